"""Folders of .npy files as datasets."""

from __future__ import annotations

from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

NPY_COLUMN = "npy"  # of the files' paths
SPLITS = ("train", "validation", "test")


def has_npy_files(folder: Path) -> bool:
    """Whether the folder has .npy files, at any depth."""
    return next(folder.rglob("*.npy"), None) is not None


def load_npy_folder(folder: Path) -> DatasetDict:
    """Splits of a folder of .npy files: [SPLIT/][LABEL/]FILE.npy.

    A folder named train, validation or test is a split, else all files are the split `train`; a
    file's own folder is its label. The columns are `npy`, the files' paths, and `label`.

    Raises:
        ValueError: if some files have a label's folder and others don't.
    """
    paths: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.npy")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts):
            continue
        has_split = len(parts) > 1 and parts[0] in SPLITS
        paths.setdefault(parts[0] if has_split else SPLITS[0], []).append(path)
    labels: dict[Path, str | None] = {}
    for split, files in paths.items():
        for path in files:
            is_root = path.parent in (folder, folder / split)
            labels[path] = None if is_root else path.parent.name
    names = set(labels.values())
    if None in names and len(names) > 1:
        bare = next(path for path, name in labels.items() if name is None)
        raise ValueError(f"{bare} is in no label's folder, other files are; one way is allowed")
    splits = {}
    for split, files in paths.items():
        columns: dict[str, list] = {NPY_COLUMN: [str(path) for path in files]}
        features = {NPY_COLUMN: Value("string")}
        if None not in names:
            columns["label"] = [labels[path] for path in files]
            features["label"] = ClassLabel(names=sorted(names))
        splits[split] = Dataset.from_dict(columns, features=Features(features))
    return DatasetDict(splits)
