"""Images as an autoencoder's latents, encoded once and kept on disk.

A cache is a folder of safetensors files, SHARD images each, under a name that is a hash of all that decides what they
hold. A file is moved into place when it is whole, and the cache is whole when all files are there: whoever is killed
loses one file's work, and runs that encode the same images at the same time do no harm to each other.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, AutoModel, VQModel
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..images import encode
from .data import LabelledImages

if TYPE_CHECKING:
    from .options import Options

Autoencoder = AutoencoderKL | VQModel
SHARD = 256  # images a file
PIXELS = 2**21  # encoded at once


def load_vae(options: Options) -> Autoencoder | None:
    """The autoencoder of --vae in float32: a pipeline's `vae` or `vqvae`, or one of its own.

    Raises:
        ValueError: if there is none, or it is of another kind.
    """
    if (path := options.vae) is None:
        return None
    for subfolder in ("vae", "vqvae", None):
        try:
            vae = AutoModel.from_pretrained(path, subfolder=subfolder, torch_dtype=torch.float32)
            break
        except (OSError, ValueError) as error:
            reason = error
    else:
        raise ValueError(f"--vae {path}: {reason}") from reason
    if not isinstance(vae, Autoencoder):
        raise ValueError(
            f"--vae {path} holds a {type(vae).__name__}; AutoencoderKL and VQModel are allowed"
        )
    if vae.config.in_channels not in (1, 3):
        raise ValueError(
            f"--vae {path} encodes {vae.config.in_channels} channels; 1 and 3 are allowed"
        )
    return vae.requires_grad_(False)


class LatentImages(torch.utils.data.Dataset):
    """Items of `LabelledImages` with latents (C, h, w) as `"pixel_values"`, scaled as the diffusion model has them.

    An item is asked for by its index, which then is the seed, or by `(index, seed)`: from that seed alone come whether
    it is mirrored, and the draw from the autoencoder's posterior, if it has one. `write_latents` must come first.

    Args:
        images: not augmented.
        vae: whose latents these are.
        root: of all caches.
        random_flip: mirror half of the images, whose mirror images are encoded, too.

    Raises:
        ValueError: if the images' resolution is no multiple of what the autoencoder scales by.
    """

    def __init__(
        self, images: LabelledImages, vae: Autoencoder, root: Path, random_flip: bool = False
    ):
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        if images.resolution % scale:
            raise ValueError(
                f"--resolution {images.resolution}: the multiples of {scale} are allowed with this --vae"
            )
        self.images, self.random_flip = images, random_flip
        self.dataset, self.id2label = images.dataset, images.id2label
        self.resolution = images.resolution // scale
        self.channels = vae.config.get("vq_embed_dim") or vae.config.latent_channels
        count = math.ceil(len(images) / SHARD)
        folder = root / fingerprint(images, vae, random_flip)
        self.files = [folder / f"{k:05d}-of-{count:05d}.safetensors" for k in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def label(self, index: int) -> int:
        """The label of a row whose latents aren't read."""
        return self.images.label(index)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int]:
        index, seed = item if isinstance(item, tuple) else (item, item)
        file, row = opened(self.files[index // SHARD]), index % SHARD
        view = int(
            self.random_flip and random.Random(seed).random() < 0.5
        )  # as LabelledImages draws it
        latents = file.get_slice("mean")[row, view]
        if "std" in file.keys():
            eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
            latents = latents + file.get_slice("std")[row, view] * eps
        return {"pixel_values": latents, "label": self.images.label(index)}

    def encoded(self, vae: Autoencoder, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """`mean` and, with a posterior, `std`, (B, 1 or 2 with the mirror images, C, h, w), on the CPU."""
        views = [pixels, pixels.flip(-1)] if self.random_flip else [pixels]
        parts = zip(*(encode(vae, view) for view in views), strict=True)
        return {
            name: torch.stack(part, dim=1).cpu()
            for name, part in zip(("mean", "std"), parts, strict=True)
            if part[0] is not None
        }


@cache
def opened(path: Path) -> safe_open:
    """A file of latents, mapped into memory."""
    return safe_open(path, "pt")


def fingerprint(images: LabelledImages, vae: Autoencoder, random_flip: bool) -> str:
    """A hash of all that decides what a cache holds."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    settings = {
        "images": images.dataset._fingerprint,
        "image_column": images.image_column,
        "shard": SHARD,
        "resolution": images.resolution,
        "channels": images.channels,
        "center_crop": images.center_crop,
        "random_flip": random_flip,
        "vae": [type(vae).__name__, config],
    }
    digest = sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(save(vae.state_dict()))
    return digest.hexdigest()[:32]


@torch.no_grad()
def write_latents(
    options: Options, accelerator: Accelerator, vae: Autoencoder | None, *parts: LatentImages | None
) -> None:
    """Encode what is not there yet, with --vae; called on every process, of which each takes its share of the files.

    Raises:
        FloatingPointError: if a latent is NaN or infinite.
        ValueError: if a process doesn't see what the others wrote.
    """
    if vae is None:
        return
    device = vae.device
    vae.to(accelerator.device)
    try:
        for data in parts:
            if data is not None:
                write_files(options, accelerator, vae, data)
    finally:
        vae.to(device)


def write_files(
    options: Options, accelerator: Accelerator, vae: Autoencoder, data: LatentImages
) -> None:
    """The files of one split."""
    rank, world, files = accelerator.process_index, accelerator.num_processes, data.files
    files[0].parent.mkdir(parents=True, exist_ok=True)
    mine = [k for k in range(rank, len(files), world) if not files[k].exists()]
    at_once = max(1, PIXELS // data.images.resolution**2)
    batches = {
        k: list(torch.arange(k * SHARD, min((k + 1) * SHARD, len(data))).split(at_once))
        for k in mine
    }
    rows = [batch.tolist() for k in mine for batch in batches[k]]
    loader = DataLoader(data.images, batch_sampler=rows, num_workers=options.dataloader_num_workers)
    bar = tqdm(
        total=sum(map(len, rows)),
        desc="latents of this process",
        unit="image",
        disable=not (options.progress and accelerator.is_main_process and mine),
    )
    stream = iter(loader)
    for start in range(
        0, len(files), world
    ):  # in step: none waits for another longer than a collective may last
        if start + rank in batches:
            write_file(data, vae, files[start + rank], stream, len(batches[start + rank]), bar)
        accelerator.wait_for_everyone()
    bar.close()
    if missing := [file for file in files if not file.exists()]:
        raise ValueError(
            f"--latents_cache: {missing[0]} was written by another process and isn't there for this one; "
            "a folder that all processes share is allowed"
        )


def write_file(
    data: LatentImages,
    vae: Autoencoder,
    file: Path,
    stream: Iterator[dict[str, torch.Tensor]],
    batches: int,
    bar: tqdm,
) -> None:
    """Encode the next batches of `stream` into a file, written aside and moved into place."""
    parts = []
    for _ in range(batches):
        pixels = next(stream)["pixel_values"]
        parts.append(data.encoded(vae, pixels.to(vae.device)))
        bar.update(len(pixels))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise FloatingPointError(f"--vae: latents for {file} are NaN or infinite")
    aside = file.with_name(f"{file.name}.{uuid4().hex}.partial")
    try:
        save_file(tensors, aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
