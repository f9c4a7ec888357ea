"""A page as a real browser shows it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def find_browser() -> str:
    """The Chromium of this machine; skips the test where there is none, and fails it under CI."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium: the page was not seen by a browser")
        pytest.skip("needs Chromium")
    return found


def rendered(address: str, picture: Path, *options: str, size: tuple[int, int] = (1280, 2400)) -> str:
    """The page's elements once its scripts have run; a picture of it is written.

    Args:
        options: of Chromium.
    """
    width, height = size
    command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={picture.parent / 'profile'}", f"--window-size={width},{height}", *options]
    command += [f"--screenshot={picture}", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
