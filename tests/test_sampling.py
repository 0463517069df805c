"""Sampling at scale: the same files for any processes, restarts and accidents; what is refused, and how."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
import torch
from conftest import files_of_at_most
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from helpers import ranks
from PIL import Image
from test_cli import NAMES, folder, pipeline, run  # noqa: F401  (folder and pipeline are fixtures)

from guided_diffusers import ClassifierGuidedPipeline, utils
from guided_diffusers.cli import main
from guided_diffusers.cli_options import launched_processes
from guided_diffusers.evaluation import evaluate, open_generated, wrap_module
from guided_diffusers.evaluation.labels import match_labels
from guided_diffusers.files import aside, write_json
from guided_diffusers.sampling import (
    grid,
    image_generator,
    sample,
    sample_to_folder,
    shards,
)
from guided_diffusers.sampling.folder import wait_for_shards
from guided_diffusers.sampling.manifest import (
    differences,
    folder_names,
    hub_commit,
    module_hash,
    resolve_defaults,
    unique,
    unique_names,
    weights_hash,
)
from guided_diffusers.sampling.shards import Shards

FORMATS = ("imagefolder", "parquet", "npz")
Make = Callable[..., Any]


@pytest.fixture
def make(pipeline: ClassifierGuidedPipeline, tmp_path: Path) -> Make:
    """Ten images in four shards of two batches each, into a folder of that name."""

    def function(name: str, **changed: Any) -> Any:
        return sample_to_folder(
            pipeline,
            [0, "coat", "7"],
            tmp_path / name,
            **{
                "num_images": 10,
                "batch_size": 2,
                "shard_size": 3,
                "num_inference_steps": 2,
                "progress": False,
                **changed,
            },
        )

    return function


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Crash(BaseException):
    """As a kill: nothing catches it."""


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """The process dies when it moves a file into place for the time number `after`; what it wrote is left."""
    move, count = os.replace, 0

    def replace(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise Crash
        move(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Crash):
            yield


# The same images


def test_a_folder_of_an_earlier_version_is_resumed(make: Make, tmp_path: Path) -> None:
    """Its records hold [size, CRC-32] of each file."""
    make("a")
    expected = files(tmp_path / "a")
    for record in (tmp_path / "a" / ".shards").iterdir():
        sizes = json.loads(record.read_text())["files"]
        old = {name: [size, 123456789] for name, size in sizes.items()}
        record.write_text(json.dumps({"files": old}))
    cut(tmp_path / "a" / "boot" / "000009.png")
    assert make("a").before == 9
    assert {
        name: data for name, data in files(tmp_path / "a").items() if ".shards" not in name
    } == {name: data for name, data in expected.items() if ".shards" not in name}


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_that_dies_at_any_moment_goes_on(
    format: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"format": format, "num_images": 5, "num_inference_steps": 2}
    make("whole", **settings)
    whole, moved = files(tmp_path / "whole"), 0
    while True:
        try:
            with dying(monkeypatch, after=moved):
                make("parts", **settings)
        except pytest.fail.Exception:  # it lived
            break
        before = set(files(tmp_path / "parts"))
        partials = [name for name in before if name.endswith(".partial")]
        assert len([name for name in partials if "manifest" not in name]) <= 1
        assert 1 <= len(partials) <= 2  # the first manifest is linked, which leaves a second
        images = {".shards/00000.json": 3, ".shards/00001.json": 2, ".shards/samples.json": 5}
        made = make("parts", **settings)
        assert made.images == 5 and made.before == min(
            5, sum(images.get(name, 0) for name in before)
        )
        assert files(tmp_path / "parts") == whole, f"killed at file {moved}"
        shutil.rmtree(tmp_path / "parts")
        moved += 1
    assert (
        moved == {"imagefolder": 5 + 2 + 2, "parquet": 2 + 2 + 2, "npz": 2 + 2 + 2 + 2}[format]
    )  # 2: the manifest, after it was linked


def test_killed_again_and_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start makes one shard, and dies."""
    make("whole")
    for _ in range(3):
        with dying(monkeypatch, after=5):
            make("parts")
    made = make("parts")
    assert made.before == 9 and files(tmp_path / "parts") == files(tmp_path / "whole")
    again = make("parts")
    assert again.before == 10 and files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize("format", FORMATS)
def test_other_batches_and_shards_make_the_same_images(
    format: str, make: Make, tmp_path: Path, pipeline: ClassifierGuidedPipeline
) -> None:
    """As `sample` makes them one by one, up to rounding; in the order of their numbers."""
    expected = [
        np.asarray(image, int)
        for i in range(10)
        for _, images in sample(pipeline, [0, 1, 2], 0, 1, [i], num_inference_steps=2)
        for image in images
    ]
    for name, sizes in {
        "a": {},
        "b": {"batch_size": 3, "shard_size": 7},
        "c": {"batch_size": 4, "shard_size": 99},
    }.items():
        make(name, format=format, **sizes)
        found, labels = read(tmp_path / name, format)
        assert labels == [i % 3 for i in range(10)]
        assert np.abs(found - np.stack(expected)).max() <= 1


