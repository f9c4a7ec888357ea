"""Identity of the encoder of an adapter: its name, revision and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpc_dist.errors import UserError
from gpc_dist.files import few, read_small_json, sha256
from gpc_dist.names import check_name
from gpc_dist.pickled import open_archive, read_pickled
from gpc_dist.tensors import Stored, read_header, read_headers

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
"""Files of a checkpoint in one file, in the order in which they are looked for."""
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class EncoderIdentity:
    """Identity of a frozen encoder."""

    path: str
    """Local folder or Hub id from which it was loaded."""
    revision: str | None
    """Commit of a Hub id."""
    model_type: str
    hidden_size: int
    layers: int
    sha256: str
    """See `fingerprint_files`, or `fingerprint_tensors` for an encoder without files."""

    def dump(self) -> dict[str, Any]:
        return asdict(self)


def identify(encoder: nn.Module, files: Sequence[Path] | None = None) -> EncoderIdentity:
    """Identity of an encoder.

    Args:
        files: those its weights were read from, see `weight_files`. When not given, those of the folder or Hub id that
            the encoder names; of a Hub id the main branch in the cache, because a model does not know its revision.

    Raises:
        UserError: a file cannot be read.
    """
    config: Any = encoder.config
    path = getattr(encoder, "name_or_path", "")
    if files is None:
        folder = _folder_of(path) if path else None
        files = weight_files(str(folder), None) if folder else []
    snapshot = files[0].parent if files and files[0].parent.parent.name == "snapshots" else None
    return EncoderIdentity(
        path=path or config.model_type,
        revision=snapshot.name if snapshot else None,
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        sha256=fingerprint_files(files) if files else fingerprint_tensors(encoder),
    )


def weight_files(path: str, revision: str | None) -> list[Path]:
    """The files of the weights in a folder or under a Hub id (downloaded if need be); empty if there are none.

    An encoder is loaded from these files, and known by them. What else lies beside them is not looked at.

    Raises:
        UserError: an index that cannot be read, or names a file that is missing.
    """
    from gpc_dist.private.transformers import find_file

    for name in (SAFETENSORS, PICKLED):
        if single := find_file(path, name, revision):
            return [single]
        if index := find_file(path, f"{name}.index.json", revision):
            files = {shard: find_file(path, shard, revision) for shard in shards(index)}
            if missing := [shard for shard, file in files.items() if file is None]:
                raise UserError(
                    f"{index} names {few(missing)}, which are not there: fetch the checkpoint again"
                )
            return [file for file in files.values() if file is not None]
    return []


def stored_tensors(files: Sequence[Path]) -> dict[str, Stored]:
    """Name -> place of every tensor of a checkpoint's files, of either format.

    Raises:
        UserError: see `tensors.read_headers` and `pickled.read_pickled`.
    """
    return read_headers(files, read_table)


def read_table(file: Path) -> dict[str, Stored]:
    """Name -> place of every tensor of one file."""
    return read_header(file) if file.suffix == ".safetensors" else read_pickled(file)


def fingerprint_files(files: Sequence[Path]) -> str:
    """SHA-256 over name, dtype, shape and first 4 KiB of every tensor.

    Reads a few hundred KiB of a checkpoint of any size, and never unpickles: for a `.bin` file it
    uses the checksums in the zip directory, or if it is none (PyTorch before 1.6) all its bytes.

    Raises:
        UserError: a file is damaged or cannot be read, or a name stands in it, or in two files, twice.
    """
    entries: list[tuple[str, bytes]] = []
    for file in files:
        if file.suffix != ".safetensors":
            entries += _pickled_entries(file)
    stored = read_headers(file for file in files if file.suffix == ".safetensors")
    for name, place in stored.items():
        head = torch.empty(min(place.numel, _HEAD_BYTES // place.dtype.itemsize), dtype=place.dtype)
        place.read(0, head)
        content = head.view(torch.uint8).numpy().tobytes()
        entries.append((f"{name} {place.type_name} {list(place.shape)}", content))
    return _digest(entries)


def fingerprint_tensors(encoder: nn.Module) -> str:
    """SHA-256 over name, shape and first 1024 values of every tensor, for an encoder in memory (random weights)."""
    entries = []
    for name, parameter in encoder.named_parameters():
        head = parameter.detach().flatten()[: _HEAD_BYTES // 4].float().cpu().numpy().tobytes()
        entries.append((f"{name} {list(parameter.shape)}", head))
    return _digest(entries)


def _digest(entries: list[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(entries):
        digest.update(name.encode())
        digest.update(content)
    return digest.hexdigest()


def _pickled_entries(file: Path) -> list[tuple[str, bytes]]:
    try:
        if file.is_file() and not zipfile.is_zipfile(file):
            return [(file.name, bytes.fromhex(sha256(file)))]
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    with open_archive(file) as archive:
        return [(info.filename, f"{info.CRC} {info.file_size}".encode()) for info in archive.infolist()]


def _folder_of(path: str) -> Path | None:
    """A local folder, or the snapshot of a Hub id's main branch in the cache; None if there is neither."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def shards(index: Path) -> list[str]:
    """Names of the files of a checkpoint in several files, sorted.

    Raises:
        UserError: the index cannot be read, or names none, or a file that is not beside it.
    """
    try:
        found = read_small_json(index)
    except UserError as error:
        raise UserError(f"{error}: fetch the checkpoint again") from None
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not (isinstance(names, dict) and names):
        raise UserError(f"{index} is no index of weights (weight_map): fetch the checkpoint again")
    return sorted({check_name(name, f"{index}: the file") for name in names.values()})
