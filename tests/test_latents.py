"""Training on latents: their scaling, what is kept of them on the disk, and guided pictures in the end."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel, VQModel
from helpers import CLASSIFIER, UNET, free_port, load_script, reset_accelerate
from PIL import Image as PILImage
from safetensors.torch import load_file
from torch.nn import functional as F

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.images import decode, encode
from guided_diffusers.learning import latents
from guided_diffusers.learning.batches import generator_for
from guided_diffusers.learning.data import LabelledImages
from guided_diffusers.learning.distributed import end_training

SIZES = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "layers_per_block": 1,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
COLOURS = {"red": (220, 40, 30), "green": (20, 160, 50), "blue": (10, 60, 230)}
TINY = (
    "--resolution 16 --center_crop --train_batch_size 4 --learning_rate 1e-3 --max_train_steps 3 "
    "--no_progress --cpu --lr_warmup_steps 1 --validation_samples 4"
)


def make_vae(
    seed: int = 0, kind: type = AutoencoderKL, **config: object
) -> AutoencoderKL | VQModel:
    torch.manual_seed(seed)
    return kind(**{**SIZES, **config}).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Noisy pictures of three colours, 18 by 16 pixels; tiny configs; an autoencoder."""
    root, random = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 2)):
        for name, colour in COLOURS.items():
            folder = root / "folder" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + random.normal(0, 20, (16, 18, 3)), 0, 255)
                PILImage.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    for name, config in (("unet", UNET), ("classifier", CLASSIFIER)):
        (root / f"{name}.json").write_text(json.dumps(config))
    make_vae().save_pretrained(root / "vae")
    files = {"unet": root / "unet.json", "classifier": root / "classifier.json"}
    return SimpleNamespace(root=root, folder=root / "folder", vae=root / "vae", **files)


@pytest.fixture(autouse=True)
def small_shards(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place.root / "cache"))
    monkeypatch.setattr(latents, "IMAGES_PER_FILE", 8)
    monkeypatch.setattr(latents, "PIXELS_PER_BATCH", 4 * 16**2)  # four at once


@pytest.fixture
def images(place: SimpleNamespace) -> LabelledImages:
    train = datasets.load_dataset(str(place.folder))["train"]
    return LabelledImages(train, resolution=16, center_crop=True)


