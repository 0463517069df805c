"""`LabelledImages` against arrays worked out by hand, for each form that data comes in."""

from __future__ import annotations

import gzip
import io
import itertools
import random
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from helpers import load_script
from PIL import Image as PILImage

from guided_diffusers.evaluation.images import open_generated
from guided_diffusers.learning.data import (
    SHARD_STRIDE,
    LabelledImages,
    held_out_rows,
    load_splits,
    mode_of_complete,
    row_name,
)

prepare_fashion_mnist = load_script("prepare_fashion_mnist")

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def split(images: list[np.ndarray], labels: list | None = None, feature: object = None) -> Dataset:
    """A split of the images, with a column `y` of labels of that feature."""
    rows = {"picture": [PILImage.fromarray(image) for image in images]}
    features = {"picture": Image()}
    if labels is not None:
        rows, features = {**rows, "y": labels}, {**features, "y": feature}
    return Dataset.from_dict(rows, features=Features(features))


def scaled(array: np.ndarray) -> torch.Tensor:
    """uint8 (H, W) or (H, W, C) -> (C, H, W) in [-1, 1]."""
    array = array if array.ndim == 3 else array[..., None]
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1


def png(array: np.ndarray) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    PILImage.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_pixels_span_minus_one_to_one() -> None:
    array = RAMP.copy()
    array[0, 0], array[7, 7] = 0, 255
    item = LabelledImages(split([array]), resolution=8)[0]
    assert item["pixel_values"].dtype == torch.float32
    assert item["pixel_values"].min() == -1 and item["pixel_values"].max() == 1
    torch.testing.assert_close(item["pixel_values"], scaled(array))
    assert item["label"] == 0


def test_channels() -> None:
    grey, colour = RAMP, np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)
    assert LabelledImages(split([grey]), resolution=8)[0]["pixel_values"].shape == (1, 8, 8)
    pixels = LabelledImages(split([colour]), resolution=8)[0]["pixel_values"]
    torch.testing.assert_close(pixels, scaled(colour))
    # one grey image first doesn't make a coloured split grey
    mixed = LabelledImages(split([grey, colour]), resolution=8)
    assert mixed.channels == 3
    torch.testing.assert_close(mixed[0]["pixel_values"], scaled(np.stack([grey] * 3, axis=2)))
    converted = LabelledImages(split([colour]), resolution=8, channels=1)
    assert converted[0]["pixel_values"].shape == (1, 8, 8)


def test_sixteen_bit_images_keep_their_range() -> None:
    data = LabelledImages(split([RAMP.astype(np.uint16) * 256 + 77]), resolution=8)
    assert data.channels == 1
    torch.testing.assert_close(data[0]["pixel_values"], scaled(RAMP))


def stored(array: np.ndarray, kind: str) -> LabelledImages:
    """A split of one image that is stored in a format of Pillow."""
    buffer = io.BytesIO()
    PILImage.fromarray(array).save(buffer, kind)
    rows = Dataset.from_dict({"picture": [{"bytes": buffer.getvalue(), "path": None}]})
    return LabelledImages(rows.cast_column("picture", Image()), resolution=8)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (RAMP.astype(np.int32), "mode I.+ are from 0 to 252"),
        (RAMP.astype(np.int32) * 2**16, "mode I.+ are from 0 to 16515072"),
        (RAMP.astype(np.int32) * 256 - 1, "mode I.+ are from -1 to 64511"),
        (RAMP.astype(np.float32) / 252, "mode F.+ are from 0.0 to 1.0"),
        (RAMP.astype(np.float32) * 256, "mode F.+ are from 0.0 to 64512.0"),
        (np.full((8, 8), np.nan, np.float32), "mode F.+ are from nan"),
    ],
)
def test_32_bit_images_of_an_unknown_range_are_refused(array: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=f"row 0 can't be read: .*{reason}.*image_range"):
        _ = stored(array, "TIFF")[0]


