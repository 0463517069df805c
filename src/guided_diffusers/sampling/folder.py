"""Large numbers of images in a folder, written in shards, by any number of processes, resumable.

    FOLDER/manifest.json                      settings, model revision, versions, "complete", and
                                              "failed", the images that are not finite, and
                                              "populations", the evidence of each, with particles
    FOLDER/LABEL/000012.png                   imagefolder, as `datasets` reads it
    FOLDER/data/train-00000-of-00196.parquet  parquet: `datasets.load_dataset(FOLDER)`
    FOLDER/samples.npz                        npz: arr_0 (N, H, W, 3) uint8, arr_1 (N,) labels
    FOLDER/.shards/00000.json                 record of a finished shard: its files and sizes

Shard s holds the images from s * shard_size on, generated in batches that start at its first
image. Its content therefore depends neither on the number of processes nor on interruptions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers.utils.logging import get_logger
from tqdm.auto import tqdm

from ..checks import MAX_SEED, check_number, shown
from ..cli_options import TIMEOUT_MINUTES
from ..files import folder_lock
from ..likelihood import Label, parse_labels
from ..pipeline import ClassifierGuidedPipeline
from .batches import WarnOnce, per_image, progress_bars, sample
from .manifest import open_or_resume, resolve_defaults, run_settings, unique_names, write_manifest
from .shards import Shards

logger = get_logger(__name__)
MAX_SHARDS = 10**6  # each has a record, which is read at every start


@dataclass(frozen=True)
class SampleResult:
    """Result of `sample_to_folder`."""

    images: int  # in the folder
    before: int  # of these, existing before the call
    seconds: float
    labels: tuple[int, ...]  # ids
    failed: tuple[int, ...] = ()  # in the main process: indices of images that are not finite
    populations: tuple[dict[str, Any], ...] = ()  # in the main process: of `population_summary`


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
    skip_failed: bool = False,
    model: str | None = None,
    revision: str | None = None,
    processes: PartialState | None = None,
    progress: bool = True,
    timeout_minutes: float = TIMEOUT_MINUTES,
    **call: Any,
) -> SampleResult:
    """Generate the missing ones of `num_images` images; image i has the label as in `sample`.

    Args:
        labels: ids or names.
        folder: a new or empty folder, or one of a run with the same settings, which is resumed, or
            extended if that had fewer images.
            With several machines, a folder that all of them share.
        batch_size: images per batch; at most `shard_size`.
        shard_size: images written together; a process that is killed loses at most these.
        format: file format, see the module's docstring.
        skip_failed: leave out images that are not finite, and list them in the manifest; a run that
            is resumed doesn't try them again. Otherwise such an image ends the run.
        model, revision: model name and revision for the manifest. None: the pipeline's class, and
            a hash of its weights and configs.
        processes: processes that share the work, each with its pipeline on its device. None: one.
        progress: show a progress bar in the main process.
        timeout_minutes: how long a process waits for the others while none of them finishes a
            shard; three times its own slowest shard, if that is longer.
        call: further arguments of the pipeline's call. The manifest stores numbers, strings, lists
            and mappings; of other objects (a guidance term) the name of the class. With `particles`,
            num_images and shard_size are multiples of it.

    Raises:
        ValueError: for an invalid argument; for a folder with other settings (the message lists
            them), with other content, or that another process uses.
        OSError: if a file can't be written, or the disk is too small for the images. Finished
            shards stay, and the run can be resumed.
        RuntimeError: if another process is waited for in vain.
        FloatingPointError: for images that are not finite; its attribute `images` has their
            indices. With `skip_failed`, if all of them are not finite.
    """
    start = time.perf_counter()
    ids = label_ids(pipeline, labels)
    check_number("seed", seed, 0, MAX_SEED, integer=True)
    sizes = {"num_images": num_images, "batch_size": batch_size, "shard_size": shard_size}
    for name, value in sizes.items():
        check_number(name, value, 1, MAX_SEED, integer=True)
    if -(-num_images // shard_size) > MAX_SHARDS:
        raise ValueError(
            f"num_images={num_images}, shard_size={shard_size}: up to {MAX_SHARDS} shards of "
            "shard_size images are allowed"
        )
    particles = call.get("particles") or 1
    for name in ("num_images", "shard_size"):
        if sizes[name] % particles:
            raise ValueError(
                f"{name}={sizes[name]}: with particles={particles}, whole populations, a multiple of it, "
                "are allowed"
            )
    if batch_size > shard_size:
        raise ValueError(f"batch_size={batch_size}: at most shard_size={shard_size} is allowed")
    kind = "np" if pipeline.has_arrays else "pil"
    if pipeline.has_arrays and format == "imagefolder":
        raise ValueError(
            "format='imagefolder': the pipeline's samples are arrays; npz and parquet are allowed"
        )
    names = unique_names(pipeline.config.id2label, max(pipeline.num_labels or 0, max(ids) + 1))
    of_images = per_image(ids, particles)
    shards = Shards(Path(folder), format, names, of_images, num_images, shard_size)
    arguments = {"format": format, "num_images": num_images, "labels": ids, "seed": seed}
    arguments |= {**sizes, **resolve_defaults(pipeline, call)}
    settings = run_settings(pipeline, model, revision, arguments)

    is_main = processes is None or processes.is_main_process
    if is_main:
        _warn_of_renamed(shards)
    with folder_lock(shards.folder) if is_main else nullcontext():
        missing = _missing_shards(shards, settings, processes)
        before = num_images - sum(len(shards.indices(shard)) for shard in missing)
        share = missing
        if processes is not None:
            share = missing[processes.process_index :: processes.num_processes]
        show = progress and is_main
        with WarnOnce(), progress_bars(pipeline, num_images, batch_size, show, before) as bar:
            generate = partial(sample, pipeline, ids, seed, batch_size, output_type=kind, **call)
            slowest = _write_shards(shards, share, generate, skip_failed, bar)
        if processes is not None:
            wait_for_shards(shards, missing, processes, max(60 * timeout_minutes, 3 * slowest))
            processes.wait_for_everyone()
        failed: list[int] = []
        populations: list[dict[str, Any]] = []
        if is_main:
            failed = shards.failed()
            if len(failed) == num_images:
                raise FloatingPointError(f"none of the {num_images} images is finite")
            shards.finish()
            populations = shards.populations()
            write_manifest(shards.folder, settings, True, failed, populations)
    seconds = time.perf_counter() - start
    results = tuple(ids), tuple(failed), tuple(populations)
    return SampleResult(num_images, before, seconds, *results)


def _warn_of_renamed(shards: Shards) -> None:
    """Log labels whose folder has another name."""
    renamed = []
    for label in sorted(set(shards.labels)):
        if shards.format == "imagefolder" and shards.folders[label] != shards.names[label]:
            renamed.append(f"{shards.names[label]!r:.50} has {shards.folders[label]!r:.50}")
    if renamed:
        more = f" and {len(renamed) - 5} more" if len(renamed) > 5 else ""
        logger.warning(
            f"labels whose names can't be folders on every system: {'; '.join(renamed[:5])}{more}"
        )


def _write_shards(
    shards: Shards,
    missing: Sequence[int],
    generate: Callable[..., Iterator[tuple[list[int], Any]]],
    skip_failed: bool,
    bar: tqdm,
) -> float:
    """Generate and write the missing shards of this process; `generate` is a part of `sample`.

    Returns:
        The longest time of a shard, seconds.
    """
    slowest = 0.0
    failed: list[int] | None = [] if skip_failed else None
    is_checked = False
    for shard in missing:
        began, content = time.monotonic(), []
        indices = shards.indices(shard)
        populations: list[dict[str, Any]] = []
        for _, images in generate(indices=indices, failed=failed, populations=populations):
            content += map(shards.encode, images)
            if not is_checked:
                shards.check_space(content, missing)
                is_checked = True
            # the bar counts the finished shards of all processes
            bar.update(max(0, shards.num_recorded_images() + len(content) - bar.n))
        missing_images = [i for i in failed or () if i in indices]
        shards.write(shard, content, missing_images, populations)
        slowest = max(slowest, time.monotonic() - began)
    return slowest


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
        open_or_resume(shards.folder, settings, extend=shards.extend)
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
    if not isinstance(labels, Sequence) or isinstance(labels, (str, bytes)) or not labels:
        raise ValueError(f"labels={shown(labels)}: a list of ids or names is allowed")
    ids = []
    weighted = parse_labels(list(labels), pipeline.config.id2label, pipeline.num_labels)
    for label, weights in zip(labels, weighted, strict=True):
        if list(weights.values()) != [1.0]:
            raise ValueError(
                f"label {label!r}: one label an image is allowed, since it is saved with the image"
            )
        ids += weights
    return ids
