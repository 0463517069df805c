"""Noise levels and predictions: the table of coefficients, levels read from schedulers, variances."""

from __future__ import annotations

from math import cos, hypot, log, sin, sqrt
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import Clock, Mixture, OracleUNet
from diffusers import DDPMScheduler
from test_schedulers import CASES, Case

from guided_diffusers import ClassifierGuidedPipeline, NoiseLevel, noise_levels
from guided_diffusers.noise import (
    OUT_OF_REACH,
    TrainedSchedule,
    posterior_variance,
    prediction_type,
    reads_variance,
    sampling_timesteps,
    schedule_config,
    split_variance,
    x0_coefficients,
)

VP, VE, FLOW, TRIG = "variance preserving", "alpha = 1", "alpha = 1 - sigma", "cos, sin"
SPACES = {
    VP: [(cos(u), sin(u)) for u in (0.01, 0.7, 1.56)],
    VE: [(1.0, s) for s in (0.01, 1.0, 80.0)],
    FLOW: [(1 - s, s) for s in (0.01, 0.5, 0.999)],
    TRIG: [(cos(u), 0.5 * sin(u)) for u in (0.01, 0.7, 1.5)],
}
KARRAS = {"sigma_data": 0.5, "sigma_min": 0.002}


def definition(
    prediction: str, x0: torch.Tensor, eps: torch.Tensor, alpha: float, sigma: float
) -> torch.Tensor:
    """What a network predicts, from its paper: x_t = alpha x0 + sigma eps."""
    x_t, norm, data = alpha * x0 + sigma * eps, hypot(alpha, sigma), KARRAS["sigma_data"]
    match prediction:
        case "epsilon":
            return eps
        case "sample":
            return x0
        case "v_prediction":  # alpha eps - sigma x0, of the variance-preserving alpha and sigma
            return (alpha * eps - sigma * x0) / norm
        case "flow":
            return eps - x0
        case "data_flow":
            return x0 - eps
        case (
            "edm_epsilon" | "edm_v_prediction"
        ):  # D = c_skip x + c_out F; Diffusers' v has the other sign
            skip, out = data**2 / (sigma**2 + data**2), sigma * data / sqrt(sigma**2 + data**2)
            return (x0 - skip * x_t) / out * (1 if prediction == "edm_epsilon" else -1)
        case "consistency":
            late = sigma - KARRAS["sigma_min"]
            return (x0 - data**2 / (late**2 + data**2) * x_t) / (
                late * data / sqrt(sigma**2 + data**2)
            )
        case "score":
            return -eps / sigma
        case "trigflow":  # dx_t / dt of x_t = cos(t) x0 + sin(t) sigma_d eps
            return alpha * data * eps - sigma / data * x0
    raise AssertionError(prediction)


TABLE = [
    (prediction, space)
    for prediction, spaces in {
        "epsilon": (VP, VE, FLOW),
        "sample": (VP, VE, FLOW),
        "v_prediction": (VP, VE),
        "flow": (FLOW,),
        "data_flow": (FLOW,),
        "score": (VP, VE, FLOW),
        "edm_epsilon": (VE,),
        "edm_v_prediction": (VE,),
        "consistency": (VE,),
        "trigflow": (TRIG,),
    }.items()
    for space in spaces
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("prediction", "space"), TABLE)
def test_output_x0_and_score_say_the_same(prediction: str, space: str) -> None:
    x0, eps, shift = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), normal(2, 3, 4, 4, seed=2)
    for alpha, sigma in SPACES[space]:
        level = NoiseLevel(alpha, sigma, *x0_coefficients(prediction, alpha, sigma, **KARRAS))
        x_t, output = alpha * x0 + sigma * eps, definition(prediction, x0, eps, alpha, sigma)
        close = {"rtol": 1e-9, "atol": 1e-9 / alpha}
        torch.testing.assert_close(level.x0(x_t, output), x0, **close)
        torch.testing.assert_close(level.output(x_t, x0) * level.b, output * level.b, **close)
        torch.testing.assert_close(
            level.score(x_t, x0), -eps / sigma, rtol=1e-9, atol=1e-9 / sigma**2
        )
        moved = level.x0(x_t, level.corrected(output, shift))
        torch.testing.assert_close(moved - x0, sigma**2 / alpha * shift, **close)
        torch.testing.assert_close(
            level.score(x_t, moved), -eps / sigma + shift, rtol=1e-9, atol=1e-9 / sigma**2
        )


