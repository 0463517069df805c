"""The project's published benchmark: guidance of the bundled model by scale, scheduler and number of steps.

    python examples/benchmarks/guidance.py --reference data/fashion-mnist --output out/benchmark
    python examples/benchmarks/guidance.py --reference data/fashion-mnist --output out/benchmark --device cuda
    python examples/benchmarks/guidance.py --reference data/fashion-mnist --output out/all --num-images 1000 \\
        --steps 10 25 50 250 --scales 0 1 2 3 5 8 10
    accelerate launch examples/benchmarks/guidance.py --reference data/fashion-mnist --output out/benchmark

It is `guided-diffusers sweep` of the bundled networks without the model's preset: guidance at each step of the whole
run. 500 images a point, at the same seeds: about four hours of one CPU core. A point is kept when it is done, so that
it may be stopped and started again, and several may run on one folder. The network isn't told the label: what steers
is the classifier alone. In the folder `OUTPUT-told` is what a network does that is told, which leaves guidance less to
add.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from guided_diffusers.evaluation import load_network
from guided_diffusers.pipeline import DEFAULTS
from guided_diffusers.sampling.commands import device_of, team
from guided_diffusers.sweep import sweep
from guided_diffusers.utils import exchanged, load_pipeline

SCHEDULERS = ("ddim", "dpmsolver++", "ddpm")
RUNS = {
    (10, 25): (0, 1, 2, 3, 5, 8, 10),
    (50,): (0, 1, 3, 5, 10),
    (250,): (0, 3, 10),
}  # steps: scales
TOLD: dict[str, Any] = {"schedulers": ("dpmsolver++",), "steps": (10, 25), "scales": (0, 1, 3, 10)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option(
        "--reference", required=True, help="labelled real images, as of `guided-diffusers sweep`"
    )
    option(
        "--output", type=Path, default=Path("out/benchmark"), help="a folder (default: %(default)s)"
    )
    option("--schedulers", nargs="+", default=SCHEDULERS, help="(default: ddim dpmsolver++ ddpm)")
    option(
        "--steps",
        type=int,
        nargs="+",
        help="with --scales, instead of what is published, and without `-told`",
    )
    option("--scales", type=float, nargs="+", help="with --steps")
    option("--num-images", type=int, default=500, help="of a point (default: %(default)s)")
    option("--device", help="cpu, cuda, mps, ... (default: the fastest there is)")
    option("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    if (options.steps is None) != (options.scales is None):
        parser.error(
            f"--steps {options.steps}, --scales {options.scales}: both, or neither, are needed"
        )

    device = device_of(options.device, team(options.device))
    pipeline, judge = (
        load_pipeline("fashion-mnist").to(device),
        load_network("fashion-mnist", device),
    )
    pipeline.scheduler = exchanged(pipeline.scheduler, "ddim")
    pipeline.register_to_config(
        defaults={**DEFAULTS, "guidance_scale": pipeline.config.defaults["guidance_scale"]}
    )

    def run(output: Path, **more: Any) -> None:
        print(
            sweep(
                pipeline,
                options.reference,
                output,
                judge,
                judge,
                num_images=options.num_images,
                dtype="bfloat16",
                batch_size=100,
                model="fashion-mnist",
                progress=not options.quiet,
                **more,
            )
        )

    for steps, scales in (
        {tuple(options.steps): options.scales} if options.steps else RUNS
    ).items():
        run(
            options.output,
            schedulers=options.schedulers,
            steps=steps,
            scales=scales,
            conditional=False,
        )
    if not options.steps:
        run(options.output.with_name(f"{options.output.name}-told"), **TOLD)


if __name__ == "__main__":
    main()
