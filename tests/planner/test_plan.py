"""`gpc-dist plan` on recipes, and runs that take its recommendation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from gpc_dist import config as configuration
from gpc_dist.cli import main
from gpc_dist.config import PLANNED, EncoderConfig, build
from gpc_dist.errors import UserError
from gpc_dist.planner import recipe as plan
from gpc_dist.planner import workload
from gpc_dist.planner.devices import DEVICES, find_device
from gpc_dist.planner.dry_run import ModelSpec, Passes, measure_passes
from gpc_dist.planner.planner import Estimate, recommend
from gpc_dist.planner.timing import Cluster
from tests.conftest import losses
from tests.processes import start_launcher

SHORT = {"data.max_length": "24"}
"""For tests that share a dry run."""


@pytest.fixture(scope="module", autouse=True)
def _each_dry_run_once() -> Iterator[None]:
    """What depends on nothing but its arguments, and takes seconds."""
    made: dict[tuple[object, ...], Passes] = {}

    def once(model: ModelSpec, tokens: int) -> Passes:
        key = (
            model.encoder.to_json_string(use_diff=False),
            model.dtype,
            model.adapter,
            model.outputs,
            tokens,
        )
        if key not in made:
            made[key] = measure_passes(model, tokens)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "measure_passes", once)
        yield


@pytest.mark.slow
def test_a_plan_is_printed_and_written(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    code = main(
        ["plan", str(tiny_recipe), "--nodes", "2", "--gpus-per-node", "4", "--gpu", "a100-40"]
        + ["--json", str(file), *(word for key, value in SHORT.items() for word in (f"--{key}", value))]
    )
    said = capsys.readouterr().out
    assert code == 0
    assert "replicated, int8, recompute" in said
    assert (
        "Recommended: replicated (fits whole, so nothing is gathered), on 8 x a100-40 with 40.0 GiB" in said
    )
    assert "a model, not a measurement" in said
    written = json.loads(file.read_text())
    assert written["recommended"] == "replicated"
    assert written["workload"]["tokens"] == 24
    assert [line["nodes"] for line in written["scaling"]] == [1, 2, 4, 8, 16, 32, 64]
    assert len(written["regimes"]) == 22
    for line in written["regimes"]:
        assert line["total_gib"] * 2**30 == pytest.approx(sum(line["memory"].values()))


@pytest.mark.slow
def test_clusters_are_compared(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        ["plan", str(tiny_recipe), "--clusters", *(word for k, v in SHORT.items() for word in (f"--{k}", v))]
    )
    said = capsys.readouterr().out
    assert code == 0
    lines = [line for line in said.splitlines() if re.match(r"\d x \d ", line)]
    assert lines[3].startswith("2 x 8 a4000 ")
    assert len(lines) == 16
    assert all("replicated" in line and "fits whole, so nothing is gathered" in line for line in lines)


def test_the_help_names_every_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join([*DEVICES][:-1])} or cpu [h100]" in said


@pytest.mark.slow
def test_a_known_shape_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    """The packaged t5-xl recipe, in a shape that is dry-run fast."""
    code = main(["plan", "t5-xl", "--encoder.path", "t5-v1_1-small", "--gpu-memory-gib", "0.05"])
    said = capsys.readouterr().out
    assert code == 0
    assert "No regime fits on 8 x h100 with 0.1 GiB, 10% kept free: use more or larger devices" in said
    assert "a model, not a measurement" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "gtx"], "not a device the planner knows: give one of h100"),
        (["--encoder.path", "nobody/no-such-model"], "a known shape: t5-v1_1-small"),
        (["--gpu-memory-gib", "-1"], "is no amount of memory"),
        (["--clusters", "--nodes", "2"], "--clusters names its own clusters"),
    ],
)
def test_what_cannot_be_planned(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", str(tiny_recipe), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "width", "layers"),
    [("small", 512, 8), ("base", 768, 12), ("large", 1024, 24), ("xl", 2048, 24), ("xxl", 4096, 24)],
)
def test_every_lm_adapted_t5_is_a_known_shape(size: str, width: int, layers: int) -> None:
    found = plan.encoder_config(EncoderConfig(path=f"google/t5-{size}-lm-adapt"))
    assert (found.hidden_size, found.num_hidden_layers) == (width, layers)


@pytest.mark.slow
def test_train_takes_the_recommendation(tiny_recipe: Path, tmp_path: Path) -> None:
    done = start_launcher(
        "train", tiny_recipe, "--run.dir", tmp_path, "--engine.ranks", 2, "--engine.plan", "auto"
    )
    assert done.wait() == 0, done.stderr
    assert done.stderr.count("engine.plan: zero_stage 0, offload_param none") == 1
    assert len(losses(tmp_path)) == 12
    engine = yaml.safe_load((tmp_path / "config.yaml").read_text())["engine"]
    assert engine["plan"] == "none"
    assert (engine["zero_stage"], engine["activation_checkpointing"]) == (0, False)
    assert engine["micro_batch_tokens"] >= 36
    # what a run has written can be run
    configuration.load(str(tmp_path / "config.yaml"))


@pytest.mark.slow
def test_little_memory_changes_the_plan(tiny_recipe: Path) -> None:
    """2 bytes of each of 4.8 B parameters do not fit whole into a rank's share of 32 GiB; sharded over two hosts
    they do."""
    overrides = {"encoder.path": "t5-v1_1-xxl", "engine.plan": "auto", "engine.dtype": "bf16"}
    config = configuration.load(str(tiny_recipe), overrides)
    values = plan.plan_for(config, [(host, find_device("cpu", 32)) for host in "aabb"], outputs=2)
    assert values["zero_stage"] == 3
    assert set(values) == set(PLANNED)
    with pytest.raises(UserError, match="No regime fits on 4 x cpu with 2.0 GiB"):
        plan.plan_for(config, [(host, find_device("cpu", 8)) for host in "aabb"], outputs=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "device", "offloads", "kinds"),
    [
        ({}, "h100", {"none", "cpu"}, {"none"}),
        ({"engine.quantize": "int8"}, "h100", {"none", "cpu"}, {"int8"}),
        ({}, "cpu", {"none"}, {"none"}),  # the host's memory is what such a rank has already
    ],
)
def test_only_regimes_that_can_run_are_recommended(
    tiny_recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: dict[str, str],
    device: str,
    offloads: set[str],
    kinds: set[str],
) -> None:
    config = configuration.load(str(tiny_recipe), overrides | SHORT)
    cluster = Cluster(find_device(device), 1, 2)
    planner = plan.make_planner(config, cluster.device, outputs=2)
    compared: list[Estimate] = []
    monkeypatch.setattr(plan, "recommend", lambda each: compared.extend(each) or recommend(each))
    chosen = plan.choose(planner, cluster, config.engine)
    assert chosen is not None
    assert chosen.estimate in compared
    assert {estimate.regime.offload for estimate in compared} == offloads
    assert {estimate.regime.quantize for estimate in compared} == kinds
    local = config.engine.model_copy(update={"nvme_path": Path("/local")})
    compared.clear()
    plan.choose(planner, cluster, local)
    assert ("nvme" in {estimate.regime.offload for estimate in compared}) == ("int8" not in kinds)


@pytest.mark.parametrize("key", ["zero_stage", "micro_batch_tokens", "activation_checkpointing"])
def test_a_plan_and_what_it_chooses_exclude_each_other(key: str) -> None:
    with pytest.raises(
        UserError, match=rf"engine\.plan 'auto' chooses for itself what engine\.{key} would fix"
    ):
        build({"engine": {"plan": "auto", key: 1}})
    with pytest.raises(UserError, match=f"engine.{key}"):
        build({}, {"engine.plan": "auto", f"engine.{key}": "1"})


def test_a_plan_asked_for_on_the_command_line_wins_over_a_recipe() -> None:
    config = configuration.load("t5-xl", {"engine.plan": "auto"})
    assert config.engine.plan == "auto"
    assert config.engine.zero_stage == 0
