"""A population before and after its images are weighted by the classifier.

    python examples/populations.py
    python examples/populations.py --label bag --scale 3 --particles 32 --output bags.png

The images of a population are guided by the gradient of log p(label | x_t), which is never exact, and weighted by
the classifier's values at each step, so that they are samples of p(x) p(label | x). Writes a picture of two rows, of
the same noise: the guided images, from the largest to the smallest weight, and the population that is resampled by its
weights. Prints the weights, the effective sample size, and the estimate of log p(label).
"""

import argparse
from pathlib import Path

from diffusers import DDPMScheduler

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.sampling import grid, image_generator, save_image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--label", default="dress")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the guidance (default: %(default)s)"
    )
    parser.add_argument("--particles", type=int, default=12, help="images (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default="populations.png")
    options = parser.parse_args()

    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist")
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)  # noise in each step
    weighted, resampled = (
        pipeline(
            options.label,
            particles=options.particles,
            resample=resample,
            guidance_scale=options.scale,
            conditional=False,
            num_inference_steps=options.num_inference_steps,
            generator=[image_generator(options.seed, i) for i in range(options.particles)],
        )
        for resample in (False, True)
    )
    weights = weighted.log_weights.flatten().softmax(0)
    order = weights.argsort(descending=True).tolist()
    print("weights:", ", ".join(f"{weights[i]:.3f}" for i in order))
    for name, result in {"weighted": weighted, "resampled": resampled}.items():
        print(
            f"{name}: log p({options.label}) about {float(result.log_evidence):.2f}, "
            f"effective sample size {float(result.effective_sample_size):.1f}"
        )
    pictures = [*(weighted.images[i] for i in order), *resampled.images]
    save_image(grid(pictures, ["by weight", "resampled"]), options.output)


if __name__ == "__main__":
    main()
