"""Checkpoints that were cut off, damaged, or changed by somebody: each is refused in one line that names the remedy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpc_dist import config
from gpc_dist.distributed import checkpoint
from gpc_dist.distributed.world import World
from gpc_dist.errors import EXIT_USAGE, UserError
from gpc_dist.files import sha256
from gpc_dist.tensors import stream
from gpc_dist.training.state import saved_state
from tests.conftest import gpc

ALONE = World(0, 1, 0, torch.device("cpu"))


def damaged(run: Path, folder: Path, name: str) -> Path:
    shutil.copytree(run, folder)
    newest = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    path = newest / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["trained.safetensors", "rng.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_with_its_remedy(
    run: Path, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = damaged(run, tmp_path / "run", name)
    assert gpc("train", tiny_recipe, "--run.dir", folder, "--train.steps", 14) == EXIT_USAGE
    said = capsys.readouterr().err
    assert f"{name} changed after it was written" in said
    assert "delete this folder" in said


def test_an_interrupted_save_leaves_the_previous_checkpoint(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    before = checkpoint.newest(folder)
    assert before is not None
    saved = checkpoint.load(before)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sha256", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, checkpoint.Checkpoint(99, saved.tensors, saved.rng, saved.state))
    monkeypatch.undo()
    assert checkpoint.newest(folder) == before
    assert checkpoint.load(before).tensors.keys() == saved.tensors.keys()
    assert not list(folder.glob("*99*"))


def save_in_parts(folder: Path, step: int) -> Path:
    """A checkpoint of one rank, in the form of those that have a file for each."""
    part = stream({"param/x": torch.arange(3.0), "step": torch.tensor(2.0)})
    found = checkpoint.Checkpoint(step, {}, [checkpoint.rng_state()], {"position": None})
    checkpoint.save_parts(folder, found, part, ALONE)
    return folder / found.name


def test_a_checkpoint_in_parts_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_in_parts(tmp_path, 4)
    name = "trained-00000-of-00001.safetensors"
    assert {file.name for file in path.iterdir()} == {name, "rng.safetensors", "state.json", "COMPLETE"}
    saved = checkpoint.load(path)
    (part,) = saved.parts()
    assert torch.equal(part["param/x"].loaded(), torch.arange(3.0))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sha256", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_in_parts(tmp_path, 5)
    monkeypatch.undo()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1] + b"\1")
    with pytest.raises(UserError, match=f"{name} changed after it was written"):
        checkpoint.load(path)
    # each of several processes verifies its share
    assert checkpoint.load(path, rank=1, ranks=2).part_files == [path / name]


def test_a_run_that_has_nothing_to_save_keeps_no_more_checkpoints_than_it_is_to(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    """As when the last save was cut off before what is too many was removed."""
    train = ("train", tiny_recipe, "--run.dir", tmp_path / "run", "--train.keep_last")
    assert gpc(*train, 9) == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    assert len(list(checkpoints.iterdir())) == 3
    assert gpc(*train, 1) == 0
    best = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["best_step"]
    assert {checkpoint.step_of(path) for path in checkpoints.iterdir()} == {12, best}


def test_a_checkpoint_that_is_moved_before_its_marker_is_not_marked_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, moved = tmp_path / "run" / "checkpoints", tmp_path / "moved"
    complete_with = checkpoint._complete_with

    def move_and_complete(path: Path, digests: dict[str, str]) -> None:
        folder.parent.rename(moved)
        complete_with(path, digests)

    monkeypatch.setattr(checkpoint, "_complete_with", move_and_complete)
    with pytest.raises(FileNotFoundError):
        checkpoint.save(folder, checkpoint.Checkpoint(4, {"a": torch.ones(2)}, [checkpoint.rng_state()], {}))
    assert not folder.parent.exists()
    assert checkpoint.newest(moved / "checkpoints") is None


def test_a_checkpoint_in_parts_is_copied_and_removed_with_all_its_files(tmp_path: Path) -> None:
    saved = checkpoint.load(save_in_parts(tmp_path / "one", 4))
    save_in_parts(tmp_path / "two", 9)
    checkpoint.replace_all(tmp_path / "two", saved)
    (copied,) = (tmp_path / "two").iterdir()
    assert copied.name == "step-00000004"
    assert torch.equal(checkpoint.load(copied).parts()[0]["param/x"].loaded(), torch.arange(3.0))
    for step in (5, 6):
        save_in_parts(tmp_path / "one", step)
    (tmp_path / "one" / ".step-00000007.new-0").mkdir()  # what a killed save leaves
    (tmp_path / "one" / ".step-00000007.new-0" / "trained-00003-of-00004.safetensors").touch()
    checkpoint.prune(tmp_path / "one", keep_last=1, best_step=None)
    assert [each.name for each in (tmp_path / "one").iterdir()] == ["step-00000006"]


def test_a_state_of_other_data_or_of_another_format_is_refused_by_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    saved = checkpoint.load(newest)
    settings = config.load(str(run / "config.yaml"))
    checkpoint.save(tmp_path, saved)
    found = saved_state(tmp_path, settings, ALONE)
    assert found is not None
    assert found.step == saved.step
    other = settings.model_copy(update={"data": settings.data.model_copy(update={"holdout": 0.1})})
    with pytest.raises(UserError, match="belongs to a run with another data:"):
        saved_state(tmp_path, other, ALONE)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        checkpoint.save(tmp_path, saved)
    with pytest.raises(
        UserError, match=f"has format {checkpoint.FORMAT + 1}; this version reads {checkpoint.FORMAT}"
    ):
        saved_state(tmp_path, settings, ALONE)


def test_a_state_of_a_version_without_some_keys_is_read(run: Path, tmp_path: Path) -> None:
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    saved = checkpoint.load(newest)
    for key in ("init_from", "prompt_mlp"):
        del saved.state["identity"]["adapter"][key]
    del saved.state["position"]["origin"]
    checkpoint.save(tmp_path, saved)
    settings = config.load(str(run / "config.yaml"))
    assert saved_state(tmp_path, settings, ALONE) is not None
    other = settings.adapter.model_copy(update={"prompt_mlp": 4})
    with pytest.raises(UserError, match="belongs to a run with another adapter:"):
        saved_state(tmp_path, settings.model_copy(update={"adapter": other}), ALONE)


def resealed(folder: Path, change: Callable[[Path], Any]) -> Path:
    """Change a checkpoint and write its checksums again, as somebody does who hands it over."""
    change(folder)
    sums = {name: sha256(folder / name) for name in ("trained.safetensors", "rng.safetensors", "state.json")}
    (folder / "COMPLETE").write_text(json.dumps(sums))
    return folder


def state_with(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        for key, value in changes.items():
            section, _, inner = key.partition("__")
            if inner:
                state[section][inner] = value
            else:
                state[section] = value
        (folder / "state.json").write_text(json.dumps(state))

    return change


def tensors_with(
    change: Callable[[dict[str, Any]], Any], file: str = "trained.safetensors"
) -> Callable[[Path], Any]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return rewrite


def narrower(tensors: dict[str, Any]) -> None:
    """A shape that would be broadcast."""
    tensors["param/prompt.start"] = tensors["param/prompt.start"][:1].clone()


def narrower_moment(tensors: dict[str, Any]) -> None:
    tensors["state/prompt.start/exp_avg"] = tensors["state/prompt.start/exp_avg"][:1].clone()


WRONG = {
    "state that is a list": (
        lambda f: (f / "state.json").write_text("[]"),
        "state.json holds no JSON object",
    ),
    "state of brackets": (lambda f: (f / "state.json").write_text("[" * 100_000), "nested too deeply"),
    "step that is a text": (state_with(step="10"), "step '10'"),
    "step below 0": (state_with(step=-1), "step -1"),
    "another step": (state_with(position__step=3), "its position is step 3"),
    "no position": (state_with(position=None), "step-00000012 is damaged"),
    "best that is a list": (state_with(position__best=[1]), "best: input should be a valid dictionary"),
    "unknown position": (state_with(position__more=1), "more"),
    "identity that is a list": (state_with(identity=[1]), "its state names no run"),
    "narrower": (tensors_with(narrower), r"'param/prompt\.start' has shape \[1, 32\], not \[4, 32\]"),
    "narrower moment": (tensors_with(narrower_moment), r"'state/prompt\.start/exp_avg' has shape \[1, 32\]"),
    "a tensor less": (tensors_with(lambda t: t.pop("param/prompt.start")), "it lacks 'param/prompt.start'"),
    "a tensor more": (tensors_with(lambda t: t.update(more=torch.zeros(1))), "it holds 'more'"),
    "integers": (
        tensors_with(lambda t: t.update({"param/prompt.start": t["param/prompt.start"].int()})),
        "holds torch.int32",
    ),
    "half": (
        tensors_with(lambda t: t.update({"param/prompt.start": t["param/prompt.start"].half()})),
        "holds torch.float16, not float32",
    ),
    "no header": (
        lambda f: (f / "trained.safetensors").write_bytes(bytes(9)),
        "trained.safetensors is damaged",
    ),
    "a generator's state that is none": (
        tensors_with(lambda t: t.update({"0": torch.zeros(3, dtype=torch.uint8)}), "rng.safetensors"),
        "RNG state",
    ),
    "ranks from 1 on": (
        tensors_with(lambda t: t.update({"1": t.pop("0")}), "rng.safetensors"),
        "does not hold the ranks from 0 on",
    ),
}


@pytest.mark.parametrize("damage", WRONG)
def test_a_checkpoint_of_other_content_is_one_line(
    run: Path, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    change, message = WRONG[damage]
    shutil.copytree(run, tmp_path / "run")
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    resealed(newest, change)
    assert gpc("train", tiny_recipe, "--run.dir", tmp_path / "run", "--train.steps", 14) == EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert newest.name in line
    assert "is damaged (" in line
    assert re.search(message, line), line


@pytest.mark.parametrize("content", ["[]", "null", "{", "[" * 100_000, '{"state.json": 3}'])
def test_a_marker_that_is_no_marker_is_one_line(run: Path, tmp_path: Path, content: str) -> None:
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    copied = Path(shutil.copytree(newest, tmp_path / newest.name))
    (copied / "COMPLETE").write_text(content)
    with pytest.raises(UserError, match="is damaged") as caught:
        checkpoint.load(copied)
    assert len(str(caught.value).splitlines()) == 1


def test_a_save_cut_off_before_its_marker_is_not_read(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    newest = checkpoint.newest(folder)
    assert newest is not None
    (newest / "COMPLETE").unlink()
    previous = checkpoint.newest(folder)
    assert previous is not None
    assert checkpoint.step_of(previous) < checkpoint.step_of(newest)
    checkpoint.prune(folder, keep_last=2, best_step=None)
    assert not newest.exists()


def test_a_save_cut_off_while_its_marker_was_written_is_made_again(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    newest = checkpoint.newest(folder)
    assert newest is not None
    saved = checkpoint.load(newest)
    (newest / "COMPLETE").rename(newest / f".COMPLETE.{'ab' * 16}")
    checkpoint.save(folder, saved)
    assert checkpoint.newest(folder) == newest
    (newest / "COMPLETE").rename(newest / f".COMPLETE.{'ab' * 16}")
    checkpoint.prune(folder, keep_last=1, best_step=None)
    assert not newest.exists()
