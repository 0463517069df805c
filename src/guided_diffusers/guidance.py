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
from numbers import Integral
from typing import Any

import torch

from .noise import NoiseLevel, TrainedSchedule, schedule_config

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
        self.start, self.stop = start, stop

    @abstractmethod
    def score(self, step: Step) -> torch.Tensor:
        """What is added to the score grad log p(sample): (B, C, H, W), the scale included."""

    def active(self, index: int, count: int) -> bool:
        """Whether the term acts at step `index` of `count`."""
        return self.start <= index / count < self.stop

    def scale_at(self, step: Step) -> torch.Tensor:
        """The scale, broadcast over the sample's dimensions."""
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
        self._terms = tuple(terms)

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
        config = classifier.config
        num_labels, id2label = (config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
                                for name in ("num_labels", "id2label"))
        self.labels = parse_labels(label, id2label, num_labels)
        self._weights: torch.Tensor | None = None

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.classifier,)

    def log_probability(self, logits: torch.Tensor) -> torch.Tensor:
        """sum_y w_y log p(y | x_t), (B,), of logits (B, num_labels), in float32 or wider."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._weights is None or self._weights.device != wide.device:
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
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


class FiniteCheck:
    """Refuses non-finite guidance without making an accelerator wait: there it is looked at when the run ends."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype  # of the network that guides
        self._seen: list[tuple[torch.Tensor, str]] = []

    def __call__(self, score: torch.Tensor, step: Step) -> None:
        """Note the score of a step; on the CPU raise at once."""
        place = f"step {step.index} of {step.count} (timestep {step.timestep:g}, sigma {step.level.sigma:.4g})"
        self._seen.append((score.isfinite().all(), place))
        if score.device.type == "cpu":
            self.finish()

    def finish(self) -> None:
        """Look at the scores noted.

        Raises:
            FloatingPointError: for the first that is not finite, naming the step, the timestep and the likely cause.
        """
        for finite, place in self._seen:
            if not finite:
                cause = (f"the classifier computes in {self.dtype}, whose range is small: load it in float32"
                         if self.dtype == torch.float16 else
                         "the sample left the range that the classifier knows: lower guidance_scale, take more steps "
                         "or a first-order scheduler, or raise guidance_start")
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
        ValueError: for an unknown name or id, or anything that is no label; the message says what is allowed.
    """
    names = {name: int(i) for i, name in (id2label or {}).items()}
    known = f"ids 0 to {num_labels - 1}" if num_labels else "ids from 0"
    known += f" and the names {sorted(names)}" if names else " (the classifier has no names)"

    def one(value: Any) -> int:
        if isinstance(value, str) and value in names:
            return names[value]
        if isinstance(value, (Integral, torch.Tensor)) and not isinstance(value, bool):
            i = int(value)
            if 0 <= i and (num_labels is None or i < num_labels):
                return i
        raise ValueError(f"label {value!r} is unknown; allowed: {known}")

    def weighted(value: Any) -> dict[int, float]:
        if not isinstance(value, Mapping):
            return {one(value): 1.0}
        if not value:
            raise ValueError("label is an empty mapping; a mixture is {label: weight, ...}")
        return {one(name): float(weight) for name, weight in value.items()}

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
