"""The command line: parse, then call."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpc_dist import config
from gpc_dist.errors import EXIT_DONE, EXIT_USAGE, UserError
from gpc_dist.parser import build_parser
from gpc_dist.shipped import SHIPPED, shipped_folder

_STARTED_S = "GPC_DIST_STARTED_S"
"""Environment variable through which the ranks know when the user's command began."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see `gpc_dist.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options, rest = build_parser().parse_known_args(arguments)
    try:
        return COMMANDS[options.command](options, rest, arguments)
    except UserError as error:
        print(f"gpc-dist: error: {error}", file=sys.stderr)
        if error.exit_code == EXIT_USAGE:
            _note_refusal(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print("gpc-dist: interrupted", file=sys.stderr)
        return 128 + 2


def _note_refusal(reason: str) -> None:
    """Tell the batch script that the job must not be tried again; see `slurm/train.sbatch`."""
    if note := os.environ.get("GPC_DIST_REFUSAL"):
        Path(note).write_text(reason + "\n", encoding="utf-8")


def entry() -> None:
    """The console script."""
    sys.exit(main())


def overrides(arguments: Sequence[str]) -> dict[str, str]:
    """The `--section.key VALUE` and `--section.key=VALUE` pairs of a command line.

    Raises:
        UserError: something else, a key without a value, or a key given twice.
    """
    found: dict[str, str] = {}
    pending = list(arguments)
    while pending:
        word = pending.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument '{word}': settings are given as --section.key VALUE")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not pending:
                raise UserError(f"--{key} needs a value")
            value = pending.pop(0)
        if key in found:
            raise UserError(f"--{key} is given twice: keep one of them")
        found[key] = value
    return found


def _train(options: Any, rest: list[str], arguments: list[str]) -> int:
    settings = config.load(options.recipe, overrides(rest))
    started_s = float(os.environ.get(_STARTED_S, time.time()))
    code = _start_ranks(settings, arguments)
    if code is not None:
        return code
    from gpc_dist.training.stop import StopRequest

    stop = StopRequest()
    stop.listen(signal.SIGUSR2)  # a batch system may ask before torch is there
    from gpc_dist.training.run import run_training

    return run_training(settings, started_s, ["gpc-dist", *arguments], stop)


def _evaluate(options: Any, rest: list[str], arguments: list[str]) -> int:
    settings = overrides(rest)
    code = _start_ranks(config.build({}, settings), arguments)
    if code is not None:
        return code
    from gpc_dist.inference.adapters import run_evaluation

    return run_evaluation(options.adapter, options.split, settings)


def _inspect(options: Any, rest: list[str], _: list[str]) -> int:
    settings = overrides(rest)
    from gpc_dist.inference.inspect import run_inspection

    return run_inspection(options.adapters, options.examples, options.json, options.png, settings)


def _predict(options: Any, rest: list[str], arguments: list[str]) -> int:
    settings = overrides(rest)
    if not options.input.is_file():
        raise UserError(f"--input {options.input} does not exist")
    code = _start_ranks(config.build({}, settings), arguments)
    if code is not None:
        return code
    from gpc_dist.inference.adapters import run_prediction

    return run_prediction(options.adapter, options.input, options.output, settings)


def _start_ranks(settings: config.Config, arguments: list[str]) -> int | None:
    """Run this very command as several ranks, if several are wanted and none were given."""
    from gpc_dist.distributed import launch

    ranks = launch.wanted_ranks(settings.engine)
    if launch.given_ranks() or ranks == 1:
        return None
    os.environ.setdefault(_STARTED_S, str(time.time()))
    command = [sys.executable, "-m", "gpc_dist", *arguments]
    return launch.start_ranks(command, ranks, cpu_only=not launch.visible_gpus())


def _bench(options: Any, rest: list[str], arguments: list[str]) -> int:
    settings = config.load(options.recipe, overrides(rest))
    code = _start_ranks(settings, arguments)
    if code is not None:
        return code
    from gpc_dist.bench.bench import run_bench

    return run_bench(settings, options.steps, options.lengths, options.shape, options.json)


def _plan(options: Any, rest: list[str], _: list[str]) -> int:
    settings = config.load(options.recipe, overrides(rest))
    from gpc_dist.planner.report import run_plan

    return run_plan(
        settings, options.gpu, options.gpu_memory_gib, options.nodes, options.gpus_per_node, options.json
    )


def _results(options: Any, rest: list[str], _: list[str]) -> int:
    _refuse(rest)
    from gpc_dist.reports.results import results_table

    print(results_table(options.runs))
    return EXIT_DONE


def _compare(options: Any, rest: list[str], _: list[str]) -> int:
    _refuse(rest)
    from gpc_dist.reports.comparison import compare, comparison_table

    comparisons = compare(options.place, options.metric, options.uri)
    print("\n\n".join(map(comparison_table, comparisons)))
    if options.html or options.png:
        from gpc_dist.reports.page import write_comparison

        for file in write_comparison(comparisons, options.place, options.html, options.png):
            print(f"wrote {file}")
    return EXIT_DONE


def _sync(options: Any, rest: list[str], _: list[str]) -> int:
    _refuse(rest)
    from gpc_dist.tracking.sync import sync

    for folder in options.places:
        state = sync(folder, options.uri)
        print(f"{folder}: MLflow run {state.run_id} is up to date")
    return EXIT_DONE


def _tune(options: Any, rest: list[str], arguments: list[str]) -> int:
    from gpc_dist.search import spec

    search = spec.load(options.search, overrides(rest))
    from gpc_dist.search import node

    if node.is_one():
        return node.run_node(search, arguments)
    from gpc_dist.search.tuner import run_search

    return run_search(search, ["gpc-dist", *arguments], options.resume)


def _study(options: Any, rest: list[str], arguments: list[str]) -> int:
    from gpc_dist.study import spec

    study = spec.load(options.study, overrides(rest))
    if options.dry_run:
        from gpc_dist.study.dry_run import describe

        print(describe(study, options.gpu))
        return EXIT_DONE
    if not options.report_only:
        from gpc_dist.study.run import run_study

        if code := run_study(study, ["gpc-dist", *arguments]):
            return code
    from gpc_dist.reports.study import write_report

    for file in write_report(study):
        print(f"wrote {file}")
    return EXIT_DONE


def _fetch(options: Any, rest: list[str], _: list[str]) -> int:
    settings = config.load(options.recipe, overrides(rest))
    from gpc_dist.cluster.fetch import run_fetch

    return run_fetch(settings)


def _doctor(options: Any, rest: list[str], _: list[str]) -> int:
    _refuse(rest)
    from gpc_dist.cluster.environment import report

    if options.slurm:
        from gpc_dist.cluster.check import examine_cluster

        return report(examine_cluster(options.partition, options.nodes, options.gpus_per_node))
    from gpc_dist.cluster.environment import examine

    return report(examine())


def _submit(options: Any, rest: list[str], arguments: list[str]) -> int:
    settings = overrides(rest)
    from gpc_dist.cluster import members
    from gpc_dist.cluster.resources import Resources
    from gpc_dist.cluster.submit import run_submission

    resources = Resources(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        ranks_per_node=options.ranks_per_node,
        cpus_per_rank=options.cpus_per_rank,
        time=options.time,
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        memory=options.mem,
        constraint=options.constraint,
        dependency=options.dependency,
        others=tuple(options.sbatch),
    )
    if options.what == "tune":
        _refuse_for_searches(options)
        from gpc_dist.search import spec

        chosen = members.search(spec.load(options.recipe, settings))
    else:
        if options.nodes == "auto":
            from gpc_dist.cluster.fit import fewest_nodes

            settings |= {"engine.plan": "auto"}
            resources = fewest_nodes(config.load(options.recipe, settings), resources, options.gpu)
        if options.seeds:
            chosen = members.seeds(options.recipe, settings, options.seeds)
        elif options.array:
            chosen = members.lines(options.recipe, settings, _lines(options.array))
        else:
            chosen = members.single(options.recipe, settings)
    command = ["gpc-dist", *arguments]
    return run_submission(options.what, chosen, resources, command, options.dry_run, options.follow)


def _refuse_for_searches(options: Any) -> None:
    given = {"--nodes auto": options.nodes == "auto", "--seeds": options.seeds, "--array": options.array}
    for name in (name for name, value in given.items() if value):
        raise UserError(f"{name} is for `submit train`: a search has its own nodes, seeds and settings")


def _lines(file: Path) -> list[dict[str, str]]:
    """The settings in each line of a file, empty lines and those that begin with # left out."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--array {file}: {error.strerror}") from None
    found = [shlex.split(line, comments=True) for line in text.splitlines()]
    if not any(found):
        raise UserError(f"--array {file} has no settings: give one line of --section.key VALUE for each run")
    return [overrides(words) for words in found if words]


def _jobs(options: Any, rest: list[str], _: list[str]) -> int:
    _refuse(rest)
    from gpc_dist.cluster.jobs import jobs_table

    usual = [path for path in (Path("runs"), Path("searches")) if path.is_dir()]
    print(jobs_table(options.runs or usual))
    return EXIT_DONE


def _cancel(options: Any, rest: list[str], _: list[str]) -> int:
    _refuse(rest)
    from gpc_dist.cluster.jobs import cancel_jobs

    print(f"asked to end: {', '.join(cancel_jobs(options.jobs))}")
    return EXIT_DONE


def _init(options: Any, rest: list[str], _: list[str]) -> int:
    _refuse(rest)
    present = [name for name in SHIPPED if (options.folder / name).exists()]
    if present:
        raise UserError(
            f"{options.folder} already has {', '.join(present)}: move it away, or choose another DIR"
        )
    for name in SHIPPED:
        ignored = shutil.ignore_patterns("__pycache__", "*.py", "demo_data")
        shutil.copytree(shipped_folder(name), options.folder / name, ignore=ignored)
    print(
        f"copied {', '.join(SHIPPED)} to {options.folder}; start with: gpc-dist train {options.folder}/recipes/rte.yaml"
    )
    return EXIT_DONE


def _refuse(rest: list[str]) -> None:
    if rest:
        raise UserError(f"unexpected argument '{rest[0]}'")


COMMANDS: dict[str, Callable[[Any, list[str], list[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "predict": _predict,
    "bench": _bench,
    "plan": _plan,
    "results": _results,
    "compare": _compare,
    "sync": _sync,
    "tune": _tune,
    "study": _study,
    "fetch": _fetch,
    "doctor": _doctor,
    "submit": _submit,
    "jobs": _jobs,
    "cancel": _cancel,
    "init": _init,
}
"""Each takes the parsed options, the words that are left (settings), and the whole command line."""
