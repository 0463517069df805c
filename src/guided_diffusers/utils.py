"""Helpers of several modules: atomic writes, JSON, Markdown, models by name, random numbers.

Diffusers and the pipeline are imported where they are used, so that this module loads quickly.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bundled

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin

    from .pipeline import ClassifierGuidedPipeline


# Files


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Context manager for an atomic write: yields a temporary path, moved to `path` on exit.

    After an error the temporary file is removed, and `path` is as before.

    Raises:
        OSError: naming `path`, if it can't be written, such as on a full disk.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} can't be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes(content: bytes, path: Path) -> None:
    """Write a file atomically (see `aside`)."""
    with aside(path) as partial:
        partial.write_bytes(content)


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file atomically (see `aside`); NaN and infinity become null."""
    write_bytes((json.dumps(finite(content), indent=2, allow_nan=False) + "\n").encode(), path)


def finite(content: Any) -> Any:
    """Nested mappings and sequences with None in place of NaN and infinity, for JSON."""
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table that ends in a newline."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        ImportError: if it is missing; the message says how to install it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error


# Models


def is_hub_id(model: str | Path) -> bool:
    """Whether a model is given as a Hub id: it contains "/", and no such path exists."""
    return "/" in str(model) and not Path(model).exists()


def model_folder(model: str | Path) -> str | Path:
    """Folder of a bundled model, given its name; an existing path or a Hub id is returned as it is.

    Raises:
        ValueError: for a name without "/" that is neither a path nor a bundled model.
    """
    if is_hub_id(model) or Path(model).exists():
        return model
    return bundled.folder(str(model))


def load_pipeline(model: str | Path, revision: str | None = None) -> ClassifierGuidedPipeline:
    """Load a pipeline.

    Args:
        model: name of a bundled model, a folder or a Hub id.
        revision: branch, tag or commit of a model on the Hub. None: main.

    Raises:
        ValueError: for a revision of a model that isn't on the Hub; as `from_pretrained`.
    """
    from .pipeline import ClassifierGuidedPipeline

    if revision is not None and not is_hub_id(model):
        raise ValueError(
            f"--revision {revision}: only a model of the Hub has revisions, and {model} is none"
        )
    arguments = {} if revision is None else {"revision": revision}
    return ClassifierGuidedPipeline.from_pretrained(model_folder(model), **arguments)


def exchanged(scheduler: SchedulerMixin, name: str) -> SchedulerMixin:
    """A scheduler of the class called `name`, with the config of `scheduler`.

    Raises:
        ValueError: for an unknown name, or a class that isn't compatible.
    """
    cls = find_scheduler(name)
    compatible = {known.__name__ for known in (type(scheduler), *scheduler.compatibles)}
    if cls.__name__ not in compatible:
        raise ValueError(
            f"--scheduler {name}: {cls.__name__} doesn't fit the model, whose "
            f"{type(scheduler).__name__} can be exchanged for {', '.join(sorted(compatible))}"
        )
    return cls.from_config(scheduler.config)


def find_scheduler(name: str) -> type[SchedulerMixin]:
    """A scheduler class of Diffusers by its name.

    Args:
        name: name of the class, in any case, also without "Scheduler", "DiscreteScheduler" or
            "MultistepScheduler" at its end.

    Raises:
        ValueError: for an unknown name, or a scheduler that can't be guided; the message lists the
            names.
    """
    import diffusers

    from .noise import OUT_OF_REACH

    classes = [
        cls
        for cls in dir(diffusers.schedulers)
        if cls.endswith("Scheduler") and not cls.startswith("Flax") and cls not in OUT_OF_REACH
    ]
    known = {}
    for cls in sorted(classes, key=len, reverse=True):  # the shortest name wins
        for ending in ("", "Scheduler", "DiscreteScheduler", "MultistepScheduler"):
            known[cls.removesuffix(ending).lower()] = cls
    if name.lower() not in known:
        raise ValueError(f"scheduler {name!r} is unknown; allowed: {', '.join(sorted(classes))}")
    return getattr(diffusers, known[name.lower()])


# Modules and tensors


@contextmanager
def evaluating(*modules: torch.nn.Module | None) -> Iterator[None]:
    """Within, the modules are in evaluation mode and their parameters need no gradient.

    Both are restored on exit. None stands for a module that isn't used.
    """
    from .guidance import no_parameter_grad

    present = [module for module in modules if module is not None]
    training = [part for module in present for part in module.modules() if part.training]
    try:
        for module in present:
            module.eval()
        with no_parameter_grad(present):
            yield
    finally:
        for part in training:
            part.training = True


def weights_digest(weights: torch.nn.Module | Sequence[Path]) -> str:
    """Hash of a model's weights, or of those in its safetensors files, 16 hexadecimal digits.

    Of names, shapes, and values rounded to float16. So it is the same for any number of shards and
    for a copy in half precision; metrics hold for both.
    """
    import torch
    from safetensors import safe_open

    digest, readers = hashlib.sha256(), {}
    if isinstance(weights, torch.nn.Module):
        state = weights.state_dict()
        readers = {name: functools.partial(state.get, name) for name in state}
    else:
        for path in weights:
            file = safe_open(path, "pt")
            readers |= {name: functools.partial(file.get_tensor, name) for name in file.keys()}
    for name, read in sorted(readers.items()):
        tensor = read().detach().cpu().contiguous()
        tensor = tensor.half() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def image_generator(seed: int, index: int) -> torch.Generator:
    """CPU generator of image `index`; every pair (seed, index) has a separate random stream."""
    import numpy as np
    import torch

    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def parameter_dtype(module: torch.nn.Module, default: torch.dtype | None = None) -> torch.dtype:
    """Dtype of the module's first parameter; `default` (None: float32) if it has none."""
    import torch

    for parameter in module.parameters():
        return parameter.dtype
    return torch.float32 if default is None else default
