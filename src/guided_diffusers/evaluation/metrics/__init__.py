"""Distances between generated and real images, in the features of a network.

Accumulators add up batches in any order, can be merged with the same result up to rounding, and
don't grow with the number of images. Functions of features are in float64, computed in blocks.

    moments, sample = Moments(width), FeatureSample(width, 50_000, size=10_000, seed=0)
    for indices, labels, features in batches:
        moments.update(features)
        sample.update(indices, labels, features)
    frechet_distance(real_moments, moments), kernel_distance(real_sample.features, sample.features)

torchmetrics isn't used (the tests compare with it): its Frechet distance subtracts squares of means
from means of squares, its kernel distance keeps all features, and neither can be merged.
"""

from ...deprecated import renamed
from .accumulator import Accumulator, FeatureSample, gather, hash_indices
from .bootstrap import bootstrap_weights, confidence_interval
from .classification import ClassScore, ConfusionMatrix
from .frechet import Moments, bootstrap_frechet_distances, frechet_distance
from .pairwise import (
    NearestImages,
    class_diversity,
    count_in_balls,
    density_coverage,
    kernel_distance,
    precision_recall,
)
from .sliced import sliced_wasserstein

__all__ = [
    "Accumulator",
    "ClassScore",
    "ConfusionMatrix",
    "FeatureSample",
    "Moments",
    "NearestImages",
    "bootstrap_frechet_distances",
    "bootstrap_weights",
    "class_diversity",
    "confidence_interval",
    "count_in_balls",
    "density_coverage",
    "frechet_distance",
    "gather",
    "hash_indices",
    "kernel_distance",
    "precision_recall",
    "sliced_wasserstein",
]

__getattr__ = renamed(
    __name__,
    {
        "Answers": "ConfusionMatrix",
        "Kept": "FeatureSample",
        "Nearest": "NearestImages",
        "frechet_resampled": "bootstrap_frechet_distances",
        "hashed": "hash_indices",
        "interval": "confidence_interval",
        "memberships": "count_in_balls",
        "resamples": "bootstrap_weights",
    },
)
