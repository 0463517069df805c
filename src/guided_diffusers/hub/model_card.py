"""The card of a model: README.md, made of what its folder holds, for a person to read and for the Hub to index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.logging import get_logger
from huggingface_hub import EvalResult, ModelCardData

from ..classifier import NoiseAwareClassifier
from ..noise import prediction_type
from .files import count_parameters

if TYPE_CHECKING:
    from ..pipeline import ClassifierGuidedPipeline

logger = get_logger(__name__)
MOST_ROWS, MOST_NAMES = 20, 60
RECIPE = {"max_train_steps": "steps", "train_batch_size": "images a step and process", "learning_rate": "learning rate",
          "lr_scheduler": "its schedule", "adam_weight_decay": "weight decay", "mixed_precision": "precision",
          "use_ema": "averaged weights", "random_flip": "mirrored images", "random_shift": "shift in pixels",
          "prediction_type": "prediction", "label_dropout": "label dropout", "objective": "objective", "seed": "seed"}


def write_card(folder: Path, model: ClassifierGuidedPipeline | NoiseAwareClassifier, repo_id: str | None = None,
               license: str | None = None, datasets: Sequence[str] = (), picture: bool = True) -> Path:
    """Write README.md, and where they can be made example.png (if there is none) and accuracy.png, into the folder.

    Args:
        model: that of the folder.
        repo_id: what the snippets load. None: the folder.
        license: of the weights, as the Hub calls it: "apache-2.0", "cc-by-4.0", ... None: "unknown".
        datasets: ids on the Hub of what it was trained on. None given: those that the training's options name.
        picture: draw example.png, a row a label: half a minute for a small model on a CPU.
    """
    figures = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))
               if path.name not in ("model_index.json", "config.json") and ".index." not in path.name}
    figures = {**figures.pop("figures", {}), **figures}
    is_pipeline = not isinstance(model, NoiseAwareClassifier)
    if is_pipeline and picture and not (folder / "example.png").exists():
        draw_example(model, folder / "example.png")
    curves = {name: part["held_out"] for name, part in figures.items()
              if isinstance(part, dict) and any("accuracy" in row for row in part.get("held_out", []))
              and len(part["held_out"]) > 1}
    drawn = bool(curves) and draw_accuracy(curves, folder / "accuracy.png")
    repo_id = repo_id or str(folder)
    ids = list(datasets) or sorted({part["options"]["dataset_name"] for part in figures.values()
                                    if isinstance(part, dict) and (part.get("options") or {}).get("dataset_name")})
    parts = [metadata(repo_id, is_pipeline, license, ids, figures), *introduction(folder, model, repo_id),
             *usage(model, repo_id), *training(figures, ids), *measured(figures, drawn), *limits(model, curves),
             f"The licence of the weights is {license}." if license else "The licence of the weights isn't stated.",
             "The code in this repository is a part of guided-diffusers (Apache-2.0)."]
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def metadata(repo_id: str, is_pipeline: bool, license: str | None, datasets: list[str],
             figures: Mapping[str, Any]) -> str:
    """What the Hub indexes, as YAML between lines."""
    results = []
    for name, part in figures.items():
        rows = part.get("held_out", []) if isinstance(part, dict) else []
        data = datasets[0] if datasets else source_of(part) or "unknown"
        results += [EvalResult(
            task_type="image-classification", task_name="labels of noisy images", dataset_type=data, dataset_name=data,
            dataset_split="test", metric_type="accuracy", metric_value=row["accuracy"],
            metric_name=f"accuracy of {name} at timestep {row['timestep']}") for row in rows if "accuracy" in row]
    name = repo_id.rpartition("/")[2]
    data = ModelCardData(
        library_name="diffusers", pipeline_tag="unconditional-image-generation" if is_pipeline else
        "image-classification", license=license or "unknown", datasets=datasets or None,
        tags=["guided-diffusers", "classifier-guidance", "diffusion"], model_name=name if results else None,
        eval_results=results or None)
    return f"---\n{data.to_yaml()}\n---"


def source_of(part: Any) -> str | None:
    """The dataset that a training's options name."""
    options = part.get("options") if isinstance(part, dict) else None
    where = (options or {}).get("dataset_name") or (options or {}).get("train_data_dir")
    return Path(where).name if where else None


