"""Adapters by name, wherever they are, and new versions of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gpc_dist.adapter.store import CARD, NAMES, WEIGHTS
from gpc_dist.errors import UserError
from gpc_dist.files import new_folder
from gpc_dist.inference.server.catalog import Catalog
from gpc_dist.inference.server.places import Place, look_at_all
from tests.inference.server.made import CATS, write_adapter
from tests.tiny import write_encoder

CPU = {"engine.device": "cpu"}


def run_folder(place: Path, adapter: Path) -> Path:
    """The folder of a run that wrote a copy of an adapter."""
    shutil.copytree(adapter, place / "adapter")
    (place / "config.yaml").write_text("{}")
    return place


def search_folder(place: Path, best: str, **adapters: Path) -> Path:
    """The folder of a search whose trials wrote these."""
    for name, adapter in adapters.items():
        run_folder(place / "trials" / name, adapter)
    (place / "search.yaml").write_text("{}")
    (place / "result.json").write_text(json.dumps({"metric": "accuracy", "best_trial": best, "best": 0.5}))
    return place


def names(*places: object) -> list[str]:
    return sorted(look_at_all([Place.parse(str(place)) for place in places]))


def test_an_adapter_is_called_after_its_run_its_search_or_its_folder(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    run = run_folder(tmp_path / "a" / "rte", adapters["late"])
    search = search_folder(tmp_path / "a" / "sweep", "t1", t0=adapters["late"], t1=adapters["deep"])
    assert names(run) == names(run / "adapter") == ["rte"]
    assert names(search) == ["sweep"]
    assert names(adapters["late"]) == ["late"]
    assert names(f"mine={run}") == ["mine"]
    (tmp_path / "a" / "other").mkdir()
    assert names(tmp_path / "a") == ["rte", "sweep"]
    with look_at_all([Place.parse(str(search))])["sweep"].fetched() as folder:
        assert folder == search / "trials" / "t1" / "adapter"


def test_an_adapter_that_is_being_written_is_none_yet(adapters: dict[str, Path], tmp_path: Path) -> None:
    run_folder(tmp_path / "rte", adapters["late"])
    with new_folder(tmp_path / "cb", NAMES) as half:
        for name in NAMES:
            shutil.copy(adapters["deep"] / name, half / name)
        assert names(tmp_path) == ["rte"]
    assert names(tmp_path) == ["cb", "rte"]


def test_a_path_with_the_sign_is_a_path(adapters: dict[str, Path], tmp_path: Path) -> None:
    run = run_folder(tmp_path / "lr=1" / "rte", adapters["late"])
    assert names(run) == ["rte"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["empty"], "there is no adapter in empty"),
        (
            ["x/rte", "y/rte"],
            "x/rte and y/rte are both called 'rte': give one another name, as in rte-2=y/rte",
        ),
        (["mine=x"], "x holds 2 adapters"),
        (["models:/rte/1"], "models:/rte/1: there is no mlflow.db in runs or here"),
    ],
)
def test_what_cannot_be_served_is_said(
    adapters: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("empty").mkdir()
    for place in ("x/rte", "x/cb", "y/rte"):
        run_folder(Path(place), adapters["late"])
    with pytest.raises(UserError, match=said):
        for found in look_at_all(list(map(Place.parse, given))).values():
            with found.fetched():
                pass


def test_adapters_of_two_encoders_are_refused_by_the_names_of_both(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    (tmp_path / "encoder").mkdir()
    encoder = write_encoder(tmp_path / "encoder")
    weights = encoder / "model.safetensors"
    torch.manual_seed(1)
    from safetensors.torch import load_file, save_file

    tensors = {name: value + 1 for name, value in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    other = write_adapter(tmp_path / "other", encoder, CATS, {"prompt_tokens": 4})
    with pytest.raises(
        UserError, match=r"'late' was trained on .* and 'other' on .*: start a server for each"
    ):
        Catalog([Place(str(adapters["late"])), Place(str(other))], CPU)


def test_what_is_new_is_taken_up_whole(
    adapters: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run_folder(tmp_path / "runs" / "first", adapters["late"])
    search = search_folder(tmp_path / "sweep", "t0", t0=adapters["deep"], t1=adapters["recurrent"])
    catalog = Catalog([Place(str(tmp_path / "runs")), Place(str(search))], CPU)
    before = catalog.held
    assert catalog.look_again() == 0
    assert catalog.held == before

    run_folder(tmp_path / "runs" / "second", adapters["probe"])
    (search / "result.json").write_text(json.dumps({"best_trial": "t1"}))
    assert catalog.look_again() == 2
    now = catalog.held
    assert (sorted(before), sorted(now)) == (["first", "sweep"], ["first", "second", "sweep"])
    assert now["first"] is before["first"]
    assert now["sweep"].loaded.adapter.config.method == "gpc"

    # half of another version
    shutil.copy(adapters["gated"] / CARD, first / "adapter" / CARD)
    with caplog.at_level("WARNING", logger="gpc_dist"):
        for _ in range(2):
            assert catalog.look_again() == 0
    assert catalog.held["first"] is before["first"]
    assert len([each for each in caplog.records if "not taken up" in each.message]) == 1
    shutil.copy(adapters["gated"] / WEIGHTS, first / "adapter" / WEIGHTS)
    assert catalog.look_again() == 1
    assert catalog.held["first"].loaded.task.name == "pair"

    shutil.rmtree(tmp_path / "runs")
    assert catalog.look_again() == 0
    assert sorted(catalog.held) == ["first", "second", "sweep"]


def test_a_name_that_is_taken_is_not_taken_over(
    adapters: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_folder(tmp_path / "x" / "one", adapters["late"])
    run_folder(tmp_path / "y" / "two", adapters["deep"])
    catalog = Catalog([Place(str(tmp_path / "x")), Place(str(tmp_path / "y"))], CPU)
    run_folder(tmp_path / "y" / "one", adapters["probe"])
    with caplog.at_level("WARNING", logger="gpc_dist"):
        assert catalog.look_again() == 0
    assert "both called 'one'" in caplog.text
