"""Checkpoints: written aside and moved into place; only whole ones, of the same run, of nothing but data are loaded."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import ConfigMixin
from safetensors import SafetensorError
from torch.serialization import get_unsafe_globals_in_checkpoint

from .options import MAY_CHANGE, Options

MANIFEST = (
    "manifest.json"  # in a checkpoint: its step, whose it is, and its files' sizes and check sums
)
UNWRITABLE = (OSError, RuntimeError, SafetensorError)  # Python's, torch's, safetensors'
UNLOADABLE = (*UNWRITABLE, EOFError, KeyError, TypeError, UnpicklingError, ValueError)
# What else than tensors and plain Python the files of a checkpoint are made of: random states, DeepSpeed's optimizer.
KNOWN = {
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


def identity_of(
    options: Options,
    accelerator: Accelerator,
    model: torch.nn.Module,
    images: int | str,
    steps: int,
) -> dict[str, Any]:
    """What must be the same for a run that goes on from a checkpoint to equal the uninterrupted one.

    All options but those in MAY_CHANGE, what some of these come to, and the network's config. The number of steps
    belongs to it where the learning rate's schedule depends on it.
    """
    settings = {name: value for name, value in asdict(options).items() if name not in MAY_CHANGE}
    settings |= {
        "images": images,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "images a forward pass": options.train_batch_size * accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
    if options.lr_scheduler not in ("constant", "constant_with_warmup"):
        settings["max_train_steps"] = steps
    if (kind := accelerator.distributed_type) in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        settings["distributed_type"] = kind.value
    if kind == DistributedType.DEEPSPEED:  # each process saves a part of the optimizer
        settings["processes"] = accelerator.num_processes
    config = model.config.items() if isinstance(model, ConfigMixin) else ()
    settings |= {f"network's {name}": value for name, value in config if not name.startswith("_")}
    return json.loads(json.dumps(settings, default=str))


def write_json(path: Path, content: Any) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(aside, path)


def save_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, limit: int, identity: dict[str, Any]
) -> None:
    """Write `checkpoint-STEP` under a temporary name, move it into place, drop the oldest beyond the limit.

    Raises:
        OSError: if it can't be written, for instance on a full disk; what there was before is left as it was.
    """
    aside, place = folder / f"checkpoint-{step}.partial", folder / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    with removed_unless_written(aside):
        accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with removed_unless_written(aside):
            files = {
                str(path.relative_to(aside)): written(path)
                for path in sorted(aside.rglob("*"))
                if path.is_file()
            }
            write_json(aside / MANIFEST, {"step": step, "run": identity, "files": files})
            written(aside / MANIFEST)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(aside, place)
        for old in checkpoints(folder)[:-limit] if limit else []:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


@contextmanager
def removed_unless_written(aside: Path) -> Iterator[None]:
    try:
        yield
    except UNWRITABLE as error:
        shutil.rmtree(aside, ignore_errors=True)
        if "DataLoader worker" in str(
            error
        ):  # one died: torch raises that wherever the main thread happens to be
            raise
        raise OSError(f"{aside.with_suffix('')} can't be written: {error}") from error


def written(path: Path) -> list[int]:
    """A file's size and CRC-32, once it is on the disk."""
    total, size = 0, 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(2**20):
            total, size = zlib.crc32(block, total), size + len(block)
    return [size, total]


def why_refused(checkpoint: Path, identity: dict[str, Any]) -> str | None:
    """Why a checkpoint isn't whole, isn't of this run, or could run code when loaded; None if nothing is wrong."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files, run = manifest["files"], manifest["run"]
        for name, (size, total) in files.items():
            found = written(checkpoint / name)
            if found[0] != size:
                return f"{name} has {found[0]} bytes of {size}"
            if found[1] != total:
                return f"{name} isn't as it was written"
        if foreign := unknown_content(checkpoint):
            return f"it holds {foreign}, which isn't loaded"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (*UNLOADABLE, AttributeError) as error:
        return f"can't be read: {error}"
    other = [
        f"{name} {run.get(name)!r:.60}, here {identity.get(name)!r:.60}"
        for name in {**identity, **run}
        if run.get(name) != identity.get(name)
    ]
    return f"of another run: {', '.join(other)}" if other else None


def unknown_content(checkpoint: Path) -> str:
    """The classes and functions, other than KNOWN ones, that a checkpoint's pickles name; empty if there are none."""
    files = [path for path in checkpoint.rglob("*") if path.suffix in (".bin", ".pkl", ".pt")]
    return ", ".join(
        sorted({name for path in files for name in get_unsafe_globals_in_checkpoint(path)} - KNOWN)
    )


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoints(options: Options) -> list[Path]:
    """The folders that --resume_from_checkpoint may mean, the newest first; none to start at the beginning.

    Raises:
        ValueError: if there is none, or it is none, or a new run would mix its checkpoints with an older run's.
    """
    asked, there = options.resume_from_checkpoint, checkpoints(Path(options.output_dir))
    if asked is None and there:
        raise ValueError(
            f"--output_dir {options.output_dir} has {there[-1].name} of another run: go on with "
            "--resume_from_checkpoint latest, or give another folder"
        )
    if asked in (None, "latest"):
        return there[::-1]
    if not (Path(asked) / MANIFEST).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {asked}: not the folder of a checkpoint; `latest` and "
            f"{[str(path) for path in there]} are allowed"
        )
    if there and Path(asked).resolve() != there[-1].resolve():
        raise ValueError(
            f"--resume_from_checkpoint {asked}: --output_dir {options.output_dir} has others, up to "
            f"{there[-1].name}, which would be mixed with what follows; remove them, or give another "
            "--output_dir"
        )
    return [Path(asked)]
