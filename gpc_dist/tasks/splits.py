"""Which local files are a split: one, or all parts of it as data sets are downloaded from the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gpc_dist.errors import UserError
from gpc_dist.tasks.example import Split
from gpc_dist.tasks.formats import SUFFIXES, suffix_of

_STEMS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test",),
}

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?:-[0-9a-f]+)?", re.ASCII)
"""`train-00000-of-00003`, and with the hash that the Hub's files had until 2023."""


def split_files(path: Path | None, split: Split, named: str | None, config: str | None) -> list[Path]:
    """The files of a split, in order.

    Args:
        path: `data.path`: a folder, or the file of the training split.
        named: file that is named for the split, in the folder or anywhere. If it is one of several numbered parts, it
            stands for all of them, except as the test split: that is the one file to predict.
        config: a folder of this name in `path` may hold the split too; `default` when not given, as on the Hub.

    Raises:
        UserError: no file, files of which each could be the split, or a part is missing.
    """
    if named is not None:
        file = _named_file(path, split, named)
        return [file] if split == "test" else _all_parts(file)
    if path is None:
        raise UserError(
            f"no data: set data.path to a folder with a {split} file or to a Hub id, "
            f"or data.{split} to a file"
        )
    if path.is_file():
        if split == "train":
            return _all_parts(path)
        raise UserError(
            f"data.path is the single file {path}, read as the training split: "
            f"set data.{split} to the {split} file"
        )
    if not path.is_dir():
        raise UserError(f"data.path {path} does not exist: give a folder, a file or a Hub id")
    return _usual_files(path, split, config)


def _named_file(path: Path | None, split: Split, named: str) -> Path:
    folder = path if path is None or path.is_dir() else path.parent
    candidates = [folder / named] if folder is not None else []
    candidates.append(Path(named))
    for file in candidates:
        if file.is_file():
            return file
    looked = " and ".join(str(file) for file in dict.fromkeys(candidates))
    raise UserError(f"data.{split} '{named}' does not exist (looked at {looked})")


def _usual_files(folder: Path, split: Split, config: str | None) -> list[Path]:
    """The files under the usual names in a folder, in its folder `data`, or in that of a configuration."""
    found: dict[str, list[Path]] = {}
    for place in dict.fromkeys((folder, folder / "data", folder / (config or "default"))):
        for entry in sorted(place.iterdir()) if place.is_dir() else ():
            if entry.is_dir() and entry.name in _STEMS[split]:
                if inside := [file for file in sorted(entry.iterdir()) if suffix_of(file)]:
                    found[f"{entry.relative_to(folder)}/"] = inside
            elif _stem(entry) in _STEMS[split] and suffix_of(entry):
                found.setdefault(str(_whole(entry).relative_to(folder)), []).append(entry)
    if len(found) > 1:
        raise UserError(
            f"{folder} has several {split} files ({', '.join(found)}): set data.{split} to one, or remove the others"
        )
    if not found:
        held = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise UserError(
            f"no {split} file in {folder} (looked for {', '.join(_STEMS[split])} with "
            f"{', '.join(SUFFIXES)}; it holds {held}): set data.{split} to a file"
        )
    (files,) = found.values()
    _check_parts(files)
    return files


def _all_parts(file: Path) -> list[Path]:
    """The files of which `file` is one part, or `file` alone."""
    if _part(file) is None:
        return [file]
    parts = [other for other in sorted(file.parent.iterdir()) if _whole(other) == _whole(file)]
    _check_parts(parts)
    return parts


def _check_parts(files: Sequence[Path]) -> None:
    """Raise `UserError` if files are of several formats, or of the parts of a file not each is there once."""
    if len({suffix_of(file) for file in files}) > 1:
        raise UserError(
            f"{files[0].parent} holds files of several formats ({', '.join(file.name for file in files)}): "
            "keep those of one"
        )
    for whole in dict.fromkeys(map(_whole, files)):
        parts = [found for file in files if _whole(file) == whole and (found := _part(file))]
        numbers = sorted(int(part["number"]) for part in parts)
        if parts and numbers != list(range(int(parts[0]["count"]))):
            shown = ", ".join(map(str, numbers))
            raise UserError(
                f"{whole} has {int(parts[0]['count'])} parts, counted from 0, and here are {shown}: "
                "fetch those that are missing, and keep each once"
            )


def _part(file: Path) -> re.Match[str] | None:
    return _PART.fullmatch(file.name[: len(file.name) - len(suffix_of(file))])


def _stem(file: Path) -> str:
    """The name without its ending and its number among the parts."""
    part = _part(file)
    return part["stem"] if part else file.name[: len(file.name) - len(suffix_of(file))]


def _whole(file: Path) -> Path:
    """What all parts of a file have in common: their path with `*` for the number."""
    part = _part(file)
    return file.with_name(f"{part['stem']}-*-of-{part['count']}{suffix_of(file)}") if part else file
