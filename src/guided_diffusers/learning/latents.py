"""Images as an autoencoder's latents, encoded once and kept on disk.

A cache is a folder of safetensors files of IMAGES_PER_FILE images each. Its name is a hash of all
that decides its content. A file is moved into place when it is complete, and the cache is complete
when all files are: a killed run loses the work of one file, and runs that encode the same images
concurrently don't disturb each other.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from itertools import chain
from pathlib import Path
from uuid import uuid4

import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import AutoencoderKL, AutoModel, VQModel
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..cli_options import TIMEOUT_MINUTES
from ..images import config_size, encode
from ..weights import load_checked
from .batches import limited_wait
from .data import LabelledImages
from .options import check_multiple

Autoencoder = AutoencoderKL | VQModel
IMAGES_PER_FILE = 256
PIXELS_PER_BATCH = 2**21  # when encoding


def load_vae(path: str | None) -> Autoencoder | None:
    """The autoencoder of --vae in float32: a pipeline's `vae` or `vqvae`, or an autoencoder's folder."""
    if path is None:
        return None
    for subfolder in ("vae", "vqvae", None):
        try:
            load, dtype = AutoModel.from_pretrained, torch.float32
            vae = load_checked(load, path, subfolder=subfolder, torch_dtype=dtype)
            break
        except OSError as error:
            reason = error
        except TypeError as error:  # AutoModel's, of a pipeline's model_index.json
            reason = error
        except ValueError as error:
            raise ValueError(f"--vae {path}: {error}") from error
    else:
        if (Path(path) / "model_index.json").is_file():
            raise ValueError(f"--vae {path}: it is a pipeline without a vae or vqvae")
        raise ValueError(f"--vae {path}: {reason}") from reason
    name, channels = type(vae).__name__, vae.config.get("in_channels")
    for ok, message in (
        (isinstance(vae, Autoencoder), f"holds a {name}; AutoencoderKL and VQModel are allowed"),
        (channels in (1, 3), f"encodes {channels} channels; 1 and 3 are allowed"),
    ):
        if not ok:
            raise ValueError(f"--vae {path} {message}")
    return vae.requires_grad_(False)


class LatentImages(torch.utils.data.Dataset):
    """Items of `LabelledImages` whose "pixel_values" are latents (C, h, w), scaled for the denoiser.

    An item's key is its index, which then is the seed, or `(index, seed)`: the seed decides whether
    it is mirrored, and the sample of the autoencoder's posterior, if it has one. `images` aren't
    augmented; with `random_flip`, mirror images are encoded, too. `root` is the folder of all
    caches. `write_latents` must be called first.
    """

    def __init__(
        self, images: LabelledImages, vae: Autoencoder, root: Path, random_flip: bool = False
    ):
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        check_multiple(images.resolution, scale, "with this --vae")
        self.images, self.random_flip = images, random_flip
        self.dataset, self.id2label = images.dataset, images.id2label
        self.resolution = config_size([side // scale for side in images.size])
        self.channels = vae.config.get("vq_embed_dim") or vae.config.latent_channels
        count = math.ceil(len(images) / IMAGES_PER_FILE)
        folder = root / fingerprint(images, vae, random_flip)
        self.files = [folder / f"{k:05d}-of-{count:05d}.safetensors" for k in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def whole(self) -> Dataset:
        return self.images.whole

    def number(self, index: int) -> int:
        return self.images.number(index)

    def label(self, index: int) -> int:
        return self.images.label(index)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, torch.Tensor | int]:
        index, seed = item if isinstance(item, tuple) else (item, item)
        file, row = open_cached(self.files[index // IMAGES_PER_FILE]), index % IMAGES_PER_FILE
        # 1: the mirror image, drawn as in `LabelledImages`
        view = int(self.random_flip and random.Random(seed).random() < 0.5)
        latents = file.get_slice("mean")[row, view]
        if "std" in file.keys():
            eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
            latents = latents + file.get_slice("std")[row, view] * eps
        return {"pixel_values": latents, "label": self.images.label(index)}


@cache
def open_cached(path: Path) -> safe_open:
    """A file of latents, mapped into memory."""
    return safe_open(path, "pt")


def fingerprint(images: LabelledImages, vae: Autoencoder, random_flip: bool) -> str:
    """A hash of all that decides the content of a cache."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    names = ("image_column", "resolution", "channels", "center_crop")
    settings = {name: getattr(images, name) for name in names}
    for name in ("image_range", "alpha_background"):  # without them, as caches were named before
        if (value := getattr(images, name)) is not None:
            settings[name] = value
    settings |= {"images": images.dataset._fingerprint, "shard": IMAGES_PER_FILE}
    settings |= {"random_flip": random_flip, "vae": [type(vae).__name__, config]}
    digest = sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(save(vae.state_dict()))
    return digest.hexdigest()[:32]


