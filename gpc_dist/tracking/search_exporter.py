"""Exports a search to MLflow: one run for the search, and a child run for each trial, all by one process.

The driver of a search calls `start_exporter` and, at the end, `ExporterProcess.finish`; trials do not
start exporters. So a search has one writer, no matter how many trials write their folders at once, and a
SQLite file is enough as the store.

| in the search's folder | in MLflow                                                         |
|------------------------|-------------------------------------------------------------------|
| `search.yaml`          | params of the parent run; artifact                                |
| `facts.json`           | tags and description of the parent; artifact                      |
| `trials/<trial>/`      | a child run each (`trial_exporter`); ten best in the description   |
| `result.json`          | metrics `final/...`, tags `best_trial`, `metric`, `mode`; artifact |
| `status.json`          | the parent's status                                               |
| `search.yaml`          | a tag of the experiment: a view of the trials, best first         |

The best trial of a finished search becomes a version of the registered model that `register_as` in
`search.yaml` names (by default the search's name; null: none). Trials that have ended and are exported are
not read again; only the times and sizes of their files are checked.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from gpc_dist import files
from gpc_dist.runs.folder import SearchFolder, Status, TrialFolder
from gpc_dist.tracking import model, process, store, translate
from gpc_dist.tracking.exporter import ArtifactError, Exporter
from gpc_dist.tracking.state import ExportState
from gpc_dist.tracking.trial_exporter import BEST, Objective, TrialExporter

_LISTED = 10  # trials in the description
_WHOLE = "whole trial"
_NOTE = "note"
_REGISTERED = "registered"
_VIEW = "view"


def start_exporter(search_dir: Path | str, delay_s: float = 10.0) -> process.ExporterProcess | None:
    """Start the exporter of a search whose `search.yaml` and `status.json` are written.

    Call it once per search, from the driver, which must be the process in `status.json`.

    Args:
        search_dir: the search's folder.
        delay_s: seconds for which the exporter waits while the driver starts.

    Returns:
        See `process.start`.
    """
    return process.spawn(__name__, SearchFolder(search_dir), delay_s)


def view_in_ui(uri: str, state: ExportState) -> str:
    """Where a browser shows the trials of a search as a table, best first; the store as a whole before it has them.

    Args:
        uri: a result of `store.tracking_uri`.
        state: of the search's export.
    """
    if state.experiment_id is None or state.run_id is None or _VIEW not in state.sent:
        return store.ui_command(uri)
    from gpc_dist.private.mlflow import view_address

    return store.ui_page(uri, view_address(state.experiment_id, state.run_id))


class SearchExporter(Exporter):
    """Brings MLflow up to date with a search.

    Args:
        folder: a search's folder with at least `search.yaml`.
        uri: tracking store, also of the trials; that of `search.yaml` when not given.
        loader_module: module that loads an adapter as a model.

    Raises:
        UserError: the folder is not a search's folder.
    """

    def __init__(
        self, folder: SearchFolder, uri: str | None = None, loader_module: str = model.SERVING_MODULE
    ) -> None:
        super().__init__(folder, uri)
        self._search_folder = folder
        self._loader_module = loader_module
        self._trials: dict[str, TrialExporter] = {}  # of trials that still run
        self._whole: dict[str, str] = {}  # trial that has ended -> the version that MLflow holds
        self._failures: dict[str, int] = {}
        self._by_run: dict[str, TrialFolder] = {}
        self._trial_failure: ArtifactError | None = None
        self._note_is_old = True
        self.objective: Objective | None = None

    @property
    def name(self) -> str:
        return str(self._config.get("name") or self._folder.path.name)

    def update(self) -> ExportState:
        """Send what is new in the search and its trials. After an exception, call it again.

        Raises:
            UserError: a file of the search or of a trial is broken.
            mlflow.exceptions.MlflowException: the store cannot be reached or refuses.
        """
        state = super().update()
        # Last: a model registry that refuses must not prevent the export of the search.
        if state.state == "finished":
            self._register()
        return state

    # -- the search itself -----------------------------------------------------------------------

    def _send_content(self, status: Status) -> None:
        if status.state != "running":
            self._search_folder.mark_running_trials("ended with its search")
        self._send_new(self._folder.config, self._send_config)
        self._send_new(self._folder.facts, self._send_facts)
        self.objective = self._find_objective()
        self._send_trials()
        self._send_new(self._folder.result, self._send_result)
        self._send_view()
        if self._note_is_old:
            self._send_note()

    def _run_name(self) -> str:
        return self.name

    def _find_objective(self) -> Objective | None:
        """The objective in `result.json`, or before that exists in `search.yaml`; None if it names no metric."""
        source = files.read_json(self._folder.result) or self._config
        metric = source.get("metric")
        return Objective(metric, source.get("mode") or "max") if metric else None

    def _send_config(self) -> None:
        self._config = self._folder.read_config()
        group = (self._config.get("tracking") or {}).get("group")
        self._send_params(translate.search_params(self._config), {"search": self.name, "group": group})

    def _send_facts(self) -> None:
        super()._send_facts()
        self.state.sent.pop(_NOTE, None)  # the facts' description, without the trials, replaced it
        self._note_is_old = True

    def _send_result(self) -> None:
        result = files.read_json(self._folder.result)
        time_ms = translate.ms(self._folder.result.stat().st_mtime)
        # A resumed search has a new result, maybe with the same number of trials: the step counts results.
        step = 1 + max((self.state.steps.get(f"final/{key}", 0) for key in result), default=0)
        self._send_metrics(
            (f"final/{name}", value, time_ms, step) for name, value in translate.numbers(result)
        )
        self._set_tags({key: result.get(key) for key in ("best_trial", "metric", "mode")})

    def _send_view(self) -> None:
        """Keep a view of the trials: a row for each configuration, the best first, with what was tried as columns. A
        search of so many keys that MLflow would not take it has none."""
        from gpc_dist.private.mlflow import LARGEST_VIEW, view, view_tag

        if self.objective is None:
            return
        spaces = [self._config.get("space") or {}, *(self._config.get("configurations") or [])]
        seeds = self._config.get("seeds") or []
        found = view(
            condition=f"tags.`mlflow.parentRunId` = '{self.run_id}'",
            metrics=[BEST],
            params=[translate.name(key) for key in dict.fromkeys(key for space in spaces for key in space)],
            tags=["decision"],
            order_by=BEST,
            ascending=self.objective.mode == "min",
            group_by="seed_group" if len(seeds) > 1 else None,
        )
        if self.state.sent.get(_VIEW) != found and len(found) <= LARGEST_VIEW:
            self.client.set_experiment_tag(self.experiment_id, view_tag(self.run_id), found)
            self.state.sent[_VIEW] = found
            self._save()

    def _send_note(self) -> None:
        note = translate.note(files.read_json(self._folder.facts), self._folder) + self._best_trials()
        if self.state.sent.get(_NOTE) != note:
            self._set_tags({"mlflow.note.content": note})
            self.state.sent[_NOTE] = note
            self._save()
        self._note_is_old = False

    def _best_trials(self) -> str:
        """A Markdown table of the best trials, which MLflow finds and sorts."""
        if self.objective is None:
            return ""
        order = "ASC" if self.objective.mode == "min" else "DESC"
        runs = self.client.search_runs(
            [self.experiment_id],
            f"tags.`mlflow.parentRunId` = '{self.run_id}'",
            order_by=[f"metrics.`{BEST}` {order}"],
            max_results=_LISTED,
        )
        rows: list[dict[str, Any]] = []
        for run in runs:
            if BEST not in run.data.metrics:  # trials without the metric are last
                break
            folder = self._by_run.get(run.info.run_id)
            trial = files.read_json(folder.trial) if folder else {}
            row = {"run": run.info.run_name, self.objective.metric: f"{run.data.metrics[BEST]:.4g}"}
            rows.append(row | trial.get("settings", {}) | {"decision": trial.get("decision")})
        return f"\nBest trials:\n\n{translate.table(rows)}\n" if rows else ""

    # -- its trials ------------------------------------------------------------------------------

    def _send_trials(self) -> None:
        # By the number of failed exports: a trial that fails delays only trials that failed more often.
        trials = self._search_folder.begun_trials()
        self._trial_failure = None
        for folder in sorted(trials, key=lambda trial: self._failures.get(trial.path.name, 0)):
            name = folder.path.name
            try:
                self._send_trial(folder)
            except ArtifactError as error:
                self._trial_failure = error
            except Exception:
                self._failures[name] = self._failures.get(name, 0) + 1
                self._trials.pop(name, None)  # its state in memory may be the cause
                raise
            self._failures.pop(name, None)

    def _try_artifacts(self, status: Status) -> Exception | None:
        return super()._try_artifacts(status) or self._trial_failure

    def _send_trial(self, folder: TrialFolder) -> None:
        name = folder.path.name
        versions = (files.version(folder.status), files.version(folder.trial))
        seen = " ".join((*versions, str(self.objective), self.run_id))
        if self._whole.get(name) == seen:
            return
        if name not in self._trials:
            before = ExportState.load(folder)
            if before.sent.get(_WHOLE) == seen:  # exported by an earlier process
                self._whole[name] = seen
                self._by_run[str(before.run_id)] = folder
                return
            self._trials[name] = TrialExporter(folder, self, self._loader_module)
        state = self._trials[name].update()
        self._by_run[str(state.run_id)] = folder
        if state.state == "running":
            return
        state.sent[_WHOLE] = seen
        state.save(folder)
        self._whole[name] = seen
        del self._trials[name]
        self._note_is_old = True

    def _register(self) -> None:
        result = files.read_json(self._folder.result)
        name, best = self._config.get("register_as", self.name), result.get("best_trial")
        if name is None or best is None:
            return
        wanted = f"{name} {files.version(self._folder.result)}"
        if self.state.sent.get(_REGISTERED) == wanted:
            return
        folder = self._search_folder.trial(best)
        trial = TrialExporter(folder, self, self._loader_module, best=True).update()
        if trial.model_id is not None:
            keys = ("metric", "mode", "best")
            described = {key: result.get(key) for key in keys} | {"search": self.name, "trial": best}
            version = model.register(self.client, name, trial.model_id, translate.tags(described))
            self._set_tags({"registered_model": f"models:/{name}/{version}"})
        self.state.sent[_REGISTERED] = wanted
        self._save()


def main(search_dir: str, delay_s: float, driver_pid: int) -> int:
    """Export a search until its driver ends, then the rest; return the exit code."""
    os.nice(19)  # lower priority than Ray's workers, which train at 15
    folder = SearchFolder(search_dir)
    return process.follow(folder, partial(SearchExporter, folder), delay_s, driver_pid)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
