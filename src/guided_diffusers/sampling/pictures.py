"""Several images as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isqrt, sqrt
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..utils import aside, printable


def grid(
    images: Sequence[Image.Image], names: Sequence[str] | None = None, smallest: int = 84
) -> Image.Image:
    """A grid of images: one row per name, or, with at most one name, nearly a square.

    Args:
        images: images of one size, ordered by row, equally many for every name.
        names: labels of the rows, written on the left.
        smallest: images narrower than this are enlarged by an integer factor, pixels.
    """
    factor = max(1, round(smallest / images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    # a full rectangle at most five times as wide as high, or else a square
    rows, margin, row_names = isqrt(len(images)), 0, []
    while len(images) % rows:
        rows -= 1
    if len(images) > 5 * rows**2:
        rows = round(sqrt(len(images)))
    font = ImageFont.load_default(max(10, height // 5))
    if names and len(names) > 1:
        rows, row_names = len(names), [printable(name) for name in names]
        margin = 12 + ceil(max(map(font.getlength, row_names)))
    columns = ceil(len(images) / rows)
    picture = Image.new("RGB", (margin + columns * width, rows * height), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        picture.paste(enlarged, (margin + column * width, row * height))
    for row, name in enumerate(row_names):
        ImageDraw.Draw(picture).text((6, (row + 0.5) * height), name, "black", font, "lm")
    return picture


def save_image(image: Image.Image, path: Path) -> None:
    """Save an image in the format of the path's extension, atomically."""
    with aside(path) as partial:
        image.save(partial, Image.registered_extensions()[path.suffix.lower()])
