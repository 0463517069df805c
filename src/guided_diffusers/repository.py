"""What a repository on the Hub holds beside weights: code that loads it anywhere, and the classes that it may name.

    model_index.json    {..., "classifier": ["guided_diffusers_classifier", "NoiseAwareClassifier"]}
    pipeline.py         ClassifierGuidedPipeline and all that it needs of this package, in one file (`source`)
    classifier/guided_diffusers_classifier.py, ...      the same of each component that is ours

Where this package is imported, Diffusers finds the components' modules under those names among its own, where
`register` put them, and no code of the repository runs. Elsewhere it takes the files, with `trust_remote_code=True`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from logging import LogRecord
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
from diffusers.utils.logging import get_logger
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from .source import code_of

LIBRARIES = ("diffusers", "transformers")
ALLOWED = "a model or scheduler of diffusers, transformers, guided_diffusers or a module that you imported"


def register(modules: Collection[ModuleType], pipelines: Collection[type]) -> None:
    """Let Diffusers find the components of these modules, also by the names of folders saved before there were
    repositories, and `DiffusionPipeline` these pipelines."""
    for module in modules:
        setattr(diffusers.pipelines, module.__name__.replace(".", "_"), module)
        setattr(diffusers.pipelines, module.__name__, module)
    for pipeline in pipelines:
        setattr(diffusers, pipeline.__name__, pipeline)


def load(
    cls: type,
    from_pretrained: Callable[..., Any],
    name: str | Path,
    subfolder: str | None,
    **kwargs: Any,
) -> Any:
    """`from_pretrained` of a pipeline's class, with a subfolder, safetensors only, and the folder checked before.

    Raises:
        ValueError: as `check_index`, or for `use_safetensors=False`.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False: only True is allowed; weights in pickles aren't read"
        )
    kwargs["use_safetensors"] = True
    if Path(name).is_dir():
        folder = Path(name) / (subfolder or "")
    elif str(name).count("/") > 1:
        raise ValueError(
            f"{str(name)!r} is no folder, and no id of a repository: user/model is allowed"
        )
    elif subfolder is None:
        try:
            folder = Path(cls.download(str(name), **kwargs))
        except (
            OSError
        ) as error:  # Diffusers' speaks of its cache, also of a repository that is private
            raise (
                error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
            ) from None
    else:
        where = ("revision", "cache_dir", "token", "local_files_only", "force_download")
        folder = (
            Path(
                snapshot_download(
                    str(name),
                    allow_patterns=[
                        f"{subfolder}/*.{kind}" for kind in ("json", "txt", "safetensors")
                    ],
                    **{
                        option: kwargs[option] for option in where if kwargs.get(option) is not None
                    },
                )
            )
            / subfolder
        )
    components = cls._get_signature_keys(cls)[0]
    passed = {component: kwargs[component] for component in components if component in kwargs}
    for component, module in passed.items():
        if component != "scheduler" and not isinstance(module, (torch.nn.Module, type(None))):
            raise ValueError(f"{component} is {module!r}; a torch.nn.Module or None is allowed")
    if not kwargs.get("trust_remote_code"):
        check_index(folder, set(components) - passed.keys())
    with _quiet():
        pipeline = from_pretrained(folder, **kwargs)
    pipeline.register_to_config(_name_or_path=str(name))
    return pipeline


def check_index(folder: Path, components: Collection[str]) -> None:
    """Refuse the model_index.json of a pipeline with code of its own, or whose components' classes are no models.

    Raises:
        ValueError: naming the entry and what is allowed.
        OSError: if there is none.
    """
    if not (path := folder / "model_index.json").is_file():
        raise OSError(f"{folder} has no model_index.json, so it is no pipeline")
    index = json.loads(path.read_text())
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(
            f"{path}: _class_name is {index.get('_class_name')!r}, code of the repository; a name is "
            "allowed, or trust_remote_code=True if you have read that code"
        )
    for component, entry in index.items():
        if component in components and isinstance(entry, list) and entry[:1] != [None]:
            _check_class(f"{path}: {component} is {entry!r}", folder / component, entry)


def _check_class(where: str, folder: Path, entry: list[Any]) -> None:
    if len(entry) != 2 or not all(
        isinstance(part, str) and part.replace(".", "_").isidentifier() for part in entry
    ):
        raise ValueError(f"{where}, which is no [module, class]; {ALLOWED} is allowed")
    library, name = entry
    module = getattr(diffusers.pipelines, library, None) or sys.modules.get(library)
    if module is None and library in LIBRARIES:
        module = importlib.import_module(library)
    if module is None and (folder / f"{library}.py").exists():
        raise ValueError(
            f"{where}, code of the repository; {ALLOWED} is allowed, or trust_remote_code=True if you "
            "have read that code"
        )
    found = getattr(module, name, None)
    if not isinstance(found, type) or not issubclass(
        found, (torch.nn.Module, diffusers.SchedulerMixin)
    ):
        raise ValueError(f"{where}, which is no class of a model here; {ALLOWED} is allowed")


def save(
    pipeline: Any,
    save_pretrained: Callable[..., Any],
    folder: Path,
    safe_serialization: bool,
    push_to_hub: bool,
    variant: str | None,
    max_shard_size: int | str | None,
    **kwargs: Any,
) -> None:
    """`save_pretrained` of a pipeline, in safetensors, with its code.

    Args:
        kwargs: `repo_id` and other arguments of `push_to_hub`.

    Raises:
        ValueError: for `safe_serialization=False`.
    """
    if not safe_serialization:
        raise ValueError(
            "safe_serialization=False: only True is allowed, weights are saved as safetensors"
        )
    save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
    pipeline.save_code(folder)
    if push_to_hub:
        pipeline.push_to_hub(kwargs.pop("repo_id", folder.name), variant=variant, **kwargs)


def save_code(pipeline: Any, folder: Path) -> None:
    """Write a pipeline's code into its folder, whose configs then name it and no path of this machine."""
    code = pipeline.code()
    for file, text in code.items():
        (folder / file).write_text(text)
    for path in [
        folder / pipeline.config_name,
        *(folder / name / "config.json" for name in pipeline.components),
    ]:
        if path.exists():
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)
            for component, _, file in (file.removesuffix(".py").rpartition("/") for file in code):
                if component in config and path.name == pipeline.config_name:
                    config[component][0] = file
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def code(pipeline: Any) -> dict[str, str]:
    """The files, {path: text}, that load a pipeline where guided-diffusers isn't installed."""
    found = {"pipeline.py": _code_of(pipeline)}
    for name, component in pipeline.components.items():
        component = getattr(
            component, "_orig_mod", component
        )  # the module that torch.compile wraps
        file = type(component).__module__.removeprefix("diffusers_modules.local.").replace(".", "_")
        found[f"{name}/{file}.py"] = _code_of(component)
    return {file: text for file, text in found.items() if text is not None}


def _code_of(model: Any) -> str | None:
    """The file that defines a model's class where guided-diffusers isn't installed; None for another package's."""
    cls = type(model)
    package = cls.__module__.partition(".")[0]
    if package == "diffusers_modules":  # it came from such a file
        return Path(inspect.getfile(cls)).read_text()
    return code_of(model) if package == "guided_diffusers" else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, Diffusers doesn't print every layer of a component that is passed in place of one of ours."""

    def wanted(record: LogRecord) -> bool:
        return not record.getMessage().startswith("You have passed a non-standard module")

    logger = get_logger("diffusers.pipelines.pipeline_loading_utils")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
