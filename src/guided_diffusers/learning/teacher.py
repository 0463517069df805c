"""Classifiers whose probabilities are a noise-aware classifier's targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor
from tqdm.auto import tqdm

from ..classifier import NoiseAwareClassifier
from ..noise import SMALLEST_ALPHA, NoiseLevel, TrainedSchedule, schedule_config
from .batches import collate
from .data import evenly_spread

# images (B, C, H, W) in [-1, 1] -> (features, logits (B, K))
Network = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Teacher:
    """log p(y | x0) of a classifier, calibrated on held-out images:

        log p = log softmax(s f),    s = 1 / temperature of least cross entropy

    (Guo et al. 2017, "On calibration of modern neural networks", section 4.2). Overconfident
    targets would make p^w too large or too small at high powers w.

    Args:
        name: --teacher, for messages.
        network: images in [-1, 1] -> (features, logits f (B, K)); frozen and in evaluation mode.
        id2label: the network's labels; empty if it has no names.
        data_id2label: the labels to predict, in their order.

    Attributes:
        figures: of `calibrate`.

    Raises:
        ValueError: if it doesn't know the labels.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        id2label: Mapping[int, str],
        num_labels: int | None,
        data_id2label: Mapping[int, str],
    ):
        self.name, self.network, self.logit_scale = name, network, 1.0
        self.figures: dict[str, Any] = {}
        self.columns = label_columns(name, id2label, num_labels, data_id2label)

    def log_targets(self, x0: Tensor, x_t: Tensor, t: Tensor, power: Any = None) -> Tensor:
        """log p(y | x0)^w, (B, K); `power` is w, a number or (B,), None: 1."""
        log_p = self(x0)
        return log_p if power is None else torch.as_tensor(power).reshape(-1, 1) * log_p

    @torch.no_grad()
    def __call__(self, x0: Tensor) -> Tensor:
        """log p(y | x0) of the data's labels, (B, K), float32; of clean images in [-1, 1]."""
        return (self.logit_scale * self.logits(x0)).log_softmax(dim=1)

    def logits(self, x0: Tensor) -> Tensor:
        """f of the data's labels, (B, K), float32; others are left out, so that p sums to 1."""
        logits = self.network(x0)[1]
        if logits is None:
            raise ValueError(f"--teacher {self.name}: it is no classifier")
        return logits.float()[:, self.columns]

    @torch.no_grad()
    def calibrate(
        self,
        held_out: torch.utils.data.Dataset,
        images: int,
        batch_size: int,
        fit_scale: Callable[[Tensor, Tensor], tuple[float, float]],
        error: Callable[[Tensor, Tensor], float],
        progress: bool = True,
    ) -> dict[str, Any]:
        """Fit the temperature on up to `images` held-out images, and measure before and after.

        Args:
            fit_scale: (logits, labels) -> (s, standard error).
            error: (logits, labels) -> expected calibration error.

        Returns:
            {"teacher", "images", "temperature", "accuracy", "cross_entropy",
            "cross_entropy_before", "calibration_error", "calibration_error_before"}.
        """
        logits, labels = [], []
        indices = evenly_spread(len(held_out), images)
        starts = range(0, len(indices), batch_size)
        for start in tqdm(starts, desc="calibrating the teacher", disable=not progress):
            batch = collate([held_out[i] for i in indices[start : start + batch_size]])
            logits.append(self.logits(batch["pixel_values"]).cpu())
            labels.append(batch["label"])
        f, y = torch.cat(logits), torch.cat(labels)
        self.logit_scale = fit_scale(f, y)[0]
        if self.logit_scale <= 0:
            raise ValueError(
                f"--teacher {self.name}: its logits say nothing of the held-out images' labels"
            )

        def measure(scale: float) -> tuple[float, float]:
            loss = torch.nn.functional.cross_entropy(scale * f, y)
            return round(float(loss), 5), round(error(scale * f, y), 5)

        before, after = measure(1.0), measure(self.logit_scale)
        self.figures = {
            "teacher": self.name,
            "images": len(y),
            "temperature": round(1 / self.logit_scale, 4),
            "accuracy": round(float((f.argmax(dim=1) == y).float().mean()), 5),
            "cross_entropy": after[0],
            "cross_entropy_before": before[0],
            "calibration_error": after[1],
            "calibration_error_before": before[1],
        }
        return self.figures


class NoisyTeacher:
    """A noise-aware classifier that sees the x_t of its student:

        log q_y = log p(y | x_t), or log E[p(y | x_0)^w | x_t] of a power w

    These are the expectations of the targets on clean images, given x_t, so the student's optimum
    is the same, and the loss has less noise. They aren't calibrated again.

    Args:
        name: --teacher, for messages.
        classifier: frozen and in evaluation mode; single labels.
        data_id2label: the labels to predict, in their order.
        scheduler: the student's; the teacher is evaluated at the same noise-to-signal ratio.
        min_timestep, max_timestep: of the student's training.

    Attributes:
        figures: {"teacher", "input"}.

    Raises:
        ValueError: if it doesn't know the labels or the noise levels.
    """

    def __init__(
        self,
        name: str,
        classifier: NoiseAwareClassifier,
        data_id2label: Mapping[int, str],
        scheduler: DDPMScheduler,
        min_timestep: int,
        max_timestep: int,
    ):
        self.classifier, config = classifier, classifier.config
        self.columns = label_columns(name, config.id2label or {}, config.num_labels, data_id2label)
        self.figures = {"teacher": name, "input": "x_t"}
        schedule = TrainedSchedule(schedule_config(classifier), pure_noise=False)
        alpha_bar = scheduler.alphas_cumprod.double().clamp(min=SMALLEST_ALPHA**2)
        pairs = zip(alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist(), strict=True)
        levels = [NoiseLevel(alpha, sigma, 0.0, 0.0) for alpha, sigma in pairs]
        for t in (min_timestep, max_timestep):
            ratio = math.log(levels[t].sigma / levels[t].alpha)
            if not schedule.log_ratio[0] - 1e-3 <= ratio <= schedule.log_ratio[-1] + 1e-3:
                raise ValueError(
                    f"--teacher {name} knows no noise as of timestep {t} of this schedule; its own "
                    "(--scheduler), or --min_timestep and --max_timestep within it, are allowed"
                )
        self.timesteps = torch.tensor([schedule.timestep(level) for level in levels])

    def log_targets(self, x0: Tensor, x_t: Tensor, t: Tensor, power: Any = None) -> Tensor:
        """log q of the data's labels, (B, K), float32; `t` (B,) is the student's timestep. It can be
        differentiated in x_t."""
        timesteps = self.timesteps.to(x_t.device)[t]
        logits = self.classifier(x_t, timesteps, power=power).logits.float()[:, self.columns]
        return logits.log_softmax(dim=1) if power is None else F.logsigmoid(logits)


def label_columns(
    name: str,
    id2label: Mapping[int, str],
    num_labels: int | None,
    data_id2label: Mapping[int, str],
) -> list[int]:
    """The teacher's output of each of the data's labels, in their order.

    Raises:
        ValueError: if it doesn't know the labels.
    """
    names, known = list(data_id2label.values()), {label: i for i, label in id2label.items()}
    if missing := [label for label in names if known and label not in known]:
        raise ValueError(f"--teacher {name}: it doesn't know the data's labels {missing[:5]}")
    if not known and num_labels != len(names):
        raise ValueError(
            f"--teacher {name}: it has {num_labels} labels without names and the data has "
            f"{len(names)}; the same number, or names, are allowed"
        )
    return [known[label] for label in names] if known else list(range(len(names)))
