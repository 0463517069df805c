"""Losses of training against OpenAI's guided-diffusion, and against what they must be."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import weights
from scipy.stats import norm
from test_openai_networks import REFERENCE, original, pair
from torch import Tensor

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.learning import losses
from guided_diffusers.learning.batches import generator_for
from guided_diffusers.learning.data import LabelledImages, load_splits
from guided_diffusers.learning.losses import (
    LossSecondMomentSampler,
    Process,
    bits_per_dim,
    diffusion_loss,
    discretized_log_likelihood,
    normal_kl,
    variational_bound,
)
from guided_diffusers.openai import (
    ADMDDPMScheduler,
    convert_scheduler,
    join_low_resolution,
    respaced_timesteps,
)


def load(name: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array) for key, array in np.load(REFERENCE / name).items()}


def described(file: str, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(case, its arguments) of the arrays "case|what" of a file."""
    for entry in json.loads((REFERENCE / "index.json").read_text()):
        case, _, name = entry["key"].partition("|")
        if entry["file"] == file and name == what:
            yield case, entry["args"]


def network(name: str) -> torch.nn.Module:
    state, args = original(name)
    return pair(name)[0](state, args).double()


def process_for(diffusion: dict[str, Any]) -> Process:
    scheduler = ADMDDPMScheduler.from_config(convert_scheduler(diffusion).config)
    return Process(scheduler, respaced_timesteps(1000, diffusion.get("timestep_respacing", "")))


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs() / expected.abs().clamp(min=1e-12)).max().item()


# 1. The numbers of the original


def test_noised_images() -> None:
    inputs, reference = load("inputs.npz"), load("training/q_sample.npz")
    eps = torch.cat([inputs["noise"][0], inputs["noise"][1]])
    for entry in json.loads((REFERENCE / "index.json").read_text()):
        if entry["file"] == "training/q_sample.npz":
            process = process_for(entry["args"])
            got = process.noised(inputs["x0"], eps, torch.tensor(entry["args"]["t"]))
            torch.testing.assert_close(got, reference[entry["key"]].to(got), rtol=0, atol=1e-6)


def test_losses_and_gradients() -> None:
    inputs, reference = load("inputs.npz"), load("training/losses.npz")
    x0, eps = inputs["x0"].double(), torch.cat([inputs["noise"][0], inputs["noise"][1]]).double()
    networks: dict[str, torch.nn.Module] = {}
    print("\nlosses of the original, largest relative differences (float64)")
    for case, args in described("training/losses.npz", "loss_f64"):
        diffusion, name = args["diffusion"], args["model"]
        if diffusion.get("use_kl"):
            objective = "bound"
        elif not diffusion.get("learn_sigma"):
            objective = "simple"
        else:
            objective = "hybrid_rescaled" if diffusion.get("rescale_learned_sigmas") else "hybrid"
        model = networks.setdefault(name, network(name))
        process, k = process_for(diffusion), torch.tensor(args["t"])
        x_t = process.noised(x0, eps, k)
        if name == "sr":
            small = torch.nn.functional.interpolate(x0, scale_factor=0.5, mode="area")
            x_t = join_low_resolution(x_t, small)
        labels = inputs["y4"] if model.config.num_class_embeds else None
        model.zero_grad()
        output = model(x_t, process.timesteps[k], class_labels=labels).sample
        got = diffusion_loss(process, output, x0, eps, k, objective)
        got["loss"].mean().backward()
        errors = {}
        for what in ("loss", "mse", "vb"):
            if (key := f"{case}|{what}_f64") in reference:
                errors[what] = relative(got[what], reference[key])
        for layer, ours in (("out.2", "conv_out"), ("input_blocks.0.0", "conv_in")):
            expected = reference[f"{case}|grad|{layer}.weight"]
            grad = model.get_submodule(ours).weight.grad
            errors[f"grad {layer}"] = ((grad - expected).abs().max() / expected.abs().max()).item()
        print(f"{case:20}", {what: f"{error:.1e}" for what, error in errors.items()})
        assert max(errors.values()) < 1e-5, case


