"""A run of steps that somebody else's loop makes: which step it is, and what its network's output becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils.logging import get_logger

from .guidance import FiniteCheck, GuidanceSum, StepContext
from .noise import clipping_warning, noise_levels, sampling_timesteps, split_variance

logger = get_logger(__name__)


class Run:
    """One run of a scheduler through its timesteps: which step is it, at which noise level?

    Args:
        scheduler: after `set_timesteps`, and after `set_begin_index` where the run starts midway. It is only read.
        timestep: the run's first, where that is known.
    """

    def __init__(self, scheduler: SchedulerMixin, timestep: Any = None):
        self.timesteps = scheduler.timesteps  # held, so that another run's are another object
        probe = copy(scheduler)  # reading the levels moves its position
        if "_step_index" in vars(probe):
            probe._step_index = None
        self.levels = noise_levels(probe)
        self.numbers: list[float] = sampling_timesteps(scheduler).tolist()
        self.doubled: bool | None = (
            None  # whether the pipeline steps each image twice; None: not known yet
        )
        first, number = getattr(scheduler, "begin_index", None), number_of(timestep)
        if (
            first is None and number in self.numbers
        ):  # of a duplicated first timestep some schedulers take the second
            first = self.numbers.index(number)
            if hasattr(scheduler, "index_for_timestep"):
                first = int(scheduler.index_for_timestep(self.timesteps[first]))
        self.first = first or 0
        self.last = self.first - 1

    @property
    def count(self) -> int:
        """How many steps the run has."""
        return len(self.numbers) - self.first

    def next(self, number: float | None) -> int:
        """Which step of the schedule is the next one at this timestep; the next of all if there is none."""
        found = [index for index, one in enumerate(self.numbers) if one == number]
        return next(
            (index for index in found if index > self.last), found[0] if found else self.last + 1
        )

    def step(self, timestep: Any) -> int:
        """Go on to that step.

        Raises:
            ValueError: if there is none at `timestep`.
        """
        number = number_of(timestep)
        index = self.next(number)
        if index >= len(self.numbers) or self.numbers[index] != number:
            raise ValueError(
                f"timestep {number} is none of the scheduler's {self.numbers}, so its noise "
                "level isn't known"
            )
        self.last = index
        return index

    def acting(self, terms: GuidanceSum, index: int) -> GuidanceSum:
        """The terms that act at a step."""
        return (
            terms.at(index - self.first, self.count, self.levels[index])
            if index < len(self.levels)
            else GuidanceSum()
        )


def number_of(timestep: Any) -> float | None:
    """A timestep, a number or one a sample, as a number."""
    return timestep.flatten()[0].item() if isinstance(timestep, torch.Tensor) else timestep


def guided(
    terms: GuidanceSum,
    run: Run,
    index: int,
    output: torch.Tensor,
    sample: torch.Tensor,
    check: FiniteCheck,
    predict: Callable[..., torch.Tensor],
    others: Sequence[torch.Tensor] = (),
    decode: Callable[[torch.Tensor], torch.Tensor] = lambda x0: x0,
    repeats: int = 1,
) -> torch.Tensor:
    """What a network's output becomes under the terms that act at step `index` of the run.

    Args:
        output: (B, C or 2C, ...), the latter with a learned variance, which stays.
        sample: (B, C, ...).
        check: is told of the step.
        predict: a sample's output as a differentiable function, that may be given another network.
        others: outputs for the conditions of the terms.
        repeats: how many times the rows of `output` and `sample` hold the images.
    """
    level, number = run.levels[index], run.numbers[index]
    prediction, variance = split_variance(output, sample.shape[1])
    images = len(sample) // repeats
    wide = sample[:images].to(torch.promote_types(sample.dtype, torch.float32))
    step = StepContext(
        wide,
        level.x0(wide, prediction[:images]),
        lambda x, *network: level.x0(x, predict(x, *network)),
        level,
        index - run.first,
        run.count,
        number,
        tuple(level.x0(wide, other) for other in others),
        decode,
    )
    score = terms.score(step)
    prediction = level.corrected(prediction, score.repeat(repeats, *[1] * (score.ndim - 1)))
    check(step, score, prediction)
    return prediction if variance is None else torch.cat([prediction, variance], dim=1)


def finite_check(terms: GuidanceSum) -> FiniteCheck:
    return FiniteCheck(
        next((p.dtype for module in terms.modules() for p in module.parameters()), torch.float32)
    )


def check_parts(scheduler: SchedulerMixin, terms: GuidanceSum, device: torch.device) -> None:
    """Warn of a scheduler that spoils guided samples, refuse a network that is elsewhere than the samples.

    Raises:
        ValueError: for one.
    """
    if warning := clipping_warning(scheduler):
        logger.warning(warning)
    for module in terms.modules():
        devices = {p.device for p in module.parameters()}
        if (
            devices and device not in devices and not hasattr(module, "_hf_hook")
        ):  # accelerate moves those
            raise ValueError(
                f"guidance: {type(module).__name__} is on {sorted(map(str, devices))}, the pipeline's "
                f"samples are on {device}; move it there"
            )
