"""The command line: parse, then call."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpc_dist import __version__, config
from gpc_dist.errors import EXIT_DONE, UserError
from gpc_dist.shipped import SHIPPED, shipped_folder

_STARTED_S = "GPC_DIST_STARTED_S"
"""Environment variable through which the ranks know when the user's command began."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see `gpc_dist.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options, rest = _parser().parse_known_args(arguments)
    try:
        return options.run(options, rest, arguments)
    except UserError as error:
        print(f"gpc-dist: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("gpc-dist: interrupted", file=sys.stderr)
        return 128 + 2


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpc-dist",
        description="Tune a Global Prompt Cell on a frozen pretrained encoder, on one machine or many.",
        epilog="Start with `gpc-dist doctor`, then `gpc-dist train demo`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gpc-dist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str,
        run: Callable[[Any, list[str], list[str]], int],
        summary: str,
        detail: str = "",
        arguments: str = "",
        settings: bool = False,
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            usage=f"gpc-dist {name} {arguments}".rstrip()
            + (" [--section.key VALUE ...]" if settings else ""),
            description=f"{summary}\n\n{detail}" if detail else summary,
            epilog=_settings_help() if settings else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(run=run)
        return added

    train = command(
        "train",
        _train,
        "Train an adapter.",
        "Writes one folder (run.dir, by default runs/<run.name>): configuration, metrics, checkpoints, the best\n"
        "adapter and result.json. Stopped or killed, the same command goes on from the last checkpoint.\n\n"
        "example: gpc-dist train rte --data.path SuperGLUE/RTE --engine.ranks 2 --train.lr 3e-3",
        arguments="RECIPE",
        settings=True,
    )
    train.add_argument(
        "recipe", metavar="RECIPE", help=f"a YAML file, or one of: {', '.join(config.recipe_names())}"
    )

    evaluate = command(
        "evaluate",
        _evaluate,
        "Measure a trained adapter on its task's validation split.",
        "example: gpc-dist evaluate runs/rte/adapter --data.path SuperGLUE/RTE",
        arguments="ADAPTER",
        settings=True,
    )
    evaluate.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter folder of a run")

    predict = command(
        "predict",
        _predict,
        "Write a trained adapter's predictions for a file.",
        "A packaged task is written in SuperGLUE's submission format, any other as JSON lines with\n"
        "probabilities. The input has the columns of the training data; labels are not needed.\n\n"
        "example: gpc-dist predict runs/rte/adapter --input SuperGLUE/RTE/test.jsonl --output RTE.jsonl",
        arguments="ADAPTER --input FILE --output FILE",
        settings=True,
    )
    predict.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter folder of a run")
    predict.add_argument("--input", required=True, type=Path, help="JSONL, CSV, TSV or Parquet file")
    predict.add_argument("--output", required=True, type=Path, help="file to write, or a folder")

    bench = command(
        "bench",
        _bench,
        "Measure what a training step of a recipe costs on this machine.",
        "Real steps on random tokens: time, tokens/s, MFU, memory, communication. Needs no data, and with --shape\n"
        "no encoder either.\n\n"
        "example: gpc-dist bench t5-xl --shape t5-v1_1-xl --lengths fixed --json bench.json",
        arguments="RECIPE [--steps N] [--lengths KIND] [--shape NAME] [--json FILE]",
        settings=True,
    )
    bench.add_argument("recipe", metavar="RECIPE", help="as of `gpc-dist train`")
    bench.add_argument(
        "--steps", type=_count, default=20, help="steps to measure, after a few to warm up [20]"
    )
    bench.add_argument(
        "--lengths",
        metavar="KIND",
        default="mix",
        help="text lengths: fixed (every row data.max_length), mix (as SuperGLUE's tasks), or one of boolq, cb, "
        "multirc, rte, wic, wsc [mix]",
    )
    bench.add_argument("--shape", metavar="NAME", help="random weights in a known shape, such as t5-v1_1-xl")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")

    plan = command(
        "plan",
        _plan,
        "Say whether and how a recipe fits on a cluster, how fast it would be, and how to run it.",
        "From the encoder's configuration alone: no weights, no GPU. A model, not a measurement.\n\n"
        "example: gpc-dist plan t5-xl --nodes 4 --gpus-per-node 8 --gpu a100-40",
        arguments="RECIPE [--nodes N] [--gpus-per-node N] [--gpu NAME] [--gpu-memory-gib GIB] [--json FILE]",
        settings=True,
    )
    plan.add_argument("recipe", metavar="RECIPE", help="as of `gpc-dist train`")
    plan.add_argument("--nodes", type=_count, default=1, help="equal nodes [1]")
    plan.add_argument("--gpus-per-node", type=_count, default=8, help="ranks of a node [8]")
    plan.add_argument("--gpu", default="h100", help="h100, h200, b200, a100-80, a100-40, l40s or cpu [h100]")
    plan.add_argument(
        "--gpu-memory-gib", type=float, help="memory of one GPU; the device's own when not given"
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the whole plan there too")

    results = command("results", _results, "Show finished runs side by side.", arguments="RUN ...")
    results.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder")

    sync = command(
        "sync",
        _sync,
        "Bring MLflow up to date with a run's folder.",
        "For runs whose tracking server was down or out of reach. Nothing is recorded twice.",
        arguments="[--uri URI] RUN ...",
    )
    sync.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder")
    sync.add_argument("--uri", help="MLflow tracking URI; the run's own when not given")

    command("doctor", _doctor, "Say what this machine has and what is missing.")

    init = command(
        "init",
        _init,
        f"Copy the files that are made to be edited ({', '.join(SHIPPED)}) into a folder.",
        arguments="DIR",
    )
    init.add_argument("folder", metavar="DIR", type=Path)
    return parser


def _count(text: str) -> int:
    """A whole number above 0."""
    count = int(text)
    if count < 1:
        raise ValueError
    return count


def _settings_help() -> str:
    """Every configuration key with its default and its documentation."""
    lines = ["settings (--section.key VALUE):"]
    for key, field in config.all_keys().items():
        default = "none" if field.default is None else field.default
        lines.append(f"  --{key}  [{default}]")
        lines += [f"      {line}" for line in (field.description or "").splitlines()]
    return "\n".join(lines)


def _train(options: Any, rest: list[str], arguments: list[str]) -> int:
    settings = config.load(options.recipe, overrides(rest))
    started_s = float(os.environ.get(_STARTED_S, time.time()))
    code = _start_ranks(settings, arguments)
    if code is not None:
        return code
    from gpc_dist.training.run import run_training

    return run_training(settings, started_s, ["gpc-dist", *arguments])


def _evaluate(options: Any, rest: list[str], arguments: list[str]) -> int:
    settings = overrides(rest)
    code = _start_ranks(config.build({}, settings), arguments)
    if code is not None:
        return code
    from gpc_dist.training.inference import run_evaluation

    return run_evaluation(options.adapter, settings)


def _predict(options: Any, rest: list[str], arguments: list[str]) -> int:
    settings = overrides(rest)
    if not options.input.is_file():
        raise UserError(f"--input {options.input} does not exist")
    code = _start_ranks(config.build({}, settings), arguments)
    if code is not None:
        return code
    from gpc_dist.training.inference import run_prediction

    return run_prediction(options.adapter, options.input, options.output, settings)


def _start_ranks(settings: config.Config, arguments: list[str]) -> int | None:
    """Run this very command as several ranks, if several are wanted and none were given."""
    from gpc_dist.engine import launch

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
    from gpc_dist.training.bench import run_bench

    return run_bench(settings, options.steps, options.lengths, options.shape, options.json)


def _plan(options: Any, rest: list[str], _: list[str]) -> int:
    settings = config.load(options.recipe, overrides(rest))
    from gpc_dist.training.plan_report import run_plan

    return run_plan(
        settings, options.gpu, options.gpu_memory_gib, options.nodes, options.gpus_per_node, options.json
    )


def _results(options: Any, rest: list[str], _: list[str]) -> int:
    _refuse(rest)
    from gpc_dist.training.results import results_table

    print(results_table(options.runs))
    return EXIT_DONE


def _sync(options: Any, rest: list[str], _: list[str]) -> int:
    _refuse(rest)
    from gpc_dist.tracking.sync import sync_run

    for folder in options.runs:
        state = sync_run(folder, options.uri)
        print(f"{folder}: MLflow run {state.run_id} is up to date")
    return EXIT_DONE


def _doctor(_: Any, rest: list[str], __: list[str]) -> int:
    _refuse(rest)
    from gpc_dist.training.doctor import run_doctor

    return run_doctor()


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