def test_32_bit_images_of_a_known_range() -> None:
    integers = stored(RAMP.astype(np.int32) * 256 + 77, "TIFF")[0]["pixel_values"]
    torch.testing.assert_close(integers, scaled(RAMP))
    floats = stored(RAMP.astype(np.float32), "TIFF")[0]["pixel_values"]
    torch.testing.assert_close(floats[:1], scaled(RAMP))
    black = stored(np.zeros((8, 8), np.int32), "TIFF")[0]["pixel_values"]
    assert black.unique().tolist() == [-1]


def test_resizes_the_shorter_side_and_crops_the_longer() -> None:
    wide = np.tile(np.arange(32, dtype=np.uint8) * 8, (8, 1))
    centre = LabelledImages(split([wide]), resolution=8, center_crop=True)[0]["pixel_values"]
    torch.testing.assert_close(centre, scaled(wide[:, 12:20]))
    data = LabelledImages(split([wide]), resolution=8)
    lefts = set()
    for seed in range(200):
        crop = data[0, seed]["pixel_values"]
        left = round((crop[0, 0, 0].item() + 1) * 127.5 / 8)
        torch.testing.assert_close(crop, scaled(wide[:, left : left + 8]))
        lefts.add(left)
    assert lefts == set(range(25))  # every place, the two ends included
    smaller = LabelledImages(split([wide]), resolution=4, center_crop=True)[0]["pixel_values"]
    resized = PILImage.fromarray(wide).resize((16, 4), PILImage.Resampling.BICUBIC)
    expected = resized.crop((6, 0, 10, 4))
    torch.testing.assert_close(smaller, scaled(np.asarray(expected)))


def test_a_gradient_is_halved_and_cropped_to_height_and_width() -> None:
    """Pixel r of a halved gradient is at 2 r + 1/2 of it, away from the edges."""
    tall = np.repeat(4 * np.arange(32, dtype=np.uint8)[:, None], 24, axis=1)
    wide = np.repeat(4 * np.arange(60, dtype=np.uint8)[None], 16, axis=0)
    rows, columns = 4 * (2 * np.arange(4, 12) + 0.5), 4 * (2 * np.arange(9, 21) + 0.5)
    for image, expected in ((tall, rows[:, None]), (wide, columns[None])):
        data = LabelledImages(split([image]), resolution=(8, 12), center_crop=True)
        assert data.resolution == (8, 12)
        expected = np.broadcast_to(expected, (8, 12))
        torch.testing.assert_close(data[0]["pixel_values"], scaled(expected))


def test_an_image_is_resized_as_little_as_covers_the_resolution() -> None:
    random_size = np.random.default_rng(0).integers(3, 60, (60, 2)).tolist()
    sizes = [(8, 12), (8, 40), (30, 12), (16, 24), *random_size]
    data = LabelledImages(split([np.zeros(s, np.uint8) for s in sizes]), resolution=(8, 12))
    for i, (height, width) in enumerate(sizes):
        image, _ = data._image(i)
        assert image.height == 8 and image.width >= 12 or image.height > 8 and image.width == 12
        ratio = image.width / image.height / (width / height)  # a side is off by half a pixel
        assert abs(ratio - 1) < 0.5 / 8 + 0.01
        assert data[i]["pixel_values"].shape == (1, 8, 12)


def test_random_crops_reach_every_place() -> None:
    for shape, places in (((8, 16), 5), ((11, 12), 4)):
        image = np.arange(shape[0] * shape[1], dtype=np.uint8).reshape(shape)
        data = LabelledImages(split([image]), resolution=(8, 12))
        seen = set()
        for seed in range(100):
            crop = data[0, seed]["pixel_values"]
            top, left = divmod(round((crop[0, 0, 0].item() + 1) * 127.5), shape[1])
            torch.testing.assert_close(crop, scaled(image[top : top + 8, left : left + 12]))
            seen.add((top, left))
        assert len(seen) == places


