"""How often the judge, a classifier that never guides, recognises the label that guidance asks for.

    python examples/benchmarks/judge_agreement.py
    python examples/benchmarks/judge_agreement.py --scales 0 3 --num-inference-steps 25 --output agreement.json
    python examples/benchmarks/judge_agreement.py --data data/fashion-mnist     # also its accuracy on real test images

Two rows of the table for each scale: the classifier alone steers (the class-conditional network gets its null label),
and the network gets the label, too. Diversity is the mean distance between two images of a label, relative to scale 0.
"""

import argparse
import math
from pathlib import Path

import torch
from tqdm.auto import tqdm

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.bundled import folder
from guided_diffusers.files import write_json
from guided_diffusers.learning.data import LabelledImages, load_splits
from guided_diffusers.sampling import sample
from guided_diffusers.utils import exchanged

GIVES_LABEL = {"classifier": False, "network-and-classifier": True}  # whether the network gets it


@torch.no_grad()
def predict(judge: NoiseAwareClassifier, images: torch.Tensor) -> torch.Tensor:
    """Labels (B,) that the judge predicts for images in [-1, 1], at its lowest noise level."""
    return torch.cat([judge(batch, 0).logits.argmax(-1) for batch in images.split(250)])


def accuracy_on_test_images(judge: NoiseAwareClassifier, data: str, size: int) -> float:
    test = LabelledImages(load_splits(data)["test"], resolution=size)
    items = [test[i] for i in range(len(test))]
    predicted = predict(judge, torch.stack([item["pixel_values"] for item in items]))
    labels = torch.tensor([item["label"] for item in items])
    return (predicted == labels).float().mean().item()


def make_images(
    pipeline: ClassifierGuidedPipeline,
    count: int,
    scale: float,
    conditional: bool,
    options: argparse.Namespace,
) -> torch.Tensor:
    """`count` images in [-1, 1], all labels in turn."""
    batches = sample(
        pipeline,
        sorted(pipeline.config.id2label),
        options.seed,
        options.batch_size,
        range(count),
        guidance_scale=scale,
        conditional=conditional,
        output_type="latent",
        num_inference_steps=options.num_inference_steps,
    )
    total = math.ceil(count / options.batch_size)
    parts = [batch.clamp(-1, 1) for _, batch in tqdm(batches, total=total, leave=False)]
    return torch.cat(parts)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option(
        "--model", type=Path, default=folder("fashion-mnist"), help="pipeline folder with a judge"
    )
    option("--scales", type=float, nargs="+", default=[0, 1, 2, 3, 5, 8], help="guidance scales")
    option("--steered-by", choices=GIVES_LABEL, nargs="+", default=list(GIVES_LABEL))
    option("--images-per-label", type=int, default=100, help="(default: %(default)s)")
    option("--num-inference-steps", type=int, default=50, help="(default: %(default)s)")
    option("--batch-size", type=int, default=100, help="(default: %(default)s)")
    option("--seed", type=int, default=0, help="(default: %(default)s)")
    option("--data", help="labelled dataset whose test split the judge is measured on")
    option("--output", type=Path, help="JSON file of the results")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    judge = NoiseAwareClassifier.from_pretrained(options.model / "judge")
    pipeline = ClassifierGuidedPipeline.from_pretrained(options.model, defaults={})
    pipeline.scheduler = exchanged(pipeline.scheduler, "ddim")
    pipeline.set_progress_bar_config(disable=True)
    labels = sorted(pipeline.config.id2label)
    count = options.images_per_label * len(labels)
    targets = torch.tensor([labels[i % len(labels)] for i in range(count)])
    results = {
        "images": count,
        "num_inference_steps": options.num_inference_steps,
        "seed": options.seed,
        "scheduler": type(pipeline.scheduler).__name__,
        "rows": [],
    }
    if options.data:
        accuracy = accuracy_on_test_images(judge, options.data, pipeline.unet.config.sample_size)
        results["judge_accuracy_on_test_images"] = accuracy
        print(f"judge on real test images: {accuracy:.2%}")

    print("steered by               scale   agreement   diversity   per label")
    for name in options.steered_by:
        first_spread = None
        for scale in options.scales:
            images = make_images(pipeline, count, scale, GIVES_LABEL[name], options)
            correct = (predict(judge, images) == targets).float()
            spreads = [torch.pdist(images[targets == y].flatten(1)).mean() for y in labels]
            spread = sum(spreads) / len(labels)
            first_spread = first_spread or spread
            row = {
                "steered_by": name,
                "guidance_scale": scale,
                "agreement": correct.mean().item(),
                "relative_diversity": float(spread / first_spread),
                "agreement_per_label": [
                    round(correct[targets == y].mean().item(), 3) for y in labels
                ],
            }
            results["rows"].append(row)
            print(
                f"{name:24} {scale:5g}   {row['agreement']:9.1%}   "
                f"{row['relative_diversity']:9.2f}   {row['agreement_per_label']}"
            )
    if options.output:
        write_json(results, options.output)


if __name__ == "__main__":
    main()
