"""A predictor that several threads call, as MLflow's server does."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gpc_dist.adapter.graft import GraftedEncoder
from gpc_dist.inference.adapters import Predictor
from tests.inference.server.made import CATS, write_adapter
from tests.tiny import WORDS


@pytest.mark.parametrize("first_layer", [0, 2])
def test_threads_take_turns_and_get_their_own_answers(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_layer: int
) -> None:
    folder = write_adapter(
        tmp_path / "one", tiny_encoder, CATS, {"prompt_tokens": 4, "first_layer": first_layer}
    )
    predictor = Predictor(folder, {"engine.device": "cpu"})
    texts = [" ".join(WORDS[: 1 + number]) for number in range(8)]
    alone = [predictor.predict([{"text": text}])[0].probabilities for text in texts]
    inside = most = 0
    forward = GraftedEncoder.forward

    def counted(self: GraftedEncoder, *given: Any, **named: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)  # so that the others come in, where they can
        try:
            return forward(self, *given, **named)
        finally:
            inside -= 1

    monkeypatch.setattr(GraftedEncoder, "forward", counted)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda text: predictor.predict([{"text": text}])[0].probabilities, texts))
    assert most == 1
    assert found == alone
