"""Labelled images: a Hub dataset, image folder, Parquet or tar files -> {pixel_values, label}.

`ImageRows` turns a row into an item, wherever the row comes from.
"""

from __future__ import annotations

import math
import os
import random
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from glob import glob
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image as PILImage
from pyarrow import ArrowException

from ..images import as_pair, config_size
from ..text import printable
from .batches import generator_for
from .npy import has_npy_files, load_npy_folder
from .pixels import (
    GREY_MODES,
    SIXTEEN_BIT_MODES,
    PixelStatistics,
    check_range,
    deep_colours,
    has_deep_colours,
    in_range,
    stored_bits,
    without_alpha,
)

DECODING_ERRORS = (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError)  # Pillow's
MAX_ATTEMPTS = 100  # images that are tried in place of a corrupt one
COLOUR_TOLERANCE = 8  # of 255, by which red, green and blue differ in a grey JPEG
MAX_LABELS_PER_ID = 10  # labels that integer ids may make, for each id that occurs
BUILDERS = {".tar": "webdataset", ".parquet": "parquet"}  # builders of `datasets`
END_OF_TAR = 2 * tarfile.BLOCKSIZE  # bytes, all 0
SHARD_STRIDE = 2**32  # row r of shard s of a stream has the number (s + 1) SHARD_STRIDE + r


