"""The oldest versions that pyproject.toml allows, as constraints for pip: what `make test-lowest` installs."""

from __future__ import annotations

import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def pins(pyproject: Path) -> list[str]:
    """`name==version` of each dependency, those of extras included, that has a lower bound."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    listed = chain(project["dependencies"], *project["optional-dependencies"].values())
    found = [
        f"{requirement.name}=={bound.version}"
        for requirement in map(Requirement, listed)
        for bound in requirement.specifier
        if bound.operator in (">=", "==")
    ]
    return sorted(set(found))


if __name__ == "__main__":
    print("\n".join(pins(PYPROJECT)))
