"""Labelled images: a Hub dataset, image folder, Parquet or tar files -> {pixel_values, label}.

`ImageRows` turns a row into an item, wherever the row comes from.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
)
from PIL import Image as PILImage

SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B")
GREY_MODES = {"1", "L", "LA", *SIXTEEN_BIT_MODES}
DECODING_ERRORS = (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError)  # Pillow's
MAX_ATTEMPTS = 100  # images that are tried in place of a corrupt one
BUILDERS = {".tar": "webdataset", ".parquet": "parquet"}  # builders of `datasets`
SHARD_STRIDE = 2**32  # row r of shard s of a stream has the number (s + 1) SHARD_STRIDE + r


def load_splits(
    name_or_folder: str, config_name: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """All splits of a dataset.

    Args:
        name_or_folder: a name on the Hub, an image folder (one folder per label), a folder of
            Parquet or tar files (WebDataset), or a pattern (`*`, `?`, `[...]`) of such files, which
            become the split `train`.
        streaming: read rows while iterating, never all of them at once.

    Raises:
        ValueError: if a local path doesn't exist, or a pattern matches other files.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.exists():
        return load_dataset(str(folder), config_name, streaming=streaming)
    if is_pattern(name_or_folder):
        files = sorted(glob(str(folder)))
        kinds = {Path(file).suffix for file in files}
        if len(kinds) != 1 or not kinds <= BUILDERS.keys():
            raise ValueError(
                f"dataset: {name_or_folder!r} matches {len(files)} files of the kinds "
                f"{sorted(kinds)}; one of {list(BUILDERS)} is allowed"
            )
        return load_dataset(BUILDERS[kinds.pop()], data_files={"train": files}, streaming=streaming)
    if name_or_folder.startswith((".", "/", "~")):
        raise ValueError(f"dataset: no folder {name_or_folder!r}")
    return load_dataset(name_or_folder, config_name, streaming=streaming)


def is_pattern(name: str) -> bool:
    """Whether a path contains wildcards."""
    return any(sign in name for sign in "*?[")


def find_column(
    dataset: Dataset | IterableDataset, name: str | None, argument: str, feature_type: type
) -> str:
    """The column called `name`; by default the first with features of a type.

    Raises:
        ValueError: naming `argument`, if there is none.
    """
    matching = [
        column for column, feature in dataset.features.items() if isinstance(feature, feature_type)
    ]
    if name is None and matching:
        return matching[0]
    if name not in dataset.column_names:
        raise ValueError(f"{argument}={name!r}: the dataset has the columns {dataset.column_names}")
    return name


class CorruptImage(ValueError):
    """An image that can't be read; the message names its row."""


def row_name(number: int) -> str:
    """A row's number in words; rows of a stream are numbered from SHARD_STRIDE."""
    if number < SHARD_STRIDE:
        return f"row {number}"
    return f"row {number % SHARD_STRIDE} of shard {number // SHARD_STRIDE - 1}"


