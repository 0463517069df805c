"""`sweep`: measures a grid of settings and writes the report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..checks import check_number
from ..defaults import DEFAULTS
from ..evaluation import COVERAGE_K, Images, Network, open_real
from ..files import check_writable, folder_lock
from ..pipeline import ClassifierGuidedPipeline
from ..sampling import WarnOnce, module_hash, resolve_defaults, weights_hash
from ..utils import require_matplotlib, scheduler_for, scheduler_name
from .learn import learn_schedule, require_scipy, write_preset
from .measure import MeasureOptions, PointEvaluator, class_names, quiet_copy
from .metrics import PICTURES, Result
from .report import write_report
from .settings import SweepSetting, sweep_grid
from .store import Store
from .verdict import Verdict, verdict_of


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
    learn: int = 0,
    evaluations: int = 40,
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
    image_range: tuple[float, float] | None = None,
    alpha_background: tuple[int, int, int] | None = None,
    model: str | None = None,
    progress: bool = True,
) -> Verdict:
    """Measure guidance in every combination of settings and write the report.

    Settings that the folder already has are not measured again. Processes that work on one folder
    share the settings; those of `accelerate launch` also share the pass over the real images.

    Args:
        pipeline: must have a classifier.
        reference: labelled real images: a Hub dataset, an image folder or a folder of Parquet
            files.
        output: a new folder, or one with results under the same arguments; these are then part of
            the report.
        features: network whose features the distances use.
        judge: classifier that is not used for guidance. None: no accuracy.
        scales: guidance scales; 0 (off) is always measured, negative ones steer away from the label.
        schedulers: names such as `dpmsolver++`. None: the pipeline's scheduler.
        steps: numbers of steps. None: the pipeline's default.
        intervals: (guidance_start, guidance_stop), fractions of the run in [0, 1]. None: the
            pipeline's default.
        algorithms: `guidance_algorithm`s. None: the pipeline's default.
        every, tolerances: `guidance_every` and `guidance_tolerance`, which are not combined.
        learn: number of knots of a `guidance_schedule` that is fitted for each scheduler and number
            of steps (`learn_schedule`), and then measured as the other settings are; 0: none. The
            seed of the fitted images is `seed` + 1, so that the measured ones are others. Writes
            the presets `learned/NAME-preset.json`.
        evaluations: for each fit: how often `num_images` images are generated and compared, at least
            learn + 2.
        num_images: images per setting, at least 10; labels take turns. Image i depends only on
            the seed and i.
        conditional: as in the pipeline's call. False: the denoiser does not get the label, so that
            only guidance steers.
        dtype: autocast dtype of the denoiser; sampler and classifier are not affected.
        bootstrap: resamples for the 95% intervals, at least 2.
        max_features: size of the sample of images for metrics that need features of single images.
        split, image_column, label_column, image_range, alpha_background: of the reference, as of
            `open_real`.
        model: name in the report.

    Raises:
        ValueError: for other values, a folder with results under other arguments, a reference
            without labels, a judge with other classes, or a judge or feature network with the
            weights of the pipeline's classifier.
        ImportError: if matplotlib is missing.
        OSError: if the disk is full; finished results are kept.
    """
    require_matplotlib()
    if PartialState().is_main_process:
        check_output(Path(output))
    defaults = resolve_defaults(pipeline, {"conditional": conditional})
    if schedulers is None:
        schedulers = [scheduler_name(pipeline.scheduler)]
    names = [scheduler_name(scheduler_for(pipeline.scheduler, name)) for name in schedulers]
    if intervals is None:
        intervals = [(defaults["guidance_start"], defaults["guidance_stop"])]
    steps = steps or [defaults["num_inference_steps"]]
    algorithms = algorithms or (None,)
    settings = sweep_grid(scales, names, steps, intervals, algorithms, every, tolerances)
    source = (reference, split, image_column, label_column, image_range, alpha_background)
    options = MeasureOptions(
        num_images, seed, batch_size, conditional, dtype, bootstrap, max_features
    )
    default_scale = float(defaults["guidance_scale"])
    learned = []
    if _check_learn(learn, evaluations):
        runs = [(name, int(count)) for name, count in product(names, sorted(steps))]
        fit = (learn, evaluations, default_scale or 1.0)
        bench = (pipeline, source, output, features, judge, options, model, progress)
        learned = _learn(runs, fit, *bench)
    settings = [*settings, *learned]
    store = _measure(pipeline, settings, source, output, features, judge, options, model, progress)
    if not PartialState().is_main_process:
        return verdict_of(store.all(), default_scale)
    for setting in learned:
        command = f"guided-diffusers sweep --learn {learn} --evaluations {evaluations}"
        write_preset(pipeline, store, setting, conditional, command, Path(output) / "learned")
    label_names = [name for _, name in sorted(class_names(pipeline).items())]
    columns = [label_names[i % len(label_names)] for i in range(min(PICTURES, num_images))]
    with folder_lock(Path(output), wait=True):
        return write_report(Path(output), store.all(), store.protocol, default_scale, columns)


def _check_learn(learn: int, evaluations: int) -> bool:
    """Whether schedules are learned.

    Raises:
        ValueError: for other values.
    """
    check_number("learn", learn, 0, integer=True)
    check_number("evaluations", evaluations, 1, integer=True)
    if learn and evaluations < learn + 2:
        raise ValueError(f"evaluations={evaluations}: at least learn + 2 = {learn + 2} is allowed")
    if learn:
        require_scipy()
    return learn > 0


def check_output(output: Path) -> None:
    """Check, before the work, that the results and the report can be written."""
    for name in ("", "points", ".locks", ".real"):
        check_writable(output / name, "output", folder=True)
    for name in ("sweep.json", "report.md", "report.html"):
        check_writable(output / name, "output")


def measure_points(
    pipeline: ClassifierGuidedPipeline,
    settings: Sequence[SweepSetting],
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
    image_range: tuple[float, float] | None = None,
    alpha_background: tuple[int, int, int] | None = None,
    model: str | None = None,
    progress: bool = True,
) -> Store:
    """Measure the settings that the folder lacks, without a report; arguments as of `sweep`.

    Returns:
        The results of the folder; `store.read(store.path(setting))` is one of them.

    Raises:
        ValueError, OSError: as `sweep`.
    """
    source = (reference, split, image_column, label_column, image_range, alpha_background)
    options = MeasureOptions(
        num_images, seed, batch_size, conditional, dtype, bootstrap, max_features
    )
    return _measure(pipeline, settings, source, output, features, judge, options, model, progress)


def _measure(
    pipeline: ClassifierGuidedPipeline,
    settings: Sequence[SweepSetting],
    source: tuple[Any, ...],
    output: str | Path,
    features: Network,
    judge: Network | None,
    options: MeasureOptions,
    model: str | None,
    progress: bool,
) -> Store:
    """Measure the settings that the folder lacks, with a progress bar over all images."""
    real, protocol = _open(pipeline, source, features, judge, options, model)
    store = Store(output, protocol)
    store.all()  # refuses results of another protocol before any computation
    show = progress and PartialState().is_main_process
    cache = Path(output) / ".real"
    evaluator = PointEvaluator(pipeline, real, features, judge, options, cache, show)
    finished = sum(store.read(store.path(setting)) is not None for setting in settings)
    total, initial = len(settings) * options.num_images, finished * options.num_images
    bar = tqdm(total=total, initial=initial, unit="image", disable=not show)
    with WarnOnce(), bar:
        if finished and show:
            bar.write(f"{finished} of {len(settings)} settings are already measured")

        def measure(setting: SweepSetting) -> Result:
            bar.set_description(setting.name)
            return evaluator.measure(setting, store.folder, bar.update)

        store.fill(settings, measure)
    return store


def _learn(
    runs: Sequence[tuple[str, int]],
    fit: tuple[int, int, float],
    pipeline: ClassifierGuidedPipeline,
    source: tuple[Any, ...],
    output: str | Path,
    features: Network,
    judge: Network | None,
    options: MeasureOptions,
    model: str | None,
    progress: bool,
) -> list[SweepSetting]:
    """A learned setting for each (scheduler, steps); `fit`: knots, evaluations, first scale."""
    real, protocol = _open(pipeline, source, features, judge, options, model)
    Store(output, protocol).all()  # refuses a folder with other results before the fit
    options, show = replace(options, seed=options.seed + 1), PartialState().is_main_process
    show, cache = progress and show, Path(output) / ".real"
    evaluator = PointEvaluator(pipeline, real, features, judge, options, cache, show)
    where, protocol = Path(output) / "learned", {**protocol, "seed": options.seed}
    with WarnOnce():
        return [learn_schedule(evaluator, *run, *fit, protocol, where, show) for run in runs]


def _open(
    pipeline: ClassifierGuidedPipeline,
    source: tuple[Any, ...],
    features: Network,
    judge: Network | None,
    options: MeasureOptions,
    model: str | None,
) -> tuple[Images, dict[str, Any]]:
    """The real images, and what results depend on apart from the setting, as JSON."""
    check_networks(pipeline, features, judge)
    real = open_reference(pipeline, *source)
    reference = {"name": source[0], "split": real.description["split"], "images": len(real)}
    protocol = {
        "model": model or type(pipeline).__name__,
        **pipeline_protocol(pipeline, options.conditional),
        "reference": {**reference, "digest": fingerprint(real)},
        "features": {"network": features.name, "weights": features.digest()},
        "judge": judge and {"network": judge.name, "weights": judge.digest()},
        "device": pipeline.device.type,
        **asdict(options),
    }
    return real, protocol


def check_networks(
    pipeline: ClassifierGuidedPipeline, features: Network, judge: Network | None
) -> None:
    """Raise a ValueError without a classifier, or if another network has its weights."""
    if pipeline.classifier is None or not class_names(pipeline):
        raise ValueError(
            "pipeline: it has no classifier or its labels are unknown; both are needed"
        )
    classifier_hash = module_hash(pipeline.classifier)
    for name, network in (("judge", judge), ("features", features)):
        if network is not None and module_hash(network.module) == classifier_hash:
            raise ValueError(
                f"{name}: {network.name} has the weights of the pipeline's classifier and would "
                "judge its own guidance; use a network that is not used for guidance"
            )


def open_reference(pipeline: ClassifierGuidedPipeline, reference: str, *arguments: Any) -> Images:
    """The labelled real images, as of `open_real` with its further arguments.

    Raises:
        ValueError: without labels, or for too few.
    """
    with PartialState().main_process_first():  # the main process prepares the dataset's files
        real = open_real(reference, image_shape(pipeline), *arguments)
    too_few = f"{len(real)} images; at least {COVERAGE_K + 1} are needed"
    for is_valid, problem in (
        (real.labelled, "no labels; name their column with label_column"),
        (len(real) > COVERAGE_K, too_few),
    ):
        if not is_valid:
            raise ValueError(f"reference: {reference} has {problem}")
    return real


def image_shape(pipeline: ClassifierGuidedPipeline) -> tuple[int, int, int]:
    """(C, H, W) of the pipeline's images, from one that it generates."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    call = {"guidance_scale": 0.0, "num_inference_steps": 2, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    images = quiet_copy(pipeline, scheduler)([0], generator=generator, **call).images
    return tuple(images.shape[1:])


