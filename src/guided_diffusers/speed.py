"""What makes a guided step cheaper on a device: each part where it helps, said, and undone when it's no longer wanted.

    with optimize(pipeline, images=50_000) as chosen:
        print(chosen)                                  # what is on and why, what is off and why
        images = pipeline("sneaker", 50).images

The parts are `computing_in` (a network) and `gradients_in` (the gradient by a classifier's input). Neither touches
weights, config or what is saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32

from .guidance import (
    ClassifierGuidance,
    NoiseAwareGuidance,
    gradient,
    no_parameter_grad,
)
from .likelihood import logits_of
from .noise import module_config
from .pipeline import ClassifierGuidedPipeline

Backend = str | Callable[..., Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: seconds to compile a network, and the share of its eager seconds that a compiled one saves, by what it computes in:
#: measured on a CPU with AMX, one thread, bundled models (`examples/benchmark_step.py --compile`)
COMPILE_SECONDS = 35.0
SAVED = {
    "unet": {torch.float32: 0.15, torch.bfloat16: 0.3},
    "classifier": {torch.float32: 0.0, torch.bfloat16: 0.09},
}
#: images of a call from which on autocast is faster on a CPU with AMX: below, it casts weights longer than it computes
FEWEST = {"unet": 8, "classifier": 32}
PROBED = 16  # images of a call that is timed, at most


@contextmanager
def computing_in(
    network: torch.nn.Module, dtype: torch.dtype, compile: Backend | None = None
) -> Iterator[None]:
    """Within, the network computes in `dtype` where that is accurate enough (autocast) and gives float32.

    Args:
        dtype: float32 leaves it as it is.
        compile: a backend of `torch.compile`, as "inductor": its `forward` is compiled at its next call, again for
            another size of the batch, and not for another timestep, if that is a tensor. None: off.

    Raises:
        ValueError: for another dtype, or a network that is offloaded already.
    """
    _check_dtype(dtype)
    if dtype == torch.float32 and compile is None:
        yield
        return
    if hasattr(
        network, "_hf_hook"
    ):  # offloading exchanges `forward` after each call of the pipeline
        raise ValueError(
            f"{type(network).__name__} is offloaded already; only before that it can be made faster"
        )
    before, own = network.forward, vars(network).get("forward")
    inner = before if compile is None else torch.compile(before, backend=compile)
    convert = convert_outputs_to_fp32 if dtype != torch.float32 else lambda function: function

    @wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # not the weights', which sequential offloading has on no device
        with _autocast(
            next(one for one in (*args, *kwargs.values()) if torch.is_tensor(one)).device, dtype
        ):
            return inner(*args, **kwargs)

    network.forward = faster = convert(forward)
    try:
        yield
    finally:
        if vars(network).get("_old_forward") is faster:  # offloaded meanwhile
            network._old_forward = before
        elif own is not None:
            network.forward = own
        else:
            del network.forward


@contextmanager
def gradients_in(
    classifier: torch.nn.Module,
    dtype: torch.dtype = torch.float32,
    compile: Backend | None = None,
    chunk_size: int | None = None,
) -> Iterator[None]:
    """Within, guidance takes its gradients by this classifier's input so; they are float32 (or wider) as without.

    Args:
        classifier: of terms that ask a network trained on noise (`ClassifierGuidance`, `NoiseAwareCLIPGuidance`).
        dtype: what it computes in where that is accurate enough (autocast).
        compile: a backend of `torch.compile`: log p(y | x_t) and its gradient are one compiled function, compiled
            again for a larger batch, and not for another step; a smaller batch isn't compiled. None: off.
        chunk_size: images of one forward and backward pass, against the memory of their activations; the gradient is
            the same. None: all.

    Raises:
        ValueError: for other values.
    """
    _check_dtype(dtype)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(
            f"chunk_size={chunk_size}: at least 1, or None for all images at once, is allowed"
        )
    before = vars(classifier).get("input_gradient")
    classifier.input_gradient = InputGradient(classifier, dtype, compile, chunk_size)
    try:
        yield
    finally:
        if before is None:
            del classifier.input_gradient
        else:
            classifier.input_gradient = before


class InputGradient:
    """(term, z, t) -> the gradient by z of the term's log p(y | z); arguments as of `gradients_in`."""

    def __init__(
        self,
        classifier: torch.nn.Module,
        dtype: torch.dtype,
        compile: Backend | None,
        chunk_size: int | None,
    ):
        self.dtype, self.chunk_size = dtype, chunk_size
        self.compiled = (
            None if compile is None else torch.compile(value_and_gradient, backend=compile)
        )
        self.num_labels: int | None = module_config(classifier).get("num_labels")
        self.rows = 0  # of the largest call so far

    def __call__(self, term: NoiseAwareGuidance, z: torch.Tensor, t: float) -> torch.Tensor:
        size = self.chunk_size or len(z)
        with torch.inference_mode(False), torch.no_grad():
            z = z.clone() if z.is_inference() else z.detach()
            with _autocast(z.device, self.dtype):
                self._prepare(term, z)
                if size >= len(z):
                    return self._of(term, z, t)
                return torch.cat(
                    [
                        self._of(term.select(slice(i, i + size), len(z)), z[i : i + size], t)
                        for i in range(0, len(z), size)
                    ]
                )

    def _of(self, term: NoiseAwareGuidance, z: torch.Tensor, t: float) -> torch.Tensor:
        dtype = next((p.dtype for p in term.module.parameters()), z.dtype)
        self.rows = max(self.rows, len(z))
        fewer = (
            len(z) < self.rows
        )  # a last batch, or images that `guidance_tolerance` asks for: as many sizes as calls
        if (
            self.compiled is None or fewer or getattr(term, "softplus", None) is not None
        ):  # new modules at every step
            return gradient(lambda z: term.log_likelihood(z.to(dtype), t), z)
        number = torch.full(
            (), t, dtype=torch.float32, device=z.device
        )  # compiled code is for one value of a float
        return self.compiled(term, z, number, dtype)[1]

    def _prepare(self, term: NoiseAwareGuidance, z: torch.Tensor) -> None:
        """Have labels checked and weighed once, and neither for each chunk nor in compiled code."""
        if isinstance(term, ClassifierGuidance):
            self.num_labels = self.num_labels or logits_of(term.module(z[:1], 0.0)).shape[1]
            term.likelihood(z.new_zeros(len(z), self.num_labels))