def test_epsilon_is_corrected_as_in_algorithm_2() -> None:
    level = NoiseLevel(0.6, 0.8, *x0_coefficients("epsilon", 0.6, 0.8))
    output, shift = normal(1, 1, 4, 4), normal(1, 1, 4, 4, seed=1)
    torch.testing.assert_close(level.corrected(output, shift), output - 0.8 * shift)


def test_without_noise_and_where_the_output_has_no_say_nothing_is_corrected() -> None:
    output = normal(1, 1, 4, 4)
    clean = NoiseLevel(1.0, 0.0, *x0_coefficients("epsilon", 1.0, 0.0))
    boundary = NoiseLevel(
        1.0, 0.002, *x0_coefficients("consistency", 1.0, 0.002, **KARRAS)
    )  # c_out = 0 at sigma_min
    assert boundary.b == 0
    for level in (clean, boundary):
        assert torch.equal(level.corrected(output, torch.ones_like(output)), output)


def test_half_precision_output_gives_x0_and_correction_in_single_precision() -> None:
    """At t = 999 an epsilon network's x0 is a difference of numbers of about 150: half precision has no digits left."""
    abar = float(DDPMScheduler().alphas_cumprod[-1])
    alpha, sigma = sqrt(abar), sqrt(1 - abar)
    level, x_t = (
        NoiseLevel(alpha, sigma, *x0_coefficients("epsilon", alpha, sigma)),
        normal(1, 1, 8, 8).float(),
    )
    output = normal(1, 1, 8, 8, seed=1).half()
    x0 = level.x0(x_t, output)
    torch.testing.assert_close(
        x0, level.x0(x_t.double(), output.double()).float(), rtol=1e-4, atol=1e-3
    )
    assert level.corrected(output, x_t).dtype == torch.float16


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(
        ValueError, match="prediction 'noise' is not one of epsilon, sample, v_prediction"
    ):
        x0_coefficients("noise", 0.6, 0.8)
    with pytest.raises(
        ValueError, match="prediction_type='noise' in the config of DDPMScheduler: epsilon, sample"
    ):
        prediction_type(DDPMScheduler(prediction_type="noise"))
    with pytest.raises(
        ValueError, match="use_flow_sigmas=True; use 'flow_prediction', 'epsilon' or 'sample'"
    ):
        prediction_type(
            diffusers.DPMSolverMultistepScheduler(
                prediction_type="v_prediction", use_flow_sigmas=True
            )
        )


def levels_of(scheduler: Any, steps: int = 10) -> list[NoiseLevel]:
    scheduler.set_timesteps(steps)
    return noise_levels(scheduler)


