"""Guidance: something added to the score.

    score of p(x_t | y)  =  score of p(x_t)  +  guidance_scale * grad_x log p(y | x_t)

A term of guidance answers one question: at this noisy sample and this noise level, what do you add to the score? Terms
add up (`a + b`), and the sum corrects the network's output in one place (`NoiseLevel.corrected`).

To write a term, extend `Guidance` and give `score(step)`, for instance to make images brighter:

    class Brighter(Guidance):
        def score(self, step: StepContext) -> torch.Tensor:
            return self.scale_at(step) * gradient(lambda x: step.predict(x).mean(dim=(1, 2, 3)), step.sample)

A term that needs the network's prediction under another condition than the step's own names the arguments that differ
in `conditions`; they join the step's one call of the network, and their predicted x0 are in `step.condition_x0`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal

import torch

from .noise import NoiseLevel, TrainedSchedule, module_config, schedule_config

#: sigma / alpha beyond which a sample is noise alone: zero terminal SNR, the first step of flow matching
NO_SIGNAL = 1e4
Scale = (
    float
    | Sequence[float]
    | torch.Tensor
    | Callable[[NoiseLevel], float | Sequence[float] | torch.Tensor]
)


@dataclass(frozen=True)
class StepContext:
    """What a term may look at.

    Attributes:
        sample: x_t in the scheduler's space, (B, C, H, W), float32 or wider.
        x0: the x0 that the network predicts at `sample`, (B, C, H, W).
        predict: the same as a differentiable function of the sample; each call is a call of the network. Given another
            network as its second argument, what that one predicts, told the same things.
        level: the noise level of `sample`.
        index, count: this is step `index` of `count`, from 0.
        timestep: the scheduler's timestep, for messages.
        condition_x0: predicted x0 for each of the evaluated term's `conditions`.
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
    condition_x0: tuple[torch.Tensor, ...] = ()
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
    supports_pure_noise = False
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
    def score(self, step: StepContext) -> torch.Tensor:
        """What is added to the score grad log p(sample): (B, C, H, W), the scale included."""

    def active(self, index: int, count: int, level: NoiseLevel) -> bool:
        """Whether the term acts at step `index` of `count`; where its scale is 0, or there is no noise, it doesn't."""
        if (
            not self._on
            or level.sigma == 0
            or not (self.supports_pure_noise or level.sigma <= NO_SIGNAL * level.alpha)
        ):
            return False
        if callable(self.scale) and not _numbers(self.scale(level)).any():
            return False
        if self.sigma_interval is not None:
            low, high = self.sigma_interval
            return low < level.sigma / level.alpha <= high
        return self.start <= index / count < self.stop

    def scale_at(self, step: StepContext) -> torch.Tensor:
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
        return GuidanceSum(self.terms() + other.terms())


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


class GuidanceSum(Guidance):
    """Terms side by side, each with its own scale and interval; empty, it is no guidance."""

    def __init__(self, terms: Sequence[Guidance] = ()):
        super().__init__()
        self._terms = tuple(one for term in terms for one in term.terms())

    def terms(self) -> tuple[Guidance, ...]:
        return self._terms

    def at(self, index: int, count: int, level: NoiseLevel) -> GuidanceSum:
        """Those that act at a step."""
        return GuidanceSum([term for term in self._terms if term.active(index, count, level)])

    def active(self, index: int, count: int, level: NoiseLevel) -> bool:
        return any(term.active(index, count, level) for term in self._terms)

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return tuple(module for term in self._terms for module in term.modules())

    @property
    def conditions(self) -> tuple[Mapping[str, Any], ...]:
        """Those of the terms, in their order."""
        return tuple(condition for term in self._terms for condition in term.conditions)

    def score(self, step: StepContext) -> torch.Tensor:
        """The sum over the terms; `step.condition_x0` are the predictions for `conditions`."""
        return total_score(self._terms, step)


