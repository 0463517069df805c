"""Images to evaluate: image folders, Parquet and .npz files, labelled datasets."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from ..checks import read_json, shown
from ..images import config_size
from ..learning.arrays import arrays_of_shape, find_array_column
from ..learning.data import LabelledImages, check_all_read, load_splits
from ..learning.pixels import check_no_pixel_options
from .dataset_images import DatasetImages, Item, NativeSizeImages, ParquetImages, Shape

NPZ_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, ValueError)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Images(Protocol):
    """Images of one shape."""

    shape: Shape  #: (C, H, W)
    names: dict[int, str]  #: of the labels by id; {} without names
    labelled: bool  #: whether the images have labels
    description: dict[str, Any]  #: where they come from, as JSON

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
        return open_npz(folder)
    manifest = _read_manifest(folder)
    if not manifest.get("complete", True):
        raise ValueError(
            f"images: {folder} is incomplete according to its manifest; start `guided-diffusers "
            "sample` again to finish it"
        )
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            files.setdefault(file.suffix.lower(), []).append(file)
    if len(files.get(".npz", [])) == 1:
        images = open_npz(files[".npz"][0])
    elif (
        ".parquet" in files
        and split is None
        and not _has_arrays(files[".parquet"][0], image_column)
    ):
        images = ParquetImages(files[".parquet"], image_column, label_column)
    else:
        load = partial(load_splits, str(path))
        if split is None and IMAGE_SUFFIXES & files.keys():
            load = partial(datasets.load_dataset, "imagefolder", data_dir=str(folder))
            if manifest:  # each folder is a label, even a single one, or one named like a split
                load = partial(load, data_files={"train": "**"}, drop_labels=False)
        splits = _load("images", path, load)
        if not manifest and IMAGE_SUFFIXES & files.keys():
            check_all_read(folder, splits)
        if split is None and len(splits) > 1:
            raise ValueError(f"images: {path} has the splits {sorted(splits)}; name one of them")
        dataset = _select_split(splits, split or next(iter(splits)), "images")
        column = find_array_column(dataset, image_column, label_column)
        if column is not None:
            images = _array_images(dataset, column, label_column)
        else:
            images = NativeSizeImages(dataset, image_column, label_column)
    expected, failed = manifest.get("num_images", len(images)), manifest.get("failed", [])
    if not isinstance(expected, int) or not isinstance(failed, list):
        raise ValueError(
            f"images: {folder / 'manifest.json'} has num_images {shown(expected)} and failed "
            f"{shown(failed)}; a number and a list are allowed"
        )
    expected -= len(failed)
    if len(images) != expected:
        raise ValueError(f"images: {folder} has {len(images)} images, its manifest says {expected}")
    images.description["path"] = str(path)
    if manifest:
        images.description["manifest"] = manifest
    return images


def open_real(
    dataset: str,
    shape: Shape,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    image_range: tuple[float, float] | None = None,
    alpha_background: tuple[int, int, int] | None = None,
) -> Images:
    """A split of a dataset (default: validation, test or train), resized to the shape of the
    generated images; `image_range` and `alpha_background` as of `LabelledImages`.

    Raises:
        ValueError: for an unknown split, colour images where the generated ones are grey, or
            options of images for arrays.
    """
    splits = _load("dataset", dataset, partial(load_splits, dataset))
    if not split:
        split = next((name for name in ("validation", "test", "train") if name in splits), None)
    rows = _select_split(splits, split, "dataset")
    column = find_array_column(rows, image_column, label_column)
    pixels = {"image_range": image_range, "alpha_background": alpha_background}
    pixels = {name: value for name, value in pixels.items() if value is not None}
    if column is not None:
        check_no_pixel_options(column, pixels)
        images = _array_images(rows, column, label_column, shape)
        images.description = {"dataset": dataset, "split": split, "fingerprint": rows._fingerprint}
        images.description |= {"image_column": column, "label_column": images.items.label_column}
        return images
    resolution = config_size(shape[1:])
    options: dict[str, Any] = {"resolution": resolution, "center_crop": True, **pixels}
    data = LabelledImages(rows, image_column, label_column, **options)
    if data.channels > shape[0]:
        raise ValueError(
            f"dataset: {dataset} has colour images, the generated ones have {shape[0]} channel; "
            "grey images are needed"
        )
    if data.channels < shape[0]:
        data = LabelledImages(rows, image_column, label_column, channels=shape[0], **options)
    images = DatasetImages(data, data.id2label, data.label_column is not None)
    images.description = {"dataset": dataset, "split": split, "resolution": resolution}
    images.description |= {"fingerprint": rows._fingerprint}
    images.description |= {"image_column": data.image_column, "label_column": data.label_column}
    images.description |= pixels
    return images


def _array_images(
    rows: datasets.Dataset, column: str, label_column: str | None, shape: Shape | None = None
) -> DatasetImages:
    """Arrays (C, ...) in the data's units."""
    data = arrays_of_shape(rows, column, label_column, shape, scale=(0.0, 1.0))
    return DatasetImages(data, data.id2label, data.label_column is not None)


