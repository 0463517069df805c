"""Files of weights in a model's folder, and whether a model can be saved to them and loaded again.

Diffusers loads a file that lacks weights, or has others: those that it lacks are then meta tensors
or uninitialised memory. And it drops a component that it can't save. Both are refused here.

Part of the code that is saved beside the weights: it imports nothing else of this package.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

WEIGHT_NAMES = ("diffusion_pytorch_model", "model")  # of Diffusers, of transformers
CONFIG_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
LOAD_FAULTS = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
MAX_NAMED_WEIGHTS = 3
SAVE_ADVICE = (
    "merge an adapter into its model (merge_and_unload), take a parallel model's .module, or make "
    "it a subclass of ModelMixin and ConfigMixin (a scheduler: of SchedulerMixin and ConfigMixin)"
)
#: {name: (whether it is a floating-point number, shape)}
WeightKinds = dict[str, tuple[bool, tuple[int, ...]]]


# ---------------------------------------------------------------- files


def variant_of(stem: str) -> tuple[str, str | None]:
    """(name, variant) of a `weights_stem`, such as ("diffusion_pytorch_model", "fp16")."""
    name, _, variant = stem.partition(".")
    return name, variant or None


def weights_stem(name: str) -> str:
    """Name of a weights file without its suffix and the number of its shard."""
    return re.sub(r"(-\d{5}-of-\d{5})?\.safetensors$", "", name)


def index_names(stem: str) -> tuple[str, str]:
    """Names of the index of a `weights_stem`'s shards, the second as older versions wrote it."""
    name, variant = variant_of(stem)
    if variant is None:
        return (f"{name}.safetensors.index.json",) * 2
    index = f"{name}.safetensors.index.{variant}.json"
    return index, f"{name}.safetensors.{variant}.index.json"


def weight_patterns(stem: str) -> tuple[str, ...]:
    """Patterns of all files that may hold the weights of a `weights_stem`."""
    return f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors", *index_names(stem)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that are loaded from a model's folder; empty if there are none.

    Raises:
        ValueError: for an index that names files elsewhere.
        OSError: for one that is broken.
    """
    for kind in dict.fromkeys((variant, None)):
        for name in WEIGHT_NAMES:
            stem = f"{name}.{kind}" if kind else name
            for index in index_names(stem):
                if (folder / index).is_file():
                    return _indexed_files(folder / index)
            if (folder / f"{stem}.safetensors").is_file():
                return [folder / f"{stem}.safetensors"]
    return []


def _indexed_files(index: Path) -> list[Path]:
    try:
        content = json.loads(index.read_text())
        shards = sorted(set(content["weight_map"].values()))
        others = [shard for shard in shards if Path(shard).name != shard]
        content["metadata"]  # which Diffusers needs
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{index} is no index of weights, or is broken: {error!r}") from error
    if others:
        raise ValueError(f"{index}: {others[0]!r} has a path separator")
    return [index.with_name(shard) for shard in shards]


def saved_variants(folder: Path) -> set[str | None]:
    """Variants of the weights in a model's folder; None is that without a name."""
    stems = {weights_stem(path.name) for path in folder.glob("*.safetensors")}
    named = [variant_of(stem) for stem in stems]
    return {variant for name, variant in named if name in WEIGHT_NAMES}


@contextmanager
def saved_aside(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to save into, whose files are moved into `folder` at the end.

    Then weights are removed that those replace: a file beside new shards, or shards and their index
    beside a new file, would be loaded instead, or together. After an error `folder` is as before.

    Raises:
        OSError: if it can't be written, such as on a full disk.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; a folder to save into is needed")
    partial = folder / f".{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        files = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
        for file in sorted(files):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / file, folder / file)
        for file in files:
            if file.suffix == ".safetensors":
                for pattern in weight_patterns(weights_stem(file.name)):
                    for path in (folder / file).parent.glob(pattern):
                        if path.relative_to(folder) not in files:
                            path.unlink()
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} can't be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---------------------------------------------------------------- loading


def load_checked(load: Callable[..., Any], name: str | Path, **options: Any) -> Any:
    """`load(name, **options)`, which is `from_pretrained` of a Diffusers model's class.

    Raises:
        ValueError: for files that don't hold the model's weights, as `check_weights`.
    """
    variant = options.get("variant")
    try:
        loaded = load(name, **options)
    except (*LOAD_FAULTS, OSError):  # such as of a weight's shape, but without the file's name
        check_class_weights(load.__self__, name, options)
        raise
    model = loaded[0] if options.get("output_loading_info") else loaded
    any_shape = options.get("ignore_mismatched_sizes", False)
    check_weights(model, _config_folder(name, options), variant, any_shape)
    return loaded


def _config_folder(name: str | Path, options: Mapping[str, Any]) -> Path:
    """The folder of a model's config and weights; of a model of the Hub, that in the cache."""
    if Path(name).is_dir():
        return Path(name) / (options.get("subfolder") or "")
    given = {option: options[option] for option in CONFIG_OPTIONS if options.get(option)}
    return Path(hf_hub_download(str(name), "config.json", **given)).parent


