"""Identity of the encoder of an adapter: its name, revision and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gpc_dist.errors import UserError
from gpc_dist.names import check_name

SAFETENSORS = "model.safetensors"
"""File of a checkpoint in one file."""
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


def identify(encoder: nn.Module, folder: Path | None = None) -> EncoderIdentity:
    """Identity of an encoder.

    Args:
        folder: folder of its weight files. When not given, the folder or Hub id that the encoder names; of a Hub id
            the main branch in the cache, because a model does not know its revision.
    """
    config: Any = encoder.config
    path = getattr(encoder, "name_or_path", "")
    if folder is None and path:
        folder = _folder_of(path)
    files = _weight_files(folder) if folder else []
    return EncoderIdentity(
        path=path or config.model_type,
        revision=folder.name if folder and folder.parent.name == "snapshots" else None,
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        sha256=fingerprint_files(files) if files else fingerprint_tensors(encoder),
    )


def fingerprint_files(files: list[Path]) -> str:
    """SHA-256 over name, dtype, shape and first 4 KiB of every tensor.

    Reads a few hundred KiB of a checkpoint of any size, and never unpickles: for a `.bin` file it
    uses the checksums in the zip directory, or if it is none (PyTorch before 1.6) all its bytes.
    """
    entries: list[tuple[str, bytes]] = []
    for file in files:
        if file.suffix == ".safetensors":
            entries += _safetensors_entries(file)
        elif not zipfile.is_zipfile(file):
            with file.open("rb") as handle:
                entries.append((file.name, hashlib.file_digest(handle, "sha256").digest()))
        else:
            with zipfile.ZipFile(file) as archive:
                entries += [(i.filename, f"{i.CRC} {i.file_size}".encode()) for i in archive.infolist()]
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


def _safetensors_entries(file: Path) -> list[tuple[str, bytes]]:
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        header.pop("__metadata__", None)
        entries = []
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            handle.seek(8 + size + start)
            head = handle.read(min(end - start, _HEAD_BYTES))
            entries.append((f"{name} {entry['dtype']} {entry['shape']}", head))
    return entries


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


def _weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint, in the order in which `transformers` looks for them; others may lie beside them."""
    for single in (SAFETENSORS, "pytorch_model.bin"):
        if (folder / single).is_file():
            return [folder / single]
        if (index := folder / f"{single}.index.json").is_file():
            return [folder / name for name in shards(index)]
    return []


def shards(index: Path) -> list[str]:
    """Names of the files of a checkpoint in several files, sorted.

    Raises:
        UserError: the index cannot be read, or names a file that is not beside it.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of weights ({error!r}): fetch the checkpoint again") from None
    return sorted(check_name(name, f"{index}: the file") for name in names)
