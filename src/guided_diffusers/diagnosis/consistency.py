"""Compares the configs of classifier, denoiser and data, and the range of the images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..noise import TrainedSchedule, module_config, schedule_config
from .levels import SamplingRun


def as_pair(size: Any) -> tuple[int, ...]:
    """(height, width) of a `sample_size`, a number or a pair."""
    return (size, size) if isinstance(size, int) else tuple(size)


def config_mismatches(
    classifier: torch.nn.Module,
    unet: torch.nn.Module | None,
    vae: torch.nn.Module | None,
    run: SamplingRun,
    image_shape: Sequence[int],
) -> list[str]:
    """What the configs of classifier, denoiser and data disagree on, a sentence each.

    Args:
        image_shape: (C, H, W) of the data's images.

    Raises:
        ValueError: if the classifier can't read the images.
    """
    config, unet_config = module_config(classifier), module_config(unet)
    channels = config.get("in_channels")
    if vae is None and channels not in (None, image_shape[0]):
        raise ValueError(
            f"dataset: its images have {image_shape[0]} channels, the classifier's {channels}"
        )
    mismatches = []
    for name, description in (("sample_size", "size"), ("in_channels", "number of channels")):
        values = config.get(name), unet_config.get(name)
        if None not in values and as_pair(values[0]) != as_pair(values[1]):
            mismatches.append(
                f"the classifier's {description} is {values[0]}, the network's {values[1]}"
            )
    embeddings, labels = unet_config.get("num_class_embeds"), config.get("num_labels")
    if embeddings and labels and embeddings not in (labels, labels + 1):
        mismatches.append(
            f"the classifier has {labels} labels, the network {embeddings} class embeddings"
        )
    return mismatches + schedule_mismatch(classifier, run)


def schedule_mismatch(classifier: torch.nn.Module, run: SamplingRun) -> list[str]:
    """Whether the run starts above the classifier's highest training noise level.

    A run that starts from pure noise (zero terminal SNR) has no such level to train at.
    """
    log_trained = float(TrainedSchedule(schedule_config(classifier)).log_ratio[-1])
    trained, start = math.exp(log_trained), run.at(0.0).ratio
    if start <= 1.01 * trained or (start >= 1e4 and log_trained >= 2):
        return []
    return [
        f"the classifier was trained up to sigma/alpha {trained:.3g}, and the run starts at "
        f"{start:.3g}; above its highest training noise level it is evaluated at that level"
    ]


def range_mismatch(low: float, high: float) -> list[str]:
    """Whether images with values from `low` to `high` don't have the range [-1, 1]."""
    values = f"the images' values run from {low:.3g} to {high:.3g}"
    if low < -1.001 or high > 1.001:
        return [f"{values}, beyond [-1, 1]"]
    if high - low >= 1.5:
        return []
    hint = "; they look like [0, 1]: convert them by 2 x - 1" if low >= 0 else ""
    return [f"{values} and don't cover [-1, 1]{hint}"]
