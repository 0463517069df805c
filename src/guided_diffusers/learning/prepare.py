"""What a training starts with, from its options: data, noise schedule, model, optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from datasets import DatasetDict, IterableDatasetDict
from diffusers import DDPMScheduler, ModelMixin

from .data import LabelledImages, is_pattern, load_splits
from .latents import Autoencoder, LatentImages
from .options import Options
from .streaming import StreamedImages, parse_labels

AnyModel = TypeVar("AnyModel", bound=ModelMixin)
Images = LabelledImages | LatentImages | StreamedImages
# Config entries that define a noise schedule.
SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
DEFAULT_CLASSIFIER = {
    "block_out_channels": [64, 128, 192, 256],
    "layers_per_block": 2,
    "attention_head_dim": 64,
    "dropout": 0.1,
}


def load_data(
    options: Options, accelerator: Accelerator, vae: Autoencoder | None = None
) -> tuple[Images, Images | None]:
    """The training split, and the held-out split if there is one; latents with --vae.

    Raises:
        ValueError: if there is no such dataset, split or column, or the autoencoder doesn't fit
            --resolution.
    """
    if options.vae is not None and vae is None:
        raise ValueError(f"--vae {options.vae}: this script trains on pixels")
    splits, held_out = _load_splits(options, accelerator)
    data_class = StreamedImages if options.streaming else LabelledImages
    labels = parse_labels(options.labels)
    settings = {
        "resolution": options.resolution,
        "skip_corrupt_images": options.skip_corrupt_images,
    }
    cache = {"cache_images": True} if options.cache_images else {}
    train = data_class(
        splits[options.train_split],
        options.image_column,
        options.label_column,
        center_crop=options.center_crop,
        random_flip=options.random_flip and vae is None,
        random_shift=options.random_shift,
        channels=None if vae is None else vae.config.in_channels,
        labels=labels,
        **settings,
        **cache,
    )
    validation = None
    if held_out is not None:
        validation = data_class(
            splits[held_out],
            train.image_column,
            train.label_column,
            center_crop=True,
            channels=train.channels,
            labels=labels if options.streaming else train.id2label,
            **settings,
        )
        if options.streaming:
            validation = validation.in_memory(options.validation_samples, train.id2label)
    if vae is None:
        return train, validation
    folder = Path(options.latents_cache or Path(options.output_dir) / "latents")
    if validation is not None:
        validation = LatentImages(validation, vae, folder)
    return LatentImages(train, vae, folder, options.random_flip), validation


def _load_splits(
    options: Options, accelerator: Accelerator
) -> tuple[DatasetDict | IterableDatasetDict, str | None]:
    """All splits, and the name of the held-out one."""
    name = "train_data_dir" if options.dataset_name is None else "dataset_name"
    source = getattr(options, name)
    if name == "train_data_dir" and not (Path(source).expanduser().is_dir() or is_pattern(source)):
        raise ValueError(f"--train_data_dir {source}: there is no such folder")
    with accelerator.main_process_first():
        try:
            splits = load_splits(source, options.dataset_config_name, options.streaming)
        except (OSError, ValueError) as error:
            raise ValueError(f"--{name} {source}: {error}") from error
    held_out = options.validation_split
    if held_out is None:
        held_out = next((split for split in ("validation", "test") if split in splits), None)
    for name, split in (("train_split", options.train_split), ("validation_split", held_out)):
        if split is not None and split not in splits:
            raise ValueError(f"--{name} {split}: the dataset has {sorted(splits)}")
    return splits, held_out


def load_scheduler(options: Options, prediction_type: str | None = None) -> DDPMScheduler:
    """The noise schedule to train with: that of --scheduler, or of the --ddpm options.

    Args:
        prediction_type: None: that of --scheduler, or "epsilon".

    Raises:
        ValueError: if --scheduler has none, or another kind of schedule.
    """
    path = options.scheduler
    changes = {"clip_sample": False} if options.vae else {}  # latents aren't within [-1, 1]
    if path is None:
        return DDPMScheduler(
            num_train_timesteps=options.ddpm_num_steps,
            beta_schedule=options.ddpm_beta_schedule,
            prediction_type=prediction_type or "epsilon",
            **changes,
        )
    try:
        config = DDPMScheduler.load_config(path, subfolder="scheduler")
    except OSError as error:
        raise ValueError(f"--scheduler {path}: {error}") from error
    if not (config.get("beta_schedule") or config.get("trained_betas")):
        raise ValueError(
            f"--scheduler {path}: {config.get('_class_name')} has no betas; a scheduler of a "
            "variance-preserving model (DDPM, DDIM, Euler, DPM-Solver, ...) is allowed"
        )
    if prediction_type:
        changes["prediction_type"] = prediction_type
    if config.get("variance_type", "learned") in (None, "learned", "learned_range"):
        changes["variance_type"] = "fixed_small"  # the model to train learns no variance
    scheduler = DDPMScheduler.from_config(config, **changes)
    if scheduler.config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"--scheduler {path} has prediction_type {scheduler.config.prediction_type!r}; "
            "epsilon, sample and v_prediction are allowed"
        )
    return scheduler


def trained_schedule(scheduler: DDPMScheduler, max_timestep: int | None) -> dict[str, Any]:
    """Config entries of the noise schedule up to --max_timestep; None: all of it.

    Raises:
        ValueError: if --max_timestep is beyond the schedule.
    """
    schedule = {name: scheduler.config[name] for name in SCHEDULE}
    count = schedule["num_train_timesteps"]
    steps = count if max_timestep is None else max_timestep + 1
    if steps > count:
        raise ValueError(f"--max_timestep {max_timestep}: 0 to {count - 1} is allowed")
    if steps < count or scheduler.config.rescale_betas_zero_snr:
        betas = scheduler.betas[:steps].tolist()
        schedule |= {"num_train_timesteps": steps, "trained_betas": betas}
    return schedule


def make_model(
    model_class: type[AnyModel], options: Options, default: dict[str, Any], **settings: Any
) -> AnyModel:
    """The model of --model_config_name_or_path.

    Args:
        default: config without that option.
        settings: config entries that the data decides.

    Raises:
        ValueError: if there is no such config, or it isn't one of this class, or not for this
            resolution.
    """
    path = options.model_config_name_or_path
    try:
        config = {}
        for name, value in (default if path is None else model_class.load_config(path)).items():
            if not name.startswith("_") and name != "auto_map":
                config[name] = value
        return model_class(**{**config, **settings})
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"--model_config_name_or_path {path}, --resolution {options.resolution}: {error}"
        ) from error


def make_optimizer(options: Options, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW in the variant of --optimizer.

    Raises:
        ValueError: if it isn't installed.
    """
    settings = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "weight_decay": options.adam_weight_decay,
    }
    if options.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                "--optimizer adamw_8bit needs bitsandbytes (pip install bitsandbytes); adamw and "
                "adamw_fused are allowed without it"
            ) from error
        return AdamW8bit(model.parameters(), **settings)
    fused = options.optimizer == "adamw_fused" or None
    return torch.optim.AdamW(model.parameters(), **settings, fused=fused)
