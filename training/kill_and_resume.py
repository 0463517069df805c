# /// script
# requires-python = ">=3.10"
# dependencies = ["guided-diffusers"]
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

from guided_diffusers.learning.checkpointing import list_checkpoints
from guided_diffusers.learning.distributed import exit_on_value_error
from guided_diffusers.learning.options import AT_LEAST_0, AT_LEAST_1, check_ranges, option, parse

SHARED = {
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "block_out_channels": [8, 16],
    "dropout": 0.1,
}
CONFIGS = {
    "classifier": {**SHARED, "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]},
    "unet": {
        **SHARED,
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
    },
}


@dataclass
class KillOptions:
    script: Literal["classifier", "unet"] = option("classifier", "training script")
    kills: int = option(20, "number of kills", AT_LEAST_1)
    seed: int = option(0, "seed of the moments of the kills")
    steps: int = option(600, "optimizer steps", AT_LEAST_1)
    checkpointing_steps: int = option(
        10, "steps between checkpoints; a divisor of --steps", AT_LEAST_1
    )
    dataloader_num_workers: int = option(0, "processes that read images", AT_LEAST_0)
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
    (root / "config.json").write_text(json.dumps(CONFIGS[options.script]))


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
    paths = {
        "--train_data_dir": root / "images",
        "--model_config_name_or_path": root / "config.json",
        "--output_dir": root / output,
    }
    script = Path(__file__).with_name(f"train_{options.script}.py")
    words = [str(word) for option in paths.items() for word in option]
    return [sys.executable, str(script), *line.split(), *words]


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    checkpoints = list_checkpoints(folder)
    return int(checkpoints[-1].name.removeprefix("checkpoint-")) if checkpoints else 0


def run_until(
    command: list[str], folder: Path, log: Path, step: int = 0, seconds: float = math.inf
) -> bool:
    """Run a training, and kill it some seconds after it has a checkpoint of `step` or later.

    Returns:
        Whether it was killed; else it ended.
    """
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
    saved = [*folder.glob("*.safetensors"), *folder.glob("unet/*.safetensors")]
    state = {}
    for path in [*saved, checkpoint / "model.safetensors"]:
        state |= flatten(load_file(path), str(path.relative_to(folder)))
    for path in [checkpoint / "optimizer.bin", *checkpoint.glob("custom_checkpoint_*.pkl")]:
        content = torch.load(path, weights_only=True)
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
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return first == second


def compare_runs(options: KillOptions, root: Path) -> int:
    """Make both runs; returns the exit status: 0 if they are equal."""
    draw, log = random.Random(options.seed), root / "killed.log"
    reference, killed = root / "whole", root / "killed"
    command = training_command(options, root, "killed")
    write_data(options, root)
    start = time.monotonic()
    run_until(training_command(options, root, "whole"), reference, root / "whole.log")
    seconds = time.monotonic() - start
    times = [path.stat().st_mtime for path in reference.glob("checkpoint-*/manifest.json")]
    print(f"uninterrupted: {options.steps} steps, {seconds:.0f} s", flush=True)
    for number in range(1, options.kills + 1):
        at_start, step = number % 5 == 0, newest_step(killed)
        steps_per_kill = (options.steps - step) // (options.kills - number + 2)
        step = 0 if at_start else step + draw.randint(1, max(1, steps_per_kill))
        moment = draw.uniform(0, 5 if at_start else max(times) - min(times))
        if not run_until(command, killed, log, step, moment):
            raise SystemExit(
                f"the training ended before kill {number} of {options.kills}: use more --steps"
            )
        print(
            f"kill {number}: {moment:.2f} s after its {'start' if at_start else 'checkpoint'}, the "
            f"newest is checkpoint-{newest_step(killed)}"
            + (", while it wrote the next" if [*killed.glob("*.partial")] else ""),
            flush=True,
        )
    run_until(command, killed, log)
    first, second = final_state(reference, options.steps), final_state(killed, options.steps)
    different = sorted(first.keys() ^ second.keys())
    different += [name for name in first.keys() & second if not equal(first[name], second[name])]
    print(
        f"{len(first)} tensors and numbers compared after {options.kills} kills: "
        f"{len(different)} differ"
    )
    print("\n".join(different[:10]))
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
    main()
