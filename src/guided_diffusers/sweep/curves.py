"""The points of a sweep as curves, for a light and for a dark page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils import aside, require_matplotlib
from .figures import METRICS, Result
from .points import number
from .verdict import ACCURACY, CRITERION, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = {
    "page": "#ffffff",
    "ink": "#1d2129",
    "faint": "#d9dde3",
    "soft": "#6b7280",
    "bad": "#c62828",
    "series": (
        "#2a6fdb",
        "#d9660f",
        "#138a5e",
        "#8b3fb8",
        "#b4862a",
        "#c2375f",
        "#3f8fa6",
        "#6d6d1f",
    ),
    "ramp": ("#9cc3f5", "#5b97e5", "#2a62b8", "#12305f"),
}
DARK = {
    "page": "#16191f",
    "ink": "#e8eaed",
    "faint": "#353b45",
    "soft": "#9aa3af",
    "bad": "#ff8a80",
    "series": (
        "#6ba6ff",
        "#ff9f52",
        "#41c794",
        "#c58bf0",
        "#e0bd68",
        "#ff7fa3",
        "#74c6dc",
        "#c3c35a",
    ),
    "ramp": ("#2f5590", "#4a82d0", "#86b4f5", "#d6e6ff"),
}
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "osD^vPX*"


def draw(results: Sequence[Result], verdict: Verdict, folder: Path) -> dict[str, str]:
    """Write NAME.png and, for a dark page, NAME-dark.png of each picture; {NAME: what it shows}.

    Raises:
        ImportError: where matplotlib is missing.
    """
    require_matplotlib()
    quality, variety = _axes(results)
    pictures = {
        "quality-diversity": (
            _quality_diversity,
            f"Quality against diversity ({METRICS[quality].title}, "
            f"{METRICS[variety].title}): a line a number of steps; the numbers beside it are "
            "guidance scales, a ring is no guidance. Up and to the right is better.",
        ),
        "quality-cost": (
            _quality_cost,
            "Quality against cost: a mark a point; the line joins those than which no "
            "cheaper one is better.",
        ),
        "by-scale": (
            _by_scale,
            "Each figure against the guidance scale, with intervals of 95%. Scale 0 is no "
            "guidance.",
        ),
    }
    for name, (picture, _) in pictures.items():
        for suffix, theme in (("", LIGHT), ("-dark", DARK)):
            figure = _themed(picture(results, verdict, theme), theme)
            with aside(folder / f"{name}{suffix}.png") as partial:
                figure.savefig(partial, format="png", dpi=150)
    return {name: text for name, (_, text) in pictures.items()}


def _axes(results: Sequence[Result]) -> tuple[str, str]:
    """The names of quality and diversity among the figures."""
    names = results[0].figures
    return (
        next(name for name in (ACCURACY, "precision", CRITERION) if name in names),
        next(name for name in ("recall", "coverage", "diversity", CRITERION) if name in names),
    )


def _figure(rows: int, columns: int, height: float = 3.6) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(5.0 * columns, 11.7), height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _themed(figure: Figure, theme: dict[str, Any]) -> Figure:
    """With the theme's page and ink, and nothing but a faint grid around the data."""
    figure.set_facecolor(theme["page"])
    for axis in figure.axes:
        axis.set_facecolor(theme["page"])
        axis.grid(color=theme["faint"], linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(which="both", colors=theme["soft"], labelsize=8, length=0)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme["faint"])
        for text in (axis.xaxis.label, axis.yaxis.label):
            text.set(color=theme["soft"], fontsize=9)
        axis.title.set(color=theme["ink"], fontsize=10, fontweight="bold")
    for legend in [*figure.legends, *(axis.get_legend() for axis in figure.axes)]:
        for text in legend.get_texts() if legend else ():
            text.set(color=theme["ink"], fontsize=8)
    return figure


def _lines(results: Sequence[Result], scheduler: str) -> dict[tuple[int, str], list[Result]]:
    """{(steps, guided): the points by scale}, each beginning with that of no guidance."""
    found, none = defaultdict(list), {}
    for one in sorted(
        results,
        key=lambda one: (one.point.num_inference_steps, one.point.guided, one.point.guidance_scale),
    ):
        if one.point.scheduler == scheduler:
            if one.point.guidance_scale == 0:
                none[one.point.num_inference_steps] = one
            else:
                found[one.point.num_inference_steps, one.point.guided].append(one)
    for steps, one in none.items():
        for line in [line for line in found if line[0] == steps] or [(steps, "")]:
            found[line].insert(0, one)
    return dict(found)