@pytest.fixture
def train(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    def run(script: str, line: str = "", output: str = "out") -> Path:
        command = (
            f"{TINY} --train_data_dir {place.folder} --model_config_name_or_path "
            f"{vars(place)[script]} {line.format(**vars(place))} --output_dir {tmp_path / output}"
        )
        if script == "classifier":
            command += " --diagnosis_images 6"
        monkeypatch.setattr(sys, "argv", [f"train_{script}.py", *shlex.split(command)])
        reset_accelerate()
        try:
            load_script(f"train_{script}").main()
        finally:
            reset_accelerate()
        return tmp_path / output

    return run


class Counted:
    """How many images an autoencoder encodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: float = float("inf")):
        self.images, self.stop_after, whole = 0, stop_after, latents.encode

        def counting(
            vae: torch.nn.Module, pixels: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            if self.images >= self.stop_after:
                raise KeyboardInterrupt
            self.images += len(pixels)
            return whole(vae, pixels)

        monkeypatch.setattr(latents, "encode", counting)


def write(
    data: latents.LatentImages, vae: torch.nn.Module, workers: int = 0, progress: bool = False
) -> latents.LatentImages:
    accelerator = Accelerator(cpu=True)
    latents.write_latents(accelerator, vae, data, None, workers=workers, progress=progress)
    return data


def cached(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    paths = sorted(root.rglob("*.safetensors"))
    return {str(path.relative_to(root)): load_file(path) for path in paths}


# How latents are scaled


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.3},
        {"scaling_factor": 0.36, "shift_factor": 0.7},
        {
            "scaling_factor": 0.5,
            "latents_mean": [0.1, -0.2, 0.3, 0.4],
            "latents_std": [1.0, 2, 3, 0.5],
        },
    ],
)
def test_encode_is_the_inverse_of_decode(config: dict[str, object]) -> None:
    vae, pixels = make_vae(**config).double(), torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    mean, std = encode(vae, pixels)
    assert mean.shape == std.shape == (2, 4, 8, 8)
    torch.testing.assert_close(decode(vae, mean), vae.decode(posterior.mean).sample)
    eps = torch.randn_like(mean)  # a draw, too, and so std
    expected = vae.decode(posterior.mean + posterior.std * eps).sample
    torch.testing.assert_close(decode(vae, mean + std * eps), expected)


def test_scaled_latents_have_unit_variance_where_the_config_says_so() -> None:
    pixels = torch.rand(16, 3, 16, 16) * 2 - 1
    z = make_vae().encode(pixels).latent_dist.mean
    mean, std = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    for config in (
        {"scaling_factor": 1.0, "latents_mean": mean.tolist(), "latents_std": std.tolist()},
        {"scaling_factor": 1 / z.std().item(), "shift_factor": z.mean().item()},
    ):
        scaled, _ = encode(make_vae(**config), pixels)
        assert abs(scaled.mean()) < 1e-4 and scaled.std() == pytest.approx(1, abs=2e-2)


def test_latents_of_images_that_are_no_squares(place: SimpleNamespace, tmp_path: Path) -> None:
    rows = datasets.load_dataset(str(place.folder))["train"]
    images = LabelledImages(rows, resolution=(8, 16), center_crop=True)
    vae = make_vae()
    data = write(latents.LatentImages(images, vae, tmp_path, random_flip=True), vae)
    assert data.resolution == (4, 8)
    pixels = images[9]["pixel_values"][None]
    means = [encode(vae, view)[0][0] for view in (pixels, pixels.flip(-1))]
    stored = next(iter(cached(tmp_path).values()))["mean"]
    assert stored.shape[1:] == (2, 4, 4, 8)
    assert any(
        torch.allclose(row, torch.stack(means), atol=1e-5)
        for tensors in cached(tmp_path).values()
        for row in tensors["mean"]
    )
    assert data[9]["pixel_values"].shape == (4, 4, 8)
    square = LabelledImages(rows, resolution=(8, 8), center_crop=True)
    named = latents.fingerprint(square, vae, True)
    same = latents.fingerprint(LabelledImages(rows, resolution=8, center_crop=True), vae, True)
    assert named == same != data.files[0].parent.name
    odd = LabelledImages(rows, resolution=(8, 15), center_crop=True)
    with pytest.raises(ValueError, match="--resolution 8x15: the multiples of 2 are allowed with"):
        latents.LatentImages(odd, vae, tmp_path)


def test_a_vector_quantized_autoencoder_has_no_posterior(
    images: LabelledImages, tmp_path: Path
) -> None:
    vae = make_vae(kind=VQModel, vq_embed_dim=5, scaling_factor=0.5)
    data = write(latents.LatentImages(images, vae, tmp_path), vae)
    assert (data.channels, data.resolution) == (5, 8)
    pixels = images[9]["pixel_values"][None]
    torch.testing.assert_close(data[9, 1]["pixel_values"], 0.5 * vae.encode(pixels).latents[0])
    wanted = vae.decode(vae.encode(pixels).latents).sample
    torch.testing.assert_close(decode(vae, data[9]["pixel_values"][None]), wanted)
    assert all(tensors.keys() == {"mean"} for tensors in cached(tmp_path).values())


def test_half_precision_that_overflows_is_refused() -> None:
    with pytest.raises(ValueError, match="float16 and overflows"):
        encode(make_vae(force_upcast=True).half(), torch.zeros(1, 3, 16, 16))


# What is kept


def test_items_are_draws_from_the_posterior_by_seed(images: LabelledImages, tmp_path: Path) -> None:
    vae = make_vae(scaling_factor=0.5)
    data = write(latents.LatentImages(images, vae, tmp_path, random_flip=True), vae)
    assert len(data) == 30 and (data.channels, data.resolution) == (4, 8)
    for index in (0, 7, 8, 29):
        pixels = images[index]["pixel_values"][None]
        views = [[part[0] for part in encode(vae, view)] for view in (pixels, pixels.flip(-1))]
        draws = torch.stack([data[index, seed]["pixel_values"] for seed in range(200)])
        mirrored = [(draw - views[1][0]).norm() < (draw - views[0][0]).norm() for draw in draws]
        assert 60 < sum(mirrored) < 140
        for view, (mean, std) in enumerate(views):
            z = (draws[torch.tensor(mirrored) == bool(view)] - mean) / std
            assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
        assert torch.equal(data[index, 5]["pixel_values"], draws[5])
        assert torch.equal(data[index]["pixel_values"], data[index, index]["pixel_values"])
        assert data[index]["label"] == images[index]["label"]


def test_a_cache_is_used_again(
    images: LabelledImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    counted, vae = Counted(monkeypatch), make_vae()
    first = write(latents.LatentImages(images, vae, tmp_path), vae, progress=True)
    assert counted.images == 30 and "30/30" in capfd.readouterr().err
    again = latents.LatentImages(images, make_vae(), tmp_path)
    second = write(again, vae, workers=1, progress=True)
    assert "/30" not in capfd.readouterr().err
    assert counted.images == 30 and torch.equal(first[3]["pixel_values"], second[3]["pixel_values"])
    write(latents.LatentImages(images, vae, tmp_path, random_flip=True), vae, workers=1)
    assert counted.images == 90  # and their mirror images


def test_the_name_of_a_cache_depends_on_all_that_it_holds(
    place: SimpleNamespace, images: LabelledImages
) -> None:
    def named(vae: torch.nn.Module, flip: bool = False, split: str = "train", **how: object) -> str:
        how = {"resolution": 16, "center_crop": True, **how}
        data = LabelledImages(datasets.load_dataset(str(place.folder))[split], **how)
        return latents.fingerprint(data, vae, flip)

    vae = make_vae()
    other_weight = make_vae()
    other_weight.decoder.conv_out.bias[0] += 1e-6
    names = [
        named(vae),
        named(vae, resolution=18),
        named(vae, center_crop=False),
        named(vae, flip=True),
        named(vae, split="test"),
        named(vae, channels=1),
        named(make_vae(1)),
        named(other_weight),
        named(make_vae(scaling_factor=0.5)),
    ]
    assert len(set(names)) == len(names)
    assert named(AutoencoderKL.from_pretrained(place.vae)) == names[0]  # wherever it comes from


def test_an_interrupted_encoding_goes_on(
    images: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the third of four files; what is cut off in place, as by a full disk, isn't read either."""
    vae = make_vae()
    whole = write(latents.LatentImages(images, vae, tmp_path / "whole"), vae)
    with monkeypatch.context() as patch:
        Counted(patch, stop_after=20)
        parts = latents.LatentImages(images, vae, tmp_path / "parts")
        with pytest.raises(KeyboardInterrupt):
            write(parts, vae)
    assert [file.exists() for file in parts.files] == [True, True, False, False]
    with pytest.raises(FileNotFoundError):
        parts[20]
    counted = Counted(monkeypatch)
    write(parts, vae)
    assert counted.images == 14
    assert all(torch.equal(whole[i]["pixel_values"], parts[i]["pixel_values"]) for i in range(30))

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(latents, "save_file", full)
    full_disk = latents.LatentImages(images, vae, tmp_path / "full")
    with pytest.raises(OSError, match="no space left"):
        write(full_disk, vae)
    assert not any(full_disk.files[0].parent.iterdir())


def test_latents_that_are_not_finite_are_refused(images: LabelledImages, tmp_path: Path) -> None:
    vae = make_vae()
    vae.quant_conv.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="--vae: latents .* NaN"):
        write(latents.LatentImages(images, vae, tmp_path), vae)
    assert not cached(tmp_path)


