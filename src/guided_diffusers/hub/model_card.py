"""The card of a model: README.md, made of what its folder holds, for a person to read and for the Hub to index."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..classifier import NoiseAwareClassifier
from ..clip import NoiseAwareCLIP
from ..diagnosis import COLUMNS
from ..noise import prediction_type
from .charts import draw_guided, draw_levels, guided_rows, level_rows
from .files import count_parameters

if TYPE_CHECKING:
    from ..pipeline import ClassifierGuidedPipeline

    Model = ClassifierGuidedPipeline | NoiseAwareClassifier | NoiseAwareCLIP

MOST_ROWS, MOST_NAMES = 20, 60
MARK = "\n<!-- guided-diffusers card {}: made anew with the model as long as nobody edits this file -->\n"
TAGS = {
    "ClassifierGuidedPipeline": "unconditional-image-generation",
    "NoiseAwareClassifier": "image-classification",
    "NoiseAwareCLIP": "zero-shot-image-classification",
}
HIDDEN = (
    "made_of",
    "options",
    "command",
    "verdict",
    "settings",
    "mismatches",
)  # of figures: not numbers to show
RECIPE = {
    "max_train_steps": "steps",
    "train_batch_size": "images a step and process",
    "learning_rate": "learning rate",
    "lr_scheduler": "its schedule",
    "adam_weight_decay": "weight decay",
    "mixed_precision": "precision",
    "use_ema": "averaged weights",
    "random_flip": "mirrored images",
    "random_shift": "shift in pixels",
    "prediction_type": "prediction",
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
    """Write README.md, and the pictures that can be made: example.png (if there is none), figure-*.png.

    Args:
        model: that of the folder.
        repo_id: what the snippets load. None: the folder.
        license: of the weights, as the Hub calls it: "apache-2.0", "cc-by-4.0", ... None: that of the card which is
            there, else "unknown".
        datasets: ids on the Hub of what it was trained on. None given: those of the card which is there, else those
            that the training's options name.
        picture: draw example.png, a row a label: half a minute for a small model on a CPU.

    Raises:
        FileExistsError: if there is a README.md that a person wrote or edited.
    """
    path = folder / "README.md"
    if not is_ours(path):
        raise FileExistsError(
            f"{path} was written or edited by a person; it isn't overwritten: move it away first"
        )
    old = ModelCard.load(path).data if path.exists() else ModelCardData()
    license = license or (old.license if old.license != "unknown" else None)
    figures = {
        path.stem: json.loads(path.read_text())
        for path in sorted(folder.glob("*.json"))
        if path.name not in ("model_index.json", "config.json") and ".index." not in path.name
    }
    figures = {**figures.pop("figures", {}), **figures}
    if isinstance(model, DiffusionPipeline) and picture and not (folder / "example.png").exists():
        draw_example(model, folder / "example.png")
    levels, guided = level_rows(figures), guided_rows(figures)
    pictures = {"levels": draw_levels(levels, folder / "figure-levels.png")} | {
        name: draw_guided(rows, folder / f"figure-{name}.png") for name, rows in guided.items()
    }
    repo_id = repo_id or str(folder)
    ids = (
        list(datasets)
        or list(old.datasets or ())
        or sorted(
            {
                part["options"]["dataset_name"]
                for part in figures.values()
                if isinstance(part, dict) and (part.get("options") or {}).get("dataset_name")
            }
        )
    )
    parts = [
        metadata(repo_id, model, license, ids, figures),
        *introduction(folder, model, repo_id),
        *usage(model, repo_id),
        *training(figures, ids),
        *measured(figures, {name for name, drawn in pictures.items() if drawn}),
        *limits(model, levels),
        f"The licence of the weights is {license}."
        if license
        else "The licence of the weights isn't stated.",
        "The code in this repository is a part of guided-diffusers (Apache-2.0).",
    ]
    text = "\n\n".join(parts) + "\n"
    aside = path.with_name(".README.md")
    aside.write_text(text + MARK.format(digest(text)))
    os.replace(aside, path)
    return path


def is_ours(path: Path) -> bool:
    """Whether a card may be made anew: there is none, or nobody touched it since it was made."""
    if not path.exists():
        return True
    text, _, mark = path.read_text().rpartition(MARK.partition("{")[0])
    return bool(mark) and MARK.format(digest(text)).endswith(mark)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def metadata(
    repo_id: str, model: Model, license: str | None, datasets: list[str], figures: Mapping[str, Any]
) -> str:
    """What the Hub indexes, as YAML between lines."""
    kind = next(
        tag for cls, tag in TAGS.items() if cls in [base.__name__ for base in type(model).__mro__]
    )
    results: list[EvalResult] = []
    known = [*datasets, *filter(None, map(source_of, figures.values())), "unknown"]

    def add(part: str, task: str, task_name: str, words: str, metric: str, value: float) -> None:
        data = known[0] if datasets else source_of(figures[part]) or known[0]
        results.append(
            EvalResult(
                task_type=task,
                task_name=task_name,
                dataset_type=data,
                dataset_name=data,
                dataset_split="test",
                metric_type=metric,
                metric_value=round(value, 5),
                metric_name=f"{metric.replace('_', ' ')} of {part}, {words}",
            )
        )

    for part, rows in level_rows(figures).items():
        for row in rows:
            for metric in ("accuracy", "zero_shot", "ece"):
                if metric in row:
                    add(
                        part,
                        "image-classification",
                        "labels of noisy images",
                        f"noise of timestep {row['timestep']:g}",
                        metric,
                        row[metric],
                    )
    for part, rows in guided_rows(figures).items():
        for row in rows:
            for metric in ("agreement", "frechet_distance"):
                if isinstance(row.get(metric), (int, float)):
                    add(
                        part,
                        "unconditional-image-generation",
                        "guided images",
                        row["guidance"],
                        metric,
                        row[metric],
                    )
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=kind,
        license=license or "unknown",
        datasets=datasets or None,
        tags=["guided-diffusers", "classifier-guidance", "diffusion"],
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def source_of(part: Any) -> str | None:
    """The dataset that a training's options name."""
    options = part.get("options") if isinstance(part, dict) else None
    where = (options or {}).get("dataset_name") or (options or {}).get("train_data_dir")
    return Path(where).name if where else None


