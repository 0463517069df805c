"""Which way to train the classifier guides best: the curves of several, and the samples they guide, in one table.

    sh training/recipes.sh                                              # trains them: 75 minutes of a core
    python examples/benchmarks/recipes_table.py --data data/fashion-mnist --output out/recipes-table \\
        --classifiers base=out/fashion-mnist-classifier plain=out/recipes/plain dlsm=out/recipes/dlsm \\
            second_moment=out/recipes/second_moment smooth_mixup=out/recipes/smooth_mixup
    python examples/benchmarks/recipes_table.py ... --report examples/figures      # recipes.json, recipes.png

All are judged alike: accuracy, calibration and the gradient's cosine to the network's own (label minus null label) at
the noise levels of the run, on test images (`guided_diffusers.diagnosis`); then images guided at equal scales, from
equal seeds, by a judge that never guided. Frechet distance and recall are in its features, as in `guidance_table.py`.
What is done is not done again: a run that was stopped goes on.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from guidance_table import Judge, make_row

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.bundled import folder
from guided_diffusers.diagnosis import diagnose
from guided_diffusers.evaluation.metrics import frechet_distance, precision_recall
from guided_diffusers.learning.data import LabelledImages, load_splits
from guided_diffusers.utils import exchanged

CURVES = {
    "accuracy": "accuracy",
    "ece": "expected calibration error",
    "cosine": "cosine to the network's own gradient",
}


def named_folder(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=FOLDER is allowed")
    return name, Path(path)


def write(path: Path, content: Any) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(aside, path)


def measure(
    name: str,
    classifier: NoiseAwareClassifier,
    options: argparse.Namespace,
    real: torch.Tensor,
    judge: Judge,
    test: LabelledImages,
    settings: dict[str, Any],
    path: Path,
) -> dict[str, Any]:
    """The curves of one classifier and its guided samples at every scale, each written to `path` as it is done."""
    pipeline = ClassifierGuidedPipeline.from_pretrained(
        options.model, classifier=classifier, defaults={}
    )
    pipeline.scheduler = exchanged(pipeline.scheduler, "ddim")
    pipeline.set_progress_bar_config(disable=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    if not settings.items() <= found.items():
        levels = diagnose(
            classifier,
            test,
            pipeline.scheduler,
            unet=pipeline.unet,
            images=options.diagnosed_images,
            gradient_images=options.gradient_images,
            progress=False,
        ).levels
        found = {**settings, "levels": levels, "guided": {}}
        write(path, found)
    for scale in options.scales:
        if f"{scale:g}" in found["guided"]:
            continue
        images, wanted, cost = make_row(
            pipeline,
            lambda i, y, s=scale: {"conditional": False, "guidance_scale": s},
            pipeline.classifier,
            options,
        )
        told, features = judge(images)
        precision, recall = precision_recall(real[:: max(1, len(real) // 1000)], features)
        found["guided"][f"{scale:g}"] = {
            "agreement": (told == wanted).float().mean().item(),
            "frechet_distance": frechet_distance(real, features),
            "precision": precision,
            "recall": recall,
            **cost,
        }
        write(path, found)
        print(f"{name}, scale {scale:g}: {found['guided'][f'{scale:g}']}", flush=True)
    return found


def report(found: dict[str, dict[str, Any]], scales: list[str], place: Path | None) -> None:
    """The table, in Markdown; the curves as a picture and all figures as JSON in `place`."""
    means = "| accuracy | calibration error | cosine |"
    print(
        f"| recipe {means}"
        + "".join(f" judge agrees, Frechet distance, recall at {scale} |" for scale in scales)
    )
    print("|---" * (4 + len(scales)) + "|")
    for name, one in found.items():
        row = [sum(level[key] for level in one["levels"]) / len(one["levels"]) for key in CURVES]
        cells = [
            f"{one['guided'][s]['agreement']:.1%}, {one['guided'][s]['frechet_distance']:.2f}, "
            f"{one['guided'][s]['recall']:.3f}"
            for s in scales
        ]
        print(f"| {name} | " + " | ".join([f"{value:.3f}" for value in row] + cells) + " |")
    if place is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    place.mkdir(parents=True, exist_ok=True)
    write(place / "recipes.json", found)
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(13, 4), layout="constrained")
    for axis, (key, text) in zip(axes, CURVES.items(), strict=True):
        for name, one in found.items():
            levels = [level for level in one["levels"] if level["sigma_over_alpha"] > 0]
            axis.plot(
                [level["sigma_over_alpha"] for level in levels],
                [level[key] for level in levels],
                ".-",
                label=name,
            )
        axis.set(xscale="log", xlabel="sigma / alpha", title=text)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(place / "recipes.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--classifiers", nargs="+", required=True, type=named_folder, metavar="NAME=FOLDER"
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=folder("fashion-mnist"),
        help="the pipeline to guide, with judge",
    )
    parser.add_argument("--data", required=True, help="the labelled data set, for its test images")
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[3.0, 8.0], help="(default: %(default)s)"
    )
    parser.add_argument("--images-per-label", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument(
        "--num-inference-steps", type=int, default=25, help="(default: %(default)s)"
    )
    parser.add_argument("--diagnosed-images", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--gradient-images", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the figures of each classifier"
    )
    parser.add_argument("--report", type=Path, help="folder for recipes.json and recipes.png")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    judge = Judge(options.model / "judge")
    weights = options.model / "unet" / "diffusion_pytorch_model.safetensors"
    data = load_splits(options.data)["test"]
    found, real = {}, None
    for name, path in options.classifiers:
        classifier = NoiseAwareClassifier.from_pretrained(path, torch_dtype=torch.float32).eval()
        if real is None:
            test = LabelledImages(data, resolution=classifier.config.sample_size)
            real = judge(torch.stack([test[i]["pixel_values"] for i in range(len(test))]))[1]
        made_of = hashlib.sha256(weights.read_bytes())
        for value in classifier.state_dict().values():
            made_of.update(value.contiguous().numpy().tobytes())
        settings = {
            "made_of": made_of.hexdigest()[:16],
            "images": 10 * options.images_per_label,
            "seed": options.seed,
            "num_inference_steps": options.num_inference_steps,
            "diagnosed_images": options.diagnosed_images,
            "gradient_images": options.gradient_images,
        }
        found[name] = measure(
            name, classifier, options, real, judge, test, settings, options.output / f"{name}.json"
        )
    report(found, [f"{scale:g}" for scale in options.scales], options.report)


if __name__ == "__main__":
    main()
