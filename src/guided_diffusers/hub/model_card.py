"""The model card, README.md: written from a template and from what the model's folder contains."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..arguments import DEFAULTS
from ..classifier import NoiseAwareClassifier
from ..clip import NoiseAwareCLIP
from ..files import aside
from ..noise import prediction_type
from ..text import code_literal, markdown, markdown_code, markdown_table, printable
from .card_metrics import (
    GUIDED_DISTANCES,
    Metrics,
    Row,
    cell,
    guided_rows,
    is_number,
    level_rows,
    read_metrics,
    sections,
    stale_metrics,
    training_options,
    words,
)
from .charts import draw_example, draw_guided, draw_levels
from .eval_results import write_eval_results
from .files import count_parameters

if TYPE_CHECKING:
    from ..pipeline import ClassifierGuidedPipeline

    Model = ClassifierGuidedPipeline | NoiseAwareClassifier | NoiseAwareCLIP

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"
DATASETS_URL = "https://huggingface.co/datasets"
LEVELS_PICTURE = "figure-levels.png"
MAX_LABELS = 60
#: last line of a generated card, with a digest of the text before it
MARK = (
    "\n<!-- guided-diffusers card {}: written again with the model unless this file is edited -->\n"
)
MARK_PATTERN = re.compile(r"\n<!-- guided-diffusers card (\w+): [^\n]*-->\n\Z")
TASKS = {
    "pipeline": "unconditional-image-generation",
    "classifier": "image-classification",
    "clip": "zero-shot-image-classification",
}
#: training options in the card's table, and their names there
RECIPE = {
    "max_train_steps": "training steps",
    "train_batch_size": "batch size per process",
    "learning_rate": "learning rate",
    "lr_scheduler": "learning rate schedule",
    "adam_weight_decay": "weight decay",
    "mixed_precision": "mixed precision",
    "use_ema": "EMA of the weights",
    "random_flip": "random flips",
    "random_shift": "random shift (pixels)",
    "random_scale": "random scale",
    "prediction_type": "prediction type",
    "label_dropout": "label dropout",
    "objective": "objective",
    "seed": "seed",
}


def write_card(
    folder: Path,
    model: Model,
    repo_id: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    picture: bool = True,
) -> Path:
    """Write README.md, the plots figure-*.png, example.png if it is missing, and, of metrics on a
    dataset of the Hub, `.eval_results`; returns the path.

    Args:
        model: the model in the folder.
        repo_id: what the card's examples load. None: the folder.
        license: of the weights, as the Hub names it: "apache-2.0", "cc-by-4.0", ... None: the
            license in the existing card, else "unknown".
        datasets: the Hub's ids of the training data. Empty: those in the existing card, else those
            in the training options.
        picture: draw example.png; half a minute for a small model on a CPU.

    Raises:
        FileExistsError: if a user wrote or edited README.md.
    """
    path = folder / "README.md"
    if not is_generated(path):
        raise FileExistsError(
            f"{path} was written or edited by a user and is not overwritten; move it away first"
        )
    existing = ModelCard.load(path).data if path.exists() else ModelCardData()
    if existing.license != "unknown":
        license = license or existing.license
    stale = stale_metrics(folder, model)
    metrics = {name: entry for name, entry in read_metrics(folder).items() if name not in stale}
    datasets = list(datasets or existing.datasets or _trained_datasets(metrics))
    if picture and isinstance(model, DiffusionPipeline) and not (folder / "example.png").exists():
        draw_example(model, folder / "example.png")
    levels, guided = level_rows(metrics), guided_rows(metrics)
    has_levels = draw_levels(levels, folder / LEVELS_PICTURE)
    pictures = {}
    for name, rows in guided.items():
        file = f"figure-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[:100]}.png"
        if file not in pictures.values() and draw_guided(rows, folder / file):
            pictures[name] = file
    repo_id = repo_id or str(folder)
    generated = ModelCard.from_template(
        card_data(repo_id, model, license, datasets, metrics),
        str(TEMPLATE),
        name=markdown(repo_id.rpartition("/")[2]),
        repo_id=code_literal(repo_id),
        license=license and markdown(license),
        markdown=markdown,
        markdown_code=markdown_code,
        levels_picture=LEVELS_PICTURE if has_levels else None,
        sections=sections(metrics, pictures),
        accuracies=accuracy_ranges(levels),
        **describe_training(metrics, datasets),
        **describe_model(folder, model),
    )
    write_eval_results(folder, evaluation_results(metrics, datasets) if datasets else ())
    text = f"{generated}\n"
    with aside(path) as partial:
        partial.write_text(text + MARK.format(digest(text)))
    return path


def is_generated(path: Path) -> bool:
    """Whether the card may be written: it is missing, or was generated and not edited since."""
    if not path.exists():
        return True
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error.reason}); save it as UTF-8") from None
    mark = MARK_PATTERN.search(text)
    return mark is not None and mark[1] == digest(text[: mark.start()])


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- metadata


def card_data(
    repo_id: str, model: Model, license: str | None, datasets: list[str], metrics: Metrics
) -> ModelCardData:
    """The card's metadata, which the Hub indexes."""
    results = evaluation_results(metrics, datasets)
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASKS[model_kind(model)],
        license=printable(license or "unknown"),
        datasets=[printable(name) for name in datasets] or None,
        tags=["guided-diffusers", "classifier-guidance", "diffusion"],
        model_name=printable(repo_id.rpartition("/")[2]) if results else None,
        eval_results=results or None,
    )


