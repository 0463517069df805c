"""`guided-diffusers evaluate` on tiny data sets and networks: what it reads, finds, says and refuses."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import files_of_at_most
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.cli import main
from guided_diffusers.evaluation import (
    Bootstrap,
    DatasetImages,
    Evaluation,
    evaluate,
    load_inception,
    load_network,
    open_generated,
    open_real,
    results,
    wrap_classifier,
    wrap_module,
)
from guided_diffusers.evaluation.bits import noise_process
from guided_diffusers.evaluation.labels import match_labels
from guided_diffusers.evaluation.metrics import (
    Moments,
    density_coverage,
    frechet_distance,
    kernel_distance,
    precision_recall,
    sliced_wasserstein,
)
from guided_diffusers.evaluation.report import draw_confusion
from guided_diffusers.learning.losses import bits_per_dim
from guided_diffusers.sampling import image_generator, sample_to_folder
from guided_diffusers.sampling.shards import Shards, parquet

NAMES = ["boot", "coat", "hat/cap"]


def pixels(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Noisy squares, (N, 8, 8) uint8, bright where their label is."""
    labels = [i % 3 for i in range(count)]
    found = np.random.default_rng(seed).integers(0, 120, (count, 8, 8))
    for i, label in enumerate(labels):
        found[i, 2 * label : 2 * label + 3] += 100
    return found.astype(np.uint8), labels


