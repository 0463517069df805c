"""What `train_unet.py` can learn: min-SNR weights, zero terminal SNR, flow matching, and a transformer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Clock, Mixture, OracleClassifier, OracleUNet
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from helpers import TRAINING, UNET, apart, load_script, weights
from torch import Tensor

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.learning.batches import generator_for
from guided_diffusers.learning.data import LabelledImages, load_splits
from guided_diffusers.learning.losses import (
    FlowProcess,
    Process,
    bits_per_dim,
    diffusion_loss,
    min_snr_weights,
)

DIT = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 2}
DIT |= {"attention_head_dim": 8, "num_layers": 2, "patch_size": 2}
train_unet = load_script("train_unet")
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    path = tmp_path / "dit.json"
    path.write_text(json.dumps(DIT))
    return path


def quiet(pipeline: ClassifierGuidedPipeline) -> ClassifierGuidedPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(pipeline: ClassifierGuidedPipeline, *labels: Any, **options: Any) -> Tensor:
    options = {"num_inference_steps": 3, "guidance_scale": 0.0, "output_type": "latent", **options}
    return quiet(pipeline)(*labels, generator=torch.Generator().manual_seed(0), **options).images


def draws_of(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    options = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
    return torch.randn(shape, **options).clamp(-1, 1), torch.randn(shape, **options)


# Min-SNR weights


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_the_papers(gamma: float) -> None:
    """Of x0, eps and v, from alpha_bar; and all three are one loss of the predicted x0."""
    k = torch.tensor([0, 1, 150, 400, 700, 999])
    alpha_bar = torch.cumprod(1 - DDPMScheduler().betas.double(), 0)[k]
    snr = alpha_bar / (1 - alpha_bar)
    assert snr[0] > gamma > snr[-1]
    least = torch.minimum(snr, torch.tensor(gamma).double())
    expected = {"sample": least, "epsilon": least / snr, "v_prediction": least / (snr + 1)}
    x0, eps = draws_of((6, 1, 4, 4))
    predicted_x0 = draws_of((6, 1, 4, 4), seed=1)[0]
    alpha, sigma = (level.sqrt()[:, None, None, None] for level in (alpha_bar, 1 - alpha_bar))
    predicted_eps = (alpha * x0 + sigma * eps - alpha * predicted_x0) / sigma
    predicted_v = alpha * predicted_eps - sigma * predicted_x0
    outputs = {"sample": predicted_x0, "epsilon": predicted_eps, "v_prediction": predicted_v}
    x0_loss = least * (predicted_x0 - x0).square().mean(dim=(1, 2, 3))
    for prediction in PREDICTIONS:
        process = Process(DDPMScheduler(prediction_type=prediction))
        weight = min_snr_weights(process, k, x0, gamma)
        torch.testing.assert_close(weight, expected[prediction], rtol=1e-9, atol=0)
        got = diffusion_loss(process, outputs[prediction], x0, eps, k, "simple", snr_gamma=gamma)
        torch.testing.assert_close(got["loss"], x0_loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(got["loss"], expected[prediction] * got["mse"])


def test_min_snr_leaves_the_learned_variance_alone() -> None:
    process, k = Process(DDPMScheduler(variance_type="learned_range")), torch.tensor([3, 900])
    (x0, eps), output = draws_of((2, 1, 4, 4)), draws_of((2, 2, 4, 4), seed=1)[1]
    plain = diffusion_loss(process, output, x0, eps, k, "hybrid")
    got = diffusion_loss(process, output, x0, eps, k, "hybrid", snr_gamma=5.0)
    weighted = min_snr_weights(process, k, x0) * plain["mse"]
    torch.testing.assert_close(got["loss"], weighted + plain["vb"])


# Zero terminal SNR


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_last_timestep_is_noise_alone(schedule: str) -> None:
    x0, eps = draws_of((2, 1, 4, 4))
    k = torch.tensor([999, 999])
    for prediction, target in (("v_prediction", -x0), ("sample", x0)):
        settings = {"beta_schedule": schedule, "prediction_type": prediction}
        process = Process(DDPMScheduler(**settings, rescale_betas_zero_snr=True))
        betas = rescale_zero_terminal_snr(DDPMScheduler(beta_schedule=schedule).betas)
        expected = torch.cumprod(1 - betas.double(), 0).sqrt()
        alpha = process.at(torch.arange(1000), x0, "alpha")[0].flatten()
        torch.testing.assert_close(alpha, expected, rtol=1e-12, atol=0)
        assert alpha[-1] == 0 and (alpha[:-1] > 0).all()
        assert torch.equal(process.noised(x0, eps, k), eps)
        assert torch.equal(process.target(x0, eps, k), target)
        assert torch.equal(process.denoised(target, eps, k), x0)
        assert not diffusion_loss(process, target, x0, eps, k)["loss"].any()
    message = "prediction_type 'epsilon': .*zero terminal SNR.*v_prediction and sample"
    with pytest.raises(ValueError, match=message):
        Process(DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=True))


def test_bits_of_noise_alone() -> None:
    """Nothing is left of x0 at T, so that the prior costs nothing; and all of the bound is finite."""
    scheduler = DDPMScheduler(
        6, prediction_type="v_prediction", variance_type="fixed_small", rescale_betas_zero_snr=True
    )
    network = UNet2DModel(**UNET, sample_size=8, in_channels=1, out_channels=1).eval()
    x0, generator = torch.zeros(2, 1, 8, 8), torch.Generator().manual_seed(0)
    bits = bits_per_dim(network, Process(scheduler), x0, generator=generator)
    assert not bits["prior"].any() and all(term.isfinite().all() for term in bits.values())


def test_a_step_from_noise_alone_is_the_mean(mixture: Mixture) -> None:
    """One DDIM step from T with the exact network gives E[x0], of any noise; guided at scale 1, E[x0 | y]."""
    zero = {"rescale_betas_zero_snr": True}
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, **zero
    )
    unet = OracleUNet(mixture, "v_prediction", Clock("ddpm", **zero))
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pipeline = ClassifierGuidedPipeline(unet, scheduler, OracleClassifier(mixture))
    mean = (mixture.prior[:, None, None, None] * mixture.means).sum(0)
    options = {"num_images_per_label": 3, "num_inference_steps": 1, "latents": noise}
    images = sampled(pipeline, **options)
    torch.testing.assert_close(images, mean.expand_as(images), rtol=0, atol=1e-5)
    for label in range(2):
        images = sampled(pipeline, label, **options, guidance_scale=1.0)
        # the classifier was never trained on noise alone: at its noisiest level alpha is 0.0064
        expected = mixture.means[label].expand_as(images)
        torch.testing.assert_close(images, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("line", "scheduler"),
    [
        ("--prediction_type v_prediction", DDIMScheduler),
        ("--prediction_type sample", DDIMScheduler),
        ("--prediction_type v_prediction --objective hybrid", DDPMScheduler),
    ],
)
def test_the_saved_scheduler_starts_at_noise_alone(
    train: Callable[..., Path], line: str, scheduler: type
) -> None:
    line = f"--rescale_betas_zero_snr --max_train_steps 2 --ddpm_num_steps 40 {line}"
    folder = train("unet", line)
    pipeline = ClassifierGuidedPipeline.from_pretrained(folder)
    saved = pipeline.scheduler
    assert type(saved) is scheduler and saved.config.rescale_betas_zero_snr
    assert saved.config.clip_sample == (scheduler is DDPMScheduler)
    assert saved.config.prediction_type in line and saved.alphas_cumprod[-1] == 0
    saved.set_timesteps(4)
    assert saved.timesteps.tolist() == [39, 29, 19, 9]
    images = sampled(pipeline, num_inference_steps=4)
    assert images.isfinite().all()
    again = ClassifierGuidedPipeline.from_pretrained(folder)
    assert torch.equal(images, sampled(again, num_inference_steps=4))
    rows = json.loads((folder / "metrics.json").read_text())["held_out"]
    assert len(rows) == 10 and all(0 < row["loss"] < 100 for row in rows)


# Flow matching


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_the_schedulers(shift: float) -> None:
    """x_s and the timesteps that the network is told are those of `FlowMatchEulerDiscreteScheduler`."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    process = FlowProcess(scheduler)
    timesteps = process.timesteps(torch.arange(1, 1001).double() / 1000).flip(0)
    torch.testing.assert_close(timesteps, scheduler.timesteps.double(), rtol=1e-6, atol=0)
    x0, eps = (part.float() for part in draws_of((4, 1, 4, 4)))
    t = scheduler.timesteps[[0, 300, 700, 999]]
    torch.testing.assert_close(process.noised(x0, eps, t), scheduler.scale_noise(x0, t, eps))
    # a step to s = 0 with the true velocity is x0
    scheduler.set_timesteps(5)
    for index, t in enumerate(scheduler.timesteps):
        x_s = process.noised(x0, eps, t.expand(4))
        velocity = process.target(x0, eps, t.expand(4))
        torch.testing.assert_close(x_s - scheduler.sigmas[index] * velocity, x0, rtol=0, atol=1e-5)


