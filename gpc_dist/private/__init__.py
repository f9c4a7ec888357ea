"""What this program uses of DeepSpeed, MLflow, PyTorch and transformers beyond what they document: a module for each.

Such parts may change with any release. A module here checks, when it is imported, that the installed version lies in
the range of `CHECKED` and that the parts are there; if not, the error says what to install. Nothing else in the
program names these parts. Whoever widens a range, here and in pyproject.toml, tests both of its ends first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata

from packaging.specifiers import SpecifierSet

from gpc_dist.errors import MachineError


@dataclass(frozen=True)
class Checked:
    """The versions of a library that work, as far as is known."""

    oldest: str
    """What `make test-lowest` runs with."""
    newest: str
    """What `make test` runs with (constraints.txt)."""
    below: str
    """The next release that may break anything, as the library numbers its releases."""

    @property
    def range(self) -> str:
        return f">={self.oldest},<{self.below}"


CHECKED = {
    "deepspeed": Checked("0.18", "0.19.8", below="0.20"),
    "mlflow": Checked("3.16", "3.17.2", below="4"),
    "torch": Checked("2.9", "2.13.0", below="3"),
    "transformers": Checked("5.15", "5.23.0", below="6"),
}


def check_version(package: str) -> None:
    """Compare an installed version with `CHECKED`.

    Raises:
        MachineError: it lies outside, or the package is not installed.
    """
    allowed = CHECKED[package].range
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise MachineError(f"{package} is not installed: pip install '{package}{allowed}'") from None
    if not SpecifierSet(allowed).contains(version, prereleases=True):
        raise MachineError(
            f"{package} {version} is installed, and gpc-dist was checked with {allowed}: "
            f"pip install '{package}{allowed}'"
        )


@contextmanager
def checked(package: str) -> Iterator[None]:
    """Stands around the imports of a library's private parts.

    Raises:
        MachineError: see `check_version`; or a part is not there.
    """
    check_version(package)
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise MachineError(
            f"{package} {metadata.version(package)} lacks what gpc-dist needs of it ({error}): "
            f"pip install '{package}=={CHECKED[package].newest}', with which it was checked"
        ) from None


@contextmanager
def without(module: str) -> Iterator[None]:
    """Let a module that is not imported yet seem to be missing to what is imported in the block."""
    there = sys.modules.setdefault(module, None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if there is None:
            del sys.modules[module]


def require(owner: object, *names: str) -> None:
    """Check that private attributes are there.

    Raises:
        AttributeError: one is not.
    """
    for name in names:
        getattr(owner, name)
