"""What made a run's images: settings, the model's revision, versions; and whether a folder is of the same run."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from huggingface_hub import try_to_load_from_cache

from ..noise import module_config
from ..pipeline import DEFAULTS, ClassifierGuidedPipeline
from ..utils import finite, write_json

NAME = "manifest.json"
NO_SETTINGS = {"callback_on_step_end", "callback_on_step_end_tensor_inputs"}  # those that look on
LIBRARIES = ("guided-diffusers", "torch", "diffusers", "numpy", "pillow", "pyarrow")


def all_settings(
    pipeline: ClassifierGuidedPipeline,
    model: str | None,
    revision: str | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """`settings`, and what of the pipeline and this machine has a say in the images, as JSON."""
    found = {
        "model": model or type(pipeline).__name__,
        "revision": revision or weights_hash(pipeline),
        "classifier": None if pipeline.classifier is None else module_hash(pipeline.classifier),
        **{name: value for name, value in settings.items() if name not in NO_SETTINGS},
        "scheduler": scheduler_settings(pipeline.scheduler),
        "device": pipeline.device.type,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    return json.loads(json.dumps(finite(found), default=lambda value: type(value).__name__))


def scheduler_settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Its class and that class's own options, without those that another class left in the config."""
    takes = inspect.signature(type(scheduler).__init__).parameters
    return {
        "class": type(scheduler).__name__,
        **{name: value for name, value in scheduler.config.items() if name in takes},
    }


def settled(pipeline: ClassifierGuidedPipeline, call: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, with the pipeline's own where it says nothing."""
    own = dict(pipeline.config.defaults)
    if any(
        call.get(name) is not None for name in ("guidance_every", "guidance_tolerance")
    ):  # one turns the other off
        own |= {name: DEFAULTS[name] for name in ("guidance_every", "guidance_tolerance")}
    return own | {
        name: value for name, value in call.items() if value is not None or name not in own
    }


def weights_hash(pipeline: ClassifierGuidedPipeline) -> str:
    """SHA-256 of all networks' classes, configs and weights."""
    digest = hashlib.sha256()
    for name, module in sorted(pipeline.components.items()):
        if isinstance(module, torch.nn.Module):
            config = {
                key: value
                for key, value in module_config(module).items()
                if not str(key).startswith("_")
            }
            digest.update(
                json.dumps(
                    [name, type(module).__name__, config], sort_keys=True, default=str
                ).encode()
            )
            add_weights(digest, module)
    return f"sha256:{digest.hexdigest()}"


def module_hash(module: torch.nn.Module) -> str:
    """SHA-256 of a network's weights alone, wherever they lie and whatever it is called."""
    add_weights(digest := hashlib.sha256(), module)
    return f"sha256:{digest.hexdigest()}"


def add_weights(digest: Any, module: torch.nn.Module) -> None:
    """Tell a digest of `hashlib` of all weights: their names, types, shapes and numbers."""
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def commit(model: str, revision: str | None = None) -> str | None:
    """The Hub's commit hash of a model that was just loaded from there; None for a folder, or a bundled model."""
    if "/" not in model or Path(model).exists():
        return None
    found = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def begin(folder: Path, settings: Mapping[str, Any], written: bool = False) -> None:
    """Write a new folder's manifest, or see that it is of these settings; remove what killed runs left half-written.

    Args:
        written: another process did; only see that it is the same.

    Raises:
        ValueError: for a folder of other settings, naming them, one that is no run's, or a manifest that can't be read.
    """
    path = folder / NAME
    if not path.exists():
        if written:
            raise ValueError(
                f"{folder} isn't the same for all processes: {path} was just written, and isn't here; "
                "several machines need a folder that all of them see"
            )
        if folder.exists() and (
            not folder.is_dir() or [one for one in folder.iterdir() if not _half_written(one)]
        ):
            raise ValueError(
                f"{folder} is in use and has no {NAME}, so it is of no run that could go on; a new or "
                "empty folder is allowed"
            )
        write_manifest(folder, settings, complete=False)
    try:
        before = json.loads(path.read_text())
        before.pop("complete")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} can't be read ({error!r}), so it isn't known what made the images there; another "
            "folder is allowed"
        ) from error
    different = {
        name: f"{name} is {one}, here {other}" for name, one, other in differences(before, settings)
    }
    if different.keys() - {"model"}:  # its revision says what it is, its path may be another
        raise ValueError(
            f"{path} is of a run with other settings, which can't go on with these: "
            f"{'; '.join(different.values())}. Use the same, or another folder"
        )
    if not written:
        for partial in filter(_half_written, folder.rglob(".*.partial")):
            partial.unlink(missing_ok=True)


def write_manifest(folder: Path, settings: Mapping[str, Any], complete: bool) -> None:
    """Write the settings, and whether all images are there."""
    write_json({**settings, "complete": complete}, folder / NAME)


def _half_written(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial") and path.is_file()


def differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, its value, its other value) of all that differs in nested mappings; None where there is none."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys((*one, *other)):
            yield from differences(
                one.get(key), other.get(key), f"{name}.{key}" if name else str(key)
            )
    elif one != other:
        yield name, one, other


def unique_names(id2label: Mapping[Any, str] | None, count: int) -> list[str]:
    """The names of the labels 0 to count - 1, by default their ids; a name of several gets its id behind it."""
    known = {int(i): str(name) for i, name in (id2label or {}).items()}
    return unique([known.get(i, str(i)) for i in range(count)])


def folder_names(names: Sequence[str]) -> list[str]:
    """The names as folders, all apart, also where capitals are as small letters."""
    return unique([as_folder(name) for name in names], str.casefold)


def as_folder(name: str) -> str:
    """A name without what a folder's mustn't have."""
    return re.sub(r"^\.|[/\\\0]", "-", name) or "-"


def unique(names: Sequence[str], seen_as: Callable[[str], str] = str) -> list[str]:
    """The names, of which those that several have get their number behind them, until all are apart."""
    while max((counts := Counter(map(seen_as, names))).values(), default=1) > 1:
        names = [
            f"{name} {i}" if counts[seen_as(name)] > 1 else name for i, name in enumerate(names)
        ]
    return list(names)