def png(array: np.ndarray, path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path.read_bytes()


def write(path: Path, form: str, count: int = 60, seed: int = 2) -> Path:
    """Generated images in one of the forms of `guided-diffusers sample`."""
    arrays, labels = pixels(count, seed)
    pngs = [
        png(array, path / "pngs" / NAMES[label].replace("/", "-") / f"{i:06d}.png")
        for i, (array, label) in enumerate(zip(arrays, labels, strict=True))
    ]
    match form:
        case "npz":
            np.savez(path / "samples.npz", arrays[..., None].repeat(3, 3), np.array(labels))
            return path / "samples.npz"
        case "parquet":
            for shard in range(0, count, 25):
                file = path / "shards" / "data" / f"train-{shard:05d}.parquet"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(
                    parquet(pngs[shard : shard + 25], labels[shard : shard + 25], NAMES)
                )
            return path / "shards"
    return path / "pngs"


def judge_module(names: list[str] = NAMES) -> NoiseAwareClassifier:
    torch.manual_seed(0)
    found = NoiseAwareClassifier(
        8,
        1,
        len(names),
        (8, 16),
        ("DownBlock2D",) * 2,
        1,
        "conv",
        "default",
        8,
        4,
        pool="adaptive",
        id2label=dict(enumerate(names)),
    )
    torch.nn.init.normal_(found.head[-1].weight)
    return found.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set `real` with 90 training and 50 test images, and the judge `judge`."""
    place = tmp_path_factory.mktemp("evaluate")
    for split, count, seed in (("train", 90, 0), ("test", 50, 1)):
        arrays, labels = pixels(count, seed)
        data = parquet([png(array, place / "x.png") for array in arrays], labels, NAMES)
        (place / "real").mkdir(exist_ok=True)
        (place / "real" / f"{split}-00000.parquet").write_bytes(data)
    judge_module().save_pretrained(place / "judge")
    return place


def run(
    place: Path, images: Path | None, *arguments: str, judge: str | None = None
) -> dict[str, Any]:
    main(
        [
            "evaluate",
            *([str(images)] if images else []),
            "--dataset",
            str(place / "real"),
            "--features",
            judge or str(place / "judge"),
            "--output",
            str(place / "out"),
            "--quiet",
            "--device",
            "cpu",
            "--bootstrap",
            "20",
            *arguments,
        ]
    )
    return json.loads((place / "out" / "evaluation.json").read_text())


def stacked(images: Any) -> tuple[torch.Tensor, torch.Tensor]:
    items = list(images.read(0, len(images)))
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def test_all_forms_are_read_alike(place: Path, tmp_path: Path) -> None:
    found = {
        form: open_generated(write(tmp_path / form, form))
        for form in ("imagefolder", "parquet", "npz")
    }
    arrays, labels = pixels(60, 2)
    expected = torch.from_numpy(arrays)[:, None].float() / 127.5 - 1
    for form in ("parquet", "npz"):
        images, got = stacked(found[form])
        assert (
            torch.allclose(images, expected.expand_as(images), atol=1e-6) and got.tolist() == labels
        ), form
    assert found["parquet"].shape == (1, 8, 8) and found["npz"].shape == (3, 8, 8)
    images, got = stacked(found["imagefolder"])  # in the order of their folders
    order = sorted(range(60), key=lambda i: (labels[i], i))
    assert torch.allclose(images, expected[order], atol=1e-6) and got.tolist() == [
        labels[i] for i in order
    ]
    for images in found.values():  # from anywhere
        assert [label for _, label in images.read(23, 53)] == [
            label for _, label in images.read(0, 60)
        ][23:53]
        assert torch.equal(next(images.read(41, 42))[0], list(images.read(0, 60))[41][0])


def test_figures_are_those_of_the_judges_features(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Against the metrics of all features at once, computed here; the same for each form but for the images' order."""
    module = judge_module()
    seen: list[torch.Tensor] = []
    module.head[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    generated = write(tmp_path, "parquet")
    images, labels = stacked(open_generated(generated))
    with torch.no_grad():
        logits = module(images, 0).logits
        module(stacked(open_real(str(place / "real"), (1, 8, 8)))[0], 0)
    features, real = seen
    found = run(place, generated, "--batch-size", "7")
    value = {name: figure["value"] for name, figure in found["figures"].items()}
    assert value["frechet_distance"] == pytest.approx(frechet_distance(real, features), rel=1e-5)
    assert value["kernel_distance"] == pytest.approx(
        float(kernel_distance(real, features)), rel=1e-4
    )
    assert value["sliced_wasserstein"] == pytest.approx(
        float(sliced_wasserstein(real, features)), rel=1e-4
    )
    assert (value["precision"], value["recall"]) == pytest.approx(precision_recall(real, features))
    assert (value["density"], value["coverage"]) == pytest.approx(density_coverage(real, features))
    right = logits.argmax(1) == labels
    assert value["top_1"] == pytest.approx(float(right.double().mean()))
    assert np.trace(found["confusion"]) == right.sum() and np.sum(found["confusion"]) == 60
    for row in found["per_class"]:
        mine, true = labels == row["label"], torch.arange(50) % 3 == row["label"]
        assert row["name"] == NAMES[row["label"]] and row["images"] == 20
        assert row["top_1"]["value"] == pytest.approx(float(right[mine].double().mean()))
        distance = frechet_distance(real[true], features[mine])
        assert row["frechet_distance"]["value"] == pytest.approx(distance, rel=1e-4)
    for figure in found["figures"].values():
        low, high = figure["interval"]
        assert low <= figure["value"] <= high
    assert found["settings"]["features"]["network"] == str(place / "judge")
    assert (
        found["settings"]["real"]["split"] == "test" and found["settings"]["images"]["count"] == 60
    )
    said = capsys.readouterr().out
    assert "Frechet distance" in said and "FID" not in said and "hat/cap" in said
    assert {one.name for one in (place / "out").iterdir()} == {
        "evaluation.json",
        "confusion.png",
        "nearest.png",
    }
    assert Image.open(place / "out" / "confusion.png").size[0] > 300
    assert Image.open(place / "out" / "nearest.png").size[0] > 10 * 80

    for form in ("imagefolder", "npz"):
        again = run(place, write(tmp_path / form, form))["figures"]
        for name, figure in again.items():
            assert figure["value"] == pytest.approx(value[name], rel=1e-3, abs=1e-6), name


def test_options_have_an_effect(place: Path, tmp_path: Path) -> None:
    generated = write(tmp_path, "parquet")
    plain = run(place, generated)
    few = run(
        place,
        generated,
        "--max-features",
        "30",
        "--bootstrap",
        "0",
        "--no-per-class",
        "--judge",
        "none",
        "--training-split",
        "none",
        "--no-picture",
        "--split",
        "train",
    )
    assert (
        few["figures"]["precision"]["images"] == 30
        and few["figures"]["frechet_distance"]["images"] == 60
    )
    assert few["figures"]["frechet_distance"]["interval"] is None and few["per_class"] == []
    assert (
        few["confusion"] is None
        and "top_1" not in few["figures"]
        and few["settings"]["real"]["split"] == "train"
    )
    assert "memorised" not in few["figures"] and any(
        "a sample of 30 of the 60" in note for note in few["notes"]
    )
    other = run(place, generated, "--seed", "5", "--confidence", "0.5", "--nearest", "10")
    wide, narrow = (one["figures"]["precision"]["interval"] for one in (plain, other))
    assert wide != narrow and other["figures"]["nearest_ratio"]["images"] == 10
    assert plain["figures"]["precision"]["value"] == other["figures"]["precision"]["value"]


def test_real_images_of_another_white_and_alpha(place: Path, tmp_path: Path) -> None:
    """Those of 12 bits in 16, and shapes in the alpha, are the images of 8 bits, by the options."""
    for split, count, seed in (("train", 90, 0), ("test", 50, 1)):
        for i, (array, label) in enumerate(zip(*pixels(count, seed), strict=True)):
            name = Path(split, "abc"[label], f"{i}.png")
            deep = (array.astype(float) / 255 * 4095).round().astype(np.uint16)
            png(deep, tmp_path / "deep" / name)
            icon = np.zeros((8, 8, 4), np.uint8)
            icon[..., 3] = 255 - array
            png(icon, tmp_path / "icons" / name)
            png(array, tmp_path / "usual" / name)
    generated = write(tmp_path / "generated", "npz")
    options = ("--max-features", "50", "--nearest", "5")
    plain = run(place, generated, *options, "--dataset", str(tmp_path / "usual"))
    for folder, flag, value in (
        ("deep", "--image-range", "0,4095"),
        ("icons", "--alpha-background", "white"),
    ):
        line = (*options, "--dataset", str(tmp_path / folder))
        with pytest.raises(SystemExit, match=flag.replace("-", "_").replace("__", "--")):
            run(place, generated, *line)
        result = run(place, generated, *line, flag, value)
        for name in ("frechet_distance", "kernel_distance", "nearest_ratio"):  # continuous ones
            figure = plain["figures"][name]
            assert result["figures"][name]["value"] == pytest.approx(figure["value"], 0.02, 1e-4)
        assert result["settings"]["real"][flag[2:].replace("-", "_")]
    with pytest.raises(SystemExit, match="--image_range '5': LOW,HIGH is allowed"):
        run(place, generated, "--image-range", "5")


def test_several_processes_give_the_same_figures(place: Path, tmp_path: Path) -> None:
    generated = write(tmp_path, "parquet")
    options = [
        "--max-features",
        "40",
        "--batch-size",
        "7",
        "--bits-per-dim",
        "5",
        "--model",
        str(tmp_path / "model"),
    ]
    pipeline().save_pretrained(tmp_path / "model")
    one = run(place, generated, *options)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "guided_diffusers",
        "evaluate",
        str(generated),
        "--dataset",
        str(place / "real"),
        "--features",
        str(place / "judge"),
        "--output",
        str(tmp_path / "two"),
        "--quiet",
        "--device",
        "cpu",
        "--bootstrap",
        "20",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Frechet distance") == 1  # one process says it
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert two["settings"].pop("processes") == 2 and one["settings"].pop("processes") == 1
    assert alike(one, two)


def alike(one: Any, other: Any) -> bool:
    """Equal, numbers to rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return (
        one == other
        if not isinstance(one, float)
        else one == pytest.approx(other, rel=1e-5, abs=1e-7)
    )


SEPARATE = """
import shutil, sys
from datetime import timedelta
from pathlib import Path
import torch
from accelerate import PartialState
from guided_diffusers.evaluation import DatasetImages, Settings, wrap_module, open_real, summarise

state, place, root = PartialState(cpu=True, timeout=timedelta(seconds=60)), *map(Path, sys.argv[1:])
with state.main_process_first():
    images = open_real(str(place / "real"), (1, 8, 8))
read, before = [], DatasetImages.read
DatasetImages.read = lambda self, start, stop: read.append(stop - start) or before(self, start, stop)

def found(cache):
    read.clear()
    network = wrap_module(torch.nn.Flatten())
    summary = summarise(images, network, None, Settings(), progress=False, cache=cache)
    parts = summary.accumulators()
    return [value for part in parts for value in part.state().values()]

expected = found(root / "shared")
for having in (0, 1):
    mine = root / f"{having} of {state.process_index}"
    if state.process_index == having:
        shutil.copytree(root / "shared", mine)
    assert all(map(torch.equal, found(mine), expected))
    assert sum(read) == (1 if having == 0 else 26), read  # one image tells the features' width
print("alike")
state.destroy_process_group()  # or its threads may end the process with an error
"""


def test_one_process_looks_for_all_whether_something_was_kept(place: Path, tmp_path: Path) -> None:
    """Two processes, each with a folder of its own, of which one has the real images' summary."""
    (tmp_path / "separate.py").write_text(SEPARATE)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "separate.py"),
        str(place),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("alike") == 2


MEMORY = """
import resource, sys, torch
from guided_diffusers.evaluation import DatasetImages, evaluate, wrap_classifier
sys.path.insert(0, sys.argv[2])
from test_evaluate import Drawn

model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 3))
model.config = {"id2label": {0: "boot", 1: "coat", 2: "hat"}}
judge = wrap_classifier(model)
names = judge.names
found = evaluate(DatasetImages(Drawn(int(sys.argv[1]), 0), names), DatasetImages(Drawn(600, 1), names), judge, judge,
                 DatasetImages(Drawn(int(sys.argv[1]), 2), names), max_features=500, nearest=100, bootstrap=2,
                 per_class=False, progress=False, batch_size=500)
assert found.metrics["top_1"]["images"] == int(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


class Drawn:
    """Items that are made when they are read."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        image = torch.linspace(0, 1e4 + i, 64).add(self.seed).sin().reshape(1, 8, 8)
        return {"pixel_values": image, "label": i % 3}


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """Peaks of processes; the features of 18,000 more images would be 74 MB."""
    peaks = []
    for count in ("2000", "20000"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, count, str(Path(__file__).parent)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_copied_training_images_are_found(place: Path) -> None:
    """A third of the generated images are training images."""
    training, held_out = (
        open_real(str(place / "real"), (1, 8, 8), split) for split in ("train", "test")
    )
    copied = [{"pixel_values": image, "label": label} for image, label in training.read(30, 50)]
    arrays, labels = pixels(40, 7)
    fresh = [
        {"pixel_values": torch.from_numpy(array)[None].float() / 127.5 - 1, "label": label}
        for array, label in zip(arrays, labels, strict=True)
    ]
    judge = wrap_classifier(judge_module())
    found = evaluate(
        DatasetImages(fresh + copied, judge.names),
        held_out,
        judge,
        None,
        training,
        bootstrap=20,
        progress=False,
    )
    assert {(one.generated, one.training) for one in found.pairs} <= {
        (40 + i, 30 + i) for i in range(20)
    }
    assert len(found.pairs) == 10 and all(one.distance < 1e-5 for one in found.pairs)
    assert all(torch.equal(*one.images) for one in found.pairs)
    assert (
        found.metrics["memorised"]["value"] >= 1 / 3 and found.metrics["memorised"]["real"] <= 0.02
    )
    none = evaluate(
        DatasetImages(fresh, judge.names),
        held_out,
        judge,
        None,
        training,
        bootstrap=20,
        progress=False,
    )
    assert none.metrics["memorised"]["value"] < 0.1
    assert (
        0.7 < none.metrics["nearest_ratio"]["value"] < 1.4
        and found.metrics["nearest_ratio"]["value"] < none.metrics["nearest_ratio"]["value"]
    )
    assert not [note for note in none.notes if "training images" in note]
    assert "20 of 60 generated images are training images, to rounding" in found.notes


class Shaken(torch.nn.Module):
    """Pixels, far from 0, that differ by as little as rounding does where an image has another place in the batch."""

    def __init__(self, offset: float):
        super().__init__()
        self.offset = torch.nn.Parameter(torch.tensor(offset))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) + self.offset) * (1 + 1e-6 * torch.arange(len(x))[:, None])


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_training_images_among_the_others_are_said(place: Path, offset: float) -> None:
    """Also in features that are far from 0, and in other batches, where they are rounded otherwise."""
    training, held_out = (
        open_real(str(place / "real"), (1, 8, 8), split) for split in ("train", "test")
    )
    rows = {
        name: [
            {"pixel_values": image, "label": label} for image, label in images.read(0, len(images))
        ]
        for name, images in (("training", training), ("held out", held_out))
    }
    network = wrap_module(Shaken(offset))

    def found(generated: list[Any], real: list[Any]) -> tuple[Any, ...]:
        got = evaluate(
            DatasetImages(generated),
            DatasetImages(real),
            network,
            None,
            training,
            bootstrap=5,
            progress=False,
            batch_size=32,
        )
        memorised, ratio = (got.metrics.get(name, {}) for name in ("memorised", "nearest_ratio"))
        return (
            memorised["value"],
            memorised["real"],
            ratio.get("value"),
            [note for note in got.notes if "training images" in note],
        )

    all_ = "{0} of {0} {1} images are training images, to rounding".format
    held, copied = rows["held out"], rows["training"]
    assert found(copied[1:80], held) == (1, pytest.approx(0.02), 0, [all_(79, "generated")])
    # real images that are training images: what is said of generated ones is which of them are, too
    memorised, real, ratio, notes = found(held[:30] + copied[:10], copied)
    assert (memorised, real, ratio) == (0.25, 1, None)
    assert notes[:2] == [
        "10 of 40 generated images are training images, to rounding",
        all_(90, "held-out"),
    ]
    assert notes[2].startswith("most held-out images are training images") and len(notes) == 3
    memorised, real, ratio, notes = found(
        held[:30] + copied[:10], held + copied[:5]
    )  # some of them
    assert memorised == 0.25 and real == pytest.approx(5 / 55) and 0.5 < ratio < 1.5
    assert (
        notes[1] == "5 of 55 held-out images are training images, to rounding" and len(notes) == 2
    )
    memorised, real, ratio, notes = found(held, held)  # the reference's own images
    assert memorised == real == pytest.approx(0.02) and ratio == 1 and not notes


