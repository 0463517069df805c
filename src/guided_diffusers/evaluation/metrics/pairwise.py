"""Metrics of pairs of images: kernel distance, diversity, precision, recall, nearest images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .accumulator import Accumulator, blocks


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(x, y) = (x . y / D + 1)^3, Binkowski et al. 2018, section 4."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def pair_mean(x: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], weights: Tensor) -> Tensor:
    """Mean of k(x_i, x_j) over pairs i != j of x (n, D), weighted by w_i w_j for each row w of
    `weights` (R, n): (R,)."""
    total = torch.zeros(len(weights), dtype=torch.float64)
    for rows in blocks(len(x), len(x)):
        values = kernel(x[rows], x)
        values.diagonal(rows.start).zero_()
        total += ((weights[:, rows] @ values) * weights).sum(1)
    return total / (weights.sum(1).square() - weights.square().sum(1))


def kernel_distance(real: Tensor, generated: Tensor, weights: Tensor | None = None) -> Tensor:
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
    cross = torch.zeros(len(generated), dtype=torch.float64)
    for block in blocks(len(generated), len(real)):
        cross[block] = cubic_kernel(generated[block], real).mean(1)
    distance = pair_mean(real, cubic_kernel, real_weights)
    distance = distance + pair_mean(generated, cubic_kernel, rows) - 2 * rows @ cross / rows.sum(1)
    return distance[0] if weights is None else distance


def class_diversity(features: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
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


def count_in_balls(points: Tensor, centres: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """How many balls contain each point (N,), and how many points each ball contains (M,).

    The balls have the `centres` (M, D); each reaches to its k-th nearest other centre. In float64.

    Raises:
        ValueError: for k or fewer rows.
    """
    if min(len(points), len(centres)) <= k or k < 1:
        raise ValueError(
            f"{len(centres)} and {len(points)} features, k={k}: more than k >= 1 of each are needed"
        )
    points, centres = points.double(), centres.double()
    radii = torch.zeros(len(centres), dtype=torch.float64)
    for rows in blocks(len(centres), len(centres)):  # the nearest centre is the centre itself
        radii[rows] = torch.cdist(centres[rows], centres).kthvalue(k + 1, dim=1).values
    balls_per_point, points_per_ball = [], torch.zeros(len(centres), dtype=torch.int64)
    for rows in blocks(len(points), len(centres)):
        inside = torch.cdist(points[rows], centres) <= radii
        balls_per_point.append(inside.sum(1))
        points_per_ball += inside.sum(0)
    return torch.cat(balls_per_point), points_per_ball


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """The share of `generated` (N, D) in the manifold of `real` (M, D), and the reverse.

    A manifold is the union of balls around the features, each reaching to its k-th nearest
    neighbour (Kynkaanniemi et al. 2019, "Improved precision and recall metric for assessing
    generative models", eq. 2).

    Raises:
        ValueError: for k or fewer rows.
    """
    precision = (count_in_balls(generated, real, k)[0] > 0).double().mean()
    recall = (count_in_balls(real, generated, k)[0] > 0).double().mean()
    return float(precision), float(recall)


def density_coverage(real: Tensor, generated: Tensor, k: int = 5) -> tuple[float, float]:
    """How many real neighbourhoods contain a generated image, over k, and how many contain any:

        density = 1 / (k N) sum_j sum_i [y_j in B_i],    coverage = 1 / M sum_i [some y_j in B_i]

    B_i reaches from the real image i to its k-th nearest real neighbour (Naeem et al., Reliable
    fidelity and diversity metrics for generative models, 2020, eq. 5 and 6). Density may exceed 1.
    Unlike precision and recall, outliers among the generated images don't increase them.

    Raises:
        ValueError: for k or fewer rows.
    """
    balls, points = count_in_balls(generated, real, k)
    return float(balls.double().mean() / k), float((points > 0).double().mean())


class NearestImages(Accumulator):
    """The nearest training image of each query (Q, D): distance (Q,) and index (Q,), in float64.

    Distances sum squared differences, so that a copy has distance 0: |x|^2 + |y|^2 - 2 x . y would
    leave 1e-8 |x|.
    """

    sums = ("distance", "index")

    def __init__(self, queries: Tensor):
        self.queries = queries.double()
        self.distance = torch.full((len(queries),), float("inf"), dtype=torch.float64)
        self.index = torch.full((len(queries),), -1, dtype=torch.int64)

    def update(self, indices: Tensor, features: Tensor) -> None:
        """Add training images with indices (B,) and features (B, D)."""
        if len(features) == 0:
            return
        features = features.cpu().double()
        for rows in blocks(len(self.queries), len(features)):
            exact = "donot_use_mm_for_euclid_dist"
            distance, position = torch.cdist(self.queries[rows], features, 2, exact).min(dim=1)
            self._keep_nearer(rows, distance, indices[position])

    def _keep_nearer(self, rows: slice, distance: Tensor, index: Tensor) -> None:
        nearer = distance < self.distance[rows]
        self.distance[rows] = torch.where(nearer, distance, self.distance[rows])
        self.index[rows] = torch.where(nearer, index, self.index[rows])

    def merge(self, other: NearestImages) -> None:
        self._keep_nearer(slice(None), other.distance, other.index)
