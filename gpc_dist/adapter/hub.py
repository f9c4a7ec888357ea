"""Adapters on the Hugging Face Hub: the model card that tells what an adapter is, and the upload of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpc_dist.adapter.fingerprint import EncoderIdentity
from gpc_dist.adapter.lane import Origin
from gpc_dist.adapter.store import MARK, AdapterCard
from gpc_dist.errors import UserError
from gpc_dist.schema import mapping
from gpc_dist.shown import one_line, shown
from gpc_dist.typed import is_number

_LIBRARY = "gpc-dist"
_PIPELINES = {"classification": "text-classification", "choice": "multiple-choice"}
"""The Hub's names by `task.kind`; it has none for a number of a text."""
_PACKAGED = ("minilm", "demo")
"""Paths of what the program itself has."""
_FILES = ("path", "train", "validation", "test")
"""Keys of `data` that name files."""
_METHODS = {
    "gpc": "a prompt and a Global Prompt Cell (arXiv 2304.05642), which rewrites the prompt between the layers",
    "prompt-tuning": "a prompt before the text (prompt tuning)",
    "deep-prompt": "a fresh prompt at every layer",
    "linear-probe": "a head alone, without a prompt",
    "fine-tuning": "a fine-tuned encoder and a head",
}


def model_card(
    card: AdapterCard,
    name: str,
    parameters: int,
    metrics: Mapping[str, Any] | None = None,
    place: str = ".",
    split: str = "validation",
) -> str:
    """The text of an adapter's `README.md`: metadata as the Hub reads them, then what it is and how to load it.

    Local paths are not in it: they mean nothing elsewhere.

    Args:
        name: of the adapter.
        parameters: trained ones.
        metrics: figures by name; what is no number is left out.
        place: what to load it from: a Hub id, or a folder.
        split: of the data on which the figures are measured.
    """
    from huggingface_hub import EvalResult, ModelCardData

    task, data = mapping("task", card.task.get("task")), mapping("data", card.task.get("data"))
    figures = {key: float(value) for key, value in (metrics or {}).items() if is_number(value)}
    task_name = shown(str(task.get("name", "unnamed")))
    dataset = _on_hub(data.get("path"))
    kind = str(task.get("kind"))
    if kind == "classification" and card.outputs == 1:
        kind = "choice"  # of a packaged task, whose kind its configuration does not say
    pipeline = _PIPELINES.get(kind) if task else None
    results = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=dataset or task_name,
            dataset_name=task_name,
            dataset_config=data.get("config") if dataset else None,
            dataset_split=split,
            metric_type=key,
            metric_value=value,
        )
        for key, value in figures.items()
    ]
    metadata = ModelCardData(
        library_name=_LIBRARY,
        base_model=_on_hub(card.encoder.path),
        datasets=[dataset] if dataset else None,
        pipeline_tag=pipeline,
        metrics=[key for key in figures if key != "loss"] or None,
        tags=[_LIBRARY, card.adapter.method],
        model_name=name,
        eval_results=results or None,
    )
    encoder = card.encoder
    lines = [
        ("method", f"{card.adapter.method}: {_METHODS[card.adapter.method]}"),
        ("trained parameters", f"{parameters:,}"),
        ("outputs", str(card.outputs)),
        ("task", f"{task_name}, {kind}" if task else "not recorded"),
        *([("labels", ", ".join(map(str, task["labels"])))] if task.get("labels") else []),
        ("data", dataset or ("local files" if data.get("path") else "not recorded")),
        *([("started from", _of_origin(card.origin))] if card.origin else []),
        ("encoder", f"{_on_hub(encoder.path) or Path(encoder.path).name}, frozen ({encoder.model_type})"),
        ("encoder's revision", encoder.revision or "not recorded"),
        ("encoder's fingerprint", f"sha256 {encoder.sha256}"),
        *((f"{key} ({split})", f"{value:.4f}") for key, value in figures.items()),
    ]
    table = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in lines)
    return f"""---
{metadata.to_yaml()}
---
{MARK}

# {_cell(name)}

An adapter for a frozen encoder, trained with gpc-dist. It holds what was trained and nothing of the encoder.

| | |
|---|---|
{table}

The encoder is loaded beside it and must have this fingerprint; another one is refused.

```python
from gpc_dist.adapter import GraftedEncoder

model = GraftedEncoder.from_pretrained("{place}")
logits = model(**tokenizer(texts, padding=True, return_tensors="pt"))  # the encoder's tokenizer
```
"""


def without_local_paths(
    encoder: EncoderIdentity, task: Mapping[str, Any]
) -> tuple[EncoderIdentity, dict[str, Any]]:
    """What an adapter's card says of its encoder and its task, for others: a local encoder by its last name (and its
    fingerprint), and no local files of data."""
    if encoder.path not in _PACKAGED and _on_hub(encoder.path) is None:
        encoder = replace(encoder, path=Path(encoder.path).name)
    data = mapping("data", task.get("data"))
    if data and data.get("path") not in _PACKAGED and _on_hub(data.get("path")) is None:
        return encoder, {**task, "data": {**data, **dict.fromkeys(_FILES)}}
    return encoder, dict(task)


def push_folder(folder: Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Upload an adapter folder to a model repository of the Hub, which is made if it is not there; returns its address.

    Args:
        private: of a new repository; as the account has it when not given.
        token: of the Hub; that of `hf auth login` or of HF_TOKEN when not given.

    Raises:
        UserError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name=_LIBRARY)
    try:
        found = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=found.repo_id, folder_path=folder, commit_message="Upload an adapter of gpc-dist"
        )
    except Exception as error:  # the Hub's client raises a dozen types
        raise UserError(
            f"{shown(repo_id)} on the Hugging Face Hub cannot be written ({one_line(error)}): see hf auth whoami, and "
            "whether the Hub can be reached"
        ) from None
    return str(found)


def _on_hub(path: Any) -> str | None:
    """A path that is a Hub id; None for a local one, and for what the program itself has."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not isinstance(path, str) or path in _PACKAGED or Path(path).exists():
        return None
    try:
        validate_repo_id(path)
    except HFValidationError:
        return None
    return path


def _of_origin(origin: Origin) -> str:
    """What an adapter took from another one."""
    return f"{', '.join(origin.parts)} of an adapter of {origin.task}, sha256 {origin.weights_sha256}"


def _cell(text: str) -> str:
    """Text in a line of Markdown."""
    return shown(text).replace("|", r"\|").replace("<", "&lt;")
