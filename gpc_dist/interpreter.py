"""Processes of the interpreter that runs this one, which find the same modules, wherever they are started.

Python puts the current folder first on its module path for `python -m` and `python -c`. It is the user's: a
`datasets.py` or a `random.py` there would take the place of a package.
"""

# Nothing else may be imported here: it would come from that folder. These two are part of the interpreter.
import os
import sys

_SAFE = "PYTHONSAFEPATH"
"""Environment variable with which Python leaves the current folder off its path."""


def python(module: str, *words: str) -> list[str]:
    """The command line that runs a module as `python -m` does, without the current folder on its path."""
    return [sys.executable, "-P", "-m", module, *words]


def leave_current_folder() -> None:
    """Take the current folder off the path of this process, which `python -m` started; before other imports."""
    if sys.flags.safe_path:
        return
    here = sys.path.pop(0)
    if os.path.realpath(here) == os.path.dirname(os.path.dirname(os.path.realpath(__file__))):
        # a checkout that may not be installed: those that this process starts find it too
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))


def protect_children() -> None:
    """Let processes that libraries start (multiprocessing, Ray, compilers) leave the current folder off their path."""
    os.environ[_SAFE] = "1"
