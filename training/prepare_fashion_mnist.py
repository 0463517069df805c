# /// script
# requires-python = ">=3.10"
# dependencies = ["datasets", "numpy", "pillow"]
# ///
"""Convert Fashion-MNIST's four idx files to a folder of Parquet files for `datasets.load_dataset`.

apt-get install dataset-fashion-mnist      # Debian's package of these files
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

from guided_diffusers.cli_options import run_program

# Names of Xiao, Rasul and Vollgraf (2017), in lowercase
LABELS = "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(",")


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file of unsigned bytes, gzipped or not: magic 00 00 08 ndim, big-endian sizes, data."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    if data[:3] != b"\x00\x00\x08":
        raise SystemExit(f"--source: {path} is not an idx file of unsigned bytes")
    shape = np.frombuffer(data, ">u4", data[3], offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != shape.prod():
        size, header = values.size, shape.tolist()
        raise SystemExit(f"--source: {path} has {size} bytes of data, its header says {header}")
    return values.reshape(shape)


def find_file(source: Path, stem: str) -> Path:
    """The idx file of a name, gzipped or not."""
    for name in (f"{stem}-ubyte.gz", f"{stem}-ubyte"):
        if (source / name).exists():
            return source / name
    install = "On Debian: apt-get install dataset-fashion-mnist"
    raise SystemExit(f"--source {source}: {stem}-ubyte(.gz) is missing. {install}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = Path("/usr/share/datasets/fashion-mnist")
    help = "the folder of the idx files, gzipped or not (default: %(default)s)"
    parser.add_argument("--source", type=Path, default=source, help=help)
    parser.add_argument("--output", type=Path, required=True, help="a folder that isn't there yet")
    options = parser.parse_args()
    if options.output.exists():
        raise SystemExit(f"--output {options.output} exists already")
    partial = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    features = Features({"image": Image(), "label": ClassLabel(names=LABELS)})
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(find_file(options.source, f"{prefix}-images-idx3"))
        labels = read_idx(find_file(options.source, f"{prefix}-labels-idx1"))
        rows = {"image": [PILImage.fromarray(image) for image in images], "label": labels.tolist()}
        file = partial / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(rows, features=features).to_parquet(file)
        print(f"{split}: {len(labels)} images of {images.shape[1]}x{images.shape[2]}")
    os.replace(partial, options.output)


if __name__ == "__main__":
    run_program(main)
