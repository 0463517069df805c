"""NoiseAwareCLIP and its training: embeddings, captions, saving, loss, warm starts, runs on dark and light images."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from diffusers import DDPMScheduler, UNet2DModel
from helpers import TRAINING, load_script
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from guided_diffusers import NoiseAwareClassifier
from guided_diffusers.clip import NoiseAwareCLIP
from guided_diffusers.learning.annotations import CaptionedImages
from guided_diffusers.learning.batches import generator_for
from guided_diffusers.learning.data import LabelledImages
from guided_diffusers.learning.options import parse
from guided_diffusers.noise import schedule_config
from guided_diffusers.utils import weights_digest

train_clip = load_script("train_clip")

IMAGE = {
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "projection_dim": 6,
}
CAPTIONS = {
    "train": {
        "dark": ["a dark image", "this is dark", "black, dark"],
        "light": ["a light image", "this is light", "white, light"],
    },
    "held_out": {"dark": ["this image is a black"], "light": ["this image is a white"]},
}
SENTENCES = [caption for part in CAPTIONS["train"].values() for caption in part]
TINY = (
    "--resolution 8 --train_batch_size 4 --lr_warmup_steps 0 --learning_rate 1e-2 --validation_samples 10 "
    "--ddpm_num_steps 50 --no_progress --cpu --model_config_name_or_path {root}/image.json"
)
DATA = "--train_data_dir {root}/data "
BY_LABEL = DATA + "--captions {root}/captions.json "
SMALL = "--text_config {root}/text.json "


def make_clip(**changes: object) -> NoiseAwareCLIP:
    torch.manual_seed(0)
    tokenizer = train_clip.word_tokenizer(SENTENCES, 12)
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "eos_token_id": 3,
        "bos_token_id": 2,
        "pad_token_id": 0,
    }
    image = {**IMAGE, "sample_size": 8, "in_channels": 1}
    return NoiseAwareCLIP(
        **{"image_config": image, "text_config": text, "tokenizer": tokenizer, **changes}
    ).eval()


@pytest.fixture(scope="module")
def clip() -> NoiseAwareCLIP:
    return make_clip(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and light images with labels, a caption and several captions; configs, and models to start from."""
    root = tmp_path_factory.mktemp("clip")
    random = np.random.default_rng(0)
    features = Features(
        {
            "image": Image(),
            "label": ClassLabel(names=["dark", "light"]),
            "one": Value("string"),
            "several": List(Value("string")),
            "number": Value("int64"),
        }
    )
    (root / "data").mkdir()
    for split, count in (("train", 24), ("test", 10)):
        labels = [i % 2 for i in range(count)]
        pixels = [
            random.integers(0, 60, (8, 8), dtype=np.uint8) + np.uint8(180 * label)
            for label in labels
        ]
        several = [CAPTIONS["train"][["dark", "light"][label]] for label in labels]
        rows = {
            "image": [PILImage.fromarray(image) for image in pixels],
            "label": labels,
            "several": several,
            "one": [captions[i % 3] for i, captions in enumerate(several)],
            "number": labels,
        }
        Dataset.from_dict(rows, features=features).to_parquet(root / "data" / f"{split}.parquet")
    for name, content in (("image", IMAGE), ("text", TEXT), ("captions", CAPTIONS)):
        (root / f"{name}.json").write_text(json.dumps(content))
    torch.manual_seed(1)
    encoder = NoiseAwareClassifier(**IMAGE, sample_size=8, in_channels=1, num_labels=3)
    torch.nn.init.normal_(encoder.head[-1].out.weight)
    encoder.save_pretrained(root / "classifier")
    tokenizer = train_clip.word_tokenizer([*SENTENCES, "more words"], 12)
    config = CLIPTextConfig(
        **TEXT, vocab_size=len(tokenizer), eos_token_id=3, bos_token_id=2, pad_token_id=0
    )
    text = CLIPTextModelWithProjection(config)
    text.save_pretrained(root / "text")
    text.text_model.save_pretrained(root / "unprojected")
    for folder in ("text", "unprojected"):
        tokenizer.save_pretrained(root / folder)
    UNet2DModel(
        8,
        1,
        1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        norm_num_groups=4,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
    ).save_pretrained(root / "unet")
    return root


