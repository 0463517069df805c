"""The options that both training scripts share, and what they name: the data, the noise schedule, the network."""

from __future__ import annotations

import math
import os
import sys
import traceback
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers import DDPMScheduler, ModelMixin
from transformers import HfArgumentParser

from .data import LabelledImages, is_pattern, load_splits
from .latents import Autoencoder, LatentImages
from .streaming import StreamedImages, load_streams

AnyOptions = TypeVar("AnyOptions", bound="Options")
AnyModel = TypeVar("AnyModel", bound=ModelMixin)
Images = LabelledImages | LatentImages | StreamedImages


PATIENCE = timedelta(
    hours=2
)  # of processes that wait while one alone reads a dataset, a checkpoint, or diagnoses
AT_LEAST_1 = {
    "resolution",
    "ddpm_num_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_train_steps",
    "validation_samples",
    "checkpointing_steps",
    "shuffle_buffer",
}
AT_LEAST_0 = {
    "random_shift",
    "seed",
    "learning_rate",
    "lr_warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "ema_power",
    "ema_max_decay",
    "validation_steps",
    "checkpoints_total_limit",
    "dataloader_num_workers",
    "label_dropout",
    "sample_images",
    "max_timestep",
    "bits_per_dim_images",
    "diagnosis_images",
}
# A run may go on from a checkpoint with others of these and ends as if there had been no stop: where things lie, what
# is written and shown, how fast, and what is compared as what it comes to (see `checkpointing.identity_of`).
MAY_CHANGE = {
    "dataset_name",
    "train_data_dir",
    "validation_split",
    "cache_images",
    "skip_corrupt_images",
    "latents_cache",
    "output_dir",
    "model_config_name_or_path",
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_train_steps",
    "mixed_precision",
    "gradient_checkpointing",
    "validation_steps",
    "validation_samples",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "dataloader_num_workers",
    "report_to",
    "logging_dir",
    "cpu",
    "progress",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    "sample_images",
    "bits_per_dim_images",
    "diagnosis_images",
}
AT_MOST = {
    "seed": 2**32 - 1,
    "adam_beta1": 1,
    "adam_beta2": 1,
    "ema_max_decay": 1,
    "label_dropout": 1,
}