def test_a_collapsed_model_is_not_diverse(place: Path) -> None:
    judge = wrap_classifier(judge_module())
    real = open_real(str(place / "real"), (1, 8, 8))
    arrays, labels = pixels(3, 9)
    same = [
        {"pixel_values": torch.from_numpy(arrays[i % 3])[None].float() / 127.5 - 1, "label": i % 3}
        for i in range(30)
    ]
    found = evaluate(
        DatasetImages(same, judge.names), real, judge, bootstrap=5, progress=False
    ).metrics
    assert found["relative_diversity"]["value"] < 1e-3 and found["coverage"]["value"] < 0.5
    alike_ = evaluate(real, real, judge, bootstrap=5, progress=False).metrics
    assert alike_["relative_diversity"]["value"] == pytest.approx(1)
    assert alike_["frechet_distance"]["value"] == pytest.approx(0, abs=1e-8)
    rows = evaluate(real, real, judge, judge, bootstrap=20, progress=False).per_class
    for figure in (
        alike_["frechet_distance"],
        *(row["frechet_distance"] for row in rows),
    ):  # a distance isn't below 0
        assert 0 == figure["interval"][0] <= figure["value"] < figure["interval"][1]


def test_a_bar_is_shown_where_the_bootstrap_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def slow(real: Any, features: torch.Tensor, weights: Any) -> torch.Tensor:
        return torch.stack([time.sleep(0.4) or weight.sum() for weight in weights])

    monkeypatch.setattr(results, "bootstrap_frechet_distances", slow)
    moments = Moments(2)
    moments.update(torch.eye(2))
    for shown in (True, False):
        assert (
            Bootstrap(4, progress=shown)
            .frechet_distances(moments, torch.eye(2), 7, " of boot")
            .tolist()
            == [7.0] * 4
        )
        said = capsys.readouterr().err
        assert (
            ("Frechet distance of boot, resampled" in said and "/4" in said) if shown else not said
        )


