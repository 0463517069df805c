"""Metrics of pairs of images: the kernel distance, and the diversity within a class."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .accumulator import blocks

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (m, D), (n, D) -> (m, n)


def cubic_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """k(x, y) = (x . y / D + 1)^3, Binkowski et al. 2018, section 4."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def pair_mean(x: torch.Tensor, kernel: Kernel, weights: torch.Tensor) -> torch.Tensor:
    """The mean of k(x_i, x_j) over pairs i != j of x (n, D), weighted by w_i w_j.

    Returns:
        (R,), one for each row w of `weights` (R, n).
    """
    total = torch.zeros(len(weights), dtype=torch.float64)
    for rows in blocks(len(x), len(x)):
        values = kernel(x[rows], x)
        values[torch.arange(len(values)), torch.arange(len(x))[rows]] = 0.0
        total += ((weights[:, rows] @ values) * weights).sum(1)
    return total / (weights.sum(1).square() - weights.square().sum(1))


def kernel_distance(
    real: torch.Tensor, generated: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The unbiased kernel distance between features (M, D) and (N, D), of all pairs, in float64:

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),
        k(x, y) = (x . y / D + 1)^3

    (Gretton et al., A kernel two-sample test, 2012, eq. 3; Binkowski et al., Demystifying MMD GANs,
    2018.) It is a KID only for Inception's features; the usual KID is its mean over small subsets,
    with the same expectation and a larger spread. It may be negative.

    Args:
        weights: how often each generated image counts, (R, N). None: once.

    Returns:
        (R,), without weights ().

    Raises:
        ValueError: for fewer than two rows, or different D.
    """
    if min(len(real), len(generated)) < 2 or real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"features of shapes {tuple(real.shape)} and {tuple(generated.shape)}: two or more "
            "rows and the same number of columns are needed"
        )
    real, generated = real.double(), generated.double()
    real_weights = torch.ones(1, len(real), dtype=torch.float64)
    rows = torch.ones(1, len(generated), dtype=torch.float64) if weights is None else weights
    cross = [
        cubic_kernel(generated[block], real).mean(1) for block in blocks(len(generated), len(real))
    ]
    distance = (
        pair_mean(real, cubic_kernel, real_weights)
        + pair_mean(generated, cubic_kernel, rows)
        - 2 * rows @ torch.cat(cross) / rows.sum(1)
    )
    return distance[0] if weights is None else distance


def class_diversity(
    features: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean distance |x_i - x_j| between images of a class, averaged over the classes.

    Args:
        features: (N, D).
        labels: class ids, (N,); classes with one image are left out.
        weights: how often each image counts, (R, N). None: once.

    Returns:
        (R,), without weights ().

    Raises:
        ValueError: if no class has two images.
    """
    rows = torch.ones(1, len(features), dtype=torch.float64) if weights is None else weights
    classes, counts = labels.unique(return_counts=True)
    means = []
    for label in classes[counts > 1].tolist():
        members = labels == label
        means.append(pair_mean(features[members].double(), torch.cdist, rows[:, members]))
    if not means:
        raise ValueError(
            f"{len(features)} images of {len(classes)} classes: two of one class are needed"
        )
    diversity = torch.stack(means).nanmean(0)  # a class may have no pair in a resample
    return diversity[0] if weights is None else diversity
