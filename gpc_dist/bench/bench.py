"""`gpc-dist bench`: what a training step costs on this machine.

The steps are those of `train` on synthetic examples: the same functions cut, share, run and finish the batches. The
learning rate is 0, so that training on random targets cannot change the work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from gpc_dist import files
from gpc_dist.adapter.fingerprint import EncoderIdentity
from gpc_dist.bench.machine import communication, matmul_tflops, synchronize
from gpc_dist.bench.synthetic import draw_lengths, synthetic
from gpc_dist.bench.work import count_work
from gpc_dist.config import Config
from gpc_dist.distributed.memory import peak_memory_mib
from gpc_dist.distributed.optimizer import LaneOptimizer
from gpc_dist.distributed.world import World, encoder_dtype, init_world
from gpc_dist.encoder.frozen import Encoder, count_parameters
from gpc_dist.encoder.shapes import known_config, shape_names
from gpc_dist.encoder.skeleton import build_skeleton, drawn
from gpc_dist.errors import EXIT_DONE, MachineError, UserError
from gpc_dist.planner.devices import devices_of
from gpc_dist.planner.dry_run import ModelSpec
from gpc_dist.planner.recipe import planned
from gpc_dist.tasks import Task
from gpc_dist.tasks.encode import Encoded
from gpc_dist.tasks.metrics import accuracy
from gpc_dist.training.session import Base, Session, Split, check_input, load_base, open_session, plan_of
from gpc_dist.training.step import LaneExamples, backward, finish, prepare

PROFILED_STEPS = 3


def run_bench(config: Config, steps: int, lengths: str, shape: str | None, json_file: Path | None) -> int:
    """Measure steps as one rank of the job, and print and write the results; returns the exit code.

    Args:
        steps: measured steps; a few more are run before them.
        lengths: text lengths, see `synthetic.LENGTHS`.
        shape: a well-known encoder (`shapes.shape_names`), built with random weights; the recipe's own is
            loaded when not given.
        json_file: where the results are written as JSON.

    Raises:
        UserError: unknown lengths or shape, or what `train` refuses.
        MachineError: out of GPU memory.
    """
    world = init_world(config.engine)
    try:
        result = _measure(config, world, steps, lengths, shape)
    except torch.cuda.OutOfMemoryError:
        raise MachineError(
            "out of memory on the GPU: give --engine.activation_checkpointing true, or a lower "
            "--engine.micro_batch_tokens or --train.batch_size"
        ) from None
    finally:
        world.leave()
    if world.is_main:
        print(_table(result))
        if json_file:
            files.write_json(json_file, result)
    return EXIT_DONE


def _measure(config: Config, world: World, steps: int, lengths: str, shape: str | None) -> dict[str, Any]:
    draw_lengths(lengths, 1, config.data.max_length)  # an unknown kind is refused before an encoder is loaded
    task = _task()
    config = _for_bench(config, shape)
    config = planned(config, world, task.outputs)
    if shape is None:
        check_input(config, world)
        base = load_base(config, world)
    else:
        base = _random_base(shape, config, world)
    session = open_session(config, world, task, base)
    adapter = session.new_adapter(config)
    split = session.with_states(Split([], _examples(session, lengths, steps)))
    session.release_lower_layers()
    examples = split.encoded
    optimizer = LaneOptimizer(adapter, config.train, world, config.engine.zero_stage)
    optimizer.set_factor(0.0)

    plan, _ = plan_of(config, examples)
    steps_examples = [LaneExamples(adapter, split, indices, task.kind) for indices in plan.steps(0)]
    by_work = sorted(steps_examples, key=lambda each: examples.sizes.padded_tokens(each.indices))
    # warm-up of the allocator, the compiler and caches: the longest, the shortest and the middle batch
    _run(session, optimizer, [by_work[-1], by_work[0], by_work[len(by_work) // 2]])
    seconds, padded = _run(session, optimizer, steps_examples)
    memory = world.gather(peak_memory_mib(world.device))
    spent = communication(lambda: _run(session, optimizer, steps_examples[:PROFILED_STEPS]), world)
    dtype = encoder_dtype(config.engine, world.device)
    sums = world.sum(torch.tensor([matmul_tflops(world.device, dtype), padded], device=world.device))
    measured_tflops, padded = sums.tolist()

    work = count_work(
        ModelSpec(
            base.parts.encoder.config,
            dtype,
            config.adapter,
            task.outputs,
            states_given=split.states is not None,
        ),
        examples.lengths,
        sharded=config.engine.zero_stage == 3,
        recompute=config.engine.activation_checkpointing,
    )
    total_s, tokens = sum(seconds), int(examples.lengths.sum())
    datasheet_tflops = _datasheet_tflops(world)
    return {
        "encoder": config.encoder.path if shape is None else f"{shape}, random weights",
        "frozen_parameters": base.parameters,
        "trainable_parameters": sum(p.numel() for p in adapter.parameters()),
        "method": config.adapter.method,
        "prompt_tokens": adapter.prompt_tokens,
        "lengths": lengths,
        "max_length": session.text_tokens,
        "engine": config.dump()["engine"],
        "dtype": str(dtype).removeprefix("torch."),
        "device": _device_name(world),
        "world_size": world.size,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "steps": len(seconds),
        "examples_per_step": len(examples) / len(seconds),
        "step_ms": 1000 * statistics.median(seconds),
        "tokens_per_s": tokens / total_s,
        "examples_per_s": len(examples) / total_s,
        "padding_pct": 100 * (1 - tokens / padded),
        "model_tflop_per_step": work.model / len(seconds) / 1e12,
        "peak_tflops": {"measured": measured_tflops, "datasheet": datasheet_tflops},
        "mfu_pct": _shares(work.model / total_s, measured_tflops, datasheet_tflops),
        "hfu_pct": _shares(work.hardware / total_s, measured_tflops, datasheet_tflops),
        "peak_memory_mib": memory,
        "first_layer": session.model.first_layer,
        "state_cache_mib": split.states.bytes / 2**20 if split.states else 0.0,
        "state_cache_s": session.text_states_s,
        "communication_pct": 100 * spent.busy,
        "communication_exposed_pct": None if spent.exposed is None else 100 * spent.exposed,
    }


def _for_bench(config: Config, shape: str | None) -> Config:
    """The recipe, with a prompt that needs neither a tokenizer nor label words to start from.

    Raises:
        UserError: the encoder is not frozen.
    """
    if config.adapter.trains_encoder:
        raise UserError(
            "bench counts the work of a frozen encoder: give another adapter.method than fine-tuning"
        )
    update: dict[str, Any] = {"adapter": config.adapter.model_copy(update={"prompt_init": "vocab"})}
    if config.engine.state_cache in ("auto", "disk"):
        # nobody needs the states of synthetic examples again
        update["engine"] = config.engine.model_copy(update={"state_cache": "memory"})
    if shape is not None:
        update["encoder"] = config.encoder.model_copy(update={"path": shape})
    return config.model_copy(update=update)


def _task() -> Task:
    return Task(
        name="synthetic",
        kind="classification",
        labels=("no", "yes"),
        label_words=(),
        metrics={"accuracy": accuracy},
        main_metric="accuracy",
        columns=(),
        reader=lambda _: [],
        parser=lambda _: [],
    )


def _random_base(shape: str, config: Config, world: World) -> Base:
    """An encoder of random weights, which are drawn as those of a checkpoint are read: only those that are needed."""
    start = time.monotonic()
    model_config = known_config(shape)
    if model_config is None:
        raise UserError(f"--shape '{shape}' is unknown: give one of {', '.join(shape_names())}")
    dtype = encoder_dtype(config.engine, world.device)

    def load(table: bool = True) -> Encoder:
        parts = build_skeleton(model_config, dtype)
        encoder = Encoder(parts, drawn(parts))
        if table:
            encoder.read_table()
        return encoder

    encoder = load(table=config.adapter.entry_layer(model_config.num_hidden_layers) == 0)
    parts = encoder.parts
    identity = EncoderIdentity(
        path=f"{shape}, random weights",
        revision=None,
        model_type=model_config.model_type,
        hidden_size=parts.shape.hidden_size,
        layers=parts.shape.layers,
        sha256="",
    )
    return Base(encoder, identity, None, load, count_parameters(parts), time.monotonic() - start)


def _examples(session: Session, lengths: str, steps: int) -> Encoded:
    """Synthetic examples for `steps` steps."""
    train, seed = session.config.train, session.config.run.seed
    per_step = train.batch_size
    if train.batch_tokens is not None:
        typical = draw_lengths(lengths, 1000, session.text_tokens, seed).mean()
        per_step = max(1, round(train.batch_tokens / typical))
    drawn = draw_lengths(lengths, steps * per_step, session.text_tokens, seed)
    vocabulary: Any = session.model.token_embeddings
    return synthetic(drawn, vocabulary.num_embeddings, seed)


def _run(
    session: Session, optimizer: LaneOptimizer, steps_examples: Sequence[LaneExamples]
) -> tuple[list[float], int]:
    """Run these steps as the training loop does; returns the seconds of each, and the tokens with padding that
    this rank ran in all of them.

    Raises:
        UserError: a loss is not finite, so that its update would be left out.
    """
    seconds, padded = [], 0
    step = prepare(session, [steps_examples[0]])
    synchronize(session.world.device)
    for upcoming in [*steps_examples[1:], steps_examples[0]]:
        start = time.perf_counter()
        loss = backward(session, [optimizer], step)
        following = prepare(session, [upcoming])
        (done,), _ = finish(session, [optimizer], loss)
        seconds.append(time.perf_counter() - start)
        if not done.finite:
            raise UserError("the loss is not finite, so this measures nothing: set engine.dtype fp32 or bf16")
        padded += sum(micro.batch.padded_tokens for micro in step.passes if micro.counts)
        step = following
    return seconds, padded


def _shares(flop_per_s: float, measured_tflops: float, datasheet_tflops: float | None) -> dict[str, Any]:
    """Per cent of the measured peak and of the datasheet's, which are in 10^12 FLOPs per second."""
    return {
        "measured": 100 * flop_per_s / measured_tflops / 1e12,
        "datasheet": 100 * flop_per_s / datasheet_tflops / 1e12 if datasheet_tflops else None,
    }


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


