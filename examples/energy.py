"""Guidance by functions of the image: symmetry, the left half of the first image, darkness.

    python examples/energy.py
    python examples/energy.py --label dress --scale 2 --output dresses.png

An energy returns one number per image, (B,), of the predicted images (B, C, H, W) in [-1, 1]. Guidance
samples p(x) exp(-scale * energy), so images of low energy are more likely. Writes a picture: a row without
energy, then a row per energy of `ENERGIES`, with the same noise.
"""

import argparse
from pathlib import Path

from guided_diffusers import ClassifierGuidedPipeline, EnergyGuidance
from guided_diffusers.sampling import grid, image_generator, save_image

ENERGIES = {
    "symmetric": lambda x: (x - x.flip(-1)).square().sum((1, 2, 3)),
    "left of the 1st": lambda x: (
        (x - x[:1].detach())[..., : x.shape[-1] // 2].square().sum((1, 2, 3))
    ),
    "dark": lambda x: 800 * (x.mean((1, 2, 3)) + 0.8).square(),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--label", default="t-shirt")
    parser.add_argument("--scale", type=float, default=5.0)
    parser.add_argument("--images", type=int, default=8, help="per row (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default="energy.png")
    options = parser.parse_args()

    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist")
    pictures = []
    for name in (None, *ENERGIES):
        term = EnergyGuidance(ENERGIES[name], options.scale) if name else None
        # "lie_trotter": in the output, energies as strong as these break a second-order scheduler
        images = pipeline(
            [options.label] * options.images,
            guidance=term,
            output_type="pt",
            guidance_algorithm="lie_trotter",
            num_inference_steps=options.num_inference_steps,
            generator=[image_generator(options.seed, i) for i in range(options.images)],
        ).images
        energies = {key: energy(2 * images - 1).mean().item() for key, energy in ENERGIES.items()}
        print(
            f"{name or 'none':>16}: "
            + ", ".join(f"{key} {value:.1f}" for key, value in energies.items())
        )
        pictures += pipeline.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())
    save_image(grid(pictures, ["none", *ENERGIES]), options.output)


if __name__ == "__main__":
    main()