def option(default: Any, help: str) -> Any:
    """A field of an options class, with its line in --help."""
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    dataset_name: str | None = option(
        None, "a dataset on the Hub, or a local folder that `load_dataset` reads"
    )
    dataset_config_name: str | None = option(
        None, "the configuration of the dataset, where it has several"
    )
    train_data_dir: str | None = option(
        None,
        "an image folder (a folder a label), a folder of Parquet or tar files (WebDataset), or a pattern such as "
        "'shards/train-*.tar'",
    )
    train_split: str = option("train", "the split to train on")
    validation_split: str | None = option(
        None, "the held-out split; `validation` or `test` if left out, where there is one"
    )
    image_column: str | None = option(
        None, "column of the images; the first that holds images if left out"
    )
    label_column: str | None = option(
        None,
        "column of the labels (class ids, integers or names); the first that holds "
        "class ids if left out",
    )
    streaming: bool = option(
        False, "read the data as the steps need it, never all of it; needs --max_train_steps"
    )
    shuffle_buffer: int | None = option(
        None,
        "with --streaming: how many images in a row are shuffled together; 1000 "
        "if left out, and of an image folder always all",
    )
    labels: str | None = option(
        None,
        "with --streaming: the labels of a column of integers or strings: names such as cat,dog, a JSON file "
        "with a list of them, or the number of classes; a column of class ids needs none",
    )
    resolution: int = option(64, "height and width in pixels: the shorter side is resized to it")
    center_crop: bool = option(False, "crop the longer side in the middle, not at a random place")
    random_flip: bool = option(False, "mirror half of the images")
    random_shift: int = option(0, "move images by up to that many pixels each way")
    cache_images: bool = option(
        False,
        "keep images that were read in memory, decoded and resized: in that of every "
        "process that reads them, so best with --dataloader_num_workers 0 or 1",
    )
    skip_corrupt_images: bool = option(
        False,
        "train on another image in the place of one that can't be read, and "
        "count them; such an image ends the run if left out",
    )
    vae: str | None = option(
        None,
        "train on the latents of this autoencoder (AutoencoderKL or VQModel): its folder or Hub name, or a "
        "pipeline's; images are encoded once, and their mirror images with --random_flip. It needs --center_crop",
    )
    latents_cache: str | None = option(
        None,
        "where latents are kept, for several runs to share; `latents` below "
        "--output_dir if left out",
    )
    output_dir: str = option("output", "where the model, its checkpoints and its figures go")
    seed: int = option(0, "decides the initial weights, the order of the data and all noise")
    model_config_name_or_path: str | None = option(
        None,
        "the network's config: a JSON file, or a model's folder or Hub name; a middle-sized one if left out",
    )
    scheduler: str | None = option(
        None,
        "whose noise schedule to use: a scheduler's config, or a pipeline's folder or Hub name; that of the "
        "--ddpm options if left out",
    )
    ddpm_num_steps: int = option(1000, "timesteps of the noise schedule")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = option(
        "linear", "its betas"
    )
    train_batch_size: int = option(64, "images a process and forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes an optimizer step")
    num_train_epochs: int = option(100, "passes over the images; --max_train_steps overrides it")
    max_train_steps: int | None = option(None, "optimizer steps")
    learning_rate: float = option(1e-4, "AdamW's, after the warm-up")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("constant_with_warmup", "how the learning rate goes on")
    lr_warmup_steps: int = option(
        500, "optimizer steps in which it rises from 0; not for `constant`"
    )
    adam_beta1: float = option(0.9, "AdamW's first beta")
    adam_beta2: float = option(0.999, "AdamW's second beta")
    adam_weight_decay: float = option(0.01, "AdamW's weight decay")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit"] = option(
        "adamw",
        "AdamW in one kernel with adamw_fused, with states of 8 bits with adamw_8bit (pip install "
        "bitsandbytes)",
    )
    max_grad_norm: float = option(1.0, "gradients of a larger norm are scaled to it; 0: off")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None,
        "autocast of the forward pass; what `accelerate launch` or `accelerate config` say if left out",
    )
    gradient_checkpointing: bool = option(
        False,
        "work activations out again in the backward pass: less memory, about a third more time",
    )
    use_ema: bool = option(True, "evaluate and save the exponential moving average of the weights")
    ema_inv_gamma: float = option(
        1.0, "its decay is 1 - (1 + step / ema_inv_gamma) ** -ema_power ..."
    )
    ema_power: float = option(0.75, "... with this power ...")
    ema_max_decay: float = option(0.9999, "... and at most this")
    validation_steps: int = option(1000, "optimizer steps between evaluations; 0: only at the end")
    validation_samples: int = option(
        2000,
        "at most so many held-out images are read, evenly spread; with "
        "--streaming the first, which stay in memory",
    )
    checkpointing_steps: int = option(500, "optimizer steps between checkpoints")
    checkpoints_total_limit: int = option(2, "how many checkpoints are kept; 0: all")
    resume_from_checkpoint: str | None = option(
        None,
        "a checkpoint's folder to go on from, or `latest`: the newest in "
        "--output_dir, if there is one",
    )
    dataloader_num_workers: int = option(
        0, "processes that read images, beside each training process"
    )
    report_to: str | None = option(
        None, "a tracker of Accelerate that is installed (tensorboard, wandb, ...) or `all`"
    )
    logging_dir: str = option("logs", "where trackers write, below --output_dir")
    cpu: bool = option(False, "train on the CPU even where there is an accelerator")
    progress: bool = option(True, "show a progress bar")

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                f"--dataset_name {self.dataset_name} and --train_data_dir {self.train_data_dir}: one of "
                "the two is needed, and only one"
            )
        for name in (f.name for f in fields(self) if f.name in AT_LEAST_1 | AT_LEAST_0):
            value, least, most = (
                getattr(self, name),
                int(name in AT_LEAST_1),
                AT_MOST.get(name, math.inf),
            )
            if value is not None and not least <= value <= most:
                allowed = f"{least} to {most}" if name in AT_MOST else f"{least} or more"
                raise ValueError(f"--{name} {value}: {allowed} is allowed")
        if self.scheduler and (self.ddpm_num_steps, self.ddpm_beta_schedule) != (1000, "linear"):
            raise ValueError(
                f"--scheduler {self.scheduler} has a noise schedule: --ddpm_num_steps and "
                "--ddpm_beta_schedule are not allowed with it"
            )
        if self.vae is None and self.latents_cache is not None:
            raise ValueError(f"--latents_cache {self.latents_cache} needs --vae")
        if self.vae is not None and (self.random_shift or not self.center_crop):
            raise ValueError(
                f"--vae {self.vae} encodes an image once, which random crops and shifts don't allow: "
                f"--random_shift is {self.random_shift}, 0 is allowed, and --center_crop is "
                f"{self.center_crop}, which must be given"
            )
        self._check_streaming()
        for name in ("cache_images", "skip_corrupt_images"):
            if self.vae is not None and getattr(self, name):
                raise ValueError(
                    f"--{name} is not allowed with --vae {self.vae}, which reads every image once, before "
                    "the first step"
                )

    def _check_streaming(self) -> None:
        if not self.streaming:
            for name in ("shuffle_buffer", "labels"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"--{name} {value} needs --streaming")
            return
        if self.max_train_steps is None:
            raise ValueError(
                "--streaming needs --max_train_steps, since nobody knows how many images an epoch has"
            )
        if self.vae is not None:
            raise ValueError(
                f"--vae {self.vae} encodes all images before the first step, which --streaming can't: "
                "only one of the two is allowed"
            )
        if self.cache_images:
            raise ValueError(
                "--cache_images keeps all images in memory, --streaming none: only one of the two is "
                "allowed"
            )
        if self.skip_corrupt_images and self.train_batch_size == 1:
            raise ValueError(
                "--train_batch_size 1: with --streaming and --skip_corrupt_images 2 or more are allowed, "
                "since another image of the batch takes the place"
            )


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """One spelling of each option, and its default where it has one."""

    def _format_action_invocation(self, action: Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.removeprefix("--")]
        value = (
            "" if action.nargs in (0, "?") else " " + self._format_args(action, action.dest.upper())
        )
        return ", ".join(names or action.option_strings) + value

    def _get_help_string(self, action: Action) -> str:
        if action.option_strings[0].startswith("--no_"):
            return f"not: {action.help}"
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def parse(options: type[AnyOptions], description: str | None) -> AnyOptions:
    """The options from the command line; wrong ones end the program with a message."""
    parser = HfArgumentParser(options, description=description, formatter_class=_HelpFormatter)
    try:
        return parser.parse_args_into_dataclasses()[0]
    except ValueError as error:
        parser.error(str(error))