def _datasheet_tflops(world: World) -> float | None:
    """Dense bf16 peak of all ranks' GPUs; None for a device that is not in the table."""
    known = devices_of(_device_name(world))
    return known[0].peak_tflops * world.size if known else None


def _states_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    if not result["state_cache_mib"]:
        return []
    size, seconds = result["state_cache_mib"], result["state_cache_s"]
    return [
        (
            "text states",
            f"{size:,.1f} MiB that enter layer {result['first_layer']}, computed in {seconds:,.1f} s before the steps",
        )
    ]


def _table(result: dict[str, Any]) -> str:
    def shares(key: str) -> str:
        of = result[key]
        datasheet = "" if of["datasheet"] is None else f", {of['datasheet']:.1f} % of the datasheet peak"
        return f"{of['measured']:.1f} % of the measured peak{datasheet}"

    peak, engine = result["peak_tflops"], result["engine"]
    datasheet = "unknown" if peak["datasheet"] is None else f"{peak['datasheet']:,.0f}"
    exposed = result["communication_exposed_pct"]
    lines = [
        ("encoder", f"{result['encoder']} ({result['frozen_parameters'] / 1e6:,.0f} M parameters)"),
        ("device", f"{result['world_size']} x {result['device']}, {result['dtype']}"),
        ("ZeRO stage", engine["zero_stage"]),
        ("adapter", f"{result['method']}, {result['prompt_tokens']} prompt tokens"),
        ("examples", f"{result['examples_per_step']:.4g} a step, lengths: {result['lengths']}"),
        ("step", f"{result['step_ms']:,.1f} ms (median of {result['steps']})"),
        ("tokens/s", f"{result['tokens_per_s']:,.0f} (no padding, no prompt)"),
        ("examples/s", f"{result['examples_per_s']:,.1f}"),
        ("padding", f"{result['padding_pct']:.1f} %"),
        ("peak of the device", f"{peak['measured']:,.3g} TFLOPS measured, datasheet: {datasheet}"),
        ("MFU", shares("mfu_pct")),
        ("HFU", shares("hfu_pct")),
        *_states_lines(result),
        ("peak memory", ", ".join(f"{mib:,.0f}" for mib in result["peak_memory_mib"]) + " MiB per rank"),
        (
            "communication",
            f"{result['communication_pct']:.1f} % of the step"
            + ("" if exposed is None else f", {exposed:.1f} % with nothing else running"),
        ),
    ]
    return tabulate(lines, tablefmt="plain", disable_numparse=True)
