"""Where served adapters are: folders of adapters, of runs and of searches, and models of MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from gpc_dist.adapter.store import CARD, NAMES
from gpc_dist.errors import UserError
from gpc_dist.files import few, version
from gpc_dist.names import check_name, fault_of
from gpc_dist.runs.folder import RunFolder, SearchFolder
from gpc_dist.runs.result import SearchResult
from gpc_dist.tracking.fetch_model import fetch_model, fixed_uri, is_model_uri, model_name
from gpc_dist.typed import read_as


@dataclass(frozen=True)
class Found:
    """An adapter that was found, and not loaded."""

    name: str
    """What requests call it."""
    source: str
    """Where it is, in words."""
    version: str
    """Tells what is there from what was or will be there."""
    folder: Callable[[Path], Path]
    """Gives the adapter's folder; what has to be fetched is put into the folder that it is given."""

    def check_same(self, other: Found) -> None:
        """Raise `UserError` if another adapter of this name is at another place."""
        if other.source != self.source:
            raise UserError(
                f"{self.source} and {other.source} are both called '{self.name}': give one another name, as in "
                f"{self.name}-2={other.source}"
            )

    @contextmanager
    def fetched(self) -> Iterator[Path]:
        """The adapter's folder, while the block runs."""
        with TemporaryDirectory(prefix="gpc-dist-") as scratch:
            yield self.folder(Path(scratch))


@dataclass(frozen=True)
class Place:
    """A place that a user named, `PLACE` or `NAME=PLACE`."""

    text: str
    name: str | None = None

    @classmethod
    def parse(cls, given: str) -> Place:
        name, equals, text = given.partition("=")
        # a path may hold the sign too
        return cls(text, name) if equals and not fault_of(name) and not is_model_uri(given) else cls(given)

    def look(self) -> list[Found]:
        """The adapters that are there now: one, or all in a folder of runs.

        Raises:
            UserError: there is none; or there are several, and the place has one name.
        """
        found = [_model(self.text)] if is_model_uri(self.text) else _in_folder(Path(self.text))
        if self.name is None:
            return found
        if len(found) > 1:
            raise UserError(
                f"{self.text} holds {len(found)} adapters ({few([each.name for each in found])}), and has the one name "
                f"'{self.name}': give the places of each"
            )
        return [Found(self.name, found[0].source, found[0].version, found[0].folder)]


def look_at_all(places: Sequence[Place]) -> dict[str, Found]:
    """The adapters at all places, by name.

    Raises:
        UserError: see `Place.look`; or two have the same name.
    """
    named: dict[str, Found] = {}
    for found in (each for place in places for each in place.look()):
        check_name(found.name, "the adapter's name")
        named.setdefault(found.name, found).check_same(found)
    return named


def _model(uri: str) -> Found:
    fixed = fixed_uri(uri)
    return Found(model_name(uri), uri, fixed, lambda scratch: fetch_model(fixed, scratch))


def _in_folder(folder: Path) -> list[Found]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give that of an adapter, a run or a search")
    if found := _adapter_of(folder):
        return [found]
    # what is hidden is nobody's to serve: among others, adapters that are being written
    shown = (each for each in sorted(folder.iterdir()) if each.is_dir() and not each.name.startswith("."))
    inside = [_adapter_of(each) for each in shown]
    if not any(inside):
        raise UserError(
            f"there is no adapter in {folder}: give the folder of one, of a finished run or search, or of such folders"
        )
    return [found for found in inside if found is not None]


def _adapter_of(folder: Path) -> Found | None:
    """The adapter of an adapter's, a run's or a search's folder; None where there is none (yet)."""
    absolute = folder.absolute()
    if (folder / CARD).is_file():
        named = absolute.parent if absolute == RunFolder(absolute.parent).adapter else absolute
        return _local(named.name, folder, folder)
    if (RunFolder(folder).adapter / CARD).is_file():
        return _local(absolute.name, folder, RunFolder(folder).adapter)
    search = SearchFolder(folder)
    if search.config.is_file() and (result := read_as(SearchResult, search.result)) and result.best_trial:
        return _local(absolute.name, folder, search.trial(result.best_trial).adapter)
    return None


def _local(name: str, source: Path, adapter: Path) -> Found:
    # the files of each version are new ones
    versions = " ".join(version(adapter / file) for file in NAMES)
    return Found(name, str(source), f"{adapter} {versions}", lambda _: adapter)
