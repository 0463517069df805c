"""Metrics of a classifier's logits: accuracy, cross entropy, information, calibration."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 15
#: names under which the means of `calibration_gaps` stand in a row of metrics
GAPS = tuple(f"gap {m}" for m in range(BINS))


def calibration_gaps(logits: Tensor, label: Tensor, bins: int = BINS) -> Tensor:
    """(correct - confidence) of each image in the bin of its confidence, 0 in the other bins.

    The expected calibration error is the sum over bins of the mean's absolute value (Guo et al.
    2017, "On calibration of modern neural networks", eq. 3; bins ((m - 1)/M, m/M]). Means can be
    averaged over batches and processes, and so can this error.

    Args:
        logits: (B, K).
        label: (B,).

    Returns:
        (B, bins).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    gap = (predicted == label).to(logits) - confidence
    return _in_bin(confidence, bins) * gap[:, None]


def _in_bin(confidence: Tensor, bins: int) -> Tensor:
    """One-hot bin of each confidence, (B, bins)."""
    return F.one_hot(((confidence * bins).ceil().long() - 1).clamp(0, bins - 1), bins)


def calibration_error(gaps: Tensor) -> float:
    """The expected calibration error of `calibration_gaps`, in [0, 1]."""
    return float(gaps.mean(dim=0).abs().sum())


def with_calibration(row: Mapping[str, float]) -> dict[str, float]:
    """A row of mean metrics with `ece` in place of the means named `GAPS`."""
    gaps = torch.tensor([[row[name] for name in GAPS]], dtype=torch.float64)
    metrics = {name: value for name, value in row.items() if name not in GAPS}
    return {**metrics, "ece": round(calibration_error(gaps), 5)}


def calibration_floor(
    logits: Tensor, generator: torch.Generator, bins: int = BINS, draws: int = 100
) -> float:
    """The calibration error that a perfectly calibrated classifier would show on as few images."""
    confidence = logits.double().softmax(dim=1).amax(dim=1)
    uniform = torch.rand(draws, len(confidence), generator=generator, dtype=torch.float64)
    gap = (uniform < confidence).double() - confidence
    in_bin = _in_bin(confidence, bins).double()
    return float((gap @ in_bin / len(confidence)).abs().sum(dim=1).mean())


def logit_scale(logits: Tensor, label: Tensor, largest: float = 100.0) -> tuple[float, float]:
    """The s in [0, `largest`] that minimises the cross entropy of softmax(s logits), and its error.

    1 / s is the temperature of Guo et al. 2017. Logits are (N, K), or (L, N, K) at L noise levels;
    the standard error counts images, not levels.
    """
    logits = logits.double().reshape(-1, *logits.shape[-2:])
    logits = logits - logits.mean(dim=-1, keepdim=True)
    label_logit = logits.gather(-1, label.expand(len(logits), -1)[..., None])[..., 0]

    def slope(s: float) -> Tensor:  # of the cross entropy, (L, N); its mean increases with s
        return ((s * logits).softmax(dim=-1) * logits).sum(dim=-1) - label_logit

    low, high = 0.0, largest
    for _ in range(50):
        middle = (low + high) / 2
        if slope(middle).mean() < 0:
            low = middle
        else:
            high = middle
    if len(label) < 2:
        return low, float("inf")
    p = (low * logits).softmax(dim=-1)
    curvature = ((p * logits**2).sum(-1) - (p * logits).sum(-1) ** 2).mean()
    image_slope = slope(low).mean(dim=0)
    error = image_slope.std() / len(image_slope) ** 0.5 / curvature.clamp(min=1e-12)
    return low, float(error)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error (infinite for a single value)."""
    values = values.double()
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("inf")
    return float(values.mean()), error


def level_metrics(
    logits: Tensor, label: Tensor, log_prior: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """Metrics of the logits (N, K) at one noise level; `..._error` are standard errors.

    `information` is the mean of log p(y | x_t) - log p(y), in nats an image.
    """
    log_p = logits.double().log_softmax(dim=1)
    label_log_p = log_p.gather(1, label[:, None])[:, 0]
    correct = (log_p.argmax(dim=1) == label).double()
    per_image = {
        "accuracy": correct,
        "cross_entropy": -label_log_p,
        "information": label_log_p - log_prior[label],
        "overconfidence": log_p.exp().amax(dim=1) - correct,
    }
    row: dict[str, float] = {}
    for name, values in per_image.items():
        row[name], row[f"{name}_error"] = mean_and_error(values)
    row["chance"] = float(log_prior.exp().max())
    row["prior_entropy"] = float(-log_prior[label].mean())
    row["ece"] = calibration_error(calibration_gaps(logits, label))
    row["ece_floor"] = calibration_floor(logits, generator)
    row["logit_scale"], row["logit_scale_error"] = logit_scale(logits, label)
    return row
