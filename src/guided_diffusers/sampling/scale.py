"""Images by the ten thousands: in shards that are whole or absent, by any number of processes, killed and resumed.

    FOLDER/manifest.json                        all settings, the model's revision, versions; "complete" at the end
    FOLDER/LABEL/000012.png                     imagefolder: `datasets.load_dataset("imagefolder", data_dir=FOLDER)`
    FOLDER/data/train-00000-of-00196.parquet    parquet: `datasets.load_dataset(FOLDER)`
    FOLDER/samples.npz                          npz: arr_0 (N, H, W, 3) uint8, arr_1 (N,) labels; made of the shards
    FOLDER/.shards/00000.json                   of each shard that is done: its files, their sizes and CRC-32

Shard s is the images from s * shard_size on, made in batches from its first on: neither the processes nor the moments
at which they died have a say in what is in it, nor in which images share a batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..likelihood import Label, parse_labels
from ..pipeline import ClassifierGuidedPipeline
from .batches import Once, sample
from .manifest import all_settings, begin, settled, unique_names, write_manifest
from .shards import Shards


@dataclass(frozen=True)
class Made:
    """What `sample_to_folder` did: images in all, how many of them were there before, seconds, labels' ids."""

    images: int
    before: int
    seconds: float
    labels: tuple[int, ...]


def sample_to_folder(
    pipeline: ClassifierGuidedPipeline,
    labels: Sequence[int | str],
    folder: str | Path,
    num_images: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    shard_size: int = 256,
    format: Literal["imagefolder", "parquet", "npz"] = "imagefolder",
    model: str | None = None,
    revision: str | None = None,
    processes: PartialState | None = None,
    progress: bool = True,
    **call: Any,
) -> Made:
    """Make `num_images` images, image i with label `labels[i % len(labels)]`, or those of them that aren't there yet.

    Args:
        labels: ids or names.
        folder: new, empty, or of a run with the same settings, which goes on. With several machines one that all see.
        batch_size: images at once; at most `shard_size`.
        shard_size: images that are written together; what a process that dies loses at most.
        format: of the files, as above.
        model, revision: what the manifest calls the model. None: its class, and a hash of its weights and configs.
        processes: that share the work, each with a pipeline of its own on its device. None: this one alone.
        progress: show a progress bar, in the main process.
        call: further arguments of the pipeline's call. The manifest holds numbers, strings, lists and mappings as they
            are, of anything else (a term of guidance) the class's name.

    Raises:
        ValueError: for any other argument; for a folder of other settings, naming those, or of something else.
        OSError: for a disk that is full; what was written before stays, and is gone on from.
    """
    ids = label_ids(pipeline, labels)
    for name, value in (
        ("num_images", num_images),
        ("batch_size", batch_size),
        ("shard_size", shard_size),
    ):
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1 is allowed")
    if batch_size > shard_size:
        raise ValueError(f"batch_size={batch_size}: at most shard_size={shard_size} is allowed")
    names = unique_names(pipeline.config.id2label, max(pipeline.num_labels or 0, max(ids) + 1))
    shards = Shards(Path(folder), format, names, ids, num_images, shard_size)
    settings = all_settings(
        pipeline,
        model,
        revision,
        {
            "format": format,
            "num_images": num_images,
            "labels": ids,
            "seed": seed,
            "batch_size": batch_size,
            "shard_size": shard_size,
            **settled(pipeline, call),
        },
    )
    return _run(pipeline, shards, settings, seed, batch_size, processes, progress, call)


def _run(
    pipeline: ClassifierGuidedPipeline,
    shards: Shards,
    settings: Mapping[str, Any],
    seed: int,
    batch_size: int,
    processes: PartialState | None,
    progress: bool,
    call: Mapping[str, Any],
) -> Made:
    # 1. A folder of these settings
    began, main = time.perf_counter(), processes is None or processes.is_main_process
    rank, world = (
        (0, 1) if processes is None else (processes.process_index, processes.num_processes)
    )
    if main:
        begin(shards.folder, settings)
    if world > 1:
        processes.wait_for_everyone()
        if not main:
            begin(shards.folder, settings, written=True)

    # 2. What is missing, looked at by all, and known to all
    missing = shards.missing(range(rank, len(shards), world), progress and main)
    missing = sorted(gather_object(missing)) if world > 1 else missing
    if main and missing:
        write_manifest(shards.folder, settings, complete=False)
    left = sum(len(shards.indices(shard)) for shard in missing)

    # 3. This process's share of it
    one_batch = shards.num_images <= batch_size  # then the steps are worth a bar, else the images
    with (
        _steps_bar(pipeline, one_batch and progress and main),
        Once(),
        tqdm(
            total=shards.num_images,
            initial=shards.num_images - left,
            unit="image",
            disable=not progress or not main or one_batch,
        ) as bar,
    ):
        for shard in missing[rank::world]:
            content: list[Any] = []
            for indices, images in sample(
                pipeline,
                shards.labels,
                seed,
                batch_size,
                shards.indices(shard),
                output_type="pil",
                **call,
            ):
                content += map(shards.encoded, images)
                bar.update(
                    len(indices) if world == 1 else max(0, shards.done() + len(content) - bar.n)
                )
            shards.write(shard, content)

    # 4. All of it
    if world > 1:
        processes.wait_for_everyone()
    if main:
        shards.finish()
        write_manifest(shards.folder, settings, complete=True)
    return Made(
        shards.num_images,
        shards.num_images - left,
        time.perf_counter() - began,
        tuple(shards.labels),
    )


def label_ids(pipeline: ClassifierGuidedPipeline, labels: Sequence[Label]) -> list[int]:
    """Ids of labels, which may be names.

    Raises:
        ValueError: for an unknown label, or a mixture, which isn't one.
    """
    found = parse_labels(list(labels), pipeline.config.id2label, pipeline.num_labels)
    for label, one in zip(labels, found, strict=True):
        if list(one.values()) != [1.0]:
            raise ValueError(
                f"label {label!r}: one label an image is allowed, which is written beside it"
            )
    return [next(iter(one)) for one in found]


@contextmanager
def _steps_bar(pipeline: ClassifierGuidedPipeline, shown: bool) -> Iterator[None]:
    """Within, the pipeline shows its bar of steps, or doesn't."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**before, "disable": not shown, "unit": "step"})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
