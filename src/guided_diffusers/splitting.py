"""Guidance as a part of its own beside the scheduler's step, and fewer questions to it.

In z = x / alpha and s = sigma / alpha, with eps what the network predicts and e = sigma grad_x log p(y | x) what
guidance takes from it, the guided path without noise is

    dz/ds = eps(z, s) - e(z, s)

Split as z = y + c,

    dy/ds = eps(y + c, s)  is the scheduler's,        dc/ds = -e(y + c, s)  is guidance's.

The scheduler sees y and eps alone: nothing that it extrapolates, corrects or keeps from step to step has guidance in
it, so that any scheduler, of any order, can do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from math import log

import torch
from diffusers import SchedulerMixin

from .guidance import Guidance, NoiseAwareGuidance, StepContext, total_score
from .noise import NoiseLevel, noise_levels, sampling_timesteps, stepper

#: s_n / s_{n+1} beyond which guidance at a step's end is no second opinion on the whole of it; with 4, strang diverged
#: in 5 steps at scale 10 (`examples/benchmark_quality_cost.py --part solvers`)
STEEPEST = 2.0
#: and beyond which Heun's corrector, (s_n / s_{n+1} - 1) / 2 > 1, takes away more than was added
OVERSHOOTS = 3.0
#: by how much an interval between two questions may be longer than the one before it, in log s
GROWTH = 2.0


class OperatorSplitting:
    """The part c of a run's samples that guidance has made, (B, C, H, W).

        lie_trotter    c_{n+1} = c_n + w_n e_n                         order 1
        strang         c_{n+1} = c_n + w_n (e_n + e_{n+1}) / 2         order 2, or the scheduler's where that is 1

    with w_n = s_n - s_{n+1} without noise, and as `step_weights` with it. They are the splittings of Wizadwongsa &
    Suwajanakorn 2023, "Accelerating guided diffusion sampling with splitting numerical methods", but both parts of a
    step begin at one sample, at which network and terms are asked once; so a multi-step scheduler's history is of the
    guided path, and any term can be asked. e_{n+1} is taken where c_n + w_n e_n leads to. Where guidance begins or ends
    within the run, strang does so half a step earlier.

    In very few steps s falls so far in one that not all of this holds. Beyond `STEEPEST`, e_{n+1} says little of the
    whole step, and strang does as lie_trotter. Beyond `OVERSHOOTS`, a scheduler that asks the network twice in a step,
    as Heun, sees c_n until the step ends: to the network at s_{n+1}, what was just added is noise, and Heun would take
    it away (s_n / s_{n+1} - 1) / 2 times over.

    Args:
        algorithm: "lie_trotter" or "strang".
        scheduler: after `set_timesteps`; it is only read.
        levels: its `noise_levels`.
        eta: as of the pipeline's call.

    Raises:
        ValueError: for a scheduler that clips or thresholds x0, which would clip what isn't x0.
    """

    def __init__(
        self, algorithm: str, scheduler: SchedulerMixin, levels: Sequence[NoiseLevel], eta: float
    ):
        clips = [name for name in ("clip_sample", "thresholding") if scheduler.config.get(name)]
        if clips:
            raise ValueError(
                f"guidance_algorithm={algorithm!r}: {type(scheduler).__name__} has {clips[0]}=True, which "
                "is for samples without guidance in them; make it False, and use clip_x0=True instead"
            )
        assert algorithm in ("lie_trotter", "strang"), algorithm
        self.levels, self.halves = levels, algorithm == "strang"
        self.weights = step_weights(scheduler, levels, eta)
        s = [*(level.sigma / level.alpha for level in levels), 0.0]
        order, count = (
            getattr(scheduler, "order", 1),
            len(levels),
        )  # in Diffusers, questions of a step
        again = [
            i + 1 < count and ((i + 1) % order > 0 or s[i + 1] == s[i + 2]) for i in range(count)
        ]
        falls = [
            (s[i - 1 if i and again[i - 1] else i], s[i + 2 if again[i] else i + 1])
            for i in range(count)
        ]
        self.steep = [one > STEEPEST * following for one, following in falls]
        self.hides = [
            again[i] and one > OVERSHOOTS * following for i, (one, following) in enumerate(falls)
        ]
        self.c: float | torch.Tensor = 0.0
        self.seen: float | torch.Tensor = 0.0  # what of it is in the samples
        self._before: tuple[float | torch.Tensor, float, torch.Tensor] | None = (
            None  # c, w, e of the question before
        )

    def asks(self, index: int) -> bool:
        """Whether what guidance says at this question has an effect: none at Heun's second, but on a half of strang."""
        return self.weights[index] != 0 or (self._before is not None and self._before[1] != 0)

    def unguided(
        self,
        index: int,
        output: torch.Tensor,
        sample: torch.Tensor,
        score_shift: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and the sample that the scheduler gets, eps and y; c goes on over the step.

        Args:
            output: the network's, at `sample` (B, C, H, W).
            score_shift: what guidance adds to the score there; None: nothing.
        """
        level = self.levels[index]
        own = sample - level.alpha * self.seen
        if level.b:
            output = level.output(own, level.x0(sample, output) - self.seen).to(output.dtype)
        e = torch.zeros_like(sample) if score_shift is None else level.sigma * score_shift
        c, w = self.c, self.weights[index]
        if self._before is not None:
            its_c, its_w, its_e = self._before
            c = its_c + its_w / 2 * (its_e + e)
        self.c = c + w * e
        if not self.hides[index]:
            self.seen = self.c
        self._before = (c, w, e) if self.halves and not self.steep[index] else None
        return output, own

    def guided(self, index: int, own: torch.Tensor) -> torch.Tensor:
        """The sample after the step, from the scheduler's."""
        alpha = self.levels[index + 1].alpha if index + 1 < len(self.levels) else 1.0
        return (own + alpha * self.seen).to(own.dtype)


def step_weights(
    scheduler: SchedulerMixin, levels: Sequence[NoiseLevel], eta: float = 0.0
) -> list[float]:
    """w of each step: s (1 - r), where moving the predicted eps by -e, and so x0 by s e, moves the next z by w e.

    r is what the scheduler makes of a z where x0 = 0: s' / s without noise, and (s' / s)^2 with all of it, as DDPM. It
    is read off a run with one huge number, beside which the noise is nothing; where the step forgets it (a consistency
    model's x0, with new noise), r is 0. A weight below 1e-4 s, of a step that only corrects the one before, is 0.
    """
    probe, generator = deepcopy(scheduler), torch.Generator().manual_seed(0)
    vars(probe).update(
        {
            name: value.cpu()
            for name, value in vars(probe).items()
            if isinstance(value, torch.Tensor)
        }
    )
    noise_levels(probe)
    step = stepper(probe, generator, eta, 1)
    x, weights = torch.full((1, 1, 1, 1), 1e20, dtype=torch.float64), []
    for index, (level, t) in enumerate(zip(levels, sampling_timesteps(probe), strict=True)):
        if hasattr(probe, "scale_model_input"):
            probe.scale_model_input(x, t)  # or some warn
        alpha = levels[index + 1].alpha if index + 1 < len(levels) else 1.0
        after = step(
            level.output(x, torch.zeros_like(x)) if level.b else torch.zeros_like(x), index, x
        ).double()
        r = float(after / alpha) / float(x / level.alpha)
        if abs(r) < 1e-5:
            r, after = 0.0, torch.full_like(x, 1e20)
        weights.append(level.sigma / level.alpha * (1 - r) if abs(1 - r) > 1e-4 else 0.0)
        x = after
    return weights


class GuidanceReuse:
    """Which steps, and which images at them, ask the terms, and what stands for their answers elsewhere.

    Kept are e = sigma * g, by which guidance moves the predicted eps: from step to step it changes less than the score
    (by 1/sigma) or the predicted x0 (by sigma). Between questions it is extrapolated from the last two, straight over
    log s (after one, it is held):

        e(s) = e_1 + (e_1 - e_0) log(s / s_1) / log(s_1 / s_0)

    Dinh et al. 2024, "Compress guidance in conditional diffusion sampling", ask at every k-th step.

    Args:
        levels: of the run's steps.
        every: ask at every k-th of the steps at which guidance acts.
        tolerance: instead, ask an image's terms again where what its guidance has turned meanwhile would move the
            sample by more, in the units of x0, as root mean square over its values; estimated from the last two answers
            as sum (s - s') log(s_1 / s) rms(e_1 - e_0) / log(s_0 / s_1) over the steps since; but the estimate is
            believed for no longer than `GROWTH` log(s_0 / s_1), since where all is noise nothing turns yet. The errors
            of the intervals between questions may add up or cancel. Terms that can't be asked for some images alone,
            all but `NoiseAwareGuidance`, are asked at each step, and those beside them.

    Raises:
        ValueError: for other values.
    """

    def __init__(
        self, levels: Sequence[NoiseLevel], every: int = 1, tolerance: float | None = None
    ):
        if every != int(every) or every < 1:
            raise ValueError(f"guidance_every={every!r}: a whole number from 1 on is allowed")
        if tolerance is not None and not 0 < tolerance < float("inf"):
            raise ValueError(
                f"guidance_tolerance={tolerance!r}: a positive number, or None, is allowed"
            )
        if tolerance is not None and every != 1:
            raise ValueError(
                f"guidance_every={every}, guidance_tolerance={tolerance}: only one is allowed"
            )
        self.levels, self.every, self.tolerance = levels, every, tolerance
        self.log_s = [
            log(level.sigma / level.alpha) if level.sigma else -float("inf") for level in levels
        ]
        s = [level.sigma / level.alpha for level in levels] + [0.0]
        self.lengths = [max(one - following, 0.0) for one, following in pairwise(s)]
        self._active: list[Guidance] = []
        self._acted = 0  # how many steps ago they began
        self._last: torch.Tensor | None = None  # e_1, (B, C, H, W)
        self._slope: torch.Tensor | None = None  # (e_1 - e_0) / log(s_1 / s_0)
        self._at = torch.zeros(0)  # log s_1 of each image, (B,)
        self._turning = torch.zeros(0)  # rms of the slope, infinite before there is one
        self._believed = torch.zeros(0)  # how far below log s_1
        self._error = torch.zeros(0)  # the estimate so far

    def rows(self, index: int, images: int, active: Sequence[Guidance]) -> torch.Tensor | None:
        """Which of the images ask at this step, where `active` are the terms that act: their numbers, rising. None:
        all, and their answers aren't kept.
        """
        if self.tolerance is not None and not all(
            isinstance(term, NoiseAwareGuidance) for term in active
        ):
            self._active = []
            return None
        everyone = torch.arange(images)
        if self._active != list(active):  # the first step, or one at which a term begins or ends
            self._active, self._last, self._acted = list(active), None, 0
            self._at, self._error = (
                torch.zeros(images, dtype=torch.float64),
                torch.zeros(images, dtype=torch.float64),
            )
            self._turning = torch.full((images,), float("inf"), dtype=torch.float64)
            self._believed = torch.full_like(self._turning, float("inf"))
            return everyone
        self._acted += 1
        if self.tolerance is None:
            return everyone if self._acted % self.every == 0 else everyone[:0]
        since = self._at - self.log_s[index]
        self._error += torch.where(since > 0, self._turning * since, 0.0) * self.lengths[index]
        # an interval that grew just so counts, whatever the rounding of its logarithms
        unknown = self._turning.isinf() | (since > self._believed - 1e-9)
        return everyone[(self._error > self.tolerance) | unknown]

    def score(
        self, asked: Sequence[Guidance], step: StepContext, rows: torch.Tensor
    ) -> torch.Tensor:
        """What guidance adds to the score at this step: the terms' answer for the images `rows`, for the others what
        stands for it.

        Args:
            asked: the terms; none where `rows` is empty.
        """
        if len(rows):
            self._keep(step, rows, total_score(*select(asked, step, rows)))
        passed = (self.log_s[step.index] - self._at).to(self._last, non_blocking=True)
        passed = passed.reshape(-1, *[1] * (self._last.ndim - 1))
        return (self._last + passed * self._slope) / step.level.sigma

    def _keep(self, step: StepContext, rows: torch.Tensor, score: torch.Tensor) -> None:
        now, e = self.log_s[step.index], step.level.sigma * score
        if self._last is None:
            self._last, self._slope, self._at = (
                e,
                torch.zeros_like(e),
                torch.full_like(self._at, now),
            )
            return
        there = rows.to(e.device, non_blocking=True)
        passed = now - self._at[rows]
        moved = passed != 0  # a scheduler of second order asks twice at one level
        over, along = (
            one.to(e.device, non_blocking=True).reshape(-1, *[1] * (e.ndim - 1))
            for one in (passed.to(e.dtype), moved)
        )
        slope = torch.where(
            along, (e - self._last[there]) / torch.where(along, over, 1.0), self._slope[there]
        )
        self._last, self._slope = (
            self._last.index_copy(0, there, e),
            self._slope.index_copy(0, there, slope),
        )
        self._at[rows], self._error[rows] = now, 0.0
        if self.tolerance is not None:
            turning = (
                slope.flatten(1).square().mean(1).sqrt().cpu().double()
            )  # here the host waits for an accelerator
            self._turning[rows] = torch.where(moved, turning, self._turning[rows])
            self._believed[rows] = torch.where(moved, -GROWTH * passed, self._believed[rows])


def select(
    terms: Sequence[NoiseAwareGuidance], step: StepContext, rows: torch.Tensor
) -> tuple[Sequence[Guidance], StepContext]:
    """Terms and step of some of the images."""
    count = len(step.sample)
    if len(rows) == count:
        return terms, step
    there = rows.to(step.sample.device, non_blocking=True)
    return [term.select(rows.tolist(), count) for term in terms], replace(
        step, sample=step.sample[there], x0=step.x0[there], graph=None
    )
