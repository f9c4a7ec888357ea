"""What the tests of readers under hypothesis share: how many cases there are, and what a reader may do.

A reader of files that others hand over may do two things: give content that a second reader agrees with, or refuse
with one line of this program's own, in little time and memory. `judged` holds it to that; the tests compare.

`make fuzz` tries more cases, drawn anew each time. The smallest case that fails is printed with a line
(`@reproduce_failure`) that tries it again.
"""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings

from gpc_dist.errors import MachineError, UserError

T = TypeVar("T")

_ASKED = os.environ.get("GPC_DIST_FUZZ_EXAMPLES")

settings.register_profile(
    "fuzz",
    max_examples=int(_ASKED or 20),
    derandomize=not _ASKED,
    print_blob=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
FUZZ = settings.get_profile("fuzz")
"""Decorates a test, above `@given`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


MOST_MIB = 256
MOST_CPU_S = 3.0
"""A second for the reader, on machines of all kinds. What it imports is not its own: let it read something first."""


def judged(read: Callable[[], T], listed: bool = False) -> T | UserError | MachineError:
    """What a reader gives, or the error of this program that it raises.

    Args:
        listed: it may say a line for each thing that is wrong.

    Raises:
        AssertionError: it raised something else, said more than a line, or took more memory or time than it may.
    """
    memory, begun_s = _Memory(), time.process_time()
    found: T | UserError | MachineError
    try:
        found = read()
    except (UserError, MachineError) as error:
        found = error
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}, not an error of this program: {error}") from error
    finally:
        used_s, used_mib = time.process_time() - begun_s, memory.used_mib()
    assert used_mib < MOST_MIB, f"it took {used_mib:.0f} MiB"
    assert used_s < MOST_CPU_S, f"it took {used_s:.1f} s"
    if isinstance(found, UserError | MachineError):
        said = str(found)
        assert said.strip(), "it refused without a word"
        assert listed or not set("\r\n") & set(said), f"it said more than a line: {said}"
    return found


class _Memory:
    """Measures by how much the memory of this process grows at most.

    On Linux, all of it; elsewhere, what Python allocates, and ten times as slowly.
    """

    _FORGET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def __init__(self) -> None:
        try:
            self._FORGET.write_text("5")  # the highest so far
        except OSError:
            self._before_mib = None
            tracemalloc.start()
        else:
            self._before_mib = self._highest_mib()

    def used_mib(self) -> float:
        if self._before_mib is not None:
            return self._highest_mib() - self._before_mib
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest / 2**20

    def _highest_mib(self) -> float:
        lines = self._STATUS.read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
