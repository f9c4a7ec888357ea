"""Text for other eyes: nothing steers the terminal, and no secret is in it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from gpc_dist import cli, logs
from gpc_dist.errors import EXIT_DONE, EXIT_USAGE
from gpc_dist.shown import holds_secret, redact, shown, shown_lines
from tests.test_cli import RESULT

ATTACK = "a\x1b[2J\x1b]0;title\x07\x9b31m\u202eb\u2066c\rd\x00\x7f"
PLAIN = r"a\x1b[2J\x1b]0;title\x07\x9b31m\u202eb\u2066c d\x00\x7f"


def test_shown() -> None:
    assert shown(ATTACK) == PLAIN
    assert shown("two\nlines\tand \u2028 one") == r"two lines and \u2028 one"
    assert shown_lines("two\nlines\r\nand\tmore\x1b") == "two\nlines\nand\tmore\\x1b"
    for text in ("café", "日本", "שלום", "👩\u200d💻", "±…", ""):
        assert shown(text) == shown_lines(text) == text


def steers(text: str) -> bool:
    return any(c in text for c in "\x1b\x07\x9b\u202e\u2066\r\x00\x7f")


def test_tables_errors_and_log_lines_are_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / f"run{ATTACK}".replace("\0", "")
    (run / "job").mkdir(parents=True)
    result = RESULT | {"task": ATTACK, "main_metric": f"accuracy{ATTACK}", "method": ATTACK}
    result["metrics"] = {"best": {f"accuracy{ATTACK}": 0.75}}
    (run / "result.json").write_text(json.dumps(result))
    (run / "config.yaml").write_text(json.dumps({"run": {"seed": 1}, "task": {"name": ATTACK}}))
    (run / "status.json").write_text(json.dumps({"state": "failed", "reason": ATTACK}))
    (run / "job" / "job.json").write_text(
        json.dumps({"job_id": "7", "log": "", "submitted_s": 2e9, "command": [], "sbatch": [], "code": {}})
    )
    monkeypatch.setattr("gpc_dist.cluster.slurm.call", lambda *_: "")
    for command in ("results", "jobs"):
        assert cli.main([command, str(run)]) == EXIT_DONE
    assert cli.main(["compare", str(tmp_path)]) == EXIT_DONE
    said = capsys.readouterr().out
    assert not steers(said)
    assert said.count(r"\x1b[2J") > 5
    assert cli.main(["results", str(run / f"none{ATTACK}".replace("\0", ""))]) == EXIT_USAGE
    logs.configure(0)
    logging.getLogger("gpc_dist.somewhere").warning("left out: %s", ATTACK)
    said = capsys.readouterr().err
    assert not steers(said)
    assert said.count(r"\x1b[2J") == 3


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://u:p@h/x", "https://***@h/x"),
        ("https://u:pa/ss@h", "https://***@h"),
        ("https://u:p@ss@h", "https://***@h"),
        ("https://u:p@s/s@h:5000/x", "https://***@h:5000/x"),
        ("https://me@corp.org:pa/ss@h", "https://***@h"),
        ("https://u@h", "https://***@h"),
        (
            "see postgresql://gpc:pw@db/mlflow and https://host/a@b",
            "see postgresql://***@db/mlflow and https://host/a@b",
        ),
        ("https://h/x?token=abc&a=b", "https://h/x?token=***&a=b"),
        ("https://h/x?a=b&access_token=abc#c", "https://h/x?a=b&access_token=***#c"),
        ("postgresql://h/db?user=u&password=p%20w", "postgresql://h/db?user=u&password=***"),
        (
            "https://h/x?X-Amz-Signature=abc&X-Amz-Credential=d",
            "https://h/x?X-Amz-Signature=***&X-Amz-Credential=***",
        ),
        ("could not connect: host=db password=pw user=u", "could not connect: host=db password=*** user=u"),
        ("http://127.0.0.1:5000/#/experiments/1", "http://127.0.0.1:5000/#/experiments/1"),
        ("sqlite:////home/a:b@c/mlflow.db", "sqlite:////home/a:b@c/mlflow.db"),
        ("--adapter.prompt_tokens 20 a@b", "--adapter.prompt_tokens 20 a@b"),
    ],
)
def test_redact(text: str, redacted: str) -> None:
    assert redact(text) == redacted
    assert redact(redacted) == redacted


@pytest.mark.parametrize(
    ("uri", "secret"),
    [
        ("https://h:5000", False),
        ("https://u@h:5000/x", False),
        ("postgresql://u@db:5432/mlflow", False),
        ("sqlite:////home/a:b/mlflow.db", False),
        ("databricks://profile", False),
        ("https://u:p@h", True),
        ("https://u:pa/ss@h", True),
        ("https://:p@h", True),
        ("https://me@corp.org:p@h", True),
        ("postgresql://h/db?user=u&password=p", True),
        ("https://h?token=t", True),
    ],
)
def test_uris_with_a_secret(uri: str, secret: bool) -> None:
    assert holds_secret(uri) == secret