def test_the_exact_velocity_has_the_smallest_loss(mixture: Mixture) -> None:
    """v(x) = (x - E[x0 | x]) / s. Of Gaussian data its loss is std^2 / ((1 - s)^2 std^2 + s^2)."""
    generator = torch.Generator().manual_seed(0)
    count, process = 20_000, FlowProcess(FlowMatchEulerDiscreteScheduler())
    shape = (2, count, 1, 4, 4)
    noise, eps = torch.randn(shape, generator=generator, dtype=torch.float64)
    label = (torch.rand(count, generator=generator) < mixture.prior[1]).long()
    for t in (50.0, 300.0, 600.0, 950.0, 1000.0):
        s, timesteps = t / 1000, torch.full((count,), t)
        for told in (0, None):
            x0 = mixture.means[label if told is None else label * 0] + mixture.std * noise
            x = process.noised(x0, eps, timesteps)
            exact = (x - mixture.denoised(x, 1 - s, s, told)) / s

            def loss(velocity: Tensor, *batch: Tensor) -> tuple[float, float]:
                each = diffusion_loss(process, velocity, *batch)["loss"]
                return each.mean().item(), each.std().item() / sqrt(count)

            batch = (x0, eps, timesteps)
            least, error = loss(exact, *batch)
            if told == 0:
                closed = mixture.std**2 / (((1 - s) * mixture.std) ** 2 + s**2)
                assert abs(least - closed) < 4 * error
            # of another timestep
            late = (x - mixture.denoised(x, 1.05 - s, s - 0.05 + 1e-9, told)) / s
            for other in (1.05 * exact, 0.95 * exact, exact + 0.1, -exact, late):
                assert loss(other, *batch)[0] > least


