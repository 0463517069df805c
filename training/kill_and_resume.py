# /// script
# requires-python = ">=3.10"
# dependencies = ["guided-diffusers"]
# [tool.uv.sources]
# guided-diffusers = { path = ".." }
# ///
"""Kill a training at random moments, resume it each time, and compare it with an uninterrupted one.

    python training/kill_and_resume.py           # 20 kills of a tiny classifier, about five minutes
    python training/kill_and_resume.py --script unet --kills 5 --dataloader_num_workers 1
    python training/kill_and_resume.py --seed 7 --work_dir out/kills     # other moments; keep files

Every kill is a SIGKILL of the training and its child processes. A fifth of the kills happen during
startup, the others during steps, checkpoints and evaluations: a random time after a random one of
the next checkpoints. The final weights and all of the last checkpoint (weights, optimizer, EMA,
learning rate) must be equal bit for bit; otherwise the exit status is 1.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from guided_diffusers.cli_options import run_program
from guided_diffusers.learning.checkpointing import list_checkpoints
from guided_diffusers.learning.distributed import exit_on_value_error
from guided_diffusers.learning.options import check_ranges, option, parse

SIZE = {"layers_per_block": 1, "block_out_channels": [8, 16], "attention_head_dim": 8}
SHARED = {**SIZE, "norm_num_groups": 4, "dropout": 0.1}
CONFIGS = {
    "classifier": {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]},
    "unet": {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
}


@dataclass
class KillOptions:
    script: Literal["classifier", "unet"] = option("classifier", "training script")
    kills: int = option(20, "number of kills", 1)
    seed: int = option(0, "seed of the moments of the kills")
    steps: int = option(600, "optimizer steps", 1)
    checkpointing_steps: int = option(10, "steps between checkpoints; a divisor of --steps", 1)
    dataloader_num_workers: int = option(0, "processes that read images", 0)
    work_dir: str | None = option(None, "new folder of both runs; by default a temporary one")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.steps % self.checkpointing_steps:
            raise ValueError(
                f"--checkpointing_steps {self.checkpointing_steps}: a divisor of --steps "
                f"{self.steps} is allowed"
            )


def write_data(options: KillOptions, root: Path) -> None:
    """Write 64 images of noise with 4 labels, and a model config."""
    draw = np.random.default_rng(0)
    for i in range(64):
        folder = root / "images" / ("train" if i < 48 else "test") / f"label{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8), np.uint8)).save(folder / f"{i}.png")
    (root / "config.json").write_text(json.dumps(SHARED | CONFIGS[options.script]))


def training_command(options: KillOptions, root: Path, output: str) -> list[str]:
    """The command of a training that starts or resumes."""
    line = (
        "--resolution 8 --train_batch_size 4 --random_flip --lr_warmup_steps 10 "
        "--learning_rate 1e-3 --cpu --no_progress --resume_from_checkpoint latest "
        f"--validation_samples 4 --validation_steps {4 * options.checkpointing_steps} "
        f"--max_train_steps {options.steps} --checkpointing_steps {options.checkpointing_steps} "
        f"--dataloader_num_workers {options.dataloader_num_workers}"
    )
    if options.script == "unet":
        line += " --sample_images 0"
    data, config = (
        f"--train_data_dir={root}/images",
        f"--model_config_name_or_path={root}/config.json",
    )
    script = str(Path(__file__).with_name(f"train_{options.script}.py"))
    return [sys.executable, script, *line.split(), data, config, f"--output_dir={root / output}"]


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    checkpoints = list_checkpoints(folder)
    return int(checkpoints[-1].name.removeprefix("checkpoint-")) if checkpoints else 0


def run_until(
    command: list[str], folder: Path, log: Path, step: int = 0, seconds: float = math.inf
) -> bool:
    """Whether a training was killed, some seconds after its checkpoint of `step`; else it ended."""
    start = None
    with log.open("a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    while process.poll() is None:
        if start is None and newest_step(folder) >= step:
            start = time.monotonic()
        if start is not None and time.monotonic() - start >= seconds:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"the training failed:\n{log.read_text()[-3000:]}")
    return False


def final_state(folder: Path, step: int) -> dict[str, Any]:
    """All tensors and numbers of a finished run by name: of the model and the last checkpoint."""
    checkpoint = folder / f"checkpoint-{step}"
    paths = [*folder.glob("*.safetensors"), *folder.glob("unet/*.safetensors")]
    paths += [checkpoint / "model.safetensors", checkpoint / "optimizer.bin"]
    state = {}
    for path in [*paths, *checkpoint.glob("custom_checkpoint_*.pkl")]:
        weights = path.suffix == ".safetensors"
        content = load_file(path) if weights else torch.load(path, weights_only=True)
        state |= flatten(content, str(path.relative_to(folder)))
    return state


def flatten(value: Any, name: str) -> dict[str, Any]:
    """The leaves of nested containers by their path."""
    if not isinstance(value, dict | list | tuple):
        return {name: value}
    leaves = {}
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        leaves |= flatten(part, f"{name}/{key}")
    return leaves


def equal(first: Any, second: Any) -> bool:
    """Whether two leaves are equal bit for bit."""
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def compare_runs(options: KillOptions, root: Path) -> int:
    """Make both runs; returns the exit status: 0 if they are equal."""
    draw, log = random.Random(options.seed), root / "killed.log"
    reference, killed = root / "whole", root / "killed"
    command = training_command(options, root, "killed")
    write_data(options, root)
    start = time.monotonic()
    run_until(training_command(options, root, "whole"), reference, root / "whole.log")
    print(f"uninterrupted: {options.steps} steps, {time.monotonic() - start:.0f} s", flush=True)
    times = [path.stat().st_mtime for path in reference.glob("checkpoint-*/manifest.json")]
    for number in range(1, options.kills + 1):
        at_start, step = number % 5 == 0, newest_step(killed)
        steps_per_kill = (options.steps - step) // (options.kills - number + 2)
        step = 0 if at_start else step + draw.randint(1, max(1, steps_per_kill))
        moment = draw.uniform(0, 5 if at_start else max(times) - min(times))
        if not run_until(command, killed, log, step, moment):
            raise SystemExit(
                f"the training ended before kill {number} of {options.kills}: use more --steps"
            )
        start = "start" if at_start else "checkpoint"
        writing = ", while it wrote the next" if [*killed.glob("*.partial")] else ""
        newest = f"the newest is checkpoint-{newest_step(killed)}{writing}"
        print(f"kill {number}: {moment:.2f} s after its {start}, {newest}", flush=True)
    run_until(command, killed, log)
    first, second = final_state(reference, options.steps), final_state(killed, options.steps)
    different = sorted(first.keys() ^ second.keys())
    different += [name for name in first.keys() & second if not equal(first[name], second[name])]
    compared = f"{len(first)} tensors and numbers compared after {options.kills} kills"
    print(f"{compared}: {len(different)} differ", *different[:10], sep="\n")
    return int(bool(different))


def main() -> None:
    options = parse(KillOptions, __doc__)
    with exit_on_value_error(), tempfile.TemporaryDirectory() as temporary:
        root = Path(options.work_dir or temporary)
        if (root / "whole").exists():
            raise ValueError(f"--work_dir {root} has another comparison; a new folder is allowed")
        root.mkdir(parents=True, exist_ok=True)
        sys.exit(compare_runs(options, root))


if __name__ == "__main__":
    run_program(main)
