"""Powers: p(x) p(y|x)^w by the expectation of p(y|x0)^w, in the classifier, the loss, guidance and the training."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler
from helpers import NAMES, apart, load_script, weights
from torch import Tensor, nn

from guided_diffusers import ClassifierGuidance, ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.classifier import log_odds
from guided_diffusers.learning.batches import StepRandom
from guided_diffusers.learning.classifier_losses import power_losses
from guided_diffusers.learning.classifier_objective import ClassifierLoss
from guided_diffusers.learning.teacher import NoisyTeacher, Teacher
from guided_diffusers.learning.warm_start import classifier_config, copy_weights

MEAN, WIDTH, PEAK = (
    1.5,
    1.0,
    0.6,
)  # p(0 | x0) = PEAK exp(-(x0 - MEAN)^2 / (2 WIDTH^2)); x0 ~ N(0, 1)
BETAS = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")


def random_classifier(**changes: Any) -> NoiseAwareClassifier:
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "num_labels": 3,
        "block_out_channels": (8, 16),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "power_range": (1.0, 8.0),
    }
    model = NoiseAwareClassifier(**config | changes)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


class GaussianNetwork(nn.Module):
    """E[eps | x_t] = sigma x_t of x0 ~ N(0, 1)."""

    config = {"in_channels": 1, "sample_size": 1}

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return ((1 - BETAS.alphas_cumprod[int(timestep)]).sqrt() * sample,)


class GaussianClassifier(nn.Module):
    """E[p(y | x0)^w | x_t] in closed form: x0 given x_t is N(alpha x_t, sigma^2)."""

    config = {
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "num_labels": 2,
        "power_range": (1.0, 8.0),
        "problem_type": "single_label_classification",
    }

    def forward(self, sample: Tensor, timestep: float, power: float = 1.0) -> SimpleNamespace:
        alpha_bar = BETAS.alphas_cumprod[round(float(timestep))].double()
        x, alpha, variance = sample.double().flatten(1), alpha_bar.sqrt(), 1 - alpha_bar
        spread = WIDTH**2 / power  # p^w is a Gaussian function of this variance
        log_q = power * math.log(PEAK) + 0.5 * torch.log(spread / (spread + variance))
        log_q = log_q - (alpha * x - MEAN) ** 2 / (2 * (spread + variance))
        odds = log_q - torch.log(-torch.expm1(log_q))
        return SimpleNamespace(logits=torch.cat([odds, -odds], dim=1))


def test_log_odds_are_those_of_the_softmax_also_where_it_saturates() -> None:
    x = 5 * torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = x.softmax(dim=1)
    torch.testing.assert_close(log_odds(x), p.log() - (1 - p).log(), rtol=1e-9, atol=1e-9)
    x = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    odds = log_odds(x)
    torch.testing.assert_close(odds, torch.tensor([[300.0, -300.0, -600.0]]))
    odds.sum().backward()
    assert x.grad.isfinite().all()


def test_at_power_1_it_is_the_classifier() -> None:
    model, x = random_classifier(), torch.randn(5, 1, 8, 8)
    p = model(x, 30.5).logits.softmax(dim=1)
    torch.testing.assert_close(model(x, 30.5, power=1.0).logits.sigmoid(), p)
    odds = model(x, 30.5, power=4.0).logits
    assert (odds.sigmoid() - p).abs().max() > 1e-3
    each = torch.tensor([1.0, 4.0, 4.0, 1.0, 4.0])
    rows = model(x, 30.5, power=each).logits.sigmoid()
    torch.testing.assert_close(rows, torch.where(each[:, None] == 1, p, odds.sigmoid()))


def test_untrained_powers_are_those_of_the_initial_classifier() -> None:
    """Nothing is learned yet, so every power gives p(y | x_t)."""
    initial, x = random_classifier(power_range=None), torch.randn(4, 1, 8, 8)
    shape = {"sample_size": 8, "in_channels": 1, "num_labels": 3}
    model = NoiseAwareClassifier(
        **classifier_config(initial) | shape | {"power_range": (1.0, 8.0)}
    ).eval()
    copy_weights(model, initial, "initial")
    p = initial(x, 10).logits.softmax(dim=1)
    for power in (1.0, 3.0, 8.0):
        torch.testing.assert_close(model(x, 10, power=power).logits.sigmoid(), p)
    torch.testing.assert_close(model(x, 10).logits, initial(x, 10).logits)
    # and back: an ordinary classifier from one of powers
    back = NoiseAwareClassifier(**classifier_config(model) | shape).eval()
    assert back.config.power_range is None
    copy_weights(back, random_classifier(), "powers")
    torch.testing.assert_close(back(x, 10).logits, random_classifier()(x, 10).logits)


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_every_head_has_powers(pool: str) -> None:
    output = random_classifier(pool=pool)(torch.randn(2, 1, 8, 8), 3, power=2.5)
    assert output.logits.shape == (2, 3)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"power_range": (2.0, 8.0)}, "power_range"),
        ({"power_range": (1.0, 1.0)}, "power_range"),
        ({"power_range": 8.0}, "power_range"),
        ({"power_range": (1.0, math.inf)}, "power_range"),
        ({"power_range": ("a", 8.0)}, "power_range"),
        ({"problem_type": "regression"}, "problem_type is 'regression'"),
    ],
)
def test_what_the_config_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        random_classifier(**changes)


@pytest.mark.parametrize("power", [0.5, 8.5, "3", True, math.nan, torch.tensor([2.0, 9.0])])
def test_powers_out_of_range(power: Any) -> None:
    with pytest.raises(ValueError, match="power is .*from 1 to 8"):
        random_classifier()(torch.randn(2, 1, 8, 8), 3, power=power)
    if not torch.is_tensor(power):
        with pytest.raises(ValueError, match="power=.*from 1"):
            ClassifierGuidance(random_classifier(), 0, power=power)


def test_powers_of_a_classifier_without() -> None:
    plain = random_classifier(power_range=None)
    with pytest.raises(ValueError, match="--max_power"):
        plain(torch.randn(2, 1, 8, 8), 3, power=2.0)
    with pytest.raises(ValueError, match="knows no powers"):
        ClassifierGuidance(plain, 0, power=2.0)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"label": {0: 0.5, 1: 0.5}}, "one label an image"),
        ({"label": {0: 2.0}}, "one label an image"),
        ({"label": 0, "joint_temperature": 2.0}, "joint_temperature=2.0"),
        ({"label": 0, "marginal_temperature": 0.5}, "marginal_temperature=0.5"),
    ],
)
def test_what_has_no_exact_power(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ClassifierGuidance(random_classifier(), power=2.0, **options)


def test_the_loss_is_least_at_the_expectation() -> None:
    """Over x0 with p(y | x0) in {0.2, 0.9}, the best odds are those of the mean of p^w."""
    log_p = torch.tensor([[0.2, 0.8], [0.9, 0.1]], dtype=torch.float64).log()
    power = torch.full((2,), 3.0, dtype=torch.float64)
    mean = torch.tensor([(0.2**3 + 0.9**3) / 2, (0.8**3 + 0.1**3) / 2], dtype=torch.float64)
    f = torch.logit(mean).requires_grad_()
    loss = power_losses(f.expand(2, 2), power[:, None] * log_p).sum()
    assert torch.autograd.grad(loss, f)[0].abs().max() < 1e-12
    expected = -(mean * mean.log() + (1 - mean) * (1 - mean).log()).sum()
    torch.testing.assert_close(loss.detach() / 2, expected)


@pytest.mark.parametrize("power", [1.0, 3.0, 8.0])
def test_samples_are_of_p_x_times_p_y_to_the_power(power: float) -> None:
    """p(x) p(0|x)^w is Gaussian: its mean and variance, and what linear guidance makes of it."""
    latents = torch.special.ndtri((torch.arange(400).double() + 0.5) / 400).float()
    pipeline = ClassifierGuidedPipeline(GaussianNetwork(), BETAS, GaussianClassifier())
    pipeline.set_progress_bar_config(disable=True)

    def sample(**call: Any) -> Tensor:
        options = {"num_inference_steps": 200, "output_type": "latent", **call}
        return pipeline(0, 400, latents=latents.reshape(-1, 1, 1, 1), **options).images.flatten()

    x = sample(guidance_power=power)
    variance = 1 / (1 + power / WIDTH**2)
    mean = variance * power * MEAN / WIDTH**2
    assert abs(float(x.mean()) - mean) < 0.01
    assert abs(float(x.std()) - variance**0.5) < 0.01
    if power > 1:
        assert abs(float(sample(guidance_scale=power).mean()) - mean) > 0.05
        doubled = sample(guidance_power=power, guidance_scale=2.0)
        assert abs(float(doubled.mean()) - mean) > 0.05  # a scale still multiplies the gradient


def test_the_arguments_of_the_pipeline(tmp_path: Path) -> None:
    network, classifier = GaussianNetwork(), GaussianClassifier()
    pipeline = ClassifierGuidedPipeline(network, BETAS, classifier, defaults={"guidance_power": 3})
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 1, 1, 1)
    options = {"latents": latents, "num_inference_steps": 5, "output_type": "latent"}
    by_default = pipeline([0, 1], **options)
    assert by_default.settings["guidance_power"] == 3
    given = pipeline([0, 1], guidance_power=3.0, **options)
    assert torch.equal(by_default.images, given.images)
    for call, words in [
        ({"guidance_power": 9.0}, "guidance_power=9.0.* 1.0 to 8.0"),
        ({"guidance_power": 0.5}, "guidance_power=0.5"),
        ({"guidance_power": 3.0, "guidance_scale": 0.0}, "no effect with guidance_scale=0"),
    ]:
        with pytest.raises(ValueError, match=words):
            pipeline([0, 1], **options, **call)
    with pytest.raises(ValueError, match="guidance_power=3.0 needs a label"):
        pipeline(None, 2, guidance_power=3.0, **options)
    with pytest.raises(ValueError, match="guidance_power=3.0: the classifier knows no powers"):
        other = ClassifierGuidedPipeline(network, BETAS, random_classifier(power_range=None))
        other([0, 1], guidance_power=3.0, **options)
    with pytest.raises(ValueError, match="defaults: guidance_power"):
        ClassifierGuidedPipeline(network, BETAS, classifier, defaults={"guidance_power": 0.2})


def test_a_teacher_is_calibrated_and_its_labels_are_matched_by_name() -> None:
    """Logits that are twice too large have the temperature 2."""
    from guided_diffusers.diagnosis import calibration_error, calibration_gaps, logit_scale

    generator = torch.Generator().manual_seed(0)
    f = torch.randn(4000, 3, generator=generator)
    y = torch.multinomial(f.softmax(dim=1), 1, generator=generator)[:, 0]
    items = [{"pixel_values": row, "label": int(label)} for row, label in zip(f, y, strict=True)]
    order = [2, 0, 1]  # the teacher's own order of the labels
    names = {k: NAMES[order[k]] for k in range(3)}

    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        return images, 2 * images[:, order]

    data_names = {k: NAMES[k] for k in range(3)}
    teacher = Teacher("t", network, names, 3, data_names)

    def error(logits: Tensor, labels: Tensor) -> float:
        return calibration_error(calibration_gaps(logits, labels))

    figures = teacher.calibrate(items, 4000, 500, logit_scale, error, progress=False)
    assert abs(figures["temperature"] - 2) < 0.1
    assert figures["calibration_error"] < figures["calibration_error_before"] / 3
    torch.testing.assert_close(teacher(f), f.log_softmax(dim=1), rtol=0, atol=0.2)
    with pytest.raises(ValueError, match="doesn't know the data's labels"):
        Teacher("t", network, names, 3, {0: "z"})
    with pytest.raises(ValueError, match="4 labels without names and the data has 3"):
        Teacher("t", network, {}, 4, data_names)


def test_a_warm_start_with_another_head_and_first_layer() -> None:
    """What fits is copied; the first and the last layer stay."""
    initial = random_classifier()
    model = NoiseAwareClassifier.from_config(initial.config, pool="adaptive", patch_size=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "parameters" in copy_weights(model, initial, "x")
    after, source = model.state_dict(), initial.state_dict()
    name = "mid_block.resnets.0.conv1.weight"
    assert torch.equal(after[name], source[name]) and not torch.equal(before[name], source[name])
    for name in ("conv_in.weight", "head.4.weight"):
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("power", [None, 3.0])
def test_a_noise_aware_teacher_sees_the_students_noise(power: float | None) -> None:
    """On another schedule it is evaluated at the same sigma / alpha; labels go by name."""
    names = {0: "a", 1: "b", 2: "c"}
    classifier = random_classifier(id2label=names)
    student = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.015)
    data_names = {0: "c", 1: "a", 2: "b"}
    teacher = NoisyTeacher("t", classifier, data_names, student, 100, 900)
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([300, 700])
    log_q = teacher.log_targets(torch.zeros(0), x_t, t, power)
    ratios = (1 / DDPMScheduler().alphas_cumprod - 1).sqrt()  # of the classifier, by timestep
    for i, ratio in enumerate((1 / student.alphas_cumprod[t] - 1).sqrt()):
        near = int((ratios - ratio).abs().argmin())  # the levels of two timesteps differ by < 1.5%
        logits = classifier(x_t[i : i + 1], near, power=power).logits[:, [2, 0, 1]]
        expected = logits.log_softmax(dim=1) if power is None else logits.sigmoid().log()
        torch.testing.assert_close(log_q[i : i + 1], expected, rtol=0.02, atol=0.01)
    assert teacher.figures == {"teacher": "t", "input": "x_t"}
    low_noise = random_classifier(trained_betas=[1e-4] * 50, num_train_timesteps=50)
    with pytest.raises(ValueError, match="--teacher t knows no noise as of timestep 900"):
        NoisyTeacher("t", low_noise, names, student, 0, 900)


@pytest.mark.parametrize("max_power", [None, 8.0])
def test_the_loss_with_a_teachers_gradient_is_the_formula(max_power: float | None) -> None:
    """Half of the labels are the image's, the others any; the teacher itself has no error left."""
    names, scheduler, count = {0: "a", 1: "b", 2: "c"}, DDPMScheduler(), 8
    classifier = random_classifier(id2label=names).requires_grad_(False)
    student = random_classifier(id2label=names)
    torch.nn.init.normal_(student.conv_in.weight, std=0.1)
    teacher = NoisyTeacher("t", classifier, names, scheduler, 0, 999)

    def draws() -> StepRandom:
        return StepRandom(torch.Generator().manual_seed(0), count, 0, 1, torch.device("cpu"))

    batch = {"pixel_values": torch.rand(count, 1, 8, 8), "label": torch.arange(count) % 3}

    def loss(model: nn.Module, weight: float) -> Tensor:
        kind = {"teacher": teacher, "max_power": max_power, "gradient_weight": weight}
        return ClassifierLoss(Accelerator(cpu=True), scheduler, 3, 0, 999, **kind)(
            model, batch, draws()
        )

    again = draws()
    t, eps = again.randint(1000), again.randn(1, 8, 8)
    power = None if max_power is None else torch.exp(again.rand() * math.log(max_power))
    label = torch.where(again.rand() < 0.5, batch["label"], again.randint(3))
    assert (label != batch["label"]).any()
    x = scheduler.add_noise(batch["pixel_values"], eps, t).requires_grad_()

    def sigma_gradient(model: nn.Module) -> Tensor:
        logits = model(x, t, power=power).logits
        log_p = logits.log_softmax(dim=1) if power is None else nn.functional.logsigmoid(logits)
        (gradient,) = torch.autograd.grad(log_p[torch.arange(count), label].sum(), x)
        return ((1 - scheduler.alphas_cumprod[t]).sqrt()[:, None, None, None] * gradient).flatten(1)

    exact = sigma_gradient(classifier)
    error = (sigma_gradient(student) - exact).square().sum(dim=1)
    expected = (error / (1 + exact.square().sum(dim=1))).mean()
    found = loss(student, 2.0)
    torch.testing.assert_close(found - loss(student, 0.0), 2 * expected, rtol=1e-3, atol=1e-6)
    found.backward()
    assert all(parameter.grad is None for parameter in classifier.parameters())
    torch.testing.assert_close(loss(classifier, 2.0), loss(classifier, 0.0), rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- the training

POWERS = "--max_power 8 --train_batch_size 16 --validation_samples 12 --learning_rate 1e-3"


def test_training_with_powers(train: Callable[..., Path]) -> None:
    """A tiny teacher of clean images, then a student of powers; resumed it ends the same."""
    learn = "--max_train_steps 150 --train_batch_size 16 --learning_rate 3e-3 --no_use_ema"
    teacher = train("classifier", f"{learn} --max_timestep 0", "teacher")
    line = f"--teacher {teacher} {POWERS} --checkpointing_steps 3"
    whole = train("classifier", f"{line} --max_train_steps 6", "whole")
    part = shutil.copytree(whole, whole.with_name("part"))
    shutil.rmtree(part / "checkpoint-6")
    train("classifier", f"{line} --max_train_steps 6 --resume_from_checkpoint latest", "part")
    assert apart(weights(whole), weights(part)) == 0
    model = NoiseAwareClassifier.from_pretrained(whole)
    assert model.config.power_range == [1.0, 8.0]
    assert float(model.power_embedding.linear_2.weight.abs().max()) > 0  # it learned
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["teacher"]["images"] == 12 and metrics["teacher"]["temperature"] > 0
    row = metrics["held_out"][0]
    assert row["power 1"] == pytest.approx(1, abs=1e-4)
    assert row["power 8 of the teacher"] < row["power 2 of the teacher"] < 1
    # without --max_power: the teacher's probabilities as soft labels, an ordinary classifier
    plain = train("classifier", f"--teacher {teacher} --max_train_steps 2", "plain")
    assert NoiseAwareClassifier.from_pretrained(plain).config.power_range is None
    assert json.loads((plain / "metrics.json").read_text())["teacher"]["temperature"] > 0
    # a noise-aware teacher sees x_t, unless it lacks the powers to learn
    line = f"--teacher {whole} --max_power 8 --max_train_steps 2"
    student = train("classifier", line, "student")
    metrics = json.loads((student / "metrics.json").read_text())
    assert metrics["teacher"] == {"teacher": str(whole), "input": "x_t"}
    matched = train("classifier", f"{line} --teacher_gradient_weight 1", "matched")
    assert apart(weights(student), weights(matched)) > 0
    with pytest.raises(SystemExit, match="--teacher_gradient_weight 1: --teacher .* sees clean"):
        train("classifier", f"--teacher {teacher} --teacher_gradient_weight 1", "unmatched")
    script = load_script("train_classifier")
    size, channels = model.config.sample_size, model.config.in_channels
    for count, same in ((channels, True), (channels + 2, False)):  # a teacher of other samples
        images = SimpleNamespace(resolution=size, channels=count)
        assert script.has_samples(model, images) is same
    sees_noise = script.sees_noise
    assert sees_noise(model, 8.0) and sees_noise(random_classifier(power_range=None), None)
    assert not sees_noise(model, 9.0)
    assert not sees_noise(NoiseAwareClassifier.from_pretrained(teacher), None)


def test_the_loss_learns_the_expectation_of_a_known_teacher() -> None:
    """x0 = +-1, p(0 | x0) = 0.9 or 0.2: at pure noise sigmoid(f_0) is the mean of p^w, w between."""
    torch.manual_seed(0)
    log_p = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
    net = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(600):
        side, power = torch.randint(2, (256,)), torch.exp(torch.rand(256) * math.log(8))
        loss = power_losses(net(power.log()[:, None]), power[:, None] * log_p[side]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for w in (1.0, 3.0, 8.0):
        learned = net(torch.tensor([[math.log(w)]])).sigmoid()[0]
        expected = (w * log_p).exp().mean(dim=0)
        torch.testing.assert_close(learned, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--max_power 8", "--max_power 8 needs --teacher"),
        ("--max_power 1 --teacher x", "--max_power 1: a number above 1"),
        ("--teacher {folder}", "--teacher .*folder"),
        ("--teacher x --mixup 0.2", "--mixup 0.2: 0 is allowed with --teacher"),
        ("--teacher x --label_smoothing 0.1", "--label_smoothing 0.1"),
        ("--teacher x --class_weights balanced", "--class_weights balanced"),
    ],
)
def test_what_a_teacher_refuses(train: Callable[..., Path], line: str, words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        train("classifier", line)


def test_inspect_says_whether_the_powers_are_consistent() -> None:
    """The mean of E[p^w | x_t] is the same at all noise levels, if the classifier is exact."""
    from guided_diffusers.diagnosis import diagnose

    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(4000, generator=generator)
    p = PEAK * torch.exp(-((x0 - MEAN) ** 2) / (2 * WIDTH**2))
    label = (torch.rand(4000, generator=generator) > p).long()
    data = [
        {"pixel_values": x.reshape(1, 1, 1), "label": y} for x, y in zip(x0, label, strict=True)
    ]

    class Plain(GaussianClassifier):  # of label 0 alone, whose expectation is in closed form
        error = 0.0

        def forward(self, sample: Tensor, timestep: float, power: float = 1.0) -> SimpleNamespace:
            odds = super().forward(sample, float(round(timestep)), power).logits
            if power > 1:
                odds = torch.stack([odds[:, 0], torch.full_like(odds[:, 0], -100.0)], dim=1)
                odds = odds + self.error * timestep / 1000
            return SimpleNamespace(logits=odds / 2 if power == 1 else odds)

    exact, wrong = Plain(), Plain()
    wrong.error = 1.0
    options = {"gradient_images": 8, "images": 4000, "finite_differences": False, "progress": False}
    sentence = diagnose(exact, data, batch_size=4000, **options).verdict.words[-1]
    assert "guidance_power=8" in sentence and "(consistent)" in sentence, sentence
    expected = float(torch.exp(8 * p.log()).mean())
    assert abs(float(sentence.split(", and ")[1].split()[0]) - expected) < 0.01
    sentence = diagnose(wrong, data, batch_size=4000, **options).verdict.words[-1]
    assert "(inconsistent: train it longer)" in sentence


def test_the_bundled_preset_is_exact_with_a_power() -> None:
    """Its limits and scales are for linear guidance; and the classifier can still be a judge."""
    from guided_diffusers.bundled import folder
    from guided_diffusers.evaluation import load_network

    pipeline = ClassifierGuidedPipeline.from_bundled()
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "latent", "conditional": False}
    settings = pipeline("dress", guidance_power=3.0, **options).settings
    expected = {"guidance_power": 3.0, "guidance_scale": 1.0, "guidance_start": 0.0}
    expected |= {"guidance_stop": 1.0, "guidance_every": 1, "guidance_tolerance": None}
    assert {name: settings[name] for name in expected} == expected
    assert pipeline("dress", guidance_power=3.0).settings["num_inference_steps"] == 15
    settings = pipeline({"dress": 1, "coat": 1}, **options).settings
    assert settings["guidance_scale"] == 3.0 and settings["guidance_power"] is None
    classifier = load_network(str(folder("fashion-mnist") / "classifier"))
    features, logits = classifier(torch.zeros(2, 1, 28, 28))
    assert features.shape == (2, 96) and logits.shape == (2, 10)


def test_power_1_is_for_any_classifier_and_mixtures_ignore_a_default() -> None:
    plain, powers = random_classifier(power_range=None), random_classifier()
    assert ClassifierGuidance(plain, 0, power=1.0).power is None
    assert ClassifierGuidance(powers, 0, power=1.0).power == 1.0
    with pytest.raises(ValueError, match="power=2.0 has no effect on regression"):
        regressor = random_classifier(power_range=None, problem_type="regression")
        ClassifierGuidance(regressor, target=1.0, power=2.0)
    network = GaussianNetwork()
    defaults = {"guidance_power": 3}
    pipeline = ClassifierGuidedPipeline(network, BETAS, GaussianClassifier(), defaults=defaults)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "latent"}
    assert pipeline({0: 1.0, 1: 0.5}, **options).settings["guidance_power"] is None
