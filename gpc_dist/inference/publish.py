"""`gpc-dist push`: an adapter on the Hugging Face Hub, with the figures of its run."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from gpc_dist.adapter.hub import model_card, push_folder, without_local_paths
from gpc_dist.adapter.store import load_adapter, save_adapter
from gpc_dist.errors import EXIT_DONE, UserError
from gpc_dist.runs.folder import RunFolder
from gpc_dist.runs.result import RunResult, read_result


def run_push(folder: Path, repo_id: str, private: bool | None) -> int:
    """Upload an adapter with a model card, and print its address; returns the exit code.

    Args:
        folder: of the adapter; where it stands in the folder of a finished run, the card has that run's figures.

    Raises:
        UserError: the folder has no adapter, or a fine-tuned encoder; or the Hub cannot be written.
    """
    adapter, card = load_adapter(folder)
    if card.adapter.trains_encoder:
        raise UserError(
            f"{folder} holds a whole encoder and no adapter beside it: upload the folder with hf upload"
        )
    run = RunFolder(Path(os.path.abspath(folder)).parent)
    result = read_result(run.path) if run.result.is_file() else RunResult()
    count = sum(parameter.numel() for parameter in adapter.parameters())
    encoder, task = without_local_paths(card.encoder, card.task)
    with TemporaryDirectory(prefix="gpc-dist-") as place:
        save_adapter(
            Path(place) / "adapter",
            adapter,
            encoder,
            task,
            describe=lambda written: model_card(
                written, repo_id.rpartition("/")[2], count, result.metrics.best, repo_id, result.selected_on
            ),
        )
        print(f"uploaded to {push_folder(Path(place) / 'adapter', repo_id, private)}")
    return EXIT_DONE
