"""Networks of a run: in evaluation mode, without gradients of parameters, with a smooth ReLU."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock
from types import MethodType
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module

from .checks import check_number, shown


def network_output(
    network: torch.nn.Module, sample: torch.Tensor, timestep: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """Output of a network that is called (sample, timestep), whether it returns a tensor, a tuple that
    begins with it, or an object that has it as `.sample`."""
    parameters = inspect.signature(unwrap_module(network).forward).parameters.values()
    if any(p.name == "return_dict" or p.kind is p.VAR_KEYWORD for p in parameters):
        kwargs["return_dict"] = False
    output = network(sample, timestep, **kwargs)
    if isinstance(output, (tuple, list)):
        return output[0]
    return output if isinstance(output, torch.Tensor) else output.sample


def check_module(name: str, module: Any) -> None:
    """Raise ValueError unless it is a `torch.nn.Module`."""
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"{name}={shown(module)}: a torch.nn.Module is allowed")


@contextmanager
def evaluating(*modules: torch.nn.Module | None) -> Iterator[None]:
    """Context in which the modules are in evaluation mode and their parameters need no gradient.

    Evaluation mode means that dropout is off and running statistics are used and stay as they are.
    On exit each layer has its own mode again. None stands for a module that isn't used.
    """
    present = [module for module in modules if module is not None]
    with evaluation_mode(*present), no_parameter_grad(present):
        yield


@contextmanager
def evaluation_mode(*modules: torch.nn.Module) -> Iterator[None]:
    """Context in which the modules are in evaluation mode, as in `evaluating`; parameters stay as
    they are, since torch rounds some products otherwise where they need no gradient."""
    with _false([(layer, "training") for module in modules for layer in module.modules()]):
        yield


@contextmanager
def no_parameter_grad(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Context in which no parameter of the modules requires a gradient; restored on exit.

    Nothing is then kept in memory or computed for the weights' gradients.
    """
    flags = []
    for module in modules:
        for layer in module.modules():
            for name, parameter in layer._parameters.items():
                # one made in inference mode can't change, nor be part of a gradient
                if parameter is not None and not parameter.is_inference():
                    flags.append((layer, name))
    with _false(flags):
        yield


@contextmanager
def naming_dtypes(**modules: torch.nn.Module | None) -> Iterator[None]:
    """Context in which an error about dtypes names the module with weights of several dtypes.

    Raises:
        ValueError: in place of a RuntimeError, if there is such a module.
    """
    try:
        yield
    except RuntimeError as error:
        if "type" not in str(error):
            raise
        for name, module in modules.items():
            parameters = () if module is None else module.parameters()
            dtypes = sorted({str(p.dtype) for p in parameters if p.is_floating_point()})
            if len(dtypes) > 1:
                raise ValueError(
                    f"{name}: its weights are {' and '.join(dtypes)}, which don't fit in one of its "
                    f"layers; {name}.to(dtype) makes them one dtype ({error})"
                ) from error
        raise


Flag = tuple[torch.nn.Module, str]  # `training`, or the parameter of this name: its requires_grad


#: how many contexts set a flag to False that was True: calls in several threads may share a network
_false_counts: Counter[tuple[int, str]] = Counter()


_false_lock = Lock()


@contextmanager
def _false(flags: Sequence[Flag]) -> Iterator[None]:
    """Context in which the flags are False; the last one to end restores those that were True."""
    changed = []
    try:
        with _false_lock:
            for layer, name in flags:
                key = (id(layer), name)
                if key in _false_counts or _get_flag(layer, name):
                    _false_counts[key] += 1
                    changed.append((layer, name))
                    _set_flag(layer, name, False)
        yield
    finally:
        with _false_lock:
            for layer, name in changed:
                key = (id(layer), name)
                _false_counts[key] -= 1
                if not _false_counts[key]:
                    del _false_counts[key]
                    _set_flag(layer, name, True)


def _get_flag(layer: torch.nn.Module, name: str) -> bool:
    return layer.training if name == "training" else layer._parameters[name].requires_grad


def _set_flag(layer: torch.nn.Module, name: str, value: bool) -> None:
    if name == "training":
        layer.training = value
    else:  # looked up again: sequential offloading replaces the parameters at each forward pass
        layer._parameters[name].requires_grad_(value)


def check_softplus(module: torch.nn.Module, beta: float | None) -> None:
    """Refuse a beta that is not positive, or that would have no effect.

    Raises:
        ValueError: for either.
    """
    if beta is not None:
        beta = check_number("softplus", beta, 0, above=True)
    if beta is not None and not any(isinstance(m, torch.nn.ReLU) for m in module.modules()):
        raise ValueError(
            f"softplus={beta}: {type(module).__name__} has no torch.nn.ReLU to make smooth"
        )
    relu_as_softplus(module, beta)


def relu_as_softplus(module: torch.nn.Module, beta: float | None) -> torch.nn.Module:
    """A copy of the module with softplus(beta x) / beta in place of its ReLU; None: the module.

    The copy shares the weights, and layers without ReLU; the module itself isn't changed, so other
    threads can use it meanwhile. A copy takes about 1 ms for 500 layers.

    Raises:
        ValueError: for a layer with ReLU below it whose `forward` was replaced by a function, which
            would run the layer itself instead of the copy.
    """
    if beta is None:
        return module
    copies: dict[int, torch.nn.Module] = {}  # by the id of a layer; those of shared ones are shared
    smooth = _with_softplus(module, beta, copies)

    def exchange(value: Any) -> Any:
        """The value with copies in place of layers."""
        if isinstance(value, torch.nn.Module):
            return copies.get(id(value), value)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, exchange(value.__self__))
        if type(value) is partial:
            return partial(exchange(value.func), *map(exchange, value.args), **value.keywords)
        if type(value) in (list, tuple):
            return type(value)(map(exchange, value))
        if type(value) is dict:
            return {name: exchange(item) for name, item in value.items()}
        return value

    for clone in copies.values():
        attributes = vars(clone)
        for name in attributes.keys() - _MODULE_ATTRIBUTES:
            attributes[name] = exchange(attributes[name])
        if not isinstance(attributes.get("forward"), (MethodType, partial, type(None))):
            raise ValueError(
                f"softplus={beta}: the forward of {type(clone).__name__} was replaced by a function "
                "(torch.compile, computing_in, ...), which would run its ReLU; None is allowed"
            )
    return smooth


_MODULE_ATTRIBUTES = vars(torch.nn.Module()).keys()


def _with_softplus(
    layer: torch.nn.Module, beta: float, copies: dict[int, torch.nn.Module]
) -> torch.nn.Module:
    """A copy of a layer with ReLU in or below it, added to `copies`; of any other the layer."""
    layer = unwrap_module(layer)  # of torch.compile
    if id(layer) in copies:
        return copies[id(layer)]
    if isinstance(layer, torch.nn.ReLU):
        copies[id(layer)] = torch.nn.Softplus(beta)
        return copies[id(layer)]
    children = {}
    for name, child in layer._modules.items():
        children[name] = child if child is None else _with_softplus(child, beta, copies)
    if all(children[name] is child for name, child in layer._modules.items()):
        return layer
    clone = object.__new__(type(layer))
    vars(clone).update({**vars(layer), "_modules": children, "_compiled_call_impl": None})
    copies[id(layer)] = clone
    return clone
