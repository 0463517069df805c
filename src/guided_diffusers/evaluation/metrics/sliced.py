"""The sliced Wasserstein distance between two sets of features: MIND in Inception's."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from .accumulator import blocks

DIRECTIONS = 1000  # at least, in whole bases


def orthonormal_directions(width: int, count: int, seed: int = 0) -> Tensor:
    """Random unit vectors (K, D), in orthonormal bases that are rotated at random; K is the next
    multiple of D.

    In each basis sum_k (u_k . x)^2 = |x|^2, so the distance of two means has no error of sampling
    (Rowland et al., Orthogonal estimation of Wasserstein distances, 2019).
    """
    generator = torch.Generator().manual_seed(seed)
    bases = ceil(count / width)
    noise = torch.randn(bases, width, width, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise).Q.mT.reshape(-1, width)


def sliced_wasserstein(
    real: Tensor,
    generated: Tensor,
    weights: Tensor | None = None,
    directions: int = DIRECTIONS,
    seed: int = 0,
) -> Tensor:
    """The squared sliced Wasserstein distance between features (M, D) and (N, D), in float64:

        3 D mean_k W(u_k . x, u_k . y),    W(a, b) = integral_0^1 (F_a^-1(q) - F_b^-1(q))^2 dq

    over unit vectors u_k, with F^-1 the quantiles. In Inception's features it is the MIND (Berthet
    et al., MIND: Monge Inception Distance for generative models evaluation, 2026), whose factor of 3 D
    is kept in others. W is exact for sets of any sizes, of which neither is subsampled. Between
    normal distributions of covariance s^2 I and t^2 I it is 3 |mean_x - mean_y|^2 + 3 D (s - t)^2,
    three times their Frechet distance.

    Samples of one distribution have a distance above 0, which falls as 1 / M + 1 / N; no correction
    is made for it. Compare it at equal numbers of images.

    Args:
        weights: how often each generated image counts, (R, N). None: once.
        directions: at least so many, in whole bases.
        seed: of the directions.

    Returns:
        (R,), without weights ().

    Raises:
        ValueError: for empty sets, or different D.
    """
    if not len(real) or not len(generated) or real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"features of shapes {tuple(real.shape)} and {tuple(generated.shape)}: one or more rows "
            "and the same number of columns are needed"
        )
    width = real.shape[1]
    unit = orthonormal_directions(width, directions, seed)
    rows = torch.ones(1, len(generated), dtype=torch.float64) if weights is None else weights
    centre = real.double().mean(0)  # against cancellation; distances don't depend on it
    x, y = (features.double() - centre for features in (real, generated))
    total = torch.zeros(len(rows), dtype=torch.float64)
    for block in blocks(len(unit), 8 * (len(x) + len(rows) * len(y))):  # in eight arrays
        total += _wasserstein(unit[block] @ x.T, unit[block] @ y.T, rows).sum(1)
    distance = 3 * width * total / len(unit)
    return distance[0] if weights is None else distance


def _wasserstein(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """W of the numbers x (K, M) and y (K, N), where each of y counts `weights` (R, N) times, (R, K).

    The integral of F_x^-1 F_y^-1 is sum_j y_j (P(q_j) - P(q_{j-1})) over sorted y, where y_j is the
    quantile from q_{j-1} to q_j, and P(q), the integral of F_x^-1 from 0 to q, is linear between
    the q = i / M.
    """
    count, (x, (y, order)) = x.shape[1], (x.sort().values, y.sort())
    shares = (weights / weights.sum(1, keepdim=True))[:, order]  # (R, K, N)
    at = shares.cumsum(2).clamp(max=1) * count
    index = at.long().clamp(max=count - 1)
    partial = torch.nn.functional.pad(x.cumsum(1), (1, 0))[:, :-1]
    slope, partial = (part.expand(len(shares), -1, -1).gather(2, index) for part in (x, partial))
    integral = (partial + (at - index) * slope) / count
    cross = (y * integral.diff(dim=2, prepend=torch.zeros_like(integral[..., :1]))).sum(2)
    return (x.square().mean(1) + (shares * y.square()).sum(2) - 2 * cross).clamp(min=0)
