r"""The peer GPC-Dist is measured against: PEFT prompt tuning trained by DeepSpeed on CPU ranks.

This is the loop a competent user writes today from the libraries' own documentation, and it
shares no code with `gpc_dist`. Every rank is one process with RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT set, for example:

    python benchmarks/peer_loop.py --prebuild
    torchrun --nproc-per-node 2 benchmarks/peer_loop.py --task rte --data DATA/RTE \
        --encoder FOLDER --stage 3 --steps 40 --out result.json

The training set is tokenised once before the first step; a step's time covers fetching and padding
the batch, forward, backward and the optimizer step. There is no evaluation. The frozen encoder runs
without its dropout unless `--dropout` is given: GPC-Dist does not use it either, and with it the
attention falls back to a slower kernel, so leaving it out is the peer's faster setting.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Must precede the imports below: they count as start-up, and they read these variables.
os.environ.setdefault("PROCESS_START_S", str(time.time()))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader, DistributedSampler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations import HfDeepSpeedConfig

TEXT_FIELDS = {"rte": ("premise", "hypothesis"), "boolq": ("question", "passage")}
LABELS: dict[str, list[Any]] = {"rte": ["entailment", "not_entailment"], "boolq": [False, True]}
Example = dict[str, Any]  # token lists and the label
WARMUP_STEPS = 2  # not counted in the throughput
LOG_EVERY = 10  # steps


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="PEFT prompt tuning + DeepSpeed on CPU ranks.")
    parser.add_argument("--task", choices=sorted(TEXT_FIELDS))
    parser.add_argument("--data", type=Path, help="folder with train.jsonl (SuperGLUE schema)")
    parser.add_argument("--encoder", type=Path, help="folder of the pretrained encoder")
    parser.add_argument("--stage", type=int, choices=range(4), default=1, help="ZeRO stage")
    parser.add_argument("--batch-size", type=int, default=32, help="examples per step, all ranks")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--max-length", type=int, default=256, help="text tokens")
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON result, written by rank 0")
    parser.add_argument("--checkpoint", type=Path, help="save here at the end (new folder)")
    parser.add_argument(
        "--dropout",
        action="store_true",
        help="put the frozen encoder in train mode, as many loops do (much slower on CPU)",
    )
    parser.add_argument(
        "--prebuild", action="store_true", help="only build DeepSpeed's shared-memory op, then exit"
    )
    args = parser.parse_args()
    if args.prebuild:
        return args
    for name in ("task", "data", "encoder", "out"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is required")
    if args.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be above {WARMUP_STEPS}, the steps that are not counted")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch_size % world_size:
        parser.error(f"--batch-size {args.batch_size} does not split over {world_size} ranks")
    if args.checkpoint and args.checkpoint.exists():
        parser.error(f"--checkpoint {args.checkpoint} exists; its size is measured, name a new one")
    return args


def ds_config(args: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration: fp32, torch AdamW, the chosen ZeRO stage.

    The bucket is 20 MB, not 2 GB, as 22 M frozen parameters and 8 k trained ones need no more.
    Stage 3 keeps DeepSpeed's generous defaults for prefetch, live parameters and reuse distance,
    so that at this size a layer gathered in the forward pass is still there in the backward pass.
    """
    return {
        "train_batch_size": args.batch_size,
        "train_micro_batch_size_per_gpu": args.batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": args.lr, "torch_adam": True}},
        "zero_optimization": {
            "stage": args.stage,
            "reduce_bucket_size": 5_000_000,
            "allgather_bucket_size": 5_000_000,
        },
        "steps_per_print": args.steps + 1,
        "wall_clock_breakdown": False,
    }


