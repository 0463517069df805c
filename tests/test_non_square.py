"""Images of 8 x 12 pixels, from training to evaluation; sizes on the command line."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import CLASSIFIER, UNET, load_script, reset_accelerate
from PIL import Image as PILImage

from guided_diffusers import NoiseAwareClassifier
from guided_diffusers.cli import main
from guided_diffusers.clip import NoiseAwareCLIP
from guided_diffusers.evaluation import open_generated, open_real
from guided_diffusers.learning.options import Options, parse
from guided_diffusers.learning.warm_start import copy_weights

LINE = (
    "--resolution 8x12 --train_batch_size 4 --lr_warmup_steps 1 --validation_samples 6 "
    "--no_progress --cpu --max_train_steps 2"
)
SCRIPTS = {"unet": "--sample_images 2", "classifier": "--diagnosis_images 0", "clip": ""}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 x 26 pixels, wider than 8 x 12; bright above or below. And the networks' configs."""
    root, random = tmp_path_factory.mktemp("wide"), np.random.default_rng(0)
    for i in range(40):
        label, split = ("above", "below")[i % 2], "train" if i < 24 else "test"
        pixels = random.integers(0, 100, (16, 26))
        pixels[:8] += 150 * (label == "above")
        pixels[8:] += 150 * (label == "below")
        folder = root / "data" / split / label
        folder.mkdir(parents=True, exist_ok=True)
        PILImage.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    for name, config in (("unet", UNET), ("classifier", CLASSIFIER), ("clip", CLASSIFIER)):
        (root / f"{name}.json").write_text(json.dumps(config))
    return root


@pytest.fixture
def train(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(data / "cache"))

    def run(script: str, line: str = "", output: str | None = None) -> Path:
        folder = tmp_path / (output or script)
        command = (
            f"{LINE} --train_data_dir {data / 'data'} --output_dir {folder} "
            f"--model_config_name_or_path {data / script}.json {SCRIPTS[script]} {line}"
        )
        monkeypatch.setattr(sys, "argv", [f"train_{script}.py", *shlex.split(command)])
        reset_accelerate()
        try:
            load_script(f"train_{script}").main()
        finally:
            reset_accelerate()
        return folder

    return run


def test_from_training_to_evaluation(
    data: Path, train: Callable[..., Path], tmp_path: Path
) -> None:
    unet, classifier = train("unet", "--class_conditional"), train("classifier")
    assert PILImage.open(unet / "samples-2.png").size == (12, 16)  # a row a label
    assert json.loads((unet / "unet" / "config.json").read_text())["sample_size"] == [8, 12]
    assert json.loads((unet / "options.json").read_text())["resolution"] == [8, 12]
    assert NoiseAwareClassifier.from_pretrained(classifier).size == (8, 12)

    pipeline, images = tmp_path / "pipeline", tmp_path / "images"
    main(["assemble", f"--unet={unet}", f"--classifier={classifier}", f"--output={pipeline}"])
    few = ["--num-inference-steps", "2", "--quiet", "--device", "cpu"]
    main(["sample", f"--model={pipeline}", "--label", "above", f"--output={tmp_path}/x.png", *few])
    width, height = PILImage.open(tmp_path / "x.png").size  # 10 images, in two rows
    assert (width / 5) / (height / 2) == 12 / 8
    labels = ["--label", "all", "--num-images", "8"]
    main(["sample", f"--model={pipeline}", f"--output={images}", *labels, *few])
    assert {PILImage.open(file).size for file in images.rglob("*.png")} == {(12, 8)}

    place = ["--dataset", str(data / "data"), "--device", "cpu", "--no-picture"]
    main(["inspect", str(pipeline), *place, "--images", "8", f"--output={tmp_path}/diagnosis"])
    assert json.loads((tmp_path / "diagnosis" / "diagnosis.json").read_text())["levels"]
    judge = [f"--judge={classifier}", f"--features={classifier}", "--bootstrap", "0", "--quiet"]
    bits = [f"--model={pipeline}", "--bits-per-dim", "4"]
    evaluation = [f"--output={tmp_path}/evaluation"]
    main(["evaluate", str(images), *place, *judge, *bits, *evaluation])
    results = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert "[8, 12]" in json.dumps(results)

    main(["card", str(pipeline), "--no-picture"])
    assert "8x12" in (pipeline / "README.md").read_text()


def test_a_clip_and_what_it_guides(train: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text('{"train": {"above": ["sky"], "below": ["sea"]}}')
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "projection_dim": 8}
    (tmp_path / "text.json").write_text(json.dumps(text))
    line = f"--captions {tmp_path}/captions.json --text_config {tmp_path}/text.json"
    clip = NoiseAwareCLIP.from_pretrained(train("clip", line))
    assert clip.image_encoder.size == (8, 12)
    start = train("classifier")
    train("clip", f"{line} --image_encoder {start}", "from-classifier")
    with pytest.raises(SystemExit, match="--resolution 12x8: size mismatch: .* is for 8x12"):
        train("clip", f"{line} --image_encoder {start} --resolution 12x8", "turned")


