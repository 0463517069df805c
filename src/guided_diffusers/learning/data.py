"""Labelled images: a Hub dataset, an image folder or local Parquet files -> {pixel_values in [-1, 1], label}.

With captions, too, from a column or by label, or with several labels or numbers an image in place of the one.
`ImageRows` is what becomes of a row, wherever it comes from.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

SIXTEEN_BITS = ("I", "I;16", "I;16B")
GREY = ("1", "L", "LA", *SIXTEEN_BITS)
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    PILImage.DecompressionBombError,
)  # what Pillow raises
ATTEMPTS = 100  # images in the place of one that can't be read
BUILDERS = {".tar": "webdataset", ".parquet": "parquet"}  # of datasets
SHARD = 2**32  # row r of shard s of a stream has the number (s + 1) SHARD + r


def load_splits(
    name_or_folder: str, config_name: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """All splits of a dataset: a name on the Hub, an image folder (a folder a label), or a folder of Parquet files.

    Or a folder of tar files (WebDataset), or a pattern (`*`, `?`, `[...]`) of tar or Parquet files, the split `train`.

    Args:
        streaming: read nothing yet, and never all of it at once.

    Raises:
        ValueError: if `name_or_folder` looks like a local path and there is nothing there, or as a pattern matches
            other files.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.exists():
        return load_dataset(str(folder), config_name, streaming=streaming)
    if is_pattern(name_or_folder):
        files = sorted(glob(str(folder)))
        kinds = {Path(file).suffix for file in files}
        if len(kinds) != 1 or not kinds <= BUILDERS.keys():
            raise ValueError(
                f"dataset: {name_or_folder!r} matches {len(files)} files of the kinds {sorted(kinds)}; "
                f"one of {list(BUILDERS)} is allowed"
            )
        return load_dataset(BUILDERS[kinds.pop()], data_files={"train": files}, streaming=streaming)
    if name_or_folder.startswith((".", "/", "~")):
        raise ValueError(f"dataset: no folder {name_or_folder!r}")
    return load_dataset(name_or_folder, config_name, streaming=streaming)


def is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _column(
    dataset: Dataset | IterableDataset, name: str | None, argument: str, feature_type: type
) -> str:
    """The column that was asked for, else the first one of that type."""
    fitting = [
        column for column, feature in dataset.features.items() if isinstance(feature, feature_type)
    ]
    if name is None and fitting:
        return fitting[0]
    if name not in dataset.column_names:
        raise ValueError(f"{argument}={name!r}: the dataset has the columns {dataset.column_names}")
    return name


class CorruptImage(ValueError):
    """An image that can't be read; the message names its row."""


def row_name(number: int) -> str:
    """The words for a row's number: of a dataset from 0, of a stream from SHARD."""
    return (
        f"row {number}"
        if number < SHARD
        else f"row {number % SHARD} of shard {number // SHARD - 1}"
    )


