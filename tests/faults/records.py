"""Faults in what records a run: its exporter to MLflow, the server, its database; and a run that is recorded."""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from random import Random
from typing import Any

from gpc_dist.errors import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_STOPPED
from tests.faults.case import end, left, noted
from tests.faults.inject import Fault, Place
from tests.faults.run_kinds import EVERYWHERE, Kind, RunCase
from tests.faults.runs import Runs, is_same
from tests.mlflow_server import MlflowServer
from tests.processes import Started, start, start_call
from tests.proxy import Decision, standing_before

_FINISH_S = 4
"""`tracking.finish_timeout_s`: the exporter goes on alone after it."""
_LIMIT_S = 240
"""Longest wait for `sync`, which waits for the exporter."""
_MOST_REQUESTS = 12
"""That a server answers otherwise, and so the most `sync`s that it takes."""
_SERVED = ("answers 500", "is slow", "drops requests", "loses answers", "is killed")
"""What a server does for a while, `record-server <it>`."""


def _signal(name: str, *codes: int) -> Kind:
    number = signal.Signals[name]
    return Kind(
        EVERYWHERE,
        frozenset({128 + number, -number, *codes}),
        targets=("self", "launcher", "ranks"),
        arrangements=((1, 0), (2, 3)),
        injected=name,
    )


def _after_ms(draw: Random) -> int:
    return draw.randrange(6000)


def _requests(draw: Random) -> int:
    """The first request that is answered otherwise, and how many are."""
    return draw.randrange(20) * 100 + draw.randrange(1, _MOST_REQUESTS)


# a fault of what records must never show in the run's exit code
_UNSEEN: frozenset[int] = frozenset()
_ALONE = ((1, 0),)

KINDS: dict[str, Kind] = {
    "record-SIGKILL": _signal("SIGKILL"),
    "record-SIGTERM": _signal("SIGTERM", EXIT_STOPPED),
    "record-exporter-SIGKILL": Kind(
        ("export",), _UNSEEN, arrangements=_ALONE, detail=_after_ms, injected="exporter_kill"
    ),
    "record-exporter-SIGTERM": Kind(
        ("export",), _UNSEEN, arrangements=_ALONE, detail=_after_ms, injected="exporter_end"
    ),
    "record-exporter-pause": Kind(
        ("export",), _UNSEEN, arrangements=_ALONE, detail=_after_ms, injected="exporter_pause"
    ),
    "record-store-locked": Kind(("never",), _UNSEEN, arrangements=_ALONE, detail=_after_ms),
} | {
    f"record-server-{what.replace(' ', '-')}": Kind(
        ("never",), _UNSEEN, arrangements=_ALONE, detail=_requests
    )
    for what in _SERVED
}


