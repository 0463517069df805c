"""Options that several commands share, each written once."""

from __future__ import annotations

import argparse
from typing import Any

SHARED: dict[str, dict[str, Any]] = {
    "--model": {
        "default": "fashion-mnist",
        "help": "a bundled model, a pipeline folder or a Hub id (default: %(default)s)",
    },
    "--revision": {"help": "of a model on the Hub: a branch, a tag or a commit (default: main)"},
    "--split": {"help": "split of the dataset (default: validation or test)"},
    "--image-column": {"help": "image column of the dataset (default: the first with images)"},
    "--label-column": {"help": "label column of the dataset (default: the first with class ids)"},
    "--judge": {
        "metavar": "NETWORK",
        "help": "a classifier of clean images with the same labels that was never used for "
        "guidance: as --features; `none`: no judge",
    },
    "--features": {
        "metavar": "NETWORK",
        "help": "feature network of the distances: inception (needs torch-fidelity; only then is "
        "it an FID), a bundled model (its judge), or the folder or Hub id of a "
        "NoiseAwareClassifier or a transformers vision model (default: the bundled judge)",
    },
    "--seed": {"type": int, "default": 0, "help": "random seed (default: %(default)s)"},
    "--batch-size": {"type": int, "default": 64, "help": "images a batch (default: %(default)s)"},
    "--device": {"help": "cpu, cuda, mps, ... (default: the fastest available)"},
    "--picture": {
        "action": argparse.BooleanOptionalAction,
        "default": True,
        "help": "draw the plots, which needs matplotlib (default: yes)",
    },
    "--quiet": {"action": "store_true", "help": "no progress bars"},
}


def add_shared_option(command: argparse.ArgumentParser, flag: str, **changes: Any) -> None:
    """Add an option of `SHARED` to a command; `changes` replace parts of its definition."""
    command.add_argument(flag, **{**SHARED[flag], **changes})


def add_shared_options(command: argparse.ArgumentParser, *flags: str) -> None:
    """Add options of `SHARED` to a command as they are."""
    for flag in flags:
        add_shared_option(command, flag)


def select_device(name: str | None) -> Any:
    """The `torch.device` called `name`; None: the fastest available."""
    import torch

    if name is not None:
        return torch.device(name)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")
