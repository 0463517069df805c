"""Images as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isqrt, sqrt
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..utils import aside


def grid(
    images: Sequence[Image.Image], names: Sequence[str] | None = None, smallest: int = 84
) -> Image.Image:
    """One picture: a row a name with its images in order, or, with at most one name, a square.

    Args:
        images: of one size, the images of a name next to each other, equally many a name.
        names: of the rows, written in front.
        smallest: images narrower than this many pixels are enlarged by a whole factor.
    """
    factor = max(1, round(smallest / images[0].width))
    size = (images[0].width * factor, images[0].height * factor)
    rows = len(names) if names and len(names) > 1 else _rows(len(images))
    columns, margin = ceil(len(images) / rows), 0
    font = ImageFont.load_default(max(10, size[1] // 5))
    if names and len(names) > 1:
        margin = 12 + ceil(max(font.getlength(name) for name in names))
    picture = Image.new("RGB", (margin + columns * size[0], rows * size[1]), "white")
    for i, image in enumerate(images):
        place = (margin + i % columns * size[0], i // columns * size[1])
        picture.paste(image.convert("RGB").resize(size, Image.Resampling.NEAREST), place)
    for row, name in enumerate(names if margin else []):
        ImageDraw.Draw(picture).text((6, (row + 0.5) * size[1]), name, "black", font, "lm")
    return picture


def _rows(count: int) -> int:
    """Of a rectangle without holes that is no longer than five times its height, else of a square."""
    whole = max(rows for rows in range(1, isqrt(count) + 1) if count % rows == 0)
    return whole if count <= 5 * whole**2 else round(sqrt(count))


def save_image(image: Image.Image, path: Path) -> None:
    """Write under a temporary name, then move into place."""
    with aside(path) as partial:
        image.save(partial, Image.registered_extensions()[path.suffix.lower()])
