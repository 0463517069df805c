"""Images to be evaluated, one at a time: folders of pictures, Parquet shards, .npz files, any labelled data set."""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from ..learning.data import CorruptImage, LabelledImages, load_splits
from ..sampling.manifest import as_folder, folder_names, unique_names

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
Item = tuple[torch.Tensor, int]  # (C, H, W) in [-1, 1], and its label's id or -1


class Images(Protocol):
    """Images of one shape (C, H, W), the names of their labels by id ({}: no names), and whether they have labels."""

    shape: tuple[int, int, int]
    names: dict[int, str]
    labelled: bool
    description: dict[str, Any]

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Item]:
        """The images `start` to `stop` - 1."""


def open_generated(
    path: str | Path,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Images:
    """Generated images: a folder of `guided-diffusers sample`, an .npz file, an image folder, or a labelled data set.

    Args:
        path: a folder, a file, or a data set's name on the Hub.
        split: of a data set; by default a folder of Parquet files is read as a whole, in the order of their names.
        image_column, label_column: of Parquet files and data sets.

    Raises:
        ValueError: for what isn't there, isn't complete, can't be read, or has images of several sizes.
    """
    folder = Path(path).expanduser()
    if folder.suffix == ".npz":
        return Arrays(folder)
    if (manifest := read_manifest(folder)) and not manifest.get("complete", True):
        raise ValueError(
            f"images: {folder} isn't complete, as its manifest says; start `guided-diffusers sample` "
            "again, which goes on where it was"
        )
    shown = [
        one
        for one in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in one.relative_to(folder).parts)
    ]
    arrays, shards = (
        [one for one in shown if one.suffix == suffix] for suffix in (".npz", ".parquet")
    )
    if len(arrays) == 1:
        found: Images = Arrays(arrays[0])
    elif shards and split is None:
        found = Shards(shards, image_column, label_column)
    else:
        pictures = split is None and any(one.suffix.lower() in PICTURES for one in shown)
        # of ours every folder is a label, also an only one, or one that is called as a split is
        ours = {"data_files": {"train": "**"}, "drop_labels": False} if manifest else {}
        splits = _loaded(
            lambda: (
                datasets.load_dataset("imagefolder", data_dir=str(folder), **ours)
                if pictures
                else load_splits(str(path))
            ),
            "images",
            str(path),
        )
        if split is None and len(splits) > 1:
            raise ValueError(f"images: {path} has the splits {sorted(splits)}; name one")
        found = Rows.native(
            _split(splits, split or next(iter(splits)), "images"), image_column, label_column
        )
    expected = (manifest or {}).get("num_images", len(found))
    if len(found) != expected:
        raise ValueError(f"images: {folder} has {len(found)} images, its manifest says {expected}")
    found.description |= {"path": str(path), **({"manifest": manifest} if manifest else {})}
    return found


