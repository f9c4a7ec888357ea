"""One run in a lane of an encoder: its examples, its progress, and the files that it writes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpc_dist import files
from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.store import save_adapter
from gpc_dist.config import Config, warmup_steps
from gpc_dist.distributed import checkpoint, deepspeed_config
from gpc_dist.distributed.checkpoint import Checkpoint
from gpc_dist.distributed.optimizer import schedule_factor
from gpc_dist.errors import UserError
from gpc_dist.runs.folder import RunFolder
from gpc_dist.runs.metrics import MetricLog
from gpc_dist.tasks import Task
from gpc_dist.training.evaluation import Evaluation
from gpc_dist.training.losses import class_weights
from gpc_dist.training.session import Session, Split, plan_of
from gpc_dist.training.state import Position, restore_state, save_state
from gpc_dist.training.step import Done, LaneExamples, optimizer_of


@dataclass
class Speed:
    """Time, examples and tokens of this process's steps, without evaluation and saving."""

    step_s: list[float] = field(default_factory=list)
    examples: int = 0
    tokens: int = 0
    """Text tokens without padding."""
    padded_tokens: int = 0
    """Text tokens with every row padded to the step's longest; ranks and micro-batches pad less."""
    first_step_at_s: float | None = None
    """Unix time at which the first step was done."""

    def count(self, split: Split, indices: np.ndarray, seconds: float) -> None:
        """Add a step. The first one is left out, because it includes warm-up."""
        if self.first_step_at_s is None:
            self.first_step_at_s = time.time()
            return
        encoded = split.encoded
        rows = [r for i in indices for r in range(*encoded.example_starts[i : i + 2])]
        lengths = encoded.lengths[rows]
        self.step_s.append(seconds)
        self.examples += len(indices)
        self.tokens += int(lengths.sum())
        self.padded_tokens += int(len(lengths) * lengths.max())

    @property
    def total_s(self) -> float:
        return sum(self.step_s)

    def figures(self) -> dict[str, float | None]:
        """Return speeds and padding for `result.json` and the metrics log; None before the second step."""
        total_s = self.total_s
        return {
            "samples_per_s": self.examples / total_s if total_s else None,
            "tokens_per_s": self.tokens / total_s if total_s else None,
            "padding_pct": 100 * (1 - self.tokens / self.padded_tokens) if self.padded_tokens else None,
            "step_ms": 1000 * statistics.median(self.step_s) if self.step_s else None,
        }


