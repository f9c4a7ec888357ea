"""Tensors of `pytorch_model.bin` files: where each is stored, as `tensors.read_header` says it of safetensors files.

Such a file is a zip of records that are not compressed: one for the flat bytes of each storage, and `data.pkl`, a
pickle that says which tensor lies where in which storage. That pickle alone is read. Every name in it must be one of
`_NAMES`, and what a name stands for here makes no tensor: PyTorch's own restricted reader (`weights_only`) makes
tensors and byte arrays with whatever arguments it is given, and a few bytes then stand for more than a machine holds.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpc_dist.errors import UserError
from gpc_dist.files import SMALL_BYTES, open_plain
from gpc_dist.shown import one_line, shown
from gpc_dist.tensors import LARGEST, Stored, WeightFile, row_major

_OLD = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
"""The begin of files of PyTorch before 1.6: a pickled number."""
_LOCAL = struct.Struct("<4s22x2H")
"""Header of a record: a mark, and the lengths of the name and of what follows before the content."""
_MOST_TUPLES = 40_000
"""In a table: of those within each other, as a key, the hash would go beyond the stack. A tensor has three."""
_MOST_DIMENSIONS = 64


def read_pickled(file: Path) -> dict[str, Stored]:
    """Name -> place of every tensor of a zip of pickled weights.

    Raises:
        UserError: the file is damaged or truncated, cannot be read, is in the format of PyTorch before 1.6, has a
            compressed record, or holds anything else than tensors, or tensors that PyTorch keeps in several parts.
    """
    with open_archive(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        prefix = next(iter(records), "").partition("/")[0]
        order = records.get(f"{prefix}/byteorder")
        if order and _content(archive, order, "its byte order") != sys.byteorder.encode():
            raise UserError(
                f"{file} was written on a machine with another order of bytes: save it there as safetensors"
            )
        try:
            content = _content(archive, records[f"{prefix}/data.pkl"], "its table of tensors")
        except KeyError:
            raise _DamagedError("it has no data.pkl") from None
        _check_operations(content, file)

        def storage(saved: Any) -> _Storage:
            kind, dtype, key, _, count = saved
            if kind != "storage" or type(dtype) is not torch.dtype or type(count) is not int:
                raise _DamagedError("a storage has no type or size")
            info = records.get(f"{prefix}/data/{key}")
            if info is None or info.file_size != count * dtype.itemsize:
                raise _DamagedError(f"storage {key} is missing, or of another size")
            return _Storage(_place(archive, info), dtype, count)

        try:
            table = _Table(content, storage).load()
        except _DamagedError:
            raise
        except Exception as error:  # a damaged pickle raises a dozen types
            raise _DamagedError(f"{type(error).__name__} in its table of tensors: {error}") from None
        if not isinstance(table, dict) or not all(type(name) is str for name in table):
            raise UserError(f"{file} holds no table of tensors: {_REMEDY}")
        source = WeightFile(file)
        return {name: _stored(source, name, tensor) for name, tensor in table.items()}


@contextmanager
def open_archive(file: Path) -> Iterator[zipfile.ZipFile]:
    """The zip of pickled weights, of which only the directory is read.

    Raises:
        UserError: it cannot be read, is damaged, or is in the format of PyTorch before 1.6; the block found it damaged.
    """
    try:
        with _Frugal(open_plain(file).detach()) as opened:
            if opened.read(len(_OLD)) == _OLD:
                raise UserError(
                    f"{file} is in the format of PyTorch before 1.6, of which no part can be read by itself: write it "
                    "anew in Python, with torch.save(torch.load(FILE, weights_only=True), FILE)"
                )
            with zipfile.ZipFile(opened) as archive:
                if len(set(archive.namelist())) < len(archive.namelist()):
                    raise _DamagedError("it has a name twice")
                yield archive
    except (
        _DamagedError,
        zipfile.BadZipFile,
        ValueError,
        struct.error,
        RuntimeError,  # of zipfile: a version or an encryption that it lacks
    ) as error:
        raise UserError(f"{file} is damaged ({one_line(error)}): fetch it again") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None


_REMEDY = "save the weights alone, best as safetensors (safetensors.torch.save_file)"


class _DamagedError(Exception):
    """Says what is wrong, without the file."""


class _Frugal(io.BufferedReader):
    """A file whose directory is read only if it is small; its size stands in the file."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > SMALL_BYTES:
            raise _DamagedError(f"its directory would take {size} bytes")
        return super().read(size)


class _Storage(NamedTuple):
    """Numbers that tensors are parts of."""

    place: int
    """Bytes from the start of the file."""
    dtype: torch.dtype
    numbers: int


class _Part(NamedTuple):
    """What the table says of a tensor; nothing of it is known to be right."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    bits: Any
    """Of conjugated and negated views; none in weights."""


class _Named:
    """What a name in the pickle stands for: a function of this module, which no pickle can change."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]):
        self._make = make

    def __call__(self, *given: Any) -> Any:
        return self._make(*given)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for what has none")


