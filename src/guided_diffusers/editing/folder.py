"""A folder of pictures, edited one batch at a time, resumable.

OUTPUT/manifest.json             settings, model revision, versions, "complete"
OUTPUT/NAME.png                  the edited picture of each INPUT/NAME.*
OUTPUT/comparisons/NAME.png      before, after and difference
OUTPUT/.records/NAME.json        written last: the picture is finished
OUTPUT/results.json              of all pictures: change, and probabilities before and after
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from ..checks import read_json
from ..files import folder_lock, write_json
from ..images import as_pair, down_sampling
from ..likelihood import parse_labels
from ..noise import module_config
from ..pipeline import ClassifierGuidedPipeline
from ..sampling import open_or_resume, run_settings, save_image, write_manifest
from .pictures import comparison

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
COMPARISONS, RECORDS, RESULTS = "comparisons", ".records", "results.json"


@dataclass(frozen=True)
class EditResult:
    """Result of `edit_folder`: numbers of pictures in the folder and before the call, seconds, and
    what `results.json` holds."""

    pictures: int
    before: int
    seconds: float
    results: dict[str, dict[str, Any]]


def edit_folder(
    pipeline: ClassifierGuidedPipeline,
    source: str | Path,
    output: str | Path,
    label: int | str | None,
    *,
    mask: str | Path | None = None,
    batch_size: int = 16,
    model: str | None = None,
    revision: str | None = None,
    progress: bool = True,
    **edit: Any,
) -> EditResult:
    """Edit the pictures of a folder that aren't finished yet; see the module for the files.

    Args:
        label: the new one, an id or a name; None: none.
        mask: a picture for all, or a folder with a picture of each one's name.
        model, revision: for the manifest, as in `sample_to_folder`.
        edit: further arguments of `pipeline.edit`.

    Raises:
        ValueError: before any work, for a picture or mask that can't be used, or another run's
            folder.
        OSError: for a file that can't be read or written. The run can be resumed.
    """
    start = time.perf_counter()
    source, output = Path(source), Path(output)
    files = find_pictures(source)
    check_pictures(pipeline, [source / file for file in files.values()])
    masks = find_masks(mask, files, source)
    arguments = {"pictures": digest([source / file for file in files.values()]), "label": label}
    arguments |= {"mask": None if mask is None else digest(sorted({*masks.values()})), **edit}
    settings = run_settings(pipeline, model, revision, arguments)
    with folder_lock(output):
        open_or_resume(output, settings)
        missing = [name for name in files if not _record(output, name).exists()]
        with tqdm(
            total=len(files),
            initial=len(files) - len(missing),
            unit="picture",
            disable=not progress,
        ) as bar:
            for first in range(0, len(missing), batch_size):
                names = missing[first : first + batch_size]
                edit_batch(
                    pipeline,
                    {name: source / files[name] for name in names},
                    masks,
                    output,
                    label,
                    edit,
                )
                bar.update(len(names))
        results = {name: read_json(_record(output, name)) for name in files}
        write_json(results, output / RESULTS)
        write_manifest(output, settings, complete=True)
    return EditResult(len(files), len(files) - len(missing), time.perf_counter() - start, results)


def find_pictures(source: Path) -> dict[str, Path]:
    """{name without suffix: path within the folder} of all pictures in a folder, sorted.

    Raises:
        ValueError: without any, or for two of one name.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; a folder of pictures is allowed")
    files: dict[str, Path] = {}
    for path in sorted(source.rglob("*")):
        file = path.relative_to(source)
        is_hidden = any(part.startswith(".") for part in file.parts)
        if path.suffix.lower() not in SUFFIXES or is_hidden:
            continue
        name = file.with_suffix("").as_posix()
        if name in files:
            raise ValueError(
                f"{source / files[name]} and {path}: both would be {name}.png; rename one"
            )
        if file.parts[0] == COMPARISONS:
            raise ValueError(f"{path}: the folder {COMPARISONS} is for the output; rename it")
        files[name] = file
    if not files:
        raise ValueError(f"{source} has no pictures ({', '.join(SUFFIXES)})")
    return files


