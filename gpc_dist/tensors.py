"""Tensors in files: where each is stored, reading any flat part of it, and writing them one at a time.

A safetensors file is a table of names, types, shapes and byte ranges, followed by the tensors as flat row-major
bytes. So a rank can read its own part of a tensor and nothing else, without unpickling and without a whole tensor
in memory. `pickled` says the same of `pytorch_model.bin` files.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as write
from torch import Tensor

from gpc_dist.errors import UserError
from gpc_dist.files import SMALL_BYTES, open_plain
from gpc_dist.parsing import parse_json
from gpc_dist.shown import one_line

_CHUNK_BYTES = 8 * 2**20
LARGEST = 2**59
"""Below it are sizes, and how many numbers a tensor has if no size is 0: with them torch computes."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_TYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class WeightFile:
    """A file of tensors, with one memory map for all that view it."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def storage(self) -> Any:
        return torch.UntypedStorage.from_file(str(self.path), shared=False, nbytes=self.path.stat().st_size)


@dataclass(frozen=True)
class Stored:
    """Place of a tensor in a file."""

    source: WeightFile
    offset: int
    """Bytes from the start of the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    """In numbers, of a tensor that is not stored row by row: in files of PyTorch, which keep what it had in memory."""

    @property
    def file(self) -> Path:
        return self.source.path

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def type_name(self) -> str:
        """The dtype as safetensors names it."""
        return _TYPE_NAMES[self.dtype]

    def mapped(self) -> Tensor:
        """The tensor as a view of the file, in memory of the page cache, which all processes share. The pages count as
        this process's until all views of the same header's tensors are gone, and their places.

        Writing to it does not reach the file. A tensor whose bytes do not start at a multiple of its
        type's size cannot be a view and is read. One that is not stored row by row has the strides that it is stored
        with.
        """
        if self.offset % self.dtype.itemsize:
            return self.loaded()
        values = torch.empty(0, dtype=self.dtype)
        strides = row_major(self.shape) if self.strides is None else self.strides
        return values.set_(self.source.storage, self.offset // self.dtype.itemsize, self.shape, strides)  # type: ignore[call-overload]

    def loaded(self) -> Tensor:
        """The tensor in memory of its own.

        Raises:
            UserError: the file became shorter.
        """
        values = torch.empty(self.shape, dtype=self.dtype)
        self.read(0, values.view(-1))
        return values

    def read(self, start: int, target: Tensor) -> None:
        """Read the elements from `start` (of the flattened tensor) into `target`.

        Args:
            target: one-dimensional and contiguous, on any device, of the file's dtype or any floating-point one.

        Raises:
            UserError: the file became shorter.
        """
        if self.strides is not None:
            _copy_part(self._of_file(), start, target)
            return
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

    def _of_file(self) -> Tensor:
        """The tensor as a view of the file, whose pages are let go with it."""
        assert self.strides is not None
        count = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        with self.file.open("rb") as handle:
            mapped = mmap.mmap(
                handle.fileno(), 0, access=mmap.ACCESS_COPY
            )  # torch takes only what can be written
        if self.offset + count * self.dtype.itemsize > len(mapped):
            raise _shorter()
        values = torch.frombuffer(mapped, dtype=self.dtype, count=count, offset=self.offset)
        return values.as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class Held:
    """What a process holds of a tensor: all of it, or a flat part."""

    shape: Sequence[int]
    """Of the whole tensor."""
    start: int
    """Elements of the flattened tensor before the part."""
    values: Tensor
    """The part `[n]`, as a view of where it is kept."""


def whole(tensor: Tensor) -> Held:
    """A contiguous tensor of which this process holds all."""
    return Held(tensor.shape, 0, tensor.detach().view(-1))


@dataclass(frozen=True)
class Stream:
    """Named float32 tensors that come one at a time, so that not all of them need be in memory."""

    shapes: Mapping[str, Sequence[int]]
    values: Iterable[Tensor]
    """On any device, in the order of `shapes`; each is used before the next one is asked for."""


def stream(tensors: Mapping[str, Tensor]) -> Stream:
    """A stream of tensors that are all there."""
    return Stream({name: tensor.shape for name, tensor in tensors.items()}, tensors.values())


def write_stream(path: Path, tensors: Stream) -> None:
    """Write a safetensors file, which is not synced.

    Raises:
        OSError: it cannot be written.
    """
    header, place = dict[str, Any](), 0
    for name, shape in tensors.shapes.items():
        end = place + prod(shape) * torch.float32.itemsize
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)  # so that tensors start at multiples of 8 bytes, as readers like it
    with path.open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        for shape, values in zip(tensors.shapes.values(), tensors.values, strict=True):
            assert values.numel() == prod(shape)
            flat = values.detach().to("cpu", torch.float32).contiguous().view(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Joined:
    """A flattened tensor that is stored in pieces, which follow one another."""

    pieces: Sequence[Stored]
    """All of one dtype."""

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(piece.numel for piece in self.pieces),)

    def read(self, start: int, target: Tensor) -> None:
        """As `Stored.read`."""
        end, before = start + len(target), 0
        for piece in self.pieces:
            first, last = max(start, before), min(end, before + piece.numel)
            if first < last:
                piece.read(first - before, target[first - start : last - start])
            before += piece.numel


