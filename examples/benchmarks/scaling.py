"""How the cost of an image grows with the batch, with its size and with the number of processes: one plot, one JSON.

    OMP_NUM_THREADS=1 python examples/benchmarks/scaling.py                 # examples/figures/scaling.png, scaling.json
    python examples/benchmarks/scaling.py --sizes 16 32 64 --batches 1 8 64 --processes 1 2 4 --output out/scaling
    python examples/benchmarks/scaling.py --device cuda --sizes 28 64 128 256

Batches and processes are of the bundled model; sizes are of its architecture with random weights, in calls of equally
many pixels, and with a level more for each doubling beyond 32 pixels, as larger networks have it: attention, whose own
cost is quadratic in pixels, stays at the lowest level. A guided step of an image is the unit: CPU time on a CPU, which
other programs hardly disturb, else the wall's; the least of some repeats. Each panel has the exponent that was fitted:
of seconds an image against batch (0: flat; below 0: large batches are cheaper) and pixels (1: linear); for processes
the images a second by those of one process.
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
from guided_diffusers.sampling import sample
from guided_diffusers.utils import aside, write_json

STEPS = 3


def bundled(device: str, size: int | None = None) -> ClassifierGuidedPipeline:
    """The bundled pipeline, or one of its architecture for another size of images."""
    pipeline = ClassifierGuidedPipeline.from_bundled(defaults={})  # guided at each step
    if size is not None:
        torch.manual_seed(0)
        more = max(0, math.ceil(math.log2(size / 32)))
        unet, classifier = (
            cls.from_config(deeper(part.config, more), sample_size=size)
            for cls, part in (
                (UNet2DModel, pipeline.unet),
                (NoiseAwareClassifier, pipeline.classifier),
            )
        )
        pipeline = ClassifierGuidedPipeline(unet.eval(), pipeline.scheduler, classifier.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def deeper(config: Mapping[str, Any], more: int) -> dict[str, Any]:
    """A network's config with so many levels more, wide as its lowest; the new ones lie above it."""
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


def seconds_an_image(pipeline: ClassifierGuidedPipeline, batch: int, repeats: int) -> float:
    """Of a guided step: the least of `repeats`, each of as many calls as it takes for 16 images."""

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
        began = now()
        for _ in range(calls):
            call()
        fastest = min(fastest, now() - began)
    return fastest / (calls * batch * STEPS)


def share(rank: int, count: int, images: int, device: str) -> None:
    """What one of `count` processes does: load, say so, wait for the others, make its images, say how long it took."""
    pipeline = bundled(device)

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


def of_processes(count: int, images: int, device: str) -> dict[str, float]:
    """Images a second of `count` processes together, and the CPU seconds of a step of an image."""
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
                raise RuntimeError(f"a process of {count} did not start")
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        found = [json.loads(process.communicate(timeout=600)[0]) for process in started]
    finally:
        for process in started:
            process.kill()
    return {
        "processes": count,
        "images_a_second": images / max(one["wall"] for one in found),
        "seconds": sum(one["cpu"] for one in found) / images / STEPS,
    }


def exponent(rows: list[dict[str, Any]], name: str) -> float:
    """p of seconds ~ name^p, by least squares of the logarithms."""
    return float(
        np.polyfit(
            np.log([row[name] for row in rows]), np.log([row["seconds"] for row in rows]), 1
        )[0]
    )


