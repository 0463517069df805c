"""Pixels of files whose white, or whose alpha, isn't that of 8 bits: read right, or refused with the option."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusers.learning.data import LabelledImages, load_splits
from guided_diffusers.learning.pixels import parse_background, parse_image_range

RAMP = np.linspace(0, 1, 64, dtype=np.float64).reshape(8, 8)


def save_all(folder: Path, make: Callable[[int], Image.Image], suffix: str = "png") -> Path:
    for i in range(3):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        make(i).save(folder / "ab"[i % 2] / f"{i}.{suffix}")
    return folder


def opened(folder: Path, **options: Any) -> LabelledImages:
    return LabelledImages(load_splits(str(folder))["train"], resolution=8, **options)


def expected(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(2 * values - 1).float()[None]


@pytest.mark.parametrize(
    ("high", "dtype", "suffix"),
    [
        (1, np.float32, "tif"),
        (255, np.uint16, "png"),
        (4095, np.uint16, "png"),
        (3.5, np.float32, "tif"),
    ],
    ids=["float TIFF in [0, 1]", "16 bits, 8 used", "16 bits, 12 used", "float TIFF to 3.5"],
)
def test_pixels_of_another_white_are_refused_or_read_by_the_option(
    high: float, dtype: type, suffix: str, tmp_path: Path
) -> None:
    given = parse_image_range(f"0,{high}")

    def make(i: int) -> Image.Image:
        values = np.roll(RAMP, i, 0) * high
        return Image.fromarray((values if dtype is np.float32 else values.round()).astype(dtype))

    folder = save_all(tmp_path, make, suffix)
    if high != 3.5:  # which might be 8 bits in floating point, of a black picture
        with pytest.raises(ValueError, match=r"--image_range LOW,HIGH"):
            opened(folder)
    data = opened(folder, image_range=given)
    assert data.channels == 1
    ramps = [expected(np.roll(RAMP, i, 0)) for i in range(3)]
    for i in range(3):
        pixels = data[i]["pixel_values"]
        error = min(float((pixels - ramp).abs().max()) for ramp in ramps)
        assert error < (1.1 / high if dtype is np.uint16 else 1e-5)
    coloured = opened(folder, image_range=given, channels=3)
    assert (coloured[0]["pixel_values"] - data[0]["pixel_values"]).abs().max() < 0.01
    with pytest.raises(ValueError, match=r"outside of 0 to 0.5; image_range"):
        opened(folder, image_range=(0.0, 0.5))


def test_sixteen_bits_that_are_used_need_no_option(tmp_path: Path) -> None:
    folder = save_all(tmp_path, lambda i: Image.fromarray((RAMP * 65535).astype(np.uint16)))
    torch.testing.assert_close(opened(folder)[0]["pixel_values"], expected(RAMP), atol=0.01, rtol=0)
    whole = opened(folder, image_range=(0.0, 65535.0))
    torch.testing.assert_close(whole[0]["pixel_values"], expected(RAMP), atol=1e-4, rtol=0)


def twelve_bit_tiff(path: Path, values: np.ndarray) -> None:
    """A grey TIFF (rows, columns) whose pixels have 12 bits, packed."""
    pairs = values.reshape(-1, 2)
    packed = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.astype(int).tolist()
    )
    rows, columns = values.shape
    tags = {256: columns, 257: rows, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: rows}
    tags[279] = len(packed)
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())
    )
    head = b"II*\0" + struct.pack("<I", 8 + len(packed))
    path.write_bytes(head + packed + struct.pack("<H", len(tags)) + entries + b"\0" * 4)


def test_twelve_bits_that_the_file_says_are_read_right(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        twelve_bit_tiff(tmp_path / name / "0.tif", (RAMP * 4095).round())
    torch.testing.assert_close(
        opened(tmp_path)[0]["pixel_values"], expected(RAMP), atol=1e-3, rtol=0
    )


def deep_png(path: Path, values: np.ndarray, alpha: bool = False) -> None:
    """A PNG of 16-bit colours (rows, columns, 3), which Pillow can't write."""
    values = np.dstack([values, np.full(values.shape[:2], 65535)]) if alpha else values
    rows, columns, _ = values.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 16, 6 if alpha else 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    ]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        checksum = zlib.crc32(name + data)
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def deep_tiff(path: Path, values: np.ndarray) -> None:
    """A TIFF of 16-bit colours (rows, columns, 3)."""
    rows, columns, _ = values.shape
    data = struct.pack("<HHH", 16, 16, 16) + values.astype("<u2").tobytes()
    tags = {256: columns, 257: rows, 259: 1, 262: 2, 273: 14, 277: 3, 278: rows}
    tags[279] = len(data) - 6
    entries = {tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()}
    entries[258] = struct.pack("<HHII", 258, 3, 3, 8)
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    table = b"".join(entries[tag] for tag in sorted(entries))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + data + struct.pack("<H", len(entries)) + table + b"\0" * 4)


