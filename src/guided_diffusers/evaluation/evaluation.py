"""Comparison of generated images with real ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..files import write_json
from ..sampling import module_hash
from .images import Images
from .labels import common_labels
from .memorisation import Pair, memorisation, nearest_pairs
from .networks import Network
from .report import draw_bits, draw_confusion, draw_pairs, metrics_table
from .results import COVERAGE_K, PRECISION_K, Bootstrap, Metric, by_class, compare
from .summary import Settings, Summary, summarise

FILES = ("evaluation.json", "confusion.png", "nearest.png", "bits_per_dim.png")
PAIR_FIELDS = ("generated", "training", "distance")  # in evaluation.json


@dataclass
class Evaluation:
    """Metrics of generated images. `str` gives them as a table.

    Attributes:
        metrics: {name: {"value", "interval" (or None), "better" ("less", "more", or "real": close
            to the real images'), "images": number used, "real": of the real images, "name"}}.
        per_class: for each class "label", "name", "images", and the metrics "frechet_distance",
            "top_1" and "top_5".
        confusion: counts [label][class predicted by the judge].
        classes: names of the rows and columns of `confusion`.
        pairs: generated images and their nearest training images, nearest first.
        bits: as of `measure_bits_per_dim`.
        settings: what was compared, and how.
        notes: what to know when reading the metrics.
    """

    metrics: dict[str, Metric] = field(default_factory=dict)
    per_class: list[Metric] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    classes: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    bits: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return metrics_table(self.metrics, self.per_class, self.bits, self.notes)

    def save(self, folder: str | Path, picture: bool = True) -> None:
        """Write `evaluation.json`, and where they apply `confusion.png`, `nearest.png` and
        `bits_per_dim.png`, each atomically. Raises ImportError for pictures without matplotlib,
        OSError for a full disk."""
        folder = Path(folder)
        content = {
            "figures": self.metrics,
            "per_class": self.per_class,
            "confusion": self.confusion,
            "classes": self.classes,
            "bits_per_dimension": self.bits,
            "notes": self.notes,
            "nearest": [{name: getattr(pair, name) for name in PAIR_FIELDS} for pair in self.pairs],
            "settings": self.settings,
            "weights": self._model_weights(),
        }
        write_json(content, folder / "evaluation.json")
        if not picture:
            return
        if self.confusion is not None:
            draw_confusion(self.confusion, self.classes, folder / "confusion.png")
        if self.pairs:
            draw_pairs(self.pairs, folder / "nearest.png")
        if self.bits is not None:
            draw_bits(self.bits["terms"], folder / "bits_per_dim.png")

    def _model_weights(self) -> str | None:
        """Hash of the weights of the model that made the images, by their manifest."""
        manifest = (self.settings.get("images") or {}).get("manifest") or {}
        revision = str(manifest.get("revision"))  # or a commit of the Hub
        return revision if revision.startswith("sha256:") else None


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

    Frechet distance, accuracy and class score use all images; the other metrics, and the intervals
    of Frechet distances, a sample of `max_features`, so memory doesn't grow with the number of
    images. With several processes all get the result.

    Args:
        generated, real: of one shape; from `open_generated`, `open_real`, or `DatasetImages` of
            items in memory.
        features: the network in whose features images are compared.
        judge: a classifier that was never used for guidance. None: no accuracy.
        training: what the model was trained on, to find the nearest training images; `real` must be
            held out from it.
        nearest: number of generated, and of real images whose nearest training image is searched.
        bootstrap: resamples for the intervals, of the generated images (for recall and coverage,
            which are shares of the real images, of those); 0: no intervals.
        confidence: of the intervals, in (0, 1).
        seed: of samples and resamples.
        per_class: whether to compute each class's Frechet distance, which takes 8 K D^2 bytes.
        cache: a folder where the summary of the real images is kept for the next evaluation.

    Raises:
        ValueError: for other arguments, too few or unreadable images, or a judge with other
            classes.
        FloatingPointError: for features that aren't finite.
    """
    options = {"max_features": max_features, "nearest": nearest, "bootstrap": bootstrap}
    options |= {"confidence": confidence, "seed": seed, "batch_size": batch_size}
    _check(generated, real, judge, options)
    labels = common_labels(generated, real, judge)
    classifier = judge or (features if features.is_inception else None)
    judged, ids = judge is not None, labels.generated_ids
    settings = Settings(labels.count, ids, max_features, bootstrap, per_class, judged, seed)
    work = {"batch_size": batch_size, "progress": progress}
    summary = summarise(generated, features, classifier, settings, title="generated images", **work)
    settings = replace(settings, ids=labels.real_ids)
    kept = work | {"cache": None if cache is None else Path(cache)}
    real_summary = summarise(real, features, classifier, settings, title="real images", **kept)
    resampler = Bootstrap(bootstrap, confidence, seed, progress and PartialState().is_main_process)
    images = {"images": generated, "real": real, "training": training}
    result = Evaluation(
        compare(summary, real_summary, resampler, features.is_inception),
        by_class(summary, real_summary, labels.names, resampler),
        settings=_settings(images, features, judge, summary.width) | options,
        notes=labels.notes
        + _notes_on_failed(generated.description.get("manifest", {}))
        + _notes_on_guidance(generated.description.get("manifest", {}), features, judge)
        + _notes_on_samples(summary, real_summary, per_class),
    )
    if summary.confusion is not None:
        result.confusion = summary.confusion.counts.tolist()
        result.classes = [labels.names.get(i, str(i)) for i in range(labels.count)]
    if training is not None:
        result.pairs, distances = nearest_pairs(
            generated, training, features, summary, real_summary, nearest, **work
        )
        metrics, notes = memorisation(*distances, resampler)
        result.metrics |= metrics
        result.notes += notes
    return result


def _settings(
    images: Mapping[str, Images | None], features: Network, judge: Network | None, width: int
) -> dict[str, Any]:
    """What was compared, as JSON."""
    sources: dict[str, Any] = dict.fromkeys(images)
    for name, part in images.items():
        if part is not None:
            sources[name] = part.description | {"count": len(part)}
    return sources | {
        "features": {"network": features.name, "width": width, "weights": features.digest()},
        "judge": judge and {"network": judge.name, "weights": judge.digest()},
        "shape": list(images["images"].shape),
        "precision_k": PRECISION_K,
        "coverage_k": COVERAGE_K,
        "processes": PartialState().num_processes,
    }


def _check(
    generated: Images, real: Images, judge: Network | None, options: Mapping[str, Any]
) -> None:
    smallest = {"max_features": COVERAGE_K + 1, "nearest": 1, "bootstrap": 0, "batch_size": 1}
    for name, least in smallest.items():
        if options[name] < least:
            raise ValueError(f"{name}={options[name]}: at least {least} is allowed")
    for name, images in (("generated", generated), ("real", real)):
        if len(images) <= COVERAGE_K:
            raise ValueError(f"{len(images)} {name} images: at least {COVERAGE_K + 1} are needed")
    if not 0 < options["confidence"] < 1:
        raise ValueError(f"confidence={options['confidence']}: a number between 0 and 1 is allowed")
    if generated.shape != real.shape:
        shapes = f"generated images have the shape {generated.shape}, the real ones {real.shape}"
        raise ValueError(f"the {shapes}; they must have one shape")
    if judge is not None and judge.classes is None:
        raise ValueError(f"judge: {judge.name} is no classifier")
    if judge is not None and not generated.labelled:
        no_labels = "the generated images have no labels; name their column, or use no judge"
        raise ValueError(f"judge: {no_labels}")


def _notes_on_failed(manifest: Mapping[str, Any]) -> list[str]:
    """A note on images that `sample --skip-failed` left out."""
    failed = manifest.get("failed", [])
    if not failed:
        return []
    return [
        f"{len(failed)} of the {manifest['num_images']} generated images are missing, since they "
        "were not finite (`failed` in the manifest)"
    ]


def _notes_on_guidance(
    manifest: Mapping[str, Any], features: Network, judge: Network | None
) -> list[str]:
    """Notes where the judge or the feature network is the classifier that guided the images."""
    scale, notes = manifest.get("guidance_scale"), []
    if not manifest.get("classifier") or not any(scale if isinstance(scale, list) else [scale]):
        return notes
    roles = [("judge", judge)]
    if judge is not features:
        roles.append(("network of the features", features))
    for role, network in roles:
        if network is not None and module_hash(network.module) == manifest["classifier"]:
            notes.append(
                f"the {role}, {network.name}, has the weights of the classifier that guided the "
                "images, so its metrics show the strength of the guidance, not the images' quality"
            )
    return notes


def _notes_on_samples(generated: Summary, real: Summary, per_class: bool) -> list[str]:
    """Notes on numbers of images and labels that limit what the metrics tell."""
    width, labels, notes = generated.width, [], []
    for name, summary in (("generated", generated), ("real", real)):
        count, sampled = summary.count, len(summary.sample.labels)
        labels.append(set(summary.sample.labels.tolist()) - {-1})
        text = f"{count} {name} images for {width} features: the covariance is singular, which "
        text += "increases the Frechet distance; compare it only at equal numbers of images"
        notes.append((count <= width, text))
        text = (
            f"metrics that need features image by image use a sample of {sampled} of the {count} "
        )
        notes.append((sampled < count, text + f"{name} images"))
    generated_labels, real_labels = labels
    missing, labelled = real_labels - generated_labels, bool(generated_labels)
    text = f"Frechet distances of classes are skipped: the covariances of {width} features would "
    skipped = per_class and labelled and not generated.has_class_moments
    notes.append((skipped, text + "take more than 1 GiB"))
    text = f"{len(missing)} of the real images' {len(real_labels)} classes were not generated, "
    notes.append((labelled and missing, text + "which worsens distances, recall and coverage"))
    return [note for applies, note in notes if applies]
