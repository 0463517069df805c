"""Checkpoints: written aside and moved into place; checked before they are loaded.

Only complete checkpoints of the same run are loaded, and only if they hold nothing but data.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import ConfigMixin
from safetensors import SafetensorError
from torch.serialization import get_unsafe_globals_in_checkpoint

from ..files import write_json
from .distributed import SHARDED
from .options import Options

# In a checkpoint: its step, the identity of its run, and the size and checksum of each file.
MANIFEST = "manifest.json"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # Python's, torch's, safetensors'
LOAD_ERRORS = (*WRITE_ERRORS, EOFError, KeyError, TypeError, UnpicklingError, ValueError)
# Classes and functions in a checkpoint's pickles, beside tensors and plain Python: those of random
# states and of DeepSpeed's optimizer.
TRUSTED_GLOBALS = {
    "numpy.dtype",
    "numpy.ndarray",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtypes.UInt32DType",
    "_codecs.encode",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def run_identity(
    options: Options,
    accelerator: Accelerator,
    model: torch.nn.Module,
    images: int | str,
    steps: int,
) -> dict[str, Any]:
    """Settings that must be equal for a resumed run to equal the uninterrupted one.

    All options but those that may change, the effect of some of these, and the model's config;
    `images` is the number of training images, or the kind of a stream.
    """
    names = [f.name for f in fields(options) if not f.metadata["may_change"]]
    settings = {name: getattr(options, name) for name in names}
    settings |= {
        "images": images,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "images a forward pass": options.train_batch_size * accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
    if options.lr_scheduler not in ("constant", "constant_with_warmup"):
        settings["max_train_steps"] = steps
    kind = accelerator.distributed_type
    if kind in SHARDED:
        settings["distributed_type"] = kind.value
    if kind == DistributedType.DEEPSPEED:  # each process saves a part of the optimizer
        settings["processes"] = accelerator.num_processes
    config = model.config.items() if isinstance(model, ConfigMixin) else ()
    settings |= {f"network's {name}": value for name, value in config if not name.startswith("_")}
    return json.loads(json.dumps(settings, default=str))


def save_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, limit: int, identity: dict[str, Any]
) -> None:
    """Write `checkpoint-STEP` aside, move it into place, keep `limit` checkpoints (0: all).

    Raises:
        OSError: if it can't be written, for instance to a full disk; older ones stay as they were.
    """
    partial, checkpoint = folder / f"checkpoint-{step}.partial", folder / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            paths = [path for path in sorted(partial.rglob("*")) if path.is_file()]
            files = {str(path.relative_to(partial)): checksum(path) for path in paths}
            write_json({"step": step, "run": identity, "files": files}, partial / MANIFEST)
            checksum(partial / MANIFEST)
            shutil.rmtree(checkpoint, ignore_errors=True)
            os.replace(partial, checkpoint)
    except WRITE_ERRORS as error:
        shutil.rmtree(partial, ignore_errors=True)
        if "DataLoader worker" in str(error):  # torch raises that wherever the main thread is
            raise
        raise OSError(f"{checkpoint} can't be written: {error}") from error
    if accelerator.is_main_process and limit:
        for old in list_checkpoints(folder)[:-limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def checksum(path: Path) -> list[int]:
    """Size and CRC-32 of a file, which is on the disk afterwards."""
    crc, size = 0, 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(2**20):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def refusal_reason(checkpoint: Path, identity: dict[str, Any]) -> str | None:
    """Why a checkpoint can't be used: incomplete, of another run, or unsafe to load; None: it can."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files, run = manifest["files"], manifest["run"]
        for name, (size, crc) in files.items():
            actual_size, actual_crc = checksum(checkpoint / name)
            if actual_size != size:
                return f"{name} has {actual_size} bytes of {size}"
            if actual_crc != crc:
                return f"{name} isn't as it was written"
        if unsafe := untrusted_globals(checkpoint):
            return f"it holds {', '.join(unsafe)}, which isn't loaded"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (*LOAD_ERRORS, AttributeError) as error:
        return f"can't be read: {error}"
    differences = []
    for name in {**identity, **run}:
        if run.get(name) != identity.get(name):
            differences.append(f"{name} {run.get(name)!r:.60}, here {identity.get(name)!r:.60}")
    return f"of another run: {', '.join(differences)}" if differences else None


def untrusted_globals(checkpoint: Path) -> list[str]:
    """Classes and functions that a checkpoint's pickles name, but for `TRUSTED_GLOBALS`."""
    names = set()
    for path in checkpoint.rglob("*"):
        if path.suffix in (".bin", ".pkl", ".pt"):
            names |= set(get_unsafe_globals_in_checkpoint(path))
    return sorted(names - TRUSTED_GLOBALS)


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        names = []  # also if the folder goes while it is read: it may be one that was only tried
    steps = [name.removeprefix("checkpoint-") for name in names if name.startswith("checkpoint-")]
    return [folder / f"checkpoint-{step}" for step in sorted(filter(str.isdigit, steps), key=int)]


def find_checkpoints(resume_from: str | None, output_dir: str) -> list[Path]:
    """Candidates of --resume_from_checkpoint, newest first; empty: start from the beginning."""
    existing = list_checkpoints(Path(output_dir))
    if resume_from is None and existing:
        raise ValueError(
            f"--output_dir {output_dir} has {existing[-1].name} of another run: go on with "
            "--resume_from_checkpoint latest, give another folder, or remove what is in it with "
            "--overwrite_output_dir"
        )
    if resume_from in (None, "latest"):
        return existing[::-1]
    checkpoint = Path(resume_from)
    if not (checkpoint / MANIFEST).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {resume_from}: not the folder of a checkpoint; `latest` and "
            f"{[str(path) for path in existing]} are allowed"
        )
    if existing and checkpoint.resolve() != existing[-1].resolve():
        raise ValueError(
            f"--resume_from_checkpoint {resume_from}: --output_dir {output_dir} has others, up to "
            f"{existing[-1].name}, to mix the new ones with; remove them, or give another folder"
        )
    return [checkpoint]