def test_levels_are_those_of_the_formulas() -> None:
    abar = DDPMScheduler().alphas_cumprod.double()
    for name in ("DDPM", "DDIM", "DPMSolverMultistep", "UniPCMultistep", "PNDM"):
        scheduler = getattr(diffusers, f"{name}Scheduler")()
        levels = levels_of(scheduler)
        expected = abar[scheduler.timesteps]
        torch.testing.assert_close(
            torch.tensor([level.alpha for level in levels]).double(),
            expected.sqrt(),
            rtol=1e-5,
            atol=0,
        )
        torch.testing.assert_close(
            torch.tensor([level.sigma for level in levels]).double(),
            (1 - expected).sqrt(),
            rtol=1e-4,
            atol=0,
        )
    for name in ("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "HeunDiscrete"):
        scheduler = getattr(diffusers, f"{name}Scheduler")()
        assert [(v.alpha, v.sigma) for v in levels_of(scheduler)] == [
            (1.0, float(s)) for s in scheduler.sigmas[:-1]
        ]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = levels_of(scheduler)
    assert [v.sigma for v in levels] == [float(s) for s in scheduler.sigmas[:-1]]
    assert levels[0].alpha == 2.0**-24 and all(v.alpha == 1 - v.sigma for v in levels[1:])
    scheduler = diffusers.EDMEulerScheduler()
    assert [v.sigma for v in levels_of(scheduler)] == [float(s) for s in scheduler.sigmas[:-1]]


def test_x0_is_the_schedulers_own() -> None:
    """For each configuration of test_schedulers.py whose step tells the x0 that it used, at its first steps."""
    checked = set()
    for case in CASES:
        scheduler = getattr(diffusers, case.scheduler)(**case.config)
        scheduler.set_timesteps(case.call.get("num_inference_steps", 6))
        timesteps, levels = sampling_timesteps(scheduler), noise_levels(scheduler)
        if (
            "Wuerstchen" in case.scheduler
            or "old_pred_original_sample" in scheduler.step.__code__.co_varnames
        ):
            continue
        sample = normal(2, 1, 4, 4)
        for index, (t, level) in enumerate(zip(timesteps[:3], levels[:3], strict=True)):
            output = normal(2, 1, 4, 4, seed=index + 1)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, t)
            result = scheduler.step(output, t, sample)
            if getattr(result, "pred_original_sample", None) is not None:
                x0 = level.x0(sample, output)
                torch.testing.assert_close(
                    x0,
                    result.pred_original_sample.double(),
                    rtol=2e-3,
                    atol=2e-3 / level.alpha,
                    msg=lambda text, case=case: f"{case.name}: {text}",
                )
                checked.add(case.scheduler)
            sample = result.prev_sample.double()
    assert {
        "DDPMScheduler",
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "EDMEulerScheduler",
        "LMSDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "SCMScheduler",
    } <= checked


def test_reading_levels_leaves_the_scheduler_at_its_first_step() -> None:
    x, output = normal(1, 1, 4, 4).float(), normal(1, 1, 4, 4, seed=1).float()
    for name in (
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2Discrete",
        "DPMSolverMultistep",
        "UniPCMultistep",
        "DDIM",
        "FlowMatchEulerDiscrete",
        "EDMEuler",
        "LMSDiscrete",
        "DPMSolverSinglestep",
    ):
        read, untouched = (getattr(diffusers, f"{name}Scheduler")() for _ in range(2))
        levels_of(read)
        untouched.set_timesteps(10)
        a, b = x, x
        for t in read.timesteps[:4]:
            for scheduler in (read, untouched):
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(x, t)
            a = read.step(output, t, a).prev_sample
            b = untouched.step(output, t, b).prev_sample
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "SASolver"]
)
def test_a_duplicated_first_timestep_is_harmless(name: str) -> None:
    """A large flow shift rounds the first two timesteps to the same; alone, Diffusers starts at the second then."""
    case = Case(
        f"{name}Scheduler",
        "flow",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 12.0},
    )
    scheduler = getattr(diffusers, case.scheduler)(**case.config)
    levels = levels_of(scheduler, 100)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    assert [level.sigma for level in levels] == [float(s) for s in scheduler.sigmas[:-1]]
    mixture = Mixture()
    pipeline = ClassifierGuidedPipeline(OracleUNet(mixture, "flow", Clock("flow"), 1), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        num_images_per_label=8,
        num_inference_steps=100,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert (images.mean(0) - mixture.means[1]).abs().mean() < 0.2


# the classifier's schedule

LINEAR = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
}
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


@pytest.mark.parametrize("config", [LINEAR, COSINE])
def test_the_same_schedule_gives_its_own_integers_back(config: dict[str, Any]) -> None:
    schedule = TrainedSchedule(config)
    for name in ("DDPM", "DDIM"):
        scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
        scheduler.set_timesteps(1000)
        assert [
            schedule.timestep(level) for level in noise_levels(scheduler)
        ] == scheduler.timesteps.tolist()
    euler = diffusers.EulerDiscreteScheduler(**config, timestep_spacing="trailing")
    euler.set_timesteps(50)
    assert [schedule.timestep(level) for level in noise_levels(euler)] == euler.timesteps.tolist()


def ratio_level(ratio: float) -> NoiseLevel:
    return NoiseLevel(1.0, ratio, 1.0, -ratio)


