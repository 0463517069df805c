"""Files of the shards of a run: written atomically, recorded with their sizes."""

from __future__ import annotations

import io
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils.logging import get_logger
from PIL import Image

from ..checks import read_json, shown
from ..files import aside, write_bytes, write_json
from ..text import one_line
from .manifest import folder_names

logger = get_logger(__name__)
FORMATS = ("imagefolder", "parquet", "npz")
PARQUET_NAME = re.compile(r"train-(\d{5,})-of-\d{5,}\.parquet")
ARCHIVE = "samples"  # name of the npz file that joins all shards, and of its record


@dataclass
class Shards:
    """The shards of a run: `names` of all labels by id; image i has `labels[i % len(labels)]`."""

    folder: Path
    format: str
    names: Sequence[str]
    labels: Sequence[int]
    num_images: int
    shard_size: int

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r}: {', '.join(FORMATS)} are allowed")
        self.folders, self.records = folder_names(self.names), self.folder / ".shards"

    def __len__(self) -> int:
        return -(-self.num_images // self.shard_size)

    def indices(self, shard: int) -> range:
        """Indices of the images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def label(self, i: int) -> int:
        """Label id of image i."""
        return self.labels[i % len(self.labels)]

    def encode(self, image: Image.Image | np.ndarray) -> bytes | np.ndarray:
        """An image in the form that `write` takes: a PNG file, or for npz (H, W, 3) uint8; an array
        (C, ...) as it is, in float32."""
        if isinstance(image, np.ndarray):
            return np.ascontiguousarray(image, np.float32)
        if self.format == "npz":
            return np.asarray(image.convert("RGB"))
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return buffer.getvalue()

    def check_space(self, content: Sequence[bytes | np.ndarray], missing: Sequence[int]) -> None:
        """Raise an OSError if images like the encoded `content` don't fit on the disk.

        Of the missing shards, half the size is needed: other images may be smaller.
        """
        count = sum(len(self.indices(shard)) for shard in missing)
        mean = sum(memoryview(part).nbytes for part in content) / len(content)
        size = mean * count * (2 if self.format == "npz" else 1)  # the shards, and all joined
        free = shutil.disk_usage(self.folder).free
        if size / 2 > free:
            raise OSError(
                f"{self.folder} can't be written: {count} images are about {size / 2**20:,.0f} "
                f"MiB, {free / 2**20:,.0f} MiB are free"
            )

    def write(
        self,
        shard: int,
        content: Sequence[bytes | np.ndarray],
        failed: Sequence[int] = (),
        populations: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Write the files of a shard, given its encoded images, then its record.

        Args:
            failed: indices of the shard's images that are missing in `content`.
            populations: `population_summary` of each of its populations.
        """
        sizes = {}
        for name, data in self._files(shard, self._generated(shard, failed), content):
            write_bytes(data, self.folder / name)
            sizes[name] = len(data)
        self._write_record(shard, sizes, failed, populations)

    def _generated(self, shard: int | str, failed: Collection[int]) -> list[int]:
        """Indices of a shard's images, or of all, without those that failed."""
        indices = range(self.num_images) if shard == ARCHIVE else self.indices(shard)
        return [i for i in indices if i not in failed]

    def _write_record(
        self,
        shard: int | str,
        sizes: dict[str, int],
        failed: Sequence[int],
        populations: Sequence[dict[str, Any]],
    ) -> None:
        record: dict[str, Any] = {"files": sizes}
        if failed:
            record["failed"] = list(failed)
        if populations:
            record["populations"] = list(populations)
        write_json(record, self._record(shard))

    def _files(
        self, shard: int, indices: Sequence[int], content: Sequence[Any]
    ) -> Iterator[tuple[str, bytes]]:
        """Path in the folder and content of each file of a shard."""
        names = self._file_names(shard, indices)
        if self.format == "imagefolder":
            yield from zip(names, content, strict=True)
        elif self.format == "parquet":
            labels = [self.label(i) for i in indices]
            yield names[0], parquet(content, labels, self.names)
        else:
            buffer = io.BytesIO()
            np.save(buffer, np.stack(content) if content else np.zeros((0, 0, 0, 3), np.uint8))
            yield names[0], buffer.getvalue()

    def _file_names(self, shard: int | str, indices: Sequence[int]) -> list[str]:
        """Paths in the folder of a shard's files, or of the file that joins all."""
        if shard == ARCHIVE:
            return [f"{ARCHIVE}.npz"]
        if self.format == "imagefolder":
            return [f"{self.folders[self.label(i)]}/{i:06d}.png" for i in indices]
        if self.format == "parquet":
            return [self._parquet_name(shard)]
        return [f".shards/{shard:05d}.npy"]

    def _record(self, shard: int | str) -> Path:
        return self.records / f"{shard:0>5}.json"

    def is_recorded(self, shard: int) -> bool:
        """Whether a process has finished the shard."""
        return self._record(shard).exists()

    def num_recorded_images(self) -> int:
        """Number of images in finished shards, of all processes."""
        records = (path.stem for path in self.records.glob("*.json"))
        return sum(len(self.indices(int(name))) for name in records if name.isdigit())

    def failed(self) -> list[int]:
        """Indices of the images that could not be generated, of finished shards."""
        return sorted(set(self._recorded("failed")))

    def populations(self) -> list[dict[str, Any]]:
        """`population_summary` of all populations of finished shards, in their order."""
        records = {record["population"]: record for record in self._recorded("populations")}
        return [records[number] for number in sorted(records)]

    def _recorded(self, name: str) -> list[Any]:
        values = []
        for shard in (ARCHIVE, *range(len(self))):
            if self._record(shard).exists():
                values += read_json(self._record(shard)).get(name, [])
        return values

    def extend(self, before: int) -> None:
        """Make a folder of `before` images one of more, whose further shards are missing.

        Missing is also a last shard that wasn't full, and with format npz all that were joined.
        """
        last, is_partial = divmod(before, self.shard_size)
        if is_partial:
            self._record(last).unlink(missing_ok=True)
        self._record(ARCHIVE).unlink(missing_ok=True)
        for path in list((self.folder / "data").glob("train-*-of-*.parquet")):
            match = PARQUET_NAME.fullmatch(path.name)
            if match is None:  # not ours
                continue
            shard = int(match[1])
            name = self._parquet_name(shard)  # which tells how many there are
            os.replace(path, self.folder / name)
            try:
                record = read_json(self._record(shard))
            except (OSError, ValueError):  # none, or a broken one: it is generated again
                continue
            lists = record.get("failed", ()), record.get("populations", ())
            self._write_record(shard, {name: (self.folder / name).stat().st_size}, *lists)

    def _parquet_name(self, shard: int) -> str:
        return f"data/train-{shard:05d}-of-{len(self):05d}.parquet"

    def missing(self) -> list[int]:
        """Shards that aren't finished, or have changed; the records of the latter are removed."""
        if self.format == "npz" and self._is_complete(ARCHIVE):
            return []
        return [shard for shard in range(len(self)) if not self._is_complete(shard)]

    def _is_complete(self, shard: int | str) -> bool:
        """Whether a shard has a record of all its files, and these have the recorded sizes."""
        record = self._record(shard)
        if not record.exists():
            return False
        try:
            content = read_json(record)
            indices = self._generated(shard, content.get("failed", ()))
            if sorted(content["files"]) != sorted(self._file_names(shard, indices)):
                raise ValueError(f"{record} is not of the files of this shard")
            if not set(content.get("failed", ())) <= set(range(self.num_images)):
                raise ValueError(f"{record}: failed is {shown(content['failed'])}")
            for name, size in content["files"].items():
                size = size[0] if isinstance(size, list) else size  # earlier: [size, CRC-32]
                actual = (self.folder / name).stat().st_size
                if actual != size:
                    raise ValueError(f"{self.folder / name} has {actual} bytes instead of {size}")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            logger.warning(one_line(f"shard {shard} of {self.folder} is generated again: {error}"))
            record.unlink(missing_ok=True)
            return False
        return True

    def finish(self) -> None:
        """With format npz, join all shards to one file and remove them."""
        if self.format != "npz":
            return
        if not self._record(ARCHIVE).exists():
            path, failed = self.folder / f"{ARCHIVE}.npz", self.failed()
            with aside(path) as partial:
                self._join(partial, failed)
            sizes = {path.name: path.stat().st_size}
            self._write_record(ARCHIVE, sizes, failed, self.populations())
        for shard in range(len(self)):
            self._record(shard).unlink(missing_ok=True)
            (self.records / f"{shard:05d}.npy").unlink(missing_ok=True)

    def _load(self, shard: int) -> np.ndarray:
        """The images of a shard of format npz; one that is broken will be generated again."""
        path = self.records / f"{shard:05d}.npy"
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError) as error:
            self._record(shard).unlink(missing_ok=True)
            raise OSError(f"{path} is broken; run the same command to generate it again") from error

    def _join(self, path: Path, failed: Sequence[int] = ()) -> None:
        """Write all shards to one .npz file, with one shard at a time in memory."""
        failed = set(failed)
        finite = [i for i in range(self.num_images) if i not in failed]
        labels = np.array([self.label(i) for i in finite], np.int64)
        shards = map(self._load, range(len(self)))
        with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                header: dict[str, Any] = {"fortran_order": False}
                for images in filter(len, shards):
                    if "shape" not in header:
                        header["descr"] = images.dtype.str
                        header["shape"] = (len(labels), *images.shape[1:])
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(images.data)
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, labels)


def parquet(
    images: Sequence[bytes | np.ndarray], labels: Sequence[int], names: Sequence[str]
) -> bytes:
    """A Parquet file whose columns `image` and `label` are `datasets`' `Image` and `ClassLabel`; of
    arrays the column `array` has nested lists."""
    import pyarrow
    import pyarrow.parquet
    from datasets import ClassLabel, Features, List, Value
    from datasets import Image as ImageFeature

    name, feature = "image", ImageFeature()
    column: list[Any] = [{"bytes": image, "path": None} for image in images]
    if images and isinstance(images[0], np.ndarray):
        name, feature, column = "array", Value("float32"), [image.tolist() for image in images]
        for _ in range(images[0].ndim):
            feature = List(feature)
    features = Features({name: feature, "label": ClassLabel(names=list(names))})
    rows = {name: column, "label": list(labels)}
    buffer = io.BytesIO()
    table = pyarrow.Table.from_pydict(rows, features.arrow_schema)
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()
