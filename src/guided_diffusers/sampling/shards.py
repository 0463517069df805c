"""The files of a run's shards: written whole, noted with their sizes and checksums, looked at again."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from diffusers.utils.logging import get_logger
from PIL import Image
from tqdm.auto import tqdm

from ..utils import aside, write_bytes, write_json
from .manifest import folder_names

logger = get_logger(__name__)
FORMATS = ("imagefolder", "parquet", "npz")
WHOLE = "samples"  # the name of npz's last shard, which is all of them


class Shards:
    """The shards of a run.

    Args:
        names: of all labels, by id.
        labels: ids; image i has `labels[i % len(labels)]`.

    Raises:
        ValueError: for another format.
    """

    def __init__(
        self,
        folder: Path,
        format: Literal["imagefolder", "parquet", "npz"],
        names: Sequence[str],
        labels: Sequence[int],
        num_images: int,
        shard_size: int,
    ):
        if format not in FORMATS:
            raise ValueError(f"format={format!r}: {', '.join(FORMATS)} are allowed")
        self.folder, self.format, self.names, self.labels = (
            folder,
            format,
            list(names),
            list(labels),
        )
        self.num_images, self.shard_size, self.records = num_images, shard_size, folder / ".shards"
        self.folders = folder_names(names)

    def __len__(self) -> int:
        return -(-self.num_images // self.shard_size)

    def indices(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def label(self, i: int) -> int:
        """Of image i."""
        return self.labels[i % len(self.labels)]

    def encoded(self, image: Image.Image) -> bytes | np.ndarray:
        """An image as it waits for the others of its shard: a PNG, or for npz (H, W, 3) uint8."""
        if self.format == "npz":
            return np.asarray(image.convert("RGB"))
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return buffer.getvalue()

    def write(self, shard: int, content: Sequence[bytes | np.ndarray]) -> None:
        """Write a shard's files, then the note that they are there.

        Args:
            content: of each image what `encoded` made of it.

        Raises:
            OSError: for a full disk.
        """
        noted = {}
        for name, data in self._files(shard, content):
            write_bytes(data, self.folder / name)
            noted[name] = [len(data), zlib.crc32(data)]
        self._note(shard, noted)

    def _files(self, shard: int, content: Sequence[Any]) -> Iterator[tuple[str, bytes]]:
        """(path in the folder, content) of a shard's files."""
        labels = [self.label(i) for i in self.indices(shard)]
        match self.format:
            case "imagefolder":
                for i, label, png in zip(self.indices(shard), labels, content, strict=True):
                    yield f"{self.folders[label]}/{i:06d}.png", png
            case "parquet":
                yield (
                    f"data/train-{shard:05d}-of-{len(self):05d}.parquet",
                    parquet(content, labels, self.names),
                )
            case "npz":
                buffer = io.BytesIO()
                np.save(buffer, np.stack(content))
                yield f".shards/{shard:05d}.npy", buffer.getvalue()

    def _record(self, shard: int | str) -> Path:
        return self.records / (f"{shard:05d}.json" if isinstance(shard, int) else f"{shard}.json")

    def _note(self, shard: int | str, noted: dict[str, list[int]]) -> None:
        write_json({"files": noted}, self._record(shard))

    def done(self) -> int:
        """How many images are in shards that are noted, by whichever process."""
        noted = (path.stem for path in self.records.glob("*.json") if path.stem.isdigit())
        return sum(len(self.indices(int(shard))) for shard in noted)

    def missing(self, shards: Iterable[int], progress: bool = False) -> list[int]:
        """Those of the shards that aren't there as they were written; what was noted of a broken one is forgotten."""
        if self.format == "npz" and self._whole(WHOLE):
            return []
        noted = [shard for shard in shards if self._record(shard).exists()]
        whole = {
            shard
            for shard in tqdm(
                noted, "checking", unit="shard", disable=not progress or len(noted) < 2
            )
            if self._whole(shard)
        }
        return [shard for shard in shards if shard not in whole]

    def _whole(self, shard: int | str) -> bool:
        """Whether a shard is noted, and its files are as it says."""
        record = self._record(shard)
        try:
            if not record.exists():
                return False
            for name, (size, crc) in json.loads(record.read_text())["files"].items():
                if (found := (self.folder / name).stat().st_size) != size:
                    raise ValueError(f"{self.folder / name} has {found} bytes of {size}")
                if checksum(self.folder / name) != crc:
                    raise ValueError(f"{self.folder / name} isn't as it was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning(f"shard {shard} of {self.folder} is made again: {error}")
            record.unlink(missing_ok=True)
            return False
        return True

    def finish(self) -> None:
        """Once all shards are there: put npz together, which then takes their place.

        Raises:
            OSError: for a full disk; the shards are still there.
        """
        if self.format != "npz":
            return
        if not self._record(WHOLE).exists():
            path = self.folder / f"{WHOLE}.npz"
            with aside(path) as partial:
                self._join(partial)
                noted = [partial.stat().st_size, checksum(partial)]
            self._note(WHOLE, {path.name: noted})
        for shard in range(len(self)):
            self._record(shard).unlink(missing_ok=True)
            (self.records / f"{shard:05d}.npy").unlink(missing_ok=True)

    def _join(self, path: Path) -> None:
        """All shards as one .npz, of which one shard at a time is in memory."""
        labels = np.array([self.label(i) for i in range(self.num_images)], np.int64)
        first = np.load(self.records / "00000.npy", mmap_mode="r")
        with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                header = {
                    "descr": "|u1",
                    "fortran_order": False,
                    "shape": (self.num_images, *first.shape[1:]),
                }
                np.lib.format.write_array_header_1_0(member, header)
                for shard in range(len(self)):
                    with (self.records / f"{shard:05d}.npy").open("rb") as file:
                        np.lib.format.read_magic(file)
                        np.lib.format.read_array_header_1_0(file)
                        shutil.copyfileobj(file, member, 2**20)
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, labels)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            crc = zlib.crc32(block, crc)
    return crc


def parquet(pngs: Sequence[bytes], labels: Sequence[int], names: Sequence[str]) -> bytes:
    """A Parquet file with the columns `image` and `label`, which `datasets` reads as `Image` and `ClassLabel`."""
    import pyarrow
    import pyarrow.parquet
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature

    schema = Features(
        {"image": ImageFeature(), "label": ClassLabel(names=list(names))}
    ).arrow_schema
    rows = {"image": [{"bytes": png, "path": None} for png in pngs], "label": list(labels)}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pydict(rows, schema), buffer)
    return buffer.getvalue()
