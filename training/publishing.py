"""The options of scripts whose model can go to the Hub, and how it goes there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token
from options import Options, explained, option

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier, NoiseAwareCLIP


@dataclass
class PublishedOptions(Options):
    push_to_hub: bool = option(
        False,
        "publish the model on the Hub at the end; the token is that of `hf auth login` "
        "or of HF_TOKEN",
    )
    hub_model_id: str | None = option(
        None, "user/model, where it goes; the name of --output_dir if left out"
    )
    hub_private: bool = option(False, "make a repository that isn't there yet a private one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private):
            raise ValueError(
                f"--hub_model_id {self.hub_model_id}, --hub_private {self.hub_private} need --push_to_hub"
            )
        if self.push_to_hub and get_token() is None:
            raise ValueError(
                "--push_to_hub needs a token: log in by `hf auth login`, or set HF_TOKEN"
            )


def publish(
    options: PublishedOptions,
    model: ClassifierGuidedPipeline | NoiseAwareClassifier | NoiseAwareCLIP,
) -> None:
    """Publish a model that is saved, with the figures and options in --output_dir, if --push_to_hub says so."""
    if options.push_to_hub:
        folder = Path(options.output_dir)
        with explained():
            commit = model.push_to_hub(
                options.hub_model_id or folder.resolve().name,
                private=options.hub_private or None,
                figures=folder,
            )
        print(f"published: {commit.commit_url}")
