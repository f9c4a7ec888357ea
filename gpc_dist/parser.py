"""The words of the command line: commands, their arguments and their help."""

from __future__ import annotations

import argparse
from pathlib import Path

from gpc_dist import __version__, config, schema
from gpc_dist.shipped import SHIPPED, shipped_folder


def build_parser() -> argparse.ArgumentParser:
    """The parser of `gpc-dist`; `command` holds the command's name."""
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
        added.set_defaults(command=name)
        return added

    train = command(
        "train",
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
        "Measure a trained adapter on its task's validation split.",
        "example: gpc-dist evaluate runs/rte/adapter --data.path SuperGLUE/RTE",
        arguments="ADAPTER [--split validation|holdout]",
        settings=True,
    )
    evaluate.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter folder of a run")
    evaluate.add_argument(
        "--split",
        choices=["validation", "holdout"],
        default="validation",
        help="the official split, or what data.holdout kept out of training [validation]",
    )

    predict = command(
        "predict",
        "Write a trained adapter's predictions for a file.",
        "A packaged task is written in its benchmark's submission format, any other as JSON lines with\n"
        "probabilities. The input has the columns of the training data; labels are not needed.\n\n"
        "example: gpc-dist predict runs/rte/adapter --input SuperGLUE/RTE/test.jsonl --output RTE.jsonl",
        arguments="ADAPTER --input FILE --output FILE",
        settings=True,
    )
    predict.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter folder of a run")
    predict.add_argument("--input", required=True, type=Path, help="JSONL, CSV, TSV or Parquet file")
    predict.add_argument("--output", required=True, type=Path, help="file to write, or a folder")

    inspect = command(
        "inspect",
        "Show what becomes of a trained prompt from layer to layer.",
        "On some validation examples: how like its start the prompt still is, how much the cell changes it, how large\n"
        "it is beside the text, and how much of the loss's gradient reaches it.\n\n"
        "example: gpc-dist inspect runs/rte/adapter --data.path SuperGLUE/RTE --png rte.png",
        arguments="ADAPTER... [--examples N] [--json FILE] [--png FILE]",
        settings=True,
    )
    inspect.add_argument("adapters", metavar="ADAPTER", nargs="+", type=Path, help="adapter folders of runs")
    inspect.add_argument(
        "--examples",
        metavar="N",
        type=_count,
        default=64,
        help="the first so many of the validation split [64]",
    )
    inspect.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    inspect.add_argument("--png", type=Path, metavar="FILE", help="draw them")

    bench = command(
        "bench",
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

    results = command("results", "Show finished runs side by side.", arguments="RUN ...")
    results.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder")

    compare = command(
        "compare",
        "Rank the configurations of many runs: a table, plots, and a page to keep or send.",
        "PLACE is a folder of runs, a search's folder, or else the name of an MLflow experiment. Runs that differ\n"
        "only in seed, name and folder are one configuration.\n\n"
        "example: gpc-dist compare runs --html compare.html",
        arguments="PLACE [--html FILE] [--png DIR] [--metric NAME] [--uri URI]",
    )
    compare.add_argument("place", metavar="PLACE", help="folder, or MLflow experiment")
    compare.add_argument("--html", metavar="FILE", type=Path, help="write one page with everything in it")
    compare.add_argument("--png", metavar="DIR", type=Path, help="write the plots as PNG files")
    compare.add_argument(
        "--metric", metavar="NAME", help="rank by this metric; the task's own when not given"
    )
    compare.add_argument("--uri", help="MLflow tracking URI of the experiment [mlflow.db in runs, or here]")

    sync = command(
        "sync",
        "Bring MLflow up to date with the folder of a run or of a search.",
        "For those whose tracking server was down or out of reach. Nothing is recorded twice.",
        arguments="[--uri URI] PLACE ...",
    )
    sync.add_argument("places", metavar="PLACE", type=Path, nargs="+", help="folder of a run or of a search")
    sync.add_argument("--uri", help="MLflow tracking URI; the folder's own when not given")

    tune = command(
        "tune",
        "Search for good settings: many trials, compared in MLflow.",
        "A search is a YAML file (space, trials, scheduler, resources), with overrides such as --trials 8 or\n"
        "--settings.train.steps 100. With resources.pack K, K trials share one running encoder.\n\n"
        "example: gpc-dist tune demo --trials 4",
        arguments="SEARCH [--resume] [--key VALUE ...]",
    )
    tune.add_argument(
        "search", metavar="SEARCH", help=f"a YAML file, or one of: {', '.join(_search_names())}"
    )
    tune.add_argument("--resume", action="store_true", help="go on with a search that was cut off")

    study = command(
        "study",
        "Compare methods on several tasks, each with the same budget of search.",
        "For each task: all methods' configurations are run and chosen from on a part of the training split, the\n"
        "chosen ones run again with other seeds, and their adapters measured once on the official validation split.\n"
        "The same command goes on after a kill. The report is in report/ of the study's folder.\n\n"
        "example: gpc-dist study minilm --data_root DATA",
        arguments="STUDY [--dry-run [--gpu NAME]] [--report-only] [--key VALUE ...]",
    )
    study.add_argument("study", metavar="STUDY", help=f"a YAML file, or one of: {', '.join(_study_names())}")
    study.add_argument("--dry-run", action="store_true", help="show what would be run")
    study.add_argument(
        "--gpu", help="for --dry-run: a device of `gpc-dist plan`, to expect its hours (minutes of thought)"
    )
    study.add_argument(
        "--report-only", action="store_true", help="run nothing: report what has been found so far"
    )

    fetch = command(
        "fetch",
        "Download what a recipe needs: encoder, tokenizer and data.",
        "For compute nodes without network: run it on a login node that shares the cache (HF_HOME) with them, and\n"
        "submit with HF_HUB_OFFLINE=1.",
        arguments="RECIPE",
        settings=True,
    )
    fetch.add_argument("recipe", metavar="RECIPE", help="as of `gpc-dist train`")

    doctor = command(
        "doctor",
        "Say what this machine, or a Slurm cluster, has and what is missing.",
        "With --slurm: partitions, and a job of a minute on a few nodes that checks the shared folder, the\n"
        "connection between them, clocks, disks and versions.",
        arguments="[--slurm [--partition P] [--nodes N] [--gpus-per-node N]]",
    )
    doctor.add_argument("--slurm", action="store_true", help="check the cluster")
    doctor.add_argument("--partition", help="partition of the check; the default one when not given")
    doctor.add_argument("--nodes", type=_count, default=2, help="nodes of the check [2]")
    doctor.add_argument("--gpus-per-node", type=_count, help="check their GPUs, and nccl between them")

    _add_submit(
        command(
            "submit",
            "Submit a run or a search to Slurm.",
            "The configuration is kept in the run's folder (job/) as it is now. Stopped by a time limit or a\n"
            "preemption, the job saves its state, requeues itself and goes on: one run in MLflow.\n\n"
            "example: gpc-dist submit train t5-xl --nodes 2 --gpus-per-node 8 --time 12:00:00 --follow\n"
            "         gpc-dist submit tune cb-asha --nodes 2 --gpus-per-node 8 --resources.pack 8",
            arguments="train|tune RECIPE|SEARCH [options]",
            settings=True,
        )
    )
    jobs = command("jobs", "Show this project's Slurm jobs.", arguments="[RUN ...]")
    jobs.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="*",
        help="folder of a run or a search, or of several [runs, searches]",
    )
    cancel = command(
        "cancel", "End Slurm jobs; their runs save their state first.", arguments="JOB|RUN [JOB|RUN ...]"
    )
    cancel.add_argument("jobs", metavar="JOB|RUN", nargs="+", help="a job's id, or the folder of its run")

    init = command(
        "init",
        f"Copy the files that are made to be edited ({', '.join(SHIPPED)}) into a folder.",
        arguments="DIR",
    )
    init.add_argument("folder", metavar="DIR", type=Path)
    return parser


