"""Batches of images whose labels and noise depend only on the seed and the image's index."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.utils.logging import get_logger
from tqdm.auto import tqdm

from ..guider import logger as guider_logger
from ..likelihood import Label
from ..pipeline import ClassifierGuidedPipeline
from ..utils import image_generator

logger = get_logger(__name__)


class WarnOnce(logging.Filter):
    """Context manager in which guidance logs a message only once, also if reentered."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = str(record.msg)  # without its numbers, which differ between batches
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new

    def __enter__(self) -> None:
        guider_logger.addFilter(self)

    def __exit__(self, *_: object) -> None:
        guider_logger.removeFilter(self)


def sample(
    pipeline: ClassifierGuidedPipeline,
    labels: Sequence[Label | None],
    seed: int = 0,
    batch_size: int = 64,
    indices: Sequence[int] | None = None,
    failed: list[int] | None = None,
    **call: Any,
) -> Iterator[tuple[list[int], Any]]:
    """Yield batches (indices, images); image i has label `labels[i % len(labels)]`.

    The label and all noise of image i, also that of a stochastic scheduler, depend only on the
    seed and i. With another batch size the network rounds differently: images differ by
    floating-point error, and in a few pixels after rounding to 8 bits.

    Args:
        labels: ids, names or mixtures; [None] for a network without labels.
        indices: indices of the images to generate. None: 0 to len(labels) - 1.
        failed: collects the indices of images that are not finite, which are then left out. None:
            such an image ends the run.
        call: further arguments of the pipeline's call, such as `guidance_scale`, `output_type`.

    Raises:
        FloatingPointError: without `failed`, for images that are not finite; its attribute `images`
            has their indices.
    """
    if indices is None:
        indices = range(len(labels))
    warn_once = WarnOnce()
    for start in range(0, len(indices), batch_size):
        batch = list(indices[start : start + batch_size])
        with warn_once:
            batch, images = _sample_batch(pipeline, labels, seed, batch, failed, call)
        if batch:
            yield batch, images


def _sample_batch(
    pipeline: ClassifierGuidedPipeline,
    labels: Sequence[Label | None],
    seed: int,
    batch: list[int],
    failed: list[int] | None,
    call: Mapping[str, Any],
) -> tuple[list[int], Any]:
    """Indices and images of a batch, without those that fail."""
    rows = finite = batch
    while finite:
        generators = [image_generator(seed, i) for i in rows]
        of_labels: dict[str, Any] = {"label": [labels[i % len(labels)] for i in rows]}
        if None in labels:
            of_labels = {"num_images_per_label": len(rows)}
        try:
            images = pipeline(**of_labels, generator=generators, **call).images
        except FloatingPointError as error:
            not_finite = sorted({rows[row] for row in getattr(error, "images", ())})
            if not not_finite:
                raise
            text = f"{list_images(not_finite)} of seed {seed}: {error}"
            if failed is None:
                raised = FloatingPointError(text)
                raised.images = not_finite
                raise raised from error
            if not failed:
                logger.warning(f"left out: {text}")
            failed += not_finite
            finite = [i for i in finite if i not in not_finite]
            # another image takes their place: in a smaller batch the network would round differently
            rows = [i if i in finite else finite[0] for i in batch] if finite else []
            continue
        if finite == batch:
            return batch, images
        kept = [row for row, i in enumerate(batch) if i in finite]
        return finite, images[kept] if hasattr(images, "shape") else [images[row] for row in kept]
    return [], []


def list_images(indices: Sequence[int]) -> str:
    """At most ten indices as text."""
    numbers = ", ".join(map(str, indices[:10]))
    if len(indices) == 1:
        return f"image {numbers}"
    return f"images {numbers}" + (f" and {len(indices) - 10} more" if len(indices) > 10 else "")


@contextmanager
def progress_bars(
    pipeline: ClassifierGuidedPipeline,
    num_images: int,
    batch_size: int,
    show: bool,
    initial: int = 0,
) -> Iterator[tqdm]:
    """Yields a bar of images to update; for a single batch, the pipeline shows its bar of steps."""
    settings = getattr(pipeline, "_progress_bar_config", {})
    show_steps = show and num_images <= batch_size
    hide_images = show_steps or not show
    pipeline.set_progress_bar_config(**{**settings, "disable": not show_steps, "unit": "step"})
    try:
        with tqdm(total=num_images, initial=initial, unit="image", disable=hide_images) as bar:
            yield bar
    finally:
        pipeline.set_progress_bar_config(**settings)