@contextmanager
def explained() -> Iterator[None]:
    """End the program with a message, without a traceback, where what the options name turns out to be wrong."""
    try:
        yield
    except ValueError as error:
        message = f"{Path(sys.argv[0]).name}: error: {error}"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            leave_at_once(message)
        raise SystemExit(message) from None


def leave_at_once(message: str) -> None:
    """End this process of several with a message, so that its launcher ends the others.

    A process that leaves in the ordinary way destroys its process group first, and may wait there for the others for
    ever.
    """
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def make_accelerator(options: Options) -> Accelerator:
    trackers = ["all", *map(str, get_available_trackers())]
    if options.report_to not in (None, *trackers):
        raise ValueError(f"--report_to {options.report_to}: {trackers} are installed here")
    project = ProjectConfiguration(
        options.output_dir, str(Path(options.output_dir) / options.logging_dir)
    )
    try:
        accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            cpu=options.cpu,
            log_with=options.report_to,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            project_config=project,
        )
    except ValueError as error:
        raise ValueError(f"--mixed_precision {options.mixed_precision}: {error}") from error
    except ImportError as error:
        raise ValueError(f"distributed_type DEEPSPEED: {error}") from error
    accelerator.gradient_accumulation_steps = (
        options.gradient_accumulation_steps
    )  # not those of the launcher
    if accelerator.distributed_type.value == "MEGATRON_LM":
        raise ValueError(
            "distributed_type MEGATRON_LM of Accelerate is for language models: MULTI_GPU and its like, "
            "FSDP, DEEPSPEED and NO are allowed, e.g. with a file of training/accelerate"
        )
    if (
        accelerator.distributed_type.value == "MULTI_CPU"
        and os.environ.get("ACCELERATE_USE_FSDP") == "true"
    ):
        raise ValueError(
            "--cpu with distributed_type FSDP, which Accelerate leaves out on CPUs: a config without it, "
            "e.g. training/accelerate/cpu.yaml, is allowed"
        )
    if accelerator.num_processes > 1:
        sys.excepthook = lambda *error: leave_at_once("".join(traceback.format_exception(*error)))
    return accelerator


