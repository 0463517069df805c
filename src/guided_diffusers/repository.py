"""Code beside a saved pipeline's weights that loads it anywhere, and checks of a folder to load.

    model_index.json    {"_class_name": ["pipeline", "ClassifierGuidedPipeline"],
                         "classifier": ["guided_diffusers_classifier", "NoiseAwareClassifier"], ...}
    pipeline.py         ClassifierGuidedPipeline and all that it needs, in one file (`standalone`)
    classifier/guided_diffusers_classifier.py, ...      the same for each component of this package

If this package is imported, Diffusers finds the components' modules under those names among its
own and the pipeline's class is this package's (`lazy.register_with_diffusers`): no code of the
repository runs. Without the package it takes the files, with `trust_remote_code=True`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from logging import LogRecord
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils.logging import get_logger
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from .checks import read_json, shorten, shown
from .families import training_schedule
from .noise import module_config
from .weights import (
    LOAD_FAULTS,
    check_class_weights,
    check_saveable,
    check_variant,
    check_weights,
    saved_aside,
)

LIBRARIES = ("diffusers", "transformers")
CLASS_NAME = "ClassifierGuidedPipeline"
ALLOWED_CLASSES = (
    "a model or scheduler of diffusers, transformers, guided_diffusers or an imported module"
)
#: more, in a component's config, is no real model, and would take for ever to build
MAX_LAYERS, MAX_CONFIG_NUMBER, MAX_CONFIG_LIST = 1000, 10**7, 10**5
#: entries of a config that size a network or a schedule
SIZES = re.compile(
    "block|channel|class|depth|dim|embd|embed|expert|feature|group|head|height|hidden|label|layer|length|"
    "mult|order|resolution|size|steps|units|vocab|width"
)
#: of them, numbers of layers, also one for each block; those of `mlp_layers` may be widths
LAYER_COUNTS = re.compile("layers_per|n(um)?_?layers?|num_.*layers|depth")
DOWNLOAD_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


# ---------------------------------------------------------------- loading


def load_pipeline(
    cls: type,
    from_pretrained: Callable[..., Any],
    name: str | Path,
    subfolder: str | None,
    **kwargs: Any,
) -> Any:
    """`from_pretrained` of a pipeline's class from a checked folder, safetensors only.

    Raises:
        ValueError: as `check_index` and `check_weights`, or for `use_safetensors=False`.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False: only True is allowed; weights in pickles aren't read"
        )
    kwargs["use_safetensors"] = True
    folder = _local_folder(cls, name, subfolder, kwargs)
    for component in cls._get_signature_keys(cls)[0]:
        check_config(folder / component)
    components = cls._get_signature_keys(cls)[0]
    passed = {component: kwargs[component] for component in components if component in kwargs}
    for component, module in passed.items():
        if component != "scheduler" and not isinstance(module, (torch.nn.Module, type(None))):
            raise ValueError(f"{component} is {module!r}; a torch.nn.Module or None is allowed")
    classes: dict[str, type] = {}
    if not kwargs.get("trust_remote_code"):
        classes = check_index(folder, set(components) - passed.keys())
        needed = set(components) - {*classes, *passed, *cls._optional_components}
        if needed:
            raise ValueError(
                f"{folder / 'model_index.json'}: {min(needed)} is null or missing; a class is "
                f"needed, or {min(needed)}=... as an argument"
            )
    variant = kwargs.get("variant")
    try:
        with _without_layer_listing():
            pipeline = from_pretrained(folder, **kwargs)
    except (*LOAD_FAULTS, ArithmeticError, MemoryError, NameError, OSError) as error:
        # such as of a weight's shape, but without the file's name
        _check_components(folder, classes, variant)
        if isinstance(error, (ValueError, OSError)):
            raise
        raise ValueError(  # a config with values of wrong kinds
            f"{folder} can't be loaded; a value in its configs or model_index.json is wrong: "
            f"{type(error).__name__}: {shorten(error)}"
        ) from error
    loaded = {name: part for name, part in pipeline.components.items() if name not in passed}
    _check_components(folder, loaded, variant)
    pipeline.register_to_config(_name_or_path=str(name))
    if "scheduler" in passed and "training_schedule" not in kwargs:
        _keep_training_schedule(pipeline, folder)
    return pipeline


def _keep_training_schedule(pipeline: Any, folder: Path) -> None:
    """Register the schedule of the scheduler in the folder, which another one was passed for, where
    model_index.json has none."""
    index, path = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    if "training_schedule" in read_json(index) or not path.is_file():
        return
    config = read_json(path)
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin):
        with suppress(Exception):  # not used, so it may be one that this version can't make
            schedule = training_schedule(cls.from_config(config))
            pipeline.register_to_config(training_schedule=schedule)


