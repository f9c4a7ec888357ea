"""The run folder: its layout, the metrics log, facts and GPU telemetry. It is the source of truth about a run."""
