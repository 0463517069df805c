"""Helpers of several modules: models and schedulers by name, the Hub's time limit, hashes, random
numbers.

Diffusers and the pipeline are imported where they are used, so that this module loads quickly.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from . import bundled
from .checks import nearest, shown
from .text import one_line

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin

    from .pipeline import ClassifierGuidedPipeline


MULTISTEP_DPM = ("dpmsolver++", "sde-dpmsolver++", "sde-dpmsolver")  # its `algorithm_type`s


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

HUB_CONNECT_TIMEOUT_S = 10
HUB_GIVE_UP_S = 10  # after which no further request is tried
HUB_WRITE_TIMEOUT_S = 60  # for the answer to a request that changes a repository


def is_hub_id(model: str | Path) -> bool:
    """Whether a model is given as a Hub id, user/model, and no such path exists."""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(model))
    return is_id is not None and not Path(model).exists()


def is_bundled(model: str | Path) -> bool:
    """Whether it is the name of a bundled model, and no model's folder here has that name."""
    files = ("model_index.json", "config.json")
    return str(model) in bundled.names() and not any(Path(model, name).exists() for name in files)


def model_folder(model: str | Path) -> str | Path:
    """Folder of a bundled model, given its name; a path or a Hub id is returned as it is.

    A folder of that name comes first if it holds a model.

    Raises:
        ValueError: for a name without "/" that is neither a path nor a bundled model.
    """
    if is_hub_id(model) or (Path(model).exists() and not is_bundled(model)):
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
        if urlsplit(str(response.url)).path.startswith("/api/"):  # small, so soon complete
            response.stream = LimitedStream(response.stream)
        if response.status_code < 500 and response.status_code != 429:
            unanswered.clear()

    def limited_client() -> Any:
        client = factory()
        client.event_hooks["request"].append(limit)
        client.event_hooks["response"].append(note_answer)
        return client

    httpx = sys.modules[errors.HTTPError.__module__]  # its name differs between versions

    class LimitedStream(httpx.SyncByteStream):
        """A stream that ends with an error when it has not ended in time."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __iter__(self) -> Iterator[bytes]:
            start = time.monotonic()
            for part in self.stream:
                yield part
                if time.monotonic() - start > HUB_WRITE_TIMEOUT_S / 4:
                    raise httpx.ReadTimeout("the answer is not complete in time")

        def close(self) -> None:
            self.stream.close()

    factory = _http._GLOBAL_CLIENT_FACTORY
    _http.set_client_factory(limited_client)
    try:
        yield
    except json.JSONDecodeError as error:
        address = re.sub("//[^/@]*@", "//", constants.ENDPOINT)
        raise OSError(
            f"the Hub, {address}, answers with no JSON ({error}); check HF_ENDPOINT, and whether the "
            "network asks for a login"
        ) from error
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
