"""Checks a collected folder before it is published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from ..classifier import NoiseAwareClassifier
from ..clip import NoiseAwareCLIP
from ..weights import check_class_weights, check_weights, saved_variants, weight_files
from . import verify_standalone
from .files import SECRET_VARIABLES, check_files, safetensors_header
from .staging import Model, model_class

OWN_CLASSES = (NoiseAwareClassifier, NoiseAwareCLIP)
TIMEOUT_S = 1800  # of the clean process, in seconds


def check(
    folder: Path,
    model: Model | None = None,
    variant: str | None = None,
    include: Sequence[str] = (),
) -> None:
    """Refuse files that must not be published, and an output that differs without this package.

    Args:
        model: the model of the folder. None: it is loaded.
        include: as in `select_files`; files that match may be code.

    Raises:
        ValueError: naming the problem.
        OSError: for a broken file of weights; the message names it.
    """
    for path in folder.rglob("*.safetensors"):
        safetensors_header(path)
    model = model or model_class(folder).from_pretrained(folder, variant=variant)
    check_published_weights(folder, model)
    check_files(folder, model.code(), include)
    actual = _standalone_output(folder, variant)
    expected = verify_standalone.reference_output(model)
    if not torch.equal(expected, actual):
        same_shape = expected.shape == actual.shape
        largest = (expected - actual).abs().max().item() if same_shape else float("nan")
        raise ValueError(
            f"{folder}: the output differs when loaded without guided-diffusers; the largest "
            f"difference is {largest:.3g}"
        )


def check_published_weights(folder: Path, model: Model) -> None:
    """Refuse weights, in any variant, of which a model in the folder or below lacks some.

    Raises:
        ValueError: naming the file; also for one that isn't loaded.
    """
    modules: dict[Path, Any] = {folder: model}
    if isinstance(model, DiffusionPipeline):
        modules = {folder / name: module for name, module in model.components.items()}
    for config in folder.rglob("config.json"):
        path, loaded = config.parent, set()
        class_name = str(json.loads(config.read_text()).get("_class_name"))
        cls = next((c for c in OWN_CLASSES if c.__name__ == class_name), None)
        cls = cls or getattr(diffusers, class_name, None)
        for variant in saved_variants(path):
            loaded |= set(weight_files(path, variant))
            if isinstance(modules.get(path), torch.nn.Module):
                check_weights(modules[path], path, variant)
            elif cls is not None:  # such as a judge's
                check_class_weights(cls, path, {"variant": variant})
        for file in set(path.glob("*.safetensors")) - loaded if loaded else ():
            raise ValueError(f"{file} isn't loaded: other files have these weights; remove it")


def _standalone_output(folder: Path, variant: str | None) -> torch.Tensor:
    """`reference_output` of the folder in a clean process without this package."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "output.safetensors"
        environment = {}
        for name, value in os.environ.items():
            if not any(word in name for word in SECRET_VARIABLES):
                environment[name] = value
        environment["HF_HOME"] = directory
        environment["HF_MODULES_CACHE"] = str(Path(directory) / "modules")
        environment["HF_HUB_OFFLINE"] = "1"
        arguments = [folder.resolve(), variant or "", str(torch.get_num_threads()), output]
        try:
            run = subprocess.run(
                [sys.executable, verify_standalone.__file__, *arguments],
                env=environment,
                cwd=directory,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"{folder}: no output within {TIMEOUT_S} seconds when loaded without "
                "guided-diffusers"
            ) from error
        if run.returncode:
            *_, reason = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
            raise ValueError(f"{folder} can't be loaded without guided-diffusers: {reason[-2000:]}")
        return load_file(output)["output"]
