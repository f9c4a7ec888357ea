"""What the other tests rely on: processes that are new although they start at once, and runs that stand still."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import losses
from tests.holds import Hold
from tests.processes import call_on_ranks, start, start_call

pytestmark = pytest.mark.slow


def describe(file: Path) -> int:
    print("described")
    file.write_text(json.dumps([os.getpid(), "deepspeed" in sys.modules]))
    return 7


def test_a_process_is_new_and_has_imported_what_takes_long(tmp_path: Path) -> None:
    numbers = set()
    for name in ("one", "two"):
        started = start_call(describe, tmp_path / name)
        assert started.wait() == 7
        assert started.stdout == "described\n"
        number, has_deepspeed = json.loads((tmp_path / name).read_text())
        assert (number, has_deepspeed) == (started.pid, True)
        numbers.add(number)
    assert len(numbers) == 2


def fail_on_the_second() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("of the second rank")
    dist.barrier()


def test_a_rank_that_fails_ends_the_others_and_is_heard() -> None:
    done = call_on_ranks(2, fail_on_the_second)
    assert done.returncode == 1
    assert "ValueError: of the second rank" in done.stderr


def test_a_held_run_stands_still_until_it_is_let_go(tiny_recipe: Path, tmp_path: Path) -> None:
    holds = [Hold(tmp_path / "run", step) for step in (3, 5)]
    started = start("train", tiny_recipe, "--run.dir", tmp_path / "run")
    for hold, step in zip(holds, (3, 5), strict=True):
        hold.wait()
        assert max(losses(tmp_path / "run")) == step
        hold.release()
    assert started.wait() == 0
    assert max(losses(tmp_path / "run")) == 12