def find_masks(mask: str | Path | None, files: Mapping[str, Path], source: Path) -> dict[str, Path]:
    """The path of each picture's mask; empty without masks.

    Raises:
        ValueError: for a missing mask, or one of another size than its picture.
    """
    if mask is None:
        return {}
    mask = Path(mask)
    masks = dict.fromkeys(files, mask)
    if mask.is_dir():
        found = find_pictures(mask)
        if absent := [name for name in files if name not in found]:
            raise ValueError(f"mask {mask} has no picture for {', '.join(absent[:5])}; add it")
        masks = {name: mask / found[name] for name in files}
    for name, path in masks.items():
        sizes = picture_size(path), picture_size(source / files[name])
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"mask {path} has {sizes[0][0]} x {sizes[0][1]} pixels, {source / files[name]} "
                f"{sizes[1][0]} x {sizes[1][1]}; one size is allowed"
            )
    return masks


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture's file.

    Raises:
        ValueError: naming the file, if it can't be read as one.
    """
    try:
        with Image.open(path) as picture:
            return picture.size
    except FileNotFoundError:
        raise ValueError(f"{path} doesn't exist; a picture is needed") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a picture: {error}") from None


def check_pictures(pipeline: ClassifierGuidedPipeline, paths: Sequence[Path]) -> None:
    """Check that the pictures have the size of the pipeline's images.

    Raises:
        ValueError: naming the first that doesn't.
    """
    size = module_config(pipeline.unet).get("sample_size")
    if size is None:
        return
    pixels = down_sampling(module_config(pipeline.vae))
    height, width = (pixels * side for side in as_pair(size))
    for path in paths:
        if picture_size(path) != (width, height):
            has = "{} x {}".format(*picture_size(path))
            raise ValueError(
                f"{path} has {has} pixels; the model's images have {width} x {height}: resize it"
            )


def read_picture(path: Path) -> Image.Image:
    """A picture, read completely.

    Raises:
        ValueError: naming the file, if it can't be read.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.copy()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a picture: {error}") from None


def edit_batch(
    pipeline: ClassifierGuidedPipeline,
    pictures: Mapping[str, Path],
    masks: Mapping[str, Path],
    output: Path,
    label: int | str | None,
    edit: Mapping[str, Any],
) -> None:
    """Edit pictures, {name: path}, and write their files."""
    images = [read_picture(path) for path in pictures.values()]
    region = [read_picture(masks[name]) for name in pictures] if masks else None
    result = pipeline.edit(images, label, mask=region, **edit)
    records = describe(pipeline, label, result)
    for i, name in enumerate(pictures):
        picture = comparison(images[i], result.images[i], result.difference[i], titles(records[i]))
        save_image(picture, output / COMPARISONS / f"{name}.png")
        save_image(result.images[i], output / f"{name}.png")
        write_json(records[i], _record(output, name))


def describe(
    pipeline: ClassifierGuidedPipeline, label: int | str | None, result: Any
) -> list[dict[str, Any]]:
    """For each image: the mean absolute change (1 is from black to white), and if a classifier knows
    it, the label and probability before and after, and that of the new label."""
    change = np.abs(result.difference).reshape(len(result.difference), -1).mean(1).tolist()
    records = [{"change": value} for value in change]
    if result.probabilities_before is None:
        return records
    names = module_config(pipeline.classifier).get("id2label") or pipeline.config.id2label or {}
    names = {int(i): str(name) for i, name in names.items()}
    new = None
    if label is not None:
        new = next(iter(parse_labels(label, names, pipeline.num_labels)[0]))
    for when in ("before", "after"):
        rows = getattr(result, f"probabilities_{when}").tolist()
        for record, row in zip(records, rows, strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            record[when] = {"label": names.get(best, str(best)), "probability": row[best]}
            if new is not None:
                record[when][f"p({names.get(new, new)})"] = row[new]
    return records


def titles(record: Mapping[str, Any]) -> list[str]:
    """Titles of a picture before and after the edit."""
    parts = []
    for when in ("before", "after"):
        guess = record.get(when)
        text = f": {guess['label']} {guess['probability']:.0%}" if guess else ""
        parts.append(when + text)
    return parts


def digest(paths: Sequence[Path]) -> str:
    """Hash of the names and contents of files."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]


def _record(output: Path, name: str) -> Path:
    return output / RECORDS / f"{name}.json"
