"""Whoever is in the batch, the answers are those that each adapter gives by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpc_dist.adapter.halves import LowerHalf
from gpc_dist.errors import UserError
from gpc_dist.inference.adapters import Predictor
from gpc_dist.inference.server.encoder import Row, SharedEncoder
from gpc_dist.inference.server.service import Service
from gpc_dist.tasks import Prediction
from tests.conftest import gpc
from tests.inference.server.made import KINDS, ROWS, options, write_adapter


def rows_of(name: str) -> Sequence[Any]:
    return ROWS[str(KINDS[name][0]["name"])]


def assert_same(found: Prediction, expected: Prediction) -> None:
    assert found.id == expected.id
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    if expected.probabilities is None:
        assert found.value == pytest.approx(expected.value, abs=1e-5)
    else:
        assert found.value == expected.value


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[Row]]:
    """The rows of each pass."""
    made: list[list[Row]] = []
    run = SharedEncoder.run

    def noted(self: SharedEncoder, rows: Sequence[Row]) -> Any:
        made.append(list(rows))
        return run(self, rows)

    monkeypatch.setattr(SharedEncoder, "run", noted)
    return made


async def ask_all(service: Service, names: Sequence[str]) -> list[list[Prediction]]:
    held = service.catalog.held
    async with service.running():
        asked = [service.predict(held[name].loaded, rows_of(name)) for name in names]
        return list(await asyncio.gather(*asked))


@pytest.mark.parametrize("batch_tokens", [4096, 40])
def test_adapters_that_share_passes_answer_as_alone(
    adapters: dict[str, Path], passes: list[list[Row]], batch_tokens: int
) -> None:
    service = Service(options(*adapters.values(), batch_tokens=batch_tokens, wait_ms=100))
    names = list(KINDS) * 2
    found = asyncio.run(ask_all(service, names))
    assert all(len({row.kind for row in rows}) == 1 for rows in passes)
    shared = {len({row.adapter for row in rows}) for rows in passes}
    assert max(shared) >= (5 if batch_tokens == 4096 else 1)
    for name, predictions in zip(names, found, strict=True):
        expected = Predictor(adapters[name], {"engine.device": "cpu"}).predict(rows_of(name))
        for pair in zip(predictions, expected, strict=True):
            assert_same(*pair)


def test_lower_layers_run_once_for_a_text_of_several_adapters(
    adapters: dict[str, Path], tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = write_adapter(tmp_path / "other", tiny_encoder, *KINDS["late"], seed=99)
    service = Service(options(adapters["late"], more, wait_ms=100))
    lower: list[int] = []
    call = LowerHalf.__call__

    def noted(self: LowerHalf, ids: torch.Tensor, *others: Any) -> torch.Tensor:
        lower.append(len(ids))
        return call(self, ids, *others)

    monkeypatch.setattr(LowerHalf, "__call__", noted)

    async def both() -> list[list[Prediction]]:
        held = service.catalog.held
        async with service.running():
            asked = [service.predict(held[name].loaded, ROWS["cats"]) for name in ("late", "other")]
            return list(await asyncio.gather(*asked))

    one, other = asyncio.run(both())
    assert lower == [2]
    assert one[0].probabilities != other[0].probabilities
    for folder, found in ((adapters["late"], one), (more, other)):
        for pair in zip(
            found, Predictor(folder, {"engine.device": "cpu"}).predict(ROWS["cats"]), strict=True
        ):
            assert_same(*pair)


def test_what_has_an_encoder_of_its_own_is_refused(
    adapters: dict[str, Path], tiny_recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tuned"
    words = ("--adapter.method", "fine-tuning", "--train.steps", 1, "--run.dir", run)
    assert gpc("train", tiny_recipe, *words) == 0
    with pytest.raises(UserError, match="fine-tuned encoder.*mlflow models serve"):
        Service(options(adapters["late"], run))


def test_the_encoder_is_whole(adapters: dict[str, Path]) -> None:
    given = options(adapters["late"])
    with pytest.raises(UserError, match=r"engine\.zero_stage 3"):
        Service(replace(given, settings={**given.settings, "engine.zero_stage": "3"}))
