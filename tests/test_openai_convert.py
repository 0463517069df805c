"""OpenAI's checkpoint files to pipeline folders: what comes out, what it takes, and what is refused."""

import argparse
import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import save_file
from test_openai_networks import (
    CLASSIFIER,
    UNET,
    assert_identical,
    original_shapes,
    published_arguments,
    random_state,
)

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.openai import (
    PRESETS,
    ADMDDPMScheduler,
    ADMUNet2DModel,
    add_convert_command,
    convert_checkpoint,
    convert_classifier,
    convert_scheduler,
    convert_unet,
    find_preset,
    load_state_dict,
)

State = dict[str, torch.Tensor]
EXAMPLE = Path(__file__).parents[1] / "examples" / "adm_imagenet.py"
CONFIG: dict[str, Any] = {
    "unet": UNET,
    "classifier": CLASSIFIER,
    "noise_schedule": "cosine",
    "classifier_scale": 2.5,
    "timestep_respacing": "3",
}
FLAGS = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "16,8",
         "channel_mult": "1,2,3", "num_head_channels": 16, "learn_sigma": True, "class_cond": False,
         "use_scale_shift_norm": True, "dropout": 0.1, "resblock_updown": True, "use_fp16": True,
         "noise_schedule": "linear", "diffusion_steps": 1000}  # fmt: skip


def save(state: State, file: Path) -> Path:
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    return file


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    return save(random_state(UNET), tmp_path / "model.pt")


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return save(random_state(CLASSIFIER), tmp_path / "classifier.safetensors")


def command(*arguments: Any) -> None:
    parser = argparse.ArgumentParser()
    add_convert_command(parser.add_subparsers())
    options = parser.parse_args(["convert", *map(str, arguments)])
    options.run(options)


# 1. What comes out


def test_the_command_writes_a_pipeline(
    unet: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    command(
        "--unet",
        unet,
        "--classifier",
        classifier,
        "--config",
        tmp_path / "config.json",
        "--output",
        tmp_path / "out",
    )
    printed = capsys.readouterr()
    assert "out is ready" in printed.out and "save" in printed.err and "3/3" in printed.err
    pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out")
    cosine = CLASSIFIER | {"noise_schedule": "cosine"}
    assert_identical(
        pipeline.unet.state_dict(), convert_unet(random_state(UNET), UNET).state_dict()
    )
    assert_identical(
        pipeline.classifier.state_dict(),
        convert_classifier(random_state(CLASSIFIER), cosine).state_dict(),
    )
    assert pipeline.classifier.config.beta_schedule == "squaredcos_cap_v2"
    assert pipeline.config.defaults == {
        "guidance_scale": 2.5,
        "guidance_power": None,
        "guidance_schedule": None,
        "guidance_start": 0.0,
        "guidance_stop": 1.0,
        "classifier_free_scale": 0.0,
        "num_inference_steps": 3,
        "guidance_algorithm": "mean",
        "guidance_every": 1,
        "guidance_tolerance": None,
    }
    scheduler = pipeline.scheduler
    assert (type(scheduler), scheduler.config.variance_type) == (DDPMScheduler, "learned_range")
    assert (scheduler.config.beta_schedule, scheduler.config.timestep_spacing) == (
        "squaredcos_cap_v2",
        "linspace",
    )

    # The defaults are used, and only where the call says nothing.
    pipeline.set_progress_bar_config(disable=True)
    # The weights are the same objects: copies elsewhere in memory may be rounded differently.
    same = ClassifierGuidedPipeline(pipeline.unet, scheduler, pipeline.classifier)
    same.set_progress_bar_config(disable=True)

    def images(pipeline: ClassifierGuidedPipeline, **call: Any) -> torch.Tensor:
        return pipeline(
            label=1, generator=torch.Generator().manual_seed(0), output_type="pt", **call
        ).images

    asked = {"guidance_scale": 2.5, "num_inference_steps": 3, "guidance_algorithm": "mean"}
    assert torch.equal(images(pipeline), images(same, **asked))
    for name, value in (
        ("guidance_scale", 30.0),
        ("num_inference_steps", 2),
        ("guidance_algorithm", "output"),
    ):
        assert torch.equal(images(pipeline, **{name: value}), images(same, **asked | {name: value}))
        assert not torch.equal(images(pipeline, **{name: value}), images(pipeline))


def test_flags_alone_without_a_classifier_and_in_half_precision(unet: Path, tmp_path: Path) -> None:
    (tmp_path / "flags.json").write_text(json.dumps(FLAGS))
    command(
        "--unet",
        unet,
        "--config",
        tmp_path / "flags.json",
        "--output",
        tmp_path / "out",
        "--dtype",
        "float16",
        "--quiet",
    )
    pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.classifier is None and pipeline.config.defaults["guidance_scale"] == 0.0
    weights = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 0.6 * unet.stat().st_size
    state = convert_unet(random_state(UNET), UNET).half().state_dict()
    half = ClassifierGuidedPipeline.from_pretrained(
        tmp_path / "out", dtype=torch.float16
    ).unet.state_dict()
    assert all(torch.equal(half[name], tensor) for name, tensor in state.items())
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_our_own_classes_are_found_again(tmp_path: Path) -> None:
    """In a process that has imported nothing but the pipeline."""
    args = UNET | {"num_heads": 4, "num_head_channels": -1, "num_classes": 6}
    convert_checkpoint(
        save(random_state(args), tmp_path / "model.pt"),
        tmp_path / "out",
        config={"unet": args},
        progress=False,
    )
    pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out")
    pipeline.scheduler = ADMDDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "exact")
    code = (
        "from guided_diffusers import ClassifierGuidedPipeline as P; import sys;"
        "p = P.from_pretrained(sys.argv[1]);"
        "print(type(p.unet).__name__, type(p.scheduler).__name__, p.unet.config.attention_head_dim)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "exact")], capture_output=True, text=True
    )
    assert out.stdout.strip() == "ADMUNet2DModel ADMDDPMScheduler [8, 16, 24]", out.stderr


