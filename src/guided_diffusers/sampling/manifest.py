"""Manifest of a folder of images: settings, model revision and versions of the run that made it."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from ..checks import read_json
from ..defaults import DEFAULTS
from ..files import finite, is_abandoned, is_lock, write_json
from ..noise import module_config
from ..pipeline import ClassifierGuidedPipeline
from ..presets import resolve_settings
from ..utils import is_hub_id

MANIFEST = "manifest.json"
MAX_FOLDER_BYTES = 240  # of 255, so that a number that makes it unique fits
#: the manifest, and devices of Windows, also with a suffix
RESERVED = re.compile(
    r"manifest\.json|(con|prn|aux|nul|(com|lpt)[0-9\u00b9\u00b2\u00b3])(\..*)?", re.IGNORECASE
)
#: arguments of the pipeline's call that don't change the images
OBSERVERS = {"callback_on_step_end", "callback_on_step_end_tensor_inputs"}
LIBRARIES = ("guided-diffusers", "torch", "diffusers", "numpy", "pillow", "pyarrow")


def run_settings(
    pipeline: ClassifierGuidedPipeline,
    model: str | None,
    revision: str | None,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """All that determines the images, as JSON: `arguments`, the pipeline, device and versions."""
    classifier, scheduler = pipeline.classifier, pipeline.scheduler
    parameters = inspect.signature(type(scheduler).__init__).parameters
    options = {name: value for name, value in scheduler.config.items() if name in parameters}
    settings = {
        "model": model or type(pipeline).__name__,
        "revision": revision or weights_hash(pipeline),
        "classifier": None if classifier is None else module_hash(classifier),
        **{name: value for name, value in arguments.items() if name not in OBSERVERS},
        "scheduler": {"class": type(scheduler).__name__, **options},
        "device": pipeline.device.type,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    return json.loads(json.dumps(finite(settings), default=lambda value: type(value).__name__))


def resolve_defaults(pipeline: ClassifierGuidedPipeline, call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call with a label per image; those left out or None have the pipeline's
    defaults."""
    hidden = call.get("conditional") is False and pipeline.null_label is not None
    settings = resolve_settings(pipeline, call, hidden)
    return {**call, **{name: settings[name] for name in DEFAULTS}}