def test_a_network_that_looks_at_what_it_guided_is_said(place: Path, tmp_path: Path) -> None:
    def notes(images: str, *arguments: str, judge: Path = place / "judge") -> list[str]:
        found = run(
            place,
            tmp_path / images,
            "--no-picture",
            "--training-split",
            "none",
            *arguments,
            judge=str(judge),
        )
        return [
            note.split(",")[0]
            for note in found["notes"]
            if "the weights of the classifier that guided" in note
        ]

    guided = ClassifierGuidedPipeline(
        pipeline().unet, DDIMScheduler(clip_sample=False), judge_module()
    )
    for scale in (2.0, 0.0):
        sample_to_folder(
            guided,
            [0, 1, 2],
            tmp_path / str(scale),
            12,
            format="parquet",
            num_inference_steps=2,
            guidance_scale=scale,
            progress=False,
        )
    other = judge_module()
    other.head[-1].weight.data *= 1.5
    other.save_pretrained(tmp_path / "other")
    assert notes("2.0") == ["the judge"]
    assert notes("2.0", "--judge", str(tmp_path / "other")) == ["the network of the features"]
    assert notes("2.0", "--judge", str(place / "judge"), judge=tmp_path / "other") == ["the judge"]
    assert notes("2.0", judge=tmp_path / "other") == notes("0.0") == []


def test_labels_are_matched_by_name(place: Path, tmp_path: Path) -> None:
    """A judge that numbers them otherwise gives the same accuracy; folders are named as they can be."""
    generated, names = write(tmp_path, "imagefolder"), [NAMES[2], NAMES[0], NAMES[1]]
    module, other = judge_module(), judge_module(names)
    other.head[-1].weight.data = module.head[-1].weight.data[[2, 0, 1]]
    other.head[-1].bias.data = module.head[-1].bias.data[[2, 0, 1]]
    other.save_pretrained(tmp_path / "other")
    first, second = run(place, generated), run(place, generated, judge=str(tmp_path / "other"))
    assert first["figures"]["top_1"] == second["figures"]["top_1"]
    assert second["classes"] == names and 0 < first["figures"]["top_1"]["value"] < 1
    assert {
        row["name"]: row["frechet_distance"]["value"] for row in first["per_class"]
    } == pytest.approx(
        {row["name"]: row["frechet_distance"]["value"] for row in second["per_class"]}
    )


