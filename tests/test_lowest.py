"""The oldest versions that the package allows."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from tests import lowest


def test_lower_bounds_become_pins(tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text(
        """
[project]
dependencies = ["numpy>=1.26,<3", "ray[tune] >= 2.40", "free"]
[project.optional-dependencies]
search = ["optuna>=4.0"]
dev = ["optuna>=4.0", "data==0.1.0", "below<2"]
"""
    )
    assert lowest.pins(file) == ["data==0.1.0", "numpy==1.26", "optuna==4.0", "ray==2.40"]


def test_every_dependency_has_a_lower_bound() -> None:
    project = tomllib.loads(lowest.PYPROJECT.read_text())["project"]
    pinned = {Requirement(pin).name for pin in lowest.pins(lowest.PYPROJECT)}
    assert {Requirement(each).name for each in project["dependencies"]} <= pinned
