"""Every command of the README and of the pages runs, page by page, in the order in which it is read.

A block that needs a cluster, a network or hours says so in its title. What is trained is shortened: a tiny
encoder, a few rows, two steps.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from gpc_dist import cli
from gpc_dist.shipped import shipped_folder
from tests.conftest import gpc
from tests.pages import SHELL, Block
from tests.processes import command, start, start_launcher, wait_until

PAGES = {
    block.page: [each for each in SHELL if each.page == block.page and not each.needs] for block in SHELL
}
SEARCHES = [
    page for page, held in PAGES.items() if any(words[1] == "tune" for b in held for words in b.lines)
]
ON_RANKS = {name for name, each in cli.COMMANDS.items() if each.on_ranks}
SHORT = {
    "train.steps": "2",
    "train.batch_size": "4",
    "train.eval_every": "2",
    "data.max_length": "32",
    "engine.device": "cpu",
}


@pytest.fixture(scope="module")
def shortened(tiny_encoder: Path) -> dict[str, str]:
    """Settings that every run gets, whatever its command says."""
    return SHORT | {"encoder.path": str(tiny_encoder)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, shortened: dict[str, str], mlflow_store: Path) -> Path:
    """A user's folder: official files, a table, a recipe, a DeepSpeed file, and runs that were trained before."""
    folder = tmp_path_factory.mktemp("user")
    rows = [
        {"premise": f"the cat sees bird {n}", "hypothesis": "yes", "label": label, "idx": n}
        for n, label in enumerate(["entailment", "not_entailment"] * 4)
    ]
    for task, labels in (("RTE", {}), ("CB", {"not_entailment": "contradiction"})):
        (folder / "SuperGLUE" / task).mkdir(parents=True)
        for split in ("train", "val", "test"):
            lines = [json.dumps(row | {"label": labels.get(row["label"], row["label"])}) for row in rows]
            lines += [json.dumps(rows[0] | {"label": "neutral", "idx": 8})] if task == "CB" else []
            (folder / "SuperGLUE" / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    for name, columns in {"AX-b": ("sentence1", "sentence2"), "AX-g": ("premise", "hypothesis")}.items():
        (folder / "SuperGLUE" / name).mkdir()
        lines = [
            json.dumps(
                {columns[0]: row["premise"], columns[1]: "yes", "label": row["label"], "idx": row["idx"]}
            )
            for row in rows
        ]
        (folder / "SuperGLUE" / name / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "tickets").mkdir()
    table = "subject,body,team\n" + "a cat,it sleeps,one\na dog,it runs,two\n" * 4
    for file in ("tickets/train.csv", "tickets/validation.csv", "new.csv"):
        (folder / file).write_text(table)
    (folder / "my-recipe.yaml").write_text("run: {name: tickets}\n")
    shutil.copy(shipped_folder("ds_configs") / "zero0.json", folder / "mine.json")
    (folder / "runs").mkdir()
    shutil.copy(mlflow_store, folder / "runs" / "mlflow.db")
    rte = ("rte", "--data.path", folder / "SuperGLUE" / "RTE")
    table_task = ("--task.name", "tickets", "--task.text", "[subject, body]", "--task.label", "team")
    given = [word for key, value in shortened.items() for word in (f"--{key}", value)]
    for name, words in {
        "rte": rte,
        "rte-prompt-tuning": (*rte, "--adapter.method", "prompt-tuning"),
        "cb": ("cb", "--data.path", folder / "SuperGLUE" / "CB"),
        "tickets": (folder / "my-recipe.yaml", "--data.path", folder / "tickets", *table_task),
    }.items():
        own = ("--run.name", name, "--run.dir", folder / "runs" / name, "--tracking.enabled", "false")
        assert gpc("train", *words, *own, *given) == 0
    return folder


@pytest.fixture
def user(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "user"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder


def expanded(word: str) -> list[str]:
    """What a shell makes of a word."""
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


def run(words: list[str], settings: dict[str, str], environment: dict[str, str]) -> None:
    """Run a command as it stands, with these settings in place of its own."""
    options, _ = cli.build_parser().parse_known_args(words[1:])
    command_name = words[1]
    if command_name == "tune":
        settings = {f"settings.{key}": value for key, value in settings.items()}
        settings |= {"trials": "2", "settings.data.path": str(Path("SuperGLUE", "CB").absolute())}
        settings |= {"scheduler.grace_steps": "2", "resources.ranks": "1", "tracking.enabled": "false"}
        settings = {} if options.resume else settings
    elif command_name == "train":
        settings = settings | {"train.resume": "false", "tracking.enabled": "false"}
    elif command_name == "bench":
        settings = {key: value for key, value in settings.items() if key != "encoder.path"}
    else:
        settings = {}
    kept = [each for word in words[1:] for each in expanded(word)]
    if command_name == "study" and "--dry-run" not in kept:
        kept.append("--dry-run")  # tests/study runs one
    for key, value in settings.items():
        for name in (f"--{key}", f"--{key.replace('train.steps', 'train.epochs')}"):
            if name in kept:
                del kept[(place := kept.index(name)) : place + 2]
        kept += [f"--{key}", value]
    if command_name == "serve":
        served_until_stopped(kept)
        return
    done = start_launcher(*kept) if command_name in ON_RANKS else command(*kept, **environment)
    done.wait()
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"


def served_until_stopped(words: list[str]) -> None:
    server = start(*words, "--port", 0, "--engine.device", "cpu")
    wait_until(lambda: "serving" in server.stdout or server.returncode is not None)
    server.send_signal(signal.SIGTERM)
    assert server.wait() == 0, server.stderr


def commands(held: list[Block]) -> list[list[str]]:
    return [words for block in held for words in block.lines if words[0] == "gpc-dist"]


PLANNED: set[tuple[str, ...]] = set()
"""Commands of the planner that have run: they depend on nothing, and several pages have the same."""


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page not in SEARCHES and commands(PAGES[page])])
def test_the_commands_of_a_page_run(page: str, user: Path, shortened: dict[str, str]) -> None:
    for words in commands(PAGES[page]):
        if words[1] != "plan" or tuple(words) not in PLANNED:
            run(words, shortened, {})
            PLANNED.add(tuple(words))


@pytest.mark.ray
@pytest.mark.parametrize("page", SEARCHES)
def test_the_commands_of_a_page_with_searches_run(
    page: str, user: Path, shortened: dict[str, str], shared_ray: dict[str, str]
) -> None:
    for words in commands(PAGES[page]):
        run(words, shortened, shared_ray)
