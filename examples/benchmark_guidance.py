"""The project's published benchmark: guidance of the bundled model at every scale, scheduler and number of steps.

    python examples/benchmark_guidance.py --reference data/fashion-mnist --output out/benchmark
    python examples/benchmark_guidance.py --reference data/fashion-mnist --output out/benchmark --device cuda
    python examples/benchmark_guidance.py --reference data/fashion-mnist --output out/benchmark --steps 10 25
    accelerate launch examples/benchmark_guidance.py --reference data/fashion-mnist --output out/benchmark

It is `guided-diffusers sweep` with these arguments; others are handed on. 84 points of 1,000 images, at the same seeds;
a point is kept when it is done, so that it may be stopped and started again, also with fewer --steps first, and several
may run on one folder. The network isn't told the label: what steers is the classifier alone.
"""

import sys

from guided_diffusers.cli import main

POINTS = ["--model", "fashion-mnist", "--scales", "0", "1", "2", "3", "5", "8", "10",
          "--schedulers", "ddim", "dpmsolver++", "ddpm", "--steps", "10", "25", "50", "250",
          "--num-images", "1000", "--no-conditional", "--dtype", "bfloat16", "--batch-size", "50"]

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
    main(["sweep", *POINTS, *sys.argv[1:]])