@pytest.mark.parametrize(
    "names", [["boot"], ["bullet train", "test", "boot"], ["a/b", "a-b", "Boot", "boot"]]
)
def test_folders_of_ours_are_labels(names: list[str], tmp_path: Path) -> None:
    """Also an only one, those that are called as a split is, and those that are one folder's name."""
    written = Shards(tmp_path, "imagefolder", names, [i % len(names) for i in range(6)], 6, 6)
    written.write(0, [written.encode(Image.new("L", (8, 8), 10 * i)) for i in range(6)])
    written.finish()
    (tmp_path / "manifest.json").write_text('{"complete": true, "num_images": 6}')
    images, labels = stacked(found := open_generated(tmp_path))
    numbers = ((images[:, 0, 0, 0] + 1) * 12.75).round().int().tolist()
    assert sorted(numbers) == list(range(6))
    ids = match_labels(found.names, dict(enumerate(names)), "they", "the judge")
    assert [ids[label] for label in labels.tolist()] == [i % len(names) for i in numbers]


def test_labels_of_one_name_stay_apart() -> None:
    wanted = {0: "crane", 1: "a/b", 2: "crane", 3: "c/d", 4: "c/d"}
    assert match_labels(wanted, wanted, "x", "y") == {i: i for i in range(5)}
    assert match_labels(
        {0: "a-b", 1: "c-d 3", 2: "c/d 4", 3: "crane 0", 4: "crane 2"}, wanted, "x", "y"
    ) == {0: 1, 1: 3, 2: 4, 3: 0, 4: 2}
    assert (
        match_labels({0: "crane 2", 1: "crane"}, {0: "crane", 1: "crane 2", 2: "crane"}, "x", "y")[
            0
        ]
        == 1
    )


def test_what_was_found_of_real_images_is_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated, options = (
        write(tmp_path, "parquet"),
        ("--cache", str(tmp_path / "cache"), "--training-split", "none"),
    )
    first = run(place, generated, *options)
    (kept,) = (tmp_path / "cache").iterdir()
    seen: list[int] = []
    before = DatasetImages.read
    monkeypatch.setattr(
        DatasetImages,
        "read",
        lambda self, start, stop: seen.append(stop - start) or before(self, start, stop),
    )
    assert run(place, generated, *options) == first
    assert 50 not in seen and 60 not in seen  # shards of 25, and one image for its features' width
    run(place, generated, *options, "--seed", "1")
    assert 50 in seen and len(list((tmp_path / "cache").iterdir())) == 2
    assert (
        open_real(str(place / "real"), (1, 8, 8)).description.items()
        >= {  # which the kept file's name is made of
            "image_column": "image",
            "label_column": "label",
        }.items()
    )


def test_networks_of_transformers(place: Path, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        id2label=dict(enumerate(NAMES)),
    )
    processor = ViTImageProcessor(do_resize=False, image_mean=[0.5], image_std=[0.25])
    for name, cls in (("judge", ViTForImageClassification), ("features", ViTModel)):
        cls(config).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    images, _ = stacked(open_real(str(place / "real"), (1, 8, 8)))
    pixel_values = ((images + 1) / 2 - 0.5) / 0.25
    with torch.no_grad():
        features, logits = load_network(tmp_path / "judge")(images)
        model = ViTForImageClassification.from_pretrained(tmp_path / "judge")
        assert torch.allclose(logits, model(pixel_values).logits, atol=1e-5)
        assert torch.allclose(features, model.vit(pixel_values).last_hidden_state[:, 0], atol=1e-5)
        features, logits = load_network(tmp_path / "features")(images)
        expected = ViTModel.from_pretrained(tmp_path / "features")(pixel_values).pooler_output
        assert torch.allclose(features, expected, atol=1e-5) and logits is None
    found = run(
        place,
        write(tmp_path, "parquet"),
        "--judge",
        str(tmp_path / "judge"),
        judge=str(tmp_path / "features"),
    )
    assert (
        found["settings"]["judge"]["network"] == str(tmp_path / "judge")
        and "top_1" in found["figures"]
    )


