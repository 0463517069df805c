"""Cost of an image by batch size, image size and number of processes: a plot and a JSON file.

    OMP_NUM_THREADS=1 python examples/benchmarks/scaling.py                 # examples/figures/scaling.png, scaling.json
    python examples/benchmarks/scaling.py --sizes 16 32 64 --batches 1 8 64 --processes 1 2 4 --output out/scaling
    python examples/benchmarks/scaling.py --device cuda --sizes 28 64 128 256

Batch sizes and processes are measured with the bundled model. Image sizes are measured with its architecture and random
weights, in calls with the same number of pixels, with one more level for each doubling above 32 pixels, as in larger
networks, so that attention, whose cost is quadratic in pixels, stays at the lowest level. The unit is a guided step of
one image: CPU time on a CPU, which other load hardly disturbs, otherwise wall-clock time; the minimum of some repeats.
Each panel gives a fitted exponent: of seconds per image against batch size (0: flat; below 0: large batches
are cheaper) and pixels (1: linear); for processes, the images per second relative to one process.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.files import aside, write_json
from guided_diffusers.sampling import sample

STEPS = 3


def make_pipeline(device: str, size: int | None = None) -> ClassifierGuidedPipeline:
    """The bundled pipeline, or its architecture with random weights for images of `size` pixels."""
    pipeline = ClassifierGuidedPipeline.from_bundled(defaults={})  # no preset: guided at each step
    if size is not None:
        torch.manual_seed(0)
        more = max(0, math.ceil(math.log2(size / 32)))
        unet, classifier = (
            cls.from_config(with_levels(part.config, more), sample_size=size)
            for cls, part in (
                (UNet2DModel, pipeline.unet),
                (NoiseAwareClassifier, pipeline.classifier),
            )
        )
        pipeline = ClassifierGuidedPipeline(unet.eval(), pipeline.scheduler, classifier.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def with_levels(config: Mapping[str, Any], more: int) -> dict[str, Any]:
    """A network's config with `more` levels above its lowest one, and as wide."""
    config = dict(config)
    config["block_out_channels"] = [
        *config["block_out_channels"],
        *config["block_out_channels"][-1:] * more,
    ]
    config["down_block_types"] = [
        *config["down_block_types"][:1] * more,
        *config["down_block_types"],
    ]
    if "up_block_types" in config:
        config["up_block_types"] = [
            *config["up_block_types"],
            *config["up_block_types"][-1:] * more,
        ]
    return config


def seconds_per_image(pipeline: ClassifierGuidedPipeline, batch: int, repeats: int) -> float:
    """Seconds of a guided step per image: the minimum of `repeats`, each of at least 16 images."""

    def call() -> None:
        pipeline([0] * batch, guidance_scale=1.0, num_inference_steps=STEPS, output_type="latent")

    def now() -> float:
        if pipeline.device.type != "cpu":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    call()
    calls, fastest = math.ceil(16 / batch), float("inf")
    for _ in range(repeats):
        start = now()
        for _ in range(calls):
            call()
        fastest = min(fastest, now() - start)
    return fastest / (calls * batch * STEPS)


def run_share(rank: int, count: int, images: int, device: str) -> None:
    """One of `count` processes: load, print "ready", wait for a line, make its images, print the seconds."""
    pipeline = make_pipeline(device)

    def make(indices: range) -> None:
        for _ in sample(
            pipeline, range(10), 0, 32, indices, num_inference_steps=STEPS, output_type="latent"
        ):
            pass

    make(range(32))
    print("ready", flush=True)
    sys.stdin.readline()
    wall, cpu = time.perf_counter(), time.process_time()
    make(range(rank, images, count))
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))


def measure_processes(count: int, images: int, device: str) -> dict[str, float]:
    """Images per second of `count` processes together, and CPU seconds per image and step."""
    command = [sys.executable, __file__, "--device", device, "--images", str(images), "--share"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(count)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for rank in range(count)
    ]
    try:
        for process in started:
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError(f"one of {count} processes did not start")
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        times = [json.loads(process.communicate(timeout=600)[0]) for process in started]
    finally:
        for process in started:
            process.kill()
    return {
        "processes": count,
        "images_a_second": images / max(seconds["wall"] for seconds in times),
        "seconds": sum(seconds["cpu"] for seconds in times) / images / STEPS,
    }


def exponent(rows: list[dict[str, Any]], name: str) -> float:
    """p of seconds ~ name^p, fitted by least squares in the logarithms."""
    return float(
        np.polyfit(
            np.log([row[name] for row in rows]), np.log([row["seconds"] for row in rows]), 1
        )[0]
    )


def plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    batch_axis, size_axis, process_axis = figure.subplots(1, 3)
    exponents = results["exponents"]
    plot_cost(batch_axis, results["batch"], "batch", "images in a batch")
    batch_axis.set(title=f"batch: exponent {exponents['batch']:.2f}", ylim=(1, None))

    sizes = results["size"]
    plot_cost(size_axis, sizes, "size", "pixels along a side")
    linear = [1e3 * sizes[-1]["seconds"] * row["pixels"] / sizes[-1]["pixels"] for row in sizes]
    x = [row["size"] for row in sizes]
    size_axis.plot(x, linear, "--", color="gray", label="linear in pixels")
    size_axis.set_title(f"pixels: exponent {exponents['pixels']:.2f}")

    rows = results["processes"]
    x = [row["processes"] for row in rows]
    linear = [rows[0]["images_a_second"] * count / x[0] for count in x]
    process_axis.plot(x, [row["images_a_second"] for row in rows], "o-", label="measured")
    process_axis.plot(x, linear, "--", color="gray", label="linear")
    process_axis.set(xlabel="processes", ylabel=f"images per second, {STEPS} steps", xticks=x)
    process_axis.set(ylim=(0, None))
    process_axis.set_title(f"processes: {results['throughput_ratio']:.2f} times the images of one")
    for axis in (size_axis, process_axis):
        axis.legend(frameon=False)
    with aside(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def plot_cost(axis: Any, rows: list[dict[str, Any]], name: str, label: str) -> None:
    from matplotlib.ticker import NullLocator, ScalarFormatter

    x = [row[name] for row in rows]
    axis.loglog(x, [1e3 * row["seconds"] for row in rows], "o-", label="measured")
    axis.set(xlabel=label, ylabel="ms per image and guided step")
    axis.set_xticks(x, [str(value) for value in x])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(ScalarFormatter())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    pipeline, largest = make_pipeline(options.device), max(options.sizes)
    batches = [
        {"batch": batch, "seconds": seconds_per_image(pipeline, batch, options.repeats)}
        for batch in options.batches
    ]
    sizes = []
    for size in options.sizes:
        pipeline, batch = make_pipeline(options.device, size), 2 * largest**2 // size**2
        seconds = seconds_per_image(pipeline, batch, options.repeats)
        sizes.append({"size": size, "pixels": size**2, "seconds": seconds})
    processes = [
        measure_processes(count, options.images, options.device) for count in options.processes
    ]
    neighbours = zip(sizes, sizes[1:], strict=False)
    return {
        "device": options.device,
        "threads": torch.get_num_threads(),
        "steps": STEPS,
        "clock": "CPU" if options.device == "cpu" else "wall",
        "torch": torch.__version__,
        "batch": batches,
        "size": sizes,
        "processes": processes,
        "exponents": {
            "batch": exponent(batches, "batch"),
            "pixels": exponent(sizes, "pixels"),
            "pixels, steepest": max(exponent(list(pair), "pixels") for pair in neighbours),
        },
        "throughput_ratio": processes[-1]["images_a_second"] / processes[0]["images_a_second"],
    }


def print_results(results: dict[str, Any]) -> None:
    for name in ("batch", "size"):
        for row in results[name]:
            print(f"{name} {row[name]:>4}: {1e3 * row['seconds']:8.2f} ms per image and step")
    for row in results["processes"]:
        print(
            f"{row['processes']} processes: {row['images_a_second']:.1f} images per second, "
            f"{1e3 * row['seconds']:.2f} CPU ms per image and step"
        )
    exponents = results["exponents"]
    print(
        f"seconds per image ~ batch^{exponents['batch']:.2f}, pixels^{exponents['pixels']:.2f} "
        f"(between neighbours at most {exponents['pixels, steepest']:.2f}); "
        f"{results['processes'][-1]['processes']} processes make {results['throughput_ratio']:.2f} "
        f"times the images of {results['processes'][0]['processes']}"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option, several = parser.add_argument, {"type": int, "nargs": "+"}
    option("--batches", default=[1, 2, 4, 8, 16, 32, 64, 128], help="batch sizes", **several)
    option("--sizes", default=[16, 28, 32, 64, 128], help="image sizes, multiples of 4", **several)
    option("--processes", default=[1, 2], help="their numbers; first the reference", **several)
    option("--images", type=int, default=256, help="images of all processes (default: %(default)s)")
    option("--repeats", type=int, default=3, help="(default: %(default)s)")
    option("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    option(
        "--output",
        type=Path,
        default=Path("examples/figures/scaling"),
        help="path without .png and .json (default: %(default)s)",
    )
    option("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.share:
        run_share(*options.share, options.images, options.device)
        return
    results = measure(options)
    print_results(results)
    write_json(results, options.output.with_suffix(".json"))
    plot(results, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
