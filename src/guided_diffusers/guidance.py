"""Guidance: something added to the score.

    score of p(x_t | y)  =  score of p(x_t)  +  guidance_scale * grad_x log p(y | x_t)

A term of guidance answers one question: at this noisy sample and this noise level, what do you add to the score? Terms
add up (`a + b`), and the sum corrects the network's output in one place (`NoiseLevel.corrected`).

To write a term, extend `Guidance` and give `score(step)`, for instance to make images brighter:

    class Brighter(Guidance):
        def score(self, step: Step) -> torch.Tensor:
            return self.scale_at(step) * gradient(lambda x: step.predict(x).mean(dim=(1, 2, 3)), step.sample)

A term that needs the network's prediction for other labels than the step's own names them in `conditions`; they join
the step's one call of the network, and their predicted x0 are in `step.others`. Classifier-free guidance is then

    class TowardsLabel(Guidance):                                   # (1 + scale) * conditional - scale * unconditional
        conditions = (null_label,)
        def score(self, step):
            conditional, unconditional = (step.level.score(step.sample, x0) for x0 in (step.x0, step.others[0]))
            return self.scale_at(step) * (conditional - unconditional)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Integral, Real
from typing import Any

import torch

from .noise import NoiseLevel, TrainedSchedule, module_config, schedule_config

Label = int | str | Mapping[int | str, float]


@dataclass(frozen=True)
class Step:
    """What a term may look at.

    Attributes:
        sample: x_t in the scheduler's space, (B, C, H, W), float32 or wider.
        x0: the x0 that the network predicts at `sample`, (B, C, H, W).
        predict: the same as a differentiable function of the sample; each call is a call of the network.
        level: the noise level of `sample`.
        index, count: this is step `index` of `count`, from 0.
        timestep: the scheduler's timestep, for messages.
        others: predicted x0 for each of the asking term's `conditions`.
    """

    sample: torch.Tensor
    x0: torch.Tensor
    predict: Callable[[torch.Tensor], torch.Tensor]
    level: NoiseLevel
    index: int
    count: int
    timestep: float
    others: tuple[torch.Tensor, ...] = ()


class Guidance(ABC):
    """A term of guidance.

    Args:
        scale: multiplies the term; a number or one an image, (B,). 0 is off.
        start, stop: the term acts while `start <= index / count < stop`; fractions of the run in [0, 1].

    Raises:
        ValueError: for other values.
    """

    #: class labels, (B,) or (1,), for which the term needs the network's prediction
    conditions: tuple[torch.Tensor, ...] = ()

    def __init__(self, scale: float | Sequence[float] | torch.Tensor = 1.0, start: float = 0.0, stop: float = 1.0):
        self.scale = torch.as_tensor(scale, dtype=torch.float32)
        if self.scale.ndim > 1 or not self.scale.isfinite().all():
            raise ValueError(f"scale is {scale!r}; a finite number or one an image is allowed")
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"start={start!r}, stop={stop!r}: 0 <= start <= stop <= 1 is allowed")
        self.start, self.stop, self._on = start, stop, bool(self.scale.any())

    @abstractmethod
    def score(self, step: Step) -> torch.Tensor:
        """What is added to the score grad log p(sample): (B, C, H, W), the scale included."""

    def active(self, index: int, count: int) -> bool:
        """Whether the term acts at step `index` of `count`; with scale 0 never."""
        return self._on and self.start <= index / count < self.stop

    def scale_at(self, step: Step) -> torch.Tensor:
        """The scale, broadcast over the sample's dimensions.

        Raises:
            ValueError: for a scale an image, of another number of images.
        """
        if self.scale.numel() not in (1, len(step.sample)):
            raise ValueError(f"scale holds {self.scale.numel()} numbers for {len(step.sample)} images; one, or one an "
                             "image, is allowed")
        return self.scale.to(step.sample).reshape(-1, *[1] * (step.sample.ndim - 1))

    def modules(self) -> tuple[torch.nn.Module, ...]:
        """The networks that the term differentiates; their parameters are frozen meanwhile."""
        return ()

    def terms(self) -> tuple[Guidance, ...]:
        return (self,)

    def __add__(self, other: Guidance) -> Guidance:
        return Sum(self.terms() + other.terms())


class Sum(Guidance):
    """Terms side by side, each with its own scale and interval; empty, it is no guidance."""

    def __init__(self, terms: Sequence[Guidance] = ()):
        super().__init__()
        self._terms = tuple(one for term in terms for one in term.terms())

    def terms(self) -> tuple[Guidance, ...]:
        return self._terms

    def active(self, index: int, count: int) -> bool:
        return any(term.active(index, count) for term in self._terms)

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return tuple(module for term in self._terms for module in term.modules())

    def active_conditions(self, index: int, count: int) -> list[torch.Tensor]:
        """The class labels that the active terms need predictions for, in the order of the terms."""
        return [labels for term in self._terms if term.active(index, count) for labels in term.conditions]

    def score(self, step: Step) -> torch.Tensor:
        """The sum over the active terms; `step.others` are the predictions for `active_conditions`."""
        total, others = None, step.others
        for term in self._terms:
            if not term.active(step.index, step.count):
                continue
            mine, others = others[: len(term.conditions)], others[len(term.conditions) :]
            score = term.score(replace(step, others=mine))
            total = score if total is None else total + score
        return torch.zeros_like(step.sample) if total is None else total


class ClassifierGuidance(Guidance):
    """Steer to what a noise-aware classifier calls the label: adds `scale * sum_y w_y grad_x log p(y | x_t)`.

    Dhariwal & Nichol 2021, "Diffusion models beat GANs on image synthesis", section 4. The classifier is asked at the
    noise-to-signal ratio of the step, whatever the scheduler calls it: at z = sample / sqrt(alpha^2 + sigma^2) and the
    (fractional) timestep of the classifier's own schedule with the same sigma / alpha; the chain rule puts
    1 / sqrt(alpha^2 + sigma^2) into the gradient. At noisier levels than it was trained on, it is asked at its
    noisiest, and what it then moves the predicted x0 by is kept (`TrainedSchedule.beyond`).

    Args:
        classifier: `NoiseAwareClassifier`, or any module with `forward(sample, timestep)` that gives `.logits`
            (B, num_labels) and a `config` with the noise schedule that it was trained with.
        label: an id, a name of `config.id2label`, a mapping {id or name: weight}, a list of such (one an image), or a
            tensor of ids. Negative weights steer away.
        scale: 0 is off; 1 with an exact classifier is the exact conditional model; more is a sharper one, p(y|x)^scale.
        start, stop: fractions of the run.
    """

    def __init__(self, classifier: torch.nn.Module, label: Label | Sequence[Label] | torch.Tensor,
                 scale: float | Sequence[float] | torch.Tensor = 1.0, start: float = 0.0, stop: float = 1.0):
        super().__init__(scale, start, stop)
        self.classifier = classifier
        self.schedule = TrainedSchedule(schedule_config(classifier))
        config = module_config(classifier)
        self.labels = parse_labels(label, config.get("id2label"), config.get("num_labels"))
        self._weights: torch.Tensor | None = None

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.classifier,)

    def log_probability(self, logits: torch.Tensor) -> torch.Tensor:
        """sum_y w_y log p(y | x_t), (B,), of logits (B, num_labels), in float32 or wider.

        Raises:
            ValueError: if the labels don't fit the logits.
        """
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if len(self.labels) not in (1, len(wide)) or self._weights is None or self._weights.device != wide.device:
            largest = max(i for label in self.labels for i in label)
            if largest >= wide.shape[1] or len(self.labels) not in (1, len(wide)):
                raise ValueError(f"label holds {len(self.labels)} labels up to id {largest}; one, or one for each of "
                                 f"the {len(wide)} images, below the classifier's {wide.shape[1]} logits is allowed")
            rows = [[label.get(i, 0.0) for i in range(wide.shape[1])] for label in self.labels]
            self._weights = torch.tensor(rows, device=wide.device)  # (B or 1, num_labels)
        return (self._weights.to(wide.dtype) * wide.log_softmax(dim=-1)).sum(dim=-1)

    def score(self, step: Step) -> torch.Tensor:
        level, t = step.level, self.schedule.timestep(step.level)
        norm = (level.alpha**2 + level.sigma**2) ** 0.5
        dtype = next((p.dtype for p in self.classifier.parameters()), step.sample.dtype)
        grad = gradient(lambda z: self.log_probability(_logits(self.classifier(z.to(dtype), t))), step.sample / norm)
        return (self.scale_at(step) * (self.schedule.beyond(level) / norm)) * grad


def _logits(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


def gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The gradient of `function(x).sum()`, in the dtype of `x`, also inside `torch.no_grad` and `inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)
        return torch.autograd.grad(function(x).sum(), x)[0]


@contextmanager
def frozen(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within, no parameter of the modules wants a gradient: nothing is kept or computed for it. Restored at the end."""
    trained = [[name for name, p in module.named_parameters() if p.requires_grad] for module in modules]

    def want(gradient: bool) -> None:
        for module, names in zip(modules, trained, strict=True):
            parameters = dict(module.named_parameters())  # anew: sequential offloading replaces them at each forward
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
                cause = ("the sample left the range that the classifier knows: lower guidance_scale, take more steps "
                         "or a first-order scheduler, or raise guidance_start")
            else:
                cause = f"the guided output left the range of {dtype}: lower guidance_scale or load the unet in float32"
            raise FloatingPointError(f"the guidance is not finite at {place}; likely cause: {cause}")
        self._seen.clear()


def parse_labels(label: Label | Sequence[Label] | torch.Tensor, id2label: Mapping[int | str, str] | None,
                 num_labels: int | None) -> list[dict[int, float]]:
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
                raise ValueError(f"label {value!r} is the name of several ids; use one of {names[value]}")
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
                raise ValueError(f"label {value!r}: {name!r} has the weight {weight!r} or comes twice; a finite number "
                                 "for each label is allowed")
            mixture[one(name)] = float(weight)
        return mixture

    if isinstance(label, torch.Tensor):
        if label.ndim > 1 or label.is_floating_point() or label.dtype == torch.bool:
            raise ValueError(f"label is a tensor {tuple(label.shape)} of {label.dtype}; integer ids, one or (B,), are "
                             "allowed")
        label = label.reshape(-1).tolist()
    if isinstance(label, (list, tuple)):
        if not label:
            raise ValueError("label is an empty list; give at least one")
        return [weighted(value) for value in label]
    return [weighted(label)]
