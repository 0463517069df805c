"""Training objective of a noise-aware classifier, made of the parts in `classifier_losses`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..images import config_size, size_text
from ..noise import SMALLEST_ALPHA, NoiseLevel, TrainedSchedule, split_variance, x0_coefficients
from ..pipeline import ClassifierGuidedPipeline
from .annotations import TargetedImages
from .batches import Batch, StepRandom
from .classifier_losses import (
    SINGLE,
    balanced_weights,
    gradient_matching_losses,
    label_losses,
    log_likelihood,
    mixup,
    power_losses,
    score_matching_losses,
    soft_labels,
    worst_case,
)
from .losses import LossSecondMomentSampler, draw_steps, weighted_mean
from .prepare import Images
from .teacher import NoisyTeacher, Teacher


@dataclass
class ClassifierLoss:
    """The loss of a classifier at random noise levels: (model, batch, draws) -> mean of the rows."""

    accelerator: Accelerator
    scheduler: DDPMScheduler
    num_labels: int
    min_timestep: int
    max_timestep: int
    problem_type: str = SINGLE
    class_weights: Tensor | None = None  # as those of `label_losses`
    variance: Tensor | None = None
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0  # a of Beta(a, a), from which the shares of `mixup` are drawn; 0: off
    robust_epsilon: float = 0.0  # radius of `worst_case`; 0: off
    robust_steps: int = 7
    score: ScoreModel | None = None  # for `score_matching_losses`; None: off
    score_weight: float = 0.0
    sampler: LossSecondMomentSampler | None = None  # counts from `min_timestep`; None: uniform
    teacher: Teacher | NoisyTeacher | None = (
        None  # whose probabilities are the targets; None: the labels
    )
    max_power: float | None = None  # of `power_losses`; None: off. Needs a teacher
    gradient_weight: float = 0.0  # of `gradient_matching_losses`; 0: off. Needs a `NoisyTeacher`

    def __call__(self, model: torch.nn.Module, batch: Batch, draws: StepRandom) -> Tensor:
        x0, y = batch["pixel_values"], batch["label"]
        steps = self.max_timestep + 1 - self.min_timestep
        k, weight = draw_steps(draws, steps, self.sampler)
        t, eps = self.min_timestep + k, draws.randn(*x0.shape[1:])
        if self.mixup_alpha:
            x0, y = mixup(x0, soft_labels(y, self.num_labels), self.mixup_shares(draws))
        options, label = {}, None
        if self.max_power is not None:
            options["power"] = torch.exp(draws.rand() * math.log(self.max_power))  # log-uniform
        if self.gradient_weight:  # the image's label, or any
            label = torch.where(draws.rand() < 0.5, y, draws.randint(self.num_labels))
        x_t, log_q, teacher_gradient = self.scheduler.add_noise(x0, eps, t), None, None
        if self.teacher is not None:
            log_q, teacher_gradient = self.teacher_targets(x0, x_t, t, options, label)
            y = log_q.exp()

        def of_logits(logits: Tensor) -> Tensor:
            if options:
                return power_losses(logits, log_q)
            kind = (self.problem_type, self.class_weights, self.label_smoothing, self.variance)
            return label_losses(logits, y, *kind)

        def of_images(x: Tensor) -> Tensor:
            return of_logits(model(x, t, **options).logits)

        if self.score is None and not self.gradient_weight:
            losses = of_images(worst_case(of_images, x_t, self.robust_epsilon, self.robust_steps))
            return weighted_mean(losses, k, weight, self.sampler, self.accelerator)

        x_t.requires_grad_()
        sigma = (1 - self.scheduler.alphas_cumprod.to(x_t.device)[t]).sqrt()
        with sdpa_kernel(SDPBackend.MATH):  # other attention kernels have no second derivative
            logits = model(x_t, t, **options).logits
        if self.score is not None:
            log_p = log_likelihood(logits, y, self.problem_type)
            score = self.score(x_t, t)
            of_gradient = self.score_weight * score_matching_losses(log_p, x_t, eps, sigma, score)
        else:
            log_p = F.logsigmoid(logits) if options else logits.log_softmax(dim=1)
            log_p = log_p.gather(1, label[:, None]).squeeze(1)
            matching = gradient_matching_losses(log_p, x_t, sigma, teacher_gradient)
            of_gradient = self.gradient_weight * matching
        if self.robust_epsilon:
            losses = of_images(worst_case(of_images, x_t, self.robust_epsilon, self.robust_steps))
        else:
            losses = of_logits(logits)
        return weighted_mean(losses + of_gradient, k, weight, self.sampler, self.accelerator)

    def teacher_targets(
        self, x0: Tensor, x_t: Tensor, t: Tensor, options: dict[str, Tensor], label: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """log q (B, K), and the gradient in x_t of that of `label` (B,), if there is one."""
        x_t = x_t.detach().requires_grad_(label is not None)
        with self.accelerator.autocast():
            log_q = self.teacher.log_targets(x0, x_t, t, **options)
        if label is None:
            return log_q, None
        (gradient,) = torch.autograd.grad(log_q.gather(1, label[:, None]).sum(), x_t)
        return log_q.detach(), gradient

    def mixup_shares(self, draws: StepRandom) -> Tensor:
        """Shares from Beta(mixup_alpha, mixup_alpha), (B,).

        Drawn by NumPy, since torch draws from this distribution with its global generator only.
        """
        seed = torch.randint(2**62, (), generator=draws.generator).item()
        shares = np.random.default_rng(seed).beta(self.mixup_alpha, self.mixup_alpha, draws.total)
        return draws.local(torch.from_numpy(shares).float())


class ScoreModel:
    """The score s(x_t) of a diffusion model at the timesteps of the classifier's schedule.

    The model's schedule may be another one: it is evaluated at the same noise-to-signal ratio.
    Raises `ValueError` if the model can't be loaded, has no unconditional score, or doesn't fit the
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
        levels = []
        for alpha, sigma in zip(alphas, sigmas, strict=True):
            a, b = x0_coefficients(config["prediction_type"], alpha, sigma)
            levels.append(NoiseLevel(alpha, sigma, a, b))
        betas, steps = DDPMScheduler.from_config(config).betas, config["num_train_timesteps"]
        schedule = TrainedSchedule({"trained_betas": betas.tolist(), "num_train_timesteps": steps})
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
    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(alpha x0_pred - x_t) / sigma^2 at the classifier's timesteps (B,), in float32."""
        self.unet.to(x_t.device)
        timestep, c_x, c_out = self.tables.to(x_t.device)[:, t]
        labels = None if self.null_label is None else torch.full_like(t, self.null_label)
        output = self.unet(x_t, timestep, class_labels=labels).sample.float()
        output, _ = split_variance(output, self.channels)
        c_x, c_out = (c.reshape(-1, *[1] * (x_t.ndim - 1)) for c in (c_x, c_out))
        return c_x * x_t + c_out * output


