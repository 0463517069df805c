"""Stable Diffusion, guided by an off-the-shelf image classifier on the predicted images.

    python examples/stable_diffusion_classifier.py
    python examples/stable_diffusion_classifier.py --prompt "a photo of a dog" --label "golden retriever" --scale 30
    python examples/stable_diffusion_classifier.py --classifier facebook/convnext-tiny-224 --device cuda

Writes a picture: the images of the prompt alone, and below them the guided ones.
"""

import argparse
from pathlib import Path

from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import AutoImageProcessor, AutoModelForImageClassification

from guided_diffusers import ImageClassifierGuidance, guide
from guided_diffusers.sampling import grid, image_generator, save_image


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="folder or Hub id"
    )
    parser.add_argument("--classifier", default="microsoft/resnet-50", help="folder or Hub id")
    parser.add_argument("--prompt", default="a photo of a dog on a meadow")
    parser.add_argument(
        "--label", default="golden retriever", help="a label name of the classifier, or an id"
    )
    parser.add_argument("--scale", type=float, default=20.0, help="scale of the classifier; 0: off")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=5.0,
        help="classifier-free scale of the prompt; 1: off",
    )
    parser.add_argument(
        "--start",
        type=float,
        default=0.2,
        help="fraction of the run at which the classifier starts; earlier predicted images are blurred",
    )
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--num-inference-steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("stable-diffusion-classifier.png"))
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    pipeline = StableDiffusionPipeline.from_pretrained(options.model).to(options.device)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    classifier = AutoModelForImageClassification.from_pretrained(options.classifier).to(
        options.device
    )
    label = int(options.label) if options.label.isdigit() else options.label
    term = ImageClassifierGuidance(
        classifier,
        label,
        options.scale,
        options.start,
        processor=AutoImageProcessor.from_pretrained(options.classifier),
    )

    def sample() -> list:
        return pipeline(
            options.prompt,
            num_images_per_prompt=options.images,
            guidance_scale=options.guidance_scale,
            generator=[image_generator(options.seed, i) for i in range(options.images)],
            num_inference_steps=options.num_inference_steps,
        ).images

    unguided = sample()
    with guide(pipeline, term):
        guided = sample()
    save_image(grid([*unguided, *guided], ["unguided", options.label]), options.output)


if __name__ == "__main__":
    main()
