"""Every guidance on the bundled Fashion-MNIST models in one table: same seeds, a judge that never guided.

    python examples/benchmarks/guidance_table.py --data data/fashion-mnist --output out/guidance-table     # an hour of a core
    python examples/benchmarks/guidance_table.py --data data/fashion-mnist --output out/small --images-per-label 10 --rows clip
    python examples/benchmarks/guidance_table.py --data data/fashion-mnist --output out/guidance-table --report examples/figures

A row is written when it is done and not made again: a run that was stopped goes on, and several may share the work with
--rows. Agreement is how often the judge's label is the wanted one. Frechet distance (to all test images) and recall
(the share of 1,000 test images in the manifold of the generated ones) are in the judge's features, so this is no FID.
Evaluations are rows of a network's forward passes, an image: of the diffusion network, and of the one that guides.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from guided_diffusers import (
    ClassifierGuidedPipeline,
    ImageClassifierGuidance,
    NoiseAwareClassifier,
    NoiseAwareCLIP,
    NoiseAwareCLIPGuidance,
)
from guided_diffusers.bundled import folder
from guided_diffusers.evaluation.metrics import frechet_distance, precision_recall
from guided_diffusers.learning.data import LabelledImages, load_splits
from guided_diffusers.sampling import grid, image_generator
from guided_diffusers.utils import exchanged

Row = Callable[
    [list[int], list[int]], dict[str, Any]
]  # (indices, labels) -> arguments of the pipeline's call


def make_rows(
    pipeline: ClassifierGuidedPipeline, options: argparse.Namespace
) -> dict[str, tuple[str, Row, Any]]:
    """{name: (how it is described, its call, the network that guides)}."""
    off = {"guidance_scale": 0.0}
    clip = image_classifier = None
    if "clip" in options.rows:
        clip = NoiseAwareCLIP.from_pretrained(options.model / "clip")
        held_out = json.loads(options.captions.read_text())["held_out"]
    if {"image-classifier", "through-network"} & set(options.rows):
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        image_classifier = AutoModelForImageClassification.from_pretrained(
            options.image_classifier
        ).eval()
        processor = AutoImageProcessor.from_pretrained(options.image_classifier)
    names = pipeline.config.id2label

    def of_x0(labels: list[int], through_network: bool) -> dict[str, Any]:
        name = "through-network" if through_network else "image-classifier"
        return off | {
            "conditional": False,
            "guidance": ImageClassifierGuidance(
                image_classifier,
                labels,
                options.scales[name],
                processor=processor,
                marginal_temperature=0.5,
                through_network=through_network,
            ),
        }

    def captions(indices: list[int], labels: list[int]) -> list[str]:
        """The held-out phrasings of each label in turn."""
        return [
            held_out[names[y]][i // len(names) % len(held_out[names[y]])]
            for i, y in zip(indices, labels, strict=True)
        ]

    rows: dict[str, tuple[str, Row, Any]] = {
        "unguided": ("unguided", lambda i, y: off | {"conditional": False}, None),
        "conditional": ("network's label", lambda i, y: off, None),
        "classifier": (
            "classifier, scale {}",
            lambda i, y: {"conditional": False, "guidance_scale": options.scales["classifier"]},
            pipeline.classifier,
        ),
        "classifier-free": (
            "classifier-free, scale {}",
            lambda i, y: off | {"classifier_free_scale": options.scales["classifier-free"]},
            None,
        ),
        "both": (
            "both, scale {} each",
            lambda i, y: {
                "guidance_scale": options.scales["both"],
                "classifier_free_scale": options.scales["both"],
            },
            pipeline.classifier,
        ),
        "image-classifier": (
            "image classifier on the predicted x0, scale {}",
            lambda i, y: of_x0(y, False),
            image_classifier,
        ),
        "through-network": (
            "the same, gradient through the network, scale {}",
            lambda i, y: of_x0(y, True),
            image_classifier,
        ),
        "clip": (
            "noise-aware CLIP by unseen captions, scale {}",
            lambda i, y: (
                off
                | {
                    "conditional": False,
                    "guidance": NoiseAwareCLIPGuidance(
                        clip, captions(i, y), options.scales["clip"]
                    ),
                }
            ),
            clip and clip.image_encoder,
        ),
    }
    return {
        name: (text.format(f"{options.scales[name]:g}") if "{}" in text else text, row, network)
        for name, (text, row, network) in rows.items()
        if name in options.rows
    }


def count_rows(network: torch.nn.Module | None) -> list[int]:
    """The batch sizes of the network's calls, as they come."""
    calls: list[int] = []
    if network is not None:
        network.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(len(next(iter([*args, *kwargs.values()])))),
            with_kwargs=True,
        )
    return calls


