"""Finds where a run makes the host wait for its device, also where there is none; used by `gpu.py`.

    python examples/benchmarks/gpu.py --device meta --size tiny

In Python:

    with SimulatedDevice() as device, in_loop(pipeline.unet, device):
        to_device(pipeline.unet, pipeline.classifier)
        pipeline([3, 4], output_type="latent")
    print(device.waits)                    # of the loop, from the first call of the network to the end of its last step

On the simulated device, "meta", tensors keep their values, so that a run has the same results as on the CPU, up to
rounding, and every operation passes through `SimulatedDevice`. It notes what waits on an accelerator: operations that
read a value, such as `item()`, `bool(tensor)` or `nonzero()`, and copies to and from it without `non_blocking=True`;
and it refuses operations between tensors of two devices. `package` says in which package an operation was called.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from guided_diffusers.guider import Guider

DEVICE = "meta"
#: operations whose result, or its shape, depends on values that the host reads
READS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
PACKAGES = ("guided_diffusers", "diffusers", "transformers")
COPIES = {"_to_copy", "copy_"}
#: these take an index on the CPU, and copy it
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass(frozen=True)
class Wait:
    """An operation for which the host waits.

    Attributes:
        kind: "read", or "copy", to the device.
        operation: its name.
        package: in which it was called: guided_diffusers, diffusers, or a file's name.
        place: file and function there.
    """

    kind: str
    operation: str
    package: str
    place: str


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated device; `held` has its values."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> DeviceTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        kind = {"dtype": held.dtype, "device": DEVICE}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, **kind)

    def __init__(self, held: torch.Tensor):
        self.held = held

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __format__(self, specification: str) -> str:
        return format(self.item() if self.ndim == 0 else self.cpu(), specification)

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"a tensor on {DEVICE!r} has no array; use tensor.cpu()")

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple, kwargs: Any = None) -> Any:
        raise RuntimeError(f"{op}: tensors of the simulated device are used within it")


class _Factories(TorchFunctionMode):
    """`torch.tensor(values, device=...)` as on a device, a copy; that of "meta" has no values."""

    def __torch_function__(self, function: Any, types: Any, args: tuple, kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        makes_copy = function in (torch.tensor, torch.as_tensor)
        if makes_copy and device is not None and torch.device(device).type == DEVICE:
            return function(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        return function(*args, **kwargs)


class SimulatedDevice(TorchDispatchMode):
    """Context in which the device "meta" computes on the CPU, and waits are noted.

    Attributes:
        waits: noted while `is_on`; see `in_loop`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.is_on = True
        self._factories = _Factories()

    def __enter__(self) -> SimulatedDevice:
        self._factories.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._factories.__exit__(*error)

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        target = kwargs.get("device")
        if target is not None:
            target = torch.device(target).type
            kwargs["device"] = "cpu" if target == DEVICE else target
        name = op.__name__.partition(".")[0]
        if on_device or target == DEVICE:
            self._note(name, tensors, args, kwargs, target)
        held = tree_map_only(DeviceTensor, lambda tensor: tensor.held, (args, kwargs))
        result = op(*held[0], **held[1])
        stays = (on_device and target is None) or target == DEVICE
        if name == "copy_":
            return args[0]
        if not stays:
            return result
        result = tree_map_only(torch.Tensor, DeviceTensor, result)
        return return_and_correct_aliasing(op, args, kwargs, result) if on_device else result

    def _note(
        self,
        name: str,
        tensors: Sequence[torch.Tensor],
        args: tuple,
        kwargs: dict[str, Any],
        target: str | None,
    ) -> None:
        """Note an operation with a tensor of the device, or to it, if the host waits for it.

        Raises:
            RuntimeError: for tensors of both devices, as on an accelerator.
        """
        on_cpu = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
        masks = [tensor for tensor in tensors[1:] if tensor.dtype in (torch.bool, torch.uint8)]
        if name in READS or (name in INDEXED and masks):
            self._add("read", name)
        elif name in COPIES:
            blocks = not kwargs.get("non_blocking", name == "copy_" and args[2:3] == (True,))
            if target == "cpu" or (name == "copy_" and not isinstance(args[0], DeviceTensor)):
                self._add("read", name)
            elif blocks and on_cpu:
                self._add("copy", name)
        elif on_cpu and name in INDEXED:
            self._add("copy", name)
        elif any(tensor.ndim for tensor in on_cpu):
            raise RuntimeError(f"{name}: tensors on two devices, cpu and {DEVICE}")

    def _add(self, kind: str, name: str) -> None:
        if self.is_on:
            self.waits.append(Wait(kind, name, *_caller()))

    def reads(self, package: str) -> list[Wait]:
        """The reads of values that were called in a package."""
        return [wait for wait in self.waits if wait.kind == "read" and wait.package == package]


def _caller() -> tuple[str, str]:
    """Package, and file and function, of the innermost frame that isn't torch's or this file's."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name != Path(__file__).name and "torch" not in path.parts:
            packages = [name for name in PACKAGES if name in path.parts]
            return (packages or [path.name])[0], f"{path.name}, {frame.f_code.co_name}"
        frame = frame.f_back
    return "", ""


@contextmanager
def in_loop(network: torch.nn.Module, device: Any, step: int = 0) -> Iterator[None]:
    """Context in which waits are noted, `device.is_on`, from the network's call number `step` to the
    end of the run's last scheduler step, where the run is checked for NaN. `guide` reads the
    schedule, and compares the pipeline's tensors, at the first step."""
    check, calls = Guider.check_finite, 0
    device.is_on = False

    def start(*_: Any) -> None:
        nonlocal calls
        device.is_on, calls = device.is_on or calls == step, calls + 1

    @wraps(check)
    def stop(guider: Guider) -> None:
        device.is_on = False
        check(guider)

    handle = network.register_forward_pre_hook(start)
    try:
        with patch.object(Guider, "check_finite", stop):
            yield
    finally:
        device.is_on = False
        handle.remove()


def to_device(*modules: torch.nn.Module) -> None:
    """Move the weights of modules to the simulated device."""
    for module in modules:
        for layer in module.modules():
            for name, parameter in layer._parameters.items():
                if parameter is not None:
                    held = DeviceTensor(parameter.detach())
                    layer._parameters[name] = torch.nn.Parameter(held, parameter.requires_grad)
            for name, buffer in layer._buffers.items():
                if buffer is not None:
                    layer._buffers[name] = DeviceTensor(buffer)
