"""What docs/reliability.md says of the campaign of faults is what its JSON holds."""

from __future__ import annotations

import json
import re

from tests.conftest import ROOT
from tests.faults.families import KINDS


def test_the_page_has_the_counts_of_the_campaign() -> None:
    rows = json.loads((ROOT / "benchmarks" / "faults.json").read_text())["kinds"]
    page = (ROOT / "docs" / "reliability.md").read_text()
    found = re.findall(r"^\| (\S+) +\| (\d+) +\| (\d+) +\| ([-\d ]*?) *\| (\d+) +\|$", page, re.MULTILINE)
    columns = ("kind", "cases", "injected", "exit codes", "undisturbed")
    assert found == [tuple(str(row[name]) for name in columns) for row in rows]
    assert [row["failed"] for row in rows] == [0] * len(rows)
    assert {row["kind"] for row in rows} - {"all"} == set(KINDS)
    assert f"**{rows[-1]['injected']:,}**, in {rows[-1]['cases']:,} cases" in page