def _styles(
    results: Sequence[Result], theme: dict[str, Any]
) -> dict[tuple[int, str], dict[str, Any]]:
    """A line's colour says its steps, from few to many, its dashes when and how guidance acts."""
    from matplotlib.colors import LinearSegmentedColormap

    steps = sorted({one.point.num_inference_steps for one in results})
    ways = sorted({one.point.guided for one in results})
    ramp = LinearSegmentedColormap.from_list("steps", theme["ramp"])
    return {
        (count, guided): {
            "color": ramp(i / max(1, len(steps) - 1) if len(steps) > 1 else 0.6),
            "linestyle": DASHES[j % len(DASHES)],
            "linewidth": 1.6,
            "label": f"{count} steps" + (f", {guided}" if guided else ""),
        }
        for i, count in enumerate(steps)
        for j, guided in enumerate(ways)
    }


def _schedulers(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(one.point.scheduler for one in results))


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One for all panels, below them."""
    found = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if len(found) > 1:
        figure.legend(
            found.values(),
            found.keys(),
            loc="outside lower center",
            ncols=min(len(found), 6),
            frameon=False,
        )


def _quality_diversity(
    results: Sequence[Result], verdict: Verdict, theme: dict[str, Any]
) -> Figure:
    quality, variety = _axes(results)
    schedulers, styles = _schedulers(results), _styles(results, theme)
    figure, axes = _figure(1, len(schedulers), 4.2)
    for axis, scheduler in zip(axes[0], schedulers, strict=True):
        lines = _lines(results, scheduler)
        for place, (line, along) in enumerate(lines.items()):
            x, y = ([one.value(name) for one in along] for name in (variety, quality))
            axis.plot(x, y, marker="o", markersize=4, **styles[line])
            axis.plot(
                x[:1],
                y[:1],
                "o",
                markersize=6,
                color=theme["page"],
                markeredgecolor=styles[line]["color"],
                markeredgewidth=1.4,
            )
            if place in (0, len(lines) - 1):  # of all lines they would cover each other
                for one, across, up in zip(along, x, y, strict=True):
                    axis.annotate(
                        number(one.point.guidance_scale),
                        (across, up),
                        textcoords="offset points",
                        xytext=(5, 4) if place else (-5, -9),
                        fontsize=7.5,
                        color=theme["ink"],
                        ha="left" if place else "right",
                    )
        _mark_best(axis, results, verdict, scheduler, variety, quality, theme)
        axis.set(
            title=scheduler,
            xlabel=_label(variety),
            ylabel=_label(quality) if axis is axes[0][0] else "",
        )
        axis.margins(0.1)
        _percent(axis, quality)
    _share(axes[0])
    _legend(figure, axes[0])
    return figure


def _mark_best(
    axis: Axes,
    results: Sequence[Result],
    verdict: Verdict,
    scheduler: str,
    across: str,
    up: str,
    theme: dict[str, Any],
) -> None:
    for one in results:
        if one.point == verdict.best and one.point.scheduler == scheduler:
            axis.plot(
                one.value(across),
                one.value(up),
                marker="*",
                markersize=14,
                linestyle="none",
                color=theme["series"][1],
                markeredgecolor=theme["page"],
                zorder=5,
                label=f"lowest {METRICS[CRITERION].title}",
            )


def _quality_cost(results: Sequence[Result], verdict: Verdict, theme: dict[str, Any]) -> Figure:
    names = [name for name in (CRITERION, ACCURACY) if name in results[0].figures]
    schedulers = _schedulers(results)
    figure, axes = _figure(1, len(names), 4.2)
    for axis, name in zip(axes[0], names, strict=True):
        for i, scheduler in enumerate(schedulers):
            some = [one for one in results if one.point.scheduler == scheduler]
            axis.plot(
                [one.cost["seconds"] for one in some],
                [one.value(name) for one in some],
                MARKERS[i % len(MARKERS)],
                markersize=5,
                alpha=0.75,
                label=scheduler,
                markeredgewidth=0,
                color=theme["series"][i % len(theme["series"])],
            )
        front, reached = [], None
        for one in sorted(results, key=lambda one: (one.cost["seconds"], _loss(one, name))):
            if reached is None or _loss(one, name) < reached:
                front, reached = [*front, one], _loss(one, name)
        x, y = [one.cost["seconds"] for one in front], [one.value(name) for one in front]
        axis.plot(x, y, drawstyle="steps-post", color=theme["soft"], linewidth=1.2, zorder=1)
        for one in _apart(front):
            axis.annotate(
                f"scale {number(one.point.guidance_scale)}\n{one.point.num_inference_steps} steps",
                (one.cost["seconds"], one.value(name)),
                textcoords="offset points",
                ha="center",
                xytext=(0, 6 if METRICS[name].better == "more" else -22),
                fontsize=7,
                color=theme["ink"],
            )
        axis.set(
            xscale="log",
            xlabel=f"{results[0].cost['clock']} seconds an image",
            ylabel=_label(name),
            title="cheap and close" if name == CRITERION else "cheap and sharp",
        )
        axis.margins(0.15)
        if name == CRITERION and min(one.value(name) for one in results) > 0:
            axis.set_yscale("log")
        _plain_ticks(axis)
        _percent(axis, name)
    _legend(figure, axes[0])
    return figure


def _loss(result: Result, name: str) -> float:
    value = result.value(name)
    return -value if METRICS[name].better == "more" else value


def _apart(front: Sequence[Result], factor: float = 1.6) -> list[Result]:
    """Those with so much between their costs, the last ones first, so that their names don't cover each other."""
    found: list[Result] = []
    for one in reversed(front):
        if not found or one.cost["seconds"] * factor < found[-1].cost["seconds"]:
            found.append(one)
    return found


