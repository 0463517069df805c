"""What a classifier learns, and from where it starts: the options, the loss, and the first weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from diffusers import DDPMScheduler, ModelMixin, UNet2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import ClassifierGuidedPipeline, NoiseAwareClassifier
from ..noise import (
    SMALLEST_ALPHA,
    NoiseLevel,
    TrainedSchedule,
    split_variance,
    x0_coefficients,
)
from .classifier_losses import (
    REGRESSION,
    SINGLE,
    balanced_weights,
    label_losses,
    log_likelihood,
    mixup,
    score_matching_losses,
    soft_labels,
    worst_case,
)
from .data import TargetedImages
from .latents import LatentImages
from .loop import Batch, Draws
from .losses import LossSecondMomentSampler
from .options import Images, Options, option

ARCHITECTURE = (
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "downsample_type",
    "norm_num_groups",
    "resnet_time_scale_shift",
    "attention_head_dim",
    "norm_eps",
    "dropout",
)  # common to UNet and classifier
SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")


@dataclass
class RecipeOptions(Options):
    problem_type: Literal[
        "single_label_classification", "multi_label_classification", "regression"
    ] = option(
        SINGLE,
        "what a label is: one class, several (a list of ids or names, or a vector of zeros and ones), or one "
        "or more numbers; but for the first --label_column must be given",
    )
    class_weights: str | None = option(
        None,
        "how much a label counts: `balanced` (by how rare it is), numbers such as 1,1,0.5, or a JSON file of "
        "{name: weight}. Several labels an image: how much its presence does",
    )
    label_smoothing: float = option(
        0.0, "share of a label that is given to all labels alike; 0: off"
    )
    mixup: float = option(
        0.0, "images and labels are mixed by twos, in shares from Beta(mixup, mixup); 0: off"
    )
    timestep_sampler: Literal["uniform", "second_moment"] = option(
        "uniform",
        "second_moment: timesteps of large loss more often, weighted so that the mean loss stays the same",
    )
    min_timestep: int = option(0, "the least noisy timestep to train on")
    init_from: str | None = option(
        None,
        "start from these weights: a classifier's or UNet2DModel's folder or Hub name, or that of a pipeline "
        "with one. Without --model_config_name_or_path it says the architecture, too; a classifier, without "
        "--scheduler and --ddpm options, the noise schedule",
    )
    robust_epsilon: float = option(
        0.0,
        "train on the worst images within this distance (L2, in units of x_t) of the noisy ones; 0: off",
    )
    robust_steps: int = option(7, "gradients by which the worst image is found")
    dlsm_weight: float = option(
        0.0,
        "weight of the denoising likelihood score-matching loss, a mean over pixels, which makes the gradient "
        "right; it needs --score_model; 0: off",
    )
    score_model: str | None = option(
        None,
        "the diffusion model whose score that loss takes: the folder or Hub name of a pipeline with UNet2DModel, "
        "unconditional or with a null label",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("label_smoothing", "mixup", "min_timestep", "robust_epsilon", "dlsm_weight"):
            most, allowed = (
                (1, "0 up to, not including, 1")
                if name == "label_smoothing"
                else (np.inf, "0 or more")
            )
            if not 0 <= (value := getattr(self, name)) < most:
                raise ValueError(f"--{name} {value}: {allowed} is allowed")
        if self.robust_steps < 1 or self.robust_steps != 7 and not self.robust_epsilon:
            raise ValueError(
                f"--robust_steps {self.robust_steps}: 1 or more is allowed, with --robust_epsilon"
            )
        if (self.dlsm_weight > 0) != (self.score_model is not None):
            raise ValueError(
                f"--dlsm_weight {self.dlsm_weight} and --score_model {self.score_model} need each other"
            )
        if self.dlsm_weight and (self.mixup or self.problem_type == REGRESSION):
            raise ValueError(
                f"--dlsm_weight {self.dlsm_weight}: with --mixup {self.mixup} and --problem_type "
                f"{self.problem_type} 0 is allowed, since there is no p(y | x_t) of these images"
            )
        if self.dlsm_weight and self.gradient_checkpointing:
            raise ValueError(
                f"--dlsm_weight {self.dlsm_weight} differentiates twice, which --gradient_checkpointing "
                "can't: 0 is allowed with it"
            )
        if self.streaming and self.problem_type != SINGLE:
            raise ValueError(
                f"--problem_type {self.problem_type} needs all labels before the first step, which "
                f"--streaming doesn't have: {SINGLE} is allowed with it"
            )
        if self.streaming and self.class_weights == "balanced":
            raise ValueError(
                "--class_weights balanced counts all labels before the first step, which --streaming "
                "doesn't have: numbers and a JSON file are allowed with it"
            )
        if self.mixup and self.train_batch_size % 2:
            raise ValueError(
                f"--train_batch_size {self.train_batch_size}: an even number is allowed with --mixup, "
                "which mixes images by twos"
            )
        if self.problem_type == REGRESSION and (
            self.class_weights is not None or self.label_smoothing
        ):
            raise ValueError(
                f"--class_weights {self.class_weights}, --label_smoothing {self.label_smoothing}: none "
                f"and 0 are allowed with --problem_type {REGRESSION}"
            )


# Labels


def without_labels(options: RecipeOptions) -> RecipeOptions:
    """Options with which images are loaded whose labels are `labelled` then."""
    return options if options.problem_type == SINGLE else replace(options, label_column=None)


def labelled(
    options: RecipeOptions, data: Images, held_out: Images | None
) -> tuple[Images | TargetedImages, Images | TargetedImages | None]:
    """Both splits with the labels of --problem_type.

    Raises:
        ValueError: if --label_column doesn't hold them.
    """
    if (kind := options.problem_type) == SINGLE:
        return data, held_out
    data = TargetedImages(data, options.label_column, kind)
    if held_out is not None:
        held_out = TargetedImages(held_out, options.label_column, kind, data.id2label)
        if held_out.num_labels != data.num_labels:
            raise ValueError(
                f"--label_column {options.label_column}: {data.num_labels} numbers an image to train on, "
                f"and {held_out.num_labels} in the held-out split"
            )
    return data, held_out


def all_labels(data: Images | TargetedImages) -> torch.Tensor:
    """Those of a split, (N,) ids or (N, num_labels)."""
    if isinstance(data, TargetedImages):
        return data.targets()
    images = data.images if isinstance(data, LatentImages) else data
    return torch.tensor([images.label(i) for i in range(len(images))])


def make_class_weights(
    options: RecipeOptions, data: Images | TargetedImages
) -> torch.Tensor | None:
    """(num_labels,) of --class_weights.

    Raises:
        ValueError: if it is none of its forms, or they don't fit the labels.
    """
    given, names = options.class_weights, list(data.id2label.values())
    if given is None:
        return None
    try:
        if given == "balanced":
            labels = all_labels(data)
            counts = (
                torch.bincount(labels, minlength=len(names))
                if labels.ndim == 1
                else labels.sum(dim=0)
            )
            return balanced_weights(counts, len(labels), options.problem_type)
        if Path(given).is_file():
            by_name = json.loads(Path(given).read_text())
            if not isinstance(by_name, dict) or by_name.keys() != set(names):
                raise ValueError(f"a weight for each of the labels {names} is allowed")
            weights = [float(by_name[name]) for name in names]
        else:
            weights = [float(one) for one in given.split(",")]
        if (
            len(weights) != len(names)
            or not all(0 <= weight < np.inf for weight in weights)
            or not any(weights)
        ):
            raise ValueError(f"{len(names)} numbers, 0 or more and not all 0, are allowed")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--class_weights {given}: {error}; `balanced`, numbers such as 1,1,0.5 and a JSON file of "
            "{name: weight} are allowed"
        ) from error
    return torch.tensor(weights)


# Where it starts


def load_start(path: str | None) -> NoiseAwareClassifier | UNet2DModel | None:
    """The model of --init_from in float32.

    Raises:
        ValueError: if there is none of these classes.
    """
    if path is None:
        return None
    for subfolder in (None, "classifier", "unet"):
        try:
            config = UNet2DModel.load_config(path, subfolder=subfolder)
        except OSError as error:
            reason = error
            continue
        for model_class in (NoiseAwareClassifier, UNet2DModel):
            if config.get("_class_name") == model_class.__name__:
                try:
                    return model_class.from_pretrained(
                        path, subfolder=subfolder, torch_dtype=torch.float32
                    )
                except (OSError, ValueError) as error:
                    raise ValueError(f"--init_from {path}: {error}") from error
        reason = f"it holds a {config.get('_class_name')}"
    raise ValueError(
        f"--init_from {path}: {reason}; NoiseAwareClassifier and UNet2DModel are allowed"
    )


def start_schedule(options: RecipeOptions, start: ModelMixin | None) -> DDPMScheduler | None:
    """The noise schedule of a classifier to start from, where the options name none."""
    own = options.scheduler is None and (options.ddpm_num_steps, options.ddpm_beta_schedule) == (
        1000,
        "linear",
    )
    if own and isinstance(start, NoiseAwareClassifier):
        return DDPMScheduler(**{name: start.config[name] for name in SCHEDULE})
    return None


def architecture(start: ModelMixin) -> dict[str, Any]:
    """The classifier's arguments that its start decides, where no config is given."""
    if isinstance(start, NoiseAwareClassifier):
        decided = (*SCHEDULE, "num_labels", "id2label", "label2id", "problem_type")
        return {name: value for name, value in start.config.items() if name not in decided}
    return {name: start.config[name] for name in ARCHITECTURE}


def start_at(
    options: RecipeOptions,
    model: NoiseAwareClassifier,
    start: ModelMixin | None,
    data: Images | TargetedImages,
) -> str | None:
    """Give a fresh classifier the weights of its start, and a regressor's outputs the labels' mean; says what was done.

    The parameters that have the same name and shape are taken: a UNet's encoder and middle block are a classifier's,
    and so is all of a classifier, but for the last layer if its labels are others.

    Raises:
        ValueError: if there is none.
    """
    own = model.state_dict()
    last = [name for name in own if name.startswith("head.")][-2:]  # weight and bias
    if options.problem_type == REGRESSION:
        model.get_parameter(last[1]).data.copy_(data.targets().mean(dim=0))
    if start is None:
        return None
    theirs = start.state_dict()
    taken = {
        name: theirs[name]
        for name in own
        if name in theirs and theirs[name].shape == own[name].shape
    }
    if any(start.config.get(name) != model.config[name] for name in ("problem_type", "id2label")):
        taken = {name: value for name, value in taken.items() if name not in last}
    if not taken:
        raise ValueError(
            f"--init_from {options.init_from}: no parameter of the {type(start).__name__} has the name "
            "and shape of one of the classifier's, as they have without --model_config_name_or_path"
        )
    model.load_state_dict(taken, strict=False)
    numbers = sum(value.numel() for value in taken.values()) / sum(
        value.numel() for value in own.values()
    )
    return f"starts from {options.init_from}: {len(taken)} of {len(own)} parameters ({numbers:.0%} of the numbers)"


