from __future__ import annotations

from pathlib import Path

import pytest

from tests.inference.server.made import KINDS, write_adapter


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> dict[str, Path]:
    """A folder for each of `KINDS`, in one folder."""
    place = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(place / name, tiny_encoder, *kind, seed=seed)
        for seed, (name, kind) in enumerate(KINDS.items())
    }
