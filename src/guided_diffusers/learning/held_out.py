"""Metrics of the held-out images at several noise levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from .batches import Batch, collate, generator_for

# (batch, eps, t) -> one number per metric and image, (M, B)
Score = Callable[[Batch, torch.Tensor, torch.Tensor], torch.Tensor]


def eval_timesteps(steps: int) -> list[int]:
    """Ten timesteps, the centers of ten equal parts: 49, 149, ..., 949 of 1000; fewer of fewer."""
    return sorted({int((part + 0.5) * steps / 10 - 1e-6) for part in range(10)})


@torch.no_grad()
def held_out_metrics(
    accelerator: Accelerator,
    data: torch.utils.data.Dataset | None,
    timesteps: list[int],
    names: tuple[str, ...],
    score: Score,
    max_images: int,
    batch_size: int,
) -> dict[str, Any]:
    """Means of metrics over the held-out images at some timesteps.

    An image gets the same noise in any batch and process. Each process evaluates its share; all get
    the same means.

    Args:
        data: None: there are no held-out images.
        names: of the M metrics.
        score: (batch, eps, t) -> (M, B), what is averaged.
        max_images: maximum number of images, evenly spread.
        batch_size: images per forward pass.

    Returns:
        {"images": number of images, "held_out": [{"timestep": t, name: mean, ...}, ...]}, and
        "skipped_images", if some could not be read; empty without held-out images.
    """
    if data is None:
        return {}
    count, device = min(max_images, len(data)), accelerator.device
    share = [i * len(data) // count for i in range(count)]
    share = share[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(len(timesteps), len(names), device=device)
    skipped = torch.zeros((), device=device)
    for start in range(0, len(share), batch_size):
        indices = share[start : start + batch_size]
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
        rows.append({"timestep": timestep, **metrics})
    skipped = int(accelerator.reduce(skipped, "sum"))
    return {"images": count, "held_out": rows} | ({"skipped_images": skipped} if skipped else {})
