"""examples/emoji: the dataset from the npm packages."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "examples/emoji/prepare.py"
VENDORS = ("google", "twitter")


def put_packages(source: Path, count: int, archive: bool) -> None:
    """Packages of `count` food emoji, a skin tone, and one without a picture, unpacked or as .tgz."""
    for shade, vendor in enumerate(VENDORS):
        folder = source / vendor / "package"
        (folder / "img" / vendor / "64").mkdir(parents=True)
        entries = []
        for i in range(count + 2):
            entry = {"unified": f"1F{i:03}", "image": f"1f{i:03}.png", "name": f"RED FRUIT-{i}"}
            entry |= {
                "short_names": [f"red_fruit_{i}", f"red-fruit-{i}"],
                "category": "Food & Drink",
            }
            entry |= {"subcategory": "food-fruit", f"has_img_{vendor}": i != count + 1}
            if i == count:
                entry["category"] = "Component"
            entries.append(entry)
            pixels = np.zeros((64, 64, 4), np.uint8)
            drawn = min(i, count - 2)  # the last two emoji have the same picture
            pixels[16:48, 16:48] = (200, 100 * shade, 10 * drawn, 255)
            Image.fromarray(pixels).save(folder / "img" / vendor / "64" / entry["image"])
        (folder / "emoji.json").write_text(json.dumps(entries))
        (folder / "LICENSE").write_text(f"The licence of {vendor}")
        if archive:
            with tarfile.open(source / f"emoji-datasource-{vendor}-16.0.0.tgz", "w:gz") as tar:
                tar.add(folder, "package")
                big = tarfile.TarInfo(f"package/img/{vendor}/sheets/64.png")
                tar.addfile(big, io.BytesIO())
            (source / vendor).rename(source / f"{vendor}-moved")


def prepare(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("archive", [False, True])
def test_pictures_are_on_white_and_an_emoji_is_in_one_split(tmp_path: Path, archive: bool) -> None:
    put_packages(tmp_path / "npm", 20, archive)
    words = ("--source", tmp_path / "npm", "--output", tmp_path / "data", "--resolution", 16)
    made = prepare(*words)
    assert made.returncode == 0, made.stderr
    splits = load_dataset(str(tmp_path / "data"))
    emoji = {name: {row["emoji"] for row in split} for name, split in splits.items()}
    assert len(emoji["test"]) == 2 and len(emoji["train"]) == 18  # a tenth, with its two pictures
    assert not emoji["test"] & emoji["train"]
    assert ("1F018" in emoji["test"]) == ("1F019" in emoji["test"])  # of one picture
    assert len(splits["test"]) == 4 and len(splits["train"]) == 36
    features = splits["train"].features
    assert features["vendor"].names == list(VENDORS) and features["category"].names == [
        "Food & Drink"
    ]
    row = next(row for row in splits["train"] if row["vendor"] == 1)
    number = int(row["emoji"][2:])
    assert row["caption"] == [f"red fruit {number}", "food fruit"]  # a caption once
    pixels = np.asarray(row["image"])
    assert pixels.shape == (16, 16, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255]  # where the picture is transparent
    assert pixels[8, 8].tolist() == [200, 100, 10 * min(number, 18)]
    licenses = (tmp_path / "data" / "LICENSES.txt").read_text()
    assert "CC-BY 4.0" in licenses and "Apache License 2.0" in licenses
    assert "The licence of google" in licenses and "The licence of twitter" in licenses
    again = prepare(*words)
    assert again.returncode == 1 and "data exists already" in again.stderr


def test_a_package_without_its_list_is_named(tmp_path: Path) -> None:
    put_packages(tmp_path / "npm", 20, archive=False)
    (tmp_path / "npm/twitter/package/emoji.json").write_text("[{}]")
    made = prepare("--source", tmp_path / "npm", "--output", tmp_path / "data")
    assert made.returncode == 1
    assert "twitter/package/emoji.json can't be read (KeyError: 'has_img_twitter')" in made.stderr
    assert not (tmp_path / "data").exists()
