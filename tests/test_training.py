"""The training scripts on scikit-learn's digits: what they compute, save, refuse, and how they go on after a stop."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import accelerate
import datasets
import numpy as np
import pytest
import torch
from accelerate.utils import LoggerType
from diffusers import (
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from helpers import (
    CLASSIFIER,
    NAMES,
    TINY,
    TRAINING,
    UNET,
    apart,
    environment_of,
    launched,
    load_script,
    shadow,
    weights,
)
from PIL import Image as PILImage
from safetensors.torch import load_file
from torch.nn import functional as F

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.diagnosis import diagnose
from guided_diffusers.learning.batches import ShuffledBatches, generator_for
from guided_diffusers.learning.checkpointing import list_checkpoints
from guided_diffusers.learning.data import LabelledImages
from guided_diffusers.learning.options import Options, parse
from guided_diffusers.noise import TrainedSchedule
from guided_diffusers.utils import weights_digest

train_unet, train_classifier = load_script("train_unet"), load_script("train_classifier")

# What is saved


def test_unet_becomes_a_pipeline(train: Callable[..., Path]) -> None:
    folder = train(
        "unet",
        "--class_conditional --prediction_type v_prediction --ddpm_num_steps 20 "
        "--max_train_steps 2 --ddpm_beta_schedule squaredcos_cap_v2 --sample_images 20 "
        "--mixed_precision bf16",
    )
    pipeline = ClassifierGuidedPipeline.from_pretrained(folder)
    assert pipeline.config.id2label == dict(enumerate(NAMES))
    assert pipeline.unet.config.num_class_embeds == 11 and pipeline.unet.dtype == torch.float32
    scheduler = pipeline.scheduler.config
    assert (scheduler.prediction_type, scheduler.num_train_timesteps) == ("v_prediction", 20)
    assert scheduler.beta_schedule == "squaredcos_cap_v2"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(["c", 4], guidance_scale=0.0, num_inference_steps=2).images[1].size == (8, 8)

    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["step"], metrics["images"]) == (2, 6)
    assert metrics["weights"] == weights_digest(pipeline.unet)
    assert [row["timestep"] for row in metrics["held_out"]] == list(range(0, 20, 2))
    assert all(0 < row["loss"] < 10 for row in metrics["held_out"])
    assert PILImage.open(folder / "samples-2.png").size == (16, 80)  # a row a label
    assert json.loads((folder / "options.json").read_text())["max_train_steps"] == 2


def test_classifier_becomes_a_model(train: Callable[..., Path]) -> None:
    folder = train("classifier", "--max_train_steps 2")
    model = NoiseAwareClassifier.from_pretrained(folder)
    assert model.config.id2label == dict(enumerate(NAMES)) and model.config.label2id["c"] == 2
    assert (model.config.num_train_timesteps, model.config.beta_schedule) == (1000, "linear")
    assert model.config.trained_betas is None
    rows = json.loads((folder / "metrics.json").read_text())["held_out"]
    assert [row["timestep"] for row in rows] == list(range(49, 1000, 100))
    assert all(0 <= row["accuracy"] <= 1 and 0 < row["cross_entropy"] < 10 for row in rows)


def test_unconditional_unet_of_unlabelled_colours(train: Callable[..., Path]) -> None:
    folder = train(
        "unet",
        "--max_train_steps 1 --prediction_type sample --sample_images 3",
        data="--train_data_dir {unlabelled}",
    )
    pipeline = ClassifierGuidedPipeline.from_pretrained(folder)
    assert pipeline.unet.config.num_class_embeds is None and pipeline.unet.config.in_channels == 3
    assert (
        pipeline.scheduler.config.prediction_type == "sample" and pipeline.config.id2label is None
    )
    assert json.loads((folder / "metrics.json").read_text())["images"] == 1  # a tenth of 8
    assert PILImage.open(folder / "samples-1.png").size == (24, 8)


def test_figures_are_of_the_saved_model(
    train: Callable[..., Path], place: SimpleNamespace, capsys: pytest.CaptureFixture
) -> None:
    """Accuracy and cross entropy at each level, worked out from the saved folder alone."""
    folder = train(
        "classifier", "--max_train_steps 3 --validation_samples 100 --diagnosis_images 9"
    )
    model = NoiseAwareClassifier.from_pretrained(folder).eval()
    scheduler = DDPMScheduler(1000)
    splits = datasets.load_dataset(str(place.folder))
    images = torch.stack(
        [torch.from_numpy(np.array(row["image"], np.float32))[None] for row in splits["test"]]
    )
    x0, label = images / 127.5 - 1, torch.tensor(splits["test"]["label"])
    for k, row in enumerate(json.loads((folder / "metrics.json").read_text())["held_out"]):
        eps = torch.stack(
            [torch.randn(1, 8, 8, generator=generator_for(0, 3, i, k)) for i in range(12)]
        )
        t = torch.full((12,), row["timestep"])
        with torch.no_grad():
            logits = model(scheduler.add_noise(x0, eps, t), t).logits
        assert row["accuracy"] == pytest.approx(
            (logits.argmax(1) == label).float().mean().item(), abs=1e-5
        )
        assert row["cross_entropy"] == pytest.approx(
            F.cross_entropy(logits, label).item(), abs=2e-5
        )
        sure, answer = logits.double().softmax(1).max(1)
        bins = [(sure > m / 15) & (sure <= (m + 1) / 15) for m in range(15)]
        gaps = [
            ((answer == label).double() - sure)[inside].sum().abs().item() / len(label)
            for inside in bins
        ]
        assert row["ece"] == pytest.approx(sum(gaps), abs=2e-4) and "gap 0" not in row
    assert json.loads((folder / "diagnosis.json").read_text())["levels"] == json.loads(
        json.dumps(
            diagnose(
                deepcopy(
                    model
                ),  # in aligned memory, which safetensors' isn't: the same last digits
                LabelledImages(splits["test"], resolution=8),
                images=9,
                gradient_images=32,
                batch_size=4,
                finite_differences=False,
                progress=False,
            ).levels
        )
    )
    assert (
        "finite_difference_error"
        not in json.loads((folder / "diagnosis.json").read_text())["levels"][0]
    )
    assert "nowhere" in capsys.readouterr().out  # three steps teach nothing
    assert not (train("classifier", "--max_train_steps 1", "off") / "diagnosis.json").exists()
    curves = PILImage.open(folder / "curves.png")
    assert curves.size[0] > curves.size[1] and not list(folder.glob(".curves*"))


# What is computed


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_unet_training_is_the_plain_loop(
    train: Callable[..., Path], place: SimpleNamespace, prediction: str
) -> None:
    """Four steps, two passes each, written out: data order, draws, loss, clipping, AdamW, warm-up, moving average."""
    folder = train(
        "unet",
        f"--class_conditional --label_dropout 0.4 --prediction_type {prediction} --seed 5 "
        "--random_flip --gradient_accumulation_steps 2 --max_train_steps 4 --checkpointing_steps 4 "
        "--adam_beta2 0.99 --max_grad_norm 0.1 --ema_power 0.6",
    )
    data = LabelledImages(
        datasets.load_dataset(str(place.folder))["train"], resolution=8, random_flip=True
    )
    torch.manual_seed(5)
    model = UNet2DModel(**UNET, sample_size=8, in_channels=1, out_channels=1, num_class_embeds=11)
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, betas=(0.9, 0.99), weight_decay=0.01)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    alpha_bar = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000).double(), 0)
    order = torch.randperm(48, generator=generator_for(5, 0, 0)).tolist()
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, step / 2)
        for number in (2 * step, 2 * step + 1):
            positions = range(4 * number, 4 * number + 4)
            items = [data[order[position], 5 * 1_000_003 + position] for position in positions]
            x0, label = (
                torch.stack([item["pixel_values"] for item in items]),
                [item["label"] for item in items],
            )
            generator = generator_for(5, 2, number)
            t = torch.randint(1000, (4,), generator=generator)
            eps = torch.randn(4, 1, 8, 8, generator=generator)
            dropped = torch.rand(4, generator=generator) < 0.4
            label = torch.where(dropped, 10, torch.tensor(label))
            alpha = alpha_bar[t].sqrt().float()[:, None, None, None]
            sigma = (1 - alpha_bar[t]).sqrt().float()[:, None, None, None]
            output = model(alpha * x0 + sigma * eps, t, class_labels=label).sample
            wanted = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[
                prediction
            ]
            ((output - wanted).square().mean() / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        decay = 1 - (1 + step) ** -0.6 if step else 0.0
        for mean, parameter in zip(average, model.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 1 - decay)
    assert (
        apart(load_file(folder / "checkpoint-4" / "model.safetensors"), model.state_dict()) < 1e-6
    )
    saved = weights(folder)
    for (name, _), mean in zip(model.named_parameters(), average, strict=True):
        torch.testing.assert_close(saved[name], mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("unet", "--class_conditional --random_flip"),
        ("unet", "--gradient_accumulation_steps 3 --mixed_precision bf16"),
        ("classifier", "--random_shift 1"),  # with dropout
        ("classifier", "--gradient_accumulation_steps 2 --no_use_ema --lr_scheduler cosine"),
    ],
)
def test_resumed_equals_uninterrupted(
    train: Callable[..., Path], place: SimpleNamespace, script: str, line: str
) -> None:
    """Bit for bit: weights, moving average, optimizer; the whole run with evaluations in between."""
    config = place.root / "dropout.json"
    config.write_text(json.dumps({**(UNET if script == "unet" else CLASSIFIER), "dropout": 0.2}))
    line += (
        f" --model_config_name_or_path {config} --checkpointing_steps 2 --checkpoints_total_limit 0"
    )
    line += " --max_train_steps 6"
    whole = train(script, line + " --validation_steps 2", "whole")
    parts = shutil.copytree(
        whole, whole.with_name("parts")
    )  # what a run leaves that is killed while it writes step 6
    os.replace(parts / "checkpoint-6", parts / "checkpoint-6.partial")
    (parts / "checkpoint-6.partial" / "model.safetensors").write_bytes(b"half")
    train(script, line + " --resume_from_checkpoint latest", "parts")
    assert apart(weights(whole), weights(parts)) == 0
    one, other = whole / "checkpoint-6", parts / "checkpoint-6"
    assert apart(load_file(one / "model.safetensors"), load_file(other / "model.safetensors")) == 0
    first, second = (
        torch.load(path / "optimizer.bin", weights_only=True)["state"] for path in (one, other)
    )
    assert first and all(
        torch.equal(first[i][name], second[i][name]) for i in first for name in first[i]
    )
    if "--no_use_ema" in line:
        assert (
            apart(weights(whole), load_file(one / "model.safetensors")) == 0
        )  # the last weights are saved
    else:
        assert apart(shadow(one), shadow(other)) == 0
        assert apart(weights(whole), load_file(one / "model.safetensors")) > 0  # their average is
    # a run that is complete only saves again; the checkpoint may be named
    train(script, line + f" --resume_from_checkpoint {one}", "again")
    assert apart(weights(whole), weights(whole.with_name("again"))) == 0


SCRIPTS = {"unet": train_unet, "classifier": train_classifier}
EXACT = "--adam_epsilon 1e-4 --validation_samples 1 --checkpoints_total_limit 0 --cpu --mixed_precision "
FIFTY = EXACT + "no --max_train_steps 50 --checkpointing_steps 45 "
SIX = EXACT + "{} --max_train_steps 6 --checkpointing_steps 3 "
LINES = {
    "unet": FIFTY + "--class_conditional --random_flip --sample_images 10",
    "classifier": FIFTY + "--random_shift 1",
    "recipe": FIFTY + "--timestep_sampler second_moment --ddpm_num_steps 8 --mixup 0.3",
    "fsdp-unet": SIX.format("no")
    + "--class_conditional --gradient_accumulation_steps 2 --sample_images 10",
    "fsdp-recipe": SIX.format("no")
    + "--timestep_sampler second_moment --robust_epsilon 0.2 --robust_steps 2",
    "fsdp-bf16": SIX.format("bf16") + "--no_use_ema",
}


def script_of(name: str) -> str:
    return "unet" if "unet" in name else "classifier"


@pytest.fixture(scope="module")
def two(place: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Trainings on two processes, some split by FSDP, and what they print; `-resumed` goes on from a checkpoint."""
    root, commands, fsdp = tmp_path_factory.mktemp("two"), [], environment_of("fsdp")
    for name, line in LINES.items():
        script, tiny = script_of(name), TINY.replace("batch_size 4", "batch_size 2")
        command = [
            str(TRAINING / f"train_{script}.py"),
            *tiny.split(),
            *line.split(),
            "--train_data_dir",
            str(place.folder),
            "--model_config_name_or_path",
            str(vars(place)[script]),
        ]
        settings = fsdp if "fsdp" in name else {}
        commands.append((settings, [*command, "--output_dir", str(root / name)]))
        if "recipe" in name:
            first = root / name / ("checkpoint-3" if "fsdp" in name else "checkpoint-45")
            commands.append(
                (
                    settings,
                    [
                        *command,
                        "--output_dir",
                        str(root / f"{name}-resumed"),
                        "--resume_from_checkpoint",
                        str(first),
                    ],
                )
            )
    return SimpleNamespace(root=root, printed=launched(root, place, commands))


