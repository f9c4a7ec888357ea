"""Real trainers with real exporters: whatever happens to one of them, the run is recorded once."""

from __future__ import annotations

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from gpc_dist import files
from gpc_dist.errors import MachineError, UserError
from gpc_dist.runs.folder import RunFolder
from gpc_dist.tracking.state import ExportState
from gpc_dist.tracking.sync import mark_stale, sync_run
from tests.conftest import gpc
from tests.processes import TIMEOUT_S, free_port, wait_until

from .conftest import MakeRun, Start

pytestmark = pytest.mark.slow


def with_password(run: RunFolder) -> None:
    """Give the store of a run a password, as recipes once could."""
    run.config.write_text(run.config.read_text().replace("uri: http://", "uri: http://me:hunter2@"))
    assert "hunter2" in run.config.read_text()


def value_of(run: RunFolder, key: str) -> object:
    return files.read_json(run.tracking).get(key)


def recorded_steps(client: MlflowClient, run: RunFolder) -> list[int]:
    points = client.get_metric_history(str(value_of(run, "run_id")), "train/loss")
    return sorted(int(point.step) for point in points)


def test_run_is_recorded_while_it_goes_on_and_after_a_resume(
    make_run: MakeRun, trainer: Start, tmp_path: Path
) -> None:
    run = make_run()
    client = MlflowClient(f"sqlite:///{run.path.parent}/mlflow.db")
    first = trainer(
        run,
        "log.append(1, {'train/loss': 1.0})\n"
        "log.append(2, {'train/loss': 0.9})\n"
        "print(exporter.wait_for_run_id(300), flush=True)\n"
        "signal.signal(signal.SIGUSR2, lambda *_: None)\n"
        "signal.pause()\n"
        "run.write_status('stopped', 'SIGUSR2')\n"
        f"state = exporter.finish({TIMEOUT_S})\n"
        "print(state.run_id, state.complete)\n",
    )
    assert first.stdout is not None
    run_id = first.stdout.readline().strip()
    wait_until(lambda: value_of(run, "steps") == {"train/loss": 2})
    assert client.get_run(run_id).info.status == "RUNNING"
    (exporter,) = psutil.Process(first.pid).children()
    assert exporter.nice() == min(os.nice(0) + 10, 19)
    assert exporter.environ()["CUDA_VISIBLE_DEVICES"] == ""
    assert not any("libtorch" in region.path for region in exporter.memory_maps())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        exporter.send_signal(number)  # as a batch system does, which knows nothing of roles
    first.send_signal(signal.SIGUSR2)
    assert first.stdout.read() == f"{run_id} True\n"
    assert first.wait(TIMEOUT_S) == 0
    assert client.get_run(run_id).info.status == "KILLED"
    assert client.get_run(run_id).data.tags["gpc.state"] == "stopped"

    second = trainer(
        run,
        "log.truncate_after(1)\n"
        "for step in (2, 3):\n"
        "    log.append(step, {'train/loss': 0.8})\n"
        "files.write_json(run.result, {'steps': 3})\n"
        "run.write_status('finished')\n"
        f"print(exporter.finish({TIMEOUT_S}).run_id)\n",
    )
    assert second.communicate(timeout=TIMEOUT_S)[0] == f"{run_id}\n"
    assert client.get_run(run_id).info.status == "FINISHED"
    assert recorded_steps(client, run) == [1, 2, 3]
    assert os.listdir(tmp_path) == []  # no mlruns, no mlflow.db: nothing beside the run folders


def test_killed_trainer_is_recorded_as_killed(make_run: MakeRun, trainer: Start) -> None:
    run = make_run()
    # The forked child outlives the trainer with the pipe still open.
    process = trainer(
        run,
        "log.append(1, {'train/loss': 1.0})\n"
        "exporter.wait_for_run_id(300)\n"
        "log.append(2, {'train/loss': 0.9})\n"
        "if os.fork() != 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "while run.read_status().state == 'running': time.sleep(0.1)\n",
    )
    assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    wait_until(lambda: value_of(run, "state") == "killed")
    client = MlflowClient(f"sqlite:///{run.path.parent}/mlflow.db")
    found = client.get_run(str(value_of(run, "run_id")))
    assert found.info.status == "KILLED"
    assert "without a word" in found.data.tags["gpc.reason"]
    assert recorded_steps(client, run) == [1, 2]
    assert run.read_status().state == "killed"