@pytest.mark.parametrize("suffix", ["png", "alpha.png", "tif"])
def test_colours_of_sixteen_bits_are_read_right_or_refused(suffix: str, tmp_path: Path) -> None:
    """Pillow reads their upper 8 bits: black where 12 are used, also with the option."""
    shades = np.stack([RAMP, RAMP[::-1], RAMP.T], -1)

    def save(folder: Path, high: int) -> Path:
        for i in range(3):
            values = (np.roll(shades, i, 0) * high).round()
            if suffix == "tif":
                deep_tiff(folder / "ab"[i % 2] / f"{i}.tif", values)
            else:
                deep_png(folder / "ab"[i % 2] / f"{i}.png", values, suffix == "alpha.png")
        return folder

    folder = save(tmp_path / "twelve", 4095)
    with pytest.raises(ValueError, match=r"brightest .* 16 bits is 4095, .*--image_range LOW,HIGH"):
        opened(folder, channels=3, check_pixels=True)
    ramps = [
        torch.from_numpy(2 * np.roll(shades, i, 0) - 1).float().movedim(-1, 0) for i in range(3)
    ]
    whole = save(tmp_path / "sixteen", 65535)
    for data in (
        opened(folder, image_range=(0.0, 4095.0)),
        opened(whole),
        opened(whole, image_range=(0.0, 65535.0)),
    ):
        for i in range(3):
            pixels = data[i]["pixel_values"]
            assert min(float((pixels - ramp).abs().max()) for ramp in ramps) < 0.01
    if suffix == "alpha.png":
        with pytest.raises(ValueError, match="colours of 16 bits and alpha.*--alpha_background"):
            opened(folder, image_range=(0.0, 4095.0), alpha_background=(255, 255, 255))


def test_eight_bits_have_no_white_above_255(tmp_path: Path) -> None:
    folder = save_all(tmp_path, lambda i: Image.fromarray((RAMP * 255).astype(np.uint8)))
    with pytest.raises(ValueError, match="8 bits, whose white is 255 at most, not 4095"):
        opened(folder, image_range=(0.0, 4095.0))
    assert opened(folder, image_range=(0.0, 255.0))[0]["pixel_values"].max() > 0.9


def icon(colours: bool) -> Callable[[int], Image.Image]:
    """A shape in the alpha of a black picture, or of one with colours."""

    def make(i: int) -> Image.Image:
        pixels = np.zeros((8, 8, 4), np.uint8)
        pixels[..., 3] = np.roll(RAMP * 255, i, 0).astype(np.uint8)
        if colours:
            pixels[..., 0] = (RAMP * 255).astype(np.uint8)
        return Image.fromarray(pixels, "RGBA")

    return make


def test_a_picture_in_the_alpha_is_refused_or_put_on_a_colour(tmp_path: Path) -> None:
    folder = save_all(tmp_path / "icons", icon(colours=False))
    with pytest.raises(ValueError, match=r"it has one colour.*--alpha_background white"):
        opened(folder)
    data = opened(folder, alpha_background=parse_background("white"))
    alphas = [(np.roll(RAMP * 255, i, 0).astype(np.uint8) / 255) for i in range(3)]
    error = min((data[0]["pixel_values"] - expected(1 - alpha)).abs().max() for alpha in alphas)
    assert error < 0.02
    # where the colours show a picture, alpha is left out, as before, unless a background is given
    folder = save_all(tmp_path / "coloured", icon(colours=True))
    plain = opened(folder)[0]["pixel_values"]
    torch.testing.assert_close(plain[:1], expected(RAMP), atol=0.01, rtol=0)
    grey = opened(folder, alpha_background=parse_background("#808080"))[0]["pixel_values"]
    assert not torch.allclose(grey, plain, atol=0.1)


def test_constant_images_are_warned_of(tmp_path: Path) -> None:
    ramp = Image.fromarray((RAMP * 255).astype(np.uint8))
    folder = save_all(tmp_path / "some", lambda i: Image.new("L", (8, 8), 7) if i == 1 else ramp)
    with pytest.warns(UserWarning, match=r"1 of 3 sampled images are constant, such as .*1\.png"):
        opened(folder)
    with pytest.warns(UserWarning, match="1 of 3"):
        opened(folder, channels=1, check_pixels=True)
    folder = save_all(tmp_path / "none", lambda i: ramp)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(folder)


@pytest.mark.parametrize("text", ["1", "5,2", "a,b", "0,inf", "0,1,2", "nan,1"])
def test_refused_ranges(text: str) -> None:
    with pytest.raises(ValueError, match=f"--image_range '{text}': LOW,HIGH is allowed"):
        parse_image_range(text)


def test_refused_backgrounds() -> None:
    with pytest.raises(ValueError, match="--alpha_background 'blueish': a colour is allowed"):
        parse_background("blueish")


def test_other_numbers_of_channels_are_named(tmp_path: Path) -> None:
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 7, 278: 8, 279: 8 * 8 * 7}
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())
    )
    data = bytes(8 * 8 * 7)
    content = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    content += struct.pack("<H", len(tags)) + entries + b"\0" * 4
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tif").write_bytes(content)
    with pytest.raises(ValueError, match=r"0.tif.* number of channels .* \.npy arrays"):
        opened(tmp_path)


def test_options_of_the_scripts(train: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_all(tmp_path / "data", lambda i: Image.fromarray((RAMP * 4095).astype(np.uint16)))
    data, line = f"--train_data_dir {folder}", "--max_train_steps 1 --validation_fraction 0"
    with pytest.raises(SystemExit, match="--image_range LOW,HIGH"):
        train("classifier", f"{line} --channels 1", data=data)
    assert (
        train("classifier", f"{line} --image_range 0,4095", data=data) / "config.json"
    ).is_file()
    with pytest.raises(SystemExit, match="--channels 4: .*other numbers of channels can be arrays"):
        train("classifier", f"{line} --channels 4", data=data)
