"""The models that the package ships."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guided_diffusers import (
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    NoiseAwareClassifier,
    NoiseAwareCLIP,
    NoiseAwareCLIPGuidance,
)
from guided_diffusers.bundled import folder
from guided_diffusers.sampling import sample

LABELS = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]


@pytest.fixture(scope="module")
def pipeline() -> ClassifierGuidedPipeline:
    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_small_and_safe() -> None:
    files = [path for path in folder("fashion-mnist").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    clip = folder("fashion-mnist") / "clip"
    assert sum(path.stat().st_size for path in files if clip not in path.parents) <= 16e6
    assert 0 < sum(path.stat().st_size for path in files if clip in path.parents) <= 3e6


def test_labels_and_figures(pipeline: ClassifierGuidedPipeline) -> None:
    assert list(pipeline.config.id2label.values()) == LABELS
    assert pipeline.unet.config.num_class_embeds == 11  # ten labels and the null label
    figures = json.loads((folder("fashion-mnist") / "figures.json").read_text())
    accuracy = {row["timestep"]: row["accuracy"] for row in figures["classifier"]["held_out"]}
    assert (
        len(accuracy) == 10 and accuracy[49] > 0.85 and accuracy[49] > accuracy[449] > accuracy[949]
    )


@pytest.mark.parametrize("conditional, least", [(True, 0.85), (False, 0.85)])
def test_the_judge_agrees(
    pipeline: ClassifierGuidedPipeline, conditional: bool, least: float
) -> None:
    """With few steps and images, by the preset of each mode; `quality_cost.py` measures them in
    full."""
    judge = NoiseAwareClassifier.from_pretrained(folder("fashion-mnist") / "judge")
    agreed = {}
    for scale in (0.0, None):
        ((_, images),) = sample(
            pipeline,
            LABELS,
            0,
            40,
            range(40),
            guidance_scale=scale,
            conditional=conditional,
            num_inference_steps=15,
            output_type="latent",
        )
        with torch.no_grad():
            told = judge(images.clamp(-1, 1), 0).logits.argmax(-1)
        agreed[scale] = (told == torch.arange(40) % 10).float().mean().item()
    assert agreed[None] >= least
    assert agreed[None] >= agreed[0.0]
    if not conditional:
        assert agreed[0.0] < 0.35  # chance is 0.1


def test_the_presets_are_those_that_were_measured(pipeline: ClassifierGuidedPipeline) -> None:
    """The rows of examples/benchmarks/README.md, and of the README's text on presets."""
    fixed = {"num_inference_steps": 1, "output_type": "latent"}
    rows = {}
    for name, call in {
        "label": {},
        "classifier": {"conditional": False},
        "classifier_free": {"classifier_free_scale": 1.0},
    }.items():
        settings = pipeline("bag", **fixed, **call).settings
        assert settings["mode"] == name
        rows[name] = [settings[key] for key in ("guidance_scale", "guidance_start")]
        rows[name].append(settings["guidance_tolerance"])
    assert rows == {
        "label": [1.0, 0.4, 0.1],
        "classifier": [3.0, 0.2, 0.1],
        "classifier_free": [0.0, 0.0, None],
    }
    hidden = pipeline("bag", **fixed, conditional=False).settings
    assert pipeline({"bag": 1.5}, **fixed).settings == hidden
    assert pipeline.config.defaults["num_inference_steps"] == 15


def test_four_steps_by_timesteps_and_a_schedule_that_a_search_found(
    pipeline: ClassifierGuidedPipeline,
) -> None:
    """The call in examples/benchmarks/README.md; evenly spaced steps end too early."""
    schedule = {"sigmas": [0.128, 1.33, 5.95, 64.8], "scales": [2.97, 4.85, 0.68, 3.76]}
    call = {"conditional": False, "guidance_scale": 1.0, "guidance_schedule": schedule}
    call |= {"guidance_start": 0.0, "guidance_every": 1, "timesteps": [907, 594, 314, 35]}
    generators = [torch.Generator().manual_seed(i) for i in range(40)]
    labels = [i % 10 for i in range(40)]
    result = pipeline(labels, generator=generators, output_type="latent", **call)
    judge = NoiseAwareClassifier.from_pretrained(folder("fashion-mnist") / "judge")
    with torch.no_grad():
        found = judge(result.images.clamp(-1, 1), 0).logits.argmax(-1)
    assert result.guidance_evaluations == 4
    assert (found == torch.tensor(labels)).float().mean() > 0.85