def joined(parts: Sequence[Mapping[str, Stored]]) -> dict[str, Joined]:
    """The tensors whose pieces are in several files.

    Args:
        parts: name -> place of the pieces of each file, in order.

    Raises:
        UserError: pieces of one tensor have different dtypes.
    """
    pieces: dict[str, list[Stored]] = {}
    for part in parts:
        for name, piece in part.items():
            pieces.setdefault(name, []).append(piece)
    for name, found in pieces.items():
        if len({piece.dtype for piece in found}) > 1:
            raise UserError(f"the pieces of {name!r} are of several types")
    return {name: Joined(found) for name, found in pieces.items()}


def row_major(shape: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor."""
    return [prod(shape[place + 1 :]) for place in range(len(shape))]


def _copy_part(values: Tensor, start: int, target: Tensor) -> None:
    """Copy the elements from `start` of a tensor, as if it were flat, into a flat one."""
    if values.dim() < 2:
        target.copy_(values[start : start + len(target)])
        return
    size = values[0].numel()
    first = -(-start // size)
    head = min(len(target), first * size - start)
    rows = (len(target) - head) // size
    whole = target[head : head + rows * size]
    if head:
        _copy_part(values[first - 1], start - (first - 1) * size, target[:head])
    whole.view(rows, *values.shape[1:]).copy_(values[first : first + rows])
    if head + len(whole) < len(target):
        _copy_part(values[first + rows], 0, target[head + len(whole) :])


def read_header(file: Path) -> dict[str, Stored]:
    """Name -> place of every tensor of a safetensors file, in the order in which they are stored.

    Raises:
        UserError: the file is damaged or truncated, cannot be read, or has a name twice or an unknown type.
    """
    try:
        with open_plain(file) as handle:
            size = int.from_bytes(handle.read(8), "little")
            if size > SMALL_BYTES:
                raise UserError(f"its header would take {size} bytes")
            header = handle.read(size)
        # the library refuses sizes that are not the shapes', and tensors that do not fill the file one after another:
        # so the place of each follows from those before it
        with safe_open(file, framework="numpy") as opened:
            entries = {name: opened.get_slice(name) for name in opened.offset_keys()}
            listed = {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries.items()}
        parse_json(header, "its header")  # of two entries of one name the library takes the last
    except (UserError, SafetensorError) as error:
        reason = one_line(error).removeprefix("Error while deserializing header: ")
        raise UserError(f"{file} is damaged ({reason}): fetch it again") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    found, place, source = dict[str, Stored](), 8 + size, WeightFile(file)
    for name, (kind, shape) in listed.items():
        if kind not in _DTYPES:
            raise UserError(f"{file}: {name!r} has type {kind}, which is not supported: give plain weights")
        if prod(max(1, size) for size in shape) >= LARGEST:  # possible with a 0 in it
            raise UserError(f"{file} is damaged (the shape of {name!r} is too large): fetch it again")
        found[name] = Stored(source, place, _DTYPES[kind], shape)
        place += found[name].numel * found[name].dtype.itemsize
    return found


def read_headers(
    files: Iterable[Path], read: Callable[[Path], dict[str, Stored]] = read_header
) -> dict[str, Stored]:
    """Name -> place of every tensor of several files.

    Args:
        read: gives those of one.

    Raises:
        UserError: see `read_header`; or a name that two files hold.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in read(file).items():
            if name in found:
                raise UserError(
                    f"{file} and {found[name].file} both hold {name!r}: remove the file that does not belong to "
                    "the checkpoint"
                )
            found[name] = stored
    return found


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as a safetensors file.

    Raises:
        OSError: it cannot be written; the library says so with an error of its own.
    """
    try:
        write(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None


def check_like(found: Mapping[str, Stored | Joined | Tensor], wanted: Mapping[str, Sequence[int]]) -> None:
    """Compare names and shapes of floating-point tensors with what they should be; scalars may be of any type.

    Args:
        wanted: name -> shape.

    Raises:
        UserError: names the first tensor that differs, but no file.
    """
    for name in sorted(found.keys() ^ wanted.keys()):
        raise UserError(f"it {'holds' if name in found else 'lacks'} {name!r}")
    for name, tensor in found.items():
        shape, right = list(tensor.shape), list(wanted[name])
        if shape != right:
            raise UserError(f"{name!r} has shape {shape}, not {right}")
        if shape and not tensor.dtype.is_floating_point:
            raise UserError(f"{name!r} holds {tensor.dtype}, not floating-point numbers")


def _read_bytes(descriptor: int, place: int, target: Tensor) -> None:
    view = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while view:
        count = os.preadv(descriptor, [view[: 2**30]], place)
        if count == 0:
            raise _shorter()
        view, place = view[count:], place + count


def _shorter() -> UserError:
    return UserError("a weight file became shorter while it was read: fetch the checkpoint again")
