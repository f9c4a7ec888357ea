"""A exporter beside a search's driver: real processes, one of which is killed, and 64 trials that write at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpc_dist import files
from tests.processes import TIMEOUT_S, wait_until

from .conftest import Start, python_processes
from .searches import AddTrial, MakeSearch, children_of, parent_of, steps_of

pytestmark = pytest.mark.slow


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that runs a script with `search` (SearchFolder) and `exporter`."""
    yield from python_processes(
        "import os, signal, sys, threading, time\n"
        "from gpc_dist import files\n"
        "from gpc_dist.runs.folder import SearchFolder\n"
        "from gpc_dist.runs.metrics import MetricLog\n"
        "from gpc_dist.tracking.search_exporter import start_exporter\n"
        "search = SearchFolder(sys.argv[1])\n"
        "search.write_status('running')\n"
        "exporter = start_exporter(search.path, delay_s=0)\n",
        tmp_path,
    )


def test_killed_driver_and_resumed_search(
    make_search: MakeSearch, add_trial: AddTrial, driver: Start
) -> None:
    search = make_search()
    add_trial(search, 0, {1: 0.5})
    add_trial(search, 1, {1: 0.5, 2: 0.6}, "running", "running")
    first = driver(search, "print(exporter.wait_for_run_id(300), flush=True)\nsignal.pause()\n")
    assert first.stdout is not None
    run_id = first.stdout.readline().strip()
    tracking = search.trial("t1").tracking
    wait_until(lambda: files.read_json(tracking).get("state") == "running")
    first.kill()
    wait_until(lambda: files.read_json(search.tracking).get("state") == "killed")
    parent, children = parent_of(search), children_of(search)
    assert (parent.info.run_id, parent.info.status) == (run_id, "KILLED")
    assert "the search's process ended without a word" in parent.data.tags["gpc.reason"]
    assert {trial: run.info.status for trial, run in children.items()} == {"t0": "FINISHED", "t1": "KILLED"}

    second = driver(
        search,
        "trial = search.trial('t1')\n"
        "trial.write_status('running')\n"
        "with MetricLog(trial.metrics) as log:\n"
        "    log.truncate_after(1)\n"
        "    for step in (2, 3):\n"
        "        log.append(step, {'val/accuracy': 0.8})\n"
        "trial.write_status('finished')\n"
        "files.write_json(search.result, {'best_trial': 't1', 'metric': 'accuracy', 'best': 0.8})\n"
        "search.write_status('finished')\n"
        f"state = exporter.finish({TIMEOUT_S})\n"
        "print(state.run_id, state.complete)\n",
    )
    assert second.communicate(timeout=TIMEOUT_S)[0] == f"{run_id} True\n"
    resumed = children_of(search)
    assert {trial: run.info.run_id for trial, run in resumed.items()} == {
        trial: run.info.run_id for trial, run in children.items()
    }
    assert (parent_of(search).info.status, resumed["t1"].info.status) == ("FINISHED", "FINISHED")
    assert steps_of(search, resumed["t1"], "val/accuracy") == [1, 2, 3]


def test_sixty_four_trials_at_once(make_search: MakeSearch, add_trial: AddTrial, driver: Start) -> None:
    search = make_search(register_as=None)
    for number in range(64):
        add_trial(search, number, {}, "running", "running")
    process = driver(
        search,
        "met = threading.Event()\n"  # the exporter meets them while they write
        "def train(trial):\n"
        "    with MetricLog(trial.metrics) as log:\n"
        "        for step in range(20):\n"
        "            log.append(step, {'train/loss': step / 10, 'val/accuracy': step / 100})\n"
        "            if step == 9: met.wait()\n"
        "    trial.write_status('finished')\n"
        "exporter.wait_for_run_id(300)\n"
        "trials = search.begun_trials()\n"
        "threads = [threading.Thread(target=train, args=(t,)) for t in trials]\n"
        "for thread in threads: thread.start()\n"
        "while not any(files.read_json(t.tracking).get('steps') for t in trials): time.sleep(0.1)\n"
        "met.set()\n"
        "for thread in threads: thread.join()\n"
        "search.write_status('finished')\n"
        f"state = exporter.finish({TIMEOUT_S})\n"
        "print(state.complete)\n",
    )
    assert process.communicate(timeout=TIMEOUT_S)[0] == "True\n"
    assert "failed" not in search.tracking_log.read_text(), search.tracking_log.read_text()
    children = children_of(search)
    assert len(children) == 64
    for child in children.values():
        assert child.info.status == "FINISHED"
        assert child.data.metrics["final/best"] == 0.19
        assert steps_of(search, child, "train/loss") == list(range(20))
