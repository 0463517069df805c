"""Whether generated images are good: figures with intervals, what made them, and pictures.

    guided-diffusers evaluate out/images --dataset data/fashion-mnist --output out/evaluation

    from guided_diffusers.evaluation import evaluate, load_network, open_generated, open_real

    images = open_generated("out/images")
    judge = load_network("fashion-mnist")
    found = evaluate(images, open_real("data/fashion-mnist", images.shape, "test"), judge, judge)
    print(found)
    found.figures["frechet_distance"]["value"], found.figures["top_1"]["interval"]

What is generated is compared with real images in the features of a network, `features`, and a classifier, `judge`, is
asked whether it is what it should be; that must not be one that guided. Under `accelerate launch` each process looks at
its share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from ..sampling.manifest import module_hash
from ..utils import write_json
from .figures import COVERAGE_K, PRECISION_K, Bootstrap, Figure, by_class, compare, memorisation
from .images import Images, Rows, matched, named, open_generated, open_real
from .metrics import Nearest, gather
from .networks import Network, default_features, inception, load_network, of_classifier, of_module
from .report import draw_bits, draw_confusion, draw_pairs, table
from .summary import Settings, Summary, stream, summarise

__all__ = [
    "Bootstrap",
    "Evaluation",
    "Images",
    "Network",
    "Rows",
    "Settings",
    "Summary",
    "compare",
    "default_features",
    "evaluate",
    "inception",
    "load_network",
    "of_classifier",
    "of_module",
    "open_generated",
    "open_real",
    "summarise",
]
SHOWN = 10  # pairs of the picture
SAME = 1e-4  # of a feature vector's length: nearer is the same image, seen in another batch


@dataclass(frozen=True)
class Pair:
    """A generated image and its nearest training image, (C, H, W) in [-1, 1], by their numbers, and their distance."""

    generated: int
    training: int
    distance: float
    images: tuple[Tensor, Tensor] = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        figures: {name: {"value", "interval" (of `confidence`, or None), "better" ("less", "more", or "real": near the
            real images'), "images" it is of, "real": the same figure of the real images, "name": what it is called}}.
        per_class: a row a class: "label", "name", "images", and figures "frechet_distance", "top_1", "top_5".
        confusion: [asked for][the judge's answer], counts, of the classes `classes`.
        pairs: generated images nearest to a training image.
        bits: as of `bits.measure`, where it was asked for.
        settings: what the figures were made with.
        notes: what to know in reading them.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    per_class: list[Figure] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    classes: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    bits: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return table(self.figures, self.per_class, self.bits, self.notes)

    def save(self, folder: str | Path, picture: bool = True) -> None:
        """Write `evaluation.json`, and where there is something to show `confusion.png`, `nearest.png` and
        `bits_per_dim.png`, each aside and moved into place.

        Raises:
            ImportError: where matplotlib is missing and a picture is asked for.
            OSError: for a disk that is full.
        """
        folder = Path(folder)
        write_json(
            {
                "figures": self.figures,
                "per_class": self.per_class,
                "confusion": self.confusion,
                "classes": self.classes,
                "bits_per_dimension": self.bits,
                "notes": self.notes,
                "nearest": [
                    {"generated": one.generated, "training": one.training, "distance": one.distance}
                    for one in self.pairs
                ],
                "settings": self.settings,
            },
            folder / "evaluation.json",
        )
        if picture and self.confusion is not None:
            draw_confusion(self.confusion, self.classes, folder / "confusion.png")
        if picture and self.pairs:
            draw_pairs([(one.images, one.distance) for one in self.pairs], folder / "nearest.png")
        if picture and self.bits is not None:
            draw_bits(self.bits["terms"], folder / "bits_per_dim.png")


def evaluate(
    generated: Images,
    real: Images,
    features: Network,
    judge: Network | None = None,
    training: Images | None = None,
    *,
    max_features: int = 10_000,
    nearest: int = 1000,
    bootstrap: int = 100,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 64,
    per_class: bool = True,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compare generated images with real ones.

    Frechet distance, accuracy and class score are of all images. What needs the features image by image (kernel
    distance, precision, recall, density, coverage, diversity, and the intervals of Frechet distances) is of a sample of
    `max_features`, so that memory doesn't grow with the number of images. With several processes all get the result.

    Args:
        generated, real: of one shape; `open_generated`, `open_real`, or `Rows` of items in memory.
        features: what they are compared in.
        judge: a classifier that never guided. None: no accuracy.
        training: what the network was trained on, for its nearest images; `real` must then be held out from that.
        nearest: generated and real images, each, whose nearest training image is looked for.
        bootstrap: resamples of the generated images that intervals are made of (of recall and coverage, which are
            shares of the real images, of those); 0: no intervals.
        confidence: that an interval's bootstrap holds, in (0, 1).
        seed: of the samples and resamples.
        per_class: whether each class's Frechet distance is measured, which takes 8 K D^2 bytes.
        cache: a folder where what was found of the real images is kept for the next time.

    Raises:
        ValueError: for other arguments, too few images, images that can't be read, or a judge with other classes.
        FloatingPointError: for features that are not finite.
    """
    _check(generated, real, judge, max_features, nearest, bootstrap, confidence, batch_size)
    names, classes, ids, real_ids, notes = common_labels(generated, real, judge)
    notes += _of_the_guide(generated.description.get("manifest", {}), features, judge)
    scorer = judge or (features if features.inception else None)
    shared = {
        "classes": classes,
        "max_features": max_features,
        "resamples": bootstrap,
        "seed": seed,
        "per_class": per_class,
        "answers": judge is not None,
    }
    work: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    ours = summarise(
        generated, features, scorer, Settings(ids=ids, **shared), what="generated images", **work
    )
    theirs = summarise(
        real,
        features,
        scorer,
        Settings(ids=real_ids, labelled=real_ids != {}, **shared),
        what="real images",
        cache=cache and Path(cache),
        **work,
    )
    draws = Bootstrap(bootstrap, confidence, seed, progress and PartialState().is_main_process)
    figures = compare(ours, theirs, draws, features.inception)
    width = ours.moments.mean.shape[1]
    notes += _notes(ours, theirs, width, per_class)
    pairs: list[Pair] = []
    if training is not None:
        more, pairs, said = _nearest(
            generated, training, features, ours, theirs, nearest, draws, work
        )
        figures |= more
        notes += said
    confusion = None if ours.answers is None else ours.answers.confusion.tolist()
    settings = {
        "images": {**generated.description, "count": ours.count},
        "real": {**real.description, "count": theirs.count},
        "training": None if training is None else {**training.description, "count": len(training)},
        "features": {"network": features.name, "width": width, "weights": features.digest()},
        "judge": None if judge is None else {"network": judge.name, "weights": judge.digest()},
        "shape": list(generated.shape),
        "max_features": max_features,
        "nearest": nearest,
        "bootstrap": bootstrap,
        "confidence": confidence,
        "seed": seed,
        "batch_size": batch_size,
        "precision_k": PRECISION_K,
        "coverage_k": COVERAGE_K,
        "processes": PartialState().num_processes,
    }
    return Evaluation(
        figures,
        by_class(ours, theirs, names, draws),
        confusion,
        [names.get(i, str(i)) for i in range(classes)] if confusion else [],
        pairs,
        None,
        settings,
        notes,
    )


