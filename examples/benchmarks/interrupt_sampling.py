"""Check that interrupted, parallel and differently batched sampling give the same images.

    python examples/benchmarks/interrupt_sampling.py                      # 2,000 images, ten kills, minutes
    python examples/benchmarks/interrupt_sampling.py --scheduler ddpm --format parquet --seed 1
    python examples/benchmarks/interrupt_sampling.py --device cuda --num-inference-steps 50 --output x.json

One run is uninterrupted. Another is shared by two processes. A third is killed (SIGKILL, with all
its children) and resumed, alternately by one and by two processes. All three must write the same
files, bit for bit. A fourth has another batch size, which changes the rounding in the network; the
fraction of pixels that differ is reported. The exit status is 1 if a file differs that must not, or
a pixel by more than 1 of 255.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image


def command(
    options: argparse.Namespace, folder: Path, processes: int = 1, batch_size: int | None = None
) -> list[str]:
    """Command line that generates the images, or resumes the folder."""
    launcher = []
    if processes > 1:
        launcher = f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
    program = (
        f"-m guided_diffusers sample --label all --quiet --device {options.device} "
        f"--num-images {options.num_images} --shard-size {options.shard_size} "
        f"--num-inference-steps {options.num_inference_steps} --format {options.format} "
        f"--batch-size {batch_size or options.batch_size}"
    ).split()
    if options.scheduler:
        program += ["--scheduler", options.scheduler]
    paths = ["--model", options.model, "--output", str(folder)]
    return [sys.executable, *launcher, *program, *paths]


def run(line: list[str], log: Path, kill_at: tuple[Path, int, float] | None = None) -> bool:
    """Run a command; return whether it was killed.

    Args:
        kill_at: (folder, shards, seconds): kill it so long after so many shards are finished.
    """
    environment, reached = {**os.environ, "OMP_NUM_THREADS": "1"}, None
    with log.open("a") as out:
        process = subprocess.Popen(
            line, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        while process.poll() is None:
            if kill_at and reached is None and finished_shards(kill_at[0]) >= kill_at[1]:
                reached = time.monotonic()
            if reached is not None and time.monotonic() - reached >= kill_at[2]:
                return True
            time.sleep(0.01)
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
        process.wait()
    if process.returncode:
        raise SystemExit(f"sampling failed:\n{log.read_text()[-3000:]}")
    return False


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants, also in other sessions, as torch's launcher has."""
    root = psutil.Process(pid)
    root.suspend()  # so that it starts no further process
    processes = [*root.children(recursive=True), root]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def finished_shards(folder: Path) -> int:
    return len(list((folder / ".shards").glob("*.json")))


def contents(folder: Path) -> dict[str, bytes]:
    """Content of every file, by its path."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def pixels(folder: Path) -> np.ndarray:
    """All images in order, (N, H, W, C) or (N, H, W) int."""
    if (folder / "samples.npz").exists():
        return np.load(folder / "samples.npz")["arr_0"].astype(int)
    if (folder / "data").exists():
        from datasets import load_dataset

        parts = sorted(map(str, folder.glob("data/*")))
        with tempfile.TemporaryDirectory() as cache:
            rows = load_dataset("parquet", data_files=parts, cache_dir=cache)["train"]
            return np.stack([np.asarray(row["image"], int) for row in rows])
    paths = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    return np.stack([np.asarray(Image.open(path), int) for path in paths])


def kill_repeatedly(
    options: argparse.Namespace, folder: Path, seconds_per_shard: float, log: Path
) -> int:
    """Kill and resume a run, then let it finish; return how many kills left a partial file."""
    draw = random.Random(options.seed)
    shards, partial_files = -(-options.num_images // options.shard_size), 0
    for number in range(1, options.kills + 1):
        finished = finished_shards(folder)
        if number % 5 == 0:  # while it starts
            target, seconds = 0, draw.uniform(0, 8)
        else:
            share = max(1, (shards - finished) // (options.kills - number + 2))
            target = min(finished + draw.randint(1, share), shards - 1)
            seconds = draw.uniform(0, 2 * seconds_per_shard)
        processes = 2 - number % 2
        if not run(command(options, folder, processes), log, (folder, target, seconds)):
            raise SystemExit(
                f"sampling ended before kill {number} of {options.kills}: use more --num-images"
            )
        has_partial = any(folder.rglob("*.partial"))
        partial_files += has_partial
        print(
            f"kill {number} of {processes} process(es), {seconds:.2f} s after shard {target}: "
            f"{finished_shards(folder)} of {shards} shards finished"
            f"{', a partial file' if has_partial else ''}",
            flush=True,
        )
    run(command(options, folder), log)
    return partial_files


def compare(options: argparse.Namespace, root: Path) -> dict[str, object]:
    """Make the four runs and return the differences between them."""
    log, start = root / "log.txt", time.monotonic()
    run(command(options, root / "whole"), log)
    seconds = time.monotonic() - start
    print(f"uninterrupted: {options.num_images} images in {seconds:.0f} s", flush=True)
    run(command(options, root / "two", processes=2), log)
    print("two processes: done", flush=True)
    seconds_per_shard = seconds * options.shard_size / options.num_images
    partial_files = kill_repeatedly(options, root / "killed", seconds_per_shard, log)
    run(command(options, root / "other", batch_size=options.other_batch_size), log)

    expected = contents(root / "whole")
    metrics: dict[str, object] = {
        "num_images": options.num_images,
        "files": len(expected),
        "kills": options.kills,
        "kills_that_left_a_file_half_written": partial_files,
    }
    for name in ("two", "killed"):
        actual = contents(root / name)
        different = [path for path in expected | actual if expected.get(path) != actual.get(path)]
        metrics[f"files_that_differ_{name}"] = len(different)
    difference = np.abs(pixels(root / "whole") - pixels(root / "other"))
    return metrics | {
        "batch_sizes": [options.batch_size, options.other_batch_size],
        "pixels_that_differ": float(np.mean(difference > 0)),
        "largest_difference": int(difference.max()),
        "images_that_differ": float(np.mean(difference.reshape(len(difference), -1).any(1))),
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", default="fashion-mnist")
    option("--num-images", type=int, default=2000)
    option("--num-inference-steps", type=int, default=5)
    option("--scheduler", help="default: set by the model")
    option("--format", choices=("imagefolder", "parquet", "npz"), default="imagefolder")
    option("--batch-size", type=int, default=64)
    option("--other-batch-size", type=int, default=7)
    option("--shard-size", type=int, default=64)
    option("--kills", type=int, default=10)
    option("--seed", type=int, default=0, help="seed of the times of kills (default: %(default)s)")
    option("--device", default="cpu")
    option("--work-dir", type=Path, help="new folder for the images (default: a temporary one)")
    option("--output", type=Path, help="JSON file for the metrics")
    options = parser.parse_args()
    if options.work_dir and options.work_dir.exists():
        parser.error(f"--work-dir {options.work_dir}: a new folder is allowed")
    return options


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.work_dir or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        metrics = compare(options, root)
    print(json.dumps(metrics, indent=2))
    if options.output:
        options.output.write_text(json.dumps(metrics, indent=2) + "\n")
    differ = metrics["files_that_differ_two"] or metrics["files_that_differ_killed"]
    sys.exit(int(bool(differ or metrics["largest_difference"] > 1)))


if __name__ == "__main__":
    main()
