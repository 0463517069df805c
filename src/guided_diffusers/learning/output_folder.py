"""--output_dir: whether a training may start there, and what an earlier one has left."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .checkpointing import list_checkpoints
from .options import Options

OPTIONS_FILE = "options.json"
# What trainings write into --output_dir, as patterns; `latents` and `logs` don't depend on the run.
RESULTS = """model_index.json pipeline.py config.json guided_diffusers_*.py
diffusion_pytorch_model*.safetensors* unet/config.json unet/diffusion_pytorch_model*.safetensors*
scheduler/scheduler_config.json vae/config.json vae/diffusion_pytorch_model*.safetensors*
tokenizer/*.json tokenizer/*.txt metrics.json diagnosis.json diagnosis.png curves.png samples-*.png samples-*.npz
checkpoint-*""".split()
RECORDS = (OPTIONS_FILE, "tracker_run")
# Options that don't change what ends up in --output_dir.
LOCAL_OPTIONS = set(
    """output_dir overwrite_output_dir resume_from_checkpoint logging_dir latents_cache report_to
    progress cpu cache_images check_images dataloader_num_workers checkpointing_steps
    checkpoints_total_limit push_to_hub hub_model_id hub_private""".split()
)


def list_results(folder: Path) -> list[Path]:
    """The results of an earlier training in a folder."""
    return sorted({path for pattern in RESULTS for path in folder.glob(pattern)})


def check_output_dir(options: Options) -> list[Path]:
    """What --overwrite_output_dir has to remove: without it, nothing.

    Raises:
        ValueError: if the folder has results that this run neither goes on from nor may remove.
    """
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; a folder is allowed")
    results = list_results(folder)
    names = [str(path.relative_to(folder)) for path in results]
    if options.overwrite_output_dir:
        if links := [path.parent for path in results if path.parent.is_symlink()]:
            raise ValueError(
                f"--overwrite_output_dir: {links[0]} is a link; nothing is removed: remove the link, "
                "or give another folder"
            )
        if results and not (folder / OPTIONS_FILE).is_file():
            raise ValueError(
                f"--overwrite_output_dir: {folder} has {names[:5]}, but no {OPTIONS_FILE} of a "
                "training; nothing is removed: give another folder"
            )
        return results + [path for name in RECORDS if (path := folder / name).exists()]
    resume = options.resume_from_checkpoint
    goes_on = resume is not None and list_checkpoints(folder)  # compared by their manifests
    if results and not goes_on and not (resume == "latest" and is_same_run(options, folder)):
        raise ValueError(
            f"--output_dir {folder} has {names[:5]}{' and more' if names[5:] else ''} of another "
            "training: give another folder, go on with the same one by --resume_from_checkpoint "
            "latest, or remove them by --overwrite_output_dir"
        )
    return []


def is_same_run(options: Options, folder: Path) -> bool:
    """Whether a folder's options.json is of the same training, where there are no checkpoints."""
    try:
        saved: dict[str, Any] = json.loads((folder / OPTIONS_FILE).read_text())
    except (OSError, ValueError):
        return False
    defaults = {f.name: f.default for f in fields(options)}
    current = json.loads(json.dumps(asdict(options)))  # a tuple is a list in a file
    if not isinstance(saved, dict) or saved.keys() - current.keys():
        return False
    names = current.keys() - LOCAL_OPTIONS
    return all(saved.get(name, defaults[name]) == current[name] for name in names)


def remove(paths: list[Path], folder: Path) -> None:
    """Remove files and folders, or links to them, and the folders of models that are empty then."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for parent in {path.parent for path in paths} - {folder}:
        if not any(parent.iterdir()):
            parent.rmdir()
