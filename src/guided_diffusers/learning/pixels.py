"""Which pixels of a file are black and white, and what is under transparent ones.

Pillow doesn't say what the white of 16 bits or of floating-point numbers is, and drops alpha; a file
that is read wrong becomes a black picture without an error.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageOps

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


def in_range(image: Image.Image | np.ndarray, low: float, high: float) -> Image.Image:
    """The image, or `deep_colours`, with `low` as 0 and `high` as 255: a grey one in floating point
    (mode F), RGB in 8 bits.

    Raises:
        ValueError: for pixels outside.
    """
    if isinstance(image, Image.Image) and image.mode not in {"L", "F", *SIXTEEN_BIT_MODES}:
        image = image.convert("L" if image.mode in GREY_MODES else "RGB")
    if isinstance(image, Image.Image) and image.mode in ("L", "RGB") and high > 255:
        raise ValueError(
            f"its pixels have 8 bits, whose white is 255 at most, not {high:g} (--image_range)"
        )
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


def open_undecoded(image: Mapping[str, Any]) -> Image.Image:
    """An image {"path" or "bytes"}, opened but not read."""
    content = image.get("bytes")
    return Image.open(BytesIO(content) if content else image["path"])


def has_deep_colours(undecoded: Mapping[str, Any]) -> bool:
    """Whether an image has colours of 16 bits, of which Pillow reads the upper 8; False if it is no
    file of this machine."""
    try:
        with open_undecoded(undecoded) as image:
            is_coloured = image.mode in ("RGB", "RGBA")
            return is_coloured and any(";16" in str(tile.args) for tile in image.tile)
    except (OSError, KeyError, TypeError):
        return False


def deep_colours(
    undecoded: Mapping[str, Any], background: tuple[int, int, int] | None
) -> np.ndarray:
    """The red, green and blue of an image of `has_deep_colours`, (H, W, 3) uint16; alpha is left out,
    so a `background` is refused with one.

    Pillow reads one of the two bytes of each number: the lower one where it takes the file for one
    of the other byte order.

    Raises:
        ValueError: for a file that it can't read so.
    """
    other, parts = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}, []
    for is_lower in (False, True):
        image, tiles = open_undecoded(undecoded), []
        if background is not None and image.mode == "RGBA":
            raise ValueError(
                "it has colours of 16 bits and alpha, which can't be put on a colour "
                "(--alpha_background); save it without alpha"
            )
        for tile in image.tile if is_lower else ():
            first, *rest = tile.args if isinstance(tile.args, tuple) else (tile.args,)
            order = first[:-1] + other.get(first[-1], "?")
            tiles.append(tile._replace(args=(order, *rest) if rest else order))
        image.tile = tiles or image.tile
        try:
            image.load()
        except (ValueError, OSError) as error:
            raise ValueError(
                f"its colours of 16 bits can't be read completely ({error}); save it without alpha as "
                "PNG, or as a .npy array"
            ) from error
        pixels = np.asarray(ImageOps.exif_transpose(image))
        parts.append(pixels[..., :3].astype(np.uint16))
    return parts[0] << 8 | parts[1]


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


def pixel_options(options: Any) -> dict[str, Any]:
    """{image_range, alpha_background} of parsed options, as `LabelledImages` takes them."""
    return {
        "image_range": parse_image_range(options.image_range),
        "alpha_background": parse_background(options.alpha_background),
    }


def check_no_pixel_options(column: str, options: dict[str, Any]) -> None:
    """Refuse options of images for arrays, which have no white and no alpha.

    Raises:
        ValueError: naming the first that is given.
    """
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name}={value}: None is allowed with arrays (column {column!r}), which are used "
                "as they are"
            )


class PixelStatistics:
    """What sampled images have in common that makes pictures black.

    Args:
        has_range: whether the range of the pixels was given.
    """

    def __init__(self, has_range: bool):
        self.has_range, self.modes, self.count = has_range, set(), 0
        self.constant: list[str] = []
        self.brightest: dict[str, int] = {}  # of images of 16 bits, by their place

    def add(self, image: Image.Image, place: str, is_deep: bool = False) -> None:
        """Count a decoded image, of which 8 of 16 bits were read where `is_deep`."""
        self.modes.add(image.mode)
        self.count += 1
        bands = image.convert("RGB") if image.mode == "P" else image
        extrema = bands.getextrema()
        extrema = extrema if isinstance(extrema[0], tuple) else (extrema,)
        if all(low == high for low, high in extrema):
            self.constant.append(place)
        if image.mode in SIXTEEN_BIT_MODES:
            self.brightest[place] = int(extrema[0][1])
        elif is_deep:
            self.brightest[place] = max(high << 8 | 255 for _, high in extrema[:3])

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