@pytest.mark.parametrize("name", LINES)
def test_two_processes_equal_one_with_twice_the_batch(
    train: Callable[..., Path], two: SimpleNamespace, name: str
) -> None:
    """After 50 steps, and after 6 split by FSDP. One process has no share of the held-out images."""
    one, both, bf16 = train(script_of(name), LINES[name]), two.root / name, "bf16" in name
    assert apart(weights(one), weights(both)) < (2e-4 if bf16 else 1e-5)
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in (one, both)]
    assert [figure["images"] for figure in figures] == [1, 1]
    for first, second in zip(figures[0]["held_out"], figures[1]["held_out"], strict=True):
        assert first == pytest.approx(second, abs=0.02 if bf16 else 1e-4)
    assert json.loads((both / "options.json").read_text())["train_batch_size"] == 2
    if not bf16:
        last = list_checkpoints(one)[-1].name
        assert apart(shadow(one / last), shadow(both / last)) < 1e-5


def test_two_processes_speak_once_and_resume(two: SimpleNamespace) -> None:
    assert (
        two.printed.count("step 50: loss") == two.printed.count("step 6: loss") == 1
    )  # the main one speaks for both
    for name in ("recipe", "fsdp-recipe"):
        last = list_checkpoints(two.root / name)[-1]
        assert (last / "random_states_1.pkl").exists()
        assert (last / "pytorch_model_fsdp.bin").exists() == (name == "fsdp-recipe")
        assert apart(weights(two.root / name), weights(two.root / f"{name}-resumed")) == 0
    resumed = two.root / "fsdp-recipe-resumed" / last.name
    assert apart(shadow(last), shadow(resumed)) == 0
    assert NoiseAwareClassifier.from_pretrained(two.root / "fsdp-recipe").config.id2label[2] == "c"


