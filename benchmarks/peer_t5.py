r"""The peer of `gpu_t5.py` and `scaling.py`: PEFT prompt tuning of a T5 encoder, in plain PyTorch or under DeepSpeed.

This is the loop a competent user writes today from the libraries' own documentation, and it shares no code with
`gpc_dist`: random batches padded to their longest row, pinned memory, worker processes and copies that do not wait
on a GPU, no loss read back in a step. The frozen encoder runs without its dropout, which makes it faster. Out of
memory is a result, not an error.

    python benchmarks/peer_t5.py --encoder FOLDER --examples FILE.npz --batch-size 32 --out result.json
    torchrun --nproc-per-node 2 benchmarks/peer_t5.py ... --stage 3

FILE.npz holds `ids` (token ids of all rows, one after the other), `lengths` and `labels` of the rows. Every row is
seen once in the measured steps.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler
from transformers import T5EncoderModel, set_seed
from transformers.utils import logging

WARMUP_STEPS = 3
Example = tuple[Tensor, int]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="PEFT prompt tuning of a T5 encoder.")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--examples", type=Path, required=True, help="see above")
    parser.add_argument("--out", type=Path, required=True, help="JSON result, written by rank 0")
    parser.add_argument("--batch-size", type=int, default=32, help="examples per step, all ranks")
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--stage", type=int, choices=range(4), help="ZeRO stage; no DeepSpeed when not given")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.stage is None and world_size > 1:
        parser.error("several ranks need --stage")
    if args.batch_size % world_size:
        parser.error(f"--batch-size {args.batch_size} does not split over {world_size} ranks")
    return args


def ds_config(args: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of PEFT's guide, with buckets that suit so few trained parameters."""
    return {
        "train_batch_size": args.batch_size,
        "train_micro_batch_size_per_gpu": args.batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": args.lr, "torch_adam": True}},
        "bf16": {"enabled": args.device == "cuda"},
        "zero_optimization": {
            "stage": args.stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": 5_000_000,
            "allgather_bucket_size": 5_000_000,
        },
        "steps_per_print": 1_000_000,
        "wall_clock_breakdown": False,
    }


class Classifier(nn.Module):
    """A T5 encoder with a soft prompt, and a linear head on the mean of the text states."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        encoder = T5EncoderModel.from_pretrained(args.encoder, dtype=dtype, dropout_rate=0.0)
        if args.gradient_checkpointing:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
        config = PromptTuningConfig(
            task_type=TaskType.FEATURE_EXTRACTION, num_virtual_tokens=args.prompt_tokens
        )
        self.prompt_tokens = args.prompt_tokens
        self.encoder = get_peft_model(encoder, config)
        self.head = nn.Linear(encoder.config.d_model, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the batch."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        states = output.last_hidden_state[:, self.prompt_tokens :]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return F.cross_entropy(self.head(pooled.to(self.head.weight.dtype)).float(), labels)


def read_examples(path: Path) -> list[Example]:
    """Token ids and label of every row."""
    with np.load(path) as file:
        rows = np.split(file["ids"].astype(np.int64), np.cumsum(file["lengths"])[:-1])
        return [(torch.from_numpy(row), int(label)) for row, label in zip(rows, file["labels"], strict=True)]


def pad(examples: list[Example]) -> dict[str, Tensor]:
    """A batch, padded to its longest row."""
    rows, labels = zip(*examples, strict=True)
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence(list(rows), batch_first=True)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}


def make_step(args: argparse.Namespace, world_size: int) -> Any:
    """The function that trains on one batch (on the device)."""
    if args.stage is None:
        model = Classifier(args).to(args.device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=args.lr)

        def step(batch: dict[str, Tensor]) -> None:
            model(**batch).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    if args.device == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # its shared-memory operator would be compiled first, for a minute
    deepspeed.init_distributed(dist_backend="nccl" if args.device == "cuda" else "gloo")
    config = ds_config(args, world_size)
    # must live while from_pretrained runs: weights are then born sharded
    _zero3 = HfDeepSpeedConfig(config) if args.stage == 3 else None
    model = Classifier(args)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    engine.train()

    def engine_step(batch: dict[str, Tensor]) -> None:
        engine.backward(engine(**batch))
        engine.step()

    return engine_step


def endless_batches(loader: DataLoader[Example], sampler: DistributedSampler[Example]) -> Iterator[Any]:
    """Batches for ever, in a new random order each epoch."""
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def mark(device: str) -> Any:
    """This moment: of the GPU's own time, which needs no waiting, or of the clock."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Any, second: Any) -> float:
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1000


def peak_memory_mib(device: str) -> float:
    """Most memory this process has held so far: of its GPU, or resident on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train on every row once and return the measurements (the same on every rank)."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    set_seed(0)
    step = make_step(args, world_size)
    examples: Any = read_examples(args.examples)  # a list serves as a Dataset
    steps = len(examples) // args.batch_size
    sampler: DistributedSampler[Example] = DistributedSampler(examples, world_size, rank, drop_last=True)
    on_gpu = args.device == "cuda"
    loader: DataLoader[Example] = DataLoader(
        examples,
        batch_size=args.batch_size // world_size,
        sampler=sampler,
        collate_fn=pad,
        drop_last=True,
        pin_memory=on_gpu,
        num_workers=2 if on_gpu else 0,
        persistent_workers=on_gpu,
    )
    batches = endless_batches(loader, sampler)
    tokens = torch.zeros(2, dtype=torch.long)  # non-padding, and all with padding
    marks = []
    for number in range(WARMUP_STEPS + steps):
        if number == WARMUP_STEPS:
            marks.append(mark(args.device))
        batch = next(batches)
        if number >= WARMUP_STEPS:
            mask = batch["attention_mask"]
            tokens += torch.tensor([int(mask.sum()), mask.numel()])
        step({key: value.to(args.device, non_blocking=True) for key, value in batch.items()})
        if number >= WARMUP_STEPS:
            marks.append(mark(args.device))
    if on_gpu:
        torch.cuda.synchronize()

    memory: list[Any] = [peak_memory_mib(args.device)]
    if world_size > 1:
        memory = [None] * world_size
        dist.all_gather_object(memory, peak_memory_mib(args.device))
        tokens = tokens.to(args.device)
        dist.all_reduce(tokens)
    total_s = seconds_between(marks[0], marks[-1])
    step_s = [seconds_between(a, b) for a, b in zip(marks, marks[1:], strict=False)]
    return {
        "steps": steps,
        "step_ms": 1000 * statistics.median(step_s),
        "tokens_per_s": int(tokens[0]) / total_s,  # non-padding, text only
        "examples_per_s": args.batch_size * steps / total_s,
        "padding_pct": 100 * (1 - int(tokens[0]) / int(tokens[1])),
        "peak_memory_mib": memory,
    }


def main() -> None:
    args = parse_args()
    logging.disable_progress_bar()
    try:
        result = train(args)
    except torch.cuda.OutOfMemoryError:
        result = {"out_of_memory": True}
    if int(os.environ.get("RANK", "0")) == 0:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
