"""Real searches with Ray Tune on this machine: packed and not, cut off and resumed, with trials that fail."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import signal
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
import yaml
from ray.exceptions import RayActorError

from gpc_dist import cli, files
from gpc_dist.distributed import checkpoint
from gpc_dist.errors import EXIT_STOPPED, EXIT_USAGE, MachineError
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search import ray_cluster, ray_tune, tuner
from gpc_dist.search.trial_files import recipe_of
from tests.conftest import gpc, losses
from tests.holds import Hold
from tests.processes import command, start, start_call, wait_until
from tests.rays import kill_search, refused_without_the_token, workers_in
from tests.tracking.searches import children_of, parent_of

pytestmark = pytest.mark.ray


@pytest.fixture
def place(tmp_path: Path, tiny_recipe: Path, mlflow_store: Path) -> Path:
    """The user's folder, with scripts that have names of packages: no process may import them."""
    for name in ("datasets", "mlflow", "random", "tokenizers", "yaml"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} of the user was imported')\n")
    (tmp_path / "recipe.yaml").write_text(tiny_recipe.read_text())
    (tmp_path / "searches").mkdir()
    shutil.copy(mlflow_store, tmp_path / "searches" / "mlflow.db")
    return tmp_path


WHOLE = {"pack": 4, "cpus_per_rank": os.cpu_count()}
"""Resources of a search whose only pack takes the machine."""


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
        "resources": WHOLE,
        "tracking": {"enabled": False},
    }
    path = place / "mine.yaml"
    path.write_text(yaml.safe_dump(search | keys))
    return path


