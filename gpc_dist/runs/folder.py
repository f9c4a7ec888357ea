"""Folders of runs, searches and trials: the paths of all files that they write."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from gpc_dist import files, locks
from gpc_dist.errors import MachineError, UserError
from gpc_dist.names import check_name, inside
from gpc_dist.parsing import parse_yaml
from gpc_dist.typed import read_as

_LOCK, _TRACKING_LOCK = ".lock", ".tracking.lock"
_OWN = ("status.json", "trial.json", "job/job.sh")
"""What this program writes first into a folder: any of these files says that the folder is its own."""

State = Literal["running", "finished", "failed", "killed", "stopped"]


@dataclass(frozen=True)
class Status:
    """The state of a run (`status.json`).

    `stopped` is an end on request with the training state saved; `killed` is an end without saving it.
    """

    state: State
    reason: str = ""
    host: str = ""
    pid: int = 0
    started_s: float = 0.0
    """Unix time at which the run (or its latest resume) began."""
    updated_s: float = 0.0
    """Unix time of this state; the end of the run if it has ended."""


class RunFolder:
    """Paths of one run, and its small files.

    Args:
        path: the folder; the first write creates it if it does not exist.
    """

    kind: ClassVar[str] = "run"
    others: ClassVar[tuple[str, ...]] = ("search.yaml", "study.yaml")
    """What folders of other kinds have."""
    elsewhere: ClassVar[str] = "another --run.name or --run.dir"
    """What to give for another folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self.config = self.path / "config.yaml"
        self.ds_config = self.path / "ds_config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.facts = self.path / "facts.json"
        self.result = self.path / "result.json"
        self.status = self.path / "status.json"
        self.tracking = self.path / "tracking.json"
        self.tracking_log = self.path / "tracking.log"
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.telemetry = self.path / "telemetry"
        self.logs = self.path / "logs"
        self.job = self.path / "job"
        self._place: tuple[int, int] | None = None
        """Device and inode of the folder, while it is held."""

    @property
    def _held(self) -> tuple[Path, ...]:
        """The files that whoever holds the folder writes."""
        return self.config, self.ds_config, self.metrics, self.facts, self.result, self.status

    def __str__(self) -> str:
        return str(self.path)

    def host_telemetry(self, host: str | None = None) -> Path:
        """The telemetry file of one host (this one when not given), a `MetricLog`."""
        return self.telemetry / f"{host or socket.gethostname()}.jsonl"

    def rank_log(self, rank: int) -> Path:
        """The log file of a rank above 0; rank 0 logs to the terminal or the job's log."""
        return self.logs / f"rank-{rank}.log"

    def read_config(self) -> dict[str, Any]:
        """The resolved configuration as plain values.

        Raises:
            UserError: the file is missing, so this is not a run folder; or it is not a mapping in YAML.
        """
        if not self.config.exists():
            raise UserError(f"{self.path} is not the folder of a {self.kind}: it has no {self.config.name}")
        tree = parse_yaml(files.read_text(self.config), str(self.config))
        if not isinstance(tree, dict | None):
            raise UserError(f"{self.config} is not the configuration of a {self.kind}: restore or remove it")
        return tree or {}

    def write_status(self, state: State, reason: str = "") -> None:
        """Write the state of the run, with host and id of the calling process.

        `running` is written before all other files. An end state is written last: a reader of it can
        rely on all other files being complete.
        """
        started_s = time.time() if state == "running" else self.read_status().started_s
        status = Status(state, reason, socket.gethostname(), os.getpid(), started_s, time.time())
        files.write_json(self.status, asdict(status))

    def read_status(self) -> Status:
        """The last status written; `running` since the epoch if there is none yet."""
        return read_as(Status, self.status) or Status("running")

    def mark_killed(self, reason: str) -> None:
        """Write the state `killed` for a trainer that wrote no end state, with the time of its last heartbeat."""
        ended_s = self.last_sign_of_life_s()
        status = replace(self.read_status(), state="killed", reason=reason, updated_s=ended_s)
        files.write_json(self.status, asdict(status))

    def sign_of_life(self) -> None:
        """Write a heartbeat: the exporter process, and so the trainer, is alive."""
        os.utime(self.tracking_log)

    def last_sign_of_life_s(self) -> float:
        """Unix time of the last write or heartbeat of the trainer or its exporter; 0 for an empty folder."""
        signs = (self.status, self.metrics, self.tracking_log)
        return max((path.stat().st_mtime for path in signs if path.exists()), default=0.0)

    def start_over(self) -> None:
        """Remove the records of an earlier run, so that a new MLflow run begins.

        For a run that does not resume; checkpoints and adapter are not touched.

        Raises:
            UserError: a process is still exporting the earlier run.
        """
        with self.hold_tracking():
            for path in (self.metrics, self.facts, self.result, self.status, self.tracking):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.telemetry, ignore_errors=True)

    @contextmanager
    def hold_tracking(self, timeout_s: float | None = 0.0) -> Iterator[None]:
        """Be the one writer of this run in MLflow, and of `tracking.json`, while the block runs.

        Args:
            timeout_s: seconds to wait for another writer; without end when None.

        Raises:
            UserError: another process still is.
        """
        try:
            with locks.hold(self.path / _TRACKING_LOCK, timeout_s):
                yield
        except locks.TakenError:
            raise UserError(
                f"{self.path} is being recorded by another process (see {self.tracking_log.name} "
                "there): wait until it ends"
            ) from None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the one process that works on this run while the block runs.

        Raises:
            MachineError: another process is, for now: the lost node of a batch job may end it only later.
            UserError: the folder is no run's, see `check_own`.
        """
        self.check_own()
        try:
            with locks.hold(self.path / _LOCK, timeout_s=0.0):
                files.remove_cut_off(self.path, [path.name for path in self._held])
                self._place = _place(self.path)
                yield
        except locks.TakenError:
            status = self.read_status()
            raise MachineError(
                f"{self.path} is in use by process {status.pid} on {status.host}: wait until it ends, or give "
                f"{self.elsewhere}"
            ) from None

    @property
    def present(self) -> bool:
        """Whether the folder that is held is still where it was."""
        return self._place == _place(self.path)

    def check_present(self) -> None:
        """Raise `MachineError` if the folder that is held is not where it was: a new one there would lack what was
        written before."""
        if not self.present:
            raise MachineError(
                f"{self.path} was removed or moved while the {self.kind} wrote there: move it back, and the same "
                "command goes on from what is saved in it"
            )

    def check_own(self) -> None:
        """Refuse a folder that is not this program's to write into.

        Raises:
            UserError: it is a file; or it holds files, and nothing that this program writes first into the folder
                of a run; or it is the folder of something else.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"{self.path} is a file: give {self.elsewhere}")
        if other := next((name for name in self.others if (self.path / name).exists()), None):
            raise UserError(
                f"{self.path} is not the folder of a {self.kind} (it has {other}): give {self.elsewhere}"
            )
        # a start that ended within its first write left a hidden file, and nothing else
        names = [path.name for path in self._held]
        found = sorted(
            name
            for name in set(os.listdir(self.path)) - {_LOCK, _TRACKING_LOCK}
            if not files.is_cut_off(name, names)
        )
        if found and not any((self.path / name).is_file() for name in _OWN):
            raise UserError(
                f"{self.path} holds {files.few(found)}, and is not the folder of a {self.kind}: give "
                f"{self.elsewhere}, of a folder that is new or empty"
            )


