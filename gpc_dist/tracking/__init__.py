"""Export to MLflow, while the run folder (`gpc_dist.runs`) stays the single source of truth.

The trainer writes the folder and never calls MLflow. A separate process (`process`) exports the folder during the run:
so MLflow can neither stop nor slow a run, each run has one writer, and no value is recorded twice. `sync` runs the
same exporters later, for nodes without network and for tracking servers that were down.

`exporter` has the base class of the exporters of runs, trials and searches. A search has one exporter process for
itself and all of its trials.
"""
