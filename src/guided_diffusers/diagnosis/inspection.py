"""Measure a noise-aware classifier at the noise levels of a sampling run: `inspect`, `diagnose`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from tqdm.auto import tqdm

from ..assembly import scale_mismatches
from ..files import write_json
from ..networks import evaluating
from ..noise import module_config, schedule_config
from ..text import printable
from ..utils import load_pipeline, weights_digest
from .evidence import LabelEvidence, evidence_pipeline, label_evidence
from .levels import Reference, SamplingRun, default_run, network_reference
from .loading import load_classifier, match_labels, open_data, reads_arrays
from .metrics import BINS
from .mismatches import config_mismatches, measured_mismatches
from .report import plot, table
from .statistics import Item, LevelStatistics
from .verdict import Verdict, assess

SINGLE_LABEL = "single_label_classification"


@dataclass(frozen=True)
class Diagnosis:
    """Metrics at noise levels, noisiest first, and the verdict.

    Attributes:
        levels: a row a level: `sigma_over_alpha`, `fraction` of the run, the scheduler's `timestep`,
            the classifier's (`classifier_timestep`), whether it is `beyond` the classifier's
            training noise levels, `accuracy`, `chance`, `cross_entropy`, `prior_entropy`,
            `information`, `ece`, `ece_floor`, `overconfidence`, `logit_scale`, `gradient_norm`,
            `cosine`, `finite_difference_error`, `status`; standard errors end in `_error`. With a
            reference also `reference_scale`: the guidance_scale at which the gradient is nearest to
            it; of a classifier that knows powers also `power_mean`, the mean of its p(y | x)^w
            summed over the labels, at the largest `power` w.
        verdict: where and how strongly to guide.
        mismatches: inconsistencies of classifier, denoiser and data, in sentences.
        settings: of the measurement.
        evidence: of each label, if it was estimated.
    """

    levels: tuple[dict[str, Any], ...]
    verdict: Verdict
    mismatches: tuple[str, ...]
    settings: dict[str, Any]
    evidence: LabelEvidence | None = None

    def __str__(self) -> str:
        lines = [table(self.levels), "", f"Verdict: {self.verdict.summary}.", *self.verdict.words]
        return "\n".join(
            lines + [f"Mismatch: {printable(mismatch)}" for mismatch in self.mismatches]
        )

    def save(self, folder: str | Path, picture: bool = True) -> None:
        """Write `diagnosis.json`, and with `picture` the curves as `diagnosis.png`, atomically.

        Raises:
            ImportError: if a picture is requested and matplotlib is missing.
        """
        names = ("verdict", "mismatches", "levels", "settings")
        content = asdict(self)
        content = {name: content[name] for name in names}
        if self.evidence is not None:
            content["evidence"] = asdict(self.evidence)
        content["weights"] = content["settings"].pop("weights", None)
        write_json(content, Path(folder) / "diagnosis.json")
        if picture:
            title = f"{self.settings['model']}: {self.verdict.summary}"
            cosine = f"cosine to {self.settings['cosine_to']}"
            plot(self.levels, Path(folder) / "diagnosis.png", title, cosine)


def diagnose(
    classifier: torch.nn.Module,
    data: Sequence[Item],
    scheduler: SchedulerMixin | None = None,
    *,
    unet: torch.nn.Module | None = None,
    vae: torch.nn.Module | None = None,
    reference: Reference | None = None,
    images: int = 1000,
    gradient_images: int = 64,
    levels: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    finite_differences: bool = True,
    progress: bool = True,
) -> Diagnosis:
    """Measure a classifier on held-out images at the noise levels of a sampling run.

    Args:
        classifier: as of `ClassifierGuidance`, single-label; everything is computed on its device.
        data: items `{"pixel_values": (C, H, W) in [-1, 1], "label": id}`, such as `LabelledImages`;
            for a classifier of arrays (C, ...) as it reads them, such as `LabelledArrays`.
        scheduler: of the run. None: DDIM with the classifier's schedule.
        unet: the guided denoiser; with a null label, its gradient is the reference.
        vae: autoencoder of a latent model, which encodes the images.
        reference: (x_t, label, eval_level) -> grad log p(y | x_t), if another one is known.
        images: largest number of images, drawn at random.
        gradient_images: number of these whose gradients are taken, which costs more.
        levels: number of equal parts of the run; their middles and its last step are measured.
        seed: of the choice of images and their noise.
        finite_differences: check the gradient by them, in a float64 copy on the CPU.
        progress: show a progress bar.

    Raises:
        ValueError: for invalid arguments, or labels that the classifier doesn't have.
        FloatingPointError: if its logits are NaN or infinite.
    """
    if unet is not None and scheduler is None:
        raise ValueError("unet: its scheduler is needed, too")
    sizes = {"images": images, "gradient_images": gradient_images, "batch_size": batch_size}
    log_prior = _label_log_frequencies(data, _check_arguments(classifier, len(data), sizes))
    run = default_run(classifier) if scheduler is None else SamplingRun(scheduler)
    num_labels, eval_levels = len(log_prior), run.eval_levels(levels)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)[:images].tolist()
    image_shape = torch.as_tensor(data[order[0]]["pixel_values"]).shape
    mismatches = config_mismatches(classifier, unet, run, image_shape if vae is None else None)
    has_range = vae is None and not reads_arrays(classifier)

    cosine_to = "a reference" if reference else "itself under a tenth of other noise"
    if reference is None and module_config(unet).get("num_class_embeds") == num_labels + 1:
        cosine_to = "the network's own"
        reference = network_reference(unet, run, null_label=num_labels)

    statistics = LevelStatistics(
        classifier, eval_levels, reference, gradient_images, seed, finite_differences
    )
    bar = tqdm(total=len(order), unit="image", disable=not progress)
    with torch.no_grad(), evaluating(classifier, unet, vae), bar:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            statistics.add(indices, [data[i] for i in indices], vae)
            bar.update(len(indices))

    rows = statistics.rows(log_prior)
    mismatches += measured_mismatches(rows, statistics.value_range if has_range else None)
    verdict = assess(rows, *statistics.logits_and_label(), run, reference is not None)
    settings = {"model": type(classifier).__name__, "images": len(order)}
    settings |= {"gradient_images": min(gradient_images, len(order)), "levels": levels}
    settings |= {"seed": seed, "bins": BINS, "scheduler": type(run.scheduler).__name__}
    settings |= {"schedule": "own" if scheduler is None else "given", "cosine_to": cosine_to}
    settings["weights"] = weights_digest(classifier)
    settings["classifier_schedule"] = dict(schedule_config(classifier))
    return Diagnosis(tuple(rows), verdict, tuple(mismatches), settings)


def _check_arguments(classifier: torch.nn.Module, count: int, sizes: dict[str, int]) -> int:
    """Number of labels; raises ValueError for arguments that aren't allowed."""
    config = module_config(classifier)
    num_labels, kind = config.get("num_labels"), config.get("problem_type") or SINGLE_LABEL
    if kind != SINGLE_LABEL or not num_labels or num_labels < 2:
        raise ValueError(
            f"classifier: problem_type={kind!r}, num_labels={num_labels}; only a single-label "
            "classifier with at least two labels can be diagnosed"
        )
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1 is allowed")
    if not count:
        raise ValueError("data: there are no images")
    return num_labels


