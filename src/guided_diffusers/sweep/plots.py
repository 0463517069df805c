"""Plots of a sweep's results."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import aside
from ..utils import require_matplotlib
from .metrics import ACCURACY, FRECHET, METRICS, Result, group_by_curve
from .verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MUTED, FAINT, BAD = "#6b7280", "#d9dde3", "#c62828"
SERIES = "#2a6fdb #d9660f #138a5e #8b3fb8 #b4862a #c2375f #3f8fa6 #6d6d1f".split()
STEPS_RAMP = "#9cc3f5 #5b97e5 #2a62b8 #12305f".split()  # few steps to many
STYLE: dict[str, Any] = {"axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6}
STYLE |= {"axes.edgecolor": FAINT, "grid.color": FAINT, "axes.labelcolor": MUTED}
STYLE |= {"axes.spines.right": False, "axes.spines.top": False, "legend.frameon": False}
STYLE |= {"axes.labelsize": 9, "axes.titlesize": 10, "legend.fontsize": 8}
STYLE |= {"axes.titleweight": "bold", "text.color": "#1d2129"}
for ticks in ("xtick", "ytick"):
    STYLE |= {f"{ticks}.color": MUTED, f"{ticks}.labelsize": 8}
    STYLE |= {f"{ticks}.major.size": 0, f"{ticks}.minor.size": 0}
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "osD^vPX*"
LABEL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5}
LABEL_DISTANCE = 1.6  # least ratio of the costs of two labels, which would overlap otherwise


def draw(results: Sequence[Result], verdict: Verdict, folder: Path) -> dict[str, str]:
    """Write NAME.png of each plot.

    Returns:
        {NAME: caption}.

    Raises:
        ImportError: if matplotlib is missing.
    """
    require_matplotlib()
    import matplotlib

    quality, diversity = _quality_and_diversity(results)
    captions = {
        "quality-diversity": f"Quality ({METRICS[quality].title}) against diversity "
        f"({METRICS[diversity].title}), one line per number of steps. The numbers are guidance "
        "scales; a ring marks no guidance. Up and to the right is better.",
        "quality-cost": "Quality against cost, one mark per setting. The line joins the settings "
        "that no cheaper one surpasses.",
        "by-scale": "Metrics against guidance scale, with 95% intervals. Scale 0 is no guidance.",
    }
    plots = (_plot_quality_diversity, _plot_quality_cost, _plot_by_scale)
    for name, plot in zip(captions, plots, strict=True):
        with matplotlib.rc_context(STYLE), aside(folder / f"{name}.png") as path:
            plot(results, verdict).savefig(path, format="png", dpi=150)
    return captions


def _quality_and_diversity(results: Sequence[Result]) -> tuple[str, str]:
    """Names of the metrics that stand for quality and diversity."""
    measured = results[0].metrics
    quality = next(name for name in (ACCURACY, "precision", FRECHET) if name in measured)
    diversity = next(name for name in ("recall", "coverage", FRECHET) if name in measured)
    return quality, diversity


def _subplots(rows: int, columns: int, height: float, **share: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(5.0 * columns, 11.7), height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **share)


def _by_scheduler(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups = groupby(results, key=lambda result: result.setting.scheduler)  # they are sorted
    return {scheduler: list(selected) for scheduler, selected in groups}


def _line_styles(results: Sequence[Result]) -> dict[tuple[int, str], dict[str, Any]]:
    """{(steps, variant): style}: the colour encodes the steps, the dashes the variant."""
    from matplotlib.colors import LinearSegmentedColormap

    steps = sorted({result.setting.num_inference_steps for result in results})
    variants = sorted({result.setting.variant for result in results})
    ramp = LinearSegmentedColormap.from_list("steps", STEPS_RAMP)
    styles = {}
    for i, count in enumerate(steps):
        color = ramp(i / (len(steps) - 1) if len(steps) > 1 else 0.6)
        for j, variant in enumerate(variants):
            label = f"{count} steps" + (f", {variant}" if variant else "")
            style = {"color": color, "linestyle": DASHES[j % len(DASHES)], "label": label}
            styles[count, variant] = {**style, "linewidth": 1.6, "marker": "o", "markersize": 4}
    return styles


def _plot_quality_diversity(results: Sequence[Result], verdict: Verdict) -> Figure:
    quality, diversity = _quality_and_diversity(results)
    groups, styles = _by_scheduler(results), _line_styles(results)
    figure, axes = _subplots(1, len(groups), 4.2, sharex=True, sharey=True)
    for axis, (scheduler, selected) in zip(axes[0], groups.items(), strict=True):
        curves = group_by_curve(selected)
        for i, (curve, along) in enumerate(curves.items()):
            points = [(result.value(diversity), result.value(quality)) for result in along]
            style = styles[curve.steps, curve.variant]
            axis.plot(*zip(*points, strict=True), **style)
            ring = {"edgecolors": style["color"], "linewidths": 1.4, "zorder": 3}
            axis.scatter(*points[0], 36, "white", **ring)
            if i not in (0, len(curves) - 1):  # labels of all curves would overlap
                continue
            offset, align = ((-5, -9), "right") if i == 0 else ((5, 4), "left")
            for result, point in zip(along, points, strict=True):
                axis.annotate(result.setting.scale_text, point, offset, ha=align, **LABEL)
        for result in selected:
            if result.setting == verdict.best:
                star = {"marker": "*", "edgecolors": "white", "zorder": 5}
                star["label"] = f"lowest {METRICS[FRECHET].title}"
                point = (result.value(diversity), result.value(quality))
                axis.scatter(*point, 196, SERIES[1], **star)
        axis.set(title=scheduler, xlabel=_axis_label(diversity))
        axis.margins(0.1)
        _format_ticks(axis, quality)
    axes[0][0].set_ylabel(_axis_label(quality))
    _add_legend(figure, axes[0])
    return figure


def _plot_quality_cost(results: Sequence[Result], verdict: Verdict) -> Figure:
    names = [name for name in (FRECHET, ACCURACY) if name in results[0].metrics]
    figure, axes = _subplots(1, len(names), 4.2)
    for axis, name in zip(axes[0], names, strict=True):
        for i, (scheduler, selected) in enumerate(_by_scheduler(results).items()):
            x = [result.seconds for result in selected]
            y = [result.value(name) for result in selected]
            mark = {"marker": MARKERS[i % len(MARKERS)], "color": SERIES[i % len(SERIES)]}
            axis.scatter(x, y, 25, alpha=0.75, linewidths=0, zorder=2, label=scheduler, **mark)
        _plot_cost_front(axis, results, name)
        unit = f"{results[0].cost['clock']} seconds per image"
        axis.set(xscale="log", xlabel=unit, ylabel=_axis_label(name))
        axis.set_title(f"{METRICS[name].title} and cost")
        axis.margins(0.15)
        if name == FRECHET and min(result.value(name) for result in results) > 0:
            axis.set_yscale("log")
        _format_ticks(axis, name)
    _add_legend(figure, axes[0])
    return figure


def _plot_cost_front(axis: Axes, results: Sequence[Result], name: str) -> None:
    """A line through the results that are better than all cheaper ones, and labels."""
    sign = -1 if METRICS[name].better == "more" else 1
    front: list[Result] = []
    for result in sorted(results, key=lambda r: (r.seconds, sign * r.value(name))):
        if not front or sign * result.value(name) < sign * front[-1].value(name):
            front.append(result)
    x, y = [result.seconds for result in front], [result.value(name) for result in front]
    axis.plot(x, y, drawstyle="steps-post", color=MUTED, linewidth=1.2, zorder=1)
    offset = (0, 6 if sign < 0 else -22)
    labelled_seconds = float("inf")
    for result in reversed(front):
        if result.seconds * LABEL_DISTANCE < labelled_seconds:
            labelled_seconds, setting = result.seconds, result.setting
            text = f"scale {setting.scale_text}\n{setting.num_inference_steps} steps"
            axis.annotate(text, (result.seconds, result.value(name)), offset, ha="center", **LABEL)


def _plot_by_scale(results: Sequence[Result], verdict: Verdict) -> Figure:
    names = [n for n in (FRECHET, ACCURACY, "precision", "recall") if n in results[0].metrics]
    groups, styles = _by_scheduler(results), _line_styles(results)
    figure, axes = _subplots(len(groups), len(names), 2.8, sharex=True, sharey="col")
    for (scheduler, selected), row in zip(groups.items(), axes, strict=True):
        for name, axis in zip(names, row, strict=True):
            for curve, along in group_by_curve(selected).items():
                style = styles[curve.steps, curve.variant]
                scales = [result.setting.guidance_scale for result in along]
                low, high = zip(*(result.interval(name) for result in along), strict=True)
                axis.fill_between(scales, low, high, color=style["color"], alpha=0.18, linewidth=0)
                axis.plot(scales, [result.value(name) for result in along], **style)
            _format_ticks(axis, name)
        worse = [result for result in selected if result.setting in verdict.harmful]
        if worse:
            x = [result.setting.guidance_scale for result in worse]
            y = [result.value(FRECHET) for result in worse]
            ring = {"edgecolors": BAD, "zorder": 3, "label": "worse than no guidance"}
            row[0].scatter(x, y, 64, "none", **ring)
        row[0].set_ylabel(scheduler)
    for name, column in zip(names, axes.T, strict=True):
        column[0].set_title(METRICS[name].title)
        column[-1].set_xlabel("guidance scale")
    _add_legend(figure, axes[:, 0])
    return figure


def _add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all axes, below them."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    if len(handles) > 1:
        place = {"loc": "outside lower center", "ncols": min(len(handles), 6)}
        figure.legend(handles.values(), handles.keys(), **place)


def _axis_label(name: str) -> str:
    better = METRICS[name].better
    return f"{METRICS[name].title} ({'closer to 1' if better == 'real' else better} is better)"


def _format_ticks(axis: Axes, name: str) -> None:
    """Percent for metrics that are shares; plain numbers, no powers of ten, on log axes."""
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    for scale_axis in (axis.xaxis, axis.yaxis):
        if scale_axis.get_scale() == "log":
            scale_axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale_axis.set_major_formatter("{x:g}")
            scale_axis.set_minor_formatter(NullFormatter())
    if METRICS[name].format.endswith("%"):
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
