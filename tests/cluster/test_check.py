"""The check of a cluster's nodes, with a stand-in for `srun`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpc_dist.cluster import check
from gpc_dist.cluster.resources import Resources

SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$FAKES/words"
printf '%s' "$GPC_DIST_SECRET" > "$FAKES/secret"
echo 'srun: error: Unable to allocate resources' >&2
exit 1
"""


def test_the_secret_of_the_ranks_is_in_no_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("FAKES", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("GPC_DIST_SECRET", raising=False)
    resources = Resources(nodes=2, ranks_per_node=1, gpus_per_node=None, time="5", partition=None)
    (finding,) = check._examine_nodes(resources, tmp_path)
    assert (finding.what, finding.found) == ("check job", "srun: error: Unable to allocate resources")
    assert "Slurm refuses" in finding.remedy
    words, secret = (tmp_path / "words").read_text(), (tmp_path / "secret").read_text()
    assert len(secret) == 64
    assert secret not in words
    assert "GPC_DIST_SECRET" not in words
