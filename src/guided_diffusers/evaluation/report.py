"""An evaluation as a text table and as plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import aside
from ..text import plot_text, printable
from ..utils import require_matplotlib
from .memorisation import Pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETTER = {"less": "less", "more": "more", "real": "near the real images'"}
MAX_NAMED_CLASSES = 60  # of a confusion matrix; more names don't fit
MAX_NUMBERED_CLASSES = 20  # whose shares are written in the cells


def metrics_table(
    metrics: Mapping[str, Mapping[str, Any]],
    per_class: Sequence[Mapping[str, Any]],
    bits: Mapping[str, Any] | None,
    notes: Sequence[str],
) -> str:
    """All metrics as text: a table, a table of the classes, and the notes."""
    rows = [["", "value", "interval", "real images", ""]]
    for name, metric in metrics.items():
        title = printable(metric.get("name", name.replace("_", " ")))
        real = f"{metric['real']:.4g}" if "real" in metric else ""
        rows.append([title, *_cells(metric), real, f"{BETTER[metric['better']]} is better"])
    if bits is not None:
        note = f"of {bits['images']} real images; less is better"
        rows.append(["bits per dimension", *_cells(bits["total"]), "", note])
    text = _aligned(rows) if len(rows) > 1 else ""
    names = ("frechet_distance", "top_1", "top_5")
    columns = [name for name in names if any(row.get(name) for row in per_class)]
    if columns:
        rows = [["class", "images"]]
        for name in columns:
            rows[0] += [name.replace("_", " "), "interval"]
        for row in per_class:
            cells = [cell for name in columns for cell in _cells(row.get(name))]
            rows.append([printable(row["name"]), str(row["images"]), *cells])
        text += "\n\n" + _aligned(rows)
    return text + "".join(f"\nNote: {printable(note)}." for note in notes)


def _cells(metric: Mapping[str, Any] | None) -> tuple[str, str]:
    """Value and interval."""
    if not metric:
        return "", ""
    interval = metric.get("interval")
    text = "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"
    return f"{metric['value']:.4g}", text


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


@contextmanager
def new_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A matplotlib figure of this size in inches, which is saved at the end."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with aside(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def draw_confusion(counts: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """Plot the share of each label's images (row) that the judge assigns to each class (column)."""
    matrix = torch.tensor(counts, dtype=torch.float64)
    labels = matrix.sum(1).nonzero().flatten().tolist()  # those that were generated
    shares = matrix[labels] / matrix[labels].sum(1, keepdim=True)
    names = [plot_text(name) for name in names]
    named = len(names) <= MAX_NAMED_CLASSES
    size = max(4.0, 0.45 * len(names)) if named else 10.0
    with new_figure(path, size + 2, size * max(len(labels), 4) / len(names) + 2) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
        figure.colorbar(image, ax=axes, label="share of the label's images")
        axes.set(xlabel="class predicted by the judge", ylabel="label")
        if named:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(labels)), [names[label] for label in labels])
        style = {"ha": "center", "va": "center", "fontsize": "x-small"}
        if len(names) <= MAX_NUMBERED_CLASSES:
            for i, j in (shares >= 0.005).nonzero().tolist():
                color = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, f"{float(shares[i, j]):.0%}", color=color, **style)


def draw_pairs(pairs: Sequence[Pair], path: Path) -> None:
    """Plot generated images above their nearest training images, with their distances."""
    style = {"cmap": "gray", "vmin": 0, "vmax": 255, "interpolation": "nearest"}
    with new_figure(path, len(pairs) + 0.4, 2.6) as figure:
        grid = figure.subplots(2, len(pairs), squeeze=False)
        for pair, column in zip(pairs, grid.T, strict=True):
            for image, axes in zip(pair.images, column, strict=True):
                if image.ndim == 2:  # a signal
                    axes.plot(image.T.numpy(), linewidth=0.8)
                elif image.ndim == 3 and len(image) in (1, 3):
                    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
                    axes.imshow(pixels.permute(1, 2, 0).numpy(), **style)
                else:  # a field's first channel, or a volume's middle slice of it
                    axes.imshow(image[0] if image.ndim == 3 else image[0, image.shape[1] // 2])
                axes.set(xticks=[], yticks=[])
            column[1].set_xlabel(f"{pair.distance:.3g}")
        grid[0, 0].set_ylabel("generated")
        grid[1, 0].set_ylabel("training")
        figure.supxlabel("distance of the features", fontsize="medium")


def draw_bits(terms: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot the terms of the variational bound, and the errors, against the timestep."""
    titles = {
        "bound": "term of the bound (bits per dimension)",
        "x0_mse": "squared error of x0",
        "eps_mse": "squared error of the noise",
    }
    timesteps = [row["timestep"] for row in terms]
    with new_figure(path, 11, 3.4) as figure:
        for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
            values = [row[name] for row in terms]
            axes.plot(timesteps, values, marker="." if len(terms) < 50 else "")
            axes.set_title(title, fontsize="medium")
            axes.set(xlabel="timestep", yscale="log" if min(values) > 0 else "linear")
            axes.grid(alpha=0.3)
