"""Labelled images: a Hub dataset, an image folder or local Parquet files -> {pixel_values in [-1, 1], label}."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset
from PIL import Image as PILImage


def load_splits(name_or_folder: str, config_name: str | None = None) -> DatasetDict:
    """All splits of a dataset: a name on the Hub, an image folder (a folder a label), or a folder of Parquet files.

    Raises:
        ValueError: if `name_or_folder` looks like a local path and there is nothing there.
    """
    if name_or_folder.startswith((".", "/", "~")) and not Path(name_or_folder).expanduser().exists():
        raise ValueError(f"dataset: no folder {name_or_folder!r}")
    return load_dataset(str(Path(name_or_folder).expanduser()) if Path(name_or_folder).expanduser().exists()
                        else name_or_folder, config_name)


def _column(dataset: Dataset, name: str | None, argument: str, features: tuple[type, ...]) -> str:
    """The column that was asked for, else the first one of a fitting type."""
    fitting = [column for column, feature in dataset.features.items() if isinstance(feature, features)]
    if name is None and fitting:
        return fitting[0]
    if name not in dataset.column_names:
        raise ValueError(f"{argument}={name!r}: the dataset has the columns {dataset.column_names}")
    return name


class LabelledImages(torch.utils.data.Dataset):
    """Items of one split as `{"pixel_values": (C, H, W) float32 in [-1, 1], "label": int}`.

    An item is asked for by its index, or by `(index, seed)`: crop and flip are drawn from that seed alone, so an item
    is the same in whichever process and order it is read.

    Args:
        dataset: a split with an image column, and a label column of class ids, integers or strings.
        image_column, label_column: by default the first column of images, the first of class ids. Without a label
            column every label is 0 and `id2label` is empty.
        resolution: height and width in pixels; the shorter side is resized to it, the longer one cropped.
        center_crop: crop in the middle; otherwise at a random place.
        random_flip: mirror half of the images.
        random_shift: move by up to that many pixels each way, the edge repeated.
        channels: 1 (grey) or 3 (RGB); by default what the first image has.
        labels: the names of another split, where ids must mean the same.
    """

    def __init__(self, dataset: Dataset, image_column: str | None = None, label_column: str | None = None,
                 resolution: int = 64, center_crop: bool = False, random_flip: bool = False,
                 random_shift: int = 0, channels: int | None = None, labels: dict[int, str] | None = None):
        if len(dataset) == 0:
            raise ValueError("dataset: the split has no rows")
        self.dataset, self.resolution = dataset, resolution
        self.center_crop, self.random_flip, self.random_shift = center_crop, random_flip, random_shift
        self.image_column = _column(dataset, image_column, "image_column", (Image,))
        first = dataset[0][self.image_column]
        if not isinstance(first, PILImage.Image):
            raise ValueError(f"image_column={self.image_column!r} holds {type(first).__name__}, not images")
        self.channels = channels or (1 if first.mode in ("1", "L", "I;16") else 3)
        has_labels = label_column or any(isinstance(feature, ClassLabel) for feature in dataset.features.values())
        self.label_column = _column(dataset, label_column, "label_column", (ClassLabel,)) if has_labels else None
        self.id2label = labels if labels is not None else self._names()
        self._ids = {name: i for i, name in self.id2label.items()}

    def _names(self) -> dict[int, str]:
        if self.label_column is None:
            return {}
        feature = self.dataset.features[self.label_column]
        if isinstance(feature, ClassLabel):
            return dict(enumerate(feature.names))
        values = self.dataset.unique(self.label_column)
        if isinstance(feature, Value) and feature.dtype == "string":
            return dict(enumerate(sorted(values)))
        if isinstance(feature, Value) and "int" in feature.dtype and min(values) >= 0:
            return {i: str(i) for i in range(max(values) + 1)}
        raise ValueError(f"label_column={self.label_column!r} holds {feature}; class ids, integers from 0 or strings "
                         "can be labels")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int]:
        index, seed = item if isinstance(item, tuple) else (item, 0)
        row, draw = self.dataset[index], random.Random(seed)
        image = self._crop(row[self.image_column].convert("L" if self.channels == 1 else "RGB"), draw)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).reshape(*image.size[::-1], self.channels)
        if self.random_flip and draw.random() < 0.5:
            pixels = pixels.flip(1)
        if reach := self.random_shift:
            left, top = draw.randint(0, 2 * reach), draw.randint(0, 2 * reach)
            padded = np.pad(pixels.numpy(), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
            pixels = torch.from_numpy(padded)[top:top + self.resolution, left:left + self.resolution]
        label = row[self.label_column] if self.label_column else 0
        if isinstance(label, str):
            if label not in self._ids:
                raise ValueError(f"label {label!r} of row {index} is not one of {sorted(self._ids)}")
            label = self._ids[label]
        if self.id2label and label not in self.id2label:
            raise ValueError(f"label {label} of row {index} is not one of the {len(self.id2label)} class ids")
        return {"pixel_values": pixels.permute(2, 0, 1) / 127.5 - 1.0, "label": int(label)}

    def _crop(self, image: PILImage.Image, draw: random.Random) -> PILImage.Image:
        size, (width, height) = self.resolution, image.size
        if min(width, height) != size:
            scale = size / min(width, height)
            width, height = max(size, round(width * scale)), max(size, round(height * scale))
            image = image.resize((width, height), PILImage.Resampling.BICUBIC, reducing_gap=None)
        left, top = ((width - size) // 2, (height - size) // 2) if self.center_crop else (
            draw.randint(0, width - size), draw.randint(0, height - size))
        return image.crop((left, top, left + size, top + size))
