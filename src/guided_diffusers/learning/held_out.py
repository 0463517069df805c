"""Metrics of the held-out images at several noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from .batches import Batch, collate, generator_for
from .data import evenly_spread
from .options import Options

# (batch, eps, t) -> one number per metric and image, (M, B)
Score = Callable[[Batch, torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def held_out_metrics(
    accelerator: Accelerator,
    options: Options,
    data: torch.utils.data.Dataset | None,
    num_timesteps: int,
    names: tuple[str, ...],
    score: Score,
) -> dict[str, Any]:
    """Means of the metrics `names` over the held-out images, if there are any, at ten timesteps.

    The timesteps are the centers of ten equal parts: 49, 149, ..., 949 of 1000; fewer of fewer. An
    image gets the same noise in any batch and process. Each process evaluates its share; all get
    the same means.

    Returns:
        {"images": number of images, "held_out": [{"timestep": t, name: mean, ...}, ...]}, and
        "skipped_images", if some could not be read; empty without held-out images.

    Raises:
        FloatingPointError: if a mean is NaN or infinite, on every process.
    """
    if data is None:
        return {}
    timesteps = sorted({int((part + 0.5) * num_timesteps / 10 - 1e-6) for part in range(10)})
    indices, device = evenly_spread(len(data), options.validation_samples), accelerator.device
    count, share = len(indices), indices[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(len(timesteps), len(names), device=device)
    skipped = torch.zeros((), device=device)
    for start in range(0, len(share), options.train_batch_size):
        indices = share[start : start + options.train_batch_size]
        batch = collate([data[i] for i in indices])
        shape = batch["pixel_values"].shape[1:]
        if "corrupt" in batch:
            skipped += (batch["corrupt"] >= 0).sum()
        batch = {name: value.to(device) for name, value in batch.items()}
        for k, timestep in enumerate(timesteps):
            generators = [generator_for(0, 3, i, k) for i in indices]
            eps = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
            t = torch.full((len(indices),), timestep, device=device)
            sums[k] += score(batch, eps, t).float().sum(dim=1)
    means = (accelerator.reduce(sums, "sum") / count).tolist()
    rows = []
    for timestep, values in zip(timesteps, means, strict=True):
        metrics = {name: round(mean, 5) for name, mean in zip(names, values, strict=True)}
        for name, mean in metrics.items():
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"{name} of held-out images at timestep {timestep} is {mean}; try a smaller "
                    "--learning_rate, or look at the images and labels"
                )
        rows.append({"timestep": timestep, **metrics})
    skipped = int(accelerator.reduce(skipped, "sum"))
    return {"images": count, "held_out": rows} | ({"skipped_images": skipped} if skipped else {})
