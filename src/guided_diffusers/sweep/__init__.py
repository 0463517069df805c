"""Does guidance help, at which scale, at which cost?

    guided-diffusers sweep --model fashion-mnist --reference data/fashion-mnist --scales 0 1 3 8 --output out/sweep

    from guided_diffusers import ClassifierGuidedPipeline
    from guided_diffusers.evaluation import load_network
    from guided_diffusers.sweep import sweep

    pipeline, judge = ClassifierGuidedPipeline.from_bundled("fashion-mnist"), load_network("fashion-mnist")
    verdict = sweep(pipeline, "data/fashion-mnist", "out/sweep", judge, judge, scales=[1, 3, 8], steps=[10, 25])
    print(verdict)

Every point is a scheduler, a number of steps, a guidance scale and the part of the run that is guided. Each is measured
once, at the same seeds, and kept as a JSON file; a sweep that was stopped goes on, and several processes share it. The
report says which scale is best, what is worth its cost, and where guidance is worse than none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..evaluation import Bootstrap, Images, Network, Settings, common_labels, open_real, summarise
from ..evaluation.figures import COVERAGE_K
from ..pipeline import DEFAULTS, ClassifierGuidedPipeline
from ..sampling.batches import WarnOnce
from ..sampling.manifest import module_hash, weights_hash
from ..utils import require_matplotlib
from .figures import PICTURES, Result
from .measure import DTYPES, Bench, quiet_copy, scheduler_for, scheduler_name
from .points import Point, Store, points
from .report import write_report
from .verdict import Verdict, pareto_front, verdict_of

__all__ = [
    "Point",
    "Result",
    "Store",
    "Verdict",
    "measure_points",
    "pareto_front",
    "points",
    "sweep",
    "verdict_of",
    "write_report",
]


def sweep(
    pipeline: ClassifierGuidedPipeline,
    reference: str,
    output: str | Path,
    features: Network,
    judge: Network | None = None,
    *,
    scales: Sequence[float] = (0, 1, 2, 3, 5, 8, 10),
    schedulers: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    intervals: Sequence[tuple[float, float]] | None = None,
    algorithms: Sequence[str] | None = None,
    every: Sequence[int] = (),
    tolerances: Sequence[float] = (),
    num_images: int = 1000,
    seed: int = 0,
    batch_size: int = 50,
    conditional: bool | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    bootstrap: int = 100,
    max_features: int = 2000,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    model: str | None = None,
    progress: bool = True,
) -> Verdict:
    """Measure guidance at every combination, or what of them isn't measured yet, and write the report.

    Processes that are started on one folder share the points; those of `accelerate launch` share the look at the real
    images, too.

    Args:
        pipeline: with a classifier.
        reference: labelled real images: a data set's name on the Hub, an image folder or a folder of Parquet files.
        output: a folder: new, or of points with the same settings, which then are in the report, too.
        features: the network in whose features images are compared.
        judge: a classifier that never guided. None: nothing is said of accuracy.
        scales: guidance scales, 0 and more; 0, off, is always measured.
        schedulers: as `dpmsolver++`, by default the pipeline's own; steps: by default the pipeline's own.
        intervals: (guidance_start, guidance_stop), fractions of the run; by default the pipeline's own.
        algorithms: as of the pipeline's call, by default its own; every, tolerances: `guidance_every` and
            `guidance_tolerance` there, one or the other.
        num_images: of each point, of all labels in turn; image i depends on the seed and i alone.
        conditional: as of the pipeline's call. False: the network isn't told the label, so that guidance alone steers.
        dtype: what the network computes in; sampler and classifier stay as they are.
        bootstrap: resamples that intervals are made of.
        max_features: images whose features are kept, a sample, for the figures that need them one by one.
        split, image_column, label_column: of the reference.
        model: what the report calls the model.

    Raises:
        ValueError: for other arguments, a folder of points with other settings, a reference without labels, a judge
            with other classes, or a judge or features of the classifier that guides.
        ImportError: where matplotlib is missing.
        OSError: for a disk that is full; measured points stay.
    """
    require_matplotlib()
    wanted = _wanted(pipeline, scales, schedulers, steps, intervals, algorithms, every, tolerances)
    store = measure_points(
        pipeline,
        wanted,
        reference,
        output,
        features,
        judge,
        num_images=num_images,
        seed=seed,
        batch_size=batch_size,
        conditional=conditional,
        dtype=dtype,
        bootstrap=bootstrap,
        max_features=max_features,
        split=split,
        image_column=image_column,
        label_column=label_column,
        model=model,
        progress=progress,
    )
    own = float(pipeline.config.defaults["guidance_scale"])
    if not PartialState().is_main_process:
        return verdict_of(store.all(), own)
    labels = _labels(pipeline)
    pictured = [labels[sorted(labels)[i % len(labels)]] for i in range(min(PICTURES, num_images))]
    return write_report(Path(output), store.all(), store.settings, own, pictured)


def measure_points(
    pipeline: ClassifierGuidedPipeline,
    wanted: Sequence[Point],
    reference: str,
    output: str | Path,
    features: Network,
    judge: Network | None = None,
    *,
    num_images: int = 1000,
    seed: int = 0,
    batch_size: int = 50,
    conditional: bool | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    bootstrap: int = 100,
    max_features: int = 2000,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    model: str | None = None,
    progress: bool = True,
) -> Store:
    """Measure points of one's own, or what of them isn't measured yet, without a report; arguments as of `sweep`.

    Returns:
        The points of the folder; `read(path(point))` is one.

    Raises:
        ValueError, OSError: as `sweep`.
    """
    # 1. What is asked for
    for name, value, least in (
        ("num_images", num_images, 10),
        ("batch_size", batch_size, 1),
        ("bootstrap", bootstrap, 2),
        ("max_features", max_features, COVERAGE_K + 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: at least {least} is allowed")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: {', '.join(DTYPES)} are allowed")
    called = _labels(pipeline)
    labels = sorted(called)
    if pipeline.classifier is None or not labels:
        raise ValueError("pipeline: one with a classifier is needed, whose labels are known")
    guide = module_hash(pipeline.classifier)
    for name, network in (("judge", judge), ("features", features)):
        if network is not None and module_hash(network.module) == guide:
            raise ValueError(
                f"{name}: {network.name} has the weights of the pipeline's classifier, which would judge "
                "what it guided itself; a network that never guided is allowed"
            )
    alone = PartialState()
    with alone.main_process_first():  # one prepares the data set's files, the others find them
        real = open_real(reference, _shape(pipeline), split, image_column, label_column)
    if not real.labelled:
        raise ValueError(
            f"reference: {reference} has no labels; name their column with label_column"
        )
    if len(real) <= COVERAGE_K:
        raise ValueError(
            f"reference: {reference} has {len(real)} images; at least {COVERAGE_K + 1} are needed"
        )
    ours = SimpleNamespace(labelled=True, names=called)
    names, classes, ids, real_ids, _ = common_labels(ours, real, judge)

    # 2. Points that were measured with other settings are refused before the work
    settings = {
        "model": model or type(pipeline).__name__,
        "weights": weights_hash(pipeline),
        "own_scheduler": {
            "class": type(pipeline.scheduler).__name__,
            **{  # also what another class will read there
                name: value
                for name, value in pipeline.scheduler.config.items()
                if not name.startswith("_")
            },
        },
        "defaults": {
            name: value
            for name, value in pipeline.config.defaults.items()
            if name in ("classifier_free_scale", "guidance_algorithm")
            or (name in ("guidance_every", "guidance_tolerance") and value != DEFAULTS[name])
        },
        "reference": {
            "name": reference,
            "split": real.description["split"],
            "images": len(real),
            "digest": _digest(real),
        },
        "features": {"network": features.name, "weights": features.digest()},
        "judge": judge and {"network": judge.name, "weights": judge.digest()},
        "num_images": num_images,
        "seed": seed,
        "conditional": conditional,
        "dtype": dtype,
        "bootstrap": bootstrap,
        "max_features": max_features,
        "device": pipeline.device.type,
        "batch_size": batch_size,
    }
    store = Store(output, settings)
    store.all()

    # 3. Real images once, then the points
    scorer = judge or (features if features.inception else None)
    look = Settings(classes, ids, max_features, bootstrap, seed=seed, answers=judge is not None)
    theirs = replace(look, ids=real_ids, labelled=real_ids != {})
    seen = summarise(
        real,
        features,
        scorer,
        theirs,
        batch_size=batch_size,
        what="real images",
        progress=progress,
        cache=store.folder.parent / ".real",
    )
    shown = progress and alone.is_main_process
    draws = Bootstrap(bootstrap, seed=seed, progress=shown)
    bench = Bench(
        pipeline,
        labels,
        features,
        scorer,
        seen,
        look,
        names,
        draws,
        num_images,
        seed,
        batch_size,
        conditional,
        DTYPES[dtype],
    )
    _fill(store, wanted, bench, shown)
    return store


def _labels(pipeline: ClassifierGuidedPipeline) -> dict[int, str]:
    """{id: name, or the id where it has none}."""
    names = pipeline.config.id2label or {i: i for i in range(pipeline.num_labels or 0)}
    return {int(i): str(name) for i, name in names.items()}


def _wanted(
    pipeline: ClassifierGuidedPipeline,
    scales: Sequence[float],
    schedulers: Sequence[str] | None,
    steps: Sequence[int] | None,
    intervals: Sequence[tuple[float, float]] | None,
    algorithms: Sequence[str] | None,
    every: Sequence[int],
    tolerances: Sequence[float],
) -> list[Point]:
    """All points, their schedulers by one name each."""
    own = (
        [scheduler_name(pipeline.scheduler)]
        if schedulers is None
        else [scheduler_name(scheduler_for(pipeline.scheduler, name)) for name in schedulers]
    )
    defaults = pipeline.config.defaults
    steps = steps or [defaults["num_inference_steps"]]
    if intervals is None:
        intervals = [(defaults["guidance_start"], defaults["guidance_stop"])]
    return points(scales, own, steps, intervals, algorithms or (None,), every, tolerances)


def _shape(pipeline: ClassifierGuidedPipeline) -> tuple[int, int, int]:
    """(C, H, W) of its images, by making one."""
    own = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    image = quiet_copy(pipeline, own)(
        [0],
        guidance_scale=0.0,
        num_inference_steps=2,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    return tuple(image.shape[1:])


def _digest(images: Images, count: int = 16) -> str:
    """Of so many images and their labels, evenly spread: whether it is the same data set, wherever it lies."""
    found = hashlib.sha256()
    for i in sorted({len(images) * i // count for i in range(count)}):
        pixels, label = next(iter(images.read(i, i + 1)))
        found.update(pixels.numpy().tobytes() + str(label).encode())
    return found.hexdigest()[:16]


def _fill(store: Store, wanted: Sequence[Point], bench: Bench, progress: bool) -> None:
    there = sum(store.read(store.path(point)) is not None for point in wanted)
    with (
        WarnOnce(),
        tqdm(
            total=len(wanted) * bench.num_images,
            initial=there * bench.num_images,
            unit="image",
            disable=not progress,
        ) as bar,
    ):
        if there and progress:
            bar.write(f"{there} of {len(wanted)} points were there")

        def measure(point: Point) -> Result:
            bar.set_description(point.name)
            return bench.measure(point, store.folder, bar.update)

        store.fill(wanted, measure)