class _Dict(dict[Any, Any]):
    """For the ordered one of a module's `state_dict`, which has versions of modules as an attribute."""

    def __setstate__(self, state: Any) -> None:
        pass


def _part(storage: Any, offset: Any, shape: Any, strides: Any, _: Any, __: Any, bits: Any = None) -> _Part:
    return _Part(storage, offset, shape, strides, bits)


_NAMES: dict[str, Any] = {
    "collections OrderedDict": _Named(lambda: _Dict()),
    "torch._utils _rebuild_tensor_v2": _Named(_part),
    "torch._utils _rebuild_parameter": _Named(lambda tensor, _, __: tensor),
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
"""As `pickletools` writes them."""
_OPERATIONS = frozenset(
    "PROTO STOP GLOBAL REDUCE BUILD BINPERSID MARK TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE EMPTY_LIST EMPTY_DICT APPEND "
    "APPENDS SETITEM SETITEMS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING "
    "BINPUT LONG_BINPUT BINGET LONG_BINGET".split()
)
"""Those of pickles that `torch.save` writes; none of them takes more memory than its arguments."""


class _Table(pickle.Unpickler):
    def __init__(self, content: bytes, storage: Callable[[Any], _Storage]):
        super().__init__(io.BytesIO(content), fix_imports=False, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        return _NAMES[f"{module} {name}"]

    def persistent_load(self, saved: Any) -> _Storage:
        return self._storage(saved)


def _check_operations(content: bytes, file: Path) -> None:
    """Refuse a pickle before it is read: by what it does and names, and by what it would take."""
    tuples = 0
    try:
        for number, (operation, argument, _) in enumerate(pickletools.genops(content)):
            if operation.name not in _OPERATIONS:
                raise UserError(f"{file} holds more than tensors (pickled with {operation.name}): {_REMEDY}")
            if operation.name == "GLOBAL" and argument not in _NAMES:
                what = shown(str(argument).replace(" ", "."))[:100]
                raise UserError(f"{file} holds more than plain tensors ({what}): {_REMEDY}")
            if operation.name == "LONG_BINPUT" and (argument or 0) > number:
                raise _DamagedError("its table of tensors has a number that is too large")
            tuples += operation.name.startswith("TUPLE")
    except ValueError as error:
        raise _DamagedError(f"its table of tensors: {error}") from None
    if tuples > _MOST_TUPLES:
        raise UserError(f"{file} has a table of more than {_MOST_TUPLES // 3:,} tensors: save it in parts")


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, what: str) -> bytes:
    _check_record(info)
    if info.file_size > SMALL_BYTES:
        raise _DamagedError(f"{what} would take {info.file_size} bytes")
    return archive.read(info)


def _check_record(info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise _DamagedError(f"{shown(info.filename)[:100]} is compressed, and PyTorch compresses nothing")
    if info.header_offset < 0:
        raise _DamagedError("its begin is cut off")


def _place(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where a record's content begins, in bytes from the start of the file."""
    _check_record(info)
    assert archive.fp is not None
    descriptor = archive.fp.fileno()
    mark, name_size, rest_size = _LOCAL.unpack(os.pread(descriptor, _LOCAL.size, info.header_offset))
    begin = info.header_offset + _LOCAL.size
    name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    if mark != b"PK\3\4" or os.pread(descriptor, name_size, begin) != name:
        raise _DamagedError(f"{shown(info.filename)[:100]} is not where the directory says")
    begin += name_size + rest_size
    if begin + info.file_size > os.fstat(descriptor).st_size:
        raise _DamagedError(f"{shown(info.filename)[:100]} is cut off")
    return begin


def _stored(source: WeightFile, name: str, tensor: Any) -> Stored:
    """A tensor's place, if it lies within its storage and stands for no more numbers than are there."""
    if type(tensor) is not _Part or type(tensor.storage) is not _Storage or tensor.bits:
        raise UserError(f"{source.path}: {shown(name)[:100]!r} is no plain tensor: {_REMEDY}")
    storage, offset, shape, strides, _ = tensor
    numbers: tuple[Any, ...] = (
        (offset, *shape, *strides) if type(shape) is type(strides) is tuple else (None,)
    )
    right = all(type(number) is int and 0 <= number < LARGEST for number in numbers)
    if not right or len(shape) != len(strides) or len(shape) > _MOST_DIMENSIONS:
        raise _DamagedError(f"{name!r} has no shape")
    if prod(max(1, size) for size in shape) >= LARGEST:
        raise _DamagedError(f"the shape of {name!r} is too large")
    count = prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count and (last >= storage.numbers or count > storage.numbers):
        raise _DamagedError(f"{name!r} stands for more numbers than are stored")
    usual = row_major(shape)
    plain = count == 0 or all(
        size == 1 or stride == right for size, stride, right in zip(shape, strides, usual, strict=True)
    )
    place = storage.place + (offset * storage.dtype.itemsize if count else 0)
    return Stored(source, place, storage.dtype, shape, None if plain else strides)