def introduction(folder: Path, model: Any, repo_id: str) -> Iterator[str]:
    yield f"# {repo_id.rpartition('/')[2]}"
    size = (
        "{}x{} pixels".format(*size_of(model)) if not isinstance(model, DiffusionPipeline) else ""
    )
    if isinstance(model, NoiseAwareClassifier):
        names = model.config.id2label
        of = f" of {len(names)} labels: {listed(names.values())}" if names else ""
        yield (
            f"A noise-aware classifier{of}. It reads images of {size} and {channels_of(model)} that are noised as "
            f"in diffusion, at any of its {model.config.num_train_timesteps} timesteps, so that its gradient steers "
            f"a diffusion model to a label (Dhariwal & Nichol 2021). {millions(folder)} parameters."
        )
        return
    if isinstance(model, NoiseAwareCLIP):
        yield (
            f"A noise-aware CLIP: it says how well a caption fits an image of {size} and {channels_of(model)} that "
            f"is noised as in diffusion, at any of its {model.config.num_train_timesteps} timesteps, so that its "
            f"gradient steers a diffusion model to a caption (Nichol et al. 2021, GLIDE). {millions(folder)} "
            "parameters."
        )
        return
    config, names = model.unet.config, model.config.id2label
    size = config.get("sample_size")
    size = f"{size}x{size}" if isinstance(size, int) else "x".join(map(str, size or ("any", "any")))
    what = "pixels" if model.vae is None else "latents"
    yield (
        f"A diffusion model that generates images of {size} {what}"
        + (f", guided to one of {len(names)} labels: {listed(names.values())}." if names else ".")
        + (
            " A classifier that understands noise steers the network."
            if model.classifier is not None
            else ""
        )
    )
    if (folder / "example.png").exists():
        yield "![Images that it generated, a row a label](example.png)"
    rows = [
        [name, type(part).__name__, millions(folder / name)]
        for name, part in model.components.items()
        if isinstance(part, torch.nn.Module)
    ]
    yield table(["part", "class", "parameters"], rows)
    yield (
        f"The network predicts {prediction_type(model.scheduler).removesuffix('_prediction')}; it is sampled by "
        f"{type(model.scheduler).__name__}, which can be exchanged. Where a call says nothing else, it takes "
        + ", ".join(f"`{name}={value!r}`" for name, value in model.config.defaults.items())
        + "."
    )


def size_of(model: NoiseAwareClassifier | NoiseAwareCLIP) -> tuple[int, int]:
    return model.size if isinstance(model, NoiseAwareClassifier) else model.image_encoder.size


def channels_of(model: NoiseAwareClassifier | NoiseAwareCLIP) -> str:
    count = (
        model if isinstance(model, NoiseAwareClassifier) else model.image_encoder
    ).config.in_channels
    return f"{count} channel{'s' * (count > 1)}"