@pytest.fixture
def train(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run `main` in this process: (options, output folder's name) -> folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root / "cache"))

    def run(line: str, output: str = "out") -> Path:
        folder = tmp_path / output
        words = shlex.split(
            f"train_clip.py {TINY} {line} --output_dir {folder}".replace("{root}", str(root))
        )
        monkeypatch.setattr(sys, "argv", words)
        start_afresh()
        try:
            train_clip.main()
        finally:
            start_afresh()
        return folder

    return run


def start_afresh() -> None:
    """Let the next Accelerator be another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


# The model


def test_embeddings_and_critic(clip: NoiseAwareCLIP) -> None:
    sample = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = clip.tokenizer(SENTENCES[:2], padding=True, return_tensors="pt")
    t = torch.tensor([0.0, 12.5, 49.0])
    output = clip(sample, t, tokens.input_ids, tokens.attention_mask)
    assert output.image_embeds.shape == (3, 6) and output.text_embeds.shape == (2, 6)
    for embeds in (output.image_embeds, output.text_embeds):
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(len(embeds)))
    cosines = torch.stack(
        [torch.stack([i @ c for c in output.text_embeds]) for i in output.image_embeds]
    )
    torch.testing.assert_close(output.logits_per_image, cosines / 0.07)
    assert torch.equal(output.image_embeds, clip.encode_image(sample, t))
    torch.testing.assert_close(clip.encode_image(sample, 12.5)[1], output.image_embeds[1])
    torch.testing.assert_close(
        clip.encode_image(sample, torch.tensor(49))[2], output.image_embeds[2]
    )
    assert (clip.encode_image(sample, 0) - clip.encode_image(sample, 49)).abs().max() > 1e-3
    assert torch.equal(
        clip(sample, t, tokens.input_ids, return_dict=False)[0], output.logits_per_image
    )
    with torch.autocast("cpu", torch.bfloat16):
        output = clip(sample, t, tokens.input_ids)
    assert output.logits_per_image.dtype == output.image_embeds.dtype == torch.float32
    torch.testing.assert_close(
        output.logits_per_image, output.image_embeds @ output.text_embeds.T / 0.07
    )
    half = make_clip().to(torch.bfloat16)
    embeds = half.encode_image(sample.bfloat16(), 3), half.encode_text(tokens.input_ids)
    assert all(
        torch.allclose(e.norm(dim=1), torch.ones(())) and e.dtype == torch.float32 for e in embeds
    )


def test_gradient_of_the_critic_is_that_of_finite_differences(clip: NoiseAwareCLIP) -> None:
    exact, tokens = make_clip().double(), clip.tokenizer(SENTENCES[:1], return_tensors="pt")
    generator = torch.Generator().manual_seed(2)
    x, direction = (
        torch.randn(1, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    # float64 weights; the embedding itself is float32, hence the wide step
    critic = lambda x: exact(x, 7.0, tokens.input_ids).logits_per_image.sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(critic(x.requires_grad_()), x)
    with torch.no_grad():
        slope = (critic(x + 1e-2 * direction) - critic(x - 1e-2 * direction)) / 2e-2
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=2e-2)


def test_the_scale_is_at_most_100() -> None:
    model = make_clip()
    assert model.scale.item() == pytest.approx(1 / 0.07)
    model.logit_scale.data.fill_(9.0)
    assert model.scale.item() == pytest.approx(100)


def test_the_schedule_is_in_the_config(clip: NoiseAwareCLIP) -> None:
    schedule = {
        "num_train_timesteps": 50,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 1e-4,
        "beta_end": 0.02,
    }
    assert schedule_config(clip) == schedule == schedule_config(clip.image_encoder)
    betas = [0.1, 0.2]
    model = make_clip(num_train_timesteps=2, trained_betas=betas)
    assert (
        schedule_config(model)["trained_betas"]
        == schedule_config(model.image_encoder)["trained_betas"]
        == betas
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_config": {**IMAGE, "num_labels": 4, "beta_end": 0.1}},
            r"image_config has \['beta_end', 'num_labels'\]",
        ),
        ({"image_config": {**IMAGE, "sample_size": 9}}, "sample_size is 9"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_clip(**changes)


# Captions


def test_word_tokenizer() -> None:
    tokenizer = train_clip.word_tokenizer(["A T-shirt, red", "a coat"], 9)
    tokens = tokenizer("A t-SHIRT,red glove")
    assert tokenizer.convert_ids_to_tokens(tokens.input_ids) == [
        "[BOS]",
        "a",
        "t",
        "-",
        "shirt",
        ",",
        "red",
        "[UNK]",
        "[EOS]",
    ]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (0, 1, 3)
    cut = tokenizer("red " * 20, truncation=True, max_length=5).input_ids
    assert len(cut) == 5 and cut[-1] == 3
    assert (
        tokenizer.get_vocab()
        == train_clip.word_tokenizer(["A T-shirt, red", "a coat"], 9).get_vocab()
    )


def test_prompts_are_the_same_in_any_batch(clip: NoiseAwareCLIP) -> None:
    prompts = ["dark", "this is a light, light image", "A Dark image", "this"]
    together = clip.encode_prompts(prompts)
    apart = torch.cat([clip.encode_prompts(prompt) for prompt in prompts])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)
    assert torch.cdist(together, together).add(10 * torch.eye(4)).min() > 1e-2
    filled = clip.tokenizer(prompts, padding="max_length", max_length=12, return_tensors="pt")
    torch.testing.assert_close(clip.encode_text(filled.input_ids), apart, rtol=0, atol=1e-6)


def test_text_is_pooled_at_eos(clip: NoiseAwareCLIP) -> None:
    ids = clip.tokenizer(["dark", "this is light"], padding=True, return_tensors="pt").input_ids
    hidden = clip.text_encoder(ids).last_hidden_state
    pooled = torch.stack(
        [hidden[0, 2], hidden[1, 4]]
    )  # [BOS] dark [EOS], [BOS] this is light [EOS]
    wanted = F.normalize(pooled @ clip.text_encoder.text_projection.weight.T, dim=1)
    torch.testing.assert_close(clip.encode_text(ids), wanted)


def test_prompts_that_cannot_be_read_are_refused(clip: NoiseAwareCLIP) -> None:
    with pytest.raises(ValueError, match="encode_prompts needs a tokenizer"):
        make_clip(tokenizer=None).encode_prompts("dark")
    with pytest.raises(ValueError, match=r"prompts is \[\]; allowed: a string or a list"):
        clip.encode_prompts([])
    with pytest.raises(ValueError, match="'light light .*' of 14 tokens; up to 12 are allowed"):
        clip.encode_prompts(["dark", "light " * 12])
    with pytest.raises(
        ValueError,
        match=r"'a Zebra in light', and the model was not trained on the words \['Zebra', 'in'\]",
    ):
        clip.encode_prompts(["light", "a Zebra in light"])


@pytest.mark.parametrize("subfolder", [None, "clip"])
def test_saved_and_loaded_is_the_same(
    clip: NoiseAwareCLIP, tmp_path: Path, subfolder: str | None
) -> None:
    first, second = tmp_path / "first" / (subfolder or ""), tmp_path / "second"
    clip.encode_prompts(SENTENCES)  # a tokenizer would save how it last padded
    clip.save_pretrained(first)
    loaded = NoiseAwareCLIP.from_pretrained(tmp_path / "first", subfolder=subfolder)
    assert not loaded.training and apart(clip.state_dict(), loaded.state_dict()) == 0
    assert torch.equal(loaded.encode_prompts(SENTENCES), clip.encode_prompts(SENTENCES))
    loaded.save_pretrained(second)
    names = [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "guided_diffusers_clip.py",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]
    for folder in (first, second):
        found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        assert sorted(found) == names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    shutil.rmtree(second / "tokenizer")
    assert NoiseAwareCLIP.from_pretrained(second).tokenizer is None


def test_only_safetensors_are_loaded(clip: NoiseAwareCLIP, tmp_path: Path) -> None:
    clip.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(clip.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        NoiseAwareCLIP.from_pretrained(tmp_path)


def test_captioned_images(root: Path) -> None:
    images = LabelledImages(
        Dataset.from_parquet(str(root / "data" / "train.parquet")), resolution=8
    )
    one, several = CaptionedImages(images, "one"), CaptionedImages(images, "several")
    assert [one[i]["caption"] for i in range(4)] == [
        "a dark image",
        "this is light",
        "black, dark",
        "a light image",
    ]
    assert len(one) == 24 and sorted(set(one.captions())) == sorted(
        set(several.captions())
    ) == sorted(SENTENCES)
    by_label = CaptionedImages(
        images, captions={0: CAPTIONS["train"]["dark"], 1: CAPTIONS["train"]["light"]}
    )
    for data in (several, by_label):
        drawn = [data[1, seed]["caption"] for seed in range(300)]
        assert drawn == [data[1, seed]["caption"] for seed in range(300)]
        assert all(70 < drawn.count(caption) < 130 for caption in CAPTIONS["train"]["light"])
        assert data[7]["caption"] == data[7, 7]["caption"]
        assert (
            torch.equal(data[3, 5]["pixel_values"], images[3, 5]["pixel_values"])
            and data[3, 5]["label"] == 1
        )
    with pytest.raises(
        ValueError, match="caption_column='number' holds .*int64.*; strings or lists of strings"
    ):
        CaptionedImages(images, "number")
    with pytest.raises(ValueError, match=r"captions: there are none for the labels \['light'\]"):
        CaptionedImages(images, captions={0: ["dark"]})
    with pytest.raises(
        ValueError, match="caption_column=None, captions=None: one of the two is needed"
    ):
        CaptionedImages(images)
    unlabelled = LabelledImages(images.dataset.select_columns(["image"]), resolution=8)
    with pytest.raises(ValueError, match="captions: captions by label need labels"):
        CaptionedImages(unlabelled, captions={0: ["dark"]})
    empty = Dataset.from_dict(
        {**images.dataset[:1], "several": [[]]}, features=images.dataset.features
    )
    with pytest.raises(ValueError, match=r"row 0 has the captions \[\]"):
        CaptionedImages(LabelledImages(empty, resolution=8), "several")[0]


# The training


def test_contrastive_loss() -> None:
    """Written out pair by pair; and 0 of a perfect match at a large scale."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(5, 3, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    f = lambda i, j: 3.0 * sum(images[i] * texts[j]).item()  # noqa: E731
    wanted = (
        sum(
            math.log(sum(math.exp(f(i, j)) for j in range(5)))
            + math.log(sum(math.exp(f(j, i)) for j in range(5)))
            - 2 * f(i, i)
            for i in range(5)
        )
        / 10
    )
    assert train_clip.contrastive_loss(images, texts, torch.tensor(3.0)).item() == pytest.approx(
        wanted, abs=1e-12
    )
    assert (
        train_clip.contrastive_loss(torch.eye(4), torch.eye(4), torch.tensor(100.0)).item() < 1e-6
    )


def test_it_learns_and_its_figures_are_of_the_saved_model(
    train: Callable[..., Path], root: Path
) -> None:
    folder = train(
        BY_LABEL + SMALL + "--max_train_steps 60 --ema_max_decay 0.9 --train_batch_size 8"
    )
    model = NoiseAwareCLIP.from_pretrained(folder)
    assert schedule_config(model)["num_train_timesteps"] == 50
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["step"], metrics["images"]) == (60, 10)
    assert metrics["weights"] == weights_digest(model)
    held_out = Dataset.from_parquet(str(root / "data" / "test.parquet"))
    x0 = (
        torch.stack(
            [torch.from_numpy(np.array(row["image"], np.float32))[None] for row in held_out]
        )
        / 127.5
        - 1
    )
    label = torch.tensor(held_out["label"])
    with torch.no_grad():
        texts = torch.cat(
            [model.encode_prompts(CAPTIONS["held_out"][name]) for name in ("dark", "light")]
        )
        for k, row in enumerate(metrics["held_out"]):
            eps = torch.stack(
                [torch.randn(1, 8, 8, generator=generator_for(0, 3, i, k)) for i in range(10)]
            )
            t = torch.full((10,), row["timestep"])
            image = model.encode_image(DDPMScheduler(50).add_noise(x0, eps, t), t)
            right = ((image @ texts.T).argmax(dim=1) == label).float().mean().item()
            assert row["zero_shot"] == pytest.approx(right, abs=1e-5)
            # ten captions of others, of two kinds: the five of the own kind are the own one again
            f = model.scale * image @ texts.T
            own, other = f.gather(1, label[:, None])[:, 0], f.gather(1, 1 - label[:, None])[:, 0]
            assert row["retrieval"] == pytest.approx((own > other).float().mean().item(), abs=1e-5)
            assert row["cross_entropy"] == pytest.approx(
                (torch.logaddexp(own, other + math.log(5)) - own).mean().item(), abs=1e-4
            )
    assert metrics["held_out"][0]["zero_shot"] >= 0.9


@pytest.mark.parametrize(
    "line",
    [
        BY_LABEL + SMALL + "--random_shift 1",
        DATA + "--caption_column several " + SMALL,
        DATA + "--caption_column one --text_encoder {root}/text --max_timestep 20",
    ],
)
def test_resumed_equals_uninterrupted(train: Callable[..., Path], line: str) -> None:
    line += " --checkpointing_steps 2 --checkpoints_total_limit 0 --max_train_steps 4"
    whole = train(line + " --validation_steps 2", "whole")
    parts = shutil.copytree(whole, whole.with_name("parts"))
    shutil.rmtree(parts / "checkpoint-4")
    (parts / "diffusion_pytorch_model.safetensors").unlink()
    train(line + " --resume_from_checkpoint latest", "parts")
    assert apart(weights(whole), weights(parts)) == 0
    tokenizers = [
        (folder / "tokenizer" / "tokenizer.json").read_bytes() for folder in (whole, parts)
    ]
    assert tokenizers[0] == tokenizers[1]
    assert schedule_config(NoiseAwareCLIP.from_pretrained(whole))["num_train_timesteps"] == (
        21 if "max_timestep" in line else 50
    )


def test_two_processes_equal_one_with_twice_the_batch(
    train: Callable[..., Path], root: Path, tmp_path: Path
) -> None:
    line = BY_LABEL + SMALL + "--adam_epsilon 1e-4 --max_train_steps 3 --validation_samples 5 "
    one, two = train(line, "one"), tmp_path / "two"
    words = shlex.split(
        f"{TINY} {line} --train_batch_size 2 --output_dir {two}".replace("{root}", str(root))
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = [
        subprocess.Popen(
            [sys.executable, str(TRAINING / "train_clip.py"), *words],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "HF_DATASETS_CACHE": str(root / "cache"),
            },
        )
        for rank in range(2)
    ]
    try:
        errors = [run.communicate(timeout=300)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], errors
    assert apart(weights(one), weights(two)) < 1e-5
    figures = [
        json.loads((folder / "metrics.json").read_text())["held_out"] for folder in (one, two)
    ]
    for first, second in zip(*figures, strict=True):
        assert first == pytest.approx(second, abs=1e-3)


def test_warm_starts(train: Callable[..., Path], root: Path) -> None:
    """At learning rate 0 the start is what's saved; a frozen text encoder stays what it was."""
    line = (
        BY_LABEL
        + "--image_encoder {root}/classifier --text_encoder {root}/text --max_train_steps 2 "
    )
    start = train(line + "--learning_rate 0 --ddpm_num_steps 60", "start")
    model, classifier = (
        NoiseAwareCLIP.from_pretrained(start),
        NoiseAwareClassifier.from_pretrained(root / "classifier"),
    )
    text = CLIPTextModelWithProjection.from_pretrained(root / "text")
    assert apart(model.text_encoder.state_dict(), text.state_dict()) == 0
    mine, theirs = model.image_encoder.state_dict(), classifier.state_dict()
    different = {name for name in mine if mine[name].shape != theirs[name].shape}
    assert different == {"head.2.out.weight", "head.2.out.bias"}
    assert all(torch.equal(mine[name], theirs[name]) for name in mine.keys() - different)
    assert model.image_encoder.config.num_labels == 6 and "more" in model.tokenizer.get_vocab()

    frozen = NoiseAwareCLIP.from_pretrained(train(line + "--freeze_text_encoder", "frozen"))
    assert apart(frozen.text_encoder.state_dict(), text.state_dict()) == 0
    assert apart(frozen.image_encoder.state_dict(), mine) > 0
    moved = NoiseAwareCLIP.from_pretrained(train(line, "moved"))
    assert apart(moved.text_encoder.state_dict(), text.state_dict()) > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (DATA, "--caption_column None and --captions None: one of the two is needed"),
        (BY_LABEL + "--train_batch_size 1", "--train_batch_size 1: .*2 or more are allowed"),
        (
            BY_LABEL + "--text_config {root}/image.json",
            "--text_config .*image.json has .*'down_block_types'.*of CLIPTextConfig are allowed",
        ),
        (
            BY_LABEL + "--caption_column one",
            "--caption_column one and --captions .*: only one of the two",
        ),
        (
            BY_LABEL + SMALL + "--text_encoder {root}/text",
            "--text_encoder .* and --text_config .*: only one of the two",
        ),
        (BY_LABEL + "--freeze_text_encoder", "--freeze_text_encoder needs --text_encoder"),
        (
            DATA + "--caption_column words",
            r"caption_column='words': the dataset has the columns \['image', ",
        ),
        (DATA + "--caption_column number", "caption_column='number' holds .*int64"),
        (DATA + "--captions {root}/none.json", "--captions .*none.json: .*No such file"),
        (
            DATA + "--captions {root}/text.json",
            r"--captions .*text.json has \['hidden_size', .*\]; \"train\"",
        ),
        (
            DATA + "--captions {root}/other.json",
            r"--captions .*: 'train' has the labels \['dark'\], the dataset",
        ),
        (
            DATA + "--captions {root}/string.json",
            "--captions .*: 'train' has 'dark' for 'dark'; a list of strings",
        ),
        (
            BY_LABEL + "--text_config {root}/list.json",
            "--text_config .*list.json holds a list; an object is allowed",
        ),
        (BY_LABEL + "--text_encoder {root}/none", "--text_encoder .*none: "),
        (
            BY_LABEL + "--text_encoder {root}/unprojected --freeze_text_encoder",
            r"has no \['text_projection.weight'\]",
        ),
        (
            BY_LABEL + "--text_encoder {root}/incomplete",
            r"incomplete lacks 1 weights .*final_layer_norm.bias",
        ),
        (BY_LABEL + "--image_encoder {root}/none", "--image_encoder .*none: "),
        (BY_LABEL + "--image_encoder {root}/unet", "--image_encoder .*unet: "),
        (
            BY_LABEL + "--image_encoder {root}/classifier --resolution 16",
            "--image_encoder .*, --resolution 16: .*mismatch",
        ),
        (BY_LABEL + "--max_timestep 50", "--max_timestep 50: 0 to 49 is allowed"),
    ],
)
def test_wrong_options_are_named(
    train: Callable[..., Path],
    root: Path,
    tmp_path: Path,
    line: str,
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, content in (
        ("other", {"train": {"dark": ["dark"]}}),
        ("list", [1]),
        ("string", {"train": {"dark": "dark", "light": ["light"]}}),
    ):
        (root / f"{name}.json").write_text(json.dumps(content))
    incomplete = shutil.copytree(root / "text", root / "incomplete", dirs_exist_ok=True)
    state = load_file(incomplete / "model.safetensors")
    lost = next(name for name in state if name.endswith("final_layer_norm.bias"))
    state.pop(lost)
    save_file(state, incomplete / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as end:
        train(line, "refused")
    said = capsys.readouterr().err + str(end.value)
    assert re.search(message, said, re.DOTALL), said
    assert end.value.code not in (None, 0) and not (tmp_path / "refused").exists()


# The recipe of the Fashion-MNIST model


def test_fashion_mnist_captions() -> None:
    """Held-out captions are new sentences of known words."""
    captions = json.loads((TRAINING / "configs" / "fashion_mnist_captions.json").read_text())
    text = json.loads((TRAINING / "configs" / "fashion_mnist_clip_text.json").read_text())
    known = [caption for part in captions["train"].values() for caption in part]
    new = [caption for part in captions["held_out"].values() for caption in part]
    assert len(captions["train"]) == 10 and captions["train"].keys() == captions["held_out"].keys()
    assert all(len(part) >= 8 for part in captions["train"].values())
    assert all(len(part) >= 4 for part in captions["held_out"].values())
    assert len(known) == len(set(known)) and len(new) == len(set(new)) and not set(known) & set(new)
    tokenizer = train_clip.word_tokenizer(known, text["max_position_embeddings"])
    for caption in known + new:
        ids = tokenizer(caption).input_ids
        assert len(ids) <= text["max_position_embeddings"] and tokenizer.unk_token_id not in ids
    assert all(
        tokenizer.unk_token_id not in tokenizer(label).input_ids for label in captions["train"]
    )


def test_recipe_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (TRAINING / "fashion_mnist.sh").read_text().replace('"$OUT', "out").replace('"', "")
    recipe = next(
        line[line.index("training/train_clip.py") :].split()
        for line in script.replace("\\\n", "").splitlines()
        if "training/train_clip.py" in line
    )
    monkeypatch.setattr(sys, "argv", recipe)
    parsed = parse(train_clip.ClipOptions, None)
    root = TRAINING.parent
    assert (root / parsed.captions).is_file() and (root / parsed.text_config).is_file()


@pytest.mark.parametrize("wrong", [None, "", "  ", [], ["a", ""], ["a", None]])
def test_missing_captions_are_found_at_once(wrong: object) -> None:
    image, feature = np.zeros((8, 8), np.uint8), Value("string")
    captions: list[object] = ["dark", "black", wrong]
    if isinstance(wrong, list):
        feature, captions = List(feature), [["dark"], ["black"], wrong]
    features = Features({"image": Image(), "text": feature})
    rows = {"image": [PILImage.fromarray(image)] * 3, "text": captions}
    images = LabelledImages(Dataset.from_dict(rows, features=features), resolution=8)
    with pytest.raises(ValueError, match="row 2 has the captions .* in caption_column='text'; one"):
        CaptionedImages(images, "text")
    assert CaptionedImages(images.select([1]), "text")[0]["caption"] == "black"


def test_captions_that_are_cut_or_all_the_same(root: Path) -> None:
    image, length = np.zeros((8, 8), np.uint8), 6

    def check(texts: list[str]) -> str | None:
        rows = {"image": [PILImage.fromarray(image)] * len(texts), "text": texts}
        features = Features({"image": Image(), "text": Value("string")})
        images = LabelledImages(Dataset.from_dict(rows, features=features), resolution=8)
        tokenizer = train_clip.word_tokenizer(texts, length)
        return train_clip.check_captions(CaptionedImages(images, "text"), tokenizer, length)

    assert check(["a b c d", "a b c e", "a b c d"]) is None  # and [BOS], [EOS]
    warning = "data: 1 of 2 different captions are cut to 6 tokens, such as 'a b c d e'"
    assert check(["a b c d e", "b"]) == warning
    for texts in (["a b", "A b"], ["a b c d e", "a b c d f"]):
        with pytest.raises(ValueError, match="captions: all have the same first 6 tokens, as "):
            check(texts)