def test_a_bundle_takes_a_preset(tmp_path: Path) -> None:
    """training/bundle.py: scheduler and defaults change, the weights don't; a call that says nothing takes them."""
    place, preset = tmp_path / "bundle", tmp_path / "preset.json"
    modes = Path(__file__).parents[1] / "training/configs/fashion_mnist_modes.json"
    shutil.copytree(folder("fashion-mnist"), place)
    defaults = {
        "num_inference_steps": 4,
        "guidance_scale": 2.0,
        "guidance_start": 0.5,
        "guidance_tolerance": 0.1,
    }
    preset.write_text(
        json.dumps(
            {
                "scheduler": "dpmsolver++3m",
                "defaults": defaults,
                "command": "measured",
                "rows": [{"guidance": "some", "agreement": 0.9}],
            }
        )
    )
    script = Path(__file__).parents[1] / "training/bundle.py"
    subprocess.run(
        [sys.executable, script, "--preset", preset, "--modes", modes, "--output", place],
        check=True,
        timeout=300,
    )
    for part in ("unet", "classifier", "judge", "clip"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert (place / name).read_bytes() == (folder("fashion-mnist") / name).read_bytes()
    assert json.loads((place / "figures.json").read_text())["preset"]["command"] == "measured"
    pipeline = ClassifierGuidedPipeline.from_pretrained(place)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipeline.scheduler.config.solver_order == 3
    own, said = (
        pipeline("bag", generator=torch.Generator().manual_seed(0), output_type="pt", **call)
        for call in ({}, defaults)
    )
    bundled = ClassifierGuidedPipeline.from_bundled("fashion-mnist").config.defaults
    assert pipeline.config.defaults["modes"] == bundled["modes"] == json.loads(modes.read_text())
    assert own.guidance_evaluations == 2 and torch.equal(own.images, said.images)


def test_the_first_command(tmp_path: Path) -> None:
    """What the README says first, from another folder."""
    command = [
        sys.executable,
        "-m",
        "guided_diffusers",
        "sample",
        "--label",
        "sneaker",
        "--guidance-scale",
        "3",
        "--num-images",
        "2",
        "--num-inference-steps",
        "5",
        "--output",
        "sneaker.png",
    ]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "sneaker.png").is_file() and "2 images of sneaker" in ran.stdout
    assert "step" in ran.stderr  # the progress bar


