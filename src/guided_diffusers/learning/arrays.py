"""Labelled arrays of any rank: columns of arrays or nested lists, and folders of .npy files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Array3D, Array4D, Array5D, Dataset, Image, LargeList, List, Value

from ..checks import check_number
from .data import LabelledImages, Row, row_name
from .npy import NPY_COLUMN

STANDARD, UNSCALED = "standard", "none"  # of --data_scale, beside LOW,HIGH
AXES = ("first", "last", "none")  # of --channel_axis


def find_array_column(dataset: Any, name: str | None, label_column: str | None) -> str | None:
    """The column of arrays: `name`, or without images the first of arrays; None: there is none."""
    features = dict(dataset.features or {})
    if name is not None:
        return name if _is_array(name, features.get(name)) else None
    if any(isinstance(feature, Image) for feature in features.values()):
        return None
    columns = (column for column in features if column != label_column)
    return next((column for column in columns if _is_array(column, features[column])), None)


def _is_array(name: str, feature: Any) -> bool:
    if isinstance(feature, (Array2D, Array3D, Array4D, Array5D)) or name == NPY_COLUMN:
        return True
    while isinstance(feature, (List, LargeList)):
        feature = feature.feature
        if isinstance(feature, Value):
            return feature.dtype.startswith(("float", "int", "uint"))
    return False


def parse_data_scale(text: str) -> tuple[float, float] | None:
    """(mean, std) of --data_scale: LOW,HIGH becomes [-1, 1]; None: of the data.

    Raises:
        ValueError: for anything else.
    """
    if text == STANDARD:
        return None
    if text == UNSCALED:
        return 0.0, 1.0
    try:
        low, high = map(float, text.split(","))
        check_number("", high - low, 0, above=True)
    except ValueError:
        raise ValueError(
            f"--data_scale {text!r}: {STANDARD} (mean and standard deviation of each channel), "
            f"LOW,HIGH (these become -1 and 1) and {UNSCALED} are allowed"
        ) from None
    return (low + high) / 2, (high - low) / 2


def arrays_of_shape(
    dataset: Dataset,
    column: str,
    label_column: str | None,
    shape: Sequence[int] | None,
    **options: Any,
) -> LabelledArrays:
    """Arrays with the axis of channels that gives them a shape (C, ...), the first if both do; None:
    the usual axis.

    Raises:
        ValueError: if there is none, and as `LabelledArrays`.
    """
    problem, shapes = None, []
    for axis in (None, *AXES):
        try:
            data = LabelledArrays(dataset, column, label_column, channel_axis=axis, **options)
        except ValueError as error:  # of the arrays, or of this axis
            problem = problem or error
            continue
        if shape is None or data.shape == tuple(shape):
            return data
        shapes.append(data.shape)
    raise problem or ValueError(
        f"dataset: column {column!r} has arrays {', '.join(map(str, dict.fromkeys(shapes)))}, by the "
        f"axis of channels; the shape {tuple(shape)} is needed"
    )


@dataclass(eq=False, repr=False)
class LabelledArrays(LabelledImages):
    """Items of one split, {"pixel_values": (C, ...) float32, (data - data_mean) / data_std, "label":
    int}, of arrays that all have one shape.

    Args:
        image_column: the column of arrays, or of the paths of .npy files.
        channel_axis: which axis of an array is that of channels: "first", "last", or "none" (one
            channel). None: "none" for arrays of one axis, else "first".
        scale: (data_mean, data_std). None: those of each channel, of all rows.

    `resolution` is the length of signals, a tuple of sizes of others; the other arguments, and those
    of images that can be given, are those of `LabelledImages`.

    Raises:
        ValueError: if the arrays' shapes differ, or values aren't finite; naming the row.
    """

    channel_axis: str | None = None
    scale: tuple[Any, Any] | None = None

    def __post_init__(self) -> None:
        if len(self.dataset) == 0:
            raise ValueError("dataset: the split has no rows")
        columns = [self.image_column, *self._find_label_column()]
        self._rows, self.whole = self.dataset.select_columns(columns), self.dataset
        if self.image_column != NPY_COLUMN:
            only = {"columns": [self.image_column], "output_all_columns": True}
            self._rows = self._rows.with_format("numpy", **only)
        plain: Dataset = self._rows.with_format(None)
        self._labels = plain.select_columns([self.label_column]) if self.label_column else None
        self.id2label = self._all_label_names()
        self._ids = {name: i for i, name in self.id2label.items()}
        self._cache: dict[int, Any] = {}
        self.shape: tuple[int, ...] | None = None
        self.shape = self._array(self._row(0)).shape
        self.channels, self.size = self.shape[0], tuple(self.shape[1:])
        self.resolution = self.size[0] if len(self.size) == 1 else self.size
        mean, std = self.scale or self._statistics()
        self.data_mean, self.data_std = mean, std
        axes = (-1, *[1] * len(self.size))
        self._mean, self._std = (
            np.asarray(value, np.float32).reshape(axes) for value in (mean, std)
        )

    @property
    def text(self) -> str:
        """The arrays in words."""
        sizes = ", ".join(map(str, self.shape))
        mean, std = (np.array2string(np.asarray(v), precision=4) for v in (self._mean, self._std))
        mean, std = (
            " ".join(value.replace("[", "").replace("]", "").split()) for value in (mean, std)
        )
        return f"arrays ({sizes}), of which mean {mean} becomes 0 and deviation {std} becomes 1"

    def _row(self, index: int) -> Row:
        values = self._rows[index]
        return Row(self.number(index), values[self.image_column], values.get(self.label_column))

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        return map(self._row, indices)

    def _array(self, row: Row) -> np.ndarray:
        """A row's array, (C, ...), in float32."""
        try:
            value = row.image
            if self.image_column == NPY_COLUMN:
                value = np.load(value, allow_pickle=False)
            array = np.asarray(value)
            if array.dtype.kind not in "fiub":
                raise ValueError(f"it holds {array.dtype}, not numbers of one shape")
            array = self._with_channels(array.astype(np.float32))
            if self.shape is not None and array.shape != self.shape:
                raise ValueError(f"it has shape {array.shape}, the first one {self.shape}")
            if not np.isfinite(array).all():
                raise ValueError("it has infinite or NaN values; finite ones are allowed")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"the array of {self._place(row)} can't be used: {error}") from error
        return array

    def _with_channels(self, array: np.ndarray) -> np.ndarray:
        axis = self.channel_axis or ("none" if array.ndim == 1 else "first")
        if array.ndim < (1 if axis == "none" else 2) or array.ndim > 4 or 0 in array.shape:
            raise ValueError(
                f"it has shape {array.shape}; one to three dimensions, and an axis of channels with "
                f"--channel_axis {axis}, are allowed"
            )
        if axis == "none":
            return array[None]
        return np.moveaxis(array, -1, 0) if axis == "last" else array

    def _place(self, row: Row) -> str:
        path = f" ({Path(row.image)})" if self.image_column == NPY_COLUMN else ""
        return row_name(row.number) + path

    def _statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, over all rows."""
        sums = np.zeros((2, self.channels))
        for row in self.rows(range(len(self))):
            values = self._array(row).reshape(self.channels, -1).astype(np.float64)
            sums += values.mean(1), np.square(values).mean(1)
        mean, square = sums / len(self)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        if not (std > 1e-6 * (1e-30 + np.abs(mean))).all():
            raise ValueError(
                f"--data_scale {STANDARD}: channel {int(std.argmin())} of the arrays is constant; "
                "LOW,HIGH is allowed"
            )
        return [float(f"{v:.6g}") for v in mean], [float(f"{v:.6g}") for v in std]

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int]:
        row = self._row(item[0] if isinstance(item, tuple) else item)
        values = (self._array(row) - self._mean) / self._std
        label = self._label(row.label, row.number)
        return {"pixel_values": torch.from_numpy(values.copy()), "label": label}

    def check_image(self, row: Row, decode: bool = False) -> None:
        """Raise a `ValueError` for an array that can't be used."""
        self._array(row)
