"""A campaign of faults: each is injected into a real run, which must end as documented and go on undisturbed.

Every case is drawn from its kind and its seed: what is run, and when, where and to whom the fault happens.
`tests/faults/families.py` lists the families of kinds; each has its faults, and what must hold after them, in a file.

    python benchmarks/faults.py --cases 1000 --folder /tmp/faults
    python benchmarks/faults.py --only SIGKILL --seed 17

The same command goes on where it was stopped: what is done stands in `outcomes.jsonl` in the folder, of which the table
at the end is made, and the folders of cases in which something did not hold stay there. `--again` runs those again.
`--json` keeps the counts with the machine's description.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

from common import machine  # noqa: E402
from tabulate import tabulate  # noqa: E402

from tests.faults.families import FAMILIES, KINDS, family_of, made  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=200, help="over all kinds")
    parser.add_argument("--only", metavar="KIND", choices=KINDS, nargs="+", default=list(KINDS), help="kinds")
    parser.add_argument("--seed", type=int, help="run the case of this seed alone of each kind")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument(
        "--again", action="store_true", help="run cases again in which something did not hold"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    seeds = itertools.count(options.first_seed) if options.seed is None else [options.seed]
    drawn = ((kind, seed) for seed in seeds for kind in options.only)
    cases = list(itertools.islice(drawn, options.cases))
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "outcomes.jsonl"
    run_all(folder, log, cases, options.at_once, options.again)
    outcomes = list(done_in(log).values())
    table = summary(outcomes)
    print(tabulate(table, headers="keys"))
    for outcome in outcomes:
        if outcome["problems"]:
            print(f"{outcome['kind']} {outcome['seed']}: {'; '.join(outcome['problems'])}")
    if options.json:
        found = {"machine": machine(), "kinds": table}
        found["failed"] = [outcome for outcome in outcomes if outcome["problems"]]
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(any(outcome["problems"] for outcome in outcomes))


def done_in(log: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The last outcome of each case, by its kind and seed."""
    lines = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
    return {(line["kind"], line["seed"]): line for line in lines}


def run_all(folder: Path, log: Path, cases: list[tuple[str, int]], at_once: int, again: bool) -> None:
    """Run the kinds and seeds that are not done yet, and log their outcomes as they end."""
    done = {case for case, outcome in done_in(log).items() if not (again and outcome["problems"])}
    for kind_of in FAMILIES:
        mine = [case for case in cases if case not in done and family_of(case[0]) is kind_of]
        if not mine:
            continue
        family = made(kind_of, folder)
        drawn = [family.draw(*case) for case in mine]
        try:
            family.prepare(drawn)
            with ThreadPoolExecutor(min(at_once, family.at_once)) as pool, log.open("a") as file:
                futures = [pool.submit(family.run, case) for case in drawn]
                try:
                    for number, future in enumerate(as_completed(futures), start=1):
                        outcome = asdict(future.result())
                        file.write(json.dumps(outcome) + "\n")
                        file.flush()
                        print(f"{number} of {len(drawn)}: {described(outcome)}", file=sys.stderr)
                except BaseException:  # an error of the campaign, or it was stopped
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            family.close()


def described(outcome: dict[str, Any]) -> str:
    ended = "; ".join(outcome["problems"]) or f"exit code {outcome['code']}"
    return f"{outcome['kind']} {outcome['seed']} ({outcome['what']}; {outcome['seconds']} s): {ended}"


def summary(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kind, and one for all."""
    kinds = [kind for kind in KINDS if any(outcome["kind"] == kind for outcome in outcomes)]
    rows = [(kind, [outcome for outcome in outcomes if outcome["kind"] == kind]) for kind in kinds]
    return [_row(kind, found) for kind, found in [*rows, ("all", outcomes)] if found]


def _row(kind: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    happened = [outcome for outcome in found if outcome["injected"]]
    codes = sorted({outcome["code"] for outcome in happened if outcome["code"] is not None})
    return {
        "kind": kind,
        "cases": len(found),
        "injected": sum(outcome["injected"] for outcome in found),
        "exit codes": " ".join(map(str, codes)),
        "undisturbed": sum(outcome["same"] for outcome in found),
        "failed": sum(bool(outcome["problems"]) for outcome in found),
        "median_s": median(outcome["seconds"] for outcome in found),
    }


if __name__ == "__main__":
    main()
