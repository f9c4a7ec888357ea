"""The plots of a comparison: learning curves, settings, their importance, and cost."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpc_dist.reports.comparison import Comparison, Configuration, shorten, show
from gpc_dist.reports.importance import Importance
from gpc_dist.reports.plots import COLOURS, INK, OTHERS, PAPER, WIDTH, Plot, log_axis, new_figure, over_seeds
from gpc_dist.reports.scales import is_log, scale_of
from gpc_dist.runs.records import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORST_TO_BEST = ("#4477dd", "#9a6fb0", "#e8730c")
_MOST_POINTS = 60
_MOST_AXES = 10
_MOST_BARS = 20
_LONGEST_LABEL = 130


def plots(comparison: Comparison, found: Importance | str) -> list[Plot]:
    """The plots for which the comparison has enough data.

    Args:
        found: result of `importance.importance`.
    """
    metric, ranked = comparison.metric, comparison.ranked
    named = ranked[: len(COLOURS)]
    others = " Grey: the other configurations." if len(comparison.configurations) > len(named) else ""
    prefix = "-".join(re.sub(r"\W", "_", text) for text in (comparison.task, metric))
    made = []
    if any(run.curves for run in comparison.runs):
        made.append(
            Plot(
                f"{prefix}-curves",
                "Learning curves",
                "Mean of the seeds that reached the step; the band is one standard deviation. A training loss is "
                f"the mean over the steps around.{others}",
                lambda: _curves(comparison, named),
            )
        )
    if comparison.varied and len(ranked) > 1:
        keys = (
            [key for key, *_ in found.settings] if isinstance(found, Importance) else list(comparison.varied)
        )
        left_out = f" The {_MOST_AXES} foremost of {len(keys)} settings." if len(keys) > _MOST_AXES else ""
        made.append(
            Plot(
                f"{prefix}-settings",
                "Settings",
                f"Each line is a configuration, from its settings to its {metric}; the best one is drawn "
                f"thicker.{left_out}",
                lambda: _parallel(comparison, keys[:_MOST_AXES]),
            )
        )
    if isinstance(found, Importance):
        made.append(
            Plot(
                f"{prefix}-importance",
                "Importance of the settings",
                f"By how much a random forest is more wrong about the {metric} of configurations it has not seen when "
                "this setting's value is replaced by another configuration's; the bar is one standard deviation over "
                f"ways to split them. {_trust(found)} Settings that go together share their importance, and runs "
                "stopped early count with what they had reached.",
                lambda: _importance(comparison, found),
            )
        )
    if sum(bool(c.cost_s) for c in ranked) > 1:
        made.append(
            Plot(
                f"{prefix}-cost",
                "Cost",
                "Each point is a configuration; the bar is one standard deviation over its seeds. The line is the best "
                "to be had for a cost, and the numbers on it are those of the lines in the table.",
                lambda: _cost(comparison),
            )
        )
    return made


def _trust(found: Importance) -> str:
    if found.explained <= 0:
        return "The forest predicts these configurations no better than their mean does, so these numbers mean nothing."
    return f"The forest explains {100 * found.explained:.0f} % of the variance in them: the less, the less they mean."


def _label(comparison: Comparison, configuration: Configuration) -> str:
    """A configuration's number in the table, and its settings."""
    number = comparison.configurations.index(configuration) + 1
    settings = ", ".join(
        f"{name} {show(configuration.settings.get(key))}" for key, name in comparison.varied.items()
    )
    text = f"{number}: {settings or configuration.runs[0].name}"
    return text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"


# -- learning curves ----------------------------------------------------------------------------------


def _curves(comparison: Comparison, named: Sequence[Configuration]) -> Figure:
    figure = new_figure(WIDTH, 4.4 + 0.2 * len(named))
    scores, losses = figure.subplots(1, 2)
    drawn: list[float] = []
    named_lines: dict[int, Any] = {}
    faint = _faint(len(comparison.configurations))
    for axes, key, thin in (
        (scores, f"val/{comparison.metric}", _as_it_is),
        (losses, "train/loss", _thinned),
    ):
        for place, configuration in enumerate(comparison.configurations):
            curves = [thin(run.curves[key]) for run in configuration.runs if key in run.curves]
            steps, mean, std = over_seeds(curves)
            drawn += mean.tolist() if axes is losses else []
            if not steps:
                continue
            if place >= len(named):
                axes.plot(steps, mean, color=OTHERS, linewidth=0.7, alpha=faint, zorder=1)
                continue
            colour, marker = COLOURS[place], "o" if len(steps) == 1 else None
            (line,) = axes.plot(steps, mean, color=colour, marker=marker, linewidth=1.7)
            axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)
            named_lines[place] = line
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    scores.set_ylabel(f"validation {comparison.metric}")
    losses.set_ylabel("training loss")
    if drawn and is_log(drawn):
        log_axis(losses, "y")
    entries = {_label(comparison, named[place]): named_lines[place] for place in sorted(named_lines)}
    if (baseline := comparison.baseline) is not None:
        entries["majority baseline"] = scores.axhline(baseline, color=INK, linewidth=1, dashes=(2, 3))
    if entries:
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", fontsize="small")
    return figure


def _faint(lines: int) -> float:
    """Opacity at which this many lines on top of each other can be told apart."""
    return max(0.2, min(0.6, 20 / lines))


def _as_it_is(curve: Curve) -> Curve:
    return curve


