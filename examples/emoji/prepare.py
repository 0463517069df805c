# /// script
# requires-python = ">=3.10"
# dependencies = ["guided-diffusers", "datasets", "numpy", "pillow"]
# [tool.uv.sources]
# guided-diffusers = { path = "../.." }
# ///
"""Make a dataset of emoji pictures of two vendors: Parquet files with category, vendor and captions.

    python examples/emoji/prepare.py --output data/emoji                    # fetches with `npm pack`
    python examples/emoji/prepare.py --source FOLDER --output data/emoji    # takes what is there

The pictures are those of the npm packages emoji-datasource-google (Noto Emoji, Apache-2.0) and
emoji-datasource-twitter (Twemoji, CC-BY 4.0), version 16.0.0: 64 x 64 pixels with alpha, put on white
and resized. Emoji of the category "Component" and variants of skin tone are left out. A tenth of the
emoji of each category are held out, with the pictures of both vendors; emoji that share a picture
are on one side.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from guided_diffusers.cli_options import run_program

VERSION = "16.0.0"
VENDORS = ("google", "twitter")
LEFT_OUT = "Component"  # skin tones and hair on their own
HELD_OUT = 0.1  # of each category
NOTICE = """The pictures in these Parquet files were put on white and resized; nothing else was changed.

google: Noto Emoji, copyright Google Inc., Apache License 2.0
    https://github.com/googlefonts/noto-emoji, https://www.apache.org/licenses/LICENSE-2.0
twitter: Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0
    https://github.com/jdecked/twemoji, https://creativecommons.org/licenses/by/4.0/
Names, categories and the packages emoji-datasource-google and emoji-datasource-twitter:
    copyright Cal Henderson, MIT License, https://github.com/iamcal/emoji-data
"""


def package_folder(source: Path, vendor: str) -> Path:
    """The folder `package` of a vendor, unpacked from what `npm pack` gives, which it fetches.

    Raises:
        SystemExit: if the package can't be fetched.
    """
    folder = source / vendor / "package"
    if folder.is_dir():
        return folder
    name = f"emoji-datasource-{vendor}"
    archive = source / f"{name}-{VERSION}.tgz"
    if not archive.is_file():
        source.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{name}@{VERSION}", "--silent"]
        try:
            subprocess.run(command, cwd=source, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"--source {source}: {archive.name} isn't there, and `{' '.join(command)}` fails "
                f"({error}); put the file there, or unpack it to {folder}"
            ) from error
    partial = source / f"{vendor}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        wanted = [m for m in tar if f"/{vendor}/64/" in m.name or m.name.count("/") == 1]
        tar.extractall(partial, members=wanted, filter="data")
    os.replace(partial, folder.parent)
    return folder


def read_emoji(folder: Path, vendor: str) -> list[dict[str, Any]]:
    """The entries of `emoji.json` that have a picture, without the category "Component".

    Raises:
        SystemExit: if the file is missing or is no list of emoji.
    """
    try:
        entries = json.loads((folder / "emoji.json").read_text())
        with_picture = [entry for entry in entries if entry[f"has_img_{vendor}"]]
        return [entry for entry in with_picture if entry["category"] != LEFT_OUT]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(
            f"--source: {folder / 'emoji.json'} can't be read ({type(error).__name__}: {error}); the "
            f"file of emoji-datasource-{vendor} {VERSION} is needed"
        ) from error


def on_white(path: Path, resolution: int) -> PILImage.Image:
    """A picture with alpha, on white, resized to a square."""
    picture = PILImage.open(path).convert("RGBA")
    white = PILImage.new("RGBA", picture.size, "white")
    rgb = PILImage.alpha_composite(white, picture).convert("RGB")
    return rgb.resize((resolution, resolution), PILImage.Resampling.LANCZOS)


def captions_of(entry: dict[str, Any]) -> list[str]:
    """The emoji's name, its short names and its subcategory, in words of lower case."""
    names = [entry["name"] or "", *entry["short_names"], entry["subcategory"]]
    words = [" ".join(name.lower().replace("_", " ").replace("-", " ").split()) for name in names]
    return [caption for caption in dict.fromkeys(words) if caption]


def held_out_emoji(rows: list[dict[str, Any]], seed: int) -> set[str]:
    """Ids of the emoji to hold out: HELD_OUT of each category; those that share a picture together."""
    group = {row["emoji"]: {row["emoji"]} for row in rows}  # of each emoji, a set that they share
    first: dict[tuple[str, bytes], str] = {}
    for row in rows:
        mine = group[row["emoji"]]
        same = group[first.setdefault((row["vendor"], row["image"].tobytes()), row["emoji"])]
        for emoji in mine | same:
            group[emoji] = same
        same.update(mine)
    category = {row["emoji"]: row["category"] for row in rows}
    sizes = Counter(category.values())
    held_out: set[str] = set()
    for name in sorted(sizes):
        groups = sorted({min(group[emoji]) for emoji in category if category[emoji] == name})
        random.Random(f"{seed} {name}").shuffle(groups)
        remaining = round(HELD_OUT * sizes[name])
        for emoji in groups:
            if len(group[emoji]) <= remaining:
                held_out.update(group[emoji])
                remaining -= len(group[emoji])
    return held_out


def read_rows(source: Path, resolution: int) -> Iterator[dict[str, Any]]:
    """A row for every picture of every vendor."""
    for vendor in VENDORS:
        folder = package_folder(source, vendor)
        for entry in read_emoji(folder, vendor):
            picture = folder / "img" / vendor / "64" / entry["image"]
            yield {
                "image": on_white(picture, resolution),
                "category": entry["category"],
                "vendor": vendor,
                "emoji": entry["unified"],
                "caption": captions_of(entry),
                "subcategory": entry["subcategory"],
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    help = "folder of the packages' .tgz files, fetched into it if missing (default: %(default)s)"
    parser.add_argument("--source", type=Path, default=Path("data/emoji-npm"), help=help)
    parser.add_argument("--output", type=Path, required=True, help="a folder that isn't there yet")
    help = "height and width (default: %(default)s)"
    parser.add_argument(
        "--resolution", type=int, default=32, choices=range(8, 65), help=help, metavar="N"
    )
    help = "of the choice of held-out emoji (default: %(default)s)"
    parser.add_argument("--seed", type=int, default=0, help=help)
    options = parser.parse_args()
    if options.output.exists():
        raise SystemExit(f"--output {options.output} exists already; a new folder is allowed")

    rows = list(read_rows(options.source, options.resolution))
    held_out = held_out_emoji(rows, options.seed)
    categories = sorted({row["category"] for row in rows})
    features = Features(
        {
            "image": Image(),
            "category": ClassLabel(names=categories),
            "vendor": ClassLabel(names=list(VENDORS)),
            "emoji": Value("string"),
            "caption": List(Value("string")),
            "subcategory": Value("string"),
        }
    )
    partial = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for split in ("train", "test"):
        part = [row for row in rows if (row["emoji"] in held_out) == (split == "test")]
        file = partial / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(part, features=features).to_parquet(file)
        print(
            f"{split}: {len({row['emoji'] for row in part})} emoji, {len(part)} pictures", end="; "
        )
        print(", ".join(f"{name} {n}" for name, n in Counter(r["category"] for r in part).items()))
    licenses = [
        f"{vendor}\n\n{file.read_text()}"
        for vendor in VENDORS
        for file in [package_folder(options.source, vendor) / "LICENSE"]
    ]
    (partial / "LICENSES.txt").write_text("\n\n".join([NOTICE, *licenses]))
    os.replace(partial, options.output)


if __name__ == "__main__":
    run_program(main)
