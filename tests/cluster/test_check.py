"""The check of a cluster's nodes, with stand-ins for Slurm's programs: two ranks of it on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpc_dist.cluster import check
from gpc_dist.cluster.resources import Resources
from tests.processes import free_port
from tests.test_interpreter import MODULES

SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$FAKES/srun"
while [[ $1 == -* ]]; do shift; done
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & done
wait -n && wait -n
"""
SCONTROL = "#!/bin/bash\necho 127.0.0.1\n"


@pytest.mark.slow
def test_nodes_are_measured_beside_any_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, programs = tmp_path / "place", tmp_path / "programs"
    for folder in (place, programs):
        folder.mkdir()
    for name in MODULES:
        (place / f"{name}.py").write_text(f"raise ImportError('{name} of the user was imported')\n")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (place / "shared").mkdir()
    monkeypatch.chdir(place)
    job = str(free_port() - 20000)  # its port follows from its number
    for name, value in {
        "FAKES": str(tmp_path),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "node[01-02]",
        "SLURM_NTASKS": "2",
    }.items():
        monkeypatch.setenv(name, value)
    resources = Resources(nodes=2, ranks_per_node=1, gpus_per_node=None, time="5", partition=None)
    findings = {found.what: found for found in check._examine_nodes(resources, place / "shared")}
    assert "2 ranks on" in findings["rendezvous"].found
    assert "GB/s all-reduce (gloo)" in findings["bandwidth"].found
    assert findings["shared folder"].found == f"{place} is seen by all"
    assert not findings["versions"].remedy
    assert "GPC_DIST_SECRET" not in (tmp_path / "srun").read_text()
