"""A user's own DeepSpeed JSON, and the packaged regimes: what is taken of them, and what DeepSpeed is then given."""

from __future__ import annotations

import copy
import json
import logging
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from gpc_dist import config, deepspeed_keys
from gpc_dist.config import Config
from gpc_dist.deepspeed_file import packaged, read, regimes
from gpc_dist.deepspeed_keys import KEYS, OFFLOAD, SECTIONS, ZERO, Fate, leaves
from gpc_dist.distributed import deepspeed_config
from gpc_dist.distributed.deepspeed_config import resolve, warn_of_unused, with_groups, with_sizes
from gpc_dist.errors import UserError
from gpc_dist.private import CHECKED
from gpc_dist.schema import all_keys
from tests.conftest import ROOT

HF = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none"},
        "offload_param": {"device": "cpu", "pin_memory": False},
        "overlap_comm": False,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 7e8,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}
"""As the trainer of transformers takes it."""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(values: Any) -> Path:
        file = tmp_path / "mine.json"
        file.write_text(json.dumps(values))
        return file

    return write


def zero(**values: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3} | values}


def load(file: object, **engine: object) -> Config:
    keys = {f"engine.{key}": str(value) for key, value in engine.items()}
    return config.load("rte", {"data.path": "demo", "engine.ds_config": str(file)} | keys)


# -- the packaged regimes ------------------------------------------------------------------------------------


def test_the_promised_regimes_are_there_and_help_names_them() -> None:
    promised = {*(f"zero{stage}" for stage in range(4)), "zero3-offload-cpu", "zero3-offload-nvme"}
    assert {*promised, "zero3-hpz", "zero3-quantized"} == set(regimes())
    said = all_keys(Config)["engine.ds_config"].description or ""
    assert all(f" {name}" in said.replace("\n", " ") for name in regimes())


@pytest.mark.parametrize("name", regimes())
def test_every_regime_is_valid_for_deepspeed_itself(name: str) -> None:
    import deepspeed

    parsed = deepspeed.DeepSpeedConfig(packaged(name))
    assert parsed.zero_optimization_stage == int(name[4])
    assert parsed.gradient_clipping == 1.0


@pytest.mark.parametrize("name", regimes())
def test_every_regime_resolves_with_the_runs_values(name: str) -> None:
    """By its name, and by the keys that the name stands for."""
    stage, _, offload = name.removeprefix("zero").partition("-offload-")
    keys: dict[str, Any] = {"zero_stage": stage[0], "offload_param": offload or "none", "hpz": "hpz" in name}
    keys["quantize"] = "int8" if "quantized" in name else "none"
    nvme = {"nvme_path": "/local/nvme"} if offload == "nvme" else {}
    built = config.load(
        "rte", {f"engine.{key}": str(value).lower() for key, value in {**keys, **nvme}.items()}
    )
    named = load(name, **nvme)
    assert named.engine.model_copy(update={"ds_config": None}) == built.engine
    values = with_groups(resolve(built, 16, torch.bfloat16), ["one"] * 8 + ["two"] * 8)
    assert values["train_batch_size"] == 32
    assert values["gradient_clipping"] == built.train.clip_norm
    assert values["bf16"] == {"enabled": True}
    expected = packaged(name)["zero_optimization"]
    if nvme:
        expected["offload_param"]["nvme_path"] = "/local/nvme"
    assert values["zero_optimization"] == expected


# -- the table -----------------------------------------------------------------------------------------------


