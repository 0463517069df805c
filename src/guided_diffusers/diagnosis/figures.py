"""What a noise-aware classifier says at the noise levels of a sampling run: the figures, without an opinion on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch.nn import functional as F

from ..guidance import ClassifierGuidance, StepContext, no_parameter_grad
from ..images import encode
from ..noise import (
    NoiseLevel,
    TrainedSchedule,
    module_config,
    noise_levels,
    sampling_timesteps,
    schedule_config,
    split_variance,
)
from ..utils import image_generator

BINS = 15
REACH = 10.0  # a schedule whose noisiest sigma / alpha is below this can't be that of a whole sampling run
OWN_SCHEDULE = ("beta_schedule", "beta_start", "beta_end")
Item = dict[str, Any]
Reference = Callable[[torch.Tensor, torch.Tensor, "Place"], torch.Tensor]


@dataclass(frozen=True)
class Place:
    """A step of a sampling run: `fraction` of the run, the scheduler's index and timestep, and the noise level."""

    fraction: float
    index: int
    timestep: float
    level: NoiseLevel

    @property
    def ratio(self) -> float:
        """sigma / alpha."""
        return self.level.sigma / self.level.alpha


class SamplingRun:
    """The run of a scheduler in its most steps (1000 at most), of which some places are looked at.

    Args:
        scheduler: it is copied.

    Raises:
        ValueError: for a scheduler that guidance can't work with.
    """

    def __init__(self, scheduler: SchedulerMixin):
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(
            min(1000, self.scheduler.config.get("num_train_timesteps") or 1000)
        )
        self.timesteps = sampling_timesteps(self.scheduler)
        self.noise_levels = [level for level in noise_levels(self.scheduler) if level.sigma > 0]

    def places(self, count: int) -> list[Place]:
        """`count` places in the middles of equal parts of the run, noisiest first, and its last step.

        Raises:
            ValueError: for fewer than one, or more than the run has steps.
        """
        steps = len(self.noise_levels)
        if not 1 <= count < steps:
            raise ValueError(
                f"levels={count}: 1 to {steps - 1} are allowed, the run has {steps} steps"
            )
        return [self._place((part + 0.5) / count) for part in range(count)] + [self._place(1.0)]

    def _place(self, fraction: float) -> Place:
        index = min(int(fraction * len(self.noise_levels)), len(self.noise_levels) - 1)
        return Place(fraction, index, float(self.timesteps[index]), self.noise_levels[index])

    def ratio_at(self, fraction: float) -> float:
        """sigma / alpha at a fraction of the run; 0 at its end."""
        return 0.0 if fraction >= 1 else self._place(fraction).ratio

    def scheduler_at(self, place: Place) -> SchedulerMixin:
        """A copy that stands at a place, as `scale_model_input` of sigma-based schedulers counts its calls."""
        scheduler = copy.deepcopy(self.scheduler)
        if callable(getattr(scheduler, "set_begin_index", None)):
            scheduler.set_begin_index(place.index)
        return scheduler


def own_run(classifier: torch.nn.Module) -> SamplingRun:
    """The DDIM run of a classifier's schedule, for want of a network's.

    A schedule that ends early (a classifier of clean images) is continued to 1000 steps of its betas: a sampling run
    begins in pure noise, whatever its classifier knows.
    """
    config = dict(schedule_config(classifier))
    if TrainedSchedule(config).log_ratio[-1] < torch.tensor(REACH).log():
        config = {
            name: module_config(classifier)[name]
            for name in OWN_SCHEDULE
            if name in module_config(classifier)
        }
    return SamplingRun(DDIMScheduler(**config, clip_sample=False, timestep_spacing="trailing"))


def network_reference(unet: torch.nn.Module, run: SamplingRun, null: int) -> Reference:
    """grad log p(y | x_t) by a class-conditional network with a null label (Ho & Salimans 2022):

        score(x_t | y) - score(x_t)

    It never saw the classifier, so it is an independent estimate, and no more: where both scores are nearly the same
    (much noise, or hardly any) their difference is the network's error.
    """

    def reference(x: torch.Tensor, label: torch.Tensor, place: Place) -> torch.Tensor:
        scheduler, wanted = run.scheduler_at(place), next(unet.parameters())
        t = run.timesteps[place.index].to(x.device)
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        labels = torch.cat([label, torch.full_like(label, null)])
        output = unet(
            torch.cat([scaled] * 2).to(wanted.dtype), t, class_labels=labels, return_dict=False
        )[0]
        prediction, _ = split_variance(output, x.shape[1])
        told, untold = (place.level.x0(x, half) for half in prediction.chunk(2))
        return place.level.score_shift(told - untold)

    return reference