def test_server_that_is_down_is_the_exporter_processs_business_only(
    make_run: MakeRun, trainer: Start, server_uri: str
) -> None:
    run = make_run(tracking__uri=f"http://127.0.0.1:{free_port()}")
    with_password(run)
    process = trainer(
        run,
        "log.append(1, {'train/loss': 1.0})\n"
        "print(exporter.pid, flush=True)\n"
        "while not run.tracking.exists(): time.sleep(0.1)\n"
        "run.write_status('finished')\n"
        "state = exporter.finish(0.5)\n"
        "os.kill(exporter.pid, 0)\n"  # which goes on, and was not waited for
        "assert not state.complete and state.run_id is None\n",
    )
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    pid, warning = output.split("\n", 1)
    assert "MLflow has not taken everything within 0.5 s" in warning
    assert f"gpc-dist sync {run}" in warning
    assert "Connection refused" in str(value_of(run, "error"))
    assert "hunter2" not in run.tracking.read_text() + run.tracking_log.read_text()

    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(sync_run, run.path)  # for the exporter
        os.kill(int(pid), signal.SIGKILL)  # the job's end
        with pytest.raises(MachineError, match="did not take the run"):
            waiting.result()
    state = sync_run(run.path, server_uri)
    assert state.complete
    client = MlflowClient(server_uri)
    assert client.get_run(str(state.run_id)).info.status == "FINISHED"
    assert recorded_steps(client, run) == [1]
    assert sync_run(run.path, server_uri).run_id == state.run_id
    assert recorded_steps(client, run) == [1]


def test_tracking_server_takes_a_whole_run(make_run: MakeRun, server_uri: str) -> None:
    run = make_run(tracking__uri=server_uri)
    files.write_text(run.adapter / "adapter_config.json", "{}")
    files.write_json(run.result, {"steps": 1, "metrics": {"accuracy": 0.5}})
    run.write_status("finished")
    state = sync_run(run.path)
    client = MlflowClient(server_uri)
    found = client.get_run(str(state.run_id))
    assert found.info.status == "FINISHED"
    assert found.data.metrics["final/metrics/accuracy"] == 0.5
    assert {item.path for item in client.list_artifacts(str(state.run_id))} >= {"config.yaml"}
    assert client.get_logged_model(str(state.model_id)).status == "READY"


def test_stale_run_is_marked(make_run: MakeRun) -> None:
    run = make_run()
    assert not mark_stale(run.path), "a run that has not begun is not stale"
    run.write_status("running")
    assert not mark_stale(run.path), "its trainer is this process"
    gone = subprocess.Popen(["true"])
    gone.wait()
    status = files.read_json(run.status)
    files.write_json(run.status, status | {"pid": gone.pid})
    with run.hold_tracking():
        assert not mark_stale(run.path), "its exporter is at work and will mark it"
    assert mark_stale(run.path)
    assert not mark_stale(run.path)
    assert run.read_status().state == "killed"


def test_run_of_another_host_is_stale_after_a_long_silence(make_run: MakeRun) -> None:
    run = make_run()
    run.write_status("running")
    files.write_json(run.status, files.read_json(run.status) | {"host": "elsewhere"})
    assert not mark_stale(run.path)
    os.utime(run.status, (0, 0))
    assert mark_stale(run.path)


def test_sync_leaves_out_what_is_no_run(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    (run.path.parent / "mlflow.db").touch()
    (run.path.parent / "notes").mkdir()
    asked = []
    monkeypatch.setattr("gpc_dist.tracking.sync.sync", lambda place, _: asked.append(place) or ExportState())
    assert gpc("sync", *(run.path.parent / name for name in ("mlflow.db", "notes", run.path.name))) == 0
    assert asked == [run.path]
    said = capsys.readouterr().err
    for name in ("mlflow.db", "notes"):
        assert f"left out: {run.path.parent / name} is not the folder of a run or of a search" in said


def test_what_is_no_run_folder_is_not_touched(tmp_path: Path) -> None:
    for command in (sync_run, mark_stale):
        with pytest.raises(UserError, match="not the folder of a run"):
            command(tmp_path / "typo")
    assert os.listdir(tmp_path) == []


def test_nothing_that_tracking_finds_decides_how_a_run_ends(make_run: MakeRun, trainer: Start) -> None:
    run, zeros = make_run(), "\0" * 200
    run.tracking.write_text(zeros)
    ended = trainer(
        run,
        "log.append(1, {'train/loss': 1.0})\n"
        "run_id = exporter.wait_for_run_id(300)\n"
        "files.write_json(run.result, {'steps': 1, 'mlflow_run_id': run_id})\n"
        "run.write_status('finished')\n"
        f"state = exporter.finish({TIMEOUT_S})\n"
        "print(state.complete, run.read_status().state)\n",
    )
    wait_until(lambda: run.tracking_log.exists() and "an attempt failed" in run.tracking_log.read_text())
    (exporter,) = psutil.Process(ended.pid).children()
    exporter.kill()  # it would try on for a while
    said, _ = ended.communicate(timeout=TIMEOUT_S)
    assert said.splitlines()[-1] == "False finished"
    assert f"complete it with: gpc-dist sync {run}" in said
    assert files.read_json(run.result) == {"steps": 1, "mlflow_run_id": None}
    assert run.tracking.read_text() == zeros, "what is broken is left for its owner to look at"
    with pytest.raises(UserError, match=r"tracking\.json.*restore or remove it"):
        sync_run(run.path)


def test_an_exporter_that_cannot_start_is_a_warning(make_run: MakeRun, trainer: Start) -> None:
    run = make_run()
    run.tracking_log.mkdir()
    ended = trainer(run, "print(exporter)\n")
    said, _ = ended.communicate(timeout=TIMEOUT_S)
    assert ended.returncode == 0
    assert said.splitlines()[-1] == "None"
    assert f"record this later with: gpc-dist sync {run}" in said