def introduction(folder: Path, model: Any, repo_id: str) -> Iterator[str]:
    yield f"# {repo_id.rpartition('/')[2]}"
    if isinstance(model, NoiseAwareClassifier):
        config = model.config
        size = f"{model.size[0]}x{model.size[1]}"
        names = f" of {len(config.id2label)} labels: {listed(config.id2label.values())}" if config.id2label else ""
        yield (f"A noise-aware classifier{names}. It reads images of {size} pixels and {config.in_channels} "
               f"channel{'s' * (config.in_channels > 1)} that are noised as in diffusion, at any of its "
               f"{config.num_train_timesteps} timesteps, so that its gradient steers a diffusion model to a label "
               f"(Dhariwal & Nichol 2021). {count_parameters(folder) / 1e6:.1f} million parameters.")
        return
    config, names = model.unet.config, model.config.id2label
    size = config.get("sample_size")
    size = f"{size}x{size}" if isinstance(size, int) else "x".join(map(str, size or ("any", "any")))
    what = "pixels" if model.vae is None else "latents"
    yield (f"A diffusion model that generates images of {size} {what}" + (
        f", guided to one of {len(names)} labels: {listed(names.values())}." if names else ".") + (
        " A classifier that understands noise steers the network." if model.classifier is not None else ""))
    if (folder / "example.png").exists():
        yield "![Images that it generated, a row a label](example.png)"
    rows = [[name, type(part).__name__, f"{count_parameters(folder / name) / 1e6:.1f} million"]
            for name, part in model.components.items() if isinstance(part, torch.nn.Module)]
    yield table(["part", "class", "parameters"], rows)
    yield (f"The network predicts {prediction_type(model.scheduler).removesuffix('_prediction')}; it is sampled by "
           f"{type(model.scheduler).__name__}, which can be exchanged. Where a call says nothing else, it takes "
           + ", ".join(f"`{name}={value!r}`" for name, value in model.config.defaults.items()) + ".")