def test_figures_of_flow_are_of_the_saved_model(train: Callable[..., Path], place: Any) -> None:
    """The held-out loss at ten s, worked out from the saved folder alone."""
    folder = train("unet", "--objective flow_matching --max_train_steps 3")
    pipeline = ClassifierGuidedPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    assert pipeline.scheduler.config.shift == 1
    data = LabelledImages(load_splits(place.folder)["test"], resolution=8, center_crop=True)
    numbers = range(0, 12, 2)
    x0 = torch.stack([data[i]["pixel_values"] for i in numbers])
    rows = json.loads((folder / "metrics.json").read_text())["held_out"]
    assert [row["timestep"] for row in rows] == list(range(49, 1000, 100))
    for k, row in enumerate(rows):
        s = row["timestep"] / 1000
        generators = [generator_for(0, 3, i, k) for i in numbers]
        eps = torch.stack([torch.randn(1, 8, 8, generator=g) for g in generators])
        with torch.no_grad():
            output = pipeline.unet((1 - s) * x0 + s * eps, 1000 * s).sample
        assert row["loss"] == pytest.approx((output - (eps - x0)).square().mean().item(), abs=2e-5)


def test_a_classifier_of_diffusion_guides_a_flow(
    train: Callable[..., Path], mixture: Mixture
) -> None:
    """A trained folder and a classifier of a variance-preserving schedule; and the exact ones, to the conditional."""
    flow = train("unet", "--objective flow_matching --flow_shift 3 --max_train_steps 2", "flow")
    trained = train("classifier", "--max_train_steps 4", "classifier")
    classifier = NoiseAwareClassifier.from_pretrained(trained)
    pipeline = ClassifierGuidedPipeline.from_pretrained(flow, classifier=classifier)
    assert pipeline.scheduler.config.shift == 3
    unguided = sampled(ClassifierGuidedPipeline.from_pretrained(flow))
    guided = {scale: sampled(pipeline, "c", guidance_scale=scale) for scale in (0.0, 1.0, 20.0)}
    assert torch.equal(guided[0.0], unguided)
    moved = [(guided[scale] - unguided).abs().max().item() for scale in (1.0, 20.0)]
    assert 0 < moved[0] < moved[1] < 100

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    unet, told = (OracleUNet(mixture, "flow", Clock("flow"), label) for label in (None, 1))
    noise = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"latents": noise, "num_images_per_label": 4, "num_inference_steps": 20}
    guided = ClassifierGuidedPipeline(unet, scheduler, OracleClassifier(mixture))
    got = sampled(guided, 1, guidance_scale=1.0, **options)
    expected = sampled(ClassifierGuidedPipeline(told, scheduler), **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.01)