def load_examples(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Read and tokenise the training set."""
    with (args.data / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    first, second = ([row[field] for row in rows] for field in TEXT_FIELDS[args.task])
    encoded = tokenizer(first, second, truncation=True, max_length=args.max_length)
    labels = [LABELS[args.task].index(row["label"]) for row in rows]
    columns = {**encoded, "labels": labels}
    examples = zip(*columns.values(), strict=True)
    return [dict(zip(columns, example, strict=True)) for example in examples]


def endless_batches(loader: DataLoader[Any], sampler: DistributedSampler[Any]) -> Iterator[Any]:
    """Yield batches for ever, in a new random order each epoch."""
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def build_model(args: argparse.Namespace, pad_token_id: int) -> torch.nn.Module:
    """Load the encoder with a 2-class head and add the trainable prompt."""
    encoder = AutoModelForSequenceClassification.from_pretrained(
        args.encoder, num_labels=2, pad_token_id=pad_token_id, dtype=torch.float32
    )
    return get_peft_model(
        encoder,
        PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=args.prompt_tokens),
    )


def saved_bytes(engine: deepspeed.DeepSpeedEngine, folder: Path, **options: Any) -> int:
    """Save a checkpoint from all ranks and return the size of everything written."""
    engine.save_checkpoint(str(folder), **options)
    dist.barrier()
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train for `args.steps` steps and return the measurements (the same on every rank)."""
    deepspeed.init_distributed(dist_backend="gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = ds_config(args, world_size)
    # Must live before from_pretrained and stay alive: weights are then born sharded.
    _zero3_config = HfDeepSpeedConfig(config) if args.stage == 3 else None
    set_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(args.encoder)
    examples: Any = load_examples(args, tokenizer)  # a list serves as a Dataset
    sampler: DistributedSampler[Example] = DistributedSampler(
        examples, world_size, rank, shuffle=True, seed=args.seed, drop_last=True
    )
    loader: DataLoader[Example] = DataLoader(
        examples,
        batch_size=args.batch_size // world_size,
        sampler=sampler,
        collate_fn=DataCollatorWithPadding(tokenizer),
        drop_last=True,
    )

    model = build_model(args, tokenizer.pad_token_id)
    trainable = [param for param in model.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
    engine.train(args.dropout)

    batches = endless_batches(loader, sampler)
    losses: list[torch.Tensor] = []
    step_s: list[float] = []
    tokens = torch.zeros(2, dtype=torch.long)  # non-padding, and all with padding
    first_step_s = 0.0
    for step in range(1, args.steps + 1):
        started_s = time.perf_counter()
        batch = next(batches)
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
        if step % LOG_EVERY == 0 and rank == 0:
            print(f"step {step} loss {losses[-1].item():.4f}", flush=True)
        step_s.append(time.perf_counter() - started_s)
        if step == 1:
            first_step_s = time.time() - float(os.environ["PROCESS_START_S"])
        if step > WARMUP_STEPS:
            mask = batch["attention_mask"]
            tokens += torch.tensor([int(mask.sum()), mask.numel()])

    peak_rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peaks_mib: list[Any] = [None] * world_size
    dist.all_gather_object(peaks_mib, peak_rss_mib)
    final_loss = torch.stack(losses[-LOG_EVERY:]).mean()
    dist.all_reduce(final_loss)
    dist.all_reduce(tokens)
    timed_s = sum(step_s[WARMUP_STEPS:])
    result: dict[str, Any] = {
        "system": "peft+deepspeed",
        "task": args.task,
        "zero_stage": args.stage,
        "world_size": world_size,
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "prompt_tokens": args.prompt_tokens,
        "lr": args.lr,
        "seed": args.seed,
        "dropout": args.dropout,
        "steps": args.steps,
        "warmup_steps": WARMUP_STEPS,
        "step_s": step_s,
        "timed_s": timed_s,  # this and the next four: all ranks, after the warm-up steps
        "examples_per_s": args.batch_size * (args.steps - WARMUP_STEPS) / timed_s,
        "tokens_non_padding": int(tokens[0]),  # text only, without the prompt
        "tokens_with_padding": int(tokens[1]),
        "tokens_per_s": int(tokens[0]) / timed_s,  # non-padding
        "first_step_s": first_step_s,  # from process start to the end of the first step
        "final_loss": final_loss.item() / world_size,  # mean of the last 10 steps, all ranks
        "peak_rss_mib": peaks_mib,  # per rank, before any checkpoint is saved
        "trainable_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in trainable),
    }
    if args.checkpoint:
        result["checkpoint_bytes"] = saved_bytes(engine, args.checkpoint / "default")
        result["checkpoint_without_frozen_bytes"] = saved_bytes(
            engine, args.checkpoint / "without_frozen", exclude_frozen_parameters=True
        )
    return result


def main() -> None:
    """Run one rank, or build the shared-memory op alone."""
    args = parse_args()
    if args.prebuild:
        get_accelerator().create_op_builder("ShareMemCommBuilder").load()
        return
    result = train(args)
    if dist.get_rank() == 0:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
