"""Reading encoders from their files: every value where it belongs, and every damage named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5ForConditionalGeneration

from gpc_dist.adapter.fingerprint import fingerprint_files, identify
from gpc_dist.config import Config, EncoderConfig, EngineConfig
from gpc_dist.distributed.world import World
from gpc_dist.encoder import frozen, weights
from gpc_dist.encoder.frozen import load_encoder, place
from gpc_dist.errors import UserError
from gpc_dist.tensors import Stored, WeightFile
from gpc_dist.training.session import load_base
from tests.adapter.encoders import FAMILIES, tiny

ALONE = World(0, 1, 0, torch.device("cpu"))


def load(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    encoder = load_encoder(EncoderConfig(path=str(folder), **config), dtype, ALONE)
    place(encoder, ALONE, EngineConfig(), {})
    return encoder


def values(encoder: Any) -> dict[str, Tensor]:
    """Every parameter of a loaded encoder by its name; the token table is beside it."""
    table = encoder.parts.token_embeddings.weight
    return {**dict(encoder.parts.encoder.named_parameters()), "table": table}


def small_bert(folder: Path, model: Any = BertModel) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    made = model(config).eval()
    made.save_pretrained(folder)
    return made


def pickle_weights(folder: Path, change: Any = lambda tensor: tensor) -> None:
    """Write a checkpoint's tensors in the format of PyTorch instead."""
    tensors = {name: change(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def turned(tensor: Tensor) -> Tensor:
    """The same numbers, stored column by column: as a conversion from TensorFlow leaves them."""
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


def edit(folder: Path, change: Any) -> None:
    """Rewrite a checkpoint's tensors."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("revision", [None, "v1", "c0ffee" + 34 * "0"])
def test_an_encoder_of_the_hub_is_known_by_the_revision_it_was_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    cached = tmp_path / "models--someone--small"
    commits = {"main": "d" * 40, "v1": "c0ffee" + 34 * "0"}
    (cached / "refs").mkdir(parents=True)
    for seed, (name, commit) in enumerate(commits.items()):
        tiny("bert", seed).save_pretrained(cached / "snapshots" / commit)
        (cached / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = Config(encoder=EncoderConfig(path="someone/small", revision=revision))
    monkeypatch.setattr(frozen, "load_tokenizer", lambda _: None)
    found = load_base(config, ALONE).identity
    commit = commits["v1" if revision else "main"]
    assert (found.path, found.revision) == ("someone/small", commit)
    assert found.sha256 == fingerprint_files([cached / "snapshots" / commit / "model.safetensors"])


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_the_values_that_transformers_gives_it(
    family: str, dtype: torch.dtype, pickled: bool, tmp_path: Path
) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    expected = dict(type(model).from_pretrained(tmp_path, dtype=dtype).named_parameters())
    if pickled:
        pickle_weights(tmp_path, turned)
    found = load(tmp_path, dtype)
    assert found.places is not None, "it was loaded whole"
    loaded = {id(p): p for p in values(found).values()}
    table = found.parts.token_embeddings.weight
    for name, parameter in found.parts.encoder.named_parameters():
        (known,) = {id(p): p for n, p in expected.items() if n == name or n.endswith("." + name)}.values()
        assert parameter.dtype == known.dtype
        assert torch.equal(parameter, known), name
    assert any(p.shape == table.shape and torch.equal(p, table) for p in expected.values())
    assert not any(p.device.type == "meta" or p.requires_grad for p in loaded.values())


def test_a_weight_of_the_files_type_is_a_view_of_the_file(tmp_path: Path) -> None:
    small_bert(tmp_path)
    found = load(tmp_path)
    sizes = {p.untyped_storage().nbytes() for p in values(found).values()}
    assert sizes == {(tmp_path / "model.safetensors").stat().st_size}


def test_a_file_in_parts_is_read_like_a_whole_one(tmp_path: Path) -> None:
    model = small_bert(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="5KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    whole, parts = values(load(tmp_path / "whole")), values(load(tmp_path / "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_weights_under_a_task_head_are_found(tmp_path: Path) -> None:
    model = small_bert(tmp_path, BertForMaskedLM)
    found = values(load(tmp_path))
    for name, parameter in model.bert.named_parameters():
        if "pooler" not in name and "word_embeddings" not in name:
            assert torch.equal(found[name], parameter)


def test_old_names_of_layer_norms_are_understood(tmp_path: Path) -> None:
    small_bert(tmp_path)
    expected = {name: value.clone() for name, value in values(load(tmp_path)).items()}

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        return {_replaced(name, old): value for name, value in tensors.items()}

    edit(tmp_path, rename)
    assert "embeddings.LayerNorm.gamma" in load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in values(load(tmp_path)).items())


def _replaced(name: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        name = name.replace(old, new)
    return name


def test_of_an_encoder_decoder_only_the_encoder_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert torch.equal(found.parts.token_embeddings.weight, model.shared.weight)
    for name, parameter in found.parts.encoder.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def name_another_file(folder: Path) -> None:
    """A key of config.json that `transformers` follows."""
    save_file({"w": torch.zeros(2)}, folder / "other.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))


def add_an_adapter_of_peft(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["query"], init_lora_weights=False)
    get_peft_model(BertModel.from_pretrained(folder), lora).save_pretrained(folder)


def add_other_forms(folder: Path) -> None:
    other = {"encoder.layer.1.output.dense.weight": torch.zeros(2)}
    torch.save(other, folder / "pytorch_model.bin")
    save_file(other, folder / "model_old.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model_old.safetensors"}}')


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("decoy", [name_another_file, add_an_adapter_of_peft, add_other_forms])
def test_what_is_loaded_is_what_is_hashed_whatever_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoy: Any, whole: bool
) -> None:
    model = small_bert(tmp_path)
    expected = fingerprint_files([tmp_path / "model.safetensors"])
    decoy(tmp_path)
    if whole:
        monkeypatch.setattr(frozen, "TESTED", frozenset())
    found = load(tmp_path)
    assert (found.places is None) is whole
    assert found.files == [tmp_path / "model.safetensors"]
    assert identify(found.parts.encoder, found.files).sha256 == expected
    for name, parameter in found.parts.encoder.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def both_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"embeddings.LayerNorm.gamma": torch.zeros(16)}


def eighths(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "encoder.layer.0.output.dense.weight"
    return tensors | {name: tensors[name].to(torch.float8_e4m3fn)}


def fewer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if k != "encoder.layer.1.output.dense.weight"}


def deeper(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"encoder.layer.2.output.dense.weight": torch.zeros(2)}


def wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"embeddings.LayerNorm.weight": torch.zeros(17)}


def integers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "encoder.layer.0.output.dense.weight"
    return tensors | {name: tensors[name].to(torch.int8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fewer, "lacks 'encoder.layer.1.output.dense.weight'"),
        (deeper, "holds 'encoder.layer.2.output.dense.weight'"),
        (wider, r"'embeddings.LayerNorm.weight' has shape \[17\].*\[16\]"),
        (both_names, "'embeddings.LayerNorm.weight' is there under its old name too"),
        (eighths, "float8_e4m3fn: give a checkpoint that is not quantised"),
        (integers, "int8: give a checkpoint that is not quantised"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Any, message: str, tmp_path: Path) -> None:
    small_bert(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("keep", "message"), [(4, "header too small"), (60, "header length"), (-8, "not fully covered")]
)
def test_a_damaged_file_is_named(keep: int, message: str, tmp_path: Path) -> None:
    small_bert(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"model.safetensors is damaged.*{message}"):
        load(tmp_path)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    small_bert(tmp_path / "whole").save_pretrained(tmp_path / "parts", max_shard_size="5KB")
    missing = sorted((tmp_path / "parts").glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(UserError, match=missing.name):
        load(tmp_path / "parts")


def test_checksums(tmp_path: Path) -> None:
    small_bert(tmp_path)
    file = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="nothing to compare"):
        load(tmp_path, checksum=True)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  {file.name}\n")
    load(tmp_path, checksum=True)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    load(tmp_path)
    with pytest.raises(UserError, match=f"not {digest}: it is damaged"):
        load(tmp_path, checksum=True)


def test_a_name_of_the_hubs_cache_is_a_checksum(tmp_path: Path) -> None:
    small_bert(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.rename(tmp_path / digest)
    file.symlink_to(tmp_path / digest)
    weights.check_sums([file])
    with (tmp_path / digest).open("ab") as blob:
        blob.write(b"x")
    with pytest.raises(UserError, match="damaged"):
        weights.check_sums([file])


def test_prefixes_are_chosen_by_most_matches() -> None:
    """T5's decoder has layers of the same names as the encoder."""
    model = nn.ModuleDict(
        {"block": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(2, 2), "ff": nn.Linear(2, 2)})])}
    )
    names = [f"{p}.block.0.{m}" for p, ms in (("decoder", ("q",)), ("encoder", ("q", "ff"))) for m in ms]
    shapes = {f"{n}.weight": (2, 2) for n in names} | {f"{n}.bias": (2,) for n in names}
    stored = {
        name: Stored(WeightFile(Path("x")), place, torch.float32, shape)
        for place, (name, shape) in enumerate(shapes.items())
    }
    found = weights.match(model, stored)
    assert found == {parameter: stored[f"encoder.{name}"] for name, parameter in model.named_parameters()}
