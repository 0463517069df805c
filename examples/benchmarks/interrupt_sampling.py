"""Are the images the same after kills at random moments, with several processes, and in other batches?

    python examples/benchmarks/interrupt_sampling.py                                   # 2,000 images, ten kills, a few minutes
    python examples/benchmarks/interrupt_sampling.py --scheduler ddpm --format parquet --seed 1
    python examples/benchmarks/interrupt_sampling.py --device cuda --num-inference-steps 50 --output figures.json

One run is uninterrupted. One is shared by two processes. One is killed (SIGKILL, with its child processes) and resumed,
by one and two processes in turn. These three must have the same files, bit for bit. The fourth has another batch size,
where sums are rounded differently: the share of pixels that differ is printed. The exit code is 1 if a file of the
first three differs, or a pixel of the fourth by more than 1 of 255.
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
from math import ceil
from pathlib import Path

import numpy as np
import psutil
from datasets import load_dataset
from PIL import Image

from guided_diffusers.utils import write_json


def command(
    options: argparse.Namespace, folder: Path, processes: int = 1, batch_size: int | None = None
) -> list[str]:
    """Command that fills the folder, or resumes it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    program = [
        "-m",
        "guided_diffusers",
        "sample",
        "--model",
        options.model,
        "--label",
        "all",
        "--device",
        options.device,
        "--num-images",
        str(options.num_images),
        "--num-inference-steps",
        str(options.num_inference_steps),
        "--format",
        options.format,
        "--batch-size",
        str(batch_size or options.batch_size),
        "--shard-size",
        str(options.shard_size),
        "--output",
        str(folder),
        "--quiet",
        *(["--scheduler", options.scheduler] if options.scheduler else []),
    ]
    return [sys.executable, *(launcher if processes > 1 else []), *program]


def run(line: list[str], log: Path, until: tuple[Path, int, float] | None = None) -> bool:
    """Run a command; with until=(folder, shards, seconds), kill it so many seconds after so many shards.

    Returns whether it was killed.
    """
    environment, since = {**os.environ, "OMP_NUM_THREADS": "1"}, None
    with log.open("a") as out:
        process = subprocess.Popen(
            line, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        while process.poll() is None:
            if until and since is None and finished_shards(until[0]) >= until[1]:
                since = time.monotonic()
            if since is not None and time.monotonic() - since >= until[2]:
                return True
            time.sleep(0.01)
    finally:
        if process.poll() is None:
            kill_all(process.pid)
        process.wait()
    if process.returncode:
        raise SystemExit(f"sampling failed:\n{log.read_text()[-3000:]}")
    return False


def kill_all(pid: int) -> None:
    """SIGKILL a process and its descendants, also those in other sessions, as of torch's launcher."""
    launcher = psutil.Process(pid)
    launcher.suspend()  # so that it starts no more
    processes = [*launcher.children(recursive=True), launcher]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def finished_shards(folder: Path) -> int:
    return len(list((folder / ".shards").glob("*.json")))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def pixels(folder: Path) -> np.ndarray:
    """All images in order, (N, H, W, C) uint8."""
    if (folder / "samples.npz").exists():
        return np.load(folder / "samples.npz")["arr_0"]
    if (folder / "data").exists():
        with tempfile.TemporaryDirectory() as cache:
            rows = load_dataset(
                "parquet", data_files=sorted(map(str, folder.glob("data/*"))), cache_dir=cache
            )["train"]
            return np.stack([np.asarray(row["image"]) for row in rows])
    paths = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def kill(options: argparse.Namespace, folder: Path, seconds_a_shard: float, log: Path) -> int:
    """Kill the run `options.kills` times, then finish it. Returns how many kills left a partial file."""
    draw, shards, torn = (
        random.Random(options.seed),
        ceil(options.num_images / options.shard_size),
        0,
    )
    for number in range(1, options.kills + 1):
        finished, at_start = finished_shards(folder), number % 5 == 0
        share = max(1, (shards - finished) // (options.kills - number + 2))  # left for this part
        target = 0 if at_start else min(finished + draw.randint(1, share), shards - 1)
        seconds = draw.uniform(0, 8 if at_start else 2 * seconds_a_shard)
        processes = 2 - number % 2
        if not run(command(options, folder, processes), log, (folder, target, seconds)):
            raise SystemExit(
                f"sampling ended before kill {number} of {options.kills}: use more --num-images"
            )
        partial = any(folder.rglob("*.partial"))
        torn += partial
        print(
            f"kill {number}: {processes} process{'es' * (processes > 1)}, {seconds:.2f} s after shard {target}; "
            f"{finished_shards(folder)} of {shards} shards finished{', a partial file' if partial else ''}",
            flush=True,
        )
    run(command(options, folder), log)
    return torn


def measure(options: argparse.Namespace, root: Path) -> dict[str, object]:
    """Make the four runs below `root` and compare them."""
    log, start = root / "log.txt", time.monotonic()
    run(command(options, root / "uninterrupted"), log)
    seconds = time.monotonic() - start
    print(f"uninterrupted: {options.num_images} images in {seconds:.0f} s", flush=True)
    run(command(options, root / "two", processes=2), log)
    print("two processes: done", flush=True)
    torn = kill(options, root / "killed", seconds * options.shard_size / options.num_images, log)
    run(command(options, root / "other", batch_size=options.other_batch_size), log)

    expected = files(root / "uninterrupted")
    results: dict[str, object] = {
        "num_images": options.num_images,
        "files": len(expected),
        "kills": options.kills,
        "kills_that_left_a_file_half_written": torn,
    }
    for name in ("two", "killed"):
        actual = files(root / name)
        results[f"files_that_differ_{name}"] = sum(
            expected.get(path) != actual.get(path) for path in expected | actual
        )
    first, other = (pixels(root / name).astype(int) for name in ("uninterrupted", "other"))
    results |= {
        "batch_sizes": [options.batch_size, options.other_batch_size],
        "pixels_that_differ": float(np.mean(first != other)),
        "largest_difference": int(abs(first - other).max()),
        "images_that_differ": float(np.mean((first != other).reshape(len(first), -1).any(1))),
    }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fashion-mnist")
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--num-inference-steps", type=int, default=5)
    parser.add_argument("--scheduler", help="default: the model's own")
    parser.add_argument(
        "--format", choices=("imagefolder", "parquet", "npz"), default="imagefolder"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--other-batch-size", type=int, default=7)
    parser.add_argument("--shard-size", type=int, default=64)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments of the kills (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="new folder that keeps the images (default: a temporary one)",
    )
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    if options.work_dir and options.work_dir.exists():
        parser.error(f"--work-dir {options.work_dir} exists: only a new folder is allowed")
    with tempfile.TemporaryDirectory() as temporary:
        root = options.work_dir or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        results = measure(options, root)
    print(json.dumps(results, indent=2))
    if options.output:
        write_json(results, options.output)
    files_differ = results["files_that_differ_two"] or results["files_that_differ_killed"]
    sys.exit(int(bool(files_differ or results["largest_difference"] > 1)))


if __name__ == "__main__":
    main()
