"""The probability flow between images and noise, in both directions (Song et al. 2021,
"Score-based generative modeling through stochastic differential equations", eq. 13).

    x = alpha x0 + sigma eps,    dx = x0(x) dalpha + eps(x) dsigma

with the x0 and eps that the network predicts at x; in z = x / alpha and s = sigma / alpha this is
dz/ds = eps. `ProbabilityFlow` follows it from noise to images, as the scheduler of a guided run,
and `invert` from images to noise. Both take steps of Heun's method between the same noise levels,
so that a round trip closes: the error of a step there is nearly undone by the step back.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from math import atan, exp, hypot, log, tan
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin

from .noise import (
    EDM,
    NoiseLevel,
    first_step,
    is_flow,
    is_instance_by_name,
    noise_levels,
    prediction_type,
    sampling_timesteps,
    x0_coefficients,
)

#: log(sigma / alpha) of a run's levels is `GRID_WIDTH` tan(phi) with equidistant phi: the levels are
#: densest where noise and image are about equal, and pure noise, s = infinity, is not far
GRID_WIDTH = 2.0
#: fixed-point iterations of the first step away from the image
FIRST_STEP_ITERATIONS = 2
#: predictions of networks that jump to x0, and follow no flow
WITHOUT_FLOW = ("consistency", "trigflow")


class ProbabilityFlow:
    """A deterministic scheduler of second order for the network of any other scheduler.

    It has `num_inference_steps` steps from the noise level at which the other scheduler's run with
    as many steps has the fraction `strength` before it, down to the lowest noise level of the
    network's training, and then to its x0. Each but the last evaluates the network twice, as
    Diffusers' HeunDiscreteScheduler, but for any prediction and between levels that fit both ends
    of the run. Where a network counts timesteps, it gets fractional ones.

    Args:
        scheduler: the other one; it is only read.
        strength: fraction of the run, in (0, 1].

    Attributes:
        levels: noise level of each step, falling; the samples' space is the network's input.
        timesteps: the network's, as `HeunDiscreteScheduler` lists them: t0, t1, t1, t2, t2, ...

    Raises:
        ValueError: for a scheduler of a network that follows no flow; in `set_timesteps`, for a
            level that none is below.
    """

    order = 2
    init_noise_sigma = 1.0

    def __init__(self, scheduler: SchedulerMixin, strength: float = 1.0):
        prediction = prediction_type(scheduler)
        if prediction in WITHOUT_FLOW:
            raise ValueError(
                f"scheduler: the network of {type(scheduler).__name__} jumps to x0 and can't be "
                "inverted; a network that predicts epsilon, v, x0 or a flow is needed"
            )
        self.scheduler, self.strength = scheduler, strength
        self.config = {"prediction_type": prediction}
        if sigma_data := scheduler.config.get("sigma_data"):
            self.config["sigma_data"] = sigma_data
        self.levels: list[NoiseLevel] = []
        self.alpha = 1.0  # of the other scheduler's samples at the first level
        self.timesteps = torch.zeros(0)
        self._index = 0
        self._start: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Set the levels and timesteps of a run; see the class."""
        run = deepcopy(self.scheduler)
        run.set_timesteps(num_inference_steps)
        levels = noise_levels(run)
        first = first_step(run, len(levels), self.strength)
        count = len(range(first, len(levels), getattr(run, "order", 1)))
        timestep, lowest = network_timestep(self.scheduler)
        highest = levels[first].sigma / levels[first].alpha
        if highest < lowest * (1 - 1e-4):
            raise ValueError(
                f"strength={self.strength}: its noise, sigma/alpha={highest:.3g}, is less than the "
                f"lowest of the network's training, {lowest:.3g}; use more strength"
            )
        self.alpha = levels[first].alpha
        ratios = level_grid(highest, lowest, count)
        self.levels = [self._level(s) for s in ratios]
        steps = [timestep(level) for level in self.levels]
        steps = [t for t in steps for _ in range(2)][1:]
        self.timesteps = torch.tensor(steps, dtype=torch.float32, device=device)
        self.set_begin_index(0)

    def _level(self, s: float) -> NoiseLevel:
        """The level with this sigma / alpha, in the space of the network's input."""
        prediction, constants = self.config["prediction_type"], {}
        if is_flow(self.scheduler):
            alpha, sigma = 1 / (1 + s), s / (1 + s)
        elif prediction.startswith("edm"):
            alpha, sigma, constants = 1.0, s, {"sigma_data": self.config["sigma_data"]}
        else:
            alpha, sigma = 1 / hypot(1, s), s / hypot(1, s)
        return NoiseLevel(alpha, sigma, *x0_coefficients(prediction, alpha, sigma, **constants))

    def set_begin_index(self, index: int) -> None:
        """Start with entry `index` of `timesteps`."""
        self._index, self._start = index, None

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, _: Any = None) -> torch.Tensor:
        """The sample of an image and noise at the current step."""
        level = self.levels[(self._index + 1) // 2]
        return level.alpha * x0 + level.sigma * noise

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        """The network's input of a sample at a timestep."""
        if "sigma_data" not in self.config or not is_instance_by_name(self.scheduler, EDM):
            return sample
        entry = int((self.timesteps - timestep).abs().argmin())
        return sample / hypot(self.levels[(entry + 1) // 2].sigma, self.config["sigma_data"])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """The sample at the next of `timesteps`, or after the last the image, x0."""
        i, level = (self._index + 1) // 2, self.levels[(self._index + 1) // 2]
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        x0, eps = predicted(level, x, model_output)
        if self._index == 2 * len(self.levels) - 2:
            x = x0
        elif self._index % 2 == 0:
            self._start = x, x0, eps
            x = moved(x, level, self.levels[i + 1], x0, eps)
        else:
            x, start_x0, start_eps = self._start
            mean_x0, mean_eps = (start_x0 + x0) / 2, (start_eps + eps) / 2
            x = moved(x, self.levels[i - 1], level, mean_x0, mean_eps)
        self._index += 1
        return (x.to(sample.dtype),)


def predicted(
    level: NoiseLevel, x: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and eps of a network's output at x = alpha x0 + sigma eps."""
    x0 = level.x0(x, output)
    return x0, (x - level.alpha * x0) / level.sigma


def moved(
    x: torch.Tensor, start: NoiseLevel, end: NoiseLevel, x0: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """x + x0 dalpha + eps dsigma, from one level to another."""
    return x + (end.alpha - start.alpha) * x0 + (end.sigma - start.sigma) * eps


def level_grid(highest: float, lowest: float, count: int) -> list[float]:
    """`count` falling values of s = sigma / alpha; see `GRID_WIDTH`."""
    if count == 1:
        return [highest]
    first, last = (atan(log(s) / GRID_WIDTH) for s in (highest, lowest))
    inner = [first + i / (count - 1) * (last - first) for i in range(1, count - 1)]
    return [highest, *(exp(GRID_WIDTH * tan(phi)) for phi in inner), lowest]


def network_timestep(scheduler: SchedulerMixin) -> tuple[Callable[[NoiseLevel], float], float]:
    """The timestep, with fractions, of a scheduler's network at a noise level; and the lowest
    sigma / alpha of its training."""
    count = scheduler.config.get("num_train_timesteps") or 1000
    if is_flow(scheduler):
        inverted = scheduler.config.get("invert_sigmas")
        return lambda level: count * (level.alpha if inverted else level.sigma), 1 / (count - 1)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is not None and scheduler.config.get("timestep_type") != "continuous":
        table = table.double().cpu().clamp(2.0**-48, 1 - 2.0**-48)
        log_s, timesteps = 0.5 * ((1 - table).log() - table.log()), np.arange(len(table))
    else:  # what the scheduler itself has, in a long run
        run = deepcopy(scheduler)
        run.set_timesteps(count)
        ratios = [level.sigma / level.alpha for level in noise_levels(run)]
        kept = [i for i, s in enumerate(ratios) if s > 0][::-1]
        log_s = torch.tensor([log(ratios[i]) for i in kept])
        timesteps = sampling_timesteps(run).double().cpu()[kept].numpy()
    log_s = log_s.numpy()
    return (
        lambda level: float(np.interp(log(level.sigma / level.alpha), log_s, timesteps)),
        exp(float(log_s[0])),
    )


def invert(
    flow: ProbabilityFlow,
    x0: torch.Tensor,
    predict: Callable[[torch.Tensor, int], torch.Tensor],
) -> list[torch.Tensor]:
    """The samples that the flow takes to an image: at each of its levels, the noisiest first.

    The last step of `flow`, to the network's x0, is inverted by fixed-point iterations of

        x = alpha x0 + sigma eps(x)

    and the others by Heun's method.

    Args:
        flow: after `set_timesteps`.
        x0: the images or latents, (B, C, ...).
        predict: (sample, index of the level) -> the network's output.
    """
    levels = flow.levels
    last = len(levels) - 1

    def prediction(x: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return predicted(levels[i], x, predict(x, i))

    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    x = levels[last].alpha * x0
    for _ in range(FIRST_STEP_ITERATIONS):
        x = levels[last].alpha * x0 + levels[last].sigma * prediction(x, last)[1]
    samples = [x]
    for i in range(last, 0, -1):
        start = prediction(x, i)
        end = prediction(moved(x, levels[i], levels[i - 1], *start), i - 1)
        mean = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
        x = moved(x, levels[i], levels[i - 1], *mean)
        samples.append(x)
    return samples[::-1]
