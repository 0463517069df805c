"""Losses of noise-aware classifiers: three kinds of labels, mixup, worst-case images, score matching.

f are a classifier's outputs (B, K) for x_t = alpha x0 + sigma eps. Their kinds, in `transformers`'
words:

    single_label_classification   log p(y | x_t) = f_y - log sum_k exp f_k     y: ids (B,) or shares
    multi_label_classification    log p(y | x_t) = sum_k log sigmoid(+-f_k)    y: 0 to 1, (B, K)
    regression                    f = E[y | x_t]                               y: numbers (B, K)

Every loss is per image, (B,), in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .losses import per_image

SINGLE, MULTI = "single_label_classification", "multi_label_classification"
REGRESSION = "regression"
PROBLEM_TYPES = (SINGLE, MULTI, REGRESSION)
METRICS = {  # of `held_out_scores`
    SINGLE: ("accuracy", "cross_entropy"),
    MULTI: ("accuracy", "average_precision", "cross_entropy"),
    REGRESSION: ("r2", "mse"),
}


def label_losses(
    logits: Tensor,
    y: Tensor,
    problem_type: str = SINGLE,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    variance: Tensor | None = None,
) -> Tensor:
    """The loss of each image's outputs, (B,):

        single_label_classification   - sum_k w_k q_k log p(k | x_t),    q = (1 - s) y + s / K
        multi_label_classification    - mean_k [w_k q_k log sigmoid(f_k)
                                                + (1 - q_k) log sigmoid(-f_k)],
                                      q = (1 - s) y + s / 2
        regression                    mean_k (f_k - y_k)^2 / variance_k

    It is smallest at p(q | x_t), up to w, and at E[y | x_t].

    Args:
        class_weights: w, (K,); None: all 1. Not for regression.
        label_smoothing: s, the probability that is distributed over all labels (Szegedy et al. 2016,
            "Rethinking the inception architecture for computer vision", section 7); 0: off. Not for
            regression.
        variance: (K,), of the numbers to regress, so that the mean loss is 1 - R^2; None: all 1. For
            regression only.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type={problem_type!r}: {', '.join(PROBLEM_TYPES)} are allowed")
    if problem_type == REGRESSION and (class_weights is not None or label_smoothing):
        raise ValueError(
            f"class_weights={class_weights}, label_smoothing={label_smoothing} have no effect on "
            f"{REGRESSION}; leave them None and 0"
        )
    if problem_type != REGRESSION and variance is not None:
        raise ValueError(f"variance={variance} has no effect on {problem_type}; leave it None")
    if problem_type == REGRESSION:
        scale = 1.0 if variance is None else variance.to(wide)
        return ((wide - y).square() / scale).mean(dim=1)
    w, s = None if class_weights is None else class_weights.to(wide), label_smoothing
    if problem_type == SINGLE:
        y = y if y.ndim == 1 else y.to(wide.dtype)
        return F.cross_entropy(wide, y, w, reduction="none", label_smoothing=s)
    q = (1 - s) * y.to(wide.dtype) + s / 2
    losses = F.binary_cross_entropy_with_logits(wide, q, pos_weight=w, reduction="none")
    return losses.mean(dim=1)


