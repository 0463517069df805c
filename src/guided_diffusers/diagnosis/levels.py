"""Noise levels of a sampling run at which a classifier is evaluated, and a reference gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor

from ..noise import (
    NoiseLevel,
    TrainedSchedule,
    module_config,
    noise_levels,
    prediction_type,
    sampling_timesteps,
    schedule_config,
    split_variance,
)
from ..utils import parameter_dtype

MAX_STEPS = 1000
MAX_TIMESTEPS_PER_STEP = 40
USUAL_STEPS = 20
MIN_START_RATIO = 10.0  # sigma / alpha above which every sampling run starts
BETA_OPTIONS = ("beta_schedule", "beta_start", "beta_end")


@dataclass(frozen=True)
class EvalLevel:
    """A step of a sampling run at which the classifier is evaluated.

    `fraction` is its position, 0 (pure noise) to 1 (last step); `index`, `timestep`: the scheduler's.
    """

    fraction: float
    index: int
    timestep: float
    level: NoiseLevel

    @property
    def ratio(self) -> float:
        """sigma / alpha."""
        return self.level.sigma / self.level.alpha


#: (x_t, label, eval_level) -> grad log p(y | x_t), (B, C, H, W)
Reference = Callable[[Tensor, Tensor, EvalLevel], Tensor]


class SamplingRun:
    """A long run of (a copy of) a scheduler, of 1000 steps at most, with the levels of a usual run.

    The longest one need not have them: with `timestep_spacing="leading"` all its timesteps may be
    0, or it may begin at a lower noise level than 20 steps do.

    Raises:
        ValueError: if there is no such run.
    """

    def __init__(self, scheduler: SchedulerMixin):
        prediction_type(scheduler)  # refuses one that can't be guided
        name, trained = type(scheduler).__name__, scheduler.config.get("num_train_timesteps")
        trained, reason = trained or MAX_STEPS, "its runs repeat a few timesteps"
        usual = _levels_of_run(copy.deepcopy(scheduler), min(USUAL_STEPS, trained))[0]
        smallest = -(-trained // MAX_STEPS)  # number of trained timesteps in a step
        for timesteps_per_step in range(smallest, smallest + MAX_TIMESTEPS_PER_STEP):
            for steps in (trained // timesteps_per_step, trained // timesteps_per_step - 1):
                self.scheduler = copy.deepcopy(scheduler)
                self.noise_levels, error = _levels_of_run(self.scheduler, steps)
                reason = error or reason
                ratios = [level.sigma / level.alpha for level in self.noise_levels]
                # in a second-order run half the levels may be repeated
                if ratios and len(set(ratios)) >= len(ratios) / 2:
                    if not usual or ratios[0] > 0.99 * usual[0].sigma / usual[0].alpha:
                        self.timesteps = sampling_timesteps(self.scheduler)
                        return
        spacing = scheduler.config.get("timestep_spacing")
        raise ValueError(
            f"scheduler {name} with num_train_timesteps={trained}, timestep_spacing={spacing!r}: no "
            f'run to measure, {reason}; use timestep_spacing="trailing" or another scheduler'
        )

    def eval_levels(self, count: int) -> list[EvalLevel]:
        """The middles of `count` equal parts of the run, noisiest first, and its last step."""
        steps = len(self.noise_levels)
        if not 1 <= count < steps:
            raise ValueError(
                f"levels={count}: 1 to {steps - 1} are allowed, the run has {steps} steps"
            )
        fractions = [(part + 0.5) / count for part in range(count)]
        return [self.at(fraction) for fraction in (*fractions, 1.0)]

    def at(self, fraction: float) -> EvalLevel:
        """The step at a fraction of the run in [0, 1]."""
        index = min(int(fraction * len(self.noise_levels)), len(self.noise_levels) - 1)
        return EvalLevel(fraction, index, float(self.timesteps[index]), self.noise_levels[index])

    def model_input(self, x: Tensor, index: int) -> Tensor:
        """What the denoiser reads for the sample `x` at step `index`: `scale_model_input`."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        scheduler = copy.deepcopy(self.scheduler)  # sigma-based schedulers count the calls
        if callable(getattr(scheduler, "set_begin_index", None)):
            scheduler.set_begin_index(index)
        return scheduler.scale_model_input(x, self.timesteps[index].to(x.device))


def _levels_of_run(
    scheduler: SchedulerMixin, steps: int
) -> tuple[list[NoiseLevel], Exception | None]:
    """Noise levels of a run, and why there are none."""
    try:
        scheduler.set_timesteps(steps)
        return [level for level in noise_levels(scheduler) if level.sigma > 0], None
    except (IndexError, ValueError) as error:  # some schedulers only have runs of certain lengths
        return [], error


def default_run(classifier: torch.nn.Module) -> SamplingRun:
    """DDIM run of the classifier's own schedule."""
    config = dict(schedule_config(classifier))
    if TrainedSchedule(config).log_ratio[-1] < math.log(MIN_START_RATIO):
        # of a classifier of clean images; a run starts from noise, so all steps of its betas
        full = module_config(classifier)
        config = {name: full[name] for name in BETA_OPTIONS if name in full}
    return SamplingRun(DDIMScheduler(**config, clip_sample=False, timestep_spacing="trailing"))


def network_reference(unet: torch.nn.Module, run: SamplingRun, null_label: int) -> Reference:
    """grad log p(y | x_t) = score(x_t | y) - score(x_t) of a class-conditional denoiser.

    Ho & Salimans 2022, "Classifier-free diffusion guidance". The denoiser's errors dominate where
    both scores are nearly equal (at very high and at very low noise).
    """

    def reference(x: Tensor, label: Tensor, eval_level: EvalLevel) -> Tensor:
        model_input = run.model_input(x, eval_level.index).to(parameter_dtype(unet))
        t = run.timesteps[eval_level.index].to(x.device)
        output = unet(
            torch.cat([model_input] * 2),
            t if x.ndim == 4 else t.expand(2 * len(x)),
            class_labels=torch.cat([label, torch.full_like(label, null_label)]),
            return_dict=False,
        )[0]
        prediction, _ = split_variance(output, x.shape[1])
        conditional, unconditional = (eval_level.level.x0(x, half) for half in prediction.chunk(2))
        return eval_level.level.score_shift(conditional - unconditional)

    return reference
