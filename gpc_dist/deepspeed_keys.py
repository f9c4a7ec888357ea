"""What becomes of each key of a DeepSpeed configuration in this program: one table, for the reader of a user's file and
for docs/deepspeed.md.

The names are those of DeepSpeed's own models, which a test compares.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

ZERO = "zero_optimization"
OFFLOAD = f"{ZERO}.offload_param"
SECTIONS = (ZERO, OFFLOAD)
"""Keys whose own keys stand in the table."""


class Fate(Enum):
    """What the program does with a key of the file."""

    GIVEN = "given to DeepSpeed"
    TRAINED = "given to DeepSpeed, where it matters to fine-tuning alone"
    READ = "counts as"
    SET = "set from"
    UNUSED = "not used, with a warning"
    REFUSED = "refused"


@dataclass(frozen=True)
class Key:
    """A row of the table."""

    fate: Fate
    note: str = ""
    """The program's key that it is read as or set from; or why it is not used, and what to take instead."""
    kind: type | None = None
    """Of the value, where it is used: bool, int (a whole number), str or dict."""
    default: Any = False
    """A value that asks for nothing, beside false, null, "auto", "none" and what is empty."""

    def asks(self, value: Any) -> bool:
        """Whether a value asks for anything."""
        if isinstance(value, dict):
            return self.asks(value["enabled"]) if "enabled" in value else any(map(self.asks, value.values()))
        return value not in (None, False, "auto", "none", "", [], self.default)


def _given(kind: type) -> Key:
    return Key(Fate.GIVEN, kind=kind)


def _trained(kind: type) -> Key:
    return Key(Fate.TRAINED, kind=kind)


def _read(key: str, kind: type, default: Any = False) -> Key:
    return Key(Fate.READ, f"`{key}`", kind, default)


def _set(source: str) -> Key:
    return Key(Fate.SET, source)


def _unused(note: str) -> Key:
    return Key(Fate.UNUSED, note)


def _refused(note: str, default: Any = False) -> Key:
    return Key(Fate.REFUSED, note, default=default)


_MONITORS = (
    "DeepSpeed's engine writes it in its own steps, and makes none here: `tracking.uri`, `metrics.jsonl`"
)
_PARALLEL = "ranks share the encoder by ZeRO alone"
_REMOVED = "DeepSpeed 0.19.8 has removed it, and frozen weights have no use for it"
_CHECKPOINTS = "checkpoints are the program's own: `train.save_every`"
_MICS = "DeepSpeed 0.19.8 has removed MiCS: `zero_hpz_partition_size` gathers inside a node too"
_DTYPE = "`engine.dtype` (fp32, bf16) says it"
_TIMES = "DeepSpeed times passes of its own engine, and the layers run without it: `gpc-dist bench`"
_LEAF = "each layer is gathered as a whole"
_GRADIENT = "the gradient is that of the mean over a step's examples"
_OLD_OFFLOAD = "an older name: write `offload_param` with a `device`"