class ImageRows(torch.utils.data.Dataset):
    """How a row becomes an item, `{"pixel_values": (C, H, W) float32 in [-1, 1], "label": int}`.

    A subclass says what its rows are: `_image` reads one, and `_number` numbers it. It sets `channels` (1 or 3) and
    calls `_use`. `LabelledImages` has the arguments and what is raised.
    """

    channels: int
    id2label: dict[int, str]

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
        self.image_column = _column(dataset, image_column, "image_column", Image)
        feature = dataset.features[self.image_column]
        self._bytes = feature == Value("binary") or isinstance(feature, dict) and "bytes" in feature
        if not self._bytes and not isinstance(feature, Image):
            raise ValueError(
                f"image_column={self.image_column!r} holds {feature}, not images; the dataset has the "
                f"columns {dataset.column_names}"
            )
        has_labels = label_column or any(
            isinstance(feature, ClassLabel) for feature in dataset.features.values()
        )
        self.label_column = (
            _column(dataset, label_column, "label_column", ClassLabel) if has_labels else None
        )
        self.columns = [self.image_column] + ([self.label_column] if has_labels else [])

    def _image(self, row: Any) -> tuple[PILImage.Image, int]:
        """A row's image, its shorter side resized, and its label."""
        raise NotImplementedError

    def _number(self, row: Any) -> int:
        raise NotImplementedError

    def _names(self, features: Features, labels: Mapping[int, str] | None) -> dict[int, str] | None:
        """The labels' names by id, or None where the dataset would have to be read for them."""
        if self.label_column is None:
            return {}
        feature = features[self.label_column]
        if isinstance(feature, ClassLabel):
            names = dict(enumerate(feature.names))
            if labels not in (None, names):
                raise ValueError(
                    f"label_column={self.label_column!r} has the labels {names}, the other split {labels}"
                )
            return names
        dtype = feature.dtype if isinstance(feature, Value) else ""
        return labels if labels is not None and ("int" in dtype or dtype == "string") else None

    def _use(self, names: dict[int, str]) -> None:
        self.id2label, self._ids = names, {name: i for i, name in names.items()}

    def _item(self, rows: Iterable[Any], seed: int) -> dict[str, torch.Tensor | int]:
        """The item of the first of `rows`, or where corrupt images are to be skipped of the first that can be read."""
        image, label, row, corrupt = self._readable(rows)
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
        found = {"pixel_values": pixels.permute(2, 0, 1) / 127.5 - 1.0, "label": label}
        return found | {"row": row, "corrupt": corrupt} if self.skip_corrupt_images else found

    def _readable(self, rows: Iterable[Any]) -> tuple[PILImage.Image, int, int, int]:
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
            f"the image of {row_name(tried[0])} can't be read, nor those of {len(tried) - 1} rows drawn "
            "instead"
        )

    def _prepared(self, image: PILImage.Image) -> PILImage.Image:
        """In grey or colours, the shorter side resized."""
        if image.mode in SIXTEEN_BITS:  # Pillow's convert would cut at 255
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
        left, top = (
            ((width - size) // 2, (height - size) // 2)
            if self.center_crop
            else (draw.randint(0, width - size), draw.randint(0, height - size))
        )
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


def all_grey(images: Iterable[PILImage.Image]) -> bool:
    """Whether there are images, and all are grey."""
    modes = {image.mode for image in images}
    return bool(modes) and modes <= set(GREY)


class LabelledImages(ImageRows):
    """Items of one split as `{"pixel_values": (C, H, W) float32 in [-1, 1], "label": int}`.

    An item is asked for by its index, or by `(index, seed)`: crop, flip and shift are drawn from that seed alone, so an
    item is the same in whichever process and order it is read.

    Args:
        dataset: a split with a column of images (or of their files' bytes, where `image_column` names it).
        image_column: by default the first column of images.
        label_column: class ids, integers from 0, or strings; by default the first column of class ids. Without one
            every label is 0 and `id2label` is empty.
        resolution: height and width in pixels; the shorter side is resized to it, the longer one cropped.
        center_crop: crop in the middle; otherwise at a random place.
        random_flip: mirror half of the images.
        random_shift: move by up to that many pixels each way, the edge repeated; 0: off.
        channels: 1 (grey) or 3 (RGB); by default 1 if sixteen images, evenly spread, are all grey.
        labels: the names of another split, where ids must mean the same.
        cache_images: keep every image that was read, decoded and resized, in the memory of the process that read it.
        skip_corrupt_images: an image that can't be read is replaced by another row's, image and label, chosen by the
            seed and the index alone. Items then also have `"row"`, the row that was read, and `"corrupt"`, the row
            that could not be read, or -1.

    Raises:
        ValueError: if a column is missing or holds something else, or the labels differ from `labels`; when an item is
            read, if its image can't be, or its label is none.
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
        self._labels = dataset.select_columns([self.label_column]) if self.label_column else None
        self._rows = self.dataset.select_columns(self.columns)
        self.channels = channels or self._channels()
        self._use(self._all_names(labels))

    def _channels(self) -> int:
        def readable() -> Iterator[PILImage.Image]:
            for i in sorted({len(self._rows) * i // 16 for i in range(16)}):
                try:
                    yield self._row(i)[self.image_column]
                except CorruptImage:
                    if not self.skip_corrupt_images:
                        raise

        return 1 if all_grey(readable()) else 3

    def _row(self, index: int) -> dict[str, object]:
        """The columns of image and label, with the image decoded."""
        try:
            row = self._rows[index]
            if row[self.image_column] is None:
                raise ValueError("there is none")
            row[self.image_column].load()
            return row
        except UNREADABLE as error:
            raw = (
                self._rows.cast_column(self.image_column, Image(decode=False))[index][
                    self.image_column
                ]
                or {}
            )
            name = f" ({raw['path']})" if raw.get("path") else ""
            raise CorruptImage(f"the image of row {index}{name} can't be read: {error}") from error

    def _all_names(self, labels: dict[int, str] | None) -> dict[int, str]:
        names = self._names(self._rows.features, labels)
        if names is not None:
            return names
        feature, values = (
            self._rows.features[self.label_column],
            self._rows.unique(self.label_column),
        )
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
        instead = random.Random(f"instead {index} {seed}")
        return self._item(
            chain([index], (instead.randrange(len(self)) for _ in range(ATTEMPTS - 1))), seed
        )

    def _number(self, row: int) -> int:
        return row

    def _image(self, row: int) -> tuple[PILImage.Image, int]:
        if self._cache is not None and row in self._cache:
            return self._cache[row]
        values = self._row(row)
        found = (
            self._prepared(values[self.image_column]),
            self._label(values.get(self.label_column), row),
        )
        if self._cache is not None:
            self._cache[row] = found
        return found

    def label(self, index: int) -> int:
        """The label of a row whose image isn't read."""
        return (
            0
            if self._labels is None
            else self._label(self._labels[index][self.label_column], index)
        )


class CaptionedImages(torch.utils.data.Dataset):
    """Items of `LabelledImages` with a `"caption"`, a string, drawn from the captions of the row or of its label.

    An item is asked for by its index, which then is the seed, or by `(index, seed)`.

    Args:
        images: the images and labels.
        caption_column: a column of strings or of lists of strings, in the images' dataset.
        captions: instead of a column, captions by label id.

    Raises:
        ValueError: if both or neither are given, the column is missing or holds something else, or a label has no
            caption.
    """

    def __init__(
        self,
        images: LabelledImages,
        caption_column: str | None = None,
        captions: Mapping[int, Sequence[str]] | None = None,
    ):
        if (caption_column is None) == (captions is None):
            raise ValueError(
                f"caption_column={caption_column!r}, captions={captions!r}: one of the two is needed, and "
                "only one"
            )
        self.images, self._by_label = images, captions
        if captions is not None:
            if not images.id2label:
                raise ValueError(
                    "captions: captions by label need labels, and the dataset has no column of class ids"
                )
            if without := [name for i, name in images.id2label.items() if not captions.get(i)]:
                raise ValueError(f"captions: there are none for the labels {without}")
            return
        feature = images.dataset.features[
            _column(images.dataset, caption_column, "caption_column", Value)
        ]
        if getattr(getattr(feature, "feature", feature), "dtype", None) not in (
            "string",
            "large_string",
        ):
            raise ValueError(
                f"caption_column={caption_column!r} holds {feature}; strings or lists of strings are "
                "allowed"
            )
        self._rows = images.dataset.select_columns([caption_column])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int | str]:
        index, seed = item if isinstance(item, tuple) else (item, item)
        found = self.images[item]
        captions = (
            self._captions(found.get("row", index))
            if self._by_label is None
            else self._by_label[found["label"]]
        )
        return {**found, "caption": random.Random(f"caption {seed}").choice(captions)}

    def _captions(self, index: int) -> Sequence[str]:
        (value,) = self._rows[index].values()
        captions = [value] if isinstance(value, str) else value
        if not captions or None in captions:
            raise ValueError(
                f"row {index} has the captions {captions!r}; one or more strings are allowed"
            )
        return captions

    def captions(self) -> Iterator[str]:
        """All captions that an item may get."""
        groups = (
            self._by_label.values()
            if self._by_label is not None
            else map(self._captions, range(len(self)))
        )
        for group in groups:
            yield from group


