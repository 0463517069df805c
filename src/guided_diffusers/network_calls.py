"""Calls of a pipeline's network: other conditions in the batch, and the same prediction again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

NO_REPEAT = (
    "the network can't be evaluated again: use through_network=False, or a start after the first "
    "step, no conditions and no other network"
)
#: arguments that networks repeat for each row of their batch: with one row, it is by chance that
#: they have as many as the batch
SHARED_BY_ROWS = {"padding_mask"}
#: arguments whose first dimension is that of a text encoder's layers
LAYERS_FIRST = {"encoder_hidden_states_llama3"}


class DenoiserCall:
    """A call of the network between two steps.

    Attributes:
        arguments: the pipeline's, by name; the first is the network's noisy input.
        module: the network.
        conditions: those of the terms that are expected to be active at the step.
        variants: the arguments under each of the conditions.
        is_joined: whether these are in the batch of the pipeline's own call.
        results: what the network gave for the pipeline, and under each of the conditions.
        output, condition_outputs: the predictions in these: (B, C, ...), or a list of images.
    """

    output: torch.Tensor
    variants: list[dict[str, Any]]
    results: list[Any]
    is_joined = False

    def __init__(
        self,
        module: torch.nn.Module,
        arguments: inspect.BoundArguments,
        conditions: tuple[Mapping[str, Any], ...],
    ):
        arguments.arguments = _copy_arguments(arguments.arguments)
        self.module, self.arguments, self.conditions = module, arguments, conditions
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

    def with_sample(self, sample: torch.Tensor, scaled: torch.Tensor) -> tuple[tuple, dict] | None:
        """(args, kwargs) with another sample in the place of the one that was scaled to `scaled`;
        None if the network's input doesn't hold that one."""
        if not isinstance(self.input, torch.Tensor):
            return None
        place = find_sample(self.input, scaled)
        if place is None:
            return None
        dim, start = place
        size = scaled.shape[dim]
        before, _, after = clone_if_inference(self.input).tensor_split((start, start + size), dim)
        repeats = len(self.input) // len(sample), *[1] * (sample.ndim - 1)
        joined = torch.cat([before, sample.to(self.input.dtype).repeat(repeats), after], dim)
        return self.with_changes(**{self.input_name: joined})


def find_sample(input: torch.Tensor, scaled: torch.Tensor) -> tuple[int, int] | None:
    """(dimension, start) of the slice of a network's input that is the sample, scaled as the
    scheduler scales it, once or more often in the batch; None if there is none."""
    if input.ndim != scaled.ndim or len(input) % len(scaled):
        return None
    longer = [
        dim
        for dim, (size, own) in enumerate(zip(input.shape[1:], scaled.shape[1:], strict=True), 1)
        if size != own
    ]
    if len(longer) > 1 or (longer and input.shape[longer[0]] < scaled.shape[longer[0]]):
        return None
    dim = longer[0] if longer else 1
    expected = scaled.repeat(len(input) // len(scaled), *[1] * (scaled.ndim - 1)).float()
    tolerance = 0.02 * expected.norm()
    for start in range(input.shape[dim] - scaled.shape[dim] + 1):
        part = input.narrow(dim, start, scaled.shape[dim]).float()
        if (part - expected).norm() <= tolerance:
            return dim, start
    return None


class OutputCombination:
    """How a pipeline made its prediction (B, C, ...) from the network's outputs in the calls since
    the last step, and from its sample.

    Args:
        name: of the pipeline.
        sample: (B, C, ...), whose weight is not 0 in some pipelines: x0 or a velocity is made of it.
    """

    def __init__(
        self, name: str, calls: Sequence[DenoiserCall], made: torch.Tensor, sample: torch.Tensor
    ):
        self.name, self.calls, self.made, self.sample = name, calls, made, sample

    @cached_property
    def weights(self) -> list[float] | None:
        """None if the prediction is no such combination of the outputs."""
        outputs = [call.output for call in self.calls]
        if not all(isinstance(output, torch.Tensor) for output in outputs):
            return None
        if len({output.shape[1:] for output in outputs}) != 1:
            return None
        return combination_weights(torch.cat(outputs), self.made, self.sample)

    def refusal(self, reason: str = "") -> str:
        """Message where neither this combination nor `LoopReplay` applies."""
        reason = reason or (
            "it makes of its network's output what is no weighted mean of the batch's parts "
            "(guidance rescale, thresholding, ...)"
        )
        return f"pipeline {self.name}: {reason}, and its loop can't be run again, so {NO_REPEAT}"

    def __call__(
        self, outputs: Sequence[torch.Tensor], sample: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The prediction that the pipeline would make of these outputs, one per call, and of
        another sample."""
        parts = torch.cat(list(outputs))[:, : self.made.shape[1]].split(len(self.made))
        *weights, of_sample = self.weights
        made = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        if of_sample:
            made = made + of_sample * (self.sample if sample is None else sample).to(made.dtype)
        return made


