"""Guide a Diffusers pipeline that exists: Stable Diffusion, SDXL, SD 3, DiT, PixArt, DeepFloyd IF, Kandinsky, ...

    with guide(stable_diffusion, ClassifierGuidance(classifier, label="sneaker", scale=3.0)):
        image = stable_diffusion("a photo of a shoe").images[0]

A pipeline's loop calls its network, combines what that says, and hands the result to `scheduler.step`. There, on the
way in, guidance corrects it; the loop doesn't know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import cached_property, partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.logging import get_logger
from diffusers.utils.torch_utils import unwrap_module
from torch.utils._pytree import tree_map

from .guidance import Guidance, GuidanceSum, no_parameter_grad
from .images import decode, one_by_one
from .noise import prediction_type
from .run import Run, check_parts, finite_check, guided, number_of

if TYPE_CHECKING:
    from diffusers import ModularPipeline

logger = get_logger(__name__)
DENOISERS = ("unet", "transformer", "prior")
DECODERS = ("vae", "vqvae", "movq")


@contextmanager
def guide(pipeline: DiffusionPipeline | ModularPipeline, *terms: Guidance) -> Iterator[Any]:
    """Within, each call of the pipeline is guided by the sum of the terms; afterwards it is as it was.

    A term sees the pipeline's own prediction, its classifier-free guidance included. Where no term acts, at scale 0,
    the images are those of the unguided pipeline, bit for bit. The fractions `start` and `stop` of a term count the
    steps from where the run begins (img2img: after the skipped ones) to the end of the schedule. Where the network is
    asked again (`through_network`, another network), the rest of what the pipeline told it is as it was: a ControlNet's
    residuals, too, so that its own Jacobian is left out of the gradient.

    Args:
        pipeline: with a scheduler, and the network that it steps with as `unet`, `transformer` or `prior`.
        terms: what guides. Their `conditions` name arguments that the pipeline gives its network, nested as there, and
            join its call: {"added_cond_kwargs": {"text_embeds": ...}}.

    Raises:
        ValueError: for a pipeline or a term that can't be used, now or at the first step.
        FloatingPointError: if the guidance becomes infinite or NaN.
    """
    name = type(pipeline).__name__
    scheduler = getattr(pipeline, "scheduler", None)
    denoiser = _component(pipeline, DENOISERS)
    if scheduler is None or denoiser is None:
        raise ValueError(
            f"pipeline {name} has no {'scheduler' if scheduler is None else ' or '.join(DENOISERS)}; "
            "guide needs the scheduler and the network that it steps with"
        )
    if not terms or not all(isinstance(term, Guidance) for term in terms):
        raise ValueError(
            f"terms: {[type(term).__name__ for term in terms]}; one or more terms of guidance are allowed"
        )
    if hasattr(scheduler.step, "guided_by"):
        raise ValueError(
            f"pipeline {name} is guided already; give all terms to one guide(pipeline, a, b)"
        )
    prediction_type(scheduler)
    total = GuidanceSum(terms)
    decoder = _component(pipeline, DECODERS)
    attached = _Attached(scheduler, denoiser, decoder, partial(_decode, pipeline), total)
    modules = [module for module in (denoiser, decoder, *total.modules()) if module is not None]
    # hooks, not another `forward`: offloading exchanges that one after each call of the pipeline
    with (
        no_parameter_grad(modules),
        _replaced(scheduler, "step", attached.step),
        denoiser.register_forward_pre_hook(attached.before_call, with_kwargs=True),
        denoiser.register_forward_hook(attached.after_call, with_kwargs=True),
    ):
        scheduler.step.guided_by = total
        yield pipeline
    attached.check.finish()
    if not attached.steps:
        logger.warning(
            f"nothing was guided: {type(scheduler).__name__}.step of the {name} was not called within guide"
        )


def _component(pipeline: Any, names: Sequence[str]) -> torch.nn.Module | None:
    return next((one for name in names if (one := getattr(pipeline, name, None)) is not None), None)


@contextmanager
def _in_float32(decoder: torch.nn.Module | None) -> Iterator[None]:
    """Within, an autoencoder that overflows in float16 (Stable Diffusion XL's) computes in float32, as its pipeline has
    it when it decodes the result."""
    if decoder is None or decoder.dtype != torch.float16 or not decoder.config.get("force_upcast"):
        yield
        return
    decoder.to(torch.float32)
    try:
        yield
    finally:
        decoder.to(torch.float16)


@contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Within, `owner.name(...)` is `method(...)`, with the signature of the original, which pipelines look at."""

    @wraps(getattr(owner, name))
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    before = vars(owner).get(name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


def _decode(pipeline: Any, x0: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] of a pipeline's predicted x0."""
    decoder = _component(pipeline, DECODERS)
    if decoder is None:
        return x0
    if x0.ndim != 4:
        raise ValueError(
            f"pipeline {type(pipeline).__name__}: its latents {tuple(x0.shape)} are packed, or no images; "
            "terms that look at images need (B, C, H, W)"
        )
    if (
        getattr(pipeline, "movq", None) is decoder
    ):  # Kandinsky doesn't scale, and quantization has no gradient
        return one_by_one(
            lambda z: decoder.decode(z, force_not_quantize=True).sample, x0.to(decoder.dtype)
        )
    return decode(decoder, x0)


class _Call:
    """A call of the network between two steps.

    Attributes:
        arguments: those that the pipeline gave, by name; the first is the network's noisy input.
        conditions: of the terms that are expected to act at the step.
        output, others: what the network said for the pipeline, and under each of the conditions.
    """

    output: torch.Tensor

    def __init__(
        self, arguments: inspect.BoundArguments, conditions: tuple[Mapping[str, Any], ...]
    ):
        arguments.arguments = _copied(arguments.arguments)
        self.arguments, self.conditions = arguments, conditions
        self.others: list[torch.Tensor] = []

    @property
    def name(self) -> str:
        """Of the first argument."""
        return next(iter(self.arguments.arguments))

    @property
    def input(self) -> torch.Tensor:
        return self.arguments.arguments[self.name]

    def told(self, **changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with changes, in the form that the network takes them."""
        arguments = copy(self.arguments)
        arguments.arguments = {**_copied(self.arguments.arguments), **changes}
        return arguments.args, arguments.kwargs


class _Recipe:
    """How a pipeline made its prediction (B, C, ...) of what its network said in the calls since the last step."""

    def __init__(self, calls: Sequence[_Call], made: torch.Tensor):
        self.calls, self.made = calls, made

    @cached_property
    def weights(self) -> list[float]:
        return weights(torch.cat([call.output for call in self.calls]), self.made)

    def __call__(self, said: Sequence[torch.Tensor]) -> torch.Tensor:
        """What it would make of these outputs, one a call."""
        parts = torch.cat(list(said))[:, : self.made.shape[1]].split(len(self.made))
        return sum(weight * part for weight, part in zip(self.weights, parts, strict=True))


class _Attached:
    """What `guide` knows between a call of the network and the scheduler's step."""

    def __init__(
        self,
        scheduler: SchedulerMixin,
        denoiser: torch.nn.Module,
        decoder: torch.nn.Module | None,
        decode: Callable[[torch.Tensor], torch.Tensor],
        terms: GuidanceSum,
    ):
        self.scheduler, self.denoiser, self.decoder, self.decode = (
            scheduler,
            denoiser,
            decoder,
            decode,
        )
        self.terms, self.stack = terms, ExitStack()
        self.scheduler_step, self.check, self.steps = scheduler.step, finite_check(terms), 0
        self.step_signature = inspect.signature(scheduler.step)
        self.signature = inspect.signature(unwrap_module(denoiser).forward)
        self.run: Run | None = None
        self.timesteps: Any = None  # of the run
        self.calls: list[_Call] = []  # since the last step
        self.open: _Call | None = None  # the one that is on its way
        self.predicting = False  # the network's call is ours

    def run_at(self, timestep: Any) -> Run:
        self.look_for_a_new_run()
        if self.run is None:
            self.run = Run(self.scheduler, timestep)
        return self.run

    def look_for_a_new_run(self) -> None:
        """Forget what was kept of a run when another one begins, also after one that broke off."""
        if self.timesteps is not self.scheduler.timesteps:
            self.run, self.calls, self.timesteps = None, [], self.scheduler.timesteps

    def before_call(
        self, module: torch.nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """The pipeline calls its network: add to the batch what the acting terms want to know."""
        if self.predicting:
            return None
        self.look_for_a_new_run()
        self.open, bound = None, self.signature.bind(*args, **kwargs)
        if not isinstance(
            next(iter(bound.arguments.values())), torch.Tensor
        ):  # a list of images, as Z-Image's
            return None
        conditions: tuple[Mapping[str, Any], ...] = ()
        if self.terms.conditions:
            timestep = bound.arguments.get("timestep")
            run = self.run_at(timestep)
            conditions = run.acting(self.terms, run.next(number_of(timestep))).conditions
        call = self.open = _Call(bound, conditions)
        if not conditions:
            return None
        own = dict(bound.arguments)
        others = [
            _told(own, condition, type(unwrap_module(module)).__name__) for condition in conditions
        ]
        return call.told(**tree_map(partial(_joined, len(call.input)), own, *others))

    def after_call(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Keep what the network said, and give the pipeline its part of it."""
        if self.predicting or self.open is None:
            return None
        call, self.open = self.open, None
        self.calls.append(call)
        rows, total = len(call.input), len(output[0])
        call.output, *call.others = output[0].split(rows)
        if not call.others:
            return None
        return tree_map(lambda value: value[:rows] if _is_rows(value, total) else value, output)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's step, of a corrected output."""
        bound = self.step_signature.bind(*args, **kwargs)
        output, timestep, sample = (
            bound.arguments[name] for name in ("model_output", "timestep", "sample")
        )
        run, calls = self.run_at(timestep), self.calls
        index, self.calls, self.steps = run.step(timestep), [], self.steps + 1
        acting = run.acting(self.terms, index)
        if acting.terms():
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # within inference mode, nothing has a gradient
                bound.arguments["model_output"] = self.guided(
                    acting, run, index, calls, timestep, _plain(output), _plain(sample)
                )
            args, kwargs = bound.args, bound.kwargs
        if index + 1 == len(run.numbers):
            self.check.finish()
        return self.scheduler_step(*args, **kwargs)

    def guided(
        self,
        acting: GuidanceSum,
        run: Run,
        index: int,
        calls: Sequence[_Call],
        timestep: Any,
        output: torch.Tensor,
        sample: torch.Tensor,
    ) -> torch.Tensor:
        """The corrected output."""
        if run.doubled is None:
            self.look(acting, calls, timestep, sample)
            run.doubled = len(calls) == 1 and _is_doubled(calls[0], output, sample)
        repeats = 2 if run.doubled else 1
        recipe = _Recipe(calls, output[: len(sample) // repeats, : sample.shape[1]])
        if any(call.conditions != acting.conditions for call in calls):
            raise ValueError(
                f"timestep: the network was told another than the scheduler's {run.numbers[index]:g}, so "
                "which terms act wasn't known; terms with conditions can't act on part of the run"
            )
        if acting.conditions:
            _check_seen(calls)
        others = [
            recipe([_plain(call.others[i]) for call in calls])
            for i in range(len(acting.conditions))
        ]
        predict = partial(self.predict, recipe, timestep)
        with self.stack:  # until the gradient is there, which decodes again
            return guided(
                acting,
                run,
                index,
                output,
                sample,
                self.check,
                predict,
                others,
                self.images,
                repeats,
            )

    def images(self, x0: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] of a predicted x0."""
        self.stack.enter_context(_in_float32(self.decoder))
        return self.decode(x0)

    def predict(
        self,
        recipe: _Recipe,
        timestep: Any,
        x: torch.Tensor,
        network: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """The output for another sample, or of another network, as the pipeline would have made it."""
        _check_seen(recipe.calls)
        scaled, said = self.scaled(x, timestep), []
        self.predicting = True
        try:
            for call in recipe.calls:
                if call.input.shape[2:] != x.shape[2:]:
                    raise ValueError(
                        f"the network's input {tuple(call.input.shape)} is not the sample "
                        f"{tuple(x.shape)} with more channels behind it, so it can't be asked again"
                    )
                rows = scaled.to(call.input.dtype).repeat(
                    len(call.input) // len(x), *[1] * (x.ndim - 1)
                )
                joined = torch.cat([rows, _plain(call.input)[:, x.shape[1] :]], dim=1)
                args, kwargs = call.told(**{call.name: joined})
                said.append((network or self.denoiser)(*args, **kwargs)[0])
        finally:
            self.predicting = False
        return recipe(said)

    def scaled(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        """What the network is given for a sample."""
        scale = getattr(
            self.scheduler, "scale_model_input", None
        )  # Euler and Heun for flow matching have none
        return sample if scale is None else scale(sample, timestep)

    def look(
        self, acting: GuidanceSum, calls: Sequence[_Call], timestep: Any, sample: torch.Tensor
    ) -> None:
        """Refuse, at the first step, what can't be guided.

        Raises:
            ValueError: for a classifier on another device, or a pipeline whose sample is not the scheduler's.
        """
        check_parts(self.scheduler, acting, sample.device)
        if (
            not calls
            or calls[0].input.shape[2:] != sample.shape[2:]
            or len(calls[0].input) % len(sample)
        ):
            return
        seen = calls[0].input[:, : sample.shape[1]].float()
        expected = (
            self.scaled(sample, timestep)
            .repeat(len(seen) // len(sample), *[1] * (sample.ndim - 1))
            .float()
        )
        if (seen - expected).norm() > 0.02 * expected.norm():
            raise ValueError(
                "pipeline: its network was not given the sample as "
                f"{type(self.scheduler).__name__} scales it, so the sample's noise level isn't known; use "
                "a scheduler that doesn't scale, as DDIMScheduler or DPMSolverMultistepScheduler"
            )


def _plain(value: Any) -> Any:
    """A tensor that autograd can use, also of inference mode."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def _copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments in containers of their own: some networks empty the lists that they get."""
    return tree_map(_plain, dict(arguments))


def _check_seen(calls: Sequence[_Call]) -> None:
    if not calls:
        raise ValueError(
            f"pipeline: between two steps none of its {', '.join(DENOISERS)} was called with a batch, so "
            "the network can't be asked again: use through_network=False, no conditions and no other "
            "network"
        )


def _is_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows


def _told(own: Mapping[str, Any], condition: Mapping[str, Any], network: str) -> dict[str, Any]:
    """The arguments `own` with those of the condition in their place, also of mappings within."""
    told = dict(own)
    for name, value in condition.items():
        if told.get(name) is None:
            raise ValueError(
                f"guidance: a term has the condition {name!r}; the pipeline tells its {network} "
                f"{sorted(key for key, one in own.items() if one is not None)}"
            )
        told[name] = _told(told[name], value, network) if isinstance(value, Mapping) else value
    return told


def _joined(rows: int, own: Any, *others: Any) -> Any:
    """An argument of one call with the rows of several: of the pipeline's, and of others with conditions."""
    same = all(other is own for other in others)
    if not isinstance(own, torch.Tensor) or (same and not _is_rows(own, rows)):
        return own
    values = [
        torch.atleast_1d(torch.as_tensor(value)).to(own.device, own.dtype)
        for value in (own, *others)
    ]
    for value in values:
        if rows % len(value) or value.shape[1:] != own.shape[1:]:
            raise ValueError(
                f"guidance: a condition has shape {tuple(value.shape)} in the place of "
                f"{tuple(own.shape)}; one row, or one an image, of that shape is allowed"
            )
    return torch.cat(
        [value.repeat(rows // len(value), *[1] * (value.ndim - 1)) for value in values]
    )


def _is_doubled(call: _Call, output: torch.Tensor, sample: torch.Tensor) -> bool:
    """Whether rows hold each image twice: two halves went into the network alike, came out different, and go into the
    step alike, the guided half twice (DiT). Two images of one seed and label come out alike."""
    if len(sample) % 2 or len(call.input) != len(sample):
        return False
    (seen, seen_too), (said, said_too), (guided, guided_too) = (
        tensor[:, : sample.shape[1]].chunk(2) for tensor in (call.input, call.output, output)
    )
    return (
        torch.equal(seen, seen_too)
        and torch.equal(guided, guided_too)
        and not torch.equal(said, said_too)
    )


def weights(said: torch.Tensor, made: torch.Tensor) -> list[float]:
    """w of `made = sum_i w_i part_i`, sum_i w_i = 1: how a pipeline combined the parts of its network's batch.

    Classifier-free guidance is made = first + s (second - first), and perturbed-attention guidance has three parts.
    Found by least squares.

    Args:
        said: (k B, C or 2C, ...), the network's output.
        made: (B, C, ...).

    Raises:
        ValueError: if it is no such combination, as with guidance rescale.
    """
    images, channels = made.shape[:2]
    fits = (
        len(said) % images == 0 and said.shape[2:] == made.shape[2:] and said.shape[1] >= channels
    )
    if fits:
        parts = [part.double().flatten().cpu() for part in said[:, :channels].split(images)]
        target = made.double().flatten().cpu()
        steps = torch.stack([part - parts[0] for part in parts], dim=1)
        found = (torch.linalg.pinv(steps.mT @ steps) @ (steps.mT @ (target - parts[0]))).tolist()
        found[0] = 1 - sum(found[1:])
        scaled = [weight * part for weight, part in zip(found, parts, strict=True)]
        eps = max(torch.finfo(tensor.dtype).eps for tensor in (said, made))
        fits = (sum(scaled) - target).norm() <= 8 * eps * max(
            part.norm() for part in (target, *scaled)
        )
    if not fits:
        raise ValueError(
            "the pipeline makes of its network's output what is no weighted mean of the batch's parts "
            "(guidance rescale, thresholding, ...), so it can't be made again: use through_network=False, "
            "no conditions and no other network, or the pipeline without it"
        )
    return found