def listed(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")


def usage(model: Any, repo_id: str) -> Iterator[str]:
    """Two snippets that run as they are."""
    yield "## Use"
    if isinstance(model, NoiseAwareClassifier):
        shape = ", ".join(map(str, (1, model.config.in_channels, *model.size)))
        rest = (f"noisy = torch.randn({shape})\n"
                f"logits = classifier(noisy, timestep={model.config.num_train_timesteps - 1}).logits")
        yield "With the package guided-diffusers:"
        yield (f"```python\nimport torch\nfrom guided_diffusers import NoiseAwareClassifier\n\n"
               f'classifier = NoiseAwareClassifier.from_pretrained("{repo_id}")\n{rest}\n```')
        yield ('and to guide a network, `ClassifierGuidedPipeline.from_pretrained("user/network", '
               "classifier=classifier)`. Without the package, by the code in this repository; read it first:")
        yield (f"```python\nimport torch\nfrom diffusers import AutoModel\n\n"
               f'classifier = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)\n{rest}\n```')
        return
    labels = list((model.config.id2label or {}).values())
    unique = next((name for name in labels if labels.count(name) == 1), None)
    label = repr(unique) if unique is not None else "0" if model.num_labels else ""
    rest = f'image = pipeline({label}).images[0]\nimage.save("image.png")'.replace("'", '"')
    yield "With the package guided-diffusers:"
    yield (f"```python\nfrom guided_diffusers import ClassifierGuidedPipeline\n\n"
           f'pipeline = ClassifierGuidedPipeline.from_pretrained("{repo_id}")\n{rest}\n```')
    yield "Without it, by the code in this repository; read it first:"
    yield (f"```python\nfrom diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained(\n"
           f'    "{repo_id}", custom_pipeline="{repo_id}", trust_remote_code=True)\n{rest}\n```')
    if labels or model.num_labels:
        yield ("Labels are names or ids, one or a list; `guidance_scale=0` is the unguided model, more is sharper and "
               "less varied.")


def training(figures: Mapping[str, Any], datasets: list[str]) -> Iterator[str]:
    trained = {name: part["options"] for name, part in figures.items()
               if isinstance(part, dict) and isinstance(part.get("options"), dict)}
    if not trained and not datasets:
        return
    yield "## Training"
    data = sorted({source_of(figures[name]) or "" for name in trained} - {""})
    if datasets or data:
        ids = " and ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets)
        yield f"Trained on {ids or ' and '.join(data)}, by the scripts of guided-diffusers:"
    used = {option: text for option, text in RECIPE.items()
            if any(options.get(option) is not None for options in trained.values())}
    if trained:
        yield table(["", *trained], [[text, *(shown(options.get(option)) for options in trained.values())]
                                     for option, text in used.items()])
        for name, options in trained.items():
            yield (f"<details><summary>All options: {name}</summary>\n\n```json\n{json.dumps(options, indent=2)}\n```\n"
                   "\n</details>")


def measured(figures: Mapping[str, Any], curve: bool) -> Iterator[str]:
    """Every figure that the folder has: numbers, rows, and the command that measured them."""
    shown_parts = [(name, part) for name, part in figures.items() if isinstance(part, dict)]
    if not shown_parts:
        return
    yield "## Figures"
    if curve:
        yield "![Accuracy at each noise level](accuracy.png)"
    for name, part in shown_parts:
        yield f"### {name.replace('_', ' ')}"
        numbers = {key: value for key, value in part.items() if isinstance(value, (int, float, str))
                   and key != "command"}
        if {"step", "images", "held_out"} <= part.keys():
            yield f"After {numbers.pop('step')} steps of training, on {numbers.pop('images')} held-out images:"
        if numbers:
            yield ", ".join(f"{key.replace('_', ' ')}: {shown(value)}" for key, value in numbers.items()) + "."
        for key, rows in part.items():
            if isinstance(rows, dict) and key != "options" and all(isinstance(row, dict) for row in rows.values()):
                rows = [{"": label, **row} for label, row in rows.items()]
            if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
                columns = [column for column in rows[0] if not isinstance(rows[0][column], (list, dict))]
                yield (f"{key.replace('_', ' ')}:\n\n" if key not in ("rows", "held_out") else "") + table(
                    [column.replace("_", " ") for column in columns],
                    [[shown(row.get(column)) for column in columns] for row in rows[:MOST_ROWS]])
        if "command" in part:
            yield f"Measured by `{part['command']}`."


def limits(model: Any, curves: Mapping[str, Any]) -> Iterator[str]:
    yield "## Limits"
    found = []
    if not isinstance(model, NoiseAwareClassifier):
        size = model.unet.config.get("sample_size")
        found.append(f"It was made for one size{f', {size}' if size else ''}, and knows nothing but what its training "
                     "data shows, with their biases.")
        if model.classifier is not None:
            found.append("More guidance makes images more typical and less varied; beyond some scale they get worse.")
            found.append("Labels outside the classifier's are unknown to it.")
    else:
        found.append("It tells its labels apart and nothing else: for any image, also of something else, its "
                     "probabilities add up to one." if model.config.problem_type == "single_label_classification" else
                     "It tells what it was trained on, and nothing else.")
    for name, rows in curves.items():
        best, worst = (pick(rows, key=lambda row: row["timestep"]) for pick in (min, max))
        found.append(f"The accuracy of the {name} falls with the noise: {best['accuracy']:.1%} at timestep "
                     f"{best['timestep']}, {worst['accuracy']:.1%} at {worst['timestep']}.")
    yield "\n".join(f"- {line}" for line in found)


def shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else re.sub(r"([|<>])", r"\\\1", str(value))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_example(pipeline: ClassifierGuidedPipeline, path: Path) -> None:
    """A row a label, at most ten; fewer of large images."""
    from ..sampling import grid, image_generator, save_image

    size = pipeline.unet.config.get("sample_size") or 64
    small = max(size if isinstance(size, (tuple, list)) else [size]) <= 64 and pipeline.vae is None
    columns, most = (5, 10) if small else (2, 4)
    count = pipeline.num_labels or 0
    labels = sorted({i * count // most for i in range(most)}) if count > most else list(range(count))
    steps = min(pipeline.config.defaults["num_inference_steps"], 30)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(max(1, len(labels))):
        one = labels[start : start + 1] or None
        generators = [image_generator(0, start * columns + i) for i in range(columns)]
        images += pipeline(one, num_images_per_label=columns, generator=generators, num_inference_steps=steps).images
    names = pipeline.config.id2label or {}
    save_image(grid(images, [names.get(label, str(label)) for label in labels] or None), path)


def draw_accuracy(curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> bool:
    """Accuracy over the timestep; False without matplotlib, whose picture the table then stands for."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib isn't installed: the card has the accuracies as a table only")
        return False
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for name, rows in curves.items():
        axes.plot([row["timestep"] for row in rows], [row["accuracy"] for row in rows], "o-", markersize=4, label=name)
    axes.set(xlabel="timestep (noisier to the right)", ylabel="accuracy", ylim=(0, 1))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(path, dpi=144, metadata={"Software": None})
    return True
