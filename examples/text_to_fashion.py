"""Captions for a diffusion model without text: guidance by a noise-aware CLIP, as in GLIDE.

    python examples/text_to_fashion.py
    python examples/text_to_fashion.py --prompts "the image shows a frock" "a grey image of trainers" --scale 8

Writes a picture, a row per caption. The diffusion model gets no label.
"""

import argparse
from pathlib import Path

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareCLIP, NoiseAwareCLIPGuidance
from guided_diffusers.bundled import folder
from guided_diffusers.sampling import grid, image_generator, save_image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=[
            "the shop shows a small picture of a gown",
            "this is a bootie",
            "a handbag on a black background",
        ],
        help="captions; the bundled CLIP knows the words of training/configs/fashion_mnist_captions.json",
    )
    parser.add_argument(
        "--clip",
        default=folder("fashion-mnist") / "clip",
        help="a NoiseAwareCLIP, folder or Hub id",
    )
    parser.add_argument("--scale", type=float, default=5.0)
    parser.add_argument("--images", type=int, default=8, help="per caption (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default="text-to-fashion.png")
    options = parser.parse_args()

    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist")
    clip = NoiseAwareCLIP.from_pretrained(options.clip)
    prompts = [prompt for prompt in options.prompts for _ in range(options.images)]
    term = NoiseAwareCLIPGuidance(clip, prompts, options.scale)
    pictures = pipeline(
        num_images_per_label=len(prompts),
        guidance=term,
        conditional=False,
        num_inference_steps=options.num_inference_steps,
        generator=[image_generator(options.seed, i) for i in range(len(prompts))],
    ).images
    save_image(grid(pictures, options.prompts), options.output)
    print(f"{options.output}: a row per caption of {options.prompts}")


if __name__ == "__main__":
    main()
