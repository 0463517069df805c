"""Sums over images and a sample of their features, merged across processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

BLOCK = 2**21  # numbers in a block of distances: 16 MiB in float64


class Accumulator:
    """Sums over images: the tensors named in `sums`."""

    sums: tuple[str, ...]

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.sums}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Replace the sums by those of an accumulator with the same settings.

        Raises:
            ValueError: for the state of another class.
        """
        if state.keys() != set(self.sums):
            raise ValueError(
                f"state: {sorted(state)} is none of {type(self).__name__}; {self.sums} is needed"
            )
        vars(self).update(state)

    def merge(self, other: Any) -> None:
        """Add the sums of `other`, an accumulator of the same class."""
        for name, value in self.state().items():
            value += getattr(other, name)


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a matrix with at most `BLOCK` numbers each."""
    step = max(1, BLOCK // max(columns, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def gather(accumulators: Sequence[Accumulator]) -> None:
    """Merge each accumulator with those of all processes, in the order of their ranks.

    Afterwards all processes hold the same sums. Processes broadcast one after the other, so that
    none holds more than two states.
    """
    num_processes = PartialState().num_processes
    if num_processes == 1:
        return
    local = [accumulator.state() for accumulator in accumulators]
    for process in range(num_processes):
        states = broadcast_object_list([local], from_process=process)[0]
        for accumulator, state in zip(accumulators, states, strict=True):
            if process == 0:
                accumulator.restore(state)
            else:
                other = copy(accumulator)
                other.restore(state)
                accumulator.merge(other)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_indices(seed: int, indices: np.ndarray) -> np.ndarray:
    """A 64-bit hash of (seed, index) for each index, uint64.

    The finaliser of SplitMix64 (Steele, Lea & Flood, Fast splittable pseudorandom number
    generators, 2014), applied twice.
    """
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        start = _mix(np.asarray([seed], np.int64).astype(np.uint64) + step)
        return _mix(_mix(indices.astype(np.uint64) * step + start) + step)


class FeatureSample(Accumulator):
    """Features and labels of a uniform random sample of at most `size` of `count` images.

    The sample consists of the images with the smallest hashes of (seed, index), in that order
    (bottom-k sampling: Cohen & Kaplan, Summarizing data using bottom-k sketches, 2007), so its
    first m images are a sample as well.

    Args:
        width: D.
        count: number of images; their indices are 0 to count - 1.

    Raises:
        ValueError: for a size below 1.
    """

    sums = ("labels", "features")

    def __init__(self, width: int, count: int, size: int, seed: int = 0):
        if size < 1:
            raise ValueError(f"size={size}: at least 1 is allowed")
        keys = hash_indices(seed, np.arange(count)) >> np.uint64(1)
        self.indices = torch.from_numpy(keys.argsort()[:size])
        self._rows = torch.full((count,), -1)
        self._rows[self.indices] = torch.arange(len(self.indices))
        self.labels = torch.zeros(len(self.indices), dtype=torch.int64)
        self.features = torch.zeros(len(self.indices), width)

    def update(self, indices: Tensor, labels: Tensor, features: Tensor) -> None:
        """Add images with indices (B,), labels (B,) and features (B, D)."""
        rows = self._rows[indices]
        sampled = rows >= 0
        self.labels[rows[sampled]] = labels[sampled]
        self.features[rows[sampled]] = features.cpu()[sampled].float()
