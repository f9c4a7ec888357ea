"""The page, as a browser shows it, and the plots."""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from matplotlib.image import imread

from gpc_dist import cli, config, files
from gpc_dist.errors import UserError
from gpc_dist.reports.comparison import compare
from gpc_dist.reports.comparison_plots import plots
from gpc_dist.reports.importance import importance
from gpc_dist.reports.page import write_comparison
from gpc_dist.reports.plots import to_svg
from tests.browser import rendered

from .test_comparison import write_run

EVIL = "<script>document.title='taken'</script>\"&'$x_1$ 日本"


@pytest.fixture(autouse=True)
def _small_forests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which show as large ones do; what they learn is tested with comparisons."""
    monkeypatch.setattr("gpc_dist.reports.importance._TREES", 5)


def make_page(place: Path, file: Path) -> str:
    write_comparison(compare(str(place)), str(place), file, None)
    return file.read_text(encoding="utf-8")


def search(folder: Path, count: int) -> Path:
    """Runs with settings of every kind, some of them broken."""
    draw = random.Random(0)
    for number in range(count):
        best = None if number % 9 == 8 else 0.5 + 0.4 * draw.random()
        evaluations = [None if draw.random() < 0.1 else draw.random() for _ in range(number % 5)]
        write_run(
            folder / f"run-{number:03d}",
            best,
            evaluations=evaluations,
            state="finished" if best else "failed",
            run__seed=number % 2,
            train__lr=10 ** draw.uniform(-4, -1),
            adapter__cell_rank=draw.choice(["null", 8, 32]),
            adapter__cell=draw.choice(["gated", "residual"]),
            engine__ranks=draw.choice(["auto", 2]),
            adapter__cell_per_layer=draw.choice(["true", "false"]),
            wall_s=draw.uniform(10, 1000),
        )
    return folder


class Balanced(HTMLParser):
    """Fails where an element is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.browser
