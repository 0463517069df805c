"""A folder of pictures or arrays, edited one batch at a time, resumable.

OUTPUT/manifest.json             settings, model revision, versions, "complete"
OUTPUT/NAME.png                  the edited picture of each INPUT/NAME.*
OUTPUT/comparisons/NAME.png      before, after and difference
OUTPUT/.records/NAME.json        written last: the picture is finished
OUTPUT/results.json              of all pictures: change, and probabilities before and after

Of arrays, NAME.npy and differences/NAME.npy, in the data's units.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..checks import read_json
from ..files import folder_lock, write_json
from ..likelihood import parse_labels
from ..noise import module_config
from ..pipeline import ClassifierGuidedPipeline
from ..sampling import open_or_resume, run_settings, write_manifest
from .files import Files, files_of

RECORDS, RESULTS = ".records", "results.json"


@dataclass(frozen=True)
class EditResult:
    """Result of `edit_folder`: numbers of pictures, or of arrays by `kind`, in the folder and before
    the call, seconds, and what `results.json` holds."""

    pictures: int
    before: int
    seconds: float
    results: dict[str, dict[str, Any]]
    kind: str = "picture"


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
    """Edit the pictures, or arrays, of a folder that aren't finished yet; see the module for the files.

    Args:
        label: the new one, an id or a name; None: none.
        mask: a picture for all, or a folder with a picture of each one's name; for arrays, arrays of
            numbers from 0 to 1 of their size, without channels.
        model, revision: for the manifest, as in `sample_to_folder`.
        edit: further arguments of `pipeline.edit`.

    Raises:
        ValueError: before any work, for a picture or mask that can't be used, or another run's
            folder.
        OSError: for a file that can't be read or written. The run can be resumed.
    """
    start = time.perf_counter()
    source, output = Path(source), Path(output)
    form = files_of(pipeline)
    files = find_files(form, source)
    form.check([source / file for file in files.values()])
    masks = find_masks(form, mask, files, source)
    arguments = {"pictures": digest([source / file for file in files.values()]), "label": label}
    arguments |= {"mask": None if mask is None else digest(sorted({*masks.values()})), **edit}
    settings = run_settings(pipeline, model, revision, arguments)
    with folder_lock(output):
        open_or_resume(output, settings)
        missing = [name for name in files if not _record(output, name).exists()]
        with tqdm(
            total=len(files),
            initial=len(files) - len(missing),
            unit=form.kind,
            disable=not progress,
        ) as bar:
            for first in range(0, len(missing), batch_size):
                names = missing[first : first + batch_size]
                paths = {name: source / files[name] for name in names}
                edit_batch(pipeline, form, paths, masks, output, label, edit)
                bar.update(len(names))
        results = {name: read_json(_record(output, name)) for name in files}
        write_json(results, output / RESULTS)
        write_manifest(output, settings, complete=True)
    seconds = time.perf_counter() - start
    return EditResult(len(files), len(files) - len(missing), seconds, results, form.kind)


def find_files(form: Files, source: Path) -> dict[str, Path]:
    """{name without suffix: path within the folder} of all pictures or arrays in a folder, sorted.

    Raises:
        ValueError: without any, or for two of one name.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; a folder of {form.kind}s is allowed")
    files: dict[str, Path] = {}
    for path in sorted(source.rglob("*")):
        file = path.relative_to(source)
        is_hidden = any(part.startswith(".") for part in file.parts)
        if path.suffix.lower() not in form.suffixes or is_hidden:
            continue
        name = file.with_suffix("").as_posix()
        if name in files:
            raise ValueError(
                f"{source / files[name]} and {path}: both would be {name}{form.suffix}; rename one"
            )
        if file.parts[0] == f"{form.beside}s":
            raise ValueError(f"{path}: the folder {form.beside}s is for the output; rename it")
        files[name] = file
    if not files:
        raise ValueError(f"{source} has no {form.kind}s ({', '.join(form.suffixes)})")
    return files


def find_masks(
    form: Files, mask: str | Path | None, files: Mapping[str, Path], source: Path
) -> dict[str, Path]:
    """The path of each file's mask; empty without masks.

    Raises:
        ValueError: for a missing mask, or one of another size than its picture or array.
    """
    if mask is None:
        return {}
    mask = Path(mask)
    masks = dict.fromkeys(files, mask)
    if mask.is_dir():
        found = find_files(form, mask)
        if absent := [name for name in files if name not in found]:
            raise ValueError(f"mask {mask} has no {form.kind} for {', '.join(absent[:5])}; add it")
        masks = {name: mask / found[name] for name in files}
    for name, path in masks.items():
        form.check_mask(path, source / files[name])
    return masks


def edit_batch(
    pipeline: ClassifierGuidedPipeline,
    form: Files,
    paths: Mapping[str, Path],
    masks: Mapping[str, Path],
    output: Path,
    label: int | str | None,
    edit: Mapping[str, Any],
) -> None:
    """Edit files, {name: path}, and write theirs."""
    region = form.read_masks([masks[name] for name in paths]) if masks else None
    result = pipeline.edit(form.read([*paths.values()]), label, mask=region, **edit)
    records = describe(pipeline, label, result)
    for i, (name, path) in enumerate(paths.items()):
        beside = output / f"{form.beside}s" / f"{name}{form.suffix}"
        form.save(path, output / f"{name}{form.suffix}", beside, result, i, titles(records[i]))
        write_json(records[i], _record(output, name))


def describe(
    pipeline: ClassifierGuidedPipeline, label: int | str | None, result: Any
) -> list[dict[str, Any]]:
    """For each image: the mean absolute change (1 is from black to white; of arrays in their units),
    and if a classifier knows it, the label and probability before and after, and that of the new
    label."""
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