def _label_log_frequencies(data: Sequence[Item], num_labels: int) -> torch.Tensor:
    """Log frequencies of all labels of the data, (K,); without reading images where possible."""
    read_label = getattr(data, "label", None) or (lambda i: int(data[i]["label"]))
    counts = Counter(read_label(i) for i in range(len(data)))
    unknown = sorted(label for label in counts if not 0 <= label < num_labels)
    if unknown:
        raise ValueError(
            f"dataset: labels {unknown[:10]} are unknown to the classifier; ids 0 to "
            f"{num_labels - 1} are allowed"
        )
    frequencies = torch.tensor([counts[i] for i in range(num_labels)], dtype=torch.float64)
    return (frequencies / len(data)).log()


def inspect(
    model: str | Path,
    dataset: str,
    unet: str | Path | None = None,
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    image_range: tuple[float, float] | None = None,
    alpha_background: tuple[int, int, int] | None = None,
    device: str | torch.device = "cpu",
    evidence: int | None = None,
    **options: Any,
) -> Diagnosis:
    """`diagnose` a saved classifier.

    Args:
        model: folder or Hub id of a classifier or of a pipeline with one, or a bundled name. A
            pipeline's network is the one to be guided, unless `unet` is given.
        dataset: a Hub name, an image folder or a folder of Parquet files; of arrays, as the
            classifier reads them, or .npy files, for a classifier of arrays.
        unet: folder, Hub id or bundled name of the pipeline whose network is to be guided.
        split, image_column, label_column: of the dataset; default: the first of validation, test
            and train, and the first columns that fit.
        image_range, alpha_background: of images, as of `LabelledImages`.
        evidence: particles of each population by which `label_evidence` checks whether the labels'
            evidences add up to 1; needs a network. None: off.
        options: of `diagnose`.

    Raises:
        ValueError: for a model without a classifier, evidence without a network, a wrong split or
            labels, and as `diagnose`.
        OSError: for files that are missing or broken.
    """
    from ..learning.data import load_splits

    classifier, pipeline = load_classifier(model)
    if unet is not None:
        pipeline = load_pipeline(str(unet))
    if evidence is not None and pipeline is None:
        raise ValueError(f"evidence={evidence} needs the network to be guided, unet=PIPELINE")
    if evidence is not None:
        evidence_pipeline(pipeline, classifier)  # before the work
    parts: dict[str, Any] = {}
    if pipeline is not None:
        parts = {name: getattr(pipeline, name) for name in ("scheduler", "unet", "vae")}
    vae = parts.get("vae")
    splits = load_splits(dataset)
    if split is None:
        split = next((name for name in ("validation", "test", "train") if name in splits), None)
    if split not in splits:
        raise ValueError(f"split {split!r}: the dataset has {sorted(splits)}")
    columns, pixels = (image_column, label_column), dict(image_range=image_range)
    pixels["alpha_background"] = alpha_background
    data = open_data(splits[split], classifier, vae, columns, pixels)
    data, notes = match_labels(data, module_config(classifier).get("id2label"))
    if pipeline is not None:
        notes += scale_mismatches(module_config(classifier), pipeline.config)
    if split == "train":
        notes.append("the split is 'train': metrics on training images don't hold for other images")
    for module in filter(None, (classifier, parts.get("unet"), vae)):
        module.to(device)
    diagnosis = diagnose(classifier, data, **parts, **options)
    settings = diagnosis.settings | {"model": str(model), "dataset": str(dataset), "split": split}
    settings["unet"] = None if unet is None else str(unet)
    diagnosis = replace(diagnosis, mismatches=(*notes, *diagnosis.mismatches), settings=settings)
    if evidence is None:
        return diagnosis
    names = ("seed", "batch_size", "progress")
    chosen = {name: options[name] for name in names if name in options}
    found = label_evidence(pipeline, classifier, evidence, **chosen)
    verdict = replace(diagnosis.verdict, words=(*diagnosis.verdict.words, str(found)))
    return replace(diagnosis, verdict=verdict, evidence=found)