def open_real(
    dataset: str,
    shape: tuple[int, int, int],
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Images:
    """A split of a data set (default: validation, test or train) in the shape of the generated images.

    Raises:
        ValueError: for a split that isn't there, or images in colour where the generated ones are grey.
    """
    splits = _loaded(lambda: load_splits(dataset), "dataset", dataset)
    split = split or next(
        (name for name in ("validation", "test", "train") if name in splits), None
    )
    rows = _split(splits, split, "dataset")
    data = LabelledImages(rows, image_column, label_column, shape[1], center_crop=True)
    if data.channels > shape[0]:
        raise ValueError(
            f"dataset: its images are in colour, the generated ones have {shape[0]} channel"
        )
    data = LabelledImages(
        rows, image_column, label_column, shape[1], center_crop=True, channels=shape[0]
    )
    found = Rows(data, data.id2label, data.label_column is not None)
    found.description |= {
        "dataset": dataset,
        "split": split,
        "resolution": shape[1],
        "fingerprint": rows._fingerprint,
        "image_column": data.image_column,
        "label_column": data.label_column,
    }
    return found


def _loaded(
    load: Callable[[], datasets.DatasetDict], argument: str, name: str
) -> datasets.DatasetDict:
    try:
        return load()
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise ValueError(f"{argument}: {name} can't be read: {error.__cause__ or error}") from error


def _split(
    splits: Mapping[str, datasets.Dataset], split: str | None, argument: str
) -> datasets.Dataset:
    if split not in splits:
        raise ValueError(f"{argument}: split {split!r} isn't there; it has {sorted(splits)}")
    return splits[split]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `guided-diffusers sample`, where there is one.

    Raises:
        ValueError: if it can't be read.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"images: {path} can't be read: {error}") from error


class Rows:
    """Items `{"pixel_values": (C, H, W) in [-1, 1], "label": id}`, as `LabelledImages` or a list.

    Args:
        items: of one shape.
        names: of the labels, by id.
        labelled: whether the labels mean anything.
        check: is told of an item before it is read, and raises where it doesn't fit.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        names: Mapping[int, str] | None = None,
        labelled: bool = True,
        check: Callable[[int], None] = lambda i: None,
    ):
        if len(items) == 0:
            raise ValueError("images: there are none")
        self.items, self.names, self.labelled, self.check = (
            items,
            dict(names or {}),
            labelled,
            check,
        )
        self.shape = tuple(items[0]["pixel_values"].shape)
        self.description: dict[str, Any] = {}

    @classmethod
    def native(
        cls,
        rows: datasets.Dataset,
        image_column: str | None,
        label_column: str | None,
        names: dict[int, str] | None = None,
        shape: tuple[int, int, int] | None = None,
    ) -> Rows:
        """Rows of a data set as they are, where all are squares of one size: that of `shape`, else of the first."""
        column = LabelledImages(rows, image_column, label_column, channels=1).image_column
        encoded = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))

        def size(i: int) -> tuple[int, int]:
            raw = encoded[i][column]
            try:
                return Image.open(io.BytesIO(raw["bytes"]) if raw["bytes"] else raw["path"]).size
            except (OSError, TypeError) as error:
                name = f" ({raw['path']})" if raw and raw["path"] else ""
                raise CorruptImage(
                    f"images: that of row {i}{name} can't be read: {error}"
                ) from error

        width, height = size(0) if shape is None else shape[:0:-1]
        if width != height:
            raise ValueError(
                f"images: they are {width} by {height}; only square ones can be evaluated"
            )

        def check(i: int) -> None:
            if (found := size(i)) != (width, height):
                raise ValueError(
                    f"images: that of row {i} is {found[0]} by {found[1]}, others are {width} by {height}"
                )

        check(0)
        data = LabelledImages(
            rows,
            image_column,
            label_column,
            width,
            channels=None if shape is None else shape[0],
            labels=names,
        )
        return cls(data, data.id2label, data.label_column is not None, check)

    def __len__(self) -> int:
        return len(self.items)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        for i in range(start, stop):
            self.check(i)
            item = self.items[i]
            if tuple(item["pixel_values"].shape) != self.shape:
                raise ValueError(
                    f"images: that of row {i} has the shape {tuple(item['pixel_values'].shape)}, others "
                    f"{self.shape}"
                )
            yield item["pixel_values"], int(item["label"]) if self.labelled else -1


class Shards:
    """Parquet files with a column of images and, for labels, one of class ids, integers or strings, read in turn.

    Nothing is copied to a cache, and a row group at a time is in memory.

    Raises:
        ValueError: for a file that is cut short or damaged, naming it, or an image that can't be read, naming the file
            and its row there.
    """

    def __init__(
        self,
        files: Sequence[Path],
        image_column: str | None = None,
        label_column: str | None = None,
    ):
        self.files, self.columns = list(files), (image_column, label_column)
        self.counts = [self._metadata(file).num_rows for file in self.files]
        if not sum(self.counts):
            raise ValueError(f"images: the Parquet files of {self.files[0].parent} have no rows")
        self.description: dict[str, Any] = {}
        self.names, self.shape, self.labelled = {}, None, True
        _, first = next(
            self._chunks(self.files[next(i for i, count in enumerate(self.counts) if count)])
        )
        self.shape, self.labelled = first.shape, first.labelled
        self.names = self._names(first)

    @staticmethod
    def _metadata(file: Path) -> Any:
        try:
            return pyarrow.parquet.read_metadata(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"images: {file} can't be read; it is cut short, or no Parquet file ({error})"
            ) from error

    def _names(self, first: Rows) -> dict[int, str]:
        """Of all files, where the labels aren't class ids with names."""
        column = first.items.label_column
        if column is None or isinstance(first.items.dataset.features[column], datasets.ClassLabel):
            return first.names
        values: set[Any] = set()
        for file in self.files:
            values |= set(
                pyarrow.parquet.read_table(file, columns=[column])[column].unique().to_pylist()
            )
        if all(isinstance(value, str) for value in values):
            return dict(enumerate(sorted(values)))
        return {i: str(i) for i in range(max(values) + 1)}

    def _chunks(self, file: Path, start: int = 0) -> Iterator[tuple[int, Rows]]:
        """The rows of a file from `start` on, in parts: the number of a part's first row in the file, the part."""
        done = 0
        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                for batch in opened.iter_batches(256):
                    if start < done + len(batch):
                        first = max(start, done)
                        rows = datasets.Dataset(
                            pyarrow.Table.from_batches([batch[first - done :]]), fingerprint="0"
                        )
                        with numbered(file, first):
                            part = Rows.native(rows, *self.columns, self.names or None, self.shape)
                        yield first, part
                    done += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"images: {file} can't be read; it is damaged ({error})") from error

    def __len__(self) -> int:
        return sum(self.counts)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        for file, count in zip(self.files, self.counts, strict=True):
            left, last = max(start, 0), min(stop, count)
            start, stop = start - count, stop - count
            if left >= last:
                continue
            for first, rows in self._chunks(file, left):
                some = min(len(rows), last - left)
                with numbered(file, first):
                    yield from rows.read(0, some)
                left += some
                if left == last:
                    break


