"""The adapter as an MLflow model: what `mlflow models serve` and `mlflow.pyfunc.load_model` load."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Any

from gpc_dist.errors import UserError
from gpc_dist.inference.adapters import Predictor
from gpc_dist.schema import read_overrides

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = "GPC_DIST_SERVE"
"""Environment variable with settings for the served model, as on a command line: `--engine.zero_stage 3 ...`."""


class TextModel:
    """Predicts a table of texts; `_load_pyfunc` makes it."""

    def __init__(self, predictor: Predictor):
        self._predictor = predictor

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Predict a table.

        Args:
            model_input: a DataFrame with the task's text columns; or, for a task that reads one text
                column, a list of strings or a DataFrame with one column of any name.

        Returns:
            A DataFrame with the column `prediction` and, unless the task is a regression, one
            `probability_<label>` column for each label (or `probabilities` for a choice).
        """
        import pandas as pd

        task = self._predictor.session.task
        table = model_input if isinstance(model_input, pd.DataFrame) else pd.DataFrame(model_input)
        columns = task.columns
        if len(columns) == 1 and len(table.columns) == 1:
            table = table.set_axis(list(columns), axis=1)
        if missing := [name for name in columns if name not in table.columns]:
            raise UserError(
                f"the input lacks the column(s) {', '.join(missing)}: task {task.name} reads "
                f"{', '.join(columns)}"
            )
        predictions = self._predictor.predict(table.to_dict("records"))
        result = pd.DataFrame({"prediction": [p.value for p in predictions]})
        if task.kind == "classification":
            for label in task.labels:
                result[f"probability_{label}"] = [p.probabilities[label] for p in predictions]  # type: ignore[index]
        elif task.kind == "choice":
            result["probabilities"] = [list((p.probabilities or {}).values()) for p in predictions]
        return result


def _load_pyfunc(path: str) -> TextModel:
    return TextModel(Predictor(path, read_overrides(shlex.split(os.environ.get(SETTINGS, "")))))