def check_class_weights(cls: type, name: str | Path, options: Mapping[str, Any]) -> None:
    """Say why a Diffusers model can't be loaded, if it is its config or its weights.

    Raises:
        ValueError: for a config that the class refuses, naming the file; as `check_weights`.
        OSError: for weights that are missing or broken, naming the file.
    """
    try:
        folder = _config_folder(name, options)
        config = cls.load_config(folder)
    except Exception:  # neither: loading the model says what it is
        return
    try:
        model = empty_model(cls, config)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder / 'config.json'} is no config of a {cls.__name__}: {reason}"
        ) from error
    variant = options.get("variant")
    if not weight_files(folder, variant):
        raise OSError(_without_weights(folder, variant))
    check_weights(model, folder, variant)


def _without_weights(folder: Path, variant: str | None) -> str:
    """That a folder has no weights, and which other files it has."""
    stem = WEIGHT_NAMES[0] + (f".{variant}" if variant else "")
    message = f"{folder} has no weights: {stem}.safetensors is needed"
    files = sorted(path.name for path in folder.iterdir())
    variants = saved_variants(folder) - {None}
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if variants:
        message += f"; it has those of the variant {', '.join(sorted(variants))}"
    elif pickles:
        message += f"; {pickles[0]} is a pickle, which isn't read: save it as safetensors"
    return message


def empty_model(cls: type, config: Mapping[str, Any]) -> torch.nn.Module:
    """A Diffusers model without memory for its weights."""
    without_memory = torch.device("meta")
    if find_spec("accelerate"):  # it leaves other tensors alone, whose values `__init__` may read
        without_memory = import_module("accelerate").init_empty_weights()
    with torch.random.fork_rng(devices=[]), without_memory:
        return cls.from_config(config)


def check_weights(
    model: torch.nn.Module, folder: Path, variant: str | None = None, any_shape: bool = False
) -> None:
    """Refuse a folder whose safetensors files don't hold the model's weights.

    Left out are weights that the class ignores, those shared with another that is there, and
    quantized models, whose weights have other names. `any_shape`: a shape may differ.

    Raises:
        ValueError: naming the file and the weights that are missing, unknown, of another shape, or
            integers.
        OSError: for a broken file.
    """
    files = weight_files(folder, variant)
    if not files or getattr(model, "hf_quantizer", None) is not None:
        return
    saved, expected = saved_kinds(files), weight_kinds(model)
    if isinstance(model, ModelMixin):
        if len(files) == 1:
            model._fix_state_dict_keys_on_load(saved)  # names that attention layers once had
    elif saved.keys() != expected.keys():  # transformers renames weights as it loads them
        info = type(model).from_pretrained(folder, variant=variant, output_loading_info=True)[1]
        saved = expected | dict.fromkeys(info["unexpected_keys"], (True, ()))
        saved = {key: kind for key, kind in saved.items() if key not in info["missing_keys"]}
    for key in _shared(model.state_dict(), saved) - saved.keys():
        expected.pop(key)
    for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ():
        for key in [key for key in saved if key not in expected and re.search(pattern, key)]:
            saved.pop(key)
    if problems := weight_differences(saved, expected, any_shape):
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise ValueError(
            f"{files[0]}{more}: not the weights of the {type(model).__name__} in config.json: "
            f"{problems}; put the file back that was saved with this config"
        )


def weight_kinds(model: torch.nn.Module) -> WeightKinds:
    kinds = {}
    for key, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):  # not a module's extra state
            kinds[key] = value.is_floating_point(), tuple(value.shape)
    return kinds


def saved_kinds(files: Sequence[Path]) -> WeightKinds:
    """The weights in safetensors files; OSError for a missing or broken file."""
    kinds = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    kinds[key] = part.get_dtype().startswith(("F", "BF")), tuple(part.get_shape())
        except (SafetensorError, FileNotFoundError) as error:
            raise OSError(f"{path} is missing, or no safetensors file: {error}") from error
    return kinds


def _shared(state: Mapping[str, Any], saved: Mapping[str, Any]) -> set[str]:
    """Names of the weights whose memory is that of a saved one (tied weights)."""
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    tensors = {key: value for key, value in tensors.items() if not value.is_meta and value.numel()}
    memory = {value.data_ptr() for key, value in tensors.items() if key in saved}
    return {key for key, value in tensors.items() if value.data_ptr() in memory}


