"""Training data that is read while training (--streaming): its rows, their order, and the position.

The training process reads rows with undecoded images in windows, one window ahead; the DataLoader's
workers decode them. So the order of the items, and the position to resume from, don't depend on the
number of workers.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from torch.utils.data import Sampler

from .batches import item_seed
from .data import SHARD_STRIDE, ImageRows, LabelledImages, Row, evenly_spread

AnyItem = TypeVar("AnyItem")
DEFAULT_WINDOW = 1000  # rows that are shuffled together
ROWS_PER_READ = 50
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio
MAX_LABELS = 100_000  # whose number --labels may be
START = {"epoch": 0, "shard": 0, "row": 0, "passed": 0, "window": 0, "taken": 0}
Item = tuple[tuple[list[Row], int], int]  # ((rows, i), seed)


class StreamedImages(ImageRows):
    """Items of a split that is never in memory completely; arguments as those of `LabelledImages`.

    The item of the key `((rows, i), seed)` of `StreamedBatches` is that of row i; with
    `skip_corrupt_images`, if its image can't be read, that of another of these rows, which the seed
    decides. By default `channels` is 1 if the first sixteen images are all grey. `label_column` may
    be a field of a column of JSON, e.g. "json.label"; `labels` names integers or strings by id.

    Args:
        held_out_fraction: share of the rows that `StreamedBatches` leaves out, for `in_memory`.
    """

    held_out_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.dataset.features is None:
            raise ValueError(
                "--streaming: the dataset has no column types; Parquet files, tar files "
                "(WebDataset) and image folders have"
            )
        self.dataset = with_json_field(self.dataset.decode(False), self.label_column)
        super().__post_init__()
        self.num_shards = self._rows.num_shards
        first = list(islice(self.rows(), 16))
        if not first:
            raise ValueError("dataset: the split has no rows")
        self.of_files = all(row.image.get("path") and not row.image.get("bytes") for row in first)
        if self.check_pixels or not self.channels:
            channels = self._look_at(first)
            self.channels = self.channels or channels

    def kind(self, window: int | None, processes: int) -> str:
        """Description of the order that positions refer to; a resumed run must have the same."""
        window = "all" if self.of_files else window or DEFAULT_WINDOW
        kind = f"{self.num_shards} shards streamed to {processes} processes, {window} shuffled together"
        return kind + (f", without {self.held_out_fraction:g}" if self.held_out_fraction else "")

    def is_held_out(self, row: Row) -> bool:
        """Whether a row is held out: the same in every run, evenly spread over each shard."""
        share = self.held_out_fraction
        return share > 0 and row.number * GOLDEN % 2**64 < share * 2**64

    def shard_rows(self, shard: int, first: int = 0) -> Iterator[Row]:
        """The rows of a shard in their order, from number `first` on."""
        part = self._rows.shard(num_shards=self.num_shards, index=shard)
        number = (shard + 1) * SHARD_STRIDE + first
        for rows in (part.skip(first) if first else part).iter(ROWS_PER_READ):
            labels = rows.get(self.label_column, [None] * len(rows[self.image_column]))
            for image, label in zip(rows[self.image_column], labels, strict=True):
                yield Row(number, image or {}, label)
                number += 1

    def rows(self) -> Iterator[Row]:
        """All rows in the dataset's order."""
        for shard in range(self.num_shards):
            yield from self.shard_rows(shard)

    def in_memory(self, count: int, labels: dict[int, str]) -> LabelledImages | None:
        """The first rows, or of an image folder evenly spread rows, with another split's labels.

        With `held_out_fraction`, of the rows that are held out; None if there are none.
        """
        rows = self.rows()
        if self.held_out_fraction:
            rows = filter(self.is_held_out, rows)
        rows = list(islice(rows, None if self.of_files else count))
        if not rows:
            return None
        rows = [rows[i] for i in evenly_spread(len(rows), count)]
        columns = {self.image_column: [row.image or None for row in rows]}
        features = {self.image_column: Image()}
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
            labelled=self.labelled,
            refuse_colour=self.refuse_colour,
            numbers=[row.number for row in rows],
        )

    def __getitem__(self, item: Item) -> dict[str, torch.Tensor | int]:
        (rows, i), seed = item
        order = [i]
        if self.skip_corrupt_images:
            others = [j for j in range(len(rows)) if j != i]
            order += random.Random(f"instead {seed}").sample(others, len(others))
        return self._item((rows[j] for j in order), seed)

    def _all_label_names(self) -> dict[int, str]:
        feature, labels = self.dataset.features.get(self.label_column), self.labels
        if labels is not None and (feature is None or isinstance(feature, ClassLabel)):
            reason = "has no column of labels (--label_column)"
            if feature is not None:
                reason = f"names its own: {feature.names}"
            raise ValueError(
                f"--labels {list(labels.values())}: not allowed, since the dataset {reason}"
            )
        if (names := self._label_names()) is None:
            raise ValueError(
                f"--label_column {self.label_column} holds {feature}, and a stream can't be read "
                "in advance: a column of class ids, and one of integers from 0 or strings with "
                "--labels, are allowed"
            )
        return names


def with_json_field(dataset: IterableDataset, column: str | None) -> IterableDataset:
    """The dataset with a field of a column of JSON, e.g. "json.label", as a column."""
    if column is None or column in dataset.features:
        return dataset
    first, *path = column.split(".")
    feature = dataset.features.get(first)
    for name in path:
        feature = feature.get(name) if isinstance(feature, dict) else None
    if not isinstance(feature, Value):
        return dataset  # the caller reports the missing column

    def pick(row: dict[str, Any]) -> dict[str, object]:
        value = row[first]
        for name in path:
            value = value and value.get(name)
        return {column: value}

    return dataset.map(pick, features=Features({**dataset.features, column: feature}))