def test_a_browser_shows_and_sorts_it(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = make_page(search(tmp_path / "runs", 24), page)
    click = "document.querySelectorAll('th button')[%d].click();"
    # settings are lr, cell_rank, ...; the first click sorts from the smallest value
    names = re.findall(r"<button[^>]*>([^<]+)", text)
    clicked = click % names.index("lr") + click % names.index("accuracy") * 2
    page.write_text(text.replace("</body>", f"<script>{clicked}</script></body>"))
    shown = rendered(page.as_uri(), page.with_suffix(".png"))
    cells = re.findall(r"<tr>(.*?)</tr>", shown.partition("<tbody>")[2], re.DOTALL)
    assert len(cells) == 24
    place = names.index("accuracy")
    values = [re.findall(r"<td[^>]*>([^<]*)", row)[place] for row in cells]
    known = [value for value in values if value != "-"]
    assert len(known) >= 20
    assert known == sorted(known, reverse=True)
    assert values == known + ["-"] * (24 - len(known))  # without a value: last, whichever way
    assert shown.count('aria-sort="descending"') == 1
    assert shown.count("<svg") == 4
    picture = imread(page.with_suffix(".png"))
    assert picture.shape[:2] == (2400, 1280)
    assert len({tuple(pixel) for pixel in picture[::20, ::20].reshape(-1, picture.shape[2]).tolist()}) > 20


@pytest.mark.browser
def test_text_is_text(tmp_path: Path) -> None:
    for number in range(2):
        run = write_run(
            tmp_path / "runs" / f"run-{number}",
            0.5 + number / 10,
            evaluations=[0.5, 0.6],
            train__lr=number + 1,
        )
        tree = run.read_config()
        tree["encoder"]["path"] = f"{EVIL}{number}"
        files.write_text(run.config, yaml.safe_dump(tree))
        files.write_json(run.facts, {"command": EVIL})
        files.write_json(run.status, {"state": "failed", "reason": EVIL})
    page = tmp_path / "page.html"
    write_comparison(compare(str(tmp_path / "runs")), EVIL, page, None)
    text = page.read_text()
    assert text.count("<script>") == 1
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    shown = rendered(page.as_uri(), page.with_suffix(".png"))
    title = re.findall(r"<title>(.*?)</title>", shown, re.DOTALL)[0]
    assert title.startswith("Comparison of &lt;script&gt;")
    assert text.count("document.title") == shown.count("document.title") > 3


def test_needs_nothing_but_itself(tmp_path: Path) -> None:
    text = make_page(search(tmp_path / "runs", 12), tmp_path / "page.html")
    assert "://" not in text
    assert not re.findall(r'\b(?:src|href)="(?!#|data:)', text)
    assert "@import" not in text
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert {f"rte-accuracy-{name}" for name in ("curves", "settings", "importance", "cost")} <= set(
        parser.ids
    )
    assert not [name for name in parser.ids if re.search(r"_\d+$", name)]


@pytest.mark.parametrize("count", [1, 2, pytest.param(200, marks=pytest.mark.slow)])
def test_any_number_of_runs(tmp_path: Path, count: int) -> None:
    page = make_page(search(tmp_path / "runs", count), tmp_path / "page.html")
    assert page.count("<tr>") == 1 + count
    assert ("Too few configurations" in page) == (count < 8)
    assert len(page) < 3_000_000


def test_runs_that_have_nothing_to_show(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", state="running")
    page = make_page(tmp_path / "runs", tmp_path / "page.html")
    assert "No run has been evaluated by metric yet" in page
    assert "<svg" not in page


def test_a_section_for_each_task(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", 0.9, evaluations=[0.9])
    write_run(tmp_path / "runs" / "b", 0.4, evaluations=[0.4], task__name="cb", metric="average")
    page = make_page(tmp_path / "runs", tmp_path / "page.html")
    assert re.findall("<h2>(.*?)</h2>", page) == ["cb: average", "rte: accuracy"]
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "rte-accuracy-curves" in parser.ids
    assert "cb-average-curves" in parser.ids
    assert len(parser.ids) == len(set(parser.ids))


def test_the_best_can_be_made_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "my runs" / "a", 0.9, train__lr=0.1, run__dir="my runs/a")
    write_run(tmp_path / "my runs" / "b", 0.8, train__lr=0.2)
    page = make_page(tmp_path / "my runs", tmp_path / "page.html")
    assert "0.1000 ahead of the second" in page
    assert (
        "<pre>gpc-dist train &#39;my runs/a/config.yaml&#39; --run.name a-again --run.dir runs/a-again</pre>"
        in page
    )
    again = config.load("my runs/a/config.yaml", {"run.name": "a-again", "run.dir": "runs/a-again"})
    assert (again.train.lr, str(again.run.folder)) == (0.1, "runs/a-again")


@pytest.mark.slow
def test_figures_are_the_same_for_the_same_runs(tmp_path: Path) -> None:
    search(tmp_path, 10)
    (comparison,), (again,) = (compare(str(tmp_path)) for _ in range(2))
    drawn = plots(comparison, importance(comparison))
    assert [plot.name.rpartition("-")[2] for plot in drawn] == ["curves", "settings", "importance", "cost"]
    for plot, same in zip(drawn, plots(again, importance(again)), strict=True):
        svg = to_svg(plot)
        ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
        assert svg == to_svg(same)
        assert "currentColor" in svg


def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = search(tmp_path / "runs", 12)
    assert cli.main(["compare", str(place), "--png", str(tmp_path / "new" / "png")]) == 0
    written = sorted((tmp_path / "new" / "png").iterdir())
    assert [file.name for file in written] == [
        f"rte-accuracy-{name}.png" for name in ("cost", "curves", "importance", "settings")
    ]
    said = capsys.readouterr().out
    for file in written:
        assert f"wrote {file}\n" in said
        assert imread(file).shape[1] >= 1500


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    found = compare(str(search(tmp_path / "runs", 2)))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--html"):
        write_comparison(found, "runs", tmp_path, None)
    with pytest.raises(UserError, match="--png"):
        write_comparison(found, "runs", None, tmp_path / "file")
