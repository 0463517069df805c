"""Publishing of a trained model on the Hub (--push_to_hub)."""

from __future__ import annotations

from pathlib import Path

from .. import ClassifierGuidedPipeline, NoiseAwareClassifier, NoiseAwareCLIP
from .distributed import exit_on_value_error
from .options import Options


def publish(
    options: Options, model: ClassifierGuidedPipeline | NoiseAwareClassifier | NoiseAwareCLIP
) -> None:
    """With --push_to_hub, publish a saved model with the metrics and options in --output_dir."""
    if not options.push_to_hub:
        return
    folder = Path(options.output_dir)
    with exit_on_value_error():
        commit = model.push_to_hub(
            options.hub_model_id or folder.resolve().name,
            private=options.hub_private or None,
            figures=folder,
        )
    print(f"published: {commit.commit_url}")
