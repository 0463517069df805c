"""Pictures of the model card: example images, and plots of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

from diffusers.utils.logging import get_logger

from ..diagnosis import BASELINES, CURVES
from ..files import aside
from ..text import plot_text
from .card_metrics import GUIDED_METRICS, Row, is_number, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..pipeline import ClassifierGuidedPipeline

logger = get_logger(__name__)
#: metrics at each noise level, and the titles of their plots
LEVEL_METRICS = {
    "accuracy": "accuracy",
    "zero_shot": "zero-shot accuracy",
    "retrieval": "retrieval accuracy",
    **{name: CURVES[name] for name in ("cross_entropy", "ece", "gradient_norm")},
    "loss": "denoising loss",
}
FRACTIONS = ("accuracy", "zero_shot", "retrieval")
COLORS = ("#3266a8", "#d1603d", "#4f9d69", "#8c5fa8", "#a88932")
SMALL_SIZE = 64  # pixels


def draw_levels(curves: Mapping[str, Sequence[Row]], path: Path) -> bool:
    """Plot each metric over the timestep, a line a model; False without metrics or matplotlib."""
    curves = {name: rows for name, rows in curves.items() if len(rows) > 1}
    present = set().union(*(row for rows in curves.values() for row in rows))
    metrics = [metric for metric in LEVEL_METRICS if metric in present]
    columns, rows = min(len(metrics), 3), ceil(len(metrics) / 3)
    figure = new_figure(3.1 * columns + 0.6, 2.8 * rows) if metrics else None
    if figure is None:
        return False
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, metric in zip(panels, metrics, strict=False):
        _draw_metric(panel, metric, curves)
    for panel in panels[len(metrics) :]:
        panel.remove()
    save_figure(figure, path)
    return True


def _draw_metric(panel: Axes, metric: str, curves: Mapping[str, Sequence[Row]]) -> None:
    baseline, baseline_label = BASELINES.get(metric, (None, ""))
    baseline_rows: list[Row] = []
    for index, (name, rows) in enumerate(curves.items()):
        rows = [row for row in rows if row.get(metric) is not None]
        if metric == "cross_entropy":  # a CLIP's is of captions, not of labels
            rows = [row for row in rows if "retrieval" not in row]
        if rows:
            color = COLORS[index % len(COLORS)]
            x, y = [row["timestep"] for row in rows], [row[metric] for row in rows]
            panel.plot(x, y, "o-", color=color, markersize=3.5, label=plot_text(words(name)))
        baseline_rows = baseline_rows or [row for row in rows if baseline in row]
    if baseline_rows:
        x, y = [row["timestep"] for row in baseline_rows], [row[baseline] for row in baseline_rows]
        panel.plot(x, y, "--", color="grey", linewidth=1, label=baseline_label)
    _style(panel, LEVEL_METRICS[metric], "timestep (larger: noisier)")
    panel.set_ylim(0, 1 if metric in FRACTIONS else None)
    if len(panel.lines) > 1 or len(curves) > 1:
        panel.legend(frameon=False, fontsize=7)


def draw_guided(rows: Sequence[Row], path: Path) -> bool:
    """Plot metrics of guided images as bars, one per row; False as for `draw_levels`."""
    metrics = [m for m in GUIDED_METRICS if any(is_number(row.get(m)) for row in rows)]
    if len(rows) < 2 or not metrics:
        return False
    figure = new_figure(3.1 * len(metrics) + 0.6, 0.3 * len(rows) + 0.9)
    if figure is None:
        return False
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    labels = [fill(plot_text(shorten(row["guidance"], 90)), 30) for row in rows]
    for panel, metric, color in zip(panels, metrics, COLORS, strict=False):
        values = [row.get(metric) or 0.0 for row in rows]
        bars = panel.barh(range(len(rows)), values, color=color, height=0.7)
        spec = ".1%" if metric == "agreement" else ".2f"
        panel.bar_label(bars, [format(value, spec) for value in values], padding=3, fontsize=7)
        _style(panel, GUIDED_METRICS[metric])
        panel.margins(x=0.2)
        panel.set_yticks(range(len(rows)), labels, fontsize=8)
    panels[0].invert_yaxis()
    save_figure(figure, path)
    return True


def new_figure(width: float, height: float) -> Figure | None:
    """A figure of this size in inches; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed: the card has no plots, only tables")
        return None
    return Figure(figsize=(width, height), layout="constrained")


def _style(panel: Axes, title: str, x_label: str = "") -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(x_label, fontsize=8)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    panel.set_axisbelow(True)


def save_figure(figure: Figure, path: Path) -> None:
    with aside(path) as partial:
        figure.savefig(partial, dpi=144, format="png", metadata={"Software": None})


def draw_example(pipeline: ClassifierGuidedPipeline, path: Path) -> None:
    """Save a picture with one row of images per label, fewer for large or latent models."""
    from ..sampling import grid, image_generator, save_image

    size: Any = pipeline.unet.config.get("sample_size") or SMALL_SIZE
    largest = max(size) if isinstance(size, (tuple, list)) else size
    columns, max_rows = (5, 10) if largest <= SMALL_SIZE and pipeline.vae is None else (2, 4)
    count = pipeline.num_labels or 0
    labels: list[int | None] = list(range(count)) or [None]
    if count > max_rows:
        labels = sorted({row * count // max_rows for row in range(max_rows)})
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for row, label in enumerate(labels):
        images += pipeline(
            label,
            num_images_per_label=columns,
            generator=[image_generator(0, row * columns + i) for i in range(columns)],
            num_inference_steps=min(pipeline.config.defaults["num_inference_steps"], 30),
        ).images
    id2label = pipeline.config.id2label or {}
    names = [id2label.get(label, str(label)) for label in labels if label is not None]
    save_image(grid(images, names or None), path)