def parse_labels(text: str | None) -> dict[int, str] | None:
    """Label names by id from --labels: names, a JSON file with a list of names, or their number."""
    if text is None:
        return None
    try:
        if text.isdecimal():
            if int(text) > MAX_LABELS:
                raise ValueError(f"up to {MAX_LABELS} classes are allowed")
            names = [str(i) for i in range(int(text))]
        elif Path(text).is_file():
            names = json.loads(Path(text).read_text())
        else:
            names = text.split(",")
    except (OSError, ValueError) as error:
        raise ValueError(f"--labels {text}: {error}") from error
    valid = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not valid or not names or len(set(names)) < len(names):
        raise ValueError(
            f"--labels {text}: different names such as cat,dog, a JSON file with a list of them "
            "and a number of classes, 1 or more, are allowed"
        )
    return dict(enumerate(names))


@dataclass(eq=False)
class StreamedBatches(Sampler[list[Item]]):
    """Batches of `((rows, i), seed)` for `StreamedImages`: epochs, each in another order.

    In an epoch the shards are in an order drawn from (seed, epoch). Process `rank` reads the shards
    at rank, rank + world, ... of it if their number is a multiple of `world`; otherwise all of them,
    of which it keeps one row in `world` (as datasets' `split_dataset_by_node`). Its rows are cut
    into windows, the last one of an epoch shorter, and permuted within each by (seed, epoch,
    window). An image folder's rows, which hold names and no images, are one window.

    The other arguments and the seeds are those of `ShuffledBatches`.

    Args:
        window: rows that are shuffled together; None: 1000.
        start: `position` before batch `first`, independent of what was read ahead; None: the start
            of the data. Resuming only skips the shard's rows before it, without decoding.
    """

    source: StreamedImages
    window: int | None
    batch_size: int
    seed: int
    rank: int
    world: int
    first: int
    last: int
    start: dict[str, int] | None = None

    def __post_init__(self) -> None:
        self.window = None if self.source.of_files else self.window or DEFAULT_WINDOW
        self.start = dict(self.start or START)
        # For every window in use: the number of rows before it, and the position of its start.
        self._windows_in_use: deque[tuple[int, dict[str, int]]] = deque()

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[Item]]:
        rows = self._shuffled_rows()
        for batch in range(self.first, self.last):
            start = (batch * self.world + self.rank) * self.batch_size
            chosen = list(islice(rows, self.batch_size))
            yield [((chosen, i), item_seed(self.seed, start + i)) for i in range(self.batch_size)]

    def position(self, batch: int) -> dict[str, int]:
        """Where the stream is before `batch`: one that was read, or the next; forgets earlier ones."""
        rows_read = (batch - self.first) * self.batch_size
        while len(self._windows_in_use) > 1 and self._windows_in_use[1][0] < rows_read:
            self._windows_in_use.popleft()
        before, start = -self.start["taken"], self.start
        if self._windows_in_use:
            before, start = self._windows_in_use[0]
        return {**start, "taken": rows_read - before}

    def _shuffled_rows(self) -> Iterator[Row]:
        self._windows_in_use.clear()
        before, taken = -self.start["taken"], self.start["taken"]
        for start, rows in prefetch(self._windows()):
            self._windows_in_use.append((before, start))
            order = list(range(len(rows)))
            draw = random.Random(f"window {self.seed} {start['epoch']} {start['window']}")
            draw.shuffle(order)
            yield from (rows[i] for i in order[taken:])
            before, taken = before + len(rows), 0

    def _windows(self) -> Iterator[tuple[dict[str, int], list[Row]]]:
        """The start and the rows of each window."""
        position = dict(self.start)
        while True:
            rows, start = self._epoch_rows(position), dict(position)
            while window := list(islice(rows, self.window)):
                yield start, window
                position["window"] += 1
                start = dict(position)
            if position["window"] == 0:
                raise ValueError(
                    f"--streaming: process {self.rank} of {self.world} finds no row in epoch "
                    f"{position['epoch']} of {self.source.num_shards} shards; fewer processes, and "
                    "more or larger shards, are allowed"
                )
            position = {**START, "epoch": position["epoch"] + 1}

    def _epoch_rows(self, position: dict[str, int]) -> Iterator[Row]:
        """This process's rows of the rest of an epoch; updates `position`."""
        count = self.source.num_shards
        draw = random.Random(f"shards {self.seed} {position['epoch']}")
        shards = draw.sample(range(count), count)
        by_shard = count % self.world == 0
        if by_shard:
            shards = shards[self.rank :: self.world]
        while position["shard"] < len(shards):
            for row in self.source.shard_rows(shards[position["shard"]], position["row"]):
                position["row"] += 1
                if self.source.is_held_out(row):
                    continue
                number = position["passed"]
                position["passed"] += 1
                if by_shard or number % self.world == self.rank:
                    yield row
            position["shard"], position["row"] = position["shard"] + 1, 0


def prefetch(items: Iterator[AnyItem]) -> Iterator[AnyItem]:
    """The same items, of which a thread computes the next one in advance."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, items, None)
        while (item := future.result()) is not None:
            future = thread.submit(next, items, None)
            yield item