def load_splits(
    name_or_folder: str, config_name: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """All splits of a dataset.

    Args:
        name_or_folder: a name on the Hub, an image folder (one folder per label), such a folder of
            .npy files (`load_npy_folder`), a folder of Parquet or tar files (WebDataset), or a
            pattern (`*`, `?`, `[...]`) of such files, which become the split `train`.
        streaming: read rows while iterating, never all of them at once.

    Raises:
        ValueError: if a local path doesn't exist, a pattern matches other files, or a file is
            damaged.
    """
    try:
        return _load_splits(name_or_folder, config_name, streaming)
    except (DatasetsError, ArrowException, FileNotFoundError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:500]
        raise ValueError(f"dataset: {name_or_folder} can't be read: {reason}") from error


def _load_splits(
    name_or_folder: str, config_name: str | None, streaming: bool
) -> DatasetDict | IterableDatasetDict:
    folder = Path(name_or_folder).expanduser()
    if folder.exists():
        for file in folder.rglob("*.tar"):
            check_tar(file)
        if has_npy_files(folder):
            return load_npy_folder(folder)
        splits = load_dataset(str(folder), config_name, streaming=streaming)
        check_all_read(folder, splits)
        return splits
    if is_pattern(name_or_folder):
        files = sorted(glob(str(folder)))
        kinds = {Path(file).suffix for file in files}
        if len(kinds) != 1 or not kinds <= BUILDERS.keys():
            raise ValueError(
                f"dataset: {name_or_folder!r} matches {len(files)} files of the kinds "
                f"{sorted(kinds)}; one of {list(BUILDERS)} is allowed"
            )
        for file in files:
            if file.endswith(".tar"):
                check_tar(Path(file))
        return load_dataset(BUILDERS[kinds.pop()], data_files={"train": files}, streaming=streaming)
    if name_or_folder.startswith((".", "/", "~")):
        raise ValueError(f"dataset: no folder {name_or_folder!r}")
    return load_dataset(name_or_folder, config_name, streaming=streaming)


def check_all_read(folder: Path, splits: DatasetDict | IterableDatasetDict) -> None:
    """Refuse an image folder of which `datasets` leaves out images.

    It does so without a word for names with a line break, and beside a folder named like a split
    (a label "train"). What begins with "." or "__" is hidden. Beside several such folders, others
    are warned of.

    Raises:
        ValueError: naming a folder.
    """
    files = []
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        if file.suffix.lower() in ImageFolder.EXTENSIONS and file.is_file():
            if not any(part.startswith((".", "__")) for part in parts):
                files.append(file)
    is_complete = isinstance(splits, DatasetDict) and sum(map(len, splits.values())) >= len(files)
    if not files or is_complete:
        return
    builder = load_dataset_builder(str(folder))
    if not isinstance(builder, ImageFolder):
        return
    read = {os.path.abspath(file) for split in builder.config.data_files.values() for file in split}
    if left_out := [file for file in files if os.path.abspath(file) not in read]:
        folders = sorted({str(file.parent) for file in left_out})
        message = (
            f"dataset: of {len(files)} images in {folder}, {len(left_out)} aren't read, such as "
            f"{left_out[0].name!r} in {folders[0]!r} ({len(folders)} folders). Rename those with a line "
            f"break in their name, or move them away; beside {sorted(builder.config.data_files)} "
            "other folders aren't read"
        )
        if len(builder.config.data_files) > 1 and not any(map(_has_break, left_out)):
            warnings.warn(message, stacklevel=3)  # train, test and more
            return
        raise ValueError(message)


def _has_break(file: Path) -> bool:
    return len(str(file).splitlines()) > 1


def check_tar(path: Path) -> None:
    """Raise a `ValueError` for a truncated tar file, of which `datasets` reads what is left.

    One that stops between two files is warned of, since some programs leave out the end.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - END_OF_TAR))
        if file.read() == bytes(END_OF_TAR):
            return
    try:
        with tarfile.open(path, "r:") as archive:  # the end is optional
            for _ in archive:
                pass
            archive.fileobj.seek(archive.offset)
            if any(archive.fileobj.read(tarfile.BLOCKSIZE)):
                raise ValueError(f"no file starts at byte {archive.offset}")
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"dataset: {path} is damaged or truncated: {error}") from error
    warnings.warn(
        f"dataset: {printable(path)} lacks the end of a tar file: is it truncated?", stacklevel=2
    )


def is_pattern(name: str) -> bool:
    """Whether a path contains wildcards."""
    return any(sign in name for sign in "*?[")


def find_column(
    dataset: Dataset | IterableDataset, name: str | None, argument: str, feature_type: type
) -> str:
    """The column called `name`, by default the first with features of a type, or a `ValueError`."""
    features = dataset.features.items()
    matching = [column for column, feature in features if isinstance(feature, feature_type)]
    if name is None and matching:
        return matching[0]
    if name not in dataset.column_names:
        allowed = f"the dataset has the columns {dataset.column_names}"
        if name is None:
            allowed += f"; none is marked as one of {feature_type.__name__}, so it must be named"
        raise ValueError(f"{argument}={name!r}: {allowed}")
    return name


def integer_label_names(ids: Iterable[int], column: str, renumber: bool = False) -> dict[int, str]:
    """Label names by id: the ids up to the largest, or with `renumber` those that occur.

    Raises:
        ValueError: without `renumber`, for an id below 0, or ids that most labels don't have.
    """
    distinct = sorted(set(ids))
    if renumber:
        return dict(enumerate(map(str, distinct)))
    count, allowed = distinct[-1] + 1, MAX_LABELS_PER_ID * len(distinct)
    if distinct[0] < 0 or count > allowed:
        raise ValueError(
            f"label_column={column!r} has {len(distinct)} different ids, from {distinct[0]} to "
            f"{distinct[-1]}; 0 to {allowed - 1} are allowed, and any with renumber_labels "
            "(--renumber_labels in training)"
        )
    return {i: str(i) for i in range(count)}


def are_renumbered(names: Mapping[int, str]) -> bool:
    """Whether label names by id are integers other than the ids, as with `renumber_labels`."""
    integers = all(name.removeprefix("-").isdecimal() for name in names.values())
    return integers and any(name != str(i) for i, name in names.items())


def original_name(label: object, feature: object) -> str | None:
    """Name of a stored label before it's renumbered; None if it has none."""
    if isinstance(feature, ClassLabel):
        is_id = isinstance(label, int) and 0 <= label < feature.num_classes
        return feature.names[label] if is_id else None
    return None if label is None else str(label)


def held_out_rows(labels: Sequence[int], fraction: float) -> list[int]:
    """Rows to hold out, in their order: a share of those of each label, of which one or more stay.

    They depend on the labels and the fraction alone.
    """
    ids, generator = np.asarray(labels), generator_for(0, 5)
    order = torch.randperm(len(ids), generator=generator).numpy()
    order = order[np.argsort(ids[order], kind="stable")]
    order = order[1:][ids[order][1:] == ids[order][:-1]]  # without the first row of each label
    shares = np.ceil((np.arange(len(order) + 1) * fraction).round(6))
    return np.sort(order[np.diff(shares) > 0]).tolist()


def evenly_spread(length: int, count: int) -> list[int]:
    """At most `count` of the numbers from 0 to length - 1."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def mode_of_complete(image: dict[str, Any]) -> str | None:
    """Pillow's mode of an undecoded image, if a look at the file shows that it's complete.

    That is a PNG with right checksums, or a JPEG with its end; None for all others.
    """
    content = image.get("bytes")
    try:
        with BytesIO(content) if content else open(image["path"], "rb") as file:
            opened = PILImage.open(file)
            mode, kind = opened.mode, opened.format
            if kind == "PNG":
                opened.verify()
            elif kind == "JPEG":
                file.seek(-2, 2)
                kind = None if file.read() != b"\xff\xd9" else kind
            return mode if kind in ("PNG", "JPEG") else None
    except (*DECODING_ERRORS, KeyError, TypeError):
        return None


def scaled(image: PILImage.Image, factor: float) -> PILImage.Image:
    """The image magnified by a factor about its middle, in its size, the edge repeated."""
    width, height = image.size
    margin = max(0, math.ceil(max(width, height) * (1 / factor - 1) / 2))
    sides = [(margin, margin), (margin, margin), (0, 0)]
    pixels = np.asarray(image)
    padded = PILImage.fromarray(np.pad(pixels, sides[: pixels.ndim], mode="edge"))
    left, top = (padded.width - width / factor) / 2, (padded.height - height / factor) / 2
    box = (left, top, left + width / factor, top + height / factor)
    return padded.resize((width, height), PILImage.Resampling.BICUBIC, box=box)


class CorruptImage(ValueError):
    """An image that can't be read; the message names its row."""


def row_name(number: int) -> str:
    """A row's number in words; rows of a stream are numbered from SHARD_STRIDE."""
    if number < SHARD_STRIDE:
        return f"row {number}"
    return f"row {number % SHARD_STRIDE} of shard {number // SHARD_STRIDE - 1}"


class Row(NamedTuple):
    """A row's number (see `row_name`), undecoded image ("path" or "bytes"), and label as stored."""

    number: int
    image: dict[str, Any]
    label: object


@dataclass(eq=False, repr=False)
class ImageRows(torch.utils.data.Dataset):
    """Base class: turns rows into items; `LabelledImages` documents the arguments and errors."""

    dataset: Dataset | IterableDataset
    image_column: str | None = None
    label_column: str | None = None
    resolution: int | tuple[int, int] = 64
    center_crop: bool = False
    random_flip: bool = False
    random_shift: int = 0
    random_scale: float = 0.0
    channels: int | None = None
    labels: dict[int, str] | None = None
    skip_corrupt_images: bool = False
    labelled: bool = True
    renumber_labels: bool = False
    refuse_colour: bool = False
    image_range: tuple[float, float] | None = None
    alpha_background: tuple[int, int, int] | None = None
    check_pixels: bool = False

    def __post_init__(self) -> None:
        self.refuse_colour |= self.channels is None
        self.size = as_pair(self.resolution, "resolution")
        self.resolution = config_size(self.size)
        names = self.dataset.column_names
        self.image_column = find_column(self.dataset, self.image_column, "image_column", Image)
        feature = self.dataset.features[self.image_column]
        if feature == Value("binary") or isinstance(feature, dict) and "bytes" in feature:
            feature = Image()
            self.dataset = self.dataset.cast_column(self.image_column, feature)
        if not isinstance(feature, Image):
            raise ValueError(
                f"image_column={self.image_column!r} holds {feature}, not images; the dataset has "
                f"the columns {names}"
            )
        columns = [self.image_column, *self._find_label_column()]
        self._decoder = Image(mode=feature.mode)
        undecoded = Image(mode=feature.mode, decode=False)
        self._rows = self.dataset.select_columns(columns).cast_column(self.image_column, undecoded)
        self.id2label = self._all_label_names()
        self._ids = {name: i for i, name in self.id2label.items()}

    def _find_label_column(self) -> list[str]:
        """The column of labels, in a list; an empty one without labels."""
        features = self.dataset.features
        column = (self.label_column or None) if self.labelled else None
        if (
            column
            or self.labelled
            and any(isinstance(value, ClassLabel) for value in features.values())
        ):
            column = find_column(self.dataset, column, "label_column", ClassLabel)
            if column == self.image_column:
                raise ValueError(f"label_column={column!r}: it is the column of the images")
        self.label_column = column
        return [column] if column else []

    def _all_label_names(self) -> dict[int, str]:
        """Label names by id, of any column of labels."""
        raise NotImplementedError

    def _label_names(self) -> dict[int, str] | None:
        """Label names by id; None if only the dataset's values tell them."""
        if self.label_column is None:
            return {}
        feature, labels = self.dataset.features[self.label_column], self.labels
        if isinstance(feature, ClassLabel):
            if self.renumber_labels:
                return labels
            names = dict(enumerate(feature.names))
            if labels not in (None, names):
                raise ValueError(
                    f"label_column={self.label_column!r} has the labels {names}, the other split "
                    f"{labels}"
                )
            return names
        dtype = feature.dtype if isinstance(feature, Value) else ""
        return labels if "int" in dtype or "string" in dtype else None

    def _item(self, keys: Iterable[Any], seed: int) -> dict[str, torch.Tensor | int]:
        """The item of the first row; with `skip_corrupt_images` of the first that can be read."""
        image, label, row, corrupt = self._first_readable(keys)
        draw, (height, width) = random.Random(seed), self.size
        left, top = image.width - width, image.height - height
        if self.center_crop:
            left, top = left // 2, top // 2
        else:
            left, top = draw.randint(0, left), draw.randint(0, top)
        image = image.crop((left, top, left + width, top + height))
        if self.random_scale:
            image = scaled(image, (1 + self.random_scale) ** draw.uniform(-1, 1))
        pixels = np.array(image, dtype=np.float32).reshape(height, width, self.channels)
        if self.random_flip and draw.random() < 0.5:
            pixels = pixels[:, ::-1]
        if reach := self.random_shift:
            left, top = draw.randint(0, 2 * reach), draw.randint(0, 2 * reach)
            pixels = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
            pixels = pixels[top : top + height, left : left + width]
        pixels = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1) / 127.5 - 1.0
        item = {"pixel_values": pixels, "label": label}
        return item | {"row": row, "corrupt": corrupt} if self.skip_corrupt_images else item

    def _first_readable(self, keys: Iterable[Any]) -> tuple[PILImage.Image, int, int, int]:
        """Image, label, number of its row, and that of the first row if it is another, else -1."""
        tried: list[int] = []
        for key in keys:
            is_index = isinstance(key, int)
            tried.append(self.number(key) if is_index else key.number)
            try:
                row = key if is_index else key.number
                return *self._image(key), row, tried[0] if len(tried) > 1 else -1
            except CorruptImage:
                if not self.skip_corrupt_images:
                    raise
        raise CorruptImage(
            f"the image of {row_name(tried[0])} can't be read, nor those of {len(tried) - 1} rows "
            "drawn instead"
        )

    def _image(self, row: Row) -> tuple[PILImage.Image, int]:
        """A row's image, grey or RGB, resized to cover the resolution, and its label's id."""
        image = self._decode(row)
        self._check_colour(image, row)
        if image.mode in SIXTEEN_BIT_MODES:  # Pillow's convert would clip at 255
            image = PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if not (image.mode == "F" and self.channels == 1):  # of `in_range`
            image = image.convert("L" if self.channels == 1 else "RGB")
        height, width = self.size
        scale = max(width / image.width, height / image.height)
        if scale != 1:
            width = max(width, round(image.width * scale))
            height = max(height, round(image.height * scale))
            image = image.resize((width, height), PILImage.Resampling.BICUBIC)
        return image, self._label(row.label, row.number)

    def _label(self, label: object, number: int) -> int:
        if self.label_column is None:
            return 0
        feature = self.dataset.features[self.label_column]
        key = original_name(label, feature) if self.renumber_labels else label
        key = self._ids.get(key, key) if isinstance(key, str) else key
        if key not in self.id2label:
            raise ValueError(
                f"label_column={self.label_column!r}: label {label!r} of {row_name(number)} is none "
                f"of the {len(self.id2label)} labels {list(self.id2label.values())[:20]}"
            )
        return int(key)

    def check_image(self, row: Row, decode: bool = False) -> None:
        """Raise a `ValueError` for an image that can't be read, or is coloured where grey is needed.

        Without `decode`, only files of which `mode_of_complete` knows too little are decoded.
        """
        mode = None if decode else mode_of_complete(row.image)
        if mode is None or self.channels == 1 and mode not in GREY_MODES:
            self._check_colour(self._decode(row), row)

    def _check_colour(self, image: PILImage.Image, row: Row) -> None:
        """Raise a `ValueError` for a coloured image that `refuse_colour` keeps from becoming grey."""
        if self.channels != 1 or not self.refuse_colour or image.mode in GREY_MODES:
            return
        levels = np.asarray(image.convert("RGB"), dtype=np.int16)
        if np.ptp(levels, axis=2).max() > COLOUR_TOLERANCE:
            raise ValueError(
                f"the image of {self._place(row)} has colours, but 16 sampled images are grey; "
                "channels=3 (--channels 3) keeps colours, channels=1 (--channels 1) makes all grey"
            )

    def _place(self, row: Row) -> str:
        """Number and file of a row."""
        path = row.image.get("path")
        return row_name(row.number) + (f" ({path})" if path else "")

    def _look_at(self, rows: Iterable[Row]) -> int:
        """Check sampled images (`PixelStatistics`); 1 if all of those that can be read are grey,
        else 3."""
        statistics = PixelStatistics(self.image_range is not None)
        for row in rows:
            try:
                image = self._decode(row)
                statistics.add(image, self._place(row), has_deep_colours(row.image))
            except CorruptImage:
                if not self.skip_corrupt_images:
                    raise
        statistics.check()
        return 1 if statistics.modes and statistics.modes <= {*GREY_MODES, "F"} else 3

    def _decode(self, row: Row) -> PILImage.Image:
        """A row's image as it is stored, or a `CorruptImage` error."""
        try:
            if not row.image:
                raise ValueError("there is none")
            image = self._decoder.decode_example(row.image)
            image.load()
            image = without_alpha(image, self.alpha_background)
            if self.image_range is not None:
                if has_deep_colours(row.image):
                    image = deep_colours(row.image, self.alpha_background)
                return in_range(image, *self.image_range)
            if bits := stored_bits(image):
                return in_range(image, 0, 2**bits - 1)
            check_range(image)
            return image
        except PILImage.UnidentifiedImageError as error:
            raise CorruptImage(
                f"the image of {self._place(row)} can't be read: its format is unknown, or its number "
                "of channels is none of 1, 3 and 4 (those can be .npy arrays)"
            ) from error
        except DECODING_ERRORS as error:
            raise CorruptImage(f"the image of {self._place(row)} can't be read: {error}") from error


