"""Fits a `guidance_schedule` to a pipeline: `sweep --learn`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..defaults import DEFAULTS
from ..evaluation import Summary
from ..evaluation.metrics import sliced_wasserstein
from ..files import file_lock, finite, write_json
from ..guidance import NO_SIGNAL
from ..noise import noise_levels
from ..pipeline import ClassifierGuidedPipeline
from ..presets import resolve_settings
from ..sampling import differences, resolve_defaults
from ..utils import scheduler_for
from .measure import PointEvaluator
from .settings import SweepSetting
from .store import MAY_DIFFER, Store

LEAST = 1e-3  # scale of a knot
PRESET_METRICS = ("top_1", "frechet_distance", "sliced_wasserstein", "recall")


def learn_schedule(
    evaluator: PointEvaluator,
    scheduler: str,
    steps: int,
    knots: int,
    evaluations: int,
    start: float,
    protocol: Mapping[str, Any],
    folder: Path,
    progress: bool = True,
) -> SweepSetting:
    """Fit the scales of a schedule by Nelder and Mead's simplex (1965), on the same seeds each time.

    It minimises the sliced Wasserstein distance between generated and real images in their features
    and labels (`labelled_features`), so that images must show their label, too. Galashov et al.,
    Learn to guide your diffusion model (2025), train a network of guidance weights by such a
    distance; here a few numbers are fitted without gradients.

    Args:
        scheduler, steps: as of `SweepSetting`; the schedule is for these.
        knots: noise levels at which there is a scale, evenly chosen from the run's.
        evaluations: how often images are generated and compared, more than knots + 1.
        start: scale at all knots of the first schedule.
        protocol: what the distances depend on, as JSON.
        folder: each distance is kept there, so that a killed run goes on.

    Returns:
        The best setting; `folder/NAME.json` has all that were tried.

    Raises:
        ValueError: for a folder with distances under another protocol, or real images with labels
            that the judge doesn't know.
    """
    sigmas = knot_levels(evaluator.pipeline, scheduler, steps, knots)
    path = folder / f"{scheduler}-{steps}-steps.json"
    protocol = json.loads(json.dumps(finite({**protocol, "sigmas": sigmas, "start": start})))
    if evaluator.settings.classes and (evaluator.real.sample.labels < 0).any():
        raise ValueError(
            "reference: learn needs the judge's label of each real image; some have none"
        )
    real = labelled_features(evaluator.real, evaluator.real, evaluator.settings.classes)

    def setting_of(scales: Sequence[float]) -> SweepSetting:
        schedule = tuple(zip(sigmas, scales, strict=True))
        return SweepSetting(scheduler, steps, 1.0, guidance_schedule=schedule)

    with file_lock(folder / f".{path.stem}.lock", wait=True):
        tried = _read(path, protocol)
        count = evaluator.options.num_images
        bar = tqdm(total=evaluations, initial=0, desc="schedule", disable=not progress)

        def distance(scales: Sequence[float]) -> float:
            scales = tuple(round(max(abs(scale), LEAST), 4) for scale in scales)
            if scales not in tried:
                summary, *_ = evaluator.generate(setting_of(scales), lambda images: None)
                generated = labelled_features(summary, evaluator.real, evaluator.settings.classes)
                tried[scales] = float(sliced_wasserstein(real, generated))
                rows = [{"scales": key, "distance": value} for key, value in tried.items()]
                write_json({"protocol": protocol, "images": count, "evaluations": rows}, path)
            bar.set_postfix(best=f"{min(tried.values()):.4g}")
            bar.update()
            return tried[scales]

        with bar:
            nelder_mead(distance, [start] * len(sigmas), start, evaluations)
    return setting_of(min(tried, key=tried.__getitem__))


def write_preset(
    pipeline: ClassifierGuidedPipeline,
    store: Store,
    setting: SweepSetting,
    conditional: bool | None,
    command: str,
    folder: Path,
) -> None:
    """Write the defaults of a measured schedule, as `training/bundle.py --preset` reads them: the
    `mode` of calls that they are for, and the metrics of the setting and of no guidance."""
    call = {**setting.call_arguments, "conditional": conditional}
    values = resolve_defaults(pipeline, call)
    hidden = conditional is False and pipeline.null_label is not None
    rows = []
    for one in (setting.unguided, setting):
        result = store.read(store.path(one))
        metrics = {name: result.value(name) for name in PRESET_METRICS if name in result.metrics}
        row = {"guidance": "learned schedule" if one is setting else "no guidance", **metrics}
        rows.append({**row, "agreement": metrics.get("top_1"), "seconds": result.seconds})
    content = {
        "scheduler": setting.scheduler,
        "mode": resolve_settings(pipeline, call, hidden)["mode"],
        "defaults": {name: values[name] for name in DEFAULTS if values[name] != DEFAULTS[name]},
        "rows": rows,
        "command": command,
    }
    name = f"{setting.scheduler}-{setting.num_inference_steps}-steps-preset.json"
    write_json(content, folder / name)


def knot_levels(
    pipeline: ClassifierGuidedPipeline, scheduler: str, steps: int, knots: int
) -> list[float]:
    """sigma / alpha, rising, at steps that are evenly chosen from the run's."""
    probe = copy(scheduler_for(pipeline.scheduler, scheduler))
    probe.set_timesteps(steps)
    ratios = {
        level.sigma / level.alpha
        for level in noise_levels(probe)
        if 0 < level.sigma <= NO_SIGNAL * level.alpha
    }
    levels = sorted(ratios)
    if not levels:
        raise ValueError(
            f"steps={steps}: {scheduler} has no step with noise and signal to guide at"
        )
    if knots > len(levels):
        raise ValueError(
            f"learn={knots}: {scheduler} with {steps} steps has {len(levels)} noise levels, so at most "
            f"{len(levels)} are allowed"
        )
    chosen = torch.linspace(0, len(levels) - 1, knots).round().int().tolist()
    return [float(f"{levels[i]:.6g}") for i in chosen]


