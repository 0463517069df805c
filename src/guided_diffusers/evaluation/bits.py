"""Bits per dimension of a model: the variational bound, and its terms at each timestep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DDPMScheduler
from torch import Tensor

from ..learning.losses import Process, bits_per_dim
from ..networks import evaluating
from ..noise import module_config
from ..pipeline import ClassifierGuidedPipeline
from ..sampling import image_generator
from .images import Images
from .labels import has_names, match_labels
from .metrics import Accumulator, gather
from .results import Bootstrap
from .summary import progress_bar

TERMS = ("bound", "x0_mse", "eps_mse")


class BoundTerms(Accumulator):
    """Sums of the terms at T timesteps (3, T) and of the prior; the bits of each image (N,)."""

    sums = ("terms", "prior", "totals")

    def __init__(self, timesteps: int, count: int):
        self.terms = torch.zeros(len(TERMS), timesteps, dtype=torch.float64)
        self.prior = torch.zeros((), dtype=torch.float64)
        self.totals = torch.zeros(count, dtype=torch.float64)

    def update(self, indices: list[int], bits: Mapping[str, Tensor]) -> None:
        """Add the result of `bits_per_dim` for the images with these indices."""
        self.terms += torch.stack([bits[name].cpu().double().sum(0) for name in TERMS])
        self.prior += bits["prior"].cpu().double().sum()
        self.totals[indices] = bits["total"].cpu().double()


def noise_process(pipeline: ClassifierGuidedPipeline) -> Process:
    """The noise process of training; raises ValueError for a latent model or without betas."""
    scheduler, config = pipeline.scheduler, module_config(pipeline.unet)
    if pipeline.vae is not None:
        raise ValueError("bits_per_dim: the model is a latent one; a model of pixels is needed")
    if getattr(scheduler, "betas", None) is None:
        name = type(scheduler).__name__
        raise ValueError(f"bits_per_dim: {name} has no betas; a scheduler with betas is needed")
    learned = config["out_channels"] == 2 * config["in_channels"]
    default = "learned_range" if learned else "fixed_small"
    variance_type = scheduler.config.get("variance_type") or default
    return Process(DDPMScheduler.from_config(scheduler.config, variance_type=variance_type))


def measure_bits_per_dim(
    pipeline: ClassifierGuidedPipeline,
    images: Images,
    count: int,
    bootstrap: Bootstrap,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    """The variational bound on -log2 p(x0) a dimension, of `count` held-out images, evenly spaced,
    given their labels; the noise depends on the seed and the image's index. It has the fields

        total = sum_t bound_t + prior

    (a metric), `prior`, `terms` (`bound`, `x0_mse` and `eps_mse` of each timestep), and `images`.
    """
    if not 1 <= count <= len(images):
        raise ValueError(f"bits_per_dim={count}: 1 to {len(images)} real images are allowed")
    process, state, ids = noise_process(pipeline), PartialState(), _network_ids(pipeline, images)
    sums, device = BoundTerms(len(process), count), pipeline.device
    share = range(count)[state.process_index :: state.num_processes]
    with evaluating(pipeline.unet), progress_bar(len(share), "bits per dimension", progress) as bar:
        for start in range(0, len(share), batch_size):
            indices = list(share[start : start + batch_size])
            rows = [i * len(images) // count for i in indices]
            pixels, labels = zip(*(next(images.read(row, row + 1)) for row in rows), strict=True)
            class_labels = None if ids is None else _class_labels(labels, ids).to(device)
            x0 = torch.stack(pixels).to(device)
            noise = [image_generator(bootstrap.seed, i) for i in indices]
            bits = bits_per_dim(pipeline.unet, process, x0, class_labels, generator=noise)
            sums.update(indices, bits)
            bar.update(len(indices))
    gather([sums])
    rows = zip(process.timesteps.tolist(), *(sums.terms / count).tolist(), strict=True)
    return {
        "total": bootstrap.mean(sums.totals, "less", float("inf")),
        "prior": float(sums.prior / count),
        "terms": [dict(zip(("timestep", *TERMS), row, strict=True)) for row in rows],
        "images": count,
    }


def _network_ids(pipeline: ClassifierGuidedPipeline, images: Images) -> Mapping[int, int] | None:
    """{id of the images' labels: the network's id}, by name or by id; None if it has no labels."""
    num_class_embeds = module_config(pipeline.unet).get("num_class_embeds")
    if not num_class_embeds:
        return None
    if not images.labelled:
        raise ValueError("bits_per_dim: the network needs labels, and the images have none")
    names = {int(i): name for i, name in (pipeline.config.id2label or {}).items()}
    if has_names(images.names) and has_names(names):
        return match_labels(images.names, names, "the real images", "the network")
    return {i: i for i in range(pipeline.num_labels or num_class_embeds)}


def _class_labels(labels: Sequence[int], ids: Mapping[int, int]) -> Tensor:
    unknown = sorted(set(labels) - ids.keys())
    if unknown:
        raise ValueError(
            f"bits_per_dim: the real images have the labels {unknown[:5]}; the network has "
            f"{list(ids)[:20]}"
        )
    return torch.tensor([ids[label] for label in labels])