@torch.no_grad()
def write_latents(
    accelerator: Accelerator,
    vae: Autoencoder | None,
    *splits: LatentImages | None,
    workers: int = 0,
    timeout_minutes: float = TIMEOUT_MINUTES,
    progress: bool = True,
) -> None:
    """Encode the images that aren't cached yet; each process writes its share of the files.

    Raises `FloatingPointError` if a latent is NaN or infinite, and `ValueError` if a process doesn't
    see the files of the others.
    """
    if vae is None:
        return
    device = vae.device
    vae.to(accelerator.device)
    try:
        for data in splits:
            if data is not None:
                write_split(accelerator, vae, data, workers, timeout_minutes, progress)
    finally:
        vae.to(device)


def write_split(
    accelerator: Accelerator,
    vae: Autoencoder,
    data: LatentImages,
    workers: int,
    timeout_minutes: float,
    progress: bool,
) -> None:
    """Encode the images of one split that aren't cached yet."""
    rank, world, files = accelerator.process_index, accelerator.num_processes, data.files
    files[0].parent.mkdir(parents=True, exist_ok=True)
    batch_size = max(1, PIXELS_PER_BATCH // math.prod(data.images.size))
    batches: dict[int, list[list[int]]] = {}  # by file, of this process
    for k in range(rank, len(files), world):
        if not files[k].exists():
            rows = torch.arange(k * IMAGES_PER_FILE, min((k + 1) * IMAGES_PER_FILE, len(data)))
            batches[k] = [batch.tolist() for batch in rows.split(batch_size)]
    order = list(chain.from_iterable(batches.values()))
    loader = iter(DataLoader(data.images, batch_sampler=order, num_workers=workers))
    is_shown = progress and accelerator.is_main_process and batches
    total, title = sum(map(len, order)), "latents of this process"
    bar = tqdm(total=total, desc=title, unit="image", disable=not is_shown)
    # In lockstep, so that no process waits longer for another than a collective operation may take.
    with limited_wait(timeout_minutes) as next_batch:
        pixels = (next_batch(loader) for _ in order)
        for start in range(0, len(files), world):
            if (k := start + rank) in batches:
                write_file(data, vae, files[k], pixels, len(batches[k]), bar)
            accelerator.wait_for_everyone()
    bar.close()
    if missing := [file for file in files if not file.exists()]:
        raise ValueError(
            f"--latents_cache: {missing[0]} was written by another process, which this process "
            "doesn't see; a folder that all processes share is allowed"
        )


def write_file(
    data: LatentImages,
    vae: Autoencoder,
    file: Path,
    batches: Iterator[dict[str, torch.Tensor]],
    count: int,
    bar: tqdm,
) -> None:
    """Encode the next `count` batches into a file of (images, 1, or 2 with mirror images, C, h, w)."""
    parts: dict[str, list[torch.Tensor]] = {"mean": [], "std": []}
    for _ in range(count):
        pixels = next(batches)["pixel_values"].to(vae.device)
        views = [pixels, pixels.flip(-1)] if data.random_flip else [pixels]
        encoded = [encode(vae, view) for view in views]
        for name, latents in zip(parts, zip(*encoded, strict=True), strict=True):
            if latents[0] is not None:  # without a posterior there is no `std`
                parts[name].append(torch.stack(latents, dim=1).cpu())
        bar.update(len(pixels))
    tensors = {name: torch.cat(latents) for name, latents in parts.items() if latents}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise FloatingPointError(f"--vae: latents for {file} are NaN or infinite")
    partial = file.with_name(f"{file.name}.{uuid4().hex}.partial")
    try:
        save_file(tensors, partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
