"""Before, after and difference side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..text import printable

SMALLEST = 196  # pixels of a picture's width; narrower ones are enlarged
MARGIN = 8
MIN_SCALE = 0.05  # of the colours, so that rounding isn't shown as a change


def comparison(
    before: Image.Image, after: Image.Image, difference: np.ndarray, titles: Sequence[str]
) -> Image.Image:
    """The picture before, after, and what was added (red: brighter, blue: darker), side by side.

    Args:
        difference: after - before, (H, W, C), 1 is from black to white; the mean over the channels
            is shown, its full colour at the largest change, which the title says.
        titles: over the first two, each in one line.
    """
    change = difference.mean(-1)
    largest = max(float(np.abs(change).max()), MIN_SCALE)
    parts = [before.convert("RGB"), after.convert("RGB"), signed_colours(change / largest)]
    titles = [*titles, f"difference: red brighter, blue darker, at most {largest:.2f}"]
    factor = max(1, round(SMALLEST / before.width))
    width, height = before.width * factor, before.height * factor
    font = ImageFont.load_default(max(11, width // 16))
    lines = [_wrapped(printable(title), font, width) for title in titles]
    spacing = font.size + 3
    top = 2 * MARGIN + spacing * max(map(len, lines))
    picture = Image.new("RGB", (3 * width + 4 * MARGIN, top + height + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for i, (part, text) in enumerate(zip(parts, lines, strict=True)):
        left = MARGIN + i * (width + MARGIN)
        for row, line in enumerate(text):
            draw.text((left, MARGIN + row * spacing), line, "black", font)
        enlarged = part.resize((width, height), Image.Resampling.NEAREST)
        picture.paste(enlarged, (left, top))
    return picture


def signed_colours(values: np.ndarray) -> Image.Image:
    """Numbers in [-1, 1], (H, W), as colours from blue over white to red."""
    strength = np.abs(values).clip(0, 1)[..., None]
    colour = np.where(values[..., None] > 0, [178, 24, 43], [33, 102, 172])
    return Image.fromarray((255 + strength * (colour - 255)).round().astype(np.uint8))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
