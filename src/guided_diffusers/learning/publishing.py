"""The end of a training: save the model, and publish it on the Hub (--push_to_hub)."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from ..classifier import NoiseAwareClassifier
from ..clip import NoiseAwareCLIP
from ..pipeline import ClassifierGuidedPipeline
from .distributed import end_training, exit_on_value_error
from .options import Options


def save_and_publish(
    options: Options,
    accelerator: Accelerator,
    model: ClassifierGuidedPipeline | NoiseAwareClassifier | NoiseAwareCLIP,
) -> None:
    """Save a model in --output_dir, end the training, and with --push_to_hub publish the model.

    The repository gets the metrics and options in --output_dir, too. Called on every process.
    """
    folder = Path(options.output_dir)
    if accelerator.is_main_process:
        model.save_pretrained(folder)
    end_training(accelerator)
    if accelerator.is_main_process and options.push_to_hub:
        with exit_on_value_error():
            commit = model.push_to_hub(
                options.hub_model_id or folder.resolve().name,
                private=options.hub_private or None,
                figures=folder,
            )
        print(f"published: {commit.commit_url}")