def test_a_bundle_takes_further_classifiers_texts_and_half_precision(tmp_path: Path) -> None:
    place, trained = tmp_path / "bundle", tmp_path / "vendor"
    shutil.copytree(folder("fashion-mnist"), place)
    shutil.copytree(folder("fashion-mnist") / "judge", trained)
    (trained / "metrics.json").write_text(json.dumps({"step": 7}))
    (trained / "options.json").write_text(json.dumps({"seed": 3, "output_dir": str(trained)}))
    (tmp_path / "README.md").write_text("Whose pictures these are")
    script = Path(__file__).parents[1] / "training/bundle.py"
    command = [sys.executable, script, "--output", place, "--half", "--also", f"vendor={trained}"]
    command += ["--text", tmp_path / "README.md"]
    subprocess.run(command, check=True, timeout=300)
    for part in ("unet", "classifier", "judge", "clip", "vendor"):
        name = f"{'judge' if part == 'vendor' else part}/diffusion_pytorch_model.safetensors"
        before = load_file(folder("fashion-mnist") / name)
        after = load_file(place / part / "diffusion_pytorch_model.safetensors")
        assert before.keys() == after.keys()
        for key, weight in after.items():
            assert weight.dtype == torch.float16 and torch.equal(weight, before[key].half())
    figures = json.loads((place / "figures.json").read_text())
    assert figures["vendor"] == {"step": 7, "options": {"seed": 3}}
    assert (place / "README.md").read_text() == "Whose pictures these are"
    assert not list(place.rglob("*.py"))
    wrong = subprocess.run([*command[:4], "--also", "judge=x"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--also judge=x: NAME=FOLDER is allowed" in wrong.stderr


# Emoji


EMOJI = folder("emoji")
CATEGORIES = [
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
]


def test_the_emoji_models_are_small_and_name_whose_pictures_they_learned() -> None:
    files = [path for path in EMOJI.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 10e6
    card = (EMOJI / "README.md").read_text()
    for words in ("Noto Emoji", "Apache License\n  2.0", "Twemoji", "CC-BY\n  4.0", "emoji-data"):
        assert words in card
    figures = json.loads((EMOJI / "figures.json").read_text())
    assert {"unet", "classifier", "judge", "vendor", "clip", "preset"} <= figures.keys()
    steps = figures["unet"]["options"]["max_train_steps"]
    script = (Path(__file__).parents[1] / "examples/emoji/train.sh").read_text()
    assert f"UNET_STEPS:-{steps}" in script  # the script that made them


@pytest.fixture(scope="module")
def emoji() -> ClassifierGuidedPipeline:
    pipeline = ClassifierGuidedPipeline.from_bundled("emoji")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def emoji_samples(pipeline: ClassifierGuidedPipeline, labels: list, **call: object) -> torch.Tensor:
    batches = sample(pipeline, labels, 0, 45, range(45), output_type="latent", **call)
    return torch.cat([images for _, images in batches]).clamp(-1, 1)


def test_the_judge_agrees_more_with_guided_emoji(emoji: ClassifierGuidedPipeline) -> None:
    """Its agreement with real held-out pictures is 55%: a category has more than one look."""
    assert list(emoji.config.id2label.values()) == CATEGORIES
    judge = NoiseAwareClassifier.from_pretrained(EMOJI / "judge")
    agreed = []
    for call in ({"guidance_scale": 0.0, "classifier_free_scale": 0.0, "conditional": False}, {}):
        images = emoji_samples(emoji, CATEGORIES, num_inference_steps=10, **call)
        assert images.shape == (45, 3, 32, 32)
        with torch.no_grad():
            found = judge(images, 0).logits.argmax(-1)
        agreed.append((found == torch.arange(45) % 9).float().mean().item())
    assert agreed[0] < 0.3 and agreed[1] > 0.5  # chance is 0.11


def test_vendor_and_caption_steer_the_emoji(emoji: ClassifierGuidedPipeline) -> None:
    """Each term makes what it guides to more likely than the same seeds without it."""
    vendor = NoiseAwareClassifier.from_pretrained(EMOJI / "vendor")
    clip = NoiseAwareCLIP.from_pretrained(EMOJI / "clip")
    call = {"num_inference_steps": 10, "conditional": False, "guidance_scale": 0.0}
    plain = emoji_samples(emoji, CATEGORIES, **call)
    styled = emoji_samples(
        emoji, CATEGORIES, guidance=ClassifierGuidance(vendor, "twitter", 3.0), **call
    )
    captioned = emoji_samples(
        emoji, CATEGORIES, guidance=NoiseAwareCLIPGuidance(clip, "country flag", 4.0), **call
    )
    timestep = torch.zeros(45, dtype=torch.long)
    with torch.no_grad():
        likely = [vendor(x, timestep).logits.softmax(-1)[:, 1].mean() for x in (plain, styled)]
        texts = clip.encode_prompts("country flag")
        near = [(clip.encode_image(x, timestep) @ texts.T).mean() for x in (plain, captioned)]
    assert likely[1] > likely[0] + 0.1 and near[1] > near[0] + 0.1
