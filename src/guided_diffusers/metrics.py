"""How far generated images are from real ones, in the features of a network that never guided."""

from __future__ import annotations

import torch


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The squared Frechet distance of two sets of features (N, D) and (M, D), each taken for a Gaussian:

        |mean_a - mean_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2)),    A and B the covariances

    (Dowson & Landau 1982; Heusel et al. 2017, "GANs trained by a two time-scale update rule", eq. 6.) In float64. It is
    an FID only where the features are Inception's.

    Raises:
        ValueError: for fewer than two rows, or different D.
    """
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}: two rows each, or more, of "
                         "the same width are allowed")
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(x.T.cov()) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Fidelity and diversity: the share of `generated` (N, D) in the manifold of `real` (M, D), and the reverse.

    A set's manifold is the union of balls around its members, each reaching to its k-th nearest neighbour (Kynkaanniemi
    et al. 2019, "Improved precision and recall metric for assessing generative models", eq. 2).

    Raises:
        ValueError: for k or fewer rows.
    """
    if min(len(real), len(generated)) <= k or k < 1:
        raise ValueError(f"{len(real)} real and {len(generated)} generated features, k={k}: more than k >= 1 of each "
                         "are needed")

    def share(inside: torch.Tensor, manifold: torch.Tensor) -> float:
        radius = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values  # the nearest is itself
        return float((torch.cdist(inside, manifold) <= radius).any(dim=1).double().mean())

    real, generated = real.double(), generated.double()
    return share(generated, real), share(real, generated)
