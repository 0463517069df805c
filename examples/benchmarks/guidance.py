"""Guidance of the bundled model by scale, scheduler and number of steps: `guided-diffusers sweep` in one command.

    python examples/benchmarks/guidance.py --reference data/fashion-mnist --output out/benchmark
    python examples/benchmarks/guidance.py --reference data/fashion-mnist --output out/benchmark --device cuda
    python examples/benchmarks/guidance.py --reference data/fashion-mnist --output out/all --num-images 1000 \\
        --steps 10 25 50 250 --scales 0 1 2 3 5 8 10
    accelerate launch examples/benchmarks/guidance.py --reference data/fashion-mnist --output out/benchmark

The model's preset isn't used: guidance acts at each step of the whole run. 500 images per setting with the same seeds
take about four hours of one CPU core. Run it again to resume; several processes may share one folder. The network
doesn't get the label, so only the classifier steers. The folder `OUTPUT-told` has the same for a network that gets the
label.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from guided_diffusers.arguments import DEFAULTS
from guided_diffusers.cli_options import launched_processes, select_device
from guided_diffusers.evaluation import load_network
from guided_diffusers.sweep import sweep
from guided_diffusers.utils import exchanged, load_pipeline

SCHEDULERS = ("ddim", "dpmsolver++", "ddpm")
RUNS = {
    (10, 25): (0, 1, 2, 3, 5, 8, 10),
    (50,): (0, 1, 3, 5, 10),
    (250,): (0, 3, 10),
}  # steps: scales
WITH_LABEL: dict[str, Any] = {
    "schedulers": ("dpmsolver++",),
    "steps": (10, 25),
    "scales": (0, 1, 3, 10),
}


def parse_options() -> argparse.Namespace:
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
        help="with --scales: measure only these, without `-told` (default: the published settings)",
    )
    option("--scales", type=float, nargs="+", help="with --steps")
    option("--num-images", type=int, default=500, help="per setting (default: %(default)s)")
    option("--device", help="cpu, cuda, mps, ... (default: the fastest available)")
    option("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    if (options.steps is None) != (options.scales is None):
        parser.error(f"--steps {options.steps}, --scales {options.scales}: give both or neither")
    return options


def main() -> None:
    options = parse_options()
    device = select_device(options.device, launched_processes(options.device))
    pipeline = load_pipeline("fashion-mnist").to(device)
    judge = load_network("fashion-mnist", device)
    pipeline.scheduler = exchanged(pipeline.scheduler, "ddim")
    pipeline.register_to_config(
        defaults={**DEFAULTS, "guidance_scale": pipeline.config.defaults["guidance_scale"]}
    )

    def run(output: Path, **settings: Any) -> None:
        result = sweep(
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
            **settings,
        )
        print(result)

    published = options.steps is None
    scales_by_steps = RUNS if published else {tuple(options.steps): options.scales}
    for steps, scales in scales_by_steps.items():
        settings = {"schedulers": options.schedulers, "steps": steps, "scales": scales}
        run(options.output, **settings, conditional=False)
    if published:
        run(options.output.with_name(f"{options.output.name}-told"), **WITH_LABEL)


if __name__ == "__main__":
    main()
