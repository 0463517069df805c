"""All guidance terms on the bundled Fashion-MNIST models in one table: same seeds, one judge.

    python examples/benchmarks/guidance_table.py --data data/fashion-mnist --output out/table  # an hour of a core
    python examples/benchmarks/guidance_table.py --data data/fashion-mnist --output out/small \\
        --images-per-label 10 --rows clip
    python examples/benchmarks/guidance_table.py --data data/fashion-mnist --output out/table \\
        --report examples/figures

Run it again to resume: a finished row is kept. Several processes may share the work with --rows. Agreement is how often
the judge recognises the label. Frechet distance (to all test images) and recall (the share of 1,000 test images in the
manifold of the generated ones) are in the judge's features, so this is no FID. Evaluations are rows of a network's
forward passes per image: of the diffusion network, and of the network that guides.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification

from guided_diffusers import (
    ClassifierGuidedPipeline,
    ImageClassifierGuidance,
    NoiseAwareClassifier,
    NoiseAwareCLIP,
    NoiseAwareCLIPGuidance,
)
from guided_diffusers.bundled import folder
from guided_diffusers.evaluation.metrics import (
    frechet_distance,
    precision_recall,
    sliced_wasserstein,
)
from guided_diffusers.files import write_json
from guided_diffusers.learning.data import LabelledImages, load_splits
from guided_diffusers.sampling import grid, image_generator
from guided_diffusers.utils import exchanged

SCALES = {
    "classifier": 8.0,
    "classifier-free": 1.0,
    "both": 1.0,
    "image-classifier": 10.0,
    "through-network": 5.0,
    "clip": 5.0,
}
ROWS = ["unguided", "conditional", *SCALES]
#: (image indices, labels) -> arguments of the pipeline's call
CallArguments = Callable[[list[int], list[int]], dict[str, Any]]


@dataclass
class Row:
    """A row of the table: its title, the arguments of the pipeline's call, and the network that guides."""

    title: str
    arguments: CallArguments
    guide: torch.nn.Module | None = None


def plain_row(title: str, guide: torch.nn.Module | None = None, **arguments: Any) -> Row:
    return Row(title, lambda indices, labels: {"guidance_scale": 0.0, **arguments}, guide)


def make_row(name: str, pipeline: ClassifierGuidedPipeline, options: argparse.Namespace) -> Row:
    scale = options.scales.get(name, 0.0)
    null = {"conditional": False}  # the network gets its null label
    match name:
        case "unguided":
            return plain_row("unguided", **null)
        case "conditional":
            return plain_row("network's label")
        case "classifier":
            title = f"classifier, scale {scale:g}"
            return plain_row(title, pipeline.classifier, **null, guidance_scale=scale)
        case "classifier-free":
            return plain_row(f"classifier-free, scale {scale:g}", classifier_free_scale=scale)
        case "both":
            scales = {"guidance_scale": scale, "classifier_free_scale": scale}
            return plain_row(f"both, scale {scale:g} each", pipeline.classifier, **scales)
        case "image-classifier":
            title = f"image classifier on the predicted x0, scale {scale:g}"
            return image_classifier_row(title, scale, False, options)
        case "through-network":
            title = f"the same, gradient through the network, scale {scale:g}"
            return image_classifier_row(title, scale, True, options)
        case _:
            return clip_row(scale, pipeline.config.id2label, options)


def image_classifier_row(
    title: str, scale: float, through_network: bool, options: argparse.Namespace
) -> Row:
    classifier = AutoModelForImageClassification.from_pretrained(options.image_classifier).eval()
    processor = AutoImageProcessor.from_pretrained(options.image_classifier)

    def arguments(indices: list[int], labels: list[int]) -> dict[str, Any]:
        term = ImageClassifierGuidance(
            classifier,
            labels,
            scale,
            processor=processor,
            marginal_temperature=0.5,
            through_network=through_network,
        )
        return {"guidance_scale": 0.0, "conditional": False, "guidance": term}

    return Row(title, arguments, classifier)


