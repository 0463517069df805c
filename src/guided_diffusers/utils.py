"""Helpers of several modules: atomic writes, JSON, Markdown, models by name, random numbers.

Diffusers and the pipeline are imported where they are used, so that this module loads quickly.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import unicodedata
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


# Text


#: characters without a visible form beside those of the hidden categories; some are selectors
IGNORABLE = "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0"
IGNORABLE += "\U000e0100-\U000e01ef"
HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
#: of letters without case and symbols: between these a joiner has a visible effect
JOINED_CATEGORIES = ("Lo", "Lm", "Mn", "Mc", "Me", "So", "Sk")
#: joiners; a variant of a character that isn't a Latin letter; the rest of a region's flag
SELECTORS = re.compile(
    f"[\u200c\u200d]|(?<=[^A-Za-z\\s{IGNORABLE}])[\ufe0e\ufe0f\U000e0100-\U000e01ef]"
    "|(?<=\U0001f3f4)[\U000e0030-\U000e007a]{2,6}\U000e007f"
)


def printable(text: object) -> str:
    """A name, path or message for the terminal: one line, in any script, without control sequences.

    Control characters, line breaks, bidirectional overrides, zero-width characters and lone
    surrogates become escapes as in Python's string literals, such as `\\x1b`. Joiners and selectors
    that emoji and some scripts need are kept.
    """
    text, parts, end = str(text), [], 0
    for match in SELECTORS.finditer(text):
        sides = text[max(match.start() - 1, 0)], text[match.end() : match.end() + 1] or " "
        joins = all(unicodedata.category(side) in JOINED_CATEGORIES for side in sides)
        if joins or match[0] not in "\u200c\u200d":
            parts += [_escape_hidden(text[end : match.start()]), match[0]]
            end = match.end()
    return "".join([*parts, _escape_hidden(text[end:])])


def _escape_hidden(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    escaped = []
    for character in text:
        hidden = unicodedata.category(character) in HIDDEN_CATEGORIES
        hidden = hidden or re.match(f"[{IGNORABLE}]", character)
        escaped.append(ascii(character)[1:-1] if hidden else character)
    return "".join(escaped)


def one_line(message: object) -> str:
    """A message for the terminal as one line: line breaks become spaces (see `printable`)."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ", str(message)).strip())


def markdown(text: object) -> str:
    """A name, path or other text in Markdown, shown as it is: one line, all markup escaped.

    Also within a cell of a table. HTML, links, code and mathematics have no effect.
    """
    return re.sub(r"(://|[\\`*_{}\[\]<>|~$&#])", r"\\\1", printable(text))


def markdown_code(text: object) -> str:
    """A text as code in Markdown: one line, between more backticks than it contains."""
    text = printable(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if len(ticks) > 1 else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def code_literal(text: str) -> str:
    """A text as a literal of Python, in one line, readable in any script."""
    return printable(json.dumps(text, ensure_ascii=False))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table of cells in Markdown; it ends in a newline."""
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


def plot_text(text: object) -> str:
    """A name in a plot of matplotlib: as `printable`, and "$" starts no formula."""
    return printable(text).replace("$", r"\$")


# Models

HUB_CONNECT_TIMEOUT_S = 10
HUB_GIVE_UP_S = 10  # after which no further request is tried
HUB_WRITE_TIMEOUT_S = 60  # for the answer to a request that changes a repository


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


@contextmanager
def hub_time_limit() -> Iterator[None]:
    """Context in which a Hub that can't be reached, or doesn't answer, is an OSError within seconds.

    `huggingface_hub` itself waits without a limit for the answers to some of its requests.

    Raises:
        OSError: in one line, naming the Hub's address.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import _http

    unanswered: list[float] = []  # times of the reading requests since the last answer

    def limit(request: Any) -> None:
        reads = request.method in ("GET", "HEAD")
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT if reads else HUB_WRITE_TIMEOUT_S
        limits = {**dict.fromkeys(("read", "write"), seconds), "connect": HUB_CONNECT_TIMEOUT_S}
        set_already = request.extensions.get("timeout") or {}
        limits |= {kind: value for kind, value in set_already.items() if value is not None}
        request.extensions["timeout"] = limits
        if reads:
            unanswered.append(time.monotonic())
            if unanswered[-1] - unanswered[0] > HUB_GIVE_UP_S:  # `huggingface_hub` goes on
                raise OSError(f"no answer for {HUB_GIVE_UP_S} seconds")

    def note_answer(response: Any) -> None:
        if response.status_code < 500 and response.status_code != 429:
            unanswered.clear()

    def limited_client() -> Any:
        client = factory()
        client.event_hooks["request"].append(limit)
        client.event_hooks["response"].append(note_answer)
        return client

    factory = _http._GLOBAL_CLIENT_FACTORY
    _http.set_client_factory(limited_client)
    try:
        yield
    except (errors.HTTPError, OSError) as error:
        is_answer = isinstance(error, errors.HfHubHTTPError)
        if is_answer or (isinstance(error, OSError) and not unanswered):
            raise
        address = re.sub("//[^/@]*@", "//", constants.ENDPOINT)
        reason = re.sub(r"Bearer \S+", "Bearer ***", f"{type(error).__name__}: {error}")
        raise OSError(
            f"the Hub, {address}, can't be reached or doesn't answer; check the network and "
            f"HF_ENDPOINT, or use a folder instead of a Hub id ({one_line(reason)})"
        ) from error
    finally:
        _http.set_client_factory(factory)


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
