"""Files of the shards of a run: written atomically, recorded with their sizes."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils.logging import get_logger
from PIL import Image

from ..files import aside, write_bytes, write_json
from ..text import one_line
from .manifest import folder_names

logger = get_logger(__name__)
FORMATS = ("imagefolder", "parquet", "npz")
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

    def encode(self, image: Image.Image) -> bytes | np.ndarray:
        """An image in the form that `write` takes: a PNG file, or for npz (H, W, 3) uint8."""
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
        self, shard: int, content: Sequence[bytes | np.ndarray], failed: Sequence[int] = ()
    ) -> None:
        """Write the files of a shard, given its encoded images, then its record.

        Args:
            failed: indices of the shard's images that are missing in `content`.
        """
        sizes = {}
        indices = [i for i in self.indices(shard) if i not in failed]
        for name, data in self._files(shard, indices, content):
            write_bytes(data, self.folder / name)
            sizes[name] = len(data)
        self._write_record(shard, sizes, failed)

    def _write_record(self, shard: int | str, sizes: dict[str, int], failed: Sequence[int]) -> None:
        record: dict[str, Any] = {"files": sizes}
        if failed:
            record["failed"] = list(failed)
        write_json(record, self._record(shard))

    def _files(
        self, shard: int, indices: Sequence[int], content: Sequence[Any]
    ) -> Iterator[tuple[str, bytes]]:
        """Path in the folder and content of each file of a shard."""
        labels = [self.label(i) for i in indices]
        if self.format == "imagefolder":
            for i, label, png in zip(indices, labels, content, strict=True):
                yield f"{self.folders[label]}/{i:06d}.png", png
        elif self.format == "parquet":
            yield self._parquet_name(shard), parquet(content, labels, self.names)
        else:
            buffer = io.BytesIO()
            np.save(buffer, np.stack(content) if content else np.zeros((0, 0, 0, 3), np.uint8))
            yield f".shards/{shard:05d}.npy", buffer.getvalue()

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
        failed = []
        for path in self.records.glob("*.json"):
            failed += json.loads(path.read_text()).get("failed", [])
        return sorted(set(failed))

    def extend(self, before: int) -> None:
        """Make a folder of `before` images one of more, whose further shards are missing.

        Missing is also a last shard that wasn't full, and with format npz all that were joined.
        """
        last, is_partial = divmod(before, self.shard_size)
        if is_partial:
            self._record(last).unlink(missing_ok=True)
        self._record(ARCHIVE).unlink(missing_ok=True)
        for path in (self.folder / "data").glob("train-*-of-*.parquet"):
            shard = int(path.name.split("-")[1])
            name = self._parquet_name(shard)  # which tells how many there are
            os.replace(path, self.folder / name)
            if self._record(shard).exists():
                record = json.loads(self._record(shard).read_text())
                sizes = {name: (self.folder / name).stat().st_size}
                self._write_record(shard, sizes, record.get("failed", ()))

    def _parquet_name(self, shard: int) -> str:
        return f"data/train-{shard:05d}-of-{len(self):05d}.parquet"

    def missing(self) -> list[int]:
        """Shards that aren't finished, or have changed; the records of the latter are removed."""
        if self.format == "npz" and self._is_complete(ARCHIVE):
            return []
        return [shard for shard in range(len(self)) if not self._is_complete(shard)]

    def _is_complete(self, shard: int | str) -> bool:
        """Whether a shard has a record, and all its files have the recorded sizes."""
        record = self._record(shard)
        if not record.exists():
            return False
        try:
            for name, size in json.loads(record.read_text())["files"].items():
                size = size[0] if isinstance(size, list) else size  # earlier: [size, CRC-32]
                actual = (self.folder / name).stat().st_size
                if actual != size:
                    raise ValueError(f"{self.folder / name} has {actual} bytes instead of {size}")
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
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
            self._write_record(ARCHIVE, {path.name: path.stat().st_size}, failed)
        for shard in range(len(self)):
            self._record(shard).unlink(missing_ok=True)
            (self.records / f"{shard:05d}.npy").unlink(missing_ok=True)

    def _join(self, path: Path, failed: Sequence[int] = ()) -> None:
        """Write all shards to one .npz file, with one shard at a time in memory."""
        failed = set(failed)
        finite = [i for i in range(self.num_images) if i not in failed]
        labels = np.array([self.label(i) for i in finite], np.int64)
        shards = (np.load(self.records / f"{shard:05d}.npy") for shard in range(len(self)))
        with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                header: dict[str, Any] = {"descr": "|u1", "fortran_order": False}
                for images in filter(len, shards):
                    if "shape" not in header:
                        header["shape"] = (len(labels), *images.shape[1:])
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(images.data)
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, labels)


def parquet(pngs: Sequence[bytes], labels: Sequence[int], names: Sequence[str]) -> bytes:
    """A Parquet file whose columns `image` and `label` are `datasets`' `Image` and `ClassLabel`."""
    import pyarrow
    import pyarrow.parquet
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(names))})
    rows = {"image": [{"bytes": png, "path": None} for png in pngs], "label": list(labels)}
    buffer = io.BytesIO()
    table = pyarrow.Table.from_pydict(rows, features.arrow_schema)
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()