@pytest.mark.parametrize("center_crop", [False, True])
def test_squares_are_cropped_as_ever(center_crop: bool) -> None:
    """Bit for bit as when all were squares: shorter side resized, then left and top drawn."""
    random_numbers = np.random.default_rng(0)
    for height, width in random_numbers.integers(5, 40, (30, 2)).tolist():
        array = random_numbers.integers(0, 256, (height, width, 3)).astype(np.uint8)
        settings = {"center_crop": center_crop, "random_flip": True, "random_shift": 2}
        data = LabelledImages(split([array]), resolution=9, **settings)
        assert LabelledImages(split([array]), resolution=(9, 9)).resolution == data.resolution == 9
        image, shorter = PILImage.fromarray(array), min(height, width)
        if shorter != 9:
            size = [max(9, round(side * (9 / shorter))) for side in image.size]
            image = image.resize(size, PILImage.Resampling.BICUBIC)
        draw = random.Random(5)
        if center_crop:
            left, top = (image.width - 9) // 2, (image.height - 9) // 2
        else:
            left, top = draw.randint(0, image.width - 9), draw.randint(0, image.height - 9)
        expected = np.asarray(image.crop((left, top, left + 9, top + 9)))
        if draw.random() < 0.5:
            expected = expected[:, ::-1]
        left, top = draw.randint(0, 4), draw.randint(0, 4)
        expected = np.pad(expected, ((2, 2), (2, 2), (0, 0)), mode="edge")
        assert torch.equal(
            data[0, 5]["pixel_values"], scaled(expected[top : top + 9, left : left + 9].copy())
        )


def test_wrong_sizes_are_refused() -> None:
    for wrong in (0, -8, 8.5, "8x12", True, None, (8,), (8, 0), (8, 12, 3), [8, "12"]):
        with pytest.raises(ValueError, match="resolution=.* is allowed"):
            LabelledImages(split([RAMP]), resolution=wrong)
    assert LabelledImages(split([RAMP]), resolution=[8, np.int64(12)]).resolution == (8, 12)


def test_flip_and_shift_of_an_image_that_is_no_square() -> None:
    image = np.arange(96, dtype=np.uint8).reshape(8, 12)
    settings = {"resolution": (8, 12), "random_flip": True, "random_shift": 1}
    data = LabelledImages(split([image]), **settings)
    places = {}
    for flip, y, x in itertools.product((False, True), range(3), range(3)):
        padded = np.pad(image[:, ::-1] if flip else image, 1, mode="edge")
        places[flip, y, x] = scaled(padded[y : y + 8, x : x + 12].copy())
    seen = set()
    for seed in range(200):
        pixels = data[0, seed]["pixel_values"]
        seen.add(next(place for place, expected in places.items() if torch.equal(pixels, expected)))
    assert seen == set(places)


def test_flip_is_of_half_the_images() -> None:
    data = LabelledImages(split([RAMP]), resolution=8, random_flip=True)
    flipped = 0
    for seed in range(200):
        pixels = data[0, seed]["pixel_values"]
        mirrored = not torch.equal(pixels, scaled(RAMP))
        torch.testing.assert_close(pixels, scaled(RAMP[:, ::-1].copy() if mirrored else RAMP))
        flipped += mirrored
    assert 70 < flipped < 130  # 100 +- 4 standard deviations


def test_shift_repeats_the_edge_and_reaches_all_places() -> None:
    data = LabelledImages(split([RAMP]), resolution=8, random_shift=2)
    padded = np.pad(RAMP, 2, mode="edge")
    places = {}
    for y, x in itertools.product(range(5), repeat=2):
        places[y, x] = scaled(padded[y : y + 8, x : x + 8])
    seen = set()
    for seed in range(300):
        pixels = data[0, seed]["pixel_values"]
        seen.add(next(place for place, expected in places.items() if torch.equal(pixels, expected)))
    assert seen == set(places)


