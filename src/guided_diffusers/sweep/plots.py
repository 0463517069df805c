"""Plots of a sweep's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils import aside, require_matplotlib
from .metrics import ACCURACY, FRECHET, METRICS, Result, group_by_curve
from .settings import Curve, format_number
from .verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MUTED, FAINT, BAD = "#6b7280", "#d9dde3", "#c62828"
SERIES = "#2a6fdb #d9660f #138a5e #8b3fb8 #b4862a #c2375f #3f8fa6 #6d6d1f".split()
STEPS_RAMP = "#9cc3f5 #5b97e5 #2a62b8 #12305f".split()  # few steps to many
STYLE: dict[str, Any] = {  # two spines, no ticks, a light grid behind the data
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": "#1d2129",
}
for axis in ("xtick", "ytick"):
    STYLE |= {f"{axis}.color": MUTED, f"{axis}.labelsize": 8}
    STYLE |= {f"{axis}.major.size": 0, f"{axis}.minor.size": 0}
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "osD^vPX*"
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
    plots = {
        "quality-diversity": (
            _plot_quality_diversity,
            f"Quality ({METRICS[quality].title}) against diversity ({METRICS[diversity].title}), "
            "one line per number of steps. The numbers are guidance scales; a ring marks no "
            "guidance. Up and to the right is better.",
        ),
        "quality-cost": (
            _plot_quality_cost,
            "Quality against cost, one mark per setting. The line joins the settings that no "
            "cheaper one surpasses.",
        ),
        "by-scale": (
            _plot_by_scale,
            "Metrics against guidance scale, with 95% intervals. Scale 0 is no guidance.",
        ),
    }
    for name, (plot, _) in plots.items():
        with matplotlib.rc_context(STYLE), aside(folder / f"{name}.png") as path:
            plot(results, verdict).savefig(path, format="png", dpi=150)
    return {name: caption for name, (_, caption) in plots.items()}


def _quality_and_diversity(results: Sequence[Result]) -> tuple[str, str]:
    """Names of the metrics that stand for quality and diversity."""
    measured = results[0].metrics
    quality = next(name for name in (ACCURACY, "precision", FRECHET) if name in measured)
    diversity = next(name for name in ("recall", "coverage", FRECHET) if name in measured)
    return quality, diversity


def _subplots(rows: int, columns: int, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(5.0 * columns, 11.7), height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _by_scheduler(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.setting.scheduler, []).append(result)
    return groups


def _line_styles(results: Sequence[Result]) -> dict[tuple[int, str], dict[str, Any]]:
    """{(steps, variant): style}: the colour encodes the steps, the dashes the variant."""
    from matplotlib.colors import LinearSegmentedColormap

    steps = sorted({result.setting.num_inference_steps for result in results})
    variants = sorted({result.setting.variant for result in results})
    ramp = LinearSegmentedColormap.from_list("steps", STEPS_RAMP)
    styles = {}
    for i, count in enumerate(steps):
        for j, variant in enumerate(variants):
            styles[count, variant] = {
                "color": ramp(i / (len(steps) - 1) if len(steps) > 1 else 0.6),
                "linestyle": DASHES[j % len(DASHES)],
                "linewidth": 1.6,
                "label": f"{count} steps" + (f", {variant}" if variant else ""),
            }
    return styles


def _plot_quality_diversity(results: Sequence[Result], verdict: Verdict) -> Figure:
    quality, diversity = _quality_and_diversity(results)
    groups, styles = _by_scheduler(results), _line_styles(results)
    figure, axes = _subplots(1, len(groups), 4.2)
    for axis, (scheduler, selected) in zip(axes[0], groups.items(), strict=True):
        curves = group_by_curve(selected)
        for i, (curve, along) in enumerate(curves.items()):
            style = styles[curve.steps, curve.variant]
            _plot_curve(axis, along, diversity, quality, style)
            if i in (0, len(curves) - 1):  # labels of all curves would overlap
                _label_scales(axis, along, diversity, quality, below=i == 0)
        _mark_best(axis, selected, verdict, diversity, quality)
        axis.set(title=scheduler, xlabel=_axis_label(diversity))
        axis.margins(0.1)
        _format_percent(axis, quality)
    axes[0][0].set_ylabel(_axis_label(quality))
    _share_limits(axes[0])
    _add_legend(figure, axes[0])
    return figure


def _plot_curve(
    axis: Axes,
    along: Sequence[Result],
    x_name: str,
    y_name: str,
    style: dict[str, Any],
) -> None:
    """A line through the results, with a ring around the first."""
    x = [result.value(x_name) for result in along]
    y = [result.value(y_name) for result in along]
    axis.plot(x, y, marker="o", markersize=4, **style)
    ring = {"markeredgecolor": style["color"], "markeredgewidth": 1.4, "markersize": 6}
    axis.plot(x[:1], y[:1], "o", color="white", **ring)


def _label_scales(
    axis: Axes, along: Sequence[Result], x_name: str, y_name: str, below: bool
) -> None:
    for result in along:
        axis.annotate(
            format_number(result.setting.guidance_scale),
            (result.value(x_name), result.value(y_name)),
            textcoords="offset points",
            xytext=(-5, -9) if below else (5, 4),
            fontsize=7.5,
            ha="right" if below else "left",
        )


def _mark_best(
    axis: Axes,
    results: Sequence[Result],
    verdict: Verdict,
    x_name: str,
    y_name: str,
) -> None:
    for result in results:
        if result.setting == verdict.best:
            axis.plot(
                result.value(x_name),
                result.value(y_name),
                marker="*",
                markersize=14,
                linestyle="none",
                color=SERIES[1],
                markeredgecolor="white",
                zorder=5,
                label=f"lowest {METRICS[FRECHET].title}",
            )


def _plot_quality_cost(results: Sequence[Result], verdict: Verdict) -> Figure:
    names = [name for name in (FRECHET, ACCURACY) if name in results[0].metrics]
    figure, axes = _subplots(1, len(names), 4.2)
    for axis, name in zip(axes[0], names, strict=True):
        for i, (scheduler, selected) in enumerate(_by_scheduler(results).items()):
            axis.plot(
                [result.seconds for result in selected],
                [result.value(name) for result in selected],
                MARKERS[i % len(MARKERS)],
                markersize=5,
                alpha=0.75,
                label=scheduler,
                markeredgewidth=0,
                color=SERIES[i % len(SERIES)],
            )
        _plot_cost_front(axis, results, name)
        axis.set(
            xscale="log",
            xlabel=f"{results[0].cost['clock']} seconds per image",
            ylabel=_axis_label(name),
            title=f"{METRICS[name].title} and cost",
        )
        axis.margins(0.15)
        if name == FRECHET and min(result.value(name) for result in results) > 0:
            axis.set_yscale("log")
        _format_log_ticks(axis)
        _format_percent(axis, name)
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
    labelled_seconds = float("inf")
    for result in reversed(front):
        if result.seconds * LABEL_DISTANCE >= labelled_seconds:
            continue
        labelled_seconds = result.seconds
        setting = result.setting
        axis.annotate(
            f"scale {format_number(setting.guidance_scale)}\n{setting.num_inference_steps} steps",
            (result.seconds, result.value(name)),
            textcoords="offset points",
            ha="center",
            xytext=(0, 6 if sign < 0 else -22),
            fontsize=7,
        )


def _plot_by_scale(results: Sequence[Result], verdict: Verdict) -> Figure:
    names = [n for n in (FRECHET, ACCURACY, "precision", "recall") if n in results[0].metrics]
    groups, styles = _by_scheduler(results), _line_styles(results)
    figure, axes = _subplots(len(groups), len(names), 2.8)
    for (scheduler, selected), row in zip(groups.items(), axes, strict=True):
        curves = group_by_curve(selected)
        for name, axis in zip(names, row, strict=True):
            for curve, along in curves.items():
                _plot_with_band(axis, curve, along, name, styles)
            if name == FRECHET:
                _mark_harmful(axis, selected, verdict)
            _format_percent(axis, name)
        row[0].set_ylabel(scheduler)
    for name, column in zip(names, axes.T, strict=True):
        column[0].set_title(METRICS[name].title)
        column[-1].set_xlabel("guidance scale")
        _share_limits(column)
    _add_legend(figure, axes[:, 0])
    return figure


def _plot_with_band(
    axis: Axes,
    curve: Curve,
    along: Sequence[Result],
    name: str,
    styles: dict[tuple[int, str], dict[str, Any]],
) -> None:
    """A metric against the guidance scale, with its intervals as a band."""
    style = styles[curve.steps, curve.variant]
    scales = [result.setting.guidance_scale for result in along]
    low, high = zip(*(result.interval(name) for result in along), strict=True)
    axis.fill_between(scales, low, high, color=style["color"], alpha=0.18, linewidth=0)
    values = [result.value(name) for result in along]
    axis.plot(scales, values, marker="o", markersize=3.5, **style)


def _mark_harmful(axis: Axes, results: Sequence[Result], verdict: Verdict) -> None:
    worse = [result for result in results if result.setting in verdict.harmful]
    if worse:
        axis.plot(
            [result.setting.guidance_scale for result in worse],
            [result.value(FRECHET) for result in worse],
            "o",
            markersize=8,
            markerfacecolor="none",
            markeredgecolor=BAD,
            markeredgewidth=1,
            label="worse than no guidance",
        )


def _add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all axes, below them."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    if len(handles) > 1:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(len(handles), 6),
        )


def _axis_label(name: str) -> str:
    better = METRICS[name].better
    return f"{METRICS[name].title} ({'closer to 1' if better == 'real' else better} is better)"


def _share_limits(axes: Sequence[Axes]) -> None:
    """Set the same limits for all axes."""
    x_limits, y_limits = [axis.get_xlim() for axis in axes], [axis.get_ylim() for axis in axes]
    for axis in axes:
        axis.set_xlim(min(low for low, _ in x_limits), max(high for _, high in x_limits))
        axis.set_ylim(min(low for low, _ in y_limits), max(high for _, high in y_limits))


def _format_percent(axis: Axes, name: str) -> None:
    from matplotlib.ticker import PercentFormatter

    if METRICS[name].format.endswith("%"):
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _format_log_ticks(axis: Axes) -> None:
    """Plain numbers instead of powers of ten on logarithmic axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for scale_axis in (axis.xaxis, axis.yaxis):
        if scale_axis.get_scale() == "log":
            scale_axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale_axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            scale_axis.set_minor_formatter(NullFormatter())
