"""A pipeline's own arithmetic from its network's outputs to the scheduler's step, run again.

Most pipelines combine the outputs linearly (network_calls.py). Others rescale, normalize, unpack or
stack them. `LoopReplay` runs the statements of the loop's body on other outputs, or on another
sample: what reaches `scheduler.step` then is what the pipeline would predict.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import lru_cache
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch

from .latent_images import (
    EffectDropper,
    compile_statements,
    copy_variable,
    function_tree,
    pipeline_frames,
)
from .network_calls import DenoiserCall


class StepReached(Exception):
    """The prediction that a pipeline passes to `scheduler.step`; raised in its place."""

    def __init__(self, output: torch.Tensor):
        super().__init__("step")
        self.output = output


class _Network:
    """A network that is evaluated by a function."""

    def __init__(self, module: torch.nn.Module, evaluate: Callable[..., Any]):
        self._module, self._evaluate = module, evaluate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(self._module, *args, **kwargs)


class _Scheduler:
    """A scheduler that doesn't step: it raises the prediction."""

    def __init__(self, scheduler: Any):
        self._scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise StepReached(model_output)


class LoopVariables:
    """The variables of a pipeline's methods at its first call of the network since the last step.

    Args:
        frame: from which the methods are looked for.
    """

    def __init__(self, frame: FrameType | None):
        self._frames = [(frame, dict(frame.f_locals)) for frame in pipeline_frames(frame)]

    def replay(self, frame: FrameType, denoisers: Sequence[torch.nn.Module]) -> LoopReplay | None:
        """Of the method that calls `scheduler.step`; None if it has no loop, or no source."""
        for own, variables in self._frames:
            if own is frame:
                names = tuple(name for name in variables if name.isidentifier())
                try:
                    code = _body_code(frame.f_code, frame.f_lineno, names)
                except LookupError:
                    return None
                function = FunctionType(code, frame.f_globals)
                return LoopReplay(function, {name: variables[name] for name in names}, denoisers)
        return None


class LoopReplay:
    """The body of a pipeline's loop, up to `scheduler.step`, as a function.

    It runs on copies of the pipeline and of the method's variables.
    """

    def __init__(
        self,
        function: FunctionType,
        variables: dict[str, Any],
        denoisers: Sequence[torch.nn.Module],
    ):
        self.function, self.variables, self.denoisers = function, variables, denoisers

    def __call__(
        self,
        evaluate: Callable[..., Any],
        sample: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | None:
        """The prediction (B, C, ...), or None where the statements can't be run.

        Args:
            evaluate: (network, its arguments) -> its output.
            sample: the loop's, and another one in its place.

        Raises:
            MemoryError, torch.OutOfMemoryError: of the statements.
        """
        pipeline, replacements = self.variables["self"], {}
        own, changed = copy(pipeline), vars(pipeline).items()
        for name, value in changed:
            if any(value is module for module in self.denoisers):
                replacements[id(value)] = vars(own)[name] = _Network(value, evaluate)
        scheduler = _Scheduler(pipeline.scheduler)
        replacements[id(pipeline.scheduler)] = vars(own)["scheduler"] = scheduler
        replacements[id(pipeline)] = own
        if sample is not None:
            replacements[id(sample[0])] = sample[1]
            if not any(value is sample[0] for value in self.variables.values()):
                return None
        variables = {
            name: replacements[id(value)]
            if id(value) in replacements
            else copy_variable(name, value)
            for name, value in self.variables.items()
        }
        try:
            self.function(**variables)
        except StepReached as reached:
            return reached.output
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # such as a variable that the body has changed
            return None
        return None


def in_turn(results: Sequence[Any]) -> Callable[..., Any]:
    """A network's results in the order of its calls, for any arguments."""
    remaining: Iterator[Any] = iter(list(results))
    return lambda *args, **kwargs: next(remaining)


def repeated(calls: Sequence[DenoiserCall]) -> Callable[..., Any]:
    """The network's own results in the order of its calls, if it gets the same arguments again.

    Statements before the call that use up a generator, or change a variable, would otherwise run
    twice unnoticed.

    Raises:
        ValueError: by the function, where a tensor differs.
    """
    remaining = iter(calls)

    def evaluate(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = next(remaining)
        again = call.arguments.signature.bind(*args, **kwargs).arguments
        for name, value in call.arguments.arguments.items():
            if not _is_close(again.get(name), value):
                raise ValueError(f"{name} differs from the pipeline's own call")
        return call.results[0]

    return evaluate


def _is_close(again: Any, value: Any) -> bool:
    """Whether tensors, also of lists, are equal up to rounding; all else is."""
    if isinstance(value, (list, tuple)):
        return len(again) == len(value) and all(map(_is_close, again, value))
    if not isinstance(value, torch.Tensor):
        return True
    return is_close(again, value)


def is_close(again: Any, value: torch.Tensor) -> bool:
    """Whether a tensor was computed again, up to rounding."""
    if not isinstance(again, torch.Tensor) or again.shape != value.shape:
        return False
    again, value = again.detach().float(), value.detach().float()
    return bool((again - value).norm() <= 1e-3 * value.norm())


@lru_cache(maxsize=64)
def _body_code(method: CodeType, line: int, names: tuple[str, ...]) -> CodeType:
    """Code of a function of the method's variables: the body of the loop around this line.

    Raises:
        LookupError: if there is no loop, or no source.
    """
    tree = function_tree(method)
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.For, ast.While)) and node.lineno <= line <= node.end_lineno
    ]
    if not loops:
        raise LookupError(f"line {line} is in no loop")
    inner = max(loops, key=lambda node: node.lineno)
    inner.body = [EffectDropper().visit(node) for node in inner.body]
    once = ast.Name("_once", ast.Store())  # a loop, for its `continue` and `break`
    loop = ast.For(once, ast.Tuple([ast.Constant(0)], ast.Load()), inner.body, [])
    return compile_statements(tree, [loop], method, names)
