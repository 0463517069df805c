"""Faster guided steps: autocast, channels_last, torch.compile, chunked gradients; undone on exit.

    with optimize(pipeline, images=50_000) as chosen:
        print(chosen)                                  # what is on and what is off, with reasons
        images = pipeline("sneaker", 50).images

`computing_in` (for a network) and `gradients_in` (for the classifier's gradient) can also be used
alone. None of these changes weights, config or what `save_pretrained` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor

from .guidance import ClassifierGuidance, NoiseAwareGuidance
from .guidance import value_and_gradient as eager_value_and_gradient
from .likelihood import logits_of
from .noise import module_config
from .pipeline import ClassifierGuidedPipeline
from .utils import parameter_dtype

Backend = str | Callable[..., Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: smallest batch at which autocast is faster on a CPU; below, casting the weights dominates
MIN_AUTOCAST_BATCH = {"unet": 8, "classifier": 32}
#: images times steps from which compiling pays off: it takes 90 s and saves 1 ms each (bundled
#: models on a CPU with AMX; `examples/benchmarks/step.py --compile`)
MIN_COMPILE_EVALUATIONS = 100_000


@contextmanager
def computing_in(
    network: torch.nn.Module, dtype: torch.dtype, compile: Backend | None = None
) -> Iterator[None]:
    """Within, the network runs under autocast to `dtype` and returns float32.

    Args:
        dtype: float32, bfloat16 or float16; float32 is off.
        compile: a backend of `torch.compile`, such as "inductor", which compiles at the next call
            and for another batch size, but not for another timestep tensor. None: off.

    Raises:
        ValueError: for another dtype, or a network that is already offloaded.
    """
    _check_dtype(dtype)
    if dtype == torch.float32 and compile is None:
        yield
        return
    if hasattr(network, "_hf_hook"):  # offloading replaces `forward` after each call
        raise ValueError(
            f"{type(network).__name__} is offloaded already; call optimize before offloading"
        )
    original, own_forward = network.forward, vars(network).get("forward")
    inner = original if compile is None else torch.compile(original, backend=compile)

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # the input's device, because sequentially offloaded weights have none
        tensor = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        with _autocast(tensor.device, dtype):
            return inner(*args, **kwargs)

    faster = forward if dtype == torch.float32 else convert_outputs_to_fp32(forward)
    network.forward = faster
    try:
        yield
    finally:
        if vars(network).get("_old_forward") is faster:  # it was offloaded meanwhile
            network._old_forward = original
        elif own_forward is not None:
            network.forward = own_forward
        else:
            del network.forward


@contextmanager
def gradients_in(
    classifier: torch.nn.Module,
    dtype: torch.dtype = torch.float32,
    compile: Backend | None = None,
    chunk_size: int | None = None,
) -> Iterator[None]:
    """Within, guidance by this classifier computes its gradient faster, or with less memory.

    The gradient stays float32 (or wider).

    Args:
        classifier: of a `NoiseAwareGuidance`: `ClassifierGuidance` or `NoiseAwareCLIPGuidance`.
        dtype: of autocast: float32 (off), bfloat16 or float16.
        compile: a backend of `torch.compile` for log p(y | x_t) with its gradient. A larger batch
            is compiled again; smaller ones run eagerly. None: off.
        chunk_size: images per forward and backward pass, which bounds the memory. None: all.

    Raises:
        ValueError: for another dtype, or a chunk_size below 1.
    """
    _check_dtype(dtype)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(
            f"chunk_size={chunk_size}: at least 1, or None for all images at once, is allowed"
        )
    original = vars(classifier).get("input_gradient")
    compiled = compile and torch.compile(value_and_gradient, backend=compile)
    num_labels = module_config(classifier).get("num_labels")
    classifier.input_gradient = InputGradient(dtype, compiled, chunk_size, num_labels)
    try:
        yield
    finally:
        if original is None:
            del classifier.input_gradient
        else:
            classifier.input_gradient = original


@dataclass
class InputGradient:
    """(term, z, t) -> the term's log p(y | z), (B,), and its gradient by z."""

    dtype: torch.dtype
    compiled: Callable[..., tuple[Tensor, Tensor]] | None
    chunk_size: int | None
    num_labels: int | None
    largest_batch: int = 0

    def __call__(self, term: NoiseAwareGuidance, z: Tensor, t: float) -> tuple[Tensor, Tensor]:
        size = self.chunk_size or len(z)
        with torch.inference_mode(False), torch.no_grad():
            z = z.clone() if z.is_inference() else z.detach()
            with _autocast(z.device, self.dtype):
                if isinstance(term, ClassifierGuidance):  # checks and caches the batch's labels
                    self.num_labels = self.num_labels or logits_of(term.module(z[:1], 0.0)).shape[1]
                    term.likelihood(z.new_zeros(len(z), self.num_labels))
                if size >= len(z):
                    return self._gradient(term, z, t)
                chunks = [slice(start, start + size) for start in range(0, len(z), size)]
                parts = [self._gradient(term.select(c, len(z)), z[c], t) for c in chunks]
                values, gradients = zip(*parts, strict=True)
                return torch.cat(values), torch.cat(gradients)

    def _gradient(self, term: NoiseAwareGuidance, z: Tensor, t: float) -> tuple[Tensor, Tensor]:
        self.largest_batch = max(self.largest_batch, len(z))
        # every new size would be compiled anew: of a last batch, or with `guidance_tolerance`;
        # and so would the modules that softplus replaces at every step
        is_smaller = len(z) < self.largest_batch
        if self.compiled is None or is_smaller or getattr(term, "softplus", None) is not None:
            return eager_value_and_gradient(lambda z: term.log_probability(z, t), z)
        # a tensor, because compiled code is specialised to the value of a float
        timestep = torch.full((), t, dtype=torch.float32, device=z.device)
        return self.compiled(term, z, timestep)


