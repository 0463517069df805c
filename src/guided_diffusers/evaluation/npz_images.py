"""Images of an .npz file, as published evaluators read them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .dataset_images import Item

NPZ_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, ValueError)


class NpzImages:
    """An .npz file with arr_0, (N, H, H, 1 or 3) uint8, and for labels arr_1, (N,) ids.

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
        square = len(shape) == 4 and shape[1] == shape[2] and shape[3] in (1, 3)
        if not square or dtype != np.uint8 or fortran:
            raise ValueError(
                f"images: arr_0 of {path} is {shape} {dtype}; (N, H, H, 1 or 3) uint8 in C order "
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