def test_one_process_goes_on_from_the_checkpoint_of_two(
    train: Callable[..., Path], two: SimpleNamespace, tmp_path: Path
) -> None:
    """With twice the batch; not from that of a split network, nor with another number of images a step."""
    line, checkpoint = (
        LINES["classifier"] + " --resume_from_checkpoint ",
        two.root / "classifier" / "checkpoint-45",
    )
    assert (
        apart(weights(train("classifier", f"{line}{checkpoint}")), weights(two.root / "classifier"))
        < 1e-5
    )
    with pytest.raises(SystemExit, match="of another run: images a forward pass 4, here 8$"):
        train("classifier", f"{line}{checkpoint} --train_batch_size 8", "refused")
    with pytest.raises(SystemExit, match="of another run: distributed_type 'FSDP', here None$"):
        train(
            "classifier",
            f"{LINES['fsdp-recipe']} --resume_from_checkpoint "
            f"{two.root / 'fsdp-recipe' / 'checkpoint-3'}",
            "refused",
        )


def test_deepspeed_equals_one_process_or_is_named(
    train: Callable[..., Path],
    place: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ZeRO 2 on two processes with twice the batch, and resumed, where DeepSpeed is installed."""
    settings, line = environment_of("deepspeed"), SIX.format("no").replace("--cpu", "")
    assert settings["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    if not find_spec("deepspeed"):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(Options, "cpu", False)
        with pytest.raises(SystemExit, match="distributed_type DEEPSPEED: .*pip install deepspeed"):
            train("classifier", "--max_train_steps 1", "deepspeed")
        return
    command = [
        str(TRAINING / "train_classifier.py"),
        *TINY.replace("batch_size 4", "batch_size 2").split(),
        *line.split(),
        "--train_data_dir",
        str(place.folder),
        "--model_config_name_or_path",
        str(place.classifier),
        "--gradient_accumulation_steps",
        "2",
    ]
    resume = ["--resume_from_checkpoint", str(tmp_path / "two" / "checkpoint-3")]
    for more in (
        (tmp_path / "two",),
        (tmp_path / "resumed", *resume),
    ):  # DeepSpeed starts once in a process
        launched(tmp_path, place, [(settings, [*command, "--output_dir", *map(str, more)])])
    one = train("classifier", line + " --gradient_accumulation_steps 2", "one")
    assert apart(weights(one), weights(tmp_path / "two")) < 1e-5
    assert apart(weights(tmp_path / "resumed"), weights(tmp_path / "two")) == 0


def test_dropped_labels_are_the_null_label(train: Callable[..., Path]) -> None:
    line = "--class_conditional --no_use_ema --adam_weight_decay 0 --max_train_steps 3 --seed 3 --label_dropout "
    all_dropped, none_dropped = (
        weights(train("unet", line + share, share)) for share in ("1.0", "0.0")
    )
    torch.manual_seed(3)
    start = UNet2DModel(**UNET, sample_size=8, in_channels=1, out_channels=1, num_class_embeds=11)
    start = start.class_embedding.weight.detach()
    moved = [
        (final["class_embedding.weight"] - start).abs().amax(1) > 0
        for final in (all_dropped, none_dropped)
    ]
    assert moved[0].tolist() == [False] * 10 + [True]
    assert moved[1][:10].any() and not moved[1][10]


@pytest.mark.parametrize(
    ("line", "factors"),
    [
        ("--lr_scheduler constant_with_warmup", [0, 1 / 3, 2 / 3, 1, 1, 1]),
        (
            "--lr_scheduler cosine",
            [0, 1 / 3, 2 / 3] + [0.5 * (1 + math.cos(math.pi * k / 3)) for k in range(3)],
        ),
        ("--lr_scheduler linear", [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
        ("--lr_scheduler constant", [1] * 6),
    ],
)
def test_learning_rate_counts_optimizer_steps(
    train: Callable[..., Path], line: str, factors: list[float]
) -> None:
    """The rate of the step after each checkpoint, though every step has two passes."""
    folder = train(
        "classifier",
        f"{line} --lr_warmup_steps 3 --max_train_steps 6 --gradient_accumulation_steps 2 "
        "--checkpointing_steps 1 --checkpoints_total_limit 0 --learning_rate 0.01",
    )
    for step in range(1, 6):
        state = torch.load(folder / f"checkpoint-{step}" / "optimizer.bin", weights_only=True)
        assert state["param_groups"][0]["lr"] == pytest.approx(0.01 * factors[step], abs=1e-9)


def test_epochs_and_checkpoints_limit(train: Callable[..., Path]) -> None:
    """48 images in steps of 2 * 4 are 6 steps an epoch."""
    folder = train(
        "classifier",
        "--num_train_epochs 2 --gradient_accumulation_steps 2 --checkpointing_steps 3 "
        "--checkpoints_total_limit 3",
    )
    assert json.loads((folder / "metrics.json").read_text())["step"] == 12
    assert [path.name for path in list_checkpoints(folder)] == [
        "checkpoint-6",
        "checkpoint-9",
        "checkpoint-12",
    ]


def test_stream_is_the_same_for_any_number_of_processes() -> None:
    whole = [item for batch in ShuffledBatches(7, 4, 3, 0, 1, 0, 7) for item in batch]
    assert (
        sorted(index for index, _ in whole[:7])
        == sorted(index for index, _ in whole[7:14])
        == list(range(7))
    )
    assert [index for index, _ in whole[:7]] != [index for index, _ in whole[7:14]]
    shares = [list(ShuffledBatches(7, 2, 3, rank, 2, 0, 7)) for rank in range(2)]
    assert [item for pair in zip(*shares, strict=True) for batch in pair for item in batch] == whole
    assert list(ShuffledBatches(7, 4, 3, 0, 1, 3, 5)) == [whole[12:16], whole[16:20]]
    assert [index for index, _ in whole[:7]] != [
        items[0][0] for items in ShuffledBatches(7, 1, 4, 0, 1, 0, 7)
    ]


def test_workers_change_nothing(train: Callable[..., Path]) -> None:
    line = "--max_train_steps 2 --random_shift 1 --dataloader_num_workers "
    assert (
        apart(
            weights(train("classifier", line + "0", "a")),
            weights(train("classifier", line + "2", "b")),
        )
        == 0
    )


def test_a_loss_that_is_not_finite_ends_the_run(train: Callable[..., Path]) -> None:
    with pytest.raises(FloatingPointError, match="the loss at step 10 is .*--learning_rate"):
        train(
            "classifier",
            "--learning_rate 1e18 --lr_scheduler constant --max_grad_norm 0 --max_train_steps 10",
        )


# Where data and schedules come from


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ("--dataset_name {folder}", NAMES),
        (
            "--train_data_dir {parquet} --image_column digit",
            NAMES,
        ),  # the label is the first column of class ids
        ("--dataset_name {parquet} --label_column name", NAMES),
        ("--train_data_dir {parquet} --label_column number", list("0123456789")),
        ("--train_data_dir {parquet} --train_split validation --validation_split train", NAMES),
    ],
)
def test_data_forms_and_columns(train: Callable[..., Path], data: str, names: list[str]) -> None:
    folder = train("classifier", "--max_train_steps 1", data=data)
    assert NoiseAwareClassifier.from_pretrained(folder).config.id2label == dict(enumerate(names))
    assert json.loads((folder / "metrics.json").read_text())["images"] == 6


def test_the_named_columns_are_read(train: Callable[..., Path]) -> None:
    default, same, other = (
        weights(
            train(
                "classifier",
                "--max_train_steps 3",
                output,
                data="--train_data_dir {parquet} " + column,
            )
        )
        for output, column in (
            ("a", ""),
            ("b", "--image_column other"),
            ("c", "--image_column digit"),
        )
    )
    assert apart(default, same) == 0 and apart(default, other) > 0


def test_scheduler_of_a_pipeline_or_a_config(train: Callable[..., Path], tmp_path: Path) -> None:
    made = train(
        "unet",
        "--max_train_steps 1 --ddpm_num_steps 40 --ddpm_beta_schedule scaled_linear "
        "--prediction_type sample",
    )
    for source in (made, made / "scheduler", made / "scheduler" / "scheduler_config.json"):
        config = NoiseAwareClassifier.from_pretrained(
            train(
                "classifier",
                f"--max_train_steps 1 --scheduler {source}",
                source.name + "-classifier",
            )
        ).config
        assert (config.num_train_timesteps, config.beta_schedule) == (40, "scaled_linear")
    again = ClassifierGuidedPipeline.from_pretrained(
        train("unet", f"--max_train_steps 1 --scheduler {made}", "again")
    )
    assert again.scheduler.config.prediction_type == "sample"

    # any scheduler with betas; a network without a learned variance isn't saved with one
    EulerDiscreteScheduler(60, prediction_type="v_prediction").save_pretrained(tmp_path / "euler")
    file = tmp_path / "euler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "variance_type": "learned_range"}))
    config = ClassifierGuidedPipeline.from_pretrained(
        train("unet", f"--max_train_steps 1 --scheduler {file}", "of-euler")
    ).scheduler.config
    assert (config.num_train_timesteps, config.prediction_type) == (60, "v_prediction")
    assert config.variance_type == "fixed_small"


def test_the_saved_schedule_is_what_was_trained_on(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    rescaled = DDPMScheduler(50, rescale_betas_zero_snr=True)
    rescaled.save_pretrained(tmp_path / "rescaled")
    folder = train("classifier", f"--max_train_steps 1 --scheduler {tmp_path / 'rescaled'}", "a")
    betas = NoiseAwareClassifier.from_pretrained(folder).config.trained_betas
    torch.testing.assert_close(torch.tensor(betas), rescaled.betas)

    folder = train("classifier", "--max_train_steps 1 --max_timestep 299", "b")
    config = NoiseAwareClassifier.from_pretrained(folder).config
    alpha_bar = DDPMScheduler(1000).alphas_cumprod[299].item()
    noisiest = TrainedSchedule(
        {"num_train_timesteps": 300, "trained_betas": config.trained_betas}
    ).log_ratio[-1]
    assert config.num_train_timesteps == 300
    assert noisiest == pytest.approx(0.5 * math.log((1 - alpha_bar) / alpha_bar), abs=1e-5)
    rows = json.loads((folder / "metrics.json").read_text())["held_out"]
    assert [row["timestep"] for row in rows] == list(range(14, 300, 30))

    folder = train(
        "classifier", "--max_train_steps 1 --max_timestep 0", "c"
    )  # a judge of clean images
    assert [
        row["timestep"] for row in json.loads((folder / "metrics.json").read_text())["held_out"]
    ] == [0]


def test_a_trained_model_is_a_config(train: Callable[..., Path]) -> None:
    """A model's own folder is a config for the next, with other labels."""
    first = train("classifier", "--max_train_steps 1", "first")
    second = train(
        "classifier",
        f"--max_train_steps 1 --model_config_name_or_path {first}",
        "second",
        data="--train_data_dir {parquet} --label_column number",
    )
    assert NoiseAwareClassifier.from_pretrained(second).config.label2id == {
        str(i): i for i in range(10)
    }


# Trackers, the progress bar, the help


def test_tensorboard_gets_losses_and_figures(train: Callable[..., Path]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = train(
        "classifier",
        "--max_train_steps 20 --validation_steps 10 --validation_samples 2 "
        "--report_to tensorboard --logging_dir tracks",
    )
    events = accumulator.EventAccumulator(
        str(next((folder / "tracks").rglob("events.out*")).parent)
    ).Reload()
    assert [event.step for event in events.Scalars("loss")] == [10, 20]
    assert events.Scalars("learning_rate")[0].value == pytest.approx(1e-3)
    assert [event.step for event in events.Scalars("accuracy/t=49")] == [10, 20]


class Tracker(SimpleNamespace):
    """The part of the modules wandb and trackio that Accelerate uses; Image is the picture itself."""

    def __init__(self) -> None:
        super().__init__(config=SimpleNamespace(update=lambda *_, **__: None), Image=np.asarray)
        self.settings, self.logged = {}, []

    def init(self, **settings: object) -> Tracker:
        self.settings = settings
        return self

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        pass


@pytest.mark.parametrize(("name", "run_id"), [("trackio", "name"), ("wandb", "id")])
def test_trackers_get_losses_and_pictures_of_samples(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str, run_id: str
) -> None:
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType(name)])
    folder = train("unet", f"--max_train_steps 2 --sample_images 4 --report_to {name}")
    run = (folder / "tracker_run").read_text()
    assert tracker.settings == {"project": "out", run_id: run, "resume": "allow"}
    logged = {
        (step, key): value for step, values in tracker.logged for key, value in values.items()
    }
    assert math.isfinite(logged[2, "loss"])
    with PILImage.open(folder / "samples-2.png") as picture:
        expected = np.asarray(picture.convert("RGB"))
    assert np.array_equal(np.squeeze(logged[2, "samples"]), expected) and expected.any()


