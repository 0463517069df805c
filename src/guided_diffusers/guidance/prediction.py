"""Guidance by the difference of two predictions: classifier-free guidance and autoguidance."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch

from .contract import Guidance, Scale, Step, check_evaluating


class NullGuidance(Guidance):
    """`ClassifierFreeGuidance` of class labels, without its options.

    Args:
        null: the class label of no condition.
    """

    acts_on_noise = True

    def __init__(self, null: int, scale: Scale):
        super().__init__(scale)
        self.conditions = ({"class_labels": torch.tensor([null])},)

    def guided(self, step: Step) -> torch.Tensor:
        """The predicted x0, away from what it is without the condition."""
        return step.x0 + self.scale_at(step) * (step.x0 - step.others[0])

    def score(self, step: Step) -> torch.Tensor:
        x0 = torch.where(
            self.scale_at(step) == 0, step.x0, self.guided(step)
        )  # off, for one image as for all
        return step.level.score_shift(x0 - step.x0)


class ClassifierFreeGuidance(NullGuidance):
    """Away from what the network predicts without the condition: adds `scale * (score(x_t | c) - score(x_t))`.

    Ho & Salimans 2022, "Classifier-free diffusion guidance", eq. 6, for a network that was trained with its condition
    dropped at times, so that it knows both. The two predictions come from one call of the network with a batch twice as
    long. In terms of the predicted x0:

        x0 = x0(c) + scale (x0(c) - x0(null))

    Args:
        null: what the network is told for no condition: its null class label, or a mapping of its arguments, such as
            {"encoder_hidden_states": (1 or B, tokens, width)} of an empty prompt.
        scale: 0 is off: the conditional network. GLIDE, Imagen and Diffusers count from 1: their `guidance_scale` is
            1 + this.
        rescale: how much of the standard deviation of the network's output, an image, is put back to what it is without
            guidance, 0 (off) to 1 (Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed",
            section 3.4).
        threshold: dynamic thresholding of the guided x0, of data in [-1, 1]: x0 is clipped to [-s, s] and divided by s,
            the larger of 1 and this quantile of |x0| in the image, in (0, 1] (Saharia et al. 2022, Imagen, section 2.3:
            0.995). None: off.
        start, stop, sigma_interval: when it acts, as in `Guidance`.

    Raises:
        ValueError: for other values.
    """

    def __init__(
        self,
        null: int | Mapping[str, Any],
        scale: Scale = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        sigma_interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        threshold: float | None = None,
    ):
        Guidance.__init__(self, scale, start, stop, sigma_interval)
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale={rescale!r}: 0 (off) to 1 is allowed")
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold!r}: above 0, up to 1, or None is allowed")
        if not isinstance(null, Mapping) and (
            not isinstance(null, Integral) or isinstance(null, bool) or null < 0
        ):
            raise ValueError(
                f"null={null!r}: a class label, 0 or above, or a mapping of the network's arguments is "
                "allowed"
            )
        self.rescale, self.threshold = rescale, threshold
        self.conditions = (
            dict(null) if isinstance(null, Mapping) else {"class_labels": torch.tensor([null])},
        )

    def guided(self, step: Step) -> torch.Tensor:
        level, x0 = step.level, super().guided(step)
        dims = tuple(range(1, x0.ndim))
        if self.rescale and level.b:  # at a consistency model's boundary the output has no say
            output = level.output(step.sample, x0)
            factor = level.output(step.sample, step.x0).std(dims, keepdim=True) / output.std(
                dims, keepdim=True
            )
            x0 = level.x0(step.sample, (self.rescale * factor + 1 - self.rescale) * output)
        if self.threshold is not None:
            s = (
                x0.abs()
                .flatten(1)
                .quantile(self.threshold, dim=1)
                .clamp(min=1)
                .reshape(-1, *[1] * len(dims))
            )
            x0 = x0.clamp(-s, s) / s
        return x0


class ModelGuidance(Guidance):
    """Away from what a worse network predicts: adds `scale * (score of the network - score of the worse one)`.

    Karras et al. 2024, "Guiding a diffusion model with a bad version of itself" (autoguidance), eq. 3: the worse one is
    smaller or less trained, told the same condition. It is one more call, of the worse network.

    Args:
        network: called as the pipeline's own is, and predicts the same (epsilon, v, ...).
        scale: 0 is off; the paper's guidance weight is 1 + this.
        start, stop, sigma_interval: when it acts, as in `Guidance`.
    """

    acts_on_noise = True

    def __init__(
        self,
        network: torch.nn.Module,
        scale: Scale = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        sigma_interval: tuple[float, float] | None = None,
    ):
        super().__init__(scale, start, stop, sigma_interval)
        check_evaluating(network)
        self.network = network

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.network,)

    def score(self, step: Step) -> torch.Tensor:
        worse = step.predict(step.sample, self.network)
        return self.scale_at(step) * step.level.score_shift(step.x0 - worse)
