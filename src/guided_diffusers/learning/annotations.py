"""Images with captions, or with several labels or numbers per image, made from `LabelledImages`."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value

from .classifier_losses import MULTI, REGRESSION
from .data import LabelledImages, find_column, integer_label_names, original_name, row_name

FLOAT32_MAX = float(np.finfo(np.float32).max)


class CaptionedImages(torch.utils.data.Dataset):
    """Items of `LabelledImages` with a "caption", drawn from those of the row or of its label.

    An item's key is its index, which then is the seed, or `(index, seed)`. The captions are either a
    column of strings or of lists of strings in the images' dataset, or a mapping by label id.
    """

    def __init__(
        self,
        images: LabelledImages,
        caption_column: str | None = None,
        captions: Mapping[int, Sequence[str]] | None = None,
    ):
        if (caption_column is None) == (captions is None):
            raise ValueError(
                f"caption_column={caption_column!r}, captions={captions!r}: one of the two is "
                "needed, and only one"
            )
        self.images, self._by_label = images, captions
        if captions is not None:
            if not images.id2label:
                reason = "captions by label need labels, and the dataset has no column of class ids"
                raise ValueError(f"captions: {reason}")
            names = images.id2label.items()
            if missing := [name for i, name in names if not is_captions(captions.get(i))]:
                raise ValueError(f"captions: there are none for the labels {missing}")
            return
        column = find_column(images.dataset, caption_column, "caption_column", Value)
        feature = images.dataset.features[column]
        element = getattr(feature, "feature", feature)  # of a list
        if getattr(element, "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"caption_column={caption_column!r} holds {feature}; strings or lists of strings "
                "are allowed"
            )
        self._rows = images.dataset.select_columns([column])
        for _ in self.captions():  # raises an error for a row without captions
            pass

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int | str]:
        index, seed = item if isinstance(item, tuple) else (item, item)
        values = self.images[item]
        if self._by_label is None:
            captions = self._captions(values.get("row", index))
        else:
            captions = self._by_label[values["label"]]
        return {**values, "caption": random.Random(f"caption {seed}").choice(captions)}

    def _captions(self, index: int) -> Sequence[str]:
        (value,) = self._rows[index].values()
        return self._valid(value, index)

    def _valid(self, value: object, index: int) -> Sequence[str]:
        captions = [value] if isinstance(value, str) else value
        if not is_captions(captions):
            raise ValueError(
                f"{row_name(self.images.number(index))} has the captions {value!r} in "
                f"caption_column={self._rows.column_names[0]!r}; one or more strings that aren't "
                "empty are allowed"
            )
        return captions

    def captions(self) -> Iterator[str]:
        """All captions that an item may get."""
        if self._by_label is not None:
            return chain.from_iterable(self._by_label.values())
        values = column_values(self._rows)
        return chain.from_iterable(self._valid(value, i) for i, value in enumerate(values))


def is_captions(captions: object) -> bool:
    """Whether these are captions: one or more strings that aren't empty."""
    if not isinstance(captions, (list, tuple)):
        return False
    return bool(captions) and all(isinstance(text, str) and text.strip() for text in captions)


def column_values(dataset: Dataset) -> Iterator[object]:
    """The values of a dataset's only column."""
    for rows in dataset.iter(1000):
        (values,) = rows.values()
        yield from values