# What it learns


class ScoreModel:
    """The score s(x_t) of a diffusion model, at the timesteps of the schedule that a classifier is trained with.

    Its own schedule may be another one: it is asked where its noise-to-signal ratio is the same.

    Raises:
        ValueError: if --score_model can't be loaded, needs a label, doesn't fit the images, or knows no such noise.
    """

    def __init__(
        self,
        options: RecipeOptions,
        scheduler: DDPMScheduler,
        last: int,
        data: Images | TargetedImages,
    ):
        path = options.score_model
        try:
            pipeline = ClassifierGuidedPipeline.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"--score_model {path}: {error}") from error
        self.unet, config = pipeline.unet.requires_grad_(False).eval(), pipeline.scheduler.config
        prediction, embeddings = config.get("prediction_type"), self.unet.config.num_class_embeds
        if prediction not in ("epsilon", "sample", "v_prediction") or not config.get(
            "beta_schedule"
        ):
            raise ValueError(
                f"--score_model {path}: its {config['_class_name']} has prediction_type {prediction!r}; a "
                "variance-preserving model of epsilon, sample or v_prediction is allowed"
            )
        if embeddings is not None and pipeline.num_labels != embeddings - 1:
            raise ValueError(
                f"--score_model {path}: of {embeddings} class embeddings and {pipeline.num_labels} labels "
                "none is a null label; an unconditional model, or one with a null label, is allowed"
            )
        size = self.unet.config.sample_size or data.resolution
        if self.unet.config.in_channels != data.channels or size != data.resolution:
            raise ValueError(
                f"--score_model {path} is for {self.unet.config.in_channels} channels of size {size}; "
                f"{data.channels} of size {data.resolution} are allowed with this data"
            )
        self.null, self.channels = embeddings - 1 if embeddings else None, data.channels
        abar = scheduler.alphas_cumprod.double().clamp(min=SMALLEST_ALPHA**2)
        levels = [
            NoiseLevel(a, s, *x0_coefficients(prediction, a, s))
            for a, s in zip(abar.sqrt().tolist(), (1 - abar).sqrt().tolist(), strict=True)
        ]
        schedule = TrainedSchedule(
            {
                "trained_betas": DDPMScheduler.from_config(config).betas.tolist(),
                "num_train_timesteps": config["num_train_timesteps"],
            }
        )
        for t in (options.min_timestep, last):
            ratio = np.log(levels[t].sigma / levels[t].alpha)
            if not schedule.log_ratio[0] - 1e-3 <= ratio <= schedule.log_ratio[-1] + 1e-3:
                raise ValueError(
                    f"--score_model {path} knows no noise as of timestep {t} of this schedule; its own "
                    "(--scheduler), or --min_timestep and --max_timestep within it, are allowed"
                )
        times = [schedule.timestep(level) for level in levels]
        to_x_t = [(level.alpha * level.a - 1) / level.sigma**2 for level in levels]
        to_output = [level.alpha * level.b / level.sigma**2 for level in levels]
        self.tables = torch.tensor([times, to_x_t, to_output], dtype=torch.float64).float()

    @torch.no_grad()
    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(alpha x0_pred - x_t) / sigma^2 at the classifier's timesteps (B,), in float32."""
        self.unet.to(x_t.device)
        time, to_x_t, to_output = self.tables.to(x_t.device)[:, t]
        null = None if self.null is None else torch.full_like(t, self.null)
        output = split_variance(
            self.unet(x_t, time, class_labels=null).sample.float(), self.channels
        )[0]
        return to_x_t[:, None, None, None] * x_t + to_output[:, None, None, None] * output


