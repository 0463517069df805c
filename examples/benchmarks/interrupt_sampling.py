"""Kill sampling at random moments, share it among processes, make its batches others: are the images the same?

    python examples/benchmarks/interrupt_sampling.py                                   # 2,000 images, ten kills, a few minutes
    python examples/benchmarks/interrupt_sampling.py --scheduler ddpm --format parquet --seed 1
    python examples/benchmarks/interrupt_sampling.py --device cuda --num-inference-steps 50 --output figures.json

One run is left alone. Another is shared by two processes. A third is killed (SIGKILL, with all that it started) and
started again, in turns by one and by two processes. All three must have the same files, bit for bit. A fourth has
batches of another size: there a network's sums are rounded otherwise, and the share of pixels that differ is said. Ends
with 1 if a file differs that mustn't, or a pixel by more than 1 of 255.
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
    """A run that makes the folder, or goes on with it."""
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
    """Start a command, and kill it (folder, shards, seconds): so long after so many shards are done; whether it was."""
    environment, begun = {**os.environ, "OMP_NUM_THREADS": "1"}, None
    with log.open("a") as out:
        process = subprocess.Popen(
            line, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        while process.poll() is None:
            if until and begun is None and done(until[0]) >= until[1]:
                begun = time.monotonic()
            if begun is not None and time.monotonic() - begun >= until[2]:
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
    """SIGKILL a process and all that it started, also in sessions of their own, as torch's launcher does."""
    launcher = psutil.Process(pid)
    launcher.suspend()  # it starts nothing meanwhile
    everyone = [*launcher.children(recursive=True), launcher]
    for one in everyone:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(everyone, timeout=10)


def done(folder: Path) -> int:
    """How many shards are there."""
    return len(list((folder / ".shards").glob("*.json")))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def pixels(folder: Path) -> np.ndarray:
    """All images, (N, H, W, C) uint8, in their order."""
    if (folder / "samples.npz").exists():
        return np.load(folder / "samples.npz")["arr_0"]
    if (folder / "data").exists():
        from datasets import load_dataset

        with tempfile.TemporaryDirectory() as cache:
            rows = load_dataset(
                "parquet", data_files=sorted(map(str, folder.glob("data/*"))), cache_dir=cache
            )["train"]
            return np.stack([np.asarray(row["image"]) for row in rows])
    paths = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def kill(options: argparse.Namespace, folder: Path, seconds_a_shard: float, log: Path) -> int:
    """Kill the run so many times; how many fell on a write."""
    draw, shards, torn = (
        random.Random(options.seed),
        -(-options.num_images // options.shard_size),
        0,
    )
    for number in range(1, options.kills + 1):
        there, at_start = done(folder), number % 5 == 0
        share = max(
            1, (shards - there) // (options.kills - number + 2)
        )  # shards that this part may make
        wanted = 0 if at_start else min(there + draw.randint(1, share), shards - 1)
        seconds = draw.uniform(0, 8 if at_start else 2 * seconds_a_shard)
        processes = 2 - number % 2
        if not run(command(options, folder, processes), log, (folder, wanted, seconds)):
            raise SystemExit(
                f"sampling ended before kill {number} of {options.kills}: give it more --num-images"
            )
        half = len(list(folder.rglob("*.partial")))
        torn += half > 0
        print(
            f"kill {number}: {processes} process{'es' * (processes > 1)}, {seconds:.2f} s after shard {wanted}; "
            f"{done(folder)} of {shards} shards are there{', a file is half-written' if half else ''}",
            flush=True,
        )
    run(command(options, folder), log)
    return torn


def work(options: argparse.Namespace, root: Path) -> dict[str, object]:
    log, begun = root / "log.txt", time.monotonic()
    run(command(options, root / "whole"), log)
    seconds = time.monotonic() - begun
    print(f"uninterrupted: {options.num_images} images in {seconds:.0f} s", flush=True)
    run(command(options, root / "two", processes=2), log)
    print("two processes: done", flush=True)
    torn = kill(options, root / "killed", seconds * options.shard_size / options.num_images, log)
    run(command(options, root / "other", batch_size=options.other_batch_size), log)

    whole = files(root / "whole")
    figures: dict[str, object] = {
        "num_images": options.num_images,
        "files": len(whole),
        "kills": options.kills,
        "kills_that_left_a_file_half_written": torn,
    }
    for name in ("two", "killed"):
        found = files(root / name)
        figures[f"files_that_differ_{name}"] = sum(
            whole.get(path) != found.get(path) for path in whole | found
        )
    one, other = (pixels(root / name).astype(int) for name in ("whole", "other"))
    figures |= {
        "batch_sizes": [options.batch_size, options.other_batch_size],
        "pixels_that_differ": float(np.mean(one != other)),
        "largest_difference": int(abs(one - other).max()),
        "images_that_differ": float(np.mean((one != other).reshape(len(one), -1).any(1))),
    }
    return figures


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
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="a new folder that keeps the images; a temporary one if left out",
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if options.work_dir and options.work_dir.exists():
        parser.error(f"--work-dir {options.work_dir}: a new folder is allowed")
    with tempfile.TemporaryDirectory() as place:
        root = options.work_dir or Path(place)
        root.mkdir(parents=True, exist_ok=True)
        figures = work(options, root)
    print(json.dumps(figures, indent=2))
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n")
    wrong = (
        figures["files_that_differ_two"]
        or figures["files_that_differ_killed"]
        or figures["largest_difference"] > 1
    )
    sys.exit(int(bool(wrong)))


if __name__ == "__main__":
    main()
