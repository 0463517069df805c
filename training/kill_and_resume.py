"""Kill a training at random moments, resume it each time, and compare it with an uninterrupted one, bit for bit.

    python training/kill_and_resume.py                          # 20 kills of a tiny classifier, about five minutes
    python training/kill_and_resume.py --script unet --kills 5 --dataloader_num_workers 1
    python training/kill_and_resume.py --seed 7 --work_dir out/kills        # other moments; what is written is kept

Every kill is a SIGKILL of the training and of all that it started. A fifth of them fall on its start, the others on its
steps, checkpoints and evaluations: a random time after a random one of the next checkpoints. The final weights and all
of the last checkpoint (weights, optimizer, moving average, learning rate) are compared. Ends with 1 if they differ.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import HfArgumentParser

HERE = Path(__file__).parent
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
    script: Literal["classifier", "unet"] = field(
        default="classifier", metadata={"help": "which training"}
    )
    kills: int = field(default=20, metadata={"help": "how many"})
    seed: int = field(default=0, metadata={"help": "of the moments"})
    steps: int = field(default=600, metadata={"help": "optimizer steps"})
    checkpointing_steps: int = field(
        default=10, metadata={"help": "steps between checkpoints; it divides --steps"}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that read images"})
    work_dir: str | None = field(
        default=None, metadata={"help": "a new folder for all of it; a temporary one if left out"}
    )

    def __post_init__(self) -> None:
        for name in ("kills", "steps", "checkpointing_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: 1 or more is allowed")
        if self.steps % self.checkpointing_steps:
            raise ValueError(
                f"--checkpointing_steps {self.checkpointing_steps}: a divisor of --steps {self.steps} is "
                "allowed"
            )


def command(options: KillOptions, root: Path, output: str) -> list[str]:
    """A training on images of noise, which this writes if they aren't there."""
    draw = np.random.default_rng(0)
    for i in range(0 if (root / "images").exists() else 64):
        folder = root / "images" / ("train" if i < 48 else "test") / f"label{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8), np.uint8)).save(folder / f"{i}.png")
    (root / "config.json").write_text(json.dumps(CONFIGS[options.script]))
    line = (
        f"--resolution 8 --train_batch_size 4 --random_flip --lr_warmup_steps 10 --learning_rate 1e-3 --cpu "
        f"--validation_samples 4 --validation_steps {4 * options.checkpointing_steps} --no_progress "
        f"--max_train_steps {options.steps} --checkpointing_steps {options.checkpointing_steps} "
        f"--dataloader_num_workers {options.dataloader_num_workers} --resume_from_checkpoint latest"
    )
    line += " --sample_images 0" if options.script == "unet" else ""
    return [
        sys.executable,
        str(HERE / f"train_{options.script}.py"),
        *line.split(),
        "--train_data_dir",
        str(root / "images"),
        "--model_config_name_or_path",
        str(root / "config.json"),
        "--output_dir",
        str(root / output),
    ]


def newest(folder: Path) -> int:
    """The step of the newest checkpoint."""
    names = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def run_until(
    line: list[str], folder: Path, log: Path, step: int = 0, seconds: float = math.inf
) -> bool:
    """Start the training and kill it so many seconds after there is a checkpoint of `step`; whether it was killed."""
    begun = None
    with log.open("a") as out:
        process = subprocess.Popen(line, stdout=out, stderr=out, start_new_session=True)
    while process.poll() is None:
        if begun is None and newest(folder) >= step:
            begun = time.monotonic()
        if begun is not None and time.monotonic() - begun >= seconds:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"the training failed:\n{log.read_text()[-3000:]}")
    return False


def state(folder: Path, step: int) -> dict[str, Any]:
    """All tensors of a finished run by name: of the model, and of the last checkpoint."""
    last = folder / f"checkpoint-{step}"
    files = [
        *folder.glob("*.safetensors"),
        *folder.glob("unet/*.safetensors"),
        last / "model.safetensors",
    ]
    found = {
        f"{path.relative_to(folder)}: {name}": tensor
        for path in files
        for name, tensor in load_file(path).items()
    }
    for path in [last / "optimizer.bin", *sorted(last.glob("custom_checkpoint_*.pkl"))]:
        found |= flat(torch.load(path, weights_only=True), f"{path.relative_to(folder)}: ")
    return found


def flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, dict | list | tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            key: leaf
            for part, inside in parts
            for key, leaf in flat(inside, f"{name}/{part}").items()
        }
    return {name: value}


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def work(options: KillOptions, root: Path) -> int:
    draw, whole, killed, log = (
        random.Random(options.seed),
        root / "whole",
        root / "killed",
        root / "killed.log",
    )
    begun = time.monotonic()
    run_until(command(options, root, "whole"), whole, root / "whole.log")
    seconds = time.monotonic() - begun
    times = [path.stat().st_mtime for path in sorted(whole.glob("checkpoint-*/manifest.json"))]
    print(f"uninterrupted: {options.steps} steps, {seconds:.0f} s", flush=True)
    for number in range(1, options.kills + 1):
        at_start, step = number % 5 == 0, newest(killed)
        share = (options.steps - step) // (
            options.kills - number + 2
        )  # steps that this part may take
        step = 0 if at_start else step + draw.randint(1, max(1, share))
        moment = draw.uniform(0, 5 if at_start else max(times) - min(times))
        if not run_until(command(options, root, "killed"), killed, log, step, moment):
            raise SystemExit(
                f"the training ended before kill {number} of {options.kills}: give it more --steps"
            )
        half = ", while it wrote the next" if [*killed.glob("*.partial")] else ""
        print(
            f"kill {number}: {moment:.2f} s after its {'start' if at_start else 'checkpoint'}, the newest is "
            f"checkpoint-{newest(killed)}{half}",
            flush=True,
        )
    run_until(command(options, root, "killed"), killed, log)
    one, other = state(whole, options.steps), state(killed, options.steps)
    different = sorted(one.keys() ^ other.keys()) + [
        name for name in one.keys() & other.keys() if not same(one[name], other[name])
    ]
    print(
        f"{len(one)} tensors and numbers compared after {options.kills} kills: {len(different)} differ"
    )
    print("\n".join(different[:10]))
    return int(bool(different))


def main() -> None:
    parser = HfArgumentParser(KillOptions, description=__doc__)
    try:
        options = parser.parse_args_into_dataclasses()[0]
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place if options.work_dir is None else options.work_dir)
        if (root / "whole").exists():
            parser.error(f"--work_dir {root} has another comparison; a new folder is allowed")
        root.mkdir(parents=True, exist_ok=True)
        sys.exit(work(options, root))


if __name__ == "__main__":
    main()