def test_random_scale_magnifies_about_the_middle_and_repeats_the_edge() -> None:
    ramp = np.tile(np.arange(0, 240, 15, dtype=np.uint8), (16, 1))  # its slope shows the scale
    data = LabelledImages(split([ramp]), resolution=16, random_scale=0.25)
    factors = []
    for seed in range(200):
        pixels = data[0, seed]["pixel_values"][0] * 127.5
        rise = (pixels[:, 11] - pixels[:, 4]) / 7
        torch.testing.assert_close(rise, rise[:1].expand(16))
        assert abs(pixels.mean() + 15) < 2  # as before
        factors.append(15 / rise[0].item())
    assert 0.79 < min(factors) < 0.85 and 1.2 < max(factors) < 1.26
    below_1 = sum(factor < 1 for factor in factors)
    assert 70 < below_1 < 130  # 100 +- 4 standard deviations, as log(factor) is symmetric
    frame = np.full((8, 8), 200, np.uint8)
    frame[2:6, 2:6] = 30
    data = LabelledImages(split([frame]), resolution=8, random_scale=0.5)
    for seed in range(50):  # within a grey level of the frame's
        assert abs(data[0, seed]["pixel_values"][0, 0, 0] * 127.5 + 127.5 - 200) < 1.5
    train, held_out = LabelledImages(split([ramp] * 20), resolution=16, random_scale=0.25).hold_out(
        0.5
    )
    assert (train.random_scale, held_out.random_scale) == (0.25, 0)


def test_an_item_depends_on_its_index_and_seed_alone() -> None:
    data = LabelledImages(split([RAMP, RAMP.T]), resolution=6, random_flip=True, random_shift=1)
    first = data[1, 7]["pixel_values"]
    random.seed(3)
    _ = data[0, 8], data[1, 9]
    assert torch.equal(first, data[1, 7]["pixel_values"])
    assert torch.equal(data[1]["pixel_values"], data[1, 0]["pixel_values"])


@pytest.mark.parametrize(
    ("labels", "feature", "names", "ids"),
    [
        ([2, 0, 1], ClassLabel(names=["x", "y", "z"]), {0: "x", 1: "y", 2: "z"}, [2, 0, 1]),
        ([3, 0, 3], Value("int64"), {0: "0", 1: "1", 2: "2", 3: "3"}, [3, 0, 3]),
        ([3, 0, 3], Value("uint8"), {0: "0", 1: "1", 2: "2", 3: "3"}, [3, 0, 3]),
        (["dog", "cat", "dog"], Value("string"), {0: "cat", 1: "dog"}, [1, 0, 1]),
    ],
)
def test_labels(labels: list, feature: object, names: dict[int, str], ids: list[int]) -> None:
    data = LabelledImages(split([RAMP] * 3, labels, feature), label_column="y", resolution=8)
    assert data.id2label == names
    assert [data[i]["label"] for i in range(len(data))] == ids


def test_labels_without_a_column() -> None:
    assert LabelledImages(split([RAMP]), resolution=8).id2label == {}
    # integers could be anything: they are labels only if asked for
    assert LabelledImages(split([RAMP], [4], Value("int64")), resolution=8).id2label == {}
    named = split([RAMP], [0], ClassLabel(names=["a", "b"]))
    assert LabelledImages(named, resolution=8).id2label == {0: "a", 1: "b"}


def test_another_splits_labels_keep_their_ids() -> None:
    text, options = Value("string"), {"label_column": "y", "resolution": 8}
    train = LabelledImages(split([RAMP] * 2, ["cat", "dog"], text), **options)
    options["labels"] = train.id2label
    assert LabelledImages(split([RAMP], ["dog"], text), **options)[0]["label"] == 1
    unknown = LabelledImages(split([RAMP], ["cow"], text), **options)
    message = r"label 'cow' of row 0 is none of the 2 labels \['cat', 'dog'\]"
    with pytest.raises(ValueError, match=message):
        _ = unknown[0]
    with pytest.raises(ValueError, match="label_column='y' has the labels .*, the other split"):
        LabelledImages(split([RAMP], [0], ClassLabel(names=["dog", "cat"])), labels=train.id2label)


