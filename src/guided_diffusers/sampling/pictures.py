"""Several images as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isqrt, sqrt
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..files import aside
from ..text import printable

#: largest width and height that a format allows
MAX_PIXELS = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383}
MAX_AREA = 2**30  # pixels of a picture, which is made in memory


def grid(
    images: Sequence[Image.Image], names: Sequence[str] | None = None, smallest: int = 84
) -> Image.Image:
    """A grid of images: one row per name, or, with at most one name, nearly a square.

    Args:
        images: images of one size, ordered by row, equally many for every name.
        names: labels of the rows, written on the left.
        smallest: images narrower than this are enlarged by an integer factor, pixels.
    """
    layout = _Layout(images[0], len(images), names, smallest)
    width, height = layout.cell
    picture = Image.new("RGB", layout.size, "white")
    for i, image in enumerate(images):
        row, column = divmod(i, layout.columns)
        enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        picture.paste(enlarged, (layout.margin + column * width, row * height))
    for row, name in enumerate(layout.names):
        ImageDraw.Draw(picture).text((6, (row + 0.5) * height), name, "black", layout.font, "lm")
    return picture


class _Layout:
    """Where `grid` draws `count` images like `image`; arguments as of `grid`."""

    def __init__(self, image: Image.Image, count: int, names: Sequence[str] | None, smallest: int):
        factor = max(1, round(smallest / image.width))
        width, height = self.cell = image.width * factor, image.height * factor
        # a full rectangle at most five times as wide as high, or else a square
        rows, self.margin, self.names = isqrt(count), 0, []
        while count % rows:
            rows -= 1
        if count > 5 * rows**2:
            rows = round(sqrt(count))
        self.font = ImageFont.load_default(max(10, height // 5))
        if names and len(names) > 1:
            rows, self.names = len(names), [_one_line(name) for name in names]
            self.margin = 12 + ceil(max(map(self.font.getlength, self.names)))
        self.columns = ceil(count / rows)
        self.size = self.margin + self.columns * width, rows * height


def check_size(
    image: Image.Image, count: int, names: Sequence[str] | None, path: Path, smallest: int = 84
) -> None:
    """Raise a ValueError if the grid of `count` images is too large for the file's format, or for
    the memory."""
    size, largest = _Layout(image, count, names, smallest).size, MAX_PIXELS.get(path.suffix.lower())
    if largest is not None and max(size) > largest:
        raise ValueError(
            f"--output {path}: {count} images are a picture of {size[0]} x {size[1]} pixels, of "
            f"which {path.suffix} allows {largest} a side; use .png or a folder"
        )
    if size[0] * size[1] > MAX_AREA:
        raise ValueError(
            f"--output {path}: {count} images are a picture of {size[0]} x {size[1]} pixels; up to "
            f"{MAX_AREA} pixels are allowed; use a folder"
        )


def _one_line(name: str, length: int = 80) -> str:
    """A name as the font can draw it: without control characters, shortened."""
    name = printable(name)
    return name if len(name) <= length else f"{name[: length - 3]}..."


def save_image(image: Image.Image, path: Path) -> None:
    """Save an image in the format of the path's extension, atomically."""
    with aside(path) as partial:
        image.save(partial, Image.registered_extensions()[path.suffix.lower()])
