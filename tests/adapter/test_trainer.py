"""A graft as a model of transformers: loss on request, the Trainer, and the examples of docs/interchange.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gpc_dist.adapter import AdapterConfig, GraftedEncoder, attach
from tests.conftest import gpc

from .encoders import batch_for, randomise, tiny
from .grafts import grafted, options

PAGE = (Path(__file__).parents[2] / "docs" / "interchange.md").read_text(encoding="utf-8")


def example(word: str) -> str:
    """The one Python block of the page with a word in it."""
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if word in code]
    return found


def test_loss_of_classes() -> None:
    graft, batch, labels = grafted("bert", options("gated")), batch_for("bert"), torch.tensor([2, 0, -100])
    logits = graft(**batch)
    output = graft(**batch, labels=labels)
    assert torch.equal(output.logits, logits)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits[:2], labels[:2]))
    output.loss.backward()
    assert all(p.grad is not None for p in graft.adapter.parameters())
    assert list(graft(**batch, return_dict=True)) == ["logits"]


def test_loss_of_numbers() -> None:
    graft, batch = grafted("bert", options("gated"), outputs=1), batch_for("bert")
    labels = torch.tensor([0.5, -1.0, 2.0])
    torch.testing.assert_close(graft(**batch, labels=labels).loss, F.mse_loss(graft(**batch)[:, 0], labels))
    with pytest.raises(ValueError, match="need a head with one output, not 3"):
        grafted("bert", options("gated"))(**batch, labels=labels)


def test_loss_is_of_one_lane() -> None:
    graft, batch = grafted("bert", options("gated")), batch_for("bert")
    with pytest.raises(ValueError, match="leave lane_rows out"):
        graft(**batch, lane_rows=[3], labels=torch.zeros(3, dtype=torch.long))


def test_a_state_dict_holds_what_is_trained() -> None:
    graft, batch = grafted("bert", options("gated")), batch_for("bert")
    state = graft.state_dict()
    assert state.keys() == {f"lanes.0.{name}" for name, _ in graft.adapter.named_parameters()}
    other = attach(tiny("bert"), graft.adapter.config, outputs=3)
    assert not torch.equal(other(**batch), graft(**batch))
    other.load_state_dict(state)
    assert torch.equal(other(**batch), graft(**batch))
    # also where it is part of something larger
    pair = torch.nn.ModuleDict({"graft": other, "more": torch.nn.Linear(2, 2)})
    randomise(pair["more"])
    assert {name.partition(".")[0] for name in pair.state_dict()} == {"graft", "more"}
    pair.load_state_dict(pair.state_dict())
    for lacking in ("lanes.0.head.linear.bias", "more.bias"):
        rest = {name: value for name, value in pair.state_dict().items() if not name.endswith(lacking)}
        with pytest.raises(RuntimeError, match=lacking):
            pair.load_state_dict(rest)


@pytest.mark.slow
def test_the_example_with_the_trainer(
    minilm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel

    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"path": minilm_folder}
    exec(example("Trainer"), scope)
    trainer, model = scope["trainer"], scope["model"]
    losses = [each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each]
    assert losses[-1] < 0.3  # two texts, learnt by heart
    again = GraftedEncoder.from_pretrained("my-adapter", AutoModel.from_pretrained(minilm_folder))
    batch = scope["tokenizer"](["a fine film"], return_tensors="pt").to(
        model.adapter.head.linear.weight.device
    )
    assert torch.equal(again(**batch), model(**batch))
    # the Trainer's own checkpoint, and going on from it
    (checkpoint,) = (tmp_path / "trained").glob("checkpoint-*")
    size = (checkpoint / "model.safetensors").stat().st_size
    assert size < 4.1 * sum(p.numel() for p in model.adapter.parameters())
    trained = {name: p.detach().clone() for name, p in model.adapter.named_parameters()}
    randomise(model.adapter)
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, trained[name]) for name, p in model.adapter.named_parameters())


def test_the_example_with_peft(
    minilm: Any, minilm_folder: Path, minilm_tokenizer: Any, tmp_path: Path
) -> None:
    import transformers
    from peft import PeftModel
    from safetensors.torch import load_file

    graft = attach(minilm, AdapterConfig(method="prompt-tuning", prompt_tokens=5), outputs=2)
    graft.save_pretrained(tmp_path / "ours")
    assert gpc("export", tmp_path / "ours", "--peft", tmp_path / "peft-rte") == 0
    scope: dict[str, Any] = {
        "AutoModel": transformers.AutoModel,
        "PeftModel": PeftModel,
        "path": minilm_folder,
        "head": load_file(tmp_path / "peft-rte" / "head.safetensors"),
        "prompt_tokens": 5,
        "batch": minilm_tokenizer([["A cup.", "Hot?"], ["No.", ""]], padding=True, return_tensors="pt"),
    }
    exec(example("PeftModel").replace('"peft-rte"', repr(str(tmp_path / "peft-rte"))), scope)
    torch.testing.assert_close(scope["logits"], graft(**scope["batch"]), rtol=1e-4, atol=1e-5)