class TargetedImages(torch.utils.data.Dataset):
    """Items of `LabelledImages` whose `"label"` is (num_labels,) float32: a 0 or 1 for each label, or numbers.

    An item is asked for by its index or by `(index, seed)`.

    Args:
        images: `LabelledImages`, whose own label is left out, or what gives its items in another form.
        label_column: a column of the images' dataset.
        problem_type: what it holds, in `transformers`' words. "multi_label_classification": lists of ids or names, in
            all rows, or, if all rows have as many, two or more zeros and ones, a vector of a 0 or 1 for each label.
            "regression": numbers, or lists of always as many; `id2label` then is empty.
        labels: the names of another split, where ids must mean the same.

    Raises:
        ValueError: if the column is missing or holds something else; when an item is read, if its label is none.
    """

    def __init__(
        self,
        images: LabelledImages,
        label_column: str,
        problem_type: str,
        labels: Mapping[int, str] | None = None,
    ):
        if problem_type not in ("multi_label_classification", "regression"):
            raise ValueError(
                f"problem_type={problem_type!r}: multi_label_classification and regression are allowed"
            )
        if label_column not in images.dataset.column_names:
            raise ValueError(
                f"label_column={label_column!r}: {problem_type} needs one of the dataset's columns "
                f"{images.dataset.column_names}"
            )
        self.images, self.label_column, self.problem_type = images, label_column, problem_type
        self.dataset, self.resolution, self.channels = (
            images.dataset,
            images.resolution,
            images.channels,
        )
        self._rows, self._vectors = images.dataset.select_columns([label_column]), False
        if problem_type == "regression":
            self.id2label: dict[int, str] = {}
            self.num_labels = np.size(self._rows[0][label_column])
        else:
            self.id2label = self._names(labels)
            self.num_labels = len(self.id2label)
        self._ids = {name: i for i, name in self.id2label.items()}
        self.label(0)

    def _values(self) -> Iterator[object]:
        for rows in self._rows.iter(1000):
            yield from rows[self.label_column]

    def _names(self, labels: Mapping[int, str] | None) -> dict[int, str]:
        feature = self._rows.features[self.label_column]
        of = (
            feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        )  # both kinds of lists
        lengths, values = set(), set()
        for value in self._values() if of is not None else ():
            lengths.add(len(value) if value is not None else None)
            values |= set(value or ())
        one_length = len(lengths) == 1 and None not in lengths and max(lengths) > 1
        self._vectors = (
            one_length and values <= {0, 1} and (labels is None or lengths == {len(labels)})
        )
        if isinstance(of, ClassLabel):
            found = dict(enumerate(of.names))
            self._vectors = False
        elif self._vectors:
            found = {i: str(i) for i in range(max(lengths))}
        elif of is not None and labels is not None and not values:  # no image of this split has one
            found = {}
        elif values and all(isinstance(value, str) for value in values):
            found = dict(enumerate(sorted(values)))
        elif values and all(type(value) is int and value >= 0 for value in values):
            found = {i: str(i) for i in range(max(values) + 1)}
        else:
            some = sorted(map(repr, values))[:5]
            raise ValueError(
                f"label_column={self.label_column!r} holds {feature}, with values such as {some}; lists "
                "of class ids, of integers from 0 or of strings, or vectors of zeros and ones are allowed"
            )
        if labels is not None and not set(found.values()) <= set(labels.values()):
            raise ValueError(
                f"label_column={self.label_column!r} has the labels {found}, the other split {labels}"
            )
        return dict(found if labels is None else labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int]:
        found = self.images[item]
        return {
            **found,
            "label": self.label(found.get("row", item[0] if isinstance(item, tuple) else item)),
        }

    def label(self, index: int) -> torch.Tensor:
        """The label of a row whose image isn't read."""
        return self._label(self._rows[index][self.label_column], index)

    def targets(self) -> torch.Tensor:
        """All labels, (N, num_labels)."""
        return torch.stack(
            [self._label(value, index) for index, value in enumerate(self._values())]
        )

    def _label(self, value: object, index: int) -> torch.Tensor:
        values = list(value) if isinstance(value, list) else [value]
        if self.problem_type == "regression" or self._vectors:
            numbers = all(isinstance(one, (int, float)) and np.isfinite(one) for one in values)
            if (
                not numbers
                or len(values) != self.num_labels
                or self._vectors
                and not set(values) <= {0, 1}
            ):
                raise ValueError(
                    f"label {value!r} of row {index} of label_column={self.label_column!r}: "
                    f"{self.num_labels} {'zeros and ones' if self._vectors else 'finite numbers'} are "
                    "allowed"
                )
            return torch.tensor(values, dtype=torch.float32)
        ids = [self._ids.get(one, one) if isinstance(one, str) else one for one in values]
        if not isinstance(value, list) or any(i not in self.id2label for i in ids):
            raise ValueError(
                f"label {value!r} of row {index} isn't a list of the {len(self.id2label)} labels "
                f"{list(self.id2label.values())[:20]}"
            )
        label = torch.zeros(self.num_labels)
        label[ids] = 1.0
        return label
