"""Figures with intervals of two summaries, generated images' and real ones'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .metrics import (
    Moments,
    class_diversity,
    frechet_distance,
    frechet_resampled,
    interval,
    kernel_distance,
    memberships,
    resamples,
)
from .summary import Summary

PRECISION_K, COVERAGE_K = 3, 5  # neighbours, as in the papers
Figure = dict[str, Any]


@dataclass(frozen=True)
class Bootstrap:
    """So many resamples (0: no intervals), the share that an interval holds, the seed, and whether bars are shown."""

    count: int = 100
    confidence: float = 0.95
    seed: int = 0
    progress: bool = False

    def weights(self, rows: int, draws: int | None = None) -> Tensor:
        return resamples(rows, self.count, self.seed, draws)

    def distances(self, real: Moments, features: Tensor, images: int, what: str = "") -> Tensor:
        """The Frechet distance of each resample of so many images, of which the features (n, D) are a sample."""
        weights = self.weights(len(features), images)
        return frechet_resampled(
            real.compute(),
            features,
            tqdm(
                weights,
                desc=f"Frechet distance{what}, resampled",
                leave=False,
                delay=1,
                disable=not self.progress,
            ),
        )

    def figure(
        self,
        value: float,
        replicates: Tensor | None,
        better: str,
        low: float = -float("inf"),
        high: float = float("inf"),
        **more: Any,
    ) -> Figure:
        """`better`: "less", "more" or "real", near the real images'."""
        found = None
        if replicates is not None and len(replicates):
            found = list(interval(value, replicates, self.confidence, low, high))
        return {"value": value, "interval": found, "better": better, **more}

    def mean(self, values: Tensor, better: str, high: float = 1.0) -> Figure:
        """Of values >= 0, one an image."""
        values = values.double()
        return self.figure(
            float(values.mean()),
            self.weights(len(values)) @ values / len(values),
            better,
            0.0,
            high,
            images=len(values),
        )


def compare(
    generated: Summary, real: Summary, bootstrap: Bootstrap, inception: bool
) -> dict[str, Figure]:
    """All figures of the images together.

    Args:
        inception: whether the features are Inception's, and the names may be those of the published figures.
    """
    return {
        **_distances(generated, real, bootstrap, inception),
        **_neighbourhoods(generated, real, bootstrap),
        **_diversity(generated, real, bootstrap),
        **_judged(generated, real, bootstrap, inception),
    }


def _gaussian(moments: Moments) -> Moments:
    return moments if len(moments.count) == 1 else moments.pooled()


def _distances(
    generated: Summary, real: Summary, bootstrap: Bootstrap, inception: bool
) -> dict[str, Figure]:
    features, true = generated.kept.compute()[2], real.kept.compute()[2]
    ours, theirs = _gaussian(generated.moments), _gaussian(real.moments)
    replicates = bootstrap.distances(theirs, features, generated.count)
    once = torch.ones(1, len(features), dtype=torch.float64)
    kernel = kernel_distance(true, features, torch.cat([once, bootstrap.weights(len(features))]))
    return {
        "frechet_distance": bootstrap.figure(
            frechet_distance(theirs, ours),
            replicates,
            "less",
            0.0,
            name="FID" if inception else "Frechet distance",
            images=generated.count,
            real_images=real.count,
        ),
        "kernel_distance": bootstrap.figure(
            float(kernel[0]),
            kernel[1:],
            "less",
            name="KID, of all pairs" if inception else "kernel distance",
            images=len(features),
            real_images=len(true),
        ),
    }


def _neighbourhoods(generated: Summary, real: Summary, bootstrap: Bootstrap) -> dict[str, Figure]:
    """What is resampled are the images that a share is of; the neighbourhoods are held."""
    features, true = generated.kept.compute()[2], real.kept.compute()[2]
    balls, _ = memberships(features, true, PRECISION_K)
    recalled, _ = memberships(true, features, PRECISION_K)
    dense, inside = memberships(features, true, COVERAGE_K)
    return {
        "precision": bootstrap.mean(balls > 0, "more"),
        "recall": bootstrap.mean(recalled > 0, "more"),
        "density": bootstrap.mean(dense / COVERAGE_K, "more", float("inf")),
        "coverage": bootstrap.mean(inside > 0, "more"),
    }


def _diversity(generated: Summary, real: Summary, bootstrap: Bootstrap) -> dict[str, Figure]:
    """The mean distance of two images of a class, and over the real images' of the same classes."""
    (_, labels, features), (_, true_labels, true) = generated.kept.compute(), real.kept.compute()
    shared = torch.isin(true_labels, labels) & (true_labels >= 0)
    if labels.min() < 0 or labels.unique(return_counts=True)[1].max() < 2:
        return {}
    once = torch.ones(1, len(features), dtype=torch.float64)
    found = class_diversity(features, labels, torch.cat([once, bootstrap.weights(len(features))]))
    figures = {
        "class_diversity": bootstrap.figure(
            float(found[0]), found[1:], "real", 0.0, images=len(features)
        )
    }
    if (
        true_labels[shared].unique(return_counts=True)[1].tolist()
        and int(true_labels[shared].unique(return_counts=True)[1].max()) > 1
    ):
        of_real = float(class_diversity(true[shared], true_labels[shared]))
        figures["class_diversity"]["real"] = of_real
        if of_real > 0:
            figures["relative_diversity"] = bootstrap.figure(
                float(found[0]) / of_real,
                found[1:] / of_real,
                "real",
                0.0,
                real=1.0,
                images=len(features),
            )
    return figures