# The training script


def by_hand(
    place: Any, loss: Callable[[UNet2DModel, Tensor, torch.Generator], Tensor]
) -> dict[str, Tensor]:
    """Weights after three steps of the plain loop."""
    data = LabelledImages(load_splits(place.folder)["train"], resolution=8)
    torch.manual_seed(0)
    model = UNet2DModel(**UNET, sample_size=8, in_channels=1, out_channels=1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, eps=1e-3, weight_decay=0.01)
    order = torch.randperm(48, generator=generator_for(0, 0, 0)).tolist()
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, step / 2)
        x0 = torch.stack([data[order[p], p]["pixel_values"] for p in range(4 * step, 4 * step + 4)])
        loss(model, x0, generator_for(0, 2, step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def logit_normal(generator: torch.Generator) -> Tensor:
    return torch.randn(4, generator=generator).sigmoid()


def shifted(generator: torch.Generator) -> Tensor:
    u = logit_normal(generator)
    return u * 3 / (1 + 2 * u)


@pytest.mark.parametrize(
    ("line", "law"),
    [
        ("", logit_normal),
        ("--flow_timestep_sampling logit_normal --flow_shift 3", shifted),
        ("--flow_timestep_sampling uniform", lambda generator: torch.rand(4, generator=generator)),
    ],
)
def test_flow_training_is_the_plain_loop(
    train: Callable[..., Path], place: Any, line: str, law: Callable[[torch.Generator], Tensor]
) -> None:
    def loss(model: UNet2DModel, x0: Tensor, generator: torch.Generator) -> Tensor:
        s = law(generator)
        eps = torch.randn(4, 1, 8, 8, generator=generator)
        at = s[:, None, None, None]
        return (model((1 - at) * x0 + at * eps, 1000 * s).sample - (eps - x0)).square().mean()

    line = f"--objective flow_matching --no_use_ema --adam_epsilon 1e-3 --max_train_steps 3 {line}"
    folder = train("unet", line)
    assert apart(weights(folder), by_hand(place, loss)) < 1e-6


@pytest.mark.parametrize(
    ("line", "gamma"),
    [
        ("--prediction_type epsilon --snr_gamma 5", 5.0),
        ("--prediction_type v_prediction --snr_gamma 2", 2.0),
        ("--prediction_type v_prediction --rescale_betas_zero_snr --ddpm_num_steps 3", None),
    ],
)
def test_training_with_betas_is_the_plain_loop(
    train: Callable[..., Path], place: Any, line: str, gamma: float | None
) -> None:
    steps, zero = (3 if "num_steps" in line else 1000), "zero" in line
    betas = DDPMScheduler(steps).betas
    alpha_bar = torch.cumprod(1 - (rescale_zero_terminal_snr(betas) if zero else betas).double(), 0)
    drawn = []

    def loss(model: UNet2DModel, x0: Tensor, generator: torch.Generator) -> Tensor:
        t = torch.randint(steps, (4,), generator=generator)
        drawn.extend(t.tolist())
        eps = torch.randn(4, 1, 8, 8, generator=generator)
        levels = (alpha_bar, 1 - alpha_bar)
        alpha, sigma = (part[t].sqrt().float()[:, None, None, None] for part in levels)
        wanted = eps if "epsilon" in line else alpha * eps - sigma * x0
        each = (model(alpha * x0 + sigma * eps, t).sample - wanted).square().mean(dim=(1, 2, 3))
        if gamma is not None:
            snr = (alpha_bar / (1 - alpha_bar))[t].float()
            each = each * snr.clamp(max=gamma) / (snr if "epsilon" in line else snr + 1)
        return each.mean()

    folder = train("unet", f"--no_use_ema --adam_epsilon 1e-3 --max_train_steps 3 {line}")
    assert apart(weights(folder), by_hand(place, loss)) < 1e-6
    assert not zero or steps - 1 in drawn  # noise alone was among them


@pytest.mark.parametrize(
    "line",
    [
        "--class_conditional --objective flow_matching --flow_timestep_sampling uniform",
        "--class_conditional --objective flow_matching --flow_shift 2 --model_config_name_or_path {dit}",
        "--class_conditional --objective hybrid_rescaled --snr_gamma 5 --model_config_name_or_path {dit}",
        "--prediction_type v_prediction --rescale_betas_zero_snr",
    ],
)
def test_resumed_equals_uninterrupted(train: Callable[..., Path], dit: Path, line: str) -> None:
    """Bit for bit; and what is saved is loaded as it is and samples alike."""
    line = line.format(dit=dit) + " --checkpointing_steps 2 --checkpoints_total_limit 0 "
    line += "--max_train_steps 4 --validation_samples 2"
    whole = train("unet", line, "whole")
    parts = shutil.copytree(whole, whole.with_name("parts"))
    shutil.rmtree(parts / "checkpoint-4")
    train("unet", line + " --resume_from_checkpoint latest", "parts")
    assert apart(weights(whole), weights(parts)) == 0
    label = ["c"] if "class" in line else []
    pipelines = map(ClassifierGuidedPipeline.from_pretrained, (whole, parts))
    images, again = (sampled(pipeline, *label) for pipeline in pipelines)
    assert images.shape == (1, 1, 8, 8) and images.isfinite().all() and torch.equal(images, again)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{flow} --prediction_type epsilon", "--prediction_type epsilon with {flow}"),
        ("{flow} --rescale_betas_zero_snr", "--rescale_betas_zero_snr True with {flow}"),
        ("{flow} --snr_gamma 5", "--snr_gamma 5.0 with {flow}: simple, hybrid, hyb"),
        (
            "{flow} --timestep_sampler second_moment",
            "--timestep_sampler second_moment with --objective",
        ),
        ("{flow} --ddpm_num_steps 10", "--ddpm_num_steps 10 with {flow}: simple"),
        ("--flow_shift 3", "--flow_shift 3.0 with --objective simple: flow_matching is allowed"),
        (
            "--flow_timestep_sampling uniform --objective hybrid",
            "--flow_timestep_sampling uniform with --objective hybrid",
        ),
        ("{flow} --flow_shift 0", "--flow_shift 0.0: 0.001 to 1000.0 is allowed"),
        ("{flow} --flow_shift 1e30", r"--flow_shift 1e\+30: 0.001 to 1000.0 is allowed"),
        ("--snr_gamma nan", "--snr_gamma nan: a finite number above 0 is allowed"),
        (
            "--snr_gamma 5 --objective bound",
            "--snr_gamma 5.0 with --objective bound.*hybrid_rescaled are allowed",
        ),
        (
            "--rescale_betas_zero_snr",
            "--prediction_type epsilon: with --rescale_betas_zero_snr .*sample are allowed",
        ),
        (
            "--rescale_betas_zero_snr --prediction_type sample --snr_gamma 5",
            "--snr_gamma 5.0 with --rescale_betas_zero_snr .*only one of the two is allowed",
        ),
        ("{dit}", "--model_config_name_or_path .*dit.json: a DiT.* with --class_conditional"),
        (
            "{dit} --class_conditional --resolution 9",
            "--resolution 9: the multiples of 2 are allowed for a network of patches of 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    train: Callable[..., Path], dit: Path, line: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    options = {"dit": f"--model_config_name_or_path {dit}", "flow": "--objective flow_matching"}
    with pytest.raises(SystemExit) as end:
        train("unet", line.format(**options), "refused")
    said = capsys.readouterr().err + str(end.value)
    assert re.search(message.format(**options), said), said
    assert not (dit.parent / "refused").exists()


# The transformer


def test_a_transformer_becomes_a_pipeline(train: Callable[..., Path], dit: Path) -> None:
    line = f"--class_conditional --model_config_name_or_path {dit} --max_train_steps 6 "
    line += "--sample_images 20 --prediction_type v_prediction --validation_samples 2"
    folder = train("unet", line)
    assert (folder / "samples-6.png").exists()
    pipeline = ClassifierGuidedPipeline.from_pretrained(folder)
    model = pipeline.unet
    assert type(model) is DiTTransformer2DModel and model.config.num_embeds_ada_norm == 10
    trained = train("classifier", "--max_train_steps 2", "classifier")
    classifier = NoiseAwareClassifier.from_pretrained(trained)
    images = {scale: sampled(pipeline, "c", classifier_free_scale=scale) for scale in (0.0, 50.0)}
    assert not torch.equal(images[0.0], images[50.0])
    guided = ClassifierGuidedPipeline.from_pretrained(folder, classifier=classifier)
    assert torch.equal(sampled(guided, "c"), images[0.0])
    assert not torch.equal(sampled(guided, "c", guidance_scale=5.0), images[0.0])

    # one step written out: the label it is told, and 10 where it's told none
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline = ClassifierGuidedPipeline(model, scheduler, id2label=pipeline.config.id2label)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    for told, label in (
        ([3, 7], {"label": [3, 7]}),
        ([10, 10], {}),
        ([10, 10], {"label": [3, 7], "conditional": False, "guidance_scale": 0.0}),
    ):
        got = sampled(pipeline, num_inference_steps=1, latents=noise, **label)
        scheduler.set_timesteps(1)
        t = scheduler.timesteps[0]
        with torch.no_grad():
            output = model(noise, t.expand(2), class_labels=torch.tensor(told)).sample
        torch.testing.assert_close(got, scheduler.step(output, t, noise).prev_sample)


def test_the_config_of_the_transformer() -> None:
    """DiT-S/2 for Fashion-MNIST; its blocks are 33 million weights, and each has a timestep's embedding of its own."""
    config = json.loads((TRAINING / "configs" / "dit_small.json").read_text())
    assert config.pop("_class_name") == DiTTransformer2DModel.__name__
    shape = {"sample_size": 28, "in_channels": 1, "out_channels": 1, "num_embeds_ada_norm": 10}
    with torch.device("meta"):
        model = DiTTransformer2DModel(**config, **shape)
    assert 30e6 < sum(parameter.numel() for parameter in model.parameters()) < 40e6


def test_a_transformer_knows_its_variance(
    train: Callable[..., Path], dit: Path, place: Any
) -> None:
    line = f"--class_conditional --model_config_name_or_path {dit} --max_train_steps 2 "
    line += "--objective hybrid --ddpm_num_steps 5 --bits_per_dim_images 3 "
    line += "--ddpm_beta_schedule squaredcos_cap_v2"  # 5 linear steps never reach noise
    folder = train("unet", line)
    pipeline = ClassifierGuidedPipeline.from_pretrained(folder)
    scheduler = pipeline.scheduler.config
    assert pipeline.unet.config.out_channels == 2
    assert (scheduler.variance_type, scheduler.num_train_timesteps) == ("learned_range", 5)
    assert sampled(pipeline, "c").shape == (1, 1, 8, 8)
    assert json.loads((folder / "metrics.json").read_text())["bits_per_dim"] > 0


def test_a_transformer_starts_at_zero_and_drops_no_label_itself(
    train: Callable[..., Path], dit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the labels' embeddings move where the labels were told: the null label's if all are dropped, else not."""
    started = {}
    make = train_unet.make_denoiser

    def made(*args: Any) -> torch.nn.Module:
        model = make(*args)
        started.update(
            {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        )
        x, labels = torch.randn(2, 1, 8, 8), torch.zeros(2).long()
        with torch.no_grad():
            output = model.train()(x, torch.ones(2), class_labels=labels).sample
        assert not output.any()
        return model

    monkeypatch.setattr(train_unet, "make_denoiser", made)
    line = f"--class_conditional --model_config_name_or_path {dit} --no_use_ema "
    line += "--adam_weight_decay 0 "
    line += "--max_train_steps 12 --learning_rate 1e-2 --validation_samples 1 --label_dropout "
    for share in ("1.0", "0.0"):
        final = weights(train("unet", line + share, share))
        tables = [name for name in final if "embedding_table" in name]
        assert len(tables) == 2
        for name in tables:
            moved = (final[name] - started[name]).abs().amax(1) > 0
            assert moved[:10].any() == (share == "0.0") and moved[10] == (share == "1.0")