def test_a_tracker_goes_on_where_the_run_does(train: Callable[..., Path]) -> None:
    """What was logged after the checkpoint that a run goes on from is logged again, and only that counts."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    line = "--max_train_steps 5 --checkpointing_steps 2 --checkpoints_total_limit 0 --report_to tensorboard"
    folder = train("classifier", line)
    shutil.rmtree(folder / "checkpoint-4")
    run = (folder / "tracker_run").read_text()
    train("classifier", line + " --resume_from_checkpoint latest")
    events = accumulator.EventAccumulator(
        str(next((folder / "logs").rglob("events.out*")).parent)
    ).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 5]
    assert (folder / "tracker_run").read_text() == run


def test_a_resume_that_would_lose_something_is_refused(train: Callable[..., Path]) -> None:
    """Steps that were made, and checkpoints of the folder that another folder's run would go on over."""
    line = "--checkpointing_steps 2 --checkpoints_total_limit 0 --max_train_steps "
    first, other = (
        train("classifier", line + "4", "first"),
        train("classifier", line + "2", "other"),
    )
    for rest, message in (
        (
            "2 --resume_from_checkpoint latest",
            "--max_train_steps 2: .*checkpoint-4 has made 4 steps",
        ),
        (
            f"4 --resume_from_checkpoint {other / 'checkpoint-2'}",
            "first has others, up to checkpoint-4",
        ),
        (f"4 --resume_from_checkpoint {first / 'checkpoint-2'}", "has others"),
    ):
        with pytest.raises(SystemExit, match=message):
            train("classifier", line + rest, "first")
    assert sorted(path.name for path in first.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]


