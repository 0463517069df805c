"""What the gradient through the network costs and gains, for an off-the-shelf classifier on the predicted x0.

    python examples/train_off_the_shelf.py --data data/fashion-mnist --output out/fashion-mnist-resnet
    python examples/benchmarks/x0_gradient.py --classifier out/fashion-mnist-resnet
    python examples/benchmarks/x0_gradient.py --classifier out/fashion-mnist-resnet --images 200 --scales 0.5 1 2 4
    python examples/benchmarks/x0_gradient.py --classifier out/fashion-mnist-resnet --data data/fashion-mnist

The diffusion network gets its null label: the classifier alone steers. A judge that never guided says how many images
show the label that was asked for. Spread is the mean distance between two images of a label. With --data also: how
often the classifier is right about the predicted x0 of noised test images, and the noise-aware one about their x_t.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from guided_diffusers import (
    ClassifierGuidedPipeline,
    ImageClassifierGuidance,
    NoiseAwareClassifier,
    NoiseLevel,
)
from guided_diffusers.bundled import folder
from guided_diffusers.learning.data import LabelledImages, load_splits
from guided_diffusers.likelihood import logits_of
from guided_diffusers.noise import x0_coefficients
from guided_diffusers.sampling import image_generator
from guided_diffusers.utils import exchanged


@torch.no_grad()
def accuracies(
    pipeline: ClassifierGuidedPipeline, term: ImageClassifierGuidance, data: str, count: int
) -> list[dict]:
    """At ten noise levels, of noised test images: the classifier's on their predicted x0, the noise-aware one's."""
    test = LabelledImages(load_splits(data)["test"], resolution=pipeline.unet.config.sample_size)
    items = [test[i * len(test) // count] for i in range(count)]
    x0, labels = (
        torch.stack([item["pixel_values"] for item in items]),
        torch.tensor([item["label"] for item in items]),
    )
    null, rows = torch.full((count,), pipeline.unet.config.num_class_embeds - 1), []
    for t in range(49, 1000, 100):
        abar = pipeline.scheduler.alphas_cumprod[t].item()
        alpha, sigma = abar**0.5, (1 - abar) ** 0.5
        level = NoiseLevel(
            alpha, sigma, *x0_coefficients(pipeline.scheduler.config.prediction_type, alpha, sigma)
        )
        x_t = level.alpha * x0 + level.sigma * torch.randn(
            x0.shape, generator=torch.Generator().manual_seed(t)
        )
        predicted = level.x0(
            x_t,
            torch.cat(
                [
                    pipeline.unet(x, t, y).sample
                    for x, y in zip(x_t.split(100), null.split(100), strict=True)
                ]
            ),
        )
        logits = logits_of(term.module(term.preprocess(predicted)))
        aware = pipeline.classifier(x_t, t).logits
        rows.append(
            {
                "timestep": t,
                "on_predicted_x0": (logits.argmax(-1) == labels).float().mean().item(),
                "noise_aware": (aware.argmax(-1) == labels).float().mean().item(),
            }
        )
        print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--classifier", required=True, help="an image classification model with its processor"
    )
    parser.add_argument("--data", help="a labelled data set, for its test images")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 4, 16])
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("x0-gradient.json"))
    options = parser.parse_args()

    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist", defaults={})
    pipeline.scheduler = exchanged(pipeline.scheduler, "ddim")
    judge = NoiseAwareClassifier.from_pretrained(folder("fashion-mnist") / "judge")
    classifier = AutoModelForImageClassification.from_pretrained(options.classifier)
    processor = AutoImageProcessor.from_pretrained(options.classifier)
    labels = torch.arange(options.images) % len(pipeline.config.id2label)
    rows = []
    for scale, through_network in [(0, False)] + [
        (scale, how) for scale in options.scales for how in (False, True)
    ]:
        term = ImageClassifierGuidance(
            classifier, labels, scale, processor=processor, through_network=through_network
        )
        began, cpu_began = time.perf_counter(), time.process_time()
        images = pipeline(
            num_images_per_label=options.images,
            num_inference_steps=options.num_inference_steps,
            generator=[image_generator(options.seed, i) for i in range(options.images)],
            guidance=term,
            output_type="latent",
        ).images.clamp(-1, 1)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        with torch.no_grad():
            agreement = (judge(images, 0).logits.argmax(-1) == labels).float().mean().item()
            log_p = term.log_likelihood(images, None).mean().item()
        spread = torch.stack(
            [torch.pdist(images[labels == label].flatten(1)).mean() for label in labels.unique()]
        )
        rows.append(
            {
                "scale": scale,
                "through_network": through_network,
                "judge_agreement": agreement,
                "mean_log_p": log_p,
                "spread": spread.mean().item(),
                "seconds_per_step": seconds / options.num_inference_steps,
                "cpu_seconds_per_step": cpu_seconds / options.num_inference_steps,
            }
        )
        print(
            "  ".join(
                f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
                for name, value in rows[-1].items()
            )
        )
    figures = {
        "images": options.images,
        "num_inference_steps": options.num_inference_steps,
        "seed": options.seed,
        "scheduler": type(pipeline.scheduler).__name__,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    if options.data:
        figures["accuracy"] = accuracies(pipeline, term, options.data, 1000)
    options.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
