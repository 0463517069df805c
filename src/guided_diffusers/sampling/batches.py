"""Batches of images whose labels and noise depend on the seed and the image's number alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..likelihood import Label
from ..pipeline import ClassifierGuidedPipeline


class Once(logging.Filter):
    """A context in which the pipeline says the same warning once, however many batches there are."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()
        self._logger = logging.getLogger(ClassifierGuidedPipeline.__module__)

    def filter(self, record: logging.LogRecord) -> bool:
        new = (message := record.getMessage()) not in self._said
        self._said.add(message)
        return new

    def __enter__(self) -> None:
        self._logger.addFilter(self)

    def __exit__(self, *_: object) -> None:
        self._logger.removeFilter(self)


def image_generator(seed: int, index: int) -> torch.Generator:
    """The generator of image `index` of the images of a seed; no two (seed, index) share a stream."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def sample(
    pipeline: ClassifierGuidedPipeline,
    labels: Sequence[Label],
    seed: int = 0,
    batch_size: int = 64,
    indices: Sequence[int] | None = None,
    **call: Any,
) -> Iterator[tuple[list[int], Any]]:
    """Batches of (their indices, their images), image i with label `labels[i % len(labels)]`.

    An image's label and all its noise, a stochastic scheduler's too, depend on the seed and i alone. In a batch of
    another size a network's sums are rounded otherwise: images then differ as float numbers do, and in a few pixels
    after rounding to 8 bits.

    Args:
        labels: ids, names or mixtures.
        indices: which images to make; by default one a label, 0 to len(labels) - 1.
        call: further arguments of the pipeline's call, such as `guidance_scale` and `output_type`.
    """
    indices, once = range(len(labels)) if indices is None else indices, Once()
    for start in range(0, len(indices), batch_size):
        batch = list(indices[start : start + batch_size])
        generators = [image_generator(seed, i) for i in batch]
        with once:
            images = pipeline(
                [labels[i % len(labels)] for i in batch], generator=generators, **call
            ).images
        yield batch, images