def load_data(
    options: Options, accelerator: Accelerator, vae: Autoencoder | None = None
) -> tuple[Images, Images | None]:
    """The split to train on, and the held-out one if there is one; as latents with the autoencoder of --vae.

    Raises:
        ValueError: if there is no such dataset, split or column, or the autoencoder doesn't fit --resolution.
    """
    if options.vae is not None and vae is None:
        raise ValueError(f"--vae {options.vae}: this script trains on pixels")
    name = "train_data_dir" if options.dataset_name is None else "dataset_name"
    source = getattr(options, name)
    if name == "train_data_dir" and not (Path(source).expanduser().is_dir() or is_pattern(source)):
        raise ValueError(f"--train_data_dir {source}: there is no such folder")
    with accelerator.main_process_first():
        try:
            splits = load_splits(source, options.dataset_config_name, options.streaming)
        except (OSError, ValueError) as error:
            raise ValueError(f"--{name} {source}: {error}") from error
    held_out = options.validation_split or next(
        (name for name in ("validation", "test") if name in splits), None
    )
    for name, split in (("train_split", options.train_split), ("validation_split", held_out)):
        if split is not None and split not in splits:
            raise ValueError(f"--{name} {split}: the dataset has {sorted(splits)}")
    if options.streaming:
        return load_streams(options, splits, held_out)
    train = LabelledImages(
        splits[options.train_split],
        options.image_column,
        options.label_column,
        options.resolution,
        options.center_crop,
        options.random_flip and vae is None,
        options.random_shift,
        None if vae is None else vae.config.in_channels,
        cache_images=options.cache_images,
        skip_corrupt_images=options.skip_corrupt_images,
    )
    rest = None
    if held_out is not None:
        rest = LabelledImages(
            splits[held_out],
            train.image_column,
            train.label_column,
            options.resolution,
            center_crop=True,
            channels=train.channels,
            labels=train.id2label,
            skip_corrupt_images=options.skip_corrupt_images,
        )
    if vae is None:
        return train, rest
    cache = (
        Path(options.output_dir) / "latents"
        if options.latents_cache is None
        else Path(options.latents_cache)
    )
    return (
        LatentImages(train, vae, cache, options.random_flip),
        None if rest is None else LatentImages(rest, vae, cache),
    )


def load_scheduler(options: Options, prediction_type: str | None = None) -> DDPMScheduler:
    """The noise schedule to train with: that of --scheduler, or of the --ddpm options.

    Raises:
        ValueError: if there is none in --scheduler.
    """
    changes = {"clip_sample": False} if options.vae else {}  # latents aren't within [-1, 1]
    if options.scheduler is None:
        return DDPMScheduler(
            num_train_timesteps=options.ddpm_num_steps,
            beta_schedule=options.ddpm_beta_schedule,
            prediction_type=prediction_type or "epsilon",
            **changes,
        )
    try:
        config = DDPMScheduler.load_config(options.scheduler, subfolder="scheduler")
    except OSError as error:
        raise ValueError(f"--scheduler {options.scheduler}: {error}") from error
    if not (config.get("beta_schedule") or config.get("trained_betas")):
        raise ValueError(
            f"--scheduler {options.scheduler}: {config.get('_class_name')} has no betas; a scheduler of a "
            "variance-preserving model (DDPM, DDIM, Euler, DPM-Solver, ...) is allowed"
        )
    if prediction_type:
        changes["prediction_type"] = prediction_type
    if config.get("variance_type", "learned") in (
        None,
        "learned",
        "learned_range",
    ):  # DDPM's own, without a network's
        changes["variance_type"] = "fixed_small"
    scheduler = DDPMScheduler.from_config(config, **changes)
    if scheduler.config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"--scheduler {options.scheduler} has prediction_type {scheduler.config.prediction_type!r}; "
            "epsilon, sample and v_prediction are allowed"
        )
    return scheduler


def make_model(
    model_class: type[AnyModel], options: Options, default: dict[str, Any], **given: Any
) -> AnyModel:
    """The network of --model_config_name_or_path or `default`, with what the data decides `given`.

    Raises:
        ValueError: if there is no such config, or it's none of this class, or not for this resolution.
    """
    path = options.model_config_name_or_path
    try:
        config = default if path is None else model_class.load_config(path)
        config = {
            name: value
            for name, value in config.items()
            if not name.startswith("_") and name != "auto_map"
        }
        return model_class(**{**config, **given})
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"--model_config_name_or_path {path}, --resolution {options.resolution}: {error}"
        ) from error
