"""The classifier's gradient as guidance uses it: size, direction, and a check by finite differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..guidance import ClassifierGuidance, StepContext
from ..noise import NoiseLevel
from .levels import EvalLevel, Reference
from .metrics import mean_and_error

PERTURBATION = 0.1  # share of other noise, for the cosine without a reference
DIFFERENCE_IMAGES = 8  # of the finite differences, in as many random directions


def guidance_gradient(
    classifier: torch.nn.Module, x: torch.Tensor, label: torch.Tensor, level: NoiseLevel
) -> torch.Tensor:
    """grad log p(y | x_t) as `ClassifierGuidance` computes it; float64 on the CPU."""
    step = StepContext(x, x, lambda sample: sample, level, 0, 1, 0.0)
    return ClassifierGuidance(classifier, label).score(step).cpu().double()


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of each image's (B, C, H, W) in float64, (B,); 0 where either is 0."""
    a, b = (x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True).clamp(min=1e-300) for x in (a, b))
    return (a * b).sum(dim=1)


def gradient_metrics(
    classifier: torch.nn.Module,
    x0: torch.Tensor,
    eps: torch.Tensor,
    label: torch.Tensor,
    eval_level: EvalLevel,
    generators: Sequence[torch.Generator],
    reference: Reference | None,
) -> dict[str, torch.Tensor]:
    """Metrics of the gradient at x_t = alpha x0 + sigma eps, each (B,).

    `gradient_norm` is the norm of sigma grad log p(y | x_t): by so much guidance_scale=1 changes the
    predicted noise, whose own norm is about sqrt(D). `cosine` is to the reference; the products
    from which `reference_scale` is computed come with it.

    Without a reference, `cosine` is to the gradient at other noise, sqrt(1 - r^2) eps + r eps' with
    r = 0.1. It then measures only smoothness: 1 doesn't mean a right gradient, but near 0 the
    gradient is noise that no sampler can follow.
    """
    level = eval_level.level
    x = level.alpha * x0 + level.sigma * eps
    gradient = guidance_gradient(classifier, x, label, level)
    metrics = {"gradient_norm": level.sigma * gradient.flatten(1).norm(dim=1)}
    if reference is None:
        draws = [torch.randn(eps.shape[1:], generator=generator) for generator in generators]
        r = PERTURBATION
        other_eps = (1 - r * r) ** 0.5 * eps + r * torch.stack(draws).to(eps)
        x = level.alpha * x0 + level.sigma * other_eps
        metrics["cosine"] = cosine(gradient, guidance_gradient(classifier, x, label, level))
        return metrics
    expected = reference(x, label, eval_level).cpu().double()
    metrics["cosine"] = cosine(gradient, expected)
    metrics["product_with_reference"] = (expected * gradient).flatten(1).sum(dim=1)
    metrics["squared_norm"] = gradient.square().flatten(1).sum(dim=1)
    return metrics


def summarize(batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """Means and standard errors over batches of `gradient_metrics`.

    With a reference, `reference_scale` is the guidance_scale at which the gradient is nearest to it.
    """
    values = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    row: dict[str, float] = {}
    for name in ("gradient_norm", "cosine"):
        row[name], row[f"{name}_error"] = mean_and_error(values[name])
    if "squared_norm" in values:
        squared = values["squared_norm"].sum().clamp(min=1e-300)
        row["reference_scale"] = float(values["product_with_reference"].sum() / squared)
    return row


def finite_difference_error(
    classifier: torch.nn.Module,
    float64_copy: torch.nn.Module,
    x0: torch.Tensor,
    eps: torch.Tensor,
    label: torch.Tensor,
    level: NoiseLevel,
    generator: torch.Generator,
) -> float:
    """|finite difference - gradient . v| / |finite difference| over random directions v.

    The gradient is the classifier's, the central differences are those of its copy in float64 on the
    CPU. Gradients below the rounding error of these (of a saturated classifier) count as zero.
    """
    count = DIFFERENCE_IMAGES
    x, label = level.alpha * x0[:count] + level.sigma * eps[:count], label[:count]
    gradient = guidance_gradient(classifier, x, label, level)
    x, norm = x.cpu().double(), (level.alpha**2 + level.sigma**2) ** 0.5
    term = ClassifierGuidance(float64_copy, label.cpu())
    t, extrapolation = term.schedule.timestep(level), term.schedule.extrapolation_scale(level)
    h = 1e-4 * level.sigma
    error, size = 0.0, (1e-11 / h) ** 2
    for _ in range(count):
        v = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        up, down = (term.log_likelihood((x + sign * h * v) / norm, t) for sign in (1, -1))
        difference = extrapolation * (up - down) / (2 * h)
        error += float((difference - (gradient * v).flatten(1).sum(dim=1)).square().sum())
        size += float(difference.square().sum())
    return (error / size) ** 0.5
