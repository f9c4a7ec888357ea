"""`gpc-dist train`: one run, from its configuration to `result.json`."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from gpc_dist import batch, files, logs
from gpc_dist.adapter.lane import Adapter
from gpc_dist.adapter.transfer import Source
from gpc_dist.config import Config
from gpc_dist.distributed.checkpoint import Checkpoint
from gpc_dist.distributed.memory import peak_memory_mib
from gpc_dist.distributed.world import World, explained, init_world
from gpc_dist.errors import EXIT_DONE, EXIT_STOPPED, UserError
from gpc_dist.planner.recipe import planned
from gpc_dist.runs.folder import RunFolder, State
from gpc_dist.runs.metrics import MetricLog
from gpc_dist.runs.telemetry import GpuTelemetry, Write
from gpc_dist.shown import shown
from gpc_dist.tasks import Example, Task, make_task, read_part, selection_part
from gpc_dist.tracking import process as exporter_process
from gpc_dist.tracking.credentials import check_server
from gpc_dist.tracking.process import ExporterProcess
from gpc_dist.tracking.store import tracking_uri, ui_command
from gpc_dist.training.losses import check_class_weights
from gpc_dist.training.progress import Progress
from gpc_dist.training.record import open_folder, run_result
from gpc_dist.training.run import Run
from gpc_dist.training.saved_adapter import source_of
from gpc_dist.training.session import Session, check_input, load_base, open_session, seed_everything
from gpc_dist.training.state import saved_state
from gpc_dist.training.stop import StopRequest
from gpc_dist.training.trainer import Trainer

log = logging.getLogger(__name__)

_RUN_ID_TIMEOUT_S = 30.0
"""Longest wait for the MLflow run id at the end of a run; a server that is down must not block the run."""

_STOPPED_TIMEOUT_S = 5.0
"""Longest wait of a stopped run for MLflow: a batch system's grace period is short, and the resumed run records the
rest."""


@dataclass(frozen=True)
class _Inputs:
    """What a run begins with, read and checked before anything is written into its folder."""

    config: Config
    world: World
    folder: RunFolder
    task: Task
    training: list[Example]
    validation: list[Example]
    saved: Checkpoint | None
    source: Source | None
    """The adapter to start from; None for a run that resumes."""
    replaces: bool
    """Whether the folder has an earlier run, whose files are removed: only once this one's encoder is loaded, since a
    path that is mistyped must not cost an adapter."""


@dataclass(frozen=True)
class _Outcome:
    """Result of training."""

    step: int
    stopped_by: str | None
    """The signal that requested the stop; None if the run is complete."""
    idle: bool
    """Nothing was done but the step in which the request was seen."""
    result: dict[str, Any]
    """Contents of `result.json`; empty on ranks above 0."""


def run_training(config: Config, started_s: float, argv: Sequence[str], stop: StopRequest) -> int:
    """Train as configured, as one rank of the job; returns the exit code.

    Args:
        started_s: unix time at which the user's command began.
        argv: that command, for the run's record.
        stop: a request made before training begins takes effect at the first step or evaluation.
    """
    world = init_world(config.engine)
    held = ExitStack()
    try:
        with explained(config.engine):
            inputs = _read_inputs(config, world, held)
            record = _Record(inputs, argv)
            if not inputs.replaces:
                record.open()
            try:
                with explained(config.engine):  # what is recorded, too
                    session, adapter = _load(inputs)
                    if inputs.replaces:
                        record.open()
                    outcome = _train(inputs, session, adapter, started_s, stop, held)
            except BaseException as error:
                record.fail(error)
                raise
            record.end(outcome)
    finally:
        held.close()
        world.leave()
    # only the main rank returns the code of a stop: `srun` ends all ranks when one of them ends with an error
    return EXIT_STOPPED if outcome.stopped_by and world.is_main else EXIT_DONE


def _read_inputs(config: Config, world: World, held: ExitStack) -> _Inputs:
    """Read what a run begins with, and hold its folder until `held` is closed."""
    if config.tracking.enabled:
        check_server(tracking_uri(config.tracking.uri, config.run.folder))
    task = make_task(config.task, config.data)
    check_class_weights(config.train, task)
    training = read_part(task, config.data, "train", config.run.seed)
    validation = read_part(task, config.data, selection_part(config.data))
    config = planned(config, world, task.outputs)
    check_input(config, world)
    folder = RunFolder(config.run.folder)
    world.on_main(lambda: held.enter_context(folder.hold()))
    saved = saved_state(folder.checkpoints, config, world)
    source = source_of(config, world) if saved is None else None
    replaces = world.from_main(not config.train.resume and folder.status.exists())
    return _Inputs(
        config=config,
        world=world,
        folder=folder,
        task=task,
        training=training,
        validation=validation,
        saved=saved,
        source=source,
        replaces=replaces,
    )


def _load(inputs: _Inputs) -> tuple[Session, Adapter]:
    """Load and place the encoder, and make the adapter."""
    config, world = inputs.config, inputs.world
    if not world.is_main:
        logs.log_rank_to(inputs.folder.rank_log(world.rank))
    log.debug("one of %d ranks, on %s of %s", world.size, world.device, socket.gethostname())
    seed_everything(config.run.seed)
    session = open_session(config, world, inputs.task, load_base(config, world))
    log.debug("encoder in place after %.1f s", session.load_s)
    return session, session.new_adapter(config, inputs.source)


def _train(
    inputs: _Inputs, session: Session, adapter: Adapter, started_s: float, stop: StopRequest, held: ExitStack
) -> _Outcome:
    """Train until the run is complete or a stop is requested. From then on signals are requests until `held` is closed:
    one that comes when all is trained must not end what records it."""
    config, world, folder = inputs.config, inputs.world, inputs.folder
    run = Run(
        config.run.name,
        session,
        folder,
        adapter=adapter,
        training=session.split(inputs.training, run=config),
        validation=session.split(inputs.validation),
        saved=inputs.saved,
        filled_s=session.text_states_s,
    )
    session.release_lower_layers()
    begun, evaluated = run.position.step, run.position.evaluated_step
    held.enter_context(stop)
    with GpuTelemetry(partial(_telemetry_log, folder), enabled=world.local_rank == 0) as telemetry:
        stopped = _advance(run, stop)
    run.close()
    energy = world.gather(telemetry.energy_j)
    memory = world.gather(peak_memory_mib(world.device))
    stopped_by = (world.from_main(stop.signal) or "a signal on another rank") if stopped else None
    idle = run.position.step <= begun + 1 and run.position.evaluated_step == evaluated
    if memory is None or energy is None:  # not the main rank
        return _Outcome(run.position.step, stopped_by, idle, {})
    spent = [joules for joules in energy if joules is not None]
    first = run.speed.first_step_at_s
    measured = {
        "peak_memory_mib": memory,
        "energy_j": sum(spent) if spent else None,
        "first_step_s": None if first is None else first - started_s,
        "wall_s": time.time() - started_s,
    }
    return _Outcome(run.position.step, stopped_by, idle, run_result(run) | measured)


def _advance(run: Run, stop: StopRequest) -> bool:
    """Train a run and show its progress, until it is complete or stopped; returns whether it was stopped.

    Raises:
        UserError: the loss stays non-finite.
    """
    main = run.session.task.main_metric
    with Progress("step", run.total, run.position.step, run.session.world.is_main) as progress:

        def on_step(_: Run, figures: dict[str, float] | None) -> None:
            if figures:
                shown = {"loss": figures["train/loss"], "tokens/s": figures["train/tokens_per_s"]}
                progress.show(run.position.step, shown)
            progress.step()

        trainer = Trainer(lambda: stop.signal is not None, on_step)
        while not trainer.stopped:
            for event in trainer.advance([run]):
                if event.failure:
                    raise UserError(event.failure)
                progress.show(event.step, {f"val/{main}": event.metrics[main]})
                if event.over:
                    return False
    return True


@contextmanager
def _telemetry_log(folder: RunFolder) -> Iterator[Write]:
    with MetricLog(folder.host_telemetry()) as log:
        yield log.append


class _Record:
    """The run's record: files in its folder and, if tracking is enabled, the process that exports them to MLflow.

    All ranks have one; the main rank writes.
    """

    def __init__(self, inputs: _Inputs, argv: Sequence[str]) -> None:
        self._inputs = inputs
        self._argv = argv
        self._opened = False
        self._exporter: ExporterProcess | None = None

    def open(self) -> None:
        """Prepare the folder and start the export, on the main rank. The others wait: what they wrote first would make
        the folder a stranger's.

        Raises:
            UserError: see `open_folder`.
        """
        inputs, world = self._inputs, self._inputs.world
        folder, config = inputs.folder, inputs.config
        world.on_main(
            lambda: open_folder(folder, config, self._argv, inputs.task, inputs.training, inputs.validation)
        )
        if world.is_main and config.tracking.enabled:
            self._exporter = exporter_process.start(folder.path)
        self._opened = world.is_main

    def fail(self, error: BaseException) -> None:
        """Write why the run ended; nothing if it was not opened: what is there is an earlier run's."""
        if not self._opened:
            return
        state: State = "failed" if isinstance(error, Exception) else "killed"
        if self._inputs.folder.present:
            self._inputs.folder.write_status(state, str(error) or type(error).__name__)
        if self._exporter:
            self._exporter.finish(self._inputs.config.tracking.finish_timeout_s)

    def end(self, outcome: _Outcome) -> None:
        """Write the end of the run to its folder, finish the export to MLflow, and print the result."""
        if not self._opened:
            return
        config, folder, exporter = self._inputs.config, self._inputs.folder, self._exporter
        folder.check_present()
        timeout_s: float = config.tracking.finish_timeout_s
        if outcome.stopped_by is None:
            run_id = exporter.wait_for_run_id(_RUN_ID_TIMEOUT_S) if exporter else None
            files.write_json(folder.result, outcome.result | {"mlflow_run_id": run_id})
            folder.write_status("finished")
            _print_result(outcome.result)
        else:
            folder.write_status("stopped", f"{outcome.stopped_by} at step {outcome.step}")
            timeout_s = min(timeout_s, _STOPPED_TIMEOUT_S)
            if outcome.idle:
                batch.note_idle()
            log.info(
                "stopped by %s; state saved at step %d: the same command goes on from there",
                outcome.stopped_by,
                outcome.step,
            )
        if exporter:
            exporter.finish(timeout_s)
        print(f"run folder: {folder}")
        if config.tracking.enabled:
            print(f"compare runs: {ui_command(tracking_uri(config.tracking.uri, folder.path))}")


def _print_result(result: dict[str, Any]) -> None:
    name = result["main_metric"]
    best, baseline = result["metrics"]["best"].get(name), result["majority_baseline"][name]
    task = shown(result["task"])
    print(
        f"{task} with {result['method']}: best {name} {best:.4f} at step "
        f"{result['metrics']['best_step']} (majority baseline {baseline:.4f}), "
        f"{result['trainable_parameters']:,} parameters trained, {result['frozen_parameters']:,} frozen"
    )
