"""What sbatch will make of a submission: the options of the script, the environment and the command line together."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpc_dist.cluster.slurm import numbers, seconds
from gpc_dist.errors import UserError

_VARIABLES = {"SBATCH_TIMELIMIT": "--time", "SBATCH_SIGNAL": "--signal", "SBATCH_ARRAY_INX": "--array"}
"""Variables that sbatch takes for options."""
_EARLY_S = 60
"""Slurm sends a signal up to so many seconds ahead of its time."""
_DEFAULT_WARNING_S = 60
"""Of a `--signal` without seconds."""


@dataclass(frozen=True)
class Asked:
    """Options as sbatch takes them; None for one that is not given."""

    time: str | None
    signal: str | None
    array: str | None


def asked(script: Path, options: Sequence[str]) -> Asked:
    """Options of a submission. Of one that is given several times the last is taken, as sbatch does: those of the
    script come first, then those of the environment, then `options`.

    Raises:
        UserError: an option lacks its value.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    for names in (("-t", "--time"), ("--signal",), ("-a", "--array")):
        parser.add_argument(*names)
    lines = script.read_text(encoding="utf-8").splitlines()
    words = [
        word
        for line in lines
        if line.startswith("#SBATCH ")
        for word in shlex.split(line, comments=False)[1:]
    ]
    words += [f"{option}={os.environ[name]}" for name, option in _VARIABLES.items() if name in os.environ]
    try:
        found, _ = parser.parse_known_args([*words, *options])
    except argparse.ArgumentError as error:
        raise UserError(f"--sbatch: {error}") from None
    return Asked(found.time, found.signal, found.array)


def check_warning(given: Asked) -> None:
    """Refuse a time limit within which the job would be told to stop at once, in every start.

    Raises:
        UserError: the warning before the limit takes all of it.
    """
    limit_s = seconds(given.time) if given.time else None
    if not limit_s or given.signal is None:  # to Slurm, 0 is no limit
        return
    match = re.search(r"@(\d+)$", given.signal)
    warning_s = int(match[1]) if match else _DEFAULT_WARNING_S
    if limit_s <= warning_s + _EARLY_S:
        least = (warning_s + _EARLY_S) // 60 + 1
        raise UserError(
            f"--time {given.time} ({limit_s} s) leaves no time to train: the job is told to stop {warning_s} s ahead "
            f"of its limit, and Slurm may say so {_EARLY_S} s earlier: give --time {least} or more, or a shorter "
            "warning, such as --sbatch=--signal=B:USR2@30"
        )


def check_array(given: Asked, runs: int | None) -> str:
    """The throttle of the array that is asked for, such as `%2`; empty without one.

    Args:
        runs: of the submission's own array; None for a submission without one.

    Raises:
        UserError: the submission has no array, or one of another size.
    """
    if given.array is None:
        return ""
    if runs is None:
        raise UserError(
            f"an array of sbatch's own (--array={given.array}) would run every task in the same folder: give --seeds "
            "LIST or --array FILE, whose runs have folders of their own"
        )
    tasks, sign, most = given.array.partition("%")
    if (found := numbers(tasks)) is None or len(found) != runs:
        raise UserError(
            f"--sbatch=--array={given.array} is not for {runs} runs: give --sbatch=--array=0-{runs - 1}{sign}{most}"
        )
    return sign + most