def _place(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


class TrialFolder(RunFolder):
    """A run that is part of a search; the search describes it in `trial.json`."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self.trial = self.path / "trial.json"

    @property
    def begun(self) -> bool:
        """Whether the files that the exporter needs first are there."""
        return all(path.exists() for path in (self.config, self.trial, self.status))


class SearchFolder(RunFolder):
    """Paths of a search: its own files, named as a run's except `search.yaml`, and the folders of its trials."""

    kind = "search"
    others = ("config.yaml", "study.yaml")
    elsewhere = "another --name"

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self.config = self.path / "search.yaml"
        self.trials = self.path / "trials"

    def trial(self, name: str) -> TrialFolder:
        """The folder of a trial.

        Raises:
            UserError: its name is none of a folder in `trials`, or it leads elsewhere.
        """
        name = check_name(name, f"{self.path}: the trial")
        return TrialFolder(inside(self.trials, name))

    def begun_trials(self) -> list[TrialFolder]:
        """The trials that can be exported (`TrialFolder.begun`), sorted by name.

        Raises:
            UserError: the folder of one leads elsewhere.
        """
        if not self.trials.is_dir():
            return []
        paths = [
            inside(self.trials, path.name) if path.is_symlink() else path
            for path in sorted(self.trials.iterdir())
        ]
        return [trial for path in paths if (trial := TrialFolder(path)).begun]

    def mark_killed(self, reason: str) -> None:
        """Write the state `killed` for a driver that wrote no end state, and for its running trials."""
        self.mark_running_trials(reason)
        super().mark_killed(reason)

    def mark_running_trials(self, reason: str) -> None:
        """Write the state `killed` for trials that were running when their search ended."""
        for trial in self.begun_trials():
            if trial.read_status().state == "running":
                trial.mark_killed(reason)

    def last_sign_of_life_s(self) -> float:
        """Unix time of the last write or heartbeat of the driver, its exporter or one of the trials."""
        signs = [trial.last_sign_of_life_s() for trial in self.begun_trials()]
        return max([super().last_sign_of_life_s(), *signs])
