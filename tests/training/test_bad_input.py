"""One rank in this process: what cannot be run is one line that names it, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpc_dist.errors import EXIT_USAGE
from tests.conftest import gpc


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file", "--output file is a file, and a name without an ending is a folder's: give file.jsonl"),
        ("file/out.jsonl", "file is a file"),
        ("file/a/b", "file is a file"),
        ("closed/out.jsonl", "--output closed/out.jsonl cannot be written: you may not write to "),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda path, _: Path(path).name != "closed")  # root may write anywhere
    (tmp_path / "closed").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "in.jsonl").write_text("{}")
    assert gpc("predict", "no-adapter", "--input", "in.jsonl", "--output", output) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_an_encoders_own_code_is_not_run(
    tiny_recipe: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    encoder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    opened = tmp_path / "opened"
    (encoder / "own.py").write_text(f"open({str(opened)!r}, 'w')\nclass Own: pass\n")
    settings = json.loads((encoder / file).read_text())
    if file == "config.json":
        settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    else:
        (encoder / "config.json").write_text('{"model_type": "own"}')
        settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (encoder / file).write_text(json.dumps(settings))
    for words in (["train"], ["plan"]):
        more = ["--run.dir", tmp_path / "run"] if words == ["train"] else []
        assert gpc(*words, tiny_recipe, "--encoder.path", encoder, *more) == EXIT_USAGE
        assert not opened.exists()
        (line,) = capsys.readouterr().err.splitlines()
        assert f"encoder.path '{encoder}'" in line
        assert "needs Python code that comes with it" in line or words == ["plan"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "no tokenizer could be loaded"),
        ("config.json", '{"model_type": "bert", "hidden_size": "wide"}', "could be loaded"),
        ("tokenizer.json", "{", "no tokenizer could be loaded"),
        ("tokenizer.json", "[]", "no tokenizer could be loaded"),
        ("vocab.txt", "nothing", "no tokenizer could be loaded (WordPiece error: Missing [UNK] token"),
        ("vocab.txt", "", "no tokenizer could be loaded"),
        (
            "pytorch_model.bin",
            "version https://git-lfs.github.com/spec/v1",
            "pytorch_model.bin is damaged (File is not a zip file): fetch it again",
        ),
        ("pytorch_model.bin", "", "is damaged (File is not a zip file)"),
        ("pytorch_model.bin.index.json", "[]", "is no index of weights"),
        ("model.safetensors.index.json", "null", "is no index of weights"),
        ("model.safetensors", "", "is damaged (header too small)"),
    ],
)
def test_a_damaged_encoder_is_one_line(
    tiny_recipe: Path,
    tiny_encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: str,
    message: str,
) -> None:
    encoder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    if "model." in file:
        (encoder / "model.safetensors").unlink()
    if file == "vocab.txt":
        (encoder / "tokenizer.json").unlink()
    (encoder / file).write_text(content)
    assert gpc("train", tiny_recipe, "--encoder.path", encoder, "--run.dir", tmp_path / "run") == EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run" / "adapter").exists()


def test_pickled_weights_and_stray_files_belong_to_no_other_encoder(
    tiny_recipe: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a `.bin` of PyTorch before 1.6, which is no zip, is refused with what to do."""
    encoder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    weights = load_file(encoder / "model.safetensors")
    (encoder / "model.safetensors").unlink()
    torch.save(weights, encoder / "pytorch_model.bin")
    run = tmp_path / "run"
    assert gpc("train", tiny_recipe, "--encoder.path", encoder, "--run.dir", run, "--train.steps", 2) == 0
    save_file({"old": torch.zeros(2)}, encoder / "model_old.safetensors")
    assert gpc("evaluate", run / "adapter", "--engine.device", "cpu") == 0
    weights["embeddings.word_embeddings.weight"][0] += 1
    torch.save(weights, encoder / "pytorch_model.bin")
    assert gpc("evaluate", run / "adapter", "--engine.device", "cpu") == EXIT_USAGE
    assert "this adapter was trained on encoder" in capsys.readouterr().err
    torch.save(weights, encoder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert gpc("evaluate", run / "adapter", "--engine.device", "cpu") == EXIT_USAGE
    assert "PyTorch before 1.6" in capsys.readouterr().err


BAD = {
    "unknown recipe": (["train", "nothing"], "no recipe 'nothing'"),
    "unknown key": (["{recipe}", "--train.lrr", "1"], "did you mean 'train.lr'"),
    "a key twice": (["{recipe}", "--train.lr", "1", "--train.lr", "2"], "--train.lr is given twice"),
    "no value": (["{recipe}", "--train.lr"], "--train.lr needs a value"),
    "bad value": (["{recipe}", "--train.lr", "fast"], "train.lr: Input should be a valid number"),
    "fp16": (["{recipe}", "--engine.dtype", "fp16"], "bf16"),
    "missing data": (["{recipe}", "--data.path", "/nowhere/data"], "/nowhere/data does not exist"),
    "missing encoder": (
        ["{recipe}", "--encoder.path", "/nowhere/encoder"],
        "/nowhere/encoder does not exist",
    ),
    "hub out of reach": (["{recipe}", "--encoder.path", "no-such/encoder"], "encoder.path 'no-such/encoder'"),
    "wrong column": (["{recipe}", "--task.text", "[body]"], "there is no column 'body'"),
    "unseen label": (["{recipe}", "--task.labels", "[a, b]"], "is none of the labels"),
    "no such layer": (["{recipe}", "--adapter.cell_layers", "[0, 3]"], "give some of 0 to 2"),
    "long prompt": (["{recipe}", "--adapter.prompt_tokens", "64"], "64 positions"),
    "wrong regime": (
        ["{recipe}", "--engine.ds_config", "zero3", "--engine.zero_stage", "1"],
        "has ZeRO stage 3, but engine.zero_stage is 1",
    ),
    "no regime": (["{recipe}", "--engine.ds_config", "zero9"], "zero0"),
    "offload without sharding": (["{recipe}", "--engine.offload_param", "cpu"], "needs engine.zero_stage 3"),
    "weights without classes": (
        ["{recipe}", "--task.kind", "regression", "--train.class_weights", "balanced"],
        "task cats is of kind regression",
    ),
    "steps and epochs": (["{recipe}", "--train.steps", "1", "--train.epochs", "1"], "exclude each other"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_message_and_no_trace(
    case: str, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = BAD[case]
    if arguments[0] == "{recipe}":
        arguments = ["train", str(tiny_recipe), "--run.dir", str(tmp_path / "run"), *arguments[1:]]
    assert gpc(*arguments) == EXIT_USAGE
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "result.json").exists()


def test_another_runs_folder_is_refused(
    run: Path, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    arguments = ("--run.dir", tmp_path / "run", "--adapter.prompt_tokens", 5)
    assert gpc("train", tiny_recipe, *arguments) == EXIT_USAGE
    assert "belongs to a run with another adapter" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_an_adapter_on_another_encoder_is_refused(
    run: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModel

    other = tmp_path / "other"
    shutil.copytree(tiny_encoder, other)
    model = AutoModel.from_pretrained(other)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias += 1
    model.save_pretrained(other)
    assert gpc("evaluate", run / "adapter", "--encoder.path", other) == EXIT_USAGE
    said = capsys.readouterr().err
    assert str(other) in said
    assert str(tiny_encoder) in said
