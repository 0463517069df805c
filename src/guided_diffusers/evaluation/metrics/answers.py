"""What a classifier that never guided says of images."""

from __future__ import annotations

import torch

from .accumulate import Accumulator
from .bootstrap import poisson_weights


class Answers(Accumulator):
    """How often a judge answers what was asked for.

    `confusion[i, j]` counts the images of label i that it takes for j, (K, K); `among[i]` those of label i with i among
    its five likeliest, (K,).
    """

    def __init__(self, classes: int):
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.among = torch.zeros(classes, dtype=torch.int64)

    def update(self, labels: torch.Tensor, logits: torch.Tensor) -> None:
        """Labels (B,) and logits (B, K)."""
        classes, logits = len(self.among), logits.cpu()
        self.confusion += torch.bincount(
            labels * classes + logits.argmax(1), minlength=classes**2
        ).reshape(classes, classes)
        right = (logits.topk(min(5, classes), dim=1).indices == labels[:, None]).any(1)
        self.among += torch.bincount(labels[right], minlength=classes)

    def merge(self, other: Answers) -> None:
        self.confusion += other.confusion
        self.among += other.among

    def compute(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each label (K,): the number of its images, of the right answers, and of those among the first five."""
        return self.confusion.sum(1), self.confusion.diagonal(), self.among

    def resampled(
        self, right: torch.Tensor, total: torch.Tensor, count: int, seed: int
    ) -> torch.Tensor:
        """The shares right / total of `count` resamples: those of zeros and ones are binomial, so none are needed."""
        generator = torch.Generator().manual_seed(seed)
        share = (right / total).double().expand(count)
        return torch.binomial(total.double().expand(count), share, generator=generator) / total


class ClassScore(Accumulator):
    """How sure a classifier is of each image and how varied its answers are, the form of the Inception score:

        exp(mean KL(p(y | x) || p(y))),    p(y) = mean p(y | x);    from 1 to the number of classes

    (Salimans et al., Improved techniques for training GANs, 2016, section 4.) It is the Inception score only by that
    network, and of all images at once, not of ten parts. Row 0 of the sums is the score's, the others are of resamples
    in which an image counts `poisson_weights` times.
    """

    def __init__(self, classes: int, resamples: int = 0, seed: int = 0):
        self.seed = seed
        self.count = torch.zeros(1 + resamples, dtype=torch.float64)
        self.probability = torch.zeros(1 + resamples, classes, dtype=torch.float64)
        self.negative_entropy = torch.zeros(1 + resamples, dtype=torch.float64)

    def update(self, numbers: torch.Tensor, logits: torch.Tensor) -> None:
        """Images with these numbers (B,) and logits (B, K)."""
        log_p = logits.cpu().double().log_softmax(1)
        weights = torch.cat(
            [
                torch.ones(1, len(log_p), dtype=torch.float64),
                poisson_weights(self.seed, numbers, len(self.count) - 1),
            ]
        )
        self.count += weights.sum(1)
        self.probability += weights @ log_p.exp()
        self.negative_entropy += weights @ torch.special.entr(log_p.exp()).sum(1).neg()

    def merge(self, other: ClassScore) -> None:
        self.count += other.count
        self.probability += other.probability
        self.negative_entropy += other.negative_entropy

    def compute(self) -> torch.Tensor:
        """(1 + resamples,): the score, and those of the resamples."""
        marginal = self.probability / self.count[:, None]
        return (self.negative_entropy / self.count + torch.special.entr(marginal).sum(1)).exp()