class Recipe:
    """The loss that the options mean: (model, batch, draws) -> its mean over this process's rows.

    Args:
        scheduler: says what the noise of a timestep is.
        last: the noisiest timestep to train on.
        data: what is trained on.

    Raises:
        ValueError: if an option doesn't fit the data or the schedule.
    """

    def __init__(
        self,
        options: RecipeOptions,
        accelerator: Accelerator,
        scheduler: DDPMScheduler,
        last: int,
        data: Images | TargetedImages,
    ):
        first, kind = options.min_timestep, options.problem_type
        if first > last:
            raise ValueError(
                f"--min_timestep {first}: 0 to {last} is allowed with this schedule and --max_timestep"
            )
        self.options, self.accelerator, self.scheduler, self.first = (
            options,
            accelerator,
            scheduler,
            first,
        )
        self.count, self.num_labels = last + 1 - first, len(data.id2label)
        self.weights, self.variance = make_class_weights(options, data), None
        if kind == REGRESSION:
            self.variance = data.targets().var(dim=0, unbiased=False)
            if not (self.variance > 0).all():
                raise ValueError(
                    f"--label_column {options.label_column}: all numbers are the same, in one of its "
                    f"{data.num_labels} places; numbers that differ can be learned"
                )
        if options.dlsm_weight and accelerator.mixed_precision == "fp16":
            raise ValueError(
                f"--dlsm_weight {options.dlsm_weight}: --mixed_precision no and bf16 are allowed with it, "
                "since fp16's loss scaling doesn't reach the gradient within the loss"
            )
        if options.dlsm_weight and accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise ValueError(
                f"--dlsm_weight {options.dlsm_weight} differentiates twice, which torch.compile can't: "
                "--dynamo_backend no is allowed with it"
            )
        if options.dlsm_weight and accelerator.distributed_type in (
            DistributedType.FSDP,
            DistributedType.DEEPSPEED,
        ):
            raise ValueError(
                f"--dlsm_weight {options.dlsm_weight} differentiates twice, which distributed_type "
                f"{accelerator.distributed_type.value} isn't made for: 0 is allowed with it"
            )
        self.score = ScoreModel(options, scheduler, last, data) if options.dlsm_weight else None
        self.sampler = None
        if options.timestep_sampler == "second_moment":
            self.sampler = LossSecondMomentSampler(self.count)
            accelerator.register_for_checkpointing(self.sampler)

    def __call__(self, model: torch.nn.Module, batch: Batch, draws: Draws) -> torch.Tensor:
        options, x0, y = self.options, batch["pixel_values"], batch["label"]
        k, weight = self._draw_steps(draws)
        t, eps = self.first + k, draws.randn(*x0.shape[1:])
        if options.mixup:
            x0, y = mixup(x0, soft_labels(y, self.num_labels), self._draw_shares(draws))
        losses = self._losses(model, self.scheduler.add_noise(x0, eps, t), t, y, eps)
        if self.sampler is None:
            return losses.mean()
        self.sampler.update(*self.accelerator.gather((k, losses.detach())))
        return (weight * losses).mean()

    def _draw_steps(self, draws: Draws) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.sampler is None:
            return draws.randint(self.count), None
        return tuple(
            part[draws.mine].to(draws.device)
            for part in self.sampler.sample(draws.total, draws.generator)
        )

    def _draw_shares(self, draws: Draws) -> torch.Tensor:
        """Beta(mixup, mixup), which torch draws from its global generator only."""
        seed = torch.randint(2**62, (), generator=draws.generator).item()
        shares = np.random.default_rng(seed).beta(
            self.options.mixup, self.options.mixup, draws.total
        )
        return torch.from_numpy(shares)[draws.mine].float().to(draws.device)

    def _losses(
        self,
        model: torch.nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        eps: torch.Tensor,
    ) -> torch.Tensor:
        """One an image, (B,)."""
        options, kind, weights = self.options, self.options.problem_type, self.weights

        def wrong(x: torch.Tensor) -> torch.Tensor:
            return label_losses(
                model(x, t).logits, y, kind, weights, options.label_smoothing, self.variance
            )

        if self.score is None:
            return wrong(worst_case(wrong, x_t, options.robust_epsilon, options.robust_steps))
        with sdpa_kernel(
            SDPBackend.MATH
        ):  # attention's other kernels can't be differentiated twice
            logits = model(x_t.requires_grad_(), t).logits
        sigma = (1 - self.scheduler.alphas_cumprod.to(x_t.device)[t]).sqrt()
        matching = score_matching_losses(
            log_likelihood(logits, y, kind), x_t, eps, sigma, self.score(x_t, t)
        )
        if options.robust_epsilon:
            losses = wrong(worst_case(wrong, x_t, options.robust_epsilon, options.robust_steps))
        else:
            losses = label_losses(logits, y, kind, weights, options.label_smoothing)
        return losses + options.dlsm_weight * matching
