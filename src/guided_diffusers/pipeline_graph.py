"""The autograd graph of a pipeline's own arithmetic, from one step of its scheduler to the next.

A pipeline packs its sample, joins it with other inputs, calls its networks, and combines their
outputs, linearly or not. Where a term needs the gradient through all of that, the step before it
returns a sample that requires a gradient, and gradients are on until the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .networks import no_parameter_grad


class PipelineGraph:
    """Records the arithmetic between two steps.

    Args:
        modules: the networks between them, whose parameters need no gradient meanwhile.
    """

    def __init__(self, modules: Sequence[torch.nn.Module]):
        self.modules = modules
        self._stack: ExitStack | None = None
        self._start: torch.Tensor | None = None

    def begin(self, result: Any) -> Any:
        """The result of a step with a sample that requires a gradient; gradients are on from here.

        In inference mode, where there are none, the result as it is.
        """
        if torch.is_inference_mode_enabled() or not result[0].is_floating_point():
            return result
        self._stack = ExitStack()
        self._stack.enter_context(no_parameter_grad(self.modules))
        self._stack.enter_context(torch.enable_grad())
        # a clone, since pipelines may change it in place, which a leaf forbids
        self._start = result[0].detach().requires_grad_(True).clone()
        if isinstance(result, tuple):
            return (self._start, *result[1:])
        result.prev_sample = self._start
        return result

    def end(self, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        """The sample from which the graph leads to the network's output; None if there is none.

        It has the values of `sample`, and may be another tensor: a pipeline may step with a copy.
        """
        start = self._start
        self.stop()
        if start is None or not output.requires_grad:
            return None
        if sample is start:
            return sample
        if start.shape == sample.shape and torch.equal(start.to(sample.dtype), sample):
            return start
        return sample if _leads_to(output, sample) else None

    def stop(self) -> bool:
        """Gradients are as before; whether they were on.

        By the next step, or before: at the pipeline's decoder, or its end, where it leaves its loop
        early (interrupted, `denoising_end`).
        """
        stack, self._stack, self._start = self._stack, None, None
        if stack is not None:
            stack.close()
        return stack is not None

    def wrapped(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """A pipeline's callback that gets tensors without a graph; one that it gives back as it got
        it keeps its graph."""

        @wraps(callback)
        def plain(*args: Any, **kwargs: Any) -> Any:
            originals: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

            def detached(value: Any) -> Any:
                if not isinstance(value, torch.Tensor):
                    return value
                pair = value.detach(), value
                originals[id(pair[0])] = pair
                return pair[0]

            recorded, is_on = (self._stack, self._start), self._start is not None
            self._stack = self._start = None  # a decoder that the callback calls doesn't end it
            try:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not is_on):
                    changed = callback(*tree_map(detached, args), **tree_map(detached, kwargs))
            finally:
                self._stack, self._start = recorded
            return tree_map(lambda value: originals.get(id(value), (value, value))[1], changed)

        return plain


def _leads_to(output: torch.Tensor, sample: torch.Tensor) -> bool:
    """Whether the graph of the output has the sample in it."""
    target, todo, seen = sample.grad_fn, [output.grad_fn], set()
    while todo and target is not None:
        node = todo.pop()
        if node is target:
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return False
