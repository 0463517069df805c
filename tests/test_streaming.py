"""Training on streams: Parquet shards, tar shards and image folders, their order, resumed runs, several processes."""

from __future__ import annotations

import gc
import io
import json
import re
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from helpers import (
    CLASSIFIER,
    NAMES,
    TINY,
    TRAINING,
    apart,
    launched,
    load_script,
    reset_accelerate,
    shadow,
    weights,
)
from PIL import Image as PILImage
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from guided_diffusers import NoiseAwareClassifier
from guided_diffusers.learning.data import LabelledImages, load_splits, row_name
from guided_diffusers.learning.streaming import (
    Item,
    Row,
    StreamedBatches,
    StreamedImages,
    parse_labels,
)

train_clip = load_script("train_clip")

SIZES = (9, 5, 11, 7, 8, 8)  # rows a shard, 48 in all


ALL = ",".join(NAMES)
FEATURES = Features({"image": Image(), "label": ClassLabel(names=NAMES)})


def write_parquet(path: Path, images: list[bytes], labels: list[int], **settings: int) -> None:
    rows = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    path.parent.mkdir(exist_ok=True)
    Dataset.from_dict(rows, features=FEATURES).to_parquet(path, **settings)


def png(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    PILImage.fromarray(array).save(content, "png")
    return content.getvalue()


@pytest.fixture(scope="module")
def shards(place: SimpleNamespace) -> SimpleNamespace:
    """Digits in six Parquet files and in six tar files of different lengths, with held-out ones, and what is in them.

    Six files are a multiple of one, two and three processes, and not of four.
    """
    digits, root = load_digits(), place.root
    images = [png(image) for image in (digits.images[:60] * 255 / 16).astype(np.uint8)]
    labels = digits.target[:60].tolist()
    (root / "tars").mkdir()
    files = [f"train-{k:02d}" for k in range(6)] + ["test-00"]
    for name, start, size in zip(files, np.cumsum([0, *SIZES]), (*SIZES, 12), strict=True):
        part = slice(start, start + size)
        path = root / "shards" / f"{name}.parquet"
        write_parquet(path, images[part], labels[part], batch_size=4)
        with tarfile.open(root / "tars" / f"{name}.tar", "w") as file:
            for i in range(start, start + size):
                names = {"name": NAMES[labels[i]], "of": {"number": labels[i]}}
                fields = {"png": images[i], "cls": str(labels[i]), "json": json.dumps(names)}
                for ending, content in fields.items():
                    content = content if isinstance(content, bytes) else content.encode()
                    member = tarfile.TarInfo(f"{i:05d}.{ending}")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
    option = f"--train_data_dir {root / 'shards'}"
    paths = {"parquet": root / "shards", "tars": root / "tars"}
    return SimpleNamespace(**paths, images=images, labels=labels, option=option)


def stream(path: Path, **settings: object) -> StreamedImages:
    return StreamedImages(load_splits(str(path), streaming=True)["train"], resolution=8, **settings)


def batches(
    source: StreamedImages,
    last: int = 10**6,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    size: int = 1,
    window: int = 5,
    first: int = 0,
    position: dict[str, int] | None = None,
) -> StreamedBatches:
    return StreamedBatches(source, window, size, seed, rank, world, first, last, position)


def read(items: list[Item]) -> list[tuple[int, bytes, int]]:
    """Number, content and seed of a batch's items."""
    return [(rows[i].number, rows[i].image["bytes"], seed) for (rows, i), seed in items]


def epochs(source: StreamedImages, count: int, **settings: int) -> list[list[bytes]]:
    """The images of a process's first epochs, in their order."""
    whole, found = batches(source, **settings), [[] for _ in range(count)]
    for k, items in enumerate(whole):
        epoch = whole.position(k + 1)["epoch"]
        if epoch == count:
            return found
        found[epoch] += [content for _, content, _ in read(items)]


# Order


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_each_image_once_an_epoch_in_total(shards: SimpleNamespace, kind: str, world: int) -> None:
    """With whole shards a process (1, 2, 3) and with a row of four of all shards (4)."""
    source = stream(vars(shards)[kind])
    parts = [epochs(source, 3, rank=rank, world=world) for rank in range(world)]
    for epoch in range(3):
        images = Counter(image for part in parts for image in part[epoch])
        assert images == Counter(shards.images[:48])
    lengths = {len(part[0]) for part in parts}
    assert lengths == {12} if world == 4 else len(lengths) > 1 or world == 1


def test_the_order_depends_on_seed_and_epoch(shards: SimpleNamespace) -> None:
    source = stream(shards.parquet)
    (one, two), (other, _) = epochs(source, 2), epochs(source, 2, seed=1)
    assert epochs(stream(shards.parquet), 2) == [one, two]
    assert one != two and one != other
    starts = {shards.images[start]: k for k, start in enumerate(np.cumsum([0, *SIZES[:-1]]))}
    plain = [
        [starts[image] for image in epoch if image in starts]
        for epoch in (*epochs(source, 2, window=1), *epochs(source, 1, seed=1, window=1))
    ]
    assert sorted(plain[0]) == list(range(6))
    assert plain[0] != plain[1] and plain[0] != plain[2]  # shards in another order
    # without a window, a shard's images stay in a row; with one, they move within it, and no further
    for kept, moved in zip(epochs(source, 2, window=1), (one, two), strict=True):
        first = shards.images.index(kept[0])
        assert [shards.images.index(image) for image in kept[:5]] == list(range(first, first + 5))
        assert kept != moved
        assert all(sorted(kept[k : k + 5]) == sorted(moved[k : k + 5]) for k in range(0, 48, 5))
        orders = set()
        for k in range(0, 45, 5):
            orders.add(tuple(kept[k : k + 5].index(image) for image in moved[k : k + 5]))
        assert len(orders) > 5  # each window's own


def test_seeds_are_those_of_positions_over_all_processes(shards: SimpleNamespace) -> None:
    source = stream(shards.parquet)
    for rank in range(2):
        rows = batches(source, 3, rank, 2, seed=7, size=4)
        found = [seed for items in rows for *_, seed in read(items)]
        assert found == [7 * 1_000_003 + 8 * k + 4 * rank + i for k in range(3) for i in range(4)]


@pytest.mark.parametrize(
    ("kind", "rank", "world"),
    [("parquet", 0, 1), ("tars", 0, 1), ("parquet", 1, 2), ("parquet", 2, 4), ("tars", 3, 4)],
)
def test_it_goes_on_from_any_batch(
    shards: SimpleNamespace, kind: str, rank: int, world: int
) -> None:
    """In the middle of a window, of a shard, across epochs: the same items, and the same positions, at once or again.

    Batches of 3 and windows of 5 have their borders everywhere.
    """
    source, last = stream(vars(shards)[kind]), 40 // world
    uninterrupted = batches(source, last, rank, world, size=3)
    items, positions = [], []
    for k, batch in enumerate(uninterrupted):
        items.append(read(batch))
        positions.append(uninterrupted.position(k + 1))
    assert positions[-1]["epoch"] >= 2
    for k in range(1, last, 5 if world == 1 else 2):
        position = json.loads(json.dumps(positions[k - 1]))
        resumed = batches(source, last, rank, world, size=3, first=k, position=position)
        assert resumed.position(k) == position
        for j, batch in enumerate(resumed, start=k):
            assert read(batch) == items[j]
            assert resumed.position(j + 1) == positions[j]


def test_only_two_windows_are_in_memory(
    shards: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, most, seen, original = stream(shards.parquet), 0, [], StreamedImages.shard_rows

    def counted(self: StreamedImages, shard: int, first: int = 0) -> Iterator[Row]:
        for row in original(self, shard, first):
            seen.append(row.number)
            yield row

    monkeypatch.setattr(StreamedImages, "shard_rows", counted)
    gc.freeze()  # what there was before is left out of the counts
    try:
        for k, _ in enumerate(batches(source, 60, size=2, window=6), start=1):
            assert len(seen) <= 2 * k + 2 * 6
            most = max(most, sum(type(thing) is Row for thing in gc.get_objects()))
    finally:
        gc.unfreeze()
    # two windows, a batch, the one before, the next row
    assert len(seen) >= 120 and 6 <= most <= 2 * 6 + 2 * 2 + 1


def test_a_process_without_a_row_ends(shards: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="process 60 of 65 finds no row in epoch 0 of 6 shards"):
        next(iter(batches(stream(shards.parquet), rank=60, world=65)))


# Items


@pytest.mark.parametrize("resolution", [6, (6, 10)])
@pytest.mark.parametrize("kind", ["parquet", "tars", "folder"])
def test_items_are_those_of_labelled_images(
    shards: SimpleNamespace, place: SimpleNamespace, kind: str, resolution: int | tuple[int, int]
) -> None:
    path = place.folder if kind == "folder" else vars(shards)[kind]
    settings = {"random_flip": True, "random_shift": 1, "resolution": resolution}
    settings |= {"label_column": "cls"} if kind == "tars" else {}
    plain = LabelledImages(load_splits(str(path))["train"], **settings)
    labels = dict(enumerate(map(str, range(10)))) if kind == "tars" else None
    split = load_splits(str(path), streaming=True)["train"]
    source = StreamedImages(split, **settings, labels=labels)
    assert (source.id2label, source.channels) == (plain.id2label, plain.channels)
    rows = list(source.rows())
    assert len(rows) == len(plain) == 48
    for i in range(0, 48, 5):
        one, other = source[(rows, i), i + 100], plain[i, i + 100]
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert one["label"] == other["label"]
    assert source.in_memory(3, source.id2label).resolution == resolution


def test_a_folders_images_are_shuffled_all_together(place: SimpleNamespace) -> None:
    """They come label by label, and as names only, of which all are shuffled."""
    source = stream(place.folder)
    assert [row.label for row in source.rows()] == sorted(row.label for row in source.rows())
    whole = [rows[i].label for items in batches(source, 48, window=1) for (rows, i), _ in items]
    assert whole != sorted(whole) and len(set(whole[:12])) >= 5
    held_out = source.in_memory(12, source.id2label)
    expected = [row.label for row in list(source.rows())[::4]]
    assert [held_out[i]["label"] for i in range(12)] == expected


@pytest.mark.parametrize(
    ("column", "labels", "names"),
    [
        ("cls", "10", [str(i) for i in range(10)]),
        ("cls", ALL, NAMES),
        ("json.name", "{names}", NAMES),
        ("json.of.number", "{names}", NAMES),
    ],
)
def test_labels_that_are_told(
    shards: SimpleNamespace, tmp_path: Path, column: str, labels: str, names: list[str]
) -> None:
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    told = parse_labels(labels.format(names=tmp_path / "names.json"))
    source = stream(shards.tars, label_column=column, labels=told)
    assert source.id2label == dict(enumerate(names))
    rows = list(source.rows())
    assert [source[(rows, i), 0]["label"] for i in range(48)] == shards.labels[:48]
    test = load_splits(str(shards.tars), streaming=True)["test"]
    held_out = StreamedImages(test, label_column=column, resolution=8, labels=told)
    held_out = held_out.in_memory(5, told)
    assert [held_out[i]["label"] for i in range(len(held_out))] == shards.labels[48:53]  # the first
    few = stream(shards.tars, label_column=column, labels={0: names[0], 1: names[1]})
    message = r"label '?\w'? of row 2 of shard 0 is none of the 2 labels"
    with pytest.raises(ValueError, match=message):
        few[(rows, 2), 0]


def test_corrupt_images(shards: SimpleNamespace) -> None:
    """Named by row and shard; where they're to be skipped another of the batch takes the place, with its own label."""
    rows = list(islice(stream(shards.parquet).rows(), 8))
    rows[3] = rows[3]._replace(image={"bytes": b"no image", "path": "x.png"})
    message = r"the image of row 3 of shard 0 \(x.png\) can't be read: "
    with pytest.raises(ValueError, match=message):
        _ = stream(shards.parquet)[(rows, 3), 0]
    plain, skipping = stream(shards.parquet), stream(shards.parquet, skip_corrupt_images=True)
    taken = set()
    for seed in range(40):
        item = skipping[(rows, 3), seed]
        i = next(i for i, row in enumerate(rows) if row.number == item["row"])
        assert i != 3 and row_name(item["corrupt"]) == "row 3 of shard 0"
        assert torch.equal(item["pixel_values"], plain[(rows, i), seed]["pixel_values"])
        assert item["label"] == shards.labels[i]
        assert skipping[(rows, 3), seed]["row"] == item["row"]
        taken.add(i)
    assert len(taken) == 7
    assert skipping[(rows, 2), 0]["corrupt"] == -1
    message = "row 3 of shard 0 can't be read, nor those of 1 rows drawn instead"
    with pytest.raises(ValueError, match=message):
        _ = skipping[([rows[3]] * 2, 0), 0]


# Runs


@pytest.mark.parametrize(
    ("script", "data", "line"),
    [
        ("classifier", "--train_data_dir {root}/shards", ""),
        ("unet", "--dataset_name {root}/shards", "--class_conditional"),
        ("classifier", "--train_data_dir {root}/tars", "--label_column json.name --labels " + ALL),
        ("unet", "--train_data_dir '{root}/tars/train-*.tar'", ""),
        ("classifier", "--train_data_dir {folder}", "--skip_corrupt_images"),
    ],
)
def test_trains(
    train: Callable[..., Path], shards: SimpleNamespace, script: str, data: str, line: str
) -> None:
    folder = train(script, f"--streaming --max_train_steps 3 {line}", data=data)
    assert weights(folder)
    if "*" in data:  # one split, of which a tenth is held out
        assert 3 <= json.loads((folder / "metrics.json").read_text())["images"] <= 6
        return
    assert json.loads((folder / "metrics.json").read_text())["images"] == 6
    if script == "classifier":
        assert list(NoiseAwareClassifier.from_pretrained(folder).id2label.values()) == NAMES


def test_figures_are_of_the_first_held_out_images(
    train: Callable[..., Path], shards: SimpleNamespace, tmp_path: Path
) -> None:
    """A run that reads these alone, all in memory, finds the same of the same network."""
    for name, part in (("train", slice(0, 48)), ("test", slice(48, 54))):
        path = tmp_path / "first" / f"{name}.parquet"
        write_parquet(path, shards.images[part], shards.labels[part])
    line = "--max_train_steps 1 --learning_rate 0"  # the weights it starts with
    folders = (
        train("classifier", line + " --streaming", "one", shards.option),
        train("classifier", line, "other", f"--train_data_dir {tmp_path / 'first'}"),
    )
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("--train_data_dir {root}/shards", "--shuffle_buffer 7"),
        (
            "--train_data_dir {root}/tars",
            "--shuffle_buffer 50 --label_column cls --labels 10 "
            "--gradient_accumulation_steps 2 --dataloader_num_workers 1",
        ),
        ("--train_data_dir {folder}", ""),
    ],
)
def test_resumed_equals_uninterrupted(
    train: Callable[..., Path],
    place: SimpleNamespace,
    shards: SimpleNamespace,
    data: str,
    line: str,
) -> None:
    """Bit for bit, with augmentation and dropout, from the middle of an epoch of 12 batches into the next."""
    config = place.root / "dropout.json"
    config.write_text(json.dumps({**CLASSIFIER, "dropout": 0.2}))
    line += (
        f" --streaming --model_config_name_or_path {config} --checkpointing_steps 7 "
        "--checkpoints_total_limit 0 --max_train_steps 14 --random_shift 1"
    )
    whole = train("classifier", line, "whole", data)
    parts = shutil.copytree(whole, whole.with_name("parts"))
    shutil.rmtree(parts / "checkpoint-14")
    train("classifier", line + " --resume_from_checkpoint latest", "parts", data)
    one, other = whole / "checkpoint-14", parts / "checkpoint-14"
    assert apart(weights(whole), weights(parts)) == 0 and apart(shadow(one), shadow(other)) == 0
    files = (path / "optimizer.bin" for path in (one, other))
    first, second = (torch.load(file, weights_only=True)["state"] for file in files)
    assert all(torch.equal(first[i][name], second[i][name]) for i in first for name in first[i])
    assert positions(one) == positions(other) and positions(one)[0]["epoch"] >= 1


