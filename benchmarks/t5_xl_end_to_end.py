"""An encoder of T5-XL's size (1.2 B parameters) from its checkpoint to a record in MLflow, on CPU ranks.

    python benchmarks/t5_xl_end_to_end.py --data SuperGLUE --undisturbed
    python benchmarks/t5_xl_end_to_end.py --data SuperGLUE --one-step --shapes t5-v1_1-xxl --out t5_xxl_one_step.json

Writes a checkpoint of the shape with random weights, and gives the commands of a user, with the recipe `t5-xl` on RTE:
trains at ZeRO stage 3 on 2 ranks, stops the run with SIGTERM after step `--stop-after`, resumes it on 1 rank, evaluates
its adapter at stage 3 on 2 ranks, and exports the run to MLflow. It is an error if a step is missing or was made
twice, in the run's log or in MLflow. `--undisturbed` makes the run again without a stop and compares the losses.
`--one-step` trains one step on 2 ranks and nothing else.

Printed and kept in a JSON file: of each phase the seconds from the start of its command to its end, and the peak memory
of all its processes together, sampled every few seconds or more often (`process_memory.Memory`): as PSS, and without
the pages of mapped files, which are libraries and the table of token embeddings. Shards are read into memory of their
own, so both figures have them; what the system keeps of the checkpoint's files in its cache is in neither. The
checkpoint (2.4 GB for T5-XL, 9.5 GB for T5-XXL; as much memory is needed to write it) and the runs lie in a new folder
in `--dir`, which is removed at the end.

Beside its shard a rank holds the layers that DeepSpeed keeps gathered (docs/planner.md, memory): with a smaller
`--reuse-distance` fewer of them, which are gathered again for the backward pass.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import machine
from process_memory import Memory, memory_of
from sides import write_encoder, write_tokenizer
from tabulate import tabulate

from gpc_dist.errors import EXIT_DONE, EXIT_STOPPED
from gpc_dist.runs.folder import RunFolder
from gpc_dist.runs.metrics import read_metrics
from gpc_dist.shipped import shipped_folder

RANKS = 2
POLL_S = 0.1
SAMPLING_SHARE = 0.05
"""Of the time of a core that sampling memory may take: for processes of 8 GiB a sample takes 0.1 s."""
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def start(words: list[str]) -> subprocess.Popen[str]:
    """Start `gpc-dist`; what it says of progress and errors goes to the terminal."""
    return subprocess.Popen([sys.executable, "-m", "gpc_dist", *words], stdout=subprocess.PIPE, text=True)


def measure(
    words: list[str], stop_due: Callable[[], bool] | None = None
) -> tuple[dict[str, float | int], str]:
    """Run a command of `gpc-dist`; returns its figures and what it printed.

    Args:
        stop_due: tells when to send SIGTERM, after which the command must end as a stopped run does.
    """
    expected = EXIT_STOPPED if stop_due else EXIT_DONE
    peak, samples, start_s = Memory(), 0, time.perf_counter()
    process, next_s = start(words), start_s
    while process.poll() is None:
        if time.perf_counter() >= next_s:
            before_s = time.process_time()
            peak, samples = peak.peak(memory_of(process.pid)), samples + 1
            next_s = time.perf_counter() + (time.process_time() - before_s) / SAMPLING_SHARE
        if stop_due and stop_due():
            process.send_signal(signal.SIGTERM)
            stop_due = None
        time.sleep(POLL_S)
    seconds = time.perf_counter() - start_s
    printed, _ = process.communicate()
    if process.returncode != expected:
        command = " ".join(["gpc-dist", *words])
        raise SystemExit(f"exit code {process.returncode} instead of {expected}: {command}")
    figures = {"seconds": seconds, "peak_pss_mib": peak.pss, "peak_own_mib": peak.own, "samples": samples}
    return figures, printed


class Job:
    """One shape's checkpoint, the run that is trained on it, and the phases measured so far.

    Args:
        scratch: an empty folder.
    """

    def __init__(self, shape: str, options: argparse.Namespace, scratch: Path):
        self._options, self._scratch, self._encoder = options, scratch, scratch / "encoder"
        start_s = time.perf_counter()
        write_encoder(shape, DTYPES[options.dtype], self._encoder)
        write_tokenizer(self._encoder)
        weights = sum(file.stat().st_size for file in self._encoder.glob("*.safetensors"))
        self.report: dict[str, Any] = {
            "shape": shape,
            "checkpoint_mib": weights / 2**20,
            "write_s": time.perf_counter() - start_s,
            "phases": {},
        }
        self._regime = {}
        if distance := options.reuse_distance:
            regime = json.loads((shipped_folder("ds_configs") / "zero3.json").read_text())
            for key in ("stage3_max_reuse_distance", "stage3_max_live_parameters"):
                regime["zero_optimization"][key] = distance
            (scratch / "regime.json").write_text(json.dumps(regime))
            self._regime = {"engine.ds_config": scratch / "regime.json"}

    def one_step(self) -> None:
        """Load the encoder, train a step, and evaluate its adapter."""
        self._train("one step", RunFolder(self._scratch / "run"), RANKS, 1)

    def end_to_end(self) -> None:
        """All phases of the module's docstring."""
        options, run = self._options, RunFolder(self._scratch / "run")

        def stop_due() -> bool:
            return len(steps_of(run)) >= options.stop_after

        self._train("train, stopped", run, RANKS, options.steps, stop_due)
        self.report["stopped_after"] = stopped = len(steps_of(run))
        if stopped == options.steps:
            raise SystemExit("the run had made all its steps before it was stopped: give more --steps")
        self.report["training_state_mib"] = _mib(max(run.checkpoints.iterdir()))
        self._train("resume", run, 1, options.steps)
        check_steps(str(run.metrics), [line["step"] for line in steps_of(run)], options.steps)
        self.report["losses"] = resumed = [line["train/loss"] for line in steps_of(run)]
        self.report["adapter_mib"] = _mib(run.adapter)

        engine = {"engine.zero_stage": 3, "engine.ranks": RANKS} | self._regime
        printed = self._phase("evaluate", RANKS, ["evaluate", str(run.adapter), *words_of(engine)])
        self.report["evaluated"] = json.loads(printed)

        store = options.tracking_uri or f"sqlite:///{self._scratch / 'mlflow.db'}"
        self._phase("export", 1, ["sync", str(run), "--uri", store])
        check_steps(store, recorded_steps(run, store), options.steps)

        if options.undisturbed:
            other = RunFolder(self._scratch / "undisturbed")
            self._train("undisturbed", other, RANKS, options.steps)
            self.report["undisturbed_losses"] = expected = [line["train/loss"] for line in steps_of(other)]
            apart = [abs(found / loss - 1) for found, loss in zip(resumed, expected, strict=True)]
            self.report["largest_relative_difference"] = {
                "before_the_stop": max(apart[:stopped]),
                "after_it": max(apart[stopped:]),
            }

    def _train(
        self, phase: str, run: RunFolder, ranks: int, steps: int, stop_due: Callable[[], bool] | None = None
    ) -> None:
        options, begun = self._options, len(steps_of(run))
        settings = {
            "run.dir": run,
            "encoder.path": self._encoder,
            "task.name": "rte",
            "data.path": options.data / "RTE",
            "data.config": "rte",
            "data.max_length": options.max_length,
            "data.limit_eval": options.eval_rows,
            "adapter.prompt_tokens": options.prompt_tokens,
            "train.batch_size": options.batch_size,
            "train.steps": steps,
            "train.log_every": 1,
            "engine.device": "cpu",
            "engine.dtype": options.dtype,
            "engine.ranks": ranks,
            "tracking.enabled": "false",  # the export is a phase of its own
        }
        self._phase(phase, ranks, ["train", "t5-xl", *words_of(settings | self._regime)], stop_due)
        figures = self.report["phases"][phase]
        ends = [line["time_s"] for line in steps_of(run)[begun:]]
        figures["steps"] = len(ends)
        if len(ends) > 1:
            figures["step_s"] = statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))
        if stop_due is None:  # a stopped run has no result yet
            result = json.loads(run.result.read_text())
            self.report["frozen_parameters"] = result["frozen_parameters"]
            self.report["trainable_parameters"] = result["trainable_parameters"]
            figures["load_s"] = result["load_s"]
            figures["peak_resident_mib_of_ranks"] = result["peak_memory_mib"]

    def _phase(
        self, phase: str, ranks: int, words: list[str], stop_due: Callable[[], bool] | None = None
    ) -> str:
        """Measure a command; returns what it printed."""
        print(f"{self.report['shape']}: {phase}", file=sys.stderr)
        figures, printed = measure(words, stop_due)
        self.report["phases"][phase] = {"ranks": ranks, **figures}
        return printed


