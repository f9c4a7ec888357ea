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
    """Identity of an encoder; its weight files are those of `folder`, or of the place it names itself."""
    config: Any = encoder.config
    path = getattr(encoder, "name_or_path", "")
    files = _weight_files(folder, path, getattr(config, "_commit_hash", None)) if folder or path else []
    return EncoderIdentity(
        path=path or config.model_type,
        revision=getattr(config, "_commit_hash", None),
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


def _weight_files(folder: Path | None, path: str, revision: str | None) -> list[Path]:
    if folder is None and Path(path).is_dir():
        folder = Path(path)
    if folder is None:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(path, "config.json", revision=revision)
        except HFValidationError:
            return []
        if not isinstance(cached, str):
            return []
        folder = Path(cached).parent
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []
