"""Options that all training scripts share, and the command line of a dataclass of options."""

from __future__ import annotations

import math
import re
import sys
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter, _ActionsContainer
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from huggingface_hub import get_token
from huggingface_hub.utils import validate_repo_id

from ..cli_options import MAX_TIMEOUT_MINUTES, TIMEOUT_MINUTES, Parser, size
from ..images import as_pair, config_size, size_text

AnyOptions = TypeVar("AnyOptions")
Size = int | tuple[int, int]  # of a square, or height and width
LrScheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


def option(
    default: Any,
    help: str,
    minimum: float | None = None,
    maximum: float = math.inf,
    *,
    open: bool = False,
    may_change: bool = False,
) -> Any:
    """A field of an options dataclass.

    Args:
        help: its text in --help.
        minimum, maximum: allowed values, both included; without `maximum` if `open`.
        may_change: whether it may change when a run resumes, since it doesn't change the result:
            paths, logs, speed, and what `checkpointing.run_identity` compares by its effect.
    """
    limits = None if minimum is None else (minimum, maximum, open)
    return field(
        default=default, metadata={"help": help, "limits": limits, "may_change": may_change}
    )


#: options of all scripts in the groups of --help; those of a single script come first
GROUPS = {
    "data": "dataset_name dataset_config_name train_data_dir train_split validation_split "
    "image_column label_column streaming shuffle_buffer labels resolution center_crop random_flip "
    "random_shift random_scale cache_images skip_corrupt_images image_range alpha_background "
    "data_scale channel_axis vae latents_cache dataloader_num_workers",
    "model and noise schedule": "model_config_name_or_path scheduler ddpm_num_steps "
    "ddpm_beta_schedule",
    "optimization": "seed train_batch_size gradient_accumulation_steps num_train_epochs "
    "max_train_steps learning_rate lr_scheduler lr_warmup_steps optimizer adam_beta1 adam_beta2 "
    "adam_weight_decay adam_epsilon max_grad_norm use_ema ema_inv_gamma ema_power ema_max_decay",
    "speed and memory": "mixed_precision gradient_checkpointing cpu",
    "evaluation and checkpoints": "output_dir validation_steps validation_samples "
    "checkpointing_steps checkpoints_total_limit resume_from_checkpoint",
    "logs and publishing": "report_to logging_dir progress push_to_hub hub_model_id hub_private",
}

changeable = partial(option, may_change=True)


def check_ranges(options: Any) -> None:
    """Raise a `ValueError` for an option that is outside its allowed values."""
    for f in fields(options):
        value, limits = getattr(options, f.name), f.metadata["limits"]
        if isinstance(value, float) and (math.isinf(value) or limits is None and math.isnan(value)):
            raise ValueError(f"--{f.name} {value}: a finite number is allowed")
        if value is None or limits is None:
            continue
        minimum, maximum, open = limits
        if minimum <= value <= maximum and not (open and value == maximum):
            continue
        allowed = f"{minimum} or more"
        if maximum < math.inf:
            allowed = f"{minimum} {'up to, not including,' if open else 'to'} {maximum}"
        raise ValueError(f"--{f.name} {value}: {allowed} is allowed")


@contextmanager
def named_errors(option: str) -> Iterator[None]:
    """Raise errors of loading a model, a config or data as a `ValueError` that names the option."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{option}: {error}") from error
    except (AttributeError, LookupError, ArithmeticError, RecursionError, MemoryError) as error:
        kind = type(error).__name__  # a config with values of wrong kinds
        raise ValueError(f"{option}: a value in its config is wrong: {kind}: {error}") from error


def check_multiple(resolution: Size, multiple: int, model: str) -> None:
    """Raise a `ValueError` if a side of --resolution isn't a multiple of what the model needs."""
    if any(side % multiple for side in as_pair(resolution)):
        raise ValueError(
            f"--resolution {size_text(resolution)}: the multiples of {multiple} are allowed {model}"
        )


