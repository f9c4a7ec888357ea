"""The adapters of a server, by name. Each is taken up whole or not at all, while requests to the others go on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpc_dist.adapter.store import read_card
from gpc_dist.errors import UserError
from gpc_dist.inference.server.encoder import Loaded, SharedEncoder
from gpc_dist.inference.server.places import Found, Place, look_at_all

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """A loaded adapter, and what was found when it was."""

    found: Found
    loaded: Loaded


class Catalog:
    """Loads the adapters of all places, and the encoder that they share.

    Args:
        settings: see `SharedEncoder`.

    Raises:
        UserError: a place has no adapter, or one that cannot be loaded; two have one name; or they belong to
            different encoders.
    """

    def __init__(self, places: Sequence[Place], settings: Mapping[str, str]):
        self._places = places
        self._said: set[str] = set()
        found = look_at_all(places)
        first = next(iter(found.values()))
        with first.fetched() as folder:
            self._first, self._card = first.name, read_card(folder)
        self.encoder = SharedEncoder(self._card, settings)
        self.held = {name: self._load(each) for name, each in found.items()}
        """By name. The mapping is replaced, and never changed."""

    def look_again(self) -> int:
        """Take up what is new at the places; returns the number of adapters that were.

        What cannot be read is said once, and what was loaded before stays in its place.
        """
        before, now, problems = self.held, dict(self.held), set()
        for place in self._places:
            try:
                found = look_at_all([place])
            except (UserError, OSError) as error:  # OSError: it is being replaced just now
                problems.add(f"{place.text}: {error}")
                continue
            for name, each in found.items():
                try:
                    if name in now:
                        now[name].found.check_same(each)
                    if name not in now or each.version != now[name].found.version:
                        now[name] = self._load(each)
                except (UserError, OSError) as error:
                    problems.add(f"{each.source}: {error}")
        for problem in sorted(problems - self._said):
            log.warning("not taken up: %s", problem)
        self._said, self.held = problems, now
        changed = [name for name in now if now[name] is not before.get(name)]
        if changed:
            log.info("taken up: %s", ", ".join(changed))
        return len(changed)

    def _load(self, found: Found) -> Held:
        with found.fetched() as folder:
            card = read_card(folder)
            if card.encoder.sha256 != self._card.encoder.sha256:
                one, other = self._card.encoder, card.encoder
                raise UserError(
                    f"adapters of one server share one encoder: '{self._first}' was trained on '{one.path}' (sha256 "
                    f"{one.sha256[:12]}), and '{found.name}' on '{other.path}' (sha256 {other.sha256[:12]}): start a "
                    "server for each"
                )
            return Held(found, self.encoder.load(folder))