class Asked(dict[str, Any]):
    """Notes which keys it is asked for."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.noted: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.noted.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.noted.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.noted.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Asked:
        return self


def test_the_table_has_every_key_that_deepspeed_has() -> None:
    import deepspeed
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig

    def fields(model: Any) -> set[str]:
        return {field.alias or name for name, field in model.model_fields.items()}

    def named(section: str) -> set[str]:
        return {name.rpartition(".")[2] for name in KEYS if name.rpartition(".")[0] == section}

    values = Asked({"train_micro_batch_size_per_gpu": 1, "data_efficiency": {}})
    assert copy.copy(values) is values
    deepspeed.DeepSpeedConfig(values)
    assert values.noted - named("") == {ZERO}
    assert fields(DeepSpeedZeroOffloadParamConfig) == named(OFFLOAD)
    assert fields(DeepSpeedZeroConfig) - named(ZERO) == {"offload_param"}
    if metadata.version("deepspeed") == CHECKED["deepspeed"].newest:
        # what it has no more, or reads elsewhere, is refused by name; the table has nothing else
        gone = {name.rpartition(".")[2] for name, key in KEYS.items() if key.fate is Fate.REFUSED}
        assert named(ZERO) - fields(DeepSpeedZeroConfig) <= gone
        assert named("") - values.noted <= gone


def test_the_table_names_keys_that_the_program_has() -> None:
    ours = all_keys(Config)
    sections = {key.partition(".")[0] for key in ours}
    for key in KEYS.values():
        for word in key.note.split("`")[1::2]:
            name = word.partition(" ")[0]
            if name.partition(".")[0] in sections and not name.endswith((".json", ".jsonl")):
                assert name in ours


def test_the_table_of_the_documentation_is_the_one_in_use() -> None:
    assert deepspeed_keys.as_markdown() in (ROOT / "docs" / "deepspeed.md").read_text()


# -- a file of the user's ------------------------------------------------------------------------------------


def test_a_file_of_transformers_is_taken(write: Any, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(write(HF))
    assert (loaded.engine.zero_stage, loaded.engine.offload_param) == (3, "cpu")
    assert config.build(loaded.dump()) == loaded
    values = with_sizes(resolve(loaded, 4, torch.bfloat16), 16)
    found = values["zero_optimization"]
    assert found["stage3_prefetch_bucket_size"] == 230  # as transformers computes it
    assert (found["reduce_bucket_size"], found["stage3_param_persistence_threshold"]) == (256, 160)
    assert found["stage3_max_live_parameters"] == 700_000_000
    assert found["overlap_comm"] is False
    regime = packaged("zero3-offload-cpu")["zero_optimization"]
    assert found["offload_param"] == regime["offload_param"] | {"pin_memory": False}
    assert found["stage3_max_reuse_distance"] == regime["stage3_max_reuse_distance"]
    assert not {"optimizer", "scheduler"} & values.keys()
    assert "auto" not in json.dumps(values)
    with caplog.at_level(logging.WARNING):
        warn_of_unused(loaded, 2, values)
    (said,) = caplog.messages
    for name in (
        "optimizer",
        "scheduler",
        "steps_per_print",
        f"{ZERO}.stage3_gather_16bit_weights_on_model_save",
    ):
        assert f"{name}: {KEYS[name].note}" in said
    assert "offload_optimizer" not in said
    assert "gradient_clipping" not in said


def test_hidden_size_is_what_transformers_takes_for_auto(write: Any) -> None:
    from transformers import T5Config
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    file = write(HF)
    theirs = HfTrainerDeepSpeedConfig(str(file))
    model = type("Model", (), {"config": T5Config(d_model=48)})

    class Arguments:
        def __getattr__(self, name: str) -> Any:
            return 1 if name != "get_warmup_steps" else lambda _: 1

    theirs.mismatches = []
    theirs.trainer_config_finalize(Arguments(), model, 1)
    ours = with_sizes(resolve(load(file), 1, torch.float32), 48)["zero_optimization"]
    for name, value in HF["zero_optimization"].items():  # type: ignore[attr-defined]
        if value == "auto":
            assert ours[name] == theirs.config["zero_optimization"][name]


def test_what_replaces_a_value_is_said(write: Any, caplog: pytest.LogCaptureFixture) -> None:
    values = zero(zero_hpz_partition_size=8) | {"gradient_clipping": 0.5, "bf16": {"enabled": True}}
    loaded = load(write(values | {"train_batch_size": 32}), dtype="fp32")
    with caplog.at_level(logging.WARNING):
        warn_of_unused(loaded, 2, resolve(loaded, 2, torch.float32))
    (said,) = caplog.messages
    assert "gradient_clipping is 1.0, set from `train.clip_norm`" in said
    assert "bf16 is {'enabled': False}, set from `engine.dtype`" in said
    assert "zero_hpz_partition_size 8: one group would hold each shard twice" in said
    assert "train_batch_size" not in said


def test_where_deepspeed_has_no_part_all_of_it_is_named(write: Any, caplog: pytest.LogCaptureFixture) -> None:
    zero = {"overlap_comm": True, "reduce_bucket_size": 5e8, "zero_quantized_nontrainable_weights": True}
    loaded = load(write({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 1} | zero}))
    assert loaded.engine.zero_stage == 2
    assert not deepspeed_config.used(loaded, 2)
    with caplog.at_level(logging.WARNING):
        warn_of_unused(loaded, 2, resolve(loaded, 2, torch.float32))
    (said,) = caplog.messages
    assert said.count("DeepSpeed has no part at stage 2") == len(zero)
    assert all(f"{ZERO}.{name}: DeepSpeed has no part" in said for name in zero)


def test_a_packaged_regime_and_a_plain_file_say_nothing(write: Any, caplog: pytest.LogCaptureFixture) -> None:
    plain = load(write(zero(stage3_max_live_parameters=5)))
    for loaded in (load("zero3-offload-cpu"), plain, config.load("rte", {"engine.zero_stage": "3"})):
        warn_of_unused(loaded, 2, resolve(loaded, 2, torch.float32))
    assert not caplog.messages


ASKS: dict[str, Any] = {
    "fp16": {"enabled": True},
    "prescale_gradients": True,
    "gradient_predivide_factor": 2.0,
    "gradient_allreduce_op": "sum",
    "managed_gradient_accumulation": True,
    "activation_checkpointing": {"cpu_checkpointing": True},
    "sequence_parallel_size": 2,
    f"{ZERO}.mics_shard_size": 2,
    f"{ZERO}.stage3_module_granularity_threshold": 5,
}


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.fate is Fate.REFUSED])
def test_what_is_refused_is_named_with_the_reason(write: Any, name: str) -> None:
    section, _, last = name.rpartition(".")
    value = ASKS.get(name, {"enabled": True})
    if name == "managed_gradient_accumulation":
        value = 4
    with pytest.raises(UserError) as error:
        load(write(zero(**{last: value}) if section else zero() | {name: value}))
    assert f"{name} is refused: {KEYS[name].note}" in str(error.value)


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.fate is Fate.REFUSED])
def test_what_asks_for_nothing_is_not_refused(write: Any, name: str) -> None:
    section, _, last = name.rpartition(".")
    for value in (False, None, {"enabled": False}, {"cpu_checkpointing": False}, KEYS[name].default):
        assert (
            load(write(zero(**{last: value}) if section else zero() | {name: value})).engine.zero_stage == 3
        )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (zero(stage3_prefetch_bucket=1), r"no key .*_prefetch_bucket; did you mean .*stage3_prefetch_bucket_size"),
        ({"zero_optimisation": {"stage": 3}}, r"no key zero_optimisation; did you mean zero_optimization\?"),
        ({"stage": 3}, r"no key stage; did you mean zero_optimization.stage\?"),
        (zero(offload_param={"devise": "cpu"}), r"no key .*offload_param.devise; did you mean .*offload_param.device"),
        (zero(overlap_comm=1), "zero_optimization.overlap_comm is true or false \\(given: 1\\)"),
        (zero(stage3_prefetch_bucket_size="5e7"), "stage3_prefetch_bucket_size is a whole number \\(given: '5e7'\\)"),
        (zero(stage3_max_live_parameters=-1), "stage3_max_live_parameters is a whole number"),
        (zero(stage3_max_live_parameters=float("inf")), "stage3_max_live_parameters is a whole number"),
        (zero(offload_param="cpu"), "zero_optimization.offload_param is an object"),
        ({"zero_optimization": True}, "zero_optimization is an object"),
        (zero(stage=7), "engine.zero_stage: Input should be 0, 1, 2 or 3"),
        (zero(offload_param={"device": "disk"}), "engine.offload_param: Input should be 'none', 'cpu' or 'nvme'"),
        (zero(offload_param={"device": "nvme"}), "'nvme' needs engine.nvme_path"),
        ([], "is not a JSON object"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_valid_is_refused(write: Any, values: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(write(values))


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 0, "stage": 3}}')
    with pytest.raises(
        UserError, match=r"engine.ds_config .*mine.json: duplicate key 'stage': keep one of them"
    ):
        read(str(file))


def test_deepspeeds_own_names_of_stage_3_are_taken(write: Any) -> None:
    values = resolve(load(write(zero(max_live_parameters=9))), 1, torch.float32)
    assert values["zero_optimization"]["stage3_max_live_parameters"] == 9
    assert "max_live_parameters" not in values["zero_optimization"]


@pytest.mark.parametrize(
    ("values", "engine", "said"),
    [
        (zero(), {"zero_stage": 1}, "has ZeRO stage 3, but engine.zero_stage is 1"),
        (zero(offload_param={"device": "cpu"}), {"offload_param": "none"}, "offload_param.device cpu, but"),
        (zero(zero_quantized_nontrainable_weights=True), {"quantize": "none"}, "weights true, but .*quantize is none"),
        (zero(zero_hpz_partition_size=1), {"hpz": "true"}, "zero_hpz_partition_size 1, but engine.hpz is true"),
        (zero(offload_param={"device": "nvme", "nvme_path": "/a"}), {"nvme_path": "/b"}, "nvme_path /a, but .* is /b"),
    ],
)  # fmt: skip
def test_a_file_and_keys_that_contradict_it(
    write: Any, values: Any, engine: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=f"{said}.*leave out one of them, or make them agree"):
        load(write(values), **engine)


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_offload_beside_a_file_that_says_nothing_of_it(write: Any, device: str, tmp_path: Path) -> None:
    loaded = load(write(zero()), offload_param=device, nvme_path=tmp_path)
    found = resolve(loaded, 2, torch.float32)["zero_optimization"]["offload_param"]
    assert found["device"] == device
    assert found.get("nvme_path", str(tmp_path)) == str(tmp_path)
    # and a search's trials, or a job, build the same again
    assert config.build(loaded.dump()).engine == loaded.engine


def test_a_plan_chooses_for_itself(write: Any) -> None:
    with pytest.raises(UserError, match="chooses for itself what engine.ds_config would fix"):
        load(write(zero()), plan="auto")


# -- hpZ -----------------------------------------------------------------------------------------------------


def hpz(ranks: int, world_size: int, write: Any) -> int:
    loaded = load(write(zero(zero_hpz_partition_size=ranks)))
    values = resolve(loaded, world_size, torch.float32)
    found: int = with_groups(values, ["any"] * world_size)["zero_optimization"]["zero_hpz_partition_size"]
    return found


def test_groups_of_a_file(write: Any) -> None:
    assert hpz(2, 4, write) == 2
    assert hpz(4, 4, write) == 1
    assert hpz(8, 1, write) == 1
    with pytest.raises(
        UserError, match="partition_size 4 .* does not divide 6 ranks: take 2 or 3 or another number"
    ):
        hpz(4, 6, write)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [("aabb", 2), ("aaaabbbbcccc", 4), ("aaaa", 1), ("abcd", 1), ("aab", None), ("abab", None)],
)
def test_groups_are_the_ranks_of_a_machine(
    hosts: str, expected: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    values = resolve(
        config.load("rte", {"engine.zero_stage": "3", "engine.hpz": "true"}), len(hosts), torch.float32
    )
    if expected is None:
        with pytest.raises(UserError, match="engine.hpz needs equally many ranks on each machine"):
            with_groups(values, list(hosts))
        return
    assert with_groups(values, list(hosts))["zero_optimization"]["zero_hpz_partition_size"] == expected
    assert bool(caplog.messages) == (expected == 1)


def test_every_section_of_the_table_is_read() -> None:
    values = {"zero_optimization": {"offload_param": {"device": "cpu"}, "stage": 3}}
    assert dict(leaves(values)) == {f"{OFFLOAD}.device": "cpu", f"{ZERO}.stage": 3}
    assert SECTIONS == (ZERO, OFFLOAD)
