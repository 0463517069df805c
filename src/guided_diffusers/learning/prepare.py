"""What a training starts with, from its options: data, noise schedule, model, optimizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from datasets import DatasetDict, IterableDatasetDict
from diffusers import DDPMScheduler, ModelMixin

from ..checks import shown
from ..images import size_text
from ..repository import check_config_values
from .arrays import LabelledArrays, find_array_column, parse_data_scale
from .data import LabelledImages, is_pattern, load_splits
from .data_checks import check_data, describe_data
from .latents import Autoencoder, LatentImages
from .options import Options, named_errors
from .pixels import pixel_options
from .streaming import StreamedImages, parse_labels

AnyModel = TypeVar("AnyModel", bound=ModelMixin)
Images = LabelledImages | LabelledArrays | LatentImages | StreamedImages
# Config entries that define a noise schedule.
SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
DEFAULT_CLASSIFIER = {
    "block_out_channels": [64, 128, 192, 256],
    "layers_per_block": 2,
    "attention_head_dim": 64,
    "dropout": 0.1,
}


def load_data(
    options: Options,
    accelerator: Accelerator,
    vae: Autoencoder | None = None,
    labelled: bool = True,
) -> tuple[Images, Images | None]:
    """The images to train on, and those that are held out, if any are; latents with --vae.

    Labels and files are checked (`check_data`). `labelled` False: labels aren't read.
    """
    if options.vae is not None and vae is None:
        raise ValueError(f"--vae {options.vae}: this script trains on pixels")
    splits, held_out = _load_splits(options, accelerator)
    columns = options.image_column, options.label_column
    column = find_array_column(splits[options.train_split], *columns)
    if column is not None:
        return _load_arrays(options, accelerator, splits, held_out, column, labelled)
    _check_array_options(options)
    labels = parse_labels(options.labels)
    make = partial(
        StreamedImages if options.streaming else LabelledImages,
        resolution=options.resolution,
        skip_corrupt_images=options.skip_corrupt_images,
        labelled=labelled,
        renumber_labels=options.renumber_labels,
        refuse_colour=options.channels is None and vae is None,
        **pixel_options(options),
    )
    with named_errors(f"split {options.train_split!r}"):
        train = make(
            splits[options.train_split],
            options.image_column,
            options.label_column,
            center_crop=options.center_crop,
            random_flip=options.random_flip and vae is None,
            random_shift=options.random_shift,
            random_scale=options.random_scale,
            channels=options.channels if vae is None else vae.config.in_channels,
            labels=labels,
            check_pixels=True,
            **({"cache_images": True} if options.cache_images else {}),
        )
    fraction, validation = options.held_out_fraction, None
    with named_errors(f"split {held_out or options.train_split!r}"):
        if held_out is not None:
            validation = make(
                splits[held_out],
                train.image_column,
                train.label_column,
                center_crop=True,
                channels=train.channels,
                labels=labels if options.streaming else train.id2label,
            )
            if options.streaming:
                validation = validation.in_memory(options.validation_samples, train.id2label)
        elif fraction and options.streaming:
            train.held_out_fraction = fraction
            validation = train.in_memory(options.validation_samples, train.id2label)
        elif fraction:
            train, validation = train.hold_out(fraction)
    describe_data(options, accelerator, train, validation, held_out)
    check_data(options, accelerator, train, validation, held_out or options.train_split)
    if vae is None:
        return train, validation
    folder = Path(options.latents_cache or Path(options.output_dir) / "latents")
    if validation is not None:
        validation = LatentImages(validation, vae, folder)
    return LatentImages(train, vae, folder, options.random_flip), validation


#: options of images, and the value that they have with arrays
OF_IMAGES = {
    "streaming": False,
    "channels": None,
    "resolution": 64,
    "center_crop": False,
    "random_flip": False,
    "random_shift": 0,
    "random_scale": 0.0,
    "cache_images": False,
    "skip_corrupt_images": False,
    "image_range": None,
    "alpha_background": None,
    "vae": None,
}


def _load_arrays(
    options: Options,
    accelerator: Accelerator,
    splits: DatasetDict,
    held_out: str | None,
    column: str,
    labelled: bool,
) -> tuple[LabelledArrays, LabelledArrays | None]:
    """The arrays to train on, and those that are held out."""
    for name, value in OF_IMAGES.items():
        if getattr(options, name) != value:
            raise ValueError(
                f"--{name} {getattr(options, name)}: {value} is allowed with arrays (column "
                f"{column!r}), which are used as they are"
            )
    make = partial(
        LabelledArrays,
        image_column=column,
        labelled=labelled,
        renumber_labels=options.renumber_labels,
        channel_axis=options.channel_axis,
    )
    label_column, scale = options.label_column, parse_data_scale(options.data_scale)
    with named_errors(f"split {options.train_split!r}"):
        train = make(splits[options.train_split], label_column=label_column, scale=scale)
    validation = None
    if held_out is not None:
        with named_errors(f"split {held_out!r}"):
            validation = make(
                splits[held_out],
                label_column=train.label_column,
                labels=train.id2label,
                scale=(train.data_mean, train.data_std),
            )
            if validation.shape != train.shape:
                raise ValueError(
                    f"arrays {validation.shape}; {train.shape}, as in the training split, are allowed"
                )
    elif options.held_out_fraction:
        train, validation = train.hold_out(options.held_out_fraction)
    describe_data(options, accelerator, train, validation, held_out)
    check_data(options, accelerator, train, validation, held_out or options.train_split)
    return train, validation


def _check_array_options(options: Options) -> None:
    """Refuse options of arrays where the data are images."""
    for name, default in (("data_scale", "standard"), ("channel_axis", None)):
        if (value := getattr(options, name)) != default:
            raise ValueError(
                f"--{name} {value}: the data are images, whose pixels become -1 to 1; it is allowed "
                "with arrays (a column of arrays or lists, .npy files)"
            )


def _load_splits(
    options: Options, accelerator: Accelerator
) -> tuple[DatasetDict | IterableDatasetDict, str | None]:
    """All splits, and the name of the held-out one."""
    name = "train_data_dir" if options.dataset_name is None else "dataset_name"
    source = getattr(options, name)
    if name == "train_data_dir" and not (Path(source).expanduser().is_dir() or is_pattern(source)):
        raise ValueError(f"--train_data_dir {source}: there is no such folder")
    output, folder = Path(options.output_dir).resolve(), Path(source).expanduser().resolve()
    if folder.is_dir() and (folder == output or folder in output.parents):
        raise ValueError(
            f"--output_dir {options.output_dir} is in the folder of the data, --{name} {source}, "
            "where its pictures would become images to train on; another folder is allowed"
        )
    with accelerator.main_process_first():
        with named_errors(f"--{name} {source}"):
            splits = load_splits(source, options.dataset_config_name, options.streaming)
    held_out = options.validation_split
    if held_out is None and not options.validation_fraction:
        names = (split for split in ("validation", "test") if split != options.train_split)
        held_out = next((split for split in names if split in splits), None)
    for name, split in (("train", options.train_split), ("validation", held_out)):
        if split is not None and split not in splits:
            raise ValueError(f"--{name}_split {split}: the dataset has {sorted(splits)}")
    return splits, held_out


def load_scheduler(
    options: Options, prediction_type: str | None = None, has_range: bool = True
) -> DDPMScheduler:
    """The schedule of --scheduler or the --ddpm options; `prediction_type` None: its own.

    `has_range`: whether the data are within [-1, 1], as images are, and latents and arrays aren't.
    """
    path = options.scheduler
    changes = {} if has_range and not options.vae else {"clip_sample": False}
    if path is None:
        return DDPMScheduler(
            num_train_timesteps=options.ddpm_num_steps,
            beta_schedule=options.ddpm_beta_schedule,
            prediction_type=prediction_type or "epsilon",
            **changes,
        )
    with named_errors(f"--scheduler {path}"):
        config = DDPMScheduler.load_config(path, subfolder="scheduler")
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
    """Config entries of the noise schedule up to --max_timestep; None: all of it."""
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
    """The model of --model_config_name_or_path, or of `default`, with the data's `settings`."""
    path = options.model_config_name_or_path
    with named_errors(
        f"--model_config_name_or_path {path}, --resolution {size_text(options.resolution)}"
    ):
        config = default if path is None else model_class.load_config(path)
        if not isinstance(config, dict):
            raise ValueError(f"it holds {shown(config)}; a JSON object {{...}} is allowed")
        check_config_values(path, config)
        names = [name for name in config if not name.startswith("_") and name != "auto_map"]
        return model_class(**{name: config[name] for name in names} | settings)


def make_optimizer(options: Options, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW in the variant of --optimizer."""
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
                "--optimizer adamw_8bit needs bitsandbytes (pip install bitsandbytes), adamw and "
                "adamw_fused don't"
            ) from error
        return AdamW8bit(model.parameters(), **settings)
    fused = options.optimizer == "adamw_fused" or None
    return torch.optim.AdamW(model.parameters(), **settings, fused=fused)
