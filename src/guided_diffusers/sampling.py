"""Labels and a seed -> images: image i depends on the seed and i alone, whatever the batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from math import ceil, isqrt, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .guidance import Label
from .pipeline import ClassifierGuidedPipeline


def image_generator(seed: int, index: int) -> torch.Generator:
    """The generator of image `index` of the images of a seed; no two (seed, index) share a stream."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def sample(pipeline: ClassifierGuidedPipeline, labels: Sequence[Label], seed: int = 0, batch_size: int = 64,
           indices: Sequence[int] | None = None, **call: Any) -> Iterator[tuple[list[int], Any]]:
    """Batches of (their indices, their images), image i with label `labels[i % len(labels)]`.

    Args:
        labels: ids, names or mixtures.
        indices: which images to make; by default one a label, 0 to len(labels) - 1.
        call: further arguments of the pipeline's call, such as `guidance_scale` and `output_type`.
    """
    indices = list(range(len(labels)) if indices is None else indices)
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        generators = [image_generator(seed, i) for i in batch]
        yield batch, pipeline([labels[i % len(labels)] for i in batch], generator=generators, **call).images


def grid(images: Sequence[Image.Image], names: Sequence[str] | None = None, smallest: int = 84) -> Image.Image:
    """One picture: a row a name with its images in order, or, with at most one name, a square.

    Args:
        images: of one size, the images of a name next to each other, equally many a name.
        names: of the rows, written in front.
        smallest: images narrower than this many pixels are enlarged by a whole factor.
    """
    factor = max(1, round(smallest / images[0].width))
    size = (images[0].width * factor, images[0].height * factor)
    rows = len(names) if names and len(names) > 1 else _rows(len(images))
    columns, margin = ceil(len(images) / rows), 0
    font = ImageFont.load_default(max(10, size[1] // 5))
    if names and len(names) > 1:
        margin = 12 + ceil(max(font.getlength(name) for name in names))
    picture = Image.new("RGB", (margin + columns * size[0], rows * size[1]), "white")
    for i, image in enumerate(images):
        place = (margin + i % columns * size[0], i // columns * size[1])
        picture.paste(image.convert("RGB").resize(size, Image.Resampling.NEAREST), place)
    for row, name in enumerate(names if margin else []):
        ImageDraw.Draw(picture).text((6, (row + 0.5) * size[1]), name, "black", font, "lm")
    return picture


def _rows(count: int) -> int:
    """Of a rectangle without holes that is no longer than five times its height, else of a square."""
    whole = max(rows for rows in range(1, isqrt(count) + 1) if count % rows == 0)
    return whole if count <= 5 * whole**2 else round(sqrt(count))


def save_image(image: Image.Image, path: Path) -> None:
    """Write under a temporary name, then move into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.partial{path.suffix}")
    image.save(aside)
    os.replace(aside, path)
