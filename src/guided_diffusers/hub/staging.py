"""Collects what is published of a model's folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
from diffusers.utils.logging import get_logger

from ..checks import read_json
from ..classifier import NoiseAwareClassifier
from ..clip import NoiseAwareCLIP
from ..files import check_writable, write_json
from ..pipeline import ClassifierGuidedPipeline
from ..repository import LIBRARIES
from ..text import printable
from .card_metrics import stale_metrics
from .files import check_files, is_generated_code, select_files
from .model_card import is_generated, write_card
from .target import check_datasets, check_id

Model = ClassifierGuidedPipeline | NoiseAwareClassifier | NoiseAwareCLIP

logger = get_logger(__name__)
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
    if repo_id is not None:
        check_id(repo_id, "repo", "user/model")
    check_datasets(options.get("datasets") or ())
    check_writable(folder / "README.md", "folder")
    return write_card(folder, model_class(folder).from_pretrained(folder), repo_id, **options)


def prepare(
    folder: Path,
    stage: Path,
    repo_id: str | None,
    variant: str | None = None,
    include: Sequence[str] = (),
    **card: Any,
) -> Model:
    """Collect in `stage` what is published of `folder`; returns the model, loaded from `stage`.

    A README.md that a user wrote or edited is kept; a generated one is written again with the
    options `card`.

    Raises:
        ValueError: as `collect`; or for a license or datasets beside a user's README.md.
    """
    collect(folder, stage, include)
    return complete(folder, stage, repo_id, variant, **card)


def collect(folder: Path, stage: Path, include: Sequence[str] = ()) -> None:
    """Copy to `stage` the files of `folder` that are published, except generated code.

    What training left beside the model is left out, with a warning.

    Args:
        include: as in `select_files`.

    Raises:
        ValueError: for a folder without a pipeline, classifier or CLIP, or with components whose
            code can't be published; as `select_files` and `check_files`.
    """
    cls = model_class(folder)
    names, left_out = select_files(folder, model_places(folder, cls), include)
    if cls is ClassifierGuidedPipeline:
        _check_components(folder)
    if left_out:
        logger.warning(printable(f"not published: {', '.join(left_out)} in {folder}"))
    for name in names:
        if not is_generated_code(Path(name)):  # which is written again
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            _link_weights(folder / name, stage / name)
    _merge_metrics(stage, METRICS_NAMES[cls])
    check_files(stage, {}, include)


def is_block(folder: Path) -> bool:
    """Whether it is the folder of a block of Modular Diffusers."""
    return (folder / "modular_config.json").is_file()


def collect_block(folder: Path, stage: Path, include: Sequence[str] = ()) -> None:
    """As `collect`, of a block's folder, with its code, which is written again.

    Raises:
        ValueError: for another block than this package's; as `select_files` and `check_files`.
    """
    from ..modular import BLOCK_FILE, ClassifierGuidanceBlock

    name = read_json(folder / "modular_config.json").get("_class_name")
    if name != ClassifierGuidanceBlock.__name__:
        raise ValueError(
            f"{folder} contains the block {name}; {ClassifierGuidanceBlock.__name__} is allowed, "
            "others have Diffusers' push_to_hub"
        )
    names, _ = select_files(folder, {"."}, include)
    stage.mkdir(parents=True)
    for name in names:
        if not is_generated_code(Path(name)):
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, stage / name)
    ClassifierGuidanceBlock().save_pretrained(stage)
    code = f"{BLOCK_FILE}.py"
    check_files(stage, {code: (stage / code).read_text()}, include)


def complete(
    folder: Path, stage: Path, repo_id: str | None, variant: str | None = None, **card: Any
) -> Model:
    """Add the code and the card to the files that `collect` copied; arguments as `prepare`."""
    generated = is_generated(stage / "README.md")
    if not generated:
        refuse_card_data(folder / "README.md", card)
    model = model_class(stage).from_pretrained(stage, variant=variant)
    model.save_code(stage)
    _remove_stale_metrics(stage, model)
    if generated:
        write_card(stage, model, repo_id, **card)
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
    name = read_json(folder / "config.json").get("_class_name")
    for cls in (NoiseAwareClassifier, NoiseAwareCLIP):
        if name == cls.__name__:
            return cls
    raise ValueError(
        f"{folder} contains a {name}; a ClassifierGuidedPipeline, a NoiseAwareClassifier or a "
        "NoiseAwareCLIP is allowed"
    )


def model_places(folder: Path, cls: type[Model]) -> set[str]:
    """The folders, as paths in the model's folder, in which the model has files."""
    names = {".", "tokenizer"}
    if cls is ClassifierGuidedPipeline:
        index = read_json(folder / "model_index.json")
        names = {".", *(name for name, entry in index.items() if isinstance(entry, list))}
        names.discard("_class_name")
        for path in folder.glob("*/config.json"):  # a judge, or a CLIP, beside the pipeline
            with suppress(ValueError):
                model_class(path.parent)
                names |= {path.parent.name, f"{path.parent.name}/tokenizer"}
    return names


