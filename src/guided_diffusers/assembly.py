"""A pipeline from a trained network, a classifier and an autoencoder that fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoModel, SchedulerMixin

from .classifier import NoiseAwareClassifier
from .noise import module_config
from .pipeline import ClassifierGuidedPipeline
from .utils import is_hub_id, load_pipeline, scheduler_for

DPM_SOLVER = "DPMSolverMultistepScheduler"


def assembled(
    unet: str | Path,
    classifier: str | Path | None = None,
    vae: str | Path | None = None,
    scheduler: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> ClassifierGuidedPipeline:
    """The pipeline of trained parts, each given as a folder or a Hub id.

    Args:
        unet: output of `train_unet.py`, or any pipeline with a `unet` and a scheduler.
        classifier: output of `train_classifier.py`. None: that of `unet`, if it has one.
        vae: an autoencoder of Diffusers. None: that of `unet`, if it has one.
        scheduler: name of a scheduler, as in `utils.scheduler_for`. None: DPM-Solver++, or the
            network's own where that doesn't fit, as with flow matching.
        defaults: the pipeline's preset.

    Raises:
        ValueError: for parts that don't fit each other, or an unknown scheduler.
        OSError: for a part that can't be read.
    """
    trained = load_pipeline(unet)
    guide, autoencoder = trained.classifier, trained.vae
    if classifier is not None:
        guide = _load(NoiseAwareClassifier, "classifier", classifier)
    if vae is not None:
        autoencoder = _load(AutoModel, "vae", vae)
        if not hasattr(autoencoder, "decode"):
            kind = type(autoencoder).__name__
            raise ValueError(f"vae={str(vae)!r} is a {kind}; an autoencoder is allowed")
    pipeline = ClassifierGuidedPipeline(
        trained.unet,
        _scheduler(trained.scheduler, scheduler),
        guide,
        autoencoder,
        trained.config.id2label,
        {**trained.config.defaults, **(defaults or {})},
        trained.config.training_schedule,
        trained.config.get("data_mean"),
        trained.config.get("data_std"),
    )
    _check_fit(pipeline, trained.config.id2label)
    return pipeline


def network_mismatches(config: Mapping[str, Any], unet_config: Mapping[str, Any]) -> list[str]:
    """Differences of a classifier's config and a network's: size, channels and number of labels."""
    mismatches = []
    size, unet_size = config.get("sample_size"), unet_config.get("sample_size")
    dims = config.get("dims") or 2
    sizes = [tuple(n) if isinstance(n, (list, tuple)) else (n,) * dims for n in (size, unet_size)]
    if None not in (size, unet_size) and sizes[0] != sizes[1]:
        mismatches.append(f"the classifier's size is {size}, the network's {unet_size}")
    channels, unet_channels = config.get("in_channels"), unet_config.get("in_channels")
    upsampling = unet_channels == unet_config.get("out_channels") == 2 * (channels or 0)
    if None not in (channels, unet_channels) and channels != unet_channels and not upsampling:
        mismatches.append(
            f"the classifier's number of channels is {channels}, the network's {unet_channels}"
        )
    embeddings, labels = unet_config.get("num_class_embeds"), config.get("num_labels")
    if embeddings and labels and embeddings not in (labels, labels + 1):
        mismatches.append(
            f"the classifier has {labels} labels, the network {embeddings} class embeddings"
        )
    return mismatches


def scale_mismatches(config: Mapping[str, Any], pipeline_config: Mapping[str, Any]) -> list[str]:
    """Differences of a classifier's `data_mean` and `data_std` and a pipeline's, by their configs."""
    mismatches = []
    for name in ("data_mean", "data_std"):
        guide, network = config.get(name), pipeline_config.get(name)
        is_known = guide is not None and network is not None
        if guide is not network and not (is_known and _are_close(guide, network)):
            mismatches.append(f"the classifier's {name} is {guide}, the network's {network}")
    return mismatches


def _are_close(values: Any, others: Any) -> bool:
    """Whether two scales, each one number or one a channel, are equal up to rounding."""
    sizes = {np.size(values), np.size(others)} - {1}
    return len(sizes) < 2 and np.allclose(values, others, rtol=1e-3)


def _load(cls: Any, argument: str, part: str | Path) -> torch.nn.Module:
    if not Path(part).exists() and not is_hub_id(part):
        raise ValueError(
            f"{argument}={str(part)!r}: no such folder; a folder or a Hub id is allowed"
        )
    if (Path(part) / "model_index.json").is_file():
        raise ValueError(
            f"{argument}={str(part)!r} is a pipeline; the folder of its {argument} is needed, "
            f"such as {str(Path(part) / argument)!r}"
        )
    return cls.from_pretrained(part)


def _scheduler(trained: SchedulerMixin, name: str | None) -> SchedulerMixin:
    """The scheduler called `name`, whose runs start at pure noise."""
    if name is None:
        compatible = {cls.__name__ for cls in trained.compatibles}
        name = DPM_SOLVER if DPM_SOLVER in compatible else type(trained).__name__
    scheduler = scheduler_for(trained, name)
    changes = {"timestep_spacing": "trailing", "clip_sample": False}
    changes = {key: value for key, value in changes.items() if key in scheduler.config}
    # in one mapping: entries that the class doesn't read are kept for others
    return type(scheduler).from_config({**scheduler.config, **changes})


def _check_fit(pipeline: ClassifierGuidedPipeline, network_names: Mapping[int, str] | None) -> None:
    """Refuse a classifier of other images or labels than the network's, or another autoencoder."""
    config, unet = module_config(pipeline.classifier), module_config(pipeline.unet)
    mismatches = network_mismatches(config, unet) if pipeline.classifier is not None else []
    latents, channels = module_config(pipeline.vae).get("latent_channels"), unet.get("out_channels")
    if latents and channels and channels not in (latents, 2 * latents):  # twice: with a variance
        mismatches.append(
            f"the autoencoder has {latents} latent channels, the network's output {channels}"
        )
    if pipeline.classifier is not None:
        mismatches += scale_mismatches(config, pipeline.config)
    names = pipeline.config.id2label
    if network_names and names and network_names != names:
        mismatches.append(
            f"the network's labels are {_listed(network_names)}, the classifier's {_listed(names)}"
        )
    if mismatches:
        raise ValueError(f"the parts don't fit each other: {'; '.join(mismatches)}")


def _listed(names: Mapping[int, str]) -> str:
    text = ", ".join(f"{i}: {name}" for i, name in list(names.items())[:10])
    return text + (", ..." if len(names) > 10 else "")