def value_and_gradient(
    term: NoiseAwareGuidance,
    z: torch.Tensor,
    t: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(y | z), (B,), of a term and its gradient by z, (B, C, H, W).

    Args:
        t: timestep of the classifier's own schedule, ().
        dtype: of the classifier's weights.
    """

    def total(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = term.log_likelihood(z.to(dtype), t)
        return log_p.sum(), log_p

    grad, log_p = torch.func.grad(total, has_aux=True)(z)
    return log_p, grad


@dataclass
class Optimized:
    """What `optimize` chose; as a context manager it is undone at the end.

    Attributes:
        on, off: {what: why}.
    """

    on: dict[str, str] = field(default_factory=dict)
    off: dict[str, str] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    def note(self, what: str, on: bool, why: str) -> bool:
        (self.on if on else self.off)[what] = why
        return on

    def undo(self) -> None:
        """Make the pipeline what it was; a second time it does nothing."""
        self._stack.close()

    def __enter__(self) -> Optimized:
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo()

    def __str__(self) -> str:
        return "\n".join(
            f"{name:>3} {what}: {why}"
            for name, made in (("on", self.on), ("off", self.off))
            for what, why in made.items()
        )


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
    """Make a pipeline's steps cheaper, in place, with what helps on its device; `undo()` of the result undoes it.

    By default: autocast to bfloat16 of the network and of the classifier (their outputs and the gradient stay float32)
    where the device computes in it, on a CPU in batches that are worth it; `channels_last` with that on CUDA, and not
    on CPUs, where it was slower; and `torch.compile` where `images` are so many that it pays, as a timed call of each
    network says. Images change by the rounding of these; what is saved doesn't. Offloading comes after it.

    Args:
        images: how many will be made altogether, as far as known. None: too few to compile for.
        steps: of each. None: the pipeline's own.
        batch_size: of a call. None: all `images`, up to 64.
        dtype: instead: float32 (off), bfloat16 or float16.
        compile, channels_last: instead: whether.
        chunk_size: images of one gradient, as of `gradients_in`. None: all.
        device: where it will run. None: where it is.
        backend: of `torch.compile`.

    Returns:
        What is on and off, and why; a context manager, which undoes it at its end.

    Raises:
        ValueError: for other values, or a pipeline that is offloaded already.
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
    with ExitStack() as stack:  # undone if anything is refused
        for name in ("unet", "classifier"):
            if (part := getattr(pipeline, name)) is None:
                continue
            rows = batch_size if name == "unet" else min(batch_size, chunk_size or batch_size)
            how = _dtype(chosen, name, part, device, rows, dtype)
            own = next((p.dtype for p in part.parameters()), torch.float32)
            computed = own if how == torch.float32 else how
            if _channels_last(chosen, name, device, computed, channels_last):
                stack.enter_context(in_channels_last(part))
            if name == "unet":
                make = partial(computing_in, part, how)
            else:
                make = partial(gradients_in, part, how, chunk_size=chunk_size)
            with make():
                calls = steps if name == "unet" else steps * _share_asked(pipeline)
                pays = _compile(
                    chosen, pipeline, name, device, computed, images, calls, rows, compile
                )
            stack.enter_context(make(compile=backend if pays else None))
        if chunk_size is not None:
            chosen.note("gradient in chunks", True, f"{chunk_size} images at a time, as asked")
        chosen._stack = stack.pop_all()
    return chosen


def _dtype(
    chosen: Optimized,
    name: str,
    part: torch.nn.Module,
    device: torch.device,
    rows: int,
    wanted: torch.dtype | None,
) -> torch.dtype:
    """What a part will compute in, `rows` images a call; float32: as it is."""
    own, what = next((p.dtype for p in part.parameters()), torch.float32), f"{name}, autocast"
    few = device.type == "cpu" and rows < FEWEST[name]
    if wanted is not None:
        on, why = wanted != torch.float32, f"{wanted} as asked"
    elif own != torch.float32:
        on, why = False, f"its weights are {own}"
    elif not computes_in_bfloat16(device):
        on, why = False, f"this {device.type} doesn't compute in bfloat16 itself"
    else:
        on, why = (
            not few,
            f"no faster for {rows} images a call"
            if few
            else f"this {device.type} computes in bfloat16",
        )
    return (wanted or torch.bfloat16) if chosen.note(what, on, why) else torch.float32


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself, which is what makes them cheap."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )


def _channels_last(
    chosen: Optimized, name: str, device: torch.device, dtype: torch.dtype, wanted: bool | None
) -> bool:
    what = f"{name}, channels_last"
    if wanted is not None:
        return chosen.note(what, wanted, "as asked")
    if device.type != "cuda":
        return chosen.note(what, False, f"no faster, or slower, on {device.type}")
    half = dtype != torch.float32
    return chosen.note(
        what, half, "the layout of convolutions in half precision" if half else "no use in float32"
    )


@contextmanager
def in_channels_last(module: torch.nn.Module) -> Iterator[None]:
    """Within, the weights of convolutions lie in memory as (out, H, W, in); their values are the same."""
    module.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        module.to(memory_format=torch.contiguous_format)


def _compile(
    chosen: Optimized,
    pipeline: ClassifierGuidedPipeline,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    images: int | None,
    calls: float,
    rows: int,
    wanted: bool | None,
) -> bool:
    """Whether a part is compiled; `calls` of it are to come for each of the images, `rows` of them together."""
    what, share = f"{name}, torch.compile", SAVED[name].get(dtype, 0.0)
    if wanted is not None:
        return chosen.note(what, wanted, "as asked")
    if images is None:
        return chosen.note(what, False, "how many images there will be is not known")
    if not share:
        return chosen.note(what, False, f"no faster in {dtype}")
    if name == "classifier" and pipeline.config.defaults["guidance_tolerance"] is not None:
        return chosen.note(
            what,
            False,
            "the pipeline's guidance_tolerance asks for some images alone, in eager calls",
        )
    if (
        device.type != pipeline.device.type
        or (seconds := _seconds(pipeline, name, min(rows, PROBED))) is None
    ):
        return chosen.note(what, False, "a call can't be timed")
    seconds *= images * calls
    return chosen.note(
        what,
        share * seconds > COMPILE_SECONDS,
        f"saves about {share * seconds:.0f} of {seconds:.0f} "
        f"seconds, and takes {COMPILE_SECONDS:.0f}",
    )


def _share_asked(pipeline: ClassifierGuidedPipeline) -> float:
    """Of the steps, those at which the pipeline's own settings ask the classifier."""
    own = pipeline.config.defaults
    return (
        bool(own["guidance_scale"])
        * (own["guidance_stop"] - own["guidance_start"])
        / own["guidance_every"]
    )


def _seconds(pipeline: ClassifierGuidedPipeline, name: str, rows: int) -> float | None:
    """Of a call of the network, or of a gradient by the classifier's input, an image; None if its input isn't known."""
    part, device = getattr(pipeline, name), pipeline.device
    config = module_config(part)
    if not config.get("sample_size") or not config.get("in_channels"):
        return None
    height, width = (
        [config["sample_size"]] * 2
        if isinstance(config["sample_size"], int)
        else config["sample_size"]
    )
    x = torch.zeros(rows, config["in_channels"], height, width, device=device, dtype=pipeline.dtype)
    labels = torch.zeros(rows, dtype=torch.long, device=device)
    told = {"class_labels": labels} if pipeline._class_embeddings else {}
    wanted = {"target": 0.0} if config.get("problem_type") == "regression" else {"label": 0}
    term = ClassifierGuidance(part, **wanted) if name == "classifier" else None

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (
            time.perf_counter() if device.type == "cuda" else time.thread_time()
        )  # others may use the CPU, too

    fastest = float("inf")
    with no_parameter_grad([part]), torch.no_grad():
        for _ in range(3):
            began = now()
            part(x, labels, **told) if term is None else part.input_gradient(term, x, 0.0)
            fastest = min(fastest, now() - began)
    return fastest / rows


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """With float32 none, and not one that is off: that would undo one around it."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: {', '.join(map(str, DTYPES))} are allowed")