def test_between_its_levels_the_timestep_is_fractional_and_rises() -> None:
    schedule = TrainedSchedule(LINEAR)
    times = [schedule.timestep(ratio_level(r)) for r in np.geomspace(1e-3, 300, 500)]
    assert (
        times[0] == 0
        and times[-1] == 999
        and all(a <= b for a, b in zip(times, times[1:], strict=False))
    )
    inside = [t for t in times if 0 < t < 999]
    assert len(set(inside)) == len(inside) > 300 and sum(t != round(t) for t in inside) > 250
    half = schedule.timestep(
        ratio_level(float(np.exp((schedule.log_ratio[400] + schedule.log_ratio[401]) / 2)))
    )
    assert half == pytest.approx(400.5)


def test_a_linear_classifier_for_a_cosine_network_is_asked_at_the_same_noise() -> None:
    schedule, abar = TrainedSchedule(LINEAR), DDPMScheduler(**LINEAR).alphas_cumprod.double()
    scheduler = DDPMScheduler(**COSINE)
    scheduler.set_timesteps(20)
    for t, level in zip(scheduler.timesteps.tolist(), noise_levels(scheduler), strict=True):
        found = schedule.timestep(level)
        around = [log((1 - abar[i]) / abar[i]) / 2 for i in (int(found), min(int(found) + 1, 999))]
        wanted = log(level.sigma / level.alpha)
        assert around[0] - 1e-4 <= wanted <= around[1] + 1e-4 or found in (0.0, 999.0), (t, found)
        assert found != t or t == 0


def test_without_noise_the_timestep_is_zero() -> None:
    level = NoiseLevel(1.0, 0.0, 1.0, 0.0)
    assert (
        TrainedSchedule(LINEAR).timestep(level) == 0
        and TrainedSchedule(LINEAR).extrapolation_scale(level) == 1
    )


def test_beyond_the_noisiest_level_the_shift_of_x0_saturates() -> None:
    schedule = TrainedSchedule(LINEAR)
    last = float(np.exp(schedule.log_ratio[-1]))
    for inside in (0.01, 1.0, last * (1 - 1e-9)):
        assert schedule.extrapolation_scale(ratio_level(inside)) == 1
    assert schedule.extrapolation_scale(ratio_level(last * (1 + 1e-6))) == pytest.approx(
        1, abs=1e-5
    )

    def shift(alpha: float, sigma: float) -> float:
        """Of x0 by a gradient 1 of the classifier's input: sigma^2 / alpha * score."""
        return (
            sigma**2
            / alpha
            * schedule.extrapolation_scale(NoiseLevel(alpha, sigma, 1.0, 1.0))
            / hypot(alpha, sigma)
        )

    at_last = last**2 / sqrt(1 + last**2)
    for ratio in (last * 1.01, 10 * last, 1e4 * last):
        for norm in (1.0, hypot(1, ratio)):  # k-diffusion's space, and variance preserving
            assert shift(1 / norm, ratio / norm) == pytest.approx(at_last)


def test_a_classifier_without_a_schedule_is_refused() -> None:
    module = torch.nn.Linear(1, 1)
    for config in ({}, {"num_train_timesteps": 1000}, {"beta_schedule": "linear", "num_labels": 3}):
        module.config = config
        with pytest.raises(
            ValueError, match="config must hold the noise schedule that it was trained with"
        ):
            schedule_config(module)
    module.config = {
        "num_train_timesteps": 10,
        "trained_betas": [0.01] * 10,
        "num_labels": 3,
        "beta_schedule": None,
    }
    assert schedule_config(module) == {"num_train_timesteps": 10, "trained_betas": [0.01] * 10}
    assert len(TrainedSchedule(schedule_config(module)).log_ratio) == 10


# what can't be guided


def build(name: str) -> Any:
    """The scheduler, with what it has no default for."""
    needed = {
        "VQDiffusionScheduler": {"num_vec_classes": 8},
        "AmusedScheduler": {"mask_token_id": 7},
        "RFD4ProteinaScheduler": {
            "schedule_mode": "log",
            "noise_mode": "1/t",
            "tsr_k": 1.0,
            "tsr_sigma": 1.0,
        },
    }
    cls = getattr(diffusers, name, None) or getattr(diffusers.schedulers, name)
    return cls(**needed.get(name, {}))


