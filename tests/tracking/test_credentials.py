"""What a handed-over folder cannot do: get the user's credentials, files of the user's, or a line of requirements."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from gpc_dist import cli, files
from gpc_dist.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from gpc_dist.runs.folder import RunFolder
from gpc_dist.tracking import credentials, model, store
from gpc_dist.tracking.sync import sync

from .conftest import MakeRun
from .searches import AddTrial, MakeSearch, finish
from .test_outages import finished
from .test_run_exporter import store_of


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str | None]]]:
    """Somebody's server, and the credentials that came with each request."""
    came: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            came.append(self.headers.get("Authorization"))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_PUT = do_PATCH = _answer  # noqa: N815 - the library's names

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", came
        server.shutdown()


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for names in credentials._VARIABLES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(credentials.URI, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_credentials_go_to_a_server_that_the_user_named(
    make_run: MakeRun,
    listener: tuple[str, list[str | None]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, came = listener
    run = finished(make_run(tracking__uri=server))
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2")
    assert cli.main(["sync", str(run.path)]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert f"{server} is named by a file alone" in said
    assert "(MLFLOW_TRACKING_TOKEN)" in said
    assert "--uri" in said
    assert came == []
    # the user says so
    assert cli.main(["sync", str(run.path), "--uri", server]) == EXIT_ENVIRONMENT
    assert set(came) == {"Bearer hunter2"}
    assert credentials.URI not in os.environ
    came.clear()
    monkeypatch.setenv(credentials.URI, f"{server}/")
    assert cli.main(["sync", str(run.path)]) == EXIT_ENVIRONMENT
    assert set(came) == {"Bearer hunter2"}
    # without credentials there is nothing to refuse
    came.clear()
    monkeypatch.delenv(credentials.URI)
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    assert cli.main(["sync", str(run.path)]) == EXIT_ENVIRONMENT
    assert set(came) == {None}


@pytest.mark.parametrize(
    ("given", "asked", "same"),
    [
        ("https://h", "https://h:443/x", True),
        ("https://H", "https://h", True),
        ("http://h", "http://h:80", True),
        ("http://h:5000", "http://h", False),
        ("https://h", "http://h", False),
        ("https://h", "https://h.evil.org", False),
        ("https://h", "https://h@evil.org", False),
        ("", "https://h", False),
        ("", "HTTPS://h", False),
        ("", " https://h", False),
        ("", "https://u:pa/ss@h", False),
        ("", "https://", False),
        ("", "https://[::1", False),
        ("", "ht\ntps://h", False),
        ("https://h", "https://evil\\@h", False),
        ("https://h", "https://h:443@evil", False),
        ("https://h", "https://evil#@h", False),
        ("https://h", "https://evil?@h", False),
    ],
)
def test_servers(given: str, asked: str, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    with credentials.named_by_user(given):
        if same:
            credentials.check_server(asked)
        else:
            with pytest.raises(UserError, match=r"would get your credentials \(MLFLOW_TRACKING_PASSWORD\)"):
                credentials.check_server(asked)


def test_mlflows_own_file_is_a_credential(tmp_path: Path) -> None:
    credentials.check_server("http://h")
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow/credentials").touch()
    with pytest.raises(UserError, match=r"\(~/.mlflow/credentials\)"):
        credentials.check_server("http://h")
    credentials.check_server("sqlite:////r/mlflow.db")


def test_a_password_of_a_database_stays_with_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    credentials.check_server("http://h")
    with pytest.raises(UserError, match=r"\(PGPASSWORD\)"):
        credentials.check_server("postgresql+psycopg2://evil/db")
    with credentials.named_by_user("postgresql://mine/db"):
        credentials.check_server("postgresql://mine/db")
        with pytest.raises(UserError, match=r"\(PGPASSWORD\)"):
            credentials.check_server("postgresql://mine/db?host=evil")


def test_training_and_searches_refuse_before_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2")
    (tmp_path / "r.yaml").write_text("tracking: {uri: 'http://evil'}\nengine: {ranks: 1, device: cpu}")
    (tmp_path / "s.yaml").write_text(
        "recipe: demo\nspace: {train.lr: [0.1, 0.2]}\ntrials: 1\ntracking: {uri: 'http://evil'}"
    )
    for command in (["train", "r.yaml"], ["tune", "s.yaml"]):
        assert cli.main(command) == EXIT_USAGE
        assert "http://evil is named by a file alone" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml", "s.yaml"]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "demo", "--tracking.uri", "https://u:pa/ss@h"],
        ["tune", "demo", "--tracking.uri=https://u:pa/ss@h"],
        ["sync", "runs", "--uri", "https://u:pa/ss@h"],
        ["compare", "runs", "--uri", "https://u:pa/ss@h"],
    ],
)
def test_a_password_on_the_command_line_is_refused_and_not_repeated(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "the tracking URI https://***@h with a password would be kept in files" in said
    assert "pa/ss" not in said


def test_old_records_of_a_store_are_the_same_store() -> None:
    assert store.same_store("https://***@h/x", "https://u:p@h/x")
    assert store.same_store("https://***@h/x", "https://h/x")
    assert not store.same_store("https://***@h/x", "https://h/y")
    assert not store.same_store(None, "https://h/x")
    assert store.tracking_uri(None, "/r/run", last="https://***@h/x") == "https://h/x"


def test_links_lead_nowhere(make_run: MakeRun, runs: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("hunter2")
    for name, target in (
        ("ds_config.json", secret / "key"),
        ("result.json", secret / "key"),
        ("adapter", secret),
        ("adapter/more", secret / "key"),
    ):
        run = finished(make_run(runs / f"with-{name.replace('/', '-')}"))
        link = run.path / name
        if name == "adapter":
            (link / "adapter_config.json").unlink()
            link.rmdir()
        else:
            link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(UserError, match="leads out of"):
            sync(run.path)
        kept = [path for path in (runs / "mlartifacts").rglob("*") if path.is_file()]
        assert not any("hunter2" in path.read_text(errors="ignore") for path in kept)


@pytest.mark.parametrize("best", ["..", "../../other", 7])
def test_the_best_trial_is_a_trial(make_search: MakeSearch, add_trial: AddTrial, best: Any) -> None:
    search = make_search()
    finish(search, add_trial(search, 0, {1: 0.5}), 0.5)
    files.write_json(search.result, files.read_json(search.result) | {"best_trial": best})
    with pytest.raises(UserError, match="the trial '"):
        sync(search.path)


def test_a_trial_that_is_a_link_is_refused(
    make_search: MakeSearch, add_trial: AddTrial, make_run: MakeRun, tmp_path: Path
) -> None:
    search = make_search()
    trial = add_trial(search, 0, {1: 0.5})
    trial.path.rename(tmp_path / "elsewhere")
    trial.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="t0 leads out of"):
        sync(search.path)
    with pytest.raises(UserError, match="t0 leads out of"):
        search.trial("t0")


@pytest.mark.parametrize(
    "version",
    ["1\n--index-url http://evil", "1 ; x", "1\r\nevil", "", "-e .", "1 --hash=x", "git+https://x", 7, None],
)
def test_a_version_is_no_line_of_requirements(version: Any) -> None:
    with pytest.raises(UserError, match=r"^facts.json: the version .* of torch is none"):
        model.pip_requirements({"torch": version})


def test_versions() -> None:
    found = model.pip_requirements({"torch": "2.13.0+cu128", "safetensors": "0.6.0rc1", "numpy": "2.0"})
    assert found[2:] == ["torch==2.13.0", "safetensors==0.6.0rc1"]


def test_a_run_with_such_a_version_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    facts = files.read_json(run.facts)
    facts["versions"]["torch"] = "1\n--index-url http://evil"
    files.write_json(run.facts, facts)
    with pytest.raises(UserError, match="of torch is none"):
        sync(finished(run).path)
    assert _uploaded(run) == []


def _uploaded(run: RunFolder) -> list[str]:
    found = MlflowClient(store_of(run)).get_run(files.read_json(run.tracking)["run_id"])
    return [
        path.name for path in Path(found.info.artifact_uri.removeprefix("file://")).rglob("requirements.txt")
    ]
