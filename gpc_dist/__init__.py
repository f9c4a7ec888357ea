"""GPC-Dist: tune a Global Prompt Cell on a frozen, sharded pretrained encoder."""

import os

__version__ = "0.1.0"

_NO_TELEMETRY = {
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What keeps libraries from telling their makers that they are used; they look at it when they are imported."""

for _name, _value in _NO_TELEMETRY.items():
    os.environ.setdefault(_name, _value)
