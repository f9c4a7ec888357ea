"""The tensors of a checkpoint that belong to an encoder's parameters, and checksums of its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from gpc_dist.errors import UserError
from gpc_dist.files import read_text, sha256
from gpc_dist.tensors import Stored

SUMS = "SHA256SUMS"
"""A line for each weight file, as `sha256sum` writes it."""


def match(model: nn.Module, stored: dict[str, Stored]) -> dict[nn.Parameter, Stored]:
    """The stored tensor of each parameter of `model`; tied parameters are one parameter.

    Names may differ by a prefix (the checkpoint of a model with a task head calls an encoder's weights
    `bert.encoder...`), and layer norms may have their old names `gamma` and `beta`. Tensors of other modules
    than the model's own, such as a task head or a decoder, are left alone.

    Raises:
        UserError: missing weights, unexpected ones inside the model's own modules, or wrong shapes or dtypes.
    """
    stored = _with_new_names(stored)
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
        if not place.dtype.is_floating_point or place.dtype.itemsize < 2:
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
        if (found := sha256(file)) != expected:
            raise UserError(f"{file} has SHA-256 {found}, not {expected}: it is damaged, fetch it again")


def _expected_sum(file: Path) -> str:
    sums = file.parent / SUMS
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
        f"encoder.checksum: nothing to compare {file} with: run `sha256sum *{file.suffix} > {SUMS}` where the "
        "files are known to be good, and put it beside them"
    )


def _with_new_names(stored: dict[str, Stored]) -> dict[str, Stored]:
    new = {"gamma": "weight", "beta": "bias"}
    found: dict[str, Stored] = {}
    for old, place in stored.items():
        name = re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{new[m[1]]}", old)
        if name in found or (name != old and name in stored):
            raise UserError(f"{place.file}: {name!r} is there under its old name too: remove one of them")
        found[name] = place
    return found


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
    shown = ", ".join(f"{name!r}" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