KEYS: dict[str, Key] = {
    "train_batch_size": _set("`train.batch_size`"),
    "train_micro_batch_size_per_gpu": _set("`train.batch_size`"),
    "gradient_accumulation_steps": _set("1; `engine.micro_batch_tokens` divides a step"),
    "gradient_clipping": _set("`train.clip_norm`"),
    "bf16": _set("`engine.dtype`"),
    "fp16": _refused("T5 overflows in it: `engine.dtype bf16`"),
    "zero_allow_untested_optimizer": _set("true"),
    "zero_force_ds_cpu_optimizer": _set("false"),
    "communication_data_type": _trained(str),
    "aio": _given(dict),
    "optimizer": _unused("`train.optimizer`, `train.lr`, `train.betas` and `train.weight_decay`"),
    "scheduler": _unused("`train.schedule` and `train.warmup`"),
    "steps_per_print": _unused("`train.log_every`"),
    "log_level": _unused("DeepSpeed is kept to warnings"),
    "dump_state": _unused("`ds_config.json` in the run's folder says what DeepSpeed was given"),
    "timers": _unused("`metrics.jsonl` has `samples_per_s`"),
    "disable_allgather": _unused("nothing of ZeRO reads it"),
    "disable_python_gc": _unused("it acts in steps of DeepSpeed's engine"),
    "dataloader_drop_last": _unused("batches are the program's own"),
    "seq_parallel_communication_data_type": _unused(_PARALLEL),
    "vocabulary_size": _unused("DeepSpeed only warns about it"),
    "checkpoint": _unused(_CHECKPOINTS),
    "datastates_ckpt": _unused(_CHECKPOINTS),
    "activation_checkpointing": _refused(
        "it acts in models that call DeepSpeed's function: `engine.activation_checkpointing true`"
    ),
    "comms_logger": _refused("its summary is printed only if a program asks for it: `gpc-dist bench`"),
    "wall_clock_breakdown": _refused(_TIMES),
    "memory_breakdown": _refused("`peak_memory_mib` in `result.json` and `gpc-dist plan` say it"),
    "flops_profiler": _refused(f"{_TIMES}, and `gpc-dist plan`"),
    "tensorboard": _refused(_MONITORS),
    "wandb": _refused(_MONITORS),
    "csv_monitor": _refused(_MONITORS),
    "comet": _refused(_MONITORS),
    "autotuning": _refused("`engine.plan auto`"),
    "compile": _refused("`engine.compile true`, at stages 0 to 2"),
    "data_efficiency": _refused("batches are the program's own"),
    "data_types": _refused(_DTYPE),
    "bfloat16": _refused(f"the old name of `bf16`; {_DTYPE}"),
    "torch_autocast": _refused(_DTYPE),
    "weight_quantization": _refused("`engine.quantize int8`"),
    "prescale_gradients": _refused(_GRADIENT),
    "gradient_predivide_factor": _refused(_GRADIENT, default=1.0),
    "gradient_allreduce_op": _refused(_GRADIENT, default="mean"),
    "managed_gradient_accumulation": _refused("`engine.micro_batch_tokens`", default=True),
    "hybrid_engine": _refused("it generates text"),
    "pipeline": _refused(_PARALLEL),
    "tensor_parallel": _refused(_PARALLEL),
    "expert_parallel": _refused(_PARALLEL),
    "use_data_before_expert_parallelism": _refused(_PARALLEL),
    "sequence_parallel_size": _refused(_PARALLEL, default=1),
    "data_parallel_size": _refused(_PARALLEL),
    **{
        name: _refused(_REMOVED)
        for name in (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        )
    },
    f"{ZERO}.stage": _read("engine.zero_stage", int),
    f"{ZERO}.zero_quantized_nontrainable_weights": _read("engine.quantize int8", bool),
    f"{ZERO}.zero_hpz_partition_size": _read("engine.hpz true", int, default=1),
    f"{OFFLOAD}.device": _read("engine.offload_param", str),
    f"{OFFLOAD}.nvme_path": _read("engine.nvme_path", str),
    f"{OFFLOAD}.pin_memory": _given(bool),
    f"{OFFLOAD}.buffer_count": _given(int),
    f"{OFFLOAD}.buffer_size": _given(int),
    f"{OFFLOAD}.max_in_cpu": _given(int),
    f"{ZERO}.overlap_comm": _given(bool),
    f"{ZERO}.stage3_prefetch_bucket_size": _given(int),
    f"{ZERO}.stage3_param_persistence_threshold": _given(int),
    f"{ZERO}.stage3_model_persistence_threshold": _given(int),
    f"{ZERO}.stage3_max_live_parameters": _given(int),
    f"{ZERO}.stage3_max_reuse_distance": _given(int),
    f"{ZERO}.stage3_use_all_reduce_for_fetch_params": _given(bool),
    f"{ZERO}.stage3_allgather_sequential": _given(bool),
    f"{ZERO}.memory_efficient_linear": _given(bool),
    f"{ZERO}.override_module_apply": _given(bool),
    f"{ZERO}.log_trace_cache_warnings": _given(bool),
    f"{ZERO}.enable_sanity_checks": _given(bool),
    f"{ZERO}.contiguous_gradients": _trained(bool),
    f"{ZERO}.reduce_scatter": _trained(bool),
    f"{ZERO}.reduce_bucket_size": _trained(int),
    f"{ZERO}.use_multi_rank_bucket_allreduce": _trained(bool),
    f"{ZERO}.allgather_partitions": _trained(bool),
    f"{ZERO}.allgather_bucket_size": _trained(int),
    f"{ZERO}.round_robin_gradients": _trained(bool),
    f"{ZERO}.parameter_alignment": _trained(bool),
    f"{ZERO}.compute_grad_norm": _trained(bool),
    f"{ZERO}.ignore_unused_parameters": _trained(bool),
    f"{ZERO}.sub_group_size": _trained(int),
    f"{ZERO}.offload_optimizer": _unused("the optimizer is the program's own; an adapter's state is small"),
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": _unused("an adapter is saved, not the encoder"),
    f"{ZERO}.stage3_gather_fp16_weights_on_model_save": _unused("an adapter is saved, not the encoder"),
    f"{ZERO}.load_from_fp32_weights": _unused(_CHECKPOINTS),
    f"{ZERO}.elastic_checkpoint": _unused(_CHECKPOINTS),
    f"{ZERO}.pipeline_loading_checkpoint": _unused(_CHECKPOINTS),
    f"{ZERO}.legacy_stage1": _unused("DeepSpeed has one stage 1 today"),
    f"{ZERO}.save_muon_momentum_buffer_in_memory": _unused("there is no Muon here: `train.optimizer`"),
    f"{ZERO}.stage3_module_granularity_threshold": _refused(_LEAF, default=0),
    f"{ZERO}.leaf_module": _refused(_LEAF),
    f"{ZERO}.zenflow": _refused("it offloads an optimizer's state, and an adapter's is small"),
    f"{ZERO}.zero_quantized_weights": _refused(
        "frozen weights can be kept as int8, too: `zero_quantized_nontrainable_weights`"
    ),
    f"{ZERO}.zero_quantized_gradients": _refused("frozen weights have no gradients"),
    f"{ZERO}.mics_shard_size": _refused(_MICS, default=-1),
    f"{ZERO}.mics_hierarchical_params_gather": _refused(_MICS),
    f"{ZERO}.zeropp_loco_param": _refused(_REMOVED),
    f"{ZERO}.cpu_offload": _refused("the optimizer is the program's own; an adapter's state is small"),
    f"{ZERO}.cpu_offload_param": _refused(_OLD_OFFLOAD),
    f"{ZERO}.cpu_offload_use_pin_memory": _refused(_OLD_OFFLOAD),
}


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a configuration, as the table has them, with their values."""
    for key, value in values.items():
        name = prefix + key
        if name not in KEYS and prefix == f"{ZERO}." and f"{prefix}stage3_{key}" in KEYS:
            name = f"{prefix}stage3_{key}"  # DeepSpeed takes these names as well
        if name in SECTIONS and isinstance(value, dict):
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def problem(name: str, value: Any) -> str | None:
    """Why the program does not take a key with this value; None if it does."""
    if name in SECTIONS:
        return None if value is None or value == "auto" else f"{name} is an object (given: {value!r})"
    if name not in KEYS:
        return _unknown(name, [*SECTIONS, *KEYS])
    key = KEYS[name]
    if key.fate is Fate.REFUSED and key.asks(value):
        return f"{name} is refused: {key.note}"
    if key.kind is not None and value is not None and value != "auto" and not _is(value, key.kind):
        wanted = {bool: "true or false", int: "a whole number", str: "a text", dict: "an object"}[key.kind]
        return f"{name} is {wanted} (given: {value!r})"
    return None


def _is(value: Any, kind: type) -> bool:
    if kind is int:  # JSON writes large numbers such as 5e8, too
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 <= value < 2**63 and value == int(value)
    return isinstance(value, kind)


def _unknown(name: str, valid: Collection[str]) -> str:
    section, _, last = name.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in valid if key.rpartition(".")[0] == section}
    close = [siblings[key] for key in difflib.get_close_matches(last, siblings, n=3)]
    elsewhere = [key for key in valid if key.rpartition(".")[2] == last]
    hint = f"; did you mean {' or '.join(found)}?" if (found := elsewhere or close) else ""
    return f"DeepSpeed has no key {name}{hint}"


def as_markdown() -> str:
    """The table, as docs/deepspeed.md has it: keys of one fate for one reason share a row."""
    rows: dict[str, list[str]] = {}
    for fate in Fate:
        joint = " " if fate in (Fate.READ, Fate.SET) else ": "
        for name, key in KEYS.items():
            if key.fate is fate:
                rows.setdefault(f"{fate.value}{joint}{key.note}" if key.note else fate.value, []).append(
                    f"`{name}`"
                )
    lines = [f"| {', '.join(names)} | {said} |" for said, names in rows.items()]
    return "\n".join(["| keys | what becomes of them |", "|---|---|", *lines])
