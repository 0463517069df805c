"""A classifier of clean images whose probabilities are a noise-aware classifier's targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

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
        names, known = list(data_id2label.values()), {label: i for i, label in id2label.items()}
        if missing := [label for label in names if known and label not in known]:
            raise ValueError(f"--teacher {name}: it doesn't know the data's labels {missing[:5]}")
        if not known and num_labels != len(names):
            raise ValueError(
                f"--teacher {name}: it has {num_labels} labels without names and the data has "
                f"{len(names)}; the same number, or names, are allowed"
            )
        self.columns = [known[label] for label in names] if known else list(range(len(names)))

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