class Run:
    """One run in a lane of a session's encoder. Every rank has a copy, and all copies make the same steps.

    Rank 0 writes the metrics log, the best adapter and the checkpoints; all ranks take part in saving a checkpoint.

    Args:
        name: of the run, in events.
        session: the run's own: other runs may share its encoder, see `Session.of`.
        folder: the run's folder, prepared by `record.open_folder`.
        adapter: the adapter to train, see `Session.new_adapter`.
        saved: checkpoint to resume from.
        filled_s: seconds that computing text states for this run took, see `Session.text_states_s`.
        heard: see `Pack.add`.

    Raises:
        UserError: the checkpoint was made with other weights of the encoder.
        AlteredError: see `Integrity.check`.
    """

    def __init__(
        self,
        name: str,
        session: Session,
        folder: RunFolder,
        *,
        adapter: Adapter,
        training: Split,
        validation: Split,
        saved: Checkpoint | None = None,
        filled_s: float = 0.0,
        heard: int | None = None,
    ):
        config = session.config
        settings = config.train
        self.name, self.session, self.config, self.folder = name, session, config, folder
        self.adapter, self.training, self.validation = adapter, training, validation
        self.plan, self.total = plan_of(config, training.encoded)
        self.optimizer = optimizer_of(self.adapter, session, config)
        encoder = session.base.identity
        fresh = Position(origin=adapter.origin)
        self.position = restore_state(saved, encoder, self.optimizer) if saved else fresh
        adapter.origin = self.position.origin
        evaluated_step = self.position.evaluated_step
        self.unheard = heard is not None and heard < evaluated_step == self.position.step
        """Whether an event of the last evaluation is due: it was lost before somebody heard of it."""
        session.integrity.check(self.optimizer, folder.checkpoints)
        if (
            saved and session.world.is_main
        ):  # a save that was cut off may have left more, and this run nothing to save
            checkpoint.prune(folder.checkpoints, settings.keep_last, self.position.best_step)
        targets = training.encoded.targets
        assert targets is not None
        weights = class_weights(settings, targets, session.task.outputs)
        self._class_weights = None if weights is None else weights.to(session.world.device)
        self.speed = Speed()
        self.started_s, self.filled_s = time.time(), filled_s
        self.failure = ""
        """Why the run failed; empty if it has not."""
        self._nonfinite = 0
        self._batches = self.plan.batches(self.position.step)
        self._next: LaneExamples | None = None
        self._log: MetricLog | None = None
        if session.world.is_main:
            if deepspeed_config.used(config, session.world.size):
                files.write_json(folder.ds_config, session.ds_config)
            else:
                folder.ds_config.unlink(missing_ok=True)  # of an earlier part of the run, at another stage
            self._log = MetricLog(folder.metrics)
            self._log.truncate_after(self.position.step)

    @property
    def over(self) -> bool:
        """Whether all steps are done, or early stopping has ended the run."""
        return self.position.step >= self.total or self.position.ended

    @property
    def complete(self) -> bool:
        """Whether the run is over and its final state is evaluated."""
        return self.over and not self.evaluation_due

    @property
    def evaluation_due(self) -> bool:
        """Whether the current state must be evaluated and has not been yet."""
        step, every = self.position.step, self.config.train.eval_every
        periodic = self.plan.locate(step)[1] == 0 if every is None else step % every == 0
        return step > self.position.evaluated_step and (step == self.total or periodic)

    @property
    def next_examples(self) -> LaneExamples:
        """The examples of the next step; they stay the same until `begin_step`."""
        if self._next is None:
            _, indices = next(self._batches)
            kind = self.session.task.kind
            self._next = LaneExamples(self.adapter, self.training, indices, kind, self._class_weights)
        return self._next

    def begin_step(self) -> None:
        """Consume `next_examples` and set the learning rates of the step."""
        self._next = None
        warmup = warmup_steps(self.config.train, self.total)
        schedule = self.config.train.schedule
        self.optimizer.set_factor(schedule_factor(schedule, self.position.step, warmup, self.total))

    def finish_step(self, examples: LaneExamples, done: Done, step_s: float) -> dict[str, float] | None:
        """Record a step that was made; returns its metrics if they were logged.

        Raises:
            UserError: the loss was not finite for `train.nonfinite_patience` steps in a row.
        """
        settings, position = self.config.train, self.position
        epoch = self.plan.locate(position.step)[0]
        position.step += 1
        self.speed.count(self.training, examples.indices, step_s)
        self._nonfinite = 0 if done.finite else self._nonfinite + 1
        if self._nonfinite >= settings.nonfinite_patience:
            raise UserError(
                f"the loss was not finite (nan or inf) for {self._nonfinite} steps up to step {position.step}: lower "
                "train.lr, use a longer train.warmup, or set engine.dtype fp32"
            )
        last = position.step == self.total
        if not (position.step % settings.log_every == 0 or last or not done.finite):
            return None
        speed = self.speed.figures()
        figures: dict[str, float] = {
            "train/loss": done.loss,
            "train/grad_norm": done.norm,
            "train/lr_factor": self.optimizer.factor,
            "train/epoch": epoch,
            "train/tokens_per_s": speed["tokens_per_s"] or 0.0,
            "train/samples_per_s": speed["samples_per_s"] or 0.0,
            "train/progress_pct": 100 * position.step / self.total,
        }
        self._write(figures)
        return figures

    def finish_evaluation(self, evaluation: Evaluation) -> None:
        """Save the adapter if it is the best so far; otherwise end the run if `train.patience` is used up.

        Raises:
            UserError: see `_check_worth_keeping`.
        """
        self._check_worth_keeping()
        task, position, patience = self.session.task, self.position, self.config.train.patience
        metrics = evaluation.metrics
        position.last, position.evaluated_step = metrics, position.step
        value, best = metrics[task.main_metric], position.best.get(task.main_metric)
        if best is None or (value > best if task.greater_is_better else value < best):
            position.best, position.best_confusion = metrics, evaluation.confusion
            position.best_step, position.stale = position.step, 0
            self._save_adapter()
        else:
            position.stale += 1
            position.ended = patience is not None and position.stale >= patience
        self._write({f"val/{name}": metric for name, metric in metrics.items()})

    def _save_adapter(self) -> None:
        """Write the adapter's folder; every rank must call it."""
        weights = self.optimizer.weights()
        if self.session.world.is_main:
            card = _task_card(self.config, self.session.task)
            save_adapter(self.folder.adapter, self.adapter, self.session.base.identity, card, weights)
        else:
            for _ in weights.values:  # gathering one is a collective
                pass

    def save_due(self, evaluated: bool) -> bool:
        """Whether to save the state after this step; `evaluated` says whether the step was evaluated."""
        every = self.config.train.save_every
        return self.over or (evaluated if every is None else self.position.step % every == 0)

    def save(self) -> None:
        """Save the state as a checkpoint; every rank must call it.

        Raises:
            UserError: see `_check_worth_keeping`.
        """
        self._check_worth_keeping()
        if self._log:
            self._log.sync()
        encoder = self.session.base.identity
        save_state(self.folder.checkpoints, self.config, encoder, self.optimizer, self.position)
        self._check_present()  # a folder that was moved meanwhile does not have it

    def _check_worth_keeping(self) -> None:
        """Check that what is to be written now is right, and will be found.

        Raises:
            AlteredError: see `Integrity.check`; on every rank.
            MachineError: the run's folder is gone; on rank 0.
        """
        self.session.integrity.check(self.optimizer, self.folder.checkpoints)
        self._check_present()

    def _check_present(self) -> None:
        if self.session.world.is_main:
            self.folder.check_present()

    def close(self) -> None:
        """Close the metrics log."""
        if self._log:
            self._log.close()

    def _write(self, figures: dict[str, float]) -> None:
        if self._log:
            self._log.append(self.position.step, figures)


def _task_card(config: Config, task: Task) -> dict[str, Any]:
    """Return the `task` entry of an adapter's card: enough to evaluate and predict without the run's folder."""
    values = config.dump()
    if config.task.text or config.task.choices:
        # a table's labels must not depend on finding its training split again
        values["task"]["labels"] = list(task.labels) or None
    return {"task": values["task"], "data": values["data"]}