def evaluation_results(metrics: Metrics, datasets: list[str]) -> list[EvalResult]:
    """Metrics at each noise level and of guided images, as the Hub lists them."""
    labels_task = ("image-classification", "labels of noisy images")
    images_task = ("unconditional-image-generation", "guided images")
    names = [*datasets, *filter(None, map(dataset_name, metrics.values())), "unknown"]
    results: list[EvalResult] = []

    def add(task: tuple[str, str], part: str, row: Row, condition: str, *keys: str) -> None:
        dataset = printable(names[0] if datasets else dataset_name(metrics[part]) or names[0])
        for key in keys:
            if is_number(row.get(key)):
                results.append(
                    EvalResult(
                        task_type=task[0],
                        task_name=task[1],
                        dataset_type=dataset,
                        dataset_name=dataset,
                        dataset_split="test",
                        metric_type=key,
                        metric_value=round(row[key], 5),
                        metric_name=printable(f"{words(key)} of {part}, {condition}"),
                    )
                )

    for part, rows in level_rows(metrics).items():
        for row in rows:
            timestep = f"timestep {row['timestep']:g}"
            add(labels_task, part, row, timestep, "accuracy", "zero_shot", "ece")
    for part, rows in guided_rows(metrics).items():
        for row in rows:
            add(images_task, part, row, row["guidance"], "agreement", *GUIDED_DISTANCES)
    return results


def dataset_name(entry: Any) -> str | None:
    """Name of the training data in the options of a training's metrics."""
    options = (entry.get("options") if isinstance(entry, dict) else None) or {}
    source = options.get("dataset_name") or options.get("train_data_dir")
    return Path(source).name if source else None


def _trained_datasets(metrics: Metrics) -> list[str]:
    """The Hub's ids of the training data in the training options."""
    names = {options.get("dataset_name") for options in training_options(metrics).values()}
    return sorted(names - {None})


# ---------------------------------------------------------------- variables of the template


def model_kind(model: Model) -> str:
    if isinstance(model, DiffusionPipeline):
        return "pipeline"
    return "classifier" if isinstance(model, NoiseAwareClassifier) else "clip"


def describe_model(folder: Path, model: Any) -> dict[str, Any]:
    if isinstance(model, DiffusionPipeline):
        return _describe_pipeline(folder, model)
    kind = model_kind(model)
    encoder = model if kind == "classifier" else model.image_encoder
    labels = list((encoder.config.id2label or {}).values()) if kind == "classifier" else []
    last_timestep = model.config.num_train_timesteps - 1
    shape = ", ".join(map(str, (1, encoder.config.in_channels, *encoder.size)))
    call = f"noisy, timestep = torch.randn({shape}), {last_timestep}\n"
    if kind == "classifier":
        call += "logits = model(noisy, timestep).logits"
    else:
        call += f"texts = {_encoded_captions(model)}\n"
        call += "cosines = model.encode_image(noisy, timestep) @ texts.T"
    return {
        "kind": kind,
        "class_name": type(model).__name__,
        "labels": labels,
        "label_list": listed(labels),
        "single_label": model.config.get("problem_type") == "single_label_classification",
        "size": "x".join(map(str, encoder.size)),
        "channels": encoder.config.in_channels,
        "num_train_timesteps": model.config.num_train_timesteps,
        "parameters": millions(folder),
        "call": call,
    }


