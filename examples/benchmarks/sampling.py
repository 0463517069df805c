"""Throughput of sampling to a folder, in shards with a manifest, against a loop that keeps the images in memory.

    python examples/benchmarks/sampling.py                                    # Fashion-MNIST on the CPU, a few minutes
    python examples/benchmarks/sampling.py --device cuda --num-images 4096 --num-inference-steps 50 --format npz
    python examples/benchmarks/sampling.py --repeats 9 --output figures.json

Both make the same images, in turns. The ratio is the median over the turns of the loop's seconds / the folder's
seconds: 1 is as fast, the aim is above 0.97. Measured in wall-clock time and in CPU time, which other load disturbs
less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.files import write_json
from guided_diffusers.sampling import image_generator, sample_to_folder


def bare_loop(pipeline: ClassifierGuidedPipeline, options: argparse.Namespace) -> list[Any]:
    """Images of all labels in turn, kept in memory."""
    images: list[Any] = []
    for start in range(0, options.num_images, options.batch_size):
        indices = range(start, min(start + options.batch_size, options.num_images))
        images += pipeline(
            [i % 10 for i in indices],
            generator=[image_generator(0, i) for i in indices],
            num_inference_steps=options.num_inference_steps,
        ).images
    return images


def timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def check_same(folder: Path, images: list[Any]) -> None:
    """Raises AssertionError if the folder's images aren't those of the loop."""
    paths = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    for path, image in zip(paths, images, strict=True):
        assert np.array_equal(Image.open(path), image), f"{path.name} differs"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", help="folder or Hub id with ten labels (default: the bundled Fashion-MNIST)")
    option("--num-images", type=int, default=256, help="(default: %(default)s)")
    option("--num-inference-steps", type=int, default=10, help="(default: %(default)s)")
    option("--batch-size", type=int, default=64, help="(default: %(default)s)")
    option("--format", choices=("imagefolder", "parquet", "npz"), default="imagefolder")
    option("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    option("--device", default="cpu", help="(default: %(default)s)")
    option("--output", type=Path, help="JSON file of the results")
    return parser.parse_args()


def measure(
    pipeline: ClassifierGuidedPipeline, options: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Wall-clock and CPU seconds of each turn of the loop and of the folder."""
    seconds: dict[str, list[dict[str, float]]] = {"loop": [], "folder": []}
    for turn in range(options.repeats):
        with tempfile.TemporaryDirectory() as root:

            def to_folder(root: str = root) -> None:
                sample_to_folder(
                    pipeline,
                    range(10),
                    f"{root}/images",
                    options.num_images,
                    batch_size=options.batch_size,
                    shard_size=max(256, options.batch_size),
                    format=options.format,
                    progress=False,
                    num_inference_steps=options.num_inference_steps,
                )

            functions = {"loop": lambda: bare_loop(pipeline, options), "folder": to_folder}
            for name in sorted(functions, reverse=turn % 2 == 0):
                result, spent = timed(functions[name])
                seconds[name].append(spent)
                if name == "loop":
                    images = result
            if options.format == "imagefolder":
                check_same(Path(root), images)
        last = {name: turns[-1] for name, turns in seconds.items()}
        text = ", ".join(
            f"{name} {s['wall']:.2f} s ({s['cpu']:.2f} s CPU)" for name, s in last.items()
        )
        print(f"{turn + 1} of {options.repeats}: {text}", flush=True)
    return seconds


def main() -> None:
    options = parse_options()
    if options.model:
        pipeline = ClassifierGuidedPipeline.from_pretrained(options.model)
    else:
        pipeline = ClassifierGuidedPipeline.from_bundled()
    pipeline = pipeline.to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline([0] * options.batch_size, num_inference_steps=2)  # warm-up
    seconds = measure(pipeline, options)

    results: dict[str, Any] = {
        "num_images": options.num_images,
        "num_inference_steps": options.num_inference_steps,
        "batch_size": options.batch_size,
        "format": options.format,
        "device": options.device,
        "seconds": seconds,
    }
    pairs = list(zip(seconds["loop"], seconds["folder"], strict=True))
    for clock in ("wall", "cpu"):
        ratios = [loop[clock] / folder[clock] for loop, folder in pairs]
        results[f"throughput_ratio_{clock}"] = statistics.median(ratios)
    print(
        f"throughput of the folder / of the loop: {results['throughput_ratio_wall']:.3f} in "
        f"wall-clock time, {results['throughput_ratio_cpu']:.3f} in CPU time"
    )
    if options.output:
        write_json(results, options.output)


if __name__ == "__main__":
    main()
