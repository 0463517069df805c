"""Options that all training scripts share, and the command line of a dataclass of options."""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from huggingface_hub import get_token

AnyOptions = TypeVar("AnyOptions")
DEFAULT_SCHEDULE = (1000, "linear")  # --ddpm_num_steps and --ddpm_beta_schedule


@dataclass(frozen=True)
class Range:
    """Allowed values of a numeric option: minimum <= value <= maximum, or < maximum if `open`."""

    minimum: float
    maximum: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        below = value < self.maximum if self.open else value <= self.maximum
        return self.minimum <= value and below

    def __str__(self) -> str:
        if self.maximum == math.inf:
            return f"{self.minimum} or more"
        return f"{self.minimum} {'up to, not including,' if self.open else 'to'} {self.maximum}"


AT_LEAST_0, AT_LEAST_1, FRACTION = Range(0), Range(1), Range(0, 1)


def option(default: Any, help: str, allowed: Range | None = None) -> Any:
    """A field of an options dataclass.

    Args:
        help: its text in --help.
        allowed: its allowed values, if it is a number.
    """
    return field(default=default, metadata={"help": help, "allowed": allowed, "may_change": False})


def changeable(default: Any, help: str, allowed: Range | None = None) -> Any:
    """An `option` that may change when a run resumes, since it doesn't change the result.

    Paths, logs, speed, and options whose effect is compared instead (`checkpointing.run_identity`).
    """
    return field(default=default, metadata={"help": help, "allowed": allowed, "may_change": True})


def check_ranges(options: Any) -> None:
    """Raise a `ValueError` for an option that is outside its allowed values."""
    for f in fields(options):
        value, allowed = getattr(options, f.name), f.metadata["allowed"]
        if value is not None and allowed is not None and value not in allowed:
            raise ValueError(f"--{f.name} {value}: {allowed} is allowed")


