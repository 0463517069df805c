"""Guidance: something added to the score.

    score of p(x_t | y)  =  score of p(x_t)  +  guidance_scale * grad_x log p(y | x_t)

A term of guidance answers one question: at this noisy sample and this noise level, what is added to
the score? Terms add up (`a + b`), and the sum corrects the network's output in one place
(`guider.Guider`).

To write a term, extend `Guidance` and implement `score(step)`. This one makes images brighter:

    class Brighter(Guidance):
        through_network = True  # the loop then keeps the autograd graph of its own call

        def score(self, step: StepContext) -> torch.Tensor:
            brightness = lambda x0: x0.mean(dim=(1, 2, 3))
            return self.scale_at(step) * x0_gradient(brightness, step, through_network=True)

A term that needs the network's prediction under another condition lists the arguments that differ
in `conditions`. They join the step's one call of the network, and the predicted x0 of each is in
`step.condition_x0`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf, isfinite, log
from numbers import Integral
from typing import Any, Literal

import torch

from .checks import check_bool, check_number, noting, shown
from .likelihood import Labels, logits_of, make_likelihood
from .networks import check_module, check_softplus, relu_as_softplus
from .noise import NoiseLevel, TrainedSchedule, module_config, schedule_config

#: sigma / alpha above which a sample is pure noise: zero terminal SNR, the first step of flow
#: matching
NO_SIGNAL = 1e4
Scale = (
    float
    | Sequence[float]
    | torch.Tensor
    | Callable[[NoiseLevel], float | Sequence[float] | torch.Tensor]
)


# ---------------------------------------------------------------- the contract


@dataclass(frozen=True)
class StepContext:
    """What a term can use at a step.

    Attributes:
        sample: x_t in the scheduler's space, (B, C, H, W), float32 or wider.
        x0: the x0 that the network predicts at `sample`, (B, C, H, W).
        predict: the predicted x0 as a differentiable function of the sample; each call evaluates
            the network. With another network as its second argument, that network's prediction
            under the same conditioning.
        level: the noise level of `sample`.
        index, count: the step is number `index` of `count`, from 0.
        timestep: the scheduler's timestep, for messages.
        condition_x0: the predicted x0 for each of the term's `conditions`.
        decode: differentiable images in [-1, 1], (B, 3 or 1, H', W'), of an x0; in pixel space the
            x0 itself.
        graph: (x, x0) with the autograd graph between them, if a term needs the gradient through
            the network and the loop could keep the graph of its own call.
        log_factors: to which `score` appends its term's `log_factor`, (B,), where it computes that
            on the way.
    """

    sample: torch.Tensor
    x0: torch.Tensor
    predict: Callable[..., torch.Tensor]
    level: NoiseLevel
    index: int
    count: int
    timestep: float
    condition_x0: tuple[torch.Tensor, ...] = ()
    decode: Callable[[torch.Tensor], torch.Tensor] = lambda x0: x0
    graph: tuple[torch.Tensor, torch.Tensor] | None = None
    log_factors: list[torch.Tensor] = field(default_factory=list)

    @property
    def score(self) -> torch.Tensor:
        """The score grad log p(x_t) that predicts `x0`."""
        return self.level.score(self.sample, self.x0)


class Guidance(ABC):
    """A term of guidance.

    Args:
        scale: multiplies the term; a number, one per image (B,), or a function of the `NoiseLevel`
            that returns either. 0 is off.
        start, stop: the term is active while `start <= index / count < stop`; fractions of the run
            in [0, 1].
        sigma_interval: (low, high): instead, it is active while low < sigma / alpha <= high,
            with any scheduler (Kynkaanniemi et al. 2024, "Applying guidance in a limited
            interval improves sample and distribution quality in diffusion models"). None: off.

    Raises:
        ValueError: for other values.
    """

    #: arguments of the network, (B, ...) or (1, ...), under which the term needs its prediction,
    #: e.g. class_labels
    conditions: tuple[Mapping[str, Any], ...] = ()
    #: whether the term is active where sigma / alpha > NO_SIGNAL. Its score is multiplied by
    #: sigma^2 / alpha, up to 2^24 there: an exact score falls as alpha, so that stays finite; a
    #: learned one destroys the image
    supports_pure_noise = False
    #: whether the term differentiates through the network (`x0_gradient`)
    through_network = False

    def __init__(
        self,
        scale: Scale = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        sigma_interval: tuple[float, float] | None = None,
    ):
        start, stop = check_interval(start, stop)
        if sigma_interval is not None:
            sigma_interval = _check_sigma_interval(sigma_interval, start, stop)
        self._set_scale(scale)
        self.start, self.stop, self.sigma_interval = start, stop, sigma_interval

    def _set_scale(self, scale: Scale) -> None:
        self.scale = scale if callable(scale) else scale_tensor("scale", scale)
        self._on = callable(scale) or bool(self.scale.any())

    @property
    def is_on(self) -> bool:
        """Whether its scale is another than 0, or a function of the noise level."""
        return self._on

    @abstractmethod
    def score(self, step: StepContext) -> torch.Tensor:
        """What is added to the score grad log p(sample): (B, C, H, W), the scale included."""

    def log_factor(self, step: StepContext) -> torch.Tensor | None:
        """The logarithm of the factor by which the term multiplies the density of the images, (B,),
        up to a constant; None: it has none, and can't weight a population (`Population`)."""
        return None

    def differs_within(self, particles: int) -> str | None:
        """What of the term's factor differs within the groups of so many images, in the plural; None:
        nothing."""
        return None

    def active(self, index: int, count: int, level: NoiseLevel) -> bool:
        """Whether the term has an effect at step `index` of `count`; not at scale 0, nor without
        noise."""
        if not self._on or level.sigma == 0:
            return False
        if level.sigma > NO_SIGNAL * level.alpha and not self.supports_pure_noise:
            return False
        if callable(self.scale) and not scale_tensor("scale", self.scale(level)).any():
            return False
        if self.sigma_interval is not None:
            low, high = self.sigma_interval
            return low < level.sigma / level.alpha <= high
        return self.start <= index / count < self.stop

    def scale_at(self, step: StepContext) -> torch.Tensor:
        """The scale, broadcast over the sample's dimensions.

        Raises:
            ValueError: for one scale an image, of another number of images.
        """
        scale = self.scale
        if callable(scale):
            scale = scale_tensor("scale", scale(step.level))
        if scale.numel() not in (1, len(step.sample)):
            raise ValueError(
                f"scale holds {scale.numel()} numbers for {len(step.sample)} images; one, or one per "
                "image, is allowed"
            )
        scale = scale.to(step.sample, non_blocking=True)  # so that an accelerator doesn't wait
        return scale.reshape(-1, *[1] * (step.sample.ndim - 1))

    def with_scale(self, scale: Scale) -> Guidance:
        """The term with another scale."""
        other = copy(self)
        other._set_scale(scale)
        return other

    def modules(self) -> tuple[torch.nn.Module, ...]:
        """The networks that the term runs."""
        return ()

    def terms(self) -> tuple[Guidance, ...]:
        """The single terms of a sum; of any other term itself."""
        return (self,)

    def __add__(self, other: Guidance) -> Guidance:
        if not isinstance(other, Guidance):
            raise ValueError(f"+ {shown(other)}: only terms of guidance can be added")
        return GuidanceSum(self.terms() + other.terms())


def check_interval(start: Any, stop: Any, prefix: str = "") -> tuple[float, float]:
    """(start, stop) as floats.

    Args:
        prefix: of the arguments' names, for the message.

    Raises:
        ValueError: unless 0 <= start <= stop <= 1.
    """
    start = check_number(f"{prefix}start", start, 0, 1)
    stop = check_number(f"{prefix}stop", stop, 0, 1)
    if start > stop:
        raise ValueError(
            f"{prefix}start={start}, {prefix}stop={stop}: 0 <= start <= stop <= 1 is allowed"
        )
    return start, stop


def _check_sigma_interval(sigma_interval: Any, start: float, stop: float) -> tuple[float, float]:
    if (start, stop) != (0, 1):
        raise ValueError(
            f"sigma_interval={sigma_interval!r} with start={start!r}, stop={stop!r}: only one of "
            "the two kinds is allowed"
        )
    try:
        low, high = map(float, sigma_interval)
    except (TypeError, ValueError, RuntimeError):
        low, high = 1.0, 0.0
    if not 0 <= low <= high:
        raise ValueError(
            f"sigma_interval={shown(sigma_interval)}: (low, high) with 0 <= low <= high is allowed"
        )
    return low, high


def scale_tensor(name: str, scale: Any) -> torch.Tensor:
    """A scale as a float32 tensor, () or (B,).

    Raises:
        ValueError: for anything but a finite number, or one per image.
    """
    try:
        numbers = torch.as_tensor(scale)
        valid = numbers.dtype != torch.bool and not numbers.is_complex()
        numbers = numbers.to(torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        valid, numbers = False, torch.zeros(0)
    if not valid or numbers.ndim > 1 or not numbers.numel() or not numbers.isfinite().all():
        raise ValueError(f"{name}={shown(scale)}: a finite number or one per image is allowed")
    return numbers


class ScaleSchedule:
    """A scale as a function of the noise level, for the `scale` of a term:

        scale * f(log sigma / alpha),    f linear between the knots, constant outside them

    Args:
        schedule: {"sigmas": [...], "scales": [...]}, the knots: rising noise-to-signal ratios
            sigma / alpha above 0, and the values of f there, of which one at least isn't 0.
        scale: a number, or one per image (B,).

    Raises:
        ValueError: for another schedule, naming `guidance_schedule`.
    """

    def __init__(self, schedule: Mapping[str, Sequence[float]], scale: Any = 1.0):
        try:
            knots = [schedule[name] for name in ("sigmas", "scales")]
            sigmas, scales = (list(map(float, values)) for values in knots)
            valid = len(schedule) == 2 and 0 < len(sigmas) == len(scales)
            valid = valid and not any(isinstance(values, str) for values in knots)
        except (TypeError, ValueError, KeyError, OverflowError):
            valid, sigmas, scales = False, [], []
        rising = all(low < high for low, high in pairwise([0.0, *sigmas, inf]))
        if not valid or not rising or not any(scales) or not all(map(isfinite, scales)):
            raise ValueError(
                f'guidance_schedule={shown(schedule)}: {{"sigmas": [...], "scales": [...]}} is allowed, '
                "as many finite scales as sigmas (sigma / alpha, rising, above 0), not all 0"
            )
        self.log_sigmas, self.scales = [log(sigma) for sigma in sigmas], scales
        self.scale = scale_tensor("scale", scale)

    def factor(self, level: NoiseLevel) -> float:
        """f of the level."""
        x = log(level.sigma / level.alpha) if level.sigma and level.alpha else inf
        if x <= self.log_sigmas[0] or not level.sigma:
            return self.scales[0]
        for (low, high), (a, b) in zip(
            pairwise(self.log_sigmas), pairwise(self.scales), strict=True
        ):
            if x <= high:
                return a + (b - a) * (x - low) / (high - low)
        return self.scales[-1]

    def __call__(self, level: NoiseLevel) -> torch.Tensor:
        return self.scale * self.factor(level)


def differ_within(values: Sequence[Any], particles: int) -> bool:
    """Whether values, one for all images or one an image, differ within groups of images."""
    is_each = len(values) > 1
    return is_each and any(value != values[i - i % particles] for i, value in enumerate(values))


class GuidanceSum(Guidance):
    """A sum of terms, each with its own scale and interval; without terms, no guidance."""

    def __init__(self, terms: Sequence[Guidance] = ()):
        super().__init__()
        self._terms = tuple(single for term in terms for single in term.terms())

    def with_scale(self, scale: Scale) -> GuidanceSum:
        """The sum of the terms, each with this scale."""
        return GuidanceSum([term.with_scale(scale) for term in self._terms])

    def terms(self) -> tuple[Guidance, ...]:
        return self._terms

    def active(self, index: int, count: int, level: NoiseLevel) -> bool:
        return any(term.active(index, count, level) for term in self._terms)

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return tuple(module for term in self._terms for module in term.modules())

    @property
    def conditions(self) -> tuple[Mapping[str, Any], ...]:
        """The terms' conditions, in their order."""
        return tuple(condition for term in self._terms for condition in term.conditions)

    def score(self, step: StepContext) -> torch.Tensor:
        """Sum of the terms' scores; `step.condition_x0` are the predictions for all
        `conditions`."""
        return total_score(self._terms, step)


def total_score(
    terms: Sequence[Guidance],
    step: StepContext,
    record: Callable[[Guidance, StepContext, torch.Tensor], object] = lambda *_: None,
) -> torch.Tensor:
    """Sum of the terms' scores; `step.condition_x0` are the predictions for the conditions of all,
    in order. `record` is called with each term, the term's step and its score."""
    if not terms:
        return torch.zeros_like(step.sample)
    scores, remaining = [], step.condition_x0
    for term in terms:
        count = len(term.conditions)
        part = replace(step, condition_x0=remaining[:count], log_factors=[])
        with noting(f"in {type(term).__name__} at step {step.index} (timestep {step.timestep:g})"):
            scores.append(term.score(part))
        record(term, part, scores[-1])
        remaining = remaining[count:]
    return sum(scores[1:], scores[0])


def check_devices(terms: Sequence[Guidance], device: torch.device) -> None:
    """Refuse a term's network that is on another device than the samples.

    Raises:
        ValueError: naming the network and both devices.
    """
    for module in GuidanceSum(terms).modules():
        devices = {p.device for p in module.parameters()}
        if (
            devices and device not in devices and not hasattr(module, "_hf_hook")
        ):  # accelerate moves it
            raise ValueError(
                f"guidance: {type(module).__name__} is on {sorted(map(str, devices))}, the "
                f"pipeline's samples are on {device}; move it there"
            )


# ---------------------------------------------------------------- gradients


def value_and_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`function(x)` and the gradient of its sum, in the dtype of `x`; works in `torch.no_grad` and
    `inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)
        value = _differentiable(function(x))
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The gradient of `value_and_gradient`."""
    return value_and_gradient(function, x)[1]


def _differentiable(value: torch.Tensor) -> torch.Tensor:
    if not value.requires_grad:
        raise ValueError(
            "guidance: a term's value has no gradient in the image, which detach(), no_grad(), "
            "integers and NumPy cut; compute it of the image by differentiable functions of torch"
        )
    return value


def x0_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], step: StepContext, through_network: bool
) -> torch.Tensor:
    """The gradient of `x0_value_and_gradient`."""
    return x0_value_and_gradient(function, step, through_network)[1]


def x0_value_and_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], step: StepContext, through_network: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`function(x0)` at the predicted x0, and the gradient of its sum in x_t, (B, C, H, W).

    Through the network it is exact and costs the network's forward and backward pass. Otherwise the
    Jacobian of x0 is taken as alpha / (alpha^2 + sigma^2), its value for Gaussian data of unit
    variance, also where a network predicts otherwise; this costs neither.
    """
    if through_network and step.graph is not None:
        x, x0 = step.graph
        with torch.enable_grad():
            value = _differentiable(function(x0))
            return value.detach(), torch.autograd.grad(value.sum(), x, retain_graph=True)[0]
    if through_network:
        return value_and_gradient(lambda x: function(step.predict(x)), step.sample)
    level = step.level
    value, grad = value_and_gradient(function, step.x0)
    return value, level.alpha / (level.alpha**2 + level.sigma**2) * grad


def rescale_to_score(grad: torch.Tensor, step: StepContext) -> torch.Tensor:
    """`grad` of each image, rescaled to the norm of the image's score; 0 where it is 0."""
    dims = tuple(range(1, grad.ndim))
    peak = grad.abs().amax(dims, keepdim=True)
    # divided by its peak first: the squares of a confident classifier's gradient would underflow
    grad = grad / peak.clamp(min=torch.finfo(grad.dtype).tiny)
    norm = torch.linalg.vector_norm(grad, dim=dims, keepdim=True)
    target = torch.linalg.vector_norm(step.score, dim=dims, keepdim=True)
    return grad * (target / norm.clamp(min=1))


# ---------------------------------------------------------------- noise-aware classifiers


class NoiseAwareGuidance(Guidance):
    """Guidance by a network that was trained on noised data: adds `scale * grad_x log p(y | x_t)`.

    The network is matched to the step by its noise-to-signal ratio, with any scheduler: it is
    evaluated at z = sample / sqrt(alpha^2 + sigma^2) and the fractional timestep of its own
    schedule with the same sigma / alpha. The chain rule puts 1 / sqrt(alpha^2 + sigma^2) into the
    gradient. Above its highest training noise level, the network is evaluated at that level
    (`TrainedSchedule.extrapolation_scale`).

    Args:
        module: its `config` has the noise schedule of its training, as arguments of
            `DDPMScheduler`.
        normalize: rescale the gradient of each image to the norm of its score, so that `scale`
            counts scores; at scale 1, guidance is as strong as the diffusion network.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        scale: Scale,
        start: float,
        stop: float,
        sigma_interval: tuple[float, float] | None = None,
        normalize: bool = False,
    ):
        super().__init__(scale, start, stop, sigma_interval)
        check_module("classifier", module)
        self.module, self.normalize = module, check_bool("normalize", normalize)
        self.supports_pure_noise = not normalize  # thanks to `extrapolation_scale`
        self.schedule = TrainedSchedule(schedule_config(module), pure_noise=False)

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.module,)

    @abstractmethod
    def log_likelihood(self, z: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        """log p(y | z), (B,), up to a constant, at timestep `t` of the network's schedule; z in its
        dtype."""

    def network_input(
        self, sample: torch.Tensor, level: NoiseLevel
    ) -> tuple[torch.Tensor, float, float]:
        """(z, t, norm): the variance-preserving sample z = sample / norm, and its timestep in the
        network's schedule."""
        norm = (level.alpha**2 + level.sigma**2) ** 0.5
        return sample / norm, self.schedule.timestep(level), norm

    def log_probability(self, z: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        """log p(y | z), (B,), of `network_input`'s z and t, for z of any dtype; differentiable."""
        dtype = next((p.dtype for p in self.module.parameters()), z.dtype)
        return self.log_likelihood(z.to(dtype), t)

    def log_factor(self, step: StepContext) -> torch.Tensor:
        """log p(y | x_t), (B,), at any scale: that only shapes how samples get there."""
        z, t, _ = self.network_input(step.sample, step.level)
        return self.log_probability(z, t)

    def score(self, step: StepContext) -> torch.Tensor:
        z, t, norm = self.network_input(step.sample, step.level)
        faster = getattr(self.module, "input_gradient", None)  # set by `speed.gradients_in`
        if faster is not None:
            log_p, grad = faster(self, z, t)
        else:
            log_p, grad = value_and_gradient(lambda z: self.log_probability(z, t), z)
        step.log_factors.append(log_p)
        if self.normalize:
            return self.scale_at(step) * rescale_to_score(grad, step)
        return (self.scale_at(step) * (self.schedule.extrapolation_scale(step.level) / norm)) * grad

    def select(self, images: slice | list[int], count: int) -> NoiseAwareGuidance:
        """The term for some of `count` images."""
        part, scale = copy(self), self.scale
        if callable(scale):
            part.scale = lambda level: _select_scale(scale(level), images)
        else:
            part.scale = _select_scale(scale, images)
        return part


def _select_scale(
    scale: float | Sequence[float] | torch.Tensor, images: slice | list[int]
) -> torch.Tensor:
    numbers = torch.as_tensor(scale)
    return numbers[images] if numbers.numel() > 1 else numbers


class ClassifierGuidance(NoiseAwareGuidance):
    """Guidance by a noise-aware classifier: adds `scale * sum_y w_y grad_x log p(y | x_t)`.

    Dhariwal & Nichol 2021, "Diffusion models beat GANs on image synthesis", section 4. The
    likelihood follows from the classifier's `config.problem_type`, as in `transformers`; f are its
    logits:

        single_label_classification (the default)    joint f_y - log sum_i exp(marginal f_i)
        multi_label_classification, independent      log sigmoid(f_y)
        regression                                    -(f - target)^2 / (2 std^2)

    Args:
        classifier: `NoiseAwareClassifier`, or any module with `forward(sample, timestep)` that
            returns `.logits` (B, num_labels) and a `config` with the noise schedule of its
            training.
        label: an id, a name of `config.id2label`, a mapping {id or name: weight}, a list of such
            (one per image), or a tensor of ids. Negative weights steer away.
        scale: 0 is off. 1 samples p(x | y) if the classifier is exact and the network is
            unconditional, or gets no label. Larger: sharper samples of lower diversity, but not
            p(x) p(y | x)^scale, whose score isn't a multiple of this gradient; `power` is for that.
        start, stop, sigma_interval: when it is active, as in `Guidance`.
        target: instead of a label, the value for a regressor's outputs: a number, (num_labels,) or
            (B, num_labels).
        std: standard deviation of the regressed value given the image, in the target's units.
        joint_temperature, marginal_temperature: "joint" and "marginal" above (Ma et al. 2024,
            "Elucidating the design space of classifier-guided diffusion generation", section 4).
            With both 1 it is the classifier's own p(y | x_t). A marginal below 1 keeps the gradient
            alive where the classifier is confident; 0 follows the logit alone.
        softplus: replaces the classifier's `torch.nn.ReLU` modules (not its calls of `F.relu`) by
            softplus(beta x) / beta with this beta while the gradient is taken, which makes it
            smooth (the same paper: 3 for a ResNet). None: off.
        normalize: as in `NoiseAwareGuidance`.
        power: w, within the classifier's `config.power_range`: at scale 1, samples are of
            p(x) p(y | x)^w, since then

                score of p(x_t) p(y | x_t; w)  =  score of p(x_t) + grad log E[p(y | x_0)^w | x_t]

            (Lu et al. 2023, "Contrastive energy prediction for exact energy-guided diffusion
            sampling", eq. 8), and the classifier was trained to give this expectation. None:
            log p(y | x_t), of any classifier.

    Raises:
        ValueError: for any other argument, or one without effect for this classifier.
    """

    def __init__(
        self,
        classifier: torch.nn.Module,
        label: Labels | None = None,
        scale: Scale = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        sigma_interval: tuple[float, float] | None = None,
        target: float | Sequence[float] | torch.Tensor | None = None,
        std: float = 1.0,
        joint_temperature: float = 1.0,
        marginal_temperature: float = 1.0,
        softplus: float | None = None,
        normalize: bool = False,
        power: float | None = None,
    ):
        super().__init__(classifier, scale, start, stop, sigma_interval, normalize)
        self.classifier, self.softplus = classifier, softplus
        config, options = module_config(classifier), (std, joint_temperature, marginal_temperature)
        self.likelihood = make_likelihood(config, label, target, *options, power)
        self.power = None if config.get("power_range") is None else power  # else it is 1 or None
        check_softplus(classifier, softplus)

    def log_likelihood(self, z: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        options = {} if self.power is None else {"power": self.power}
        module = relu_as_softplus(self.module, self.softplus)
        return self.likelihood(logits_of(module(z, t, **options)))

    def differs_within(self, particles: int) -> str | None:
        return (
            "labels or targets" if differ_within(self.likelihood.conditions(), particles) else None
        )

    def select(self, images: slice | list[int], count: int) -> ClassifierGuidance:
        part = super().select(images, count)
        part.likelihood = self.likelihood.select(images)
        return part


# ---------------------------------------------------------------- differences of two predictions


class ClassifierFreeGuidance(Guidance):
    """Classifier-free guidance: adds `scale * (score(x_t | c) - score(x_t))`.

    Ho & Salimans 2022, "Classifier-free diffusion guidance", eq. 6, for a network that was trained
    with its condition dropped at times, so that it knows both. The two predictions come from one
    call of the network with a batch of twice the size. In terms of the predicted x0:

        x0 = x0(c) + scale (x0(c) - x0(null))

    Args:
        null: the condition of no condition: the network's null class label, or a mapping of its
            arguments, such as {"encoder_hidden_states": (1 or B, tokens, width)} of an empty
            prompt.
        scale: 0 is off: the conditional network. It is Diffusers' `guidance_scale` (also GLIDE's and
            Imagen's) less 1: for `guidance_scale=7.5` pass 6.5.
        rescale: share of the standard deviation of the network's output, an image, that is restored
            to its value without guidance, 0 (off) to 1 (Lin et al. 2024, "Common diffusion noise
            schedules and sample steps are flawed", section 3.4).
        threshold: dynamic thresholding of the guided x0, of data in [-1, 1]: x0 is clipped to [-s,
            s] and divided by s, the larger of 1 and this quantile of |x0| in the image, in (0, 1]
            (Saharia et al. 2022, Imagen, section 2.3: 0.995). None: off.
        start, stop, sigma_interval: when it is active, as in `Guidance`.

    Raises:
        ValueError: for other values.
    """

    supports_pure_noise = True

    def __init__(
        self,
        null: int | Mapping[str, Any],
        scale: Scale = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        sigma_interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        threshold: float | None = None,
    ):
        super().__init__(scale, start, stop, sigma_interval)
        self.rescale = check_number("rescale", rescale, 0, 1)
        self.threshold = threshold
        if threshold is not None:
            self.threshold = check_number("threshold", threshold, 0, 1, above=True)
        if isinstance(null, Mapping) and null:
            self.conditions = (dict(null),)
        elif isinstance(null, Integral) and not isinstance(null, bool) and null >= 0:
            self.conditions = ({"class_labels": torch.tensor([null])},)
        else:
            raise ValueError(
                f"null={shown(null)}: a class label, 0 or above, or a mapping of the network's "
                "arguments is allowed"
            )

    def score(self, step: StepContext) -> torch.Tensor:
        scale = self.scale_at(step)
        x0 = step.x0 + scale * (step.x0 - step.condition_x0[0])
        if self.rescale and step.level.b:  # b = 0: a consistency model's boundary, x0 is the sample
            x0 = self._rescaled(x0, step)
        if self.threshold is not None:
            s = x0.abs().flatten(1).quantile(self.threshold, dim=1).clamp(min=1)
            s = s.reshape(-1, *[1] * (x0.ndim - 1))
            x0 = x0.clamp(-s, s) / s
        x0 = torch.where(scale == 0, step.x0, x0)  # exactly off, for a single image too
        return step.level.score_shift(x0 - step.x0)

    def _rescaled(self, x0: torch.Tensor, step: StepContext) -> torch.Tensor:
        level, dims = step.level, tuple(range(1, x0.ndim))
        output = level.output(step.sample, x0)
        before = level.output(step.sample, step.x0)
        factor = before.std(dims, keepdim=True) / output.std(dims, keepdim=True)
        return level.x0(step.sample, (self.rescale * factor + 1 - self.rescale) * output)


class AutoGuidance(Guidance):
    """Autoguidance: adds `scale * (score of the network - score of a worse network)`.

    Karras et al. 2024, "Guiding a diffusion model with a bad version of itself", eq. 3. The worse
    network is smaller or less trained and gets the same condition. It costs one call of the worse
    network.

    Args:
        network: called as the pipeline's own network is, with the same kind of prediction (epsilon,
            v, ...).
        scale: 0 is off; the paper's guidance weight is 1 + this.
        start, stop, sigma_interval: when it is active, as in `Guidance`.
    """

    supports_pure_noise = True

    def __init__(
        self,
        network: torch.nn.Module,
        scale: Scale = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        sigma_interval: tuple[float, float] | None = None,
    ):
        super().__init__(scale, start, stop, sigma_interval)
        check_module("network", network)
        self.network = network

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.network,)

    def score(self, step: StepContext) -> torch.Tensor:
        worse_x0 = step.predict(step.sample, self.network)
        return self.scale_at(step) * step.level.score_shift(step.x0 - worse_x0)


# ---------------------------------------------------------------- energies


class EnergyGuidance(Guidance):
    """Guidance to a low energy: adds `-scale * grad_x E`, as for p(x) exp(-scale E(x)).

    With `through_network=True` and an energy of the predicted x0 this is universal guidance (Bansal
    et al. 2023, eq. 6) and, for a measurement, E = |y - A(x0)|^2, diffusion posterior sampling
    (Chung et al. 2023, eq. 16). The default approximates the network's Jacobian by a number
    (`x0_gradient`), which is cheaper. Images with a known left half:

        EnergyGuidance(lambda images: ((images - known)[..., :14] ** 2).sum((1, 2, 3)), scale=10)

    Args:
        energy: returns one number per image, (B,), for the input that `of` selects.
        scale: 0 is off.
        of: "image": the predicted x0 as images in [-1, 1], decoded where the model is latent; "x0":
            the predicted x0 in the model's own space; "sample": energy(x_t, level), the noisy
            sample, which needs no prediction.
        through_network: whether the gradient goes through the network, too (`x0_gradient`); for
            "image" and "x0".
        normalize: rescale the gradient of each image to the norm of its score, so that `scale`
            counts scores.
        start, stop, sigma_interval: when it is active, as in `Guidance`.

    Raises:
        ValueError: for other values, or, in the run, an energy that is not one number per image.
    """

    def __init__(
        self,
        energy: Callable[..., torch.Tensor],
        scale: Scale = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        sigma_interval: tuple[float, float] | None = None,
        of: Literal["image", "x0", "sample"] = "image",
        through_network: bool = False,
        normalize: bool = False,
    ):
        super().__init__(scale, start, stop, sigma_interval)
        if not callable(energy):
            raise ValueError(f"energy={shown(energy)}: a function of the image is allowed")
        normalize = check_bool("normalize", normalize)
        through_network = check_bool("through_network", through_network)
        if of not in ("image", "x0", "sample"):
            raise ValueError(f"of={shown(of)}: 'image', 'x0' and 'sample' are allowed")
        if of == "sample" and through_network:
            raise ValueError("through_network=True has no effect with of='sample'")
        self.energy, self.of, self.normalize = energy, of, normalize
        self.through_network = through_network
        self.supports_pure_noise = not (through_network or normalize or of == "sample")

    def log_factor(self, step: StepContext) -> torch.Tensor:
        """-scale E, (B,), of the input that `of` selects: the predicted x0, unless "sample"; with a
        scale function, that of the noise level."""
        value = self._energy(step, step.sample if self.of == "sample" else step.x0)
        return -self.scale_at(step).flatten() * value

    def differs_within(self, particles: int) -> str | None:
        if callable(self.scale):
            return "scales at each noise level, so no density,"
        scales = self.scale.flatten().tolist()
        return "scales" if differ_within(scales, particles) else None

    def score(self, step: StepContext) -> torch.Tensor:
        scale = self.scale_at(step)
        if self.of == "sample":
            value, grad = value_and_gradient(lambda x: self._energy(step, x), step.sample)
        else:
            value, grad = x0_value_and_gradient(
                lambda x0: self._energy(step, x0), step, self.through_network
            )
        step.log_factors.append(-scale.flatten() * value)
        return -scale * (rescale_to_score(grad, step) if self.normalize else grad)

    def _energy(self, step: StepContext, x: torch.Tensor) -> torch.Tensor:
        """E, (B,), of a noisy sample or an x0, as `of` says."""
        if self.of == "sample":
            value = self.energy(x, step.level)
        else:
            value = self.energy(step.decode(x) if self.of == "image" else x)
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"energy gave {shown(value)}; a tensor with one number per image, "
                f"({len(step.sample)},), is allowed"
            )
        if value.shape != step.sample.shape[:1]:
            raise ValueError(
                f"energy gave {tuple(value.shape)}; one number per image, ({len(step.sample)},), "
                "is allowed"
            )
        return value