def _judged(
    generated: Summary, real: Summary, bootstrap: Bootstrap, inception: bool
) -> dict[str, Figure]:
    figures = {}
    if generated.answers is not None:
        total, right, among = (column.sum() for column in generated.answers.compute())
        shown = {"top_1": right, **({"top_5": among} if len(generated.answers.among) > 5 else {})}
        for place, (name, some) in enumerate(shown.items()):
            replicates = generated.answers.resampled(some, total, bootstrap.count, bootstrap.seed)
            of_real = {}
            if real.answers is not None:
                true_total, *true = (column.sum() for column in real.answers.compute())
                of_real = {"real": float(true[place] / true_total)}
            figures[name] = bootstrap.figure(
                float(some / total), replicates, "more", 0.0, 1.0, images=int(total), **of_real
            )
    if generated.score is not None:
        scores = generated.score.compute()
        figures["class_score"] = bootstrap.figure(
            float(scores[0]),
            scores[1:],
            "more",
            1.0,
            name="Inception score, of all images at once"
            if inception and generated.answers is None
            else "class score",
            images=generated.count,
            real=float(real.score.compute()[0]),
        )
    return figures


def by_class(
    generated: Summary, real: Summary, names: Mapping[int, str], bootstrap: Bootstrap
) -> list[Figure]:
    """A row a class that was generated: its images, its Frechet distance and its share of the judge's right answers."""
    if generated.answers is None and not generated.classed:
        return []
    _, labels, features = generated.kept.compute()
    rows: list[Figure] = []
    counts = (
        generated.answers.compute()[0] if generated.answers is not None else generated.moments.count
    )
    for label, count in enumerate(counts.tolist()):
        if not count:
            continue
        row: Figure = {"label": label, "name": names.get(label, str(label)), "images": count}
        if generated.classed and real.classed:
            row |= {"real_images": int(real.moments.count[label])}
            row["frechet_distance"] = _class_distance(
                generated, real, label, features[labels == label], bootstrap, f" of {row['name']}"
            )
        if generated.answers is not None:
            total, right, among = (column[label] for column in generated.answers.compute())
            for name, some in (("top_1", right), ("top_5", among)):
                if name == "top_1" or len(counts) > 5:
                    replicates = generated.answers.resampled(
                        some, total, bootstrap.count, bootstrap.seed
                    )
                    row[name] = bootstrap.figure(float(some / total), replicates, "more", 0.0, 1.0)
            if real.answers is not None and (true := real.answers.compute())[0][label]:
                row["top_1"]["real"] = float(true[1][label] / true[0][label])
        rows.append(row)
    return rows


def _class_distance(
    generated: Summary, real: Summary, label: int, features: Tensor, bootstrap: Bootstrap, what: str
) -> Figure | None:
    """None where a class has fewer than two images, or two that were kept."""
    count = int(generated.moments.count[label])
    if min(count, int(real.moments.count[label])) < 2:
        return None
    ours, theirs = Moments(features.shape[1]), Moments(features.shape[1])
    for one, moments in ((ours, generated.moments), (theirs, real.moments)):
        one.count, one.mean, one.scatter = (
            part[label : label + 1] for part in (moments.count, moments.mean, moments.scatter)
        )
    replicates = bootstrap.distances(theirs, features, count, what) if len(features) > 1 else None
    return bootstrap.figure(frechet_distance(theirs, ours), replicates, "less", 0.0)


def memorisation(generated: Tensor, held_out: Tensor, bootstrap: Bootstrap) -> dict[str, Figure]:
    """How much nearer generated images are to their nearest training image than held-out ones are.

    `nearest_ratio` is that of the medians: near 1 for a model that has learned the distribution, near 0 for one that
    copies. `memorised` is the share of generated images as near as the nearest hundredth of the held-out images; where
    these are training images, too, that of the generated images which are training images.

    Args:
        generated, held_out: distances to the nearest training image, (N,) and (M,), float64; 0 of a training image.
    """
    median, first = torch.quantile(held_out, 0.5), torch.quantile(held_out, 0.01)
    draws = torch.randint(
        len(generated),
        (bootstrap.count, len(generated)),
        generator=torch.Generator().manual_seed(bootstrap.seed),
    )
    real = float((held_out <= first).double().mean())
    figures = {"memorised": {**bootstrap.mean(generated <= first, "less"), "real": real}}
    if median > 0:
        ratio = float(torch.quantile(generated, 0.5) / median)
        replicates = generated[draws].quantile(0.5, dim=1) / median if bootstrap.count else None
        figures["nearest_ratio"] = bootstrap.figure(
            ratio, replicates, "real", 0.0, real=1.0, images=len(generated)
        )
    return figures
