"""Imports at first use: `import guided_diffusers` and the command line's `--help` load no torch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

from .deprecated import renamed

PACKAGE = __name__.partition(".")[0]
#: modules whose components Diffusers loads, and the pipeline that `DiffusionPipeline` loads
COMPONENT_MODULES = ("classifier", "openai.unet", "openai.schedules")
PIPELINES = {"ClassifierGuidedPipeline": "pipeline"}
PIPELINE_LOADER = "diffusers.pipelines.pipeline_utils"
MODULAR_LOADER = "diffusers.pipelines.pipeline_loading_utils"  # what `ModularPipeline` imports from


def lazy_imports(
    package: str, old_names: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__` for what its file imports `if TYPE_CHECKING`.

    Each name is imported when it is first used. Type checkers and editors read the same lines.

    Args:
        package: `__name__` of the package.
        old_names: earlier name -> name, as in `deprecated.renamed`.
    """
    sources: dict[
        str, tuple[str, str | None]
    ] = {}  # name -> (module, name in it; None: the module)
    for node in ast.walk(ast.parse(Path(sys.modules[package].__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                is_module = node.module is None
                source = (module + alias.name, None) if is_module else (module, alias.name)
                sources[alias.name] = source
            if node.level == 1 and node.module:  # package.module, which the import would have set
                sources.setdefault(node.module.partition(".")[0], (module, None))
    missing = renamed(package, old_names or {}, stacklevel=4)

    def __getattr__(name: str) -> Any:
        if name not in sources:
            return missing(name)
        module, attribute = sources[name]
        value = import_module(module, package)
        if attribute is not None:
            value = getattr(value, attribute)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *sources})

    return __getattr__, __dir__


class AfterImport(MetaPathFinder):
    """Calls a function once, directly after a module has been imported for the first time."""

    def __init__(self, module: str, function: Callable[[], None]):
        self.module, self.function = module, function

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.module:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        exec_module = spec.loader.exec_module

        def exec_and_call(module: Any) -> None:
            exec_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.function()

        spec.loader.exec_module = exec_and_call
        return spec


def register_with_diffusers() -> None:
    """Let Diffusers find this package's components, and `DiffusionPipeline` its pipelines.

    Takes effect at once if Diffusers is imported already, else as soon as it is. The names are
    looked up when Diffusers first needs them. The modules are also registered under their full
    names, which older folders have.
    """
    for module, register in (("diffusers", _register), (PIPELINE_LOADER, _prefer_own_pipelines)):
        if module in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, AfterImport(module, register))


def _register() -> None:
    modules = {}
    for module in COMPONENT_MODULES:
        full_name = f"{PACKAGE}.{module}"
        modules |= {full_name: (full_name, None), full_name.replace(".", "_"): (full_name, None)}
    _add_names(import_module("diffusers.pipelines"), modules)
    pipelines = {name: (f"{PACKAGE}.{module}", name) for name, module in PIPELINES.items()}
    _add_names(sys.modules["diffusers"], pipelines)


def _prefer_own_pipelines() -> None:
    """Let Diffusers use this package's class where a model_index.json names the class's copy in
    the folder, `["pipeline", "ClassifierGuidedPipeline"]`; no code of the folder runs then.
    `ModularPipeline` refuses such a folder."""
    loader = sys.modules[PIPELINE_LOADER]
    find_class = loader._get_pipeline_class

    @wraps(find_class)
    def get_pipeline_class(
        cls: type, config: Any = None, *args: Any, class_name: Any = None, **kwargs: Any
    ) -> type:
        name = class_name
        if name is None and kwargs.get("custom_pipeline") is None and config is not None:
            entry = config.get("_class_name")  # where the folder lacks the file, pipeline.py
            name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if not isinstance(name, str) or name not in PIPELINES:
            return find_class(cls, config, *args, class_name=class_name, **kwargs)
        if any(base.__name__ == "ModularPipeline" for base in cls.__mro__):
            raise ValueError(
                f"{cls.__name__}: this is a {name}, which has no modular blocks; load it by "
                "DiffusionPipeline.from_pretrained"
            )
        is_base = cls.__name__ == "DiffusionPipeline"
        return getattr(sys.modules["diffusers"], name) if is_base else cls

    for module in (loader, sys.modules[MODULAR_LOADER]):
        module._get_pipeline_class = get_pipeline_class


def _add_names(module: Any, names: Mapping[str, tuple[str, str | None]]) -> None:
    """Add names to another package's module that are imported at their first use (PEP 562)."""
    previous = vars(module).get("__getattr__")

    def __getattr__(name: str) -> Any:
        if name in names:
            source, attribute = names[name]
            value = import_module(source)
            value = value if attribute is None else getattr(value, attribute)
            setattr(module, name, value)
            return value
        if previous is not None:
            return previous(name)
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    module.__getattr__ = __getattr__