@dataclass(eq=False, repr=False)
class LabelledImages(ImageRows):
    """Items of one split, {"pixel_values": (C, H, W) float32 in [-1, 1], "label": int}.

    An item's key is its index, or `(index, seed)`: the seed decides its augmentation, 0 if it isn't
    given.

    Args:
        dataset: a split of `load_splits`.
        image_column: column of images, decoded or as bytes; by default the first of images.
        label_column: column of class ids, integers from 0 or strings; by default the first of class
            ids; without one every label is 0 and `id2label` is empty.
        resolution: (H, W), or an integer for a square; an image is resized by the smallest scale
            at which it covers H x W, and cropped to it. As an attribute, an integer for a square.
        center_crop: crop in the middle; otherwise at a random place.
        random_flip: flip horizontally with probability 1/2.
        random_shift: shift by up to this many pixels, the edge repeated; 0: off.
        random_scale: magnify by a random factor of 1 / (1 + random_scale) to 1 + random_scale, its
            logarithm uniform, about the middle, the edge repeated; 0: off.
        channels: 1 (grey) or 3 (RGB); by default 1 if sixteen images, evenly spread, are all grey.
        labels: label names of another split, where ids must mean the same.
        skip_corrupt_images: replace an image that can't be read by that of another row, with its
            label, which the seed and the index alone decide. Items then also have "row", the index
            of the row that was read, and "corrupt", the number of the row that couldn't be read, or
            -1.
        labelled: False reads no labels: every label is 0 and `id2label` is empty.
        renumber_labels: only ids that occur are labels, numbered from 0 and named as they were.
        refuse_colour: raise an error for a coloured image where `channels` is 1, instead of making
            it grey; always so if `channels` isn't given.
        image_range: the pixels that are black and white. None: as the file's format says.
        alpha_background: the colour (R, G, B) under images that are transparent. None: alpha is
            left out.
        check_pixels: look at sixteen images (`PixelStatistics`) also if `channels` is given.
        cache_images: keep decoded and resized images in the memory of the process that read them.
        numbers: the rows' numbers in the split they're of, for messages; by default 0, 1, ...

    Raises:
        ValueError: if a column is missing or holds something else, or the labels differ from
            `labels`; when an item is read, if its image or label is invalid.
    """

    cache_images: bool = False
    numbers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if (count := len(self.dataset)) == 0:
            raise ValueError("dataset: the split has no rows")
        super().__post_init__()
        self.whole = self.dataset  # of which `select` leaves a part
        self._cache: dict[int, tuple[PILImage.Image, int]] = {}
        self._labels = self._rows.select_columns([self.label_column]) if self.label_column else None
        if self.check_pixels or not self.channels:
            sample = sorted({count * i // 16 for i in range(16)})
            channels = self._look_at(map(self._row, sample))
            self.channels = self.channels or channels

    def _row(self, index: int) -> Row:
        values = self._rows[index]
        return Row(
            self.number(index), values[self.image_column] or {}, values.get(self.label_column)
        )

    def number(self, index: int) -> int:
        """The number in the dataset's split of a row of these."""
        return index if self.numbers is None else self.numbers[index]

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """The rows of some indices."""
        numbers = map(self.number, indices)
        for batch in self._rows.select(indices).iter(100):
            labels = batch.get(self.label_column, [None] * len(batch[self.image_column]))
            for image, label in zip(batch[self.image_column], labels, strict=True):
                yield Row(next(numbers), image or {}, label)

    def select(self, indices: Sequence[int], **attributes: Any) -> LabelledImages:
        """These rows alone, with the same label ids, and with other attributes, if they are given."""
        part = copy(self)
        part.dataset, part._rows = self.dataset.select(indices), self._rows.select(indices)
        part._labels = None if self._labels is None else self._labels.select(indices)
        part.numbers, part._cache = [self.number(i) for i in indices], {}
        for name, value in attributes.items():
            setattr(part, name, value)
        return part

    def hold_out(self, fraction: float) -> tuple[LabelledImages, LabelledImages | None]:
        """The rows to train on, and those of `held_out_rows`, without augmentation; None: no row."""
        labels = self.labels_of_rows() if self.label_column else [0] * len(self)
        if not (rows := held_out_rows(labels, fraction)):
            return self, None
        others = np.setdiff1d(np.arange(len(self)), rows).tolist()
        plain = {"center_crop": True, "random_flip": False, "random_shift": 0, "random_scale": 0.0}
        return self.select(others), self.select(rows, **plain, cache_images=False)

    def _all_label_names(self) -> dict[int, str]:
        if (names := self._label_names()) is not None:
            return names
        feature, column = self._rows.features[self.label_column], self.label_column
        if isinstance(feature, ClassLabel):
            ids = [i for i in self._rows.unique(column) if i is not None]
            return dict(enumerate(feature.names[i] for i in sorted(ids) if i >= 0))
        dtype = feature.dtype if isinstance(feature, Value) else ""
        if "string" not in dtype and "int" not in dtype:
            raise ValueError(
                f"label_column={column!r} holds {feature}, from {self._rows[0][column]!r} on; class "
                "ids, integers from 0 or strings, in every row, can be labels"
            )
        values = self._rows.unique(column)
        for value in values:
            missing = value is None or isinstance(value, str) and not value.strip()
            if missing or isinstance(value, int) and value < 0 and not self.renumber_labels:
                row = row_name(self._rows[column][:].index(value))
                raise ValueError(
                    f"label_column={column!r} holds {value!r} in {row}; class ids, integers from 0 "
                    "or strings, in every row, can be labels"
                )
        if "string" in dtype:
            return dict(enumerate(sorted(values)))
        return integer_label_names(values, column, self.renumber_labels)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int]:
        index, seed = item if isinstance(item, tuple) else (item, 0)
        return self._item(self._candidates(index, seed), seed)

    def _candidates(self, index: int, seed: int) -> Iterator[int]:
        """A row, and those to read in its place if it can't be read."""
        yield index
        draw = random.Random(f"instead {index} {seed}")
        for _ in range(MAX_ATTEMPTS - 1):
            yield draw.randrange(len(self))

    def _image(self, index: int) -> tuple[PILImage.Image, int]:
        if index in self._cache:
            return self._cache[index]
        result = super()._image(self._row(index))
        if self.cache_images:
            self._cache[index] = result
        return result

    def label(self, index: int) -> int:
        """The label of a row, without reading its image."""
        if self._labels is None:
            return 0
        return self._label(self._labels[index][self.label_column], index)

    def labels_of_rows(self) -> list[int]:
        """The labels of all rows; a `ValueError` names the first that is none."""
        if self._labels is None:
            return [0] * len(self)
        ids: dict[object, int] = {}
        for index, label in enumerate(values := self._labels[self.label_column][:]):
            if label not in ids:
                ids[label] = self._label(label, self.number(index))
        return [ids[label] for label in values]
