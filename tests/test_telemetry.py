"""No process of the program lets a library tell its maker that it is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import gpc_dist
from tests.conftest import ROOT

ASKED = """
import gpc_dist.interpreter  # any module does
import json
import huggingface_hub.constants, mlflow.telemetry.utils
from ray._common.usage import usage_lib
print(json.dumps([
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY,
    mlflow.telemetry.utils.is_telemetry_disabled(),
    not usage_lib.usage_stats_enabled(),
]))
"""


@pytest.mark.slow
def test_libraries_are_told_before_they_are_imported() -> None:
    # in tests MLflow is silent by itself
    names = {*gpc_dist._NO_TELEMETRY, "PYTEST_CURRENT_TEST", "PYTEST_VERSION", "CI"}
    unset = {name: value for name, value in os.environ.items() if name not in names}
    words = [sys.executable, "-P", "-c", ASKED]
    environment = unset | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, True, True]


def test_who_wants_it_can_have_it() -> None:
    code = "import os, gpc_dist; print(os.environ['DO_NOT_TRACK'], os.environ['RAY_USAGE_STATS_ENABLED'])"
    given = os.environ | {"RAY_USAGE_STATS_ENABLED": "1"}
    given.pop("DO_NOT_TRACK")
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["true", "1"]