def test_bits_per_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, reference = load("inputs.npz"), load("training/bpd.npz")
    networks: dict[str, torch.nn.Module] = {}
    print("\nbits a dimension of the original, largest relative differences (of float64")
    for case, args in described("training/bpd.npz", "total_bpd_f64"):
        model = networks.setdefault(args["model"], network(args["model"]))
        process = process_for(args["diffusion"])
        labels = inputs["y4"][:2] if model.config.num_class_embeds else None
        for dtype in (torch.float64, torch.float32):
            noise = iter(inputs["noise"])
            monkeypatch.setattr(losses, "randn_tensor", lambda *_, noise=noise: next(noise))
            got = bits_per_dim(
                model.to(dtype), process, inputs["x0"][:2], labels, clip=args["clip_denoised"]
            )
            names = {"total": "total_bpd", "prior": "prior_bpd", "bound": "vb"}
            names |= {"x0_mse": "xstart_mse", "eps_mse": "mse"}
            errors = {}
            for ours, theirs in names.items():
                value = got[ours].flip(1) if got[ours].ndim > 1 else got[ours]
                errors[ours] = relative(value, reference[f"{case}|{theirs}_f64"])
            print(f"{case:16} {dtype}", {what: f"{error:.1e}" for what, error in errors.items()})
            assert max(errors.values()) < 1e-5, case
        model.double()


def test_likelihood_and_divergence_of_gaussians() -> None:
    reference = load("training/bpd.npz")
    x, mean, log_sigma = (reference[f"dgll|{name}"] for name in ("x", "means", "log_scales"))
    assert relative(discretized_log_likelihood(x, mean, log_sigma), reference["dgll|out"]) < 1e-9
    kl = normal_kl(mean, 2 * log_sigma, x, reference["kl|logvar2"])
    assert relative(kl, reference["kl|out"]) < 1e-9


@pytest.mark.parametrize(
    ("case", "steps", "history", "uniform"), [("T8_h10", 8, 10, 0.001), ("T5_h3_u05", 5, 3, 0.05)]
)
def test_second_moment_sampler(case: str, steps: int, history: int, uniform: float) -> None:
    reference = load("training/resampler.npz")
    sampler = LossSecondMomentSampler(steps, history, uniform)
    rows = [sampler.probabilities()]
    for t, loss in zip(reference[f"{case}|event_t"], reference[f"{case}|event_loss"], strict=True):
        sampler.update(t[None], loss[None])
        rows.append(sampler.probabilities())
    weights = reference[f"{case}|weights"]
    assert relative(torch.stack(rows), weights / weights.sum(dim=1, keepdim=True)) < 1e-9
    assert relative(rows[-1], reference[f"{case}|final_p"]) < 1e-9
    k, weight = sampler.sample(20_000, torch.Generator().manual_seed(0))
    drawn = reference[f"{case}|sample_t"]
    expected = reference[f"{case}|sample_weight"].double()
    assert relative(1 / (steps * rows[-1][drawn]), expected) < 1e-6
    torch.testing.assert_close(weight, (1 / (steps * rows[-1][k])).float())
    assert (torch.bincount(k, minlength=steps) / 20_000 - rows[-1]).abs().max() < 0.015
    again = LossSecondMomentSampler(steps, history, uniform)
    again.load_state_dict(sampler.state_dict())
    assert torch.equal(again.probabilities(), rows[-1])
    one, other = (x.sample(50, torch.Generator().manual_seed(1))[0] for x in (again, sampler))
    assert torch.equal(one, other)


