"""Searches that run in one pack, without Ray; one, or several of several tasks."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpc_dist.errors import EXIT_DONE, EXIT_STOPPED
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search import one_pack, spec, tuner
from gpc_dist.search.spec import SearchSpec
from gpc_dist.search.tuner import Start
from gpc_dist.training.stop import StopRequest
from tests.conftest import gpc, losses
from tests.holds import Hold
from tests.processes import call_on_ranks, start_on_ranks

LISTED = [{"adapter.method": "linear-probe"}, {"adapter.method": "prompt-tuning"}, {"adapter.method": "gpc"}]


def make(**others: Any) -> SearchSpec:
    tree = {"recipe": "demo", "configurations": LISTED, "seeds": [1, 2], "resources": {"pack": 6}}
    return SearchSpec.model_validate(tree | others)


def test_which_searches_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert one_pack.fits([make()])
    assert not one_pack.fits([make(resources={"pack": 5})])
    assert not one_pack.fits([make(resources={"pack": 6, "concurrent": 2})])
    assert not one_pack.fits([make(resources={"pack": 6, "gpus_per_rank": 0.5})])
    assert not one_pack.fits([make(scheduler={"name": "median"})])
    assert not one_pack.fits([make(stop={"threshold": 0.9})])
    assert not one_pack.fits([make(configurations=[{}, {"adapter.prompt_tokens": 3}])])
    assert not one_pack.fits([make(configurations=[{"adapter.method": "fine-tuning"}], seeds=[1])])
    assert not one_pack.fits([make(configurations=None, space={"train.lr": [0.1, 0.2]}, trials=2)])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert not one_pack.fits([make()])


def test_which_searches_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    one, other = (
        make(name=name, settings={"task.name": name}, resources={"pack": 12}) for name in ("a", "b")
    )
    assert tuner.groups([one, other]) == [[one, other]]
    long = make(name="c", settings={"adapter.prompt_tokens": 3}, resources={"pack": 12})
    assert tuner.groups([one, long, other]) == [[one, other], [long]]  # each in a pack, without Ray
    small = [make(name=name, resources={"pack": 6}) for name in ("a", "b")]
    assert tuner.groups(small) == [[small[0]], [small[1]]]
    large = [
        make(name=name, resources={"pack": 5}, settings=given)
        for name, given in (("a", {}), ("b", {"adapter.prompt_tokens": 3}))
    ]
    alone = [
        make(name=name, configurations=[{"adapter.method": "fine-tuning"}], seeds=[1], resources={})
        for name in ("a", "b")
    ]
    assert tuner.groups([large[0], alone[0], large[1], alone[1]]) == [large, alone]


@pytest.fixture
def search(tmp_path: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> SearchFolder:
    """A search of methods on two ranks with ZeRO-3, one of which cannot learn; without Ray."""
    tree = {
        "recipe": str(tiny_recipe),
        "settings": {"train.steps": 12, "train.eval_every": 6, "engine.zero_stage": 3},
        "configurations": [*LISTED, {"train.lr": 1e30, "train.clip_norm": None}],
        "resources": {"ranks": 2, "pack": 4},
        "tracking": {"enabled": False},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(tuner.ray_cluster, "connected", None)
    monkeypatch.setattr(one_pack.launch, "start_ranks", _forked)
    return SearchFolder(tmp_path / "searches" / "mine")


def _forked(command: Sequence[str], ranks: int) -> int:
    done = call_on_ranks(ranks, one_pack.main, command[command.index(one_pack._MODULE) + 1 :])
    print(done.stderr)
    return done.returncode


def decisions(search: SearchFolder) -> list[str]:
    return [json.loads(trial.trial.read_text())["decision"] for trial in search.begun_trials()]


@pytest.mark.slow
def test_methods_share_a_pack_and_a_trial_that_fails_fails_alone(search: SearchFolder) -> None:
    assert gpc("tune", "mine.yaml") == EXIT_DONE
    assert decisions(search) == ["completed", "completed", "completed", "failed"]
    result = json.loads(search.result.read_text())
    assert (result["trials"], result["finished"], result["failed"]) == (4, 3, 1)
    methods = []
    for trial in search.begun_trials()[:3]:
        found = json.loads(trial.result.read_text())
        assert (found["world_size"], found["zero_stage"], found["steps"]) == (2, 3, 12)
        assert found["share_s"] > 0
        methods.append(found["method"])
    assert methods == ["linear-probe", "prompt-tuning", "gpc"]
    assert "the loss was not finite" in search.begun_trials()[3].read_status().reason

    # only what failed is tried again
    before = [trial.metrics.read_bytes() for trial in search.begun_trials()[:3]]
    assert gpc("tune", search.config, "--resume") == EXIT_DONE
    assert [trial.metrics.read_bytes() for trial in search.begun_trials()[:3]] == before


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on(search: SearchFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(one_pack.launch, "start_ranks", lambda command, ranks: EXIT_STOPPED)
        assert gpc("tune", "mine.yaml", "--settings.train.steps", 30) == EXIT_STOPPED
    trial = search.trial("001")
    trial.path.mkdir(parents=True)
    hold = Hold(trial.path, 6)
    ranks = start_on_ranks(2, one_pack.main, [str(search)])
    hold.wait(lambda: ranks[0].stderr)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    hold.release()
    assert [rank.wait() for rank in ranks] == [EXIT_STOPPED, EXIT_STOPPED]
    assert json.loads((trial.path / "status.json").read_text())["state"] == "stopped"
    assert gpc("tune", search.config, "--resume") == EXIT_DONE
    assert sorted(losses(trial.path)) == list(range(1, 31))
    assert decisions(search) == ["completed", "completed", "completed", "failed"]


@pytest.mark.slow
def test_searches_of_several_tasks_share_a_pack(
    search: SearchFolder, other_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each the same trial fails, alone."""
    cats = spec.load("mine.yaml", {"resources.pack": "8"})
    task = {"task.name": "words", "task.kind": "regression", "task.label": "words"}
    own = task | {"data.path": str(other_data), "train.steps": 8, "train.eval_every": 4}
    words = cats.model_copy(update={"name": "words", "settings": cats.settings | own})
    searches, started = [cats, words], []

    def counted(command: Sequence[str], ranks: int) -> int:
        started.append(ranks)
        return _forked(command, ranks)

    monkeypatch.setattr(one_pack.launch, "start_ranks", counted)
    assert tuner.groups(searches) == [searches]
    assert tuner.run_searches([Start(each) for each in searches], ["gpc-dist"], StopRequest()) == EXIT_DONE
    assert started == [2]
    for each, metric, steps in ((cats, "accuracy", 12), (words, "pearson", 8)):
        folder = SearchFolder(each.folder)
        assert decisions(folder) == ["completed", "completed", "completed", "failed"]
        result = json.loads(folder.result.read_text())
        assert (result["metric"], result["trials"], result["finished"]) == (metric, 4, 3)
        found = [json.loads(trial.result.read_text()) for trial in folder.begun_trials()[:3]]
        assert {(one["task"], one["main_metric"], one["steps"]) for one in found} == {
            (each.settings.get("task.name", "cats"), metric, steps)
        }
    # one goes on by itself
    assert gpc("tune", SearchFolder(words.folder).config, "--resume") == EXIT_DONE
    assert len(started) == 2