class ImageRows(torch.utils.data.Dataset):
    """Base class: turns rows into items {"pixel_values": (C, H, W) in [-1, 1], "label": int}.

    A subclass implements `_open`, `_path` and `_number`, sets `channels` (1 or 3) and calls
    `_set_labels`. `LabelledImages` documents the arguments and errors.
    """

    channels: int

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        image_column: str | None,
        label_column: str | None,
        resolution: int,
        center_crop: bool,
        random_flip: bool,
        random_shift: int,
        skip_corrupt_images: bool,
    ):
        self.resolution, self.center_crop = resolution, center_crop
        self.random_flip, self.random_shift = random_flip, random_shift
        self.skip_corrupt_images = skip_corrupt_images
        self.image_column = find_column(dataset, image_column, "image_column", Image)
        feature = dataset.features[self.image_column]
        self._bytes = feature == Value("binary") or isinstance(feature, dict) and "bytes" in feature
        if not self._bytes and not isinstance(feature, Image):
            raise ValueError(
                f"image_column={self.image_column!r} holds {feature}, not images; the dataset has "
                f"the columns {dataset.column_names}"
            )
        self.columns, self.label_column = [self.image_column], None
        features = dataset.features.values()
        if label_column or any(isinstance(feature, ClassLabel) for feature in features):
            self.label_column = find_column(dataset, label_column, "label_column", ClassLabel)
            self.columns.append(self.label_column)

    def _open(self, row: Any) -> tuple[PILImage.Image | None, object]:
        """A row's image, which needn't be decoded yet, and its label as it is stored."""
        raise NotImplementedError

    def _path(self, row: Any) -> str | None:
        """The file of a row's image, if it is known."""
        raise NotImplementedError

    def _number(self, row: Any) -> int:
        """The number of a row, as `row_name` takes it."""
        raise NotImplementedError

    def _label_names(
        self, features: Features, labels: Mapping[int, str] | None
    ) -> dict[int, str] | None:
        """Label names by id; None if only the dataset's values tell them."""
        if self.label_column is None:
            return {}
        feature = features[self.label_column]
        if isinstance(feature, ClassLabel):
            names = dict(enumerate(feature.names))
            if labels not in (None, names):
                raise ValueError(
                    f"label_column={self.label_column!r} has the labels {names}, the other split "
                    f"{labels}"
                )
            return names
        dtype = feature.dtype if isinstance(feature, Value) else ""
        return labels if labels is not None and ("int" in dtype or dtype == "string") else None

    def _set_labels(self, names: dict[int, str]) -> None:
        self.id2label, self._ids = names, {name: i for i, name in names.items()}

    def _item(self, rows: Iterable[Any], seed: int) -> dict[str, torch.Tensor | int]:
        """The item of the first row; with `skip_corrupt_images` of the first that can be read."""
        image, label, row, corrupt = self._first_readable(rows)
        draw = random.Random(seed)
        image = self._crop(image, draw)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).reshape(
            *image.size[::-1], self.channels
        )
        if self.random_flip and draw.random() < 0.5:
            pixels = pixels.flip(1)
        if reach := self.random_shift:
            left, top = draw.randint(0, 2 * reach), draw.randint(0, 2 * reach)
            padded = np.pad(pixels.numpy(), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
            pixels = torch.from_numpy(padded)[
                top : top + self.resolution, left : left + self.resolution
            ]
        item = {"pixel_values": pixels.permute(2, 0, 1) / 127.5 - 1.0, "label": label}
        return item | {"row": row, "corrupt": corrupt} if self.skip_corrupt_images else item

    def _first_readable(self, rows: Iterable[Any]) -> tuple[PILImage.Image, int, int, int]:
        """Image, label, number of its row, and that of the first row if it is another, else -1."""
        tried: list[int] = []
        for row in rows:
            tried.append(self._number(row))
            try:
                return *self._image(row), tried[-1], tried[0] if len(tried) > 1 else -1
            except CorruptImage:
                if not self.skip_corrupt_images:
                    raise
        raise CorruptImage(
            f"the image of {row_name(tried[0])} can't be read, nor those of {len(tried) - 1} rows "
            "drawn instead"
        )

    def _image(self, row: Any) -> tuple[PILImage.Image, int]:
        """A row's image, its shorter side resized, and its label's id."""
        image, label = self._decode(row)
        return self._resize(image), self._label(label, self._number(row))

    def _resize(self, image: PILImage.Image) -> PILImage.Image:
        """The image as grey or RGB, its shorter side resized to `resolution`."""
        if image.mode in SIXTEEN_BIT_MODES:  # Pillow's convert would clip at 255
            image = PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("L" if self.channels == 1 else "RGB")
        size, (width, height) = self.resolution, image.size
        if min(width, height) == size:
            return image
        scale = size / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        return image.resize((width, height), PILImage.Resampling.BICUBIC)

    def _crop(self, image: PILImage.Image, draw: random.Random) -> PILImage.Image:
        size, (width, height) = self.resolution, image.size
        if self.center_crop:
            left, top = (width - size) // 2, (height - size) // 2
        else:
            left, top = draw.randint(0, width - size), draw.randint(0, height - size)
        return image.crop((left, top, left + size, top + size))

    def _label(self, label: object, number: int) -> int:
        if self.label_column is None:
            return 0
        label = self._ids.get(label, label) if isinstance(label, str) else label
        if label not in self.id2label:
            raise ValueError(
                f"label {label!r} of {row_name(number)} is none of the {len(self.id2label)} labels "
                f"{list(self.id2label.values())[:20]}"
            )
        return int(label)

    def _guess_channels(self, rows: Iterable[Any]) -> int:
        """1 if the images of all rows that can be read are grey, else 3."""
        modes = set()
        for row in rows:
            try:
                modes.add(self._decode(row)[0].mode)
            except CorruptImage:
                if not self.skip_corrupt_images:
                    raise
        return 1 if modes and modes <= GREY_MODES else 3

    def _decode(self, row: Any) -> tuple[PILImage.Image, object]:
        """A row's image, decoded, and its label, both as they are stored.

        Raises:
            CorruptImage: if the image can't be read.
        """
        try:
            image, label = self._open(row)
            if image is None:
                raise ValueError("there is none")
            image.load()
            return image, label
        except DECODING_ERRORS as error:
            path = self._path(row)
            name = row_name(self._number(row)) + (f" ({path})" if path else "")
            raise CorruptImage(f"the image of {name} can't be read: {error}") from error


class LabelledImages(ImageRows):
    """Items of one split, {"pixel_values": (C, H, W) float32 in [-1, 1], "label": int}.

    An item's key is its index, or `(index, seed)`: the seed decides its augmentation, 0 if it isn't
    given.

    Args:
        dataset: a split of `load_splits`.
        image_column: column of images, decoded or as bytes; by default the first of images.
        label_column: column of class ids, integers from 0 or strings; by default the first of class
            ids; without one every label is 0 and `id2label` is empty.
        resolution: H = W; the shorter side is resized to it and the longer one cropped.
        center_crop: crop in the middle; otherwise at a random place.
        random_flip: flip horizontally with probability 1/2.
        random_shift: shift by up to this many pixels, the edge repeated; 0: off.
        channels: 1 (grey) or 3 (RGB); by default 1 if sixteen images, evenly spread, are all grey.
        labels: label names of another split, where ids must mean the same.
        cache_images: keep decoded and resized images in the memory of the process that read them.
        skip_corrupt_images: replace an image that can't be read by that of another row, with its
            label, which the seed and the index alone decide. Items then also have "row", the number
            of the row that was read, and "corrupt", that of the row that couldn't be read, or -1.

    Raises:
        ValueError: if a column is missing or holds something else, or the labels differ from
            `labels`; when an item is read, if its image or label is invalid.
    """

    def __init__(
        self,
        dataset: Dataset,
        image_column: str | None = None,
        label_column: str | None = None,
        resolution: int = 64,
        center_crop: bool = False,
        random_flip: bool = False,
        random_shift: int = 0,
        channels: int | None = None,
        labels: dict[int, str] | None = None,
        cache_images: bool = False,
        skip_corrupt_images: bool = False,
    ):
        if len(dataset) == 0:
            raise ValueError("dataset: the split has no rows")
        super().__init__(
            dataset,
            image_column,
            label_column,
            resolution,
            center_crop,
            random_flip,
            random_shift,
            skip_corrupt_images,
        )
        self._cache: dict[int, tuple[PILImage.Image, int]] | None = {} if cache_images else None
        self.dataset = dataset.cast_column(self.image_column, Image()) if self._bytes else dataset
        self._rows = self.dataset.select_columns(self.columns)
        self._labels = dataset.select_columns([self.label_column]) if self.label_column else None
        count = len(dataset)
        sample = sorted({count * i // 16 for i in range(16)})
        self.channels = channels or self._guess_channels(sample)
        names = self._label_names(dataset.features, labels)
        self._set_labels(self._names_of_values() if names is None else names)

    def _open(self, row: int) -> tuple[PILImage.Image | None, object]:
        values = self._rows[row]
        return values[self.image_column], values.get(self.label_column)

    def _path(self, row: int) -> str | None:
        undecoded = self._rows.cast_column(self.image_column, Image(decode=False))
        return (undecoded[row][self.image_column] or {}).get("path")

    def _names_of_values(self) -> dict[int, str]:
        """Names of a column of integers or strings, from its values."""
        feature = self._labels.features[self.label_column]
        values = self._labels.unique(self.label_column)
        dtype = feature.dtype if isinstance(feature, Value) else ""
        if dtype == "string" and None not in values:
            return dict(enumerate(sorted(values)))
        if "int" in dtype and None not in values and min(values) >= 0:
            return {i: str(i) for i in range(max(values) + 1)}
        raise ValueError(
            f"label_column={self.label_column!r} holds {feature}, from {values[0]!r} on; class ids, "
            "integers from 0 or strings, in every row, can be labels"
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int]:
        index, seed = item if isinstance(item, tuple) else (item, 0)
        return self._item(chain([index], self._replacements(index, seed)), seed)

    def _replacements(self, index: int, seed: int) -> Iterator[int]:
        """Rows to read in place of one that can't be read."""
        draw = random.Random(f"instead {index} {seed}")
        for _ in range(MAX_ATTEMPTS - 1):
            yield draw.randrange(len(self))

    def _number(self, row: int) -> int:
        return row

    def _image(self, row: int) -> tuple[PILImage.Image, int]:
        if self._cache is None:
            return super()._image(row)
        if row not in self._cache:
            self._cache[row] = super()._image(row)
        return self._cache[row]

    def label(self, index: int) -> int:
        """The label of a row, without reading its image."""
        if self._labels is None:
            return 0
        return self._label(self._labels[index][self.label_column], index)