# 2. What they must be


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_prediction_has_no_loss(prediction_type: str) -> None:
    process = Process(DDPMScheduler(prediction_type=prediction_type, variance_type="fixed_small"))
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(3, 1, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    eps = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    k = torch.tensor([1, 500, 999])
    x_t, target = process.noised(x0, eps, k), process.target(x0, eps, k)
    torch.testing.assert_close(process.denoised(target, x_t, k), x0, rtol=1e-6, atol=1e-6)
    assert diffusion_loss(process, target, x0, eps, k)["loss"].max() < 1e-12
    assert variational_bound(process, target, x0, x_t, k).abs().max() < 1e-6


def test_steps_and_variances_of_a_shorter_process_compose() -> None:
    """x_s drawn from q(x_s | x_t, x0) with x_t from q(x_t | x0) has the moments of q(x_s | x0)."""
    process = Process(DDPMScheduler(variance_type="fixed_small"), range(0, 1000, 40))
    k, like = torch.arange(1, len(process)), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    names = ("alpha", "sigma", "c_0", "c_t", "small")
    alpha, sigma, c_0, c_t, small = (x.flatten() for x in process.at(k, like, *names))
    alpha_s, sigma_s = (x.flatten() for x in process.at(k - 1, like, "alpha", "sigma"))
    torch.testing.assert_close(c_0 + c_t * alpha, alpha_s)
    torch.testing.assert_close((c_t * sigma).square() + small, sigma_s.square())


def test_discretized_likelihood_is_a_distribution() -> None:
    """Its 256 masses add up to 1, and are the Gaussian's up to the tanh approximation."""
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, sigma in ((0.1, 0.05), (-0.97, 0.3)):
        log_sigma = torch.tensor(sigma).double().log()
        got = discretized_log_likelihood(x, torch.tensor(mean), log_sigma).exp()
        edges = np.concatenate([[-np.inf], (x[1:] - 1 / 255).numpy(), [np.inf]])
        assert abs(got.sum().item() - 1) < 1e-6
        np.testing.assert_allclose(got.numpy(), np.diff(norm.cdf(edges, mean, sigma)), atol=4e-4)


def test_hybrid_teaches_the_mean_by_mse_alone() -> None:
    process = Process(DDPMScheduler(variance_type="learned_range"))
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(2, 1, 4, 4, generator=generator) * 2 - 1
    eps = torch.randn(2, 1, 4, 4, generator=generator)
    output = torch.randn(2, 2, 4, 4, generator=generator, requires_grad=True)
    k = torch.tensor([3, 700])
    terms = diffusion_loss(process, output, x0, eps, k, "hybrid")
    (grad,) = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    assert not grad[:, :1].any() and grad[:, 1:].any()
    shorter = Process(DDPMScheduler(variance_type="learned_range"), range(0, 1000, 2))
    rescaled, half = (
        diffusion_loss(shorter, output, x0, eps, k // 2, objective)
        for objective in ("hybrid_rescaled", "hybrid")
    )
    torch.testing.assert_close(rescaled["vb"], half["vb"] / 2)


def test_objectives_that_do_not_fit_are_refused() -> None:
    process = Process(DDPMScheduler(variance_type="learned_range"))
    x0, k = torch.zeros(1, 3, 4, 4), torch.tensor([5])
    for channels, objective, message in (
        (6, "simple", "a learned variance"),
        (3, "hybrid", "no learned variance"),
        (3, "mse", "objective 'mse': simple, hybrid"),
        (5, "hybrid", "5 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            diffusion_loss(process, torch.zeros(1, channels, 4, 4), x0, x0, k, objective)


# 3. In the training script


def test_a_network_is_trained_to_know_its_variance(train: Callable[..., Path], place: Any) -> None:
    line = "--objective hybrid_rescaled --ddpm_num_steps 5 --max_train_steps 2 "
    line += "--ddpm_beta_schedule squaredcos_cap_v2 "  # 5 linear steps never reach noise
    folder = train("unet", line + "--bits_per_dim_images 3")
    pipeline = ClassifierGuidedPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline.unet.config.out_channels == 2
    assert pipeline(num_inference_steps=2, output_type="pt").images.shape == (1, 1, 8, 8)
    held_out = LabelledImages(load_splits(place.folder)["test"], resolution=8, center_crop=True)
    images = torch.stack([held_out[i]["pixel_values"] for i in (0, 4, 8)])
    noise = [generator_for(0, 4, i) for i in range(3)]
    bits = bits_per_dim(pipeline.unet, Process(pipeline.scheduler), images, generator=noise)
    expected = pytest.approx(bits["total"].mean().item(), rel=1e-5)
    assert json.loads((folder / "metrics.json").read_text())["bits_per_dim"] == expected


def test_the_samplers_history_is_part_of_a_checkpoint(train: Callable[..., Path]) -> None:
    line = "--objective bound --timestep_sampler second_moment --ddpm_num_steps 2 --checkpointing_steps 8"
    whole = train("unet", f"{line} --max_train_steps 10", "whole")
    train("unet", f"{line} --max_train_steps 8", "resumed")
    line += " --max_train_steps 10 --resume_from_checkpoint latest"
    resumed = train("unet", line, "resumed")
    state = torch.load(whole / "checkpoint-8" / "custom_checkpoint_0.pkl", weights_only=True)
    sampler = LossSecondMomentSampler(2)
    sampler.load_state_dict(state)
    assert (sampler.probabilities() - 0.5).abs().max() > 0.01  # it had warmed up
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight), name
