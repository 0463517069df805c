"""Runs a classifier on noised images and collects its metrics at each noise level."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..guidance import logits_of
from ..images import encode
from ..noise import TrainedSchedule, schedule_config
from ..sampling import image_generator
from .gradients import finite_difference_error, gradient_metrics, summarize
from .levels import EvalLevel, Reference
from .metrics import level_metrics
from .verdict import status

Item = dict[str, Any]


class LevelStatistics:
    """Logits and gradients of a classifier at noise levels, collected over batches.

    Args:
        classifier: as of `ClassifierGuidance`, in evaluation mode.
        eval_levels: noisiest first.
        reference: of the gradient; None: its smoothness is measured.
        gradient_images: gradients are taken for so many images.
        seed: of the noise; an image's noise doesn't depend on its batch.
        finite_differences: check the gradient on the first batch.

    Attributes:
        low, high: range of the images' values.
    """

    def __init__(
        self,
        classifier: torch.nn.Module,
        eval_levels: Sequence[EvalLevel],
        reference: Reference | None,
        gradient_images: int,
        seed: int,
        finite_differences: bool,
    ):
        self.classifier, self.eval_levels, self.reference = classifier, eval_levels, reference
        self.gradient_images, self.seed = gradient_images, seed
        self.low, self.high = float("inf"), float("-inf")
        self.schedule = TrainedSchedule(schedule_config(classifier))
        floating = (p.dtype for p in classifier.parameters() if p.is_floating_point())
        self.dtype = next(floating, torch.float32)
        self.float64_copy = None
        if finite_differences:
            self.float64_copy = copy.deepcopy(classifier).cpu().double()
        self._labels: list[torch.Tensor] = []
        self._logits: list[list[torch.Tensor]] = [[] for _ in eval_levels]
        self._gradients: list[list[dict[str, torch.Tensor]]] = [[] for _ in eval_levels]
        self._difference_errors: list[float] = []

    def add(self, indices: Sequence[int], x0: torch.Tensor, label: torch.Tensor) -> None:
        """Evaluate a batch at every noise level.

        Args:
            indices: of the images in the data; with the seed they determine the noise.
            x0: (B, C, H, W), images or latents.
            label: (B,).
        """
        first, done = not self._labels, sum(map(len, self._labels))
        count = max(0, min(len(x0), self.gradient_images - done))
        self.low, self.high = min(self.low, x0.amin().item()), max(self.high, x0.amax().item())
        for k, eval_level in enumerate(self.eval_levels):
            level = eval_level.level
            numbers = [len(self.eval_levels) * i + k for i in indices]
            generators = [image_generator(self.seed, number) for number in numbers]
            draws = [torch.randn(x0.shape[1:], generator=generator) for generator in generators]
            eps = torch.stack(draws).to(x0)
            self._logits[k].append(self._evaluate(level.alpha * x0 + level.sigma * eps, eval_level))
            images = x0[:count], eps[:count], label[:count]
            if count:
                self._gradients[k].append(
                    gradient_metrics(
                        self.classifier, *images, eval_level, generators[:count], self.reference
                    )
                )
            if first and self.float64_copy is not None:
                self._difference_errors.append(
                    finite_difference_error(
                        self.classifier, self.float64_copy, *images, level, generators[0]
                    )
                )
        self._labels.append(label.cpu())

    def _evaluate(self, x: torch.Tensor, eval_level: EvalLevel) -> torch.Tensor:
        """Logits at x_t, (B, K), evaluated as `NoiseAwareGuidance` does."""
        level = eval_level.level
        z = x / (level.alpha**2 + level.sigma**2) ** 0.5
        output = self.classifier(z.to(self.dtype), self.schedule.timestep(level))
        return logits_of(output).cpu().double()

    def logits_and_label(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (L, N, K) at all levels and labels (N,).

        Raises:
            FloatingPointError: if a logit is NaN or infinite.
        """
        logits = torch.stack([torch.cat(batches) for batches in self._logits])
        if not logits.isfinite().all():
            raise FloatingPointError(
                "the classifier's logits are not finite; load it in float32, or train it again"
            )
        return logits, torch.cat(self._labels)

    def rows(self, log_prior: torch.Tensor) -> list[dict[str, Any]]:
        """Metrics and status, a row a level.

        Args:
            log_prior: (K,), log frequencies of the labels.
        """
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
                **summarize(self._gradients[k]),
            }
            if self._difference_errors:
                row["finite_difference_error"] = self._difference_errors[k]
            row["status"] = status(row, self.reference is not None)
            rows.append(row)
        return rows


def batches(
    data: Sequence[Item],
    indices: Sequence[int],
    size: int,
    vae: torch.nn.Module | None,
    seed: int,
    device: torch.device,
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Batches of (indices, x0, label); with an autoencoder, x0 are sampled latents."""
    for start in range(0, len(indices), size):
        batch = list(indices[start : start + size])
        items = [data[i] for i in batch]
        x0 = torch.stack([item["pixel_values"] for item in items]).to(device)
        if vae is not None:
            mean, std = encode(vae, x0)
            x0 = mean.float()
            if std is not None:
                generators = [image_generator(seed, i) for i in batch]
                draws = [torch.randn(mean.shape[1:], generator=g) for g in generators]
                x0 = x0 + std.float() * torch.stack(draws).to(mean.device)
        label = torch.tensor([int(item["label"]) for item in items], device=device)
        yield batch, x0.float(), label