def positions(checkpoint: Path) -> list[dict[str, int]]:
    return torch.load(checkpoint / "custom_checkpoint_0.pkl", weights_only=True)["positions"]


def test_workers_change_nothing(train: Callable[..., Path], shards: SimpleNamespace) -> None:
    line = "--streaming --max_train_steps 15 --random_flip --dataloader_num_workers "
    none, two = (weights(train("classifier", line + count, count, shards.option)) for count in "02")
    assert apart(none, two) == 0


def test_two_processes(place: SimpleNamespace, shards: SimpleNamespace, tmp_path: Path) -> None:
    """Each with its own shards and epochs of its own length, and one that goes on as the uninterrupted one."""
    line = (
        f"{TINY} {shards.option} --streaming --shuffle_buffer 5 --cpu --model_config_name_or_path "
        f"{place.classifier} --max_train_steps 14 --checkpointing_steps 7 --output_dir "
    ).split()
    script = str(TRAINING / "train_classifier.py")
    resume = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-7")]
    commands = [
        ({}, [script, *line, str(tmp_path / "whole")]),
        ({}, [script, *line, str(tmp_path / "parts"), *resume]),
    ]
    launched(tmp_path, place, commands)
    assert apart(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0
    source, found = stream(shards.parquet), positions(tmp_path / "whole" / "checkpoint-14")
    for rank in range(2):
        alone = batches(source, 14, rank, 2, size=4)
        assert len(list(alone)) == 14 and alone.position(14) == found[rank]
    assert found == positions(tmp_path / "parts" / "checkpoint-14")


def test_another_kind_of_stream_does_not_go_on(
    train: Callable[..., Path], shards: SimpleNamespace
) -> None:
    line = "--max_train_steps 2 --checkpointing_steps 2 --resume_from_checkpoint latest "
    train("classifier", line + "--streaming", data=shards.option)
    for other in ("--streaming --shuffle_buffer 5", ""):
        images = "'6 shards streamed to 1 processes, 1000 shuffled together'"
        with pytest.raises(SystemExit, match=f"of another run: .*images {images}, here"):
            train("classifier", line + other, data=shards.option)


def test_corrupt_images_in_a_run(
    train: Callable[..., Path],
    shards: SimpleNamespace,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    """Three epochs with one such image; the batch that has it differs from epoch to epoch."""
    for k in range(2):
        part = slice(8 * k, 8 * k + 8)
        images = shards.images[part]
        if k == 1:
            images[5] = b"no image"
        write_parquet(tmp_path / "broken" / f"train-{k}.parquet", images, shards.labels[part])
    data, line = (
        f"--train_data_dir {tmp_path / 'broken'}",
        "--streaming --max_train_steps 12 --validation_fraction 0",
    )
    # of the first sixteen
    with pytest.raises(SystemExit, match="the image of row 5 of shard 1 can't be read: "):
        train("classifier", line, "ends", data)
    line += " --skip_corrupt_images"
    whole_line = line + " --checkpointing_steps 5 --checkpoints_total_limit 0"
    whole = train("classifier", whole_line, "whole", data)
    said, place = capfd.readouterr(), "row 5 of shard 1"
    assert said.err.count(f"the image of {place} can't be read: another takes its place") == 1
    message = f"3 times another image took the place of one that can't be read, in rows ['{place}']"
    assert message in said.out
    parts = shutil.copytree(whole, whole.with_name("parts"))
    shutil.rmtree(parts / "checkpoint-10")
    train("classifier", line + " --resume_from_checkpoint latest", "parts", data)
    assert apart(weights(whole), weights(parts)) == 0


def test_clip_by_label(
    shards: SimpleNamespace, place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes on as the uninterrupted run."""
    captions = {"train": {name: [f"a {name}", f"{name}."] for name in NAMES}}
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 8, "projection_dim": 4}
    for name, content in (("captions", captions), ("text", config)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    line = (
        f"{TINY} {shards.option} --cpu --streaming --captions {tmp_path / 'captions.json'} "
        f"--text_config {tmp_path / 'text.json'} --model_config_name_or_path {place.classifier} "
        "--max_train_steps 4 --checkpointing_steps 2 --output_dir "
    ).split()
    resume = ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-2")]
    for more in ([str(tmp_path / "whole")], [str(tmp_path / "parts"), *resume]):
        monkeypatch.setattr(sys, "argv", ["train_clip.py", *line, *more])
        reset_accelerate()
        train_clip.main()
    file = "checkpoint-4/model.safetensors"
    one, other = (load_file(tmp_path / name / file) for name in ("whole", "parts"))
    assert apart(one, other) == 0


# What is refused


@pytest.mark.parametrize(
    ("data", "line", "message"),
    [
        ("shards", "--vae x --center_crop", "--vae x .*--streaming can't"),
        ("shards", "--cache_images", "--cache_images .*--streaming none"),
        ("shards", "--shuffle_buffer 0", "--shuffle_buffer 0: 1 or more"),
        (
            "shards",
            "--skip_corrupt_images --train_batch_size 1",
            "--train_batch_size 1: with --streaming and --skip_corrupt_images 2 or more",
        ),
        ("shards", "--class_weights balanced", "--class_weights balanced .*--streaming"),
        (
            "shards",
            "--problem_type regression --label_column label",
            "--problem_type regression .*--streaming",
        ),
        ("shards", "--train_split night", "--train_split night: the dataset has"),
        ("shards", "--image_column foto", r"image_column='foto': .*\['image', 'label'\]"),
        (
            "shards",
            "--labels cat,dog",
            r"--labels \['cat', 'dog'\]: not allowed, since the dataset names its own: .*'a'",
        ),
        ("tars", "", "--label_column None: 0 labels found.*'cls'"),
        (
            "tars",
            "--labels 10",
            "--labels .*: not allowed, since the dataset has no column of labels",
        ),
        (
            "tars",
            "--label_column cls",
            r"--label_column cls holds Value\('int64'\), .*with --labels, are allowed",
        ),
        ("tars", "--label_column json.none", "label_column='json.none': .*'json'"),
        ("tars", "--label_column cls --labels a,a", "--labels a,a: different names"),
        ("tars", "--label_column cls --labels 0", "--labels 0: different names"),
        ("tars", "--label_column cls --labels {classifier}", "--labels .*json: different names"),
        ("*.md", "", "--train_data_dir .*md: dataset: .* matches 0 files"),
        ("*", "", "--train_data_dir .*: dataset: .* matches .* of the kinds .*json"),
    ],
)
def test_wrong_options_are_named(
    train: Callable[..., Path],
    shards: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    data: str,
    line: str,
    message: str,
) -> None:
    line, data = f"--streaming --max_train_steps 1 {line}", f"--train_data_dir '{{root}}/{data}'"
    with pytest.raises(SystemExit) as end:
        train("classifier", line, "refused", data=data)
    said = capsys.readouterr().err + str(end.value)
    assert re.search(message, said, re.DOTALL), said
    assert end.value.code not in (None, 0) and not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("option", "needed"),
    [
        ("--shuffle_buffer 5", "--streaming"),
        ("--labels 10", "--streaming"),
        ("--streaming", "--max_train_steps"),
    ],
)
def test_options_that_need_another(train: Callable[..., Path], option: str, needed: str) -> None:
    with pytest.raises(SystemExit, match=f"{option} needs {needed}"):
        train("classifier", option)


def test_captions_of_a_column_are_refused() -> None:
    with pytest.raises(ValueError, match="--caption_column text: with --streaming --captions"):
        train_clip.ClipOptions(
            train_data_dir="x", streaming=True, max_train_steps=1, caption_column="text"
        )


# A share that is held out


@pytest.mark.parametrize(("kind", "world"), [("parquet", 1), ("parquet", 2), ("tars", 4)])
def test_a_share_of_a_stream_is_held_out(shards: SimpleNamespace, kind: str, world: int) -> None:
    """Always the same rows, of all shards; the others are read once an epoch in total."""
    source = stream(vars(shards)[kind])
    source.held_out_fraction = 0.25
    rows = [row.image["bytes"] for row in source.rows() if source.is_held_out(row)]
    assert 9 <= len(rows) <= 15  # a quarter of 48
    held_out = source.in_memory(100, source.id2label)
    found = [shards.images.index(image) for image in rows]
    expected = [shards.labels[i] if kind == "parquet" else 0 for i in found]
    assert found == sorted(found) and held_out.labels_of_rows() == expected
    assert [row_name(held_out.number(0))] == [
        row_name(next(row.number for row in source.rows() if source.is_held_out(row)))
    ]
    parts = [epochs(source, 2, rank=rank, world=world) for rank in range(world)]
    for epoch in range(2):
        images = Counter(image for part in parts for image in part[epoch])
        assert images == Counter(shards.images[:48]) - Counter(rows)
    uninterrupted = batches(source, 20 // world, 0, world, size=3)
    items = [(read(batch), uninterrupted.position(k + 1)) for k, batch in enumerate(uninterrupted)]
    for k in range(1, len(items)):
        resumed = batches(source, 20 // world, 0, world, size=3, first=k, position=items[k - 1][1])
        again = [(read(batch), resumed.position(j)) for j, batch in enumerate(resumed, start=k + 1)]
        assert again == items[k:]


def test_numbers_of_labels_are_bounded() -> None:
    assert len(parse_labels("100000")) == 100_000
    with pytest.raises(ValueError, match="--labels 1000000000: up to 100000 classes are allowed"):
        parse_labels("1000000000")