def test_an_up_sampler(tmp_path: Path) -> None:
    state = random_state(UNET | {"super_resolution": True})
    flags = {name: value for name, value in FLAGS.items() if name != "image_size"} | {
        "large_size": 16,
        "small_size": 8,
    }
    for name, config in (("flags", flags), ("constructor", {"unet": UNET})):
        convert_checkpoint(
            save(state, tmp_path / f"{name}.pt"), tmp_path / name, config=config, progress=False
        )
        pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / name)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(image=torch.zeros(1, 3, 8, 8), num_inference_steps=2).images
        assert images[0].size == (16, 16)


@pytest.mark.parametrize("ddim", [[], ["--ddim-steps", "2"]])
def test_the_example_draws_a_picture_in_two_stages(
    ddim: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small networks in the place of the published ones, converted beforehand as the example would."""
    small = UNET | {"num_classes": 6}
    config = {"unet": small, "classifier": CLASSIFIER, "timestep_respacing": "3"}
    guide = save(random_state(CLASSIFIER), tmp_path / "classifier.pt")
    convert_checkpoint(
        save(random_state(small), tmp_path / "base.pt"),
        tmp_path / "base-with-classifier",
        guide,
        config=config,
        progress=False,
    )
    large = small | {"image_size": 32}
    upsampler = save(random_state(large | {"super_resolution": True}), tmp_path / "large.pt")
    convert_checkpoint(
        upsampler,
        tmp_path / "large",
        config={"unet": large, "timestep_respacing": "2"},
        progress=False,
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "adm_imagenet.py",
            "--unet",
            f"{tmp_path}/base.pt",
            "--classifier",
            str(guide),
            "--upsampler",
            str(upsampler),
            "--label",
            "3",
            "5",
            "--num-images",
            "2",
            "--output",
            f"{tmp_path}/out.png",
            *ddim,
        ],
    )
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert Image.open(tmp_path / "out.png").size == (64, 64)  # 2 x 2 images of 32 x 32


def test_a_learned_variance_is_read_off_the_tensors(tmp_path: Path) -> None:
    said = {name: value for name, value in UNET.items() if name != "out_channels"}
    for channels, variance_type in ((6, "learned_range"), (3, "fixed_large")):
        file = save(random_state(UNET | {"out_channels": channels}), tmp_path / f"{channels}.pt")
        convert_checkpoint(file, tmp_path / str(channels), config={"unet": said}, progress=False)
        pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / str(channels))
        assert pipeline.scheduler.config.variance_type == variance_type


def test_schedulers_of_the_flags() -> None:
    for flags, expected in (
        (
            {},
            {
                "variance_type": "fixed_large",
                "prediction_type": "epsilon",
                "timestep_spacing": "linspace",
            },
        ),
        (
            {"sigma_small": True, "predict_xstart": True},
            {"variance_type": "fixed_small", "prediction_type": "sample"},
        ),
        (
            {"learn_sigma": True, "timestep_respacing": "ddim25"},
            {"variance_type": "learned_range", "timestep_spacing": "leading"},
        ),
        (
            {"diffusion_steps": 4000, "rescale_timesteps": False},
            {"num_train_timesteps": 4000, "beta_end": 0.005},
        ),
    ):
        config = convert_scheduler(flags).config
        assert {name: config[name] for name in expected} == expected
    with pytest.raises(ValueError, match="rescale_timesteps is True with 4000 diffusion_steps"):
        convert_scheduler({"diffusion_steps": 4000, "rescale_timesteps": True})


# 2. The published checkpoints

ADM_CLASSES = {"imagenet-128", "imagenet-512", "imagenet-64-256-upsampler"}
SCALES = {
    "imagenet-64": 1.0,
    "imagenet-128": 0.5,
    "imagenet-256": 1.0,
    "imagenet-256-uncond": 10.0,
    "imagenet-512": 4.0,
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_at_full_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the published shapes, without memory, through the whole conversion but the writing of weights."""
    preset = PRESETS[name]
    kind = "sr" if "upsampler" in name else "unet"
    shapes = {f"{preset.unet}.pt": original_shapes(published_arguments(kind, preset.config))}
    if preset.classifier:
        shapes[f"{preset.classifier}.pt"] = original_shapes(
            published_arguments("clf", preset.config)
        )
    saved = []
    monkeypatch.setattr(
        "guided_diffusers.openai.convert.load_state_dict",
        lambda file: {
            key: torch.empty(shape, device="meta") for key, shape in shapes[file.name].items()
        },
    )
    monkeypatch.setattr(
        ClassifierGuidedPipeline,
        "save_pretrained",
        lambda self, folder: (saved.append(self), folder.mkdir()),
    )
    classifier = preset.classifier and tmp_path / f"{preset.classifier}.pt"
    convert_checkpoint(tmp_path / f"{preset.unet}.pt", tmp_path / "out", classifier, progress=False)
    (pipeline,) = saved
    assert type(pipeline.unet) is (ADMUNet2DModel if name in ADM_CLASSES else UNet2DModel)
    steps = 1000 if name.startswith("lsun") else 250
    assert pipeline.config.defaults == {
        "guidance_scale": SCALES.get(name, 0.0),
        "guidance_power": None,
        "guidance_schedule": None,
        "guidance_start": 0.0,
        "guidance_stop": 1.0,
        "classifier_free_scale": 0.0,
        "num_inference_steps": steps,
        "guidance_algorithm": "mean",
        "guidance_every": 1,
        "guidance_tolerance": None,
    }
    assert pipeline.scheduler.config.variance_type == "learned_range"
    beta = "squaredcos_cap_v2" if name == "imagenet-64" else "linear"
    assert pipeline.scheduler.config.beta_schedule == beta
    if classifier:
        assert (
            type(pipeline.classifier) is NoiseAwareClassifier
            and pipeline.classifier.config.beta_schedule == beta
        )
        assert pipeline.classifier.config.sample_size == pipeline.unet.config.sample_size
    assert find_preset(name) is find_preset(f"{preset.unet}.pt") is preset


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_is_at_most_twice_the_weights(tmp_path: Path) -> None:
    args = UNET | {"model_channels": 128, "num_res_blocks": 2}
    state = random_state(args)
    files = [str(save(state, tmp_path / f"model{suffix}")) for suffix in (".pt", ".safetensors")]
    code = f"""
from pathlib import Path
from guided_diffusers.openai import convert_checkpoint
def memory(name):  # in KiB, what is used now (VmRSS) or was at most (VmHWM)
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)
Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
before = memory("VmRSS")
for file in {files!r}:
    convert_checkpoint(file, file + "-out", config={{"unet": {args!r}}}, progress=False)
print((memory("VmHWM") - before) * 1024)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    size = Path(files[0]).stat().st_size
    times = float(out.stdout) / size
    print(f"peak memory: {times:.2f} times the {size / 1e6:.0f} MB of weights")
    assert times < 2.25


# 3. What is refused


def refused(message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(*arguments, progress=False, **options)


def test_wrong_preset(unet: Path, tmp_path: Path) -> None:
    refused(
        r"model.pt doesn't fit preset 'imagenet-64': \w+ is .* in the config but .* in the tensors",
        unet,
        tmp_path / "out",
        preset="imagenet-64",
    )
    refused(
        "preset 'model.pt' is unknown; allowed: imagenet-64, .*64x64_diffusion",
        unet,
        tmp_path / "out",
    )
    refused(
        "only one is allowed", unet, tmp_path / "out", preset="imagenet-64", config={"unet": UNET}
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_file(suffix: str, tmp_path: Path) -> None:
    file = save(random_state(UNET), tmp_path / f"model{suffix}")
    file.write_bytes(file.read_bytes()[:-1000])
    refused("is damaged or truncated", file, tmp_path / "out", config={"unet": UNET})
    file.write_bytes(b"")
    refused("is damaged or truncated", file, tmp_path / "out", config={"unet": UNET})
    refused("does not exist", tmp_path / "other.pt", tmp_path / "out", config={"unet": UNET})


class Code:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    "how", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, 2))]
)
def test_a_pickle_with_code_in_it(how: Any, tmp_path: Path) -> None:
    how({"a": Code(tmp_path / "run")}, tmp_path / "model.pt")
    refused(
        "model.pt is refused: .*holds code, which is never run",
        tmp_path / "model.pt",
        tmp_path / "out",
        config={"unet": UNET},
    )
    assert not (tmp_path / "run").exists()


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        load_state_dict(tmp_path / "model.pt")


def test_a_missing_key(tmp_path: Path) -> None:
    state = random_state(UNET)
    del state["middle_block.1.norm.bias"]
    refused(
        r"1 missing \['middle_block.1.norm.bias'\]",
        save(state, tmp_path / "model.pt"),
        tmp_path / "out",
        config={"unet": UNET},
    )


def test_a_classifier_of_another_image_size(unet: Path, tmp_path: Path) -> None:
    for pool, message in (
        ("attention", "image_size is 16 in the config but 32 in the tensors"),
        ("adaptive", "classifier.pt is for images of 32 x 32, .*model.pt for 16 x 16"),
    ):
        other = CLASSIFIER | {"image_size": 32, "pool": pool}
        file = save(random_state(other), tmp_path / "classifier.pt")
        stated = other | {"image_size": 16} if pool == "attention" else other
        refused(message, unet, tmp_path / "out", file, config={"unet": UNET, "classifier": stated})


def test_a_classifier_of_other_classes(classifier: Path, tmp_path: Path) -> None:
    args = UNET | {"num_classes": 9}
    refused(
        "classifier.safetensors has 6 classes, .*has 9",
        save(random_state(args), tmp_path / "model.pt"),
        tmp_path / "out",
        classifier,
        config={"unet": args, "classifier": CLASSIFIER},
    )


def test_other_settings_that_can_not_be(unet: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    refused("old exists already", unet, tmp_path / "old", config={"unet": UNET})
    refused(
        "timestep_respacing is '10,20'; one number",
        unet,
        tmp_path / "out",
        config={"unet": UNET, "timestep_respacing": "10,20"},
    )
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json is no JSON"):
        command("--unet", unet, "--config", tmp_path / "bad.json", "--output", tmp_path / "out")