def tune(place: Path, environment: dict[str, str], *words: object) -> Path:
    done = command("tune", *words, cwd=place, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "searches" / "mine"


def trials(search: Path) -> dict[int, Path]:
    return {int(path.name): path for path in sorted((search / "trials").iterdir())}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_a_packed_search(place: Path, shared_ray: dict[str, str]) -> None:
    """Of Optuna: each configuration that it draws is run with every seed."""
    path = write_search(place, algorithm="optuna", seeds=[3, 5], trials=2, tracking={"enabled": True})
    done = command("tune", path, cwd=place, **shared_ray)
    assert done.returncode == 0, done.stdout + done.stderr
    # one name and one metric for a trial, from the table to the last line
    *_, last = [line for line in done.stdout.splitlines() if line.startswith("best of 4 trials: ")]
    name, value = last.split(": ")[1].split(", accuracy ")
    assert f"best accuracy {value} by {name};" in done.stdout
    assert "4 of 4 trials ended" in done.stdout
    search = place / "searches" / "mine"
    found = trials(search)
    assert sorted(found) == [0, 1, 2, 3]
    records = [read(path / "trial.json") for path in found.values()]
    assert {record["decision"] for record in records} == {"completed"}
    assert sorted(record["lane"] for record in records) == [0, 1, 2, 3]
    groups = {record["seed_group"]: set() for record in records}
    for record, path in zip(records, found.values(), strict=True):
        groups[record["seed_group"]].add(yaml.safe_load((path / "config.yaml").read_text())["run"]["seed"])
    assert list(groups.values()) == [{3, 5}, {3, 5}]
    result = read(search / "result.json")
    assert (result["trials"], result["finished"], result["failed"]) == (4, 4, 0)
    assert read(search / "status.json")["state"] == "finished"
    best = found[int(result["best_trial"])]
    evaluated = json.loads(command("evaluate", best / "adapter").stdout)
    assert evaluated["metrics"]["accuracy"] == pytest.approx(result["best"])
    # all of it is in MLflow
    parent, children = parent_of(SearchFolder(search)), children_of(SearchFolder(search))
    assert parent.info.status == "FINISHED"
    assert set(children) == {record["trial"] for record in records}
    assert {child.info.status for child in children.values()} == {"FINISHED"}
    # a trial is the run that its configuration makes alone
    alone = ("--run.dir", place / "alone", "--tracking.enabled", "false")
    done = command("train", found[3] / "config.yaml", *alone)
    assert done.returncode == 0, done.stderr
    mine, theirs = losses(found[3]), losses(place / "alone")
    assert len(mine) == 24
    torch.testing.assert_close(list(mine.values()), list(theirs.values()), rtol=1e-3, atol=1e-5)


def test_ranks_and_more_trials_than_lanes(place: Path, shared_ray: dict[str, str]) -> None:
    """The two that learn come first, so that ASHA stops the two that cannot."""
    path = write_search(
        place,
        resources={"ranks": 2, "pack": 2},
        space={"train.lr": {"grid": [0.03, 0.02, 1e-9, 1e-10]}},
        algorithm="grid",
        trials=None,
        # a cell that does nothing: what cannot learn cannot be right by a lucky draw
        settings={
            "adapter.cell": "residual",
            "train.cell_lr": 1e-9,
            "train.steps": 40,
            "train.eval_every": 20,
            "engine.zero_stage": 3,
        },
        scheduler={"name": "asha", "grace_steps": 20, "reduction_factor": 2},
    )
    search = tune(place, shared_ray, path)
    assert most_at_once(trials(search)) == 2
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
        assert max(losses(folder)) < 40


def most_at_once(trials: dict[int, Path]) -> int:
    """Trials that were trained at the same time."""
    begun_or_ended = []
    for path in trials.values():
        times = [json.loads(line)["time_s"] for line in (path / "metrics.jsonl").open()]
        begun_or_ended += [(times[0], 1), (times[-1], -1)]
    running = itertools.accumulate(change for _, change in sorted(begun_or_ended))
    return max(running)


def test_a_search_goes_on_when_a_trial_fails_and_ends_when_patience_with_it_does(
    place: Path, shared_ray: dict[str, str]
) -> None:
    """The first trial is the best: two more are tried that do not fail, and not the other two."""
    rates = (0.03, 1e30, 1e-9, 1e-10, 1e-11, 1e-12)
    path = write_search(
        place,
        space={},
        configurations=[{"train.lr": rate, "train.cell_lr": min(rate, 1)} for rate in rates],
        trials=None,
        settings={
            "adapter.cell": "residual",
            "train.steps": 40,
            "train.eval_every": 20,
            "train.clip_norm": None,
            "train.warmup": 0,
        },
        resources=WHOLE | {"concurrent": 1},
        stop={"patience": 2},
    )
    done = command("tune", path, cwd=place, **shared_ray)
    assert done.returncode == 0, done.stderr
    assert "trial 001 failed: the loss was not finite" in done.stderr
    search = place / "searches" / "mine"
    states = [read(each / "status.json")["state"] for each in trials(search).values()]
    assert states[:4] == ["finished", "failed", "finished", "finished"]
    assert len(states) <= 5  # a trial may begin before the last one's end is known
    decisions = [read(each / "trial.json")["decision"] for each in trials(search).values()]
    assert decisions[:4] == ["completed", "failed", "completed", "completed"]
    result = read(search / "result.json")
    assert (result["best_trial"], result["failed"]) == ("000", 1)


def test_trials_of_other_shapes_go_to_another_pack(place: Path, shared_ray: dict[str, str]) -> None:
    shapes = [(4, 0.01), (4, 0.02), (6, 0.01)]
    path = write_search(
        place,
        space={},
        configurations=[{"adapter.prompt_tokens": tokens, "train.lr": rate} for tokens, rate in shapes],
        trials=None,
        settings={"train.steps": 8},
        resources={"pack": 4, "cpus_per_rank": os.cpu_count() // 2},
    )
    search = tune(place, shared_ray, path)
    records = [read(path / "trial.json") for path in trials(search).values()]
    assert {record["decision"] for record in records} == {"completed"}
    lanes = [(record["settings"]["adapter.prompt_tokens"], record["lane"]) for record in records]
    assert sorted(lanes) == [(4, 0), (4, 1), (6, 0)]


@dataclass(frozen=True)
class Planted:
    """Makes a folder when it is unpickled."""

    note: Path

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.note),)

    def write(self, folder: Path) -> None:
        """Every file that Ray Tune has ever restored a search from."""
        folder.mkdir()
        pickled = pickle.dumps(self)
        state = {"_type": "CLOUDPICKLE_FALLBACK", "value": pickled.hex()}
        whole = {"runner_data": {"x": state}, "trial_data": [], "stats": {"start_time": 0}}
        (folder / "experiment_state-2030-01-01_00-00-00.json").write_text(json.dumps(whole))
        for name in (
            "basic-variant-state-2030.json",
            "search_gen_state-2030.json",
            "searcher-state-2030.pkl",
            "tuner.pkl",
        ):
            (folder / name).write_bytes(pickled)