def millions(folder: Path) -> str:
    return f"{count_parameters(folder) / 1e6:.1f} million"


def listed(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:MOST_NAMES]) + (", ..." if len(names) > MOST_NAMES else "")


def usage(model: Any, repo_id: str) -> Iterator[str]:
    """Two snippets that run as they are."""
    yield "## Use"
    if not isinstance(model, DiffusionPipeline):
        name = type(model).__name__
        encoder = model if isinstance(model, NoiseAwareClassifier) else model.image_encoder
        shape = ", ".join(map(str, (1, encoder.config.in_channels, *encoder.size)))
        call = (
            "logits = model(noisy, timestep).logits"
            if encoder is model
            else f"texts = {captions_of(model)}\ncosines = model.encode_image(noisy, timestep) @ texts.T"
        )
        rest = f"noisy, timestep = torch.randn({shape}), {model.config.num_train_timesteps - 1}\n{call}"
        guides = (
            '`ClassifierGuidedPipeline.from_pretrained("user/network", classifier=model)`'
            if encoder is model
            else '`NoiseAwareCLIPGuidance(model, "a caption")`'
        )
        yield "With the package guided-diffusers:"
        yield (
            f"```python\nimport torch\nfrom guided_diffusers import {name}\n\n"
            f'model = {name}.from_pretrained("{repo_id}")\n{rest}\n```'
        )
        yield f"and {guides} guides a network. Without the package, by the code in this repository; read it first:"
        yield (
            f"```python\nimport torch\nfrom diffusers import AutoModel\n\n"
            f'model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True)\n{rest}\n```'
        )
        return
    labels = list((model.config.id2label or {}).values())
    unique = next((name for name in labels if labels.count(name) == 1), None)
    label = (
        json.dumps(unique, ensure_ascii=False)
        if unique is not None
        else "0"
        if model.num_labels
        else ""
    )
    rest = f'image = pipeline({label}).images[0]\nimage.save("image.png")'
    yield "With the package guided-diffusers:"
    yield (
        f"```python\nfrom guided_diffusers import ClassifierGuidedPipeline\n\n"
        f'pipeline = ClassifierGuidedPipeline.from_pretrained("{repo_id}")\n{rest}\n```'
    )
    yield "Without it, by the code in this repository; read it first:"
    yield (
        f"```python\nfrom diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained(\n"
        f'    "{repo_id}", custom_pipeline="{repo_id}", trust_remote_code=True)\n{rest}\n```'
    )
    if labels or model.num_labels:
        yield (
            "Labels are names or ids, one or a list; `guidance_scale=0` is the unguided model, more is sharper and "
            "less varied."
        )


def captions_of(clip: NoiseAwareCLIP) -> str:
    """An expression for two captions' embeddings, of words that the model knows."""
    if clip.tokenizer is None:
        config = clip.text_encoder.config
        return f"model.encode_text(torch.tensor([[{config.bos_token_id}, {config.eos_token_id}]]))"
    words = sorted(word for word in clip.tokenizer.get_vocab() if word.isascii() and word.isalpha())
    for prompts in (["a photo of a cat", "a photo of a dog"], [*words[-1:], *words[:1]]):
        try:
            clip.encode_prompts(prompts)
        except ValueError:  # a word that it never read
            continue
        return "model.encode_prompts([{}])".format(", ".join(f'"{prompt}"' for prompt in prompts))
    raise ValueError("the tokenizer knows no word")


def training(figures: Mapping[str, Any], datasets: list[str]) -> Iterator[str]:
    trained = {
        name: part["options"]
        for name, part in figures.items()
        if isinstance(part, dict) and isinstance(part.get("options"), dict)
    }
    if not trained and not datasets:
        return
    yield "## Training"
    data = sorted({source_of(figures[name]) or "" for name in trained} - {""})
    if datasets or data:
        ids = " and ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets)
        yield f"Trained on {ids or ' and '.join(data)}, by the scripts of guided-diffusers:"
    used = {
        option: text
        for option, text in RECIPE.items()
        if any(options.get(option) is not None for options in trained.values())
    }
    if trained:
        yield table(
            ["", *trained],
            [
                [text, *(shown(options.get(option)) for options in trained.values())]
                for option, text in used.items()
            ],
        )
        for name, options in trained.items():
            yield folded(f"All options: {name}", f"```json\n{json.dumps(options, indent=2)}\n```")


