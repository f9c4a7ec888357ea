"""Tensors of checkpoint files: where each is stored, and reading any flat part of it.

A safetensors file is a table of names, types, shapes and byte ranges, followed by the tensors as flat row-major
bytes. So a rank can read its own part of a tensor and nothing else, without unpickling and without a whole tensor
in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpc_dist.adapter.fingerprint import SAFETENSORS, shards
from gpc_dist.errors import UserError
from gpc_dist.files import read_text

_SUMS = "SHA256SUMS"
_CHUNK_BYTES = 8 * 2**20

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """Place of a tensor in a file."""

    file: Path
    offset: int
    """Bytes from the start of the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def mapped(self) -> Tensor:
        """The tensor as a view of the file, in memory of the page cache, which all processes share.

        Writing to it does not reach the file. A tensor whose bytes do not start at a multiple of its
        type's size cannot be a view and is read.
        """
        if self.offset % self.dtype.itemsize:
            values = torch.empty(self.shape, dtype=self.dtype)
            self.read(0, values.view(-1))
            return values
        storage = _map_file(self.file)
        values = torch.empty(0, dtype=self.dtype)
        strides = [prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return values.set_(storage, self.offset // self.dtype.itemsize, self.shape, strides)  # type: ignore[call-overload]

    def read(self, start: int, target: Tensor) -> None:
        """Read the elements from `start` (of the flattened tensor) into `target`.

        Args:
            target: one-dimensional and contiguous, on any device, of any floating-point dtype.

        Raises:
            UserError: the file became shorter.
        """
        size = self.dtype.itemsize
        begin, end = self.offset + start * size, self.offset + (start + len(target)) * size
        with self.file.open("rb", buffering=0) as handle:
            if target.dtype == self.dtype and target.device.type == "cpu":
                _read_bytes(handle.fileno(), begin, target)
                return
            chunk = torch.empty(min(len(target), _CHUNK_BYTES // size), dtype=self.dtype)
            for place in range(begin, end, _CHUNK_BYTES // size * size):
                piece = chunk[: (end - place) // size]
                _read_bytes(handle.fileno(), place, piece)
                first = (place - begin) // size
                target[first : first + len(piece)].copy_(piece)


def weight_files(path: str, revision: str | None) -> list[Path]:
    """The safetensors files of a folder or a Hub id (downloaded if need be); empty if it has none.

    Raises:
        UserError: an index that cannot be read, or names a file that is missing.
    """
    from gpc_dist.private.transformers import find_file

    if single := find_file(path, SAFETENSORS, revision):
        return [single]
    index = find_file(path, f"{SAFETENSORS}.index.json", revision)
    if index is None:
        return []
    files = {name: find_file(path, name, revision) for name in shards(index)}
    if missing := [name for name, file in files.items() if file is None]:
        raise UserError(
            f"{index} names {', '.join(missing)}, which are not there: fetch the checkpoint again"
        )
    return [file for file in files.values() if file is not None]


def read_headers(files: Iterable[Path]) -> dict[str, Stored]:
    """Name -> place of every tensor of safetensors files.

    Raises:
        UserError: a damaged or truncated file, or a name that two files hold.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in _read_header(file).items():
            if name in found:
                raise UserError(
                    f"{file} and {found[name].file} both hold '{name}': remove the file that does not belong to "
                    "the checkpoint"
                )
            found[name] = stored
    return found


def match(model: nn.Module, stored: dict[str, Stored]) -> dict[nn.Parameter, Stored]:
    """The stored tensor of each parameter of `model`; tied parameters are one parameter.

    Names may differ by a prefix (the checkpoint of a model with a task head calls an encoder's weights
    `bert.encoder...`), and layer norms may have their old names `gamma` and `beta`. Tensors of other modules
    than the model's own, such as a task head or a decoder, are left alone.

    Raises:
        UserError: missing weights, unexpected ones inside the model's own modules, or wrong shapes or dtypes.
    """
    stored = {_new_name(name): place for name, place in stored.items()}
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    prefix = _prefix(names.values(), stored)
    found, missing = {}, []
    for parameter, aliases in names.items():
        place = next((stored[prefix + name] for name in aliases if prefix + name in stored), None)
        if place is None:
            missing.append(aliases[0])
            continue
        if place.shape != tuple(parameter.shape):
            raise UserError(
                f"{place.file}: '{aliases[0]}' has shape {list(place.shape)}, but the encoder's configuration asks "
                f"for {list(parameter.shape)}: weights and config.json belong to different encoders"
            )
        if not place.dtype.is_floating_point:
            raise UserError(
                f"{place.file}: '{aliases[0]}' holds {place.dtype}: give a checkpoint that is not quantised (see "
                "engine.quantize)"
            )
        found[parameter] = place
    if missing:
        raise UserError(
            f"the checkpoint lacks {_listed(missing)} of the encoder: it is damaged, or another encoder's"
        )
    if unexpected := _unexpected(model, names.values(), prefix, stored):
        raise UserError(
            f"the checkpoint holds {_listed(unexpected)}, which the encoder's configuration knows nothing of: "
            "weights and config.json belong to different encoders"
        )
    return found


def check_sums(files: Sequence[Path]) -> None:
    """Compare the SHA-256 of whole files with `SHA256SUMS` beside them, or with the Hub's.

    Raises:
        UserError: a sum that differs, or none to compare with.
    """
    for file in files:
        expected = _expected_sum(file)
        with file.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found != expected:
            raise UserError(f"{file} has SHA-256 {found}, not {expected}: it is damaged, fetch it again")


def _expected_sum(file: Path) -> str:
    sums = file.parent / _SUMS
    if sums.is_file():
        for line in read_text(sums).splitlines():
            digest, _, name = line.partition(" ")
            if name.strip().lstrip("*") == file.name:
                return digest.lower()
        raise UserError(f"encoder.checksum: {sums} has no line for {file.name}")
    # the Hub's cache names a large file after its SHA-256
    if file.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob := file.resolve().name):
        return blob
    raise UserError(
        f"encoder.checksum: nothing to compare {file} with: run `sha256sum *.safetensors > {_SUMS}` where the "
        "files are known to be good, and put it beside them"
    )


def _read_header(file: Path) -> dict[str, Stored]:
    def damaged(reason: str) -> UserError:
        return UserError(f"{file} is damaged ({reason}): fetch it again")

    total = file.stat().st_size
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        if total < 8 or size > total - 8:
            raise damaged("its header is cut off")
        try:
            header: dict[str, Any] = json.loads(handle.read(size))
            header.pop("__metadata__", None)
            tensors = {
                name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(f"its header cannot be read: {error!r}") from None
    found, data = {}, 8 + size
    for name, (dtype, shape, start, end) in tensors.items():
        if dtype not in _DTYPES:
            raise UserError(f"{file}: '{name}' has type {dtype}, which is not supported: give plain weights")
        place = Stored(file, data + start, _DTYPES[dtype], shape)
        if end - start != place.numel * place.dtype.itemsize or start < 0:
            raise damaged(f"'{name}' has a size that is not its shape's")
        if data + end > total:
            raise damaged(f"'{name}' is cut off")
        found[name] = place
    return found


def _new_name(name: str) -> str:
    return re.sub(
        r"LayerNorm\.(gamma|beta)$", lambda m: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[m[1]], name
    )


def _prefix(aliases: Iterable[list[str]], stored: dict[str, Stored]) -> str:
    """The prefix of the model's names in the checkpoint: the candidate with which most of them are found."""
    known = [name for names in aliases for name in names]
    # one deeply nested name is enough to find the candidates
    probe = max(known, key=lambda name: name.count("."))
    ends = "." + probe
    candidates = {""} | {name.removesuffix(probe) for name in stored if name.endswith(ends)}
    return max(sorted(candidates, key=len), key=lambda p: sum(p + name in stored for name in known))


def _unexpected(
    model: nn.Module, aliases: Iterable[list[str]], prefix: str, stored: dict[str, Stored]
) -> list[str]:
    from gpc_dist.private.transformers import ignored_keys

    known = {name for names in aliases for name in names} | {name for name, _ in model.named_buffers()}
    own_modules = {name.split(".")[0] for name in known}
    ignored = ignored_keys(model)
    found = []
    for full in stored:
        name = full.removeprefix(prefix)
        inside = full.startswith(prefix) and name.split(".")[0] in own_modules
        # rotary tables and position numbers, which older versions saved
        is_buffer = name.endswith(("position_ids", "inv_freq", "token_type_ids"))
        if inside and name not in known and not is_buffer and not any(re.search(p, name) for p in ignored):
            found.append(full)
    return found


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _map_file(file: Path) -> Any:
    found = file.stat()
    return _mapping(str(file), found.st_size, (found.st_ino, found.st_mtime_ns))


@lru_cache(maxsize=64)
def _mapping(file: str, size: int, version: tuple[int, int]) -> Any:
    """One memory map of a file for all its tensors, until the file changes."""
    return torch.UntypedStorage.from_file(file, shared=False, nbytes=size)


def _read_bytes(descriptor: int, place: int, target: Tensor) -> None:
    view = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while view:
        count = os.preadv(descriptor, [view[: 2**30]], place)
        if count == 0:
            raise UserError("a weight file became shorter while it was read: fetch the checkpoint again")
        view, place = view[count:], place + count
