"""Figures of pairs of images: the kernel distance, and the diversity within a class."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .accumulate import blocks

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (m, D), (n, D) -> (m, n)


def cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """k(x, y) = (x . y / D + 1)^3, Binkowski et al. 2018, section 4."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def pair_mean(x: torch.Tensor, kernel: Kernel, weights: torch.Tensor) -> torch.Tensor:
    """The mean of k(x_i, x_j) over pairs i != j of x (n, D), that count w_i w_j, for each row w of `weights`: (R,)."""
    total = torch.zeros(len(weights), dtype=torch.float64)
    for some in blocks(len(x), len(x)):
        values = kernel(x[some], x)
        values[torch.arange(len(values)), torch.arange(len(x))[some]] = 0.0
        total += ((weights[:, some] @ values) * weights).sum(1)
    return total / (weights.sum(1).square() - weights.square().sum(1))


def kernel_distance(
    real: torch.Tensor, generated: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The kernel distance of two sets of features (M, D) and (N, D), unbiased, of all pairs, in float64:

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),
        k(x, y) = (x . y / D + 1)^3

    (Gretton et al., A kernel two-sample test, 2012, eq. 3; Binkowski et al., Demystifying MMD GANs, 2018.) It is a KID
    only where the features are Inception's; the usual KID is its mean over small subsets, which has the same
    expectation and a larger spread. It may be below 0.

    Args:
        weights: how often each generated image counts, (R, N). None: once.

    Returns:
        (R,), and without weights ().

    Raises:
        ValueError: for fewer than two rows, or different D.
    """
    if min(len(real), len(generated)) < 2 or real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"features of shapes {tuple(real.shape)} and {tuple(generated.shape)}: two rows each, or "
            "more, of the same width are allowed"
        )
    real, generated = real.double(), generated.double()
    rows = torch.ones(1, len(generated), dtype=torch.float64) if weights is None else weights
    cross = torch.cat(
        [cubic(generated[some], real).mean(1) for some in blocks(len(generated), len(real))]
    )
    once = torch.ones(1, len(real), dtype=torch.float64)
    found = (
        pair_mean(real, cubic, once)
        + pair_mean(generated, cubic, rows)
        - 2 * rows @ cross / rows.sum(1)
    )
    return found[0] if weights is None else found


def class_diversity(
    features: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean distance |x_i - x_j| of two images of one class, averaged over the classes that have two.

    Args:
        features: (N, D).
        labels: class ids, (N,).
        weights: how often each image counts, (R, N). None: once.

    Returns:
        (R,), and without weights ().

    Raises:
        ValueError: if no class has two images.
    """
    rows = torch.ones(1, len(features), dtype=torch.float64) if weights is None else weights
    classes = [
        label
        for label, count in zip(
            *(one.tolist() for one in labels.unique(return_counts=True)), strict=True
        )
        if count > 1
    ]
    if not classes:
        raise ValueError(
            f"{len(features)} images of {len(labels.unique())} classes: two of one class are needed"
        )
    each = torch.stack(
        [
            pair_mean(features[labels == label].double(), torch.cdist, rows[:, labels == label])
            for label in classes
        ]
    )
    found = each.nanmean(0)  # a resample may have one image of a class, and no pair
    return found[0] if weights is None else found
