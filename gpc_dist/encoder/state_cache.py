"""Text states that enter a layer, kept in files: computed once, and read by every run that needs the same ones.

A cache is a folder: `states.bin` has the states of all rows one after the other, without padding; `checksums.bin` a
CRC-32 for each row; `index.json`, written last, says what they are the states of. A folder without an index does not
count. A row is compared with its checksum when a process reads it for the first time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpc_dist import files, own_folders
from gpc_dist.errors import UserError
from gpc_dist.locks import hold
from gpc_dist.shown import one_line
from gpc_dist.typed import check_as

STATES, CHECKSUMS, INDEX = "states.bin", "checksums.bin", "index.json"
NAMES = (STATES, CHECKSUMS, INDEX)
"""The files of a cache."""
_FORMAT = 1
_CRC = np.dtype("<u4")


@dataclass(frozen=True)
class StatesKey:
    """What states are of: two runs with equal keys need the same."""

    encoder: str
    """Path or Hub id, for people to read."""
    encoder_sha256: str
    """See `EncoderIdentity.sha256`."""
    first_layer: int
    """The layer that they enter, or the first of those that pooled states enter; L for those after the last layer."""
    pooling: str
    """How the states of a row are pooled, to one for each layer from the first on; empty if they are not."""
    dtype: str
    """`float32` or `bfloat16`."""
    quantize: str
    """See `engine.quantize`; `int8 shards` at stage 3."""
    hidden_size: int
    data_sha256: str
    """See `Encoded.digest`."""

    @property
    def folder(self) -> str:
        """Name of the cache's folder."""
        known = asdict(self) | {"encoder": ""}  # the same weights may lie in another place
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Index:
    """Contents of `index.json`."""

    format: int
    key: StatesKey
    rows: int
    bytes: int
    """Of `states.bin`."""
    checksums_sha256: str
    """Of `checksums.bin`."""
    filled_s: float
    """Seconds that filling it took."""


def default_root() -> Path:
    """The folder of this user's caches: `GPC_DIST_CACHE`; in a Slurm job `states` in the folder that the user's jobs
    share on the node, whose disk is near; else `gpc-dist/states` where programs keep such files."""
    if given := os.environ.get("GPC_DIST_CACHE"):
        return Path(given)
    if "SLURM_JOB_ID" in os.environ and (shared := own_folders.on_this_machine()):
        return shared / "states"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpc-dist" / "states"


class Layout:
    """Where the states of each row lie in `states.bin`.

    Args:
        lengths: tokens of each row, int64 `[R]`.
        dtype: `float32` or `bfloat16`.
    """

    def __init__(self, lengths: np.ndarray, hidden_size: int, dtype: str):
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.hidden_size = hidden_size
        self.ends = np.cumsum(lengths) * hidden_size * self.dtype.itemsize
        self.starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)

    @property
    def bytes(self) -> int:
        return int(self.ends[-1])


class CachedStates:
    """The states of all rows of a data set, in a complete cache.

    Raises:
        UserError: the cache is damaged, or is not of these rows.
    """

    def __init__(self, folder: Path, key: StatesKey, layout: Layout):
        self.folder, self._layout = folder, layout
        try:
            index = read_index(folder)
        except UserError as error:
            raise self._damaged(one_line(error)) from None
        rows = len(layout.starts)
        if (index.key.folder, index.rows, index.bytes) != (key.folder, rows, layout.bytes):
            raise self._damaged("its index is another's")
        self.filled_s = index.filled_s
        try:
            self._checksums = np.fromfile(folder / CHECKSUMS, _CRC)
            self._states = np.memmap(folder / STATES, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise self._damaged(str(error)) from None
        if len(self._states) != layout.bytes or index.checksums_sha256 != _sha256(self._checksums):
            raise self._damaged("a file is not the one that was written")
        self._seen = np.zeros(rows, dtype=bool)
        with suppress(OSError):
            os.utime(folder / INDEX)  # its last use

    @property
    def bytes(self) -> int:
        return self._layout.bytes

    def padded(self, rows: np.ndarray, width: int) -> Tensor:
        """The states of these rows, `[R, width, H]`, with zeros behind the end of a row.

        Raises:
            UserError: a row is not what was written.
        """
        layout = self._layout
        found = torch.zeros(len(rows), width, layout.hidden_size, dtype=layout.dtype)
        target = found.view(torch.uint8).flatten(1).numpy()
        for place, row in enumerate(rows):
            stored = self._states[layout.starts[row] : layout.ends[row]]
            if not self._seen[row]:
                if zlib.crc32(stored.data) != self._checksums[row]:
                    raise self._damaged(f"row {row} is not what was written")
                self._seen[row] = True
            target[place, : len(stored)] = stored
        return found

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"the cached states in {self.folder} are damaged ({reason}): gpc-dist cache --remove {self.folder.name}"
        )


