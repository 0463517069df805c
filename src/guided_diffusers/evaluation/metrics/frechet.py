"""The Frechet distance between two sets of features, each approximated by a Gaussian."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .accumulator import Accumulator

MeanAndCovariance = tuple[Tensor, Tensor]  # (D,), (D, D) float64


class Moments(Accumulator):
    """Mean and covariance of features (D,), overall or of each class, in float64.

    A batch, or another accumulator, with count n', mean m' and scatter S' = sum (x - m')(x - m')^T
    is added by

        d = m' - m;    S += S' + n n' / (n + n') d d^T;    m += n' / (n + n') d

    (Chan, Golub & LeVeque, Algorithms for computing the sample variance, 1983, eq. 2.1), which
    avoids cancellation.

    Args:
        width: D.
        classes: number of classes K; it takes 8 K D^2 bytes for any number of images.
    """

    sums = ("count", "mean", "scatter")

    def __init__(self, width: int, classes: int = 1):
        self.count = torch.zeros(classes, dtype=torch.int64)
        self.mean = torch.zeros(classes, width, dtype=torch.float64)
        self.scatter = torch.zeros(classes, width, width, dtype=torch.float64)

    def update(self, features: Tensor, labels: Tensor | None = None) -> None:
        """Add features (B, D) of images with class ids (B,); without ids all are of class 0."""
        features = features.cpu().double()
        if labels is None:
            labels = torch.zeros(len(features), dtype=torch.int64)
        for label in labels.unique().tolist():
            x = features[labels == label]
            mean = x.mean(0)
            self._add(label, len(x), mean, (x - mean).T @ (x - mean))

    def _add(self, label: int, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
        before = int(self.count[label])
        total = before + count
        difference = mean - self.mean[label]
        self.scatter[label] += scatter + before * count / total * difference.outer(difference)
        self.mean[label] += count / total * difference
        self.count[label] = total

    def merge(self, other: Moments) -> None:
        for label, count in enumerate(other.count.tolist()):
            self._add(label, count, other.mean[label], other.scatter[label])

    def select(self, label: int) -> Moments:
        """Moments of one class."""
        result = Moments(self.mean.shape[1])
        result.restore({name: value[label : label + 1] for name, value in self.state().items()})
        return result

    def pooled(self) -> Moments:
        """Moments of all classes together."""
        result = Moments(self.mean.shape[1])
        for label, count in enumerate(self.count.tolist()):
            result._add(0, count, self.mean[label], self.scatter[label])
        return result

    def compute(self, label: int = 0) -> MeanAndCovariance:
        """Mean (D,) and covariance (D, D) of one class.

        Raises:
            ValueError: for fewer than two images.
        """
        count = int(self.count[label])
        if count < 2:
            raise ValueError(f"{count} images: two or more are needed")
        return self.mean[label], self.scatter[label] / (count - 1)


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """The squared Frechet distance between two sets of features (N, D) and (M, D):

        |mean_a - mean_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2)),    A and B the covariances

    (Dowson & Landau 1982; Heusel et al. 2017, "GANs trained by a two time-scale update rule",
    eq. 6), in float64. It is an FID only for Inception's features. Of `Moments` class 0 is used.

    Raises:
        ValueError: for fewer than two rows, or different D.
    """
    (mean_a, cov_a), (mean_b, cov_b) = _mean_and_covariance(a), _mean_and_covariance(b)
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"features have {len(mean_a)} and {len(mean_b)} columns; the same number is needed"
        )
    return gaussian_frechet_distance(mean_a, cov_a, mean_b, cov_b)


def _mean_and_covariance(x: Tensor | Moments) -> MeanAndCovariance:
    if isinstance(x, Moments):
        return x.compute()
    if len(x) < 2:
        raise ValueError(f"features of shape {tuple(x.shape)}: two or more rows are needed")
    return x.double().mean(0), torch.atleast_2d(x.double().T.cov())


def gaussian_frechet_distance(
    mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor, root_a: Tensor | None = None
) -> float:
    """`frechet_distance` of means (D,) and covariances (D, D); `root_a` is A^(1/2) if known."""
    root = _matrix_root(cov_a) if root_a is None else root_a
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (mean_a - mean_b).square().sum()
    return max(0.0, float(means + cov_a.trace() + cov_b.trace() - 2 * cross))


def _matrix_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def bootstrap_frechet_distances(
    real: MeanAndCovariance, features: Tensor, weights: Iterable[Tensor]
) -> Tensor:
    """The Frechet distance of each resample, (R,) float64.

    Args:
        real: mean and covariance of the real images, which aren't resampled.
        features: of the generated images, (n, D).
        weights: how often each row counts in a resample, R tensors (n,).
    """
    features = features.double()
    if len(features) < features.shape[1]:
        return _distances_by_gram_matrix(real, features, weights)
    root, distances = _matrix_root(real[1]), []
    for weight in weights:
        mean = weight @ features / weight.sum()
        x = (features - mean) * weight.sqrt()[:, None]
        covariance = x.T @ x / (weight.sum() - 1)
        distances.append(gaussian_frechet_distance(*real, mean, covariance, root))
    return torch.tensor(distances, dtype=torch.float64)


def _distances_by_gram_matrix(
    real: MeanAndCovariance, features: Tensor, weights: Iterable[Tensor]
) -> Tensor:
    """`bootstrap_frechet_distances` by one (n, n) matrix X A X^T, for n < D: with X the centred rows
    of a resample and B = X^T X, tr (A^(1/2) B A^(1/2))^(1/2) = tr (X A X^T)^(1/2)."""
    mean, covariance = real
    x, distances = features - mean, []
    gram, squares = x @ covariance @ x.T, x.square().sum(1)
    for weight in weights:
        total, drawn = weight.sum(), weight > 0
        share, root = weight[drawn] / total, weight[drawn].sqrt()
        rows = gram[drawn][:, drawn]
        middle = rows @ share
        centred = rows - middle[:, None] - middle + share @ middle
        centred = centred * root[:, None] * root / (total - 1)
        cross = torch.linalg.eigvalsh(centred).clamp(min=0).sqrt().sum()
        means = (share @ x[drawn]).square().sum()
        trace = (share @ squares[drawn] - means) * total / (total - 1)
        distances.append(max(0.0, float(means + covariance.trace() + trace - 2 * cross)))
    return torch.tensor(distances, dtype=torch.float64)
