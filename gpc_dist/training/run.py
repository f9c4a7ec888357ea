"""`gpc-dist train`: one run, from its configuration to `result.json`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from gpc_dist import files
from gpc_dist.config import Config
from gpc_dist.distributed.checkpoint import Checkpoint
from gpc_dist.distributed.memory import peak_memory_mib
from gpc_dist.distributed.world import World, init_world, lost_rank
from gpc_dist.errors import EXIT_DONE, EXIT_STOPPED
from gpc_dist.planner.recipe import planned
from gpc_dist.runs.folder import RunFolder
from gpc_dist.runs.metrics import MetricLog
from gpc_dist.runs.telemetry import GpuTelemetry, Write
from gpc_dist.tasks import Example, Task, make_task, read_part, selection_part
from gpc_dist.tracking import process as tracking
from gpc_dist.tracking.store import tracking_uri, ui_command
from gpc_dist.training import loop
from gpc_dist.training.lane_run import LaneRun, Outlet, saved_state
from gpc_dist.training.record import open_folder, run_result
from gpc_dist.training.session import (
    check_input,
    fresh_adapter,
    load_base,
    open_session,
    seed_everything,
)
from gpc_dist.training.stop import StopRequest

_RUN_ID_TIMEOUT_S = 30.0
"""How long the end of a run waits to learn its MLflow run id; a server that is down must not hold it."""

_STOPPED_TIMEOUT_S = 5.0
"""How long a stopped run waits for MLflow: a batch system's grace is short, and a resume records the rest."""


def run_training(config: Config, started_s: float, argv: Sequence[str], stop: StopRequest) -> int:
    """Train as configured, as one rank of the job; returns the exit code.

    Args:
        started_s: unix time at which the user's command began.
        argv: that command, for the record.
        stop: asked for before training begins, it comes after the first step.
    """
    world = init_world(config.engine)
    try:
        return _run(config, world, started_s, argv, stop)
    finally:
        world.leave()


def _run(config: Config, world: World, started_s: float, argv: Sequence[str], stop: StopRequest) -> int:
    task = make_task(config.task, config.data)
    train = read_part(task, config.data, "train", config.run.seed)
    validation = read_part(task, config.data, selection_part(config.data))
    config = planned(config, world, task.outputs)
    folder = RunFolder(config.run.folder)
    saved = saved_state(folder.checkpoints, config)
    check_input(config, world)
    seed_everything(config.run.seed)
    # from here on the folder is this run's: what is wrong with the input has been said
    recording = None
    if world.is_main:
        open_folder(folder, config, argv, task, train, validation)
        if config.tracking.enabled:
            recording = tracking.start(folder.path)
    try:
        outcome, result = _train(config, world, folder, saved, task, train, validation, started_s, stop)
    except BaseException as error:
        lost = lost_rank(error, config.engine)
        if world.is_main:
            reason = str(lost or error) or type(error).__name__
            folder.write_status("failed" if isinstance(error, Exception) else "killed", reason)
            if recording:
                recording.finish(config.tracking.finish_timeout_s)
        if lost:
            raise lost from None
        raise
    if world.is_main:
        patience_s: float = config.tracking.finish_timeout_s
        if outcome.stopped_by is None:
            run_id = recording.wait_for_run_id(_RUN_ID_TIMEOUT_S) if recording else None
            files.write_json(folder.result, result | {"mlflow_run_id": run_id})
            folder.write_status("finished")
            _print_result(result)
        else:
            folder.write_status("stopped", f"{outcome.stopped_by} at step {outcome.position.step}")
            patience_s = min(patience_s, _STOPPED_TIMEOUT_S)
            print(
                f"stopped by {outcome.stopped_by}; state saved at step {outcome.position.step}: the same command "
                "goes on from there",
                file=sys.stderr,
            )
        if recording:
            recording.finish(patience_s)
        _say_where(config, folder)
    # the main rank alone speaks of a stop: `srun` ends all others when one of them ends with an error
    return EXIT_STOPPED if outcome.stopped_by and world.is_main else EXIT_DONE


def _train(
    config: Config,
    world: World,
    folder: RunFolder,
    saved: Checkpoint | None,
    task: Task,
    train: list[Example],
    validation: list[Example],
    started_s: float,
    stop: StopRequest,
) -> tuple[loop.Outcome, dict[str, Any]]:
    """Train, and say what came of it: the contents of `result.json`, on rank 0."""
    base = load_base(config, world)
    adapter = fresh_adapter(config, task, base)
    session = open_session(config, world, task, base, [adapter])
    if world.is_main:
        files.write_json(folder.ds_config, session.ds_config)
    training, evaluation = session.split(train), session.split(validation)
    with ExitStack() as stack:
        log = None
        if world.is_main:
            log = stack.enter_context(MetricLog(folder.metrics))
            log.truncate_after(saved.step if saved else 0)
        sampler = GpuTelemetry(partial(_telemetry_log, folder), enabled=world.local_rank == 0)
        telemetry = stack.enter_context(sampler)
        outlet = Outlet(folder.checkpoints, folder.adapter, log.append if log else None)
        run = LaneRun(session, config, adapter, training, evaluation, outlet, saved)
        outcome = loop.train(run, stop)
    energy = world.gather(telemetry.energy_j)
    memory = world.gather(peak_memory_mib(world.device))
    if memory is None or energy is None:  # not the main rank
        return outcome, {}
    result = run_result(run)
    spent = [joules for joules in energy if joules is not None]
    first = outcome.speed.first_step_at_s
    return outcome, result | {
        "peak_memory_mib": memory,
        "energy_j": sum(spent) if spent else None,
        "first_step_s": None if first is None else first - started_s,
        "wall_s": time.time() - started_s,
    }


@contextmanager
def _telemetry_log(folder: RunFolder) -> Iterator[Write]:
    with MetricLog(folder.host_telemetry()) as log:
        yield log.append


def _print_result(result: dict[str, Any]) -> None:
    name = result["main_metric"]
    best, baseline = result["metrics"]["best"].get(name), result["majority_baseline"][name]
    print(
        f"{result['task']} with {result['method']}: best {name} {best:.4f} at step "
        f"{result['metrics']['best_step']} (majority baseline {baseline:.4f}), "
        f"{result['trainable_parameters']:,} parameters trained, {result['frozen_parameters']:,} frozen"
    )


def _say_where(config: Config, folder: RunFolder) -> None:
    print(f"run folder: {folder}")
    if config.tracking.enabled:
        print(f"compare runs: {ui_command(tracking_uri(config.tracking, folder.path))}")
