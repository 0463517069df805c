"""Intervals by the bootstrap: how much a figure would vary if other images had been generated."""

from __future__ import annotations

import numpy as np
import torch

from .kept import hashed

POISSON = np.cumsum(
    [1 / np.e / np.prod(np.arange(1.0, k + 1)) for k in range(20)]
)  # P(w <= k) of w ~ Poisson(1)


def resamples(rows: int, count: int, seed: int, draws: int | None = None) -> torch.Tensor:
    """How often each of `rows` images is in each of `count` resamples, (count, rows) float64.

    Efron, Bootstrap methods: another look at the jackknife (1979). The sum of each row is `draws` (default: rows), the
    number of images that the figure is of, where those at hand are a sample of them.
    """
    found = np.random.default_rng((seed, rows)).multinomial(
        draws or rows, np.full(rows, 1 / rows), size=count
    )
    return torch.from_numpy(found).double()


def poisson_weights(seed: int, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """w ~ Poisson(1) of each image in each of `count` resamples, (count, B), of the seed and the image's number alone.

    The bootstrap of a stream (Chamandy et al., Estimating uncertainty for massive data streams, 2012).
    """
    rows = np.arange(count, dtype=np.uint64)[:, None] << np.uint64(44)
    uniform = (
        hashed(seed, numbers.numpy().astype(np.uint64)[None] ^ rows) >> np.uint64(11)
    ) * 2.0**-53
    return torch.from_numpy(np.searchsorted(POISSON, uniform, side="right").astype(np.float64))


def interval(
    value: float,
    replicates: torch.Tensor,
    confidence: float = 0.95,
    low: float = -float("inf"),
    high: float = float("inf"),
) -> tuple[float, float]:
    """Percentiles of a figure's replicates, (R,), moved so that their mean is `value`, within [low, high].

    They are moved since resamples repeat images, by which a Frechet distance (or a score) is biased; of means and
    shares they are the percentile interval. It is of the figure's spread, and says nothing of a bias that it has.
    """
    tail = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    found = value + torch.quantile(replicates.double(), tail) - replicates.double().mean()
    first, last = found.clamp(low, high).tolist()
    return first, last