def value_and_gradient(term: NoiseAwareGuidance, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """log p(y | z) of a term, (B,), and its gradient by z, at timestep t, (), of its schedule."""

    def total(z: Tensor) -> tuple[Tensor, Tensor]:
        log_p = term.log_probability(z, t)
        return log_p.sum(), log_p

    grad, log_p = torch.func.grad(total, has_aux=True)(z)
    return log_p, grad


class Optimized(ExitStack):
    """What `optimize` chose: `on`, `off`, {optimization: reason}; undoes it on exit."""

    def __init__(self) -> None:
        super().__init__()
        self.on: dict[str, str] = {}
        self.off: dict[str, str] = {}

    def choose(self, name: str, requested: bool | None, automatic: tuple[bool, str]) -> bool:
        """Note a choice with its reason; returns whether it is on."""
        is_on, reason = automatic if requested is None else (requested, "as requested")
        (self.on if is_on else self.off)[name] = reason
        return is_on

    def undo(self) -> None:
        """Restore the pipeline; a second call has no effect."""
        self.close()

    def __str__(self) -> str:
        lines = [f" on {name}: {reason}" for name, reason in self.on.items()]
        return "\n".join(lines + [f"off {name}: {reason}" for name, reason in self.off.items()])


def optimize(
    pipeline: ClassifierGuidedPipeline,
    images: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    compile: bool | None = None,
    channels_last: bool | None = None,
    chunk_size: int | None = None,
    device: torch.device | str | None = None,
    backend: Backend = "inductor",
) -> Optimized:
    """Make a pipeline's steps faster, in place, by what helps on its device.

    By default: autocast of network and classifier to bfloat16 (outputs and gradient stay float32)
    where the device computes in it, on a CPU for large enough batches; with it `channels_last` on
    CUDA; and `torch.compile` from `MIN_COMPILE_EVALUATIONS` on. Images change only by rounding.
    Call it before offloading.

    Args:
        images: number of images to be sampled in all. None: unknown, nothing is compiled.
        steps: of each image. None: the pipeline's default.
        batch_size: images of a call. None: all `images`, at most 64.
        dtype: of autocast; float32 is off. None: automatic.
        compile, channels_last: True or False. None: automatic.
        chunk_size: images of one gradient, as of `gradients_in`. None: all.
        device: on which it will run. None: the pipeline's.
        backend: of `torch.compile`.

    Raises:
        ValueError: for invalid values, or a pipeline that is already offloaded.
    """
    if dtype is not None:
        _check_dtype(dtype)
    steps = pipeline.config.defaults["num_inference_steps"] if steps is None else steps
    batch_size = min(images or 64, 64) if batch_size is None else batch_size
    if (images is not None and images < 1) or steps < 1 or batch_size < 1:
        raise ValueError(
            f"images={images}, steps={steps}, batch_size={batch_size}: at least 1 is allowed"
        )
    if chunk_size is not None and pipeline.classifier is None:
        raise ValueError(f"chunk_size={chunk_size} has no effect: the pipeline has no classifier")
    device, chosen = torch.device(device or pipeline.device), Optimized()
    try:
        for name in ("unet", "classifier"):
            if (module := getattr(pipeline, name)) is None:
                continue
            chunk = chunk_size if name == "classifier" else None
            batch = min(batch_size, chunk or batch_size)
            autocast_dtype, compute_dtype = torch.float32, parameter_dtype(module)
            requested = None if dtype is None else dtype != torch.float32
            choice = _use_autocast(name, compute_dtype, device, batch)
            if chosen.choose(f"{name}, autocast", requested, choice):
                autocast_dtype = compute_dtype = dtype or torch.bfloat16
            is_faster = device.type == "cuda" and compute_dtype != torch.float32
            effect = "faster" if is_faster else "not faster"
            choice = is_faster, f"{effect} on {device.type} in {compute_dtype}"
            if chosen.choose(f"{name}, channels_last", channels_last, choice):
                module.to(memory_format=torch.channels_last)
                chosen.callback(module.to, memory_format=torch.contiguous_format)
            choice = _use_compile(pipeline, name, compute_dtype, images and images * steps)
            used_backend = None
            if chosen.choose(f"{name}, torch.compile", compile, choice):
                used_backend = backend
            if name == "unet":
                chosen.enter_context(computing_in(module, autocast_dtype, used_backend))
            else:
                chosen.enter_context(gradients_in(module, autocast_dtype, used_backend, chunk))
    except BaseException:
        chosen.undo()
        raise
    if chunk_size is not None:
        chosen.on["gradient in chunks"] = f"{chunk_size} images at a time, as requested"
    return chosen


def _use_autocast(
    name: str, weights: torch.dtype, device: torch.device, batch: int
) -> tuple[bool, str]:
    if weights != torch.float32:
        return False, f"its weights are {weights}"
    if not computes_in_bfloat16(device):
        return False, f"this {device.type} doesn't compute in bfloat16 itself"
    if device.type == "cpu" and batch < MIN_AUTOCAST_BATCH[name]:
        return False, f"no faster for batches of {batch}"
    return True, f"this {device.type} computes in bfloat16"


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has native bfloat16 matrix multiplication, which makes it fast."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )


def _use_compile(
    pipeline: ClassifierGuidedPipeline, name: str, dtype: torch.dtype, evaluations: float | None
) -> tuple[bool, str]:
    if evaluations is None:
        return False, "the number of images is unknown"
    defaults = pipeline.config.defaults
    if name == "classifier":
        if dtype == torch.float32:
            return False, "not faster in float32"
        if defaults["guidance_tolerance"] is not None:
            return False, "with guidance_tolerance, batches have many sizes"
        interval = defaults["guidance_stop"] - defaults["guidance_start"]
        evaluations *= bool(defaults["guidance_scale"]) * interval / defaults["guidance_every"]
    reason = f"{evaluations:.0f} evaluations; it pays off from {MIN_COMPILE_EVALUATIONS} on"
    return evaluations >= MIN_COMPILE_EVALUATIONS, reason


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    # nothing for float32: a disabled autocast would switch off one around it
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: {', '.join(map(str, DTYPES))} are allowed")
