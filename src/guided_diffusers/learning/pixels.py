"""Which pixels of a file are black and white, and what is under transparent ones.

Pillow doesn't say what the white of 16 bits or of floating-point numbers is, and drops alpha; a file
that is read wrong becomes a black picture without an error.
"""

from __future__ import annotations

import warnings

import numpy as np
from PIL import Image, ImageColor

from ..text import printable

SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B")
GREY_MODES = {"1", "L", "LA", *SIXTEEN_BIT_MODES}
BITS_PER_SAMPLE = 258  # tag of TIFF
TWELVE_BITS = 2**12 - 1
RANGE_ADVICE = "image_range (--image_range LOW,HIGH) gives the pixels that are black and white"


def check_range(image: Image.Image) -> None:
    """Raise a `ValueError` for pixels of 32 bits whose white is neither 255 nor 65535."""
    if image.mode not in ("I", "F") or image.format == "PNG":  # which has 16 bits
        return
    low, high = image.getextrema()
    unclear, maximum = (1, 255) if image.mode == "F" else (255, 65535)
    if low < 0 or 0 < high <= unclear or not high <= maximum:
        raise ValueError(
            f"its 32-bit pixels (mode {image.mode}) are from {low} to {high}, so their white "
            f"is unknown; {RANGE_ADVICE}"
        )


def stored_bits(image: Image.Image) -> int | None:
    """Number of bits of a grey TIFF's pixels if it is 9 to 15, which Pillow reads as 16."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (0,))
    is_between = image.mode in SIXTEEN_BIT_MODES and len(bits) == 1 and 8 < bits[0] < 16
    return bits[0] if is_between else None


def in_range(image: Image.Image, low: float, high: float) -> Image.Image:
    """The image with `low` as 0 and `high` as 255: a grey one in floating point (mode F), RGB in 8
    bits.

    Raises:
        ValueError: for pixels outside.
    """
    if image.mode not in {"L", "F", *SIXTEEN_BIT_MODES}:
        image = image.convert("L" if image.mode in GREY_MODES else "RGB")
    values = np.asarray(image, np.float32)
    if not (low <= values.min() and values.max() <= high):  # also for NaN
        raise ValueError(
            f"its pixels are from {values.min():g} to {values.max():g}, outside of {low:g} to "
            f"{high:g}; {RANGE_ADVICE}"
        )
    scaled = (values - low) * (255 / (high - low))
    if scaled.ndim == 2:
        return Image.fromarray(scaled)
    return Image.fromarray(scaled.round().astype(np.uint8))


def without_alpha(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    """The image over a background; without one, the image itself, whose alpha Pillow leaves out.

    Raises:
        ValueError: without one, for an image that shows in its alpha only.
    """
    has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if not has_alpha:
        return image
    rgba = image.convert("RGBA")
    if background is not None:
        under = Image.new("RGBA", image.size, (*background, 255))
        is_grey = image.mode in GREY_MODES and len(set(background)) == 1
        return Image.alpha_composite(under, rgba).convert("L" if is_grey else "RGB")
    colours, alpha = rgba.convert("RGB").getextrema(), rgba.getchannel("A").getextrema()
    if all(low == high for low, high in colours) and alpha[0] < alpha[1]:
        raise ValueError(
            "it has one colour, and its alpha makes the picture; alpha_background "
            "(--alpha_background white) puts it on a colour"
        )
    return image


def parse_image_range(text: str | None) -> tuple[float, float] | None:
    """(low, high) of --image_range LOW,HIGH.

    Raises:
        ValueError: for anything else.
    """
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = 0.0
    if not -np.inf < low < high < np.inf:
        raise ValueError(
            f"--image_range {text!r}: LOW,HIGH is allowed, the pixels that are black and white, such "
            "as 0,4095"
        )
    return low, high


def parse_background(text: str | None) -> tuple[int, int, int] | None:
    """(R, G, B) of --alpha_background.

    Raises:
        ValueError: for no colour.
    """
    try:
        return None if text is None else ImageColor.getrgb(text)[:3]
    except ValueError:
        raise ValueError(
            f"--alpha_background {text!r}: a colour is allowed, such as white or #808080"
        ) from None


class PixelStatistics:
    """What sampled images have in common that makes pictures black.

    Args:
        has_range: whether the range of the pixels was given.
    """

    def __init__(self, has_range: bool):
        self.has_range, self.modes, self.count = has_range, set(), 0
        self.constant: list[str] = []
        self.brightest: dict[str, int] = {}  # of images of 16 bits, by their place

    def add(self, image: Image.Image, place: str) -> None:
        """Count a decoded image."""
        self.modes.add(image.mode)
        self.count += 1
        bands = image.convert("RGB") if image.mode == "P" else image
        extrema = bands.getextrema()
        extrema = extrema if isinstance(extrema[0], tuple) else (extrema,)
        if all(low == high for low, high in extrema):
            self.constant.append(place)
        if image.mode in SIXTEEN_BIT_MODES:
            self.brightest[place] = int(extrema[0][1])

    def check(self) -> None:
        """Warn of constant images.

        Raises:
            ValueError: if all images of 16 bits use 12 bits or fewer.
        """
        brightest = max(self.brightest.values(), default=0)
        if not self.has_range and 0 < brightest <= TWELVE_BITS:
            raise ValueError(
                f"the brightest pixel of {len(self.brightest)} sampled images of 16 bits is "
                f"{brightest}, so they would be nearly black; {RANGE_ADVICE}: 0,"
                f"{255 if brightest <= 255 else TWELVE_BITS} where fewer bits are used, 0,65535 where "
                "all are"
            )
        if self.constant:
            warnings.warn(
                f"{len(self.constant)} of {self.count} sampled images are constant, such as that of "
                f"{printable(self.constant[0])}: is the data as it should be?",
                stacklevel=2,
            )
