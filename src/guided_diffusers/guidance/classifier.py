"""`ClassifierGuidance`: towards what a noise-aware classifier, or regressor, says of the sample."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from math import isfinite
from numbers import Integral, Real
from typing import Any

import torch

from ..noise import TrainedSchedule, module_config, schedule_config
from .contract import Guidance, Scale, Step, check_evaluating, gradient, normalized

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
    at its noisiest, and what it then moves the predicted x0 by is kept (`TrainedSchedule.beyond`).

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
        check_evaluating(module)
        self.module, self.normalize = module, normalize
        self.acts_on_noise = not normalize  # `TrainedSchedule.beyond`
        self.schedule = TrainedSchedule(schedule_config(module))

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.module,)

    @abstractmethod
    def log_likelihood(self, z: torch.Tensor, t: float) -> torch.Tensor:
        """log p(y | z), (B,), up to a constant, at timestep `t` of the network's schedule; z in its dtype."""

    def score(self, step: Step) -> torch.Tensor:
        level, t = step.level, self.schedule.timestep(step.level)
        z = step.sample / (norm := (level.alpha**2 + level.sigma**2) ** 0.5)
        dtype = next((p.dtype for p in self.module.parameters()), z.dtype)
        fast = getattr(self.module, "input_gradient", None)  # of `speed.gradients_in`
        grad = (
            fast(self, z, t) if fast else gradient(lambda z: self.log_likelihood(z.to(dtype), t), z)
        )
        if self.normalize:
            return self.scale_at(step) * normalized(grad, step)
        return (self.scale_at(step) * (self.schedule.beyond(level) / norm)) * grad

    def of_images(self, rows: slice | list[int], count: int) -> NoiseAwareGuidance:
        """The term for some of `count` images."""
        part, scale = copy(self), self.scale
        part.scale = (
            (lambda level: _of_images(scale(level), rows))
            if callable(scale)
            else _of_images(scale, rows)
        )
        return part


def _of_images(
    scale: float | Sequence[float] | torch.Tensor, rows: slice | list[int]
) -> torch.Tensor:
    numbers = torch.as_tensor(scale)
    return numbers[rows] if numbers.numel() > 1 else numbers


class LogitsGuidance(NoiseAwareGuidance):
    """By the likelihood that follows from a network's logits."""

    def log_likelihood(self, z: torch.Tensor, t: float) -> torch.Tensor:
        return self.likelihood(logits_of(self.module(z, t)))

    def of_images(self, rows: slice | list[int], count: int) -> LogitsGuidance:
        part = super().of_images(rows, count)
        part.likelihood = self.likelihood.of_images(rows)
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

    def score(self, step: Step) -> torch.Tensor:
        with smoothed(self.classifier, self.softplus):  # also while a checkpointed block runs again
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

    def of_images(self, rows: slice | list[int]) -> LabelLikelihood:
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

    def of_images(self, rows: slice | list[int]) -> TargetLikelihood:
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
def smoothed(module: torch.nn.Module, beta: float | None) -> Iterator[None]:
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