def plot(figures: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (name, label) in zip(
        axes, (("batch", "images in a batch"), ("size", "pixels along a side")), strict=False
    ):
        rows = figures[name]
        axis.loglog(
            [row[name] for row in rows],
            [1e3 * row["seconds"] for row in rows],
            "o-",
            label="measured",
        )
        axis.set(xlabel=label, ylabel="ms an image and guided step")
    axes[0].set_title(f"batch: exponent {figures['exponents']['batch']:.2f}")
    axes[0].set_ylim(bottom=1)
    axes[1].set_title(f"pixels: exponent {figures['exponents']['pixels']:.2f}")
    rows = figures["size"]
    linear = [1e3 * rows[-1]["seconds"] * (row["pixels"] / rows[-1]["pixels"]) for row in rows]
    axes[1].loglog(
        [row["size"] for row in rows], linear, "--", color="gray", label="linear in pixels"
    )
    rows = figures["processes"]
    axes[2].plot(
        [row["processes"] for row in rows],
        [row["images_a_second"] for row in rows],
        "o-",
        label="measured",
    )
    axes[2].plot(
        [row["processes"] for row in rows],
        [rows[0]["images_a_second"] * row["processes"] / rows[0]["processes"] for row in rows],
        "--",
        color="gray",
        label="linear",
    )
    axes[2].set(xlabel="processes", ylabel=f"images a second, {STEPS} steps", ylim=(0, None))
    axes[2].set_xticks([row["processes"] for row in rows])
    axes[2].set_title(f"processes: {figures['throughput_ratio']:.2f} times the images of one")
    for axis, name in zip(axes, ("batch", "size"), strict=False):
        axis.set_xticks(
            [row[name] for row in figures[name]], [str(row[name]) for row in figures[name]]
        )
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(ScalarFormatter())
    for axis in axes[1:]:
        axis.legend(frameon=False)
    with aside(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[16, 28, 32, 64, 128], help="multiples of 4"
    )
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[1, 2],
        help="how many, the first is compared with",
    )
    parser.add_argument("--images", type=int, default=256, help="that the processes make together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("examples/figures/scaling"),
        help="without .png and .json",
    )
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share:
        return share(*options.share, options.images, options.device)

    figures: dict[str, Any] = {
        "device": options.device,
        "threads": torch.get_num_threads(),
        "steps": STEPS,
        "clock": "CPU" if options.device == "cpu" else "wall",
        "torch": torch.__version__,
    }
    pipeline = bundled(options.device)
    figures["batch"] = [
        {"batch": batch, "seconds": seconds_an_image(pipeline, batch, options.repeats)}
        for batch in options.batches
    ]
    figures["size"] = [
        {
            "size": size,
            "pixels": size**2,
            "seconds": seconds_an_image(
                bundled(options.device, size),
                2 * max(options.sizes) ** 2 // size**2,
                options.repeats,
            ),
        }
        for size in options.sizes
    ]
    figures["processes"] = [
        of_processes(count, options.images, options.device) for count in options.processes
    ]
    figures["exponents"] = {
        "batch": exponent(figures["batch"], "batch"),
        "pixels": exponent(figures["size"], "pixels"),
    }
    rows = figures["size"]
    figures["exponents"]["pixels, steepest"] = max(
        exponent(list(pair), "pixels") for pair in zip(rows, rows[1:], strict=False)
    )
    rates = [row["images_a_second"] for row in figures["processes"]]
    figures["throughput_ratio"] = rates[-1] / rates[0]

    for name in ("batch", "size"):
        print(
            "\n".join(
                f"{name} {row[name]:>4}: {1e3 * row['seconds']:8.2f} ms an image and step"
                for row in figures[name]
            )
        )
    for row in figures["processes"]:
        print(
            f"{row['processes']} processes: {row['images_a_second']:.1f} images a second, {1e3 * row['seconds']:.2f} "
            "CPU ms an image and step"
        )
    print(
        f"seconds an image ~ batch^{figures['exponents']['batch']:.2f}, pixels^{figures['exponents']['pixels']:.2f} "
        f"(between neighbours at most {figures['exponents']['pixels, steepest']:.2f}); "
        f"{options.processes[-1]} processes make {figures['throughput_ratio']:.2f} times the images of "
        f"{options.processes[0]}"
    )
    write_json(figures, options.output.with_suffix(".json"))
    plot(figures, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
