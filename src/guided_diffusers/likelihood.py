"""log p(y | x) from a network's outputs: class labels, several labels at once, or a regressor's
target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from math import isfinite
from numbers import Integral, Real
from typing import Any

import torch

from .checks import check_number, nearest, scalar, shown

Label = int | str | Mapping[int | str, float]
Labels = Label | Sequence[Label] | torch.Tensor
SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


class LabelLikelihood:
    """Logits (B, num_labels) -> sum_y w_y log p(y | x), (B,), in float32 or wider.

    Args:
        labels: {id: weight}, one, or one per image.
        multi: independent labels or log odds, log sigmoid(f_y); else a softmax with the two
            temperatures.

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
        self._weights: torch.Tensor | None = None  # (B or 1, num_labels), made at the first call

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        fits = len(self.labels) in (1, len(logits))
        if not fits or self._weights is None or self._weights.device != logits.device:
            self._weights = self._make_weights(logits)
        if self.multi:
            log_p = torch.nn.functional.logsigmoid(logits)
        else:
            normalizer = (self.marginal * logits).logsumexp(dim=-1, keepdim=True)
            log_p = self.joint * logits - normalizer
        return (self._weights.to(logits.dtype) * log_p).sum(dim=-1)

    def _make_weights(self, logits: torch.Tensor) -> torch.Tensor:
        largest = max(i for label in self.labels for i in label)
        if largest >= logits.shape[1] or len(self.labels) not in (1, len(logits)):
            raise ValueError(
                f"label holds {len(self.labels)} labels up to id {largest}; one, or one for each "
                f"of the {len(logits)} images, below the classifier's {logits.shape[1]} logits is "
                "allowed"
            )
        rows = [[label.get(i, 0.0) for i in range(logits.shape[1])] for label in self.labels]
        with torch.inference_mode(False):  # kept, and then used where gradients are taken
            return torch.tensor(rows).to(logits.device, non_blocking=True)

    def conditions(self) -> list[dict[int, float]]:
        """What each image, or all of them, is conditioned on."""
        return self.labels

    def select(self, images: slice | list[int]) -> LabelLikelihood:
        """The likelihood of some of the images."""
        part = copy(self)
        if len(self.labels) == 1:
            return part
        if isinstance(images, slice):
            part.labels = self.labels[images]
        else:
            part.labels = [self.labels[i] for i in images]
        part._weights = None if self._weights is None else self._weights[images]
        return part


class TargetLikelihood:
    """Outputs f (B, num_labels) -> -(f - target)^2 / (2 std^2), summed, (B,): Gaussian up to a
    constant."""

    def __init__(self, target: torch.Tensor, std: float):
        self.target, self.std = target, std

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        target = self.target.to(outputs, non_blocking=True)  # so that an accelerator doesn't wait
        sizes = zip(target.shape[::-1], outputs.shape[::-1], strict=False)
        if target.ndim > outputs.ndim or any(size not in (1, full) for size, full in sizes):
            raise ValueError(
                f"target has shape {tuple(target.shape)}; one that broadcasts to the regressor's "
                f"{tuple(outputs.shape)} outputs is allowed"
            )
        return -((outputs - target) ** 2).sum(dim=-1) / (2 * self.std**2)

    def conditions(self) -> list[list[float]]:
        """What each image, or all of them, is conditioned on."""
        return self.target.tolist() if self.target.ndim > 1 else [self.target.tolist()]

    def select(self, images: slice | list[int]) -> TargetLikelihood:
        """The likelihood of some of the images."""
        one_an_image = self.target.ndim > 1 and len(self.target) > 1
        return TargetLikelihood(self.target[images] if one_an_image else self.target, self.std)


