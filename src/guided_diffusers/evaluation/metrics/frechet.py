"""The Frechet distance of features that are taken for Gaussians."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .accumulate import Accumulator


class Moments(Accumulator):
    """Mean and covariance of features (D,), of each class or of all, exactly and in float64.

    A batch, or another sum, with count n', mean m' and scatter S' = sum (x - m')(x - m')^T joins as

        d = m' - m;    S += S' + n n' / (n + n') d d^T;    m += n' / (n + n') d

    (Chan, Golub & LeVeque, Algorithms for computing the sample variance, 1983, eq. 2.1), which cancels nothing.

    Args:
        width: D.
        classes: how many; labels are ids below. Memory is classes * D^2 * 8 bytes, whatever the number of images.
    """

    def __init__(self, width: int, classes: int = 1):
        self.count = torch.zeros(classes, dtype=torch.int64)
        self.mean = torch.zeros(classes, width, dtype=torch.float64)
        self.scatter = torch.zeros(classes, width, width, dtype=torch.float64)

    def update(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Features (B, D) of images with class ids (B,); with one class those aren't needed."""
        features = features.cpu().double()
        labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
        for label in labels.unique().tolist():
            x = features[labels == label]
            mean = x.mean(0)
            self._join(label, len(x), mean, (x - mean).T @ (x - mean))

    def _join(self, label: int, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        before, all_ = int(self.count[label]), int(self.count[label]) + count
        if count:
            difference = mean - self.mean[label]
            self.scatter[label] += scatter + before * count / all_ * difference.outer(difference)
            self.mean[label] += count / all_ * difference
            self.count[label] = all_

    def merge(self, other: Moments) -> None:
        for label, count in enumerate(other.count.tolist()):
            self._join(label, count, other.mean[label], other.scatter[label])

    def pooled(self) -> Moments:
        """Of all classes together."""
        found = Moments(self.mean.shape[1])
        for one in zip(self.count.tolist(), self.mean, self.scatter, strict=True):
            found._join(0, *one)
        return found

    def compute(self, label: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (D,) and covariance (D, D), of one class.

        Raises:
            ValueError: for fewer than two images.
        """
        if (count := int(self.count[label])) < 2:
            raise ValueError(f"{count} images: two or more are needed")
        return self.mean[label], self.scatter[label] / (count - 1)


def frechet_distance(a: torch.Tensor | Moments, b: torch.Tensor | Moments) -> float:
    """The squared Frechet distance of two sets of features (N, D) and (M, D), each taken for a Gaussian:

        |mean_a - mean_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2)),    A and B the covariances

    (Dowson & Landau 1982; Heusel et al. 2017, "GANs trained by a two time-scale update rule", eq. 6.) In float64. It is
    an FID only where the features are Inception's. Of `Moments` the first class's.

    Raises:
        ValueError: for fewer than two rows, or different D.
    """
    shapes = [tuple(x.mean.shape[1:] if isinstance(x, Moments) else x.shape[1:]) for x in (a, b)]
    counts = [int(x.count[0]) if isinstance(x, Moments) else len(x) for x in (a, b)]
    if min(counts) < 2 or shapes[0] != shapes[1]:
        raise ValueError(
            f"features of shapes {(counts[0], *shapes[0])} and {(counts[1], *shapes[1])}: two rows each, "
            "or more, of the same width are allowed"
        )
    gaussians = [
        x.compute()
        if isinstance(x, Moments)
        else (x.double().mean(0), torch.atleast_2d(x.double().T.cov()))
        for x in (a, b)
    ]
    return distance_of_gaussians(*gaussians[0], *gaussians[1])


def distance_of_gaussians(
    mean_a: torch.Tensor,
    cov_a: torch.Tensor,
    mean_b: torch.Tensor,
    cov_b: torch.Tensor,
    root_a: torch.Tensor | None = None,
) -> float:
    """`frechet_distance` by means (D,) and covariances (D, D); `root_a` is A^(1/2) where it is known."""
    root = _root(cov_a) if root_a is None else root_a
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return max(
        0.0, float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
    )


def _root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_resampled(
    real: tuple[torch.Tensor, torch.Tensor], features: torch.Tensor, weights: Iterable[torch.Tensor]
) -> torch.Tensor:
    """The distance of each resample, (R,): row i of `features` (n, D) counts `weights[r, i]` times, R of (n,).

    Args:
        real: mean and covariance of the real images, which are held.
    """
    if len(features) < features.shape[1]:
        return _resampled_by_rows(real, features.double(), weights)
    features, root, found = features.double(), _root(real[1]), []
    for weight in weights:
        mean = weight @ features / weight.sum()
        x = (features - mean) * weight.sqrt()[:, None]
        found.append(distance_of_gaussians(*real, mean, x.T @ x / (weight.sum() - 1), root))
    return torch.tensor(found, dtype=torch.float64)


def _resampled_by_rows(
    real: tuple[torch.Tensor, torch.Tensor], features: torch.Tensor, weights: Iterable[torch.Tensor]
) -> torch.Tensor:
    """As `frechet_resampled`, by matrices (n, n) instead of (D, D): with B = X^T X, the rows X of a resample centred,

        tr (A^(1/2) B A^(1/2))^(1/2) = tr (X A X^T)^(1/2),

    and X A X^T is made of one matrix for all resamples by centring it.
    """
    mean, covariance = real
    x, found = features - mean, []
    gram, squares = x @ covariance @ x.T, x.square().sum(1)
    for weight in weights:
        total, drawn = weight.sum(), weight > 0
        share, root = weight[drawn] / total, weight[drawn].sqrt()
        rows = gram[drawn][:, drawn]
        middle = rows @ share
        centred = (
            (rows - middle[:, None] - middle + share @ middle) * root[:, None] * root / (total - 1)
        )
        cross = torch.linalg.eigvalsh(centred).clamp(min=0).sqrt().sum()
        difference = share @ x[drawn]  # of the means
        spread = (share @ squares[drawn] - difference.square().sum()) * total / (total - 1)
        found.append(
            max(0.0, float(difference.square().sum() + covariance.trace() + spread - 2 * cross))
        )
    return torch.tensor(found, dtype=torch.float64)