def _check_components(folder: Path) -> None:
    """Refuse a pipeline with a component of a class that users can't import."""
    index = read_json(folder / "model_index.json")
    for name in ClassifierGuidedPipeline._get_signature_keys(ClassifierGuidedPipeline)[0]:
        library, cls = index.get(name) or (None, None)
        known = library in (None, *LIBRARIES) or hasattr(diffusers.pipelines, library)
        if not known:
            raise ValueError(
                f"{folder}: {name} is {library}.{cls}, whose code can't be published; a class of "
                f"{', '.join(LIBRARIES)} or guided_diffusers is allowed"
            )


def _link_weights(source: Path, target: Path) -> None:
    """Hard link of weights, which are never modified; a copy of any other file."""
    if source.suffix == ".safetensors":
        with suppress(OSError):
            return os.link(os.path.realpath(source), target)
    shutil.copy(source, target)


def training_metrics(folder: Path, name: str) -> dict[str, Any]:
    """{name: metrics} of the figures.json of a folder, and of what a training wrote into it.

    Args:
        name: what the training's metrics are called, as in `METRICS_NAMES`.
    """
    merged: dict[str, Any] = {}
    if (folder / "metrics.json").exists():
        merged[name] = read_json(folder / "metrics.json")
        if (folder / "options.json").exists():
            merged[name]["options"] = read_json(folder / "options.json")
    if (folder / "figures.json").exists():
        merged |= read_json(folder / "figures.json")
    for metrics in merged.values():
        if isinstance(metrics, dict) and isinstance(metrics.get("options"), dict):
            metrics["options"] = _portable_options(metrics["options"])
    return merged


def _remove_stale_metrics(stage: Path, model: Model) -> None:
    """Remove metrics of other weights than those in `stage`, with a picture of the same name."""
    stale, path = stale_metrics(stage, model), stage / "figures.json"
    for name in stale:
        for file in (f"{name}.json", f"{name}.png"):
            (stage / file).unlink(missing_ok=True)
    if stale and path.exists():
        figures = read_json(path)
        write_json({name: figures[name] for name in figures if name not in stale}, path)


def _merge_metrics(stage: Path, name: str) -> None:
    """Move metrics.json and options.json, which training writes, into figures.json."""
    if merged := training_metrics(stage, name):
        write_json(merged, stage / "figures.json")
    for file in ("metrics.json", "options.json"):
        (stage / file).unlink(missing_ok=True)


def _portable_options(options: dict[str, Any]) -> dict[str, Any]:
    """Training options without those of this machine; of absolute paths only the name."""
    portable = {}
    for name, value in options.items():
        if name in LOCAL_OPTIONS:
            continue
        is_path = isinstance(value, str) and Path(value).is_absolute()
        portable[name] = Path(value).name if is_path else value
    return portable