def labelled_features(summary: Summary, real: Summary, classes: int) -> torch.Tensor:
    """Features (n, D + classes): beside the image's features the one-hot label, times the root mean
    square of the real features' distance from their mean, so that both count alike."""
    features, sample = summary.sample.features.double(), real.sample.features.double()
    if not classes:
        return features
    radius = (sample - sample.mean(0)).square().sum(1).mean().sqrt()
    one_hot = torch.nn.functional.one_hot(summary.sample.labels, classes)
    return torch.cat([features, radius * one_hot], dim=1)


def nelder_mead(
    function: Callable[[Sequence[float]], float],
    start: Sequence[float],
    step: float,
    evaluations: int,
) -> None:
    """Evaluate a function at `evaluations` points by SciPy's Nelder-Mead, to find a low one; the
    first simplex is `start` and start + step in each coordinate."""
    minimize = require_scipy()
    simplex = np.array(start) + step * np.eye(len(start) + 1, len(start), k=-1)
    options = {"initial_simplex": simplex, "maxfev": evaluations, "xatol": 0, "fatol": 0}
    minimize(function, start, method="Nelder-Mead", options=options)


def require_scipy() -> Callable[..., Any]:
    """SciPy's `minimize`.

    Raises:
        ImportError: without SciPy; the message says how to install it.
    """
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise ImportError(
            f"learn needs SciPy: pip install 'guided-diffusers[learn]', or 'scipy>=1.13' ({error})"
        ) from error
    return minimize


def _read(path: Path, protocol: Mapping[str, Any]) -> dict[tuple[float, ...], float]:
    """{scales: distance} of an earlier run."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    changed = differences(content["protocol"], protocol)
    changes = [f"{n} was {old}, is {new}" for n, old, new in changed if n not in MAY_DIFFER]
    if changes:
        raise ValueError(
            f"{path} has distances under other settings ({'; '.join(changes)}); use the same settings "
            "or another folder"
        )
    return {tuple(row["scales"]): row["distance"] for row in content["evaluations"]}
