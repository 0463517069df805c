"""Training data that is read as it comes (--streaming): its rows, their order, and where in it a run is.

The training process reads rows whose images aren't decoded, in windows, one ahead; whoever makes the items decodes
them. So the order of the items, and the place to go on from, are the same with any number of such processes.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
)
from PIL import Image as PILImage
from torch.utils.data import Sampler

from .data import (
    SHARD,
    UNREADABLE,
    CorruptImage,
    ImageRows,
    LabelledImages,
    all_grey,
    row_name,
)

if TYPE_CHECKING:
    from .options import Options

AnyItem = TypeVar("AnyItem")
WINDOW = 1000  # rows that are shuffled together
AT_ONCE = 50  # rows that are read together
BEGINNING = {"epoch": 0, "shard": 0, "row": 0, "passed": 0, "window": 0, "taken": 0}


class Row(NamedTuple):
    """A row of a stream, its number as `row_name` reads it, its image a `path` and, but for a file's, its `bytes`."""

    number: int
    image: dict[str, Any]
    label: object


Item = tuple[tuple[list[Row], int], int]


class StreamedImages(ImageRows):
    """Items of one split that is never in memory as a whole; the arguments are those of `LabelledImages`.

    An item is asked for by `((rows, i), seed)`, as `StreamedBatches` does: it is of row i of these rows, and with
    `skip_corrupt_images`, if its image can't be read, of another one of them, drawn by the seed.

    Args:
        channels: by default 1 if the first sixteen images are all grey.
        label_column: may be a field of a column of JSON, e.g. "json.label".
        labels: names by id, of integers or strings; a column of class ids has its own.

    Raises:
        ValueError: if a column is missing or holds something else, or the labels' names aren't known.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        image_column: str | None = None,
        label_column: str | None = None,
        resolution: int = 64,
        center_crop: bool = False,
        random_flip: bool = False,
        random_shift: int = 0,
        channels: int | None = None,
        labels: dict[int, str] | None = None,
        skip_corrupt_images: bool = False,
    ):
        if dataset.features is None:
            raise ValueError(
                "--streaming: the dataset doesn't say what its columns hold; Parquet files, tar files "
                "(WebDataset) and image folders do"
            )
        dataset = with_field(dataset.decode(False), label_column)
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
        self.dataset, self._decoder = dataset, Image()
        self._rows = dataset.select_columns(self.columns).cast_column(
            self.image_column, Image(decode=False)
        )
        self._use(self._known_names(labels))
        first = list(islice(self.rows(), 16))
        if not first:
            raise ValueError("dataset: the split has no rows")
        self.of_files = all(row.image.get("path") and not row.image.get("bytes") for row in first)
        self.channels = channels or (1 if all_grey(self._decodable(first)) else 3)

    @property
    def num_shards(self) -> int:
        return self._rows.num_shards

    def kind(self, window: int | None, processes: int) -> str:
        """Of what a position in the stream is one."""
        together = "all" if self.of_files else window or WINDOW
        return f"{self.num_shards} shards streamed to {processes} processes, {together} shuffled together"

    def shard_rows(self, shard: int, first: int = 0) -> Iterator[Row]:
        """The rows of a shard in their order, from one on."""
        part, number = (
            self._rows.shard(num_shards=self.num_shards, index=shard),
            (shard + 1) * SHARD + first,
        )
        for rows in (part.skip(first) if first else part).iter(AT_ONCE):
            images = rows[self.image_column]
            labels = [None] * len(images) if self.label_column is None else rows[self.label_column]
            for image, label in zip(images, labels, strict=True):
                yield Row(number, image or {}, label)
                number += 1

    def rows(self) -> Iterator[Row]:
        """All rows in the dataset's order."""
        for shard in range(self.num_shards):
            yield from self.shard_rows(shard)

    def in_memory(self, count: int, labels: dict[int, str]) -> LabelledImages:
        """The first rows, or of a folder of images rows evenly spread, with another split's labels."""
        rows = list(islice(self.rows(), None if self.of_files else count))
        count = min(count, len(rows))
        rows = [rows[i * len(rows) // count] for i in range(count)]
        columns, features = (
            {self.image_column: [row.image or None for row in rows]},
            {self.image_column: Image()},
        )
        if self.label_column is not None:
            columns[self.label_column] = [row.label for row in rows]
            features[self.label_column] = self.dataset.features[self.label_column]
        return LabelledImages(
            Dataset.from_dict(columns, Features(features)),
            self.image_column,
            self.label_column,
            self.resolution,
            center_crop=True,
            channels=self.channels,
            labels=labels,
            skip_corrupt_images=self.skip_corrupt_images,
        )

    def __getitem__(self, item: Item) -> dict[str, torch.Tensor | int]:
        (rows, i), seed = item
        order = [i]
        if self.skip_corrupt_images:
            others = [*range(i), *range(i + 1, len(rows))]
            order += random.Random(f"instead {seed}").sample(others, len(others))
        return self._item((rows[j] for j in order), seed)

    def _decodable(self, rows: list[Row]) -> Iterator[PILImage.Image]:
        for row in rows:
            try:
                yield self._decoded(row)
            except CorruptImage:
                if not self.skip_corrupt_images:
                    raise

    def _decoded(self, row: Row) -> PILImage.Image:
        try:
            if not row.image:
                raise ValueError("there is none")
            image = self._decoder.decode_example(row.image)
            image.load()
            return image
        except UNREADABLE as error:
            name = f" ({row.image['path']})" if row.image.get("path") else ""
            raise CorruptImage(
                f"the image of {row_name(row.number)}{name} can't be read: {error}"
            ) from error

    def _image(self, row: Row) -> tuple[PILImage.Image, int]:
        return self._prepared(self._decoded(row)), self._label(row.label, row.number)

    def _number(self, row: Row) -> int:
        return row.number

    def _known_names(self, labels: dict[int, str] | None) -> dict[int, str]:
        feature = None if self.label_column is None else self.dataset.features[self.label_column]
        if labels is not None and (feature is None or isinstance(feature, ClassLabel)):
            has = (
                "has no column of labels (--label_column)"
                if feature is None
                else f"names its own: {feature.names}"
            )
            raise ValueError(
                f"--labels {list(labels.values())}: not allowed, since the dataset {has}"
            )
        if (names := self._names(self.dataset.features, labels)) is None:
            raise ValueError(
                f"--label_column {self.label_column} holds {feature}, and a stream can't be read in "
                "advance: a column of class ids, and one of integers from 0 or strings with --labels, are "
                "allowed"
            )
        return names


def with_field(dataset: IterableDataset, column: str | None) -> IterableDataset:
    """With a field of a column of JSON, e.g. "json.label", as a column of its own."""
    if column is None or column in dataset.features:
        return dataset
    first, *path = column.split(".")
    feature = dataset.features.get(first)
    for name in path:
        feature = feature.get(name) if isinstance(feature, dict) else None
    if not isinstance(feature, Value):
        return dataset  # and it isn't found

    def picked(row: dict[str, Any]) -> dict[str, object]:
        value = row[first]
        for name in path:
            value = value and value.get(name)
        return {column: value}

    return dataset.map(picked, features=Features({**dataset.features, column: feature}))


def label_names(given: str | None) -> dict[int, str] | None:
    """The names of --labels by id.

    Raises:
        ValueError: if it is none of its forms.
    """
    if given is None:
        return None
    try:
        if given.isdecimal():
            names = [str(i) for i in range(int(given))]
        else:
            names = (
                json.loads(Path(given).read_text()) if Path(given).is_file() else given.split(",")
            )
        fitting = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    except (OSError, ValueError) as error:
        raise ValueError(f"--labels {given}: {error}") from error
    if not fitting or not names or len(set(names)) < len(names):
        raise ValueError(
            f"--labels {given}: different names such as cat,dog, a JSON file with a list of them and a "
            "number of classes, 1 or more, are allowed"
        )
    return dict(enumerate(names))


class StreamedBatches(Sampler[list[Item]]):
    """Batches of `((rows, i), seed)` for `StreamedImages`: epoch after epoch, each in another order.

    In an epoch the shards are in an order drawn from (seed, epoch). Process `rank` reads those at rank, rank + world,
    ... of it, each whole, if their number is a multiple of the processes', and else all of them, of which it keeps one
    row of `world` (as datasets' `split_dataset_by_node`). Its rows are cut into windows, the last one of an epoch
    shorter, and permuted within each by (seed, epoch, window). An image folder's rows, which hold names and no images,
    are one window.

    A batch's seeds are those that `Stream` gives it. `position` says where the stream is, in numbers that don't depend
    on what was read ahead; with it another one goes on there, which costs a look at the shard's rows before, without
    their images being decoded.
    """

    def __init__(
        self,
        source: StreamedImages,
        window: int | None,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        first: int,
        last: int,
        position: dict[str, int] | None = None,
    ):
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.window = None if source.of_files else window or WINDOW
        self.rank, self.world, self.first, self.last = rank, world, first, last
        self.start = dict(BEGINNING if position is None else position)
        self._begun: deque[tuple[int, dict[str, int]]] = (
            deque()
        )  # rows before a window, and where it begins

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[Item]]:
        rows = self._shuffled()
        for batch in range(self.first, self.last):
            start = (batch * self.world + self.rank) * self.batch_size
            chosen = list(islice(rows, self.batch_size))
            yield [((chosen, i), self.seed * 1_000_003 + start + i) for i in range(self.batch_size)]

    def position(self, batch: int) -> dict[str, int]:
        """Where the stream is before a batch that was given, or the one after the last that was; of no earlier one."""
        read = (batch - self.first) * self.batch_size
        while len(self._begun) > 1 and self._begun[1][0] < read:
            self._begun.popleft()
        before, place = self._begun[0] if self._begun else (-self.start["taken"], self.start)
        return {**place, "taken": read - before}

    def _shuffled(self) -> Iterator[Row]:
        self._begun.clear()
        before, taken = -self.start["taken"], self.start["taken"]
        for place, rows in one_ahead(self._windows()):
            self._begun.append((before, place))
            order = list(range(len(rows)))
            random.Random(f"window {self.seed} {place['epoch']} {place['window']}").shuffle(order)
            yield from (rows[i] for i in order[taken:])
            before, taken = before + len(rows), 0

    def _windows(self) -> Iterator[tuple[dict[str, int], list[Row]]]:
        """The rows of each window, and where it begins."""
        at = dict(self.start)
        while True:
            rows, place = self._epoch(at), dict(at)
            while window := list(islice(rows, self.window)):
                yield place, window
                at["window"] += 1
                place = dict(at)
            if at["window"] == 0:
                raise ValueError(
                    f"--streaming: process {self.rank} of {self.world} finds no row in epoch "
                    f"{at['epoch']} of {self.source.num_shards} shards; fewer processes, and more or "
                    "larger shards, are allowed"
                )
            at = {**BEGINNING, "epoch": at["epoch"] + 1}

    def _epoch(self, at: dict[str, int]) -> Iterator[Row]:
        """This process's rows of the rest of an epoch; `at` goes along."""
        count = self.source.num_shards
        shards = random.Random(f"shards {self.seed} {at['epoch']}").sample(range(count), count)
        if whole := count % self.world == 0:
            shards = shards[self.rank :: self.world]
        while at["shard"] < len(shards):
            for row in self.source.shard_rows(shards[at["shard"]], at["row"]):
                at["row"] += 1
                at["passed"] += 1
                if whole or (at["passed"] - 1) % self.world == self.rank:
                    yield row
            at["shard"], at["row"] = at["shard"] + 1, 0


def one_ahead(items: Iterator[AnyItem]) -> Iterator[AnyItem]:
    """The same items; a thread gets the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item


def load_streams(
    options: Options, splits: IterableDatasetDict, held_out: str | None
) -> tuple[StreamedImages, LabelledImages | None]:
    """The split to train on, and the first images of the held-out one.

    Raises:
        ValueError: if a column or its labels can't be used.
    """
    train = StreamedImages(
        splits[options.train_split],
        options.image_column,
        options.label_column,
        options.resolution,
        options.center_crop,
        options.random_flip,
        options.random_shift,
        labels=label_names(options.labels),
        skip_corrupt_images=options.skip_corrupt_images,
    )
    if held_out is None:
        return train, None
    named = (
        None
        if isinstance(train.dataset.features.get(train.label_column), ClassLabel)
        else train.id2label or None
    )
    rest = StreamedImages(
        splits[held_out],
        train.image_column,
        train.label_column,
        options.resolution,
        channels=train.channels,
        labels=named,
        skip_corrupt_images=options.skip_corrupt_images,
    )
    return train, rest.in_memory(options.validation_samples, train.id2label)
