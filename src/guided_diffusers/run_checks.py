"""Checks of a run: guidance and images are finite, and no term overshoots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import hypot, sqrt
from typing import Any

import torch
from diffusers.utils.logging import get_logger

from .checks import shown
from .guidance import Guidance, GuidanceSum, NoiseAwareGuidance, StepContext
from .noise import NoiseLevel

logger = get_logger("guided_diffusers.guider")  # of all warnings of a run
#: values of a sample, over sqrt(alpha^2 + sigma^2), of which no network is trained; noise has 5
MAX_SAMPLE = 50.0
#: of a callback's latents that have weights
ONLY_READ = "whose weights are unknown: with particles it may only read them"
#: width of [-1, 1], the range of images; latents, of about unit variance, are hardly wider
DATA_RANGE = 2.0


def check_images(images: torch.Tensor, place: str) -> None:
    """Check a batch of images or final samples; an accelerator is waited for once.

    Args:
        images: (B, ...).
        place: where they come from, for the message.

    Raises:
        FloatingPointError: for NaN or infinity, naming the images; its attribute `images` has their
            indices in the batch.
    """
    finite = images.detach().flatten(1).isfinite().all(1).tolist()
    failed = [row for row, is_finite in enumerate(finite) if not is_finite]
    if not failed:
        return
    cause = "look at the network's weights and the scheduler's config, or guide less"
    if images.dtype == torch.float16:
        cause = "float16 has a small range; use float32 or bfloat16"
    error = FloatingPointError(
        f"images {', '.join(map(str, failed))} of a batch of {len(finite)} are not finite {place}; "
        f"likely cause: {cause}"
    )
    error.images = failed
    raise error


def check_unit_variance(latents: torch.Tensor, level: NoiseLevel) -> None:
    """Warn of a starting sample, (B, C, ...), whose size is not that of its noise level; where
    images show, it may be any."""
    if level.sigma < 2 * level.alpha or latents[0].numel() < 64:
        return
    rms = latents.double().square().flatten(1).mean(1).sqrt() / hypot(level.alpha, level.sigma)
    if ((rms < 0.5) | (rms > 2)).any():
        logger.warning(
            "latents: their root mean square is %s; noise of unit variance is expected",
            ", ".join(f"{value:.3g}" for value in rms.tolist()[:5]),
        )


def check_unchanged(scheduler: Any, of_call: Any, timesteps: torch.Tensor) -> None:
    """Check that a callback left the call's scheduler and its timesteps alone.

    Raises:
        RuntimeError: if it didn't.
    """
    if scheduler is not of_call or scheduler.timesteps is not timesteps:
        raise RuntimeError(
            "callback_on_step_end: it exchanged the scheduler, or set its timesteps, within the call "
            "that steps with it; do so after the call"
        )


def replaced_latents(
    changed: Any,
    tensors: Mapping[str, Any],
    latents: torch.Tensor,
    weighted: torch.Tensor | None = None,
) -> torch.Tensor:
    """The latents after a callback.

    Args:
        changed: what the callback returned.
        tensors: what it got.
        latents: of the step.
        weighted: a copy, made before the callback, of latents that have weights, which no other
            latents have; None: they have none.

    Raises:
        ValueError: for anything but a dictionary whose "latents", if any, have the same shape, or
            for other tensors in it than it got, or other latents that have no weights, also if they were
            changed in place.
    """
    if weighted is not None and not torch.allclose(weighted, latents, 0, 0, equal_nan=True):
        raise ValueError(f"callback_on_step_end changed the latents in place, {ONLY_READ}")
    if changed is None:
        return latents
    if not isinstance(changed, Mapping):
        raise ValueError(
            f"callback_on_step_end returned {shown(changed)}; a dictionary or None is allowed"
        )
    other = [name for name in changed if name != "latents"]
    if without_effect := [n for n in other if changed[n] is not tensors.get(n, tensors)]:
        raise ValueError(
            f"callback_on_step_end returned other {shown(without_effect)}; only 'latents' has an "
            "effect"
        )
    replaced = changed.get("latents", latents)
    shape = getattr(replaced, "shape", None)
    if not isinstance(replaced, torch.Tensor) or shape != latents.shape:
        raise ValueError(
            f"callback_on_step_end returned latents that are a {type(replaced).__name__} of shape "
            f"{shape}; a torch.Tensor {tuple(latents.shape)} is allowed"
        )
    if weighted is not None and replaced is not latents:
        raise ValueError(f"callback_on_step_end returned other latents, {ONLY_READ}")
    return replaced


def _guide_dtype(terms: Sequence[Guidance]) -> torch.dtype:
    for module in GuidanceSum(terms).modules():
        for parameter in module.parameters():
            return parameter.dtype
    return torch.float32


class FiniteCheck:
    """Refuses non-finite guidance; on an accelerator, without a wait, when the run ends.

    Args:
        terms: the guidance, for the message.
    """

    def __init__(self, terms: Sequence[Guidance]):
        self.dtype = _guide_dtype(terms)
        names = ", ".join(dict.fromkeys(type(term).__name__ for term in terms))
        is_classifier = all(isinstance(term, NoiseAwareGuidance) for term in terms)
        self.guide = "the classifier" if is_classifier else f"a guidance term ({names})"
        self._steps: list[tuple[torch.Tensor, torch.dtype, str]] = []

    def __call__(self, step: StepContext, score: torch.Tensor, guided: torch.Tensor) -> None:
        """Record a step: its sample, the score shift and the guided output; on the CPU raise at
        once."""
        norm = (step.level.alpha**2 + step.level.sigma**2) ** 0.5
        largest = _largest(step.sample) / norm, _largest(score), _largest(guided)
        # `guided` may hold the images several times
        rows = torch.cat(largest).reshape(-1, len(step.sample))
        self._steps.append((rows, guided.dtype, _position(step)))
        if rows.device.type == "cpu":
            self.finish()

    def finish(self) -> None:
        """Check the recorded steps.

        Raises:
            FloatingPointError: for the first that is not finite, naming the images, the step, the
                timestep and the likely cause; its attribute `images` has the rows of all images
                that are not finite at a step.
        """
        steps, self._steps = self._steps, []
        message, images = "", set()
        for rows, dtype, position in steps:
            failed = (~rows.isfinite()).any(dim=0).nonzero().flatten().tolist()
            if failed and not message:
                cause = self._likely_cause(rows[:, failed[0]].tolist(), dtype)
                message = f"the guidance is not finite at {position}; likely cause: {cause}"
            images.update(failed)
        if images:
            error = FloatingPointError(message)
            error.images = sorted(images)
            raise error

    def _likely_cause(self, largest: Sequence[float], output_dtype: torch.dtype) -> str:
        """Of an image's largest values of the normalised sample, the score, the guided output."""
        sample, score, guided = largest[:3]
        if not math.isfinite(sample):
            return "the sample was not finite before: look at the network and the scheduler"
        if not math.isfinite(score) and self.dtype == torch.float16:
            return (
                f"the classifier computes in {self.dtype}, whose range is small: load it in float32"
            )
        if sample > MAX_SAMPLE:
            return (
                f"the sample left the range that the classifier knows, with values up to "
                f"{sample:.2g}: lower guidance_scale, take more steps or a first-order scheduler, "
                "or raise guidance_start"
            )
        if math.isnan(score):
            return (
                f"{self.guide} is not finite: its value or its gradient is NaN for a sample of an "
                f"ordinary size, up to {sample:.2g}; another scale doesn't help"
            )
        if not math.isfinite(score):
            return (
                "the gradient times the scale is infinite: lower guidance_scale, or look at the "
                "classifier's gradient"
            )
        if math.isnan(guided):
            return "the network's output is not finite: look at its weights"
        return (
            f"the guided output left the range of {output_dtype}: lower guidance_scale or load the "
            "unet in float32"
        )


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    """Largest absolute value of each row, (B,); NaN for a row with NaN."""
    return tensor.detach().abs().flatten(1).amax(dim=1)