def clip_row(scale: float, id2label: dict[int, str], options: argparse.Namespace) -> Row:
    clip = NoiseAwareCLIP.from_pretrained(options.model / "clip")
    captions = json.loads(options.captions.read_text())["held_out"]

    def arguments(indices: list[int], labels: list[int]) -> dict[str, Any]:
        """The held-out captions of each label, in turn."""
        prompts = []
        for i, y in zip(indices, labels, strict=True):
            choices = captions[id2label[y]]
            prompts.append(choices[i // len(id2label) % len(choices)])
        term = NoiseAwareCLIPGuidance(clip, prompts, scale)
        return {"guidance_scale": 0.0, "conditional": False, "guidance": term}

    title = f"noise-aware CLIP by unseen captions, scale {scale:g}"
    return Row(title, arguments, clip.image_encoder)


def record_batch_sizes(network: torch.nn.Module | None) -> list[int]:
    """A list that each call of the network appends its batch size to."""
    sizes: list[int] = []

    def record(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        sizes.append(len(next(iter([*args, *kwargs.values()]))))

    if network is not None:
        network.register_forward_pre_hook(record, with_kwargs=True)
    return sizes


def digest(options: argparse.Namespace, guide: torch.nn.Module | None) -> str:
    """Hash of the weights and captions that a row depends on."""
    content = hashlib.sha256(options.captions.read_bytes())
    for path in (options.model / "unet", options.model / "judge"):
        content.update((path / "diffusion_pytorch_model.safetensors").read_bytes())
    for value in [] if guide is None else guide.state_dict().values():
        content.update(value.contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


class Judge:
    """Predicted labels, and the features before its last layer, of images in [-1, 1]."""

    def __init__(self, path: Path):
        self.model, self.features = NoiseAwareClassifier.from_pretrained(path), []
        self.model.head[-1].register_forward_pre_hook(lambda _, args: self.features.append(args[0]))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.features.clear()
        labels = torch.cat([self.model(batch, 0).logits.argmax(-1) for batch in images.split(250)])
        return labels, torch.cat(self.features)


def test_features(judge: Judge, data: Any, size: int) -> torch.Tensor:
    """The judge's features of all test images."""
    test = LabelledImages(data, resolution=size)
    return judge(torch.stack([test[i]["pixel_values"] for i in range(len(test))]))[1]


def generate(
    pipeline: ClassifierGuidedPipeline,
    arguments: CallArguments,
    guide: torch.nn.Module | None,
    options: argparse.Namespace,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Images in [-1, 1], the labels they were guided to, and their cost per image."""
    labels = sorted(pipeline.config.id2label)
    count = options.images_per_label * len(labels)
    targets = [labels[i % len(labels)] for i in range(count)]
    network_rows, guide_rows = record_batch_sizes(pipeline.unet), record_batch_sizes(guide)
    start_time, parts = time.process_time(), []
    for start in tqdm(range(0, count, options.batch_size), leave=False):
        indices = list(range(start, min(start + options.batch_size, count)))
        batch = [targets[i] for i in indices]
        output = pipeline(
            batch,
            generator=[image_generator(options.seed, i) for i in indices],
            output_type="latent",
            num_inference_steps=options.num_inference_steps,
            **arguments(indices, batch),
        )
        parts.append(output.images)
    cost = {
        "network_evaluations": sum(network_rows) / count,
        "guide_evaluations": sum(guide_rows) / count,
        "seconds": (time.process_time() - start_time) / count,
    }
    return torch.cat(parts).clamp(-1, 1), torch.tensor(targets), cost


def quality(
    judge: Judge, images: torch.Tensor, targets: torch.Tensor, real_features: torch.Tensor
) -> tuple[dict[str, float], torch.Tensor]:
    """Agreement, Frechet distance, precision and recall; and for each image whether the judge agrees."""
    predicted, features = judge(images)
    correct = (predicted == targets).float()
    subset = real_features[:: max(1, len(real_features) // 1000)]
    precision, recall = precision_recall(subset, features)
    metrics = {
        "agreement": correct.mean().item(),
        "frechet_distance": frechet_distance(real_features, features),
        "sliced_wasserstein": float(sliced_wasserstein(real_features, features)),
        "precision": precision,
        "recall": recall,
    }
    return metrics, correct


def report(options: argparse.Namespace) -> None:
    """Print the finished rows as a Markdown table; with --report write JSON and a picture."""
    paths = {name: options.output / f"{name}.json" for name in options.rows}
    rows = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    print(
        "| guidance | agreement | Frechet distance | recall | evaluations: network + guide | CPU "
        "s per image |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows.values():
        print(
            f"| {row['guidance']} | {row['agreement']:.1%} | {row['frechet_distance']:.2f} | "
            f"{row['recall']:.3f} | {row['network_evaluations']:.0f} + "
            f"{row['guide_evaluations']:.0f} | {row['seconds']:.2f} |"
        )
    if options.report is None:
        return
    write_json(rows, options.report / "guidance_table.json")
    images = [torch.load(options.output / f"{name}.pt", weights_only=True)[:10] for name in rows]
    pictures = ClassifierGuidedPipeline.numpy_to_pil(
        torch.cat(images).permute(0, 2, 3, 1).numpy() / 255
    )
    titles = [row["guidance"] for row in rows.values()]
    grid(pictures, titles).save(options.report / "guidance_table.png")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option(
        "--model",
        type=Path,
        default=folder("fashion-mnist"),
        help="pipeline folder with judge and clip (default: the bundled one)",
    )
    option("--data", required=True, help="labelled dataset, for its test images")
    option(
        "--image-classifier",
        type=Path,
        default="out/fashion-mnist-resnet",
        help="transformers image classifier (examples/train_off_the_shelf.py; default: %(default)s)",
    )
    option(
        "--captions",
        type=Path,
        default=Path(__file__).parents[2] / "training/configs/fashion_mnist_captions.json",
        help="JSON with held-out captions of each label",
    )
    option("--rows", nargs="+", choices=ROWS, default=ROWS, help="rows to make (default: all)")
    for name, scale in SCALES.items():
        option(f"--{name}-scale", type=float, default=scale, help="(default: %(default)s)")
    option("--images-per-label", type=int, default=100, help="(default: %(default)s)")
    option("--num-inference-steps", type=int, default=25, help="(default: %(default)s)")
    option("--batch-size", type=int, default=50, help="(default: %(default)s)")
    option("--seed", type=int, default=0, help="(default: %(default)s)")
    option("--output", type=Path, required=True, help="folder of the rows")
    option("--report", type=Path, help="folder for guidance_table.json and guidance_table.png")
    options = parser.parse_args()
    options.scales = {name: getattr(options, f"{name.replace('-', '_')}_scale") for name in SCALES}
    return options


def main() -> None:
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    pipeline = ClassifierGuidedPipeline.from_pretrained(options.model, defaults={})
    pipeline.scheduler = exchanged(pipeline.scheduler, "ddim")
    pipeline.set_progress_bar_config(disable=True)
    judge, real_features = Judge(options.model / "judge"), None
    for name in options.rows:
        row, path = make_row(name, pipeline, options), options.output / f"{name}.json"
        settings = {
            "guidance": row.title,
            "made_of": digest(options, row.guide),
            "images": 10 * options.images_per_label,
            "seed": options.seed,
            "num_inference_steps": options.num_inference_steps,
            "scheduler": type(pipeline.scheduler).__name__,
        }
        if path.exists() and settings.items() <= json.loads(path.read_text()).items():
            continue
        if real_features is None:
            data, size = load_splits(options.data)["test"], pipeline.unet.config.sample_size
            real_features = test_features(judge, data, size)
        images, targets, cost = generate(pipeline, row.arguments, row.guide, options)
        metrics, correct = quality(judge, images, targets, real_features)
        per_label = {
            pipeline.config.id2label[y]: correct[targets == y].mean().item()
            for y in sorted(set(targets.tolist()))
        }
        torch.save(((images + 1) * 127.5).round().to(torch.uint8), options.output / f"{name}.pt")
        write_json({**settings, **metrics, "agreement_per_label": per_label, **cost}, path)
    report(options)


if __name__ == "__main__":
    main()