def pipeline_protocol(
    pipeline: ClassifierGuidedPipeline, conditional: bool | None
) -> dict[str, Any]:
    """What of the pipeline results depend on, apart from the arguments of a setting."""
    # the config includes options that only other scheduler classes read
    scheduler = {"class": type(pipeline.scheduler).__name__, **pipeline.scheduler.config}
    scheduler = {name: value for name, value in scheduler.items() if not name.startswith("_")}
    defaults = {}
    values = resolve_defaults(pipeline, {"conditional": conditional})
    for name, value in values.items():
        limits = ("guidance_every", "guidance_tolerance", "guidance_schedule")
        is_changed = name in limits and value != DEFAULTS[name]
        if is_changed or name in ("classifier_free_scale", "guidance_algorithm"):
            defaults[name] = value
    hashed = weights_hash(pipeline)
    return {"weights": hashed, "own_scheduler": scheduler, "defaults": defaults}


def fingerprint(images: Images, count: int = 16) -> str:
    """Hash of `count` evenly spaced images and labels; independent of where the dataset is."""
    digest = hashlib.sha256()
    for i in sorted({len(images) * i // count for i in range(count)}):
        pixels, label = next(iter(images.read(i, i + 1)))
        digest.update(pixels.numpy().tobytes() + str(label).encode())
    return digest.hexdigest()[:16]