@pytest.mark.parametrize("format", FORMATS)
def test_populations_are_whole_in_any_batch_and_resumed_with_their_evidence(
    format: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two particles each of three labels in turn; batches and shards hold whole populations."""
    options = {"particles": 2, "eta": 1.0, "format": format, "num_images": 12, "shard_size": 4}
    made = make("a", **options)
    images, labels = read(tmp_path / "a", format, 12)
    assert labels == [0, 0, 1, 1, 2, 2] * 2
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    records = manifest["populations"]
    assert manifest["particles"] == 2 and list(made.populations) == records
    assert [record["population"] for record in records] == list(range(6))
    for record in records:
        assert record["log_evidence"] < 0 and 1 <= record["effective_sample_size"] <= 2
        assert record["ancestors"] in (1, 2)
    one = make("b", **options, batch_size=1)  # one population, nevertheless
    assert np.abs(read(tmp_path / "b", format, 12)[0] - images).max() <= 1
    for first, second in zip(one.populations, made.populations, strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    with dying(monkeypatch, after=8 if format == "imagefolder" else 5):  # within the second shard
        make("c", **options)
    again = make("c", **options)
    assert again.before > 0 and files(tmp_path / "c") == files(tmp_path / "a")
    options["num_images"] = 16
    extended = make("a", **options)
    assert len(extended.populations) == 8 and list(extended.populations[:6]) == records


def test_a_population_with_an_image_that_is_not_finite_is_left_out(
    failing: Callable[..., ClassifierGuidedPipeline], tmp_path: Path
) -> None:
    options = {
        **TEN,
        "num_images": 12,
        "batch_size": 6,
        "shard_size": 6,
        "particles": 2,
        "eta": 1.0,
    }
    whole = sample_to_folder(failing(), [0, 1], tmp_path / "whole", **options)
    model = failing(1, 8)
    made = sample_to_folder(model, [0, 1], tmp_path / "out", skip_failed=True, **options)
    assert made.failed == (0, 1, 8, 9)
    assert list(made.populations) == [whole.populations[i] for i in (1, 2, 3, 5)]
    written, expected = files(tmp_path / "out"), files(tmp_path / "whole")
    pictures = [name for name in written if name.endswith(".png")]
    assert len(pictures) == 8 and all(written[name] == expected[name] for name in pictures)


def test_images_that_are_no_whole_populations_are_refused(
    pipeline: ClassifierGuidedPipeline, make: Make
) -> None:
    with pytest.raises(ValueError, match="num_images=9: with particles=2, whole populations"):
        make("a", particles=2, eta=1.0, num_images=9, shard_size=4)
    with pytest.raises(ValueError, match="shard_size=3: with particles=2, whole populations"):
        make("a", particles=2, eta=1.0)
    with pytest.raises(ValueError, match="images 1, 2 are no population; .* such as 0 to 1"):
        next(sample(pipeline, [0], indices=[1, 2], particles=2, eta=1.0))


def test_the_program_samples_populations(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    picture = tmp_path / "a.png"
    call = ["--label", "all", "--scheduler", "ddpm", "--particles", "4", "--output"]
    run(folder, *call, str(picture))
    printed = capsys.readouterr().out
    assert "12 images" in printed and "guidance algorithm mean" in printed
    lines = re.findall(
        r"\w+: log evidence -\d\.\d\d, effective sample size \d\.\d of 4, \d\.\d ancestors "
        r"\(1 population\)",
        printed,
    )
    assert len(lines) == 3
    with Image.open(picture) as image:  # a row of four for each label
        assert image.height % 3 == 0 and image.width // (image.height // 3) in (4, 5)
    run(folder, *call, str(tmp_path / "folder"), "--num-images", "16")
    assert "boot: log evidence" in (printed := capsys.readouterr().out)
    assert "(2 populations)" in printed and "16 images" in printed
    for more, message in (
        (["--num-images", "10"], "--num-images 10: with --particles 4, whole populations"),
        (["--diagnostics", str(tmp_path / "d.json")], "--diagnostics .*: with --particles"),
        (["--scheduler", "ddim"], "particles=4: DDIMScheduler adds no noise in step 0 of 3"),
    ):
        with pytest.raises(SystemExit) as error:
            run(folder, *call, str(tmp_path / "b.png"), *more)
        assert re.search(message, str(error.value.code) + capsys.readouterr().err)


def read(place: Path, format: str, count: int = 10) -> tuple[np.ndarray, list[int]]:
    """Images (N, H, W) and labels by the libraries that users have."""
    if format == "npz":
        content = np.load(place / "samples.npz")
        assert content["arr_0"].dtype == np.uint8 and content["arr_0"].shape == (count, 8, 8, 3)
        assert (content["arr_0"] == content["arr_0"][..., :1]).all()  # grey
        return content["arr_0"][..., 0].astype(int), content["arr_1"].tolist()
    cache = place.with_name(place.name + "-cache")
    if format == "parquet":
        rows = datasets.load_dataset(str(place), cache_dir=str(cache))["train"]
        assert rows.features["label"].names == list(NAMES.values())
        return np.stack([np.asarray(row["image"], int) for row in rows]), rows["label"][:]
    rows = datasets.load_dataset("imagefolder", data_dir=str(place), cache_dir=str(cache))["train"]
    numbers = [int(Path(row["image"].filename).stem) for row in rows]
    ids = {name: i for i, name in NAMES.items()}
    found = sorted(zip(numbers, rows, strict=True), key=lambda pair: pair[0])
    assert sorted(numbers) == list(range(count))
    return (
        np.stack([np.asarray(row["image"], int) for _, row in found]),
        [ids[rows.features["label"].names[row["label"]]] for _, row in found],
    )


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_an_image_has_its_own_noise_in_every_step(
    scheduler: type,
    pipeline: ClassifierGuidedPipeline,
) -> None:
    stochastic = ClassifierGuidedPipeline(
        pipeline.unet, scheduler.from_config(pipeline.scheduler.config), pipeline.classifier
    )
    stochastic.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "output_type": "latent"}
    together = [
        image
        for _, images in sample(stochastic, [0, 1], 3, 4, range(4), **call)
        for image in images
    ]
    alone = [
        image
        for _, images in sample(stochastic, [0, 1], 3, 1, range(4), **call)
        for image in images
    ]
    other = [
        image
        for _, images in sample(stochastic, [0, 1], 4, 1, range(4), **call)
        for image in images
    ]
    for one, another, different in zip(together, alone, other, strict=True):
        torch.testing.assert_close(one, another, atol=1e-4, rtol=1e-4)
        assert (one - different).abs().max() > 0.1


def launched(folder: str, output: Path, *more: str) -> subprocess.CompletedProcess:
    """By two processes, with a time limit, and nothing left behind."""
    launcher = "torch.distributed.run --standalone --nproc_per_node 2"
    line = [
        sys.executable,
        "-m",
        *launcher.split(),
        "-m",
        "guided_diffusers",
        "sample",
        "--model",
        folder,
        "--label",
        "all",
        "--device",
        "cpu",
        "--num-images",
        "10",
        "--batch-size",
        "2",
        "--shard-size",
        "3",
        "--num-inference-steps",
        "2",
        "--format",
        "parquet",
        "--output",
        str(output),
        *more,
    ]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:  # torch's launcher starts processes in sessions of their own
            launched_by = psutil.Process(process.pid)
            launched_by.suspend()
            for one in [*launched_by.children(recursive=True), launched_by]:
                one.kill()
            process.wait()
    return subprocess.CompletedProcess(line, process.returncode, out, err)


def test_two_processes_make_what_one_makes_also_after_one_failed(
    folder: str, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "two" / "data" / "train-00001-of-00004.parquet"  # of the second process
    run(
        folder,
        "--label",
        "all",
        "--num-images",
        "10",
        "--batch-size",
        "2",
        "--shard-size",
        "3",
        "--num-inference-steps",
        "2",
        "--format",
        "parquet",
        "--output",
        str(tmp_path / "two"),
        "--device",
        "cpu",
    )
    whole = files(tmp_path / "two")
    for path in [*(tmp_path / "two" / "data").iterdir(), *(tmp_path / "two" / ".shards").iterdir()]:
        path.unlink()
    in_the_way.mkdir()
    failed = launched(folder, tmp_path / "two")
    assert (
        failed.returncode != 0 and f"{in_the_way} can't be written: Is a directory" in failed.stderr
    )
    in_the_way.rmdir()
    there = len(list((tmp_path / "two" / ".shards").iterdir()))
    assert (
        there < 4
        and json.loads((tmp_path / "two" / "manifest.json").read_text())["complete"] is False
    )
    second = launched(folder, tmp_path / "two")
    assert second.returncode == 0, second.stderr
    assert (
        second.stdout.count("10 images of boot, coat, 7 (guidance scale 1, DDIMScheduler, seed 0")
        == 1
    )  # of the main process
    assert " by 2 processes: " in second.stdout
    assert files(tmp_path / "two") == whole


# What is broken, refused, full


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = [
    ("imagefolder", "coat/000004.png"),
    ("parquet", "data/train-00002-of-00004.parquet"),
    ("npz", "samples.npz"),
    ("npz", ".shards/00001.npy"),
    ("imagefolder", ".shards/00002.json"),
]


@pytest.mark.parametrize(
    ("format", "name", "damage"),
    [
        *((*file, damage) for file in FILES for damage in (cut, Path.unlink)),
        ("imagefolder", ".shards/00002.json", flip_a_bit),
    ],
)
def test_a_broken_file_is_made_again(
    format: str,
    name: str,
    damage: Callable[[Path], None],
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = make("whole", format=format) and files(tmp_path / "whole")
    if name.endswith(".npy"):  # there before they are joined
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(Shards, "_join", lambda *_: (_ for _ in ()).throw(Crash))
            make("parts", format=format)
    else:
        make("parts", format=format)
    damage(tmp_path / "parts" / name)
    said: list[str] = []
    monkeypatch.setattr(shards.logger, "warning", said.append)
    made = make("parts", format=format)
    assert files(tmp_path / "parts") == whole
    if damage is flip_a_bit:
        return  # it may still be read, as another size or name, or not
    assert made.before == {"samples.npz": 0}.get(name, 7)
    if not (
        damage is Path.unlink and name.endswith(".json")
    ):  # else it looks as if it was never written
        reason = {cut: "has .* bytes instead of ", Path.unlink: "No such file"}[damage]
        assert len(said) == 1 and re.search(
            "generated again: .*" + ("" if name.endswith(".json") else reason), said[0]
        )


@pytest.mark.parametrize(
    "content",
    ['{"files": {}}', '{"files": {}, "failed": 3}', '{"failed": ["a"]}', "[]", "[" * 100_000],
)
@pytest.mark.parametrize("number", [0, 99])
def test_records_that_are_not_of_their_shard(
    content: str, number: int, make: Make, tmp_path: Path
) -> None:
    """They are made again; others in the folder are ignored."""
    make("whole")
    make("parts")
    whole = files(tmp_path / "whole")
    record = tmp_path / "parts" / ".shards" / f"{number:05d}.json"
    if "failed" in content and number == 0:
        content = json.dumps({**json.loads(record.read_text()), **json.loads(content)})
    record.write_text(content)
    result = make("parts")
    assert result.before == (7 if number == 0 else 10) and not result.failed
    if number == 99:
        record.unlink()
    assert files(tmp_path / "parts") == whole


def test_a_broken_array_is_named_and_made_again(make: Make, tmp_path: Path) -> None:
    make("whole", format="npz")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Shards, "_join", lambda *_: (_ for _ in ()).throw(Crash))
        make("parts", format="npz")
    array = tmp_path / "parts" / ".shards" / "00001.npy"
    array.write_bytes(b"x" * array.stat().st_size)
    with pytest.raises(OSError, match="00001.npy is broken; run the same command"):
        make("parts", format="npz")
    make("parts", format="npz")
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_foreign_parquet_file_does_not_stop_an_extension(make: Make, tmp_path: Path) -> None:
    make("a", format="parquet", num_images=4)
    (tmp_path / "a" / "data" / "train-x-of-y.parquet").write_bytes(b"")
    assert make("a", format="parquet").images == 10


def test_more_images_than_can_be_recorded(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_images=.*: up to 1000000 shards of shard_size"):
        make("a", num_images=10**14)
    assert not (tmp_path / "a").exists()


def test_broken_images_make_the_folder_incomplete_until_they_are_there(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("a")
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["complete"] is True
    (tmp_path / "a" / "boot" / "000000.png").unlink()
    with dying(monkeypatch, after=1):
        make("a")
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["complete"] is False


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("before", "existing"), [(4, 3), (6, 6)])  # of shards of 3
def test_a_folder_is_extended(
    format: str,
    before: int,
    existing: int,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if that dies at any moment; the files are those of a run of the larger number."""
    make("all", format=format)
    expected = files(tmp_path / "all")
    make("a", format=format, num_images=before)
    result = make("a", format=format)
    assert result.before == (0 if format == "npz" else existing) and result.images == 10
    assert files(tmp_path / "a") == expected
    move = os.replace
    for after in range(8):
        moves = iter(range(after))

        def replace(*arguments: Any, moves: Iterator[int] = moves) -> None:
            if next(moves, None) is None:
                raise Crash
            move(*arguments)

        make(f"{after}", format=format, num_images=before)
        with monkeypatch.context() as patch, suppress(Crash):
            patch.setattr(os, "replace", replace)
            make(f"{after}", format=format)
        make(f"{after}", format=format)
        assert files(tmp_path / f"{after}") == expected, after


def test_a_run_of_other_settings_is_refused(
    make: Make,
    pipeline: ClassifierGuidedPipeline,
    tmp_path: Path,
) -> None:
    make("a", guidance_scale=2.0)
    before = files(tmp_path / "a")
    for changed, message in (
        ({"seed": 1}, "seed is 0, here 1"),
        ({"num_images": 9}, "num_images is 10, here 9"),
        ({"num_images": 11, "seed": 1}, "num_images is 10, here 11; seed is 0, here 1"),
        ({"guidance_scale": 3.0}, "guidance_scale is 2.0, here 3.0"),
        ({"batch_size": 1, "eta": 0.5}, "batch_size is 2, here 1; eta is None, here 0.5"),
        ({"format": "npz"}, "format is imagefolder, here npz"),
        ({"revision": "b" * 40, "model": "user/b"}, "model is .*; revision is sha"),
    ):
        with pytest.raises(
            ValueError,
            match=r"manifest.json is of a run with other settings.*: " + message + ".*Use",
        ):
            make("a", **{"guidance_scale": 2.0, **changed})
    pipeline.scheduler.register_to_config(beta_end=0.03)
    try:
        with pytest.raises(ValueError, match="scheduler.beta_end is 0.02, here 0.03"):
            make("a", guidance_scale=2.0)
    finally:
        pipeline.scheduler.register_to_config(beta_end=0.02)
    weight = next(pipeline.unet.parameters()).data.view(-1)
    weight[0] += 1e-3
    try:
        with pytest.raises(ValueError, match="revision is sha256:.*, here sha256:"):
            make("a", guidance_scale=2.0)
    finally:
        weight[0] -= 1e-3
    assert files(tmp_path / "a") == before


def test_a_folder_of_something_else_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a" / "cats").mkdir(parents=True)
    (tmp_path / "a" / "cats" / "1.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="a is in use and has no manifest.json"):
        make("a")
    assert files(tmp_path / "a") == {"cats/1.png": b"mine"}
    make("b")
    (tmp_path / "b" / "manifest.json").write_text('{"seed": 0, "num_im')
    before = files(tmp_path / "b")
    with pytest.raises(ValueError, match="b/manifest.json can't be read .*use another folder"):
        make("b")
    assert files(tmp_path / "b") == before


def test_wrong_arguments_of_python(make: Make, tmp_path: Path) -> None:
    for changed, message in (
        ({"num_images": 0}, "num_images=0: an integer from 1"),
        ({"shard_size": 0}, "shard_size=0: an integer"),
        ({"batch_size": 4}, "batch_size=4: at most shard_size=3 is allowed"),
        ({"format": "zip"}, "format='zip': imagefolder, parquet, npz are allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            make("a", **changed)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output", "x.png", "--format", "npz"], "--format npz: --output x.png is a picture"),
        (["--output", "x.png", "--shard-size", "9"], "--shard-size 9: --output x.png is a picture"),
        (["--output", "x", "--shard-size", "0"], "--shard-size 0: an integer, 1 or more"),
        (
            ["--output", "x", "--batch-size", "9", "--shard-size", "3"],
            "batch_size=9: at most shard_size=3",
        ),
        (["--output", "x", "--diagnostics", "y.txt"], "y.txt: a name that ends with .json, .png"),
        (
            ["--output", "x", "--revision", "v1"],
            "--revision v1: only a model of the Hub has revisions",
        ),
    ],
)
def test_wrong_arguments_of_the_program(
    arguments: list[str],
    message: str,
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(folder, "--label", "all", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_do_not_find_each_other_are_refused(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(size, "2")
    state = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    monkeypatch.setattr("accelerate.PartialState", lambda **_: state)
    with pytest.raises(ValueError, match="says that 2 processes were started, but 1 connected"):
        launched_processes("cpu")
    state.num_processes = 2
    assert launched_processes("cpu") is launched_processes(None) is state
    with pytest.raises(ValueError, match="--device cuda: the processes run on cpu"):
        launched_processes("cuda")


def test_several_processes_are_refused_what_is_for_one(
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments, message in (
        (["--output", "x.png"], "2 processes can't make a picture; use a folder, or one process"),
        (
            ["--output", "x", "--diagnostics", "y.json"],
            "--diagnostics y.json: 2 processes were started, .* one process is allowed",
        ),
        (
            ["--output", "x", "--device", "cuda:1"],
            "each of several processes has its own device; use --device cuda",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            run(folder, "--label", "all", *arguments)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_loses_nothing(
    format: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("whole", format=format)
    shard = {
        "parquet": "data/train-00001-of-00004.parquet",
        "npz": ".shards/00001.npy",
        "imagefolder": "boot/000003.png",
    }[format]
    with dying(monkeypatch, after=2):  # the manifest, the first shard, but not its note
        make("parts", format=format)
    make_rest, before = make, files(tmp_path / "parts")
    first = {name for name in before if not re.search("partial$|manifest|^.lock", name)}
    assert len(first) == 1
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=f"{shard} can't be written: File too large"),
    ):
        writes = Shards.write

        def write(self: Shards, number: int, content: list, *failed: Any) -> None:
            with files_of_at_most(10**6 if number == 0 else 100):
                writes(self, number, content, *failed)

        patch.setattr(Shards, "write", write)
        make_rest("parts", format=format)
    there = files(tmp_path / "parts")
    assert (
        ".shards/00000.json" in there
        and shard not in there
        and not [n for n in there if n.endswith(".partial")]
    )
    if format == "npz":  # all shards fit, what they are put together to doesn't
        with (
            monkeypatch.context() as patch,
            pytest.raises(OSError, match="samples.npz can't be written: File too"),
        ):
            join = Shards._join

            def smaller(self: Shards, path: Path, *failed: Any) -> None:
                with files_of_at_most(1000):
                    join(self, path, *failed)

            patch.setattr(Shards, "_join", smaller)
            make("parts", format=format)
        assert sum(name.endswith(".npy") for name in files(tmp_path / "parts")) == 4
    assert make("parts", format=format).before == (10 if format == "npz" else 3)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_the_program_says_that_the_disk_is_full_in_a_line(folder: str, tmp_path: Path) -> None:
    limited = files_of_at_most(60)
    with (
        limited,
        pytest.raises(
            SystemExit, match=r"^guided-diffusers sample: .*manifest.json can't be written: File"
        ),
    ):
        run(folder, "--label", "all", "--output", str(tmp_path / "a"))
    assert files(tmp_path / "a") == {}


# Images that are not finite


class NanFor(torch.nn.Module):
    """A classifier whose logits are NaN for the images with these numbers, by their first noise."""

    def __init__(self, inner: torch.nn.Module, *numbers: int, seed: int = 0):
        super().__init__()
        self.inner, self.config, self.dtype = inner, inner.config, inner.dtype
        noise = [torch.randn(1, 8, 8, generator=image_generator(seed, i)) for i in numbers]
        self.firsts = torch.stack(noise)[:, 0, 0, 0]

    def forward(self, sample: torch.Tensor, timestep: Any) -> tuple[torch.Tensor]:
        distance = (sample[:, 0, 0, 0, None] - self.firsts).abs().amin(dim=1)
        factor = torch.where(distance < 1e-4, float("nan"), 1.0)
        return (self.inner(sample, timestep).logits * factor[:, None],)


@pytest.fixture
def failing(pipeline: ClassifierGuidedPipeline) -> Callable[..., ClassifierGuidedPipeline]:
    def function(*numbers: int) -> ClassifierGuidedPipeline:
        classifier = NanFor(pipeline.classifier, *numbers) if numbers else pipeline.classifier
        made = ClassifierGuidedPipeline(pipeline.unet, pipeline.scheduler, classifier)
        made.register_to_config(id2label=NAMES)
        made.set_progress_bar_config(disable=True)
        return made

    return function


TEN = {"num_images": 10, "batch_size": 5, "shard_size": 5, "num_inference_steps": 2}
TEN |= {"guidance_scale": 1.0, "progress": False}


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_that_is_not_finite_is_named_and_left_out(
    format: str,
    failing: Callable[..., ClassifierGuidedPipeline],
    tmp_path: Path,
) -> None:
    """The others are bit for bit those of a classifier without the fault; a rerun tries nothing again."""
    sample_to_folder(failing(), [0, 1], tmp_path / "whole", format=format, **TEN)
    model, out = failing(1, 3, 8), tmp_path / "out"
    message = r"images 1, 3 of seed 0: the guidance is not finite at step 0.*the classifier is not"
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=message) as raised:
            sample_to_folder(model, [0, 1], out, format=format, **TEN)
        assert raised.value.images == [1, 3]
    result = sample_to_folder(model, [0, 1], out, format=format, skip_failed=True, **TEN)
    assert (result.images, result.failed) == (10, (1, 3, 8))
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["failed"], manifest["complete"]) == ([1, 3, 8], True)
    whole, rest = open_generated(tmp_path / "whole"), open_generated(out)
    expected = sorted((image.numpy().tobytes(), label) for image, label in whole.read(0, 10))
    found = sorted((image.numpy().tobytes(), label) for image, label in rest.read(0, 7))
    assert len(rest) == 7 and set(found) < set(expected)
    if format == "imagefolder":
        written, all_files = files(out), files(tmp_path / "whole")
        names = {name for name in all_files if name.endswith(".png")}
        missing = {f"coat/{i:06d}.png" for i in (1, 3)} | {"boot/000008.png"}
        assert {name for name in written if name.endswith(".png")} == names - missing
        assert all(written[name] == all_files[name] for name in names - missing)
        features = wrap_module(torch.nn.Flatten(), "pixels")
        notes = evaluate(rest, whole, features, bootstrap=0, progress=False).notes
        assert any(note.startswith("3 of the 10 generated images are missing") for note in notes)
    before = files(out)
    for skip in (True, False):
        made = sample_to_folder(model, [0, 1], out, format=format, skip_failed=skip, **TEN)
        assert (made.before, made.failed) == (10, (1, 3, 8)) and files(out) == before


def test_a_run_of_which_nothing_is_finite_is_an_error(
    failing: Callable[..., ClassifierGuidedPipeline], tmp_path: Path
) -> None:
    for format in FORMATS:
        with pytest.raises(FloatingPointError, match="none of the 10 images is finite"):
            sample_to_folder(
                failing(*range(10)), [0], tmp_path / format, format=format, skip_failed=True, **TEN
            )
        manifest = json.loads((tmp_path / format / "manifest.json").read_text())
        assert manifest["complete"] is False
    made = sample_to_folder(  # a whole shard
        failing(*range(5)), [0], tmp_path / "half", format="npz", skip_failed=True, **TEN
    )
    assert made.failed == (0, 1, 2, 3, 4) and len(open_generated(tmp_path / "half")) == 5


def test_the_program_leaves_out_what_is_not_finite(
    failing: Callable[..., ClassifierGuidedPipeline],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(utils, "load_pipeline", lambda *_: failing(2))
    common = "sample --label boot --num-images 4 --num-inference-steps 2 --guidance-scale 1 --quiet"
    for output in ("a.png", "a"):
        line = [*common.split(), "--device", "cpu", "--output", str(tmp_path / output)]
        with pytest.raises(SystemExit, match="sample: image 2 of seed 0: the guidance is not"):
            main(line)
        assert not (tmp_path / "a.png").exists() or output == "a"
        main([*line, "--skip-failed"])
        printed = capsys.readouterr()
        assert printed.out.startswith("3 images of boot")
        assert "1 not finite, left out: image 2" in printed.err
    picture = Image.open(tmp_path / "a.png")  # 2 x 2 images of 80 x 80, the third is white
    assert picture.crop((0, 80, 80, 160)).getextrema() == ((255, 255),) * 3
    assert picture.crop((80, 80, 160, 160)).getextrema() != ((255, 255),) * 3
    with pytest.raises(SystemExit, match="--diagnostics .*with --skip-failed"):
        main([*line, "--skip-failed", "--diagnostics", str(tmp_path / "x.json")])


# Before the work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "file/x.png"], "--output file/x.png can't be written: "),
        (["--output", "folder.png"], "--output folder.png can't be written: it is a folder"),
        (["--output", "x" * 246 + ".png"], r"--output x+.png can't be written: File name too"),
        (["--output", "file"], "--output file can't be written: it is a file, not a folder"),
        (["--output", "file/a/b"], "--output file/a/b can't be written: Not a directory"),
        (["--output", "y" * 256], "--output y+ can't be written: File name too long"),
        (["--output", "a", "--diagnostics", "file/d.json"], "--diagnostics file/d.json can't be"),
        (["--output", "a.png", "--diagnostics", "a.png"], "--output has the same name"),
    ],
)
def test_an_output_that_can_not_be_written_is_found_before_the_model_is_loaded(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder.png").mkdir()
    monkeypatch.setattr(utils, "load_pipeline", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=message):
        main(["sample", "--label", "boot", *arguments])
    assert sorted(path.name for path in Path().iterdir()) == ["file", "folder.png"]


def test_images_that_do_not_fit_on_the_disk_are_found_after_the_first_batch(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("a")
    size = sum(path.stat().st_size for path in (tmp_path / "a").glob("*/*.png"))
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((size, True), (size // 4, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            make("b")
        else:
            with pytest.raises(OSError, match="c can't be written: 10 images are about 0 MiB, 0 M"):
                make("c")
    assert not list((tmp_path / "c").glob("*/*.png"))


def test_a_picture_that_its_format_does_not_allow_is_found_after_the_first_batch(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # 600 of 80 x 80 in three rows: 16,000 pixels and the names' margin
    line = ["--label", "all", "--num-images", "615", "--batch-size", "15", "--output"]
    with pytest.raises(SystemExit, match="615 images are a picture of .* .webp allows 16383"):
        run(folder, *line, "x.webp")
    assert not Path("x.webp").exists()


LABELS = ["CON", "nul.txt", "b ", "c.", "manifest.json", "x" * 300, "x" * 299, "\u00e9" * 150]
LABELS += [
    "caf\u00e9",
    "cafe\u0301",
    "CAF\u00c9",
    "a:b",
    "a|b",
    "..",
    " ",
    "",
    "\ud800",
    "t\tb",
    "d/e",
]


def test_every_label_has_a_folder_that_every_system_allows(
    pipeline: ClassifierGuidedPipeline,
    tmp_path: Path,
) -> None:
    names = folder_names(LABELS)
    assert len({unicodedata.normalize("NFC", name).casefold() for name in names}) == len(LABELS)
    for name in names:
        assert 0 < len(name.encode()) <= 255 and not re.search(r'[\x00-\x1f/\\<>:"|?*]', name)
        assert name[-1] not in " ." and name[0] != "." and name.casefold() != "manifest.json"
        assert name.partition(".")[0].lower() not in ("con", "nul", "com1")
    assert folder_names(["sneaker", "T-shirt/top", "tench, Tinca tinca", "COM10"]) == [
        "sneaker",
        "T-shirt-top",
        "tench, Tinca tinca",
        "COM10",
    ]
    written = Shards(tmp_path / "out", "imagefolder", LABELS, range(len(LABELS)), len(LABELS), 99)
    written.write(0, [b"x"] * len(LABELS))
    assert len(list((tmp_path / "out").glob("*/*.png"))) == len(LABELS)


def test_images_of_such_labels_are_evaluated_under_their_names(
    pipeline: ClassifierGuidedPipeline,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The folder's names are matched with those of the real images."""
    names = {0: "manifest.json", 1: "CON", 2: "x" * 300}
    own = ClassifierGuidedPipeline(pipeline.unet, pipeline.scheduler, pipeline.classifier)
    own.register_to_config(id2label=names)
    own.set_progress_bar_config(disable=True)
    sample_to_folder(own, [0, 1, 2], tmp_path / "a", 6, num_inference_steps=2, progress=False)
    assert "names can't be folders on every system: 'manifest.json' has '-man" in caplog.text
    images = open_generated(tmp_path / "a")
    ids = match_labels(images.names, names, "the generated images", "the real ones")
    assert sorted(ids.values()) == [0, 1, 2]
    assert [ids[label] for _, label in images.read(0, 6)] == [1, 1, 0, 0, 2, 2]  # sorted by folder


def test_a_picture_takes_any_label() -> None:
    images = [Image.new("L", (84, 84), i) for i in range(4)]
    picture = grid(images, ["two\nlines", "\ud800"])
    assert picture.height == 2 * 84
    long = grid(images, ["x" * 10**5, "y"])
    assert long.width < 3000


# What it is made of


def test_an_archive_is_joined_in_little_memory(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    written = Shards(tmp_path, "npz", ["a", "b"], [0, 1], 1900, 100)
    parts = [
        draw.integers(0, 256, (min(100, 1900 - first), 32, 32, 3), np.uint8)
        for first in range(0, 1900, 100)
    ]
    for number, part in enumerate(parts):
        written.write(number, list(part))
    tracemalloc.start()
    written.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5e6 < sum(part.nbytes for part in parts) / 2
    with np.load(tmp_path / "samples.npz") as content:
        assert np.array_equal(content["arr_0"], np.concatenate(parts))
        assert np.array_equal(content["arr_1"], np.arange(1900) % 2)
    assert sorted(files(tmp_path)) == [".shards/samples.json", "samples.npz"]


def test_names_of_folders_stay_in_the_folder_and_apart(tmp_path: Path) -> None:
    names = unique_names({0: "crane", 1: "..", 2: "a/b", 3: "crane", 4: ".hidden", 5: ""}, 7)
    assert names == ["crane 0", "..", "a/b", "crane 3", ".hidden", "", "6"]
    written = Shards(tmp_path / "out", "imagefolder", names, range(7), 7, 7)
    assert written.folders == ["crane 0", "--", "a-b", "crane 3", "-hidden", "-", "6"]
    written.write(0, [b"x"] * 7)
    assert len(list((tmp_path / "out").glob("*/00000?.png"))) == 7


def test_names_are_apart_also_those_that_clash_with_a_numbered_one() -> None:
    for names in (["a", "a", "a 0"], ["a 1 2", "a", "a", "a 1", "a 1"], []):
        assert len(set(unique(names))) == len(names)
    assert unique(["a", "b", "a 0"]) == ["a", "b", "a 0"]
    names = ["a/b", "a-b", "A-b", "a-b 0", ".x", "-x", "Boot", "boot", "coat"]
    found = folder_names(names)
    assert len({name.casefold() for name in found}) == len(
        names
    )  # folders of one name, where capitals don't count
    assert found[-1] == "coat" and not {char for name in found for char in name} & set("/\\.")


def test_the_hash_of_a_model_is_that_of_its_content(
    pipeline: ClassifierGuidedPipeline, folder: str
) -> None:
    loaded = ClassifierGuidedPipeline.from_pretrained(folder)
    assert weights_hash(loaded) == weights_hash(pipeline)
    assert module_hash(loaded.classifier) == module_hash(pipeline.classifier)
    next(loaded.classifier.parameters()).data.view(-1)[-1] += 1e-4
    assert weights_hash(loaded) != weights_hash(pipeline)
    assert module_hash(loaded.classifier) != module_hash(pipeline.classifier)


def test_the_manifest_names_the_commit_of_a_model_of_the_hub(
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a cache as the Hub's client leaves it, offline."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--user--boots"
    for reference, commit_hash in (("main", "a" * 40), ("v1", "b" * 40)):
        shutil.copytree(folder, repository / "snapshots" / commit_hash)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(commit_hash)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for more, expected in (([], "a" * 40), (["--revision", "v1"], "b" * 40)):
        run("user/boots", "--label", "boot", "--num-images", "1", "--output", expected, *more)
        manifest = json.loads(Path(expected, "manifest.json").read_text())
        assert (manifest["model"], manifest["revision"]) == ("user/boots", expected)
    with pytest.raises(SystemExit, match=f"revision is {'b' * 40}, here {'a' * 40}"):
        run("user/boots", "--label", "boot", "--num-images", "1", "--output", "b" * 40)
    assert hub_commit(folder) is hub_commit("fashion-mnist") is None


def test_differences() -> None:
    one, other = {"a": 1, "b": {"c": [1], "d": 2}}, {"a": 1, "b": {"c": [2]}, "e": 0}
    assert list(differences(one, other)) == [("b.c", [1], [2]), ("b.d", 2, None), ("e", None, 0)]
    assert not list(differences(one, one))


def test_progress_is_said_unless_it_is_turned_off(
    make: Make, capsys: pytest.CaptureFixture
) -> None:
    make("a", progress=True)
    said = capsys.readouterr().err
    assert (
        "10/10" in said and "image/s" in said and "00:00<" in said and "2/2" not in said
    )  # no bar a batch
    make("a", progress=True)
    assert "10/10" in capsys.readouterr().err
    make("b")
    assert not capsys.readouterr().err


def test_a_run_warns_once_not_once_a_batch(
    pipeline: ClassifierGuidedPipeline,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clipping = ClassifierGuidedPipeline(
        pipeline.unet,
        DDIMScheduler(clip_sample=True, timestep_spacing="trailing"),
        pipeline.classifier,
    )
    clipping.set_progress_bar_config(disable=True)

    def said() -> int:
        found = caplog.text.count("DDIMScheduler clips x0")
        caplog.clear()
        return found

    for name in ("a", "b"):  # each run says it
        sample_to_folder(
            clipping,
            [0, 1],
            tmp_path / name,
            6,
            batch_size=1,
            shard_size=2,
            num_inference_steps=1,
            progress=False,
        )
        assert said() == 1
    for _ in sample(clipping, [0, 1], 0, 1, range(4), num_inference_steps=1):
        pass
    assert said() == 1
    for _ in range(2):
        clipping("boot", num_inference_steps=1)
    assert said() == 2  # nothing is held back elsewhere


def test_an_error_while_a_file_is_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_json({"a": [1.0, float("nan")]}, tmp_path / "x.json")
    with pytest.raises(ValueError, match="mine"), aside(tmp_path / "x.json") as partial:
        partial.write_text("half")
        raise ValueError("mine")
    assert files(tmp_path) == {"x.json": b'{\n  "a": [\n    1.0,\n    null\n  ]\n}\n'}
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/x.json can't be written"):
        write_json({}, tmp_path / "file" / "x.json")


def test_a_label_that_is_a_mixture_is_refused(
    make: Make,
    pipeline: ClassifierGuidedPipeline,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="one label an image is allowed"):
        sample_to_folder(pipeline, [{"boot": 0.5, "coat": 0.5}], tmp_path / "x", 2)


def test_pictures_are_as_they_were(folder: str, tmp_path: Path) -> None:
    """The images of a picture are those of a folder."""
    run(folder, "--label", "boot", "--num-images", "1", "--output", str(tmp_path / "one.jpg"))
    run(folder, "--label", "boot", "--num-images", "1", "--output", str(tmp_path / "one.png"))
    run(folder, "--label", "boot", "--num-images", "1", "--output", str(tmp_path / "one"))
    with (
        Image.open(tmp_path / "one.png") as picture,
        Image.open(tmp_path / "one" / "boot" / "000000.png") as image,
    ):
        assert (
            picture.size == (80, 80)
            and picture.resize((8, 8), 0).convert("L").tobytes() == image.tobytes()
        )


def test_the_manifest_has_what_a_call_settled(folder: str) -> None:
    """Of `guidance_every` and `guidance_tolerance` one turns the other's default off, and None is the default."""
    own = ClassifierGuidedPipeline.from_pretrained(folder)
    own.register_to_config(
        defaults={**own.config.defaults, "guidance_tolerance": 0.05, "guidance_scale": 4.0}
    )
    assert resolve_defaults(own, {})["guidance_tolerance"] == 0.05
    found = resolve_defaults(
        own, {"guidance_every": 4, "guidance_scale": None, "conditional": None}
    )
    assert (found["guidance_every"], found["guidance_tolerance"], found["guidance_scale"]) == (
        4,
        None,
        4.0,
    )
    assert found["conditional"] is None
    assert resolve_defaults(own, {"guidance_tolerance": 0.1})["guidance_every"] == 1


def test_the_program_guides_a_part_of_the_run_and_goes_on_with_any_scheduler(
    folder: str,
    tmp_path: Path,
) -> None:
    """DPM-Solver has an infinite number in its config, which JSON has not."""
    common = [
        "--label",
        "boot",
        "--num-images",
        "2",
        "--scheduler",
        "dpmsolver",
        "--guidance-scale",
        "9",
    ]
    for name, more in (
        ("whole", []),
        ("part", ["--guidance-start", "0.5", "--guidance-stop", "0.9"]),
    ):
        for _ in range(2):
            run(folder, *common, *more, "--output", str(tmp_path / name))
    whole, part = (
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "part")
    )
    assert (whole["guidance_start"], whole["guidance_stop"]) == (0, 1)
    assert (part["guidance_start"], part["guidance_stop"]) == (0.5, 0.9) and part["complete"]
    assert (
        part["scheduler"]["lambda_min_clipped"] is None and "clip_sample" not in part["scheduler"]
    )
    assert (
        files(tmp_path / "whole")["boot/000000.png"] != files(tmp_path / "part")["boot/000000.png"]
    )


# Waiting for other processes


def test_a_process_waits_for_others_as_long_as_they_finish_shards(tmp_path: Path) -> None:
    """Six shards, one each 0.3 s: longer in all than the limit. Then one that isn't finished."""
    parts = Shards(tmp_path, "imagefolder", ["coat"], [0], 7, 1)
    processes = SimpleNamespace(process_index=1, num_processes=3)

    def finish() -> None:
        for shard in range(6):
            time.sleep(0.3)
            write_json({"files": {}}, parts.records / f"{shard:05d}.json")

    other = Thread(target=finish)
    other.start()
    began = time.monotonic()
    wait_for_shards(parts, [0, 1, 2, 3, 4, 5], processes, 1.2)
    other.join()
    assert time.monotonic() - began >= 1.7
    message = (
        r"process 1 waited 0.01 minutes for 1 of 7 shards of .*, of process 0, which is stopped"
    )
    with pytest.raises(RuntimeError, match=message):
        wait_for_shards(parts, [0, 1, 2, 6], processes, 0.6)


STOPS = """
import os, signal, sys
from guided_diffusers.cli import main
from guided_diffusers.sampling.shards import Shards

write = Shards.write
def stop(self, shard, *rest):
    if shard == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    write(self, shard, *rest)

if os.environ["RANK"] == "1":
    Shards.write = stop
main(sys.argv[1:])
"""


def test_a_stopped_process_ends_the_command(folder: str, tmp_path: Path) -> None:
    """And the same command goes on."""
    output = tmp_path / "out"
    line = (
        f"sample --model {folder} --label 0 --num-images 5 --shard-size 1 --batch-size 1 --device"
    )
    line += f" cpu --num-inference-steps 2 --timeout-minutes 0.3 --quiet --output {output}"
    first, second = processes = ranks(STOPS, line.split(), 2, tmp_path)
    try:
        said = first.communicate(timeout=200)[1]
        assert psutil.Process(second.pid).status() == psutil.STATUS_STOPPED
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert first.returncode == 1
    assert said.splitlines()[-1].startswith(
        f"guided-diffusers sample: process 0 waited 0.3 minutes for 1 of 5 shards of {output}, of "
        "process 1, which is stopped, lost or slower than that; --timeout-minutes sets the limit"
    )
    assert "Traceback" not in said
    run(folder, *line.split()[3:])
    assert len(list(output.rglob("*.png"))) == 5


@pytest.mark.parametrize("minutes", [0.0, -1.0, 1e9, float("nan"), float("inf")])
def test_time_limits_that_are_none(minutes: float) -> None:
    with pytest.raises(ValueError, match="--timeout-minutes .*: above 0, up to 43200, is allowed"):
        launched_processes("cpu", minutes)
