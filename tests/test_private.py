"""What is said when a library is not of a version that its private parts were checked with."""

from __future__ import annotations

import importlib
import os
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from gpc_dist import cli
from gpc_dist.errors import EXIT_ENVIRONMENT, MachineError
from gpc_dist.private import CHECKED, check_version, checked, without

ROOT = Path(__file__).parents[1]

Install = Callable[[str, str], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Let a package seem to be installed in some version; the empty one stands for none."""

    def seem(package: str, version: str) -> None:
        usual = metadata.version

        def found(name: str) -> str:
            if name != package:
                return usual(name)
            if not version:
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(metadata, "version", found)

    return seem


@pytest.mark.parametrize("version", ["2.9.0", "2.11.0+cu130", "2.13.0", "2.14.0.dev20261101"])
def test_versions_in_the_range_pass(install: Install, version: str) -> None:
    install("torch", version)
    check_version("torch")


@pytest.mark.parametrize("version", ["0.10.0", "0.20.0", "1.0"])
def test_others_are_refused_with_what_to_install(install: Install, version: str) -> None:
    install("deepspeed", version)
    allowed = CHECKED["deepspeed"].range
    with pytest.raises(MachineError) as refused:
        check_version("deepspeed")
    assert str(refused.value) == (
        f"deepspeed {version} is installed, and gpc-dist was checked with {allowed}: pip install 'deepspeed{allowed}'"
    )


def test_a_missing_package_is_named(install: Install) -> None:
    install("deepspeed", "")
    with pytest.raises(MachineError, match="deepspeed is not installed: pip install 'deepspeed>="):
        check_version("deepspeed")


def test_a_missing_part_is_named() -> None:
    said = "cannot import name 'T5Cell'.*pip install 'transformers=="
    with pytest.raises(MachineError, match=said), checked("transformers"):
        from transformers.models.t5.modeling_t5 import T5Cell  # noqa: F401


@pytest.mark.parametrize("library", CHECKED)
def test_importing_the_parts_of_a_library_checks_it(
    library: str, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(library, "0.1")
    monkeypatch.delitem(sys.modules, f"gpc_dist.private.{library}", raising=False)
    with pytest.raises(MachineError, match=f"{library} 0.1 is installed"):
        importlib.import_module(f"gpc_dist.private.{library}")


def test_a_module_seems_to_be_missing_unless_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with without("colorsys"), pytest.raises(ImportError):
        importlib.import_module("colorsys")
    there = importlib.import_module("colorsys")
    with without("colorsys"):
        assert importlib.import_module("colorsys") is there
    assert sys.modules["colorsys"] is there


def test_doctor_tells_what_to_do(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("deepspeed", "0.20.0")
    assert cli.main(["doctor"]) == EXIT_ENVIRONMENT
    assert f"pip install 'deepspeed{CHECKED['deepspeed'].range}'" in capsys.readouterr().out


@pytest.mark.skipif(not os.environ.get("CI"), reason="another environment than `make setup` makes may differ")
def test_every_version_that_is_written_down_is_installed() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line:
            package, version = line.split("==")
            assert Version(metadata.version(package)).public == version


def test_the_package_asks_for_the_versions_that_were_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for library, versions in CHECKED.items():
        assert asked[library] == SpecifierSet(versions.range)
        assert pinned[library] == versions.newest
