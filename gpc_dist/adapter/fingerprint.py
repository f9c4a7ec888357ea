"""Which encoder an adapter belongs to: its name, revision and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

_HEAD_BYTES = 4096


@dataclass(frozen=True)
class EncoderIdentity:
    """What tells one frozen encoder from another."""

    path: str
    """Local folder or Hub id it was loaded from."""
    revision: str | None
    """Commit of a Hub id."""
    model_type: str
    hidden_size: int
    layers: int
    sha256: str
    """See `fingerprint_files`, or `fingerprint_tensors` for an encoder that has no file."""

    def dump(self) -> dict[str, Any]:
        return asdict(self)


def identify(encoder: nn.Module, folder: Path | None = None) -> EncoderIdentity:
    """Identity of an encoder; its weight files are those of `folder`, or of the place it names itself: of a Hub id
    without a folder, those of its main branch in the cache, for a model does not know of which revision it is."""
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
    """SHA-256 of the weights' index: name, dtype and shape of every tensor and its first 4 KiB.

    Reads a few hundred KiB of a checkpoint of any size, and never unpickles: of a `.bin` file the
    checksums in its zip directory are used.
    """
    entries: list[tuple[str, bytes]] = []
    for file in files:
        if file.suffix == ".safetensors":
            entries += _safetensors_entries(file)
        else:
            with zipfile.ZipFile(file) as archive:
                entries += [(i.filename, f"{i.CRC} {i.file_size}".encode()) for i in archive.infolist()]
    return _digest(entries)


def fingerprint_tensors(encoder: nn.Module) -> str:
    """The same for an encoder that exists in memory only (for example with random weights)."""
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
    """A local folder, or the snapshot of a Hub id's main branch in the cache."""
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
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []
