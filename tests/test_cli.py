"""The program `guided-diffusers`, and sampling by seeds, on a tiny random pipeline."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.cli import main
from guided_diffusers.sampling import grid, image_generator, sample
from guided_diffusers.utils import find_scheduler, is_hub_id, model_folder

NAMES = {0: "boot", 1: "coat", 2: "7"}


@pytest.fixture(scope="module")
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
    classifier = NoiseAwareClassifier(
        8,
        1,
        3,
        (8,),
        ("ResnetDownsampleBlock2D",),
        1,
        attention_head_dim=8,
        norm_num_groups=4,
        id2label=NAMES,
    )
    torch.nn.init.normal_(classifier.head[-1].out.weight)
    return ClassifierGuidedPipeline(unet, DDIMScheduler(clip_sample=False), classifier)


@pytest.fixture(scope="module")
def folder(pipeline: ClassifierGuidedPipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(path)
    return str(path)


def run(folder: str, *arguments: str) -> None:
    main(["sample", "--model", folder, "--num-inference-steps", "3", "--quiet", *arguments])


def test_a_picture(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(
        folder,
        "--label",
        "boot",
        "--guidance-scale",
        "3",
        "--output",
        str(tmp_path / "a" / "boots.png"),
    )
    assert Image.open(tmp_path / "a" / "boots.png").size == (
        5 * 80,
        2 * 80,
    )  # 8 pixels, enlarged tenfold
    said = capsys.readouterr().out
    assert "10 images of boot (guidance scale 3, DDIMScheduler" in said and " s: " in said
    assert [path.name for path in (tmp_path / "a").iterdir()] == [
        "boots.png"
    ]  # nothing temporary is left


def test_a_folder_and_batches(folder: str, tmp_path: Path) -> None:
    """LABEL/NUMBER.png; the same images for any batch size; ids and names, a name that looks like an id."""
    for batch_size in ("2", "64"):
        run(
            folder,
            "--label",
            "0",
            "coat",
            "7",
            "--num-images",
            "7",
            "--batch-size",
            batch_size,
            "--output",
            str(tmp_path / batch_size),
        )
    files = sorted(path.relative_to(tmp_path / "2") for path in (tmp_path / "2").rglob("*.png"))
    assert [str(path) for path in files] == [
        "7/000002.png",
        "7/000005.png",
        "boot/000000.png",
        "boot/000003.png",
        "boot/000006.png",
        "coat/000001.png",
        "coat/000004.png",
    ]
    for path in files:
        pixels = [
            torch.tensor(list(Image.open(tmp_path / size / path).tobytes())) for size in ("2", "64")
        ]
        assert (pixels[0] - pixels[1]).abs().max() <= 1  # float rounding of another batch size


def test_options_have_an_effect(folder: str, tmp_path: Path) -> None:
    variants = {
        "plain": [],
        "seed": ["--seed", "1"],
        "scale": ["--guidance-scale", "50"],
        "label": [],
        "scheduler": ["--scheduler", "ddpm"],
        "steps": ["--num-inference-steps", "5"],
        "unconditional": ["--no-conditional"],
        "classifier-free": ["--classifier-free-scale", "5"],
    }
    pictures = {}
    for name, extra in variants.items():
        label = "coat" if name == "label" else "boot"
        run(
            folder,
            "--label",
            label,
            "--num-images",
            "1",
            "--output",
            str(tmp_path / f"{name}.png"),
            *extra,
        )
        pictures[name] = Image.open(tmp_path / f"{name}.png").tobytes()
    assert len(set(pictures.values())) == len(variants)


def test_how_guidance_acts_has_an_effect(folder: str, tmp_path: Path) -> None:
    pictures = []
    for extra in (
        [],
        ["--guidance-algorithm", "strang"],
        ["--guidance-every", "3"],
        ["--guidance-tolerance", "10"],
    ):
        run(
            folder,
            "--label",
            "boot",
            "--num-images",
            "1",
            "--guidance-scale",
            "50",
            "--num-inference-steps",
            "20",
            "--output",
            str(tmp_path / "x.png"),
            *extra,
        )
        pictures.append(Image.open(tmp_path / "x.png").tobytes())
    assert pictures[0] not in pictures[1:]


def test_all_labels_in_rows(folder: str, tmp_path: Path) -> None:
    run(folder, "--label", "all", "--num-images", "6", "--output", str(tmp_path / "all.png"))
    width, height = Image.open(tmp_path / "all.png").size
    assert height == 3 * 80 and width > 2 * 80  # 8 pixels, enlarged tenfold, and the names in front


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--label", "hat"],
            r"label 'hat' is unknown; allowed: ids 0 to 2 and the names \['7', 'boot', 'coat'\]",
        ),
        (["--label", "9"], "label 9 is unknown"),
        (
            ["--label", "boot", "--scheduler", "fast"],
            "scheduler 'fast' is unknown; .*the nearest are .*Scheduler",
        ),
        (
            ["--label", "boot", "--scheduler", "FlowMatchEuler"],
            "FlowMatchEulerDiscreteScheduler doesn't fit the model",
        ),
        (["--label", "boot", "--device", "abacus"], "abacus"),
        (
            ["--label", "boot", "--num-images", "0"],
            "--num-images 0: an integer, 1 or more, is allowed",
        ),
        (
            ["--label", "boot", "--batch-size", "0"],
            "--batch-size 0: an integer, 1 or more, is allowed",
        ),
    ],
)
def test_wrong_arguments(folder: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run(folder, *arguments, "--output", str(tmp_path / "x.png"))
    assert not list(tmp_path.iterdir())


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"guided-diffusers {version('guided-diffusers')}\n"


def test_unknown_model() -> None:
    with pytest.raises(SystemExit, match="model 'nothing-like-it' is not bundled; allowed"):
        main(["sample", "--model", "nothing-like-it", "--label", "0"])


def test_a_model_is_a_bundled_name_a_folder_or_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (Path(model_folder("fashion-mnist")) / "judge" / "config.json").is_file()
    assert model_folder(tmp_path) == tmp_path and not is_hub_id(tmp_path)
    assert model_folder("user/model") == "user/model" and is_hub_id("user/model")
    monkeypatch.chdir(tmp_path)
    for name in ("fashion-mnist", "user/model"):  # an existing folder comes first
        Path(name).mkdir(parents=True)
        assert model_folder(name) == name and not is_hub_id(name)
    with pytest.raises(ValueError, match="model 'unknown' is not bundled; allowed"):
        model_folder("unknown")


def test_find_scheduler() -> None:
    for name, found in (
        ("ddim", "DDIMScheduler"),
        ("Euler", "EulerDiscreteScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("PNDMScheduler", "PNDMScheduler"),
        ("EulerAncestral", "EulerAncestralDiscreteScheduler"),
    ):
        assert find_scheduler(name).__name__ == found
    with pytest.raises(ValueError, match="unknown"):
        find_scheduler("VQDiffusion")  # can't be guided


def test_image_generators_differ() -> None:
    draws = {
        tuple(torch.randn(2, generator=image_generator(seed, i)).tolist())
        for seed in range(4)
        for i in range(4)
    }
    assert len(draws) == 16


def test_sample_is_the_same_for_any_share(pipeline: ClassifierGuidedPipeline) -> None:
    """Two processes with every other image make what one makes."""
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 2.0}
    whole = {
        i: image
        for batch, images in sample(pipeline, ["boot", 1], 5, 4, range(6), **call)
        for i, image in zip(batch, images, strict=True)
    }
    assert sorted(whole) == list(range(6))
    for share in (range(0, 6, 2), range(1, 6, 2)):
        for batch, images in sample(pipeline, ["boot", 1], 5, 2, share, **call):
            for i, image in zip(batch, images, strict=True):
                torch.testing.assert_close(image, whole[i], atol=1e-4, rtol=1e-4)


def test_grid() -> None:
    images = [Image.new("L", (28, 28), i * 20) for i in range(6)]
    assert grid(images).size == (3 * 84, 2 * 84)
    assert grid(images[:1]).size == (84, 84)
    assert grid(images + images[:1]).size == (3 * 84, 3 * 84)  # seven in a row would be too long
    picture = grid(images, ["a", "b", "c"])
    assert picture.height == 3 * 84 and picture.getpixel((picture.width - 1, 0))[0] == 20
