"""Checkpoints of the training state: a few megabytes, whatever the encoder's size, unless it is fine-tuned.

A checkpoint `step-00000100/` holds

    trained.safetensors   adapter parameters and optimizer moments, whole tensors: any number of ranks can
                          load them at any ZeRO stage
    rng.safetensors       generator state of every rank, used when the number of ranks is the same
    state.json            step, data position, best metric so far
    COMPLETE              SHA-256 of the other files; written last

Where DeepSpeed fine-tunes the encoder, `trained-<rank>-of-<ranks>.safetensors` stand in the place of the first: each
rank writes its own part (see `ZeroOptimizer.part`), and no rank ever has all of them in memory.

A folder without `COMPLETE` is left by an interrupted save. It is never read, and the next save removes it. Folders and
files of other names are not touched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpc_dist.errors import UserError
from gpc_dist.files import (
    new_folder,
    read_small_json,
    recover_folder,
    remove_folder,
    replace_text,
    sha256,
)
from gpc_dist.shown import one_line

# torch is imported on use: the processes of a search that only look for checkpoints do without it
if TYPE_CHECKING:
    from torch import Tensor

    from gpc_dist.distributed.world import World
    from gpc_dist.tensors import Stored, Stream

FORMAT, PARTS_FORMAT = 1, 2
"""Version of the folder's layout, with whole tensors and with parts; others are refused."""
_MARKER = "COMPLETE"
_TRAINED, _RNG, _STATE = "trained.safetensors", "rng.safetensors", "state.json"
_PART = re.compile(r"trained-[0-9]{5,}-of-[0-9]{5,}\.safetensors")
_FOLDER = re.compile(r"\.?(step-[0-9]{8,})(?:\..*)?")
"""Names of a checkpoint's folder, and of what `files.new_folder` puts beside it for a while."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint."""

    step: int
    tensors: dict[str, Tensor]
    """See `LaneOptimizer.state`; empty if there are parts."""
    rng: list[Tensor]
    """Generator state of each rank that saved."""
    state: dict[str, Any]
    part_files: list[Path] = field(default_factory=list)
    """Of each rank that saved a part, in order."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return _name(self.step)

    def parts(self) -> list[dict[str, Stored]]:
        """Name -> place of the tensors of each rank that saved a part.

        Raises:
            UserError: see `tensors.read_header`.
        """
        from gpc_dist.tensors import read_header

        return [read_header(file) for file in self.part_files]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `folder/step-<n>` atomically."""
    from gpc_dist.tensors import save_file

    path = folder / _name(checkpoint.step)
    with new_folder(path, _names(folder)) as temporary:
        if checkpoint.part_files:
            for file in checkpoint.part_files:
                shutil.copyfile(file, temporary / file.name)
        else:
            save_file(checkpoint.tensors, temporary / _TRAINED)
        _write_small(temporary, checkpoint)
        digests = {file.name: sha256(file) for file in temporary.iterdir()}
    _complete_with(path, digests)


def save_parts(folder: Path, checkpoint: Checkpoint, part: Stream, world: World) -> None:
    """Write `folder/step-<n>` atomically, each rank a part of it; every rank must call it.

    Args:
        checkpoint: on rank 0, without the parts.
        part: what this rank saves.

    Raises:
        MachineError: a file cannot be written; raised on every rank.
    """
    from gpc_dist.tensors import write_stream

    path = folder / _name(checkpoint.step)
    with ExitStack() as held:  # on rank 0, the temporary folder
        temporary = Path(world.on_main(lambda: str(held.enter_context(new_folder(path, _names(folder))))))
        own = temporary / f"trained-{world.rank:05}-of-{world.size:05}.safetensors"

        def write() -> str:
            write_stream(own, part)
            with own.open("rb") as file:
                os.fsync(file.fileno())
            return sha256(own)

        digests = dict(world.from_all([own.name, world.on_all(write)]))

        def finish() -> None:
            _write_small(temporary, checkpoint)
            small = {name: sha256(temporary / name) for name in (_RNG, _STATE)}
            held.close()
            _complete_with(path, small | digests)

        world.on_main(finish)