def make_likelihood(
    config: Mapping[str, Any],
    label: Any,
    target: Any,
    std: float = 1.0,
    joint: float = 1.0,
    marginal: float = 1.0,
    power: float | None = None,
) -> LabelLikelihood | TargetLikelihood:
    """Likelihood of the label or the target by a network with this config.

    Args:
        config: with `problem_type`, `id2label`, `num_labels` and `power_range`.
        power: with which the network is called: its outputs are then log odds.

    Raises:
        ValueError: for arguments that don't go together.
    """
    kind = config.get("problem_type") or (SINGLE if target is None else REGRESSION)
    std, joint, marginal = _check_arguments(kind, label, target, std, joint, marginal)
    if power is not None:
        if kind == REGRESSION:
            raise ValueError(f"power={shown(power)} has no effect on {kind}; leave it None")
        check_power("power", power, config.get("power_range"))
    if kind == REGRESSION:
        try:
            value = torch.as_tensor(target, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            value = torch.tensor(torch.nan)
        if isinstance(target, bool) or not value.isfinite().all():
            raise ValueError(f"target={shown(target)}: finite numbers are allowed")
        return TargetLikelihood(value, std)
    labels = parse_labels(label, config.get("id2label"), config.get("num_labels"))
    is_powered = power is not None and config.get("power_range") is not None
    if is_powered:
        _check_exact(power, labels, joint, marginal)
    return LabelLikelihood(labels, kind == MULTI or is_powered, joint, marginal)


def check_power(name: str, power: Any, powers: Sequence[float] | None) -> None:
    """Check the power w of a classifier with this `power_range`; without one it is w = 1.

    Raises:
        ValueError: naming the argument, the value and what is allowed.
    """
    if powers is None and power != 1:
        raise ValueError(
            f"{name}={shown(power)}: the classifier knows no powers; 1 or None is allowed, or train one "
            "with train_classifier.py --max_power"
        )
    check_number(name, power, *(powers or (1, 1)))


def _check_exact(
    power: float, labels: list[dict[int, float]], joint: float, marginal: float
) -> None:
    """Refuse what isn't p(y | x)^power of one label."""
    if any(list(mixture.values()) != [1] for mixture in labels):
        raise ValueError(
            f"label={shown(labels)}: with power={power} one label an image, of weight 1, is allowed; "
            "mixtures need power=None"
        )
    if (joint, marginal) != (1, 1):
        raise ValueError(
            f"joint_temperature={joint}, marginal_temperature={marginal} have no effect with "
            f"power={power}; leave them 1"
        )


def _check_arguments(
    kind: str, label: Any, target: Any, std: Any, joint: Any, marginal: Any
) -> tuple[float, float, float]:
    """The last three as floats."""
    std = check_number("std", std, 0, above=True)
    joint = check_number("joint_temperature", joint, 0, above=True)
    marginal = check_number("marginal_temperature", marginal, 0)
    if kind not in (SINGLE, MULTI, REGRESSION):
        raise ValueError(
            f"classifier: problem_type={kind!r}; {SINGLE}, {MULTI} and {REGRESSION} are allowed"
        )
    if (label is None) == (target is None) or (target is not None) != (kind == REGRESSION):
        needed = "target and no label" if kind == REGRESSION else "label and no target"
        raise ValueError(f"label={shown(label)}, target={shown(target)}: {kind} needs a {needed}")
    if kind != SINGLE and (joint, marginal) != (1, 1):
        raise ValueError(
            f"joint_temperature={joint}, marginal_temperature={marginal} have no effect on {kind}; "
            "leave them 1"
        )
    if kind != REGRESSION and std != 1:
        raise ValueError(f"std={std} has no effect on {kind}; leave it 1")
    return std, joint, marginal


def logits_of(output: Any) -> torch.Tensor:
    """Logits of a model's output object, tuple or bare tensor."""
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def parse_labels(
    label: Labels, id2label: Mapping[int | str, str] | None, num_labels: int | None
) -> list[dict[int, float]]:
    """Labels in any of their forms as a list of {id: weight}.

    Args:
        label: an id, a name, a mapping {id or name: weight}, a list of such, or a tensor of ids.
        id2label: the names; None: only ids are allowed.
        num_labels: ids run below it; None: not checked.

    Raises:
        ValueError: for an unknown name or id, a name of several ids, or anything that is no label;
            the message says what is allowed.
    """
    if isinstance(label, torch.Tensor):
        if label.ndim > 1 or label.is_floating_point() or label.dtype == torch.bool:
            raise ValueError(
                f"label is a tensor {tuple(label.shape)} of {label.dtype}; integer ids, one or "
                "(B,), are allowed"
            )
        label = label.reshape(-1).tolist()
    ids: dict[str, list[int]] = {}
    for i, name in (id2label or {}).items():
        ids.setdefault(name, []).append(int(i))
    if not isinstance(label, (list, tuple)):
        return [_parse_mixture(label, ids, num_labels)]
    if not label:
        raise ValueError("label is an empty list; give at least one")
    return [_parse_mixture(item, ids, num_labels) for item in label]


def _parse_mixture(
    value: Any, ids: Mapping[str, list[int]], num_labels: int | None
) -> dict[int, float]:
    if not isinstance(value, Mapping):
        return {_parse_id(value, ids, num_labels): 1.0}
    if not value:
        raise ValueError("label is an empty mapping; a mixture is {label: weight, ...}")
    mixture: dict[int, float] = {}
    for name, weight in value.items():
        i = _parse_id(name, ids, num_labels)
        weight = scalar(weight)
        is_number = isinstance(weight, Real) and not isinstance(weight, bool) and isfinite(weight)
        if not is_number or i in mixture:
            raise ValueError(
                f"label {value!r}: {name!r} has the weight {weight!r} or comes twice; a finite "
                "number for each label is allowed"
            )
        mixture[i] = float(weight)
    if not any(mixture.values()):
        raise ValueError(f"label {value!r}: all weights are 0, so it has no effect; use None")
    return mixture


def _parse_id(value: Any, ids: Mapping[str, list[int]], num_labels: int | None) -> int:
    if isinstance(value, str) and value in ids:
        if len(ids[value]) > 1:
            raise ValueError(f"label {value!r} is the name of several ids; use one of {ids[value]}")
        return ids[value][0]
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, Integral) and not isinstance(value, bool):
        if 0 <= value and (num_labels is None or value < num_labels):
            return int(value)
    known = f"ids 0 to {num_labels - 1}" if num_labels else "ids from 0"
    if ids:
        names = nearest(str(value), ids)
        kind = (
            "the names" if len(names) == len(ids) else f"{len(ids)} names, of which the nearest are"
        )
        known += f" and {kind} {names}"
    else:
        known += " (the classifier has no names)"
    raise ValueError(f"label {shown(value)} is unknown; allowed: {known}")
