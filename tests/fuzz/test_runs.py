"""Folders of runs and searches, and what Slurm says: they are shown, or one line says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpc_dist import config
from gpc_dist.cluster import jobs, slurm
from gpc_dist.errors import UserError
from gpc_dist.parsing import to_yaml
from gpc_dist.reports.comparison import compare, comparison_table, summary
from gpc_dist.reports.results import results_table
from gpc_dist.runs.folder import RunFolder
from gpc_dist.runs.metrics import read_metrics
from gpc_dist.tracking.state import ExportState
from tests.fuzz.conftest import FUZZ, judged
from tests.fuzz.mutations import changed_bytes, changed_tree

STATUS = {"state": "finished", "reason": "", "host": "a", "pid": 1, "started_s": 1.0, "updated_s": 9.0}
RESULT = {
    "task": "cats",
    "method": "gpc",
    "main_metric": "accuracy",
    "metrics": {"best": {"accuracy": 0.5, "loss": 0.7}, "best_step": 4, "final": {"accuracy": 0.5}},
    "majority_baseline": {"accuracy": 0.5},
    "trainable_parameters": 10,
    "frozen_parameters": 100,
    "wall_s": 8.0,
    "world_size": 2,
    "energy_j": 3.0,
}
LINES = [
    {"step": 2, "time_s": 3.0, "train/loss": 0.7, "train/progress_pct": 50.0},
    {"step": 4, "time_s": 5.0, "val/accuracy": 0.5, "val/loss": 0.7, "train/progress_pct": 100.0},
]
FACTS = {"command": "gpc-dist train", "host": "a", "slurm_job_id": "7", "versions": {"torch": "2.13"}}
JOB = {"job_id": "8", "log": "l", "submitted_s": 1.0, "command": ["a"], "sbatch": ["b"], "code": {}}
TRACKING = {"uri": "sqlite:///a", "key": "k", "steps": {"a": 1}, "sent": {"b": "c"}}
TRIAL = {"number": 0, "seed_group": "0", "settings": {"train.lr": 0.1}, "lane": 0, "decision": "completed"}
WHOLE: dict[str, Any] = {
    "status.json": STATUS,
    "result.json": RESULT,
    "facts.json": FACTS,
    "tracking.json": TRACKING,
    "trial.json": TRIAL,
    "job/job.json": JOB,
    "metrics.jsonl": LINES,
    "config.yaml": config.load("demo").model_dump(mode="json"),
}
SEARCH_RESULT = {"metric": "accuracy", "mode": "max", "best_trial": "000", "best": 0.5, "trials": 1}

Write = Callable[[Path, dict[str, Any]], Path]


def write(folder: Path, held: dict[str, Any]) -> Path:
    for name, value in held.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".yaml"):
            text = to_yaml(value)
        elif name.endswith(".jsonl"):
            text = (
                "".join(json.dumps(line) + "\n" for line in value) if isinstance(value, list) else repr(value)
            )
        else:
            text = json.dumps(value)
        path.write_bytes(text.encode(errors="replace"))
    return folder


READERS: dict[str, Callable[[Path], Any]] = {
    "results": lambda folder: results_table([folder]),
    "compare": lambda folder: [(comparison_table(each), summary(each)) for each in compare(str(folder))],
    "jobs": lambda folder: jobs.jobs_table([folder]),
    "status": lambda folder: RunFolder(folder).read_status(),
    "tracking": lambda folder: ExportState.load(RunFolder(folder)),
    "metrics": lambda folder: read_metrics(RunFolder(folder).metrics),
}
READ = [
    ("results", "result.json"),
    *(("compare", f"{name}.json") for name in ("status", "result", "facts", "trial")),
    ("compare", "config.yaml"),
    ("compare", "metrics.jsonl"),
    *(("jobs", name) for name in ("status.json", "facts.json", "job/job.json", "metrics.jsonl")),
    ("status", "status.json"),
    ("tracking", "tracking.json"),
    ("metrics", "metrics.jsonl"),
]
"""Who reads which file."""


@pytest.fixture(scope="module")
def _slurm() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "call", lambda *_: "7|RUNNING|1:00|node01|main|None\n")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, _slurm: None) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", READERS)
def test_a_whole_folder_is_read(folder: Path, name: str) -> None:
    assert READERS[name](write(folder / "run", WHOLE)) is not None


@pytest.mark.parametrize(("name", "file"), READ)
@FUZZ
@given(data=st.data())
def test_a_file_with_other_values(folder: Path, name: str, file: str, data: st.DataObject) -> None:
    held = WHOLE | {file: data.draw(changed_tree(WHOLE[file], 3))}
    judged(lambda: READERS[name](write(folder / "run", held)))


@pytest.mark.parametrize(("name", "file"), READ)
@FUZZ
@given(data=st.data())
def test_a_file_with_other_bytes(folder: Path, name: str, file: str, data: st.DataObject) -> None:
    run = write(folder / "run", WHOLE)
    content = data.draw(changed_bytes((run / file).read_bytes()))
    (run / file).write_bytes(content)
    judged(lambda: READERS[name](run))


@pytest.mark.parametrize("name", ["compare", "jobs"])
@FUZZ
@given(data=st.data())
def test_a_search(folder: Path, name: str, data: st.DataObject) -> None:
    search = folder / "search"
    write(search / "trials" / "000", WHOLE)
    tree = {"name": "mine", "recipe": "demo", "space": {"train.lr": [1, 2]}, "metric": "accuracy"}
    held = {
        "search.yaml": tree,
        "result.json": data.draw(changed_tree(SEARCH_RESULT, 2)),
        "facts.json": FACTS,
    }
    judged(lambda: READERS[name](write(search, held | {"status.json": STATUS})))


SINFO = "main*|up|1-00:00:00|2|8+|16000+|gpu:a100:2(S:0-1),lustre:1\nspot|down|infinite|1|4|8000|(null)\n"
SQUEUE = "7|RUNNING|1:00|node01|main|None\n8_1|PENDING|0:00||main|a reason | with\nlines\n"


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (SINFO, slurm.partitions),
        (SQUEUE, lambda: slurm.jobs(["7", "8_1"])),
        ("MaxArraySize = 1001\n", slurm.largest_array),
    ],
    ids=["sinfo", "squeue", "scontrol"],
)
@FUZZ
@given(data=st.data())
def test_what_slurm_says(folder: Path, said: str, read: Callable[[], Any], data: st.DataObject) -> None:
    text = data.draw(changed_bytes(said.encode())).decode(errors="replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "call", lambda *_: text)
        judged(read)


@FUZZ
@given(text=st.one_of(st.text(max_size=20), st.from_regex(r"[0-9]{0,3}-?[0-9:,-]{0,30}", fullmatch=True)))
def test_times_and_lists_of_numbers(text: str) -> None:
    limit = judged(lambda: slurm.seconds(text))
    assert isinstance(limit, UserError | int | None)
    numbers = judged(lambda: slurm.numbers(text))
    assert numbers is None or len(numbers) <= 10**6
