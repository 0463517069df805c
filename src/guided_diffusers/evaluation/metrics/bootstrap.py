"""Bootstrap intervals: how much a metric would vary if other images had been generated."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .accumulator import hash_indices

INF = float("inf")
# P(w <= k) of w ~ Poisson(1)
POISSON = np.cumsum([1 / np.e / np.prod(np.arange(1.0, k + 1)) for k in range(20)])


def bootstrap_weights(rows: int, count: int, seed: int, draws: int | None = None) -> Tensor:
    """How often each image occurs in each resample, (count, rows) float64.

    Efron, Bootstrap methods: another look at the jackknife (1979).

    Args:
        rows: number of images.
        count: number of resamples.
        draws: images in a resample, the sum of each row. Default: `rows`. Larger where these images
            are a sample of those that the metric is computed on.
    """
    random = np.random.default_rng((seed, rows))
    counts = random.multinomial(draws or rows, np.full(rows, 1 / rows), size=count)
    return torch.from_numpy(counts).double()


def poisson_weights(seed: int, indices: Tensor, count: int) -> Tensor:
    """Poisson(1) weight of each image in each of `count` resamples, (count, B), by seed and index:
    a stream's bootstrap (Chamandy et al., Estimating uncertainty for massive data streams, 2012).
    """
    rows = np.arange(count, dtype=np.uint64)[:, None] << np.uint64(44)
    hashes = hash_indices(seed, indices.numpy().astype(np.uint64)[None] ^ rows)
    uniform = (hashes >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy(np.searchsorted(POISSON, uniform, side="right").astype(np.float64))


def confidence_interval(
    value: float, replicates: Tensor, confidence: float = 0.95, low: float = -INF, high: float = INF
) -> tuple[float, float]:
    """Percentiles of a metric's replicates (R,), shifted to have the mean `value`, in [low, high].

    They are shifted because resamples repeat images, which biases a Frechet distance or a score;
    for means and proportions the result is the percentile interval. It shows the metric's spread,
    not its bias.
    """
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    ends = value + torch.quantile(replicates.double(), tails) - replicates.double().mean()
    first, last = ends.clamp(low, high).tolist()
    return first, last
