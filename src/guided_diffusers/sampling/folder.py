"""Large numbers of images in a folder, written in shards, by any number of processes, resumable.

    FOLDER/manifest.json                      settings, model revision, versions, "complete"
    FOLDER/LABEL/000012.png                   imagefolder, as `datasets` reads it
    FOLDER/data/train-00000-of-00196.parquet  parquet: `datasets.load_dataset(FOLDER)`
    FOLDER/samples.npz                        npz: arr_0 (N, H, W, 3) uint8, arr_1 (N,) labels
    FOLDER/.shards/00000.json                 record of a finished shard: its files and sizes

Shard s holds the images from s * shard_size on, generated in batches that start at its first
image. Its content therefore depends neither on the number of processes nor on interruptions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..cli_options import TIMEOUT_MINUTES
from ..likelihood import Label, parse_labels
from ..pipeline import ClassifierGuidedPipeline
from .batches import WarnOnce, progress_bars, sample
from .manifest import open_or_resume, resolve_defaults, run_settings, unique_names, write_manifest
from .shards import Shards


@dataclass(frozen=True)
class SampleResult:
    """Result of `sample_to_folder`."""

    images: int  # in the folder
    before: int  # of these, existing before the call
    seconds: float
    labels: tuple[int, ...]  # ids


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
    timeout_minutes: float = TIMEOUT_MINUTES,
    **call: Any,
) -> SampleResult:
    """Generate the missing ones of `num_images` images; image i has `labels[i % len(labels)]`.

    Args:
        labels: ids or names.
        folder: a new or empty folder, or one of a run with the same settings, which is resumed.
            With several machines, a folder that all of them share.
        batch_size: images per batch; at most `shard_size`.
        shard_size: images written together; a process that is killed loses at most these.
        format: file format, see the module's docstring.
        model, revision: model name and revision for the manifest. None: the pipeline's class, and
            a hash of its weights and configs.
        processes: processes that share the work, each with its pipeline on its device. None: one.
        progress: show a progress bar in the main process.
        timeout_minutes: how long a process waits for the others while none of them finishes a
            shard; three times its own slowest shard, if that is longer.
        call: further arguments of the pipeline's call. The manifest stores numbers, strings, lists
            and mappings; of other objects (a guidance term) the name of the class.

    Raises:
        ValueError: for an invalid argument; for a folder with other settings (the message lists
            them) or with other content.
        OSError: if a file can't be written. Finished shards stay, and the run can be resumed.
        RuntimeError: if another process is waited for in vain.
    """
    start = time.perf_counter()
    ids = label_ids(pipeline, labels)
    sizes = {"num_images": num_images, "batch_size": batch_size, "shard_size": shard_size}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1 is allowed")
    if batch_size > shard_size:
        raise ValueError(f"batch_size={batch_size}: at most shard_size={shard_size} is allowed")
    names = unique_names(pipeline.config.id2label, max(pipeline.num_labels or 0, max(ids) + 1))
    shards = Shards(Path(folder), format, names, ids, num_images, shard_size)
    arguments = {"format": format, "num_images": num_images, "labels": ids, "seed": seed}
    arguments |= {**sizes, **resolve_defaults(pipeline, call)}
    settings = run_settings(pipeline, model, revision, arguments)

    missing = _missing_shards(shards, settings, processes)
    before = num_images - sum(len(shards.indices(shard)) for shard in missing)
    is_main, share, slowest = processes is None or processes.is_main_process, missing, 0.0
    if processes is not None:
        share = missing[processes.process_index :: processes.num_processes]
    show = progress and is_main
    with WarnOnce(), progress_bars(pipeline, num_images, batch_size, show, before) as bar:
        for shard in share:
            content: list[Any] = []
            began = time.monotonic()
            batches = sample(
                pipeline, ids, seed, batch_size, shards.indices(shard), output_type="pil", **call
            )
            for _, images in batches:
                content += map(shards.encode, images)
                # the bar counts the finished shards of all processes
                bar.update(max(0, shards.num_recorded_images() + len(content) - bar.n))
            shards.write(shard, content)
            slowest = max(slowest, time.monotonic() - began)

    if processes is not None:
        wait_for_shards(shards, missing, processes, max(60 * timeout_minutes, 3 * slowest))
        processes.wait_for_everyone()
    if is_main:
        shards.finish()
        write_manifest(shards.folder, settings, complete=True)
    return SampleResult(num_images, before, time.perf_counter() - start, tuple(ids))


def wait_for_shards(
    shards: Shards, numbers: Sequence[int], processes: PartialState, seconds: float
) -> None:
    """Wait until these shards are finished, which the processes make in turns.

    Args:
        seconds: how long without another finished shard.

    Raises:
        RuntimeError: after that; it names the processes.
    """
    missing, since = list(numbers), time.monotonic()
    while True:
        now_missing = [shard for shard in missing if not shards.is_recorded(shard)]
        if not now_missing:
            return
        if now_missing != missing:
            missing, since = now_missing, time.monotonic()
        if time.monotonic() - since > seconds:
            ranks = {numbers.index(shard) % processes.num_processes for shard in missing}
            raise RuntimeError(
                f"process {processes.process_index} waited {seconds / 60:g} minutes for "
                f"{len(missing)} of {len(shards)} shards of {shards.folder}, of process "
                f"{', '.join(map(str, sorted(ranks)))}, which is stopped, lost or slower than that; "
                "--timeout-minutes sets the limit, and the same command goes on"
            )
        time.sleep(min(1.0, seconds / 10))


def _missing_shards(
    shards: Shards, settings: Mapping[str, Any], processes: PartialState | None
) -> list[int]:
    """Open the folder; return the shards to generate, the same list in every process."""
    is_main = processes is None or processes.is_main_process
    missing: list[int] = []
    if is_main:
        open_or_resume(shards.folder, settings)
        missing = shards.missing()
        if missing:
            write_manifest(shards.folder, settings, complete=False)
    if processes is not None:
        missing = broadcast_object_list([missing])[0]  # the others wait for the main process
    if not is_main:
        open_or_resume(shards.folder, settings, created=True)
    return missing


def label_ids(pipeline: ClassifierGuidedPipeline, labels: Sequence[Label]) -> list[int]:
    """Ids of labels given as ids or names; mixtures are refused."""
    ids = []
    weighted = parse_labels(list(labels), pipeline.config.id2label, pipeline.num_labels)
    for label, weights in zip(labels, weighted, strict=True):
        if list(weights.values()) != [1.0]:
            raise ValueError(
                f"label {label!r}: one label an image is allowed, since it is saved with the image"
            )
        ids += weights
    return ids
