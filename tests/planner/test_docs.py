"""The tables of docs/planner.md are what the planner says."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from gpc_dist import config, schema
from gpc_dist.config import Config, recipe_names
from gpc_dist.planner.devices import GIB, find_device
from gpc_dist.planner.planner import Planner
from gpc_dist.planner.recipe import choose, make_planner
from gpc_dist.planner.regime import REGIMES, Regime
from gpc_dist.planner.report import CLUSTERS
from gpc_dist.planner.timing import Cluster

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "planner.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, a line for each row below its first one."""
    lines = DOCS.partition(f"## {heading}\n")[2].split("\n\n")
    rows = next(part for part in lines if part.startswith("|")).splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in [rows[0], *rows[2:]]]


CHOICES = table("What to take")
COMPARED = table("Regimes compared")


@cache
def plan(words: str) -> tuple[Config, Planner]:
    """The planner for a recipe and settings, as they stand behind `gpc-dist plan`."""
    recipe, *rest = shlex.split(words.strip("`"))
    built = config.load(recipe, schema.read_overrides(rest))
    return built, make_planner(built, CLUSTERS[0].device, outputs=2)


def taken(words: str, gpu: str) -> str:
    """What to take on nodes of these GPUs, the sizes of clusters with the same regime together."""
    built, planner = plan(words)
    found = []
    for cluster in CLUSTERS:
        if cluster.device.name == gpu:
            choice = choose(planner, cluster, built.engine)
            assert choice is not None
            size = str(cluster.per_node) if cluster.nodes == 1 else f"{cluster.nodes} x {cluster.per_node}"
            found.append((choice.estimate.regime.name, size))
    groups = [(name, [size for _, size in group]) for name, group in groupby(found, key=lambda each: each[0])]
    if len(groups) == 1:
        return groups[0][0]
    return "; ".join(f"{', '.join(sizes)}: {name}" for name, sizes in groups)


@pytest.mark.slow
@pytest.mark.parametrize("row", CHOICES[1:], ids=lambda row: row[0])
def test_what_to_take(row: list[str]) -> None:
    gpus = [re.split(r"[ ,]", name)[0] for name in CHOICES[0][2:]]
    assert row[2:] == [taken(row[0], gpu) for gpu in gpus]


def test_every_recipe_with_an_encoder_of_its_own_is_there() -> None:
    encoders = {name: config.load(name).encoder.path for name in recipe_names()}
    assert {name for name, path in encoders.items() if path != "minilm"} <= {
        row[0].strip("`") for row in CHOICES
    }
    assert encoders["rte"] == "minilm"


@pytest.mark.slow
@pytest.mark.parametrize("column", range(1, len(COMPARED[0])))
def test_regimes_compared(column: int) -> None:
    words, place = re.fullmatch(r"(`.*`) on (.*)", COMPARED[0][column]).groups()  # type: ignore[union-attr]
    size, gpu = place.split(" x ")
    built, planner = plan(words)
    cluster = Cluster(find_device(gpu), 1, int(size))
    chosen = choose(planner, cluster, built.engine)
    assert chosen is not None
    regimes = {regime.name: regime for regime in REGIMES}
    expected = []
    for name, *_ in COMPARED[1:]:
        e = planner.estimate(regimes[name], cluster)
        said = f"{e.memory.total / GIB:.1f} GiB, {1000 * e.step_s:,.0f} ms" if e.fits else "does not fit"
        expected.append(f"**{said}**" if e.regime == chosen.estimate.regime else said)
    assert [row[column] for row in COMPARED[1:]] == expected


@pytest.mark.slow
def test_how_far_off_it_is_on_a_gpu() -> None:
    measured = json.loads((ROOT / "benchmarks" / "gpu_t5.json").read_text())
    found: dict[str, Any] = measured["results"][0]["sides"]["ours-gpc"][0]
    _, planner = plan("t5-xl --adapter.prompt_tokens 20 --adapter.cell recurrent --train.optimizer adamw")
    e = planner.estimate(Regime(), Cluster(find_device("h100"), 1, 1))
    assert (found["lengths"], found["max_length"], found["examples_per_step"]) == ("fixed", 512, e.rows)
    assert found["trainable_parameters"] == planner.workload.adapter
    mib, predicted_mib = found["peak_memory_mib"][0], e.memory.total / 2**20
    step_ms, predicted_ms = found["step_ms"], 1000 * e.step_s
    assert table("How far off it is")[1:] == [
        [
            "peak memory, MiB",
            f"{mib:,.0f}",
            f"{predicted_mib:,.0f}",
            f"{100 * (predicted_mib / mib - 1):+.0f} %",
        ],
        ["step, ms", f"{step_ms:.0f}", f"{predicted_ms:.0f}", f"{100 * (predicted_ms / step_ms - 1):+.0f} %"],
    ]
