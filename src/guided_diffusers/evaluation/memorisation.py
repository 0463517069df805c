"""How close generated images are to the training images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .images import Images, read_image
from .metrics import NearestImages, gather
from .networks import Network
from .results import Bootstrap, Metric
from .summary import Summary, iterate_features

NUM_PAIRS = 10  # that are shown
SAME_IMAGE = 1e-4  # relative distance of the features of one image in different batches, at most


@dataclass(frozen=True)
class Pair:
    """A generated image and its nearest training image."""

    generated: int  # index
    training: int  # index
    distance: float  # of the features
    images: tuple[Tensor, Tensor] = field(repr=False)  # both, (C, H, W) in [-1, 1]


def nearest_pairs(
    generated: Images,
    training: Images,
    features: Network,
    summary: Summary,
    real_summary: Summary,
    count: int,
    batch_size: int,
    progress: bool,
) -> tuple[list[Pair], tuple[Tensor, Tensor]]:
    """The generated images nearest to training images, and the distances of `count` generated and
    `count` held-out images to their nearest training image (0 for a training image)."""
    if training.shape != generated.shape:
        raise ValueError(
            f"the training images have the shape {training.shape}, the generated ones "
            f"{generated.shape}; one shape is needed"
        )
    queries = [part.sample.features[:count] for part in (summary, real_summary)]
    nearest = NearestImages(torch.cat(queries))
    batches = iterate_features(training, features, None, batch_size, "training images", progress)
    for indices, _, vectors, _ in batches:
        nearest.update(indices, vectors)
    gather([nearest])
    is_same = nearest.distance <= SAME_IMAGE * nearest.queries.norm(dim=1)
    distances = torch.where(is_same, 0.0, nearest.distance).split([len(rows) for rows in queries])
    pairs = []
    for i in distances[0].argsort(stable=True)[:NUM_PAIRS].tolist():
        first, second = int(summary.sample.indices[i]), int(nearest.index[i])
        images = (read_image(generated, first), read_image(training, second))
        pairs.append(Pair(first, second, float(distances[0][i]), images))
    return pairs, distances


def memorisation(
    generated: Tensor, held_out: Tensor, bootstrap: Bootstrap
) -> tuple[dict[str, Metric], list[str]]:
    """Metrics and notes of the distances to the nearest training image, (N,) and (M,) float64.

    `nearest_ratio` is the ratio of their medians: near 1 for a model that has learned the
    distribution, near 0 for one that copies; left out where most held-out images are training
    images. `memorised` is the share of generated images at most as far as the nearest hundredth of
    the held-out images; where these are training images, the share that are training images too.
    """
    notes = []
    for name, distances in (("generated", generated), ("held-out", held_out)):
        copies = int((distances == 0).sum())
        if copies:
            notes.append(
                f"{copies} of {len(distances)} {name} images are training images, to rounding"
            )
    median, first = torch.quantile(held_out, 0.5), torch.quantile(held_out, 0.01)
    memorised = bootstrap.mean(generated <= first, "less")
    memorised["real"] = float((held_out <= first).double().mean())
    if median == 0:
        notes.append(
            "most held-out images are training images, so memorisation can't be measured; "
            "`memorised` is the share of generated images that are training images as well"
        )
        return {"memorised": memorised}, notes
    count, replicates = len(generated), None
    if bootstrap.count:
        generator = torch.Generator().manual_seed(bootstrap.seed)
        draws = torch.randint(count, (bootstrap.count, count), generator=generator)
        replicates = generated[draws].quantile(0.5, dim=1) / median
    ratio = float(torch.quantile(generated, 0.5) / median)
    nearest_ratio = bootstrap.metric(ratio, replicates, "real", 0.0, real=1.0, images=count)
    return {"memorised": memorised, "nearest_ratio": nearest_ratio}, notes
