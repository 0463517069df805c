"""The same noise at growing guidance scales, a row per scale: from diverse to sharp.

python examples/scale_sweep.py
python examples/scale_sweep.py --label coat --scales 0 1 3 10 --classifier-free --output coats.png
"""

import argparse
from pathlib import Path

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.sampling import grid, sample, save_image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--label", default="sneaker")
    parser.add_argument("--scales", type=float, nargs="+", default=[0, 0.5, 1, 2, 5, 10])
    parser.add_argument(
        "--classifier-free",
        action="store_true",
        help="classifier-free guidance instead of the classifier",
    )
    parser.add_argument("--images", type=int, default=8, help="per row (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default="scale-sweep.png")
    options = parser.parse_args()

    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist")
    pictures = []
    for scale in options.scales:
        if options.classifier_free:
            guidance = {"guidance_scale": 0, "classifier_free_scale": scale}
        else:
            guidance = {"guidance_scale": scale, "guidance_start": 0.0, "conditional": False}
        for _, images in sample(
            pipeline,
            [options.label],
            options.seed,
            indices=range(options.images),
            num_inference_steps=options.num_inference_steps,
            **guidance,
        ):
            pictures += images
    save_image(grid(pictures, [f"{scale:g}" for scale in options.scales]), options.output)
    print(f"{options.output}: {options.label} at scales {options.scales}, a row per scale")


if __name__ == "__main__":
    main()
