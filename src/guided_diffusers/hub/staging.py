"""Collects what is published of a model's folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers

from ..classifier import NoiseAwareClassifier
from ..clip import NoiseAwareCLIP
from ..pipeline import ClassifierGuidedPipeline
from ..repository import LIBRARIES
from ..utils import write_json
from .card_metrics import stale_metrics
from .files import is_link_out
from .model_card import is_generated, write_card

Model = ClassifierGuidedPipeline | NoiseAwareClassifier | NoiseAwareCLIP

#: files of training that are not published
IGNORE_PATTERNS = tuple(
    ".* __pycache__ checkpoint-* logs latents samples-*.png curves.png *.partial".split()
)
#: training options that only concern the machine it ran on
LOCAL_OPTIONS = tuple(
    "output_dir logging_dir resume_from_checkpoint report_to progress cpu "
    "dataloader_num_workers latents_cache push_to_hub hub_model_id hub_private".split()
)
#: name of a model's own metrics in figures.json
METRICS_NAMES = {
    ClassifierGuidedPipeline: "unet",
    NoiseAwareClassifier: "classifier",
    NoiseAwareCLIP: "clip",
}


def card(folder: str | Path, repo_id: str | None = None, **options: Any) -> Path:
    """Write the model card of a folder, README.md, and its pictures; `options` as `write_card`."""
    folder = Path(folder)
    return write_card(folder, model_class(folder).from_pretrained(folder), repo_id, **options)


def prepare(
    folder: Path, stage: Path, repo_id: str | None, variant: str | None = None, **card: Any
) -> Model:
    """Collect in `stage` what is published of `folder`; returns the model, loaded from `stage`.

    A README.md that a user wrote or edited is kept; a generated one is written again with the
    options `card`.

    Raises:
        ValueError: for a folder without a pipeline, classifier or CLIP, with components whose code
            can't be published, or with links out of it; or for a license or datasets beside a
            user's README.md.
    """
    cls = model_class(folder)
    for path in folder.rglob("*"):
        if is_link_out(path, folder):
            raise ValueError(
                f"{path} is a link out of the folder and can't be published; `guided-diffusers "
                "pull` downloads a repository as a folder without links"
            )
    if cls is ClassifierGuidedPipeline:
        _check_components(folder)
    ignore = shutil.ignore_patterns(*IGNORE_PATTERNS)
    shutil.copytree(folder, stage, ignore=ignore, copy_function=_link_weights)
    for path in stage.glob("*.py"):  # generated code is written again; `check` refuses all other
        if path.name == "pipeline.py" or path.name.startswith("guided_diffusers_"):
            path.unlink()
    model = cls.from_pretrained(stage, variant=variant)
    model.save_code(stage)
    _remove_stale_metrics(stage, model)
    _merge_metrics(stage, METRICS_NAMES[cls])
    if is_generated(stage / "README.md"):
        write_card(stage, model, repo_id, **card)
    else:
        refuse_card_data(folder / "README.md", card)
    return model


def refuse_card_data(readme: object, card: dict[str, Any]) -> None:
    """Raise a ValueError if `card` has metadata for a README.md that isn't generated."""
    names = [name for name in ("license", "datasets") if card.get(name)]
    if names:
        raise ValueError(
            f"{', '.join(names)}: {readme} was written or edited by a user and is kept; set it in "
            "that file"
        )


def model_class(folder: Path) -> type[Model]:
    """Class of the model in a folder.

    Raises:
        ValueError: if it is neither a pipeline nor a classifier nor a CLIP.
    """
    if (folder / "model_index.json").is_file():
        return ClassifierGuidedPipeline
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} contains neither a pipeline (model_index.json) nor a classifier or CLIP "
            "(config.json)"
        )
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    for cls in (NoiseAwareClassifier, NoiseAwareCLIP):
        if name == cls.__name__:
            return cls
    raise ValueError(
        f"{folder} contains a {name}; a ClassifierGuidedPipeline, a NoiseAwareClassifier or a "
        "NoiseAwareCLIP is allowed"
    )


def _check_components(folder: Path) -> None:
    """Refuse a pipeline with a component of a class that users can't import."""
    index = json.loads((folder / "model_index.json").read_text())
    for name in ClassifierGuidedPipeline._get_signature_keys(ClassifierGuidedPipeline)[0]:
        library, cls = index.get(name) or (None, None)
        known = library in (None, *LIBRARIES) or hasattr(diffusers.pipelines, library)
        if not known:
            raise ValueError(
                f"{folder}: {name} is {library}.{cls}, whose code can't be published; a class of "
                f"{', '.join(LIBRARIES)} or guided_diffusers is allowed"
            )


def _link_weights(source: str, target: str) -> None:
    """Hard link of weights, which are never modified; a copy of any other file."""
    if source.endswith(".safetensors"):
        try:
            return os.link(os.path.realpath(source), target)
        except OSError:
            pass
    shutil.copy(source, target)


def _remove_stale_metrics(stage: Path, model: Model) -> None:
    """Remove metrics of other weights than those in `stage`, with a picture of the same name."""
    stale, path = stale_metrics(stage, model), stage / "figures.json"
    for name in stale:
        for file in (f"{name}.json", f"{name}.png"):
            (stage / file).unlink(missing_ok=True)
    if stale and path.exists():
        figures = json.loads(path.read_text())
        write_json({name: figures[name] for name in figures if name not in stale}, path)


def _merge_metrics(stage: Path, name: str) -> None:
    """Move metrics.json and options.json, which training writes, into figures.json."""
    metrics_path, options_path = stage / "metrics.json", stage / "options.json"
    merged_path = stage / "figures.json"
    merged: dict[str, Any] = {}
    if metrics_path.exists():
        merged[name] = json.loads(metrics_path.read_text())
        if options_path.exists():
            merged[name]["options"] = json.loads(options_path.read_text())
    if merged_path.exists():
        merged |= json.loads(merged_path.read_text())
    for metrics in merged.values():
        if isinstance(metrics, dict) and isinstance(metrics.get("options"), dict):
            metrics["options"] = _portable_options(metrics["options"])
    if merged:
        write_json(merged, merged_path)
    metrics_path.unlink(missing_ok=True)
    options_path.unlink(missing_ok=True)


def _portable_options(options: dict[str, Any]) -> dict[str, Any]:
    """Training options without those of this machine; of absolute paths only the name."""
    portable = {}
    for name, value in options.items():
        if name in LOCAL_OPTIONS:
            continue
        is_path = isinstance(value, str) and Path(value).is_absolute()
        portable[name] = Path(value).name if is_path else value
    return portable