def _has_arrays(file: Path, column: str | None) -> bool:
    """Whether a Parquet file has a column of arrays, and none of images; False if it can't be read."""
    try:
        features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file))
    except (pyarrow.ArrowException, OSError):
        return False  # `ParquetImages` raises an error
    rows = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    return find_array_column(rows, column, None) is not None


def open_npz(path: Path) -> Images:
    """Images of an .npz file, or arrays if arr_0 has floating-point numbers (N, C, ...); those of the
    shape of images, (N, H, W, 1 or 3), are refused."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            shape, _, dtype = _npy_header(member)
            if dtype.kind != "f" or (len(shape) == 4 and shape[-1] in (1, 3)):
                return NpzImages(path)
            labels = _npz_labels(archive)
        arrays = np.load(path, allow_pickle=False)["arr_0"].astype(np.float32)
    except NPZ_ERRORS:
        return NpzImages(path)  # which names the error
    if arrays.ndim < 3 or (labels is not None and labels.shape != arrays.shape[:1]):
        raise ValueError(
            f"images: {path} has arr_0 {arrays.shape} and labels "
            f"{None if labels is None else labels.shape}; (N, C, ...) and (N,) are allowed"
        )
    if not np.isfinite(arrays).all():
        raise ValueError(f"images: {path} has infinite or NaN values; finite ones are allowed")
    numbers = [-1] * len(arrays) if labels is None else labels.tolist()
    rows = zip(torch.from_numpy(arrays), numbers, strict=True)
    items = [{"pixel_values": array, "label": label} for array, label in rows]
    images = DatasetImages(items, labelled=labels is not None)
    images.description["path"] = str(path)
    return images


def _load(
    argument: str, name: str | Path, load: Callable[[], datasets.DatasetDict]
) -> datasets.DatasetDict:
    """Datasets of all splits; `argument` and `name` are for the message of a ValueError."""
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


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `guided-diffusers sample`; {} without one."""
    path = folder / "manifest.json"
    return read_json(path) if path.is_file() else {}


class NpzImages:
    """An .npz file with arr_0, (N, H, W, 1 or 3) uint8, and for labels arr_1, (N,) ids.

    One image at a time is in memory.

    Raises:
        ValueError: for a file that is truncated, damaged, or holds other arrays.
    """

    def __init__(self, path: Path):
        self.path, self.names = path, {}
        self.description: dict[str, Any] = {"path": str(path)}
        try:
            with zipfile.ZipFile(path) as archive:
                self._labels = _npz_labels(archive)
                with archive.open("arr_0.npy") as member:
                    shape, fortran, dtype = _npy_header(member)
                    num_bytes = archive.getinfo("arr_0.npy").file_size - member.tell()
        except NPZ_ERRORS as error:
            raise ValueError(
                f"images: {path} can't be read; it is truncated, or no .npz with arr_0 ({error})"
            ) from error
        are_images = len(shape) == 4 and min(shape[1:3]) > 0 and shape[3] in (1, 3)
        if not are_images or dtype != np.uint8 or fortran:
            raise ValueError(
                f"images: arr_0 of {path} is {shape} {dtype}; (N, H, W, 1 or 3) uint8 in C order "
                "is allowed"
            )
        self._count, self.shape = shape[0], (shape[3], shape[1], shape[2])
        self._image_bytes = int(np.prod(shape[1:]))
        if num_bytes != self._count * self._image_bytes:
            raise ValueError(f"images: arr_0 of {path} is {shape} but has {num_bytes} bytes")
        self.labelled = self._labels is not None
        if self.labelled and self._labels.shape != (self._count,):
            raise ValueError(
                f"images: {path} has {self._count} images and labels of shape "
                f"{self._labels.shape}; one label an image is needed"
            )

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> Iterator[Item]:
        channels, height, width = self.shape
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
                _npy_header(member)
                member.seek(start * self._image_bytes, 1)
                for i in range(start, stop):
                    raw = member.read(self._image_bytes)
                    if len(raw) < self._image_bytes:
                        raise EOFError(f"image {i} is truncated")
                    pixels = torch.from_numpy(np.frombuffer(raw, np.uint8).astype(np.float32))
                    image = pixels.reshape(height, width, channels).permute(2, 0, 1) / 127.5 - 1
                    yield image, int(self._labels[i]) if self.labelled else -1
        except NPZ_ERRORS as error:
            raise ValueError(f"images: {self.path} can't be read: {error}") from error


def _npy_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype; moves `member` to the first byte of the data."""
    if np.lib.format.read_magic(member) == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def _npz_labels(archive: zipfile.ZipFile) -> np.ndarray | None:
    if "arr_1.npy" not in archive.namelist():
        return None
    with archive.open("arr_1.npy") as member:
        labels = np.lib.format.read_array(member, allow_pickle=False)
    if labels.dtype.kind not in "iu" or labels.size and labels.min() < 0:
        raise ValueError(f"arr_1 holds {labels.dtype}; ids from 0 are allowed")
    return labels
