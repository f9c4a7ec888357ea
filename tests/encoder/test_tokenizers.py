"""Tokenizers as checkpoints have them: a SentencePiece model alone, as T5's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import T5Config
from transformers.utils import import_utils

from gpc_dist.config import EncoderConfig
from gpc_dist.encoder.frozen import load_tokenizer
from gpc_dist.errors import MachineError, UserError
from tests.tiny import WORDS

TEXTS = ("the cat sleeps under a tree", "always sing, never swim", "books and letters", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 without weights, whose tokenizer is `spiece.model` and nothing else."""
    folder = tmp_path_factory.mktemp("t5")
    T5Config().save_pretrained(folder)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS[place:] + WORDS[:place]) for place in range(len(WORDS))]),
        model_prefix=str(folder / "spiece"),
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "spiece.model"]
    return folder


def test_a_sentencepiece_model_is_a_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(EncoderConfig(path=str(folder)))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    for text in TEXTS:
        assert tokenizer(text).input_ids == [*pieces.encode(text), pieces.eos_id()]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


def test_without_sentencepiece_it_is_what_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for tiktoken, which does not help."""
    find = importlib.util.find_spec

    def seem_missing(name: str, *more: Any) -> Any:
        return None if name == "sentencepiece" else find(name, *more)

    missing = (lambda: False, import_utils.SENTENCEPIECE_IMPORT_ERROR)
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "sentencepiece", missing)
    monkeypatch.setattr(importlib.util, "find_spec", seem_missing)
    with pytest.raises(MachineError, match="sentencepiece is not installed.*pip install sentencepiece"):
        load_tokenizer(EncoderConfig(path=str(folder)))


def test_a_damaged_sentencepiece_model_is_named(folder: Path, tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    for content in (
        b"version https://git-lfs.github.com/spec/v1",
        (folder / "spiece.model").read_bytes()[:-9],
    ):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(UserError, match="no tokenizer could be loaded") as caught:
            load_tokenizer(EncoderConfig(path=str(tmp_path)))
        assert "tiktoken" not in str(caught.value)
