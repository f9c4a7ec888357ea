"""ZeRO-3 with encoders that are not built like BERT: a bias shared by all layers (T5), layers that share their
weights (ALBERT), layers that return tuples (DeBERTa)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AlbertConfig,
    AlbertModel,
    DebertaV2Config,
    DebertaV2Model,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.conftest import losses
from tests.processes import on_ranks
from tests.tiny import WORDS

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"vocab_size": len(WORDS) + 5}
BERT_LIKE = SMALL | {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}


def t5() -> T5ForConditionalGeneration:
    """A whole encoder-decoder: only its encoder half is to be loaded."""
    config = T5Config(
        **SMALL, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def albert() -> AlbertModel:
    return AlbertModel(AlbertConfig(**BERT_LIKE, embedding_size=16))


def deberta() -> DebertaV2Model:
    relative = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    return DebertaV2Model(DebertaV2Config(**BERT_LIKE, **relative, conv_kernel_size=3))


def pickle_weights(folder: Path) -> None:
    """Write the weights in the format of PyTorch instead, as older checkpoints have them: encoder and decoder in one
    file, matrices stored column by column."""
    tensors = load_file(folder / "model.safetensors")
    turned = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in tensors.items()}
    torch.save(turned, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def written(make: Any, tiny_encoder: Path, folder: Path) -> Path:
    """The folder of an encoder with random weights, and with the tokenizer of another one."""
    torch.manual_seed(0)
    make().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (tiny_encoder / name).exists():
            shutil.copy(tiny_encoder / name, folder)
    return folder


@pytest.mark.parametrize(("make", "pickled"), [(t5, False), (t5, True), (albert, False), (deberta, False)])
def test_sharded_and_whole_give_the_same_losses(
    make: Any, pickled: bool, tiny_recipe: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = written(make, tiny_encoder, tmp_path / "encoder")
    found = []
    for ranks, stage in ((1, 0), (2, 3)):
        run = tmp_path / f"{ranks}-{stage}"
        arguments = ("--encoder.path", folder, "--run.dir", run, "--train.steps", 5)
        done = on_ranks(ranks, "train", tiny_recipe, *arguments, "--engine.zero_stage", stage)
        assert done.returncode == 0, done.stderr
        found.append(losses(run))
        if pickled and ranks == 1:  # the others read their shards of this
            pickle_weights(folder)
    assert sorted(found[0]) == [1, 2, 3, 4, 5]
    assert found[1] == pytest.approx(found[0], rel=2e-4)


@pytest.mark.parametrize("make", [t5, albert, deberta])
def test_sharded_and_whole_are_fine_tuned_alike(
    make: Any, tiny_recipe: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = written(make, tiny_encoder, tmp_path / "encoder")
    method = ("--adapter.method", "fine-tuning", "--train.encoder_lr", 1e-3, "--train.lr", 1e-2)
    passes = ("--engine.micro_batch_tokens", 40, "--engine.activation_checkpointing", "true")
    found = []
    for ranks, stage, more in ((1, 0, ()), (2, 3, passes)):
        run = tmp_path / f"{ranks}-{stage}"
        arguments = ("--encoder.path", folder, "--run.dir", run, "--train.steps", 5, *method, *more)
        done = on_ranks(ranks, "train", tiny_recipe, *arguments, "--engine.zero_stage", stage)
        assert done.returncode == 0, done.stderr
        found.append(losses(run))
    assert sorted(found[0]) == [1, 2, 3, 4, 5]
    assert found[1] == pytest.approx(found[0], rel=5e-4)
