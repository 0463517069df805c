"""Accuracy and class score of a classifier that was never used for guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from .accumulator import Accumulator
from .bootstrap import poisson_weights


class ConfusionMatrix(Accumulator):
    """Labels against a classifier's predictions, of K classes.

    `counts[i, j]` is the number of images with label i that are classified as j, (K, K);
    `top5_correct[i]` that of images with label i that have i among the five likeliest, (K,).
    """

    sums = ("counts", "top5_correct")

    def __init__(self, classes: int):
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)
        self.top5_correct = torch.zeros(classes, dtype=torch.int64)

    def update(self, labels: Tensor, logits: Tensor) -> None:
        """Add images with labels (B,) and logits (B, K)."""
        classes, logits = len(self.top5_correct), logits.cpu()
        cells = labels * classes + logits.argmax(1)
        self.counts += torch.bincount(cells, minlength=classes**2).reshape(classes, classes)
        top5 = logits.topk(min(5, classes), dim=1).indices
        correct = (top5 == labels[:, None]).any(1)
        self.top5_correct += torch.bincount(labels[correct], minlength=classes)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each label (K,): its images, how many are classified correctly, and in the top 5."""
        return self.counts.sum(1), self.counts.diagonal(), self.top5_correct


class ClassScore(Accumulator):
    """How confident a classifier is on each image and how varied its predictions are:

        exp(mean KL(p(y | x) || p(y))),    p(y) = mean p(y | x);    from 1 to the number of classes

    the form of the Inception score (Salimans et al., Improved techniques for training GANs, 2016,
    section 4). It is the Inception score only with that network, and is computed on all images at
    once instead of ten parts. Row 0 of the sums is the score's; in the others, one a resample, an
    image counts `poisson_weights` times.
    """

    sums = ("count", "probability", "negative_entropy")

    def __init__(self, classes: int, resamples: int = 0, seed: int = 0):
        self.seed = seed
        self.count = torch.zeros(1 + resamples, dtype=torch.float64)
        self.probability = torch.zeros(1 + resamples, classes, dtype=torch.float64)
        self.negative_entropy = torch.zeros(1 + resamples, dtype=torch.float64)

    def update(self, indices: Tensor, logits: Tensor) -> None:
        """Add images with indices (B,) and logits (B, K)."""
        log_p = logits.cpu().double().log_softmax(1)
        once = torch.ones(1, len(log_p), dtype=torch.float64)
        weights = torch.cat([once, poisson_weights(self.seed, indices, len(self.count) - 1)])
        self.count += weights.sum(1)
        self.probability += weights @ log_p.exp()
        self.negative_entropy += weights @ torch.special.entr(log_p.exp()).sum(1).neg()

    def compute(self) -> Tensor:
        """The score and those of the resamples, (1 + resamples,)."""
        marginal = self.probability / self.count[:, None]
        return (self.negative_entropy / self.count + torch.special.entr(marginal).sum(1)).exp()