@dataclass
class Options:
    dataset_name: str | None = changeable(None, "dataset on the Hub, or a local dataset's folder")
    dataset_config_name: str | None = option(None, "configuration of the dataset")
    train_data_dir: str | None = changeable(
        None, "folder of images by label, of Parquet or tar files; or a pattern, 'data/*.tar'"
    )
    train_split: str = option("train", "split to train on")
    validation_split: str | None = changeable(None, "held-out split (default: validation or test)")
    validation_fraction: float | None = changeable(
        None,
        "share of the training split that is held out instead, of each label; by default 0.1 if "
        "there is no held-out split; 0: none",
        0,
        1,
        open=True,
    )
    image_column: str | None = option(None, "image column; by default the first with images")
    label_column: str | None = option(None, "label column; by default the first of class ids")
    streaming: bool = option(False, "never load all data at once; needs --max_train_steps")
    shuffle_buffer: int | None = option(
        None, "with --streaming: images shuffled together; by default 1000, of a folder all", 1
    )
    labels: str | None = option(
        None,
        "with --streaming: labels of a column of integers or strings: names such as cat,dog, a "
        "JSON file with a list of names, or the number of classes; not for columns of class ids",
    )
    renumber_labels: bool = changeable(
        False, "only ids that training images have are labels, numbered from 0"
    )
    channels: int | None = changeable(
        None, "1 (grey) or 3 (RGB); by default 1 if 16 sampled images are grey"
    )
    check_images: int = changeable(
        100_000, "files to check before the first step, of each split, evenly spread; 0: none", 0
    )
    resolution: Size = option(
        64,
        "height x width in pixels, such as 48x32, or one number for a square; images are resized "
        "to cover it, and cropped",
    )
    center_crop: bool = option(False, "crop the center instead of a random place")
    random_flip: bool = option(False, "flip images horizontally with probability 1/2")
    random_shift: int = option(0, "shift images by up to this many pixels", 0)
    random_scale: float = option(
        0.0, "magnify images by a random factor of 1 / (1 + random_scale) to 1 + random_scale", 0, 1
    )
    cache_images: bool = changeable(False, "keep resized images in the memory of each process")
    skip_corrupt_images: bool = changeable(False, "replace and count images that can't be read")
    image_range: str | None = option(
        None,
        "LOW,HIGH: the pixels that are black and white, such as 0,4095 of 16-bit files in which 12 "
        "bits are used, or 0,1 of floating-point ones; by default as the file's format says",
    )
    alpha_background: str | None = option(
        None, "colour under transparent images, white or #rrggbb; by default alpha is left out"
    )
    data_scale: str = option(
        "standard",
        "of arrays: standard (each channel gets mean 0 and standard deviation 1), LOW,HIGH (these "
        "become -1 and 1, --data_scale=-5,5), or none; saved with the model, and undone in samples",
    )
    channel_axis: Literal["first", "last", "none"] | None = option(
        None, "of arrays: the axis of channels; by default none of one-dimensional ones, else first"
    )
    vae: str | None = option(
        None,
        "train on the latents of this autoencoder (AutoencoderKL or VQModel): its folder or Hub "
        "id, or a pipeline's; needs --center_crop",
    )
    latents_cache: str | None = changeable(None, "folder of latents (default: in --output_dir)")
    output_dir: str = changeable("output", "folder of the model, its checkpoints and its metrics")
    overwrite_output_dir: bool = changeable(
        False, "remove what an earlier training wrote into --output_dir, by name; nothing else"
    )
    seed: int = option(0, "seed of initial weights, data order and noise", 0, 2**32 - 1)
    model_config_name_or_path: str | None = changeable(
        None, "model config: a JSON file, a model's folder or Hub id; by default of medium size"
    )
    scheduler: str | None = option(None, "noise schedule of this scheduler's config or pipeline")
    ddpm_num_steps: int = option(
        1000, "timesteps of the noise schedule, without --scheduler", 1, 10**6
    )
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = option(
        "linear", "betas of the noise schedule, without --scheduler"
    )
    train_batch_size: int = changeable(64, "images per process and forward pass", 1)
    gradient_accumulation_steps: int = changeable(1, "forward passes per step", 1)
    num_train_epochs: int = changeable(100, "passes over the images, without --max_train_steps", 1)
    max_train_steps: int | None = changeable(None, "optimizer steps", 1)
    learning_rate: float = option(1e-4, "learning rate after the warm-up", 0)
    lr_scheduler: LrScheduler = option("constant_with_warmup", "schedule of the learning rate")
    lr_warmup_steps: int = option(500, "steps in which the learning rate rises from 0", 0)
    adam_beta1: float = option(0.9, "AdamW's first beta", 0, 1, open=True)
    adam_beta2: float = option(0.999, "AdamW's second beta", 0, 1, open=True)
    adam_weight_decay: float = option(0.01, "AdamW's weight decay", 0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", 0)
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit"] = option(
        "adamw", "adamw_fused: in one kernel; adamw_8bit: 8-bit states (pip install bitsandbytes)"
    )
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: off", 0)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = changeable(
        None, "autocast of the forward pass; by default that of `accelerate launch` or `config`"
    )
    gradient_checkpointing: bool = changeable(False, "recompute activations: less memory, slower")
    use_ema: bool = option(True, "evaluate and save an exponential moving average of the weights")
    ema_inv_gamma: float = option(
        1.0, "EMA's decay: 1 - (1 + step / ema_inv_gamma) ** -ema_power", 1e-6
    )
    ema_power: float = option(0.75, "see --ema_inv_gamma", 0)
    ema_max_decay: float = option(0.9999, "upper limit of the EMA's decay", 0, 1)
    validation_steps: int = changeable(1000, "steps between evaluations; 0: only at the end", 0)
    validation_samples: int = changeable(2000, "held-out images; with --streaming in memory", 1)
    checkpointing_steps: int = changeable(500, "steps between checkpoints", 1)
    checkpoints_total_limit: int = changeable(2, "checkpoints to keep; 0: all", 0)
    resume_from_checkpoint: str | None = changeable(
        None, "folder of a checkpoint, or `latest`: the newest in --output_dir, if there is one"
    )
    dataloader_num_workers: int = changeable(0, "image-reading processes, per training process", 0)
    timeout_minutes: float = changeable(
        TIMEOUT_MINUTES,
        "how long a process waits for another one, or for a batch, before the training ends",
        0.01,
        MAX_TIMEOUT_MINUTES,
    )
    report_to: str | None = changeable(None, "tracker of Accelerate (tensorboard, ...) or `all`")
    logging_dir: str = changeable("logs", "folder of the trackers, in --output_dir")
    cpu: bool = changeable(False, "train on the CPU even if there is an accelerator")
    progress: bool = changeable(True, "show a progress bar")
    push_to_hub: bool = changeable(False, "publish with HF_TOKEN or the token of `hf auth login`")
    hub_model_id: str | None = changeable(None, "user/model (default: --output_dir's name)")
    hub_private: bool = changeable(False, "create a private repository, if it doesn't exist yet")

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                f"--dataset_name {self.dataset_name} and --train_data_dir {self.train_data_dir}: "
                "one of the two is needed, and only one"
            )
        self.resolution = config_size(self.resolution, "--resolution")
        check_ranges(self)
        for name in ("train_data_dir", "dataset_name", "output_dir"):
            if getattr(self, name) == "":
                raise ValueError(f"--{name} '': a text that isn't empty is allowed")
        if self.channels not in (None, 1, 3):
            raise ValueError(
                f"--channels {self.channels}: 1 (grey) and 3 (RGB) are allowed; other numbers of "
                "channels can be arrays, .npy files or a column of arrays"
            )
        self._check_needed()
        self._check_excluded()
        if self.scheduler and not self.has_default_schedule:
            raise ValueError(
                f"--scheduler {self.scheduler} has a noise schedule: --ddpm_num_steps and "
                "--ddpm_beta_schedule are not allowed with it"
            )
        is_augmented = self.random_shift or self.random_scale or not self.center_crop
        if self.vae and is_augmented:
            raise ValueError(
                f"--vae {self.vae} encodes an image once, without random crops, shifts and "
                f"scales: --random_shift is {self.random_shift} and --random_scale "
                f"{self.random_scale}, 0 is allowed, and --center_crop is {self.center_crop}, which "
                "must be given"
            )
        if self.streaming and self.skip_corrupt_images and self.train_batch_size == 1:
            raise ValueError(
                "--train_batch_size 1: with --streaming and --skip_corrupt_images 2 or more are "
                "allowed, since another image of the batch replaces a corrupt one"
            )

    @property
    def repository(self) -> str:
        """The Hub id of --push_to_hub."""
        return self.hub_model_id or Path(self.output_dir).resolve().name

    @property
    def has_default_schedule(self) -> bool:
        """Whether the --ddpm options are left at their defaults."""
        return (self.ddpm_num_steps, self.ddpm_beta_schedule) == (1000, "linear")

    @property
    def held_out_fraction(self) -> float:
        """The share of the training split to hold out, where no other split is held out."""
        return 0.1 if self.validation_fraction is None else self.validation_fraction

    def _check_needed(self) -> None:
        """Raise a `ValueError` for an option without another one that it needs."""
        needed = {"latents_cache": "vae", "shuffle_buffer": "streaming", "labels": "streaming"}
        for name, other in needed.items():
            if (value := getattr(self, name)) is not None and not getattr(self, other):
                raise ValueError(f"--{name} {value} needs --{other}")
        if self.streaming and self.max_train_steps is None:
            raise ValueError("--streaming needs --max_train_steps: the number of images is unknown")
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private):
            raise ValueError(
                f"--hub_model_id {self.hub_model_id}, --hub_private {self.hub_private} need "
                "--push_to_hub"
            )
        if not self.push_to_hub:
            return
        if get_token() is None:
            raise ValueError("--push_to_hub needs a token: `hf auth login`, or set HF_TOKEN")
        with named_errors(f"--hub_model_id {self.hub_model_id}, --output_dir {self.output_dir}"):
            validate_repo_id(self.repository)

    def _check_excluded(self) -> None:
        """Raise a `ValueError` for two options that exclude each other."""
        once = f"--vae {self.vae} reads every image once, before the first step"
        reasons = {
            ("cache_images", "vae"): f"--cache_images: {once}",
            ("skip_corrupt_images", "vae"): f"--skip_corrupt_images: {once}",
            ("streaming", "vae"): f"{once}, which --streaming can't",
            ("streaming", "cache_images"): "--cache_images keeps all images, --streaming none",
            ("streaming", "renumber_labels"): "--renumber_labels needs all labels before the first "
            "step, which --streaming doesn't have (--labels can name them)",
            ("channels", "vae"): f"--channels {self.channels}: --vae {self.vae} has its own",
            ("validation_split", "validation_fraction"): "--validation_split "
            f"{self.validation_split} and --validation_fraction {self.validation_fraction} both "
            "hold out images",
            ("overwrite_output_dir", "resume_from_checkpoint"): "--overwrite_output_dir removes "
            "what --resume_from_checkpoint goes on from",
        }
        for (first, second), reason in reasons.items():
            if getattr(self, first) and getattr(self, second):
                raise ValueError(f"{reason}: only one of the two is allowed")


