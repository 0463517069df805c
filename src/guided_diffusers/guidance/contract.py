"""The contract: a term of guidance says what is added to the score, at a noisy sample and its noise level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..noise import NoiseLevel

#: sigma / alpha beyond which a sample is noise alone: zero terminal SNR, the first step of flow matching
NO_SIGNAL = 1e4
Scale = (
    float
    | Sequence[float]
    | torch.Tensor
    | Callable[[NoiseLevel], float | Sequence[float] | torch.Tensor]
)


@dataclass(frozen=True)
class Step:
    """What a term may look at.

    Attributes:
        sample: x_t in the scheduler's space, (B, C, H, W), float32 or wider.
        x0: the x0 that the network predicts at `sample`, (B, C, H, W).
        predict: the same as a differentiable function of the sample; each call is a call of the network. Given another
            network as its second argument, what that one predicts, told the same things.
        level: the noise level of `sample`.
        index, count: this is step `index` of `count`, from 0.
        timestep: the scheduler's timestep, for messages.
        others: predicted x0 for each of the asking term's `conditions`.
        decode: images in [-1, 1], (B, 3 or 1, H', W'), of an x0: differentiable; the x0 itself in pixel space.
        graph: (x, x0) with the graph of the network's call from the one to the other, where a term that acts wants the
            gradient through the network and whoever made the step could keep it.
    """

    sample: torch.Tensor
    x0: torch.Tensor
    predict: Callable[..., torch.Tensor]
    level: NoiseLevel
    index: int
    count: int
    timestep: float
    others: tuple[torch.Tensor, ...] = ()
    decode: Callable[[torch.Tensor], torch.Tensor] = lambda x0: x0
    graph: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def score(self) -> torch.Tensor:
        """The score grad log p(x_t) that predicts `x0`."""
        return self.level.score(self.sample, self.x0)


class Guidance(ABC):
    """A term of guidance.

    Args:
        scale: multiplies the term; a number, one an image (B,), or a function of the `NoiseLevel` that gives either.
            0 is off.
        start, stop: the term acts while `start <= index / count < stop`; fractions of the run in [0, 1].
        sigma_interval: (low, high): instead, it acts while low < sigma / alpha <= high, whatever the scheduler
            (Kynkaanniemi et al. 2024, "Applying guidance in a limited interval improves sample and distribution
            quality in diffusion models"). None: off.

    Raises:
        ValueError: for other values.
    """

    #: arguments of the network, (B, ...) or (1, ...), with which the term needs its prediction, e.g. class_labels
    conditions: tuple[Mapping[str, Any], ...] = ()
    #: whether the term acts where sigma / alpha > NO_SIGNAL. There its score is multiplied by sigma^2 / alpha, up to
    #: 2^24: an exact one, which falls as alpha, stays finite, and a learned one destroys the image
    acts_on_noise = False
    #: whether the term takes its gradient through the network (`x0_gradient`)
    through_network = False

    def __init__(
        self,
        scale: Scale = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        sigma_interval: tuple[float, float] | None = None,
    ):
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"start={start!r}, stop={stop!r}: 0 <= start <= stop <= 1 is allowed")
        if sigma_interval is not None:
            check_interval(sigma_interval, start, stop)
        self.scale = scale if callable(scale) else _numbers(scale)
        self.start, self.stop, self.sigma_interval = start, stop, sigma_interval
        self._on = callable(scale) or bool(self.scale.any())

    @abstractmethod
    def score(self, step: Step) -> torch.Tensor:
        """What is added to the score grad log p(sample): (B, C, H, W), the scale included."""

    def active(self, index: int, count: int, level: NoiseLevel) -> bool:
        """Whether the term acts at step `index` of `count`; where its scale is 0, or there is no noise, it doesn't."""
        if (
            not self._on
            or level.sigma == 0
            or not (self.acts_on_noise or level.sigma <= NO_SIGNAL * level.alpha)
        ):
            return False
        if callable(self.scale) and not _numbers(self.scale(level)).any():
            return False
        if self.sigma_interval is not None:
            low, high = self.sigma_interval
            return low < level.sigma / level.alpha <= high
        return self.start <= index / count < self.stop

    def scale_at(self, step: Step) -> torch.Tensor:
        """The scale, broadcast over the sample's dimensions.

        Raises:
            ValueError: for a scale an image, of another number of images.
        """
        scale = _numbers(self.scale(step.level)) if callable(self.scale) else self.scale
        if scale.numel() not in (1, len(step.sample)):
            raise ValueError(
                f"scale holds {scale.numel()} numbers for {len(step.sample)} images; one, or one an "
                "image, is allowed"
            )
        return scale.to(step.sample, non_blocking=True).reshape(
            -1, *[1] * (step.sample.ndim - 1)
        )  # nobody waits

    def modules(self) -> tuple[torch.nn.Module, ...]:
        """The networks that the term runs; their parameters are frozen meanwhile."""
        return ()

    def terms(self) -> tuple[Guidance, ...]:
        return (self,)

    def __add__(self, other: Guidance) -> Guidance:
        return Sum(self.terms() + other.terms())


def check_interval(sigma_interval: tuple[float, float], start: float, stop: float) -> None:
    """Refuse an interval of noise levels beside one of the run, or one that is none.

    Raises:
        ValueError: for either.
    """
    if (start, stop) != (0, 1):
        raise ValueError(
            f"sigma_interval={sigma_interval!r} with start={start!r}, stop={stop!r}: only one of the two "
            "kinds is allowed"
        )
    if len(sigma_interval) != 2 or not 0 <= sigma_interval[0] <= sigma_interval[1]:
        raise ValueError(
            f"sigma_interval={sigma_interval!r}: (low, high) with 0 <= low <= high is allowed"
        )


def _numbers(scale: float | Sequence[float] | torch.Tensor) -> torch.Tensor:
    numbers = torch.as_tensor(scale, dtype=torch.float32)
    if numbers.ndim > 1 or not numbers.numel() or not numbers.isfinite().all():
        raise ValueError(f"scale is {scale!r}; a finite number or one an image is allowed")
    return numbers


class Sum(Guidance):
    """Terms side by side, each with its own scale and interval; empty, it is no guidance."""

    def __init__(self, terms: Sequence[Guidance] = ()):
        super().__init__()
        self._terms = tuple(one for term in terms for one in term.terms())

    def terms(self) -> tuple[Guidance, ...]:
        return self._terms

    def at(self, index: int, count: int, level: NoiseLevel) -> Sum:
        """Those that act at a step."""
        return Sum([term for term in self._terms if term.active(index, count, level)])

    def active(self, index: int, count: int, level: NoiseLevel) -> bool:
        return any(term.active(index, count, level) for term in self._terms)

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return tuple(module for term in self._terms for module in term.modules())

    @property
    def conditions(self) -> tuple[Mapping[str, Any], ...]:
        """Those of the terms, in their order."""
        return tuple(condition for term in self._terms for condition in term.conditions)

    def score(self, step: Step) -> torch.Tensor:
        """The sum over the terms; `step.others` are the predictions for `conditions`."""
        return total_score(self._terms, step)


def total_score(terms: Sequence[Guidance], step: Step) -> torch.Tensor:
    """The sum of the terms' scores; `step.others` are the predictions for the conditions of all."""
    scores, others = [], step.others
    for term in terms:
        mine, others = others[: len(term.conditions)], others[len(term.conditions) :]
        scores.append(term.score(replace(step, others=mine)))
    return sum(scores[1:], scores[0]) if scores else torch.zeros_like(step.sample)


def gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The gradient of `function(x).sum()`, in the dtype of `x`, also inside `torch.no_grad` and `inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)
        return torch.autograd.grad(function(x).sum(), x)[0]


def x0_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], step: Step, through_network: bool
) -> torch.Tensor:
    """The gradient in x_t of `function(x0).sum()` at the predicted x0, (B, C, H, W).

    Through the network it is exact, and costs the network's forward and backward pass. Otherwise the Jacobian of x0 is
    taken as alpha / (alpha^2 + sigma^2), which it is for Gaussian data of unit variance, whatever the network predicts;
    it costs neither.
    """
    if through_network and step.graph is not None:
        x, x0 = step.graph
        with torch.enable_grad():
            return torch.autograd.grad(function(x0).sum(), x, retain_graph=True)[
                0
            ]  # for the next term
    if through_network:
        return gradient(lambda x: function(step.predict(x)), step.sample)
    level = step.level
    return level.alpha / (level.alpha**2 + level.sigma**2) * gradient(function, step.x0)


def normalized(grad: torch.Tensor, step: Step) -> torch.Tensor:
    """`grad` of each image, scaled to the norm of the image's score; where it is 0, 0."""
    dims = tuple(range(1, grad.ndim))
    peak = grad.abs().amax(dims, keepdim=True)
    grad = grad / peak.clamp(
        min=torch.finfo(grad.dtype).tiny
    )  # the squares of a sure classifier's would vanish
    norm = torch.linalg.vector_norm(grad, dim=dims, keepdim=True)
    target = torch.linalg.vector_norm(step.score, dim=dims, keepdim=True)
    return grad * (target / norm.clamp(min=1))


def check_evaluating(module: torch.nn.Module) -> None:
    """Refuse a network that dropout or batch norm would make random, or mix the images of.

    Raises:
        ValueError: for one in training mode with either.
    """
    random = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._BatchNorm)
    if any(
        one.training and isinstance(one, random) and getattr(one, "p", 1) > 0
        for one in module.modules()
    ):
        raise ValueError(f"{type(module).__name__} is in training mode; call its eval() first")


@contextmanager
def frozen(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within, no parameter of the modules wants a gradient: nothing is kept or computed for it. Restored at the end."""
    trained = [
        [name for name, p in module.named_parameters() if p.requires_grad] for module in modules
    ]

    def want(gradient: bool) -> None:
        for module, names in zip(modules, trained, strict=True):
            parameters = dict(
                module.named_parameters()
            )  # anew: sequential offloading replaces them at each forward
            for name in names:
                parameters[name].requires_grad_(gradient)

    try:
        want(False)
        yield
    finally:
        want(True)


class FiniteCheck:
    """Refuses non-finite guidance without making an accelerator wait: there it is looked at when the run ends."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype  # of the network that guides
        self._seen: list[tuple[torch.Tensor, torch.dtype, str]] = []

    def __call__(self, step: Step, score: torch.Tensor, guided: torch.Tensor) -> None:
        """Note the score of a step and what it made of the network's output; on the CPU raise at once."""
        place = f"step {step.index} of {step.count} (timestep {step.timestep:g}, sigma {step.level.sigma:.4g})"
        finite = torch.stack([tensor.isfinite().all() for tensor in (step.sample, score, guided)])
        self._seen.append((finite, guided.dtype, place))
        if finite.device.type == "cpu":
            self.finish()

    def finish(self) -> None:
        """Look at the steps noted.

        Raises:
            FloatingPointError: for the first that is not finite, naming the step, the timestep and the likely cause.
        """
        for finite, dtype, place in self._seen:
            sample, score, guided = finite.tolist()
            if sample and score and guided:
                continue
            if not sample:
                cause = "the sample was not finite before: look at the network and the scheduler"
            elif not score and self.dtype == torch.float16:
                cause = f"the classifier computes in {self.dtype}, whose range is small: load it in float32"
            elif not score:
                cause = (
                    "the sample left the range that the classifier knows: lower guidance_scale, take more steps "
                    "or a first-order scheduler, or raise guidance_start"
                )
            else:
                cause = f"the guided output left the range of {dtype}: lower guidance_scale or load the unet in float32"
            raise FloatingPointError(
                f"the guidance is not finite at {place}; likely cause: {cause}"
            )
        self._seen.clear()
