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

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils.logging import get_logger

from .guidance import Guidance, GuidanceSum, StepContext, no_parameter_grad, total_score
from .noise import (
    check_schedule,
    clipping_warning,
    ending_warning,
    noise_levels,
    posterior_variance,
    sampling_timesteps,
    starting_warning,
    stride_warning,
)
from .splitting import GuidanceReuse, OperatorSplitting

logger = get_logger(__name__)


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
        graph_input: the sample, if `output` has the autograd graph from it.
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

    Attributes:
        levels, timesteps: noise level and timestep of each step of the schedule.
        index: this step's number in the schedule; terms count from the run's `first` step.
        score_shift: what guidance added to the score at this step, (B, C, ...); None: nothing.
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
    ):
        self.scheduler, self.algorithm, self.first = scheduler, algorithm, first
        self.terms = GuidanceSum(terms).terms()
        probe = copy(scheduler)  # reading the levels moves the position of some schedulers
        if "_step_index" in vars(probe):
            probe._step_index = None
        self.levels = noise_levels(probe)
        check_schedule(probe, self.levels)
        self.timesteps: list[float] = sampling_timesteps(scheduler).tolist()
        self.splitting = self.reuse = self.score_shift = None
        if self.terms and algorithm in ("lie_trotter", "strang"):
            self.splitting = OperatorSplitting(algorithm, scheduler, self.levels, eta)
        if every != 1 or tolerance is not None:
            self.reuse = GuidanceReuse(self.levels[first:], every, tolerance)
        self._clipping_warning = clipping_warning(scheduler)  # until it is logged
        self._schedule_warnings = [stride_warning(scheduler, first), ending_warning(scheduler)]
        if from_noise and not first:
            self._schedule_warnings.append(starting_warning(scheduler, self.levels[0]))
        self.index = first
        self.evaluations = 0
        self._active: list[Guidance] = []
        self._evaluated: list[Guidance] = []
        self._images: torch.Tensor | None = None  # that are evaluated at this step; None: all
        self._mean_shift: torch.Tensor | None = None
        self._check = FiniteCheck(_guide_dtype(self.terms))
        self._sample: torch.Tensor | None = None  # of the last step, until it is checked

    @property
    def count(self) -> int:
        """Number of steps in the run."""
        return len(self.levels) - self.first

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
        self._active = self.active_terms(index)
        if self.splitting is not None and not self.splitting.needs_guidance(index):
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
                graph = prediction.graph_input, level.x0(prediction.graph_input, prediction.output)
            prediction.output, prediction.graph_input = prediction.output.detach(), None
        output = prediction.output
        self._log_warnings()
        if self._active:
            with ExitStack() as stack:  # until the gradients are there
                context = self._context(x, prediction, graph, stack)
                self.score_shift = self._score(context)
            if self.algorithm == "output":
                output = level.corrected(output, _repeat(self.score_shift, prediction.repeats))
            elif self.algorithm == "mean":
                self._mean_shift = self.score_shift * posterior_variance(
                    self.scheduler, self.timesteps, self.index, prediction.variance
                )
            guided = output if self._mean_shift is None else self._mean_shift
            self._check(context, self.score_shift, guided)
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
        return sample

    def check_finite(self) -> None:
        """Check the guidance of all steps so far, and the sample after the last of them.

        Raises:
            FloatingPointError: if one is not finite.
        """
        self._check.finish()
        sample, self._sample = self._sample, None
        if sample is not None:
            check_images(
                sample, f"after step {self.index} of {len(self.levels)} of the sampling run"
            )

    def _log_warnings(self) -> None:
        warnings, self._schedule_warnings = self._schedule_warnings, []
        if self._active:
            warnings.append(self._clipping_warning)
            self._clipping_warning = None
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
        freeze = _once(lambda: stack.enter_context(no_parameter_grad(prediction.modules)))
        if graph is not None:
            freeze()

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
            return total_score(self._evaluated, context)
        self.evaluations += len(self._images)
        return self.reuse.score(self._evaluated, context, self._images)


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


def _guide_dtype(terms: Sequence[Guidance]) -> torch.dtype:
    for module in GuidanceSum(terms).modules():
        for parameter in module.parameters():
            return parameter.dtype
    return torch.float32


class FiniteCheck:
    """Refuses non-finite guidance; on an accelerator, without a wait, when the run ends.

    Args:
        dtype: what the guiding network computes in, for the message.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._steps: list[tuple[torch.Tensor, torch.dtype, str]] = []

    def __call__(self, step: StepContext, score: torch.Tensor, guided: torch.Tensor) -> None:
        """Record a step: its sample, the score shift and the guided output; on the CPU raise at
        once."""
        position = (
            f"step {step.index} of {step.count} (timestep {step.timestep:g}, "
            f"sigma {step.level.sigma:.4g})"
        )
        finite = torch.stack([t.isfinite().all() for t in (step.sample, score, guided)])
        self._steps.append((finite, guided.dtype, position))
        if finite.device.type == "cpu":
            self.finish()

    def finish(self) -> None:
        """Check the recorded steps.

        Raises:
            FloatingPointError: for the first that is not finite, naming the step, the timestep and
                the likely cause.
        """
        steps, self._steps = self._steps, []
        for finite, dtype, position in steps:
            sample_ok, score_ok, guided_ok = finite.tolist()
            if not (sample_ok and score_ok and guided_ok):
                cause = self._likely_cause(sample_ok, score_ok, dtype)
                raise FloatingPointError(
                    f"the guidance is not finite at {position}; likely cause: {cause}"
                )

    def _likely_cause(self, sample_ok: bool, score_ok: bool, output_dtype: torch.dtype) -> str:
        if not sample_ok:
            return "the sample was not finite before: look at the network and the scheduler"
        if not score_ok and self.dtype == torch.float16:
            return (
                f"the classifier computes in {self.dtype}, whose range is small: load it in float32"
            )
        if not score_ok:
            return (
                "the sample left the range that the classifier knows: lower guidance_scale, take "
                "more steps or a first-order scheduler, or raise guidance_start"
            )
        return (
            f"the guided output left the range of {output_dtype}: lower guidance_scale or load the "
            "unet in float32"
        )


class StepFinder:
    """Finds the step of a denoising loop that this package doesn't control, by its timestep.

    Args:
        scheduler: after `set_timesteps`, and `set_begin_index` where the run starts midway; it is
            only read.
        timestep: the run's first, if known.
    """

    def __init__(self, scheduler: SchedulerMixin, timestep: Any = None):
        self.timesteps: list[float] = sampling_timesteps(scheduler).tolist()
        first, number = getattr(scheduler, "begin_index", None), as_number(timestep)
        if first is None and number in self.timesteps:
            first = self.timesteps.index(number)
            # some schedulers take the second of two equal first timesteps
            if hasattr(scheduler, "index_for_timestep"):
                first = int(scheduler.index_for_timestep(scheduler.timesteps[first]))
        self.first = first or 0
        self.last = self.first - 1

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
        """
        number = as_number(timestep)
        index = self.next(number)
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
