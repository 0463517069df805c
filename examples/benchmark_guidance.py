"""The project's published benchmark: guidance of the bundled model by scale, scheduler and number of steps.

    python examples/benchmark_guidance.py --reference data/fashion-mnist --output out/benchmark
    python examples/benchmark_guidance.py --reference data/fashion-mnist --output out/benchmark --device cuda
    python examples/benchmark_guidance.py --reference data/fashion-mnist --output out/all --num-images 1000 \\
        --steps 10 25 50 250 --scales 0 1 2 3 5 8 10
    accelerate launch examples/benchmark_guidance.py --reference data/fashion-mnist --output out/benchmark

It is `guided-diffusers sweep` with the arguments below, once for each of `RUNS`, or once where --steps or --scales are
given; others are handed on. 500 images a point, at the same seeds: about three hours of one CPU core. A point is kept
when it is done, so that it may be stopped and started again, and several may run on one folder. The network isn't told
the label: what steers is the classifier alone. `TOLD`, in the folder `OUTPUT-told`, is with a network that is told,
which leaves guidance less to add.
"""

import sys

from guided_diffusers.cli import main

COMMON = ["--model", "fashion-mnist", "--num-images", "500", "--dtype", "bfloat16", "--batch-size", "100",
          "--intervals", "0:1", "--every", "1"]  # guidance at each step, whatever the model's preset is
ALONE = ["--no-conditional", "--schedulers", "ddim", "dpmsolver++", "ddpm"]
RUNS = [["--steps", "10", "25", "--scales", "0", "1", "2", "3", "5", "8", "10"],
        ["--steps", "50", "--scales", "0", "1", "3", "5", "10"],
        ["--steps", "250", "--scales", "0", "3", "10"]]
TOLD = ["--schedulers", "dpmsolver++", "--steps", "10", "25", "--scales", "0", "1", "3", "10"]

if __name__ == "__main__":
    given = sys.argv[1:]
    if {"-h", "--help"} & set(given):
        print(__doc__)
    if {"--steps", "--scales", "-h", "--help"} & set(given):
        main(["sweep", *COMMON, *ALONE, *given])
    else:
        for run in RUNS:
            main(["sweep", *COMMON, *ALONE, *run, *given])
        output = given[given.index("--output") + 1] if "--output" in given else "sweep"
        main(["sweep", *COMMON, *TOLD, *given, "--output", f"{output}-told"])