class TargetedImages(torch.utils.data.Dataset):
    """Items of `LabelledImages` whose "label" is (num_labels,) float32: zeros and ones, or numbers.

    An item's key is its index or `(index, seed)`.

    Args:
        images: `LabelledImages` or `LatentImages`, whose own label is replaced.
        problem_type: its kind, in `transformers`' words. "multi_label_classification": lists of ids
            or names, or, if all rows have the same number, two or more, of zeros and ones, a vector
            of a 0 or 1 for each label. "regression": numbers, or lists of the same number of them;
            `id2label` then is empty.
        labels: label names of another split, where ids must mean the same.
        renumber_labels: only ids that occur are labels, numbered from 0 and named as they were.

    Raises:
        ValueError: for a column that holds something else, naming the first such row.
    """

    def __init__(
        self,
        images: LabelledImages,
        label_column: str,
        problem_type: str,
        labels: Mapping[int, str] | None = None,
        renumber_labels: bool = False,
    ):
        if problem_type not in (MULTI, REGRESSION):
            raise ValueError(f"problem_type={problem_type!r}: {MULTI} and {REGRESSION} are allowed")
        if label_column not in images.dataset.column_names:
            raise ValueError(
                f"label_column={label_column!r}: {problem_type} needs one of the dataset's columns "
                f"{images.dataset.column_names}"
            )
        self.images, self.label_column, self.problem_type = images, label_column, problem_type
        self.dataset, self.resolution = images.dataset, images.resolution
        self.channels = images.channels
        self._rows, self._vectors = images.dataset.select_columns([label_column]), False
        self._renumber = renumber_labels
        if problem_type == REGRESSION:
            self.id2label: dict[int, str] = {}
            self.num_labels = np.size(self._rows[0][label_column])
        else:
            self.id2label = self._label_names(labels)
            self.num_labels = len(self.id2label)
        self._ids = {name: i for i, name in self.id2label.items()}
        for i, value in enumerate(column_values(self._rows)):
            self._label(value, i)

    def _label_names(self, labels: Mapping[int, str] | None) -> dict[int, str]:
        """Label names by id; sets whether the column holds vectors of zeros and ones."""
        feature = self._rows.features[self.label_column]
        # `datasets` has two kinds of lists.
        element = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        lengths, values, names, repeated = Counter(), set(), None, False
        whole = self.images.whole if labels is None else self.dataset
        whole = whole.select_columns([self.label_column])
        for value in column_values(whole) if element is not None else ():
            value = value or ()
            lengths[len(value)] += 1
            values.update(value)
            repeated |= len(set(value)) < len(value)  # as in vectors of zeros and ones
        values.discard(None)  # `_label` raises a better error
        length = lengths.most_common(1)[0][0] if len(lengths) == 1 or repeated else 0
        if isinstance(element, ClassLabel):
            names = element.names
            if self._renumber:
                names = [names[i] for i in sorted(values) if i >= 0]
        elif length > 1 and values <= {0, 1} and (labels is None or length == len(labels)):
            self._vectors, names = True, map(str, range(length))
        elif not values:
            names = None if element is None or labels is None else []
        elif all(isinstance(value, str) for value in values):
            names = sorted(value for value in values if value.strip())
        elif all(type(value) is int for value in values):
            occurring = self._renumber or labels is not None
            names = integer_label_names(values, self.label_column, occurring).values()
        if names is None:
            examples = sorted(map(repr, values))[:5]
            raise ValueError(
                f"label_column={self.label_column!r} holds {feature}, with values such as "
                f"{examples}; lists of class ids, of integers from 0 or of strings, or vectors of "
                "zeros and ones are allowed"
            )
        names = dict(enumerate(names))
        if labels is not None and not set(names.values()) <= set(labels.values()):
            raise ValueError(
                f"label_column={self.label_column!r} has the labels {names}, the other split "
                f"{labels}"
            )
        return names if labels is None else dict(labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int]:
        index = item[0] if isinstance(item, tuple) else item
        values = self.images[item]
        return {**values, "label": self.label(values.get("row", index))}

    def label(self, index: int) -> torch.Tensor:
        """The label of a row, (num_labels,), without reading its image."""
        return self._label(self._rows[index][self.label_column], index)

    def targets(self) -> torch.Tensor:
        """All labels, (N, num_labels)."""
        return torch.stack(
            [self._label(value, i) for i, value in enumerate(column_values(self._rows))]
        )

    def _label(self, value: object, index: int) -> torch.Tensor:
        values = list(value) if isinstance(value, list) else [value]
        if self.problem_type == REGRESSION or self._vectors:
            if self._vectors:
                kind, valid = "zeros and ones", all(x in (0, 1) for x in values)
            else:
                kind = "finite numbers"
                valid = all(isinstance(x, (int, float)) and abs(x) <= FLOAT32_MAX for x in values)
            if len(values) != self.num_labels or not valid:
                raise ValueError(
                    f"label {value!r} of {row_name(self.images.number(index))} of "
                    f"label_column={self.label_column!r}: {self.num_labels} {kind} are allowed"
                )
            return torch.tensor(values, dtype=torch.float32)
        if self._renumber:
            values = [self._original_name(value) for value in values]
        ids = [self._ids.get(name, name) if isinstance(name, str) else name for name in values]
        if not isinstance(value, list) or any(i not in self.id2label for i in ids):
            raise ValueError(
                f"label {value!r} of {row_name(self.images.number(index))} of "
                f"label_column={self.label_column!r} isn't a list of the {len(self.id2label)} labels "
                f"{list(self.id2label.values())[:20]}"
            )
        label = torch.zeros(self.num_labels)
        label[ids] = 1.0
        return label

    def _original_name(self, label: object) -> object:
        """Name of an element of a list, before it's renumbered."""
        feature = self._rows.features[self.label_column]
        element = feature[0] if isinstance(feature, list) else feature.feature
        return original_name(label, element)