def test_a_search_that_is_killed_and_stopped_and_loses_its_ranks_goes_on(
    place: Path,
    shared_ray: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs nothing that somebody has put into its folder, and leaves nothing of its own Ray outside of it."""
    # evaluations are far apart: what is done between two of them is to be kept when it is stopped. No trial is stopped
    # by the scheduler before the last hold
    path = write_search(
        place,
        settings={"train.steps": 60, "train.eval_every": 20, "train.log_every": 5},
        resources=WHOLE | {"pack": 2},
        scheduler={"name": "asha", "grace_steps": 40, "reduction_factor": 2},
        retries=1,
    )
    search = place / "searches" / "mine"
    # the last trial begins after both: when the search is told to stop, the first may be anywhere
    holds = [Hold(search / "trials" / name, step) for name, step in (("000", 25), ("000", 30), ("003", 25))]
    first, second, third = holds
    driver = start("tune", path, cwd=place, **shared_ray)
    first.wait(lambda: driver.stdout + driver.stderr)
    before = {number: reached(path) for number, path in trials(search).items()}
    assert before[0] == 25
    kill_search(driver, place)
    monkeypatch.chdir(place)
    assert gpc("tune", path) == EXIT_USAGE
    assert "holds a search already: go on with it by --resume" in capsys.readouterr().err
    records = {number: read(path / "trial.json") for number, path in trials(search).items()}
    assert [record["trial"].rpartition("_")[2] for record in records.values()][:2] == ["00000", "00001"]
    planted, elsewhere = Planted(place / "ran"), tmp_path_factory.mktemp("elsewhere") / "ray"
    planted.write(elsewhere)
    (left,) = search.glob(".ray-*")  # by the one that was killed
    for link in ("ray", ".ray-linked"):
        (search / link).symlink_to(elsewhere)
    planted.write(left / "trials" / "again")
    (search / ".ray-notes").mkdir()
    (search / ".ray-notes" / "mine.txt").touch()

    # with a folder for temporary files whose path is too long for Ray's sockets, and nothing set for Ray
    home, temporary = place / "home", place / ("long" * 20)
    home.mkdir()
    temporary.mkdir()
    own = {"HOME": str(home), "TMPDIR": str(temporary), "GPC_DIST_IDLE": str(place / "idle")}
    theirs = set(Path("/tmp").glob("gpc-ray-*"))
    words = [str(search / "search.yaml"), "--resume"]
    driver = start_call(tune_and_note, words, place / "note", **own)
    second.wait(lambda: driver.stdout + driver.stderr)
    refused_without_the_token(driver.pid, place)
    driver.send_signal(signal.SIGTERM)  # which Ray would take for itself
    wait_until((place / "note").exists)
    second.release()
    assert driver.wait() == 75, driver.stdout + driver.stderr
    assert "stopped by SIGTERM; go on with" in driver.stderr
    assert not (place / "idle").exists()
    assert read(search / "status.json")["state"] == "stopped"
    for trial in trials(search).values():
        assert saved(trial) >= reached(trial)
    assert not [path for path in home.rglob("*") if "ray" in path.name or "token" in path.name]
    assert not list(temporary.iterdir())
    assert set(Path("/tmp").glob("gpc-ray-*")) <= theirs
    assert not planted.note.exists()
    assert len(list(elsewhere.iterdir())) == 5
    assert sorted(each.name for each in search.glob(".ray-*")) == [".ray-linked", ".ray-notes"]
    assert (search / ".ray-notes" / "mine.txt").exists()

    driver = start("tune", path, "--resume", cwd=place, **shared_ray)
    third.wait(lambda: driver.stdout + driver.stderr)
    (rank,) = workers_in(place, "ray::Rank")
    rank.kill()
    assert driver.wait() == 0, driver.stdout + driver.stderr
    found = trials(search)
    assert sorted(found) == [0, 1, 2, 3]
    for number, record in records.items():
        after = read(found[number] / "trial.json")
        same = ("trial", "number", "seed", "seed_group", "settings")
        assert [after[key] for key in same] == [record[key] for key in same]
    for number, step in before.items():
        assert reached(found[number]) >= step
    for path in found.values():
        lines = [json.loads(line) for line in (path / "metrics.jsonl").open()]
        for key, every in (("val/accuracy", 20), ("train/loss", 5)):
            steps = [line["step"] for line in lines if key in line]
            assert steps == list(range(every, max(steps) + 1, every))
        ended = read(path / "trial.json")["decision"], max(steps)
        assert ended in {("completed", 60), ("stopped by scheduler", 40)}
    result = read(search / "result.json")
    assert result["finished"] + result["stopped"] == 4
    assert result["finished"]
    assert result["failed"] == 0


def test_trials_left_by_another_search_are_not_taken_over(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    left = place / "searches" / "mine" / "trials" / "000" / "checkpoints"
    left.mkdir(parents=True)
    path = str(write_search(place))
    for words in ((path,), (path, "--resume")):
        assert gpc("tune", *words) == EXIT_USAGE
        said = capsys.readouterr().err
        assert "holds trials of a search whose search.yaml is gone: remove the folder" in said
    assert [each.name for each in (place / "searches" / "mine").iterdir()] == ["trials"]


def tune_and_note(words: list[str], note: Path) -> int:
    """`gpc-dist tune` that leaves a note once Ray Tune knows that it is to stop."""
    kill = os.kill

    def kill_and_note(pid: int, number: int) -> None:
        kill(pid, number)  # its own process: Python has run Tune's handler when this returns
        note.touch()

    os.kill = kill_and_note
    return cli.main(["tune", *words])


@pytest.mark.parametrize(("steps", "idle"), [((), True), ((1,), True), ((1, 5), False)])
def test_a_start_of_a_search_that_gets_nowhere_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], idle: bool
) -> None:
    """Without Ray: the states that its trials have saved when it has been stopped."""
    monkeypatch.setenv("GPC_DIST_IDLE", str(place / "note"))
    monkeypatch.chdir(place)

    def stopped_at(*given: Any) -> int:
        for number, step in enumerate(steps):
            trial = SearchFolder("searches/mine").trial(f"{number:03d}")
            for file in (trial.config, trial.trial, trial.status):
                files.write_text(file, "{}")
            checkpoint.save(trial.checkpoints, checkpoint.Checkpoint(step, {}, [], {}))
        given[-1].signal = "SIGUSR2"
        return len(steps)

    monkeypatch.setattr(ray_cluster, "connected", lambda *_: nullcontext())
    monkeypatch.setattr(ray_tune, "tune_searches", stopped_at)
    assert gpc("tune", write_search(place)) == EXIT_STOPPED
    assert (place / "note").exists() == idle


@pytest.mark.parametrize("writes", range(4))
def test_a_search_that_is_killed_as_it_opens_its_folder_has_its_recipe_when_it_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(ray_cluster, "connected", lambda *_: nullcontext())
    monkeypatch.setattr(ray_tune, "tune_searches", lambda *given: setattr(given[-1], "signal", "SIGUSR2"))
    path, search = write_search(place), SearchFolder("searches/mine")
    write_text, count = files.write_text, itertools.count()

    def write_some(file: Path, text: str) -> None:
        if next(count) == writes:
            raise SystemExit
        write_text(file, text)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", write_some)
        with pytest.raises(SystemExit):
            gpc("tune", path)
    assert gpc("tune", path, *(["--resume"] if search.config.exists() else [])) == EXIT_STOPPED
    assert recipe_of(search).exists()


def test_a_search_that_loses_what_leads_its_packs_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trial would be tried again without it, as often as it may."""
    lost = [False]

    def get(ended: list[Any]) -> None:
        if ended:
            raise RayActorError

    monkeypatch.setattr(ray, "wait", lambda waited, timeout: (waited if lost[0] else [], []))
    monkeypatch.setattr(ray, "get", get)
    packs = SimpleNamespace(closed=SimpleNamespace(remote=object))
    led = ray_tune._Led(packs, [SearchFolder(tmp_path)])
    led.on_step_begin(1, [])
    lost[0] = True
    with pytest.raises(
        MachineError, match=f"was lost: go on with gpc-dist tune {tmp_path}/search.yaml --resume"
    ):
        led.on_step_begin(2, [])


def test_a_trial_that_failed_before_it_began_is_counted(tmp_path: Path) -> None:
    folder = SearchFolder(tmp_path)
    files.write_json(folder.trial("001").trial, {"decision": "failed"})
    tuner._close(folder, "accuracy", "max", 2, 0.0)
    result = read(folder.result)
    assert (result["trials"], result["failed"]) == (2, 1)


def test_a_trial_that_was_stopped_and_could_not_be_saved_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no result, and cannot be the best one."""
    folder = SearchFolder(tmp_path)
    for name, state in (("000", "running"), ("001", "stopped")):
        files.write_json(folder.trial(name).trial, {"decision": "stopped by scheduler"})
        folder.trial(name).write_status(state)
    tuner._close(folder, "accuracy", "max", 2, 0.0)
    result = read(folder.result)
    assert (result["stopped"], result["failed"]) == (1, 1)
    assert "trial 000 was stopped, but not saved" in caplog.text


def test_a_search_of_a_version_that_did_not_write_its_goal_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(ray_cluster, "connected", lambda *_: nullcontext())
    monkeypatch.setattr(ray_tune, "tune_searches", lambda *given: setattr(given[-1], "signal", "SIGUSR2"))
    path, config = write_search(place), place / "searches" / "mine" / "search.yaml"
    assert gpc("tune", path) == EXIT_STOPPED
    written = config.read_text()
    assert "metric: accuracy" in written
    config.write_text(written.replace("metric: accuracy", "metric: null").replace("mode: max", "mode: null"))
    assert gpc("tune", path, "--resume") == EXIT_STOPPED
    assert config.read_text() == written
    config.write_text(written.replace("trials: 4", "trials: 5"))
    assert gpc("tune", path, "--resume") == EXIT_USAGE
    assert "differs from the search that is to go on" in capsys.readouterr().err


def test_population_based_training_copies_the_better(place: Path, shared_ray: dict[str, str]) -> None:
    space = {"train.lr": {"loguniform": [1e-6, 1e-1]}}
    path = write_search(
        place,
        space=space,
        trials=2,
        scheduler={"name": "pbt", "perturb_every": 8, "quantile_fraction": 0.5},
        settings={"train.steps": 48, "train.schedule": "constant", "train.eval_every": 4},
        seed=3,
    )
    search = tune(place, shared_ray, path)
    assert {max(losses(path)) for path in trials(search).values()} == {48}
    copied = [path for path in trials(search).values() if (path / "started-from").exists()]
    assert copied
    for path in trials(search).values():
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        steps = [line["step"] for line in lines if "train/loss" in line]
        # a copy of a trial that is further on leaves out the steps between
        assert steps == sorted(set(steps))


def reached(path: Path) -> int:
    return max(losses(path), default=0) if (path / "metrics.jsonl").exists() else 0


def saved(path: Path) -> int:
    """Step of a run's newest checkpoint; 0 of one that has not begun."""
    states = (path / "checkpoints").glob("step-*")
    return max((int(state.name.removeprefix("step-")) for state in states), default=0)


def test_trials_that_train_their_encoder_begin_from_a_fresh_one(
    place: Path, shared_ray: dict[str, str]
) -> None:
    """One after the other, in the room of one pack."""
    fixed = {"adapter.method": "fine-tuning", "train.steps": 4, "train.encoder_lr": 1e-2}
    path = write_search(
        place,
        settings=fixed,
        space={"train.lr": {"choice": [1e-2]}},
        trials=2,
        resources={"pack": 1, "concurrent": 1},
    )
    found = trials(tune(place, shared_ray, path))
    assert losses(found[0]) == losses(found[1])
    words = [word for key, value in fixed.items() for word in (f"--{key}", value)]
    done = command("train", place / "recipe.yaml", *words, "--run.dir", place / "alone")
    assert done.returncode == 0, done.stderr
    assert list(losses(found[1]).values()) == pytest.approx(list(losses(place / "alone").values()), rel=1e-3)
