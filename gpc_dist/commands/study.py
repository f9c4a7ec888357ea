"""`gpc-dist study`."""

from __future__ import annotations

import argparse
from typing import Any

from gpc_dist import schema
from gpc_dist.commands.command import Command
from gpc_dist.errors import EXIT_DONE
from gpc_dist.shipped import shipped_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = schema.yaml_names(shipped_folder("tune") / "studies")
    parser.add_argument("study", metavar="STUDY", help=f"a YAML file, or one of: {', '.join(names)}")
    parser.add_argument("--dry-run", action="store_true", help="show what would be run")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="for --dry-run: a device of `gpc-dist plan`, to expect its hours (minutes of thought)",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="run nothing: report what has been found so far"
    )


def run(options: Any, settings: dict[str, str], words: list[str]) -> int:
    from gpc_dist.study import spec

    study = spec.load(options.study, settings)
    if options.dry_run:
        from gpc_dist.study.dry_run import describe

        print(describe(study, options.gpu))
        return EXIT_DONE
    if not options.report_only:
        from gpc_dist.study.run import run_study

        if code := run_study(study, ["gpc-dist", *words]):
            return code
    from gpc_dist.reports.study import write_report
    from gpc_dist.reports.terminal import summary
    from gpc_dist.study.results import read_study

    found = read_study(study)
    for file in write_report(found):
        print(f"wrote {file}")
    print(f"\n{summary(found)}")
    return EXIT_DONE


COMMAND = Command(
    "Compare methods on several tasks, each with the same budget of search.",
    add_arguments,
    run,
    "For each task: the configurations of each method are run and chosen from on a part of the training split, the\n"
    "chosen ones run again with other seeds, and their adapters measured once on the official validation split. Runs\n"
    "of all tasks share one encoder.\n"
    "The same command goes on after a kill. The report is in report/ of the study's folder.\n\n"
    "example: gpc-dist study demo",
    settings="own",
)
