"""The pages as a site, as `make docs` builds it."""

from __future__ import annotations

import ast
import functools
import itertools
import os
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gpc_dist import cli, schema
from gpc_dist.config import Config
from gpc_dist.runs.folder import RunFolder
from gpc_dist.search.spec import SearchSpec
from gpc_dist.study.spec import StudySpec
from tests.browser import rendered
from tests.pages import PAGES, ROOT
from tests.processes import TIMEOUT_S


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def page(site: Path, name: str) -> str:
    return (site / name / "index.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tree"), [("keys", Config), ("search-keys", SearchSpec), ("study-keys", StudySpec)]
)
def test_every_key_has_its_place_in_the_reference(site: Path, name: str, tree: type[schema.Section]) -> None:
    shown = page(site, f"reference/{name}")
    for key, field in schema.all_keys(tree).items():
        assert f'id="{key}"' in shown
        assert field.description


@pytest.mark.slow
def test_every_command_has_its_place_in_the_reference(site: Path) -> None:
    shown = page(site, "reference/commands")
    for name in cli.COMMANDS:
        assert f'id="gpc-dist-{name}"' in shown


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for file in site.rglob("index.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", file.read_text()):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), (file, tag)


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    for file in PAGES:
        place = file.relative_to(ROOT).as_posix().removeprefix("docs/")
        assert {"README.md": "index.md"}.get(place, place).lower() in text


@pytest.mark.slow
def test_the_tutorial_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "docs" / "tutorial.py"))
    assert "accuracy on what was trained: 1.00" in capsys.readouterr().out


def test_the_run_folder_is_described() -> None:
    text = (ROOT / "docs" / "reference" / "run-folder.md").read_text()
    held = [path for path in vars(RunFolder("runs/x")).values() if isinstance(path, Path)]
    for path in held[1:]:
        assert f"`{path.name}" in text, path.name
    result = (ROOT / "gpc_dist" / "training" / "record.py").read_text().partition("def _states")[2]
    for key in re.findall(r'^        "(\w+)":', result, re.MULTILINE):
        assert f"`{key}`" in text, key


def test_the_messages_that_the_troubleshooting_names_are_those_of_the_program() -> None:
    """`…` stands for what a message names."""
    rows = (ROOT / "docs" / "multi-node.md").read_text().partition("| the message |")[2].splitlines()[2:]
    said = "\n".join(_messages())
    for row in rows:
        for message in re.findall(r"`([^`]+)`", row.split(" | ")[1]):
            if message not in _OF_THE_SYSTEM:
                pattern = ".*?".join(re.escape(part) for part in message.split("…"))
                assert re.search(pattern, said), message


_OF_THE_SYSTEM = ("No space left on device", "Disk quota exceeded")


def _messages() -> Iterator[str]:
    """The texts of the program, with `…` for what is put in; and the lines of the batch scripts."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "gpc_dist").rglob("*.py")]
    constants = {
        node.targets[0].id: node.value.value
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }

    def text(part: ast.expr) -> str:
        if isinstance(part, ast.FormattedValue):
            return str(constants.get(getattr(part.value, "id", ""), "…"))
        return str(part.value) if isinstance(part, ast.Constant) else ""

    for node in itertools.chain.from_iterable(map(ast.walk, trees)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(map(text, node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[sdg]", "…", node.value)
    for file in (ROOT / "slurm").glob("*.s*"):
        yield re.sub(r"\$\w+", "…", file.read_text())


_LOOKS = """<iframe src="/?q=adapter.first_layer" width="1200" height="900"></iframe><img src="/hold">
<script>
const looking = setInterval(() => {
  const links = document.querySelector("iframe").contentDocument.querySelectorAll("a.md-search-result__link")
  if (links.length) { clearInterval(looking); fetch("/found?" + [...links].map(link => link.pathname).join()) }
}, 50)
</script>"""
"""A page that is not loaded before the search in it has found something: a browser takes its picture then."""
_NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


@pytest.mark.browser
def test_a_key_is_found_in_a_browser(site: Path, tmp_path: Path) -> None:
    found: list[str] = []
    has_found = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/hold":
                has_found.wait(TIMEOUT_S)
            elif self.path.startswith("/found?"):
                found.extend(self.path.partition("?")[2].split(","))
                has_found.set()
            if self.path == "/look":
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(_LOOKS.encode())
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/look"
        rendered(address, tmp_path / "found.png", _NO_NETWORK, size=(1280, 1000))
        server.shutdown()
    assert found[0] == "/reference/keys/"
