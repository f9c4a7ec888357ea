"""Adapters come from PEFT and go to it with the same logits; what cannot is refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpc_dist.adapter import AdapterConfig, GraftedEncoder
from gpc_dist.adapter.fingerprint import identify
from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.peft import CARD, HEAD, HEAD_CARD, PICKLED, WEIGHTS, Base, write_peft
from gpc_dist.adapter.store import load_adapter
from gpc_dist.errors import EXIT_DONE, EXIT_USAGE
from tests.conftest import gpc

from .encoders import P, batch_for, randomise, saved_encoder, tiny, tiny_config
from .grafts import grafted, options
from .reference import start_of

WITH_HEADS = ("bert", "roberta", "xlm-roberta")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def peft_model(base: Any, kind: str = "PROMPT_TUNING", task_type: str = "SEQ_CLS", **more: Any) -> Any:
    from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model

    made = {"PROMPT_TUNING": PromptTuningConfig, "P_TUNING": PromptEncoderConfig}[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, made(task_type=task_type, num_virtual_tokens=P, **more))
    randomise(torch.nn.ModuleList([p for n, p in model.named_children() if n == "prompt_encoder"]), seed=3)
    return model.eval()


def classifier(family: str, folder: Path) -> Any:
    """A model for classification with random weights, loaded from a folder."""
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_config(tiny_config(family, num_labels=3))
    randomise(model)
    model.save_pretrained(folder)
    return auto.from_pretrained(folder)


def imported(folder: Path, encoder: Path, output: Path) -> GraftedEncoder:
    """What `gpc-dist import` makes of a folder of PEFT's, on its encoder."""
    assert gpc("import", "--peft", folder, "--output", output, "--encoder.path", encoder) == EXIT_DONE
    return GraftedEncoder.from_pretrained(output, transformers.AutoModel.from_pretrained(encoder))


@torch.no_grad()
def assert_same_logits(graft: GraftedEncoder, model: Any, batch: dict[str, Tensor]) -> None:
    found, expected = graft(**batch), model(**batch).logits
    assert found.std() > 0.01
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
@pytest.mark.parametrize("family", WITH_HEADS)
def test_an_adapter_of_peft_is_ours_and_back(family: str, kind: str, tmp_path: Path) -> None:
    model, batch = peft_model(classifier(family, tmp_path / "base"), kind), batch_for(family)
    model.save_pretrained(tmp_path / "peft")
    graft = imported(tmp_path / "peft", tmp_path / "base", tmp_path / "ours")
    assert_same_logits(graft, model, batch)

    from peft import PeftModel

    assert gpc("export", tmp_path / "ours", "--peft", tmp_path / "again") == EXIT_DONE
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    again = PeftModel.from_pretrained(base, tmp_path / "again").eval()
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == [CARD, WEIGHTS]
    assert_same_logits(graft, again, batch)


@pytest.mark.parametrize("pooling", ["mean", "first", "prompt", "prompt-first"])
@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "umt5", "distilbert"])
def test_ours_is_an_adapter_of_peft_and_back(family: str, pooling: str, tmp_path: Path) -> None:
    """With the head beside it, because transformers has none that reads so."""
    from peft import PeftModel

    tiny(family).save_pretrained(tmp_path / "base")
    loader = transformers.AutoModelForTextEncoding if "t5" in family else transformers.AutoModel
    encoder, batch = loader.from_pretrained(tmp_path / "base"), batch_for(family)
    graft = grafted(encoder, options("prompt-tuning", pooling=pooling, head_hidden=pooling == "mean"))
    graft.save_pretrained(tmp_path / "ours")
    assert gpc("export", tmp_path / "ours", "--peft", tmp_path / "peft") == EXIT_DONE

    model = PeftModel.from_pretrained(loader.from_pretrained(tmp_path / "base"), tmp_path / "peft").eval()
    head = load_file(tmp_path / "peft" / HEAD)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        read = {
            "mean": (states[:, P:] * mask).sum(1) / mask.sum(1),
            "first": states[:, P],
            "prompt": states[:, :P].mean(1),
            "prompt-first": states[:, 0],
        }[pooling]
        if "hidden.weight" in head:
            read = torch.tanh(read @ head["hidden.weight"].T + head["hidden.bias"])
        torch.testing.assert_close(
            graft(**batch), read @ head["linear.weight"].T + head["linear.bias"], rtol=1e-5, atol=1e-5
        )

    again = imported(tmp_path / "peft", tmp_path / "base", tmp_path / "again")
    assert torch.equal(again(**batch), graft(**batch))
    assert again.adapter.config.pooling == pooling