def weight_differences(actual: WeightKinds, expected: WeightKinds, any_shape: bool = False) -> str:
    """How the weights differ from those expected, in words; empty if they don't."""
    common = [key for key in expected if key in actual]
    shapes, integers = [], []
    for key in common:
        (is_float, shape), (needs_float, needed_shape) = actual[key], expected[key]
        if shape != needed_shape and not any_shape:
            shapes.append(f"{key} {shape} instead of {needed_shape}")
        if needs_float and not is_float:
            integers.append(key)
    groups = {
        "missing": [key for key in expected if key not in actual],
        "unknown": [key for key in actual if key not in expected],
        "of another shape": shapes,
        "no floating-point numbers": integers,
    }
    texts = []
    for name, keys in groups.items():
        if keys:
            more = ", ..." if len(keys) > MAX_NAMED_WEIGHTS else ""
            texts.append(f"{len(keys)} {name} ({', '.join(keys[:MAX_NAMED_WEIGHTS])}{more})")
    return ", ".join(texts)


def check_values(name: str, model: torch.nn.Module | None) -> None:
    """Refuse a model that was loaded, but not by this package, from a file of other weights.

    Diffusers leaves weights that the file lacks without values. A file that has them all is read
    again; one without them may have been replaced since. A model made on "meta" is left alone, and
    so is one from which layers were removed after it was loaded.

    Raises:
        ValueError: naming the model's folder and the weights.
    """
    parts = [] if model is None else list(model.modules())
    if any(hasattr(part, "_hf_hook") for part in parts):  # Accelerate's, which offloads weights
        return
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    missing = [key for part in parts[:1] for key, value in part.named_parameters() if value.is_meta]
    if missing and source:
        raise ValueError(
            f"{name}: {len(missing)} weights of the {type(model).__name__} from {source} "
            f"have no values ({', '.join(missing[:MAX_NAMED_WEIGHTS])}); load a file that has them"
        )
    if isinstance(model, ModelMixin) and source and Path(source).is_dir():
        saved, kinds = {}, weight_kinds(model).items()
        with suppress(OSError, ValueError):  # it isn't loaded from there again
            saved = saved_kinds(weight_files(Path(source)))
        if all(key in saved and saved[key][1] == shape for key, (_, shape) in kinds):
            try:
                check_weights(model, Path(source))
            except ValueError:  # unless the file is right for its config: a layer was removed since
                check_weights(empty_model(type(model), model.config), Path(source))


# ---------------------------------------------------------------- saving


def check_saveable(name: str, component: Any) -> None:
    """Refuse a model or scheduler that wouldn't be loaded as it is, before it is saved.

    Raises:
        ValueError: for a class that Diffusers can't save or find again, or a model whose weights
            aren't those of its config; the message says what can be done.
    """
    if component is None:
        raise ValueError(f"{name} is None, which can't be saved; it is needed")
    component = getattr(component, "_orig_mod", component)  # what torch.compile wraps
    cls = type(component)
    is_model = isinstance(component, ModelMixin)
    if not _is_loadable(component) or is_model and not isinstance(component, ConfigMixin):
        raise ValueError(f"{name} is a {cls.__name__}, which can't be saved; {SAVE_ADVICE}")
    if getattr(sys.modules.get(cls.__module__), cls.__name__, None) is None:
        raise ValueError(
            f"{name} is a {cls.__qualname__}, which isn't found when it is loaded; define the "
            "class at the top level of a module"
        )
    if not is_model or getattr(component, "hf_quantizer", None) is not None:
        return
    tensors = component.state_dict().items()
    tensors = {key: value for key, value in tensors if isinstance(value, torch.Tensor)}
    if no_values := [key for key, value in tensors.items() if value.is_meta]:
        raise ValueError(
            f"{name}: {len(no_values)} weights have no values here ({no_values[0]}, ...); load "
            "complete files, or turn off offloading before saving"
        )
    try:
        config = json.loads(component.to_json_string())  # as it is saved
        fresh = weight_kinds(empty_model(cls, config))
    except Exception as error:
        raise ValueError(
            f"{name} can't be saved: {cls.__name__}.from_config fails for its config ({error}); "
            "register all arguments of __init__ with @register_to_config"
        ) from error
    if problems := weight_differences(weight_kinds(component), fresh):
        raise ValueError(
            f"{name} can't be saved: its weights aren't those of a {cls.__name__} with its config: "
            f"{problems}; merge or remove adapters and other changes of its layers first"
        )
    first: dict[int, str] = {}
    for key, value in tensors.items():
        other = first.setdefault(value.data_ptr(), key) if value.numel() else key
        if other != key:
            raise ValueError(
                f"{name} can't be saved: its weights {other} and {key} share memory, which "
                "safetensors don't store; clone one of them first"
            )


def check_variant(variant: str | None) -> None:
    """Refuse a variant of which Diffusers wouldn't find the files again.

    Raises:
        ValueError: naming what is allowed.
    """
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", str(variant)):
        raise ValueError(
            f"variant={variant!r}: letters, digits, _ and - are allowed, such as 'fp16'"
        )


def _is_loadable(component: Any) -> bool:
    """Whether Diffusers can save and load objects of this class."""
    for library, names in LOADABLE_CLASSES.items():
        classes = [getattr(sys.modules.get(library), name, None) for name in names]
        if isinstance(component, tuple(filter(None, classes))):
            return True
    return False
