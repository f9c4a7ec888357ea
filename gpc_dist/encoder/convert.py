"""A copy of a checkpoint that holds the encoder alone, in safetensors files of one dtype.

It is made a file at a time, and each file is compared with the checkpoint tensor by tensor, so that a conversion that
was killed goes on where it was. The index is written last: a copy that is not complete has none, and is not loaded.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpc_dist import files, locks
from gpc_dist.adapter.families import TESTED
from gpc_dist.adapter.fingerprint import SAFETENSORS, fingerprint_files
from gpc_dist.config import EncoderConfig
from gpc_dist.encoder.frozen import find_checkpoint, load_tokenizer, matched_skeleton
from gpc_dist.encoder.weights import SUMS
from gpc_dist.errors import MachineError, UserError
from gpc_dist.tensors import Stored, read_header, save_file
from gpc_dist.typed import read_as

log = logging.getLogger(__name__)

FILE_BYTES = 512 * 2**20
"""Of a file, and so about what a conversion takes in memory; a tensor that is larger has its own."""
_MARKER, _LOCK, _INDEX = "conversion.json", ".lock", f"{SAFETENSORS}.index.json"
_UNFINISHED = ".unfinished"
"""A folder for what is being written: the safetensors library writes files of other names first."""
_COMPARED = 2**24
"""Numbers that are compared at once."""


@dataclass(frozen=True)
class _Conversion:
    """What a folder is a copy of. It stands there from the start, and tells the folder from a user's own."""

    path: str
    sha256: str
    """Of the source: see `fingerprint.fingerprint_files`."""
    dtype: str


def convert(config: EncoderConfig, target: Path, dtype: torch.dtype) -> dict[str, int]:
    """Write the encoder of a checkpoint, with its configuration and tokenizer, into a folder that `encoder.path` can
    name; finish it if it was begun, and compare all of it with the checkpoint in any case.

    Weights that no method uses, such as a decoder, a pooler or a task head, are left out.

    Args:
        dtype: of the copy's weights.

    Returns:
        Name -> bytes of each weight file.

    Raises:
        UserError: nothing to convert, or of a family that this project's tests do not cover; `target` holds something
            else, or is being written by another process.
        MachineError: what was written is not what is read.
    """
    model_config, sources = find_checkpoint(config)
    if model_config.model_type not in TESTED:
        raise UserError(
            f"--convert: encoder family '{model_config.model_type}' is not one of those whose weights are read one by "
            f"one ({', '.join(sorted(TESTED))})"
        )
    model, places = matched_skeleton(config, model_config, sources, dtype)
    tensors = {name: places[parameter] for name, parameter in model.named_parameters()}
    parts = _parts(tensors, dtype)
    model_config.architectures = [type(model).__name__]
    model_config.dtype = dtype
    wanted = _Conversion(config.path, fingerprint_files(sources), str(dtype).removeprefix("torch."))
    with tempfile.TemporaryDirectory() as made:
        model_config.save_pretrained(made)
        load_tokenizer(config).save_pretrained(made)
        small = sorted(Path(made).iterdir())
        _check_target(target, wanted, {*parts, *(file.name for file in small)})
        with _alone(target):
            files.write_json(target / _MARKER, asdict(wanted))
            shutil.rmtree(target / _UNFINISHED, ignore_errors=True)  # what a killed process left
            (target / _UNFINISHED).mkdir()
            for file in small:
                with _whole(target / file.name) as unfinished:
                    shutil.copyfile(file, unfinished)
            for name, part in parts.items():
                _write_part(target / name, part, dtype)
            sums = "".join(f"{files.sha256(target / name)}  {name}\n" for name in parts)
            files.write_text(target / SUMS, sums)
            size = sum(place.numel for place in tensors.values()) * dtype.itemsize
            (target / _UNFINISHED).rmdir()
            where = {tensor: name for name, part in parts.items() for tensor in part}
            files.write_json(target / _INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    return {name: (target / name).stat().st_size for name in parts}


def _parts(tensors: Mapping[str, Stored], dtype: torch.dtype) -> dict[str, dict[str, Stored]]:
    """The tensors of each file, by its name."""
    parts: list[dict[str, Stored]] = [{}]
    size = 0
    for name, place in tensors.items():
        more = place.numel * dtype.itemsize
        if parts[-1] and size + more > FILE_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = place
        size += more
    base, ending = os.path.splitext(SAFETENSORS)
    return {f"{base}-{number:05}-of-{len(parts):05}{ending}": part for number, part in enumerate(parts, 1)}


def _check_target(target: Path, wanted: _Conversion, names: set[str]) -> None:
    """Refuse a folder that is not this conversion's: complete, begun, or new."""
    names = names | {SUMS, _INDEX, _MARKER, _LOCK, _UNFINISHED}
    found = read_as(_Conversion, target / _MARKER) if target.is_dir() else None
    if found is not None and found != wanted:
        raise UserError(
            f"{target} holds a copy of {found.path} (SHA-256 {found.sha256[:12]}) in {found.dtype}, not of "
            f"{wanted.path} ({wanted.sha256[:12]}) in {wanted.dtype}: give another folder, or remove it"
        )
    files.check_replaceable(target, names if found else {_LOCK})


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    try:
        with locks.hold(target / _LOCK, timeout_s=0.0):
            yield
    except locks.TakenError:
        raise UserError(f"{target} is being written by another process: wait until it ends") from None


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file that takes the place of `path` when the block ends."""
    folder = path.parent / _UNFINISHED
    unfinished = folder / path.name
    yield unfinished
    unfinished.chmod(folder.stat().st_mode & 0o666)  # as the umask allows; the library makes private files
    with unfinished.open("rb") as handle:
        os.fsync(handle.fileno())
    unfinished.replace(path)
    files.fsync_folder(path.parent)


def _write_part(path: Path, part: Mapping[str, Stored], dtype: torch.dtype) -> None:
    """Write a file, unless it is there, and compare it with the checkpoint."""
    if _holds(path, part, dtype):
        log.info("%s is complete", path)
        return
    tensors = {name: _read(place, dtype) for name, place in part.items()}
    with _whole(path) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    del tensors
    if not _holds(path, part, dtype):
        raise MachineError(f"{path} does not hold what was written: check the drive, and try again")
    log.info("%s written", path)


def _read(place: Stored, dtype: torch.dtype) -> Tensor:
    values = torch.empty(place.shape, dtype=dtype)
    place.read(0, values.view(-1))
    return values


def _holds(path: Path, part: Mapping[str, Stored], dtype: torch.dtype) -> bool:
    """Whether a file has these tensors, and no others, to the bit."""
    if not path.exists():
        return False
    try:
        found = read_header(path)
    except UserError:
        return False
    return found.keys() == part.keys() and all(
        found[name].shape == place.shape and found[name].dtype == dtype and _same(found[name], place)
        for name, place in part.items()
    )


def _same(copy: Stored, original: Stored) -> bool:
    for start in range(0, copy.numel, _COMPARED):
        pair = torch.empty(2, min(_COMPARED, copy.numel - start), dtype=copy.dtype)
        copy.read(start, pair[0])
        original.read(start, pair[1])
        if not torch.equal(*pair.view(torch.uint8)):
            return False
    return True
