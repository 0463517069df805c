"""Names and modules of earlier versions, with a DeprecationWarning, for one release."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

PACKAGE = __name__.partition(".")[0]
#: module of an earlier version -> its place now
MOVED = {
    "classifier_losses": "learning.classifier_losses",
    "data": "learning.data",
    "diagnostics": "diagnosis.steps",
    "losses": "learning.losses",
    "metrics": "evaluation.metrics",
    "outputs": "utils",
    "perceptual": "image_guidance",
    "schedulers": "noise",
}


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that returns, for an old name, what the new name in the module
    is."""

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", f"{module}.{names[name]}")
        return getattr(import_module(module), names[name])

    return __getattr__


class MovedModule(ModuleType):
    """Stands for a module that has moved, and imports it when a name is taken from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # tools that look through all modules don't import it
            raise AttributeError(name)
        target = f"{PACKAGE}.{MOVED[self.__name__.partition('.')[2]]}"
        _warn(self.__name__, target)
        return getattr(import_module(target), name)


def register_moved_modules() -> None:
    """Let `from guided_diffusers.OLD import NAME` work for the modules that moved."""
    for name in MOVED:
        sys.modules[f"{PACKAGE}.{name}"] = MovedModule(f"{PACKAGE}.{name}")


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is {new} now; the old name goes with the next version",
        DeprecationWarning,
        stacklevel=3,
    )
