"""What all tests share: a tiny encoder with random weights, a tiny data set, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

WORDS = (
    "the a cat dog bird fish runs sleeps sings swims in on under over house garden river tree red green blue old "
    "young happy sad and but because so not never always today yesterday with without boy girl man woman eats "
    "reads writes sees hears book letter song bread apple water stone good bad yes no"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def superglue() -> Path:
    """The folder with the official SuperGLUE files, where a machine has them."""
    return _shared_data("superglue")


@pytest.fixture(scope="session")
def glue() -> Path:
    """The folder with GLUE's SST-2 and CoLA as JSON Lines, where a machine has them."""
    return _shared_data("glue")


def _shared_data(name: str) -> Path:
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"needs the data files in {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 4 layers and width 32 with random weights, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 + 23 rows of one to twelve words; the label is whether `cat` stands among them. Neither number is a
    multiple of a batch size the tests use."""
    import random

    folder = tmp_path_factory.mktemp("data")
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


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, tiny_data: Path) -> Path:
    """A recipe that trains on the tiny data in under a second: 12 steps, evaluation every 4."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        f"""
run: {{name: tiny}}
encoder: {{path: {tiny_encoder}}}
task: {{name: cats, text: [text]}}
data: {{path: {tiny_data}, max_length: 32}}
adapter: {{method: gpc, prompt_tokens: 4, prompt_init: vocab}}
train: {{steps: 12, batch_size: 9, lr: 1.0e-2, cell_lr: 1.0e-3, eval_every: 4, log_every: 1}}
engine: {{device: cpu, ranks: 1}}
tracking: {{enabled: false}}
"""
    )
    return path


def command(
    *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `gpc-dist` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "gpc_dist", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        timeout=300,
    )


def losses(folder: Path) -> dict[int, float]:
    """Training loss of each step of a run, which may be going on: its last line may be half written."""
    whole, _, _ = (folder / "metrics.jsonl").read_text().rpartition("\n")
    lines = map(json.loads, whole.splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
