"""examples/emoji: the dataset from the npm packages."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
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


def test_a_shifted_copy_is_found_and_the_preset_is_the_nearest_of_the_best() -> None:
    report = runpy.run_path(str(SCRIPT.with_name("report.py")))
    generator = torch.Generator().manual_seed(0)
    training = torch.ones(5, 3, 8, 8)
    training[:, :, 2:6, 2:6] = torch.rand(5, 3, 4, 4, generator=generator)
    copies = training[[3, 1]].roll((1, -1), (2, 3))  # by a pixel down and one to the left
    others = training[[0]] - 0.5  # 0.5 in each pixel
    distances, index = report["nearest"](torch.cat([copies, others]), training)
    assert index[:2].tolist() == [3, 1]
    torch.testing.assert_close(distances[:2], torch.zeros(2), atol=1e-3, rtol=0)
    assert 0.3 < distances[2] <= 0.5 + 1e-3
    rows = []
    for scale, agreement, frechet in ((0.0, 0.5, 0.1), (1.0, 0.78, 0.3), (2.0, 0.8, 0.4)):
        call = {"guidance_scale": scale, "classifier_free_scale": 0.0}
        rows.append({"call": call, "agreement": agreement, "frechet": frechet})
    assert report["best_call"](rows) == {"guidance_scale": 1.0, "classifier_free_scale": 0.0}
