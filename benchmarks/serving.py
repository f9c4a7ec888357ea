"""One encoder with 1, 8 and 64 adapters behind `gpc-dist serve`: throughput with 99 of 100 requests answered in time,
memory, and a soak at the rated load; beside MLflow's server with an encoder for each adapter, and LoRA adapters
of PEFT in mixed batches.

    python benchmarks/serving.py --rates 10 20 40 60 80 100 --soak-s 600

Adapters of the packaged MiniLM with random weights, of classifications with two to five labels and of a regression, all
with the default method and prompt. Each request has one text of the packaged demo data, for an adapter drawn at random.
The load is open (see `serving_load.py`) and rises; all servers run, and at each rate they are measured in turn,
`--rounds` times, so that what else the machine does meets all of them. The rated load of a server is the highest rate
at which the median over the rounds of its p99 is within a limit (`--p99-ms`) and nothing else than answers came; on a
machine that does other work a second, wider limit says more.

`cpu_ms` is what the server's processes compute for a request; it depends little on other programs. Memory is `rss`,
what each process has in memory, shared pages included, and `pss`, in which pages that processes share count once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from common import machine
from process_memory import memory_of
from serving_load import Plan
from tabulate import tabulate

HERE = Path(__file__).parent
SOAK_SHARE = 0.8
"""Of the rated load, in the soak: a load that is offered at random is above its mean half of the time."""
_START_S = 180.0


@dataclass
class Side:
    """A server that is measured, or several that share a load."""

    name: str
    adapters: int
    processes: list[subprocess.Popen[Any]]
    urls: list[str]
    key: str = "rows"
    figures: list[dict[str, Any]] = field(default_factory=list)

    def memory_mib(self) -> dict[str, float]:
        found = [memory_of(process.pid) for process in self.processes]
        return {
            "rss": round(sum(each.memory_info().rss for each in self._all()) / 2**20),
            "pss": round(sum(each.pss for each in found)),
        }

    def cpu_s(self) -> float:
        times = [each.cpu_times() for each in self._all()]
        return sum(each.user + each.system for each in times)

    def _all(self) -> Iterator[psutil.Process]:
        for process in self.processes:
            root = psutil.Process(process.pid)
            yield from (root, *root.children(recursive=True))

    def measure(self, rate: float, seconds: float, seed: int, texts: list[str]) -> dict[str, Any]:
        """Offer a load from a process of its own."""
        with tempfile.TemporaryDirectory() as scratch:
            plan, result = Path(scratch, "plan.json"), Path(scratch, "result.json")
            plan.write_text(json.dumps(asdict(Plan(self.urls, self.key, rate, seconds, seed, texts))))
            before_s = self.cpu_s()
            words = [sys.executable, str(HERE / "serving_load.py"), str(plan), str(result)]
            subprocess.run(words, check=True)
            found: dict[str, Any] = json.loads(result.read_text())
        answered = found["answered_per_s"] * seconds
        cpu_ms = 1000 * (self.cpu_s() - before_s) / answered if answered else None
        return {"rate": rate, **found, "cpu_ms": cpu_ms, "load_average": os.getloadavg()[0]}


def write_adapters(folder: Path, count: int) -> list[Path]:
    """Adapters with random weights, and one more that is a head alone."""
    import torch

    from gpc_dist import config as configuration
    from gpc_dist.adapter.lane import Adapter
    from gpc_dist.adapter.store import save_adapter
    from gpc_dist.distributed.world import alone
    from gpc_dist.training.session import load_base

    base = None
    written = []
    for number in range(count + 1):
        labels = [f"label-{label}" for label in range(2 + number % 4)]
        kind = {"kind": "regression"} if number % 8 == 7 else {"labels": labels}
        tree: dict[str, Any] = {"task": {"name": f"task-{number}", "text": ["text"], **kind}}
        tree |= {"adapter": {"method": "linear-probe"}} if number == count else {}
        config = configuration.build(tree)
        base = base or load_base(config, alone(config.engine))
        adapter = Adapter(config.adapter, base.parts.shape, 1 if "kind" in kind else len(labels), number)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        values = config.dump()
        written.append(folder / f"adapter-{number}")
        save_adapter(written[-1], adapter, base.identity, {"task": values["task"], "data": values["data"]})
    return written


def demo_texts() -> list[str]:
    from gpc_dist.shipped import shipped_folder

    lines = (shipped_folder("recipes") / "demo_data" / "validation.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def start_ours(end: ExitStack, adapters: Sequence[Path], more: Sequence[str]) -> Side:
    port = free_port()
    words = [sys.executable, "-m", "gpc_dist", "serve", *map(str, adapters), "--port", str(port)]
    process = _start(end, [*words, "--engine.device", "cpu", *more], port, "/readyz")
    urls = [f"http://127.0.0.1:{port}/v1/adapters/{each.name}/predict" for each in adapters]
    return Side("gpc-dist serve", len(adapters), [process], urls)


def start_lora(end: ExitStack, head: Path, count: int) -> Side:
    port = free_port()
    words = [sys.executable, str(HERE / "serving_peft.py"), str(count), str(head), str(port)]
    process = _start(end, words, port, "/readyz")
    urls = [f"http://127.0.0.1:{port}/v1/adapters/lora-{number}/predict" for number in range(count)]
    return Side("PEFT LoRA, mixed batches", count, [process], urls)


def start_mlflow(end: ExitStack, adapters: Sequence[Path], scratch: Path) -> Side:
    """A server of MLflow's for each adapter."""
    import mlflow.pyfunc

    processes, urls = [], []
    for adapter in adapters:
        model, port = scratch / f"model-{adapter.name}", free_port()
        mlflow.pyfunc.save_model(
            model, loader_module="gpc_dist.inference.serving", data_path=str(adapter), pip_requirements=[]
        )
        words = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(model)]
        words += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
        processes.append(_start(end, words, port, "/ping"))
        urls.append(f"http://127.0.0.1:{port}/invocations")
    return Side("mlflow models serve", len(adapters), processes, urls, key="dataframe_records")


