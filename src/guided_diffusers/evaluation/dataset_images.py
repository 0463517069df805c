"""Images of datasets and Parquet files, in their own size."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from ..learning.data import LabelledImages, integer_label_names

Shape = tuple[int, int, int]  # (C, H, W)
Item = tuple[torch.Tensor, int]  # (C, H, W) in [-1, 1], and its label id or -1


class DatasetImages:
    """Items `{"pixel_values": (C, H, W) in [-1, 1], "label": id}`, as `LabelledImages` or a list.

    Args:
        items: of one shape.
        names: of the labels, by id.
        labelled: whether the labels are meaningful.

    Raises:
        ValueError: without items, or when an item of another shape is read.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        names: Mapping[int, str] | None = None,
        labelled: bool = True,
    ):
        if len(items) == 0:
            raise ValueError("images: there are none")
        self.items, self.names, self.labelled = items, dict(names or {}), labelled
        self.shape = tuple(items[0]["pixel_values"].shape)
        self.description: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.items)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        for i in range(start, stop):
            item = self.items[i]
            shape = tuple(item["pixel_values"].shape)
            if shape != self.shape:
                raise ValueError(
                    f"images: row {i} has the shape {shape}, other rows have {self.shape}; all "
                    "images must have one shape"
                )
            yield item["pixel_values"], int(item["label"]) if self.labelled else -1


class NativeSizeImages(DatasetImages):
    """Images of a dataset in their own size: that of `shape` (C, H, W), or of the first one. `names`
    replaces the dataset's label names by id."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str | None,
        label_column: str | None,
        names: dict[int, str] | None = None,
        shape: Shape | None = None,
    ):
        self._column = LabelledImages(
            dataset, image_column, channels=1, labelled=False
        ).image_column
        encoded = dataset.select_columns([self._column])
        self._encoded = encoded.cast_column(self._column, datasets.Image(decode=False))
        channels, height, width = shape or (None, *self._size(0)[::-1])
        columns = (image_column, label_column, (height, width))
        data = LabelledImages(dataset, *columns, channels=channels, labels=names)
        super().__init__(data, data.id2label, data.label_column is not None)

    def _size(self, i: int) -> tuple[int, int]:
        raw = self._encoded[i][self._column]
        try:
            return Image.open(io.BytesIO(raw["bytes"]) if raw["bytes"] else raw["path"]).size
        except (OSError, TypeError) as error:
            row = f"row {i} ({raw['path']})" if raw and raw["path"] else f"row {i}"
            raise ValueError(f"images: the image of {row} can't be read: {error}") from error

    def read(self, start: int, stop: int) -> Iterator[Item]:
        for i in range(start, stop):
            size = self._size(i)  # `LabelledImages` would resize another one
            if size != self.shape[:0:-1]:
                raise ValueError(
                    f"images: row {i} has {size[0]} by {size[1]} pixels, other rows have "
                    f"{self.shape[2]} by {self.shape[1]}; all images must have one size"
                )
            yield from super().read(i, i + 1)


class RowGroup(NamedTuple):
    """A row group of a Parquet file: its number, its first row in the file, its count of rows."""

    file: Path
    number: int
    first_row: int
    count: int


class ParquetImages:
    """Parquet files with a column of images and, for labels, one of class ids, integers or strings.

    One row group at a time is in memory; nothing is copied to the cache of `datasets`.

    Raises:
        ValueError: naming the file if it is truncated or damaged, and its row if an image can't be
            read.
    """

    def __init__(
        self,
        files: Sequence[Path],
        image_column: str | None = None,
        label_column: str | None = None,
    ):
        self._columns = (image_column, label_column)
        self._groups = [group for file in files for group in _row_groups(file)]
        if not self._groups:
            raise ValueError(f"images: the Parquet files of {files[0].parent} have no rows")
        self.names, self.shape = _label_names(files, label_column), None
        first = self._open(self._groups[0])
        self.names, self.shape, self.labelled = first.names, first.shape, first.labelled
        self.description: dict[str, Any] = {}

    def _open(self, group: RowGroup) -> NativeSizeImages:
        try:
            with pyarrow.parquet.ParquetFile(group.file) as file:
                table = file.read_row_group(group.number)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"images: {group.file} can't be read; it is damaged ({error})"
            ) from error
        dataset = datasets.Dataset(table, fingerprint="0")
        with _rows_of_file(group):
            return NativeSizeImages(dataset, *self._columns, self.names, self.shape)

    def __len__(self) -> int:
        return sum(group.count for group in self._groups)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        for group in self._groups:
            if start < group.count and stop > 0:
                images = self._open(group)
                with _rows_of_file(group):
                    yield from images.read(max(start, 0), min(stop, group.count))
            start, stop = start - group.count, stop - group.count


def _row_groups(file: Path) -> Iterator[RowGroup]:
    try:
        metadata = pyarrow.parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"images: {file} can't be read; it is truncated, or no Parquet file ({error})"
        ) from error
    first_row = 0
    for number in range(metadata.num_row_groups):
        count = metadata.row_group(number).num_rows
        if count:
            yield RowGroup(file, number, first_row, count)
        first_row += count


@contextmanager
def _rows_of_file(group: RowGroup) -> Iterator[None]:
    """Number rows in error messages from the start of the file, and name the file."""

    def in_file(match: re.Match[str]) -> str:
        return f"row {group.first_row + int(match[1])} of {group.file}"

    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"\brow (\d+)", in_file, str(error), count=1)) from error


def _label_names(files: Sequence[Path], column: str | None) -> dict[int, str] | None:
    """Label names by id of a column of integers or strings in Parquet files; None: of another."""
    features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(files[0]))
    dtype = features[column].dtype if isinstance(features.get(column), datasets.Value) else ""
    if "int" not in dtype and "string" not in dtype:
        return None
    values = pyarrow.parquet.read_table(files, columns=[column])[column].unique().to_pylist()
    if None in values:  # `LabelledImages` raises an error
        return None
    return (
        integer_label_names(values, column) if "int" in dtype else dict(enumerate(sorted(values)))
    )
