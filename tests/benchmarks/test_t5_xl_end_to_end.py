"""The end-to-end benchmark on the smallest T5 shape: each phase runs, is measured, and goes on from the one before."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.holds import Hold
from tests.processes import start_launcher

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEPS, STOP_AFTER = 4, 2


class Forked:
    """What the script uses of `subprocess.Popen`, for a command that is forked instead of started from nothing. The run
    that is to be stopped waits for it."""

    def __init__(self, words: list[str]):
        if words[0] == "train" and (run := Path(words[words.index("--run.dir") + 1])).name == "run":
            Hold(run, STOP_AFTER)
        self._started = start_launcher(*words)
        self.pid, self.send_signal = self._started.pid, self._started.send_signal

    @property
    def returncode(self) -> int | None:
        return self._started.returncode

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        return self._started.stdout, self._started.stderr


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with an RTE of a few rows."""
    folder = tmp_path / "SuperGLUE" / "RTE"
    folder.mkdir(parents=True)
    rows = [
        {"premise": "A dog runs. " * (1 + n % 3), "hypothesis": "A dog sleeps.", "idx": n}
        | {"label": ("entailment", "not_entailment")[n % 2]}
        for n in range(20)
    ]
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder.parent


@pytest.mark.slow
def test_each_phase_is_measured_and_goes_on_from_the_one_before(
    tmp_path: Path, data: Path, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import t5_xl_end_to_end as script

    monkeypatch.setattr(script, "start", Forked)
    store, out, scratch = tmp_path / "mlflow.db", tmp_path / "found.json", tmp_path / "scratch"
    shutil.copy(mlflow_store, store)
    scratch.mkdir()
    words = [
        "--data",
        data,
        "--dir",
        scratch,
        "--shapes",
        "t5-v1_1-small",
        "--dtype",
        "fp32",
        "--undisturbed",
    ]
    words += ["--steps", STEPS, "--stop-after", STOP_AFTER, "--max-length", 16, "--prompt-tokens", 4]
    words += ["--eval-rows", 4, "--reuse-distance", 10**7, "--out", out]
    words += ["--tracking-uri", f"sqlite:///{store}"]
    monkeypatch.setattr(sys, "argv", ["t5_xl_end_to_end.py", *map(str, words)])
    script.main()
    (run,) = json.loads(out.read_text())["runs"]
    phases = run["phases"]
    assert [phase["ranks"] for phase in phases.values()] == [2, 1, 2, 1, 2]
    stopped = run["stopped_after"]
    assert STOP_AFTER <= stopped <= STOP_AFTER + 1
    assert [phases[name]["steps"] for name in ("train, stopped", "resume")] == [stopped, STEPS - stopped]
    assert len(run["losses"]) == STEPS
    apart = run["largest_relative_difference"]
    assert apart["before_the_stop"] == 0
    assert apart["after_it"] < 1e-4
    for phase in phases.values():
        assert phase["peak_pss_mib"] > phase["peak_own_mib"] > 0
        assert phase["samples"] > 1
    assert run["evaluated"]["examples"] == 4
    assert list(scratch.iterdir()) == []


def test_memory_that_processes_share_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from process_memory import memory_of

    mib = 2**20
    (tmp_path / "mapped").write_bytes(b"x" * 32 * mib)
    program = f"""
import mmap, os
held = b"x" * {64 * mib}
mapped = mmap.mmap(os.open("mapped", os.O_RDONLY), 0, prot=mmap.PROT_READ)
if os.fork():
    os.wait()
else:
    mapped[:].count(b"x")
    print("ready", flush=True)
    input()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    found = memory_of(parent.pid)
    parent.communicate("\n")
    assert 64 <= found.own < 2 * 64
    assert 32 <= found.pss - found.own < 64
    assert memory_of(parent.pid).pss == 0


def test_a_step_that_was_made_twice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from t5_xl_end_to_end import check_steps

    check_steps("the log", [1, 2, 3], 3)
    for steps in ([1, 2, 2, 3], [1, 3], [1, 2]):
        with pytest.raises(SystemExit, match="the log holds steps"):
            check_steps("the log", steps, 3)