class Records(Runs):
    """The family of faults in what records a run; see `Family`."""

    table = KINDS
    kinds = tuple(KINDS)

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._held = ExitStack()
        self._uris: dict[str, str] = {}
        """Of the proxies before the server, by case."""
        self._experiments: dict[str, str] = {}
        """By case: a case that is run again must not find what it recorded before."""
        self._store = folder / "store" / "mlflow.db"
        if not self._store.exists():
            self._store.parent.mkdir(exist_ok=True)
            start_call(first_use, self._store).wait()
        self._server: MlflowServer | None = None
        self._restarting = threading.Lock()

    def close(self) -> None:
        if self._server is not None:
            self._server.kill()

    @property
    def server(self) -> MlflowServer:
        with self._restarting:
            if self._server is None:
                folder = self.folder / "server"
                folder.mkdir(exist_ok=True)
                if not (folder / "mlflow.db").exists():
                    shutil.copy(self._store, folder / "mlflow.db")
                self._server = MlflowServer(folder)
            return self._server

    def _wait_for_server(self) -> None:
        """Another case may have killed it, and its start takes longer than all tries of `sync`."""
        with self._restarting:
            pass

    def run(self, case: RunCase) -> Any:
        self._experiments[case.name] = f"{case.name}-{secrets.token_hex(4)}"
        with self._proxy(case):
            return super().run(case)

    def settings(self, case: RunCase | None) -> list[str]:
        words = ["--tracking.enabled", "true", "--tracking.experiment", self._experiment(case)]
        words += ["--tracking.finish_timeout_s", str(_FINISH_S)]
        if case is not None and case.name in self._uris:
            words += ["--tracking.uri", self._uris[case.name]]
        return words

    def _experiment(self, case: RunCase | None) -> str:
        return "undisturbed" if case is None else self._experiments[case.name]

    def open(self, place: Place) -> None:
        super().open(place)
        shutil.copy(self._store, place.disk / "mlflow.db")

    def meanwhile(
        self, case: RunCase, place: Place, started: Started, faults: list[tuple[str, Fault]]
    ) -> list[str]:
        if any(name == "record-store-locked" for name, _ in faults):
            time.sleep(case.faults[0][1].detail / 1000)
            # somebody writes to the database, and takes a long time for it
            with closing(sqlite3.connect(place.disk / "mlflow.db", timeout=60)) as locked:
                locked.execute("BEGIN IMMEDIATE")
                place.happened(case.faults[0][1]).touch()
                time.sleep(7 + case.at[0] * 5)  # MLflow's client waits for 5 s
                locked.rollback()
        return []

    def finished(self, case: RunCase | None, place: Place) -> list[str]:
        """Complete the record, and compare it with the run's folder."""
        served = case is not None and case.name in self._uris
        for _ in range(_MOST_REQUESTS):
            if served:
                self._wait_for_server()
            synced = start("sync", place.run)
            code = end(synced, _LIMIT_S)
            if not (code == EXIT_ENVIRONMENT and "Run the command again" in synced.stderr):
                break
        if code != EXIT_DONE:
            return [f"sync: exit code {code}, {synced.stderr[-500:]}"]
        database = self.folder / "server" / "mlflow.db" if served else place.disk / "mlflow.db"
        return [*_compare(place.run, database, self._experiment(case)), *left(lambda: noted(place.exporters))]

    @contextmanager
    def _proxy(self, case: RunCase) -> Iterator[None]:
        what = case.kind.removeprefix("record-server-")
        if what == case.kind:
            yield
            return
        ((_, fault),) = case.faults
        first, count = divmod(fault.detail, 100)
        server, place = self.server, Place(self.folder / case.name)
        seen = Counter[str]()
        counting = threading.Lock()

        def decide(_: BaseHTTPRequestHandler) -> Decision:
            with counting:
                number = seen["requests"]
                seen["requests"] += 1
            if not first <= number < first + count:
                return "pass"
            place.happened(fault).touch()
            if what == "is-slow":
                time.sleep(1 + case.at[0] * 3)
            elif what == "is-killed" and number == first:
                with self._restarting:
                    server.kill()
                    server.start()
            decisions: dict[str, Decision] = {
                "answers-500": 500,
                "drops-requests": "drop",
                "loses-answers": "lose",
            }
            return decisions.get(what, "pass")

        with standing_before(server.uri, decide) as uri:
            self._uris[case.name] = uri
            yield


def first_use(store: Path) -> None:
    """Make MLflow's database."""
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{store}").search_experiments()


def _compare(run: Path, database: Path, experiment: str) -> list[str]:
    """What differs between a run's folder and its record: read from the database itself, without MLflow."""
    wanted = {
        (key, line["step"]): value
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        for key, value in line.items()
        if is_same(key)
    }
    with closing(sqlite3.connect(database, timeout=60)) as store:
        runs = store.execute(
            "SELECT run_uuid, status FROM runs JOIN experiments USING (experiment_id) WHERE experiments.name = ?",
            [experiment],
        ).fetchall()
        if [status for _, status in runs] != ["FINISHED"]:
            return [f"MLflow has the runs {runs}"]
        rows = store.execute(
            "SELECT key, step, value FROM metrics WHERE run_uuid = ? ORDER BY timestamp", [runs[0][0]]
        ).fetchall()
    found = [((key, step), value) for key, step, value in rows if is_same(key)]
    problems = []
    if dict(found) != wanted:
        problems.append(f"MLflow has other metrics: {sorted(dict(found).items() ^ wanted.items())[:5]}")
    if twice := [key for key, count in Counter(key for key, _ in found).items() if count > 1]:
        problems.append(f"MLflow has {twice[:5]} more than once")
    steps = [step for (key, step), _ in found if key == "train/loss"]
    if steps != sorted(steps):
        problems.append(f"MLflow has the steps in the order {steps}")
    return problems
