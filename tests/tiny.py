"""A tiny encoder with random weights, tiny data, and the recipe that trains on them in under a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = (
    "the a cat dog bird fish runs sleeps sings swims in on under over house garden river tree red green blue old "
    "young happy sad and but because so not never always today yesterday with without boy girl man woman eats "
    "reads writes sees hears book letter song bread apple water stone good bad yes no"
).split()


def write_encoder(folder: Path) -> Path:
    """A BERT of 4 layers and width 32 with random weights, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def write_data(folder: Path) -> Path:
    """70 + 23 rows of one to twelve words; the label is whether `cat` stands among them. Neither number is a
    multiple of a batch size the tests use."""
    draw = random.Random(7)
    for split, count in (("train", 70), ("validation", 23)):
        rows = []
        for number in range(count):
            words = draw.choices([w for w in WORDS if w != "cat"], k=draw.randint(1, 12))
            label = number % 2
            if label:
                words[draw.randrange(len(words))] = "cat"
            rows.append({"text": " ".join(words), "label": ["without", "with"][label]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def write_other_data(folder: Path) -> Path:
    """31 + 17 rows for two tasks that are no classification: `words` is how many words a text has, and `right` which of
    `first` and `second` has a `cat` in it."""
    draw = random.Random(11)
    for split, count in (("train", 31), ("validation", 17)):
        rows = []
        for number in range(count):
            words = draw.choices(WORDS, k=draw.randint(2, 20))
            candidates = [" ".join(draw.choices(WORDS[1:3], k=draw.randint(1, 5))) for _ in range(2)]
            candidates[number % 2] = f"the cat and {candidates[number % 2]}"
            row = {"text": " ".join(words), "words": len(words) / 10, "right": number % 2}
            rows.append(row | dict(zip(("first", "second"), candidates, strict=True)))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def write_recipe(path: Path, encoder: Path, data: Path) -> Path:
    """A recipe that trains on the tiny data in under a second: 12 steps, evaluation every 4."""
    path.write_text(
        f"""
run: {{name: tiny}}
encoder: {{path: {encoder}}}
task: {{name: cats, text: [text]}}
data: {{path: {data}, max_length: 32}}
adapter: {{method: gpc, prompt_tokens: 4, prompt_init: vocab}}
train: {{steps: 12, batch_size: 9, lr: 1.0e-2, cell_lr: 1.0e-3, eval_every: 4, log_every: 1}}
engine: {{device: cpu, ranks: 1}}
tracking: {{enabled: false}}
"""
    )
    return path