def _check(
    generated: Images,
    real: Images,
    judge: Network | None,
    max_features: int,
    nearest: int,
    bootstrap: int,
    confidence: float,
    batch_size: int,
) -> None:
    least = COVERAGE_K + 1
    for name, value, smallest in (
        ("max_features", max_features, least),
        ("nearest", nearest, 1),
        ("bootstrap", bootstrap, 0),
        ("batch_size", batch_size, 1),
    ):
        if value < smallest:
            raise ValueError(f"{name}={value}: at least {smallest} is allowed")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: a share between 0 and 1 is allowed")
    for name, images in (("generated", generated), ("real", real)):
        if len(images) < least:
            raise ValueError(f"{len(images)} {name} images: at least {least} are needed")
    if generated.shape != real.shape:
        raise ValueError(
            f"the generated images have the shape {generated.shape}, the real ones {real.shape}"
        )
    if judge is not None and judge.classes is None:
        raise ValueError(f"judge: {judge.name} is no classifier")
    if judge is not None and not generated.labelled:
        raise ValueError(
            "judge: the generated images have no labels, so there is nothing to judge; name their column, "
            "or no judge"
        )


def common_labels(
    generated: Images, real: Images, judge: Network | None
) -> tuple[dict[int, str], int, Mapping[int, int] | None, Mapping[int, int] | None, list[str]]:
    """The names of the labels, how many, and the ids there of the generated and of the real images' labels.

    The judge's are those of all, else the real images'. Names are matched as names; ids only where there are none. Ids
    are None where they stay, and {} for real images without labels that fit.

    Raises:
        ValueError: for labels of the generated images that the judge, or the real images, haven't.
    """
    notes: list[str] = []
    if not generated.labelled:
        return (
            {},
            0,
            None,
            {},
            ["the generated images have no labels, so nothing is said of classes"],
        )
    owner, whose = (
        (judge, f"the judge {judge.name}")
        if judge is not None
        else (real, "the real images' data set")
    )
    if judge is None and not real.labelled:
        owner, whose = generated, "the generated images"
    names = dict(owner.names)
    classes = judge.classes if judge is not None else len(names)
    found: list[Mapping[int, int] | None] = []
    for images, what in ((generated, "the generated images"), (real, "the real images")):
        if not images.labelled:
            found.append({})
            notes.append(f"{what} have no labels, so nothing is said of their classes")
        elif not (named(images.names) and named(names)):
            notes += (
                [f"{what} and {whose} were matched by their labels' ids"]
                if images is not owner
                else []
            )
            found.append(None)
        else:
            try:
                found.append(matched(images.names, names, what, whose))
            except ValueError as error:
                if images is generated:
                    raise ValueError(
                        f"{error}: a judge with other classes can't judge them"
                        if judge is not None
                        else str(error)
                    ) from error
                notes.append(f"{error}; they count as without labels")
                found.append({})
    return names, classes, found[0], found[1], notes