def digest(options: argparse.Namespace, guide: torch.nn.Module | None) -> str:
    """Of the weights and captions that a row depends on."""
    found = hashlib.sha256(options.captions.read_bytes())
    for path in (options.model / "unet", options.model / "judge"):
        found.update((path / "diffusion_pytorch_model.safetensors").read_bytes())
    for value in [] if guide is None else guide.state_dict().values():
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


class Judge:
    """Labels, and features in front of its last layer, of images in [-1, 1]."""

    def __init__(self, path: Path):
        self.model, self.seen = NoiseAwareClassifier.from_pretrained(path), []
        self.model.head[-1].register_forward_pre_hook(lambda _, args: self.seen.append(args[0]))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.clear()
        labels = torch.cat([self.model(batch, 0).logits.argmax(-1) for batch in images.split(250)])
        return labels, torch.cat(self.seen)


def make_row(
    pipeline: ClassifierGuidedPipeline, row: Row, guide: Any, options: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """(images in [-1, 1], their wanted labels, what they cost an image)."""
    labels = sorted(pipeline.config.id2label)
    count = options.images_per_label * len(labels)
    wanted, parts = [labels[i % len(labels)] for i in range(count)], []
    network_rows, guide_rows, begin = (
        count_rows(pipeline.unet),
        count_rows(guide),
        time.process_time(),
    )
    for start in tqdm(range(0, count, options.batch_size), leave=False):
        batch = list(range(count))[start : start + options.batch_size]
        chosen = [wanted[i] for i in batch]
        parts.append(
            pipeline(
                chosen,
                generator=[image_generator(options.seed, i) for i in batch],
                output_type="latent",
                num_inference_steps=options.num_inference_steps,
                **row(batch, chosen),
            ).images
        )
    cost = {
        "network_evaluations": sum(network_rows) / count,
        "guide_evaluations": sum(guide_rows) / count,
        "seconds": (time.process_time() - begin) / count,
    }
    return torch.cat(parts).clamp(-1, 1), torch.tensor(wanted), cost


def report(options: argparse.Namespace) -> None:
    """The rows that are done as a Markdown table and JSON, and an image of each label a row."""
    done = {name: options.output / f"{name}.json" for name in options.rows}
    figures = {name: json.loads(path.read_text()) for name, path in done.items() if path.exists()}
    print(
        "| guidance | judge agrees | Frechet distance | recall | evaluations: network + guide | CPU s an image |"
    )
    print("|---|---|---|---|---|---|")
    for row in figures.values():
        print(
            f"| {row['guidance']} | {row['agreement']:.1%} | {row['frechet_distance']:.2f} | {row['recall']:.3f} | "
            f"{row['network_evaluations']:.0f} + {row['guide_evaluations']:.0f} | {row['seconds']:.2f} |"
        )
    if options.report:
        options.report.mkdir(parents=True, exist_ok=True)
        (options.report / "guidance_table.json").write_text(json.dumps(figures, indent=2) + "\n")
        shown = [
            torch.load(options.output / f"{name}.pt", weights_only=True)[:10] for name in figures
        ]
        pictures = ClassifierGuidedPipeline.numpy_to_pil(
            torch.cat(shown).permute(0, 2, 3, 1).numpy() / 255
        )
        grid(pictures, [row["guidance"] for row in figures.values()]).save(
            options.report / "guidance_table.png"
        )


def main() -> None:
    scales = {
        "classifier": 8.0,
        "classifier-free": 1.0,
        "both": 1.0,
        "image-classifier": 10.0,
        "through-network": 5.0,
        "clip": 5.0,
    }
    every = [
        "unguided",
        "conditional",
        "classifier",
        "classifier-free",
        "both",
        "image-classifier",
        "through-network",
        "clip",
    ]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=folder("fashion-mnist"), help="folder with judge and clip"
    )
    parser.add_argument("--data", required=True, help="the labelled data set, for its test images")
    parser.add_argument(
        "--image-classifier",
        type=Path,
        default="out/fashion-mnist-resnet",
        help="a transformers image classifier (examples/train_off_the_shelf.py; default: %(default)s)",
    )
    parser.add_argument(
        "--captions",
        type=Path,
        help="JSON with held-out captions of each label",
        default=Path(__file__).parents[2] / "training/configs/fashion_mnist_captions.json",
    )
    parser.add_argument("--rows", nargs="+", choices=every, default=every)
    for name, scale in scales.items():
        parser.add_argument(
            f"--{name}-scale", type=float, default=scale, help="(default: %(default)s)"
        )
    parser.add_argument("--images-per-label", type=int, default=100)
    parser.add_argument("--num-inference-steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder of the rows")
    parser.add_argument(
        "--report", type=Path, help="folder for guidance_table.json and guidance_table.png"
    )
    options = parser.parse_args()
    options.scales = {name: getattr(options, f"{name.replace('-', '_')}_scale") for name in scales}
    options.output.mkdir(parents=True, exist_ok=True)

    pipeline = ClassifierGuidedPipeline.from_pretrained(
        options.model, defaults={}
    )  # each row says what guides it
    pipeline.scheduler = exchanged(pipeline.scheduler, "ddim")
    pipeline.set_progress_bar_config(disable=True)
    judge = Judge(options.model / "judge")
    real_features = None
    for name, (text, row, guide) in make_rows(pipeline, options).items():
        path = options.output / f"{name}.json"
        settings = {
            "guidance": text,
            "made_of": digest(options, guide),
            "images": 10 * options.images_per_label,
            "seed": options.seed,
            "num_inference_steps": options.num_inference_steps,
            "scheduler": type(pipeline.scheduler).__name__,
        }
        if path.exists() and settings.items() <= json.loads(path.read_text()).items():
            continue
        if real_features is None:
            test = LabelledImages(
                load_splits(options.data)["test"], resolution=pipeline.unet.config.sample_size
            )
            real_features = judge(torch.stack([test[i]["pixel_values"] for i in range(len(test))]))[
                1
            ]
        images, wanted, cost = make_row(pipeline, row, guide, options)
        told, features = judge(images)
        every_tenth = real_features[:: max(1, len(real_features) // 1000)]
        precision, recall = precision_recall(every_tenth, features)
        right = (told == wanted).float()
        each = {
            pipeline.config.id2label[y]: right[wanted == y].mean().item()
            for y in sorted(set(wanted.tolist()))
        }
        figures = {
            **settings,
            "agreement": right.mean().item(),
            "agreement_per_label": each,
            "frechet_distance": frechet_distance(real_features, features),
            "precision": precision,
            "recall": recall,
            **cost,
        }
        torch.save(((images + 1) * 127.5).round().to(torch.uint8), options.output / f"{name}.pt")
        aside = path.with_suffix(".partial")
        aside.write_text(json.dumps(figures, indent=2) + "\n")
        os.replace(aside, path)
    report(options)


if __name__ == "__main__":
    main()
