"""Operator splitting of guidance and scheduler, and reuse of guidance between steps.

In z = x / alpha and s = sigma / alpha, with eps the network's prediction and e = sigma grad_x log
p(y | x) what guidance subtracts from it, the guided path without noise is

    dz/ds = eps(z, s) - e(z, s)

It is split as z = y + c:

    dy/ds = eps(y + c, s)  by the scheduler,        dc/ds = -e(y + c, s)  by this module.

The scheduler gets y and eps only. Nothing that it extrapolates, corrects or stores contains
guidance, so any scheduler of any order can be used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import log

import torch
from diffusers import SchedulerMixin

from .checks import check_number
from .guidance import Guidance, NoiseAwareGuidance, StepContext, total_score
from .noise import (
    NoiseLevel,
    probe_copy,
    reads_variance,
    sampling_timesteps,
    scale_model_input,
    step_fn,
)

#: s_n / s_{n+1} above which guidance at a step's end is not used for the whole step; with 4, strang
#: diverged in 5 steps at scale 10 (`examples/benchmarks/quality_cost.py --part solvers`)
MAX_STRANG_RATIO = 2.0
#: s_n / s_{n+1} above which Heun's corrector, (s_n / s_{n+1} - 1) / 2 > 1, removes more than was
#: added
MAX_HEUN_RATIO = 3.0
#: how much longer an interval between two evaluations may be than the previous one, in log s
MAX_GROWTH = 2.0


class OperatorSplitting:
    """The part c of a run's samples that guidance has made, (B, C, H, W).

        lie_trotter    c_{n+1} = c_n + w_n e_n                    order 1
        strang         c_{n+1} = c_n + w_n (e_n + e_{n+1}) / 2    order 2, or the scheduler's if that is 1

    with w_n = s_n - s_{n+1} without noise, and as in `step_weights` with noise. These are the
    splittings of Wizadwongsa & Suwajanakorn 2023, "Accelerating guided diffusion sampling with
    splitting numerical methods", except that both parts of a step start at one sample, at which
    network and terms are evaluated once. A multi-step scheduler's history is therefore of the
    guided path, and any term can be used. e_{n+1} is evaluated where c_n + w_n e_n leads. Where
    guidance starts or stops within the run, strang does so half a step earlier.

    In very few steps, s falls too far in one step for this. Above `MAX_STRANG_RATIO`, e_{n+1} says
    little about the whole step, and strang does the step as lie_trotter. Above `MAX_HEUN_RATIO`, a
    scheduler that evaluates the network twice in a step, as Heun, gets c_n until the step ends: to
    the network at s_{n+1}, what was just added is noise, and Heun would remove it (s_n / s_{n+1} -
    1) / 2 times over.

    Args:
        algorithm: "lie_trotter" or "strang".
        scheduler: after `set_timesteps`; it is only read.
        levels: its `noise_levels`.
        eta: as in the pipeline's call.

    Raises:
        ValueError: for a scheduler that clips or thresholds x0: it would clip a sample without its
            guidance.
    """

    def __init__(
        self,
        algorithm: str,
        scheduler: SchedulerMixin,
        levels: Sequence[NoiseLevel],
        eta: float,
    ):
        for name in ("clip_sample", "thresholding", "clip_denoised"):
            if scheduler.config.get(name):
                raise ValueError(
                    f"guidance_algorithm={algorithm!r}: {type(scheduler).__name__} has "
                    f"{name}=True, which is for samples without guidance in them; make it False, "
                    "and use clip_x0=True instead"
                )
        assert algorithm in ("lie_trotter", "strang"), algorithm
        self.levels, self.second_order = levels, algorithm == "strang"
        self.weights = step_weights(scheduler, levels, eta)
        self._find_steep_steps(getattr(scheduler, "order", 1))
        self.c: float | torch.Tensor = 0.0
        self.visible: float | torch.Tensor = 0.0  # the part of c that is in the samples
        #: c, w, e of the previous evaluation, if strang still has half of its step to correct
        self._previous: tuple[float | torch.Tensor, float, torch.Tensor] | None = None

    def _find_steep_steps(self, order: int) -> None:
        """Note the steps in which s falls beyond the limits; `order`: evaluations a step, as
        Diffusers counts."""
        s = [*(level.sigma / level.alpha for level in self.levels), 0.0]
        count = len(self.levels)
        self.steep, self.hidden = [], []
        second_follows = False
        for i in range(count):
            start = s[i - 1] if second_follows else s[i]  # the previous one was the step's first
            second_follows = i + 1 < count and ((i + 1) % order > 0 or s[i + 1] == s[i + 2])
            end = s[i + 2] if second_follows else s[i + 1]
            self.steep.append(start > MAX_STRANG_RATIO * end)
            self.hidden.append(second_follows and start > MAX_HEUN_RATIO * end)

    def needs_guidance(self, index: int) -> bool:
        """Whether guidance evaluated here changes the result: not in Heun's corrector, except for
        Strang's half."""
        return self.weights[index] != 0 or (self._previous is not None and self._previous[1] != 0)

    def split(
        self,
        index: int,
        output: torch.Tensor,
        sample: torch.Tensor,
        score_shift: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and sample for the scheduler, eps and y; c is advanced over the step.

        Args:
            output: the network's output at `sample` (B, C, H, W).
            score_shift: what guidance adds to the score there; None: nothing.
        """
        level = self.levels[index]
        y = sample - level.alpha * self.visible
        if level.b:
            output = level.output(y, level.x0(sample, output) - self.visible).to(output.dtype)
        e = torch.zeros_like(sample) if score_shift is None else level.sigma * score_shift
        c, w = self.c, self.weights[index]
        if self._previous is not None:
            previous_c, previous_w, previous_e = self._previous
            c = previous_c + previous_w / 2 * (previous_e + e)
        self.c = c + w * e
        if not self.hidden[index]:
            self.visible = self.c
        self._previous = (c, w, e) if self.second_order and not self.steep[index] else None
        return output, y

    def merge(self, index: int, y: torch.Tensor) -> torch.Tensor:
        """The sample after the step, y + c, from the scheduler's y."""
        last = index + 1 == len(self.levels)
        alpha = 1.0 if last else self.levels[index + 1].alpha
        return (y + alpha * self.visible).to(y.dtype)


def step_weights(
    scheduler: SchedulerMixin, levels: Sequence[NoiseLevel], eta: float = 0.0
) -> list[float]:
    """w of each step: s (1 - r); shifting the predicted eps by -e, and so x0 by s e, shifts the
    next z by w e.

    r is the factor that the scheduler applies to a z with x0 = 0: s' / s without noise, and (s' /
    s)^2 with all of it, as DDPM. It is measured in a run with one huge number, beside which the
    noise is nothing. Where a step forgets that number (a consistency model's x0, with new noise), r
    is 0. A weight below 1e-4 s, of a step that only corrects the previous one, is 0.
    """
    probe, generator = probe_copy(scheduler), torch.Generator().manual_seed(0)
    step = step_fn(probe, generator, eta, 1)
    huge, weights = torch.full((1, 1, 1, 1), 1e20, dtype=torch.float64), []
    x = huge
    for index, (level, t) in enumerate(zip(levels, sampling_timesteps(probe), strict=True)):
        scale_model_input(probe, x, t)  # some schedulers warn without it
        zero = torch.zeros_like(x)
        output = level.output(x, zero) if level.b else zero
        if reads_variance(probe):
            output = torch.cat([output, zero], dim=1)
        next_x = step(output, index, x).double()
        next_alpha = levels[index + 1].alpha if index + 1 < len(levels) else 1.0
        r = float(next_x / next_alpha) / float(x / level.alpha)
        if abs(r) < 1e-5:
            r, next_x = 0.0, huge
        s = level.sigma / level.alpha
        weights.append(s * (1 - r) if abs(1 - r) > 1e-4 else 0.0)
        x = next_x
    return weights


class GuidanceReuse:
    """Decides when guidance is evaluated, and extrapolates it otherwise.

    Stored is e = sigma * g, by which guidance shifts the predicted eps: from step to step it
    changes less than the score (by 1/sigma) or the predicted x0 (by sigma). Between evaluations it
    is extrapolated linearly in log s from the last two (after one, it is constant):

        e(s) = e_1 + (e_1 - e_0) log(s / s_1) / log(s_1 / s_0)

    Dinh et al. 2024, "Compress guidance in conditional diffusion sampling", evaluate at every k-th
    step.

    Args:
        levels: of the run's steps.
        every: evaluate at every k-th of the steps at which guidance is active.
        tolerance: instead, evaluate an image's terms only when the estimated extrapolation error
            exceeds this, in the units of x0, as root mean square over its values. The estimate is
            the sum over the steps since of (s - s') log(s_1 / s) rms(e_1 - e_0) / log(s_0 / s_1).
            It is used for at most `MAX_GROWTH` log(s_0 / s_1), since in pure noise nothing changes
            yet. The errors of several intervals may add up or cancel. If any active term isn't a
            `NoiseAwareGuidance`, all terms are evaluated at every step.

    Raises:
        ValueError: for other values.
    """

    def __init__(
        self, levels: Sequence[NoiseLevel], every: int = 1, tolerance: float | None = None
    ):
        every = check_number("guidance_every", every, 1, integer=True)
        if tolerance is not None:
            tolerance = check_number("guidance_tolerance", tolerance, 0, above=True)
        if tolerance is not None and every != 1:
            raise ValueError(
                f"guidance_every={every}, guidance_tolerance={tolerance}: only one is allowed"
            )
        self.every, self.tolerance = every, tolerance
        s = [level.sigma / level.alpha for level in levels]
        self.log_s = [log(value) if value else -float("inf") for value in s]
        self.lengths = [max(start - end, 0.0) for start, end in pairwise([*s, 0.0])]
        self._active: list[Guidance] = []
        self._steps = 0  # since these terms became active
        # of each image, (B, ...):
        self._e: torch.Tensor | None = None  # e_1
        self._slope: torch.Tensor | None = None  # (e_1 - e_0) / log(s_1 / s_0)
        self._log_s = torch.zeros(0)  # log s_1
        self._slope_rms = torch.zeros(0)  # infinite before there is a slope
        self._reach = torch.zeros(0)  # how far below log s_1 the estimate is used
        self._error = torch.zeros(0)  # the estimate so far

    def images_to_evaluate(
        self, index: int, batch_size: int, active: Sequence[Guidance]
    ) -> torch.Tensor | None:
        """Indices of the images whose terms are evaluated at this step, rising.

        Args:
            active: the terms that have an effect at this step.

        Returns:
            The indices; None: all images, and nothing is stored.
        """
        if self.tolerance is not None:
            if not all(isinstance(term, NoiseAwareGuidance) for term in active):
                self._active = []
                return None
        everything = torch.arange(batch_size)
        if self._active != list(active):  # the first step, or a term starts or stops here
            self._restart(active, batch_size)
            return everything
        self._steps += 1
        if self.tolerance is None:
            return everything if self._steps % self.every == 0 else everything[:0]
        distance = self._log_s - self.log_s[index]
        change = torch.where(distance > 0, self._slope_rms * distance, 0.0)
        self._error += change * self.lengths[index]
        # 1e-9: an interval that grew by exactly MAX_GROWTH counts, whatever the rounding of its
        # logarithms
        unknown = self._slope_rms.isinf() | (distance > self._reach - 1e-9)
        return everything[(self._error > self.tolerance) | unknown]

    def _restart(self, active: Sequence[Guidance], batch_size: int) -> None:
        self._active, self._e, self._steps = list(active), None, 0
        self._log_s = torch.zeros(batch_size, dtype=torch.float64)
        self._error = torch.zeros_like(self._log_s)
        self._slope_rms = torch.full_like(self._log_s, float("inf"))
        self._reach = torch.full_like(self._log_s, float("inf"))

    def score(
        self,
        terms: Sequence[Guidance],
        step: StepContext,
        images: torch.Tensor,
        record: Callable[[Guidance, StepContext, torch.Tensor], object] = lambda *_: None,
    ) -> torch.Tensor:
        """Score shift at this step: evaluated for `images`, extrapolated for the others.

        Args:
            terms: to evaluate; none if `images` is empty.
            record: as of `total_score`.
        """
        if len(images):
            score = total_score(*_select(terms, step, images), record)
            self._store(step, images, score)
        distance = (self.log_s[step.index] - self._log_s).to(self._e, non_blocking=True)
        distance = distance.reshape(-1, *[1] * (self._e.ndim - 1))
        return (self._e + distance * self._slope) / step.level.sigma

    def _store(self, step: StepContext, images: torch.Tensor, score: torch.Tensor) -> None:
        log_s, e = self.log_s[step.index], step.level.sigma * score
        if self._e is None:
            self._e, self._slope = e, torch.zeros_like(e)
            self._log_s = torch.full_like(self._log_s, log_s)
            return
        on_device = images.to(e.device, non_blocking=True)
        distance = log_s - self._log_s[images]
        moved = distance != 0  # a second-order scheduler evaluates twice at one level
        shape = (-1, *[1] * (e.ndim - 1))
        divisor = distance.to(e.dtype).to(e.device, non_blocking=True).reshape(shape)
        has_slope = moved.to(e.device, non_blocking=True).reshape(shape)
        slope = (e - self._e[on_device]) / torch.where(has_slope, divisor, 1.0)
        slope = torch.where(has_slope, slope, self._slope[on_device])
        self._e = self._e.index_copy(0, on_device, e)
        self._slope = self._slope.index_copy(0, on_device, slope)
        self._log_s[images], self._error[images] = log_s, 0.0
        if self.tolerance is not None:
            rms = (
                slope.flatten(1).square().mean(1).sqrt().cpu().double()
            )  # waits for an accelerator
            self._slope_rms[images] = torch.where(moved, rms, self._slope_rms[images])
            self._reach[images] = torch.where(moved, -MAX_GROWTH * distance, self._reach[images])


def _select(
    terms: Sequence[NoiseAwareGuidance], step: StepContext, images: torch.Tensor
) -> tuple[Sequence[Guidance], StepContext]:
    """Terms and step of some of the images."""
    count = len(step.sample)
    if len(images) == count:
        return terms, step
    on_device = images.to(step.sample.device, non_blocking=True)
    part = replace(step, sample=step.sample[on_device], x0=step.x0[on_device], graph=None)
    return [term.select(images.tolist(), count) for term in terms], part
