"""Adapters to and from the Hugging Face Hub: the model card, the upload, and loading by name alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, constants

from gpc_dist.adapter import GraftedEncoder
from gpc_dist.adapter.fingerprint import EncoderIdentity, identify
from gpc_dist.adapter.hub import model_card
from gpc_dist.adapter.store import CARD, README, WEIGHTS, AdapterCard, load_adapter, read_card, save_adapter
from gpc_dist.errors import EXIT_DONE, EXIT_USAGE, UserError
from tests.conftest import gpc

from .encoders import batch_for, saved_encoder, tiny
from .grafts import grafted, options
from .test_trainer import example

TASK = {
    "task": {"name": "rte", "kind": "classification", "labels": None},
    "data": {"path": "super_glue", "config": "rte"},
}


def a_card(
    task: dict[str, Any], path: str = "google-bert/bert-base-uncased", outputs: int = 3
) -> AdapterCard:
    graft = grafted("bert", options("gated"))
    identity = EncoderIdentity(path, "c0ffee", "bert", 32, 3, "ab" * 32)
    return AdapterCard(graft.adapter.config, graft.parts.shape, outputs, identity, task)


def loaded(text: str, tmp_path: Path) -> ModelCard:
    """The card as the Hub's library reads and checks it."""
    (tmp_path / README).write_text(text, encoding="utf-8")
    return ModelCard.load(tmp_path / README)


def test_a_model_card_is_valid_and_says_what_it_is(tmp_path: Path) -> None:
    metrics = {"accuracy": 0.6931, "loss": 0.61, "confusion": [[1, 2]], "f1": None}
    card = loaded(model_card(a_card(TASK), "rte-gpc", 1234, metrics, "me/rte-gpc"), tmp_path)
    data = card.data
    written = data.to_dict()
    assert (written["library_name"], written["pipeline_tag"]) == ("gpc-dist", "text-classification")
    assert (data.base_model, data.datasets) == ("google-bert/bert-base-uncased", ["super_glue"])
    assert (data.tags, data.metrics) == (["gpc-dist", "gpc"], ["accuracy"])
    found = {each.metric_type: (each.metric_value, each.dataset_type) for each in data.eval_results}
    assert found == {"accuracy": (0.6931, "super_glue"), "loss": (0.61, "super_glue")}
    assert data.eval_results[0].dataset_config == "rte"
    for said in ("ab" * 32, "c0ffee", "1,234", 'from_pretrained("me/rte-gpc")', "0.6931"):
        assert said in card.text
    # what the library writes of it, it reads again
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()


def test_a_packaged_choice_is_one(tmp_path: Path) -> None:
    task = {"task": {"name": "copa", "kind": "classification"}, "data": {}}
    card = loaded(model_card(a_card(task, outputs=1), "copa", 10), tmp_path)
    assert card.data.pipeline_tag == "multiple-choice"
    assert "copa, choice" in card.text


@pytest.mark.parametrize(
    "task",
    [
        {},
        {"task": {"name": "a: |\n---\n<b>", "kind": "classification", "labels": ["x|y", "---"]}, "data": {}},
        {"task": {"name": "t", "kind": "regression"}, "data": {"path": "/home/me/secret"}},
        {"task": {"name": "t", "kind": "choice"}, "data": {"path": "demo", "config": 3}},
    ],
)
def test_any_task_makes_a_valid_card_without_local_paths(task: dict[str, Any], tmp_path: Path) -> None:
    text = model_card(a_card(task, "/home/me/secret/encoder"), "na: me\n#", 10, {"m: x": 1.0, "n": 2})
    card = loaded(text, tmp_path)
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert len(card.data.eval_results) == 2
    assert "/home/me" not in text
    assert card.text.count("\n| ---") == 0


def test_what_is_saved_has_a_card_and_loads_by_its_folder_alone(tmp_path: Path) -> None:
    encoder = saved_encoder(tmp_path / "encoder")
    graft, batch = grafted(encoder, options("gated")), batch_for("bert")
    graft.save_pretrained(tmp_path / "adapter", {"accuracy": 0.75})
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == sorted((WEIGHTS, CARD, README))
    (result,) = ModelCard.load(tmp_path / "adapter" / README).data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.75)
    again = GraftedEncoder.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again(**batch), graft(**batch))
    assert not any(parameter.requires_grad for parameter in again.encoder.parameters())


def test_what_a_card_says_outlives_loading_and_saving(tmp_path: Path) -> None:
    encoder = saved_encoder(tmp_path / "encoder", "t5")
    adapter = grafted(encoder, options("gated")).adapter
    save_adapter(tmp_path / "run", adapter, identify(encoder), TASK)
    GraftedEncoder.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "copy")
    first, second = read_card(tmp_path / "run"), read_card(tmp_path / "copy")
    assert (second.encoder, second.task, second.weights_sha256) == (
        first.encoder,
        first.task,
        first.weights_sha256,
    )


def test_the_packaged_encoder_is_found_by_its_name(minilm: Any, tmp_path: Path) -> None:
    adapter = grafted(minilm, options("gated"), draw=False).adapter
    save_adapter(tmp_path / "adapter", adapter, replace(identify(minilm), path="minilm"))
    assert GraftedEncoder.from_pretrained(tmp_path / "adapter").identity.path == "minilm"  # type: ignore[union-attr]