def differences(first: Any, second: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Differences of nested mappings: (name, first value, second value), None where missing."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys((*first, *second)):
            path = f"{name}.{key}" if name else str(key)
            yield from differences(first.get(key), second.get(key), path)
    elif first != second:
        yield name, first, second


def weights_hash(pipeline: ClassifierGuidedPipeline) -> str:
    """SHA-256 of the classes, configs and weights of all networks."""
    digest = hashlib.sha256()
    for name, module in sorted(pipeline.components.items()):
        if isinstance(module, torch.nn.Module):
            config = module_config(module).items()
            public = {key: value for key, value in config if not str(key).startswith("_")}
            description = [name, type(module).__name__, public]
            digest.update(json.dumps(description, sort_keys=True, default=str).encode())
            add_weights(digest, module)
    return f"sha256:{digest.hexdigest()}"


def module_hash(module: torch.nn.Module) -> str:
    """SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    add_weights(digest, module)
    return f"sha256:{digest.hexdigest()}"


def add_weights(digest: Any, module: torch.nn.Module) -> None:
    """Update a `hashlib` digest with the names, dtypes, shapes and values of all weights."""
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def hub_commit(model: str, revision: str | None = None) -> str | None:
    """Commit of a model just loaded from the Hub; None for a folder or a bundled model."""
    if not is_hub_id(model):
        return None
    path = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def open_or_resume(
    folder: Path,
    settings: Mapping[str, Any],
    created: bool = False,
    extend: Callable[[int], None] | None = None,
) -> None:
    """Write the manifest of a new folder, or check that an existing one has these settings.

    Args:
        created: another process has opened it; otherwise temporary files of processes that have
            ended are removed, too.
        extend: called with the number of images of a folder that differs in having fewer; None: it
            is refused.
    """
    path = folder / MANIFEST
    if not path.exists():
        if created:
            raise ValueError(
                f"{folder}: the main process wrote {path}, but this process doesn't see it; use a "
                "folder that all machines share"
            )
        if folder.exists() and not all(map(_is_temporary, folder.iterdir())):
            raise ValueError(
                f"{folder} is in use and has no {MANIFEST}, so it can't be resumed; use a new or "
                "empty folder"
            )
        with suppress(FileExistsError):  # of another process, whose settings are compared below
            write_json({**settings, "complete": False}, path, exclusive=True)
    try:
        manifest = read_json(path)
        manifest.pop("complete")
        manifest.pop("failed", None)
        manifest.pop("populations", None)
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} can't be read ({error!r}), so the run can't be resumed; use another folder"
        ) from error
    different = {name: (old, new) for name, old, new in differences(manifest, settings)}
    before, after = different.get("num_images", (None, None))
    if extend is not None and not different.keys() - {"model", "num_images"}:
        if isinstance(before, int) and isinstance(after, int) and before < after:
            extend(before)
            write_manifest(folder, settings, complete=False)
            different = {}
    if different.keys() - {"model"}:  # the revision identifies the model, wherever it is stored
        texts = (f"{name} is {old}, here {new}" for name, (old, new) in different.items())
        raise ValueError(
            f"{path} is of a run with other settings: {'; '.join(texts)}. Use the same settings, "
            "or another folder"
        )
    if not created:
        for partial in filter(is_abandoned, folder.rglob(".*.partial")):
            partial.unlink(missing_ok=True)


def _is_temporary(path: Path) -> bool:
    """Whether a path is a lock or a temporary file of `aside`."""
    return is_lock(path) or (path.name.startswith(".") and path.name.endswith(".partial"))


def write_manifest(
    folder: Path,
    settings: Mapping[str, Any],
    complete: bool,
    failed: Sequence[int] = (),
    populations: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the settings, whether all images exist, which ones could not be generated, and what is
    known of each population."""
    content = {**settings, "complete": complete}
    if failed:
        content["failed"] = list(failed)
    if populations:
        content["populations"] = list(populations)
    write_json(content, folder / MANIFEST)


def unique_names(id2label: Mapping[Any, str] | None, count: int) -> list[str]:
    """Names of the labels 0 to count - 1; unnamed ones get their id, ambiguous ones a suffix."""
    names = {int(i): str(name) for i, name in (id2label or {}).items()}
    return unique([names.get(i, str(i)) for i in range(count)])


def folder_names(names: Sequence[str]) -> list[str]:
    """Unique folder names of labels, also on file systems that ignore case and Unicode forms."""
    return unique([as_folder(name) for name in names], _without_case)


def _without_case(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def as_folder(name: str) -> str:
    """A label's folder name, which every operating system allows; "-" replaces what it doesn't.

    It has at most 240 bytes, and none of the names of other files of the folder.
    """
    name = re.sub(r'^\.|[/\\<>:"|?*\x00-\x1f\x7f\ud800-\udfff]', "-", name)
    name = name.encode()[:MAX_FOLDER_BYTES].decode(errors="ignore")
    name = re.sub(r"[. ]$", "-", name)  # Windows drops these
    if RESERVED.fullmatch(name):
        name = f"-{name}"
    return name or "-"


def unique(names: Sequence[str], key: Callable[[str], str] = str) -> list[str]:
    """Names in which duplicates, compared by `key`, get their position as a suffix."""
    names = list(names)
    while True:
        counts = Counter(map(key, names))
        duplicates = [i for i, name in enumerate(names) if counts[key(name)] > 1]
        if not duplicates:
            return names
        for i in duplicates:
            names[i] = f"{names[i]} {i}"