def words_of(settings: dict[str, Any]) -> list[str]:
    """Keys of the configuration, as the command line takes them."""
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def steps_of(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of the steps in the log of a run, which may be going on."""
    return [line for line in read_metrics(run.metrics) if "train/loss" in line]


def recorded_steps(run: RunFolder, store: str) -> list[int]:
    """The steps whose training loss MLflow holds of a run."""
    from mlflow import MlflowClient

    from gpc_dist.tracking.state import ExportState

    run_id = ExportState.load(run).run_id
    assert run_id is not None
    return sorted(metric.step for metric in MlflowClient(store).get_metric_history(run_id, "train/loss"))


def check_steps(place: str, steps: list[int], expected: int) -> None:
    """End the program unless each step from 1 to `expected` is there once."""
    if steps != list(range(1, expected + 1)):
        raise SystemExit(f"{place} holds steps {steps} instead of each from 1 to {expected} once")


def _mib(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


def table(run: dict[str, Any]) -> str:
    rows = [
        [phase, found["ranks"], found["seconds"], found.get("load_s"), found.get("step_s")]
        + [found["peak_pss_mib"] / 1024, found["peak_own_mib"] / 1024]
        for phase, found in run["phases"].items()
    ]
    headers = [run["shape"], "ranks", "s", "of them loading", "s a step", "peak PSS GiB", "without files"]
    return tabulate(rows, headers=headers, floatfmt=".1f")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with SuperGLUE's RTE folder")
    parser.add_argument("--shapes", nargs="+", default=["t5-v1_1-xl"])
    parser.add_argument("--one-step", action="store_true", help="on 2 ranks, and no other phase")
    parser.add_argument("--undisturbed", action="store_true", help="compare with a run that is not stopped")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--stop-after", type=int, default=5, help="step; the next one may be made, too")
    parser.add_argument("--batch-size", type=int, default=4, help="examples per step, all ranks")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--eval-rows", type=int, default=16)
    parser.add_argument("--reuse-distance", type=int, help="parameters [that of the packaged regime]")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--tracking-uri", help="MLflow store [a new one, removed at the end]")
    parser.add_argument("--dir", type=Path, help="where to write [the system's folder for temporary files]")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    left_out = ("data", "dir", "tracking_uri", "out")
    settings = {key: value for key, value in vars(options).items() if key not in left_out}
    report: dict[str, Any] = {"machine": machine(), "settings": settings, "runs": []}
    for shape in options.shapes:
        with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
            job = Job(shape, options, Path(scratch))
            report["runs"].append(job.report)
            try:
                if options.one_step:
                    job.one_step()
                else:
                    job.end_to_end()
            finally:  # a phase that fails does not take with it what the others took minutes to find
                options.out.write_text(json.dumps(report, indent=2) + "\n")
                print(table(job.report))


if __name__ == "__main__":
    main()