def test_an_adapter_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: a snapshot in the cache, as the Hub's library leaves it."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    graft, batch = grafted(saved_encoder(tmp_path / "encoder"), options("gated")), batch_for("bert")
    repository, commit = cache / "models--me--cats", "0123456789abcdef0123456789abcdef01234567"
    graft.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert torch.equal(GraftedEncoder.from_pretrained("me/cats")(**batch), graft(**batch))
    with pytest.raises(UserError, match="no adapter in me/dogs: it is no local folder, and could not be"):
        GraftedEncoder.from_pretrained("me/dogs")


def test_an_encoder_that_is_not_here(tmp_path: Path) -> None:
    grafted(saved_encoder(tmp_path / "encoder"), options("gated")).save_pretrained(tmp_path / "adapter")
    (tmp_path / "encoder").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"encoder '.*/encoder' could not be loaded .*give it as encoder="):
        GraftedEncoder.from_pretrained(tmp_path / "adapter")
    moved = transformers.AutoModel.from_pretrained(tmp_path / "moved")
    assert GraftedEncoder.from_pretrained(tmp_path / "adapter", moved)


def test_another_encoder_in_its_place(tmp_path: Path) -> None:
    grafted(saved_encoder(tmp_path / "encoder"), options("gated")).save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "encoder")
    tiny("bert", seed=5).save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="this adapter was trained on encoder"):
        GraftedEncoder.from_pretrained(tmp_path / "adapter")


def test_a_card_of_somebody_else_stays(tmp_path: Path) -> None:
    graft = grafted("bert", options("gated"))
    graft.save_pretrained(tmp_path / "adapter")
    graft.save_pretrained(tmp_path / "adapter")  # its own
    (tmp_path / "adapter" / README).write_text("# My notes\n")
    with pytest.raises(UserError, match=r"README\.md was not written by gpc-dist"):
        graft.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / README).read_text() == "# My notes\n"


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Folders that were uploaded, by repository."""
    found: dict[str, Path] = {}

    class Made(str):
        repo_id = "me/cats"

    def upload(_: HfApi, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        found[repo_id] = tmp_path / "uploaded"
        shutil.copytree(folder_path, found[repo_id])

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Made("https://huggingface.co/me/cats"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return found


def test_a_graft_is_pushed(tmp_path: Path, uploads: dict[str, Path]) -> None:
    graft = grafted(saved_encoder(tmp_path / "encoder"), options("gated"))
    assert graft.push_to_hub("me/cats", {"accuracy": 0.5}) == "https://huggingface.co/me/cats"
    folder = uploads["me/cats"]
    assert sorted(file.name for file in folder.iterdir()) == sorted((WEIGHTS, CARD, README))
    assert 'from_pretrained("me/cats")' in (folder / README).read_text()
    assert str(tmp_path) not in (folder / CARD).read_text()
    assert read_card(folder).encoder.sha256 == identify(graft.encoder).sha256
    assert torch.equal(load_adapter(folder)[0].head.linear.weight, graft.adapter.head.linear.weight)


def test_a_run_is_pushed_with_its_figures(
    tiny_recipe: Path, tmp_path: Path, uploads: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert gpc("train", tiny_recipe, "--run.dir", run, "--data.holdout", 0.2) == EXIT_DONE
    assert gpc("push", run / "adapter", "me/cats") == EXIT_DONE
    assert "uploaded to https://huggingface.co/me/cats" in capsys.readouterr().out
    data = ModelCard.load(uploads["me/cats"] / README).data
    best = json.loads((run / "result.json").read_text())["metrics"]["best"]
    results = {each.metric_type: each.metric_value for each in data.eval_results}
    assert results["accuracy"] == best["accuracy"]
    assert {each.dataset_split for each in data.eval_results} == {"holdout"}
    assert sorted(path.name for path in (run / "adapter").iterdir()) == [WEIGHTS, CARD]
    pushed = read_card(uploads["me/cats"])
    assert pushed.task["task"]["name"] == "cats"
    assert pushed.task["data"]["path"] is None
    assert str(tmp_path.parent) not in (uploads["me/cats"] / CARD).read_text()


def test_the_example_of_the_docs(
    minilm: Any, tmp_path: Path, uploads: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = grafted(minilm, options("gated"), draw=False).adapter
    save_adapter("runs/rte/adapter", adapter, replace(identify(minilm), path="minilm"), TASK)
    before, after = example("GraftedEncoder.from_pretrained").rsplit("\n", 2)[:2]
    scope: dict[str, Any] = {}
    exec(before, scope)
    uploads["me/cats"].rename("pushed")
    exec(after.replace('"my-name/rte-gpc", revision="main"', '"pushed"'), scope)
    assert torch.equal(scope["again"](**batch_for("bert")), scope["model"](**batch_for("bert")))
    assert scope["again"].task == TASK
    assert scope["again"].identity.path == "minilm"


def test_a_hub_that_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto the Hub")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    grafted(saved_encoder(tmp_path / "encoder"), options("gated")).save_pretrained(tmp_path / "adapter")
    assert gpc("push", tmp_path / "adapter", "me/cats") == EXIT_USAGE
    assert (
        "me/cats on the Hugging Face Hub cannot be written (no route to the Hub)" in capsys.readouterr().err
    )