def _describe_pipeline(folder: Path, pipeline: ClassifierGuidedPipeline) -> dict[str, Any]:
    labels = list((pipeline.config.id2label or {}).values())
    unique = [label for label in labels if labels.count(label) == 1]
    if unique:
        label = code_literal(unique[0])
    else:
        label = "0" if pipeline.num_labels else ""
    components = []
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            components.append([name, type(component).__name__, millions(folder / name)])
    size = pipeline.unet.config.get("sample_size") or "any"
    defaults = pipeline.config.defaults
    return {
        "kind": "pipeline",
        "labels": labels,
        "label_list": listed(labels),
        "label": label,
        "size": "x".join(map(str, size if isinstance(size, (list, tuple)) else (size, size))),
        "latent": pipeline.vae is not None,
        "has_classifier": pipeline.classifier is not None,
        "has_example": (folder / "example.png").exists(),
        "components_table": markdown_table(["component", "class", "parameters"], components),
        "prediction": markdown(prediction_type(pipeline.scheduler).removesuffix("_prediction")),
        "scheduler": type(pipeline.scheduler).__name__,
        "defaults": _arguments({name: defaults[name] for name in DEFAULTS}),
        "modes": {mode: _arguments(preset) for mode, preset in defaults.get("modes", {}).items()},
    }


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(markdown_code(f"{name}={value!r}") for name, value in values.items())


def _encoded_captions(clip: NoiseAwareCLIP) -> str:
    """An expression for the embeddings of two captions, of words that the tokenizer knows."""
    if clip.tokenizer is None:
        config = clip.text_encoder.config
        return f"model.encode_text(torch.tensor([[{config.bos_token_id}, {config.eos_token_id}]]))"
    known = sorted(word for word in clip.tokenizer.get_vocab() if word.isascii() and word.isalpha())
    for captions in (["a photo of a cat", "a photo of a dog"], [*known[-1:], *known[:1]]):
        try:
            clip.encode_prompts(captions)
        except ValueError:  # an unknown word
            continue
        return f"model.encode_prompts({json.dumps(captions)})"
    raise ValueError("the tokenizer knows no word")


def describe_training(metrics: Metrics, datasets: Sequence[str]) -> dict[str, Any]:
    trained = training_options(metrics)
    links = [f"[{markdown(name)}]({DATASETS_URL}/{quote(name)})" for name in datasets]
    names = sorted({dataset_name(metrics[part]) for part in trained} - {None})
    names = [markdown(name) for name in names]
    rows = []
    for option, title in RECIPE.items():
        values = [options.get(option) for options in trained.values()]
        if any(value is not None for value in values):
            rows.append([title, *map(cell, values)])
    return {
        "trained_on": " and ".join(links or names),
        "recipe_table": markdown_table(["", *map(markdown, trained)], rows) if trained else "",
        "training_options": {
            printable(part): json.dumps(options, indent=2) for part, options in trained.items()
        },
    }


def accuracy_ranges(levels: dict[str, list[Row]]) -> list[str]:
    """Sentences with the accuracies at the lowest and the highest noise level."""
    sentences = []
    for name, rows in levels.items():
        for key, title in (("accuracy", "Accuracy"), ("zero_shot", "Zero-shot accuracy")):
            measured = [row for row in rows if row.get(key) is not None]
            if len(measured) > 1:
                first, last = measured[0], measured[-1]
                sentences.append(
                    f"{title} of {markdown(name)}, from low to high noise: {first[key]:.1%} at timestep "
                    f"{first['timestep']:g}, {last[key]:.1%} at {last['timestep']:g}."
                )
    return sentences


def millions(folder: Path) -> str:
    return f"{count_parameters(folder) / 1e6:.1f} million"


def listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > MAX_LABELS else ""
    return ", ".join(markdown(name) for name in names[:MAX_LABELS]) + more