def measured(figures: Mapping[str, Any], drawn: Collection[str]) -> Iterator[str]:
    """Every figure that the folder has: the pictures, then numbers, rows and the command that measured them."""
    guided = guided_rows(figures)
    parts = sorted(
        ((name, part) for name, part in figures.items() if isinstance(part, dict)),
        key=lambda item: item[0] not in guided,
    )
    if not parts:
        return
    yield "## Figures"
    for number, (name, part) in enumerate(parts):
        if number == min(len(guided), len(parts) - 1) and "levels" in drawn:
            yield "### At each noise level"
            yield "On images that the training didn't see:"
            yield "![Figures at each noise level](figure-levels.png)"
        yield f"### {name.replace('_', ' ')}"
        said = {
            key: value
            for key, value in part.items()
            if isinstance(value, (int, float, str)) and key not in HIDDEN
        }
        if {"step", "images", "held_out"} <= part.keys():
            yield f"After {said.pop('step')} steps of training, on {said.pop('images')} held-out images."
        if isinstance(part.get("verdict"), dict):
            yield f"`guided-diffusers inspect` says: {part['verdict'].get('summary')}."
        lists = {
            key: rows
            for key, rows in part.items()
            if key not in HIDDEN
            and isinstance(rows, list)
            and rows
            and all(isinstance(row, dict) for row in rows)
        }
        if name in guided:
            lists = {"rows": guided[name]}
        same = alike(guided[name]) if name in guided else {}
        said |= same
        if said:
            yield (
                ", ".join(f"{key.replace('_', ' ')}: {shown(value)}" for key, value in said.items())
                + "."
            )
        if name in drawn:
            yield f"![How good guided images are](figure-{name}.png)"
        for key, rows in lists.items():
            known = (
                [column for _, column, _ in COLUMNS]
                if "sigma_over_alpha" in rows[0]
                else list(rows[0])
            )
            columns = [
                column
                for column in known
                if column in rows[0]
                and column not in {*same, *HIDDEN}
                and not isinstance(rows[0][column], (list, dict))
            ]
            text = table(
                [column.replace("_", " ") for column in columns],
                [[shown(row.get(column)) for column in columns] for row in rows[:MOST_ROWS]],
            )
            yield (
                text
                if name in guided or len(rows) < 4
                else folded(
                    f"{key.replace('_', ' ')}: {len(rows)} rows"
                    if key not in ("held_out", "levels", "rows")
                    else "All numbers",
                    text,
                )
            )
        if "command" in part:
            yield f"Measured by `{part['command']}`."


def alike(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is the same in all of several rows, and so is said once."""
    return {
        key: value
        for key, value in rows[0].items()
        if len(rows) > 1
        and key not in HIDDEN
        and isinstance(value, (int, float, str))
        and all(row.get(key) == value for row in rows)
    }


def folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def limits(model: Any, levels: Mapping[str, Any]) -> Iterator[str]:
    yield "## Limits"
    found = []
    if isinstance(model, DiffusionPipeline):
        size = model.unet.config.get("sample_size")
        found.append(
            f"It was made for one size{f', {size}' if size else ''}, and knows nothing but what its training "
            "data shows, with their biases."
        )
        if model.classifier is not None:
            found.append(
                "More guidance makes images more typical and less varied; beyond some scale they get worse."
            )
            found.append("Labels outside the classifier's are unknown to it.")
    elif isinstance(model, NoiseAwareCLIP):
        found.append(
            "It knows the words and the images of its training data, and of others little; a word that its "
            "tokenizer never read is refused."
        )
    else:
        found.append(
            "It tells its labels apart and nothing else: for any image, also of something else, its "
            "probabilities add up to one."
            if model.config.problem_type == "single_label_classification"
            else "It tells what it was trained on, and nothing else."
        )
    for name, rows in levels.items():
        for key, words in (("accuracy", "accuracy"), ("zero_shot", "accuracy by unseen captions")):
            known = [row for row in rows if row.get(key) is not None]
            if len(known) > 1:
                first, last = known[0], known[-1]
                found.append(
                    f"The {words} of the {name} falls with the noise: {first[key]:.1%} at timestep "
                    f"{first['timestep']:g}, {last[key]:.1%} at {last['timestep']:g}."
                )
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
    labels = (
        sorted({i * count // most for i in range(most)}) if count > most else list(range(count))
    )
    steps = min(pipeline.config.defaults["num_inference_steps"], 30)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(max(1, len(labels))):
        one = labels[start : start + 1] or None
        generators = [image_generator(0, start * columns + i) for i in range(columns)]
        images += pipeline(
            one, num_images_per_label=columns, generator=generators, num_inference_steps=steps
        ).images
    names = pipeline.config.id2label or {}
    save_image(grid(images, [names.get(label, str(label)) for label in labels] or None), path)
