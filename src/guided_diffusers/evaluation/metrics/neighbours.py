"""Figures of nearest neighbours: precision and recall, density and coverage, nearest training images."""

from __future__ import annotations

import torch

from .accumulate import Accumulator, blocks


def radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """The distance of each row of x (N, D) to its k-th nearest other row, (N,)."""
    return torch.cat(
        [
            torch.cdist(x[some], x).kthvalue(k + 1, dim=1).values  # the nearest is itself
            for some in blocks(len(x), len(x))
        ]
    )


def memberships(
    points: torch.Tensor, centres: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """In how many balls each point is (N,), and how many points each ball has (M,).

    The balls are around `centres` (M, D), each reaching to its k-th nearest other centre. In float64.

    Raises:
        ValueError: for k or fewer rows, or different D.
    """
    if min(len(points), len(centres)) <= k or k < 1:
        raise ValueError(
            f"{len(centres)} and {len(points)} features, k={k}: more than k >= 1 of each are needed"
        )
    points, centres = points.double(), centres.double()
    radius, balls, inside = radii(centres, k), [], torch.zeros(len(centres), dtype=torch.int64)
    for some in blocks(len(points), len(centres)):
        within = torch.cdist(points[some], centres) <= radius
        balls.append(within.sum(1))
        inside += within.sum(0)
    return torch.cat(balls), inside


def precision_recall(
    real: torch.Tensor, generated: torch.Tensor, k: int = 3
) -> tuple[float, float]:
    """Fidelity and diversity: the share of `generated` (N, D) in the manifold of `real` (M, D), and the reverse.

    A set's manifold is the union of balls around its members, each reaching to its k-th nearest neighbour (Kynkaanniemi
    et al. 2019, "Improved precision and recall metric for assessing generative models", eq. 2).

    Raises:
        ValueError: for k or fewer rows.
    """
    shares = [
        (memberships(points, centres, k)[0] > 0).double().mean()
        for points, centres in ((generated, real), (real, generated))
    ]
    return float(shares[0]), float(shares[1])


def density_coverage(
    real: torch.Tensor, generated: torch.Tensor, k: int = 5
) -> tuple[float, float]:
    """How many real neighbourhoods a generated image is in, over k, and the share of these that have one:

        density = 1 / (k N) sum_j sum_i [y_j in B_i],    coverage = 1 / M sum_i [some y_j in B_i]

    B_i reaches from the real image i to its k-th nearest real neighbour (Naeem et al., Reliable fidelity and diversity
    metrics for generative models, 2020, eq. 5 and 6). Density may be above 1. Unlike precision and recall, no outlier
    among the generated images makes them large.

    Raises:
        ValueError: for k or fewer rows.
    """
    balls, inside = memberships(generated, real, k)
    return float(balls.double().mean() / k), float((inside > 0).double().mean())


class Nearest(Accumulator):
    """The nearest training image of each query (Q, D): its distance and its number, in float64.

    Distances are sums of squared differences, so that a copy's is 0: |x|^2 + |y|^2 - 2 x . y would leave 1e-8 |x|.
    """

    def __init__(self, queries: torch.Tensor):
        self.queries = queries.double()
        self.distance = torch.full((len(queries),), float("inf"), dtype=torch.float64)
        self.number = torch.full((len(queries),), -1, dtype=torch.int64)

    def state(self) -> dict[str, torch.Tensor]:
        return {"distance": self.distance, "number": self.number}

    def update(self, numbers: torch.Tensor, features: torch.Tensor) -> None:
        """Training images with these numbers (B,) and features (B, D)."""
        features = features.cpu().double()
        for some in blocks(len(self.queries), len(features)) if len(features) else ():
            distance, place = torch.cdist(
                self.queries[some], features, compute_mode="donot_use_mm_for_euclid_dist"
            ).min(dim=1)
            self._take(some, distance, numbers[place])

    def _take(self, some: slice, distance: torch.Tensor, number: torch.Tensor) -> None:
        nearer = distance < self.distance[some]
        self.distance[some] = torch.where(nearer, distance, self.distance[some])
        self.number[some] = torch.where(nearer, number, self.number[some])

    def merge(self, other: Nearest) -> None:
        self._take(slice(None), other.distance, other.number)

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(Q,) distances and (Q,) numbers."""
        return self.distance, self.number
