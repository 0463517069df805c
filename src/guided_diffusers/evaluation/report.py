"""An evaluation as a table and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..utils import aside, require_matplotlib

WORDS = {
    "less": "less is better",
    "more": "more is better",
    "real": "near the real images' is better",
}
LARGEST = 60  # classes whose names fit a picture


def table(
    figures: Mapping[str, Mapping[str, Any]],
    per_class: Sequence[Mapping[str, Any]],
    bits: Mapping[str, Any] | None,
    notes: Sequence[str],
) -> str:
    """All figures as lines."""
    rows = [("", "value", "interval", "real images", "")]
    for name, figure in figures.items():
        real = f"{figure['real']:.4g}" if "real" in figure else ""
        rows.append(
            (
                figure.get("name", name.replace("_", " ")),
                f"{figure['value']:.4g}",
                _interval(figure),
                real,
                WORDS[figure["better"]],
            )
        )
    if bits is not None:
        rows.append(
            (
                "bits per dimension",
                f"{bits['total']['value']:.4g}",
                _interval(bits["total"]),
                "",
                f"of {bits['images']} real images; less is better",
            )
        )
    text = _lines(rows) if len(rows) > 1 else ""
    columns = [
        name
        for name in ("frechet_distance", "top_1", "top_5")
        if any(row.get(name) for row in per_class)
    ]
    if columns:
        rows = [
            (
                "class",
                "images",
                *(name.replace("_", " ") for name in columns for name in (name, "interval")),
            )
        ]
        for row in per_class:
            cells = [
                (f"{row[name]['value']:.4g}", _interval(row[name])) if row.get(name) else ("", "")
                for name in columns
            ]
            rows.append((row["name"], str(row["images"]), *(one for pair in cells for one in pair)))
        text += "\n\n" + _lines(rows)
    return text + "".join(f"\nNote: {note}." for note in notes)


def _interval(figure: Mapping[str, Any]) -> str:
    return "" if figure.get("interval") is None else "{:.4g} to {:.4g}".format(*figure["interval"])


def _lines(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def draw_confusion(confusion: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """The share of each label's images (row) that the judge takes for each class (column).

    Raises:
        ImportError: where matplotlib is missing, saying what to install.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    counts = torch.tensor(confusion, dtype=torch.float64)
    asked = counts.sum(1) > 0
    share = counts[asked] / counts[asked].sum(1, keepdim=True)
    rows = [name for name, here in zip(names, asked.tolist(), strict=True) if here]
    written = len(names) <= LARGEST
    size = max(4.0, 0.45 * len(names)) if written else 10.0
    figure = Figure(
        figsize=(size + 2, size * max(len(rows), 4) / len(names) + 2), layout="constrained"
    )
    axis = figure.subplots()
    shown = axis.imshow(share.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    figure.colorbar(shown, ax=axis, label="share of the label's images")
    axis.set_xlabel("the judge's answer")
    axis.set_ylabel("asked for")
    if written:
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(rows)), rows)
        if len(names) <= 20:
            for i, row in enumerate(share.tolist()):
                for j, value in enumerate(row):
                    if value >= 0.005:
                        axis.text(
                            j,
                            i,
                            f"{value:.0%}",
                            ha="center",
                            va="center",
                            fontsize="x-small",
                            color="white" if value > 0.5 else "black",
                        )
    with aside(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def draw_pairs(pairs: Sequence[tuple[tuple[Tensor, Tensor], float]], path: Path) -> None:
    """Generated images above their nearest training images, nearest first, with their distance in the features."""
    height = pairs[0][0][0].shape[1]
    factor = max(1, round(84 / height))
    size, font = height * factor, ImageFont.load_default(13)
    margin = 12 + round(max(font.getlength(name) for name in ("generated", "training", "distance")))
    picture = Image.new("RGB", (margin + len(pairs) * (size + 4), 2 * (size + 4) + 24), "white")
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(("generated", "training")):
        draw.text((6, (row + 0.5) * (size + 4)), name, "black", font, "lm")
    draw.text((6, 2 * (size + 4) + 12), "distance", "black", font, "lm")
    for column, (images, distance) in enumerate(pairs):
        left = margin + column * (size + 4)
        for row, image in enumerate(images):
            array = (
                ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
            )
            pixels = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).convert(
                "RGB"
            )
            picture.paste(
                pixels.resize((size, size), Image.Resampling.NEAREST), (left, row * (size + 4))
            )
        draw.text((left + size / 2, 2 * (size + 4) + 12), f"{distance:.3g}", "black", font, "mm")
    with aside(path) as partial:
        picture.save(partial, "png")


def draw_bits(terms: Sequence[Mapping[str, float]], path: Path) -> None:
    """The bound's terms and the errors against the timestep.

    Raises:
        ImportError: where matplotlib is missing, saying what to install.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    titles = {
        "bound": "term of the bound (bits a dimension)",
        "x0_mse": "squared error of x0",
        "eps_mse": "squared error of the noise",
    }
    for axis, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        axis.plot(
            [row["timestep"] for row in terms],
            [row[name] for row in terms],
            marker="." * (len(terms) < 50),
        )
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("timestep")
        if min(row[name] for row in terms) > 0:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    with aside(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