class StatesWriter:
    """Writes a part of the rows of a cache that is being filled. The processes that fill it together have one each."""

    def __init__(self, folder: Path, layout: Layout):
        self._layout = layout
        self._states = (folder / STATES).open("r+b", buffering=0)
        self._checksums = (folder / CHECKSUMS).open("r+b", buffering=0)

    def write(self, rows: np.ndarray, states: Tensor) -> None:
        """Write the states `[R, T, H]` of these rows, on the CPU; what stands behind the end of a row is left out."""
        layout = self._layout
        content = states.to(layout.dtype).contiguous().view(torch.uint8).flatten(1).numpy()
        for row, held in zip(rows.tolist(), content, strict=True):
            kept = held[: layout.ends[row] - layout.starts[row]]
            _write_all(self._states.fileno(), kept, int(layout.starts[row]))
            checksum = np.array(zlib.crc32(kept.data), _CRC)
            _write_all(self._checksums.fileno(), checksum, row * _CRC.itemsize)

    def __enter__(self) -> StatesWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._states.close()
        self._checksums.close()


@contextmanager
def filling(root: Path, key: StatesKey) -> Iterator[None]:
    """Keep other processes of this machine from filling the same cache while the block runs."""
    root.mkdir(parents=True, exist_ok=True)
    with hold(root / f".{key.folder}.lock"):
        yield


@contextmanager
def new_cache(root: Path, key: StatesKey, layout: Layout) -> Iterator[Path]:
    """A folder for `StatesWriter`s to fill, which becomes the cache of `key` when the block ends without an error."""
    start = time.monotonic()
    with files.new_folder(root / key.folder, NAMES) as folder:
        (folder / STATES).touch()
        os.truncate(folder / STATES, layout.bytes)
        np.zeros(len(layout.starts), _CRC).tofile(folder / CHECKSUMS)
        yield folder
        index = Index(
            format=_FORMAT,
            key=key,
            rows=len(layout.starts),
            bytes=layout.bytes,
            checksums_sha256=_sha256(np.fromfile(folder / CHECKSUMS, _CRC)),
            filled_s=time.monotonic() - start,
        )
        files.write_json(folder / INDEX, asdict(index))


def read_index(folder: Path) -> Index:
    """The index of a cache.

    Raises:
        UserError: there is none, or none that this version can read.
    """
    found = check_as(Index, files.read_small_json(folder / INDEX), str(folder / INDEX))
    if found.format != _FORMAT:
        raise UserError(f"{folder / INDEX} has format {found.format}; this version reads {_FORMAT}")
    return found


def is_complete(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def _sha256(checksums: np.ndarray) -> str:
    return hashlib.sha256(checksums.tobytes()).hexdigest()


def _write_all(descriptor: int, content: np.ndarray, place: int) -> None:
    view = content.data.cast("B")
    while view:
        count = os.pwrite(descriptor, view, place)
        view, place = view[count:], place + count
