"""Training objective of a noise-aware classifier, made of the parts in `classifier_losses`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..noise import SMALLEST_ALPHA, NoiseLevel, TrainedSchedule, split_variance, x0_coefficients
from ..pipeline import ClassifierGuidedPipeline
from .annotations import TargetedImages
from .batches import Batch, StepRandom
from .classifier_losses import (
    SINGLE,
    balanced_weights,
    label_losses,
    log_likelihood,
    mixup,
    score_matching_losses,
    soft_labels,
    worst_case,
)
from .latents import LatentImages
from .losses import LossSecondMomentSampler, draw_steps, weighted_mean
from .prepare import Images


@dataclass
class ClassifierLoss:
    """The loss of a classifier at random noise levels: (model, batch, draws) -> mean of the rows.

    Args:
        accelerator: of all processes.
        scheduler: the noise schedule.
        num_labels: K.
        min_timestep, max_timestep: range of the timesteps.
        problem_type: kind of the labels, see `classifier_losses`.
        class_weights: (K,); None: all 1.
        variance: (K,), of the numbers to regress.
        label_smoothing: see `label_losses`; 0: off.
        mixup_alpha: a of Beta(a, a), from which the shares of `mixup` are drawn; 0: off.
        robust_epsilon, robust_steps: radius and gradient steps of `worst_case`; 0: off.
        score: adds `score_matching_losses` with the score of this diffusion model; None: off.
        score_weight: their weight.
        sampler: of timesteps, counted from `min_timestep`; None: uniform.
    """

    accelerator: Accelerator
    scheduler: DDPMScheduler
    num_labels: int
    min_timestep: int
    max_timestep: int
    problem_type: str = SINGLE
    class_weights: torch.Tensor | None = None
    variance: torch.Tensor | None = None
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    robust_epsilon: float = 0.0
    robust_steps: int = 7
    score: ScoreModel | None = None
    score_weight: float = 0.0
    sampler: LossSecondMomentSampler | None = None

    def __call__(self, model: torch.nn.Module, batch: Batch, draws: StepRandom) -> torch.Tensor:
        x0, y = batch["pixel_values"], batch["label"]
        steps = self.max_timestep + 1 - self.min_timestep
        k, weight = draw_steps(draws, steps, self.sampler)
        t, eps = self.min_timestep + k, draws.randn(*x0.shape[1:])
        if self.mixup_alpha:
            x0, y = mixup(x0, soft_labels(y, self.num_labels), self.mixup_shares(draws))
        losses = self.per_image(model, self.scheduler.add_noise(x0, eps, t), t, y, eps)
        return weighted_mean(losses, k, weight, self.sampler, self.accelerator)

    def mixup_shares(self, draws: StepRandom) -> torch.Tensor:
        """Shares from Beta(mixup_alpha, mixup_alpha), (B,).

        Drawn by NumPy, since torch draws from this distribution with its global generator only.
        """
        seed = torch.randint(2**62, (), generator=draws.generator).item()
        shares = np.random.default_rng(seed).beta(self.mixup_alpha, self.mixup_alpha, draws.total)
        return draws.local(torch.from_numpy(shares).float())

    def per_image(
        self,
        model: torch.nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        eps: torch.Tensor,
    ) -> torch.Tensor:
        """The loss of each image, (B,)."""

        def per_image_loss(x: torch.Tensor) -> torch.Tensor:
            return self._label_losses(model(x, t).logits, y)

        if self.score is None:
            return per_image_loss(self._worst_case(per_image_loss, x_t))
        with sdpa_kernel(SDPBackend.MATH):  # other attention kernels have no second derivative
            logits = model(x_t.requires_grad_(), t).logits
        sigma = (1 - self.scheduler.alphas_cumprod.to(x_t.device)[t]).sqrt()
        log_p = log_likelihood(logits, y, self.problem_type)
        matching = score_matching_losses(log_p, x_t, eps, sigma, self.score(x_t, t))
        if self.robust_epsilon:
            losses = per_image_loss(self._worst_case(per_image_loss, x_t))
        else:
            losses = self._label_losses(logits, y)
        return losses + self.score_weight * matching

    def _label_losses(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return label_losses(
            logits, y, self.problem_type, self.class_weights, self.label_smoothing, self.variance
        )

    def _worst_case(self, losses: Callable[..., torch.Tensor], x_t: torch.Tensor) -> torch.Tensor:
        return worst_case(losses, x_t, self.robust_epsilon, self.robust_steps)


class ScoreModel:
    """The score s(x_t) of a diffusion model at the timesteps of the classifier's schedule.

    The model's schedule may be another one: it is evaluated at the same noise-to-signal ratio.

    Args:
        path: of --score_model, a pipeline with a UNet2DModel.
        scheduler: the classifier's noise schedule.
        min_timestep, max_timestep: range of its timesteps.
        data: the training images.

    Raises:
        ValueError: if the model can't be loaded, has no unconditional score, or doesn't fit the
            images or the noise levels.
    """

    def __init__(
        self,
        path: str,
        scheduler: DDPMScheduler,
        min_timestep: int,
        max_timestep: int,
        data: Images | TargetedImages,
    ):
        try:
            pipeline = ClassifierGuidedPipeline.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"--score_model {path}: {error}") from error
        self.unet = pipeline.unet.requires_grad_(False).eval()
        self.channels, embeddings = data.channels, self.unet.config.num_class_embeds
        self.null_label = embeddings - 1 if embeddings else None
        check_score_model(path, pipeline, data)

        alpha_bar = scheduler.alphas_cumprod.double().clamp(min=SMALLEST_ALPHA**2)
        alphas, sigmas = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()
        config = pipeline.scheduler.config
        levels = [
            NoiseLevel(alpha, sigma, *x0_coefficients(config["prediction_type"], alpha, sigma))
            for alpha, sigma in zip(alphas, sigmas, strict=True)
        ]
        schedule = TrainedSchedule(
            {
                "trained_betas": DDPMScheduler.from_config(config).betas.tolist(),
                "num_train_timesteps": config["num_train_timesteps"],
            }
        )
        for t in (min_timestep, max_timestep):
            ratio = math.log(levels[t].sigma / levels[t].alpha)
            if not schedule.log_ratio[0] - 1e-3 <= ratio <= schedule.log_ratio[-1] + 1e-3:
                raise ValueError(
                    f"--score_model {path} knows no noise as of timestep {t} of this schedule; its "
                    "own (--scheduler), or --min_timestep and --max_timestep within it, are allowed"
                )
        # By timestep t of the classifier: the model's timestep, and s = c_x x_t + c_out output.
        timesteps = [schedule.timestep(level) for level in levels]
        c_x = [(level.alpha * level.a - 1) / level.sigma**2 for level in levels]
        c_out = [level.alpha * level.b / level.sigma**2 for level in levels]
        self.tables = torch.tensor([timesteps, c_x, c_out], dtype=torch.float64).float()

    @torch.no_grad()
    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(alpha x0_pred - x_t) / sigma^2 at the classifier's timesteps (B,), in float32."""
        self.unet.to(x_t.device)
        timestep, c_x, c_out = self.tables.to(x_t.device)[:, t]
        labels = None if self.null_label is None else torch.full_like(t, self.null_label)
        output = self.unet(x_t, timestep, class_labels=labels).sample.float()
        output, _ = split_variance(output, self.channels)
        return c_x[:, None, None, None] * x_t + c_out[:, None, None, None] * output