def _check_components(folder: Path, components: Mapping[str, Any], variant: str | None) -> None:
    """Refuse files without the weights of these networks, or that these classes refuse."""
    for name, component in components.items():
        # Diffusers looks in the pipeline's own folder next
        path = folder / name if (folder / name).is_dir() else folder
        if isinstance(component, torch.nn.Module):
            check_weights(component, path, variant)
        elif isinstance(component, type) and issubclass(component, torch.nn.Module):
            check_class_weights(component, path, {"variant": variant})
        elif isinstance(component, type) and (path / "scheduler_config.json").is_file():
            try:
                component.from_pretrained(path)
            except Exception as error:  # of the scheduler's class, or of what it calls
                wrong = _entries_in(str(error), read_json(path / "scheduler_config.json"))
                raise ValueError(
                    f"{path / 'scheduler_config.json'} is no config of a {component.__name__}: "
                    f"{wrong}{shorten(error)}"
                ) from error


def _entries_in(message: str, config: Mapping[str, Any]) -> str:
    """Entries of a config whose value is a word of an error's message, or an order of 0; for its
    start."""
    words, entries = re.findall(r"\w+", message), []
    for name, value in config.items():
        is_named = isinstance(value, str) and value in words and not name.startswith("_")
        if is_named or (name == "solver_order" and value == 0):
            entries.append(f"{name}={value!r}")
    return f"{', '.join(entries)}: " if entries else ""


def _local_folder(
    cls: type, name: str | Path, subfolder: str | None, kwargs: dict[str, Any]
) -> Path:
    """The pipeline's folder on this machine, downloaded if `name` is a Hub id."""
    if not isinstance(name, (str, Path)) or not str(name):
        raise ValueError(f"{shown(name)}: a folder or the id of a repository is allowed")
    if Path(name).is_dir():
        return Path(name) / (subfolder or "")
    if Path(name).exists() or not is_repository_id(str(name)):
        raise ValueError(
            f"{shown(str(name))} is no folder, and no id of a repository: user/model is allowed"
        )
    if subfolder is None:
        try:
            return Path(cls.download(str(name), **kwargs))
        except OSError as error:  # Diffusers blames its cache, even for a private repository
            raise (
                error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
            ) from None
    patterns = [f"{subfolder}/*.{kind}" for kind in ("json", "txt", "safetensors")]
    options = {option: kwargs[option] for option in DOWNLOAD_OPTIONS if kwargs.get(option)}
    return Path(snapshot_download(str(name), allow_patterns=patterns, **options)) / subfolder


def is_repository_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, user/model or model; "./model" is a path."""
    return bool(re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", name))


def check_config(folder: Path) -> None:
    """Refuse a component's config that is no JSON object, or has numbers of no real model.

    Raises:
        ValueError: naming the file, the entry and what is allowed.
    """
    for name in ("config.json", "scheduler_config.json"):
        path = folder / name
        if path.exists():
            check_config_values(path, read_json(path))


def check_config_values(source: Any, config: Mapping[str, Any]) -> None:
    """Refuse numbers of no real model; ValueError naming the source and the entry."""
    for entry, value in config.items():
        most = MAX_CONFIG_NUMBER if SIZES.search(entry) else float("inf")
        if LAYER_COUNTS.search(entry) or "layers" in entry and not isinstance(value, list):
            most = MAX_LAYERS
        _check_config_value(f"{source}: {entry}", value, most)
        if entry == "num_train_timesteps" and isinstance(value, int) and value < 1:
            raise ValueError(f"{source}: {entry} is {value}; 1 or more is allowed")


def _check_config_value(where: str, value: Any, most: float) -> None:
    if isinstance(value, list):
        if len(value) > MAX_CONFIG_LIST:
            raise ValueError(f"{where} has {len(value)} items; up to {MAX_CONFIG_LIST} are allowed")
        for item in value:
            _check_config_value(where, item, most)
    if isinstance(value, int) and abs(value) > most:
        raise ValueError(f"{where} is {shown(value)}; up to {most} is allowed")


def check_index(folder: Path, components: Collection[str]) -> dict[str, type]:
    """The components' classes; refuses a model_index.json with code of its own, or other classes.

    Raises:
        ValueError: naming the entry and what is allowed.
        OSError: if there is none.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise OSError(f"{folder} has no model_index.json, so it is no pipeline")
    index = read_json(path)
    name = index.get("_class_name")
    is_own = isinstance(name, list) and len(name) == 2 and name[1] == CLASS_NAME
    is_own = is_own and isinstance(name[0], str) and name[0].isidentifier()
    if not isinstance(name, str) and not is_own:
        raise ValueError(
            f"{path}: _class_name is {name!r}, code of the repository; a name, or [module, "
            f"{CLASS_NAME!r}], is allowed, or trust_remote_code=True if you have read that code"
        )
    classes = {}
    for component, entry in index.items():
        if component not in components:
            continue
        if not isinstance(entry, list):
            raise ValueError(f"{path}: {component} is {shown(entry)}; [module, class] is allowed")
        if entry[:1] != [None]:
            where = f"{path}: {component} is {entry!r}"
            classes[component] = _component_class(where, folder / component, entry)
    return classes