def power_losses(log_odds: Tensor, log_q: Tensor) -> Tensor:
    """Binary cross entropy of E[p(y | x_0)^w | x_t], summed over the labels, (B,):

        - sum_k [q_k log sigmoid(f_k) + (1 - q_k) log sigmoid(-f_k)]

    with q_k = p(k | x_0)^w or its mean given x_t. It is smallest at sigmoid(f_k) = E[q_k | x_t], as
    the minimiser of contrastive energy prediction (Lu et al. 2023, "Contrastive energy prediction
    for exact energy-guided diffusion sampling in offline reinforcement learning", section 3.2) is
    up to a factor of no gradient.

    Args:
        log_odds: f, (B, K), of a classifier that was called with the power.
        log_q: log q_k, (B, K).
    """
    f = log_odds.to(torch.promote_types(log_odds.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(f, log_q.exp().to(f.dtype), reduction="none").sum(
        dim=1
    )


def log_likelihood(logits: Tensor, y: Tensor, problem_type: str = SINGLE) -> Tensor:
    """log p(y | x_t), (B,); regression's outputs don't determine it (`ValueError`)."""
    if problem_type == REGRESSION:
        raise ValueError(f"problem_type={problem_type!r}: {SINGLE} and {MULTI} have a likelihood")
    terms = 1 if problem_type == SINGLE else logits.shape[1]
    return -label_losses(logits, y, problem_type) * terms


def balanced_weights(counts: Tensor, images: int, problem_type: str = SINGLE) -> Tensor:
    """Class weights (K,), float32, that balance the classes.

        single_label_classification   N / (K N_k): equal shares of the loss; the mean weight is 1
        multi_label_classification    (N - N_k) / N_k: equal weight of positives and negatives

    counts: N_k, (K,), images of each label, at least one; of N `images`.
    """
    counts, several = counts.double(), problem_type == MULTI
    if (counts <= 0).any() or several and (counts >= images).any():
        raise ValueError(
            f"counts={counts.long().tolist()} of {images} images: at least one image of every "
            f"label is needed{', and one without' if several else ''}"
        )
    weights = (images - counts) / counts if several else images / (len(counts) * counts)
    return weights.float()


def soft_labels(y: Tensor, num_labels: int) -> Tensor:
    """Ids (B,) as shares (B, K); shares are returned unchanged."""
    return F.one_hot(y, num_labels).float() if y.ndim == 1 else y


def mixup(x0: Tensor, y: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels mixed with those of their neighbour:

        x0_i <- share_i x0_i + (1 - share_i) x0_j,    y too,    j = i + 1 for even i, i - 1 for odd i

    Zhang et al. 2018, "mixup: Beyond empirical risk minimization".

    B is even, y (B, K), as `soft_labels` gives it, and share (B,) from Beta(a, a). With neighbours,
    unlike a permutation, the result doesn't depend on the number of processes.
    """
    if len(x0) % 2:
        raise ValueError(f"x0 has {len(x0)} images; an even number can be mixed by twos")
    j = torch.arange(len(x0), device=x0.device) ^ 1
    share = share.reshape(-1, 1)
    y = torch.lerp(y[j], y, share.to(y))
    return torch.lerp(x0[j], x0, per_image(share.to(x0), x0)), y


def worst_case(
    losses: Callable[[Tensor], Tensor], x_t: Tensor, radius: float, steps: int = 7
) -> Tensor:
    """The x_t + delta, |delta|_2 <= radius, of largest loss, by projected gradient ascent; detached.

    Kawar et al. 2022, "Enhancing diffusion-based image synthesis with robust classifier guidance",
    train on these images, since gradients of a robust classifier are perceptually aligned. The ascent
    is that of Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks":
    from delta = 0, with steps of 2.5 radius / steps along the normalized gradient.

    Args:
        losses: x_t (B, ...) -> (B,).
        radius: of each image's delta, in units of x_t; 0: off.
    """

    def norm(x: Tensor) -> Tensor:
        norms = x.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        return per_image(norms, x)

    x_t = x_t.detach()
    delta = torch.zeros_like(x_t)
    for _ in range(steps if radius else 0):
        with torch.enable_grad():
            delta.requires_grad_()
            (grad,) = torch.autograd.grad(losses(x_t + delta).sum(), delta)
        delta = delta.detach() + 2.5 * radius / steps * grad / norm(grad)
        delta = delta * (radius / norm(delta)).clamp(max=1)
    return x_t + delta


def score_matching_losses(
    log_p: Tensor, x_t: Tensor, eps: Tensor, sigma: Tensor, score: Tensor
) -> Tensor:
    """Denoising likelihood score matching, (B,), a mean over the dimensions of

        sigma^2 |grad_x log p(y | x_t) + s(x_t) + eps / sigma|^2

    Chao et al. 2022, "Denoising likelihood score matching for conditional score-based data
    generation": cross entropy trains p(y | x_t), but not its gradient, which guidance uses.
    -eps / sigma is the score of p(x_t | x0), whose mean given x_t and y is the score of p(x_t | y).
    So with the score s(x_t) of p(x_t) the best gradient is that of the exact classifier,
    grad log p(x_t | y) - grad log p(x_t). The factor sigma^2 balances the noise levels, as in the
    mean squared error of eps.

    Args:
        log_p: log p(y | x_t), (B,), computed from an `x_t` that requires a gradient, within
            `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`: the other attention kernels have no
            second derivative.
        eps, sigma: noise (B, ...) of x_t, and its level (B,).
        score: s(x_t), of an unconditional diffusion model.
    """
    sigma = per_image(sigma, x_t)
    residual = sigma * (differentiable_gradient(log_p, x_t) + score) + eps
    return residual.square().flatten(1).mean(dim=1)


def gradient_matching_losses(
    log_p: Tensor, x_t: Tensor, sigma: Tensor, teacher_gradient: Tensor
) -> Tensor:
    """Squared distance of the gradient to a teacher's, relative where that is large, (B,):

        |sigma grad_x log p(y | x_t) - sigma g|^2 / (1 + |sigma g|^2)

    Soft targets teach a student p(y | x_t); its gradient, which guidance uses, says as many numbers
    of each image as it has pixels (Czarnecki et al. 2017, "Sobolev training for neural networks",
    section 3). sigma g is the teacher's guidance in units of eps, whose norm is sqrt(dimensions):
    below norm 1 its error is counted as it is, above it relative to the norm.

    Args:
        log_p: log p(y | x_t), (B,), as for `score_matching_losses`.
        sigma: noise level of x_t, (B,).
        teacher_gradient: g, the gradient of the teacher's log p(y | x_t), (B, ...).
    """
    sigma = per_image(sigma, x_t)
    error = sigma * (differentiable_gradient(log_p, x_t) - teacher_gradient)
    return squared_norm(error) / (1 + squared_norm(sigma * teacher_gradient))


def squared_norm(x: Tensor) -> Tensor:
    """|x|^2 of each row of (B, ...), (B,)."""
    return x.square().flatten(1).sum(dim=1)


def differentiable_gradient(log_p: Tensor, x_t: Tensor) -> Tensor:
    """grad_x log p(y | x_t), (B, ...), which can be differentiated again."""
    with torch.enable_grad():
        return torch.autograd.grad(log_p.sum(), x_t, create_graph=True)[0]


def held_out_scores(
    logits: Tensor, y: Tensor, problem_type: str = SINGLE, variance: Tensor | None = None
) -> dict[str, Tensor]:
    """Scores of each image's outputs, (B,) each, whose means over images are a split's metrics.

        single_label_classification   accuracy; cross_entropy
        multi_label_classification    accuracy: share of labels on the right side of 1/2;
                                      average_precision of the ranking of the labels;
                                      cross_entropy: mean over the labels
        regression                    r2: 1 - (f - y)^2 / variance; mse: (f - y)^2; means over K

    An image's average precision (Schapire & Singer 2000) is the mean over its labels, of the share of
    its labels among all that score at least as high; 1 for an image without labels.

    Args:
        y: as in `label_losses`, without shares.
        variance: (K,), of the training labels, for R^2. For regression only.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = label_losses(wide, y, problem_type)
    if problem_type == SINGLE:
        return {"accuracy": (wide.argmax(dim=1) == y).float(), "cross_entropy": losses}
    if problem_type == REGRESSION:
        return {"r2": 1 - label_losses(wide, y, problem_type, variance=variance), "mse": losses}
    # above[i, k, l]: label l scores at least as high as label k
    above = (wide[:, None, :] >= wide[:, :, None]).to(wide.dtype)
    y = y.to(wide.dtype)
    precision = (above * y[:, None, :]).sum(dim=2) / above.sum(dim=2)
    average = torch.where(y.any(dim=1), (precision * y).sum(dim=1) / y.sum(dim=1).clamp(min=1), 1.0)
    accuracy = ((wide > 0) == (y > 0.5)).to(wide.dtype).mean(dim=1)
    return {"accuracy": accuracy, "average_precision": average, "cross_entropy": losses}
