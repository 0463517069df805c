"""The features of a bounded number of images, for figures that need them image by image."""

from __future__ import annotations

import numpy as np
import torch

from .accumulate import Accumulator


def hashed(seed: int, numbers: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each number, uint64, that differs for each seed.

    The finaliser of SplitMix64 (Steele, Lea & Flood, Fast splittable pseudorandom number generators, 2014), twice.
    """

    def mixed(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        start = mixed(np.asarray([seed], np.int64).astype(np.uint64) + step)
        return mixed(mixed(numbers.astype(np.uint64) * step + start) + step)


class Kept(Accumulator):
    """A uniformly drawn sample of at most `size` images: their features, labels and numbers.

    Image i has a hash of (seed, i) as its key, and the images of the smallest keys stay (bottom-k sampling: Cohen &
    Kaplan, Summarizing data using bottom-k sketches, 2007). So which ones stay doesn't depend on the order, the batches
    or the processes, and the first m in the order of `compute` are a sample again.
    """

    def __init__(self, size: int, seed: int = 0):
        if size < 1:
            raise ValueError(f"size={size}: at least 1 is allowed")
        self.size, self.seed = size, seed
        self.keys = self.numbers = self.labels = torch.zeros(0, dtype=torch.int64)
        self.features = torch.zeros(0, 0)
        self._waiting: list[tuple[torch.Tensor, ...]] = []

    def update(self, numbers: torch.Tensor, labels: torch.Tensor, features: torch.Tensor) -> None:
        """Images with these numbers (B,), labels (B,) and features (B, D)."""
        keys = torch.from_numpy(
            (hashed(self.seed, numbers.numpy()) >> np.uint64(1)).astype(np.int64)
        )
        some = (
            keys <= self.keys[-1]
            if len(self.keys) == self.size
            else torch.ones(len(keys), dtype=torch.bool)
        )
        self._waiting.append((keys[some], numbers[some], labels[some], features.cpu()[some]))
        if (
            sum(len(one[0]) for one in self._waiting) > self.size // 4
        ):  # not each time, as all are copied
            self._settle()

    def _settle(self) -> None:
        if not self._waiting:
            return
        old = [(self.keys, self.numbers, self.labels, self.features)] if len(self.keys) else []
        keys, numbers, labels, features = (
            torch.cat(column) for column in zip(*old, *self._waiting, strict=True)
        )
        self._waiting = []
        order = keys.argsort()[: self.size]
        self.keys, self.numbers, self.labels, self.features = (
            column[order] for column in (keys, numbers, labels, features)
        )

    def state(self) -> dict[str, torch.Tensor]:
        self._settle()
        return super().state()

    def merge(self, other: Kept) -> None:
        if len(other.compute()[0]):
            self._waiting.append((other.keys, other.numbers, other.labels, other.features))
            self._settle()

    def compute(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Numbers (n,), labels (n,) and features (n, D), in the order of their keys."""
        self._settle()
        return self.numbers, self.labels, self.features
