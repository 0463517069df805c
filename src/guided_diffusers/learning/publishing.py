"""The options of scripts whose model can go to the Hub, and how it goes there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler
from huggingface_hub import get_token

from .. import ClassifierGuidedPipeline, NoiseAwareClassifier, NoiseAwareCLIP
from .options import Options, explained, option

SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
DEFAULT = {
    "block_out_channels": [64, 128, 192, 256],
    "layers_per_block": 2,
    "attention_head_dim": 64,
    "dropout": 0.1,
}


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


@dataclass
class NoisyOptions(PublishedOptions):
    max_timestep: int | None = option(
        None,
        "the noisiest timestep to train on, with which the saved schedule ends; the schedule's last if left out, "
        "and 0 for a classifier of clean images",
    )
    adam_weight_decay: float = option(0.05, "AdamW's weight decay")


def trained_schedule(options: NoisyOptions, scheduler: DDPMScheduler) -> dict[str, Any]:
    """The noise levels trained on, in `DDPMScheduler`'s words.

    Raises:
        ValueError: if --max_timestep is beyond the schedule.
    """
    schedule = {name: scheduler.config[name] for name in SCHEDULE}
    steps = (
        schedule["num_train_timesteps"]
        if options.max_timestep is None
        else options.max_timestep + 1
    )
    if steps > schedule["num_train_timesteps"]:
        last = schedule["num_train_timesteps"] - 1
        raise ValueError(f"--max_timestep {options.max_timestep}: 0 to {last} is allowed")
    if steps < schedule["num_train_timesteps"] or scheduler.config.rescale_betas_zero_snr:
        schedule |= {
            "num_train_timesteps": steps,
            "trained_betas": scheduler.betas[:steps].tolist(),
        }
    return schedule
