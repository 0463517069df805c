"""A diagnosis on the screen, as JSON and as curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils import aside, require_matplotlib, write_json  # noqa: F401 - the last for its package

CURVES = {
    "accuracy": "accuracy",
    "cross_entropy": "cross entropy (nats)",
    "ece": "expected calibration error",
    "gradient_norm": "sigma |gradient|",
    "cosine": "cosine of the gradient",
}
BASELINES = {
    "accuracy": ("chance", "chance"),
    "cross_entropy": ("prior_entropy", "the labels' frequencies"),
    "ece": ("ece_floor", "of a calibrated one, so few images"),
}
COLUMNS = (
    ("sigma/alpha", "sigma_over_alpha", ".3g"),
    ("t", "timestep", ".0f"),
    ("accuracy", "accuracy", ".3f"),
    ("cross ent.", "cross_entropy", ".3f"),
    ("informat.", "information", "+.3f"),
    ("+-", "information_error", ".3f"),
    ("ECE", "ece", ".3f"),
    ("floor", "ece_floor", ".3f"),
    ("scale", "logit_scale", ".2f"),
    ("|grad|", "gradient_norm", ".2g"),
    ("cosine", "cosine", ".2f"),
    ("", "status", ""),
)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The levels' main figures, a row a level."""
    cells = [[name for name, _, _ in COLUMNS]]
    cells += [[format(row[key], form) for _, key, form in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def plot(
    rows: Sequence[Mapping[str, Any]], path: Path, title: str = "", cosine: str = CURVES["cosine"]
) -> None:
    """Draw the `CURVES` that the rows have against sigma / alpha (else the timestep); written aside, then moved.

    Args:
        rows: a mapping a noise level, as of `Diagnosis.levels` or of a training's `metrics.json`.
        cosine: what the cosine is to.

    Raises:
        ImportError: where matplotlib is missing, saying what to install.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    names = [name for name in CURVES if name in rows[0]]
    across = "sigma_over_alpha" if "sigma_over_alpha" in rows[0] else "timestep"
    x = [row[across] for row in rows]
    figure = Figure(figsize=(3.6 * len(names), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        y, errors = [row[name] for row in rows], [row.get(f"{name}_error", 0.0) for row in rows]
        axis.errorbar(
            x,
            y,
            [error if math.isfinite(error) else 0.0 for error in errors],
            marker="o",
            markersize=4,
            capsize=2,
        )
        if name in BASELINES and BASELINES[name][0] in rows[0]:
            key, label = BASELINES[name]
            axis.plot(x, [row[key] for row in rows], "--", color="grey", label=label)
            axis.legend(fontsize="small", frameon=False)
        for row in rows:
            if row.get("status") == "harmful":
                axis.plot(row[across], row[name], "x", color="tab:red", markersize=9)
        axis.set_title(cosine if name == "cosine" else CURVES[name], fontsize="medium")
        axis.set_xlabel("sigma / alpha" if across == "sigma_over_alpha" else "timestep")
        if across == "sigma_over_alpha":
            axis.set_xscale("log")
        if min(y) >= 0:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    if any(row.get("status") == "harmful" for row in rows):
        title += " (x: worse than silence)"
    if title:
        figure.suptitle(title, fontsize="medium")
    with aside(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:])
