"""A pipeline's folder from trained parts, with their metrics for the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..assembly import assembled
from ..classifier import NoiseAwareClassifier
from ..files import new_folder, write_json
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
        ValueError, OSError: as `assembled`; as `new_folder`.
    """
    output = Path(output)
    metrics: dict[str, Any] = {}
    for part, cls in ((classifier, NoiseAwareClassifier), (unet, ClassifierGuidedPipeline)):
        if part is not None and Path(part).is_dir():
            metrics |= training_metrics(Path(part), METRICS_NAMES[cls])
    with new_folder(output) as partial:
        pipeline = assembled(unet, classifier, vae, **options)
        pipeline.save_pretrained(partial)
        if metrics:
            write_json(metrics, partial / "figures.json")
    return pipeline
