"""How often a judge, a classifier that never guided, agrees with the label that guidance was asked for.

    python examples/benchmarks/judge_agreement.py
    python examples/benchmarks/judge_agreement.py --scales 0 3 --num-inference-steps 25 --output agreement.json
    python examples/benchmarks/judge_agreement.py --data data/fashion-mnist     # also the judge's accuracy on real test images

Two rows of the table for each scale: the classifier alone steers (the class-conditional network gets its null label),
and the network gets the label, too. Diversity is the mean distance between two images of a label, relative to scale 0.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.bundled import folder
from guided_diffusers.learning.data import LabelledImages, load_splits
from guided_diffusers.sampling import sample
from guided_diffusers.utils import exchanged

STEERED_BY = {
    "classifier": False,
    "network-and-classifier": True,
}  # whether the network gets the label


@torch.no_grad()
def judged(judge: NoiseAwareClassifier, images: torch.Tensor) -> torch.Tensor:
    """The judge's labels of images in [-1, 1], at the least noisy level that it knows."""
    return torch.cat([judge(batch, 0).logits.argmax(-1) for batch in images.split(250)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=folder("fashion-mnist"), help="pipeline folder with a judge"
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[0, 1, 2, 3, 5, 8])
    parser.add_argument("--steered-by", choices=STEERED_BY, nargs="+", default=list(STEERED_BY))
    parser.add_argument("--images-per-label", type=int, default=100)
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="a labelled data set, to judge its test split")
    parser.add_argument("--output", type=Path, help="JSON of the figures")
    options = parser.parse_args()

    judge = NoiseAwareClassifier.from_pretrained(options.model / "judge")
    pipeline = ClassifierGuidedPipeline.from_pretrained(
        options.model, defaults={}
    )  # each row says what guides it
    pipeline.scheduler = exchanged(pipeline.scheduler, "ddim")
    pipeline.set_progress_bar_config(disable=True)
    labels = sorted(pipeline.config.id2label)
    count = options.images_per_label * len(labels)
    wanted = torch.tensor([labels[i % len(labels)] for i in range(count)])
    figures = {
        "images": count,
        "num_inference_steps": options.num_inference_steps,
        "seed": options.seed,
        "scheduler": type(pipeline.scheduler).__name__,
        "rows": [],
    }

    if options.data:
        test = LabelledImages(
            load_splits(options.data)["test"], resolution=pipeline.unet.config.sample_size
        )
        real = [test[i] for i in range(len(test))]
        told = judged(judge, torch.stack([item["pixel_values"] for item in real]))
        right = told == torch.tensor([item["label"] for item in real])
        figures["judge_accuracy_on_test_images"] = right.float().mean().item()
        print(f"judge on {len(test)} real test images: {right.float().mean():.2%}")

    print("steered by               scale   agreement   diversity   per label")
    for name in options.steered_by:
        unguided = None
        for scale in options.scales:
            parts = []
            for _, batch in tqdm(
                sample(
                    pipeline,
                    labels,
                    options.seed,
                    options.batch_size,
                    range(count),
                    guidance_scale=scale,
                    conditional=STEERED_BY[name],
                    output_type="latent",
                    num_inference_steps=options.num_inference_steps,
                ),
                total=-(-count // options.batch_size),
                leave=False,
            ):
                parts.append(batch.clamp(-1, 1))
            images = torch.cat(parts)
            right = (judged(judge, images) == wanted).float()
            spread = sum(
                torch.pdist(images[wanted == label].flatten(1)).mean() for label in labels
            ) / len(labels)
            unguided = unguided or spread
            each = [round(right[wanted == label].mean().item(), 3) for label in labels]
            figures["rows"].append(
                {
                    "steered_by": name,
                    "guidance_scale": scale,
                    "agreement": right.mean().item(),
                    "relative_diversity": float(spread / unguided),
                    "agreement_per_label": each,
                }
            )
            print(f"{name:24} {scale:5g}   {right.mean():9.1%}   {spread / unguided:9.2f}   {each}")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