def test_progress_bar_can_be_off(train: Callable[..., Path], capfd: pytest.CaptureFixture) -> None:
    train("classifier", "--max_train_steps 10")
    assert "10/10" not in capfd.readouterr().err
    train("classifier", "--max_train_steps 10 --progress", "other")
    assert "10/10" in capfd.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit) as end:
        SCRIPTS[script].main()
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert SCRIPTS[script].__doc__.strip() in text
    assert "(default: 1e-08)" in text and "--no_use_ema" in text and "--adam-epsilon" not in text


# What is refused


@pytest.mark.parametrize(
    ("script", "data", "line", "message"),
    [
        (
            "unet",
            None,
            "",
            "--dataset_name None and --train_data_dir None: one of the two is needed",
        ),
        (
            "unet",
            "--train_data_dir {folder} --dataset_name {folder}",
            "",
            "--train_data_dir .*only one",
        ),
        (
            "unet",
            "--train_data_dir nowhere",
            "",
            "--train_data_dir nowhere: there is no such folder",
        ),
        ("unet", "--train_data_dir {root}/empty", "", "--train_data_dir .*empty: "),
        ("unet", "--dataset_name no/such-dataset", "", "--dataset_name no/such-dataset: "),
        (
            "unet",
            "--train_data_dir {folder}",
            "--train_split night",
            r"--train_split night: the dataset has \['test', 'train'\]",
        ),
        (
            "unet",
            "--train_data_dir {folder}",
            "--validation_split night",
            "--validation_split night: the dataset has",
        ),
        (
            "unet",
            "--train_data_dir {folder}",
            "--image_column foto",
            r"image_column='foto': .*\['image', 'label'\]",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--label_column foto",
            r"label_column='foto': .*\['image', 'label'\]",
        ),
        (
            "classifier",
            "--train_data_dir {unlabelled}",
            "",
            r"--label_column None: 0 labels found, .*\['image'\]",
        ),
        (
            "unet",
            "--train_data_dir {unlabelled}",
            "--class_conditional",
            r"--class_conditional: .*\['image'\]",
        ),
        (
            "unet",
            "--train_data_dir {folder}",
            "--resolution 9",
            "--resolution 9: the multiples of 2 are allowed",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--resolution 9",
            "--resolution 9: sample_size is 9; allowed",
        ),
        (
            "unet",
            "--train_data_dir {folder}",
            "--model_config_name_or_path {root}/none.json",
            "--model_config_name_or_path .*none.json",
        ),
        (
            "unet",
            "--train_data_dir {folder}",
            "--model_config_name_or_path {classifier} --resolution 8",
            "--model_config_name_or_path .*classifier.json.*: ",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--model_config_name_or_path {unet}",
            "--model_config_name_or_path .*unet.json.*up_block_types",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--max_timestep 1000",
            "--max_timestep 1000: 0 to 999 is allowed",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--scheduler {root}/flow",
            "--scheduler .*FlowMatchEuler.* no betas",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--scheduler {folder}",
            "--scheduler .*no file named",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--scheduler {root}/flow --ddpm_num_steps 10",
            "--scheduler .*: --ddpm_num_steps and --ddpm_beta_schedule are not allowed",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--mixed_precision fp64",
            "--mixed_precision.*: invalid choice: 'fp64'.*bf16",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--report_to paper",
            "--report_to paper: it is not installed here, or no tracker; installed: ",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--lr_scheduler steep",
            "--lr_scheduler.*: invalid choice: 'steep'.*cosine",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--max_train_steps 0",
            "--max_train_steps 0: 1 or more is allowed",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--adam_beta1 1.5",
            "--adam_beta1 1.5: 0 up to, not including, 1 is allowed",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--adam_beta2 1",
            "--adam_beta2 1.0: 0 up to, not including, 1 is allowed",
        ),
        (
            "unet",
            "--train_data_dir {folder}",
            "--ema_inv_gamma 0",
            "--ema_inv_gamma 0.0: 1e-06 or more is allowed",
        ),
        ("unet", "--train_data_dir ''", "", "--train_data_dir '': a text that isn't empty"),
        ("unet", "--dataset_name ''", "", "--dataset_name '': a text that isn't empty"),
        (
            "unet",
            "--train_data_dir {folder}",
            "--label_dropout nan",
            "--label_dropout nan: 0 to 1 is allowed",
        ),
        ("classifier", "--train_data_dir {folder}", "--batch 3", r"--batch.*3"),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--train_batch_size many",
            "--train_batch_size.*: invalid int.*'many'",
        ),
        (
            "classifier",
            "--train_data_dir {folder}",
            "--resume_from_checkpoint {root}",
            "--resume_from_checkpoint .*: not the folder of a checkpoint; `latest`",
        ),
    ],
)
def test_wrong_options_are_named(
    train: Callable[..., Path],
    place: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    script: str,
    data: str | None,
    line: str,
    message: str,
) -> None:
    """A message that names option, value and what is allowed; no traceback, and nothing written."""
    (place.root / "empty").mkdir(exist_ok=True)
    FlowMatchEulerDiscreteScheduler().save_pretrained(place.root / "flow")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as end:
        train(script, line, "refused", data=data)
    said = capsys.readouterr().err + str(end.value)
    assert re.search(message, said, re.DOTALL), said
    assert end.value.code not in (None, 0)
    assert not (tmp_path / "refused").exists()