def calibration_gaps(logits: torch.Tensor, label: torch.Tensor, bins: int = BINS) -> torch.Tensor:
    """Each image's (right or not) - confidence in its bin of confidence, 0 in the others: (B, bins) of logits (B, K).

    The expected calibration error is the sum over bins of their mean's absolute value (Guo et al. 2017, "On calibration
    of modern neural networks", eq. 3; bins ((m - 1)/M, m/M]). As means add up, so does this over batches and processes.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    confidence, answer = wide.softmax(dim=1).max(dim=1)
    gap = (answer == label).to(wide) - confidence
    return F.one_hot(_bins(confidence, bins), bins) * gap[:, None]


def _bins(confidence: torch.Tensor, bins: int) -> torch.Tensor:
    return ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)


def calibration_error(gaps: torch.Tensor) -> float:
    """The expected calibration error of `calibration_gaps`, in [0, 1]."""
    return float(gaps.mean(dim=0).abs().sum())


GAPS = tuple(f"gap {m}" for m in range(BINS))


def with_calibration(row: Mapping[str, float]) -> dict[str, float]:
    """A row of means that has those of `calibration_gaps` under the names `GAPS`, with their `ece` instead."""
    gaps = torch.tensor([[row[name] for name in GAPS]], dtype=torch.float64)
    kept = {name: value for name, value in row.items() if name not in GAPS}
    return {**kept, "ece": round(calibration_error(gaps), 5)}


def calibration_floor(
    logits: torch.Tensor, generator: torch.Generator, bins: int = BINS, draws: int = 100
) -> float:
    """The calibration error that a perfectly calibrated classifier of these confidences shows in so few images."""
    confidence = logits.double().softmax(dim=1).amax(dim=1)
    where = F.one_hot(_bins(confidence, bins), bins).double()
    right = (
        torch.rand(draws, len(confidence), generator=generator, dtype=torch.float64) < confidence
    )
    return float(((right.double() - confidence) @ where / len(confidence)).abs().sum(dim=1).mean())


def logit_scale(
    logits: torch.Tensor, label: torch.Tensor, largest: float = 100.0
) -> tuple[float, float]:
    """The s in [0, `largest`] at which softmax(s logits) has the least cross entropy, and its standard error.

    1 / s is the temperature of Guo et al. 2017. Below 1: over-confident; above 1: under-confident.

    Args:
        logits: (N, K) or (L, N, K), of the same N images at L noise levels; the error counts images, not levels.
        label: (N,).
    """
    logits = logits.double().reshape(-1, *logits.shape[-2:])
    logits = logits - logits.mean(dim=-1, keepdim=True)
    own = logits.gather(-1, label.expand(len(logits), -1)[..., None])[..., 0]

    def slope(s: float) -> torch.Tensor:  # of the cross entropy, (L, N); its mean rises with s
        return ((s * logits).softmax(dim=-1) * logits).sum(dim=-1) - own

    low, high = 0.0, largest
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle).mean() < 0 else (low, middle)
    p = (low * logits).softmax(dim=-1)
    curvature = ((p * logits**2).sum(-1) - (p * logits).sum(-1) ** 2).mean()
    each = slope(low).mean(dim=0)
    return low, float(each.std() / len(each) ** 0.5 / curvature.clamp(min=1e-12)) if len(
        each
    ) > 1 else float("inf")


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of each image's (B, C, H, W) in float64, (B,); 0 where either is 0."""
    a, b = (x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True).clamp(min=1e-300) for x in (a, b))
    return (a * b).sum(dim=1)


