"""The report of a study: `report.json` in its folder; `report.md`, `report.html` and the plots as PNG files in
`report/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpc_dist import files
from gpc_dist.reports.blocks import Block, Table, to_html, to_markdown
from gpc_dist.reports.comparison import counted, show, show_number
from gpc_dist.reports.plots import write_png
from gpc_dist.reports.study_plots import plots
from gpc_dist.study.layout import StudyFolder
from gpc_dist.study.results import (
    DRAWS,
    LEARNT,
    Difference,
    MethodResult,
    StudyResult,
    TaskResult,
)
from gpc_dist.study.searches import Configuration

_PRIVATE = {"dir", "data_root", "tracking"}
_HELD_OUT = (
    "What was chosen was chosen on a part of the training split that was held out ({:.0%} where the task says nothing "
    "else). Scores are of runs that were each measured once on the official validation split, which chose nothing."
)


def write_report(found: StudyResult) -> list[Path]:
    """Write the results of a study so far; returns the files."""
    study = found.study
    numbers, folder = StudyFolder(study.folder).numbers, StudyFolder(study.folder).report
    drawn = plots(found)
    title, content = f"Study {study.name}", [*tables(found), *drawn]
    page, text = (folder / f"report.{kind}" for kind in ("html", "md"))
    for plot in drawn:
        write_png(plot, folder / f"{plot.name}.png")
    files.write_text(page, to_html(title, content))
    files.write_text(text, to_markdown(title, content))
    files.write_json(numbers, dump(found))
    return [text, page, numbers, *(folder / f"{plot.name}.png" for plot in drawn)]


def tables(found: StudyResult) -> list[Block]:
    """The report without its plots."""
    study = found.study
    made: list[Block] = [_introduction(found)]
    if found.missing:
        made.append(f"Not measured yet, and in no figure below: {', '.join(found.missing)}.")
    if unlearnt := [task.name for task in found.tasks if task.learnt is False]:
        made.append(
            f"Left out of means: {', '.join(unlearnt)}. There {study.ceiling} is less than {100 * LEARNT:g} points "
            "better than the majority baseline, so this encoder cannot tell methods apart on it."
        )
    if all(task.ceiling is None for task in found.tasks):
        made.append(
            f"{study.ceiling} was not run: no task is left out of means, and no share of a distance is known."
        )
    made.append(_scores(found))
    if any(task.differences for task in found.tasks):
        made.append(_differences(found))
    made.append(_losses(found))
    if any(task.covered(method) is not None for task in found.tasks for method in task.methods):
        made.append(_covered(found))
    made.append(_costs(found))
    if found.searched:
        made.append(_search(found))
    if found.searched or found.study.choices:
        made.append(_chosen(found))
    return made


def _introduction(found: StudyResult) -> str:
    study = found.study
    earlier, held_out = _chosen_earlier(found), _HELD_OUT.format(study.holdout)
    if not found.searched:
        return (
            f"{len(study.methods)} methods on {study.encoder.path}, each with one configuration and "
            f"{len(study.seeds)} seeds. {earlier}{held_out}"
        )
    return (
        f"{len(study.methods)} methods on {study.encoder.path}. For each task and method up to {study.trials} "
        f"configurations were drawn, run with {counted(len(study.search_seeds), 'seed')} and compared; the best was "
        f"run again with {len(study.seeds)} other seeds. {earlier}{held_out}"
    )


def _chosen_earlier(found: StudyResult) -> str:
    """Says which methods were not searched on which tasks, because an earlier study had chosen for them."""
    methods: dict[tuple[str, ...], list[str]] = {}
    for name in found.study.methods:
        tasks = tuple(task.name for task in found.tasks if name in found.study.choices.get(task.name, {}))
        methods.setdefault(tasks, []).append(name)
    methods.pop((), None)
    said = "; ".join(f"{', '.join(names)} on {', '.join(tasks)}" for tasks, names in methods.items())
    return f"Chosen by an earlier study, and not searched again: {said}. " if said else ""


def _line(
    name: str, tasks: Sequence[TaskResult], value: Callable[[TaskResult, MethodResult], str]
) -> list[str]:
    return [name, *(value(task, task.methods[name]) if name in task.methods else "-" for task in tasks)]


def _heads(found: StudyResult) -> list[str]:
    return [f"{task.name} ({task.metric})" + ("*" if task.learnt is False else "") for task in found.tasks]


def _score(result: MethodResult, seeds: int) -> str:
    if result.mean is None:
        return "failed"
    spread = "" if result.std is None else f" ± {result.std:.4f}"
    fewer = "" if len(result.runs) == seeds else f" ({len(result.runs)} of {seeds} seeds)"
    return f"{result.mean:.4f}{spread}{fewer}"


def _scores(found: StudyResult) -> Table:
    seeds = len(found.study.seeds)
    lines = [["majority", *(f"{task.majority:.4f}" for task in found.tasks), "-"]]
    for name in found.study.methods:
        lines.append(
            [
                *_line(name, found.tasks, lambda _, result: _score(result, seeds)),
                show_number(found.mean(name), ".4f"),
            ]
        )
    return Table(
        "Scores on the official validation split",
        "Mean ± sample standard deviation over seeds. Last, the mean over the tasks that count; * does not.",
        ["method", *_heads(found), "mean"],
        lines,
    )


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    low, high = difference.interval
    return f"{difference.mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _differences(found: StudyResult) -> Table:
    reference = found.study.reference
    lines = []
    for name in found.study.methods:
        if name != reference:
            own = [_difference(task.differences.get(name)) for task in found.tasks]
            lines.append([name, *own, _difference(found.mean_difference(name))])
    return Table(
        f"Difference from {reference}",
        f"With the 95 % interval of {DRAWS} bootstrap draws of the validation examples (all of one text together), the "
        "same for both methods, scores averaged over seeds. An interval that holds 0 leaves it open which one is "
        "better. It tells of other examples, not of other seeds: for these see ± above.",
        ["method", *_heads(found), "mean"],
        lines,
    )


def _losses(found: StudyResult) -> Table:
    def loss(_: TaskResult, result: MethodResult) -> str:
        if result.loss is None:
            return "failed"
        return f"{result.loss:.4f}" + ("" if result.loss_std is None else f" ± {result.loss_std:.4f}")

    return Table(
        "Loss on the official validation split",
        "Mean over the examples, of the checkpoints that were chosen by their score; less is better. It also tells "
        "methods apart that decide the same, and grows where a method is sure of what is wrong.",
        ["method", *(task.name for task in found.tasks)],
        [_line(name, found.tasks, loss) for name in found.study.methods],
    )


def _covered(found: StudyResult) -> Table:
    def share(task: TaskResult, name: str) -> str:
        value = task.covered(name) if name in task.methods else None
        return "-" if value is None else f"{100 * value:.0f} %"

    lines = []
    for name in found.study.methods:
        mean = found.mean_covered(name)
        lines.append(
            [
                name,
                *(share(task, name) for task in found.tasks),
                "-" if mean is None else f"{100 * mean:.0f} %",
            ]
        )
    return Table(
        f"Share of the distance from {found.study.floor} to {found.study.ceiling}",
        "0 % and 100 % are those two; a dash where the second is no better than the first.",
        ["method", *_heads(found), "mean"],
        lines,
    )


def _costs(found: StudyResult) -> Table:
    lines = []
    for name in found.study.methods:
        for task in found.tasks:
            if name in task.methods:
                result = task.methods[name]
                parameters = f"{result.runs[0].parameters:,}" if result.runs else "-"
                cost = show_number(result.cost_s, ",.0f")
                search = f"{result.search.cost_s:,.0f}" if result.search.runs else "-"
                lines.append([name, task.name, parameters, cost, search])
    device = "GPU" if any(task.on_gpu for task in found.tasks) else "CPU"
    return Table(
        "Cost",
        f"Seconds of {device} ranks ({_machines(found)}); a run that shared its encoder with others is charged its "
        "part. A run that was resumed counts from its last start only.",
        ["method", "task", "trained parameters", f"{device}-s of a run", f"{device}-s of the search"],
        lines,
    )


def _machines(found: StudyResult) -> str:
    kinds = []
    for task in found.tasks:
        for machine in task.machines:
            gpus, cpus = (
                f"{machine[count]} x {machine.get(kind, kind.upper())}" if count in machine else ""
                for kind, count in (("gpu", "gpus"), ("cpu", "cpus"))
            )
            kinds.append(f"{gpus or cpus}, torch {machine['versions']['torch']}")
    return "; ".join(dict.fromkeys(kinds))


def _search(found: StudyResult) -> Table:
    lines = []
    for task in found.tasks:
        for name, result in task.methods.items():
            search = result.search
            if not search.runs:
                continue
            # best, median (of two the worse) and worst
            ends = (
                [search.values[place] for place in (0, len(search.values) // 2, -1)] if search.values else []
            )
            shown = [f"{value:.4f}" for value in ends] or ["-"] * 3
            counts = [str(search.failed), str(search.at_majority), f"{100 * search.unstable:.0f} %"]
            lines.append([name, task.name, str(search.runs), *shown, *counts])
    return Table(
        "How the search went",
        "Best evaluations on the hold-out, over all runs of a method's search: how much its settings matter, and how "
        "often they spoil a run. Failed: the loss was not finite, or the run was cut off. Not learnt: no better than "
        "the majority baseline. Unstable: the share of both.",
        ["method", "task", "runs", "best", "median", "worst", "failed", "not learnt", "unstable"],
        lines,
    )


def _chosen(found: StudyResult) -> Table:
    searched = {method: list(held.space) for method, held in found.study.methods.items()}
    lines = []
    for task in found.tasks:
        for name, result in task.methods.items():
            values = result.configuration or {}
            shown = ", ".join(f"{key} {show(values[key])}" for key in searched[name] if key in values)
            lines.append([name, task.name, shown or "-"])
    return Table("Chosen settings", "Of those that were searched.", ["method", "task", "settings"], lines)


def dump(found: StudyResult) -> dict[str, Any]:
    """Every number of the report as plain values, without folders and servers, which mean nothing to others."""
    return {
        "study": found.study.model_dump(mode="json", exclude=_PRIVATE),
        "missing": list(found.missing),
        "tasks": {task.name: _dump_task(task) for task in found.tasks},
        "means": {
            name: {
                "score": found.mean(name),
                "covered": found.mean_covered(name),
                "difference": _dump_difference(found.mean_difference(name)),
            }
            for name in found.study.methods
        },
    }


def _dump_task(task: TaskResult) -> dict[str, Any]:
    return {
        "metric": task.metric,
        "examples": task.examples,
        "majority": task.majority,
        "learnt": task.learnt,
        "machines": list(task.machines),
        "methods": {
            name: {
                "mean": result.mean,
                "std": result.std,
                "scores": {str(run.seed): run.score for run in result.runs},
                "losses": {str(run.seed): run.loss for run in result.runs},
                "holdout": {str(run.seed): run.holdout for run in result.runs},
                "trainable_parameters": result.runs[0].parameters if result.runs else None,
                "run_cost_s": result.cost_s,
                "covered": task.covered(name),
                "difference": _dump_difference(task.differences.get(name)),
                "configuration": _published(result.configuration),
                "search": {
                    "values": list(result.search.values),
                    "failed": result.search.failed,
                    "at_majority": result.search.at_majority,
                    "cost_s": result.search.cost_s,
                },
            }
            for name, result in task.methods.items()
        },
    }


def _published(configuration: Configuration | None) -> Configuration | None:
    if configuration is None:
        return None
    return {key: value for key, value in configuration.items() if key != "data.path"}


def _dump_difference(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {"mean": difference.mean, "interval": list(difference.interval)}