def check_score_model(
    path: str, pipeline: ClassifierGuidedPipeline, data: Images | TargetedImages
) -> None:
    """Raise a `ValueError` if a pipeline has no unconditional score for these images."""
    unet, scheduler = pipeline.unet.config, pipeline.scheduler.config
    prediction = scheduler.get("prediction_type")
    if prediction not in ("epsilon", "sample", "v_prediction") or not scheduler.get(
        "beta_schedule"
    ):
        raise ValueError(
            f"--score_model {path}: its {scheduler['_class_name']} has prediction_type "
            f"{prediction!r}; a variance-preserving model of epsilon, sample or v_prediction is "
            "allowed"
        )
    embeddings = unet.num_class_embeds
    if embeddings is not None and pipeline.num_labels != embeddings - 1:
        raise ValueError(
            f"--score_model {path}: of {embeddings} class embeddings and {pipeline.num_labels} "
            "labels none is a null label; an unconditional model, or one with a null label, is "
            "allowed"
        )
    size = unet.sample_size or data.resolution
    if (unet.in_channels, size) != (data.channels, data.resolution):
        raise ValueError(
            f"--score_model {path} is for {unet.in_channels} channels of size {size}; "
            f"{data.channels} of size {data.resolution} are allowed with this data"
        )


def all_labels(data: Images | TargetedImages) -> torch.Tensor:
    """The labels of a split, (N,) ids or (N, num_labels)."""
    if isinstance(data, TargetedImages):
        return data.targets()
    images = data.images if isinstance(data, LatentImages) else data
    return torch.tensor([images.label(i) for i in range(len(images))])


def parse_class_weights(
    text: str | None, data: Images | TargetedImages, problem_type: str
) -> torch.Tensor | None:
    """Class weights (num_labels,) from --class_weights: `balanced`, numbers, or a JSON file.

    Raises:
        ValueError: for anything else, or if they don't fit the labels.
    """
    if text is None:
        return None
    names = list(data.id2label.values())
    try:
        if text == "balanced":
            labels = all_labels(data)
            if labels.ndim == 1:
                counts = torch.bincount(labels, minlength=len(names))
            else:
                counts = labels.sum(dim=0)
            return balanced_weights(counts, len(labels), problem_type)
        if Path(text).is_file():
            by_name = json.loads(Path(text).read_text())
            if not isinstance(by_name, dict) or by_name.keys() != set(names):
                raise ValueError(f"a weight for each of the labels {names} is allowed")
            weights = [float(by_name[name]) for name in names]
        else:
            weights = [float(word) for word in text.split(",")]
        valid = len(weights) == len(names) and all(0 <= weight < math.inf for weight in weights)
        if not valid or not any(weights):
            raise ValueError(f"{len(names)} numbers, 0 or more and not all 0, are allowed")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--class_weights {text}: {error}; `balanced`, numbers such as 1,1,0.5 and a JSON file "
            "of {name: weight} are allowed"
        ) from error
    return torch.tensor(weights)
