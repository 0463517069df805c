"""How far generated images are from real ones, in the features of a network that never guided.

An accumulator adds up batches in any order and any parts: parts that are merged give what one would have, up to
rounding, and none grows with the number of images. Functions of features alone are exact, in float64 and in blocks.

    moments, kept = Moments(width), Kept(10_000, seed=0)
    for numbers, labels, features in batches:
        moments.update(features)
        kept.update(numbers, labels, features)
    frechet_distance(moments, real_moments), kernel_distance(real_kept.features, kept.features)

These are our own, and torchmetrics (which the tests compare with) isn't used: its Frechet distance subtracts squares of
means from means of squares, its kernel distance keeps the features of all images, and neither can be merged by hand.
"""

from .accumulate import Accumulator, gather
from .answers import Answers, ClassScore
from .bootstrap import interval, resamples
from .frechet import Moments, frechet_distance, frechet_resampled
from .kept import Kept, hashed
from .neighbours import Nearest, density_coverage, memberships, precision_recall
from .pairs import class_diversity, kernel_distance

__all__ = [
    "Accumulator",
    "Answers",
    "ClassScore",
    "Kept",
    "Moments",
    "Nearest",
    "class_diversity",
    "density_coverage",
    "frechet_distance",
    "frechet_resampled",
    "gather",
    "hashed",
    "interval",
    "kernel_distance",
    "memberships",
    "precision_recall",
    "resamples",
]