def _add_submit(submit: argparse.ArgumentParser) -> None:
    submit.add_argument("what", choices=["train", "tune"], help="a run, or a search")
    submit.add_argument(
        "recipe", metavar="RECIPE|SEARCH", help="as of `gpc-dist train`, or of `gpc-dist tune`"
    )
    submit.add_argument(
        "--nodes",
        type=_nodes,
        default=1,
        help="nodes, or `auto`: the fewest on which the planner finds room; implies engine.plan auto [1]",
    )
    submit.add_argument("--gpus-per-node", type=_count, help="GPUs of a node, one rank each")
    submit.add_argument("--ranks-per-node", type=_count, help="ranks of a node, where they are not its GPUs")
    submit.add_argument("--cpus-per-rank", type=_count, help="cores of a rank")
    submit.add_argument(
        "--time", help="limit of one start of the job, such as 12:00:00; the run may take several"
    )
    submit.add_argument("--partition", help="the cluster's default one when not given")
    submit.add_argument("--account")
    submit.add_argument("--qos")
    submit.add_argument("--mem", help="memory of a node, such as 64G")
    submit.add_argument("--constraint", help="features of the nodes")
    submit.add_argument("--dependency", help="as of sbatch, such as afterok:123")
    submit.add_argument(
        "--sbatch",
        metavar="OPTION",
        action="append",
        default=[],
        help="any other option: --sbatch=--exclusive",
    )
    submit.add_argument("--gpu", help="for --nodes auto: as of `gpc-dist plan`, where Slurm does not name it")
    several = submit.add_mutually_exclusive_group()
    several.add_argument(
        "--seeds", metavar="LIST", help="a job array with one run for each seed: 0-3, or 1,5,7"
    )
    several.add_argument(
        "--array",
        metavar="FILE",
        type=Path,
        help="a job array with one run for each line of settings in a file",
    )
    submit.add_argument("--dry-run", action="store_true", help="show what would be submitted")
    submit.add_argument("--follow", action="store_true", help="print the log until the job ends")


def _search_names() -> list[str]:
    return sorted(path.stem for path in shipped_folder("tune").glob("*.yaml"))


def _study_names() -> list[str]:
    return sorted(path.stem for path in (shipped_folder("tune") / "studies").glob("*.yaml"))


def _nodes(text: str) -> int | str:
    return text if text == "auto" else _count(text)


def _count(text: str) -> int:
    """A whole number above 0."""
    count = int(text)
    if count < 1:
        raise ValueError
    return count


def _settings_help() -> str:
    """Every configuration key with its default and its documentation."""
    lines = ["settings (--section.key VALUE):"]
    for key, field in schema.all_keys(config.Config).items():
        default = "none" if field.default is None else field.default
        lines.append(f"  --{key}  [{default}]")
        lines += [f"      {line}" for line in (field.description or "").splitlines()]
    return "\n".join(lines)