def test_peft_gets_the_prompt_that_an_mlp_makes(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "base")
    encoder, batch = transformers.AutoModel.from_pretrained(tmp_path / "base"), batch_for("bert")
    graft = grafted(encoder, options("prompt-tuning-mlp"))
    graft.save_pretrained(tmp_path / "ours")
    assert gpc("export", tmp_path / "ours", "--peft", tmp_path / "peft") == EXIT_DONE
    again = imported(tmp_path / "peft", tmp_path / "base", tmp_path / "again")
    torch.testing.assert_close(again.adapter.prompt.start, start_of(graft.adapter))
    assert torch.equal(again(**batch), graft(**batch))


def test_the_real_minilm(minilm_folder: Path, minilm_tokenizer: Any, tmp_path: Path) -> None:
    batch = dict(minilm_tokenizer([["A cup.", "Is it hot?"], ["No.", ""]], padding=True, return_tensors="pt"))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(minilm_folder, num_labels=2)
    model = peft_model(base, "P_TUNING")
    model.save_pretrained(tmp_path / "peft")
    graft = imported(tmp_path / "peft", minilm_folder, tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(graft(**batch), model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_an_imported_adapter_is_evaluated_as_any_other(
    tiny_encoder: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = transformers.AutoModelForSequenceClassification
    peft_model(auto.from_pretrained(tiny_encoder, num_labels=2)).save_pretrained(tmp_path / "peft")
    words = ["import", "--peft", tmp_path / "peft", "--output", tmp_path / "ours"]
    words += ["--encoder.path", tiny_encoder, "--data.path", tiny_data, "--data.max_length", 32]
    words += ["--task.name", "cats", "--task.text", "[text]", "--task.labels"]
    assert gpc(*words, "[a, b, c]") == EXIT_USAGE
    assert "the adapter has 2 outputs, and task 'cats' needs 3" in capsys.readouterr().err
    assert gpc(*words, "[without, with]") == EXIT_DONE
    capsys.readouterr()
    assert gpc("evaluate", tmp_path / "ours", "--engine.device", "cpu") == EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    assert found["confusion_matrix"]["labels"] == ["without", "with"]
    assert found["examples"] == 23


def test_pickled_weights_are_read_without_unpickling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = peft_model(classifier("bert", tmp_path / "base"))
    model.save_pretrained(tmp_path / "peft", safe_serialization=False)
    assert not (tmp_path / "peft" / WEIGHTS).exists()
    graft = imported(tmp_path / "peft", tmp_path / "base", tmp_path / "ours")
    assert_same_logits(graft, model, batch_for("bert"))

    torch.save({"prompt_embeddings": shutil.rmtree}, tmp_path / "peft" / PICKLED)
    words = ("--peft", tmp_path / "peft", "--output", tmp_path / "new", "--encoder.path", tmp_path / "base")
    assert gpc("import", *words) == EXIT_USAGE
    assert "cannot be an adapter of this encoder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "LORA"}, "is of PEFT's type LORA, and only prompts"),
        ({"peft_type": "PREFIX_TUNING"}, "is of PEFT's type PREFIX_TUNING"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type SEQ_2_SEQ_LM, whose answer is no class"),
        ({"num_transformer_submodules": 2}, "has a prompt for the decoder, too"),
        ({"task_type": "TOKEN_CLS"}, f"it has a prompt and no head: {HEAD} is missing"),
        ({"task_type": "FEATURE_EXTRACTION"}, f"it has a prompt and no head: {HEAD} is missing"),
        ({"peft_type": 3}, "peft_type"),
    ],
)
def test_other_adapters_of_peft(
    changes: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft_model(classifier("bert", tmp_path / "base")).save_pretrained(tmp_path / "peft")
    card = json.loads((tmp_path / "peft" / CARD).read_text())
    (tmp_path / "peft" / CARD).write_text(json.dumps(card | changes))
    words = ("--peft", tmp_path / "peft", "--output", tmp_path / "ours", "--encoder.path", tmp_path / "base")
    assert gpc("import", *words) == EXIT_USAGE
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_heads_that_cannot_be_expressed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft_model(classifier("electra", tmp_path / "electra"), token_dim=16).save_pretrained(tmp_path / "peft")
    words = ("--peft", tmp_path / "peft", "--output", tmp_path / "ours", "--encoder.path")
    assert gpc("import", *words, tmp_path / "electra") == EXIT_USAGE
    assert "on encoder family 'electra' cannot be expressed: its head has gelu" in capsys.readouterr().err

    peft_model(classifier("bert", tmp_path / "bert")).save_pretrained(tmp_path / "peft")
    without = transformers.BertModel(tiny_config("bert"), add_pooling_layer=False)
    without.save_pretrained(tmp_path / "headless")
    assert gpc("import", *words, tmp_path / "headless") == EXIT_USAGE
    assert "the encoder's files hold no pooler" in capsys.readouterr().err

    wide = transformers.BertForSequenceClassification(tiny_config("bert", hidden_size=64))
    wide.save_pretrained(tmp_path / "wide")
    assert gpc("import", *words, tmp_path / "wide") == EXIT_USAGE
    assert "has shape" in capsys.readouterr().err

    weights = load_file(tmp_path / "peft" / WEIGHTS)
    save_file(weights | {"prompt_embeddings": torch.zeros(10_001, 32)}, tmp_path / "peft" / WEIGHTS)
    assert gpc("import", *words, tmp_path / "bert") == EXIT_USAGE
    assert "prompt_tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (options("gated"), "adapter.method is gpc: its cell writes a new prompt between the layers"),
        (options("deep-prompt"), "adapter.method is deep-prompt: it has a prompt for each layer"),
        (AdapterConfig(method="linear-probe"), "adapter.method is linear-probe: it has no prompt"),
        (
            options("prompt-tuning", first_layer=1),
            "its prompt enters before layer 1, and PEFT's before the first",
        ),
        (options("prompt-tuning", head_layers="mix"), "its head reads several layers"),
    ],
)
def test_what_peft_cannot_express(
    config: AdapterConfig, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graft = grafted(saved_encoder(tmp_path / "base"), config)
    graft.save_pretrained(tmp_path / "ours")
    assert gpc("export", tmp_path / "ours", "--peft", tmp_path / "peft") == EXIT_USAGE
    assert f"PEFT cannot express this adapter: {reason}"[:110] in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()


def test_a_folder_of_others_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grafted(saved_encoder(tmp_path / "base"), options("prompt-tuning")).save_pretrained(tmp_path / "ours")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "mine.txt").touch()
    assert gpc("export", tmp_path / "ours", "--peft", tmp_path / "peft") == EXIT_USAGE
    assert "mine.txt" in capsys.readouterr().err


def test_a_trained_pooler_is_no_longer_berts(tmp_path: Path) -> None:
    """BERT's classifier under PEFT has the checkpoint's; so another one goes into the head's own file."""
    encoder = saved_encoder(tmp_path / "base")
    config = options("prompt-tuning", pooling="prompt-first", head_hidden=True)
    adapter: Adapter = grafted(encoder, config).adapter
    pooler = {"weight": encoder.pooler.dense.weight.detach(), "bias": encoder.pooler.dense.bias.detach()}
    base = Base(identify(encoder), adapter.shape, 4, True, pooler)
    assert write_peft(tmp_path / "one", adapter, base) == "TOKEN_CLS"
    assert adapter.head.hidden is not None
    adapter.head.hidden.load_state_dict(pooler)
    assert write_peft(tmp_path / "two", adapter, base) == "SEQ_CLS"
    assert (tmp_path / "one" / HEAD_CARD).is_file()
    assert not (tmp_path / "two" / HEAD).exists()


def test_a_card_without_the_new_keys_is_read_as_before(tmp_path: Path) -> None:
    grafted(saved_encoder(tmp_path / "base"), options("prompt-tuning")).save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "adapter_config.json"
    card = json.loads(path.read_text())
    for key in ("head_hidden", "prompt_mlp"):
        del card["adapter"][key]
    path.write_text(json.dumps(card))
    assert load_adapter(tmp_path / "ours")[0].head.hidden is None
