"""Turn Fashion-MNIST's four idx files into a folder of Parquet that `datasets.load_dataset` reads.

apt-get install dataset-fashion-mnist          # Debian's package of the data, or get the same files elsewhere
python training/prepare_fashion_mnist.py --output data/fashion-mnist
python training/prepare_fashion_mnist.py --source FOLDER_OF_IDX_FILES --output data/fashion-mnist
"""

import argparse
import gzip
import os
import shutil
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

# The names of Xiao, Rasul and Vollgraf 2017, in lower case.
LABELS = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file of unsigned bytes, gzipped or not: magic 00 00 08 ndim, big-endian sizes, data."""
    data = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    if data[:3] != b"\x00\x00\x08":
        raise SystemExit(f"--source: {path} is not an idx file of unsigned bytes")
    shape, values = (
        np.frombuffer(data, ">u4", data[3], offset=4),
        np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]),
    )
    if values.size != shape.prod():
        raise SystemExit(
            f"--source: {path} has {values.size} bytes of data, its header says {shape.tolist()}"
        )
    return values.reshape(shape)


def find(source: Path, stem: str) -> Path:
    for name in (f"{stem}-ubyte.gz", f"{stem}-ubyte"):
        if (source / name).exists():
            return source / name
    raise SystemExit(
        f"--source {source}: no {stem}-ubyte(.gz) there. On Debian: apt-get install dataset-fashion-mnist"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="the folder of the idx files, gzipped or not (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="a folder that does not exist yet"
    )
    options = parser.parse_args()
    if options.output.exists():
        raise SystemExit(f"--output {options.output} exists already")
    aside = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    features = Features({"image": Image(), "label": ClassLabel(names=LABELS)})
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(find(options.source, f"{prefix}-images-idx3"))
        labels = read_idx(find(options.source, f"{prefix}-labels-idx1"))
        rows = {"image": [PILImage.fromarray(image) for image in images], "label": labels.tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(
            aside / f"{split}-00000-of-00001.parquet"
        )
        print(f"{split}: {len(labels)} images of {images.shape[1]}x{images.shape[2]}")
    os.replace(aside, options.output)


if __name__ == "__main__":
    main()
