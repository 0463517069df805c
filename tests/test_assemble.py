"""A pipeline from trained parts: the same images, the parts' metrics, and what doesn't fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from test_guidance import NAMES, small_classifier, small_unet
from test_two_processes import held, kill

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.assembly import assembled
from guided_diffusers.cli import main
from guided_diffusers.sampling import grid, sample


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Folders as the training scripts write them."""
    trained = ClassifierGuidedPipeline(
        small_unet(num_class_embeds=4), DDIMScheduler(beta_end=0.03), id2label=NAMES
    )
    trained.save_pretrained(tmp_path / "unet")
    small_classifier().save_pretrained(tmp_path / "classifier")
    for part in ("unet", "classifier"):
        metrics = {"step": 4, "held_out": [{"timestep": 9, "loss": 0.5}]}
        (tmp_path / part / "metrics.json").write_text(json.dumps(metrics))
        options = {"train_batch_size": 3, "output_dir": "/home/somebody"}
        (tmp_path / part / "options.json").write_text(json.dumps(options))
    return tmp_path


def assemble(folder: Path, *options: str) -> None:
    output = str(folder / "out")
    main(["assemble", "--unet", str(folder / "unet"), "--output", output, *options])


def test_the_folder_is_the_pipeline_of_the_parts(
    parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guidance = ("--guidance-scale", "2.5", "--num-inference-steps", "3")
    assemble(parts, "--classifier", str(parts / "classifier"), *guidance)
    folder = parts / "out"
    assert f"saved to {folder}, next: guided-diffusers sample --model" in capsys.readouterr().out
    pipeline = ClassifierGuidedPipeline.from_pretrained(folder)
    assert pipeline.config.id2label == NAMES
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert pipeline.scheduler.config.beta_end == 0.03
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    exchanged = DDIMScheduler.from_config(pipeline.scheduler.config).config
    assert not exchanged.clip_sample and exchanged.timestep_spacing == "trailing"
    by_hand = ClassifierGuidedPipeline(
        small_unet(num_class_embeds=4),
        DPMSolverMultistepScheduler(beta_end=0.03, timestep_spacing="trailing"),
        small_classifier(),
    )
    call: dict[str, Any] = {"label": "cat", "output_type": "pt"}
    seeded = torch.Generator().manual_seed
    preset = {"guidance_scale": 2.5, "num_inference_steps": 3}
    assert torch.equal(
        pipeline(**call, generator=seeded(0)).images,
        by_hand(**call, **preset, generator=seeded(0)).images,
    )
    metrics = json.loads((folder / "figures.json").read_text())
    assert set(metrics) == {"unet", "classifier"}
    assert metrics["unet"]["options"] == {"train_batch_size": 3}
    main(["card", str(folder), "--no-picture"])
    assert "0.5" in (folder / "README.md").read_text()
    assert sorted(path.name for path in parts.iterdir()) == ["classifier", "out", "unet"]


def test_a_network_alone_samples(parts: Path) -> None:
    assemble(parts, "--scheduler", "ddim")
    pipeline = ClassifierGuidedPipeline.from_pretrained(parts / "out")
    assert isinstance(pipeline.scheduler, DDIMScheduler) and pipeline.classifier is None
    assert not pipeline.scheduler.config.clip_sample
    pipeline("cat", num_inference_steps=2)


def test_sample_takes_the_parts(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it takes the folder that they are assembled to."""
    classifier = ("--classifier", str(parts / "classifier"))
    assemble(parts, *classifier)
    call = ["--label", "all", "--num-images", "3", "--num-inference-steps", "2", "--output"]
    unet = ["--unet", str(parts / "unet")]
    main(["sample", *unet, *classifier, *call, str(parts / "a.png")])
    main(["sample", "--model", str(parts / "out"), *call, str(parts / "b.png")])
    assert (parts / "a.png").read_bytes() == (parts / "b.png").read_bytes()
    main(["sample", *unet, *call, str(parts / "alone.png"), "--resolution", "4x6"])
    assert "guidance scale 0," in capsys.readouterr().out
    with Image.open(parts / "alone.png") as picture:
        assert picture.size[1] * 6 == 3 * 4 * (84 // 6 * 6)  # three rows of images 84 wide
    for options, message in (
        (classifier, "--classifier .*: --unet is needed, too"),
        ((*unet, "--model", "x"), "--unet .*: --model and --revision can't be given, too"),
        ((*unet, "--resolution", "4x"), "--resolution 4x: height x width such as 48x32"),
        ((*unet, "--resolution", "0x3"), "--resolution 0x3: height x width"),
        ((*unet, "--resolution", "5x3"), "height=5, width=3: multiples of 2, from 2 to 16384"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["sample", *options, *call, str(parts / "no.png")])
    with pytest.raises(SystemExit, match="--label is needed: names, ids, or `all` .*: cat, dog"):
        main(["sample", *unet, "--output", str(parts / "no.png")])


def test_a_network_without_labels_samples(tmp_path: Path) -> None:
    pipeline = ClassifierGuidedPipeline(small_unet(), DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "unet")
    call = ["--num-images", "4", "--num-inference-steps", "2", "--batch-size", "3"]
    call += ["--unet", str(tmp_path / "unet"), "--output"]
    main(["sample", *call, str(tmp_path / "a.png")])
    images = [
        image
        for _, batch in sample(
            assembled(tmp_path / "unet"), [None], 0, 3, range(4), num_inference_steps=2
        )
        for image in batch
    ]
    assert grid(images).tobytes() == Image.open(tmp_path / "a.png").tobytes()
    with pytest.raises(SystemExit, match="of a network without labels, a picture"):
        main(["sample", *call, str(tmp_path / "folder")])


def test_flow_matching_keeps_its_scheduler(tmp_path: Path) -> None:
    trained = ClassifierGuidedPipeline(small_unet(), FlowMatchEulerDiscreteScheduler(shift=2.0))
    trained.save_pretrained(tmp_path)
    scheduler = assembled(tmp_path).scheduler
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and scheduler.config.shift == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": 16}, "the classifier's size is 16, the network's 8"),
        ({"in_channels": 3}, "the classifier's number of channels is 3, the network's 1"),
        ({"id2label": {0: "dog", 1: "cat", 2: "owl"}}, "the network's labels are 0: cat"),
        ({"num_labels": 5, "id2label": None}, "the classifier has 5 labels, the network 4 class"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    parts: Path, changes: dict[str, Any], message: str
) -> None:
    small_classifier(**changes).save_pretrained(parts / "other")
    with pytest.raises(SystemExit, match=message):
        assemble(parts, "--classifier", str(parts / "other"))
    assert not (parts / "out").exists()


def test_wrong_arguments_are_refused(parts: Path) -> None:
    with pytest.raises(
        SystemExit, match="classifier=.*: no such folder; a folder or a Hub id is allowed"
    ):
        assemble(parts, "--classifier", "nowhere")
    with pytest.raises(SystemExit, match="is a UNet2DModel; an autoencoder is allowed"):
        assemble(parts, "--vae", str(parts / "unet" / "unet"))
    with pytest.raises(SystemExit, match="scheduler 'no' is unknown"):
        assemble(parts, "--scheduler", "no")
    (parts / "out").mkdir()
    (parts / "out" / "mine.txt").write_text("x")
    with pytest.raises(SystemExit, match="exists; a new or an empty folder is allowed"):
        assemble(parts)
    assert (parts / "out" / "mine.txt").read_text() == "x"


def test_where_a_pipeline_is_written(
    parts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The current folder, if it is empty, the home folder, and a name with control sequences."""
    (parts / "here").mkdir()
    monkeypatch.chdir(parts / "here")
    monkeypatch.setenv("HOME", str(parts / "home"))
    unet = str(parts / "unet")
    for output, folder in ((".", parts / "here"), ("~/out", parts / "home" / "out")):
        main(["assemble", "--unet", unet, "--output", output])
        assert (folder / "model_index.json").is_file()
    assert Path.cwd() == parts / "here" and not (parts / "here" / "~").exists()
    main(["assemble", "--unet", unet, "--output", str(parts / "\x1b[31m")])
    assert "\x1b" not in capsys.readouterr().out
    (parts / "file").touch()
    for output, message in (
        (parts / "file" / "out", "output .*file/out can't be written: Not a directory"),
        (parts / "file", "exists; a new or an empty folder is allowed"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["assemble", "--unet", unet, "--output", str(output)])
    with pytest.raises(SystemExit, match="--output '': a path is needed"):
        main(["assemble", "--unet", unet, "--output", ""])
    assert not list(parts.glob(".*"))


def test_two_processes_and_what_a_killed_one_left(parts: Path) -> None:
    with held(parts / ".out.lock") as first:
        with pytest.raises(SystemExit, match=f"is being written by process {first.pid}"):
            assemble(parts)
        kill(first)
        left = parts / f".out.{first.pid}.partial"
        left.mkdir()
        assemble(parts)
    assert not list(parts.glob(".out*"))


def test_parts_of_other_kinds(parts: Path) -> None:
    vae = AutoencoderKL(
        out_channels=1, block_out_channels=(4,), latent_channels=4, norm_num_groups=2
    )
    vae.save_pretrained(parts / "vae")
    with pytest.raises(SystemExit, match="autoencoder has 4 latent channels, the network's out"):
        assemble(parts, "--vae", str(parts / "vae"))
    with pytest.raises(SystemExit, match="classifier='.*unet' is a pipeline; the folder of its"):
        assemble(parts, "--classifier", str(parts / "unet"))
    assemble(parts, "--scheduler", "sde-dpmsolver++")
    scheduler = ClassifierGuidedPipeline.from_pretrained(parts / "out").scheduler
    assert scheduler.config.algorithm_type == "sde-dpmsolver++"
