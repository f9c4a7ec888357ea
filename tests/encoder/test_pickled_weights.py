"""Reading encoders from `.bin` files: as from safetensors, in parts and without the decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from gpc_dist.adapter.fingerprint import fingerprint_files, identify
from gpc_dist.encoder import frozen
from gpc_dist.encoder.frozen import thaw
from gpc_dist.errors import UserError
from gpc_dist.pickled import read_pickled
from tests.encoder.test_weights import load, pickle_weights, small_bert, turned, values


@pytest.fixture(params=[False, True])
def whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the family is none that the tests cover, so that transformers loads the encoder whole."""
    if request.param:
        monkeypatch.setattr(frozen, "TESTED", frozenset())
    return request.param


def bert_without_files(folder: Path) -> Any:
    model = small_bert(folder)
    (folder / "model.safetensors").unlink()
    return model


@pytest.mark.parametrize("change", [lambda tensor: tensor, turned])
def test_pickled_weights_of_the_files_type_are_views_of_the_file(tmp_path: Path, change: Any) -> None:
    model = small_bert(tmp_path)
    pickle_weights(tmp_path, change)
    found = values(load(tmp_path))
    sizes = {p.untyped_storage().nbytes() for p in found.values()}
    assert sizes == {(tmp_path / "pytorch_model.bin").stat().st_size}
    expected = model.get_parameter("encoder.layer.1.output.dense.weight")
    assert torch.equal(found["encoder.layer.1.output.dense.weight"], expected)


def test_of_a_pickled_encoder_decoder_no_rank_reads_the_decoder(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    decoder = {
        name: place
        for name, place in read_pickled(tmp_path / "pytorch_model.bin").items()
        if "decoder" in name
    }
    content = bytearray((tmp_path / "pytorch_model.bin").read_bytes())
    for name, stored in decoder.items():
        if "embed" not in name:
            size = stored.numel * stored.dtype.itemsize
            content[stored.offset : stored.offset + size] = bytes([255]) * size  # no numbers
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    for name, parameter in load(tmp_path).parts.encoder.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_what_is_thawed_lies_row_by_row(tmp_path: Path) -> None:
    small_bert(tmp_path)
    pickle_weights(tmp_path, turned)
    found = load(tmp_path)
    before = {name: value.clone() for name, value in values(found).items()}
    thaw(found.parts)
    assert all(value.is_contiguous() for value in values(found).values())
    assert all(torch.equal(value, before[name]) for name, value in values(found).items())


@pytest.mark.usefixtures("whole")
def test_pickled_weights_of_the_old_format_are_refused(tmp_path: Path) -> None:
    model = bert_without_files(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(
        UserError, match=r"pytorch_model.bin is in the format of PyTorch before 1.6.*write it anew"
    ):
        load(tmp_path)


def test_a_checkpoint_in_pickled_parts_is_loaded_and_hashed(tmp_path: Path, whole: bool) -> None:
    model = bert_without_files(tmp_path)
    names, state = ("pytorch_model-1.bin", "pytorch_model-2.bin"), model.state_dict()
    for part, name in enumerate(names):
        torch.save(dict(list(state.items())[part::2]), tmp_path / name)
    index = {"weight_map": {key: names[place % 2] for place, key in enumerate(state)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = load(tmp_path)
    assert (found.places is None) is whole
    assert found.files == [tmp_path / name for name in names]
    assert identify(found.parts.encoder, found.files).sha256 == fingerprint_files(found.files)
    for name, parameter in found.parts.encoder.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
