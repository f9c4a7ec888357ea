"""The method that trains the encoder itself: against plain PyTorch, on several ranks, stopped and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer

from gpc_dist import config
from gpc_dist.adapter import Adapter, AdapterConfig, GraftedEncoder, attach
from gpc_dist.adapter.families import locate
from gpc_dist.distributed.world import World, joined
from gpc_dist.encoder.frozen import load_encoder, thaw
from gpc_dist.encoder.skeleton import freeze
from gpc_dist.errors import EXIT_USAGE, UserError
from gpc_dist.inference.adapters import Predictor
from gpc_dist.search import space
from gpc_dist.search.spec import SearchSpec
from gpc_dist.tasks import EpochPlan, encode, make_task, read_part
from gpc_dist.training.pack import Pack
from gpc_dist.training.session import load_base, open_session
from gpc_dist.training.step import LaneExamples, backward, finish, optimizer_of, prepare
from tests.adapter.encoders import FAMILIES, batch_for, randomise, tiny
from tests.conftest import gpc, losses
from tests.processes import call_on_ranks, on_ranks
from tests.training import test_ranks

METHOD = ("--adapter.method", "fine-tuning", "--train.encoder_lr", 1e-3, "--train.lr", 1e-2)
ARRANGEMENTS = [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (1, 3)]
"""Ranks and ZeRO stage."""
BY_DEEPSPEED = [each for each in ARRANGEMENTS if each[1] > 0]


def train(recipe: Path, folder: Path, ranks: int = 1, stage: int = 0, *more: object) -> Path:
    return test_ranks.train(recipe, folder, ranks, stage, *METHOD, *more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> dict[tuple[int, int], Path]:
    root = tmp_path_factory.mktemp("runs")
    return {
        (ranks, stage): train(tiny_recipe, root / f"{ranks}-{stage}", ranks, stage)
        for ranks, stage in ARRANGEMENTS
    }


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter.safetensors")


def last_state(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


# -- against plain PyTorch -------------------------------------------------------------------------------


class Plain(nn.Module):
    """An encoder of transformers and a linear map of the mean of its text states."""

    def __init__(self, encoder: Any, head: nn.Linear):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        states = self.encoder(**batch).last_hidden_state
        text = batch["attention_mask"][..., None]
        return self.head((states * text).sum(1) / text.sum(1))


def plain_loop(tiny_recipe: Path, tiny_encoder: Path, steps: int, warmup: int) -> tuple[Plain, list[float]]:
    """The model and the losses of a loop with torch's AdamW, in one process."""
    settings = config.load(str(tiny_recipe))
    task = make_task(settings.task, settings.data)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    examples = read_part(task, settings.data, "train", 0)
    plan = EpochPlan(encode(examples, tokenizer, 32).sizes, 0, 9)
    encoder = AutoModel.from_pretrained(tiny_encoder, add_pooling_layer=False).eval()
    shape = locate(encoder).shape
    model = Plain(encoder, Adapter(AdapterConfig(method="fine-tuning"), shape, 2, seed=0).head.linear)
    optimizer = torch.optim.AdamW(
        [
            {"params": model.head.parameters(), "lr": 1e-2},
            {"params": model.encoder.parameters(), "lr": 1e-3},
        ],
        weight_decay=0.01,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup),
    )
    losses = []
    for _, indices in zip(range(steps), (step for _, step in plan.batches()), strict=False):
        chosen = [examples[i] for i in indices]
        batch = tokenizer([e.rows[0][0] for e in chosen], padding=True, return_tensors="pt")
        loss = cross_entropy(model(dict(batch)), torch.tensor([e.target for e in chosen]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model, losses


def test_a_run_equals_a_plain_loop(tiny_recipe: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    more = ("--train.steps", 6, "--train.eval_every", 6, "--train.save_every", 6, "--train.warmup", 2)
    assert gpc("train", tiny_recipe, "--run.dir", tmp_path, *METHOD, *more) == 0
    model, expected = plain_loop(tiny_recipe, tiny_encoder, 6, 2)
    assert list(losses(tmp_path).values()) == pytest.approx(expected, rel=1e-4)
    found = {
        name.removeprefix("param/"): tensor
        for name, tensor in load_file(last_state(tmp_path) / "trained.safetensors").items()
        if name.startswith("param/")
    }
    plain = dict(model.encoder.named_parameters())
    table = plain.pop("embeddings.word_embeddings.weight")
    torch.testing.assert_close(found["encoder.embeddings.weight"], table.detach(), rtol=1e-3, atol=2e-5)
    assert found.keys() == {
        *(f"encoder.body.{name}" for name in plain),
        "encoder.embeddings.weight",
        "head.linear.weight",
        "head.linear.bias",
    }
    for name, parameter in plain.items():
        # AdamW's first steps have the gradient's sign, so noise in a tiny one shows in the weight
        close = torch.isclose(found[f"encoder.body.{name}"], parameter, rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.99, name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family_are_the_plain_encoders(family: str) -> None:
    """Also where a frozen encoder is run in another way: T5's attention bias, norms and activations."""
    batch = batch_for(family)
    parts = locate(freeze(tiny(family)))
    adapter = Adapter(AdapterConfig(method="fine-tuning"), parts.shape, 3)
    randomise(adapter)
    graft = GraftedEncoder(parts, [adapter])
    thaw(parts)
    adapter.take_encoder(parts.encoder, parts.token_embeddings)
    graft(**batch).square().sum().backward()

    encoder = tiny(family)
    model = Plain(encoder, nn.Linear(32, 3))
    model.head.load_state_dict(adapter.head.linear.state_dict())
    model(batch).square().sum().backward()
    # by value: the same weights in both, which random draws keep apart
    expected = {p.detach().numpy().tobytes(): p.grad for p in encoder.parameters()}
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    named = dict(adapter.named_parameters())
    assert sum(name.startswith("encoder.") for name in named) >= 15
    for name, parameter in named.items():
        if name.startswith("encoder."):
            gradient = expected.pop(parameter.detach().numpy().tobytes())
            if gradient is None or not gradient.any():
                assert parameter.grad is None or not parameter.grad.any(), name
                continue
            # a key's bias has no gradient but rounding: softmax does not feel it
            scale = float(gradient.abs().max()) + 0.01 * largest
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)
    assert not [g for g in expected.values() if g is not None and g.any()]  # nothing trained was forgotten


# -- ranks and resumption --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_losses_are_the_plain_loops_on_any_ranks_at_any_stage(
    runs: dict[tuple[int, int], Path],
    tiny_recipe: Path,
    tiny_encoder: Path,
    arrangement: tuple[int, int],
) -> None:
    _, expected = plain_loop(tiny_recipe, tiny_encoder, 12, 1)
    assert list(losses(runs[arrangement]).values()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_several_passes_change_nothing_whatever_rows_they_have(
    runs: dict[tuple[int, int], Path], tiny_recipe: Path, tmp_path: Path, stage: int
) -> None:
    folder = train(tiny_recipe, tmp_path / "run", 2, stage, "--engine.micro_batch_tokens", 20)
    assert losses(folder) == pytest.approx(losses(runs[1, 0]), rel=1e-4)


@pytest.mark.slow
def test_a_rank_without_examples_takes_part(tiny_recipe: Path, tmp_path: Path) -> None:
    more = ("--train.batch_size", 1, "--train.steps", 4)
    one = train(tiny_recipe, tmp_path / "one", 1, 0, *more)
    two = train(tiny_recipe, tmp_path / "two", 2, 2, *more)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arrangement", ARRANGEMENTS[:-1])
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(
    runs: dict[tuple[int, int], Path], tiny_recipe: Path, tmp_path: Path, arrangement: tuple[int, int]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[arrangement], folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    assert last_state(folder).name == "step-00000008"
    train(tiny_recipe, folder, *arrangement)
    assert losses(folder) == losses(runs[arrangement])
    assert last_state(folder).name == "step-00000012"
    mine, other = (last_state(each) for each in (folder, runs[arrangement]))
    for file in other.glob("*.safetensors"):
        assert (mine / file.name).read_bytes() == file.read_bytes()
    assert weights(folder).keys() == weights(runs[arrangement]).keys()
    assert all(tensor.equal(weights(runs[arrangement])[name]) for name, tensor in weights(folder).items())


def begun(run: Path, folder: Path) -> Path:
    """A copy of a finished run as it was after step 8."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, 1), (2, 3)), ((2, 3), (2, 2)), ((2, 2), (1, 3))])
def test_deepspeeds_stages_take_each_others_checkpoints_on_any_ranks(
    runs: dict[tuple[int, int], Path],
    tiny_recipe: Path,
    tmp_path: Path,
    before: tuple[int, int],
    after: tuple[int, int],
) -> None:
    folder = begun(runs[before], tmp_path / "run")
    train(tiny_recipe, folder, *after)
    assert losses(folder) == pytest.approx(losses(runs[1, 0]), rel=1e-4)
    assert len(list(last_state(folder).glob("trained-*"))) == after[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [((2, 1), (1, 0), "by DeepSpeed's optimizer"), ((1, 0), (1, 3), "without DeepSpeed's optimizer")],
)
def test_a_checkpoint_of_the_other_optimizer_is_refused(
    runs: dict[tuple[int, int], Path],
    tiny_recipe: Path,
    tmp_path: Path,
    before: tuple[int, int],
    after: tuple[int, int],
    message: str,
) -> None:
    folder = begun(runs[before], tmp_path / "run")
    words = ("train", tiny_recipe, "--run.dir", folder, "--engine.zero_stage", after[1], *METHOD)
    done = on_ranks(after[0], *words)
    assert done.returncode == EXIT_USAGE
    assert f"step-00000008 was saved {message}" in done.stderr


@pytest.mark.slow
def test_no_rank_writes_more_than_its_part(runs: dict[tuple[int, int], Path]) -> None:
    saved = last_state(runs[2, 3])
    shares = [file.stat().st_size for file in sorted(saved.glob("trained-*"))]
    whole = (last_state(runs[1, 0]) / "trained.safetensors").stat().st_size
    assert len(shares) == 2
    assert max(shares) < 0.6 * whole  # headers, and what does not divide by two
    parts = [load_file(file) for file in sorted(saved.glob("trained-*"))]
    for name, tensor in weights(runs[2, 3]).items():
        joined = torch.cat([part[f"param/{name}"] for part in parts])
        assert len(joined) == tensor.numel()


@pytest.mark.slow
def test_a_damaged_part_is_refused_by_all_ranks(
    runs: dict[tuple[int, int], Path], tiny_recipe: Path, tmp_path: Path
) -> None:
    folder = begun(runs[2, 1], tmp_path / "run")
    file = last_state(folder) / "trained-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    words = ("train", tiny_recipe, "--run.dir", folder, "--engine.zero_stage", 1, *METHOD)
    done = on_ranks(2, *words)
    assert done.returncode == EXIT_USAGE
    assert f"{file.name} changed after it was written" in done.stderr


def make_steps(recipe: Path, stage: int) -> None:
    """On a rank: a step whose loss one rank finds infinite, and one that is as it should be."""
    settings = {"adapter.method": "fine-tuning", "engine.zero_stage": str(stage), "run.dir": "unused"}
    chosen = config.load(str(recipe), settings)
    with joined(chosen.engine) as world:
        task = make_task(chosen.task, chosen.data)
        session = open_session(chosen, world, task, load_base(chosen, world))
        adapter = session.new_adapter(chosen)
        optimizer = optimizer_of(adapter, session, chosen)
        split = session.split(read_part(task, chosen.data, "train", 0))
        step = prepare(session, [LaneExamples(adapter, split, np.arange(9), task.kind)])

        def values() -> dict[str, Tensor]:
            found = optimizer.weights()
            return {name: each.clone() for name, each in zip(found.shapes, found.values, strict=True)}

        def after(change: float) -> tuple[bool, dict[str, Tensor]]:
            class Changed:
                engine = optimizer.engine

                def backward(self, loss: Tensor, last: bool) -> None:
                    optimizer.backward(loss + change, last)

            loss = backward(session, [Changed()], step)  # type: ignore[list-item]
            (done,), _ = finish(session, [optimizer], loss + change)
            return done.finite, values()

        start = values()
        finite, kept = after(float("inf") if world.rank == 1 else 0.0)
        assert not finite
        assert all(kept[name].equal(start[name]) for name in start)
        finite, changed = after(0.0)
        assert finite
        assert not changed["head.linear.weight"].equal(start["head.linear.weight"])
        assert all(each.isfinite().all() for each in changed.values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(tiny_recipe: Path, stage: int) -> None:
    done = call_on_ranks(2, make_steps, tiny_recipe, stage)
    assert done.returncode == 0, done.stderr


# -- what comes of it ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_folder_holds_head_and_encoder_and_gives_the_reported_metric(
    runs: dict[tuple[int, int], Path], tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs[1, 0]
    result = json.loads((run / "result.json").read_text())
    original = load_file(tiny_encoder / "model.safetensors")
    used = sum(t.numel() for name, t in original.items() if not name.startswith("pooler."))
    assert (
        sum(t.numel() for t in weights(run).values()) == result["trainable_parameters"] == used + 2 * 32 + 2
    )
    assert result["frozen_parameters"] == 0
    assert gpc("evaluate", run / "adapter", "--engine.device", "cpu") == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["metrics"] == pytest.approx(result["metrics"]["best"])


@pytest.mark.slow
def test_what_was_sharded_is_the_same_in_use_sharded_or_whole(
    runs: dict[tuple[int, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs[2, 3]
    result = json.loads((run / "result.json").read_text())
    alone = json.loads((runs[1, 0] / "result.json").read_text())
    assert result["trainable_parameters"] == alone["trainable_parameters"]
    assert {n: t.shape for n, t in weights(run).items()} == {
        n: t.shape for n, t in weights(runs[1, 0]).items()
    }
    done = on_ranks(2, "evaluate", run / "adapter", "--engine.device", "cpu")
    assert done.returncode == 0, done.stderr
    sharded = json.loads(done.stdout.splitlines()[-1])["metrics"]
    whole = ("--engine.zero_stage", 0, "--engine.ranks", 1, "--engine.device", "cpu")
    assert gpc("evaluate", run / "adapter", *whole) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert sharded == pytest.approx(result["metrics"]["best"], rel=1e-4)
    assert printed == pytest.approx(result["metrics"]["best"], rel=1e-4)


@pytest.mark.slow
def test_a_loaded_folder_predicts_with_the_tuned_weights(
    runs: dict[tuple[int, int], Path], tiny_encoder: Path
) -> None:
    saved = weights(runs[1, 0])
    model = Plain(AutoModel.from_pretrained(tiny_encoder, add_pooling_layer=False).eval(), nn.Linear(32, 2))
    body = {n.removeprefix("encoder.body."): t for n, t in saved.items() if n.startswith("encoder.body.")}
    table = {"embeddings.word_embeddings.weight": saved["encoder.embeddings.weight"]}
    texts = ["the cat sleeps", "a bird sings in the old garden today"]
    batch = AutoTokenizer.from_pretrained(tiny_encoder)(texts, padding=True, return_tensors="pt")
    model.head.load_state_dict({n: saved[f"head.linear.{n}"] for n in ("weight", "bias")})
    untuned = model(dict(batch)).softmax(-1)
    model.encoder.load_state_dict(body | table)
    expected = model(dict(batch)).softmax(-1)
    assert not torch.allclose(untuned, expected, atol=1e-3)
    found = Predictor(runs[1, 0] / "adapter", {"engine.device": "cpu"}).predict([{"text": t} for t in texts])
    torch.testing.assert_close(
        torch.tensor([list((p.probabilities or {}).values()) for p in found]), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_a_damaged_folder_is_refused(
    runs: dict[tuple[int, int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    shutil.copytree(runs[1, 0] / "adapter", tmp_path / "adapter")
    tensors = weights(runs[1, 0])
    del tensors["encoder.embeddings.weight"]
    save_file(tensors, tmp_path / "adapter" / "adapter.safetensors")
    card = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(card.read_text())
    assert gpc("evaluate", tmp_path / "adapter", "--engine.device", "cpu") == EXIT_USAGE
    assert "it is not the file that adapter_config.json was written for" in capsys.readouterr().err
    del written["weights_sha256"]  # as older versions wrote it
    card.write_text(json.dumps(written))
    assert gpc("evaluate", tmp_path / "adapter", "--engine.device", "cpu") == EXIT_USAGE
    assert "into its encoder: it lacks 'encoder.embeddings.weight'" in capsys.readouterr().err


@pytest.mark.slow
def test_it_learns_and_leaves_the_checkpoint_and_what_others_read_of_it_as_they_were(
    tiny_recipe: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    file = tiny_encoder / "model.safetensors"
    before = file.read_bytes()
    assert gpc("train", tiny_recipe, "--run.dir", tmp_path, *METHOD, "--train.steps", 80) == 0
    curve = list(losses(tmp_path).values())
    assert sum(curve[-5:]) < 0.5 * sum(curve[:5])
    assert file.read_bytes() == before
    # in this process, where the file's mapping may be shared
    settings = config.load(str(tiny_recipe))
    again = load_encoder(settings.encoder, torch.float32, World(0, 1, 0, torch.device("cpu")))
    table: Any = again.parts.token_embeddings.weight
    stored = {name: value for name, value in load_file(file).items() if not name.startswith("pooler.")}
    assert torch.equal(table, stored.pop("embeddings.word_embeddings.weight"))
    assert again.places is not None
    mapped = {
        name: again.places[parameter].mapped()
        for name, parameter in again.parts.encoder.named_parameters()
        if parameter in again.places
    }
    assert mapped.keys() == stored.keys()
    assert all(torch.equal(mapped[name], stored[name]) for name in mapped)


@pytest.mark.slow
def test_bf16_multiplies_in_bf16_and_keeps_float32_weights(
    runs: dict[tuple[int, int], Path], tiny_recipe: Path, tmp_path: Path
) -> None:
    more = ("--engine.dtype", "bf16", "--engine.activation_checkpointing", "true")
    assert gpc("train", tiny_recipe, "--run.dir", tmp_path, *METHOD, *more) == 0
    assert {t.dtype for t in weights(tmp_path).values()} == {torch.float32}
    found, reference = losses(tmp_path), losses(runs[1, 0])
    assert found != reference
    assert found == pytest.approx(reference, rel=0.1)


# -- what is refused -------------------------------------------------------------------------------------


def test_what_zero_cannot_train_is_refused() -> None:
    given = {"adapter.method": "fine-tuning", "engine.zero_stage": "3"}
    with pytest.raises(UserError, match="needs train.optimizer adamw with engine.zero_stage 3"):
        config.load("rte", given | {"train.optimizer": "adafactor"})
    with pytest.raises(UserError, match="'fine-tuning' needs engine.offload_param none"):
        config.load("rte", given | {"engine.offload_param": "cpu"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("engine.quantize", "int8", "'fine-tuning' needs engine.quantize none"),
        ("engine.token_table", "host", "'fine-tuning' needs engine.token_table device"),
        ("engine.plan", "auto", "'fine-tuning' needs engine.plan none"),
        ("adapter.pooling", "prompt", "needs a prompt, which adapter.method 'fine-tuning' lacks"),
    ],
)
def test_what_needs_a_frozen_encoder_is_refused(key: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.load("rte", {"adapter.method": "fine-tuning", key: value})


@pytest.mark.parametrize("words", [("plan",), ("bench",)])
def test_what_counts_with_a_frozen_encoder_says_so(
    words: tuple[str, ...], tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpc(*words, tiny_recipe, "--adapter.method", "fine-tuning") == EXIT_USAGE
    assert "a frozen encoder: give another adapter.method" in capsys.readouterr().err


@pytest.mark.slow
def test_a_notebook_is_told_where_to_go(runs: dict[tuple[int, int], Path], tiny_encoder: Path) -> None:
    encoder = AutoModel.from_pretrained(tiny_encoder)
    with pytest.raises(UserError, match="gpc-dist train"):
        attach(encoder, AdapterConfig(method="fine-tuning"))
    with pytest.raises(UserError, match="Predictor"):
        GraftedEncoder.from_pretrained(runs[1, 0] / "adapter", encoder)


def test_trials_that_share_an_encoder_cannot_train_it(tiny_recipe: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "recipe": str(tiny_recipe),
        "settings": {"adapter.method": "fine-tuning"},
        "space": {"train.encoder_lr": {"choice": [1e-4, 1e-3]}},
        "trials": 1,
    }
    space.validate(SearchSpec(**keys, resources={"pack": 1}))
    with pytest.raises(UserError, match=r"fine-tuning changes the encoder.* --resources.pack 1"):
        space.validate(SearchSpec(**keys, resources={"pack": 2}))

    def settings(name: str) -> config.Config:
        run = {"run.dir": str(tmp_path / name), "adapter.method": "fine-tuning", "train.steps": "2"}
        return config.load(str(tiny_recipe), run)

    pack = Pack(settings("one"), World(0, 1, 0, torch.device("cpu")))
    pack.add("one", settings("one"), ["gpc-dist"])
    with pytest.raises(UserError, match="fine-tuned by another run"):
        pack.add("two", settings("two"), ["gpc-dist"])
