"""One guided step for every loop: the pipeline's, another pipeline's (`guide`), a Modular block's.

    guider = Guider(scheduler, terms)                     # after set_timesteps
    for index, t in enumerate(timesteps):
        terms = guider.start_step(index, batch_size)      # the terms to evaluate
        prediction = Prediction(...)                      # the owner of the loop calls the network,
                                                          # also under the terms' conditions
        output, x = guider.correct(sample, prediction)    # the scheduler's input
        sample = guider.finish_step(scheduler.step(output, t, x))

Not to be confused with `diffusers.guiders`, which combine predictions and never see the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from threading import Thread, current_thread
from typing import Any

import torch
from diffusers import SchedulerMixin

from .guidance import Guidance, GuidanceSum, StepContext, total_score
from .networks import no_parameter_grad
from .noise import NoiseLevel, noise_levels, posterior_variance, sampling_timesteps
from .particles import Population
from .run_checks import FiniteCheck, OvershootCheck, check_images, logger
from .schedule_checks import (
    check_schedule,
    clipping_warning,
    ending_warning,
    starting_warning,
    stride_warning,
    timestep_warning,
)
from .splitting import GuidanceReuse, OperatorSplitting

#: by the id of a scheduler: the thread whose call it serves, in a list that stands for the call
_calls_in_progress: dict[int, list[Thread]] = {}


@contextmanager
def exclusive_use(scheduler: SchedulerMixin) -> Iterator[None]:
    """Context of a call of a pipeline, whose steps the scheduler counts.

    Raises:
        RuntimeError: if another call is in progress, in this thread or another one.
    """
    call = [current_thread()]
    other = _calls_in_progress.setdefault(id(scheduler), call)  # atomic
    if other is not call:
        place = f"in the thread {other[0].name!r}"
        if other[0] is call[0]:
            place = "in this thread, in a callback of which this call is made"
        raise RuntimeError(
            f"scheduler: this {type(scheduler).__name__} counts the steps of another call in "
            f"progress {place}. Wait for its end, or call a pipeline that shares the networks and "
            "has a scheduler of its own: pipeline.from_pipe(pipeline, "
            "scheduler=copy.deepcopy(pipeline.scheduler))"
        )
    try:
        yield
    finally:
        del _calls_in_progress[id(scheduler)]


@dataclass
class Prediction:
    """What the network predicts at a step, and how to evaluate it again.

    Attributes:
        output: the network's output, (B, C, ...).
        condition_outputs: its outputs for the evaluated terms' conditions, in their order.
        predict: (sample[, network]) -> the output for another sample, or of another network;
            differentiable.
        decode: images in [-1, 1] of an x0; differentiable.
        modules: the networks that `predict` and `decode` run.
        variance: the learned variance, (B, C, ...), which guidance_algorithm="mean" needs.
        graph_input: the sample, if `output` has the autograd graph from it; then the parameters of
            `modules` need no gradient until `Guider.correct` returns.
        repeats: how many times `output` and the sample hold the images.
    """

    output: torch.Tensor
    condition_outputs: Sequence[torch.Tensor] = ()
    predict: Callable[..., torch.Tensor] | None = None
    decode: Callable[[torch.Tensor], torch.Tensor] = lambda x0: x0
    modules: Sequence[torch.nn.Module] = ()
    variance: torch.Tensor | None = None
    graph_input: torch.Tensor | None = None
    repeats: int = 1


class Guider:
    """Guidance of one run: noise levels, active terms, algorithm, reuse of gradients, the check for
    NaN.

    Args:
        scheduler: after `set_timesteps`; it is only read.
        terms: the guidance; a sum counts as its terms. Without terms, predictions stay as they are.
        algorithm: "output", "mean", "lie_trotter" or "strang", as in the pipeline's
            `guidance_algorithm`.
        eta: the scheduler's, for the last two.
        every, tolerance: when terms are evaluated, as in `GuidanceReuse`.
        first: the step of the schedule that the run starts with, such as in img2img.
        from_noise: whether a run that starts with step 0 starts from noise only.
        population: weights of the samples, which are resampled by them; None: samples have none.
        noise_scale: standard deviation of the pipeline's noise eps; 1 unless it scales it.

    Attributes:
        levels, timesteps: noise level and timestep of each step of the schedule.
        index: this step's number in the schedule; terms count from the run's `first` step.
        score_shift: what guidance added to the score at this step, (B, C, ...); None: nothing.
        sample: this step's, (B, C, ...), as resampled.
        evaluations: how many times terms were evaluated, summed over the images.

    Raises:
        ValueError: for a scheduler that can't be guided, or arguments that don't fit it.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        terms: Sequence[Guidance],
        *,
        algorithm: str = "output",
        eta: float = 0.0,
        every: int = 1,
        tolerance: float | None = None,
        first: int = 0,
        from_noise: bool = True,
        population: Population | None = None,
        noise_scale: float = 1.0,
    ):
        self.population = population
        self.scheduler, self.algorithm, self.first = scheduler, algorithm, first
        self.terms = GuidanceSum(terms).terms()
        probe = copy(scheduler)  # reading the levels moves the position of some schedulers
        if "_step_index" in vars(probe):
            probe._step_index = None
        self.levels = [
            replace(level, sigma=noise_scale * level.sigma) for level in noise_levels(probe)
        ]
        check_schedule(probe, self.levels)
        self.timesteps: list[float] = sampling_timesteps(scheduler).tolist()
        self.splitting = self.reuse = self.score_shift = None
        if self.terms and algorithm in ("lie_trotter", "strang"):
            self.splitting = OperatorSplitting(algorithm, scheduler, self.levels, eta)
        if every != 1 or tolerance is not None:
            self.reuse = GuidanceReuse(self.levels[first:], every, tolerance)
        self._clipping_warning = clipping_warning(scheduler)  # until it is logged
        self._schedule_warnings = [stride_warning(scheduler, first), ending_warning(scheduler)]
        self._schedule_warnings.append(timestep_warning(scheduler, self.levels, self.timesteps))
        self._schedule_warnings.extend(map(self._interval_warning, self.terms))
        if from_noise and not first:
            self._schedule_warnings.append(starting_warning(scheduler, self.levels[0]))
        self.index = first
        self.sample: torch.Tensor | None = None
        self.evaluations = 0
        self._active: list[Guidance] = []
        self._evaluated: list[Guidance] = []
        self._images: torch.Tensor | None = None  # that are evaluated at this step; None: all
        self._mean_shift: torch.Tensor | None = None
        self._check = FiniteCheck(self.terms)
        self._overshoot = OvershootCheck(self.levels[first:], self.splitting is not None)
        self._sample: torch.Tensor | None = None  # of the last step, until it is checked
        self._log_factors: list[torch.Tensor] = []  # of the active terms

    @property
    def count(self) -> int:
        """Number of steps in the run."""
        return len(self.levels) - self.first

    def _interval_warning(self, term: Guidance) -> str | None:
        """Warning about a term whose interval has none of the run's steps."""
        levels = self.levels[self.first :]
        is_off = not term._on or term.start == term.stop
        if is_off or any(term.active(i, self.count, level) for i, level in enumerate(levels)):
            return None
        interval = f"start={term.start}, stop={term.stop}"
        if term.sigma_interval is not None:
            interval = f"sigma_interval={term.sigma_interval}"
        return (
            f"guidance: {type(term).__name__} has no effect, none of the run's {self.count} steps is in "
            f"{interval}; widen it or take more steps"
        )

    def active_terms(self, index: int) -> list[Guidance]:
        """The terms that have an effect at step `index` of the schedule."""
        if index >= len(self.levels):
            return []
        position = index - self.first, self.count, self.levels[index]
        return [term for term in self.terms if term.active(*position)]

    def start_step(self, index: int, batch_size: int) -> list[Guidance]:
        """Begin step `index` of the schedule.

        Returns:
            The terms to evaluate, whose `conditions` the prediction must answer.
        """
        self.index, self._images, self._mean_shift, self.score_shift = index, None, None, None
        self._log_schedule_warnings()
        self._active = self.active_terms(index)
        if self.splitting is not None and not self.splitting.needs_guidance(index):
            self._active = []
        if self.population is not None and not self.population.start_step(index):
            self._active = []
        self._evaluated = self._active
        if self.reuse is not None and self._active:
            position = index - self.first
            self._images = self.reuse.images_to_evaluate(position, batch_size, self._active)
            if self._images is not None and not len(self._images):
                self._evaluated = []
        return self._evaluated

    def correct(
        self, sample: torch.Tensor, prediction: Prediction
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The corrected output and the sample for `scheduler.step`.

        Args:
            sample: (B, C, ...).
            prediction: of the network at `sample`; its output is detached in place, which releases
                the autograd graph.

        Raises:
            FloatingPointError: for guidance that is not finite.
        """
        level = self.levels[self.index]
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        graph = None
        if prediction.graph_input is not None:
            with torch.enable_grad():
                start = prediction.graph_input
                graph = start, level.x0(start.to(x.dtype), prediction.output)
            prediction.output, prediction.graph_input = prediction.output.detach(), None
        if self.population is not None:  # whose weights are of steps in the sample's precision
            prediction.output = prediction.output.to(sample.dtype)
        output = prediction.output
        if self._active and self._clipping_warning:
            logger.warning(self._clipping_warning)
            self._clipping_warning = None
        if self._active:
            with ExitStack() as stack:  # until the gradients are there
                context = self._context(x, prediction, graph, stack)
                self.score_shift = self._score(context)
            if self.algorithm == "output":
                output = level.corrected(output, _repeat(self.score_shift, prediction.repeats))
            elif self.algorithm == "mean" and self.population is None:
                self._mean_shift = self.score_shift * posterior_variance(
                    self.scheduler, self.timesteps, self.index, prediction.variance
                )
            guided = output if self._mean_shift is None else self._mean_shift
            self._check(context, self.score_shift, guided)
            if self.population is not None:
                output, sample = self._weigh(sample, prediction)
        self.sample, self._decode = sample, prediction.decode
        if self.splitting is None:
            return output, sample
        output, x = self.splitting.split(self.index, output, x, self.score_shift)
        return output, x.to(sample.dtype)

    def finish_step(self, sample: torch.Tensor) -> torch.Tensor:
        """The next sample, from the scheduler's.

        Raises:
            FloatingPointError: at the last step, for guidance or images that are not finite.
        """
        if self.splitting is not None:
            sample = self.splitting.merge(self.index, sample)
        if self._mean_shift is not None:
            sample = sample + self._mean_shift.to(sample.dtype)
        self._sample = sample
        if self.index + 1 == len(self.levels):
            self.check_finite()
            if self.population is not None:
                sample = self._finish_population(sample)
        return sample

    def stop(self, sample: torch.Tensor) -> torch.Tensor:
        """The images of a run that ends after this step, before its last: the sample, as
        resampled by the weights so far.

        Raises:
            FloatingPointError: as `check_finite`.
        """
        self.check_finite()
        if self.population is None or self.index + 1 == len(self.levels):
            return sample
        order = self.population.finish([])
        return sample if order is None else sample[order]

    def check_finite(self) -> None:
        """Check the guidance of all steps so far, and the sample after the last of them; warn of a
        term that overshot.

        Raises:
            FloatingPointError: if one is not finite.
        """
        sample, self._sample = self._sample, None  # also if the check of the guidance raises
        self._check.finish()
        self._overshoot.finish()
        if sample is not None:
            check_images(
                sample, f"after step {self.index} of {len(self.levels)} of the sampling run"
            )

    def _weigh(
        self, sample: torch.Tensor, prediction: Prediction
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight the population at this sample; the network's output and the sample, which are
        perhaps resampled, as the guidance then is."""
        positions = [i for i, term in enumerate(self.terms) if term in self._active]
        order = self.population.weigh(positions, self._log_factors)
        self._log_factors = []
        if order is not None:
            sample, prediction.output = sample[order], prediction.output[order]
            self.score_shift = self.score_shift[order]
        self._mean_shift = self.population.mean_shift(self.score_shift)
        return prediction.output, sample

    def _finish_population(self, sample: torch.Tensor) -> torch.Tensor:
        """The images, weighted by the terms' factors without noise, and perhaps resampled."""
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        clean = StepContext(
            sample=x,
            x0=x,
            predict=lambda x, *_: x,
            level=NoiseLevel(1.0, 0.0, 1.0, 0.0),
            index=self.count,
            count=self.count,
            timestep=0.0,
            decode=self._decode,
        )
        order = self.population.finish([term.log_factor(clean) for term in self.terms])
        return sample if order is None else sample[order]

    def _record(self, term: Guidance, step: StepContext, score: torch.Tensor) -> None:
        """Check a term's score, and keep its log factor for the population."""
        self._overshoot(term, step, score)
        if self.population is not None:
            # none, or of other samples, if its score isn't the usual one
            factors = step.log_factors
            self._log_factors.append(factors[0] if len(factors) == 1 else term.log_factor(step))

    def _log_schedule_warnings(self) -> None:
        warnings, self._schedule_warnings = self._schedule_warnings, []
        for warning in filter(None, warnings):
            logger.warning(warning)

    def _context(
        self,
        x: torch.Tensor,
        prediction: Prediction,
        graph: tuple[torch.Tensor, torch.Tensor] | None,
        stack: ExitStack,
    ) -> StepContext:
        level, images = self.levels[self.index], len(x) // prediction.repeats
        x = x[:images]
        modules = prediction.modules if graph is None else ()  # else they are frozen already
        freeze = _once(lambda: stack.enter_context(no_parameter_grad(modules)))

        def predict(x: torch.Tensor, *network: torch.nn.Module) -> torch.Tensor:
            freeze()
            return level.x0(x, prediction.predict(x, *network))

        def decode(x0: torch.Tensor) -> torch.Tensor:
            freeze()
            return prediction.decode(x0)

        return StepContext(
            sample=x,
            x0=level.x0(x, prediction.output[:images]),
            predict=predict,
            level=level,
            index=self.index - self.first,
            count=self.count,
            timestep=self.timesteps[self.index],
            condition_x0=tuple(level.x0(x, output) for output in prediction.condition_outputs),
            decode=decode,
            graph=graph,
        )

    def _score(self, context: StepContext) -> torch.Tensor:
        if self._images is None:
            self.evaluations += len(context.sample)
            return total_score(self._evaluated, context, self._record)
        self.evaluations += len(self._images)
        return self.reuse.score(self._evaluated, context, self._images, self._record)


def _once(function: Callable[[], Any]) -> Callable[[], None]:
    """`function` at the first call, nothing afterwards."""
    done = False

    def call() -> None:
        nonlocal done
        if not done:
            done = True
            function()

    return call


def _repeat(score: torch.Tensor, repeats: int) -> torch.Tensor:
    return score if repeats == 1 else score.repeat(repeats, *[1] * (score.ndim - 1))


class StepFinder:
    """Finds the step of a denoising loop that this package doesn't control, by its timestep.

    Args:
        scheduler: after `set_timesteps`, and `set_begin_index` where the run starts midway; it is
            only read.
        timestep: the run's first, if known.
    """

    def __init__(self, scheduler: SchedulerMixin, timestep: Any = None):
        self.scheduler, self.schedule = scheduler, scheduler.timesteps
        self.timesteps: list[float] = sampling_timesteps(scheduler).tolist()
        first, number = getattr(scheduler, "begin_index", None), as_number(timestep)
        if first is None and number in self.timesteps:
            first = self.timesteps.index(number)
            # some schedulers take the second of two equal first timesteps
            if hasattr(scheduler, "index_for_timestep"):
                first = int(scheduler.index_for_timestep(scheduler.timesteps[first]))
        self.first = first or 0
        self.last = self.first - 1

    def number(self, timestep: Any) -> float | None:
        """A timestep as a number. That of one of the schedule's own, a view, is known by its place,
        so that an accelerator isn't waited for."""
        own = self.schedule._base if self.schedule._is_view() else self.schedule
        if isinstance(timestep, torch.Tensor) and timestep._is_view() and timestep._base is own:
            place = timestep.storage_offset() - self.schedule.storage_offset()
            index, rest = divmod(place, self.schedule.stride(0))
            if not rest and 0 <= index < len(self.timesteps):
                return self.timesteps[index]
        return as_number(timestep)

    def next(self, number: float | None) -> int:
        """The first step after the last one at this timestep; else the first with it (a repeated
        run); else the next step of all."""
        matching = [i for i, timestep in enumerate(self.timesteps) if timestep == number]
        for index in matching:
            if index > self.last:
                return index
        return matching[0] if matching else self.last + 1

    def advance(self, timestep: Any) -> int:
        """Go to the step at `timestep`.

        Raises:
            ValueError: if the schedule has none.
            RuntimeError: if another call, in another thread or a callback, uses the scheduler.
        """
        number = self.number(timestep)
        index = self.next(number)
        if self.scheduler.timesteps is not self.schedule:
            raise RuntimeError(
                f"scheduler: the timesteps of this {type(self.scheduler).__name__} were set again "
                f"before step {index} of {len(self.timesteps)}, by another call in progress; use a "
                "pipeline with a scheduler of its own for each thread"
            )
        if index >= len(self.timesteps) or self.timesteps[index] != number:
            raise ValueError(
                f"timestep {number} is none of the scheduler's {self.timesteps}, so its noise "
                "level isn't known"
            )
        self.last = index
        return index


def as_number(timestep: Any) -> float | None:
    """A timestep, a number or one per sample, as a number."""
    return timestep.flatten()[0].item() if isinstance(timestep, torch.Tensor) else timestep
