"""The command line: finds the command, reads its arguments and settings, and calls it."""

from __future__ import annotations

import argparse
import itertools
import logging
import re
import sys
from collections.abc import Sequence

from gpc_dist import __version__, batch, config, logs, schema
from gpc_dist.commands import (
    bench,
    cache,
    cancel,
    compare,
    doctor,
    evaluate,
    export,
    fetch,
    import_,
    init,
    inspect,
    jobs,
    plan,
    predict,
    push,
    results,
    serve,
    similarity,
    study,
    submission,
    submit,
    sync,
    train,
    tune,
)
from gpc_dist.commands.command import Command
from gpc_dist.distributed import launch
from gpc_dist.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from gpc_dist.interpreter import protect_children
from gpc_dist.shown import shown_lines
from gpc_dist.tracking.credentials import named_by_user

log = logging.getLogger(__name__)

COMMANDS: dict[str, Command] = {
    "train": train.COMMAND,
    "evaluate": evaluate.COMMAND,
    "predict": predict.COMMAND,
    "inspect": inspect.COMMAND,
    "serve": serve.COMMAND,
    "similarity": similarity.COMMAND,
    "submission": submission.COMMAND,
    "import": import_.COMMAND,
    "export": export.COMMAND,
    "push": push.COMMAND,
    "bench": bench.COMMAND,
    "plan": plan.COMMAND,
    "results": results.COMMAND,
    "compare": compare.COMMAND,
    "sync": sync.COMMAND,
    "tune": tune.COMMAND,
    "study": study.COMMAND,
    "fetch": fetch.COMMAND,
    "cache": cache.COMMAND,
    "doctor": doctor.COMMAND,
    "submit": submit.COMMAND,
    "jobs": jobs.COMMAND,
    "cancel": cancel.COMMAND,
    "init": init.COMMAND,
}
"""In the order in which help shows them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see `gpc_dist.errors`)."""
    words = launch.without_local_rank(sys.argv[1:] if argv is None else argv)
    others, dotted = _without_settings(words)
    try:
        options, rest = build_parser().parse_known_args(others)
    except SystemExit as ended:  # argparse has said why
        if ended.code:
            batch.note_refusal("the command line is not valid")
        raise
    command = COMMANDS[options.command]
    if not command.on_ranks:
        launch.forget_ranks()
    logs.configure(options.verbose - options.quiet)
    try:
        _check_words(words)
        given = [*rest, *dotted]
        if given and command.settings == "none":
            raise UserError(f"unexpected argument '{given[0]}'")
        settings = schema.read_overrides(given)
        with named_by_user(getattr(options, "uri", None) or settings.get("tracking.uri")):
            return command.run(options, settings, words)
    except UserError as error:
        reason = shown_lines(str(error))
        print(f"gpc-dist: error: {reason}", file=sys.stderr)
        if error.exit_code == EXIT_USAGE:
            batch.note_refusal(reason)
        return error.exit_code
    except OSError as error:  # a full disk, a folder that may not be read or written
        log.debug("where it happened", exc_info=True)
        where = f"{error.filename}: " if error.filename else ""
        print(f"gpc-dist: error: {shown_lines(f'{where}{error.strerror or error}')}", file=sys.stderr)
        return EXIT_ENVIRONMENT
    except KeyboardInterrupt:
        print("gpc-dist: interrupted", file=sys.stderr)
        return 128 + 2


def _check_words(words: Sequence[str]) -> None:
    """Refuse words that the files of a run could not hold."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{word!r} is not UTF-8 text: give files and names in UTF-8") from None


def _without_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without those of settings with a section (`--section.key VALUE`), and these: argparse does not know
    them, and would take a value for an argument, or for an option where it begins with a dash."""
    others, settings, pending = [], [], iter(words)
    for word in pending:
        if not (found := re.fullmatch(r"--\w[\w-]*\.[^=\s]*(=.*)?", word, re.DOTALL)):
            others.append(word)
        else:
            settings += [word, *itertools.islice(pending, 0 if found[1] else 1)]
    return others, settings


def entry() -> None:
    """The console script."""
    protect_children()
    sys.exit(main())


def build_parser() -> argparse.ArgumentParser:
    """The parser of `gpc-dist`; it leaves settings to `schema.read_overrides`."""
    parser = argparse.ArgumentParser(
        prog="gpc-dist",
        description="Tune a Global Prompt Cell on a frozen pretrained encoder, on one machine or many.",
        epilog="Start with `gpc-dist doctor`, then `gpc-dist train demo`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gpc-dist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary}\n\n{command.detail}".rstrip(),
            epilog=_settings_help() if command.settings == "recipe" else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(added)
        loudness = added.add_mutually_exclusive_group()
        loudness.add_argument("-v", "--verbose", action="count", default=0, help="log details")
        loudness.add_argument("-q", "--quiet", action="count", default=0, help="log warnings and errors only")
        added.usage = added.format_usage().removeprefix("usage: ").rstrip() + command.usage
        added.set_defaults(command=name)
    return parser


def _settings_help() -> str:
    """Every configuration key with its default and its documentation."""
    lines = [
        "settings (--section.key VALUE; text and paths as they are, anything else as YAML; null for none):"
    ]
    for key, field in schema.all_keys(config.Config).items():
        default = "none" if field.default is None else field.default
        lines.append(f"  --{key}  [{default}]")
        lines += [f"      {line}" for line in (field.description or "").splitlines()]
    return "\n".join(lines)
