"""Real searches with Ray Tune on this machine: packed and not, cut off and resumed, with trials that fail."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from tests.conftest import command, losses


@pytest.fixture
def place(tmp_path: Path, tiny_recipe: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(tiny_recipe.read_text())
    return tmp_path


def write_search(place: Path, **keys: Any) -> Path:
    search = {
        "recipe": "recipe.yaml",
        "settings": {"train.steps": 24},
        "space": {
            "train.lr": {"loguniform": [1e-3, 1e-1]},
            "adapter.cell": ["residual", "gated"],
            "adapter.cell_rank": {"choice": [2, 4], "when": {"adapter.cell": "gated"}},
        },
        "trials": 4,
        "resources": {"pack": 4},
    }
    path = place / "mine.yaml"
    path.write_text(yaml.safe_dump(search | keys))
    return path


def tune(place: Path, *words: object) -> Path:
    done = command("tune", *words, cwd=place, PYTHONPATH=str(Path(__file__).parents[2]))
    assert done.returncode == 0, done.stdout + done.stderr
    (place / "said").write_text(done.stdout)
    return place / "searches" / "mine"


def trials(search: Path) -> dict[int, Path]:
    return {int(path.name): path for path in sorted((search / "trials").iterdir())}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_a_packed_search(place: Path) -> None:
    # one pack takes the whole machine: trials spread over all packs there is room for
    whole = {"pack": 4, "cpus_per_rank": os.cpu_count()}
    search = tune(place, write_search(place, seeds=[0, 1], trials=2, resources=whole))
    found = trials(search)
    assert sorted(found) == [0, 1, 2, 3]
    records = [read(path / "trial.json") for path in found.values()]
    assert {record["decision"] for record in records} == {"completed"}
    assert sorted(record["lane"] for record in records) == [0, 1, 2, 3]
    groups = {record["seed_group"]: set() for record in records}
    for record, path in zip(records, found.values(), strict=True):
        groups[record["seed_group"]].add(yaml.safe_load((path / "config.yaml").read_text())["run"]["seed"])
    assert sorted(map(sorted, groups.values())) == [[0, 1], [0, 1]]
    result = read(search / "result.json")
    assert (result["trials"], result["finished"], result["failed"]) == (4, 4, 0)
    assert read(search / "status.json")["state"] == "finished"
    best = found[int(result["best_trial"])]
    evaluated = json.loads(command("evaluate", best / "adapter").stdout)
    assert evaluated["metrics"]["accuracy"] == pytest.approx(result["best"])
    # a trial is the run that its configuration makes alone
    done = command("train", found[3] / "config.yaml", "--run.dir", place / "alone")
    assert done.returncode == 0, done.stderr
    mine, theirs = losses(found[3]), losses(place / "alone")
    assert len(mine) == 24
    torch.testing.assert_close(list(mine.values()), list(theirs.values()), rtol=1e-3, atol=1e-5)


def test_ranks_and_more_trials_than_lanes(place: Path) -> None:
    """The two that learn come first, so that ASHA stops the two that cannot."""
    path = write_search(
        place,
        resources={"ranks": 2, "pack": 2},
        space={},
        configurations=[{"train.lr": rate, "train.cell_lr": rate} for rate in (0.03, 0.02, 1e-9, 1e-10)],
        trials=None,
        # a cell that does nothing at the start: what cannot learn cannot be right by a lucky draw
        settings={
            "adapter.cell": "residual",
            "train.steps": 60,
            "train.eval_every": 20,
            "engine.zero_stage": 3,
        },
        scheduler={"name": "asha", "grace_steps": 20, "reduction_factor": 2},
    )
    search = tune(place, path)
    running = set(map(int, re.findall(r"(\d+) RUNNING", (place / "said").read_text())))
    assert running <= {1, 2}
    assert running
    results = [read(path / "result.json") for path in trials(search).values()]
    assert len(results) == 4
    assert {(result["world_size"], result["zero_stage"]) for result in results} == {(2, 3)}
    ends = {number: read(path / "trial.json")["decision"] for number, path in trials(search).items()}
    assert "completed" in (ends[0], ends[1])
    stopped = [number for number, decision in ends.items() if decision == "stopped by scheduler"]
    assert stopped[-2:] == [2, 3]
    assert read(search / "result.json")["stopped"] == len(stopped)
    for number in stopped:
        folder = trials(search)[number]
        assert read(folder / "status.json")["state"] == "stopped"
        assert max(losses(folder)) < 60


def test_trials_of_other_shapes_go_to_another_pack(place: Path) -> None:
    space = {"adapter.prompt_tokens": {"grid": [4, 6]}, "train.lr": {"grid": [0.01, 0.02]}}
    path = write_search(place, space=space, algorithm="grid", trials=None, settings={"train.steps": 8})
    search = tune(place, path)
    records = [read(path / "trial.json") for path in trials(search).values()]
    assert {record["decision"] for record in records} == {"completed"}
    lanes = [(record["settings"]["adapter.prompt_tokens"], record["lane"]) for record in records]
    assert sorted(lanes) == [(4, 0), (4, 1), (6, 0), (6, 1)]


def test_a_search_that_was_killed_goes_on(place: Path) -> None:
    path = write_search(
        place,
        settings={"train.steps": 1600, "train.eval_every": 100, "train.log_every": 100},
        resources={"pack": 2},
        scheduler={"name": "asha", "grace_steps": 200, "reduction_factor": 2},
    )
    driver = start(place, path)
    search = place / "searches" / "mine"
    wait(
        lambda: (
            sum(reached(p) >= 300 for p in trials(search).values()) >= 1
            if (search / "trials").exists()
            else False
        )
    )
    before = {number: reached(path) for number, path in trials(search).items()}
    driver.kill()
    driver.wait()
    wait(
        lambda: (
            not [
                p
                for p in psutil.process_iter(["cmdline"])
                if str(search) in " ".join(p.info["cmdline"] or [])
            ]
        )
    )
    done = command("tune", path, cwd=place)
    assert done.returncode == 2
    assert "holds a search already: go on with it by --resume" in done.stderr
    tune(place, path, "--resume")
    found = trials(search)
    assert sorted(found) == [0, 1, 2, 3]
    for number, step in before.items():
        assert reached(found[number]) >= step
    for path in found.values():
        steps = [
            line["step"]
            for line in map(json.loads, (path / "metrics.jsonl").open())
            if "val/accuracy" in line
        ]
        assert steps == list(range(100, max(steps) + 1, 100))
    result = read(search / "result.json")
    assert result["finished"] + result["stopped"] == 4
    assert result["failed"] == 0


def test_trials_left_by_another_search_are_not_taken_over(place: Path) -> None:
    left = place / "searches" / "mine" / "trials" / "000" / "checkpoints"
    left.mkdir(parents=True)
    path = write_search(place)
    for words in ((path,), (path, "--resume")):
        done = command("tune", *words, cwd=place, PYTHONPATH=str(Path(__file__).parents[2]))
        assert done.returncode == 2
        assert "holds trials of a search whose search.yaml is gone: remove the folder" in done.stderr
    assert [each.name for each in (place / "searches" / "mine").iterdir()] == ["trials"]


def test_a_stopped_search_goes_on(place: Path) -> None:
    # evaluations are far apart: what is done between two of them is to be kept
    path = write_search(place, settings={"train.steps": 600, "train.eval_every": 300, "train.log_every": 25})
    driver = start(place, path)
    search = place / "searches" / "mine"
    wait(lambda: (search / "trials").exists() and any(reached(p) >= 100 for p in trials(search).values()))
    driver.send_signal(signal.SIGTERM)  # which Ray would take for itself
    out, said = driver.communicate(timeout=120)
    assert driver.returncode == 75, out + said
    assert "stopped by SIGTERM; go on with" in said
    assert read(search / "status.json")["state"] == "stopped"
    for trial in trials(search).values():
        assert saved(trial) >= reached(trial)
    tune(place, search / "search.yaml", "--resume")
    assert {max(losses(path)) for path in trials(search).values()} == {600}


def test_a_trial_whose_ranks_die_is_tried_again(place: Path) -> None:
    path = write_search(
        place,
        settings={"train.steps": 1200, "train.eval_every": 100, "train.log_every": 100},
        trials=1,
        resources={},
        retries=1,
    )
    driver = start(place, path)
    search = place / "searches" / "mine"
    wait(lambda: (search / "trials" / "000").exists() and reached(search / "trials" / "000") >= 300)
    for process in psutil.Process(driver.pid).children(recursive=True):
        if "ray::Rank" in " ".join(process.cmdline()):
            process.kill()
    out, said = driver.communicate(timeout=200)
    assert driver.returncode == 0, out + said
    assert max(losses(search / "trials" / "000")) == 1200
    assert read(search / "trials" / "000" / "trial.json")["decision"] == "completed"


def test_a_trial_that_fails_does_not_end_the_search(place: Path) -> None:
    space = {"train.lr": {"grid": [0.01, 1e30]}}
    settings = {"train.steps": 24, "train.clip_norm": None, "train.warmup": 0}
    path = write_search(place, space=space, algorithm="grid", trials=None, settings=settings)
    done = command("tune", path, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "trial 001 failed: the loss was not finite" in done.stdout
    search = place / "searches" / "mine"
    decisions = {
        yaml.safe_load((path / "config.yaml").read_text())["train"]["lr"]: read(path / "trial.json")[
            "decision"
        ]
        for path in trials(search).values()
    }
    assert decisions == {0.01: "completed", 1e30: "failed"}
    assert read(search / "result.json")["failed"] == 1


def test_population_based_training_copies_the_better(place: Path) -> None:
    space = {"train.lr": {"loguniform": [1e-6, 1e-1]}}
    path = write_search(
        place,
        space=space,
        scheduler={"name": "pbt", "perturb_every": 8, "quantile_fraction": 0.5},
        settings={"train.steps": 48, "train.schedule": "constant", "train.eval_every": 4},
        seed=3,
    )
    search = tune(place, path)
    assert {max(losses(path)) for path in trials(search).values()} == {48}
    copied = [path for path in trials(search).values() if (path / "started-from").exists()]
    assert copied
    for path in trials(search).values():
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        steps = [line["step"] for line in lines if "train/loss" in line]
        # a copy of a trial that is further on leaves out the steps between
        assert steps == sorted(set(steps))


def start(place: Path, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gpc_dist", "tune", str(path)],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )


def reached(path: Path) -> int:
    return max(losses(path), default=0) if (path / "metrics.jsonl").exists() else 0


def saved(path: Path) -> int:
    """Step of a run's newest checkpoint."""
    return max(int(state.name.removeprefix("step-")) for state in (path / "checkpoints").glob("step-*"))


def wait(ready: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_trials_that_train_their_encoder_begin_from_a_fresh_one(place: Path) -> None:
    """One after the other, in the room of one pack."""
    fixed = {"adapter.method": "fine-tuning", "train.steps": 4, "train.encoder_lr": 1e-2}
    path = write_search(
        place,
        settings=fixed,
        space={"train.lr": {"choice": [1e-2]}},
        trials=2,
        resources={"pack": 1, "concurrent": 1},
    )
    found = trials(tune(place, path))
    assert losses(found[0]) == losses(found[1])
    words = [word for key, value in fixed.items() for word in (f"--{key}", value)]
    done = command("train", place / "recipe.yaml", *words, "--run.dir", place / "alone")
    assert done.returncode == 0, done.stderr
    assert list(losses(found[1]).values()) == pytest.approx(list(losses(place / "alone").values()), rel=1e-3)
