"""Bits per dimension of a network: the variational bound, and its terms by timestep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DDPMScheduler
from torch import Tensor
from tqdm.auto import tqdm

from ..learning.losses import Process, bits_per_dim
from ..noise import module_config
from ..pipeline import ClassifierGuidedPipeline
from ..sampling import image_generator
from ..utils import evaluating
from .figures import Bootstrap
from .images import Images, matched, named
from .metrics import Accumulator, gather

TERMS = ("bound", "x0_mse", "eps_mse")


class Terms(Accumulator):
    """Sums of the terms of T timesteps, (3, T), and each image's number and bits, of which there are few."""

    def __init__(self, steps: int):
        self.sums = torch.zeros(len(TERMS), steps, dtype=torch.float64)
        self.prior = torch.zeros((), dtype=torch.float64)
        self.numbers = torch.zeros(0, dtype=torch.int64)
        self.totals = torch.zeros(0, dtype=torch.float64)

    def update(self, numbers: Tensor, found: Mapping[str, Tensor]) -> None:
        """What `bits_per_dim` gives of the images with these numbers (B,)."""
        self.sums += torch.stack([found[name].cpu().double().sum(0) for name in TERMS])
        self.prior += found["prior"].cpu().double().sum()
        self._append(numbers, found["total"].cpu().double())

    def _append(self, numbers: Tensor, totals: Tensor) -> None:
        self.numbers, self.totals = (
            torch.cat([self.numbers, numbers]),
            torch.cat([self.totals, totals]),
        )

    def merge(self, other: Terms) -> None:
        self.sums += other.sums
        self.prior += other.prior
        self._append(other.numbers, other.totals)

    def compute(self) -> tuple[Tensor, float, Tensor]:
        """Mean terms (3, T), mean prior, and bits of each image (N,) in the order of their numbers."""
        count = len(self.totals)
        return self.sums / count, float(self.prior / count), self.totals[self.numbers.argsort()]


def process_of(pipeline: ClassifierGuidedPipeline) -> Process:
    """The noise process that a pipeline's network was trained with.

    Raises:
        ValueError: for a latent model, whose bits aren't those of images, or a scheduler without betas.
    """
    scheduler, config = pipeline.scheduler, module_config(pipeline.unet)
    if pipeline.vae is not None:
        raise ValueError(
            "bits_per_dim: the model is of latents, and the bound would be of these, not of images"
        )
    if getattr(scheduler, "betas", None) is None:
        raise ValueError(
            f"bits_per_dim: a {type(scheduler).__name__} has no betas, which the bound is made of"
        )
    learned = config["out_channels"] == 2 * config["in_channels"]
    kind = scheduler.config.get("variance_type") or ("learned_range" if learned else "fixed_small")
    return Process(DDPMScheduler.from_config(scheduler.config, variance_type=kind))


def shape_of(pipeline: ClassifierGuidedPipeline) -> tuple[int, int, int]:
    """(C, H, W) of the network's images."""
    config = module_config(pipeline.unet)
    size = config["sample_size"]
    return (config["in_channels"], *((size, size) if isinstance(size, int) else size))


def measure(
    pipeline: ClassifierGuidedPipeline,
    images: Images,
    count: int,
    bootstrap: Bootstrap,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """The variational bound on -log2 p(x0) a dimension, of held-out images and the labels that they have.

        total = sum_t bound_t + prior;    each image's noise is of the seed and its number

    Every timestep is a call of the network for each batch. With several processes each measures its share.

    Args:
        images: of the network's shape.
        count: how many, evenly spread.
        bootstrap: its interval is that of the mean over images.

    Returns:
        `total` (a figure), `prior`, `terms`: a row a timestep with its `bound` and squared errors, `images`.

    Raises:
        ValueError: as `process_of`; for more images than there are, or labels that the network doesn't know.
    """
    if not 1 <= count <= len(images):
        raise ValueError(
            f"bits_per_dim={count}: 1 to {len(images)}, the images there are, is allowed"
        )
    process, state = process_of(pipeline), PartialState()
    classes = pipeline.num_labels or module_config(pipeline.unet).get("num_class_embeds")
    labelled = bool(module_config(pipeline.unet).get("num_class_embeds"))
    if labelled and not images.labelled:
        raise ValueError("bits_per_dim: the network is told labels, and the images have none")
    known, ids = {int(i): name for i, name in (pipeline.config.id2label or {}).items()}, None
    if labelled and named(images.names) and named(known):  # else they are matched by their ids
        ids = matched(images.names, known, "the real images", "the network")
    terms, device = Terms(len(process)), pipeline.device
    share = range(count)[state.process_index :: state.num_processes]
    with (
        evaluating(pipeline.unet),
        tqdm(
            total=len(share),
            desc="bits per dimension",
            unit="image",
            disable=not progress or not state.is_main_process,
        ) as bar,
    ):
        for start in range(0, len(share), batch_size):
            numbers = share[start : start + batch_size]
            some = [
                next(images.read(i * len(images) // count, i * len(images) // count + 1))
                for i in numbers
            ]
            labels = (
                torch.tensor([label if ids is None else ids[label] for _, label in some])
                if labelled
                else None
            )
            if labelled and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise ValueError(
                    f"bits_per_dim: the real images have the labels {labels.unique().tolist()[-5:]}, and "
                    f"the network knows the ids 0 to {classes - 1}"
                )
            found = bits_per_dim(
                pipeline.unet,
                process,
                torch.stack([image for image, _ in some]).to(device),
                None if labels is None else labels.to(device),
                generator=[image_generator(bootstrap.seed, i) for i in numbers],
            )
            terms.update(torch.tensor(numbers), found)
            bar.update(len(numbers))
    gather([terms])
    means, prior, totals = terms.compute()
    rows = [
        {"timestep": int(t), **dict(zip(TERMS, column, strict=True))}
        for t, column in zip(process.timesteps, means.T.tolist(), strict=True)
    ]
    return {
        "total": bootstrap.mean(totals, "less", float("inf")),
        "prior": prior,
        "terms": rows,
        "images": count,
    }
