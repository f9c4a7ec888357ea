"""Which part of a run MLflow already holds (`tracking.json`)."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field

from gpc_dist import files
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import RunFolder
from gpc_dist.typed import read_as


@dataclass
class ExportState:
    """Which part of a folder MLflow holds. Only the holder of the tracking lock writes it."""

    uri: str | None = None
    """Tracking store that this state describes, without credentials."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tag `gpc.key` of the run: finds the run if the answer to its creation was lost."""
    experiment_id: str | None = None
    run_id: str | None = None
    state: str | None = None
    """Last state of the run that was sent to MLflow."""
    steps: dict[str, int] = field(default_factory=dict)
    """Metric -> last step sent. MLflow cannot delete a value, so of the lines that a resumed run writes
    again only later steps are sent."""
    sent: dict[str, str] = field(default_factory=dict)
    """File -> its version that MLflow holds."""
    model_id: str | None = None
    """The adapter as an MLflow model: load it from `models:/<model_id>`."""
    error: str | None = None
    """Why the last attempt failed; None if it succeeded."""

    @property
    def complete(self) -> bool:
        """Whether MLflow holds the whole run: it has ended, and everything was sent."""
        return self.error is None and self.state not in (None, "running")

    @classmethod
    def load(cls, folder: RunFolder) -> ExportState:
        """The state in a folder; a new one if there is none.

        Raises:
            UserError: `tracking.json` is broken.
        """
        return read_as(cls, folder.tracking) or cls()

    @classmethod
    def peek(cls, folder: RunFolder) -> ExportState:
        """Like `load`, for those to whom it is only news: where it cannot be read, `error` says why."""
        try:
            return cls.load(folder)
        except (UserError, OSError) as error:
            return cls(error=str(error))

    def save(self, folder: RunFolder) -> None:
        files.write_json(folder.tracking, asdict(self))
