"""What may be the name of a folder or a file, and paths that stay inside a folder.

Names come with recipes, searches, run folders and encoders that anybody may have written.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from gpc_dist.errors import UserError
from gpc_dist.shown import shown

LONGEST = 200
"""Bytes of a name. A file system takes 255; what stands beside a file while it is written has a longer name."""


def fault_of(name: object, longest: int = LONGEST) -> str:
    """Why something cannot be the name of one folder or file, which no program takes for an option or a path; empty if
    it can.

    Args:
        longest: bytes in UTF-8 that it may have.
    """
    if not isinstance(name, str) or not name:
        return "is empty, or no text"
    if name != shown(name):
        return "holds control characters"
    if name.startswith((".", "-")):
        return f"begins with {name[0]}"
    if "/" in name or "\\" in name:
        return "is a path"
    if len(name.encode()) > longest:
        return f"is longer than {longest} bytes"
    return ""


def check_name(name: object, what: str) -> str:
    """Return a name that `fault_of` finds no fault with.

    Args:
        what: what to call it in errors.

    Raises:
        UserError: there is a fault.
    """
    if fault := fault_of(name):
        raise UserError(f"{what} '{shown(str(name))}' {fault}: {_REMEDY}")
    return str(name)


def inside(folder: Path, path: Path | str) -> Path:
    """A path inside a folder, which is also there once links are followed.

    Args:
        path: starts at the folder.

    Raises:
        UserError: it leads out of the folder.
    """
    found = folder / path
    try:
        held = found.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a circle of links, or no path
        held = False
    if not held:
        raise UserError(
            f"{found} leads out of {folder}: put what is meant there, in place of the link or path"
        )
    return found


def checked(name: str, longest: int = LONGEST) -> str:
    """For keys of a configuration: raises ValueError for a name with a fault."""
    if fault := fault_of(name, longest):
        raise ValueError(f"the name {fault}: {_REMEDY}")
    return name


_REMEDY = "give one such as my-run_1, which is no path and begins with neither . nor -"

LONGEST_OF_STUDY = 80

Name = Annotated[str, AfterValidator(checked)]
SearchName = Annotated[str, AfterValidator(partial(checked, longest=180))]
"""Trials are called after their search."""
StudyName = Annotated[str, AfterValidator(partial(checked, longest=LONGEST_OF_STUDY))]
"""Searches are called after their study and the task."""
