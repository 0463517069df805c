"""Metrics of nearest neighbours: precision, recall, density, coverage, nearest training images."""

from __future__ import annotations

import torch

from .accumulator import Accumulator, blocks


def neighbour_distances(x: torch.Tensor, k: int) -> torch.Tensor:
    """The distance of each row of x (N, D) to its k-th nearest other row, (N,)."""
    distances = [
        torch.cdist(x[rows], x).kthvalue(k + 1, dim=1).values  # the nearest row is the row itself
        for rows in blocks(len(x), len(x))
    ]
    return torch.cat(distances)


def count_in_balls(
    points: torch.Tensor, centres: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
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
    radii = neighbour_distances(centres, k)
    balls_per_point, points_per_ball = [], torch.zeros(len(centres), dtype=torch.int64)
    for rows in blocks(len(points), len(centres)):
        inside = torch.cdist(points[rows], centres) <= radii
        balls_per_point.append(inside.sum(1))
        points_per_ball += inside.sum(0)
    return torch.cat(balls_per_point), points_per_ball


def precision_recall(
    real: torch.Tensor, generated: torch.Tensor, k: int = 3
) -> tuple[float, float]:
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


def density_coverage(
    real: torch.Tensor, generated: torch.Tensor, k: int = 5
) -> tuple[float, float]:
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

    def __init__(self, queries: torch.Tensor):
        self.queries = queries.double()
        self.distance = torch.full((len(queries),), float("inf"), dtype=torch.float64)
        self.index = torch.full((len(queries),), -1, dtype=torch.int64)

    def update(self, indices: torch.Tensor, features: torch.Tensor) -> None:
        """Add training images with indices (B,) and features (B, D)."""
        if len(features) == 0:
            return
        features = features.cpu().double()
        for rows in blocks(len(self.queries), len(features)):
            exact = "donot_use_mm_for_euclid_dist"
            distances = torch.cdist(self.queries[rows], features, compute_mode=exact)
            distance, position = distances.min(dim=1)
            self._keep_nearer(rows, distance, indices[position])

    def _keep_nearer(self, rows: slice, distance: torch.Tensor, index: torch.Tensor) -> None:
        nearer = distance < self.distance[rows]
        self.distance[rows] = torch.where(nearer, distance, self.distance[rows])
        self.index[rows] = torch.where(nearer, index, self.index[rows])

    def merge(self, other: NearestImages) -> None:
        self._keep_nearer(slice(None), other.distance, other.index)