class Gradients:
    """The gradients of some images at a place, as guidance uses them, and how good they are.

    Args:
        classifier: as of `ClassifierGuidance`.
        reference: (x_t, label, place) -> grad log p(y | x_t); None: the gradient is compared with itself at another
            noise, sqrt(1 - r^2) eps + r eps' with r = 0.1. That asks only whether it is smooth: a smooth wrong gradient
            has a cosine of 1, too; one near 0 is noise that no sampler can follow.
    """

    PERTURBATION = 0.1
    DIFFERENCES = 8  # images, each in as many random directions

    def __init__(self, classifier: torch.nn.Module, reference: Reference | None):
        self.classifier, self.reference = classifier, reference
        self.wide = copy.deepcopy(classifier).cpu().double()

    def __call__(
        self,
        x0: torch.Tensor,
        eps: torch.Tensor,
        label: torch.Tensor,
        place: Place,
        generators: Sequence[torch.Generator],
    ) -> dict[str, torch.Tensor]:
        """Per image, (B,): the norm of sigma grad log p(y | x_t), which is what scale 1 moves the predicted noise by
        (whose own norm is sqrt(D)); `cosine`; with a reference the products that `reference_scale` is made of."""
        level = place.level
        x = level.alpha * x0 + level.sigma * eps
        gradient = self._gradient(self.classifier, x, label, level)
        found = {"gradient_norm": level.sigma * gradient.flatten(1).norm(dim=1)}
        if self.reference is None:
            other = torch.stack(
                [torch.randn(eps.shape[1:], generator=one) for one in generators]
            ).to(eps)
            r = self.PERTURBATION
            x = level.alpha * x0 + level.sigma * ((1 - r * r) ** 0.5 * eps + r * other)
            return {
                **found,
                "cosine": cosine(gradient, self._gradient(self.classifier, x, label, level)),
            }
        known = self.reference(x, label, place).cpu().double()
        products = {
            "_with_reference": (known * gradient).flatten(1).sum(dim=1),
            "_with_itself": gradient.square().flatten(1).sum(dim=1),
        }
        return {**found, "cosine": cosine(gradient, known), **products}

    @staticmethod
    def _gradient(
        classifier: torch.nn.Module, x: torch.Tensor, label: torch.Tensor, level: NoiseLevel
    ) -> torch.Tensor:
        step = StepContext(x, x, lambda sample: sample, level, 0, 1, 0.0)
        return (
            ClassifierGuidance(classifier, label).score(step).cpu().double()
        )  # some devices have no float64

    def difference_error(
        self,
        x0: torch.Tensor,
        eps: torch.Tensor,
        label: torch.Tensor,
        place: Place,
        generator: torch.Generator,
    ) -> float:
        """|finite difference - gradient . v| / |finite difference|, over some images and random directions v.

        The gradient is the classifier's own, the central differences are taken of a copy in float64. Gradients that are
        lost in its rounding, as of a classifier that is sure beyond any doubt, count as none.
        """
        level, count = place.level, self.DIFFERENCES
        x = level.alpha * x0[:count] + level.sigma * eps[:count]
        gradient = self._gradient(self.classifier, x, label[:count], level)
        x, label = x.cpu().double(), label[:count].cpu()
        term, norm = ClassifierGuidance(self.wide, label), (level.alpha**2 + level.sigma**2) ** 0.5
        t, beyond, h = (
            term.schedule.timestep(level),
            term.schedule.extrapolation_scale(level),
            1e-4 * level.sigma,
        )
        wrong, size = 0.0, (1e-11 / h) ** 2
        for _ in range(count):
            v = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            up, down = (term.log_likelihood((x + sign * h * v) / norm, t) for sign in (1, -1))
            difference = beyond * (up - down) / (2 * h)
            wrong += float((difference - (gradient * v).flatten(1).sum(dim=1)).square().sum())
            size += float(difference.square().sum())
        return (wrong / size) ** 0.5


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    values = values.double()
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("inf")
    return float(values.mean()), error


def level_figures(
    logits: torch.Tensor, label: torch.Tensor, log_prior: torch.Tensor, generator: torch.Generator
) -> dict[str, float]:
    """The figures of one noise level that need no gradient; names ending in `_error` are standard errors.

    `information` is what the classifier says beyond the labels' frequencies, in nats an image:

        mean of log p(y | x_t) - log p(y)    at most the mutual information of y and x_t; below 0: worse than silence

    Args:
        logits: (N, K).
        log_prior: (K,), of the labels' frequencies.
    """
    log_p = logits.double().log_softmax(dim=1)
    own = log_p.gather(1, label[:, None])[:, 0]
    right, confidence = (log_p.argmax(dim=1) == label).double(), log_p.exp().amax(dim=1)
    pairs = {
        "accuracy": right,
        "cross_entropy": -own,
        "information": own - log_prior[label],
        "overconfidence": confidence - right,
    }
    row: dict[str, float] = {}
    for name, values in pairs.items():
        row[name], row[f"{name}_error"] = mean_and_error(values)
    row["chance"], row["prior_entropy"] = (
        float(log_prior.exp().max()),
        float(-log_prior[label].mean()),
    )
    row["ece"] = calibration_error(calibration_gaps(logits, label))
    row["ece_floor"] = calibration_floor(logits, generator)
    row["logit_scale"], row["logit_scale_error"] = logit_scale(logits, label)
    return row


def batches(
    data: Sequence[Item],
    numbers: Sequence[int],
    size: int,
    vae: torch.nn.Module | None,
    seed: int,
    device: torch.device,
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """(numbers, x0, label) of the items `numbers`; with an autoencoder x0 are latents."""
    for start in range(0, len(numbers), size):
        some = list(numbers[start : start + size])
        items = [data[i] for i in some]
        x0 = torch.stack([item["pixel_values"] for item in items]).to(device)
        if vae is not None:
            mean, std = encode(vae, x0)
            draws = torch.stack(
                [torch.randn(mean.shape[1:], generator=image_generator(seed, i)) for i in some]
            )
            x0 = mean.float() + (0 if std is None else std.float() * draws.to(mean.device))
        yield some, x0.float(), torch.tensor([int(item["label"]) for item in items], device=device)


@contextmanager
def evaluating(*modules: torch.nn.Module | None) -> Iterator[None]:
    """Within, the modules are in evaluation mode and their parameters want no gradient. Restored at the end."""
    there = [module for module in modules if module is not None]
    training = [one for module in there for one in module.modules() if one.training]
    try:
        for module in there:
            module.eval()
        with no_parameter_grad(there):
            yield
    finally:
        for one in training:
            one.training = True
