"""Adapter folders: exact, small, atomic, and bound to their encoder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gpc_dist
from gpc_dist.adapter import Adapter, AdapterConfig, GraftedEncoder, attach
from gpc_dist.adapter.families import locate
from gpc_dist.adapter.fingerprint import identify
from gpc_dist.adapter.store import CARD, WEIGHTS, load_adapter, load_tuned_encoder, read_card, save_adapter
from gpc_dist.errors import UserError
from gpc_dist.files import sha256

from .encoders import FAMILIES, batch_for, saved_encoder, tiny, tiny_config
from .grafts import METHODS, assert_loads, grafted, options, trained

ALL_METHODS = METHODS | {"linear-probe": {"method": "linear-probe"}}


def config_of(method: str) -> Any:
    return options("residual", **ALL_METHODS[method])


@pytest.mark.parametrize("method", ALL_METHODS)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path, method: str) -> None:
    graft, batch = grafted("bert", config_of(method)), batch_for("bert")
    graft.save_pretrained(tmp_path / "adapter")
    loaded = GraftedEncoder.from_pretrained(tmp_path / "adapter", tiny("bert"))
    assert loaded.adapter.config == graft.adapter.config
    assert trained(loaded).keys() == trained(graft).keys()
    assert all(torch.equal(trained(loaded)[name], tensor) for name, tensor in trained(graft).items())
    assert torch.equal(loaded(**batch), graft(**batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_every_family_finds_its_encoder_again(tmp_path: Path, family: str) -> None:
    graft, batch = grafted(family, options("per-layer")), batch_for(family)
    graft.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        GraftedEncoder.from_pretrained(tmp_path / "adapter", tiny(family))(**batch), graft(**batch)
    )


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_folder_holds_the_trained_tensors_and_a_header(tmp_path: Path, method: str) -> None:
    graft = grafted("bert", config_of(method))
    save_adapter(tmp_path / "adapter", graft.adapter, identify(graft.encoder))
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]  # no temporary folder stays
    weights = (tmp_path / "adapter" / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    assert len(weights) == header + 4 * sum(p.numel() for p in trained(graft).values())
    assert header < 4096
    assert (tmp_path / "adapter" / CARD).stat().st_size < 4096


def test_the_card_tells_the_method_the_encoder_and_the_task(tmp_path: Path) -> None:
    graft = grafted("electra", options("low-rank"), outputs=5)
    identity = identify(graft.encoder)
    save_adapter(tmp_path / "adapter", graft.adapter, identity, {"labels": ["ja", "não"]})
    card = read_card(tmp_path / "adapter")
    assert (card.adapter, card.shape, card.outputs) == (graft.adapter.config, graft.parts.shape, 5)
    assert card.encoder == identity
    assert card.task == {"labels": ["ja", "não"]}
    written = json.loads((tmp_path / "adapter" / CARD).read_text())
    assert (written["format"], written["gpc_dist"]) == (1, gpc_dist.__version__)
    save_adapter(tmp_path / "adapter", graft.adapter, identity)
    assert read_card(tmp_path / "adapter").task == {}


def test_a_card_that_lacks_a_key_is_refused_rather_than_guessed(tmp_path: Path) -> None:
    graft = grafted("bert", options("residual", cell_norm=False, cell_scale="none"))
    graft.save_pretrained(tmp_path / "adapter")
    card = json.loads((tmp_path / "adapter" / CARD).read_text())
    del card["adapter"]["cell_norm"]
    (tmp_path / "adapter" / CARD).write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"not a valid adapter card: adapter lacks cell_norm"):
        load_adapter(tmp_path / "adapter")


def test_a_card_from_before_late_prompts_means_the_first_layer(tmp_path: Path) -> None:
    graft = grafted("bert", options("residual"))
    graft.save_pretrained(tmp_path / "adapter")
    card = json.loads((tmp_path / "adapter" / CARD).read_text())
    del card["adapter"]["first_layer"]
    (tmp_path / "adapter" / CARD).write_text(json.dumps(card))
    adapter, read = load_adapter(tmp_path / "adapter")
    assert (adapter.first_layer, read.adapter) == (0, graft.adapter.config)


# -- a fine-tuned encoder ----------------------------------------------------------------------------------


def fine_tuned(family: str, seed: int) -> Adapter:
    """An adapter that has taken the encoder of a seed."""
    parts = locate(tiny(family, seed))
    adapter = Adapter(AdapterConfig(method="fine-tuning"), parts.shape, 3, seed)
    adapter.take_encoder(parts.encoder, parts.token_embeddings)
    return adapter


@pytest.mark.parametrize("family", ["albert", "bert", "t5"])
def test_a_fine_tuned_encoder_is_saved_and_given_to_another_one_bit_for_bit(
    tmp_path: Path, family: str
) -> None:
    adapter = fine_tuned(family, seed=0)
    plain = {name: p.detach().clone() for name, p in tiny(family).named_parameters()}
    save_adapter(tmp_path / "adapter", adapter, identify(tiny(family)))
    loaded, card = load_adapter(tmp_path / "adapter")
    assert card.adapter.trains_encoder
    assert sorted(name for name, _ in loaded.named_parameters()) == ["head.linear.bias", "head.linear.weight"]
    assert torch.equal(loaded.head.linear.weight, adapter.head.linear.weight)
    other = fine_tuned(family, seed=1)
    load_tuned_encoder(tmp_path / "adapter", other)
    found = dict(other.named_parameters())
    assert sum(p.numel() for n, p in found.items() if n.startswith("encoder.")) == sum(
        p.numel() for p in plain.values()
    )
    for name, parameter in adapter.named_parameters():
        assert torch.equal(parameter, found[name]) is not name.startswith("head."), name
    assert torch.equal(other.encoder["embeddings"].weight, tiny(family).get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({"num_hidden_layers": 2}, "layer.2.attention"),
        ({"hidden_size": 16}, r"has shape \[101, 32\], not \[101, 16\]"),
    ],
)
def test_weights_of_another_encoder_are_refused_by_name(
    tmp_path: Path, sizes: dict[str, int], name: str
) -> None:
    adapter = fine_tuned("bert", seed=0)
    save_adapter(tmp_path / "adapter", adapter, identify(tiny("bert")))
    parts = locate(tiny("bert", **sizes))
    other = Adapter(AdapterConfig(method="fine-tuning"), parts.shape, 3)
    other.take_encoder(parts.encoder, parts.token_embeddings)
    with pytest.raises(UserError, match=f"{WEIGHTS} cannot be loaded into its encoder: .*({name})"):
        load_tuned_encoder(tmp_path / "adapter", other)


def test_a_fine_tuned_encoder_from_a_damaged_file_is_refused(tmp_path: Path) -> None:
    adapter = fine_tuned("bert", seed=0)
    save_adapter(tmp_path / "adapter", adapter, identify(tiny("bert")))
    for damage in (cut(WEIGHTS, 2000), lambda folder: (folder / WEIGHTS).unlink()):
        damage(tmp_path / "adapter")
        with pytest.raises(UserError, match=f"{WEIGHTS} cannot be loaded into its encoder"):
            load_tuned_encoder(tmp_path / "adapter", adapter)


@pytest.mark.parametrize("way", ["attach", "from_pretrained"])
def test_fine_tuning_has_nothing_to_attach(tmp_path: Path, way: str) -> None:
    save_adapter(tmp_path / "adapter", fine_tuned("bert", seed=0), identify(tiny("bert")))
    with pytest.raises(UserError, match="'fine-tuning' has nothing to attach to a frozen encoder"):
        if way == "attach":
            attach(tiny("bert"), AdapterConfig(method="fine-tuning"))
        else:
            GraftedEncoder.from_pretrained(tmp_path / "adapter", tiny("bert"))


# -- the encoder it belongs to ---------------------------------------------------------------------------


def test_another_encoder_is_refused_by_a_message_that_names_both(tmp_path: Path) -> None:
    graft = grafted(saved_encoder(tmp_path / "one"), options("residual"))
    graft.save_pretrained(tmp_path / "adapter")
    other = saved_encoder(tmp_path / "two", seed=1)
    with pytest.raises(UserError) as caught:
        GraftedEncoder.from_pretrained(tmp_path / "adapter", other)
    for encoder in (graft.encoder, other):
        identity = identify(encoder)
        assert f"'{identity.path}' (sha256 {identity.sha256[:12]})" in str(caught.value)
    assert str(tmp_path / "one") in str(caught.value)
    assert str(tmp_path / "two") in str(caught.value)


def test_the_same_weights_in_another_folder_are_the_same_encoder(tmp_path: Path) -> None:
    graft = grafted(saved_encoder(tmp_path / "one"), options("residual"))
    graft.save_pretrained(tmp_path / "adapter")
    moved = saved_encoder(tmp_path / "two")
    assert torch.equal(
        GraftedEncoder.from_pretrained(tmp_path / "adapter", moved)(**batch_for("bert")),
        graft(**batch_for("bert")),
    )


@pytest.mark.parametrize("claims_a_decoder", [True, False])  # a saved encoder half claims to have none
def test_the_encoder_half_and_the_whole_of_t5_are_one_encoder(tmp_path: Path, claims_a_decoder: bool) -> None:
    import transformers

    transformers.T5Model(tiny_config("t5", is_encoder_decoder=claims_a_decoder)).save_pretrained(tmp_path)
    loaders = (transformers.T5Model, transformers.T5EncoderModel, transformers.T5ForConditionalGeneration)
    graft = grafted(loaders[0].from_pretrained(tmp_path), options("gated"))
    graft.save_pretrained(tmp_path / "adapter")
    for loader in loaders[1:]:
        other = GraftedEncoder.from_pretrained(tmp_path / "adapter", loader.from_pretrained(tmp_path))
        assert torch.equal(other(**batch_for("t5")), graft(**batch_for("t5")))


def test_a_loaded_adapter_goes_to_its_encoders_device(tmp_path: Path) -> None:
    encoder = saved_encoder(tmp_path / "encoder")
    grafted(encoder, options("gated")).save_pretrained(tmp_path / "adapter")
    loaded = GraftedEncoder.from_pretrained(tmp_path / "adapter", encoder.to("meta"))
    assert {p.device.type for p in loaded.parameters()} == {"meta"}


# -- what is broken --------------------------------------------------------------------------------------


def edit_card(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        card = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps(card | changes))

    return edit


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


ENCODER = {
    "path": "bert",
    "revision": None,
    "model_type": "bert",
    "hidden_size": 32,
    "layers": 3,
    "sha256": "",
}
SHAPE = {"layers": 3, "hidden_size": 32, "embedding_size": 32}
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "no card": (lambda folder: (folder / CARD).unlink(), f"no adapter in .*{CARD} is missing"),
    "half of the weights": (cut(WEIGHTS, 2000), WEIGHTS),
    "empty weights": (cut(WEIGHTS, 0), WEIGHTS),
    "weights of zeros": (lambda folder: (folder / WEIGHTS).write_bytes(bytes(4000)), WEIGHTS),
    "half of the card": (cut(CARD, 100), f"{CARD} is not a valid adapter card"),
    "card in another encoding": (lambda f: (f / CARD).write_bytes(b"\xff\xfe{}"), "not a valid adapter card"),
    "card of another kind": (lambda f: (f / CARD).write_text("[1, 2]"), "not a valid adapter card"),
    "future format": (edit_card(format=99), "has format 99; this version reads 1"),
    "unknown method": (edit_card(adapter={"method": "lora"}), "not a valid adapter card"),
    "no encoder": (edit_card(encoder={}), "not a valid adapter card"),
    "other outputs": (edit_card(outputs=7), f"{WEIGHTS} cannot be loaded"),
    "outputs that are no number": (
        edit_card(outputs="three"),
        f"{CARD} is not a valid adapter card: .*outputs",
    ),
    "other method": (
        edit_card(adapter=AdapterConfig(method="prompt-tuning", prompt_tokens=4).model_dump(mode="json")),
        "cannot be loaded",
    ),
    "other width": (edit_card(shape=SHAPE | {"hidden_size": 64}), f"{WEIGHTS} cannot be loaded"),
    "width that is no number": (
        edit_card(shape=SHAPE | {"hidden_size": None}),
        f"{CARD} is not a valid adapter card: .*shape.hidden_size",
    ),
}


BROKEN |= {
    "card of brackets": (lambda f: (f / CARD).write_text("[" * 100_000), f"{CARD} .*nested too deeply"),
    "card with a key twice": (lambda f: (f / CARD).write_text('{"a": 1, "a": 2}'), "duplicate key 'a'"),
    "adapter that is a list": (edit_card(adapter=[]), f"{CARD} is not a valid adapter card: adapter lacks"),
    "task that is a list": (edit_card(task=[1]), f"{CARD} is not a valid adapter card: .*task"),
    "no task": (edit_card(task=None), f"{CARD} is not a valid adapter card: .*task"),
    "path that is a number": (edit_card(encoder=ENCODER | {"path": 3}), "valid adapter card: .*encoder.path"),
    # none of these may be made before it is compared
    "width of terabytes": (
        edit_card(shape=SHAPE | {"hidden_size": 10**6}),
        r"has shape \[.*, not \[.*1000000",
    ),
    "outputs of terabytes": (edit_card(outputs=10**12), r"has shape \[3, 32\], not \[1000000000000, 32\]"),
    "outputs beyond 64 bits": (edit_card(outputs=2**70), f"{WEIGHTS} cannot be loaded"),
    "layers beyond counting": (
        edit_card(shape=SHAPE | {"layers": 10**9}),
        f"{CARD} is not a valid adapter card: shape.layers is 1000000000",
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_folder_gives_one_clear_message(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "adapter"
    grafted("bert", options("residual")).save_pretrained(folder)
    break_it, message = BROKEN[damage]
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the saved tensors of an adapter whose card has no SHA-256, as older versions wrote it."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    card = json.loads((folder / CARD).read_text())
    del card["weights_sha256"]
    (folder / CARD).write_text(json.dumps(card))


def test_a_file_that_the_card_was_not_written_for_is_refused(tmp_path: Path) -> None:
    """One bit of one value; and what comes out of it is as good a number as the one before."""
    grafted("bert", options("residual")).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / WEIGHTS
    content = bytearray(path.read_bytes())
    assert json.loads((tmp_path / "adapter" / CARD).read_text())["weights_sha256"] == sha256(path)
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=f"{WEIGHTS} cannot be loaded .*not the file that {CARD} was written for"
    ):
        load_adapter(tmp_path / "adapter")


def test_an_adapter_of_an_older_version_is_loaded(tmp_path: Path) -> None:
    graft = grafted("bert", options("residual"))
    graft.save_pretrained(tmp_path / "adapter")
    rewritten(tmp_path / "adapter", lambda tensors: None)
    assert read_card(tmp_path / "adapter").weights_sha256 is None
    assert_loads(tmp_path / "adapter", trained(graft))


def int8(tensors: dict[str, torch.Tensor]) -> None:
    tensors["prompt.start"] = tensors["prompt.start"].to(torch.int8)


def half(tensors: dict[str, torch.Tensor]) -> None:
    tensors["prompt.start"] = tensors["prompt.start"].half()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: str) -> None:
    graft = grafted("bert", options("residual"))
    with torch.no_grad():
        graft.adapter.head.linear.bias[1] = float(value)
    graft.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"'head\.linear\.bias' holds values that are not finite"):
        load_adapter(tmp_path / "adapter")


def test_types_are_those_of_numbers_with_a_fraction(tmp_path: Path) -> None:
    graft = grafted("bert", options("residual"))
    graft.save_pretrained(tmp_path / "adapter")
    rewritten(tmp_path / "adapter", half)
    found = load_adapter(tmp_path / "adapter")[0].prompt.start
    assert found.dtype == torch.float32
    assert found.requires_grad
    assert torch.equal(found, graft.adapter.prompt.start.half().float())
    graft.save_pretrained(tmp_path / "adapter")
    rewritten(tmp_path / "adapter", int8)
    with pytest.raises(UserError, match=r"'prompt\.start' holds torch\.int8"):
        load_adapter(tmp_path / "adapter")


def test_a_card_that_names_other_sizes_than_the_encoders_is_refused(tmp_path: Path) -> None:
    """The cell is one for all layers, so that no tensor tells how many there are."""
    grafted("bert", options("residual")).save_pretrained(tmp_path / "adapter")
    edit_card(shape=SHAPE | {"layers": 2})(tmp_path / "adapter")
    with pytest.raises(
        UserError, match="card gives its encoder layers 2, .*'bert' has layers 3, hidden size 32"
    ):
        GraftedEncoder.from_pretrained(tmp_path / "adapter", tiny("bert"))


def test_the_folder_of_a_run_leads_to_its_adapter(tmp_path: Path) -> None:
    grafted("bert", options("residual")).save_pretrained(tmp_path / "run" / "adapter")
    with pytest.raises(UserError, match=r"no adapter in .*run: .* is missing \(.*run/adapter has one\)"):
        GraftedEncoder.from_pretrained(tmp_path / "run", tiny("bert"))


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter in .*nowhere"):
        GraftedEncoder.from_pretrained(tmp_path / "nowhere", tiny("bert"))
