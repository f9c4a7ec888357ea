"""What happens to a Slurm job in the campaign of faults: the kinds, and what each does to a job that was submitted."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults.case import Case, noted
from tests.faults.inject import Fault, Place
from tests.processes import wait_until
from tests.slurms import SlurmLab, log_of

LIMIT_S = 180
"""Longest wait for a job, and for what happens in it."""
MOMENTS = ("start", "step", "evaluation", "save", "end")


@dataclass(frozen=True)
class JobCase(Case):
    nodes: int
    ranks: int
    stage: int
    fault: Fault
    """In the rank that stands still while the job is disturbed, or in which it happens. Its visit is still open."""
    at: float
    """Which of the visits it is, from 0 for the first to 1."""
    tracked: bool
    """The run is recorded in MLflow."""
    cold: bool
    """The ranks are started from nothing: not as forks, which are not below Slurm in the tree of processes."""
    tasks: int
    """Of a job array, of which one is disturbed; 0 for a job of its own."""

    @property
    def task(self) -> int:
        return self.fault.detail % self.tasks


class Job:
    """A submitted job, and what can be done to it."""

    def __init__(self, lab: SlurmLab, case: JobCase, folder: Path, submit: Callable[[], str]):
        self.lab, self.case, self.folder = lab, case, folder
        self._submit = submit
        self.place = Place(folder / str(case.task) if case.tasks else folder)
        """Of the one that is disturbed."""
        self.submitted = submit()
        self.afterwards = ExitStack()
        """What mends the cluster when the job has ended."""

    @property
    def id(self) -> str:
        return f"{self.submitted}_{self.case.task}" if self.case.tasks else self.submitted

    def submit_again(self) -> None:
        self.submitted = self._submit()

    def said(self) -> str:
        return log_of(self.folder)

    def state(self) -> dict[str, str]:
        return self.lab.job(self.id)

    def wait(self, ready: Callable[[], object]) -> None:
        wait_until(ready, LIMIT_S, lambda: f"it is {self.state()['JobState']}: {self.said()[-500:]}")

    def wait_for_restart(self) -> None:
        self.wait(lambda: self.state()["Restarts"] == "1")

    def free(self) -> None:
        """Let the rank that stands still go on."""
        self.place.released.touch()

    def pause(self) -> None:
        time.sleep(self.case.fault.detail % 500 / 1000)

    def call(self, *words: object) -> None:
        self.lab.call(*words)

    @property
    def rank(self) -> psutil.Process:
        """The process of the rank in which the fault is."""
        return next(noted(self.place.processes, f"{self.case.fault.rank}-*"))

    @property
    def step(self) -> str:
        return f"{self.state()['JobId']}.0"

    @property
    def node(self) -> str:
        """A node of the job: the first one, which has the batch script, or the last one."""
        return f"node{1 + self.case.fault.detail % self.case.nodes:02}"

    def update_node(self, *words: str) -> None:
        """Change the node, which is in use again at the end."""
        self.afterwards.callback(self._resume_node)
        self.call("scontrol", "update", f"NodeName={self.node}", *words)

    def _resume_node(self) -> None:
        with suppress(AssertionError):  # it has come back by itself
            self.call("scontrol", "update", f"NodeName={self.node}", "State=RESUME")

    def end_daemon(self, name: str, number: int = signal.SIGKILL) -> None:
        """Of Slurm, with this signal; it is there again at the end."""
        self.afterwards.callback(self.lab.up)
        daemon = psutil.Process(self.lab.daemon(name))
        daemon.send_signal(number)
        daemon.wait(LIMIT_S)

    def processes(self, name: str = "") -> Iterator[psutil.Process]:
        """Those of the job that live, with this name; of any without one."""
        number = self.state()["JobId"]
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):  # it ends meanwhile, or is another user's
                if process.name().startswith(name) and self.lab.is_of(process, number):
                    yield process


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    disturb: Callable[[Job], None]
    """Called while a rank stands still, which goes on when this returns."""
    restarts: frozenset[int]
    """How often the job may be started again."""
    moments: tuple[str, ...] = MOMENTS
    says: str = ""
    """What the job's log says of it, where the job was started again."""
    state: str = "COMPLETED"
    """Of the job; it is submitted once more if that is another one."""
    options: tuple[str, ...] = ()
    """Of sbatch."""
    arrangements: tuple[tuple[int, int, int], ...] = ((1, 1, 0), (1, 2, 3), (2, 2, 0), (2, 2, 3))
    """Nodes, ranks and ZeRO stage."""
    injected: str = "hold"
    """What happens in the rank."""
    tasks: int = 0
    """Of a job array."""
    tracked: bool = True
    """Runs may be recorded in MLflow."""
    alone: bool = False
    """It disturbs the cluster, and other jobs with it."""


def _requeue(job: Job) -> None:
    job.call("scontrol", "requeue", job.id)
    job.pause()


