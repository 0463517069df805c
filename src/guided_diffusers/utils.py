"""Helpers of several modules: atomic writes, locks, JSON, Markdown, models by name, random numbers.

Diffusers and the pipeline are imported where they are used, so that this module loads quickly.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from . import bundled
from .checks import nearest, shown

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin
    from filelock import BaseFileLock

    from .pipeline import ClassifierGuidedPipeline

logger = logging.getLogger(__name__)
LOCK = ".lock"  # of a folder; `.lock.json` beside it names the process that has it
#: errors of file systems that have no locks
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


MULTISTEP_DPM = ("dpmsolver++", "sde-dpmsolver++", "sde-dpmsolver")  # its `algorithm_type`s


# Files


@contextmanager
def aside(path: Path, exclusive: bool = False) -> Iterator[Path]:
    """Context manager for an atomic write: yields a temporary path, moved to `path` on exit.

    After an error the temporary file is removed, and `path` is as before.

    Raises:
        OSError: naming `path`, if it can't be written, such as on a full disk.
        FileExistsError: with `exclusive`, if `path` exists on exit.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if exclusive:
            _link(partial, path)
        else:
            os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} can't be written: {error.strerror or error}") from error
    except SafetensorError as error:  # which is no OSError
        raise OSError(f"{path} can't be written: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> None:
    """Give a file the name `path`; FileExistsError if there is a file of this name."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        path.open("x").close()
        os.replace(partial, path)


def partial_path(path: Path) -> Path:
    """Temporary path beside `path`, of this process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def is_abandoned(partial: Path) -> bool:
    """Whether a path is a `partial_path` of this process or of one that has ended."""
    pid = partial.name.removesuffix(".partial").rpartition(".")[2]
    is_partial = partial.name.startswith(".") and partial.name.endswith(".partial")
    if not (is_partial and pid.isdecimal()):
        return False
    return int(pid) == os.getpid() or not is_running(int(pid))


def is_running(pid: int) -> bool:
    """Whether a process of this machine has this number; on Windows always, as far as known."""
    if os.name == "nt":  # os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def check_writable(path: Path, option: str, *, folder: bool = False, size: int = 0) -> None:
    """Check, before the work, that a file can be written, or files in a folder.

    Folders that are missing are created for the check, and removed again.

    Args:
        option: the option or argument that `path` is of.
        size: bytes that will be written at least.

    Raises:
        OSError: naming `option` and `path`, if it can't be written.
    """
    parent, missing = path if folder else path.parent, []
    try:
        missing = missing_folders(parent)
        if path.exists() and path.is_dir() != folder:
            raise OSError(0, "it is a file, not a folder" if folder else "it is a folder")
        parent.mkdir(parents=True, exist_ok=True)
        probe = partial_path(path / "probe" if folder else path)
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(parent).free
        if size > free:
            sizes = f"{size / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free"
            raise OSError(errno.ENOSPC, sizes)
    except OSError as error:
        reason = error.strerror or error
        if isinstance(error, FileExistsError):
            reason = f"{parent} is a file"
        raise OSError(f"{option} {path} can't be written: {reason}") from error
    finally:
        remove_empty(missing)


def missing_folders(folder: Path) -> list[Path]:
    """The folder and its parents that don't exist, deepest first."""
    return [part for part in (folder, *folder.parents) if not part.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def file_lock(path: Path, wait: bool = False) -> Iterator[str | None]:
    """Context manager that one process at a time enters; a process that ends loses its lock.

    Where the file system has no locks, which is logged, only processes of one machine keep each
    other out.

    Args:
        path: of the lock. It, its folder, and `PATH.json`, which names the process, are created;
            the files are removed on exit, and so is a folder that is still empty.
        wait: wait for another process, which is logged.

    Yields:
        None; without `wait`, the name of the process that has the lock, if another one has it.

    Raises:
        OSError: naming the folder, if it can't be written.
    """
    from filelock import FileLock

    lock, missing = FileLock(path), missing_folders(path.parent)
    owner = _acquire(lock, path, wait)
    if owner is not None:
        yield owner
        return
    this = {"pid": os.getpid(), "host": socket.gethostname()}
    try:
        with suppress(OSError):  # a full disk
            _record(path).write_text(json.dumps(this))
        yield None
    finally:
        if os.getpid() == this["pid"]:  # no child of it
            # removed while it is locked, so that no other process uses them
            for file in (_record(path), path):
                with suppress(OSError):
                    file.unlink(missing_ok=True)
            lock.release()
            remove_empty(missing)


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _acquire(lock: BaseFileLock, path: Path, wait: bool) -> str | None:
    """Acquire a lock; without `wait`, the name of the process that has it, if another one has."""
    waiting = False
    try:
        while not _try_lock(lock, path):
            pid, host = _lock_owner(path)
            place = "" if host == socket.gethostname() else f" on {host}"
            owner = "another process" if pid is None else f"process {pid}{place}"
            if not wait:
                return owner
            if not waiting:
                logger.warning(f"{path.parent} is in use by {owner}; waiting until it is finished")
            waiting = True
            time.sleep(1.0)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(error.errno, f"{path.parent} can't be written: {reason}") from error
    return None


def _try_lock(lock: BaseFileLock, path: Path) -> bool:
    """Whether this process got the lock."""
    from filelock import Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError):  # the process before has just removed the folder
        return False
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        logger.warning(
            f"{path.parent} is on a file system without locks ({error}); make sure that no process "
            "of another machine uses it"
        )
        pid, host = _lock_owner(path)
        return pid is None or host != socket.gethostname() or not is_running(pid)
    if path.exists():
        return True
    lock.release()  # its file was removed by the process that had it before
    return False


def _lock_owner(path: Path) -> tuple[int | None, str]:
    """Process and machine that have a lock; (None, "") if unknown."""
    try:
        owner = json.loads(_record(path).read_text())
        return int(owner["pid"]), str(owner["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, ""


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Context manager in which no other process uses the folder; see `file_lock`.

    Raises:
        ValueError: without `wait`, naming the process that uses it.
        OSError: if the folder can't be written.
    """
    with file_lock(folder / LOCK, wait) as owner:
        if owner is not None:
            raise ValueError(
                f"{folder} is in use by {owner}; wait until it is finished, or use another folder"
            )
        yield


def is_lock(path: Path) -> bool:
    """Whether a path is of a folder's lock."""
    return path.name in (LOCK, f"{LOCK}.json")


def write_bytes(content: bytes, path: Path, exclusive: bool = False) -> None:
    """Write a file atomically (see `aside`)."""
    with aside(path, exclusive) as partial:
        partial.write_bytes(content)


def write_json(content: Any, path: Path, exclusive: bool = False) -> None:
    """Write a JSON file atomically (see `aside`); NaN and infinity become null."""
    text = json.dumps(finite(content), indent=2, allow_nan=False) + "\n"
    write_bytes(text.encode(), path, exclusive)


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
    """Whether a model is given as a Hub id, user/model, and no such path exists."""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(model))
    return is_id is not None and not Path(model).exists()


def model_folder(model: str | Path) -> str | Path:
    """Folder of a bundled model, given its name; an existing path or a Hub id is returned as it is.

    Raises:
        ValueError: for a name without "/" that is neither a path nor a bundled model.
    """
    if is_hub_id(model) or Path(model).exists():
        return model
    if set("/\\~") & set(str(model)) or not str(model):
        raise ValueError(f"model {str(model)!r}: no such folder, and a Hub id is user/model")
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


def scheduler_for(scheduler: SchedulerMixin, name: str) -> SchedulerMixin:
    """The scheduler called `name`, configured for the denoiser of `scheduler`.

    Beside Diffusers' names, these select options of the multistep DPM-Solver: `dpmsolver++`,
    `sde-dpmsolver++`, `dpmsolver++3m` (third order) and `dpmsolver++-thresholding` (dynamic
    thresholding of x0).

    Raises:
        ValueError: for an unknown name, or a scheduler for other kinds of denoisers.
    """
    name = name.lower()
    if name == scheduler_name(scheduler):
        return type(scheduler).from_config(scheduler.config)
    solver = name.removesuffix("-thresholding")
    algorithm = solver.removesuffix("3m")
    if algorithm not in MULTISTEP_DPM:
        return exchanged(scheduler, name)
    multistep = exchanged(scheduler, "dpmsolver")
    return type(multistep).from_config(
        multistep.config,
        algorithm_type=algorithm,
        solver_order=3 if solver.endswith("3m") else 2,
        thresholding=name.endswith("-thresholding"),
    )


def scheduler_name(scheduler: SchedulerMixin) -> str:
    """The short name of a scheduler, as `scheduler_for` accepts it."""
    name = type(scheduler).__name__
    for suffix in ("Scheduler", "Discrete", "Multistep"):
        name = name.removesuffix(suffix)
    if name.lower() != "dpmsolver":
        return name.lower()
    config = scheduler.config
    order = "3m" if config["solver_order"] == 3 else ""
    thresholding = "-thresholding" if config["thresholding"] else ""
    return f"{config['algorithm_type']}{order}{thresholding}"


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
            nearest names.
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
        names = ", ".join(nearest(name, [*known.values(), *MULTISTEP_DPM]))
        raise ValueError(
            f"scheduler {shown(name)} is unknown; a scheduler of Diffusers that can be guided is "
            f"allowed, of which the nearest are {names}"
        )
    return getattr(diffusers, known[name.lower()])


# Modules and tensors


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
