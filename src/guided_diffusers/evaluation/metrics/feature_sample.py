"""Features of a bounded sample of the images, for metrics that need them image by image."""

from __future__ import annotations

import numpy as np
import torch

from .accumulator import Accumulator


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

    def update(self, indices: torch.Tensor, labels: torch.Tensor, features: torch.Tensor) -> None:
        """Add images with indices (B,), labels (B,) and features (B, D)."""
        rows = self._rows[indices]
        sampled = rows >= 0
        self.labels[rows[sampled]] = labels[sampled]
        self.features[rows[sampled]] = features.cpu()[sampled].float()
