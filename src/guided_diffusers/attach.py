"""Guide an existing Diffusers pipeline: Stable Diffusion, SDXL, SD 3, DiT, PixArt, DeepFloyd IF,
Kandinsky, ...

    with guide(stable_diffusion, ClassifierGuidance(classifier, label="sneaker", scale=3.0)):
        image = stable_diffusion("a photo of a shoe").images[0]

A pipeline's loop calls its network, combines the outputs, and passes the result to
`scheduler.step`. Guidance corrects it on its way into that method; the loop itself is unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from functools import cached_property, partial, wraps
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.logging import get_logger
from diffusers.utils.torch_utils import unwrap_module
from torch.utils._pytree import tree_map

from .guidance import Guidance, GuidanceSum, check_devices
from .guider import Guider, Prediction, StepFinder, as_number, exclusive_use
from .images import decode, one_by_one
from .networks import evaluating
from .noise import is_instance_by_name, prediction_type, scale_model_input, split_variance

if TYPE_CHECKING:
    from diffusers import ModularPipeline

logger = get_logger(__name__)
DENOISERS = ("unet", "transformer", "prior")
DECODERS = ("vae", "vqvae", "movq")


@contextmanager
def guide(pipeline: DiffusionPipeline | ModularPipeline, *terms: Guidance) -> Iterator[Any]:
    """Apply the sum of the terms to every call of a Diffusers pipeline; the pipeline is restored on
    exit.

    A term gets the pipeline's own prediction, including its classifier-free guidance. Where no term
    is active, at scale 0, the images are those of the unguided pipeline, bit for bit. The fractions
    `start` and `stop` of a term count from where the run begins (img2img: after the skipped steps)
    to the end of the schedule. Where the network is evaluated again (`through_network`, another
    network), its other arguments stay as the pipeline passed them. That includes a ControlNet's
    residuals, so its own Jacobian is left out of the gradient. Copies of the scheduler or the
    network that are made within aren't guided.

    Args:
        pipeline: with a scheduler, and the network that it steps with as `unet`, `transformer` or
            `prior`.
        terms: the guidance. Their `conditions` name arguments that the pipeline passes to its
            network, nested in the same way: {"added_cond_kwargs": {"text_embeds": ...}}.

    Within, the networks of the terms, the pipeline's denoiser and its decoder are in evaluation
    mode.

    Raises:
        ValueError: for a pipeline or a term that can't be used, now or at the first step; for a
            scheduler that is exchanged within, at the next call.
        FloatingPointError: if the guidance or the final sample becomes infinite or NaN.
        RuntimeError: for a call of the pipeline while another one is in progress.
    """
    name = type(pipeline).__name__
    scheduler = getattr(pipeline, "scheduler", None)
    denoiser = _component(pipeline, DENOISERS)
    if scheduler is None or denoiser is None:
        missing = "scheduler" if scheduler is None else " or ".join(DENOISERS)
        raise ValueError(
            f"pipeline {name} has no {missing}; guide needs the scheduler and the network that it "
            "steps with"
        )
    if not terms or not all(isinstance(term, Guidance) for term in terms):
        raise ValueError(
            f"terms: {[type(term).__name__ for term in terms]}; one or more terms of guidance are "
            "allowed"
        )
    if hasattr(scheduler.step, "guided_by"):
        raise ValueError(
            f"pipeline {name} is guided already; give all terms to one guide(pipeline, a, b)"
        )
    prediction_type(scheduler)
    total = GuidanceSum(terms)
    decoder = _component(pipeline, DECODERS)
    hook = GuidanceHook(pipeline, denoiser, decoder, partial(_decode, pipeline), total)
    # forward hooks, not a replaced `forward`: offloading exchanges that after each call of the
    # pipeline
    with (
        evaluating(*total.modules(), denoiser, decoder),
        _one_call_at_a_time(pipeline, hook),
        _replaced_step(scheduler, hook.step),
        denoiser.register_forward_pre_hook(hook.before_call, with_kwargs=True),
        denoiser.register_forward_hook(hook.after_call, with_kwargs=True),
    ):
        scheduler.step.guided_by = total
        yield pipeline
    hook.finish_run()
    if not hook.steps:
        logger.warning(
            f"nothing was guided: {type(scheduler).__name__}.step of the {name} was not called "
            "within guide"
        )


def _component(pipeline: Any, names: Sequence[str]) -> torch.nn.Module | None:
    for name in names:
        if (component := getattr(pipeline, name, None)) is not None:
            return component
    return None


@contextmanager
def _one_call_at_a_time(pipeline: Any, hook: GuidanceHook) -> Iterator[None]:
    """Context in which a second call of the pipeline, before the first one has ended, is refused.

    The pipeline gets a class that differs only in this, since Python looks for `__call__` there.
    """
    cls = type(pipeline)

    @wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not pipeline:  # a copy, or one made by from_pipe, with a scheduler of its own
            return cls.__call__(self, *args, **kwargs)
        uses_it_exclusively = is_instance_by_name(self, {"ClassifierGuidedPipeline"})
        with nullcontext() if uses_it_exclusively else exclusive_use(hook.scheduler):
            outer, hook.thread, hook.steps_in_call = hook.thread, get_ident(), 0
            try:
                return cls.__call__(self, *args, **kwargs)
            finally:
                hook.thread = outer

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    pipeline.__class__ = type(cls.__name__, (cls,), {"__call__": call, **names})
    try:
        yield
    finally:
        pipeline.__class__ = cls


@contextmanager
def _in_float32(decoder: torch.nn.Module | None) -> Iterator[None]:
    """Context in which an autoencoder that overflows in float16 (Stable Diffusion XL's) computes in
    float32, as when its pipeline decodes the result."""
    if decoder is None or decoder.dtype != torch.float16 or not decoder.config.get("force_upcast"):
        yield
        return
    decoder.to(torch.float32)
    try:
        yield
    finally:
        decoder.to(torch.float16)


@contextmanager
def _replaced_step(scheduler: SchedulerMixin, method: Callable[..., Any]) -> Iterator[None]:
    """Context in which `scheduler.step(...)` is `method(...)`, with the original's signature, which
    pipelines inspect. Copies and pickles have the original: else a copy would step this one."""

    @wraps(scheduler.step)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    own = {"step": scheduler.step} if "step" in vars(scheduler) else {}

    def getstate() -> dict[str, Any]:
        state = {**vars(scheduler)}
        del state["step"], state["__getstate__"]
        return state | own

    scheduler.step, scheduler.__getstate__ = replacement, getstate
    try:
        yield
    finally:
        vars(scheduler).update(getstate())
        for name in {"step", "__getstate__"} - own.keys():
            delattr(scheduler, name)


def _decode(pipeline: Any, x0: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] of a pipeline's predicted x0."""
    decoder = _component(pipeline, DECODERS)
    if decoder is None:
        return x0
    if x0.ndim != 4:
        raise ValueError(
            f"pipeline {type(pipeline).__name__}: its latents {tuple(x0.shape)} are packed, or no "
            "images; terms that look at images need (B, C, H, W)"
        )
    if (
        getattr(pipeline, "movq", None) is decoder
    ):  # Kandinsky: no scaling, no gradient of quantization
        x0 = x0.to(decoder.dtype)
        return one_by_one(lambda z: decoder.decode(z, force_not_quantize=True).sample, x0)
    return decode(decoder, x0)


class DenoiserCall:
    """A call of the network between two steps.

    Attributes:
        arguments: the pipeline's, by name; the first is the network's noisy input.
        conditions: those of the terms that are expected to be active at the step.
        output, condition_outputs: the network's output for the pipeline, and under each of the
            conditions.
    """

    output: torch.Tensor

    def __init__(
        self, arguments: inspect.BoundArguments, conditions: tuple[Mapping[str, Any], ...]
    ):
        arguments.arguments = _copy_arguments(arguments.arguments)
        self.arguments, self.conditions = arguments, conditions
        self.condition_outputs: list[torch.Tensor] = []

    @property
    def input_name(self) -> str:
        """Name of the first argument."""
        return next(iter(self.arguments.arguments))

    @property
    def input(self) -> torch.Tensor:
        return self.arguments.arguments[self.input_name]

    def with_changes(self, **changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the call, with some arguments replaced."""
        arguments = copy(self.arguments)
        arguments.arguments = {**_copy_arguments(self.arguments.arguments), **changes}
        return arguments.args, arguments.kwargs


class OutputCombination:
    """How a pipeline made its prediction (B, C, ...) from the network's outputs in the calls since
    the last step."""

    def __init__(self, calls: Sequence[DenoiserCall], made: torch.Tensor):
        self.calls, self.made = calls, made

    @cached_property
    def weights(self) -> list[float]:
        return combination_weights(torch.cat([call.output for call in self.calls]), self.made)

    def __call__(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The prediction that the pipeline would make of these outputs, one per call."""
        parts = torch.cat(list(outputs))[:, : self.made.shape[1]].split(len(self.made))
        return sum(weight * part for weight, part in zip(self.weights, parts, strict=True))


class GuidanceHook:
    """The state of `guide` between a call of the network and the scheduler's step.

    Attributes:
        steps: number of steps so far, over all runs.
    """

    def __init__(
        self,
        pipeline: Any,
        denoiser: torch.nn.Module,
        decoder: torch.nn.Module | None,
        decode: Callable[[torch.Tensor], torch.Tensor],
        terms: GuidanceSum,
    ):
        self.pipeline, self.scheduler = pipeline, (scheduler := pipeline.scheduler)
        self.denoiser, self.decoder = denoiser, decoder
        self.decode, self.terms, self.steps = decode, terms, 0
        self.scheduler_step, self.step_signature = scheduler.step, inspect.signature(scheduler.step)
        self.denoiser_signature = inspect.signature(unwrap_module(denoiser).forward)
        self.guider: Guider | None = None  # of the run
        self.finder: StepFinder | None = None
        self.repeats: int | None = (
            None  # how often the pipeline's batch holds the images; None: not known yet
        )
        self._timesteps: Any = None  # the scheduler's tensor, which is another one in another run
        self._calls: list[DenoiserCall] = []  # since the last step
        self._open_call: DenoiserCall | None = None
        self._predicting = False  # whether the network is called by this object
        self.thread: int | None = None  # of the pipeline's call; None: a loop of the user's
        self.steps_in_call = 0  # by the pipeline's call so far

    def __deepcopy__(self, memo: Any) -> GuidanceHook:
        return self  # of a copied network, which it doesn't guide

    def check_scheduler(self) -> None:
        """Refuse a scheduler that was exchanged within `guide`.

        Raises:
            ValueError: naming both.
        """
        if (current := self.pipeline.scheduler) is not self.scheduler:
            raise ValueError(
                f"pipeline {type(self.pipeline).__name__}: its scheduler was exchanged within "
                f"guide, {type(self.scheduler).__name__} for {type(current).__name__}, whose steps "
                "aren't guided; exchange it before guide"
            )

    def start_run(self, timestep: Any) -> None:
        """Read the noise levels at the first timestep of a run."""
        self.forget_previous_run()
        if self.guider is None:
            self.finder = StepFinder(self.scheduler, timestep)
            self.guider = Guider(self.scheduler, [self.terms], first=self.finder.first)

    def forget_previous_run(self) -> None:
        """Drop the state of a run when another one begins, even if it was broken off.

        Raises:
            FloatingPointError: if that run's guidance or images were not finite.
        """
        if self._timesteps is not self.scheduler.timesteps:
            in_progress = self.steps_in_call and self.guider.index + 1 < len(self.guider.levels)
            if self._is_elsewhere() or (self.thread is not None and in_progress):
                raise RuntimeError(
                    f"scheduler: the timesteps of this {type(self.scheduler).__name__} were set "
                    "again during a guided call, by a call of another pipeline that shares it; "
                    "give each pipeline a scheduler of its own"
                )
            previous, self.guider, self.finder, self.repeats = self.guider, None, None, None
            self._calls, self._timesteps = [], self.scheduler.timesteps
            if previous is not None:  # it may have ended before its last step
                previous.check_finite()

    def finish_run(self) -> None:
        """Raise FloatingPointError if the run's guidance or images were not finite."""
        if self.guider is not None:
            self.guider.check_finite()

    def _is_elsewhere(self) -> bool:
        """Whether this is another thread than that of the guided call, with the same network."""
        return self.thread not in (None, get_ident())

    # ------------------------------------------------------------ the network's calls

    def before_call(
        self, module: torch.nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """Extend the batch of the pipeline's call of its network by the conditions of the active
        terms."""
        if self._predicting or module is not self.denoiser or self._is_elsewhere():
            return None
        self.check_scheduler()
        self.forget_previous_run()
        self._open_call, bound = None, self.denoiser_signature.bind(*args, **kwargs)
        if not isinstance(next(iter(bound.arguments.values())), torch.Tensor):
            return None  # a list of images, as in Z-Image
        conditions: tuple[Mapping[str, Any], ...] = ()
        if self.terms.conditions:
            timestep = bound.arguments.get("timestep")
            self.start_run(timestep)
            index = self.finder.next(as_number(timestep))
            conditions = GuidanceSum(self.guider.active_terms(index)).conditions
        call = self._open_call = DenoiserCall(bound, conditions)
        if not conditions:
            return None
        arguments = dict(bound.arguments)
        name = type(unwrap_module(module)).__name__
        variants = [_with_condition(arguments, condition, name) for condition in conditions]
        joined = tree_map(partial(_concat_batch, len(call.input)), arguments, *variants)
        return call.with_changes(**joined)

    def after_call(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Store the network's output, and return the pipeline's part of it."""
        if self._predicting or module is not self.denoiser or self._is_elsewhere():
            return None
        if self._open_call is None:
            return None
        call, self._open_call = self._open_call, None
        self._calls.append(call)
        rows, total = len(call.input), len(output[0])
        call.output, *call.condition_outputs = output[0].split(rows)
        if not call.condition_outputs:
            return None
        return tree_map(lambda value: value[:rows] if _has_rows(value, total) else value, output)

    # ------------------------------------------------------------ the scheduler's step

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """`scheduler.step` of the corrected output."""
        bound = self.step_signature.bind(*args, **kwargs)
        output, timestep, sample = (
            bound.arguments[name] for name in ("model_output", "timestep", "sample")
        )
        self.start_run(timestep)
        calls, self._calls, self.steps = self._calls, [], self.steps + 1
        self.steps_in_call += 1
        terms = self.guider.start_step(self.finder.advance(timestep), len(sample))
        if terms:
            with torch.inference_mode(False), torch.no_grad():  # inference mode has no gradients
                bound.arguments["model_output"] = self.correct(
                    terms, calls, timestep, clone_if_inference(output), clone_if_inference(sample)
                )
            args, kwargs = bound.args, bound.kwargs
        result = self.scheduler_step(*args, **kwargs)
        self.guider.finish_step(result[0][: len(sample) // (self.repeats or 1)])
        return result

    def correct(
        self,
        terms: Sequence[Guidance],
        calls: Sequence[DenoiserCall],
        timestep: Any,
        output: torch.Tensor,
        sample: torch.Tensor,
    ) -> torch.Tensor:
        """The corrected output (B, C or 2C, ...); a learned variance stays as it is."""
        if self.repeats is None:
            self.check_first_step(terms, calls, timestep, sample)
            self.repeats = 2 if len(calls) == 1 and _is_doubled(calls[0], output, sample) else 1
        conditions = GuidanceSum(terms).conditions
        if any(_differ(call.conditions, conditions) for call in calls):
            expected = self.guider.timesteps[self.guider.index]
            raise ValueError(
                f"timestep: the network got another than the scheduler's {expected:g}, so which "
                "terms are active wasn't known; terms with conditions can't be active in part of "
                "the run"
            )
        if conditions:
            _check_calls(calls)
        combine = OutputCombination(calls, output[: len(sample) // self.repeats, : sample.shape[1]])
        condition_outputs = [
            combine([clone_if_inference(call.condition_outputs[i]) for call in calls])
            for i in range(len(conditions))
        ]
        prediction, variance = split_variance(output, sample.shape[1])
        with (
            ExitStack() as stack
        ):  # until the gradients are there: their backward pass decodes again

            def decode_images(x0: torch.Tensor) -> torch.Tensor:
                stack.enter_context(_in_float32(self.decoder))
                return self.decode(x0)

            corrected, _ = self.guider.correct(
                sample,
                Prediction(
                    output=prediction,
                    condition_outputs=condition_outputs,
                    predict=partial(self.predict, combine, timestep),
                    decode=decode_images,
                    modules=[m for m in (self.denoiser, self.decoder) if m is not None],
                    repeats=self.repeats,
                ),
            )
        return corrected if variance is None else torch.cat([corrected, variance], dim=1)

    def predict(
        self,
        combine: OutputCombination,
        timestep: Any,
        x: torch.Tensor,
        network: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """The output for another sample, or of another network, as the pipeline would have made
        it."""
        _check_calls(combine.calls)
        scaled, outputs = scale_model_input(self.scheduler, x, timestep), []
        self._predicting = True
        try:
            for call in combine.calls:
                if call.input.shape[2:] != x.shape[2:]:
                    raise ValueError(
                        f"the network's input {tuple(call.input.shape)} is not the sample "
                        f"{tuple(x.shape)} with more channels behind it, so the network can't be "
                        "evaluated again"
                    )
                repeats = len(call.input) // len(x), *[1] * (x.ndim - 1)
                extra = clone_if_inference(call.input)[:, x.shape[1] :]
                joined = torch.cat([scaled.to(call.input.dtype).repeat(repeats), extra], dim=1)
                args, kwargs = call.with_changes(**{call.input_name: joined})
                outputs.append((network or self.denoiser)(*args, **kwargs)[0])
        finally:
            self._predicting = False
        return combine(outputs)

    def check_first_step(
        self,
        terms: Sequence[Guidance],
        calls: Sequence[DenoiserCall],
        timestep: Any,
        sample: torch.Tensor,
    ) -> None:
        """Refuse, at the first guided step, what can't be guided.

        Raises:
            ValueError: for a classifier on another device, or a pipeline whose sample is not the
                scheduler's.
        """
        check_devices(terms, sample.device)
        if not calls or calls[0].input.shape[2:] != sample.shape[2:]:
            return
        if len(calls[0].input) % len(sample):
            return
        seen = calls[0].input[:, : sample.shape[1]].float()
        scaled = scale_model_input(self.scheduler, sample, timestep)
        expected = scaled.repeat(len(seen) // len(sample), *[1] * (sample.ndim - 1)).float()
        if (seen - expected).norm() > 0.02 * expected.norm():
            raise ValueError(
                "pipeline: its network was not given the sample as "
                f"{type(self.scheduler).__name__} scales it, so the sample's noise level isn't "
                "known; use a scheduler that doesn't scale, as DDIMScheduler or "
                "DPMSolverMultistepScheduler"
            )


def clone_if_inference(value: Any) -> Any:
    """The value; a clone that autograd can use, of a tensor made in inference mode."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def _copy_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in new containers: some networks empty the lists that they get."""
    return tree_map(clone_if_inference, dict(arguments))


def _check_calls(calls: Sequence[DenoiserCall]) -> None:
    if not calls:
        raise ValueError(
            f"pipeline: between two steps none of its {', '.join(DENOISERS)} was called with a "
            "batch, so the network can't be evaluated again: use through_network=False, no "
            "conditions and no other network"
        )


def _differ(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are conditions of different terms; they hold tensors, which `!=` would compare."""
    return len(a) != len(b) or any(x is not y for x, y in zip(a, b, strict=True))


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows


def _with_condition(
    arguments: Mapping[str, Any], condition: Mapping[str, Any], network: str
) -> dict[str, Any]:
    """The arguments with those of the condition in their place, also within nested mappings."""
    changed = dict(arguments)
    for name, value in condition.items():
        if changed.get(name) is None:
            passed = sorted(key for key, argument in arguments.items() if argument is not None)
            raise ValueError(
                f"guidance: a term has the condition {name!r}; the pipeline passes its {network} "
                f"{passed}"
            )
        if isinstance(value, Mapping):
            value = _with_condition(changed[name], value, network)
        changed[name] = value
    return changed


def _concat_batch(rows: int, value: Any, *variants: Any) -> Any:
    """An argument with the rows of several calls: the pipeline's, and one for each condition."""
    same = all(variant is value for variant in variants)
    if not isinstance(value, torch.Tensor) or (same and not _has_rows(value, rows)):
        return value
    batches = []
    for variant in (value, *variants):
        batch = torch.atleast_1d(torch.as_tensor(variant)).to(value.device, value.dtype)
        if rows % len(batch) or batch.shape[1:] != value.shape[1:]:
            raise ValueError(
                f"guidance: a condition has shape {tuple(batch.shape)} in the place of "
                f"{tuple(value.shape)}; one row, or one per image, of that shape is allowed"
            )
        batches.append(batch.repeat(rows // len(batch), *[1] * (batch.ndim - 1)))
    return torch.cat(batches)


def _is_doubled(call: DenoiserCall, output: torch.Tensor, sample: torch.Tensor) -> bool:
    """Whether the batch holds each image twice, as in DiT: two equal halves went into the network,
    came out different, and go into the step equal, the guided half twice. Two images of one seed
    and label come out equal."""
    if len(sample) % 2 or len(call.input) != len(sample):
        return False
    halves = [tensor[:, : sample.shape[1]].chunk(2) for tensor in (call.input, call.output, output)]
    same_input, same_output, same_guided = (torch.equal(*half) for half in halves)
    return same_input and same_guided and not same_output


def combination_weights(outputs: torch.Tensor, made: torch.Tensor) -> list[float]:
    """w of `made = sum_i w_i part_i`, sum_i w_i = 1: how a pipeline combined the parts of its
    network's batch.

    Classifier-free guidance is made = first + s (second - first), and perturbed-attention guidance
    has three parts. Solved by least squares.

    Args:
        outputs: (k B, C or 2C, ...), the network's.
        made: (B, C, ...).

    Raises:
        ValueError: if it is no such combination, as with guidance rescale.
    """
    images, channels = made.shape[:2]
    fits = (
        len(outputs) % images == 0
        and outputs.shape[2:] == made.shape[2:]
        and outputs.shape[1] >= channels
    )
    if fits:
        parts = [part.double().flatten().cpu() for part in outputs[:, :channels].split(images)]
        target = made.double().flatten().cpu()
        steps = torch.stack([part - parts[0] for part in parts], dim=1)
        normal_matrix = torch.linalg.pinv(steps.mT @ steps)
        weights = (normal_matrix @ (steps.mT @ (target - parts[0]))).tolist()
        weights[0] = 1 - sum(weights[1:])
        scaled = [weight * part for weight, part in zip(weights, parts, strict=True)]
        eps = max(torch.finfo(tensor.dtype).eps for tensor in (outputs, made))
        largest = max(part.norm() for part in (target, *scaled))
        fits = (sum(scaled) - target).norm() <= 8 * eps * largest
    if not fits:
        raise ValueError(
            "the pipeline makes of its network's output what is no weighted mean of the batch's "
            "parts (guidance rescale, thresholding, ...), so it can't be made again: use "
            "through_network=False, no conditions and no other network, or the pipeline without "
            "it"
        )
    return weights
