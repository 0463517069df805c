"""Which training recipe gives the best guiding classifier: accuracy by noise level, and guided samples, in one table.

    sh training/recipes.sh                                              # trains them: 75 minutes of a core
    python examples/benchmarks/recipes_table.py --data data/fashion-mnist --output out/recipes-table \\
        --classifiers base=out/fashion-mnist-classifier plain=out/recipes/plain dlsm=out/recipes/dlsm \\
            second_moment=out/recipes/second_moment smooth_mixup=out/recipes/smooth_mixup
    python examples/benchmarks/recipes_table.py ... --report examples/figures      # recipes.json, recipes.png

For each classifier: accuracy, calibration error and the cosine of its gradient to the network's own (label minus null
label) at the noise levels of the run, on test images (`guided_diffusers.diagnosis`); then images guided at equal scales
from equal seeds, measured by a judge that never guides. Frechet distance and recall are in the judge's features, as in
`guidance_table.py`. Run it again to resume: finished measurements are kept.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from guidance_table import Judge, generate, quality, test_features

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.bundled import folder
from guided_diffusers.diagnosis import diagnose
from guided_diffusers.files import write_json
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


def make_pipeline(
    classifier: NoiseAwareClassifier, options: argparse.Namespace
) -> ClassifierGuidedPipeline:
    pipeline = ClassifierGuidedPipeline.from_pretrained(
        options.model, classifier=classifier, defaults={}
    )
    pipeline.scheduler = exchanged(pipeline.scheduler, "ddim")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings_of(classifier: NoiseAwareClassifier, options: argparse.Namespace) -> dict[str, Any]:
    """What the measurements of a classifier depend on."""
    unet = options.model / "unet" / "diffusion_pytorch_model.safetensors"
    made_of = hashlib.sha256(unet.read_bytes())
    for value in classifier.state_dict().values():
        made_of.update(value.contiguous().numpy().tobytes())
    return {
        "made_of": made_of.hexdigest()[:16],
        "images": 10 * options.images_per_label,
        "seed": options.seed,
        "num_inference_steps": options.num_inference_steps,
        "diagnosed_images": options.diagnosed_images,
        "gradient_images": options.gradient_images,
    }


def measure(
    classifier: NoiseAwareClassifier,
    options: argparse.Namespace,
    judge: Judge,
    real_features: torch.Tensor,
    test: LabelledImages,
    path: Path,
) -> dict[str, Any]:
    """Metrics by noise level, and of guided samples at every scale; each is written to `path` when it is done."""
    pipeline, settings = make_pipeline(classifier, options), settings_of(classifier, options)
    results = json.loads(path.read_text()) if path.exists() else {}
    if not settings.items() <= results.items():
        levels = diagnose(
            classifier,
            test,
            pipeline.scheduler,
            unet=pipeline.unet,
            images=options.diagnosed_images,
            gradient_images=options.gradient_images,
            progress=False,
        ).levels
        results = {**settings, "levels": levels, "guided": {}}
        write_json(results, path)
    for scale in options.scales:
        key = f"{scale:g}"
        if key in results["guided"]:
            continue
        arguments = {"conditional": False, "guidance_scale": scale}
        images, targets, cost = generate(
            pipeline, lambda indices, labels, a=arguments: a, classifier, options
        )
        metrics, _ = quality(judge, images, targets, real_features)
        results["guided"][key] = {**metrics, **cost}
        write_json(results, path)
        print(f"{path.stem}, scale {key}: {results['guided'][key]}", flush=True)
    return results


def print_table(results: dict[str, dict[str, Any]], scales: list[str]) -> None:
    columns = ["recipe", "accuracy", "calibration error", "cosine"]
    columns += [f"agreement, Frechet distance, recall at {scale}" for scale in scales]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for name, result in results.items():
        cells = [name]
        for key in CURVES:
            values = [level[key] for level in result["levels"]]
            cells.append(f"{sum(values) / len(values):.3f}")
        for scale in scales:
            guided = result["guided"][scale]
            cells.append(
                f"{guided['agreement']:.1%}, {guided['frechet_distance']:.2f}, "
                f"{guided['recall']:.3f}"
            )
        print("| " + " | ".join(cells) + " |")


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot each of `CURVES` against sigma / alpha, a line per classifier."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, len(CURVES))
    for axis, (key, title) in zip(axes, CURVES.items(), strict=True):
        for name, result in results.items():
            levels = [level for level in result["levels"] if level["sigma_over_alpha"] > 0]
            ratios = [level["sigma_over_alpha"] for level in levels]
            axis.plot(ratios, [level[key] for level in levels], ".-", label=name)
        axis.set(xscale="log", xlabel="sigma / alpha", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=100)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--classifiers", nargs="+", required=True, type=named_folder, metavar="NAME=FOLDER")
    option(
        "--model",
        type=Path,
        default=folder("fashion-mnist"),
        help="the pipeline to guide, with judge",
    )
    option("--data", required=True, help="labelled dataset, for its test images")
    option("--scales", type=float, nargs="+", default=[3.0, 8.0], help="(default: %(default)s)")
    option("--images-per-label", type=int, default=100, help="(default: %(default)s)")
    option("--num-inference-steps", type=int, default=25, help="(default: %(default)s)")
    option("--diagnosed-images", type=int, default=2000, help="(default: %(default)s)")
    option("--gradient-images", type=int, default=256, help="(default: %(default)s)")
    option("--batch-size", type=int, default=50, help="(default: %(default)s)")
    option("--seed", type=int, default=0, help="(default: %(default)s)")
    option("--output", type=Path, required=True, help="folder of each classifier's results")
    option("--report", type=Path, help="folder for recipes.json and recipes.png")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    judge, data = Judge(options.model / "judge"), load_splits(options.data)["test"]
    results, real_features = {}, None
    for name, path in options.classifiers:
        classifier = NoiseAwareClassifier.from_pretrained(path, torch_dtype=torch.float32).eval()
        size = classifier.config.sample_size
        if real_features is None:
            real_features = test_features(judge, data, size)
        test = LabelledImages(data, resolution=size)
        output = options.output / f"{name}.json"
        results[name] = measure(classifier, options, judge, real_features, test, output)
    print_table(results, [f"{scale:g}" for scale in options.scales])
    if options.report:
        write_json(results, options.report / "recipes.json")
        draw(results, options.report / "recipes.png")


if __name__ == "__main__":
    main()