class OvershootCheck:
    """Warns, once a run, of a term that moves x0 too far in a step; on an accelerator, without a
    wait, when the run ends.

    With s = sigma / alpha, a step to s' moves z = x / alpha = x0 + s eps by (s - s') sigma * score,
    its share of the shift of the predicted x0, s sigma * score. Above hypot(DATA_RANGE, s'), as
    root mean square over an image, there are no noisy images. In strong noise, larger shifts do no
    harm.

    Args:
        levels: of the run's steps.
        is_split: whether operator splitting is used, which the warning else recommends.
    """

    def __init__(self, levels: Sequence[NoiseLevel], is_split: bool):
        self.advice = "lower its scale or take more steps"
        if not is_split:
            self.advice += ", or use guidance_algorithm='lie_trotter' or 'strang'"
        s = [*(level.sigma / level.alpha for level in levels), 0.0]
        self.lengths = [start - end for start, end in pairwise(s)]
        self.limits = [hypot(DATA_RANGE, end) for end in s[1:]]
        self._steps: list[tuple[torch.Tensor, float, str, str]] = []
        self._warned = False

    def __call__(self, term: Guidance, step: StepContext, score: torch.Tensor) -> None:
        """Record a term's score at a step; on the CPU warn at once."""
        if self._warned:
            return
        factor = self.lengths[step.index] * step.level.sigma / sqrt(score[0].numel())
        largest = factor * torch.linalg.vector_norm(score.flatten(1), dim=1).amax()
        limit, name = self.limits[step.index], type(term).__name__
        self._steps.append((largest, limit, name, _position(step)))
        if largest.device.type == "cpu":
            self.finish()

    def finish(self) -> None:
        """Check the recorded steps."""
        steps, self._steps = self._steps, []
        for largest, limit, name, position in steps:
            if not self._warned and largest.item() > limit:
                self._warned = True
                logger.warning(
                    "guidance: %s overshoots at %s: it moves x0 of an image by %.3g, more than the "
                    "range of the data and the remaining noise, %.3g; %s",
                    *(name, position, largest.item(), limit, self.advice),
                )


def _position(step: StepContext) -> str:
    return (
        f"step {step.index} of {step.count} (timestep {step.timestep:g}, "
        f"sigma {step.level.sigma:.4g})"
    )