def _thinned(curve: Curve) -> Curve:
    """The curve in blocks, at most `_MOST_POINTS`: the mean of each at its last step."""
    width = -(-len(curve) // _MOST_POINTS)
    blocks = [curve[start : start + width] for start in range(0, len(curve), width)]
    return [(block[-1][0], sum(value for _, value in block) / len(block)) for block in blocks]


# -- settings -----------------------------------------------------------------------------------------


def _parallel(comparison: Comparison, keys: Sequence[str]) -> Figure:
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    ranked = comparison.ranked
    means = [c.mean for c in ranked if c.mean is not None]
    scales = [scale_of([c.settings.get(key) for c in ranked]) for key in keys]
    scales.append(scale_of(means))
    names = [comparison.varied[key] for key in keys] + [comparison.metric]
    figure = new_figure(max(WIDTH, 1.4 * len(names) + 1), 4.6)
    axes = figure.subplots()
    axes.grid(False)
    map_ = LinearSegmentedColormap.from_list("score", _WORST_TO_BEST)
    if not comparison.greater_is_better:
        map_ = map_.reversed()
    colours = ScalarMappable(
        Normalize(min(means), max(means) if max(means) > min(means) else min(means) + 1), map_
    )
    shades = colours.to_rgba(np.array(means))
    for number in reversed(range(len(ranked))):  # the best one last, on top
        places = [scale.positions[number] for scale in scales]
        axes.plot(
            range(len(places)),
            places,
            color=shades[number],
            linewidth=1.2 if number else 3,
            alpha=_faint(len(ranked)) if number else 1,
        )
    for place, (scale, name) in enumerate(zip(scales, names, strict=True)):
        axes.axvline(place, color=INK, linewidth=0.8)
        for height, text in scale.ticks:
            axes.plot([place - 0.02, place], [height, height], color=INK, linewidth=0.8)
            label = axes.text(place - 0.04, height, text, ha="right", va="center", fontsize="small", zorder=4)
            label.set_bbox({"facecolor": PAPER, "alpha": 0.7, "linewidth": 0, "pad": 0.5})
        kind = "log scale" if scale.kind == "log" else " "
        axes.text(place, 1.06, f"{shorten(name, 18)}\n{kind}", ha="center", va="bottom")
    axes.set(xlim=(-0.6, len(names) - 0.85), ylim=(-0.05, 1.05), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if max(means) > min(means):
        figure.colorbar(colours, ax=axes, label=comparison.metric, pad=0.02, fraction=0.04)
    return figure


# -- importance and cost --------------------------------------------------------------------------------


def _importance(comparison: Comparison, found: Importance) -> Figure:
    shown = found.settings[:_MOST_BARS][::-1]
    figure = new_figure(WIDTH, 1.2 + 0.32 * len(shown))
    axes = figure.subplots()
    axes.barh(
        [shorten(comparison.varied[key]) for key, *_ in shown],
        [value for _, value, _ in shown],
        height=0.6,
        xerr=[std for *_, std in shown],
        color=COLOURS[0],
        error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3},
    )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel(f"error added when the setting is shuffled, in {comparison.metric}")
    axes.grid(axis="y", visible=False)
    return figure


def _cost(comparison: Comparison) -> Figure:
    shown = [c for c in comparison.ranked if c.cost_s]
    figure = new_figure(WIDTH, 4.6)
    axes = figure.subplots()
    devices = sorted({c.device for c in shown})
    for device, colour, marker in zip(devices, COLOURS, "os", strict=False):
        mine = [c for c in shown if c.device == device]
        axes.errorbar(
            [c.cost_s or 0.0 for c in mine],
            [c.mean or 0.0 for c in mine],
            yerr=[c.std or 0.0 for c in mine],
            fmt=marker,
            color=colour,
            elinewidth=0.8,
            label=f"on {device}s",
        )
        front = _front(mine, comparison.greater_is_better)
        costs, means = [c.cost_s or 0.0 for c in front], [c.mean or 0.0 for c in front]
        axes.plot(costs, means, drawstyle="steps-post", color=colour, linewidth=1, alpha=0.7)
        labelled = None
        for c in reversed(front):  # from the best one on; one too near to the label before has none
            if labelled is None or _is_apart(c, labelled, shown):
                number = comparison.configurations.index(c) + 1
                place = (c.cost_s or 0.0, c.mean or 0.0)
                axes.annotate(str(number), place, (5, 4), textcoords="offset points")
                labelled = c
    if is_log([c.cost_s or 0.0 for c in shown]):
        log_axis(axes, "x")
    axes.margins(0.06)
    axes.set_xlabel(f"cost of a run, {' or '.join(devices)}-seconds")
    axes.set_ylabel(f"best validation {comparison.metric}")
    if len(devices) > 1:
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def _is_apart(one: Configuration, other: Configuration, shown: Sequence[Configuration]) -> bool:
    """Whether two points of the plot are far enough apart for two labels."""

    def share(values: Sequence[float], a: float, b: float) -> float:
        return abs(a - b) / ((max(values) - min(values)) or 1.0)

    costs, means = [c.cost_s or 0.0 for c in shown], [c.mean or 0.0 for c in shown]
    across = share(costs, one.cost_s or 0.0, other.cost_s or 0.0)
    return across > 0.04 or share(means, one.mean or 0.0, other.mean or 0.0) > 0.05


def _front(configurations: Sequence[Configuration], greater_is_better: bool) -> list[Configuration]:
    """The Pareto front: those that none of the same or a lower cost beats, the cheapest first."""
    sign = 1 if greater_is_better else -1
    front: list[Configuration] = []
    for candidate in sorted(configurations, key=lambda c: (c.cost_s or 0.0, -sign * (c.mean or 0.0))):
        if not front or sign * (candidate.mean or 0.0) > sign * (front[-1].mean or 0.0):
            front.append(candidate)
    return front