def _component_class(where: str, folder: Path, entry: list[Any]) -> type:
    names = [part for part in entry if isinstance(part, str)]
    valid = all(name.replace(".", "_").isidentifier() for name in names)
    if not valid or not len(entry) == len(names) == 2:
        raise ValueError(f"{where}, which is no [module, class]; {ALLOWED_CLASSES} is allowed")
    library, name = entry
    module = getattr(diffusers.pipelines, library, None) or sys.modules.get(library)
    if module is None and library in LIBRARIES:
        module = importlib.import_module(library)
    if module is None and (folder / f"{library}.py").exists():
        raise ValueError(
            f"{where}, code of the repository; {ALLOWED_CLASSES} is allowed, or "
            "trust_remote_code=True if you have read that code"
        )
    cls = getattr(module, name, None)
    allowed = (torch.nn.Module, diffusers.SchedulerMixin)
    if not isinstance(cls, type) or not issubclass(cls, allowed):
        raise ValueError(
            f"{where}, which is no class of a model here; {ALLOWED_CLASSES} is allowed"
        )
    return cls


@contextmanager
def _without_layer_listing() -> Iterator[None]:
    """Context in which Diffusers doesn't print every layer of a component that is passed."""

    def keep(record: LogRecord) -> bool:
        return not record.getMessage().startswith("You have passed a non-standard module")

    loading_logger = get_logger("diffusers.pipelines.pipeline_loading_utils")
    loading_logger.addFilter(keep)
    try:
        yield
    finally:
        loading_logger.removeFilter(keep)


# ---------------------------------------------------------------- saving


def save_pipeline(
    pipeline: Any, save_pretrained: Callable[..., None], folder: Path, **options: Any
) -> None:
    """`save_pretrained` of a pipeline's class, in safetensors, with the pipeline's code.

    Raises:
        ValueError: before anything is written, for a component that can't be saved.
        OSError: if the folder can't be written.
    """
    check_variant(options.get("variant"))
    for name, component in pipeline.components.items():
        if component is not None or name not in pipeline._optional_components:
            check_saveable(name, component)
            check_config_values(name, module_config(component))  # else it can't be loaded
    with saved_aside(folder) as partial:
        save_pretrained(partial, **options)
        pipeline.save_code(partial)


def save_pipeline_code(pipeline: Any, folder: Path) -> None:
    """Write a pipeline's code into its folder, and its names into the configs there."""
    code = pipeline.code()
    for file, text in code.items():
        (folder / file).write_text(text)
    configs = [folder / name / "config.json" for name in pipeline.components]
    for path in [folder / pipeline.config_name, *configs]:
        if not path.exists():
            continue
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if path.name == pipeline.config_name:
            for file in code:
                component, _, module = file.removesuffix(".py").rpartition("/")
                if component in config:
                    config[component][0] = module
                elif not component:  # Diffusers' own loader then needs no custom_pipeline=
                    config["_class_name"] = [module, type(pipeline).__name__]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def pipeline_code(pipeline: Any) -> dict[str, str]:
    """The files, {path: text}, that load a pipeline where guided-diffusers isn't installed."""
    code = {"pipeline.py": _code_of(type(pipeline))}
    for name, component in pipeline.components.items():
        cls = type(getattr(component, "_orig_mod", component))  # of what torch.compile wraps
        file = cls.__module__.removeprefix("diffusers_modules.local.").replace(".", "_")
        code[f"{name}/{file}.py"] = _code_of(cls)
    return {file: text for file, text in code.items() if text is not None}


def _code_of(cls: type) -> str | None:
    """Text of a self-contained file that defines a class; None for another package's class."""
    if cls.__module__ == __name__:  # a self-contained file, which has this function, too
        return globals()["__source__"]
    package = cls.__module__.partition(".")[0]
    if package == "diffusers_modules":  # it was loaded from such a file
        return Path(inspect.getfile(cls)).read_text()
    if package == "guided_diffusers":
        return importlib.import_module("guided_diffusers.standalone").self_contained(cls)
    return None