def check_score_model(
    path: str, pipeline: ClassifierGuidedPipeline, data: Images | TargetedImages
) -> None:
    """Raise a `ValueError` if a pipeline has no unconditional score for these images."""
    unet, scheduler = pipeline.unet.config, pipeline.scheduler.config
    prediction, embeddings = scheduler.get("prediction_type"), unet.num_class_embeds
    is_known = prediction in ("epsilon", "sample", "v_prediction")
    actual = (unet.in_channels, config_size(unet.sample_size or data.resolution))
    expected = (data.channels, data.resolution)
    refusal = None
    if not is_known or not scheduler.get("beta_schedule"):
        refusal = (
            f": its {scheduler.get('_class_name')} has prediction_type {prediction!r}; a "
            "variance-preserving model of epsilon, sample or v_prediction is allowed"
        )
    elif embeddings is not None and pipeline.num_labels != embeddings - 1:
        refusal = (
            f": of {embeddings} class embeddings and {pipeline.num_labels} labels none is a null "
            "label; an unconditional model, or one with a null label, is allowed"
        )
    elif actual != expected:
        refusal = (
            f" is for {actual[0]} channels of size {size_text(actual[1])}; {data.channels} of size "
            f"{size_text(data.resolution)} are allowed with this data"
        )
    if refusal:
        raise ValueError(f"--score_model {path}{refusal}")


def parse_class_weights(
    text: str | None, data: Images | TargetedImages, problem_type: str
) -> Tensor | None:
    """Class weights (num_labels,) from --class_weights: `balanced`, numbers, or a JSON file."""
    if text is None:
        return None
    names = list(data.id2label.values())
    try:
        if text == "balanced":
            if isinstance(data, TargetedImages):
                return balanced_weights(data.targets().sum(dim=0), len(data), problem_type)
            labels = torch.tensor([data.label(i) for i in range(len(data))])
            counts = torch.bincount(labels, minlength=len(names))
            return balanced_weights(counts, len(labels), problem_type)
        if Path(text).is_file():
            by_name = json.loads(Path(text).read_text())
            if not isinstance(by_name, dict) or by_name.keys() != set(names):
                raise ValueError(f"a weight for each of the labels {names} is allowed")
            weights = [float(by_name[name]) for name in names]
        else:
            weights = [float(word) for word in text.split(",")]
        maximum = torch.finfo(torch.float32).max
        valid = len(weights) == len(names) and all(0 <= weight <= maximum for weight in weights)
        if not valid or not any(weights):
            raise ValueError(f"{len(names)} numbers, 0 or more and not all 0, are allowed")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--class_weights {text}: {error}; `balanced`, numbers such as 1,1,0.5 and a JSON file "
            "of {name: weight} are allowed"
        ) from error
    return torch.tensor(weights)
