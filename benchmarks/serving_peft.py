"""The reference of `serving.py`: LoRA adapters of PEFT in mixed batches (`adapter_names`), behind this project's own
HTTP application and batching, so that what differs is what runs.

    python benchmarks/serving_peft.py COUNT ADAPTER PORT

COUNT adapters with random weights on query and value (PEFT's usual choice for BERT), each with the head and the task of
the ADAPTER folder. Their requests go to `lora-0`, `lora-1`, ...
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from gpc_dist.adapter.head import pooled
from gpc_dist.adapter.pretrained import load_encoder_of
from gpc_dist.adapter.store import AdapterCard
from gpc_dist.inference.server import catalog
from gpc_dist.inference.server.encoder import Loaded, Row, SharedEncoder
from gpc_dist.inference.server.options import Options
from gpc_dist.inference.server.run import run

RANK = 8


class LoraEncoder(SharedEncoder):
    """As `SharedEncoder`, with an encoder that PEFT has put LoRA into."""

    def __init__(self, card: AdapterCard, settings: Mapping[str, str]):
        super().__init__(card, settings)
        encoder, _ = load_encoder_of(card.encoder)
        self._plain, self._model = encoder, None
        self._names: dict[int, str] = {}

    def load(self, folder: Path) -> Loaded:
        from peft import LoraConfig, get_peft_model

        loaded, name = super().load(folder), f"lora-{len(self._names)}"
        given = LoraConfig(r=RANK, target_modules=["query", "value"], init_lora_weights=False)
        if self._model is None:
            self._model = get_peft_model(self._plain, given, adapter_name=name).eval()
        else:
            self._model.add_adapter(name, given)
        self._names[id(loaded.adapter)] = name
        return loaded

    @torch.no_grad()
    def run(self, rows: Sequence[Row]) -> list[np.ndarray]:
        ids, mask, types = self._tensors(rows)
        names = [self._names[id(row.adapter)] for row in rows]
        assert self._model is not None
        states = self._model(
            input_ids=ids, attention_mask=mask, token_type_ids=types, adapter_names=names
        ).last_hidden_state
        read = pooled(states, mask, "mean")
        return [row.adapter.head([read[n : n + 1]])[0].numpy() for n, row in enumerate(rows)]


def main() -> None:
    count, adapter, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    catalog.SharedEncoder = LoraEncoder  # type: ignore[misc]
    places = [f"lora-{number}={adapter}" for number in range(count)]
    run(Options(places, {"engine.device": "cpu"}), "127.0.0.1", port, 5.0)


if __name__ == "__main__":
    main()