def test_metrics_that_are_not_finite_end_the_training(train: Callable[..., Path]) -> None:
    """Weights of 1e29 are finite, and so is the loss before the first step with them."""
    line = "--max_train_steps 2 --learning_rate 1e30 --no_use_ema"
    with pytest.raises(FloatingPointError, match="loss of held-out images at timestep 49 is "):
        train("unet", line, "diverged")


def test_checkpoints_of_another_run_are_refused(train: Callable[..., Path]) -> None:
    line = "--max_train_steps 2 --checkpointing_steps 2"
    folder = train("classifier", line)
    with pytest.raises(
        SystemExit,
        match="--output_dir .* has checkpoint-2 of another run.*--resume_from_checkpoint",
    ):
        train("classifier", line)
    with pytest.raises(
        SystemExit,
        match=r"checkpoint-2: of another run: network's block_out_channels \[8, 16\], here "
        r"\[8, 32\]$",
    ):
        wider = folder.parent / "wider.json"
        wider.write_text(json.dumps({**CLASSIFIER, "block_out_channels": [8, 32]}))
        train(
            "classifier",
            line + f" --resume_from_checkpoint latest --model_config_name_or_path {wider}",
        )
    with pytest.raises(SystemExit, match="checkpoint-2: of another run: use_ema True, here False$"):
        train("classifier", line + " --resume_from_checkpoint latest --no_use_ema")