def clone_if_inference(value: Any) -> Any:
    """The value; a clone that autograd can use, of a tensor made in inference mode."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def _copy_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in new containers: some networks empty the lists that they get."""
    return tree_map(clone_if_inference, dict(arguments))


def differ(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are conditions of different terms; they hold tensors, which `!=` would compare."""
    return len(a) != len(b) or any(x is not y for x, y in zip(a, b, strict=True))


def has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows


def is_batch(value: Any) -> bool:
    """Whether it is a batch, or a list of images, as Z-Image's network gets and gives."""
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    return isinstance(value, torch.Tensor) or (
        is_list and all(isinstance(one, torch.Tensor) for one in value)
    )


def rows_of(output: Any, rows: int, count: int) -> list[Any]:
    """A network's output for `count` batches of so many rows each, divided."""

    def part(i: int) -> Callable[[Any], Any]:
        def cut(value: Any) -> Any:
            is_joined = has_rows(value, count * rows)
            return value[i * rows : (i + 1) * rows] if is_joined else value

        return cut

    return [tree_map(part(i), output) for i in range(count)]


def with_condition(
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
            value = with_condition(changed[name], value, network)
        changed[name] = value
    return changed


def join_batches(
    rows: int, arguments: Mapping[str, Any], variants: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """The arguments of one call for the pipeline's batch and for that under each condition. The
    variants get their conditions in the rows and the precision of what they replace.

    None where these can't be one batch: with lists, with a cache of keys and values, with several
    rows for an image, as for frames, or with a text encoder's layers before the batch.
    """
    names = {
        name for variant in variants for name in arguments if variant[name] is not arguments[name]
    }
    for variant in variants:
        for name in names:
            variant[name] = _expanded(rows, arguments[name], variant[name])
    names |= {name for name in arguments if name == "encoder_hidden_states"}
    tensors = tree_leaves([arguments[name] for name in names])
    is_list = not isinstance(next(iter(arguments.values())), torch.Tensor)
    has_cache = any("cache" in name and arguments[name] is not None for name in arguments)
    has_frames = any(isinstance(x, torch.Tensor) and not has_rows(x, rows) for x in tensors)
    has_layers = not LAYERS_FIRST.isdisjoint(arguments)
    if is_list or has_cache or has_frames or has_layers or names & SHARED_BY_ROWS:
        return None
    joined = dict(arguments)
    for name, value in arguments.items():
        others = [variant[name] for variant in variants]
        if _has_entry_per_row(value, rows):
            joined[name] = sum(others, value)
        elif "rotary_emb" not in name and name not in SHARED_BY_ROWS:
            joined[name] = tree_map(partial(_concat_batch, rows), value, *others)
    return joined


def check_rows(condition: Mapping[str, Any], arguments: Mapping[str, Any], images: int) -> None:
    """Refuse a condition with several rows for more images: whose they are isn't known.

    Raises:
        ValueError: naming its argument.
    """
    for name, value in condition.items():
        own = arguments[name]
        if isinstance(value, Mapping):
            check_rows(value, own, images)
        elif isinstance(own, (torch.Tensor, list, tuple)):
            is_list = isinstance(value, (list, tuple))
            rows = len(value if is_list else torch.atleast_1d(torch.as_tensor(value)))
            if 1 < rows < len(own) and rows % images:
                raise ValueError(
                    f"guidance: the condition {name!r} has {rows} rows for {images} images; one row, "
                    "or one per image, is allowed"
                )


def _has_entry_per_row(value: Any, rows: int) -> bool:
    """Whether it is a list with the sizes of each row's images."""
    return (
        isinstance(value, list)
        and len(value) == rows
        and all(isinstance(entry, (list, tuple)) for entry in value)
    )


def _expanded(rows: int, value: Any, variant: Any) -> Any:
    """A condition with the rows, the device and the precision of the argument in whose place it is.

    Raises:
        ValueError: for another shape.
    """
    if variant is value:
        return value
    if isinstance(value, Mapping):
        return {name: _expanded(rows, own, variant[name]) for name, own in value.items()}
    if isinstance(value, (list, tuple)) and isinstance(variant, (list, tuple)):
        if not variant or len(value) % len(variant):
            raise ValueError(
                f"guidance: a condition has {len(variant)} entries in the place of {len(value)}; one, "
                "or one per image, is allowed"
            )
        changed = [torch.as_tensor(one) for one in variant] * (len(value) // len(variant))
        pairs = zip(value, changed, strict=True)
        return type(value)(new.to(own.device, own.dtype) for own, new in pairs)
    if not isinstance(value, torch.Tensor):
        return variant
    batch = torch.atleast_1d(torch.as_tensor(variant)).to(value.device, value.dtype)
    total = len(value) if value.ndim else 1
    if total % len(batch) or batch.shape[1:] != value.shape[1:]:
        raise ValueError(
            f"guidance: a condition has shape {tuple(batch.shape)} in the place of "
            f"{tuple(value.shape)}; one row, or one per image, of that shape is allowed"
        )
    several = total // rows if total % rows == 0 and rows % len(batch) == 0 else 1  # as for frames
    repeats = total // several // len(batch)
    return batch.repeat(repeats, *[1] * (batch.ndim - 1)).repeat_interleave(several, dim=0)


def _concat_batch(rows: int, value: Any, *variants: Any) -> Any:
    """An argument with the rows of several calls: the pipeline's, and one for each condition."""
    if not has_rows(value, rows):
        return value
    return torch.cat([value, *variants])


def is_doubled(call: DenoiserCall, output: torch.Tensor, sample: torch.Tensor) -> bool:
    """Whether the batch holds each image twice, as in DiT: two equal halves went into the network,
    came out different, and go into the step equal, the guided half twice. Two images of one seed
    and label come out equal."""
    is_tensor = isinstance(call.input, torch.Tensor) and isinstance(call.output, torch.Tensor)
    if not is_tensor or len(sample) % 2 or len(call.input) != len(sample):
        return False
    halves = [tensor[:, : sample.shape[1]].chunk(2) for tensor in (call.input, call.output, output)]
    same_input, same_output, same_guided = (torch.equal(*half) for half in halves)
    return same_input and same_guided and not same_output


def combination_weights(
    outputs: torch.Tensor, made: torch.Tensor, sample: torch.Tensor
) -> list[float] | None:
    """w of `made = sum_i w_i part_i + w_sample sample`: how a pipeline combined the parts of its
    network's batch. The last number is w_sample.

    Classifier-free guidance is made = first + s (second - first), and perturbed-attention guidance
    has three parts. These, with sum_i w_i = 1 and w_sample = 0, are tried first. Solved by least
    squares.

    Args:
        outputs: (k B, C or 2C, ...), the network's.
        made, sample: (B, C, ...).

    Returns:
        None if it is no such combination, as with guidance rescale.
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
        eps = max(torch.finfo(tensor.dtype).eps for tensor in (outputs, made))
        differences = [part - parts[0] for part in parts]
        weights = _least_squares(differences, target - parts[0])
        weights[0] = 1 - sum(weights[1:])
        if _is_sum(weights, parts, target, eps):
            return [*weights, 0.0]
        parts.append(sample.double().flatten().cpu())
        weights = _least_squares(parts, target)
        if _is_sum(weights, parts, target, eps):
            return weights
    return None


def _least_squares(columns: Sequence[torch.Tensor], target: torch.Tensor) -> list[float]:
    matrix = torch.stack(list(columns), dim=1)
    return (torch.linalg.pinv(matrix.mT @ matrix) @ (matrix.mT @ target)).tolist()


def _is_sum(
    weights: Sequence[float], parts: Sequence[torch.Tensor], target: torch.Tensor, eps: float
) -> bool:
    scaled = [weight * part for weight, part in zip(weights, parts, strict=True)]
    largest = max(part.norm() for part in (target, *scaled))
    return bool((sum(scaled) - target).norm() <= 8 * eps * largest)