def test_places_of_another_size_are_not_copied() -> None:
    """8 x 12 and 12 x 8 pixels give the attention pooling the same number of places."""
    start, turned, same = (
        NoiseAwareClassifier(**CLASSIFIER, sample_size=size, in_channels=1, num_labels=2)
        for size in ((8, 12), (12, 8), (8, 12))
    )
    copy_weights(same, start, "start")
    copy_weights(turned, start, "start")
    for name, weight in start.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
        is_place = name.endswith("positional_embedding")
        assert torch.equal(weight, turned.state_dict()[name]) != is_place


@pytest.mark.parametrize(("resolution", "size"), [("12x8", [12, 8]), ("8x8", 8), ("8", 8)])
def test_a_run_goes_on(train: Callable[..., Path], resolution: str, size: object) -> None:
    """Also one of a square that was called 8, and is called 8x8 now."""
    line = f"--resolution {resolution} --checkpointing_steps 1"
    folder = train("unet", line)
    checkpoint = json.loads((folder / "checkpoint-2" / "manifest.json").read_text())["run"]
    config = json.loads((folder / "unet" / "config.json").read_text())
    assert size == checkpoint["resolution"] == config["sample_size"]
    again = resolution if size != 8 else "8"
    line = f"--resolution {again} --checkpointing_steps 1 --resume_from_checkpoint latest"
    train("unet", line + " --max_train_steps 3")
    assert json.loads((folder / "metrics.json").read_text())["step"] == 3
    with pytest.raises(SystemExit):  # of another size
        train("unet", "--resolution 8x4 --resume_from_checkpoint latest")


def test_a_finished_run_is_its_own(train: Callable[..., Path]) -> None:
    folder = train("unet", "--checkpointing_steps 10")
    for checkpoint in folder.glob("checkpoint-*"):
        checkpoint.rename(folder.parent / checkpoint.name)
    train("unet", "--resume_from_checkpoint latest")


@pytest.mark.parametrize(
    ("script", "line", "message"),
    [
        ("unet", "--resolution 8x9", "--resolution 8x9: the multiples of 2 are allowed for a net"),
        ("unet", "--resolution 9x8", "--resolution 9x8: the multiples of 2 are allowed for a net"),
        ("classifier", "--resolution 8x9", r"--resolution 8x9: sample_size is \(8, 9\); allowed"),
        (
            "unet",
            "--class_conditional --model_config_name_or_path training/configs/dit_small.json",
            "--resolution 8x12: a DiTTransformer2DModel .* is for squares",
        ),
    ],
)
def test_sizes_that_do_not_fit(
    train: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    script: str,
    line: str,
    message: str,
) -> None:
    with pytest.raises(SystemExit) as end:
        train(script, line)
    said = capsys.readouterr().err + str(end.value)
    assert re.search(message, said) and "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "size"),
    [("48x32", (48, 32)), ("28", 28), ("28x28", 28), ("1x2", (1, 2)), ("16384x1", (16384, 1))],
)
def test_a_size_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, text: str, size: object
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--train_data_dir", "d", "--resolution", text])
    assert parse(Options, None).resolution == size


@pytest.mark.parametrize(
    "text",
    "48x 0x3 3x0 ax3 -1 -8x8 48x32x3 1e9 8.0 x8 8X12 8*12 8,12 16385 8x16385 x 9999999999 nan".split()
    + ["", " ", "8 12", "9" * 5000],
)
def test_wrong_sizes_are_one_line(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--train_data_dir", "d", "--resolution", text])
    with pytest.raises(SystemExit) as end:
        parse(Options, None)
    message = str(end.value)
    assert message.startswith("x: --resolution") and "\n" not in message
    if text != "-8x8":  # which argparse takes for an option
        assert "height x width such as 48x32, or one number, from 1 to 16384 is allowed" in message


def test_generated_images_of_any_height_and_width(data: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", pixels)
    images = open_generated(tmp_path / "x.npz")
    assert images.shape == (3, 8, 12)
    for i, (image, _) in enumerate(images.read(0, 5)):
        expected = torch.from_numpy(pixels[i].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(image, expected)
    for i in range(5):
        (tmp_path / "pngs").mkdir(exist_ok=True)
        PILImage.fromarray(pixels[i]).save(tmp_path / "pngs" / f"{i}.png")
    folder = open_generated(tmp_path / "pngs")
    assert folder.shape == (3, 8, 12)
    for (one, _), (other, _) in zip(images.read(0, 5), folder.read(0, 5), strict=True):
        torch.testing.assert_close(one, other)
    real = open_real(str(data / "data"), (1, 8, 12))
    assert real.shape == (1, 8, 12) and real.description["resolution"] == (8, 12)
    assert open_real(str(data / "data"), (1, 8, 8)).description["resolution"] == 8
    np.savez(tmp_path / "none.npz", np.zeros((5, 0, 12, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(N, H, W, 1 or 3\) uint8"):
        open_generated(tmp_path / "none.npz")


def test_attention_pooling_is_of_one_height_and_width() -> None:
    classifier = NoiseAwareClassifier(
        **CLASSIFIER, sample_size=(8, 12), in_channels=1, num_labels=2
    )
    assert classifier.config.pool == "attention"
    assert classifier(torch.zeros(2, 1, 8, 12), 3).logits.shape == (2, 2)
    with pytest.raises(ValueError, match=r"\(B, C, 8, 12\) with pool='attention'"):
        classifier(torch.zeros(2, 1, 12, 8), 3)