def _of_the_guide(
    manifest: Mapping[str, Any], features: Network, judge: Network | None
) -> list[str]:
    """What to say where a network that looks at the images is the classifier that guided them."""
    scale = manifest.get("guidance_scale")
    if not manifest.get("classifier") or not any(scale if isinstance(scale, list) else [scale]):
        return []
    looking = (
        {"judge": judge, "network of the features": features}
        if judge is not features
        else {"judge": judge}
    )
    return [
        f"the {what}, {network.name}, has the weights of the classifier that guided the images, so it says how far "
        "they were moved to its liking, not how good they are"
        for what, network in looking.items()
        if network is not None and module_hash(network.module) == manifest["classifier"]
    ]


def _notes(generated: Summary, real: Summary, width: int, per_class: bool) -> list[str]:
    notes = []
    for name, one in (("generated", generated), ("real", real)):
        if one.count <= width:
            notes.append(
                f"{one.count} {name} images of {width} features: their covariance is singular, and the "
                "Frechet distance larger than of many; compare it only at equal numbers"
            )
        if len(one.kept.compute()[0]) < one.count:
            notes.append(
                f"what needs features image by image is of a sample of {len(one.kept.compute()[0])} of the "
                f"{one.count} {name} images"
            )
    if per_class and generated.kept.compute()[1].min() >= 0 and not generated.classed:
        notes.append(
            f"no Frechet distance of a class: the covariances of all classes with {width} features would take "
            "more than 1 GiB"
        )
    labels, true = (set(one.kept.compute()[1].tolist()) - {-1} for one in (generated, real))
    if labels and true - labels:
        notes.append(
            f"{len(true - labels)} of the real images' {len(true)} classes were not generated, by which "
            "distance, recall and coverage are worse"
        )
    return notes


def _nearest(
    generated: Images,
    training: Images,
    features: Network,
    ours: Summary,
    theirs: Summary,
    count: int,
    draws: Bootstrap,
    work: Mapping[str, Any],
) -> tuple[dict[str, Figure], list[Pair], list[str]]:
    """The figures of memorisation, the nearest pairs, and what to know in reading them."""
    if training.shape != generated.shape:
        raise ValueError(
            f"the training images have the shape {training.shape}, the generated ones {generated.shape}"
        )
    (numbers, _, vectors), held_out = ours.kept.compute(), theirs.kept.compute()[2][:count]
    numbers, vectors = numbers[:count], vectors[:count]
    found = Nearest(torch.cat([vectors, held_out]))
    for these, _, some, _ in stream(
        training, features, None, work["batch_size"], "training images", work["progress"]
    ):
        found.update(these, some)
    gather([found])
    distance, number = found.compute()
    distance = torch.where(distance <= SAME * found.queries.norm(dim=1), 0.0, distance)
    pairs, first, rest = [], distance[: len(vectors)], distance[len(vectors) :]
    for i in first.argsort(stable=True)[:SHOWN].tolist():
        ours_, theirs_ = int(numbers[i]), int(number[i])
        pictures = (
            next(generated.read(ours_, ours_ + 1))[0],
            next(training.read(theirs_, theirs_ + 1))[0],
        )
        pairs.append(Pair(ours_, theirs_, float(distance[i]), pictures))
    notes = [
        f"{count} of {len(some)} {what} images are training images, to rounding"
        for what, some in (("generated", first), ("held-out", rest))
        if (count := int((some == 0).sum()))
    ]
    figures = memorisation(first, rest, draws)
    if "nearest_ratio" not in figures:
        notes.append(
            "most held-out images are training images, so that nothing can be said of memorisation but which "
            "generated images are training images, too"
        )
    return figures, pairs, notes