def total_score(terms: Sequence[Guidance], step: StepContext) -> torch.Tensor:
    """The sum of the terms' scores; `step.condition_x0` are the predictions for the conditions of all."""
    scores, others = [], step.condition_x0
    for term in terms:
        mine, others = others[: len(term.conditions)], others[len(term.conditions) :]
        scores.append(term.score(replace(step, condition_x0=mine)))
    return sum(scores[1:], scores[0]) if scores else torch.zeros_like(step.sample)


def gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The gradient of `function(x).sum()`, in the dtype of `x`, also inside `torch.no_grad` and `inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)
        return torch.autograd.grad(function(x).sum(), x)[0]


def x0_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], step: StepContext, through_network: bool
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


def rescale_to_score(grad: torch.Tensor, step: StepContext) -> torch.Tensor:
    """`grad` of each image, scaled to the norm of the image's score; where it is 0, 0."""
    dims = tuple(range(1, grad.ndim))
    peak = grad.abs().amax(dims, keepdim=True)
    grad = grad / peak.clamp(
        min=torch.finfo(grad.dtype).tiny
    )  # the squares of a sure classifier's would vanish
    norm = torch.linalg.vector_norm(grad, dim=dims, keepdim=True)
    target = torch.linalg.vector_norm(step.score, dim=dims, keepdim=True)
    return grad * (target / norm.clamp(min=1))


def check_eval_mode(module: torch.nn.Module) -> None:
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
def no_parameter_grad(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
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

    def __call__(self, step: StepContext, score: torch.Tensor, guided: torch.Tensor) -> None:
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


Label = int | str | Mapping[int | str, float]
SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


class NoiseAwareGuidance(Guidance):
    """Steer by a network that was trained on noised data: adds `scale * grad_x log p(y | x_t)`.

    The network is asked at the noise-to-signal ratio of the step, whatever the scheduler calls it: at z = sample /
    sqrt(alpha^2 + sigma^2) and the (fractional) timestep of the network's own schedule with the same sigma / alpha; the
    chain rule puts 1 / sqrt(alpha^2 + sigma^2) into the gradient. At noisier levels than it was trained on, it is asked
    at its noisiest, and what it then moves the predicted x0 by is kept (`TrainedSchedule.extrapolation_scale`).

    Args:
        module: its `config` has the noise schedule that it was trained with, in `DDPMScheduler`'s words.
        normalize: scale the gradient of each image to the norm of its score, so that `scale` counts scores; at scale 1
            guidance is as strong as the diffusion network.
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
        check_eval_mode(module)
        self.module, self.normalize = module, normalize
        self.supports_pure_noise = not normalize  # `TrainedSchedule.extrapolation_scale`
        self.schedule = TrainedSchedule(schedule_config(module))

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.module,)

    @abstractmethod
    def log_likelihood(self, z: torch.Tensor, t: float) -> torch.Tensor:
        """log p(y | z), (B,), up to a constant, at timestep `t` of the network's schedule; z in its dtype."""

    def score(self, step: StepContext) -> torch.Tensor:
        level, t = step.level, self.schedule.timestep(step.level)
        z = step.sample / (norm := (level.alpha**2 + level.sigma**2) ** 0.5)
        dtype = next((p.dtype for p in self.module.parameters()), z.dtype)
        fast = getattr(self.module, "input_gradient", None)  # of `speed.gradients_in`
        grad = (
            fast(self, z, t) if fast else gradient(lambda z: self.log_likelihood(z.to(dtype), t), z)
        )
        if self.normalize:
            return self.scale_at(step) * rescale_to_score(grad, step)
        return (self.scale_at(step) * (self.schedule.extrapolation_scale(level) / norm)) * grad

    def select(self, rows: slice | list[int], count: int) -> NoiseAwareGuidance:
        """The term for some of `count` images."""
        part, scale = copy(self), self.scale
        part.scale = (
            (lambda level: _select(scale(level), rows)) if callable(scale) else _select(scale, rows)
        )
        return part


def _select(scale: float | Sequence[float] | torch.Tensor, rows: slice | list[int]) -> torch.Tensor:
    numbers = torch.as_tensor(scale)
    return numbers[rows] if numbers.numel() > 1 else numbers


class LogitsGuidance(NoiseAwareGuidance):
    """By the likelihood that follows from a network's logits."""

    def log_likelihood(self, z: torch.Tensor, t: float) -> torch.Tensor:
        return self.likelihood(logits_of(self.module(z, t)))

    def select(self, rows: slice | list[int], count: int) -> LogitsGuidance:
        part = super().select(rows, count)
        part.likelihood = self.likelihood.select(rows)
        return part


class LabelGuidance(LogitsGuidance):
    """`ClassifierGuidance` without its options.

    Args:
        labels: {id: weight}, one or one an image.

    Raises:
        ValueError: for a classifier without labels, which regresses.
    """

    def __init__(
        self,
        classifier: torch.nn.Module,
        labels: list[dict[int, float]],
        scale: Scale,
        start: float,
        stop: float,
    ):
        super().__init__(classifier, scale, start, stop)
        kind = module_config(classifier).get("problem_type") or SINGLE
        if kind not in (SINGLE, MULTI):
            raise ValueError(
                f"classifier: problem_type={kind!r} has no labels; {SINGLE} and {MULTI} are allowed, or "
                "guidance=ClassifierGuidance(classifier, target=...)"
            )
        self.likelihood = LabelLikelihood(labels, kind == MULTI)


class ClassifierGuidance(LogitsGuidance):
    """Steer to what a noise-aware classifier calls the label: adds `scale * sum_y w_y grad_x log p(y | x_t)`.

    Dhariwal & Nichol 2021, "Diffusion models beat GANs on image synthesis", section 4. What log p(y | x_t) is follows
    from the classifier's `config.problem_type`, in the words of `transformers`; f are its logits:

        single_label_classification (also where there is none)    joint f_y - log sum_i exp(marginal f_i)
        multi_label_classification, each label on its own          log sigmoid(f_y)
        regression                                                  -(f - target)^2 / (2 std^2)

    Args:
        classifier: `NoiseAwareClassifier`, or any module with `forward(sample, timestep)` that gives `.logits`
            (B, num_labels) and a `config` with the noise schedule that it was trained with.
        label: an id, a name of `config.id2label`, a mapping {id or name: weight}, a list of such (one an image), or a
            tensor of ids. Negative weights steer away.
        scale: 0 is off; 1 with an exact classifier is the exact conditional model; more is a sharper one, p(y|x)^scale.
        start, stop, sigma_interval: when it acts, as in `Guidance`.
        target: instead of a label, what a regressor's outputs should be: a number, (num_labels,) or (B, num_labels).
        std: the standard deviation of what was regressed, given the image, in the target's units.
        joint_temperature, marginal_temperature: "joint" and "marginal" above (Ma et al. 2024, "Elucidating the design
            space of classifier-guided diffusion generation", section 4); both 1 are the classifier's own p(y | x_t); a
            marginal below 1 keeps the gradient alive where it is sure, 0 follows the logit alone.
        softplus: the classifier's `torch.nn.ReLU` (not its calls of `F.relu`) become softplus(beta x) / beta with this
            beta while the gradient is taken (the same paper: 3 for a ResNet), which makes it smooth. None: off.
        normalize: as in `NoiseAwareGuidance`.

    Raises:
        ValueError: for any other argument, or one without effect for this classifier.
    """

    def __init__(
        self,
        classifier: torch.nn.Module,
        label: Label | Sequence[Label] | torch.Tensor | None = None,
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
    ):
        super().__init__(classifier, scale, start, stop, sigma_interval, normalize)
        config = module_config(classifier)
        self.classifier, self.softplus = classifier, softplus
        self.likelihood = likelihood(
            config, label, target, std, joint_temperature, marginal_temperature
        )
        check_softplus(classifier, softplus)

    def score(self, step: StepContext) -> torch.Tensor:
        with relu_as_softplus(
            self.classifier, self.softplus
        ):  # also while a checkpointed block runs again
            return super().score(step)


class LabelLikelihood:
    """Logits (B, num_labels) -> sum_y w_y log p(y | x), (B,), in float32 or wider.

    Args:
        labels: {id: weight}, one or one an image.
        multi: each label on its own, log sigmoid(f_y); else of a softmax with the two temperatures.

    Raises:
        ValueError: when called, if the labels don't fit the logits.
    """

    def __init__(
        self,
        labels: list[dict[int, float]],
        multi: bool = False,
        joint: float = 1.0,
        marginal: float = 1.0,
    ):
        self.labels, self.multi, self.joint, self.marginal = labels, multi, joint, marginal
        self._weights: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if (
            len(self.labels) not in (1, len(wide))
            or self._weights is None
            or self._weights.device != wide.device
        ):
            largest = max(i for label in self.labels for i in label)
            if largest >= wide.shape[1] or len(self.labels) not in (1, len(wide)):
                raise ValueError(
                    f"label holds {len(self.labels)} labels up to id {largest}; one, or one for each of "
                    f"the {len(wide)} images, below the classifier's {wide.shape[1]} logits is allowed"
                )
            rows = [[label.get(i, 0.0) for i in range(wide.shape[1])] for label in self.labels]
            self._weights = torch.tensor(rows, device=wide.device)  # (B or 1, num_labels)
        if self.multi:
            log_p = torch.nn.functional.logsigmoid(wide)
        else:
            log_p = self.joint * wide - (self.marginal * wide).logsumexp(dim=-1, keepdim=True)
        return (self._weights.to(wide.dtype) * log_p).sum(dim=-1)

    def select(self, rows: slice | list[int]) -> LabelLikelihood:
        """The same for some of the images."""
        part = copy(self)
        if len(self.labels) > 1:
            part.labels = (
                self.labels[rows] if isinstance(rows, slice) else [self.labels[i] for i in rows]
            )
            part._weights = None if self._weights is None else self._weights[rows]
        return part


class TargetLikelihood:
    """Outputs f (B, num_labels) -> -(f - target)^2 / (2 std^2), summed, (B,): Gaussian up to a constant."""

    def __init__(self, target: torch.Tensor, std: float):
        self.target, self.std = target, std

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        target = self.target.to(wide, non_blocking=True)  # or an accelerator waits for it
        sizes = zip(target.shape[::-1], wide.shape[::-1], strict=False)
        if target.ndim > wide.ndim or any(size not in (1, whole) for size, whole in sizes):
            raise ValueError(
                f"target has shape {tuple(target.shape)}; one that broadcasts to the regressor's "
                f"{tuple(wide.shape)} outputs is allowed"
            )
        return -((wide - target) ** 2).sum(dim=-1) / (2 * self.std**2)

    def select(self, rows: slice | list[int]) -> TargetLikelihood:
        """The same for some of the images."""
        each = self.target.ndim > 1 and len(self.target) > 1
        return TargetLikelihood(self.target[rows] if each else self.target, self.std)


def likelihood(
    config: Mapping[str, Any],
    label: Any,
    target: Any,
    std: float = 1.0,
    joint: float = 1.0,
    marginal: float = 1.0,
) -> LabelLikelihood | TargetLikelihood:
    """What a network with this config (`problem_type`, `id2label`, `num_labels`) says of the label or the target.

    Raises:
        ValueError: for arguments that don't go together.
    """
    kind = config.get("problem_type") or (SINGLE if target is None else REGRESSION)
    if kind not in (SINGLE, MULTI, REGRESSION):
        raise ValueError(
            f"classifier: problem_type={kind!r}; {SINGLE}, {MULTI} and {REGRESSION} are allowed"
        )
    if (label is None) == (target is None) or (target is not None) != (kind == REGRESSION):
        wanted = "target and no label" if kind == REGRESSION else "label and no target"
        raise ValueError(f"label={label!r}, target={target!r}: {kind} needs a {wanted}")
    if kind != SINGLE and (joint, marginal) != (1, 1):
        raise ValueError(
            f"joint_temperature={joint}, marginal_temperature={marginal} have no effect on {kind}; leave "
            "them 1"
        )
    if kind != REGRESSION and std != 1:
        raise ValueError(f"std={std} has no effect on {kind}; leave it 1")
    if not std > 0 or not isfinite(std):
        raise ValueError(f"std={std!r}: a positive number is allowed")
    if not (joint > 0 and marginal >= 0 and isfinite(joint) and isfinite(marginal)):
        raise ValueError(
            f"joint_temperature={joint!r}, marginal_temperature={marginal!r}: above 0, and 0 or above, "
            "are allowed"
        )
    if kind == REGRESSION:
        wanted = torch.as_tensor(target, dtype=torch.float64)
        if not wanted.isfinite().all():
            raise ValueError(f"target={target!r}: finite numbers are allowed")
        return TargetLikelihood(wanted, std)
    labels = parse_labels(label, config.get("id2label"), config.get("num_labels"))
    return LabelLikelihood(labels, kind == MULTI, joint, marginal)


def logits_of(output: Any) -> torch.Tensor:
    """Of a model's output object, tuple or bare tensor."""
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def _relus(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    for parent in module.modules():
        # not named_children, which leaves out a second name of the same child
        yield from (
            (parent, name)
            for name, child in parent._modules.items()
            if isinstance(child, torch.nn.ReLU)
        )


def check_softplus(module: torch.nn.Module, beta: float | None) -> None:
    """Refuse a beta that is none, or that would have no effect.

    Raises:
        ValueError: for either.
    """
    if beta is not None and not 0 < beta < float("inf"):
        raise ValueError(f"softplus={beta!r}: a positive number, or None, is allowed")
    if beta is not None and next(_relus(module), None) is None:
        raise ValueError(
            f"softplus={beta}: {type(module).__name__} has no torch.nn.ReLU to make smooth"
        )


@contextmanager
def relu_as_softplus(module: torch.nn.Module, beta: float | None) -> Iterator[None]:
    """Within, the module's ReLU are softplus(beta x) / beta; None: as they are. Restored at the end."""
    found = list(_relus(module)) if beta is not None else []
    before = [(parent, name, getattr(parent, name)) for parent, name in found]
    try:
        for parent, name in found:
            setattr(parent, name, torch.nn.Softplus(beta))
        yield
    finally:
        for parent, name, child in before:
            setattr(parent, name, child)


def parse_labels(
    label: Label | Sequence[Label] | torch.Tensor,
    id2label: Mapping[int | str, str] | None,
    num_labels: int | None,
) -> list[dict[int, float]]:
    """Labels in any of their forms as a list of {id: weight}.

    Args:
        label: as in `ClassifierGuidance`.
        id2label: the names; None: only ids are allowed.
        num_labels: ids run below it; None: not checked.

    Raises:
        ValueError: for an unknown name or id, a name of several ids, or anything that is no label; the message says
            what is allowed.
    """
    names: dict[str, list[int]] = {}
    for i, name in (id2label or {}).items():
        names.setdefault(name, []).append(int(i))
    known = f"ids 0 to {num_labels - 1}" if num_labels else "ids from 0"
    known += f" and the names {sorted(names)}" if names else " (the classifier has no names)"

    def one(value: Any) -> int:
        if isinstance(value, str) and value in names:
            if len(names[value]) > 1:
                raise ValueError(
                    f"label {value!r} is the name of several ids; use one of {names[value]}"
                )
            return names[value][0]
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, Integral) and not isinstance(value, bool):
            if 0 <= value and (num_labels is None or value < num_labels):
                return int(value)
        raise ValueError(f"label {value!r} is unknown; allowed: {known}")

    def weighted(value: Any) -> dict[int, float]:
        if not isinstance(value, Mapping):
            return {one(value): 1.0}
        if not value:
            raise ValueError("label is an empty mapping; a mixture is {label: weight, ...}")
        mixture: dict[int, float] = {}
        for name, weight in value.items():
            if not isinstance(weight, Real) or not isfinite(weight) or one(name) in mixture:
                raise ValueError(
                    f"label {value!r}: {name!r} has the weight {weight!r} or comes twice; a finite number "
                    "for each label is allowed"
                )
            mixture[one(name)] = float(weight)
        return mixture

    if isinstance(label, torch.Tensor):
        if label.ndim > 1 or label.is_floating_point() or label.dtype == torch.bool:
            raise ValueError(
                f"label is a tensor {tuple(label.shape)} of {label.dtype}; integer ids, one or (B,), are "
                "allowed"
            )
        label = label.reshape(-1).tolist()
    if isinstance(label, (list, tuple)):
        if not label:
            raise ValueError("label is an empty list; give at least one")
        return [weighted(value) for value in label]
    return [weighted(label)]


class NullGuidance(Guidance):
    """`ClassifierFreeGuidance` of class labels, without its options.

    Args:
        null: the class label of no condition.
    """

    supports_pure_noise = True

    def __init__(self, null: int, scale: Scale):
        super().__init__(scale)
        self.conditions = ({"class_labels": torch.tensor([null])},)

    def guided(self, step: StepContext) -> torch.Tensor:
        """The predicted x0, away from what it is without the condition."""
        return step.x0 + self.scale_at(step) * (step.x0 - step.condition_x0[0])

    def score(self, step: StepContext) -> torch.Tensor:
        x0 = torch.where(
            self.scale_at(step) == 0, step.x0, self.guided(step)
        )  # off, for one image as for all
        return step.level.score_shift(x0 - step.x0)


class ClassifierFreeGuidance(NullGuidance):
    """Away from what the network predicts without the condition: adds `scale * (score(x_t | c) - score(x_t))`.

    Ho & Salimans 2022, "Classifier-free diffusion guidance", eq. 6, for a network that was trained with its condition
    dropped at times, so that it knows both. The two predictions come from one call of the network with a batch twice as
    long. In terms of the predicted x0:

        x0 = x0(c) + scale (x0(c) - x0(null))

    Args:
        null: what the network is told for no condition: its null class label, or a mapping of its arguments, such as
            {"encoder_hidden_states": (1 or B, tokens, width)} of an empty prompt.
        scale: 0 is off: the conditional network. GLIDE, Imagen and Diffusers count from 1: their `guidance_scale` is
            1 + this.
        rescale: how much of the standard deviation of the network's output, an image, is put back to what it is without
            guidance, 0 (off) to 1 (Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed",
            section 3.4).
        threshold: dynamic thresholding of the guided x0, of data in [-1, 1]: x0 is clipped to [-s, s] and divided by s,
            the larger of 1 and this quantile of |x0| in the image, in (0, 1] (Saharia et al. 2022, Imagen, section 2.3:
            0.995). None: off.
        start, stop, sigma_interval: when it acts, as in `Guidance`.

    Raises:
        ValueError: for other values.
    """

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
        Guidance.__init__(self, scale, start, stop, sigma_interval)
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale={rescale!r}: 0 (off) to 1 is allowed")
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold!r}: above 0, up to 1, or None is allowed")
        if not isinstance(null, Mapping) and (
            not isinstance(null, Integral) or isinstance(null, bool) or null < 0
        ):
            raise ValueError(
                f"null={null!r}: a class label, 0 or above, or a mapping of the network's arguments is "
                "allowed"
            )
        self.rescale, self.threshold = rescale, threshold
        self.conditions = (
            dict(null) if isinstance(null, Mapping) else {"class_labels": torch.tensor([null])},
        )

    def guided(self, step: StepContext) -> torch.Tensor:
        level, x0 = step.level, super().guided(step)
        dims = tuple(range(1, x0.ndim))
        if self.rescale and level.b:  # at a consistency model's boundary the output has no say
            output = level.output(step.sample, x0)
            factor = level.output(step.sample, step.x0).std(dims, keepdim=True) / output.std(
                dims, keepdim=True
            )
            x0 = level.x0(step.sample, (self.rescale * factor + 1 - self.rescale) * output)
        if self.threshold is not None:
            s = (
                x0.abs()
                .flatten(1)
                .quantile(self.threshold, dim=1)
                .clamp(min=1)
                .reshape(-1, *[1] * len(dims))
            )
            x0 = x0.clamp(-s, s) / s
        return x0


class AutoGuidance(Guidance):
    """Away from what a worse network predicts: adds `scale * (score of the network - score of the worse one)`.

    Karras et al. 2024, "Guiding a diffusion model with a bad version of itself" (autoguidance), eq. 3: the worse one is
    smaller or less trained, told the same condition. It is one more call, of the worse network.

    Args:
        network: called as the pipeline's own is, and predicts the same (epsilon, v, ...).
        scale: 0 is off; the paper's guidance weight is 1 + this.
        start, stop, sigma_interval: when it acts, as in `Guidance`.
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
        check_eval_mode(network)
        self.network = network

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.network,)

    def score(self, step: StepContext) -> torch.Tensor:
        worse = step.predict(step.sample, self.network)
        return self.scale_at(step) * step.level.score_shift(step.x0 - worse)


class EnergyGuidance(Guidance):
    """Towards images of low energy: adds `-scale * grad_x E`, as of p(x) exp(-scale E(x)).

    With an energy of the predicted x0 this is universal guidance (Bansal et al. 2023, eq. 6) and, for a measurement,
    E = |y - A(x0)|^2, diffusion posterior sampling (Chung et al. 2023, eq. 16). Images whose left half is given:

        EnergyGuidance(lambda images: ((images - known)[..., :14] ** 2).sum((1, 2, 3)), scale=10)

    Args:
        energy: gives one number an image, (B,), of what `of` says.
        scale: 0 is off.
        of: "image": the predicted x0 as images in [-1, 1], decoded where the model is latent; "x0": the predicted x0 in
            the model's own space; "sample": energy(x_t, level), the noisy sample, which needs no prediction.
        through_network: whether the gradient goes through the network, too: exact, for its forward and backward pass
            (`x0_gradient`); for "image" and "x0".
        normalize: scale the gradient of each image to the norm of its score, so that `scale` counts scores.
        start, stop, sigma_interval: when it acts, as in `Guidance`.

    Raises:
        ValueError: for other values, or, when run, an energy that is not one number an image.
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
        if of not in ("image", "x0", "sample"):
            raise ValueError(f"of={of!r}: 'image', 'x0' and 'sample' are allowed")
        if of == "sample" and through_network:
            raise ValueError("through_network=True has no effect with of='sample'")
        self.energy, self.of, self.through_network, self.normalize = (
            energy,
            of,
            through_network,
            normalize,
        )
        self.supports_pure_noise = not (through_network or normalize or of == "sample")

    def score(self, step: StepContext) -> torch.Tensor:
        def checked(*inputs: object) -> torch.Tensor:
            value = self.energy(*inputs)
            if value.shape != step.sample.shape[:1]:
                raise ValueError(
                    f"energy gave {tuple(value.shape)}; one number an image, ({len(step.sample)},), is "
                    "allowed"
                )
            return value

        if self.of == "sample":
            grad = gradient(lambda x: checked(x, step.level), step.sample)
        else:
            view = step.decode if self.of == "image" else lambda x0: x0
            grad = x0_gradient(lambda x0: checked(view(x0)), step, self.through_network)
        return -self.scale_at(step) * (rescale_to_score(grad, step) if self.normalize else grad)
