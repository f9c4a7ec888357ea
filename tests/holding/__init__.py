"""The files by which a test holds a run: which the processes of the program know too (`sitecustomize`)."""

import os
from pathlib import Path


def hold_files(run: Path, step: int) -> tuple[Path, Path]:
    """Of a run's folder and a step: the file that asks for the hold, and the one that it becomes when it is kept."""
    waiting = Path(os.environ["TESTS_HOLDS"], f"{str(run.absolute()).replace('/', '%')}@{step}")
    return waiting, waiting.with_name(f"{waiting.name}.held")