# The scripts


def test_guided_pictures_of_a_latent_model(
    place: SimpleNamespace,
    train: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = Counted(monkeypatch)
    shared = "--vae {vae} --random_flip --latents_cache " + str(tmp_path / "latents")
    line = shared + " --class_conditional --sample_images 3 --validation_steps 2"
    folder = train("unet", line, "unet")
    assert counted.images == 2 * 30 + 6
    pipeline = ClassifierGuidedPipeline.from_pretrained(folder)
    assert (pipeline.unet.config.sample_size, pipeline.unet.config.in_channels) == (8, 4)
    assert pipeline.scheduler.config.clip_sample is False
    assert isinstance(pipeline.vae, AutoencoderKL)
    assert PILImage.open(folder / "samples-2.png").size == (16, 48)

    source = shared.replace("{vae}", str(folder)) + f" --scheduler {folder}"  # the pipeline's own
    classifier = NoiseAwareClassifier.from_pretrained(train("classifier", source, "classifier"))
    assert counted.images == 66
    assert (classifier.config.sample_size, classifier.config.in_channels) == (8, 4)
    assert classifier.config.id2label == {0: "blue", 1: "green", 2: "red"}
    for made in (
        ClassifierGuidedPipeline.from_pretrained(folder, classifier=classifier),
        ClassifierGuidedPipeline(pipeline.unet, pipeline.scheduler, classifier, pipeline.vae),
    ):
        made.set_progress_bar_config(disable=True)
        pictures = []
        for scale in (0.0, 500.0):
            options = {"num_inference_steps": 3, "output_type": "pt", "guidance_scale": scale}
            generator = torch.Generator().manual_seed(0)
            pictures.append(made(["red", 0], generator=generator, **options).images)
        assert pictures[0].shape == (2, 3, 16, 16) and pictures[0].std() > 0
        assert (pictures[0] - pictures[1]).abs().max() > 1e-3


def test_training_sees_the_drawn_latents(
    place: SimpleNamespace, images: LabelledImages, tmp_path: Path, train: Callable[..., Path]
) -> None:
    """A figure of the held-out images, worked out from the saved folder and the autoencoder alone."""
    folder = train("classifier", "--vae {vae}")
    model = NoiseAwareClassifier.from_pretrained(folder).eval()
    vae = AutoencoderKL.from_pretrained(place.vae)
    test = datasets.load_dataset(str(place.folder))["test"]
    held_out = LabelledImages(test, resolution=16, center_crop=True)
    x0, labels = [], []
    for i in (0, 1, 3, 4):  # four of six, evenly spread
        mean, std = encode(vae, held_out[i]["pixel_values"][None])
        generator = torch.Generator().manual_seed(i)
        x0.append(mean + std * torch.randn(mean.shape[1:], generator=generator))
        labels.append(held_out[i]["label"])
    row = json.loads((folder / "metrics.json").read_text())["held_out"][5]
    generators = [generator_for(0, 3, i, 5) for i in (0, 1, 3, 4)]
    eps = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
    t = torch.full((4,), row["timestep"])
    with torch.no_grad():
        logits = model(DDPMScheduler(1000).add_noise(torch.cat(x0), eps, t), t).logits
    expected = F.cross_entropy(logits, torch.tensor(labels)).item()
    assert row["cross_entropy"] == pytest.approx(expected, abs=2e-5)


def test_a_resumed_run_equals_an_uninterrupted_one(train: Callable[..., Path]) -> None:
    line = "--vae {vae} --random_flip --checkpointing_steps 2 --max_train_steps 4"
    whole = train("classifier", line, "whole")
    parts = shutil.copytree(whole, whole.with_name("parts"))
    shutil.rmtree(parts / "checkpoint-4")
    shutil.rmtree(parts / "latents")
    line += " --resume_from_checkpoint latest --dataloader_num_workers 1"
    train("classifier", line, "parts")
    one, other = (load_file(next(path.glob("*.safetensors"))) for path in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_write_the_same_cache(images: LabelledImages, tmp_path: Path) -> None:
    vae = make_vae()
    one, two = (
        latents.LatentImages(images, vae, tmp_path / name, random_flip=True)
        for name in ("one", "two")
    )
    write(one, vae)
    own = tmp_path / "own"
    own.mkdir()
    torch.multiprocessing.spawn(write_share, (free_port(), two, vae, own), nprocs=2, daemon=True)
    assert sorted(path.name for path in own.iterdir()) == ["0 of 2", "1 of 2"]
    shares = [json.loads(path.read_text()) for path in sorted(own.iterdir())]
    assert shares == [[0, 2], [1, 3]]  # of four files
    first, second = cached(tmp_path / "one"), cached(tmp_path / "two")
    assert first.keys() == second.keys() and len(first) == 4
    for path, tensors in first.items():
        assert tensors.keys() == {"mean", "std"}
        assert all(torch.equal(tensors[name], second[path][name]) for name in tensors)
    assert {path.suffix for path in two.files[0].parent.iterdir()} == {".safetensors"}


def write_share(
    rank: int, port: int, data: latents.LatentImages, vae: torch.nn.Module, own: Path
) -> None:
    """Encode in one process of two, and note which files were its own.

    The process is a fresh one: one that is forked from this one waits for the threads that stayed in it for ever.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    latents.IMAGES_PER_FILE, latents.PIXELS_PER_BATCH = 8, 4 * 16**2
    written, write_file = [], latents.write_file

    def noting(data: latents.LatentImages, vae: torch.nn.Module, file: Path, *rest: object) -> None:
        written.append(data.files.index(file))
        write_file(data, vae, file, *rest)

    latents.write_file = noting
    write(data, vae)
    assert data[29]["pixel_values"].isfinite().all()  # whoever wrote it
    state = PartialState()
    (own / f"{state.process_index} of {state.num_processes}").write_text(json.dumps(written))
    end_training(Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("script", "line", "message"),
    [
        (
            "classifier",
            "--vae {vae} --random_shift 1",
            "--vae .* encodes an image once.*--random_shift is 1",
        ),
        ("classifier", "--vae {vae} --center_crop --random_scale 0.1", "--random_scale 0.1, 0 is"),
        (
            "classifier",
            "--vae {vae} --center_crop False",
            "--center_crop is False, which must be given",
        ),
        ("classifier", "--latents_cache here", "--latents_cache here needs --vae"),
        ("classifier", "--vae {folder}", "--vae .*folder: .*config.json"),
        ("classifier", "--vae {root}/none", "--vae .*none: "),
        (
            "classifier",
            "--vae {root}/model",
            "--vae .*model holds a UNet2DModel; AutoencoderKL and VQModel are allowed",
        ),
        (
            "unet",
            "--vae {root}/pipeline",
            "--vae .*pipeline: it is a pipeline without a vae or vqvae",
        ),
        ("classifier", "--vae {root}/wide", "--vae .*wide encodes 2 channels; 1 and 3 are allowed"),
        (
            "classifier",
            "--vae {vae} --resolution 17",
            "--resolution 17: the multiples of 2 are allowed with this --vae",
        ),
        (
            "unet",
            "--vae {vae} --resolution 18",
            "--resolution 18: the multiples of 4 are allowed for a network of 2",
        ),
        (
            "unet",
            "--vae {vae} --resolution 16x18",
            "--resolution 16x18: the multiples of 4 are allowed for a network of 2",
        ),
        (
            "unet",
            "--vae {vae} --bits_per_dim_images 1",
            "--bits_per_dim_images 1: with --vae 0 is allowed",
        ),
    ],
)
def test_wrong_options_are_named(
    place: SimpleNamespace,
    train: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    script: str,
    line: str,
    message: str,
) -> None:
    """With a message, before anything is encoded."""
    unet = UNet2DModel(**UNET, sample_size=8)
    unet.save_pretrained(place.root / "model")
    ClassifierGuidedPipeline(unet, DDPMScheduler()).save_pretrained(place.root / "pipeline")
    make_vae(in_channels=2).save_pretrained(place.root / "wide")
    with pytest.raises(SystemExit) as end:
        train(script, line, "refused")
    said = capsys.readouterr().err + str(end.value)
    assert re.search(message, said, re.DOTALL), said
    assert not (tmp_path / "refused").exists()