def _preempt(job: Job) -> None:
    """A job of a partition that comes first wants all nodes."""
    words = ("--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    job.afterwards.callback(job.lab.wait, job.lab.submit(*words, cwd=job.folder))
    _stop(job)


def _stop(job: Job) -> None:
    """Slurm tells the script."""
    job.wait(lambda: "asked to stop" in job.said())
    job.pause()


def _drain(job: Job) -> None:
    job.update_node("State=DRAIN", "Reason=injected")


def _down(job: Job) -> None:
    job.update_node("State=DOWN", "Reason=injected")
    job.wait_for_restart()


def _crash(job: Job) -> None:
    """All processes of a node end; it is back at once, or when it was missed."""
    job.lab.down("--node", job.node)
    if job.case.seed % 2:
        job.afterwards.callback(job.lab.up)
        job.wait_for_restart()
    job.lab.up()


def _part(job: Job) -> None:
    """A node is out of Slurm's reach, which starts the job again on another one while its processes go on."""
    job.end_daemon(job.node)
    job.wait(lambda: "is in use by" in job.said() or "another rank is gone" in job.said())
    job.pause()


def _slurmd(job: Job) -> None:
    job.end_daemon(job.node)
    job.pause()
    if job.case.seed % 2:
        job.lab.up()


def _controller(job: Job) -> None:
    """It is away, perhaps until the run has come to its end."""
    # SIGKILL would let it forget what it has not written yet, and Slurm refuse the nodes
    job.end_daemon("slurmctld", signal.SIGTERM)
    job.free()
    _return_of_controller(job)


def _controller_and_rank(job: Job) -> None:
    """It is away while the script decides what becomes of the job."""
    job.end_daemon("slurmctld", signal.SIGTERM)
    job.rank.kill()
    _return_of_controller(job)


def _return_of_controller(job: Job) -> None:
    """Soon, or when Slurm's commands have given up."""
    time.sleep(job.case.fault.detail % 8 + 25 * (job.case.seed % 2))
    job.lab.up()


def _signal(job: Job) -> None:
    """By hand, to the ranks, the script, or both."""
    number, whom = sent(job.case)
    job.call("scancel", f"--signal={number}", *whom, job.id)
    job.pause()


def sent(case: JobCase) -> tuple[str, tuple[str, ...]]:
    chance = random.Random(case.name)
    return chance.choice(("USR2", "TERM", "INT")), chance.choice(((), ("--batch",), ("--full",)))


def _cancel(job: Job) -> None:
    job.call("scancel", job.id)
    job.pause()


def _kill_step(job: Job) -> None:
    job.call("scancel", "--signal=KILL", job.step)


def _kill_rank(job: Job) -> None:
    job.rank.kill()


def _kill_stepd(job: Job) -> None:
    """What Slurm has on a node for the ranks there."""
    words = f"slurmstepd: [{job.step}]"
    found = [process for process in job.processes("slurmstepd") if words in " ".join(process.cmdline())]
    found[job.case.fault.detail % len(found)].kill()


def _kill_srun(job: Job) -> None:
    next(job.processes("srun")).kill()


def _kill_shell(job: Job) -> None:
    next(job.processes("slurm_script")).kill()


def _pause(job: Job) -> None:
    rank = job.rank
    rank.suspend()
    job.free()
    time.sleep(job.case.fault.detail % 1500 / 1000)
    rank.resume()


def _task(job: Job) -> None:
    """One of an array."""
    (_requeue, _kill_rank, _stop_task)[job.case.seed % 3](job)


def _stop_task(job: Job) -> None:
    job.call("scancel", "--batch", "--signal=USR2", job.id)
    _stop(job)


def _nothing(_: Job) -> None:
    """It happens in the rank."""


_NEVER, _ONCE, _PERHAPS = frozenset({0}), frozenset({1}), frozenset({0, 1})
_WARNED = ("--time=2", "--signal=B:USR2@60")
_ALONE = ((1, 1, 0), (1, 2, 3))
_APART = ((2, 2, 0), (2, 2, 3))

KINDS: dict[str, Kind] = {
    "job-requeue": Kind(_requeue, _ONCE),
    # a run that comes to its end instead is complete
    "job-preempt": Kind(_preempt, _PERHAPS, says=": requeued", options=("--partition=spot",), alone=True),
    # of several ranks, the others would end after engine.timeout_s
    "job-limit": Kind(
        _stop, _PERHAPS, ("start", "step"), says=": requeued", options=_WARNED, arrangements=((1, 1, 0),)
    ),
    "job-drain": Kind(_drain, _NEVER, alone=True),
    "job-down": Kind(_down, _ONCE, alone=True),
    "job-crash": Kind(_crash, _ONCE, alone=True),
    "job-part": Kind(_part, frozenset({1, 2, 3}), arrangements=_ALONE, alone=True),
    "job-slurmd": Kind(_slurmd, _NEVER, alone=True),
    "job-controller": Kind(_controller, _NEVER, alone=True),
    "job-controller-rank": Kind(_controller_and_rank, _ONCE, says="failure 1: requeued", alone=True),
    "job-signal": Kind(_signal, _PERHAPS, says=": requeued"),
    "job-cancel": Kind(_cancel, _NEVER, state="CANCELLED"),
    "job-step": Kind(_kill_step, _ONCE, says="failure 1: requeued"),
    "job-rank": Kind(_kill_rank, _ONCE, says="failure 1: requeued"),
    "job-stepd": Kind(_kill_stepd, _PERHAPS, says="failure 1: requeued", arrangements=_APART, tracked=False),
    "job-srun": Kind(_kill_srun, _ONCE, says="failure 1: requeued"),
    "job-shell": Kind(_kill_shell, _NEVER, state="FAILED"),
    "job-pause": Kind(_pause, _NEVER),
    "job-quota": Kind(_nothing, _PERHAPS, says="failure 1: requeued", injected="quota"),
    "job-array": Kind(_task, _PERHAPS, arrangements=_ALONE, tasks=2),
}
"""By name."""
