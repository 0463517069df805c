"""What writing images to disk, in shards with a manifest, costs against a loop that keeps them in memory.

    python examples/benchmarks/sampling.py                                    # Fashion-MNIST on the CPU, a few minutes
    python examples/benchmarks/sampling.py --device cuda --num-images 4096 --num-inference-steps 50 --format npz
    python examples/benchmarks/sampling.py --repeats 9 --output figures.json

Both make the same images, in turns. The ratio is the median over the turns of the loop's seconds by the folder's: 1 is
as fast, above 0.97 is the aim. The clock on the wall counts, and the CPU time, which other programs don't disturb.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.sampling import image_generator, sample_to_folder


def bare_loop(pipeline: ClassifierGuidedPipeline, options: argparse.Namespace) -> list[Any]:
    """What a user writes who wants the images in memory."""
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="a folder or a Hub id with ten labels (default: the bundled Fashion-MNIST)"
    )
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--num-inference-steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--format", choices=("imagefolder", "parquet", "npz"), default="imagefolder"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    load = ClassifierGuidedPipeline
    pipeline = (load.from_pretrained(options.model) if options.model else load.from_bundled()).to(
        options.device
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline([0] * options.batch_size, num_inference_steps=2)  # what happens once for all

    seconds: dict[str, list[dict[str, float]]] = {"loop": [], "folder": []}
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as place:

            def folder(place: str = place) -> Any:
                return sample_to_folder(
                    pipeline,
                    range(10),
                    f"{place}/images",
                    options.num_images,
                    batch_size=options.batch_size,
                    shard_size=max(256, options.batch_size),
                    format=options.format,
                    progress=False,
                    num_inference_steps=options.num_inference_steps,
                )

            both = {"loop": lambda: bare_loop(pipeline, options), "folder": folder}
            for name in sorted(both, reverse=repeat % 2 == 0):
                result, spent = timed(both[name])
                seconds[name].append(spent)
                if name == "loop":
                    images = result
            if options.format == "imagefolder":
                from PIL import Image

                found = sorted(Path(place).rglob("*.png"), key=lambda path: path.name)
                same = all(
                    np.array_equal(Image.open(path), image)
                    for path, image in zip(found, images, strict=True)
                )
                assert same, "the images differ"
        print(
            f"{repeat + 1} of {options.repeats}: "
            + ", ".join(
                f"{name} {seconds[name][-1]['wall']:.2f} s ({seconds[name][-1]['cpu']:.2f} s CPU)"
                for name in seconds
            ),
            flush=True,
        )

    pairs = list(zip(seconds["loop"], seconds["folder"], strict=True))
    figures = {
        "num_images": options.num_images,
        "num_inference_steps": options.num_inference_steps,
        "batch_size": options.batch_size,
        "format": options.format,
        "device": options.device,
        **{
            f"throughput_ratio_{clock}": statistics.median(
                loop[clock] / folder[clock] for loop, folder in pairs
            )
            for clock in ("wall", "cpu")
        },
        "seconds": seconds,
    }
    print(
        f"throughput of the folder / of the loop: {figures['throughput_ratio_wall']:.3f} by the wall clock, "
        f"{figures['throughput_ratio_cpu']:.3f} by CPU time"
    )
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