def _write_small(folder: Path, checkpoint: Checkpoint) -> None:
    """Write all but what was trained, and the marker."""
    from gpc_dist.tensors import save_file

    save_file({str(r): t for r, t in enumerate(checkpoint.rng)}, folder / _RNG)
    parts = sorted(file.name for file in folder.iterdir() if _PART.fullmatch(file.name))
    state = {"format": PARTS_FORMAT if parts else FORMAT, "step": checkpoint.step, **checkpoint.state}
    (folder / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def _complete_with(path: Path, digests: dict[str, str]) -> None:
    # a marker in a folder of its own would be of nothing: the one that was written may have been moved
    replace_text(path / _MARKER, json.dumps(digests, indent=2) + "\n")


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the largest step; None if there is none."""
    return max(_complete(folder), default=None, key=step_of)


def seal(path: Path) -> str:
    """What tells this checkpoint's content from every other: the SHA-256 of its checksums.

    Raises:
        UserError: it is incomplete.
    """
    try:
        return sha256(path / _MARKER)
    except OSError as error:
        raise damaged(str(path), str(error)) from None


def load(path: Path, expected: str | None = None, rank: int = 0, ranks: int = 1) -> Checkpoint:
    """Read a checkpoint and verify its checksums. Parts are not read yet.

    Args:
        expected: the `seal` that another rank found.
        rank, ranks: all of `ranks` processes load it, so this one verifies some of the parts only.

    Raises:
        UserError: incomplete, damaged, of another format or with another seal; the message names the file and the
            remedy.
    """
    from safetensors import SafetensorError

    if expected is not None:
        _check_seal(path, expected)
    try:
        digests = _json_object(path / _MARKER)
        parts = sorted(filter(_PART.fullmatch, digests))
        files = [*(parts[rank::ranks] if parts else [_TRAINED]), _RNG, _STATE]
        if changed := [name for name in files if sha256(path / name) != digests.get(name)]:
            raise UserError(f"{', '.join(changed)} changed after it was written")
        state = _json_object(path / _STATE)
        if (found := state.pop("format", None)) == (PARTS_FORMAT if parts else FORMAT):
            return _content(path, state, parts)
    except (UserError, SafetensorError, OSError, RuntimeError, OverflowError) as error:
        raise damaged(str(path), str(error)) from None
    raise UserError(
        f"checkpoint {path} has format {found!r}; this version reads {FORMAT} and {PARTS_FORMAT}: go on with the "
        "version of gpc-dist that wrote it, or give --train.resume false to start again"
    )


def _check_seal(path: Path, expected: str) -> None:
    remedy = (
        "all ranks must see the same run folder (run.dir); on a file system that shows late what another machine "
        "wrote, start again"
    )
    if not (path / _MARKER).is_file():
        raise UserError(f"checkpoint {path}, which rank 0 found, is not there: {remedy}")
    if seal(path) != expected:
        raise UserError(f"checkpoint {path} is not the one that rank 0 found: {remedy}")


def _content(path: Path, state: dict[str, Any], parts: Sequence[str]) -> Checkpoint:
    from safetensors.torch import load_file

    from gpc_dist.tensors import read_header

    step = state.pop("step", None)
    if type(step) is not int or not 0 <= step < 2**63:
        raise UserError(f"{_STATE} has step {step!r}")
    held = read_header(path / _RNG)
    ranks = [str(rank) for rank in range(len(held))]
    if sorted(held) != sorted(ranks):
        raise UserError(f"{_RNG} does not hold the ranks from 0 on")
    loaded = load_file(path / _RNG)
    rng = [loaded[rank] for rank in ranks]
    if parts:
        return Checkpoint(step, {}, rng, state, [path / name for name in parts])
    read_header(path / _TRAINED)  # refuses what the library would let pass
    return Checkpoint(step, load_file(path / _TRAINED), rng, state)


def prune(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Remove what interrupted saves left, and all checkpoints but the newest `keep_last` and the best one."""
    names = _names(folder)
    for path in _folders(folder):
        recover_folder(path, names)
    complete = sorted(_complete(folder), key=step_of)
    kept = complete[-keep_last:] + [path for path in complete if step_of(path) == best_step]
    for path in _folders(folder):
        if path not in kept:
            remove_folder(path, names)


def remove_all(folder: Path) -> None:
    """Remove every checkpoint, and what interrupted saves left."""
    names = _names(folder)
    for path in _folders(folder):
        recover_folder(path, names)
        remove_folder(path, names)


def replace_all(folder: Path, checkpoint: Checkpoint) -> None:
    """Make this the only checkpoint: later ones of another course of the run would be taken for its newest."""
    remove_all(folder)
    save(folder, checkpoint)


def rng_state() -> Tensor:
    """State of this rank's default generator, uint8."""
    import torch

    return torch.get_rng_state()


def damaged(name: str, reason: str) -> UserError:
    """What to say about a checkpoint that cannot be resumed from."""
    return UserError(
        f"checkpoint {name} is damaged ({one_line(reason)}): delete this folder to go on from the checkpoint before "
        "it, or give --train.resume false to start again"
    )


def _json_object(path: Path) -> dict[str, Any]:
    found = read_small_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path.name} holds no JSON object")
    return found


def _names(folder: Path) -> list[str]:
    """Names of all files of checkpoints in `folder`, whatever the number of ranks that wrote them, in the order of
    their removal: without its marker a folder is no checkpoint any more."""
    parts = {file.name for file in folder.glob("*step-*/trained-*") if _PART.fullmatch(file.name)}
    return [_MARKER, _TRAINED, _RNG, _STATE, *sorted(parts)]


def _complete(folder: Path) -> list[Path]:
    return [path for path in _folders(folder) if (path / _MARKER).is_file()]


def _folders(folder: Path) -> list[Path]:
    """Where checkpoints stand, or would if their saves had not been interrupted."""
    if not folder.is_dir():
        return []
    found = (_FOLDER.fullmatch(path.name) for path in folder.iterdir())
    return [folder / name for name in sorted({match[1] for match in found if match})]


def _name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))
