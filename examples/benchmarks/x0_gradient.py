"""Cost and gain of the gradient through the diffusion network, for an image classifier on the predicted x0.

    python examples/train_off_the_shelf.py --data data/fashion-mnist --output out/fashion-mnist-resnet
    python examples/benchmarks/x0_gradient.py --classifier out/fashion-mnist-resnet
    python examples/benchmarks/x0_gradient.py --classifier out/fashion-mnist-resnet --images 200 --scales 0.5 1 2 4
    python examples/benchmarks/x0_gradient.py --classifier out/fashion-mnist-resnet --data data/fashion-mnist

The diffusion network gets its null label, so only the classifier steers. Agreement is the share of images whose label
the judge, a classifier that never guides, recognises. Spread is the mean distance between two images of a label.
With --data also: the accuracy of the classifier on the predicted x0 of noised test images, and of the noise-aware
classifier on their x_t.
"""

import argparse
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
from guided_diffusers.files import write_json
from guided_diffusers.learning.data import LabelledImages, load_splits
from guided_diffusers.likelihood import logits_of
from guided_diffusers.noise import x0_coefficients
from guided_diffusers.sampling import image_generator
from guided_diffusers.utils import exchanged


def level_at(pipeline: ClassifierGuidedPipeline, t: int) -> NoiseLevel:
    alphas_cumprod = pipeline.scheduler.alphas_cumprod[t].item()
    alpha, sigma = alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5
    prediction = pipeline.scheduler.config.prediction_type
    return NoiseLevel(alpha, sigma, *x0_coefficients(prediction, alpha, sigma))


@torch.no_grad()
def accuracies(
    pipeline: ClassifierGuidedPipeline, term: ImageClassifierGuidance, data: str, count: int
) -> list[dict]:
    """Accuracies of both classifiers at ten noise levels, on `count` test images."""
    test = LabelledImages(load_splits(data)["test"], resolution=pipeline.unet.config.sample_size)
    items = [test[i * len(test) // count] for i in range(count)]
    x0 = torch.stack([item["pixel_values"] for item in items])
    labels = torch.tensor([item["label"] for item in items])
    null = torch.full((100,), pipeline.unet.config.num_class_embeds - 1)
    rows = []
    for t in range(49, 1000, 100):
        level = level_at(pipeline, t)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t))
        x_t = level.alpha * x0 + level.sigma * noise
        outputs = [pipeline.unet(x, t, null[: len(x)]).sample for x in x_t.split(100)]
        predicted = level.x0(x_t, torch.cat(outputs))
        logits = logits_of(term.module(term.preprocess(predicted)))
        noise_aware_logits = pipeline.classifier(x_t, t).logits
        rows.append(
            {
                "timestep": t,
                "on_predicted_x0": (logits.argmax(-1) == labels).float().mean().item(),
                "noise_aware": (noise_aware_logits.argmax(-1) == labels).float().mean().item(),
            }
        )
        print(rows[-1])
    return rows


def measure(
    pipeline: ClassifierGuidedPipeline,
    judge: NoiseAwareClassifier,
    term: ImageClassifierGuidance,
    labels: torch.Tensor,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Metrics and seconds per step of one guided run."""
    start, cpu_start = time.perf_counter(), time.process_time()
    images = pipeline(
        num_images_per_label=options.images,
        num_inference_steps=options.num_inference_steps,
        generator=[image_generator(options.seed, i) for i in range(options.images)],
        guidance=term,
        output_type="latent",
    ).images.clamp(-1, 1)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    with torch.no_grad():
        agreement = (judge(images, 0).logits.argmax(-1) == labels).float().mean().item()
        log_p = term.log_likelihood(images, None).mean().item()
    spreads = [torch.pdist(images[labels == y].flatten(1)).mean() for y in labels.unique()]
    return {
        "judge_agreement": agreement,
        "mean_log_p": log_p,
        "spread": torch.stack(spreads).mean().item(),
        "seconds_per_step": seconds / options.num_inference_steps,
        "cpu_seconds_per_step": cpu_seconds / options.num_inference_steps,
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--classifier", required=True, help="image classification model with its processor")
    option("--data", help="labelled dataset, for its test images")
    option("--images", type=int, default=60, help="(default: %(default)s)")
    option("--scales", type=float, nargs="+", default=[1, 4, 16], help="(default: 1 4 16)")
    option("--num-inference-steps", type=int, default=20, help="(default: %(default)s)")
    option("--seed", type=int, default=0, help="(default: %(default)s)")
    option("--output", type=Path, default=Path("x0-gradient.json"), help="JSON file of the results")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist", defaults={})
    pipeline.scheduler = exchanged(pipeline.scheduler, "ddim")
    judge = NoiseAwareClassifier.from_pretrained(folder("fashion-mnist") / "judge")
    classifier = AutoModelForImageClassification.from_pretrained(options.classifier)
    processor = AutoImageProcessor.from_pretrained(options.classifier)
    labels = torch.arange(options.images) % len(pipeline.config.id2label)
    settings = [(0, False)]
    settings += [(scale, through) for scale in options.scales for through in (False, True)]
    rows = []
    for scale, through_network in settings:
        term = ImageClassifierGuidance(
            classifier, labels, scale, processor=processor, through_network=through_network
        )
        row = measure(pipeline, judge, term, labels, options)
        rows.append({"scale": scale, "through_network": through_network, **row})
        values = "  ".join(f"{name} {value:.3f}" for name, value in row.items())
        print(f"scale {scale:g}  through_network {through_network}  {values}")
    results = {
        "images": options.images,
        "num_inference_steps": options.num_inference_steps,
        "seed": options.seed,
        "scheduler": type(pipeline.scheduler).__name__,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    if options.data:
        results["accuracy"] = accuracies(pipeline, term, options.data, 1000)
    write_json(results, options.output)


if __name__ == "__main__":
    main()
