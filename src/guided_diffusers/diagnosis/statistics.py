"""Evaluates a classifier on noised images, and collects its metrics at each noise level."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..guidance import ClassifierGuidance, StepContext, logits_of
from ..images import encode
from ..noise import NoiseLevel, TrainedSchedule, module_config, schedule_config
from ..utils import image_generator
from .levels import EvalLevel, Reference
from .metrics import level_metrics, mean_and_error
from .verdict import status

PERTURBATION = 0.1  # share of other noise, for the cosine without a reference
DIFFERENCE_IMAGES = 8  # of the finite differences, in as many random directions
Item = dict[str, Any]


@dataclass(eq=False)
class LevelStatistics:
    """Logits and gradients of a classifier at noise levels, collected over batches.

    Arguments as of `diagnose`. An image's noise doesn't depend on its batch.
    """

    classifier: torch.nn.Module
    eval_levels: Sequence[EvalLevel]
    reference: Reference | None
    gradient_images: int
    seed: int
    finite_differences: bool

    def __post_init__(self) -> None:
        self.value_range = float("inf"), float("-inf")  # of the images
        self.schedule = TrainedSchedule(schedule_config(self.classifier), pure_noise=False)
        weights = filter(torch.is_floating_point, self.classifier.parameters())
        weight = next(weights, torch.zeros(()))
        self.dtype, self.device, self.float64_copy = weight.dtype, weight.device, None
        if self.finite_differences:
            self.float64_copy = copy.deepcopy(self.classifier).cpu().double()
        self._labels: list[Tensor] = []
        self._logits: list[list[Tensor]] = [[] for _ in self.eval_levels]
        self._gradients: list[list[dict[str, Tensor]]] = [[] for _ in self.eval_levels]
        self._difference_errors: list[float] = []
        powers = module_config(self.classifier).get("power_range")
        self.max_power = None if powers is None else float(powers[1])
        self._powered: list[list[Tensor]] = [[] for _ in self.eval_levels]

    def add(
        self, indices: Sequence[int], items: Sequence[Item], vae: torch.nn.Module | None
    ) -> None:
        """Evaluate items at all levels; `indices` in the data and the seed determine the noise."""
        x0 = torch.stack([item["pixel_values"] for item in items]).to(self.device)
        label = torch.tensor([int(item["label"]) for item in items], device=self.device)
        if vae is not None:
            x0, std = encode(vae, x0)
            if std is not None:  # sampled latents
                generators = [image_generator(self.seed, i) for i in indices]
                x0 = x0.float() + std.float() * randn_tensor(x0.shape, generators, x0.device)
        x0 = x0.float()
        seen, levels = sum(map(len, self._labels)), len(self.eval_levels)
        count = max(0, min(len(x0), self.gradient_images - seen))
        low, high = self.value_range
        self.value_range = min(low, x0.amin().item()), max(high, x0.amax().item())
        for k, eval_level in enumerate(self.eval_levels):
            generators = [image_generator(self.seed, levels * i + k) for i in indices]
            eps = randn_tensor(x0.shape, generators, x0.device)
            x = _noised(x0, eps, eval_level.level)
            self._logits[k].append(self._evaluate(x, eval_level.level))
            if self.max_power is not None:
                odds = self._evaluate(x, eval_level.level, power=self.max_power)
                self._powered[k].append(odds.sigmoid().sum(dim=1))
            images = x0[:count], eps[:count], label[:count], eval_level
            if count:
                self._gradients[k].append(self._gradient_metrics(*images, generators[:count]))
            if not seen and self.float64_copy is not None:
                self._difference_errors.append(self._difference_error(*images, generators[0]))
        self._labels.append(label.cpu())

    def _evaluate(self, x: Tensor, level: NoiseLevel, **options: float) -> Tensor:
        """Logits at x_t, (B, K), evaluated as `NoiseAwareGuidance` does."""
        z = x / (level.alpha**2 + level.sigma**2) ** 0.5
        output = self.classifier(z.to(self.dtype), self.schedule.timestep(level), **options)
        return logits_of(output).cpu().double()

    def _gradient(self, x: Tensor, label: Tensor, level: NoiseLevel) -> Tensor:
        """grad log p(y | x_t) as guidance computes it; float64 on the CPU."""
        step = StepContext(x, x, lambda sample: sample, level, 0, 1, 0.0)
        return ClassifierGuidance(self.classifier, label).score(step).cpu().double()

    def _gradient_metrics(
        self, x0: Tensor, eps: Tensor, label: Tensor, eval_level: EvalLevel, generators: list[Any]
    ) -> dict[str, Tensor]:
        """Metrics of the gradient at each image, (B,).

        `gradient_norm` is |sigma grad log p(y | x_t)|; predicted noise has a norm of about sqrt(D).
        """
        level = eval_level.level
        x = _noised(x0, eps, level)
        gradient = self._gradient(x, label, level)
        metrics = {"gradient_norm": level.sigma * gradient.flatten(1).norm(dim=1)}
        if self.reference is None:
            # only smoothness: 1 doesn't mean a right gradient, but near 0 no sampler can follow it
            r, other = PERTURBATION, randn_tensor(eps.shape, generators, eps.device)
            x = _noised(x0, (1 - r * r) ** 0.5 * eps + r * other, level)
            metrics["cosine"] = cosine(gradient, self._gradient(x, label, level))
        else:
            expected = self.reference(x, label, eval_level).cpu().double()
            metrics["cosine"] = cosine(gradient, expected)
            metrics["product_with_reference"] = (expected * gradient).flatten(1).sum(dim=1)
            metrics["squared_norm"] = gradient.square().flatten(1).sum(dim=1)
        return metrics

    def _difference_error(
        self, x0: Tensor, eps: Tensor, label: Tensor, eval_level: EvalLevel, generator: Any
    ) -> float:
        """|finite difference - gradient . v| / |finite difference| over random directions v."""
        level, count = eval_level.level, DIFFERENCE_IMAGES
        x, label = _noised(x0[:count], eps[:count], level), label[:count]
        gradient = self._gradient(x, label, level)
        x, term = x.cpu().double(), ClassifierGuidance(self.float64_copy, label.cpu())
        h = 1e-4 * level.sigma
        error, size = 0.0, (1e-11 / h) ** 2  # gradients below the rounding error count as zero
        for _ in range(count):
            v = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            up, down = (
                term.log_probability(*term.network_input(x + sign * h * v, level)[:2])
                for sign in (1, -1)
            )
            difference = self.schedule.extrapolation_scale(level) * (up - down) / (2 * h)
            error += float((difference - (gradient * v).flatten(1).sum(dim=1)).square().sum())
            size += float(difference.square().sum())
        return (error / size) ** 0.5

    def logits_and_label(self) -> tuple[Tensor, Tensor]:
        """Logits (L, N, K) at all levels and labels (N,)."""
        logits = torch.stack([torch.cat(batches) for batches in self._logits])
        if not logits.isfinite().all():
            raise FloatingPointError(
                "the classifier's logits are not finite; load it in float32, or train it again"
            )
        return logits, torch.cat(self._labels)

    def rows(self, log_prior: Tensor) -> list[dict[str, Any]]:
        """Metrics and status, a row a level, given the log frequencies of the labels, (K,)."""
        logits, label = self.logits_and_label()
        rows = []
        for k, eval_level in enumerate(self.eval_levels):
            row = {
                "fraction": eval_level.fraction,
                "timestep": eval_level.timestep,
                "sigma_over_alpha": eval_level.ratio,
                "classifier_timestep": self.schedule.timestep(eval_level.level),
                "beyond": self.schedule.extrapolation_scale(eval_level.level) < 1,
                **level_metrics(logits[k], label, log_prior, image_generator(self.seed, k)),
                **_summarize(self._gradients[k]),
            }
            if self._difference_errors:
                row["finite_difference_error"] = self._difference_errors[k]
            if self.max_power is not None:  # sum over y of E[p(y | x_0)^w | x_t]
                row["power"] = self.max_power
                row["power_mean"], row["power_mean_error"] = mean_and_error(
                    torch.cat(self._powered[k])
                )
            row["status"] = status(row, self.reference is not None)
            rows.append(row)
        return rows


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each image's (B, C, H, W) in float64, (B,); 0 where either is 0."""
    a, b = (x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True).clamp(min=1e-300) for x in (a, b))
    return (a * b).sum(dim=1)


def _noised(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    return level.alpha * x0 + level.sigma * eps


def _summarize(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Means and standard errors over batches; `reference_scale` is nearest to the reference."""
    values = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    row: dict[str, float] = {}
    for name in ("gradient_norm", "cosine"):
        row[name], row[f"{name}_error"] = mean_and_error(values[name])
    if "squared_norm" in values:
        squared = values["squared_norm"].sum().clamp(min=1e-300)
        row["reference_scale"] = float(values["product_with_reference"].sum() / squared)
    return row