def parse(options: type[AnyOptions], description: str | None) -> AnyOptions:
    """The options on the command line; invalid ones end the program with a message.

    Dashes in an option's name may stand for underscores. Booleans are written --name, --name False
    or, where they are on by default, --no_name.
    """
    parser = Parser(
        usage="%(prog)s [options]",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
    )
    hints = get_type_hints(options)
    groups = {title: parser.add_argument_group(title) for title in ("this script", *GROUPS)}
    titles = {name: title for title, names in GROUPS.items() for name in names.split()}
    for f in fields(options):
        group = groups[titles.get(f.name, "this script")]
        _add_option(group, f.name, hints[f.name], f.default, f.metadata["help"])
    words = []
    for word in sys.argv[1:]:
        words.append(re.sub("(?<=^--)[^=]+", lambda name: name[0].replace("-", "_"), word))
    try:
        return options(**vars(parser.parse_args(words)))
    except ValueError as error:
        parser.error(str(error))


def _add_option(parser: _ActionsContainer, name: str, hint: Any, default: Any, help: str) -> None:
    """Add the option of a dataclass field: a `Literal`, `Size`, bool, int, float or str, or None."""
    if type(None) in get_args(hint):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if default is not None and default is not False:
        help += " (default: %(default)s)"
    settings: dict[str, Any] = {"type": hint}
    if get_origin(hint) is Literal:
        settings = {"choices": get_args(hint)}
    elif hint == Size:
        settings = {"type": size, "metavar": "HxW"}
    elif hint is bool:
        settings = {"type": _parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    parser.add_argument(f"--{name}", default=default, help=help, **settings)
    if hint is bool and default:
        help = f"turn --{name} off"
        parser.add_argument(f"--no_{name}", dest=name, action="store_false", help=help)


def _parse_bool(word: str) -> bool:
    values = dict.fromkeys(("yes", "true", "t", "y", "1"), True)
    values |= dict.fromkeys(("no", "false", "f", "n", "0"), False)
    if word.lower() not in values:
        raise ArgumentTypeError(f"{word!r}: {', '.join(values)} are allowed")
    return values[word.lower()]
