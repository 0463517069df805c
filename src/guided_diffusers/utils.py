"""Helpers that several rooms share: atomic writes, Markdown tables, models and schedulers by name."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from .guidance import no_parameter_grad
from .noise import OUT_OF_REACH
from .pipeline import ClassifierGuidedPipeline


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Within, a temporary name beside `path`; what was written there is then moved into place, after an error removed.

    Raises:
        OSError: naming `path`, for a disk that is full, or anything else that keeps it from being written.
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
    """As `aside`."""
    with aside(path) as partial:
        partial.write_bytes(content)


def write_json(content: Any, path: Path) -> None:
    """As `aside`; numbers that are NaN or infinite become null."""
    write_bytes((json.dumps(finite(content), indent=2, allow_nan=False) + "\n").encode(), path)


def finite(content: Any) -> Any:
    """What JSON holds, as `write_json` writes it: None for a number that is NaN or infinite."""
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def require_matplotlib() -> None:
    """Raises:
    ImportError: where matplotlib is missing, saying what to install.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "curves need matplotlib: pip install 'guided-diffusers[plots]'"
        ) from error


def load_pipeline(model: str, revision: str | None = None) -> ClassifierGuidedPipeline:
    """A bundled pipeline by its name, else a folder or a Hub id, of which `revision` is a branch, tag or commit.

    Raises:
        ValueError: for a revision of what is not on the Hub, or what `from_pretrained` refuses.
    """
    local = Path(model).exists()
    if revision is not None and ("/" not in model or local):
        raise ValueError(
            f"--revision {revision}: only a model of the Hub has revisions, and {model} is none"
        )
    if "/" not in model and not local:
        return ClassifierGuidedPipeline.from_bundled(model)
    return ClassifierGuidedPipeline.from_pretrained(
        model, **({"revision": revision} if revision else {})
    )


def exchanged(scheduler: SchedulerMixin, name: str) -> SchedulerMixin:
    """The scheduler called `name`, for the network that `scheduler` is for.

    Raises:
        ValueError: if there is none, or it is for networks of another kind.
    """
    found = find_scheduler(name)
    fitting = {cls.__name__ for cls in (type(scheduler), *scheduler.compatibles)}
    if found.__name__ not in fitting:
        raise ValueError(
            f"--scheduler {name}: {found.__name__} doesn't fit the model, whose "
            f"{type(scheduler).__name__} can be exchanged for {', '.join(sorted(fitting))}"
        )
    return found.from_config(scheduler.config)


def find_scheduler(name: str) -> type[SchedulerMixin]:
    """A scheduler class of Diffusers by its name, or the part of it before `Scheduler`, `Discrete` or `Multistep`.

    Raises:
        ValueError: if there is none; the message lists them.
    """
    known = {}
    for cls in sorted(dir(diffusers.schedulers), key=len, reverse=True):
        if cls.endswith("Scheduler") and not cls.startswith("Flax") and cls not in OUT_OF_REACH:
            short = cls.removesuffix("Scheduler")
            for alias in (
                cls,
                short,
                short.removesuffix("Discrete"),
                short.removesuffix("Multistep"),
            ):
                known[alias.lower()] = cls
    if name.lower() not in known:
        raise ValueError(
            f"scheduler {name!r} is unknown; allowed: {', '.join(sorted(set(known.values())))}"
        )
    return getattr(diffusers, known[name.lower()])


@contextmanager
def evaluating(*modules: torch.nn.Module | None) -> Iterator[None]:
    """Within, the modules are in evaluation mode and their parameters need no gradient.

    Both are restored on exit. None stands for a module that isn't used.
    """
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


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, a line a row, ending in a newline."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def parameter_dtype(module: torch.nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype of the module's first parameter, `default` where it has none."""
    return next((parameter.dtype for parameter in module.parameters()), default)
