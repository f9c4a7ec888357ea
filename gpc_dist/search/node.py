"""One node of a search in a Slurm job: its part of the Ray cluster, and on the first node the search itself.

    srun --ntasks-per-node=1 gpc-dist tune SEARCH [--key VALUE ...]

All nodes start in one Slurm step and end together: the workers end when the head has ended.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gpc_dist import own_folders
from gpc_dist.distributed.launch import in_job_step
from gpc_dist.errors import EXIT_ENVIRONMENT, EXIT_STOPPED, MachineError
from gpc_dist.interpreter import python
from gpc_dist.runs.folder import SearchFolder
from gpc_dist.search.ray_token import TOKEN, check_token
from gpc_dist.search.spec import SearchSpec
from gpc_dist.training.stop import SIGNALS, StopRequest

NODES = "GPC_DIST_RAY_NODES"
"""Environment variable: number of nodes that the cluster at RAY_ADDRESS will have."""

_START_S = 120.0
_END_S = 20.0
_PERIOD_S = 1.0


def is_one() -> bool:
    """Whether this process is a task of the step that `slurm/tune.sbatch` starts on every node."""
    given = os.environ.keys()
    return in_job_step() and {"MASTER_ADDR", "MASTER_PORT"} <= given and "RAY_ADDRESS" not in given


def run_node(spec: SearchSpec, arguments: Sequence[str], stop: StopRequest) -> int:
    """Run this node's part; returns the search's exit code on the first node, 0 on the others.

    Args:
        spec: of the search; a search that is already in its folder is resumed, as a job resumes a run.
        arguments: the command line, from `tune` on.
        stop: requests that have come already.

    Raises:
        MachineError: Ray does not start, or would answer everybody.
    """
    check_token()
    address = f"{socket.gethostbyname(os.environ['MASTER_ADDR'])}:{os.environ['MASTER_PORT']}"
    if int(os.environ["SLURM_PROCID"]) > 0:
        return _worker(address)
    begun = SearchFolder(spec.folder).config.exists()
    resume = ["--resume"] if begun and "--resume" not in arguments else []
    return _head(address, [*arguments, *resume], stop)


def _head(address: str, arguments: Sequence[str], stop: StopRequest) -> int:
    host, _, port = address.partition(":")
    with _own_folder() as folder:
        own = [f"--node-ip-address={host}", f"--port={port}", f"--temp-dir={folder}/r"]
        ray = _start(["--head", "--include-dashboard=false", *own])
        try:
            if not _wait_for(address, ray):
                raise MachineError(f"Ray did not start at {address} within {_START_S:.0f} s")
            cluster = {"RAY_ADDRESS": address, NODES: os.environ["SLURM_JOB_NUM_NODES"]}
            if stop.signal:
                return EXIT_STOPPED
            search = subprocess.Popen(python("gpc_dist", *arguments), env=os.environ | cluster)
            asked = []

            def forward(number: int, _: object) -> None:
                asked.append(number)
                search.send_signal(signal.SIGTERM)

            for number in SIGNALS:
                signal.signal(number, forward)
            if stop.signal:
                forward(signal.SIGTERM, None)
            code = search.wait()
            if code < 0:  # it had not begun to listen, if it was asked
                return EXIT_STOPPED if asked else 128 - code
            return code
        finally:
            _stop(ray)


def _worker(address: str) -> int:
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the first node ends the search, and then this node ends
    if not _wait_for(address):
        return EXIT_ENVIRONMENT
    own = socket.gethostbyname(socket.gethostname())
    with _own_folder():
        ray = _start([f"--address={address}", f"--node-ip-address={own}"])
        try:
            while ray.poll() is None and answers(address):
                time.sleep(_PERIOD_S)
        finally:
            _stop(ray)
    return 0


@contextmanager
def _own_folder() -> Iterator[Path]:
    """Where this node's Ray processes have their folder, to which Ray lets everybody write, and here nobody gets.

    Ray wants one path on all nodes: it follows from what the job alone knows, so that nobody else is there first.
    """
    known = hashlib.sha256(os.environ[TOKEN].encode()).hexdigest()[:8]
    # the path of a Unix socket is limited to about 100 characters, and Ray's names are long
    folder = Path(f"/tmp/ray-{os.environ['SLURM_JOB_ID']}-{known}")
    first = not folder.exists()  # nodes that are one machine have one folder
    if not own_folders.make(folder):
        raise MachineError(
            f"{folder}, for Ray's files, is not a folder of yours that nobody else can enter: remove it"
        )
    try:
        yield folder
    finally:
        if first:
            shutil.rmtree(folder, ignore_errors=True)


def _start(options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start this node's Ray processes with the CPUs and GPUs that Slurm gave; workers use any free ports."""
    cpus = f"--num-cpus={os.environ['SLURM_CPUS_ON_NODE']}"
    ports = ["--min-worker-port=0", "--max-worker-port=0"]
    gpus = [f"--num-gpus={os.environ['SLURM_GPUS_ON_NODE']}"] if "SLURM_GPUS_ON_NODE" in os.environ else []
    ray = str(Path(sys.executable).with_name("ray"))
    return subprocess.Popen(
        # without a log monitor: nobody reads there what Ray's workers print (`ray_cluster`)
        [
            *(ray, "start", "--block", "--disable-usage-stats", "--include-log-monitor=false"),
            *(cpus, *gpus, *ports, *options),
        ],
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # keeps the step's signals from Ray, which would end before the search has saved
    )


def _wait_for(address: str, ray: subprocess.Popen[bytes] | None = None) -> bool:
    """Wait until the address answers; returns False after `_START_S`, or when `ray` has ended."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and (ray is None or ray.poll() is None):
        if answers(address):
            return True
        time.sleep(_PERIOD_S)
    return False


def answers(address: str) -> bool:
    """Whether something listens at HOST:PORT."""
    host, _, port = address.partition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return True
    except OSError:
        return False


def _stop(ray: subprocess.Popen[bytes]) -> None:
    """End this node's Ray processes of this job only: `ray stop` would end those of other jobs too."""
    ray.terminate()
    try:
        ray.wait(_END_S)
    except subprocess.TimeoutExpired:
        os.killpg(ray.pid, signal.SIGKILL)