LABEL_Y = {"label_column": "y"}
PLAIN, COLUMNS = split([RAMP]), r"the dataset has the columns \['picture'\]"


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (split([]), {}, "no rows"),
        (PLAIN, {"image_column": "foto"}, f"image_column='foto': {COLUMNS}"),
        (PLAIN, {"label_column": "foto"}, f"label_column='foto': {COLUMNS}"),
        (
            split([RAMP], [1], Value("int64")),
            {"image_column": "y"},
            "image_column='y' holds Value.*not images",
        ),
        (split([RAMP] * 2, [0, -1], Value("int64")), LABEL_Y, "label_column='y' holds -1 in row 1"),
        (
            split([RAMP], [1.5], Value("float32")),
            LABEL_Y,
            "label_column='y' holds Value.*from 1.5 on",
        ),
        (
            split([RAMP] * 2, ["a", None], Value("string")),
            LABEL_Y,
            "holds None in row 1.*every row",
        ),
        (split([RAMP] * 2, ["a", " "], Value("string")), LABEL_Y, "'y' holds ' ' in row 1; class"),
        (
            Dataset.from_dict({"y": [1]}),
            {},
            r"image_column=None: the dataset has the columns \['y'\]; none is marked as one of Image",
        ),
        (PLAIN, {"label_column": "picture"}, "label_column='picture': it is the column of the im"),
    ],
)
def test_wrong_columns(dataset: Dataset, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelledImages(dataset, **options)


def test_a_hidden_label_is_named() -> None:
    data = LabelledImages(split([RAMP] * 2, [0, -1], ClassLabel(names=["a", "b"])), resolution=8)
    with pytest.raises(ValueError, match="label -1 of row 1 is none of the 2 labels"):
        _ = data[1]


def test_bytes_of_files_are_images_where_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    PILImage.fromarray(RAMP).save(buffer, "PNG")
    columns = {"png": [buffer.getvalue()], "file": [{"bytes": buffer.getvalue(), "path": None}]}
    plain = Dataset.from_dict(columns)
    for column in ("png", "file"):
        data = LabelledImages(plain, image_column=column, resolution=8)
        torch.testing.assert_close(data[0]["pixel_values"], scaled(RAMP))


def test_image_folder_and_parquet_folder(tmp_path: Path) -> None:
    for name, part, label in (("a", "train", "cat"), ("b", "train", "dog"), ("c", "test", "dog")):
        folder = tmp_path / "photos" / part / label
        folder.mkdir(parents=True, exist_ok=True)
        PILImage.fromarray(RAMP).save(folder / f"{name}.png")
    splits = load_splits(str(tmp_path / "photos"))
    train, test = (LabelledImages(splits[part], resolution=8) for part in ("train", "test"))
    assert (len(train), len(test)) == (2, 1)
    assert train.id2label == test.id2label == {0: "cat", 1: "dog"}
    assert test[0]["label"] == 1

    (tmp_path / "parquet").mkdir()
    named = split([RAMP], [1], ClassLabel(names=["cat", "dog"]))
    named.to_parquet(tmp_path / "parquet" / "train-0.parquet")
    data = LabelledImages(load_splits(str(tmp_path / "parquet"))["train"], resolution=8)
    assert data.id2label == {0: "cat", 1: "dog"}
    torch.testing.assert_close(data[0]["pixel_values"], scaled(RAMP))


def test_missing_folder() -> None:
    with pytest.raises(ValueError, match="dataset: no folder './nowhere'"):
        load_splits("./nowhere")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("labels", "left_out"),
    [
        (["cat", "do\ng"], "do\\ng"),
        (["car", "train", "boat"], "boat"),
        (["cat", "dog", ".hidden", "__MACOSX"], None),
        (["cat", "[dog]", "a b"], None),
    ],
)
def test_label_folders_that_are_not_read_are_refused(
    tmp_path: Path, labels: list[str], left_out: str | None, streaming: bool
) -> None:
    for label in labels:
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(2):
            PILImage.new("L", (8, 8)).save(tmp_path / "photos" / label / f"{i}.png")
    if left_out is None:
        split = load_splits(str(tmp_path / "photos"), streaming=streaming)["train"]
        shown = [label for label in labels if not label.startswith((".", "__"))]
        assert len(list(split)) == 2 * len(shown) and split.features["label"].names == sorted(shown)
        return
    with pytest.raises(ValueError, match=r"^dataset: of \d images in .*aren't read") as error:
        load_splits(str(tmp_path / "photos"), streaming=streaming)
    assert left_out in str(error.value) and len(str(error.value).splitlines()) == 1
    if left_out == "boat" and not streaming:
        with pytest.raises(ValueError, match="aren't read"):
            open_generated(tmp_path / "photos")