@pytest.mark.parametrize("name", sorted(OUT_OF_REACH))
def test_what_cannot_be_guided_is_refused_before_the_first_step(name: str) -> None:
    unet = OracleUNet(Mixture(), "epsilon", Clock())
    pipeline = ClassifierGuidedPipeline(unet, build(name))
    with pytest.raises(ValueError, match=f"scheduler {name} can't be guided: i"):
        pipeline(num_inference_steps=4)
    assert unet.calls == 0


def test_every_scheduler_of_diffusers_is_guided_or_refused() -> None:
    """A new one in a new release shows here, not in wrong images."""
    names = {
        name
        for name in dir(diffusers)
        if name.endswith("Scheduler") and not name.startswith("Flax")
    }
    known = {case.scheduler for case in CASES} | set(OUT_OF_REACH)
    assert names - known == set()


# variances


def test_learned_variance_is_split_off_and_other_counts_refused() -> None:
    output = normal(2, 6, 4, 4)
    prediction, variance = split_variance(output, 3)
    assert torch.equal(prediction, output[:, :3]) and torch.equal(variance, output[:, 3:])
    assert split_variance(output, 6) == (output, None)
    for channels in (1, 2, 4, 5):
        with pytest.raises(
            ValueError,
            match=f"6 channels for a sample of {channels}; {channels} or, with a learned",
        ):
            split_variance(output, channels)


def test_who_reads_a_learned_variance() -> None:
    for variance_type in ("learned", "learned_range"):
        assert reads_variance(DDPMScheduler(variance_type=variance_type))
    assert reads_variance(diffusers.UnCLIPScheduler(variance_type="learned_range"))
    assert not reads_variance(DDPMScheduler(variance_type="fixed_small"))
    assert not reads_variance(diffusers.DDIMScheduler())


@pytest.mark.parametrize(
    "variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"]
)
@pytest.mark.parametrize("timesteps", [None, [999, 700, 350, 20]])
def test_the_variance_is_ddpms_own(variance_type: str, timesteps: list[int] | None) -> None:
    """But in the last step, to the data, which has none: there guidance takes what Dhariwal & Nichol's code has."""
    scheduler = DDPMScheduler(variance_type=variance_type)
    scheduler.set_timesteps(None if timesteps else 20, timesteps=timesteps)
    numbers = scheduler.timesteps.tolist()
    for index, t in enumerate(numbers[:-1]):
        learned = normal(2, 1, 4, 4, seed=index).tanh()
        own = scheduler._get_variance(t, predicted_variance=learned)
        if variance_type == "fixed_small_log":  # Diffusers gives the standard deviation here,
            own = own**2
        elif variance_type == "learned_range":  # and the logarithm here
            own = own.exp()
        ours = torch.as_tensor(posterior_variance(scheduler, numbers, index, learned)).double()
        torch.testing.assert_close(
            ours, own.double().broadcast_to(ours.shape), rtol=2e-3, atol=1e-9
        )
    last = posterior_variance(scheduler, numbers, len(numbers) - 1, torch.zeros(1))
    assert (
        float(last) == 0
        if "small" in variance_type or variance_type == "learned"
        else 0 < float(last) < 0.01
    )


def test_flow_matching_up_to_sigma_80_is_variance_exploding() -> None:
    """As Cosmos 2 sets it up: the noise of x0 + sigma eps leads back to x0, at each of its levels."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0)
    scheduler.set_timesteps(sigmas=torch.linspace(0, 1, 5, dtype=torch.float64))
    x0, eps = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator())
    levels = noise_levels(scheduler)
    assert [level.alpha for level in levels] == [1.0] * 5 and levels[0].sigma > 70
    sample = x0 + levels[0].sigma * eps
    for t, level in zip(scheduler.timesteps, levels, strict=True):
        torch.testing.assert_close(level.x0(sample, eps), x0, rtol=0, atol=1e-4)
        sample = scheduler.step(eps, t, sample, return_dict=False)[0].double()
    torch.testing.assert_close(sample, x0, rtol=0, atol=1e-4)
