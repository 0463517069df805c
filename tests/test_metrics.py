"""Metrics against closed forms and independent implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.neighbors import NearestNeighbors

from guided_diffusers.metrics import frechet_distance, precision_recall


def features(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mixing + seed


def exactly(mean: float, std: float) -> torch.Tensor:
    """Points on a line whose sample mean and standard deviation are these."""
    x = torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None]
    return mean + std * x / x.std()


def test_frechet_distance_of_gaussians_on_a_line() -> None:
    """(mean_a - mean_b)^2 + (std_a - std_b)^2."""
    assert frechet_distance(exactly(1.0, 2.0), exactly(-0.5, 0.25)) == pytest.approx(1.5**2 + 1.75**2, rel=1e-12)


def test_frechet_distance_is_that_of_scipys_matrix_root() -> None:
    a, b = features(300, 12, 0), features(200, 12, 1)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_fewer_images_than_features() -> None:
    """Singular covariances: still finite, and that of the subspace they live in."""
    a, b = features(8, 3, 0), features(9, 3, 1)
    wide = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wide = torch.linalg.qr(wide.T).Q.T  # an isometry into 20 dimensions
    assert frechet_distance(a @ wide, b @ wide) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_precision_and_recall_are_those_of_scikit_learns_neighbours() -> None:
    real, generated, k = features(120, 4, 0), 1.5 * features(90, 4, 1) - 2, 4

    def share(inside: torch.Tensor, manifold: torch.Tensor) -> float:
        radius = NearestNeighbors(n_neighbors=k + 1).fit(manifold).kneighbors(manifold)[0][:, -1]
        return float((torch.cdist(inside, manifold).numpy() <= radius).any(1).mean())

    precision, recall = precision_recall(real, generated, k)
    assert (precision, recall) == (share(generated, real), share(real, generated))
    assert 0 < precision < 1 and 0 < recall < 1


def test_a_collapsed_model_is_precise_and_recalls_nothing() -> None:
    real = features(200, 3, 0)
    collapsed = real[:1] + 1e-3 * features(50, 3, 1)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1 and recall < 0.05


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ValueError, match="two rows each"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="of the same width"):
        frechet_distance(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="k=5"):
        precision_recall(torch.zeros(5, 2), torch.zeros(9, 2), k=5)