def test_only_features_of_inception_make_an_fid(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for torch-fidelity's class, which needs 90 MB of weights."""
    images = open_real(str(place / "real"), (1, 8, 8))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pip install torch-fidelity"):
        load_network("inception")

    class Published(torch.nn.Module):
        def __init__(self, name: str, features: list[str], weights: str):
            super().__init__()
            assert features == ["2048", "logits_unbiased"]
            self.weight = torch.nn.Parameter(torch.load(weights, weights_only=True))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert x.dtype == torch.uint8 and x.shape[1:] == (3, 8, 8)
            return x.flatten(1)[:, :8].float(), x.flatten(1).repeat(1, 6)[:, :1008].float() / 50

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Published
    package = types.ModuleType("torch_fidelity")
    package.feature_extractor_inceptionv3 = module
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save(torch.zeros(1), tmp_path / "weights.pth")
    network = load_inception(tmp_path / "weights.pth")
    found = evaluate(images, images, network, bootstrap=5, progress=False)
    assert found.metrics["frechet_distance"]["name"] == "FID" and "Inception score" in str(found)
    assert found.metrics["sliced_wasserstein"]["name"] == "MIND"
    grey, _ = pixels(50, 1)
    assert torch.equal(
        network(stacked(images)[0])[0], torch.from_numpy(grey).flatten(1)[:, :8].float()
    )
    other = evaluate(images, images, wrap_module(torch.nn.Flatten()), bootstrap=5, progress=False)
    assert (
        other.metrics["frechet_distance"]["name"] == "Frechet distance"
        and other.metrics["sliced_wasserstein"]["name"] == "sliced Wasserstein distance"
        and "class_score" not in other.metrics
    )


def test_dinov2_is_one_of_torch_fidelitys_extractors(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for its registry, which has classes (name, layers) -> images -> (features,)."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"need torch-fidelity 0.4: pip install"):
        load_network("dinov2-vit-b-14")

    class Tiny(torch.nn.Module):
        def __init__(self, name: str, layers: list[str]):
            super().__init__()
            assert (name, layers) == ("dinov2-tiny", ["dinov2"])
            self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 192 * 4).reshape(192, 4))

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return {"fid": "dinov2"}[metric]

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            assert x.dtype == torch.uint8 and x.shape[1:] == (3, 8, 8)
            return (x.flatten(1).float() @ self.weight,)

    registry = types.ModuleType("torch_fidelity.registry")
    registry.FEATURE_EXTRACTORS_REGISTRY = {"inception-v3-compat": Tiny}
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    with pytest.raises(ImportError, match="an older one is installed"):
        load_network("dinov2-vit-b-14")
    registry.FEATURE_EXTRACTORS_REGISTRY["dinov2-tiny"] = Tiny
    with pytest.raises(ValueError, match=r"'dinov2-vit-b-14' is unknown; dinov2-tiny"):
        load_network("dinov2-vit-b-14")
    network = load_network("dinov2-tiny")
    images = open_real(str(place / "real"), (1, 8, 8))
    grey, _ = pixels(50, 1)
    colours = torch.from_numpy(grey).flatten(1).repeat(1, 3).float()
    found, logits = network(stacked(images)[0])
    assert torch.allclose(found, colours @ network.module.weight) and logits is None
    metrics = evaluate(images, images, network, bootstrap=0, progress=False).metrics
    assert metrics["frechet_distance"]["name"] == "Frechet distance"
    assert metrics["sliced_wasserstein"]["value"] < 1e-6 and "top_1" not in metrics


def pipeline() -> ClassifierGuidedPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        8,
        1,
        1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=4,
    )
    return ClassifierGuidedPipeline(
        unet,
        DDIMScheduler(num_train_timesteps=6, beta_end=0.5),
        id2label=dict(enumerate(reversed(NAMES))),
    )