# Scripts as single files


@pytest.mark.parametrize("name", ["train_unet", "train_classifier", "train_clip"])
def test_a_script_is_a_file_that_runs_anywhere(name: str, tmp_path: Path) -> None:
    """A copy alone in another folder, as `uv run URL` makes it; its dependencies are in its header."""
    text = (TRAINING / f"{name}.py").read_text()
    header = text.split("# /// script\n")[1].split("# ///\n")[0].replace("# ", "")
    assert 'dependencies = ["guided-diffusers"]' in header.splitlines()
    shutil.copy(TRAINING / f"{name}.py", tmp_path)
    command = [sys.executable, f"{name}.py", "--train_data_dir", "nowhere"]
    if name == "train_clip":
        command += ["--caption_column", "text"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert run.stderr.endswith(
        f"{name}.py: error: --train_data_dir nowhere: there is no such folder\n"
    )


def test_dashes_and_booleans_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Underscores or dashes; a boolean alone, with a value, or turned off."""
    line = "--train-data-dir my-photos --random-flip --center_crop False --no-use_ema --cpu=yes"
    monkeypatch.setattr(sys, "argv", ["train", *line.split()])
    parsed = parse(Options, None)
    assert parsed.train_data_dir == "my-photos" and parsed.random_flip and parsed.cpu
    assert not parsed.center_crop and not parsed.use_ema


# The recipe of the bundled models


def test_recipe_configs_and_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks fit into 16 MiB together, and every command of the recipe is understood."""
    configs = {
        name: json.loads((TRAINING / "configs" / f"fashion_mnist_{name}.json").read_text())
        for name in ("unet", "classifier", "judge")
    }
    unet = UNet2DModel(
        **configs["unet"], sample_size=28, in_channels=1, out_channels=1, num_class_embeds=11
    )
    rest = [
        NoiseAwareClassifier(**configs[name], sample_size=28, in_channels=1, num_labels=10)
        for name in ("classifier", "judge")
    ]
    assert (
        sum(4 * parameter.numel() for model in (unet, *rest) for parameter in model.parameters())
        < 16 * 2**20
    )
    assert configs["judge"] != configs["classifier"]

    script = (TRAINING / "fashion_mnist.sh").read_text().replace('"$OUT', "out").replace('"', "")
    recipe = [
        line[line.index("training/train_") :].split()
        for line in script.replace("\\\n", "").splitlines()
        if "training/train_" in line and "--model_config_name_or_path" in line
    ]
    assert len(recipe) == 3
    assert "sh training/fashion_mnist.sh" in (TRAINING / "README.md").read_text()
    for command in recipe:
        module = SCRIPTS[Path(command[0]).stem.removeprefix("train_")]
        monkeypatch.setattr(
            sys, "argv", ["1" if word.startswith("STEPS") else word for word in command]
        )
        parsed = parse(
            module.UNetOptions if module is train_unet else module.ClassifierOptions, None
        )
        assert (TRAINING.parent / parsed.model_config_name_or_path).is_file()


# A folder that was used


def save_images(folder: Path, names: list[str]) -> str:
    """Noise as image files; the option that names them as the data."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        PILImage.fromarray(pixels).save(folder / name)
    return f"--train_data_dir {folder}"


def test_a_used_folder_is_refused_or_emptied_by_name(
    train: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    first = "--max_train_steps 1 --diagnosis_images 5"
    folder = train("classifier", first)
    (folder / "notes.txt").write_text("mine")
    (folder / "unet").mkdir()
    (folder / "unet" / "mine.bin").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    # another task, the same without --resume, another script; also where there are no checkpoints
    for script, line in (
        ("classifier", "--max_train_steps 1 --diagnosis_images 0"),
        ("classifier", first),
        ("classifier", first + " --learning_rate 1e-5 --resume_from_checkpoint latest"),
        ("unet", "--max_train_steps 1"),
        ("unet", "--max_train_steps 1 --resume_from_checkpoint latest"),
    ):
        with pytest.raises(SystemExit, match="has .*config.json.* of another.*--overwrite_output"):
            train(script, line)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    weight = weights(folder)
    train("classifier", first + " --resume_from_checkpoint latest --progress")  # the same again
    assert apart(weights(folder), weight) == 0 and (folder / "diagnosis.json").exists()

    capsys.readouterr()
    line = "--max_train_steps 2 --checkpointing_steps 1 --overwrite_output_dir"
    train("unet", line)
    removed = re.search("removes from .*: (.*)", capsys.readouterr().out)[1].split(", ")
    expected = "config.json curves.png diagnosis.json diagnosis.png metrics.json options.json"
    weight_file = "diffusion_pytorch_model.safetensors"
    expected = {*expected.split(), weight_file, "guided_diffusers_classifier.py", "tracker_run"}
    assert set(removed) == expected
    assert not (folder / "diagnosis.json").exists() and not (folder / weight_file).exists()
    assert (folder / "notes.txt").read_text() == (folder / "unet" / "mine.bin").read_text()
    assert json.loads((folder / "metrics.json").read_text())["held_out"][0].keys() == {
        "timestep",
        "loss",
    }
    train("unet", line)  # with checkpoints, and the model's folders
    assert "checkpoint-1, checkpoint-2" in capsys.readouterr().out
    assert (folder / "unet" / "mine.bin").exists() and len(list_checkpoints(folder)) == 2
    with pytest.raises(ValueError, match="--overwrite_output_dir removes what .* only one of the"):
        Options(train_data_dir="x", overwrite_output_dir=True, resume_from_checkpoint="latest")


def test_a_folder_of_something_else_is_not_emptied(
    train: Callable[..., Path], place: SimpleNamespace
) -> None:
    folder = train("classifier", "--max_train_steps 1")
    (folder / "options.json").unlink()
    with pytest.raises(SystemExit, match="but no options.json of a training; nothing is removed"):
        train("classifier", "--max_train_steps 1 --overwrite_output_dir")
    assert (folder / "config.json").exists()
    (folder / "unet").symlink_to(place.root)
    (place.root / "config.json").write_text("mine")
    with pytest.raises(SystemExit, match="unet is a link; nothing is removed"):
        train("unet", "--max_train_steps 1 --overwrite_output_dir")
    assert (place.root / "config.json").read_text() == "mine"
    with pytest.raises(
        SystemExit, match="config.json can't be written: it is a file, not a folder"
    ):
        train("unet", "--max_train_steps 1", "out/config.json")


def test_a_failed_start_leaves_the_used_folder(train: Callable[..., Path], tmp_path: Path) -> None:
    folder = train("classifier", "--max_train_steps 1")
    before = sorted(folder.rglob("*"))
    data = save_images(tmp_path / "broken", [f"{'ab'[i % 2]}/{i}.png" for i in range(9)])
    (tmp_path / "broken" / "a" / "4.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="4.png"):
        train("classifier", "--max_train_steps 1 --overwrite_output_dir", data=data)
    assert sorted(folder.rglob("*")) == before


def test_a_folder_within_the_data_is_refused(
    train: Callable[..., Path], tmp_path: Path, place: SimpleNamespace
) -> None:
    data = save_images(tmp_path / "photos", ["a/0.png", "b/1.png"])
    for output in ("photos", "photos/out"):
        with pytest.raises(SystemExit, match="--output_dir .* is in the folder of the data"):
            train("classifier", "--max_train_steps 1", output, data=data)


def test_names_of_labels_are_printed_without_control_sequences(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = save_images(tmp_path / "photos", [f"{'ab'[i % 2]}\x1b[31m/{i}.png" for i in range(8)])
    train("classifier", "--max_train_steps 1", "names", data)
    said = capsys.readouterr().out
    assert "\x1b" not in said and r"2 labels (a\x1b[31m, b\x1b[31m)" in said


# What is held out


def test_a_flat_folder_of_classes_is_evaluated(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A tenth of each label, the same whatever the script and the seed; and a resumed run is the same."""
    data = save_images(tmp_path / "flat", [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(42)])
    line = "--max_train_steps 4 --checkpointing_steps 2 --checkpoints_total_limit 0 --seed 3 "
    whole = train("classifier", line + "--diagnosis_images 4", "whole", data)
    said = capsys.readouterr().out
    assert "data: 38 training images, grey" in said and "4 images of 'train' are held out" in said
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["images"] == 4 and (whole / "diagnosis.json").exists()
    assert f"saved to {whole}; next:\n    guided-diffusers inspect {whole} --dataset" in said
    assert f"guided-diffusers assemble --unet UNET --classifier {whole} --output" in said
    parts = shutil.copytree(whole, tmp_path / "parts")
    shutil.rmtree(parts / "checkpoint-4")
    train("classifier", line + "--resume_from_checkpoint latest", "parts", data)
    assert apart(weights(whole), weights(parts)) == 0
    with pytest.raises(SystemExit, match="of another run: images 38, here 42"):
        train(
            "classifier",
            line + "--resume_from_checkpoint latest --validation_fraction 0",
            "parts",
            data,
        )
    none = train("unet", "--max_train_steps 1 --validation_fraction 0", "none", data)
    assert "no image is held out, so nothing is evaluated" in capsys.readouterr().out
    assert not (none / "metrics.json").exists()


def test_a_share_or_a_split_is_held_out(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train("classifier", "--max_train_steps 1 --validation_fraction 0.5", "share")  # not `test`
    assert "19 images of 'train' are held out" in capsys.readouterr().out  # of 48 - 10
    train("classifier", "--max_train_steps 1 --train_split test", "test")  # isn't its own test
    assert "of 'test' are held out (--validation_fraction 0.1)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="both hold out images: only one of the two is allowed"):
        Options(train_data_dir="x", validation_fraction=0.5, validation_split="test")
    with pytest.raises(ValueError, match=r"--channels 2: 1 \(grey\) and 3 \(RGB\) are allowed"):
        Options(train_data_dir="x", channels=2)


def test_labels_are_read_where_they_are_used(train: Callable[..., Path], tmp_path: Path) -> None:
    """Pictures without labels in train and test, of which `datasets` makes labels that are missing."""
    names = [f"{part}/{i}.png" for part in ("train", "test") for i in range(6)]
    data = save_images(tmp_path / "plain", names)
    folder = train("unet", "--max_train_steps 3", data=data)
    assert json.loads((folder / "metrics.json").read_text())["images"] == 6
    for script, line in (("unet", "--class_conditional"), ("classifier", "")):
        with pytest.raises(SystemExit, match="split 'train': .*: label None of row 0 is none"):
            train(script, "--max_train_steps 1 " + line, "refused", data)


@pytest.mark.parametrize(
    ("labels", "content", "message"),
    [
        ([0, 1, -1, 1], None, "split 'test': label_column='label': label -1 of row 2"),
        ([0, 1, None, 1], None, "split 'test': label_column='label': label None of row 2"),
        ([0, 1, 0, 1], b"text", "split 'test': the image of row 3 can't be read: its format"),
    ],
)
def test_held_out_rows_are_read_before_the_first_step(
    train: Callable[..., Path], tmp_path: Path, labels: list, content: bytes | None, message: str
) -> None:
    image = PILImage.fromarray(np.zeros((8, 8), np.uint8))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    images: list = [image] * 4
    if content:
        images[3] = {"bytes": content, "path": None}
    for name, rows in (("train", ([image] * 4, [0, 1, 0, 1])), ("test", (images, labels))):
        path = tmp_path / "data" / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        columns = dict(zip(("image", "label"), rows, strict=True))
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    with pytest.raises(SystemExit, match=message):
        train("classifier", "--max_train_steps 1", data=f"--train_data_dir {tmp_path / 'data'}")
    assert not (tmp_path / "out").exists()
