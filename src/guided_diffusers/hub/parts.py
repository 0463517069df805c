"""A pipeline's folder from trained parts, with their metrics for the model card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ..assembly import assembled
from ..classifier import NoiseAwareClassifier
from ..files import write_json
from ..pipeline import ClassifierGuidedPipeline
from .staging import METRICS_NAMES, training_metrics


def assemble(
    output: str | Path,
    unet: str | Path,
    classifier: str | Path | None = None,
    vae: str | Path | None = None,
    **options: Any,
) -> ClassifierGuidedPipeline:
    """Write the folder of the pipeline that `assembled` makes, with its parts' metrics.

    The metrics and options of the trainings go into figures.json, from which `card` and `push`
    write the model card.

    Args:
        output: a new or empty folder.
        unet, classifier, vae, options: as in `assembled`.

    Raises:
        ValueError, OSError: as `assembled`; if `output` exists and isn't an empty folder.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} exists; a new or an empty folder is allowed")
    pipeline = assembled(unet, classifier, vae, **options)
    metrics: dict[str, Any] = {}
    for part, cls in ((classifier, NoiseAwareClassifier), (unet, ClassifierGuidedPipeline)):
        if part is not None and Path(part).is_dir():
            metrics |= training_metrics(Path(part), METRICS_NAMES[cls])
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        pipeline.save_pretrained(partial)
        if metrics:
            write_json(metrics, partial / "figures.json")
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return pipeline
