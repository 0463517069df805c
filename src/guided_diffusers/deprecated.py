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
#: names that got another name, or another module, when theirs moved
RENAMED_WITHIN = {
    ("classifier_losses", "FIGURES"): (f"{PACKAGE}.learning.classifier_losses", "METRICS"),
    ("data", "CaptionedImages"): (f"{PACKAGE}.learning.annotations", "CaptionedImages"),
    ("data", "TargetedImages"): (f"{PACKAGE}.learning.annotations", "TargetedImages"),
    ("data", "SHARD"): (f"{PACKAGE}.learning.data", "SHARD_STRIDE"),
}


def renamed(module: str, names: Mapping[str, str], stacklevel: int = 3) -> Callable[[str], Any]:
    """A module's `__getattr__` that returns, for an old name, what the new name in the module
    is."""

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", f"{module}.{names[name]}", stacklevel)
        return getattr(import_module(module), names[name])

    return __getattr__


class MovedModule(ModuleType):
    """Stands for a module that has moved, and imports it when a name is taken from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # tools that look through all modules don't import it
            raise AttributeError(name)
        old = self.__name__.partition(".")[2]
        target = f"{PACKAGE}.{MOVED[old]}"
        if (old, name) in RENAMED_WITHIN:
            target, name = RENAMED_WITHIN[old, name]
        _warn(self.__name__, target)
        return getattr(import_module(target), name)


def register_moved_modules() -> None:
    """Let `from guided_diffusers.OLD import NAME` work for the modules that moved."""
    for name in MOVED:
        sys.modules[f"{PACKAGE}.{name}"] = MovedModule(f"{PACKAGE}.{name}")


def _warn(old: str, new: str, stacklevel: int = 3) -> None:
    warnings.warn(
        f"{old} is {new} now; the old name goes with the next version",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
