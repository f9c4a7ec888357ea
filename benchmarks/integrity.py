"""What it takes to look for flipped bits (`gpc_dist/training/integrity.py`), on 2 CPU ranks.

    python benchmarks/integrity.py

The demo's run (MiniLM, 22.6 M frozen parameters, an evaluation and a checkpoint every 30 steps) at stages 0 and 3, with
a clock around every check. Printed and kept in `integrity.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine
from tabulate import tabulate

RANKS = 2


def rank(out: Path, words: list[str]) -> int:
    """On one rank: run `gpc-dist`, and note how many seconds each check takes."""
    from gpc_dist import cli
    from gpc_dist.training.integrity import Integrity

    check, seconds = Integrity.check, list[float]()

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        check(*arguments)
        seconds.append(time.perf_counter() - start)

    Integrity.check = timed  # type: ignore[method-assign]
    code = cli.main(words)
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(seconds))
    return code


def measure(stage: int, steps: int, scratch: Path) -> dict[str, Any]:
    from gpc_dist.distributed.launch import start_ranks

    out, run = scratch / "seconds.json", scratch / f"run-{stage}"
    words = ["train", "demo", "--run.dir", run, "--engine.zero_stage", stage, "--engine.device", "cpu"]
    words += ["--tracking.enabled", "false", "--train.steps", steps]
    if code := start_ranks([sys.executable, __file__, "--rank", str(out), *map(str, words)], RANKS):
        raise SystemExit(code)
    first, *later = json.loads(out.read_text())
    result = json.loads((run / "result.json").read_text())
    training_s = steps * result["step_ms"] / 1000
    return {
        "stage": stage,
        "step_ms": result["step_ms"],
        "first_check_ms": 1000 * first,
        # a second one at the same step finds nothing to do
        "check_ms": 1000 * statistics.median(seconds for seconds in later if seconds > 1e-4),
        "share_pct": 100 * sum(later) / training_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--rank", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        out, *words = options.rank
        sys.exit(rank(Path(out), words))
    report: dict[str, Any] = {"machine": machine(), "steps": options.steps}
    with tempfile.TemporaryDirectory() as folder:
        report["stages"] = [measure(stage, options.steps, Path(folder)) for stage in (0, 3)]
    print(tabulate(report["stages"], headers="keys", floatfmt=".2f"))
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