def _start(end: ExitStack, words: Sequence[str], port: int, path: str) -> subprocess.Popen[Any]:
    # MLflow looks for uvicorn there
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PATH": programs},
        start_new_session=True,
    )
    end.callback(_stop, process)
    deadline_s = time.monotonic() + _START_S
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).close()
            return process
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"{' '.join(words)} does not answer") from None
            time.sleep(0.2)


def _stop(process: subprocess.Popen[Any]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def held(side: Side, rate: float, limit_ms: float) -> bool:
    """Whether a server held a rate, by the rounds at it."""
    figures = [each for each in side.figures if each["rate"] == rate]
    p99 = [each["p99_ms"] if each["p99_ms"] is not None else float("inf") for each in figures]
    failed = any(each["others"] or each["not_sent"] for each in figures)
    return statistics.median(p99) <= limit_ms and not failed


def rise(sides: Sequence[Side], options: argparse.Namespace, texts: list[str]) -> None:
    """Measure all sides at rising rates, in turn, each until it fails."""
    going = list(sides)
    for rate in options.rates:
        for number in range(options.rounds):
            for side in going:
                side.figures.append(side.measure(rate, options.seconds, number, texts))
                _say(side, side.figures[-1])
        going = [side for side in going if held(side, rate, max(options.p99_ms))]


def rated(side: Side, limit_ms: float) -> float:
    """The highest rate that a server held; 0 if none."""
    rates = {each["rate"] for each in side.figures}
    return max((rate for rate in rates if held(side, rate, limit_ms)), default=0.0)


def soak(side: Side, options: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    """Offer a part of the rated load, by the strictest limit that was held, for long; look at the memory every half
    minute."""
    rate, period = (
        SOAK_SHARE * next(filter(None, (rated(side, each) for each in sorted(options.p99_ms)))),
        30.0,
    )
    figures, memory = [], [side.memory_mib()]
    while len(figures) * period < options.soak_s:
        figures.append(side.measure(rate, period, len(figures), texts))
        memory.append(side.memory_mib())
        _say(side, figures[-1])
    return {
        "rate": rate,
        "seconds": len(figures) * period,
        "answered": round(sum(each["answered_per_s"] for each in figures) * period),
        "not_answered": sum(sum(each["others"].values()) + each["not_sent"] for each in figures),
        "p99_ms": [each["p99_ms"] for each in figures],
        "memory_mib": memory,
    }


def _say(side: Side, found: dict[str, Any]) -> None:
    shown = {key: found[key] for key in ("rate", "answered_per_s", "p50_ms", "p99_ms", "cpu_ms", "others")}
    print(f"{side.name}, {side.adapters} adapters: {shown}", flush=True)


def described(side: Side, limits_ms: Sequence[float], memory: dict[str, float]) -> dict[str, Any]:
    last = max(each["rate"] for each in side.figures)
    busiest = [each["cpu_ms"] for each in side.figures if each["rate"] == last and each["cpu_ms"] is not None]
    return {
        "side": side.name,
        "adapters": side.adapters,
        "rated_per_s": {f"{limit:g} ms": rated(side, limit) for limit in limits_ms},
        "busiest_per_s": last,
        "busiest_cpu_ms": round(statistics.median(busiest), 2) if busiest else None,
        "memory_mib": memory,
        "memory_after_mib": side.memory_mib(),
        "figures": side.figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--mlflow", type=int, default=2, help="servers of MLflow's, each with an encoder")
    parser.add_argument("--lora", type=int, default=64)
    parser.add_argument("--rates", nargs="+", type=float, required=True, help="requests per second, rising")
    parser.add_argument("--p99-ms", nargs="+", type=float, default=[200.0], help="limits of the latency")
    parser.add_argument("--seconds", type=float, default=10.0, help="at each rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak-s", type=float, default=600.0)
    parser.add_argument("--serve", default="", help="options of gpc-dist serve, as one word")
    parser.add_argument("--note", default="", help="what to know of the machine in this run")
    parser.add_argument("--out", type=Path, default=HERE / "serving.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and so do the servers
    about = machine() | {"note": options.note, "threads": os.environ.get("OMP_NUM_THREADS")}
    texts = demo_texts()
    with tempfile.TemporaryDirectory() as place, ExitStack() as end:
        *adapters, head = write_adapters(Path(place), max(options.adapters))
        starts: list[Callable[[], Side]] = [
            lambda count=count: start_ours(end, adapters[:count], options.serve.split())  # type: ignore[misc]
            for count in options.adapters
        ]
        if options.lora:
            starts.append(lambda: start_lora(end, head, options.lora))
        if options.mlflow:
            starts.append(lambda: start_mlflow(end, adapters[: options.mlflow], Path(place)))
        sides = [start() for start in starts]
        for side in sides:  # buffers, and what is loaded on first use
            side.measure(4.0, 4.0, 99, texts)
        memory = [side.memory_mib() for side in sides]
        rise(sides, options, texts)
        found = [described(side, options.p99_ms, each) for side, each in zip(sides, memory, strict=True)]
        most = sides[len(options.adapters) - 1]
        result = {
            "machine": about,
            "settings": {key: str(value) for key, value in vars(options).items() if key != "out"},
            "sides": found,
            "soak": soak(most, options, texts)
            if options.soak_s and rated(most, max(options.p99_ms))
            else None,
        }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    rows = [
        [
            each["side"],
            each["adapters"],
            *each["rated_per_s"].values(),
            each["busiest_cpu_ms"],
            *each["memory_mib"].values(),
        ]
        for each in found
    ]
    limits = [f"per s, p99 <= {limit:g} ms" for limit in options.p99_ms]
    print(tabulate(rows, ["side", "adapters", *limits, "CPU ms", "rss MiB", "pss MiB"]))


if __name__ == "__main__":
    main()
