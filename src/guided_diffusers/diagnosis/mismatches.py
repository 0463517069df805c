"""Inconsistencies of classifier, denoiser and data, in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.nn import Module

from ..images import as_pair
from ..noise import TrainedSchedule, module_config, schedule_config
from .levels import SamplingRun


def config_mismatches(
    classifier: Module, unet: Module | None, run: SamplingRun, image_shape: Sequence[int] | None
) -> list[str]:
    """Inconsistencies of the configs; ValueError for images (C, H, W) that can't be read."""
    config, unet_config = module_config(classifier), module_config(unet)
    channels = config.get("in_channels")
    if image_shape is not None and channels not in (None, image_shape[0]):
        raise ValueError(
            f"dataset: its images have {image_shape[0]} channels, the classifier's {channels}"
        )
    mismatches = network_mismatches(config, unet_config)
    log_trained = float(TrainedSchedule(schedule_config(classifier)).log_ratio[-1])
    trained, start = math.exp(log_trained), run.at(0.0).ratio
    # no schedule has a level to train at for a run from pure noise (zero terminal SNR)
    if start > 1.01 * trained and not (start >= 1e4 and log_trained >= 2):
        mismatches.append(
            f"the classifier was trained up to sigma/alpha {trained:.3g}, and the run starts at "
            f"{start:.3g}; above its highest training noise level it is evaluated at that level"
        )
    return mismatches


def network_mismatches(config: Mapping[str, Any], unet_config: Mapping[str, Any]) -> list[str]:
    """Differences of a classifier's config and a network's: size, channels and number of labels."""
    mismatches = []
    size, unet_size = config.get("sample_size"), unet_config.get("sample_size")
    if None not in (size, unet_size) and as_pair(size) != as_pair(unet_size):
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


def measured_mismatches(
    rows: Sequence[Mapping[str, Any]], value_range: tuple[float, float] | None
) -> list[str]:
    """Wrong gradients in the rows of metrics; images whose `value_range` isn't [-1, 1]."""
    mismatches = []
    error = max(row.get("finite_difference_error", 0.0) for row in rows)
    if error > 0.01:
        mismatches.append(
            f"the gradient differs from finite differences by {error:.1%}: its precision is too "
            "low, or part of the classifier is detached from the graph"
        )
    if value_range is not None:
        low, high = value_range
        values = f"the images' values run from {low:.3g} to {high:.3g}"
        if low < -1.001 or high > 1.001:
            mismatches.append(f"{values}, beyond [-1, 1]")
        elif high - low < 1.5:
            hint = "; they look like [0, 1]: convert them by 2 x - 1" if low >= 0 else ""
            mismatches.append(f"{values} and don't cover [-1, 1]{hint}")
    return mismatches
