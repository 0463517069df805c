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
from ..pipeline import ClassifierGuidedPipeline, GuidedImageOutput
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
    populations: list[dict[str, Any]] | None = None,
    **call: Any,
) -> Iterator[tuple[list[int], Any]]:
    """Yield batches (indices, images); image i has label `labels[i % len(labels)]`, or with
    `particles=K` in `call`, `labels[i // K % len(labels)]`.

    The label and all noise of image i, also that of a stochastic scheduler, depend only on the
    seed and i. With another batch size the network rounds differently: images differ by
    floating-point error, and in a few pixels after rounding to 8 bits.

    Args:
        labels: ids, names or mixtures; [None] for a network without labels.
        indices: indices of the images to generate. None: 0 to len(labels) - 1.
        failed: collects the indices of images that are not finite, which are then left out. None:
            such an image ends the run.
        populations: collects, with `particles`, what `population_summary` says of each population.
        call: further arguments of the pipeline's call, such as `guidance_scale`, `output_type`. With
            `particles`, a batch holds whole populations, one at least.

    Raises:
        ValueError: for indices that are not those of whole populations.
        FloatingPointError: without `failed`, for images that are not finite; its attribute `images`
            has their indices.
    """
    if indices is None:
        indices = range(len(labels))
    particles = call.get("particles") or 1
    if call.get("resample") is False:
        raise ValueError(
            "resample=False: images are sampled to be of equal weight; call the pipeline for weighted ones"
        )
    check_populations(indices, particles)
    labels = per_image(labels, particles)
    batch_size = max(batch_size - batch_size % particles, particles)
    warn_once = WarnOnce()
    for start in range(0, len(indices), batch_size):
        batch = list(indices[start : start + batch_size])
        with warn_once:
            batch, images, records = _sample_batch(pipeline, labels, seed, batch, failed, call)
        if populations is not None:
            populations += records
        if batch:
            yield batch, images


def per_image(labels: Sequence[Any], particles: int | None) -> list[Any]:
    """Labels of which image i has number i modulo their number, where each population has one of
    `labels` in turn."""
    return [label for label in labels for _ in range(particles or 1)]


def check_populations(indices: Sequence[int], particles: int) -> None:
    """Raise a ValueError unless the indices of images are those of whole populations, in a row."""
    for start in range(0, len(indices) if particles > 1 else 0, particles):
        first = indices[start] // particles * particles
        if list(indices[start : start + particles]) != list(range(first, first + particles)):
            raise ValueError(
                f"particles={particles}: the images {list_images(indices[start : start + particles])} "
                f"are no population; whole ones are allowed, such as {first} to {first + particles - 1}"
            )


def _sample_batch(
    pipeline: ClassifierGuidedPipeline,
    labels: Sequence[Label | None],
    seed: int,
    batch: list[int],
    failed: list[int] | None,
    call: Mapping[str, Any],
) -> tuple[list[int], Any, list[dict[str, Any]]]:
    """Indices, images and populations of a batch, without those that fail."""
    particles = call.get("particles") or 1
    rows = finite = batch
    while finite:
        generators = [image_generator(seed, i) for i in rows]
        of_labels: dict[str, Any] = {"label": [labels[i % len(labels)] for i in rows[::particles]]}
        if None in labels:
            of_labels = {"num_images_per_label": len(rows)}
        try:
            result = pipeline(**of_labels, generator=generators, **call)
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
            lost = {i // particles for i in not_finite}
            failed += [i for i in finite if i // particles in lost]
            finite = [i for i in finite if i // particles not in lost]
            # another population (an image without particles) takes the place of each that is lost:
            # in a smaller batch the network would round differently
            rows = []
            for start in range(0, len(batch) if finite else 0, particles):
                is_finite = batch[start] in finite
                rows += batch[start : start + particles] if is_finite else finite[:particles]
            continue
        images = result.images
        records = population_summary(result, [i // particles for i in rows[::particles]])
        if finite == batch:
            return batch, images, records
        kept = [row for row, i in enumerate(batch) if i in finite]
        images = images[kept] if hasattr(images, "shape") else [images[row] for row in kept]
        return finite, images, records
    return [], [], []


def population_summary(result: GuidedImageOutput, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """What a call says of each of its populations, without duplicates of a number: `population`, its
    number, `log_evidence`, `effective_sample_size`, and `ancestors`, how many there are."""
    if result.log_evidence is None:
        return []
    records = {}
    for row, number in enumerate(numbers):
        records[number] = {
            "population": number,
            "log_evidence": result.log_evidence[row].item(),
            "effective_sample_size": result.effective_sample_size[row].item(),
            "ancestors": len(result.ancestors[row].unique()),
        }
    return list(records.values())


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
