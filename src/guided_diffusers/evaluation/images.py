"""Images to evaluate: image folders, Parquet and .npz files, labelled datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow
import torch

from ..learning.data import LabelledImages, load_splits
from .dataset_images import DatasetImages, Item, NativeSizeImages, ParquetImages, Shape
from .npz_images import NpzImages

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Images(Protocol):
    """Images of one shape.

    Attributes:
        shape: (C, H, W).
        names: of the labels by id; {} without names.
        labelled: whether the images have labels.
        description: where they come from, as JSON.
    """

    shape: Shape
    names: dict[int, str]
    labelled: bool
    description: dict[str, Any]

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Item]:
        """Images `start` to `stop` - 1, (C, H, W) in [-1, 1], each with its label id or -1."""


def read_image(images: Images, i: int) -> torch.Tensor:
    """Image i, (C, H, W) in [-1, 1]."""
    return next(images.read(i, i + 1))[0]


def open_generated(
    path: str | Path,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Images:
    """Generated images: a folder of `guided-diffusers sample`, an .npz file, an image folder, or a
    labelled dataset.

    Args:
        path: a folder, a file, or a dataset's name on the Hub.
        split: of a dataset; without it a folder of Parquet files is read file by file, sorted by
            name.
        image_column, label_column: of Parquet files and datasets.

    Raises:
        ValueError: for images that are missing, incomplete, unreadable, or of several sizes.
    """
    folder = Path(path).expanduser()
    if folder.suffix == ".npz":
        return NpzImages(folder)
    manifest = read_manifest(folder)
    if not manifest.get("complete", True):
        raise ValueError(
            f"images: {folder} is incomplete according to its manifest; start `guided-diffusers "
            "sample` again to finish it"
        )
    images = _open_folder(folder, str(path), split, image_column, label_column, bool(manifest))
    expected = manifest.get("num_images", len(images))
    if len(images) != expected:
        raise ValueError(f"images: {folder} has {len(images)} images, its manifest says {expected}")
    images.description["path"] = str(path)
    if manifest:
        images.description["manifest"] = manifest
    return images


def _open_folder(
    folder: Path,
    name: str,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    sampled: bool,
) -> Images:
    """`open_generated` by the kinds of files in the folder; `sampled`: it has our manifest."""
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            files.setdefault(file.suffix.lower(), []).append(file)
    if len(files.get(".npz", [])) == 1:
        return NpzImages(files[".npz"][0])
    if ".parquet" in files and split is None:
        return ParquetImages(files[".parquet"], image_column, label_column)
    if split is None and IMAGE_SUFFIXES & files.keys():
        options: dict[str, Any] = {"data_dir": str(folder)}
        if sampled:  # each folder is a label, even a single one, or one named like a split
            options |= {"data_files": {"train": "**"}, "drop_labels": False}
        splits = _load("images", name, lambda: datasets.load_dataset("imagefolder", **options))
    else:
        splits = _load("images", name, lambda: load_splits(name))
    if split is None and len(splits) > 1:
        raise ValueError(f"images: {name} has the splits {sorted(splits)}; name one of them")
    dataset = _select_split(splits, split or next(iter(splits)), "images")
    return NativeSizeImages(dataset, image_column, label_column)


def open_real(
    dataset: str,
    shape: Shape,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Images:
    """A split of a dataset (default: validation, test or train), resized to the shape of the
    generated images.

    Raises:
        ValueError: for an unknown split, or colour images where the generated ones are grey.
    """
    splits = _load("dataset", dataset, lambda: load_splits(dataset))
    if not split:
        split = next((name for name in ("validation", "test", "train") if name in splits), None)
    rows = _select_split(splits, split, "dataset")
    options: dict[str, Any] = {"resolution": shape[1], "center_crop": True}
    data = LabelledImages(rows, image_column, label_column, **options)
    if data.channels > shape[0]:
        raise ValueError(
            f"dataset: {dataset} has colour images, the generated ones have {shape[0]} channel; "
            "grey images are needed"
        )
    if data.channels < shape[0]:
        data = LabelledImages(rows, image_column, label_column, channels=shape[0], **options)
    images = DatasetImages(data, data.id2label, data.label_column is not None)
    images.description = {
        "dataset": dataset,
        "split": split,
        "resolution": shape[1],
        "fingerprint": rows._fingerprint,
        "image_column": data.image_column,
        "label_column": data.label_column,
    }
    return images


def _load(
    argument: str, name: str, load: Callable[[], datasets.DatasetDict]
) -> datasets.DatasetDict:
    try:
        return load()
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise ValueError(f"{argument}: {name} can't be read: {error.__cause__ or error}") from error


def _select_split(
    splits: Mapping[str, datasets.Dataset], split: str | None, argument: str
) -> datasets.Dataset:
    if split not in splits:
        raise ValueError(f"{argument}: no split {split!r}; the dataset has {sorted(splits)}")
    return splits[split]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `guided-diffusers sample`; {} without one.

    Raises:
        ValueError: if it can't be read.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"images: {path} can't be read: {error}") from error