def test_a_folder_beside_the_splits_is_warned_of(tmp_path: Path) -> None:
    for folder in ("train/cat", "train/dog", "test/cat", "unlabelled"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        PILImage.new("L", (8, 8)).save(tmp_path / "photos" / folder / "0.png")
    with pytest.warns(UserWarning, match="of 4 images .* 1 aren't read.*unlabelled"):
        splits = load_splits(str(tmp_path / "photos"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "test": 1}


def test_a_pattern_of_files_is_the_training_split(tmp_path: Path) -> None:
    for k in range(3):
        split([RAMP], [k], Value("int64")).to_parquet(tmp_path / f"part-{k}.parquet")
    assert load_splits(str(tmp_path / "part-[01].parquet"))["train"]["y"][:] == [0, 1]
    streamed = load_splits(str(tmp_path / "*.parquet"), streaming=True)
    assert [*streamed] == ["train"] and [row["y"] for row in streamed["train"]] == [0, 1, 2]
    (tmp_path / "notes.txt").write_text("no images")
    found = {"*.*": r"4 files of the kinds \['.parquet', '.txt'\]", "*.tar": "0 files"}
    for pattern, files in found.items():
        with pytest.raises(ValueError, match=f"matches {files}.*'.tar', '.parquet'"):
            load_splits(str(tmp_path / pattern))


def write_tar(path: Path, count: int) -> bytes:
    """A tar file of images and labels; returns its content."""
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            for kind, content in (("png", png(RAMP)), ("cls", b"1")):
                member = tarfile.TarInfo(f"{i:03}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_truncated_tar_file_is_refused(tmp_path: Path, streaming: bool) -> None:
    """`datasets` would take the images before the end as all there are."""
    content = write_tar(tmp_path / "a.tar", 3)
    used = len(content.rstrip(b"\0")) // 512 * 512 + 512
    for size in (used - 512 - 100, used - 2000, 600, 100):
        (tmp_path / "a.tar").write_bytes(content[:size])
        for source in (tmp_path, tmp_path / "*.tar"):
            with pytest.raises(ValueError, match=f"{tmp_path / 'a.tar'} is damaged or truncated"):
                load_splits(str(source), streaming=streaming)
    (tmp_path / "a.tar").write_bytes(content[:used])  # complete, without the optional end
    with pytest.warns(UserWarning, match="a.tar lacks the end of a tar file"):
        rows = list(load_splits(str(tmp_path), streaming=streaming)["train"])
    assert [row["cls"] for row in rows] == [1, 1, 1]


def test_damaged_parquet_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    split([RAMP], [1], Value("int64")).to_parquet(tmp_path / "train-0.parquet")
    Dataset.from_dict({"other": [1]}).to_parquet(tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match="(?s)^dataset: .* can't be read: .*column"):
        load_splits(str(tmp_path))


def test_rows_of_streams_have_names() -> None:
    numbers = {
        7: "row 7",
        SHARD_STRIDE: "row 0 of shard 0",
        3 * SHARD_STRIDE + 7: "row 7 of shard 2",
    }
    assert {number: row_name(number) for number in numbers} == numbers


@pytest.mark.parametrize("gzipped", [False, True])
def test_prepare_fashion_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gzipped: bool
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    labels = np.array([9, 0, 7], dtype=np.uint8)
    (tmp_path / "idx").mkdir()
    for prefix in ("train", "t10k"):
        for stem, array in ((f"{prefix}-images-idx3", images), (f"{prefix}-labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content = header + array.tobytes()
            path = tmp_path / "idx" / f"{stem}-ubyte{'.gz' if gzipped else ''}"
            path.write_bytes(gzip.compress(content) if gzipped else content)
    command = ["prepare", "--source", str(tmp_path / "idx"), "--output", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", command)
    prepare_fashion_mnist.main()

    splits = load_splits(str(tmp_path / "data"))
    assert sorted(splits) == ["test", "train"]
    data = LabelledImages(splits["train"], resolution=28)
    names = [data.id2label[data[i]["label"]] for i in range(3)]
    assert names == ["ankle boot", "t-shirt", "sneaker"]
    for i in range(3):
        torch.testing.assert_close(data[i]["pixel_values"], scaled(images[i]))

    with pytest.raises(SystemExit, match="exists already"):
        prepare_fashion_mnist.main()
    command = [*command[:-1], str(tmp_path / "other"), "--source", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="train-images-idx3-ubyte.* dataset-fashion-mnist"):
        prepare_fashion_mnist.main()


def test_prepare_refuses_what_is_no_idx_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not images")
    with pytest.raises(SystemExit, match="text is not an idx file"):
        prepare_fashion_mnist.read_idx(tmp_path / "text")
    (tmp_path / "cut").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2, 3]))
    with pytest.raises(SystemExit, match=r"cut has 3 bytes of data, its header says \[9\]"):
        prepare_fashion_mnist.read_idx(tmp_path / "cut")


# What is read before a training


def test_held_out_rows_are_a_share_of_each_label() -> None:
    counts = {"a": 101, "b": 51, "c": 12, "d": 2, "e": 1}
    labels = [i for i, count in enumerate(counts.values()) for _ in range(count)]
    random.Random(0).shuffle(labels)
    rows = held_out_rows(labels, 0.1)
    assert rows == sorted(set(rows)) == held_out_rows(labels, 0.1)
    held_out = [[labels[row] for row in rows].count(i) for i in range(5)]
    # a tenth of all but one of each label: of 162 rows, 10, 5, 1.1, 0.1 and 0
    assert len(rows) == 17 and held_out[:2] == [10, 5] and held_out[4] == 0
    assert held_out[2] in (1, 2) and held_out[3] in (0, 1)
    assert len(held_out_rows([0] * 31, 0.1)) == 3  # of 30, whatever 30 * 0.1 is rounded to
    assert held_out_rows(range(9), 0.9) == []  # one of each label stays
    assert len(held_out_rows([0] * 8, 0.1)) == 1


def test_parts_of_a_split_keep_labels_and_the_numbers_of_rows() -> None:
    arrays = [np.full((8, 8), 5 * i, np.uint8) for i in range(40)]
    names = ["rare" if i == 7 else "ab"[i % 2] for i in range(40)]
    data = LabelledImages(
        split(arrays, names, Value("string")), label_column="y", resolution=8, random_shift=2
    )
    train, held_out = data.hold_out(0.1)
    assert (len(train), len(held_out)) == (36, 4)
    assert train.id2label == held_out.id2label == {0: "a", 1: "b", 2: "rare"}
    pixels = [item["pixel_values"][0, 0, 0] for part in (train, held_out) for item in part]
    found = sorted(round((pixel.item() + 1) * 127.5 / 5) for pixel in pixels)
    assert found == list(range(40))
    for part in (train, held_out):
        for i in range(len(part)):
            item, number = part[i], part.number(i)
            torch.testing.assert_close(item["pixel_values"], scaled(arrays[number]))
            assert part.id2label[item["label"]] == names[number]
    assert held_out.labels_of_rows() == [held_out.label(i) for i in range(4)]
    assert (train.random_shift, held_out.random_shift, held_out.center_crop) == (2, 0, True)
    numbers = [row.number for row in held_out.rows([1, 3])]
    assert numbers == [held_out.number(1), held_out.number(3)]
    assert data.hold_out(0.0) == (data, None)


@pytest.mark.parametrize("ids", [[1, 2, 3], [7, 100, 20000], [1, 5, 10**9], [-1, 0, 1]])
def test_ids_that_occur_can_be_renumbered(ids: list[int]) -> None:
    options = {"label_column": "y", "resolution": 8}
    dataset = split([RAMP] * 3, ids[::-1], Value("int64"))
    data = LabelledImages(dataset, renumber_labels=True, **options)
    assert data.id2label == {i: str(name) for i, name in enumerate(ids)}
    assert data.labels_of_rows() == [2, 1, 0] and data[0]["label"] == 2
    other = split([RAMP] * 2, [ids[1], 4], Value("int64"))
    other = LabelledImages(other, renumber_labels=True, labels=data.id2label, **options)
    assert other.label(0) == 1
    with pytest.raises(ValueError, match="label_column='y': label 4 of row 1 is none of the 3"):
        other.labels_of_rows()
    if ids == [1, 2, 3]:
        assert len(LabelledImages(dataset, **options).id2label) == 4
        return
    message = "'y' holds -1 in row 2" if ids[0] < 0 else f"to {ids[2]}; 0 to 29 are .*renumber"
    with pytest.raises(ValueError, match=message):
        LabelledImages(dataset, **options)


def test_class_names_that_occur_can_be_renumbered() -> None:
    feature = ClassLabel(names=["x", "y", "z"])
    data = LabelledImages(split([RAMP] * 2, [2, 0], feature), resolution=8, renumber_labels=True)
    assert data.id2label == {0: "x", 1: "z"} and data.labels_of_rows() == [1, 0]
    hidden = split([RAMP] * 3, [2, 0, -1], feature)
    hidden = LabelledImages(hidden, resolution=8, renumber_labels=True)
    with pytest.raises(ValueError, match="label -1 of row 2 is none of the 2 labels"):
        hidden.labels_of_rows()


def test_labels_that_nothing_uses_are_not_read() -> None:
    labels = split([RAMP] * 2, [None, -1], ClassLabel(names=["a", "b"]))
    data = LabelledImages(labels, label_column="y", resolution=8, labelled=False)
    assert data.id2label == {} and data[1]["label"] == 0 and data.labels_of_rows() == [0, 0]


def test_colours_do_not_become_grey_unnoticed() -> None:
    colour = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)
    arrays = [colour if i == 3 else RAMP for i in range(80)]  # every fifth is sampled
    data = LabelledImages(split(arrays), resolution=8)
    message = r"the image of row 3 has colours, but .* grey; channels=3 \(--channels 3\)"
    assert data.channels == 1 and data[2]["pixel_values"].shape == (1, 8, 8)
    with pytest.raises(ValueError, match=message):
        _ = data[3]
    for row in data.rows([0, 1, 2]):
        data.check_image(row)
    with pytest.raises(ValueError, match=message):
        data.check_image(*data.rows([3]))
    assert LabelledImages(split(arrays), resolution=8, channels=1)[3]["pixel_values"].shape[0] == 1
    wide = LabelledImages(split(arrays), resolution=8, channels=3)
    torch.testing.assert_close(wide[3]["pixel_values"], scaled(colour))
    grey = np.stack([RAMP] * 3, axis=2)  # stored as colours, but grey, as a JPEG's is nearly
    arrays[3] = grey + np.array([0, 3, 1], np.uint8)
    data = LabelledImages(split(arrays), resolution=8)
    assert (data[3]["pixel_values"] - scaled(RAMP)).abs().max() < 4 / 127.5
    data.check_image(*data.rows([3]))


def test_files_are_complete_or_not(tmp_path: Path) -> None:
    contents = {}
    for kind in ("PNG", "JPEG", "BMP"):
        buffer = io.BytesIO()
        PILImage.fromarray(RAMP).save(buffer, kind)
        contents[kind] = buffer.getvalue()
    for kind, expected in (("PNG", "L"), ("JPEG", "L"), ("BMP", None)):
        content = contents[kind]
        (tmp_path / "file").write_bytes(content)
        images = {"bytes": content, "path": None}, {"path": str(tmp_path / "file"), "bytes": None}
        assert [mode_of_complete(image) for image in images] == [expected] * 2
        assert mode_of_complete({"bytes": content[:-16]}) is None
        assert mode_of_complete({"bytes": content[:40]}) is None
    damaged = bytearray(contents["PNG"])
    damaged[50] ^= 1  # in the pixels
    for image in ({"bytes": bytes(damaged)}, {"bytes": b"text"}, {"bytes": b""}, {}):
        assert mode_of_complete(image) is None
    rows = {"picture": [contents["BMP"], bytes(damaged), b"text", contents["JPEG"][:-60]]}
    dataset = Dataset.from_dict(rows).cast_column("picture", Image())
    data = LabelledImages(dataset, resolution=8, channels=1)
    for i, row in enumerate(data.rows(range(4))):
        if i == 0:
            data.check_image(row)
            continue
        with pytest.raises(ValueError, match=f"the image of row {i} can't be read: "):
            data.check_image(row)