def _by_scale(results: Sequence[Result], verdict: Verdict, theme: dict[str, Any]) -> Figure:
    names = [
        name for name in (CRITERION, ACCURACY, "precision", "recall") if name in results[0].figures
    ]
    schedulers, styles = _schedulers(results), _styles(results, theme)
    figure, axes = _figure(len(schedulers), len(names), 2.8)
    for scheduler, row in zip(schedulers, axes, strict=True):
        worse = [
            one
            for one in results
            if one.point in verdict.harmful and one.point.scheduler == scheduler
        ]
        for name, axis in zip(names, row, strict=True):
            for line, along in _lines(results, scheduler).items():
                x = [one.point.guidance_scale for one in along]
                low, high = zip(*(one.ends(name) for one in along), strict=True)
                axis.fill_between(
                    x, low, high, color=styles[line]["color"], alpha=0.18, linewidth=0
                )
                axis.plot(
                    x,
                    [one.value(name) for one in along],
                    marker="o",
                    markersize=3.5,
                    **styles[line],
                )
            if name == CRITERION and worse:
                axis.plot(
                    [one.point.guidance_scale for one in worse],
                    [one.value(name) for one in worse],
                    "o",
                    markersize=8,
                    markerfacecolor="none",
                    markeredgecolor=theme["bad"],
                    markeredgewidth=1,
                    label="worse than no guidance",
                )
            axis.set(
                title="" if scheduler != schedulers[0] else METRICS[name].title,
                ylabel=scheduler if name == names[0] else "",
                xlabel="guidance scale" if scheduler == schedulers[-1] else "",
            )
            _percent(axis, name)
    for column in axes.T:
        _share(column)
    _legend(figure, axes[:, 0])
    return figure


def _label(name: str) -> str:
    better = METRICS[name].better
    return f"{METRICS[name].title} ({'nearer to 1' if better == 'real' else better} is better)"


def _share(axes: Sequence[Axes]) -> None:
    """The same limits in all panels of a row."""
    for get, put in (("get_xlim", "set_xlim"), ("get_ylim", "set_ylim")):
        limits = [getattr(axis, get)() for axis in axes]
        for axis in axes:
            getattr(axis, put)(min(low for low, _ in limits), max(high for _, high in limits))


def _percent(axis: Axes, name: str) -> None:
    from matplotlib.ticker import PercentFormatter

    if METRICS[name].form.endswith("%"):
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _plain_ticks(axis: Axes) -> None:
    """Numbers, not powers of ten, on logarithmic axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for one in (axis.xaxis, axis.yaxis):
        if one.get_scale() == "log":
            one.set_major_locator(LogLocator(subs=(1, 2, 5)))
            one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            one.set_minor_formatter(NullFormatter())