@dataclass
class Options:
    dataset_name: str | None = changeable(None, "dataset on the Hub, or a local dataset's folder")
    dataset_config_name: str | None = option(None, "configuration of the dataset")
    train_data_dir: str | None = changeable(
        None,
        "image folder (one folder per label), folder of Parquet or tar files (WebDataset), or a "
        "pattern such as 'shards/train-*.tar'",
    )
    train_split: str = option("train", "split to train on")
    validation_split: str | None = changeable(
        None, "held-out split; by default `validation` or `test`, if the dataset has one"
    )
    image_column: str | None = option(None, "image column; by default the first with images")
    label_column: str | None = option(
        None, "label column (class ids, integers or names); by default the first with class ids"
    )
    streaming: bool = option(False, "never load all data at once; needs --max_train_steps")
    shuffle_buffer: int | None = option(
        None,
        "with --streaming: images that are shuffled together; by default 1000; of an image folder "
        "always all",
        AT_LEAST_1,
    )
    labels: str | None = option(
        None,
        "with --streaming: labels of a column of integers or strings: names such as cat,dog, a "
        "JSON file with a list of names, or the number of classes; not for columns of class ids",
    )
    resolution: int = option(64, "size in pixels, to which the shorter side is resized", AT_LEAST_1)
    center_crop: bool = option(False, "crop the center instead of a random place")
    random_flip: bool = option(False, "flip images horizontally with probability 1/2")
    random_shift: int = option(0, "shift images by up to this many pixels", AT_LEAST_0)
    cache_images: bool = changeable(
        False,
        "keep decoded and resized images in the memory of every process that reads them; best "
        "with --dataloader_num_workers 0 or 1",
    )
    skip_corrupt_images: bool = changeable(
        False, "replace and count images that can't be read; by default such an image ends the run"
    )
    vae: str | None = option(
        None,
        "train on the latents of this autoencoder (AutoencoderKL or VQModel): its folder or Hub "
        "id, or a pipeline's; needs --center_crop",
    )
    latents_cache: str | None = changeable(
        None, "folder of encoded latents, for several runs; by default `latents` in --output_dir"
    )
    output_dir: str = changeable("output", "folder of the model, its checkpoints and its metrics")
    seed: int = option(0, "seed of initial weights, data order and noise", Range(0, 2**32 - 1))
    model_config_name_or_path: str | None = changeable(
        None,
        "model config: a JSON file, or a model's folder or Hub id; by default a medium-sized model",
    )
    scheduler: str | None = option(
        None,
        "noise schedule: a scheduler's config, or a pipeline's folder or Hub id; by default that "
        "of the --ddpm options",
    )
    ddpm_num_steps: int = option(1000, "timesteps of the noise schedule", AT_LEAST_1)
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = option(
        "linear", "betas of the noise schedule"
    )
    train_batch_size: int = changeable(64, "images per process and forward pass", AT_LEAST_1)
    gradient_accumulation_steps: int = changeable(1, "forward passes per step", AT_LEAST_1)
    num_train_epochs: int = changeable(
        100, "passes over the images, unless --max_train_steps is given", AT_LEAST_1
    )
    max_train_steps: int | None = changeable(None, "optimizer steps", AT_LEAST_1)
    learning_rate: float = option(1e-4, "learning rate after the warm-up", AT_LEAST_0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("constant_with_warmup", "schedule of the learning rate")
    lr_warmup_steps: int = option(500, "steps in which the learning rate rises from 0", AT_LEAST_0)
    adam_beta1: float = option(0.9, "AdamW's first beta", FRACTION)
    adam_beta2: float = option(0.999, "AdamW's second beta", FRACTION)
    adam_weight_decay: float = option(0.01, "AdamW's weight decay", AT_LEAST_0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", AT_LEAST_0)
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit"] = option(
        "adamw", "adamw_fused: in one kernel; adamw_8bit: 8-bit states (pip install bitsandbytes)"
    )
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: off", AT_LEAST_0)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = changeable(
        None, "autocast of the forward pass; by default that of `accelerate launch` or `config`"
    )
    gradient_checkpointing: bool = changeable(
        False, "recompute activations in the backward pass: less memory, a third more time"
    )
    use_ema: bool = option(True, "evaluate and save an exponential moving average of the weights")
    ema_inv_gamma: float = option(
        1.0, "the EMA's decay is 1 - (1 + step / ema_inv_gamma) ** -ema_power"
    )
    ema_power: float = option(0.75, "see --ema_inv_gamma", AT_LEAST_0)
    ema_max_decay: float = option(0.9999, "upper limit of the EMA's decay", FRACTION)
    validation_steps: int = changeable(
        1000, "steps between evaluations; 0: only at the end", AT_LEAST_0
    )
    validation_samples: int = changeable(
        2000,
        "maximum number of held-out images, evenly spread over the split; with --streaming the "
        "first ones, which stay in memory",
        AT_LEAST_1,
    )
    checkpointing_steps: int = changeable(500, "steps between checkpoints", AT_LEAST_1)
    checkpoints_total_limit: int = changeable(2, "checkpoints to keep; 0: all", AT_LEAST_0)
    resume_from_checkpoint: str | None = changeable(
        None, "folder of a checkpoint, or `latest`: the newest in --output_dir, if there is one"
    )
    dataloader_num_workers: int = changeable(
        0, "processes that read images, per training process", AT_LEAST_0
    )
    report_to: str | None = changeable(
        None, "installed tracker of Accelerate (tensorboard, wandb, ...) or `all`"
    )
    logging_dir: str = changeable("logs", "folder of the trackers, in --output_dir")
    cpu: bool = changeable(False, "train on the CPU even if there is an accelerator")
    progress: bool = changeable(True, "show a progress bar")
    push_to_hub: bool = changeable(
        False, "publish the model on the Hub; the token is that of `hf auth login` or HF_TOKEN"
    )
    hub_model_id: str | None = changeable(
        None, "repository to publish to, user/model; by default the name of --output_dir"
    )
    hub_private: bool = changeable(False, "create a private repository, if it doesn't exist yet")

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                f"--dataset_name {self.dataset_name} and --train_data_dir {self.train_data_dir}: "
                "one of the two is needed, and only one"
            )
        check_ranges(self)
        if self.scheduler and not self.has_default_schedule:
            raise ValueError(
                f"--scheduler {self.scheduler} has a noise schedule: --ddpm_num_steps and "
                "--ddpm_beta_schedule are not allowed with it"
            )
        self._check_latents()
        self._check_streaming()
        self._check_hub()

    @property
    def has_default_schedule(self) -> bool:
        """Whether the --ddpm options are left at their defaults."""
        return (self.ddpm_num_steps, self.ddpm_beta_schedule) == DEFAULT_SCHEDULE

    def _check_latents(self) -> None:
        if self.vae is None:
            if self.latents_cache is not None:
                raise ValueError(f"--latents_cache {self.latents_cache} needs --vae")
            return
        if self.random_shift or not self.center_crop:
            raise ValueError(
                f"--vae {self.vae} encodes an image once, which random crops and shifts don't "
                f"allow: --random_shift is {self.random_shift}, 0 is allowed, and --center_crop is "
                f"{self.center_crop}, which must be given"
            )
        for name in ("cache_images", "skip_corrupt_images"):
            if getattr(self, name):
                raise ValueError(
                    f"--{name} is not allowed with --vae {self.vae}, which reads every image once, "
                    "before the first step"
                )

    def _check_streaming(self) -> None:
        if not self.streaming:
            for name in ("shuffle_buffer", "labels"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"--{name} {value} needs --streaming")
            return
        if self.max_train_steps is None:
            raise ValueError(
                "--streaming needs --max_train_steps, since the number of images is unknown"
            )
        if self.vae is not None:
            raise ValueError(
                f"--vae {self.vae} encodes all images before the first step, which --streaming "
                "can't: only one of the two is allowed"
            )
        if self.cache_images:
            raise ValueError(
                "--cache_images keeps all images in memory, --streaming none: only one of the two "
                "is allowed"
            )
        if self.skip_corrupt_images and self.train_batch_size == 1:
            raise ValueError(
                "--train_batch_size 1: with --streaming and --skip_corrupt_images 2 or more are "
                "allowed, since another image of the batch replaces a corrupt one"
            )

    def _check_hub(self) -> None:
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private):
            raise ValueError(
                f"--hub_model_id {self.hub_model_id}, --hub_private {self.hub_private} need "
                "--push_to_hub"
            )
        if self.push_to_hub and get_token() is None:
            raise ValueError(
                "--push_to_hub needs a token: log in by `hf auth login`, or set HF_TOKEN"
            )