@contextmanager
def numbered(file: Path, first: int) -> Iterator[None]:
    """Within, an error that names a row of a part of a file, from row `first` on, names the file's row and the file."""
    try:
        yield
    except ValueError as error:
        text, found = re.subn(
            r"\brow (\d+)", lambda row: f"row {first + int(row[1])} of {file}", str(error), count=1
        )
        if not found:
            raise
        raise ValueError(text) from error


class Arrays:
    """An .npz file with arr_0, (N, H, H, 1 or 3) uint8, and for labels arr_1, (N,) ids; one image is in memory.

    Raises:
        ValueError: for a file that is cut short, damaged, or has something else.
    """

    def __init__(self, path: Path):
        self.path, self.names = path, {}
        self.description: dict[str, Any] = {"path": str(path)}
        try:
            with zipfile.ZipFile(path) as archive:
                self.labels = self._labels(archive)
                with archive.open("arr_0.npy") as member:
                    array, fortran, dtype = self._header(member)
                    bytes_ = archive.getinfo("arr_0.npy").file_size - member.tell()
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, ValueError) as error:
            raise ValueError(
                f"images: {path} can't be read; it is cut short, or no .npz with arr_0 ({error})"
            ) from error
        if (
            len(array) != 4
            or array[3] not in (1, 3)
            or dtype != np.uint8
            or fortran
            or array[1] != array[2]
        ):
            raise ValueError(
                f"images: arr_0 of {path} is {array} {dtype}; (N, H, H, 1 or 3) uint8 in C order is "
                "allowed"
            )
        self.count, self.shape = array[0], (array[3], array[1], array[2])
        self.bytes = int(np.prod(array[1:]))
        if (
            bytes_ != self.count * self.bytes
            or self.labels is not None
            and self.labels.shape != (self.count,)
        ):
            raise ValueError(
                f"images: {path} has {bytes_} bytes of {array} images, and "
                f"{'no' if self.labels is None else self.labels.shape} labels, which don't fit"
            )
        self.labelled = self.labels is not None

    @staticmethod
    def _header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(member)
        reader = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        return reader[version](member)

    @staticmethod
    def _labels(archive: zipfile.ZipFile) -> np.ndarray | None:
        if "arr_1.npy" not in archive.namelist():
            return None
        with archive.open("arr_1.npy") as member:
            labels = np.lib.format.read_array(member, allow_pickle=False)
        if labels.dtype.kind not in "iu" or labels.size and labels.min() < 0:
            raise ValueError(f"arr_1 holds {labels.dtype}; ids from 0 are allowed")
        return labels

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Iterator[Item]:
        channels, height, width = self.shape
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
                self._header(member)
                member.seek(start * self.bytes, 1)
                for i in range(start, stop):
                    if len(raw := member.read(self.bytes)) < self.bytes:
                        raise EOFError(f"image {i} is cut short")
                    pixels = torch.from_numpy(np.frombuffer(raw, np.uint8).astype(np.float32))
                    image = pixels.reshape(height, width, channels).permute(2, 0, 1) / 127.5 - 1
                    yield image, -1 if self.labels is None else int(self.labels[i])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ValueError(f"images: {self.path} can't be read: {error}") from error


def named(names: Mapping[int, str]) -> bool:
    """Whether there are names that aren't the ids."""
    return any(name != str(i) for i, name in names.items())


def matched(
    names: Mapping[int, str], wanted: Mapping[int, str], whose: str, other: str
) -> dict[int, int]:
    """{id: id in `wanted`} of labels of the same name, as it is or as a folder of `guided-diffusers sample` has it.

    Where several of `wanted` have that name, a label keeps its id if that is one of them.

    Raises:
        ValueError: for names that `wanted` hasn't.
    """
    apart = unique_names(wanted, max(wanted, default=-1) + 1)
    folders = folder_names(apart)
    own = {name: i for i, name in wanted.items()}
    ids = (
        {as_folder(name): i for name, i in own.items()}
        | {form: i for i in wanted for form in (folders[i], apart[i])}
        | own
    )
    if missing := [name for name in names.values() if name not in ids]:
        raise ValueError(
            f"{whose} have the labels {missing[:10]}, which {other} hasn't; it has "
            f"{list(wanted.values())[:20]}"
        )
    return {i: i if wanted.get(i) == name else ids[name] for i, name in names.items()}
