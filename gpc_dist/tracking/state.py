"""What of a run MLflow already holds (`tracking.json`)."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field, fields

from gpc_dist import files
from gpc_dist.runs.folder import RunFolder


@dataclass
class ExportState:
    """How much of a folder MLflow holds. Written by the holder of the tracking lock only."""

    uri: str | None = None
    """Tracking store the rest of this state is about, without credentials."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tag `gpc.key` of the run: finds it again when its creation was answered too late."""
    experiment_id: str | None = None
    run_id: str | None = None
    state: str | None = None
    """Last state of the run told to MLflow."""
    steps: dict[str, int] = field(default_factory=dict)
    """Metric -> last step recorded. MLflow cannot take a value back, so of the lines that a resumed
    run writes again only the steps beyond are sent."""
    sent: dict[str, str] = field(default_factory=dict)
    """File -> the version of it that MLflow holds."""
    model_id: str | None = None
    """The adapter as an MLflow model: load it from `models:/<model_id>`."""
    error: str | None = None
    """Why the last attempt failed; none after one that went well."""

    @property
    def complete(self) -> bool:
        """Whether MLflow holds the whole run: it is over, and nothing is left to send."""
        return self.error is None and self.state not in (None, "running")

    @classmethod
    def load(cls, folder: RunFolder) -> ExportState:
        known = {f.name for f in fields(cls)}
        values = files.read_json(folder.tracking)
        return cls(**{name: value for name, value in values.items() if name in known})

    def save(self, folder: RunFolder) -> None:
        files.write_json(folder.tracking, asdict(self))
