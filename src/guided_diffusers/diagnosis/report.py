"""A diagnosis as a text table and as plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..files import aside
from ..utils import require_matplotlib

CURVES = {
    "accuracy": "accuracy",
    "cross_entropy": "cross entropy (nats)",
    "ece": "expected calibration error",
    "gradient_norm": "sigma |gradient|",
    "cosine": "cosine of the gradient",
}
#: of some of the curves: (key of the baseline, its name in the legend)
BASELINES = {
    "accuracy": ("chance", "chance"),
    "cross_entropy": ("prior_entropy", "label frequencies"),
    "ece": ("ece_floor", "calibrated, as few images"),
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
    """The main metrics as text, a line a level."""
    cells = [[name for name, _, _ in COLUMNS]]
    for row in rows:
        cells.append([format(row[key], spec) for _, key, spec in COLUMNS])
    pattern = "  ".join(f"{{:>{max(map(len, column))}}}" for column in zip(*cells, strict=True))
    return "\n".join(pattern.format(*line) for line in cells)


@contextmanager
def saved_axes(path: Path, count: int, title: str = "") -> Iterator[Sequence[Any]]:
    """Axes side by side; on exit the figure is written atomically to `path`."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * count, 3.4), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    yield axes
    for axis in axes:
        axis.grid(alpha=0.3)
    if title:
        figure.suptitle(title, fontsize="medium")
    with aside(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:].lower())


def plot(
    rows: Sequence[Mapping[str, Any]], path: Path, title: str = "", cosine: str = CURVES["cosine"]
) -> None:
    """Plot those `CURVES` that the rows have against sigma / alpha (without it: the timestep).

    Args:
        rows: metrics by noise level, of `Diagnosis.levels` or `held_out` in `metrics.json`.
        path: of the picture, written atomically.
        cosine: title of the cosine's curve.

    Raises:
        ImportError: if matplotlib is missing.
    """
    if any(row.get("status") == "harmful" for row in rows):
        title += " (x: worse than the uninformed baseline)"
    names = [name for name in CURVES if name in rows[0]]
    with saved_axes(path, len(names), title) as axes:
        for axis, name in zip(axes, names, strict=True):
            _plot_curve(axis, rows, name)
            axis.set_title(cosine if name == "cosine" else CURVES[name], fontsize="medium")


def _plot_curve(axis: Any, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """A metric with its error bars, its baseline and a cross at each harmful level."""
    key = "sigma_over_alpha" if "sigma_over_alpha" in rows[0] else "timestep"
    x, y = [row[key] for row in rows], [row[name] for row in rows]
    errors = np.nan_to_num([row.get(f"{name}_error", 0.0) for row in rows], posinf=0.0)
    axis.errorbar(x, y, errors, marker="o", markersize=4, capsize=2)
    baseline, label = BASELINES.get(name, ("", ""))
    if baseline in rows[0]:
        axis.plot(x, [row[baseline] for row in rows], "--", color="grey", label=label)
        axis.legend(fontsize="small", frameon=False)
    for row in rows:
        if row.get("status") == "harmful":
            axis.plot(row[key], row[name], "x", color="tab:red", markersize=9)
    axis.set_xlabel("sigma / alpha" if key == "sigma_over_alpha" else key)
    if key == "sigma_over_alpha":
        axis.set_xscale("log")
    if min(y) >= 0:
        axis.set_ylim(bottom=0)