def parse(options: type[AnyOptions], description: str | None) -> AnyOptions:
    """The options on the command line; invalid ones end the program with a message.

    Dashes in an option's name may stand for underscores. Booleans are written --name, --name False
    or, where they are on by default, --no_name.
    """
    parser = ArgumentParser(
        usage="%(prog)s [options]",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
    )
    hints = get_type_hints(options)
    for f in fields(options):
        _add_option(parser, f.name, hints[f.name], f.default, f.metadata["help"])
    words = [_with_underscores(word) for word in sys.argv[1:]]
    try:
        return options(**vars(parser.parse_args(words)))
    except ValueError as error:
        parser.error(str(error))


def _with_underscores(word: str) -> str:
    """An option with underscores for the dashes in its name; other words as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def _add_option(parser: ArgumentParser, name: str, hint: Any, default: Any, help: str) -> None:
    """Add the option of a dataclass field: a `Literal`, bool, int, float or str, or None."""
    if type(None) in get_args(hint):
        hint = next(part for part in get_args(hint) if part is not type(None))
    settings: dict[str, Any] = {"default": default, "help": help}
    if default is not None and default is not False:
        settings["help"] += " (default: %(default)s)"
    if get_origin(hint) is Literal:
        settings["choices"] = get_args(hint)
    elif hint is bool:
        settings |= {"type": _parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    else:
        settings["type"] = hint
    parser.add_argument(f"--{name}", **settings)
    if hint is bool and default:
        parser.add_argument(
            f"--no_{name}", dest=name, action="store_false", help=f"turn --{name} off"
        )


def _parse_bool(word: str) -> bool:
    values = dict.fromkeys(("yes", "true", "t", "y", "1"), True)
    values |= dict.fromkeys(("no", "false", "f", "n", "0"), False)
    if word.lower() not in values:
        raise ArgumentTypeError(f"{word!r}: {', '.join(values)} are allowed")
    return values[word.lower()]
