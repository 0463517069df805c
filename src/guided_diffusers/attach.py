"""Guide an existing Diffusers pipeline: Stable Diffusion, SDXL, SD 3, DiT, PixArt, DeepFloyd IF,
Kandinsky, ...

    with guide(stable_diffusion, ClassifierGuidance(classifier, label="sneaker", scale=3.0)):
        image = stable_diffusion("a photo of a shoe").images[0]

A pipeline's loop calls its network, combines the outputs, and passes the result to
`scheduler.step`. Guidance corrects it on its way into that method; the loop itself is unchanged.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial, wraps
from threading import get_ident
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.logging import get_logger
from diffusers.utils.torch_utils import unwrap_module
from torch.utils._pytree import tree_map

from .checks import shown
from .guidance import Guidance, GuidanceSum, check_devices
from .guider import Guider, Prediction, StepFinder, exclusive_use
from .latent_images import (
    CALLBACKS,
    DECODERS,
    Frames,
    PipelineEnding,
    check_frames,
    decode_x0,
    stepping_frame,
)
from .loop_replay import LoopReplay, LoopVariables, in_turn, is_close, repeated
from .network_calls import (
    NO_REPEAT,
    DenoiserCall,
    OutputCombination,
    check_rows,
    clone_if_inference,
    differ,
    find_sample,
    is_batch,
    is_doubled,
    join_batches,
    rows_of,
    with_condition,
)
from .networks import evaluating, evaluation_mode
from .noise import (
    NoiseLevel,
    is_instance_by_name,
    prediction_type,
    scale_model_input,
    split_variance,
)
from .pipeline_graph import PipelineGraph

if TYPE_CHECKING:
    from diffusers import ModularPipeline

logger = get_logger(__name__)
#: calls of the network before a pipeline's first step, above which it steps another scheduler
MOST_CALLS = 16
COPIES = (
    "pipeline {name}: it steps copies of its scheduler, or another one, which guide doesn't reach, so "
    "it can't be guided; a pipeline that steps its own scheduler works"
)
DENOISERS = ("unet", "transformer", "prior", "decoder")


@contextmanager
def guide(
    pipeline: DiffusionPipeline | ModularPipeline,
    *terms: Guidance,
    network: str | None = None,
    frames: Frames = "all",
) -> Iterator[Any]:
    """Apply the sum of the terms to every call of a Diffusers pipeline; the pipeline is restored on
    exit.

    A term gets the pipeline's own prediction, including its classifier-free guidance. Where no term
    is active, at scale 0, the images are those of the unguided pipeline, bit for bit. The fractions
    `start` and `stop` of a term count from where the run begins (img2img: after the skipped steps)
    to the end of the schedule. A gradient through the network (`through_network`) passes through
    all that the pipeline does between two steps. At the first step of a run, and for conditions or
    another network, the network is evaluated again with the other arguments as the pipeline passed
    them, so a ControlNet's own Jacobian is left out of the gradient there. Where what the pipeline
    makes of its network's outputs is no weighted sum of them, the statements of its loop are run
    again. Copies of the scheduler or the network that are made within aren't guided.

    Args:
        pipeline: with a scheduler, and the network that it steps with as `unet`, `transformer`,
            `prior` or `decoder`; one that takes over during the run (`transformer_2`) belongs to it.
        terms: the guidance. Their `conditions` name arguments that the pipeline passes to its
            network, nested in the same way: {"added_cond_kwargs": {"text_embeds": ...}}. Terms that
            look at images get what the pipeline would decode: (B, C, H, W), or a video, (B, C, F,
            H, W), in [-1, 1].
        network: name of the pipeline's component that is the network, where it is another one.
        frames: what such terms get of a video: "all"; "middle", that frame, (B, C, H, W); or a list
            of frame numbers.

    Within, the networks of the terms, the pipeline's denoiser and its decoder are in evaluation
    mode.

    Raises:
        ValueError: for a pipeline or a term that can't be used, now or at the first step; for a
            scheduler that is exchanged within, at the next call; at the end, for a scheduler whose
            last step doesn't give the predicted x0.
        FloatingPointError: if the guidance or the final sample becomes infinite or NaN.
        RuntimeError: for a call of the pipeline while another one is in progress.
    """
    name = type(pipeline).__name__
    scheduler = getattr(pipeline, "scheduler", None)
    denoisers = _denoisers(pipeline, network)
    if scheduler is None or not denoisers:
        missing = "scheduler" if scheduler is None else " or ".join(DENOISERS)
        raise ValueError(
            f"pipeline {name} has no {missing}; guide needs the scheduler and the network that it "
            'steps with, which network="..." can name'
        )
    _check_terms(name, scheduler, terms)
    if any(term._on for term in GuidanceSum(terms).terms()):
        _check_steps_its_scheduler(pipeline)
    prediction_type(scheduler)
    total = GuidanceSum(terms)
    hook = GuidanceHook(pipeline, denoisers, total, check_frames(frames))
    # forward hooks, not a replaced `forward`: offloading exchanges that after each call of the
    # pipeline
    with ExitStack() as stack:
        stack.enter_context(evaluating(*total.modules()))
        stack.enter_context(evaluation_mode(*denoisers, *hook.decoders))
        stack.enter_context(_one_call_at_a_time(pipeline, hook))
        stack.enter_context(_replaced_step(scheduler, hook.step))
        for denoiser in denoisers:
            before = denoiser.register_forward_pre_hook(hook.before_call, with_kwargs=True)
            stack.enter_context(before)
            after = denoiser.register_forward_hook(hook.after_call, with_kwargs=True)
            stack.enter_context(after)
        for part in [part for decoder in hook.decoders for part in decoder.children()]:
            stack.enter_context(part.register_forward_pre_hook(hook.before_decoder))
        stack.callback(hook.graph.stop)
        scheduler.step.guided_by = total
        yield pipeline
    hook.finish_run()
    if not hook.steps:
        logger.warning(
            f"nothing was guided: {type(scheduler).__name__}.step of the {name} was not called "
            "within guide"
        )


def _check_terms(name: str, scheduler: SchedulerMixin, terms: Sequence[Guidance]) -> None:
    if not terms or not all(isinstance(term, Guidance) for term in terms):
        raise ValueError(
            f"terms: {[type(term).__name__ for term in terms]}; one or more terms of guidance are "
            "allowed"
        )
    if hasattr(scheduler.step, "guided_by"):
        raise ValueError(
            f"pipeline {name} is guided already; give all terms to one guide(pipeline, a, b)"
        )


def _check_steps_its_scheduler(pipeline: Any) -> None:
    """Refuse a pipeline whose call steps copies of its scheduler only, as with one for each frame.

    Raises:
        ValueError: if its source says so.
    """
    try:
        source = inspect.getsource(type(pipeline).__call__)
    except (OSError, TypeError):
        return
    if "copy(self.scheduler)" in source and "self.scheduler.step(" not in source:
        raise ValueError(COPIES.format(name=type(pipeline).__name__))


def _denoisers(pipeline: Any, network: str | None) -> list[torch.nn.Module]:
    """The network that a pipeline steps with, and one that takes over during the run.

    Raises:
        ValueError: for the name of no network.
    """
    if network is not None:
        module = getattr(pipeline, network, None) if isinstance(network, str) else None
        if not isinstance(module, torch.nn.Module):
            components = getattr(pipeline, "components", {})
            networks = [k for k, v in components.items() if isinstance(v, torch.nn.Module)]
            raise ValueError(
                f"network={shown(network)}: pipeline {type(pipeline).__name__} has {networks}"
            )
        return [module]
    for name in DENOISERS:
        found = [getattr(pipeline, name, None), getattr(pipeline, f"{name}_2", None)]
        if found := [module for module in found if isinstance(module, torch.nn.Module)]:
            return found
    return []


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
        hook.has_foreign_loop = not uses_it_exclusively
        with nullcontext() if uses_it_exclusively else exclusive_use(hook.scheduler):
            outer, hook.thread, hook.steps_in_call = hook.thread, get_ident(), 0
            has_gradients = torch.is_grad_enabled()
            for name in CALLBACKS:
                if callable(callback := kwargs.get(name)):
                    if hasattr(callback, "tensor_inputs"):  # pipelines know that by its class
                        kwargs[f"{name}_tensor_inputs"] = callback.tensor_inputs
                    kwargs[name] = hook.graph.wrapped(callback)
            try:
                result = cls.__call__(self, *args, **kwargs)
            finally:
                hook.thread = outer
                ended_within = hook.graph.stop()
                torch.set_grad_enabled(has_gradients)  # also if the graph was on when it ended
            hook.check_steps()
            return tree_map(_detached, result) if ended_within else result

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
def _without_offloading(decoder: torch.nn.Module) -> Iterator[None]:
    """Context in which a decoder doesn't move another network off the device before it decodes, as
    `enable_model_cpu_offload` has it: a gradient that leads through that one needs its weights."""
    hook = getattr(decoder, "_hf_hook", None)
    previous = getattr(hook, "prev_module_hook", None)
    if previous is None:
        yield
        return
    hook.prev_module_hook = None
    try:
        yield
    finally:
        hook.prev_module_hook = previous


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


class GuidanceHook:
    """The state of `guide` between a call of the network and the scheduler's step.

    Attributes:
        decoders: the pipeline's decoders of images.
        graph: of the pipeline's arithmetic between two steps, for terms that need its gradient.
        steps: number of steps so far, over all runs.
    """

    def __init__(
        self,
        pipeline: Any,
        denoisers: Sequence[torch.nn.Module],
        terms: GuidanceSum,
        frames: Frames,
    ):
        self.pipeline, self.scheduler = pipeline, (scheduler := pipeline.scheduler)
        self.name = type(pipeline).__name__
        self.denoisers, self.terms, self.frames, self.steps = denoisers, terms, frames, 0
        decoders = [getattr(pipeline, name, None) for name in DECODERS]
        self.decoders = [module for module in decoders if isinstance(module, torch.nn.Module)]
        self.modules = list({id(m): m for m in (*denoisers, *self.decoders)}.values())
        self.scheduler_step, self.step_signature = scheduler.step, inspect.signature(scheduler.step)
        self.signatures = [inspect.signature(unwrap_module(m).forward) for m in denoisers]
        self.graph = PipelineGraph(_networks(pipeline))
        self.guider: Guider | None = None  # of the run
        self.finder: StepFinder | None = None
        self.repeats: int | None = (
            None  # how often the pipeline's batch holds the images; None: not known yet
        )
        self._timesteps: Any = None  # the scheduler's tensor, which is another one in another run
        self._calls: list[DenoiserCall] = []  # since the last step
        self._open_call: DenoiserCall | None = None
        self._variables: LoopVariables | None = None  # of the loop, since the last step
        self._predicting = False  # whether the network is called by this object
        self.thread: int | None = None  # of the pipeline's call; None: a loop of the user's
        self.steps_in_call = 0  # by the pipeline's call so far
        self.has_foreign_loop = True  # False: the loop is this package's, which keeps its graph

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

    def check_steps(self, most_calls: int = 0) -> None:
        """Refuse a pipeline that steps other schedulers than its own.

        Args:
            most_calls: of the network without a step.

        Raises:
            ValueError: if there were more, and no step of the pipeline's call.
        """
        is_on = any(term._on for term in self.terms.terms())
        if is_on and not self.steps_in_call and len(self._calls) > most_calls:
            raise ValueError(COPIES.format(name=self.name))

    def start_run(self, timestep: Any) -> None:
        """Read the noise levels at the first timestep of a run."""
        self.forget_previous_run()
        if self.guider is None:
            self.finder = StepFinder(self.scheduler, timestep)
            self.guider = Guider(
                self.scheduler,
                [self.terms],
                first=self.finder.first,
                noise_scale=getattr(self.pipeline, "config", {}).get("noise_scale") or 1.0,
            )

    def forget_previous_run(self) -> None:
        """Drop the state of a run when another one begins, even if it was broken off.

        Raises:
            FloatingPointError: if that run's guidance or images were not finite.
        """
        if self._timesteps is not self.scheduler.timesteps:
            self.graph.stop()
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
        if self._is_other_call(module):
            return None
        self.check_scheduler()
        self.forget_previous_run()
        if self.thread is not None:
            self.check_steps(MOST_CALLS)
        signature = self.signatures[self._index_of(module)]
        self._open_call, bound = None, signature.bind(*args, **kwargs)
        if not is_batch(next(iter(bound.arguments.values()))):
            return None
        if self._variables is None and any(term._on for term in self.terms.terms()):
            self._variables = LoopVariables(sys._getframe(1))
        conditions: tuple[Mapping[str, Any], ...] = ()
        if self.terms.conditions:
            timestep = bound.arguments.get("timestep")
            self.start_run(timestep)
            index = self.finder.next(self.finder.number(timestep))
            conditions = GuidanceSum(self.guider.active_terms(index)).conditions
        arguments = dict(bound.arguments)
        call = self._open_call = DenoiserCall(module, bound, conditions)
        if not conditions:
            return None
        name = type(unwrap_module(module)).__name__
        call.variants = [with_condition(arguments, condition, name) for condition in conditions]
        joined = join_batches(len(call.input), arguments, call.variants)
        if joined is None:  # they are evaluated one after the other, after the pipeline's call
            return None
        call.is_joined = True
        return call.with_changes(**joined)

    def before_decoder(self, module: torch.nn.Module, args: tuple) -> None:
        """End the graph of a pipeline that left its loop before its last step."""
        self.graph.stop()

    def after_call(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Store the network's output, and return the pipeline's part of it."""
        if self._is_other_call(module) or self._open_call is None:
            return None
        call, self._open_call = self._open_call, None
        rows = len(call.input)
        results = [output]
        if call.is_joined:
            results = rows_of(output, rows, 1 + len(call.conditions))
        elif call.conditions:
            results += self._evaluate_conditions(call)
        firsts = [value if isinstance(value, torch.Tensor) else _first(value) for value in results]
        if not all(is_batch(first) and len(first) == rows for first in firsts):
            return self._check_has_output(call)  # it only filled a cache, or gave something else
        self._calls.append(call)
        if self._variables is not None:
            call.results = [tree_map(_detached, result) for result in results]
        call.output, *call.condition_outputs = map(_detached, firsts)
        return results[0] if call.is_joined else None

    def _evaluate_conditions(self, call: DenoiserCall) -> list[Any]:
        """The network's results under each condition."""
        self._predicting, results = True, []
        try:
            with torch.no_grad():
                for variant in call.variants:
                    args, kwargs = call.with_changes(**variant)
                    results.append(call.module(*args, **kwargs))
        finally:
            self._predicting = False
        return results

    def _check_has_output(self, call: DenoiserCall) -> None:
        if call.conditions:
            raise ValueError(
                f"pipeline {self.name}: its {type(call.module).__name__} gives no batch of "
                "predictions, so terms with conditions can't be used"
            )

    def _is_other_call(self, module: torch.nn.Module) -> bool:
        """Whether a call is not one of the guided pipeline's."""
        if self._predicting or self._index_of(module) is None or self._is_elsewhere():
            return True
        frame = stepping_frame(sys._getframe(1)) if self.thread is None else None
        if frame is None or (owner := frame.f_locals["self"]) is self.pipeline:
            return False
        return getattr(owner, "scheduler", None) is not self.scheduler

    def _index_of(self, module: torch.nn.Module) -> int | None:
        return next((i for i, own in enumerate(self.denoisers) if own is module), None)

    # ------------------------------------------------------------ the scheduler's step

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """`scheduler.step` of the corrected output."""
        bound = self.step_signature.bind(*args, **kwargs)
        output, timestep, sample = (
            bound.arguments[name] for name in ("model_output", "timestep", "sample")
        )
        graph_input = self.graph.end(sample, output)
        self.start_run(timestep)
        calls, self._calls, self.steps = self._calls, [], self.steps + 1
        variables, self._variables = self._variables, None
        self.steps_in_call += 1
        terms = self.guider.start_step(self.finder.advance(timestep), len(sample))
        if terms:
            frame = stepping_frame(sys._getframe(1))
            level = self.guider.levels[self.guider.index]
            step = PipelineStep(self.scheduler, bound.arguments, calls, frame, level, graph_input)
            if variables is not None and frame is not None:
                step.find_replay = partial(variables.replay, frame, self.denoisers)
            with torch.inference_mode(False), torch.no_grad():  # inference mode has no gradients
                bound.arguments["model_output"] = self.correct(terms, step)
            bound.arguments["sample"] = sample.detach()
            args, kwargs = bound.args, bound.kwargs
        result = self.scheduler_step(*args, **kwargs)
        if terms:
            check_ending(self.name, self.scheduler, self.guider.index, step, bound, result[0])
        self.guider.finish_step(result[0][: len(sample) // (self.repeats or 1)])
        return self.graph.begin(result) if self._needs_graph() else result

    def _needs_graph(self) -> bool:
        """Whether a term of the next step needs the gradient through the pipeline's network."""
        if self.thread is None or self.repeats == 2 or not self.has_foreign_loop:
            return False
        terms = self.guider.active_terms(self.guider.index + 1)
        return any(term.through_network for term in terms)

    def correct(self, terms: Sequence[Guidance], step: PipelineStep) -> torch.Tensor:
        """The corrected output (B, C or 2C, ...); a learned variance stays as it is."""
        sample, calls = step.sample, step.calls
        if self.repeats is None:
            self.check_first_step(terms, step)
            doubled = len(calls) == 1 and is_doubled(calls[0], step.output, sample)
            self.repeats = 2 if doubled else 1
        if self.repeats == 2:
            step.graph_input = None
        conditions = GuidanceSum(terms).conditions
        if any(differ(call.conditions, conditions) for call in calls):
            expected = self.guider.timesteps[self.guider.index]
            raise ValueError(
                f"timestep: the network got another than the scheduler's {expected:g}, so which "
                "terms are active wasn't known; terms with conditions can't be active in part of "
                "the run"
            )
        images = len(sample) // self.repeats
        if conditions:
            self.check_calls(calls)
        for call in calls:
            for condition in conditions:
                check_rows(condition, call.arguments.arguments, images)
        combine = OutputCombination(
            self.name, calls, step.output[:images, : sample.shape[1]].detach(), sample[:images]
        )
        condition_outputs = [
            step.to_prediction(self.combined(combine, step, i)) for i in range(len(conditions))
        ]
        with torch.enable_grad():  # of the graph, if there is one
            prediction, variance = split_variance(step.output, sample.shape[1])
            prediction = step.to_prediction(prediction)
        with (
            ExitStack() as stack
        ):  # until the gradients are there: their backward pass decodes again

            def decode_images(x0: torch.Tensor) -> torch.Tensor:
                for decoder in self.decoders:
                    stack.enter_context(_in_float32(decoder))
                    if any(term.through_network for term in terms):
                        stack.enter_context(_without_offloading(decoder))
                x0 = x0.repeat(self.repeats, *[1] * (x0.ndim - 1))
                return decode_x0(self.pipeline, step.ending(), x0, self.frames)

            before = prediction.detach()
            corrected, _ = self.guider.correct(
                sample,
                Prediction(
                    output=prediction,
                    condition_outputs=condition_outputs,
                    predict=partial(self.predict, combine, step),
                    decode=decode_images,
                    modules=self.modules,
                    graph_input=step.graph_input,
                    repeats=self.repeats,
                ),
            )
        corrected = step.from_prediction(corrected, before)
        return corrected if variance is None else torch.cat([corrected, variance], dim=1)

    def combined(self, combine: OutputCombination, step: PipelineStep, index: int) -> torch.Tensor:
        """The output under a condition, as the pipeline would have made it."""
        if combine.weights is not None:
            outputs = [clone_if_inference(call.condition_outputs[index]) for call in step.calls]
            return combine(outputs)
        evaluate = in_turn([call.results[1 + index] for call in step.calls])
        output = step.replayed(evaluate)
        if output is None:
            raise ValueError(combine.refusal())
        return output[: len(combine.made), : combine.made.shape[1]]

    def predict(
        self,
        combine: OutputCombination,
        step: PipelineStep,
        x: torch.Tensor,
        network: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """The output for another sample, or of another network, as the pipeline would have made
        it."""
        self.check_calls(combine.calls)
        images = len(step.sample) // self.repeats
        timestep, outputs = step.arguments["timestep"], []
        own, scaled = (
            scale_model_input(self.scheduler, one, timestep) for one in (step.sample[:images], x)
        )
        places = [call.with_sample(scaled, own) for call in combine.calls]
        if combine.weights is None or None in places:
            return self._predict_by_replay(combine, step, x, network)
        self._predicting = True
        try:
            for call, (args, kwargs) in zip(combine.calls, places, strict=True):
                outputs.append((network or call.module)(*args, **kwargs)[0])
        finally:
            self._predicting = False
        return step.to_prediction(combine(outputs, x))

    def _predict_by_replay(
        self,
        combine: OutputCombination,
        step: PipelineStep,
        x: torch.Tensor,
        network: torch.nn.Module | None,
    ) -> torch.Tensor:
        """As `predict`, by the statements of the pipeline's loop."""
        repeated = x.repeat(self.repeats, *[1] * (x.ndim - 1)).to(step.arguments["sample"].dtype)
        self._predicting = True
        try:
            output = step.replayed(
                lambda module, *args, **kwargs: (network or module)(*args, **kwargs), repeated
            )
        finally:
            self._predicting = False
        if output is None:
            reason = (
                ""
                if combine.weights is None
                else (
                    f"the sample {tuple(x.shape)} is no part of its network's input "
                    f"{tuple(getattr(combine.calls[0].input, 'shape', []))}"
                )
            )
            raise ValueError(combine.refusal(reason))
        return step.to_prediction(output[: len(x), : x.shape[1]])

    def check_calls(self, calls: Sequence[DenoiserCall]) -> None:
        """Refuse to evaluate the network again where no call of it was seen."""
        if not calls:
            raise ValueError(
                f"pipeline {self.name}: between two steps none of its {', '.join(DENOISERS)} was "
                f"called with a batch, so {NO_REPEAT}"
            )

    def check_first_step(self, terms: Sequence[Guidance], step: PipelineStep) -> None:
        """Refuse, at the first guided step, what can't be guided.

        Raises:
            ValueError: for a classifier on another device, or a pipeline whose sample is not the
                scheduler's.
        """
        sample = step.sample
        check_devices(terms, sample.device)
        if step.frame is not None and _names_argument(step.frame.f_code, "pred_original_sample"):
            raise ValueError(
                f"pipeline {self.name}: it steps its scheduler twice with each prediction, once to "
                "make an x0 of it, which guide can't tell apart; this pipeline can't be guided"
            )
        scaled = scale_model_input(self.scheduler, sample, step.arguments["timestep"])
        if not step.calls or torch.equal(scaled, sample):
            return
        network_input = step.calls[0].input
        if not isinstance(network_input, torch.Tensor):
            return  # a list of images, as in Z-Image
        has_its_size = network_input.shape[2:] == sample.shape[2:]
        if has_its_size and find_sample(network_input, scaled) is None:
            raise ValueError(
                f"pipeline {self.name}: its network was not given the sample as "
                f"{type(self.scheduler).__name__} scales it, so the sample's noise level isn't "
                "known; use a scheduler that doesn't scale, as DDIMScheduler or "
                "DPMSolverMultistepScheduler"
            )


class PipelineStep:
    """A pipeline's call of `scheduler.step`.

    Attributes:
        arguments: of the call, by name.
        calls: of the network since the last step.
        frame: of the pipeline's method that made the call; None: there is none.
        level: the noise level of the sample.
        graph_input: the sample from which the autograd graph leads to the output; None: there is
            none.
        output, sample: what the pipeline predicts, and at what.
        find_replay: finds the statements that made the output; None: they can't be run again.
    """

    @staticmethod
    def find_replay() -> LoopReplay | None:
        return None

    def __init__(
        self,
        scheduler: SchedulerMixin,
        arguments: Mapping[str, Any],
        calls: Sequence[DenoiserCall],
        frame: FrameType | None,
        level: NoiseLevel,
        graph_input: torch.Tensor | None,
    ):
        self.arguments, self.calls, self.frame, self.level = arguments, calls, frame, level
        self._ending: PipelineEnding | None = None
        output, self.graph_input = arguments["model_output"], graph_input
        self.output = clone_if_inference(output if graph_input is not None else output.detach())
        self.sample = clone_if_inference(arguments["sample"].detach())
        per_token = arguments.get("per_token_timesteps")
        self.token_factor: torch.Tensor | None = None
        if per_token is not None:
            sigma = per_token.float() / scheduler.config.num_train_timesteps
            self.token_factor = (-sigma / level.sigma)[..., None]

    def ending(self) -> PipelineEnding | None:
        """What the pipeline does after its loop; None for a loop that is not a pipeline's own."""
        if self._ending is None and self.frame is not None:
            frame, self.frame = self.frame, None
            with suppress(LookupError):
                self._ending = PipelineEnding(frame)
        return self._ending

    def replayed(
        self, evaluate: Callable[..., Any], sample: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """What the pipeline would predict with other outputs of its network, or at another sample.

        None if its loop can't be run again: with the network's own outputs it must give the network
        the same arguments, and the same prediction, again.
        """
        replay = self.find_replay()
        if replay is None:
            return None
        with torch.no_grad():
            again = replay(repeated(self.calls))
        if not is_close(again, self.output):
            return None
        pair = None if sample is None else (self.arguments["sample"], sample)
        return replay(evaluate, pair)

    def to_prediction(self, output: torch.Tensor) -> torch.Tensor:
        """The output whose x0 at the step's noise level is that of the scheduler's step.

        With a timestep for each token, `FlowMatchEulerDiscreteScheduler` goes from a token's own
        sigma_i to 0 by `sample + sigma_i * output`: the opposite sign.
        """
        return output if self.token_factor is None else self.token_factor * output

    def from_prediction(self, corrected: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The scheduler's output, after `to_prediction` of it was corrected. The x0 of a token with
        less noise moves less, by sigma_i^2 / sigma^2."""
        if self.token_factor is None:
            return corrected
        shift = self.token_factor * (corrected - before)
        return self.output.detach() + shift.to(self.output.dtype)


#: schedulers whose step to sigma = 0 gives the predicted x0
ENDS_AT_X0 = {
    "FlowMatchEulerDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "EDMEulerScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
}


def check_ending(
    name: str,
    scheduler: SchedulerMixin,
    index: int,
    step: PipelineStep,
    bound: inspect.BoundArguments,
    result: torch.Tensor,
) -> None:
    """Check, where a step ends at sigma = 0, that it gives the x0 that guidance took the network to
    predict.

    Raises:
        ValueError: if it doesn't: guidance would then have had another effect than it should.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    is_known = is_instance_by_name(scheduler, ENDS_AT_X0) and not scheduler.config.get(
        "thresholding"
    )
    if not is_known or sigmas is None or index + 1 >= len(sigmas) or sigmas[index + 1] != 0:
        return
    output = bound.arguments["model_output"][:, : step.sample.shape[1]]
    x0 = step.level.x0(step.sample.float(), step.to_prediction(output.float()))
    noise = (x0 - step.sample.float()).norm()
    rounding = torch.finfo(result.dtype).eps * step.sample.float().norm()
    if result.shape == x0.shape and (result.float() - x0).norm() > 0.1 * noise + 8 * rounding:
        raise ValueError(
            f"pipeline {name}: the last step of its {type(scheduler).__name__} gave another result "
            "than the predicted x0, so its network predicts something else than the scheduler's "
            "config says, and guidance was wrong; this pipeline can't be guided"
        )


def _names_argument(code: CodeType, name: str) -> bool:
    """Whether a method has a call with an argument of this name."""
    return any(isinstance(value, tuple) and name in value for value in code.co_consts)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _first(output: Any) -> Any:
    """The first value of a network's output; None of an empty one, or of what is no sequence."""
    try:
        return output[0]
    except (TypeError, IndexError, KeyError):
        return None


def _networks(pipeline: Any) -> list[torch.nn.Module]:
    """All networks of a pipeline."""
    components = getattr(pipeline, "components", None) or vars(pipeline)
    return [module for module in components.values() if isinstance(module, torch.nn.Module)]
