"""Metrics with bootstrap intervals, from the summaries of generated and real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .metrics import (
    Moments,
    bootstrap_frechet_distances,
    bootstrap_weights,
    class_diversity,
    confidence_interval,
    count_in_balls,
    frechet_distance,
    kernel_distance,
    sliced_wasserstein,
)
from .summary import Summary

PRECISION_K, COVERAGE_K = 3, 5  # neighbours, as in the papers
RESAMPLED_DIRECTIONS = 100  # of resamples, whose spread comes from the images
INF, ALL = float("inf"), slice(None)
Metric = dict[str, Any]  # as of `Evaluation.metrics`


@dataclass(frozen=True)
class Bootstrap:
    """Makes metrics with bootstrap intervals."""

    count: int = 100  #: number of resamples; 0: no intervals
    confidence: float = 0.95  #: of the intervals, in (0, 1)
    seed: int = 0  #: of the resamples
    progress: bool = False  #: whether to show progress bars

    def weights(self, rows: int, draws: int | None = None) -> Tensor:
        """As of `bootstrap_weights`, (count, rows)."""
        return bootstrap_weights(rows, self.count, self.seed, draws)

    def weights_with_original(self, rows: int) -> Tensor:
        """(1 + count, rows): first each row once, then as of `weights`."""
        return torch.cat([torch.ones(1, rows, dtype=torch.float64), self.weights(rows)])

    def frechet_distances(
        self, real: Moments, features: Tensor, draws: int, title: str = ""
    ) -> Tensor:
        """Frechet distances of resamples of `draws` images, from sampled features (n, D)."""
        weights, title = self.weights(len(features), draws), f"Frechet distance{title}, resampled"
        weights = tqdm(weights, title, leave=False, delay=1, disable=not self.progress)
        return bootstrap_frechet_distances(real.compute(), features, weights)

    def metric(
        self,
        value: float,
        replicates: Tensor | None,
        better: str,
        low: float = -INF,
        high: float = INF,
        **fields: Any,
    ) -> Metric:
        """A metric in [low, high] with the interval of its replicates (count,); `better`: "less",
        "more", or "real" (close to the real images')."""
        ends = None
        if replicates is not None and len(replicates):
            ends = list(confidence_interval(value, replicates, self.confidence, low, high))
        return {"value": value, "interval": ends, "better": better, **fields}

    def mean(self, values: Tensor, better: str, high: float = 1.0) -> Metric:
        """The mean of non-negative values (N,), one for each image."""
        values = values.double()
        replicates = self.weights(len(values)) @ values / len(values)
        mean = float(values.mean())
        return self.metric(mean, replicates, better, 0.0, high, images=len(values))

    def proportion(self, successes: Tensor, total: Tensor) -> Metric:
        """successes / total of two counts; its resamples are binomial."""
        generator = torch.Generator().manual_seed(self.seed)
        share = (successes / total).double().expand(self.count)
        draws = torch.binomial(total.double().expand(self.count), share, generator=generator)
        value = float(successes / total)
        return self.metric(value, draws / total, "more", 0.0, 1.0, images=int(total))


def compare(
    generated: Summary, real: Summary, bootstrap: Bootstrap, inception: bool
) -> dict[str, Metric]:
    """All metrics of all images together.

    Args:
        inception: whether the features are Inception's, so that metrics get their published names.
    """
    return {
        **_distances(generated, real, bootstrap, inception),
        **_neighbourhoods(generated, real, bootstrap),
        **_diversity(generated, real, bootstrap),
        **_accuracies(generated, real, bootstrap),
        **_class_score(generated, real, bootstrap, inception),
    }


def _distances(
    generated: Summary, real: Summary, bootstrap: Bootstrap, inception: bool
) -> dict[str, Metric]:
    """The Frechet, the kernel and the sliced Wasserstein distance."""
    features, real_features = generated.sample.features, real.sample.features
    moments, real_moments = generated.overall_moments(), real.overall_moments()
    distance = frechet_distance(real_moments, moments)
    replicates = bootstrap.frechet_distances(real_moments, features, generated.count)
    fields = {"name": "FID" if inception else "Frechet distance"}
    fields |= {"images": generated.count, "real_images": real.count}
    frechet = bootstrap.metric(distance, replicates, "less", 0.0, **fields)
    weights = bootstrap.weights_with_original(len(features))
    distances = kernel_distance(real_features, features, weights)
    fields = {"name": "KID, of all pairs" if inception else "kernel distance"}
    fields |= {"images": len(features), "real_images": len(real_features)}
    kernel = bootstrap.metric(float(distances[0]), distances[1:], "less", **fields)
    distance = float(sliced_wasserstein(real_features, features))
    replicates = sliced_wasserstein(real_features, features, weights[1:], RESAMPLED_DIRECTIONS)
    fields["name"] = "MIND" if inception else "sliced Wasserstein distance"
    sliced = bootstrap.metric(distance, replicates, "less", 0.0, **fields)
    return {"frechet_distance": frechet, "kernel_distance": kernel, "sliced_wasserstein": sliced}


def _neighbourhoods(generated: Summary, real: Summary, bootstrap: Bootstrap) -> dict[str, Metric]:
    """Resamples are of the images that a share is of; the neighbourhoods are fixed."""
    features, real_features = generated.sample.features, real.sample.features
    precision_balls, _ = count_in_balls(features, real_features, PRECISION_K)
    recall_balls, _ = count_in_balls(real_features, features, PRECISION_K)
    balls, points = count_in_balls(features, real_features, COVERAGE_K)
    return {
        "precision": bootstrap.mean(precision_balls > 0, "more"),
        "recall": bootstrap.mean(recall_balls > 0, "more"),
        "density": bootstrap.mean(balls / COVERAGE_K, "more", INF),
        "coverage": bootstrap.mean(points > 0, "more"),
    }


def _diversity(generated: Summary, real: Summary, bootstrap: Bootstrap) -> dict[str, Metric]:
    """The mean distance between images of a class, also relative to the real images'."""
    labels, features = generated.sample.labels, generated.sample.features
    if labels.min() < 0 or not _has_pair(labels):
        return {}
    count = len(features)
    diversity = class_diversity(features, labels, bootstrap.weights_with_original(count))
    metric = bootstrap.metric(float(diversity[0]), diversity[1:], "real", 0.0, images=count)
    metrics = {"class_diversity": metric}
    real_labels, real_features = real.sample.labels, real.sample.features
    shared = torch.isin(real_labels, labels) & (real_labels >= 0)
    if _has_pair(real_labels[shared]):
        reference = float(class_diversity(real_features[shared], real_labels[shared]))
        metric["real"] = reference
        if reference > 0:
            ratio, fields = diversity / reference, {"real": 1.0, "images": count}
            metric = bootstrap.metric(float(ratio[0]), ratio[1:], "real", 0.0, **fields)
            metrics["relative_diversity"] = metric
    return metrics


def _has_pair(labels: Tensor) -> bool:
    """Whether a label occurs twice."""
    return len(labels.unique()) < len(labels)


def _accuracies(
    generated: Summary, real: Summary, bootstrap: Bootstrap, label: int | slice = ALL
) -> dict[str, Metric]:
    """Top-1 and, of more than five classes, top-5 accuracy on the images of one or all labels."""
    metrics: dict[str, Metric] = {}
    if generated.confusion is None:
        return metrics
    total, *correct = (column[label].sum() for column in generated.confusion.compute())
    names = ["top_1", "top_5"] if len(generated.confusion.top5_correct) > 5 else ["top_1"]
    for name, count in zip(names, correct, strict=False):
        metrics[name] = bootstrap.proportion(count, total)
    if real.confusion is not None:
        total, *correct = (column[label].sum() for column in real.confusion.compute())
        if total > 0:
            for name, count in zip(names, correct, strict=False):
                metrics[name]["real"] = float(count / total)
    return metrics


def _class_score(
    generated: Summary, real: Summary, bootstrap: Bootstrap, inception: bool
) -> dict[str, Metric]:
    if generated.class_score is None:
        return {}
    name = "class score"
    if inception and generated.confusion is None:
        name = "Inception score, of all images at once"
    scores, real_score = generated.class_score.compute(), float(real.class_score.compute()[0])
    fields = {"name": name, "images": generated.count, "real": real_score}
    return {"class_score": bootstrap.metric(float(scores[0]), scores[1:], "more", 1.0, **fields)}


def by_class(
    generated: Summary, real: Summary, names: Mapping[int, str], bootstrap: Bootstrap
) -> list[Metric]:
    """A row for each generated class: its images, Frechet distance and the judge's accuracy."""
    counts, rows = torch.zeros(0), []
    if generated.confusion is not None:
        counts = generated.confusion.compute()[0]
    elif generated.has_class_moments:
        counts = generated.moments.count
    for label in counts.nonzero().flatten().tolist():
        name = names.get(label, str(label))
        row: Metric = {"label": label, "name": name, "images": int(counts[label])}
        if generated.has_class_moments and real.has_class_moments:
            row["real_images"] = int(real.moments.count[label])
            row["frechet_distance"] = _class_distance(generated, real, label, bootstrap, name)
        rows.append(row | _accuracies(generated, real, bootstrap, label))
    return rows


def _class_distance(
    generated: Summary, real: Summary, label: int, bootstrap: Bootstrap, name: str
) -> Metric | None:
    """None for a class with fewer than two images; no interval for fewer than two in the sample."""
    moments, real_moments = generated.moments.select(label), real.moments.select(label)
    if min(int(moments.count), int(real_moments.count)) < 2:
        return None
    features, replicates = generated.sample.features[generated.sample.labels == label], None
    if len(features) > 1:
        count = int(moments.count)
        replicates = bootstrap.frechet_distances(real_moments, features, count, f" of {name}")
    return bootstrap.metric(frechet_distance(real_moments, moments), replicates, "less", 0.0)