def test_bits_per_dimension(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The bound of the images themselves, told the network's ids of their labels."""
    pipeline().save_pretrained(tmp_path / "model")
    found = run(
        place, None, "--bits-per-dim", "10", "--model", str(tmp_path / "model"), "--batch-size", "4"
    )
    images, labels = stacked(open_real(str(place / "real"), (1, 8, 8)))
    model = pipeline()
    expected = bits_per_dim(
        model.unet.eval(),
        noise_process(model),
        images[::5],
        2 - labels[::5],
        generator=[image_generator(0, i) for i in range(10)],
    )
    bits = found["bits_per_dimension"]
    assert bits["total"]["value"] == pytest.approx(float(expected["total"].mean()), rel=1e-6)
    assert bits["prior"] + sum(row["bound"] for row in bits["terms"]) == pytest.approx(
        bits["total"]["value"]
    )
    assert [row["timestep"] for row in bits["terms"]] == list(range(6))
    assert [row["x0_mse"] for row in bits["terms"]] == pytest.approx(
        expected["x0_mse"].mean(0).tolist(), rel=1e-5
    )
    low, high = bits["total"]["interval"]
    assert low < bits["total"]["value"] < high and bits["images"] == 10
    assert "bits per dimension" in capsys.readouterr().out
    assert Image.open(place / "out" / "bits_per_dim.png").size[0] > 900


@pytest.mark.parametrize(
    "feature", [Value("int64"), Value("uint8"), ClassLabel(names=["0", "1", "2"])]
)
def test_bits_per_dimension_of_labels_without_names(
    feature: Any, place: Path, tmp_path: Path
) -> None:
    """Ids stay ids for a network that has names; those that it hasn't are refused."""
    pipeline().save_pretrained(tmp_path / "model")
    arrays, labels = pixels(20, 1)
    for name, ids in (("real", labels), ("more", [label + 1 for label in labels])):
        if name == "more" and isinstance(feature, ClassLabel):
            feature = ClassLabel(names=["0", "1", "2", "3"])
        rows = Dataset.from_dict(
            {"image": [png(array, tmp_path / "x.png") for array in arrays], "label": ids}
        )
        (tmp_path / name).mkdir()
        rows.cast(Features({"image": ImageFeature(), "label": feature})).to_parquet(
            tmp_path / name / "test.parquet"
        )
    bits = (
        "--bits-per-dim",
        "10",
        "--model",
        str(tmp_path / "model"),
        "--label-column",
        "label",
        "--no-picture",
    )
    found = run(tmp_path, None, *bits)["bits_per_dimension"]["total"]["value"]
    images, ids = stacked(open_real(str(tmp_path / "real"), (1, 8, 8), label_column="label"))
    model = pipeline()
    noise = [[image_generator(0, i) for i in range(10)] for _ in range(2)]
    for draws, dtype in zip(noise, (torch.int64, torch.uint8), strict=True):
        expected = bits_per_dim(
            model.unet.eval(),
            noise_process(model),
            images[::2],
            ids[::2].to(dtype),
            generator=draws,
        )
        assert found == pytest.approx(float(expected["total"].mean()), rel=1e-6)
    with pytest.raises(
        ValueError, match="class_labels are torch.float32; ids, integers, are allowed"
    ):
        bits_per_dim(model.unet, noise_process(model), images[::2], ids[::2].float())
    with pytest.raises(
        SystemExit,
        match=r"images have the labels \[3\]; the network has \[0, 1, 2\]",
    ):
        run(tmp_path, None, *bits, "--dataset", str(tmp_path / "more"))


@pytest.mark.parametrize("content", [b"not found", None])
def test_an_unreadable_image_of_a_parquet_file_is_named(
    content: bytes | None, tmp_path: Path
) -> None:
    """By its row in that file, wherever reading started; those before it are read. None: a picture that is cut."""
    arrays, labels = pixels(300, 0)
    good = [png(array, tmp_path / "x.png") for array in arrays]
    bad = [*good[:280], content or good[280][:-30], *good[281:]]
    for name, rows in (("a", good[:9]), ("b", bad)):
        (tmp_path / f"{name}.parquet").write_bytes(parquet(rows, labels[: len(rows)], NAMES))
    images = open_generated(tmp_path)
    for start in (0, 9, 200, 280, 289):
        reading = images.read(start, 309)
        assert len(list(itertools.islice(reading, 289 - start))) == 289 - start
        with pytest.raises(ValueError, match="row 280 of .*b.parquet can't be read"):
            next(reading)
    (tmp_path / "a.parquet").write_bytes(parquet([bad[280]] * 9, labels[:9], NAMES))
    with pytest.raises(ValueError, match="row 0 of .*a.parquet can't be read"):
        open_generated(tmp_path)


def test_a_full_disk_loses_no_figure(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What was found is said, what was there before stays, and nothing is half-written."""
    generated, save = write(tmp_path, "parquet"), Evaluation.save
    run(place, generated, "--output", str(tmp_path / "out"), "--seed", "1")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()

    def limited(*arguments: Any) -> None:
        with files_of_at_most(100):
            save(*arguments)

    monkeypatch.setattr(Evaluation, "save", limited)
    with pytest.raises(
        SystemExit, match="evaluate: .*evaluation.json can't be written: File too large"
    ):
        run(place, generated, "--output", str(tmp_path / "out"))
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    said = capsys.readouterr().out
    assert "Frechet distance" in said and "hat/cap" in said


def broken(tmp_path: Path, how: str) -> Path:
    """Generated images with something wrong."""
    form = "npz" if "npz" in how else "parquet" if "Parquet" in how else "imagefolder"
    path = write(tmp_path, form)
    match how:
        case "an unreadable picture":
            file = next(path.rglob("*.png"))
            file.write_bytes(file.read_bytes()[:60])
        case "no picture":
            next(path.rglob("*.png")).write_text("not found")
        case "another size":
            png(np.zeros((9, 9), np.uint8), next(path.rglob("000031.png")))
        case "a truncated Parquet shard":
            file = sorted(path.rglob("*.parquet"))[1]
            file.write_bytes(file.read_bytes()[:-100])
        case "a damaged Parquet shard":
            file = sorted(path.rglob("*.parquet"))[2]
            start = pyarrow.parquet.read_metadata(file).row_group(0).column(0).data_page_offset
            data = bytearray(file.read_bytes())
            data[start : start + 40] = bytes(40)
            file.write_bytes(data)
        case "an unreadable image in a Parquet shard":
            file, (arrays, labels) = sorted(path.rglob("*.parquet"))[1], pixels(60, 2)
            pngs = [png(array, tmp_path / "x.png") for array in arrays[25:50]]
            file.write_bytes(parquet([*pngs[:7], pngs[7][:-30], *pngs[8:]], labels[25:50], NAMES))
        case "a truncated npz":
            path.write_bytes(path.read_bytes()[:-500])
        case "a damaged npz":
            data = bytearray(path.read_bytes())
            data[4000] ^= 1
            path.write_bytes(data)
        case "an npz of floats":
            np.savez(path, np.zeros((20, 8, 8, 3)))
        case "an npz of fewer labels":
            np.savez(path, np.zeros((20, 8, 8, 3), np.uint8), np.zeros(19, int))
        case "an npz without labels":
            np.savez(path, pixels(20, 2)[0][..., None])
        case "too few in an npz":
            np.savez(path, pixels(5, 2)[0][..., None], np.arange(5) % 3)
        case "an npz of unknown labels":
            np.savez(path, pixels(20, 2)[0][..., None], np.arange(20))
        case "an unfinished run":
            (path / "manifest.json").write_text('{"complete": false}')
        case "a manifest of more":
            (path / "manifest.json").write_text('{"complete": true, "num_images": 61}')
        case "no manifest":
            (path / "manifest.json").write_text('{"complete": tr')
    return path


@pytest.mark.parametrize(
    "how, message",
    [
        ("an unreadable picture", r"row \d+ \(.*png\) can't be read"),
        ("no picture", r"row \d+ \(.*png\) can't be read"),
        ("another size", "row 30 has 9 by 9 pixels, other rows have 8 by 8"),
        ("a truncated Parquet shard", r"train-00025.parquet can't be read; it is truncated"),
        ("a damaged Parquet shard", r"train-00050.parquet can't be read; it is damaged"),
        (
            "an unreadable image in a Parquet shard",
            r"image of row 7 of .*train-00025.parquet can't be read",
        ),
        ("a truncated npz", "samples.npz can't be read; it is truncated"),
        ("a damaged npz", "samples.npz can't be read: Bad CRC-32"),
        ("an npz of floats", r"arr_0 of .* is \(20, 8, 8, 3\) float64; \(N, H, W, 1 or 3\) uint8"),
        ("an npz of fewer labels", r"has 20 images and labels of shape \(19,\)"),
        ("an npz without labels", "judge: the generated images have no labels"),
        ("too few in an npz", "5 generated images: at least 6 are needed"),
        ("an npz of unknown labels", "they have the labels .*; ids 0 to 2 are allowed"),
        ("an unfinished run", "is incomplete according to its manifest"),
        ("a manifest of more", "has 60 images, its manifest says 61"),
        ("no manifest", "manifest.json is no JSON"),
    ],
)
def test_broken_images_are_named_and_nothing_is_written(
    place: Path, tmp_path: Path, how: str, message: str
) -> None:
    output = tmp_path / "none"
    with pytest.raises(SystemExit, match=message):
        run(place, broken(tmp_path, how), "--judge", str(place / "judge"), "--output", str(output))
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--judge", "OTHER"],
            r"the generated images have the labels \['coat'\], which the judge .*other lacks.*; "
            "a judge of the same classes is needed",
        ),
        (["--split", "valid"], r"no split 'valid'; the dataset has \['test', 'train'\]"),
        (["--training-split", "test"], "--training-split test: the real images are of that split"),
        (["--bootstrap", "-1"], "--bootstrap -1: an integer, 0 or more"),
        (["--max-features", "5"], "max_features=5: at least 6"),
        (["--nearest", "0"], "--nearest 0: an integer, 1 or more"),
        (["--batch-size", "0"], "--batch-size 0: an integer, 1 or more"),
        (["--confidence", "1"], "confidence=1.0: a number between 0 and 1"),
        (["--bits-per-dim", "5"], "--bits-per-dim 5, --model None: use both or neither"),
        (["--bits-per-dim", "51", "--model", "MODEL"], "bits_per_dim=51: 1 to 50"),
        (
            ["--features", "imagenet"],
            r"model 'imagenet' is not bundled; allowed: \['emoji', 'fashion-mnist'\]",
        ),
        (["--dataset", "DAMAGED"], "dataset: .* can't be read"),
    ],
)
def test_wrong_arguments(place: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    judge_module(["boot", "scarf", "hat/cap"]).save_pretrained(tmp_path / "other")
    pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "damaged").mkdir()
    data = (place / "real" / "test-00000.parquet").read_bytes()
    (tmp_path / "damaged" / "test.parquet").write_bytes(data[: len(data) // 2])
    filled = [str(tmp_path / one.lower()) if one.isupper() else one for one in arguments]
    with pytest.raises(SystemExit, match=message):
        run(place, write(tmp_path, "parquet"), *filled)


def test_other_refusals(place: Path) -> None:
    real = open_real(str(place / "real"), (1, 8, 8))
    judge, flat = wrap_classifier(judge_module()), wrap_module(torch.nn.Flatten())
    with pytest.raises(ValueError, match=r"the generated images have the shape \(3, 8, 8\)"):
        evaluate(
            DatasetImages([{"pixel_values": torch.zeros(3, 8, 8), "label": 0}] * 9), real, judge
        )
    with pytest.raises(ValueError, match="judge: Flatten is no classifier"):
        evaluate(real, real, flat, flat)
    with pytest.raises(
        FloatingPointError, match="Flatten returns features or logits that aren't finite"
    ):
        evaluate(
            DatasetImages([{"pixel_values": torch.full((1, 8, 8), np.nan), "label": 0}] * 9),
            real,
            flat,
            progress=False,
        )
    with pytest.raises(ValueError, match=r"Identity returns \(1, 1, 8, 8\) for 1 images; \(B, D\)"):
        evaluate(real, real, wrap_module(torch.nn.Identity()), progress=False)
    with pytest.raises(SystemExit, match="a network must be named"):
        main(
            [
                "evaluate",
                str(place / "real"),
                "--dataset",
                str(place / "real"),
                "--images-split",
                "train",
                "--quiet",
            ]
        )


def test_names_of_classes_in_the_table_and_the_picture(tmp_path: Path) -> None:
    """No name acts on the terminal; none is a formula, which matplotlib would refuse."""
    names = ["red\x1b[31m\nx", "\u202eb", "$\\frac$", "コート"]
    scores = {"top_1": {"value": 0.5, "interval": None}}
    rows = [{"name": name, "images": 3, **scores} for name in names]
    text = str(Evaluation(per_class=rows, notes=["of red\x1b[31m\nx"]))
    assert "\x1b" not in text and "\u202e" not in text and len(text.splitlines()) == 2 + 1 + 4 + 1
    assert r"red\x1b[31m\nx" in text and "コート" in text
    draw_confusion([[1, 0, 0]] * 3, names[:3], tmp_path / "confusion.png")
    assert Image.open(tmp_path / "confusion.png").width > 100


@pytest.mark.parametrize("ids", [[39, 0, 4, 17], [10**9, 1, 1, 1]])
def test_ids_of_parquet_files_are_those_of_all_groups(ids: list[int], tmp_path: Path) -> None:
    """A group alone may have one id, such as 39, which needs no label for each smaller one."""
    arrays, _ = pixels(40, 0)
    features = Features({"image": ImageFeature(), "number": Value("int64")})
    labels = [ids[k // 10] + k % 10 * (ids[0] < 40 and k > 9) for k in range(40)]
    rows = {"image": [{"bytes": png(a, tmp_path / "x" / "x.png")} for a in arrays]}
    dataset = Dataset.from_dict({**rows, "number": labels}, features=features)
    folder = tmp_path / "parquet"
    folder.mkdir()
    dataset.to_parquet(folder / "a.parquet", batch_size=10)  # a row group for each id
    if ids[0] > 40:
        with pytest.raises(ValueError, match="'number' has 2 different ids, from 1 to 1000000000"):
            open_generated(folder, label_column="number")
        return
    images = open_generated(folder, label_column="number")
    assert len(images.names) == 40 and [label for _, label in images.read(0, 40)] == labels
