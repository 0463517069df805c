"""What is edited, in files: pictures, or arrays of data as .npy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..files import aside
from ..images import as_pair, check_bits, down_sampling
from ..noise import module_config
from ..pipeline import ClassifierGuidedPipeline
from ..sampling import save_image
from ..sizes import network_size
from .pictures import comparison


@dataclass(frozen=True)
class PictureFiles:
    """Pictures, edited as PNG, beside which a comparison shows them before and after.

    Attributes:
        size: (width, height) that the model allows; None: any.
    """

    size: tuple[int, int] | None
    kind, beside = "picture", "comparison"
    suffixes, suffix = (".png", ".jpg", ".jpeg", ".webp", ".bmp"), ".png"

    def check(self, paths: Sequence[Path]) -> None:
        """Check that the pictures have the size of the model's images.

        Raises:
            ValueError: naming the first that doesn't, or can't be read.
        """
        for path in paths:
            size = self.size_of(path)
            if self.size and size != self.size:
                has, allowed = ("{} x {}".format(*sides) for sides in (size, self.size))
                raise ValueError(
                    f"{path} has {has} pixels; the model's images have {allowed}: resize it"
                )

    def size_of(self, path: Path) -> tuple[int, ...]:
        """(width, height) of a picture's file.

        Raises:
            ValueError: naming the file, if it can't be read as one, or has more than 8 bits a
                channel.
        """
        from ..learning.pixels import has_deep_colours

        try:
            with Image.open(path) as picture:
                size, mode = picture.size, picture.mode
        except FileNotFoundError:
            raise ValueError(f"{path} doesn't exist; a picture is needed") from None
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path} can't be read as a picture: {error}") from None
        check_bits(f"{mode};16" if has_deep_colours({"path": path}) else mode, path)
        return size

    def check_mask(self, mask: Path, path: Path) -> None:
        """Raise a `ValueError` unless a mask has its picture's size."""
        sizes = self.size_of(mask), self.size_of(path)
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"mask {mask} has {sizes[0][0]} x {sizes[0][1]} pixels, {path} {sizes[1][0]} x "
                f"{sizes[1][1]}; one size is allowed"
            )

    def read(self, paths: Sequence[Path]) -> list[Image.Image]:
        """The pictures, read completely.

        Raises:
            ValueError: naming a file that can't be read.
        """
        pictures = []
        for path in paths:
            try:
                with Image.open(path) as picture:
                    picture.load()
                    pictures.append(picture.copy())
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"{path} can't be read as a picture: {error}") from None
        return pictures

    read_masks = read

    def save(
        self, source: Path, output: Path, beside: Path, result: Any, i: int, titles: Sequence[str]
    ) -> None:
        """Write image i of a result, and its comparison to the source under titles."""
        (before,) = self.read([source])
        after, difference = result.images[i], result.difference[i]
        save_image(comparison(before, after, difference, titles), beside)
        save_image(after, output)


@dataclass(frozen=True)
class ArrayFiles:
    """Arrays of data, .npy, edited in their units, beside which is the difference.

    Attributes:
        shape: (C, ...) of the model's samples; None: any.
    """

    shape: tuple[int, ...] | None
    kind, beside = "array", "difference"
    suffixes, suffix = (".npy",), ".npy"

    def check(self, paths: Sequence[Path]) -> None:
        """Check that the arrays have the shape of the model's samples, or one shape, and are finite.

        Raises:
            ValueError: naming the first that doesn't, or can't be read.
        """
        first = None
        for path in paths:
            axis, array = self.channel_axis(path), self._load(path, mmap_mode="r")
            if array.dtype.kind == "b":
                raise ValueError(f"{path} has True and False; numbers are allowed")
            if not np.isfinite(array).all():
                raise ValueError(f"{path} has infinite or NaN values; finite ones are allowed")
            shape = self._with_channels(array, axis).shape
            if shape != (first := first or shape):
                raise ValueError(
                    f"{path} has an array {shape}, {paths[0]} one {first}; one shape is allowed"
                )

    def channel_axis(self, path: Path) -> int | None:
        """Which axis of a file's array has the channels: 0, also where both could have them, or -1;
        None: no axis, one channel.

        Raises:
            ValueError: for an array that the model doesn't take.
        """
        shape = self._load(path, mmap_mode="r").shape
        if self.shape is None or shape == self.shape:
            return 0
        channels, *size = self.shape
        if channels == 1 and shape == tuple(size):
            return None
        if shape == (*size, channels):
            return -1
        raise ValueError(
            f"{path} has an array {shape}; the model's are (channels, ...) {self.shape}"
        )

    def check_mask(self, mask: Path, path: Path) -> None:
        """Raise a `ValueError` unless a mask has the size of its array, without channels."""
        size = self._with_channels(self._load(path, mmap_mode="r"), self.channel_axis(path)).shape[
            1:
        ]
        shape = self._load(mask, mmap_mode="r").shape
        if shape != size:
            raise ValueError(f"mask {mask} has shape {shape}; {size}, as {path}, is allowed")

    def read(self, paths: Sequence[Path]) -> np.ndarray:
        """The arrays, (B, C, ...).

        Raises:
            ValueError: naming a file that can't be read.
        """
        axes = [self.channel_axis(path) for path in paths]
        return np.stack(
            [
                self._with_channels(self._load(path), axis)
                for path, axis in zip(paths, axes, strict=True)
            ]
        )

    @staticmethod
    def _with_channels(array: np.ndarray, axis: int | None) -> np.ndarray:
        """A file's array as (C, ...), with its `channel_axis`."""
        return array[None] if axis is None else np.moveaxis(array, axis, 0)

    def read_masks(self, paths: Sequence[Path]) -> np.ndarray:
        """The masks, (B, ...)."""
        return np.stack([self._load(path) for path in paths])

    def save(
        self, source: Path, output: Path, beside: Path, result: Any, i: int, titles: Sequence[str]
    ) -> None:
        """Write array i of a result, and its difference to the source, with the axes of that.

        Where the edit changed nothing in float32, the array has the source's values, in float64 if
        float32 can't hold those of its dtype.
        """
        axis, original = self.channel_axis(source), self._load(source)
        image, difference = (
            array[0] if axis is None else np.moveaxis(array, 0, axis)
            for array in (result.images[i], result.difference[i])
        )
        image = np.where(image == original.astype(np.float32), original, image)
        for array, path in ((difference, beside), (image, output)):
            with aside(path) as temporary, temporary.open("wb") as file:
                np.save(file, array)

    def _load(self, path: Path, **options: Any) -> np.ndarray:
        try:
            array = np.load(path, allow_pickle=False, **options)
        except FileNotFoundError:
            raise ValueError(f"{path} doesn't exist; an array is needed") from None
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} can't be read as an array: {error}") from None
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            raise ValueError(f"{path} holds no array of numbers")
        return array


Files = PictureFiles | ArrayFiles


def files_of(pipeline: ClassifierGuidedPipeline) -> Files:
    """The files that a pipeline edits."""
    config, size = module_config(pipeline.unet), network_size(pipeline.unet)
    if pipeline.has_arrays:
        shape = (config.get("in_channels"), *size)
        return ArrayFiles(None if None in shape else shape)
    if config.get("sample_size") is None:
        return PictureFiles(None)
    pixels = down_sampling(module_config(pipeline.vae))
    height, width = (pixels * side for side in as_pair(config["sample_size"]))
    return PictureFiles((width, height))
