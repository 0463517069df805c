"""What a folder's figures (JSON) hold, as rows that the card's pictures and tables are made of, and these pictures.

A training's `metrics.json` has `held_out`, and `guided-diffusers inspect`'s `diagnosis.json` has `levels`, a row a
noise level each. A row with `agreement` or `frechet_distance` says how good guided images are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

from diffusers.utils.logging import get_logger

from ..diagnosis import BASELINES, CURVES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = get_logger(__name__)
Rows = Sequence[Mapping[str, Any]]
AT_LEVELS = {
    "accuracy": "accuracy",
    "zero_shot": "accuracy by unseen captions",
    "retrieval": "own caption found",
    **{name: CURVES[name] for name in ("cross_entropy", "ece", "gradient_norm")},
    "loss": "loss of the network",
}
GUIDED = {
    "agreement": "judge agrees",
    "frechet_distance": "Frechet distance (less is nearer)",
    "recall": "recall",
}
ALIASES = {"judge_agreement": "agreement"}
COLORS = ("#3266a8", "#d1603d", "#4f9d69", "#8c5fa8", "#a88932")


def level_rows(figures: Mapping[str, Any]) -> dict[str, Rows]:
    """{name: rows} of all figures that have a row a noise level."""
    found = {}
    for name, part in figures.items():
        rows = (part.get("held_out") or part.get("levels")) if isinstance(part, dict) else None
        if (
            isinstance(rows, list)
            and rows
            and all(isinstance(row, dict) and "timestep" in row for row in rows)
        ):
            found[name] = sorted(rows, key=lambda row: row["timestep"])
    return found


def guided_rows(figures: Mapping[str, Any]) -> dict[str, Rows]:
    """{name: rows} of all figures of guided images; a row's `guidance` says what guided."""
    found = {}
    for name, part in figures.items():
        if not isinstance(part, dict):
            continue
        named = [{"guidance": key, **row} for key, row in part.items() if isinstance(row, dict)]
        for rows in (part.get("rows"), named):
            rows = [
                {ALIASES.get(key, key): value for key, value in row.items()}
                for row in rows or ()
                if isinstance(row, dict)
            ]
            if rows and all(GUIDED.keys() & row.keys() for row in rows):
                found[name] = [{"guidance": _words(row), **row} for row in rows]
    return found


def _words(row: Mapping[str, Any]) -> str:
    """What guided, in words, of a row without `guidance`."""
    scale = row.get("guidance_scale", row.get("scale"))
    return "guided" if scale is None else f"scale {scale:g}" if scale else "unguided"


def draw_levels(curves: Mapping[str, Rows], path: Path) -> bool:
    """A panel a measure, over the timestep; False where there is nothing to draw, or nothing to draw it with."""
    curves = {name: rows for name, rows in curves.items() if len(rows) > 1}
    names = [
        name for name in AT_LEVELS if any(name in row for rows in curves.values() for row in rows)
    ]
    if (
        not names
        or (figure := _figure(3.1 * min(len(names), 3) + 0.6, 2.8 * -(-len(names) // 3))) is None
    ):
        return False
    panels = figure.subplots(-(-len(names) // 3), min(len(names), 3), squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=False):
        own = [
            (
                color,
                label,
                [
                    row
                    for row in rows
                    if row.get(name) is not None
                    and not (name == "cross_entropy" and "retrieval" in row)
                ],
            )  # of captions, not of labels
            for color, (label, rows) in zip(COLORS * len(curves), curves.items(), strict=False)
        ]
        for color, label, rows in own:
            if rows:
                panel.plot(
                    [row["timestep"] for row in rows],
                    [row[name] for row in rows],
                    "o-",
                    color=color,
                    markersize=3.5,
                    label=label.replace("_", " "),
                )
        key, words = BASELINES.get(name, ("", ""))
        if floor := next(
            (
                [row for row in rows if key in row]
                for _, _, rows in own
                if any(key in row for row in rows)
            ),
            None,
        ):
            panel.plot(
                [row["timestep"] for row in floor],
                [row[key] for row in floor],
                "--",
                color="grey",
                linewidth=1,
                label=words,
            )
        _tidy(panel, AT_LEVELS[name], "timestep (more is noisier)")
        panel.set_ylim(0, 1 if name in ("accuracy", "zero_shot", "retrieval") else None)
        if len(panel.lines) > 1 or len(curves) > 1:
            panel.legend(frameon=False, fontsize=7)
    for panel in panels[len(names) :]:
        panel.remove()
    return _save(figure, path)


def draw_guided(rows: Rows, path: Path) -> bool:
    """A bar a row, a panel a measure; False as of `draw_levels`."""
    names = [
        name for name in GUIDED if any(isinstance(row.get(name), (int, float)) for row in rows)
    ]
    if (
        len(rows) < 2
        or not names
        or (figure := _figure(3.1 * len(names) + 0.6, 0.3 * len(rows) + 0.9)) is None
    ):
        return False
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    labels = [fill(shorten(row["guidance"], 90), 30) for row in rows]
    for panel, name, color in zip(panels, names, COLORS, strict=False):
        values = [row.get(name) or 0.0 for row in rows]
        bars = panel.barh(range(len(rows)), values, color=color, height=0.7)
        form = ".1%" if name == "agreement" else ".2f"
        panel.bar_label(bars, [format(value, form) for value in values], padding=3, fontsize=7)
        _tidy(panel, GUIDED[name])
        panel.margins(x=0.2)
        panel.set_yticks(range(len(rows)), labels, fontsize=8)
    panels[0].invert_yaxis()
    return _save(figure, path)


def _figure(width: float, height: float) -> Figure | None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib isn't installed: the card has its figures as tables only")
        return None
    return Figure(figsize=(width, height), layout="constrained")


def _tidy(panel: Axes, title: str, below: str = "") -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(below, fontsize=8)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    panel.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> bool:
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=144, format="png", metadata={"Software": None})
    os.replace(aside, path)
    return True
