"""Runs that can't end in images are refused, or warned of, and the images of every run are finite."""

from __future__ import annotations

import inspect
import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from test_guidance import Pull, normal, quiet, sample, small_classifier, small_unet
from test_schedulers import CASES

from guided_diffusers import (
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    EnergyGuidance,
    noise_levels,
)
from guided_diffusers.attach import guide
from guided_diffusers.guider import Guider
from guided_diffusers.noise import (
    TrainedSchedule,
    reads_variance,
    sampling_timesteps,
    scale_model_input,
    schedule_config,
    set_begin_index,
    starting_sigma,
    step_fn,
)
from guided_diffusers.run_checks import check_images
from guided_diffusers.schedule_checks import (
    accuracy_warning,
    check_custom_steps,
    ending_warning,
    starting_warning,
    stride_warning,
    timestep_warning,
)

SMOOTH = {"clip_sample": False, "clip_denoised": False, "skip_prk_steps": True}


def build(name: str, **config: Any) -> Any:
    """A scheduler with those of the config's entries that it has."""
    cls = getattr(diffusers, name)
    parameters = inspect.signature(cls.__init__).parameters
    config = {key: value for key, value in {**SMOOTH, **config}.items() if key in parameters}
    return cls(**config)


def noise_ratios(scheduler: Any) -> list[float]:
    """Before each step, for data that is 0: the sample's standard deviation over the level's sigma."""
    levels, ratios = noise_levels(scheduler), []
    set_begin_index(scheduler, 0)
    generator = torch.Generator().manual_seed(0)
    step = step_fn(scheduler, generator, 0.0, 1)
    x = torch.randn(1, 1, 64, 64, generator=generator, dtype=torch.float64)
    x = x / x.std() * float(starting_sigma(scheduler))
    for index, (t, level) in enumerate(zip(sampling_timesteps(scheduler), levels, strict=True)):
        ratios.append(float(x.std()) / level.sigma)
        scale_model_input(scheduler, x, t)
        output = level.output(x, torch.zeros_like(x)) if level.b else torch.zeros_like(x)
        if reads_variance(scheduler):
            output = torch.cat([output, torch.zeros_like(x)], dim=1)
        x = step(output, index, x).double()
    return ratios


@pytest.mark.parametrize("steps", [1, 2, 7, 10])
@pytest.mark.parametrize("name", sorted({case.scheduler for case in CASES}))
def test_the_samples_noise_is_that_of_the_level_or_a_warning_says_so(name: str, steps: int) -> None:
    """Closed form: with data 0 and the exact network, x_t = sigma_t eps before every step."""
    spaced = "timestep_spacing" in inspect.signature(getattr(diffusers, name).__init__).parameters
    for spacing in ("leading", "trailing", "linspace") if spaced else (None,):
        scheduler = build(name, timestep_spacing=spacing)
        try:
            scheduler.set_timesteps(steps)
        except (ValueError, ZeroDivisionError):  # SCM, UnCLIP
            continue
        levels = Guider(scheduler, ()).levels
        ratios = noise_ratios(scheduler)
        worst = max(max(ratio, 1 / ratio) for ratio in ratios)
        warnings = stride_warning(scheduler), starting_warning(scheduler, levels[0])
        if any(warnings):
            starts_with_image = levels[0].sigma < 3.2 * levels[0].alpha
            assert worst > 1.04 or starts_with_image, (spacing, warnings, worst)
        else:
            assert worst < 1.12, (spacing, ratios)  # sampling error of a stochastic scheduler


def test_the_warning_of_strides_follows_the_closed_form() -> None:
    """DDIM, 10 steps of "linspace": 5.8 times the noise at the last step."""
    for steps, times in ((10, 5.77), (600, 7.15)):
        scheduler = DDIMScheduler(timestep_spacing="linspace", clip_sample=False)
        scheduler.set_timesteps(steps)
        match = re.search(r"at timestep 0 the sample has ([\d.]+) times", stride_warning(scheduler))
        assert float(match[1]) == pytest.approx(times, rel=0.01)
        assert max(noise_ratios(scheduler)) == pytest.approx(times, rel=0.01)
        scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
        scheduler.set_timesteps(steps)
        assert (stride_warning(scheduler) is None) == (steps == 10)


def test_a_scheduler_with_a_step_of_its_own_is_not_warned_of() -> None:
    from guided_diffusers.openai import ADMDDIMScheduler

    scheduler = ADMDDIMScheduler(timestep_spacing="linspace", clip_sample=False)
    scheduler.set_timesteps(10)
    assert stride_warning(scheduler) is None
    assert noise_ratios(scheduler) == pytest.approx([1] * 10, rel=0.01)


def test_warnings_are_logged_by_the_pipeline_and_by_guide(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = DDIMScheduler(timestep_spacing="linspace", clip_sample=False)
    pipeline = quiet(small_unet(), scheduler)
    sample(pipeline, num_inference_steps=5)
    assert caplog.text.count("timestep_spacing='linspace'") == 1
    caplog.clear()
    plain = diffusers.DDIMPipeline(small_unet(), scheduler)
    plain.set_progress_bar_config(disable=True)
    with guide(plain, Pull(0.1)):
        plain(num_inference_steps=5, output_type="np")
    assert caplog.text.count("timestep_spacing='linspace'") == 1


@pytest.mark.parametrize(
    ("name", "config", "steps", "message"),
    [
        ("DDIMScheduler", {"steps_offset": 1}, 1000, "has 1000, .* 0 to 999; .*steps_offset=1"),
        ("PNDMScheduler", {"steps_offset": 1}, 1000, "has 1000, .* 0 to 999; .*steps_offset=1"),
        (
            "EulerDiscreteScheduler",
            {"steps_offset": 1, "timestep_spacing": "leading"},
            1000,
            "1000",
        ),
        (
            "DDPMScheduler",
            {"timestep_spacing": "leading"},
            1,
            "starts at sigma/alpha=0.01, .*trailing",
        ),
        (
            "EulerDiscreteScheduler",
            {"timestep_spacing": "linspace"},
            1,
            "starts at sigma/alpha=0.01",
        ),
        (
            "DPMSolverMultistepScheduler",
            {},
            1001,
            "num_inference_steps=1001: an integer from 1 to 1000 is allowed",
        ),
        (
            "DPMSolverMultistepScheduler",
            {"timestep_spacing": "leading"},
            1000,
            "repeat the noise level",
        ),
        ("UniPCMultistepScheduler", {}, 1000, "repeat the noise level of timestep"),
        (
            "LMSDiscreteScheduler",
            {"timestep_spacing": "trailing"},
            1001,
            "=1001: an integer from 1 to 1000",
        ),
        (
            "DPMSolverSDEScheduler",
            {"timestep_spacing": "trailing"},
            1001,
            "=1001: an integer from 1 to 1000",
        ),
        (
            "PNDMScheduler",
            {"timestep_spacing": "trailing"},
            1001,
            "=1001: an integer from 1 to 1000 is allowed",
        ),
        ("EDMEulerScheduler", {"sigma_data": 0.0}, 5, "sigma_data=0.0"),
        (
            "EDMEulerScheduler",
            {"sigma_min": 80.0, "sigma_max": 1.0},
            5,
            "noise of EDMEuler.* rises",
        ),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 0.0}, 5, "has no noise level"),
        ("UnCLIPScheduler", {}, 1, "num_inference_steps=1: UnCLIPScheduler can't take it"),
        ("DDIMScheduler", {"num_train_timesteps": 50, "trained_betas": [0.1] * 10}, 25, "0 to 9;"),
    ],
)
def test_steps_that_give_no_images_are_refused(
    name: str, config: dict[str, Any], steps: int, message: str
) -> None:
    pipeline = quiet(small_unet(), build(name, **config))
    with pytest.raises(ValueError, match=message):
        sample(pipeline, num_inference_steps=steps)


def test_latents_may_start_at_any_level() -> None:
    """An image with noise of that level, not noise: nothing is said of the start."""
    scheduler = DDPMScheduler(clip_sample=False)
    pipeline = quiet(small_unet(), scheduler)
    with pytest.raises(ValueError, match="timesteps or sigmas that start higher"):
        sample(pipeline, timesteps=[100, 50, 0])
    sample(pipeline, timesteps=[100, 50, 0], latents=normal(1, 1, 8, 8).float())


# noise schedules that are none

BETAS = [
    {"beta_start": 0.0, "beta_end": 0.0},
    {"beta_start": float("nan")},
    {"beta_start": 0.02, "beta_end": float("inf")},
    {"beta_start": -0.01, "beta_end": -0.001},
    {"beta_start": 0.5, "beta_end": 1.5},
    {"trained_betas": [0.0] * 1000},
    {"trained_betas": [0.1] * 999 + [float("nan")]},
    {"trained_betas": [0.01] * 500 + [-0.01] * 500},
]


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("name", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep", "LCM"])
def test_betas_that_are_no_noise_schedule_are_refused(name: str, betas: dict[str, Any]) -> None:
    pipeline = quiet(small_unet(), build(f"{name}Scheduler", beta_schedule="linear", **betas))
    with pytest.raises(
        ValueError, match="(beta_start|trained_betas)=.* is no noise schedule; betas"
    ):
        sample(pipeline, num_inference_steps=5)
    with pytest.raises(ValueError, match="is no noise schedule; betas from 0 to 1"):
        TrainedSchedule({"num_train_timesteps": 1000, "beta_schedule": "linear", **betas})


def test_a_first_beta_of_0_is_a_schedule() -> None:
    scheduler = DDIMScheduler(beta_start=0.0, clip_sample=False, timestep_spacing="trailing")
    images = sample(quiet(small_unet(), scheduler), num_inference_steps=5)
    assert images.isfinite().all()
    schedule = TrainedSchedule({"num_train_timesteps": 1000, "beta_start": 0.0})
    assert np.isfinite(schedule.log_ratio).all() and (np.diff(schedule.log_ratio) > 0).all()


# timesteps and sigmas of one's own

WRONG_STEPS = [
    [],
    [float("nan"), 100.0],
    [float("inf"), 100.0],
    [500, 600, 100],
    [900, 500, 500, 100],
    [900, 500, -5],
    [[900, 500], [300, 100]],
    ["a", "b"],
    [True, False],
    500,
    None,
]


@pytest.mark.parametrize("kind", ["list", "tuple", "array", "tensor"])
@pytest.mark.parametrize("steps", WRONG_STEPS[:-1], ids=str)
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("DDPMScheduler", "timesteps"),
        ("DPMSolverMultistepScheduler", "timesteps"),
        ("EulerDiscreteScheduler", "sigmas"),
        ("FlowMatchEulerDiscreteScheduler", "sigmas"),
        ("FlowMatchEulerDiscreteScheduler", "timesteps"),
    ],
)
def test_wrong_timesteps_and_sigmas_are_refused(
    name: str, argument: str, steps: Any, kind: str
) -> None:
    convert = {"list": list, "tuple": tuple, "array": np.asarray, "tensor": torch.tensor}[kind]
    if isinstance(steps, list) and not (
        kind == "tensor" and isinstance(steps[:1], list) and "a" in steps
    ):
        steps = convert(steps)
    unet = small_unet()
    unet.register_forward_hook(lambda *_: pytest.fail("the network was evaluated"))
    with pytest.raises(ValueError, match=f"^{argument}=|^timesteps, sigmas: "):
        sample(quiet(unet, build(name)), **{argument: steps})


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("DDPMScheduler", {"timesteps": [1000, 500, 0]}),
        ("DDPMScheduler", {"timesteps": [900.5, 500.5]}),
        ("LCMScheduler", {"timesteps": [1999, 500]}),
        ("HeunDiscreteScheduler", {"timesteps": [2000, 500]}),
        ("EulerDiscreteScheduler", {"sigmas": [1000.0, 10.0, 0.0]}),
        ("EulerDiscreteScheduler", {"sigmas": [100.0]}),
        ("FlowMatchEulerDiscreteScheduler", {"sigmas": [1.5, 1.0, 0.5]}),
        ("DDPMWuerstchenScheduler", {"timesteps": [900, 600, 300, 100]}),
    ],
)
def test_timesteps_and_sigmas_beyond_the_schedule_are_refused(name: str, call: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(call))}(=|, sigmas: )|^timesteps, sigmas: "):
        sample(quiet(small_unet(), build(name)), **call)


def test_right_timesteps_and_sigmas_of_any_kind_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    for name, argument, steps in (
        ("DDPMScheduler", "timesteps", [900, 500, 100]),
        ("EulerDiscreteScheduler", "timesteps", [900.5, 500.5, 100.5]),
        ("EulerDiscreteScheduler", "sigmas", [157.41, 10.0, 1.0, 0.0]),
        ("FlowMatchEulerDiscreteScheduler", "sigmas", [1.0, 0.5, 0.1]),
    ):
        pipeline = quiet(small_unet(), build(name))
        first, *others = (
            sample(pipeline, **{argument: convert(steps)})
            for convert in (list, tuple, np.asarray, torch.tensor)
        )
        assert all(torch.allclose(first, other, atol=1e-4) for other in others)
    assert "sigmas" not in caplog.text
    pipeline = quiet(small_unet(), EulerDiscreteScheduler())
    sample(pipeline, sigmas=[100.0, 10.0, 1.0])
    assert "takes the last one, 1, for the end of the run" in caplog.text
    assert ending_warning(pipeline.scheduler)


# noise predicted where there is nothing else

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("algorithm", ["output", "lie_trotter", "strang"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler"])
def test_epsilon_at_zero_terminal_snr_is_refused(name: str, algorithm: str) -> None:
    pipeline = quiet(small_unet(), build(name, **ZERO_SNR), small_classifier())
    for scale in (0.0, 1.0):
        call = {"guidance_scale": scale, "guidance_algorithm": algorithm, "num_inference_steps": 4}
        with pytest.raises(ValueError, match="prediction_type='epsilon': at timestep 999 of"):
            sample(pipeline, "cat", **call)
    right = build(name, **ZERO_SNR, prediction_type="v_prediction")
    pipeline = quiet(small_unet(), right, small_classifier())
    assert sample(pipeline, "cat", **call).isfinite().all()


@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DDIM"])
def test_one_step_of_epsilon_from_pure_noise_is_refused(name: str) -> None:
    """x0 = (x - sigma eps) / alpha with sigma / alpha = 4096 is the network's error, 4096-fold."""
    pipeline = quiet(small_unet(), build(f"{name}Scheduler", **ZERO_SNR, clip_sample=True))
    with pytest.raises(ValueError, match="prediction_type='epsilon': at timestep 999 of"):
        sample(pipeline, num_inference_steps=1)
    assert sample(pipeline, num_inference_steps=4).isfinite().all()


def test_epsilon_with_zero_terminal_snr_runs_where_pure_noise_is_no_level_of_the_run() -> None:
    for name in ("DDIMScheduler", "DDPMScheduler"):
        scheduler = build(name, rescale_betas_zero_snr=True, timestep_spacing="leading")
        assert sample(quiet(small_unet(), scheduler), num_inference_steps=10).isfinite().all()


def test_one_step_from_usual_noise_is_taken() -> None:
    for scheduler in (
        EulerDiscreteScheduler(timestep_spacing="trailing"),
        DDIMScheduler(timestep_spacing="trailing"),
        FlowMatchEulerDiscreteScheduler(),
        LCMScheduler(),
    ):
        assert sample(quiet(small_unet(), scheduler), num_inference_steps=1).isfinite().all()


def test_a_classifier_trained_on_pure_noise_is_evaluated_below_it() -> None:
    """Its own schedule ends at alpha = 0, where p(y | x) is p(y): its gradient there is only error."""
    betas = DDPMScheduler(rescale_betas_zero_snr=True).betas.tolist()
    for config in (
        {"trained_betas": betas},
        {"rescale_betas_zero_snr": True, "trained_betas": None},
    ):
        classifier = small_classifier(num_train_timesteps=1000, **{"trained_betas": None})
        classifier.register_to_config(**config)
        assert (
            "rescale_betas_zero_snr" not in config
            or schedule_config(classifier)["rescale_betas_zero_snr"]
        )
        scheduler = DDIMScheduler(**ZERO_SNR, prediction_type="v_prediction", clip_sample=False)
        scheduler.set_timesteps(4)
        pure_noise = noise_levels(scheduler)[0]
        schedule = ClassifierGuidance(classifier, 0).schedule
        assert schedule.timestep(pure_noise) == 998
        assert schedule.extrapolation_scale(pure_noise) < 1e-2
        assert TrainedSchedule(schedule_config(classifier)).timestep(pure_noise) == 999


# the final sample


class Broken(torch.nn.Module):
    """A network whose output for some images becomes NaN or infinite at some timesteps."""

    def __init__(self, rows: list[int], value: float = float("nan"), last_only: bool = False):
        super().__init__()
        self.unet, self.rows, self.value, self.last_only = small_unet(), rows, value, last_only
        self.config = self.unet.config

    def forward(self, sample: torch.Tensor, timestep: Any, **kwargs: Any) -> Any:
        output = self.unet(sample, timestep, **kwargs)
        broken = output[0].clone()
        if not self.last_only or float(timestep) < 100:
            broken[self.rows] = self.value
        return (broken,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_images_that_are_not_finite_are_named(
    value: float, last_only: bool, output_type: str
) -> None:
    pipeline = quiet(Broken([1, 3], value, last_only), DDIMScheduler(clip_sample=False))
    with pytest.raises(FloatingPointError, match="images 1, 3 of a batch of 4 are not") as caught:
        pipeline(num_images_per_label=4, num_inference_steps=3, output_type=output_type)
    assert caught.value.images == [1, 3]


def test_a_guided_run_names_them_too() -> None:
    """A term that stops before the images break; and where a callback or the decoder breaks them."""
    broken = Broken([0], last_only=True)
    pipeline = quiet(broken, DDIMScheduler(clip_sample=False), small_classifier())
    with pytest.raises(FloatingPointError, match="images 0 of a batch of 2") as caught:
        sample(pipeline, "cat", 2, guidance_stop=0.5, num_inference_steps=10)
    assert caught.value.images == [0]

    def breaks(pipeline: Any, index: int, t: Any, tensors: dict) -> dict:
        return {"latents": tensors["latents"] * float("nan")}

    pipeline = quiet(small_unet(), DDIMScheduler(clip_sample=False))
    with pytest.raises(FloatingPointError, match="images 0, 1 of a batch of 2"):
        sample(pipeline, None, 2, num_inference_steps=1 + 1, callback_on_step_end=breaks)


def test_half_precision_that_overflows_is_named() -> None:
    with pytest.raises(
        FloatingPointError, match="images 1 of .* after; .*float16 has a small range"
    ):
        check_images(torch.tensor([1.0, 7e4]).half()[:, None], "after")
    check_images(torch.tensor([1.0, 6e4]).half()[:, None], "after")


def test_a_decoder_that_breaks_an_image_is_named() -> None:
    from test_image_guidance import tiny_vae

    vae = tiny_vae()
    vae.decoder.register_forward_hook(lambda _, args, x: torch.cat([x[:1], x[1:] * float("inf")]))
    pipeline = quiet(small_unet(sample_size=4), DDIMScheduler(clip_sample=False), vae=vae)
    with pytest.raises(FloatingPointError, match="images 1 of a batch of 2 .* in the output"):
        pipeline(num_images_per_label=2, num_inference_steps=2)
    assert sample(pipeline, None, 2, num_inference_steps=2).isfinite().all()  # latents


def test_guide_names_the_images_of_a_foreign_pipeline() -> None:
    plain = diffusers.DDPMPipeline(small_unet(), DDPMScheduler(clip_sample=False))
    plain.set_progress_bar_config(disable=True)

    def breaks(module: Any, args: Any, output: Any) -> Any:
        if float(args[1]) == 0:
            output.sample[2] = float("nan")
        return output

    plain.unet.register_forward_hook(breaks)
    call = {"batch_size": 3, "num_inference_steps": 4, "output_type": "np"}
    with pytest.raises(FloatingPointError, match="images 2 of a batch of 3 are not") as caught:
        with guide(plain, Pull(0.1, 0.0, 0.5)):
            plain(**call)
    assert caught.value.images == [2]


def test_guide_looks_at_a_run_that_ends_before_its_last_step() -> None:
    x = normal(2, 1, 8, 8).float()
    plain = diffusers.DDIMPipeline(small_unet(), DDIMScheduler(clip_sample=False))
    scheduler, output = plain.scheduler, torch.zeros_like(x)
    with pytest.raises(FloatingPointError, match="images 1 of a batch of 2"):
        with guide(plain, Pull(0.1, 0.0, 0.2)):
            scheduler.set_timesteps(5)
            x = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
            output[1] = float("nan")
            scheduler.step(output, scheduler.timesteps[1], x)


def test_the_modular_block_names_them() -> None:
    from test_modular import call, modular

    pipeline = modular()
    pipeline.unet.register_forward_hook(lambda _, args, output: (output[0] * float("nan"),))
    with pytest.raises(FloatingPointError, match="images 0, 1 of a batch of 2"):
        call(pipeline, label="cat", guidance_scale=0.0)


def test_no_step_waits_for_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is looked at once a run."""
    counted = []
    monkeypatch.setattr(
        "guided_diffusers.guider.check_images", lambda images, place: counted.append(place)
    )
    sample(quiet(small_unet(), DDIMScheduler(clip_sample=False)), num_inference_steps=8)
    assert len(counted) == 1


def test_the_bundled_pipeline_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = ClassifierGuidedPipeline.from_bundled()
    pipeline.set_progress_bar_config(disable=True)
    pipeline("sneaker", num_inference_steps=6)
    for cls in (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler):
        other = quiet(
            pipeline.unet, cls.from_config(pipeline.scheduler.config), pipeline.classifier
        )
        other("sneaker", num_inference_steps=10)
    assert not [r for r in caplog.records if r.name.startswith("guided_diffusers")]


# schedulers that remove too little noise, or tell the network another noise


def ending_std(scheduler: Any, data_std: float) -> float:
    """Of the final samples, with the exact network for normal data, from its posterior mean."""
    levels, generator = noise_levels(scheduler), torch.Generator().manual_seed(1)
    step = step_fn(scheduler, generator, 0.0, 1)
    x = torch.randn(1, 1, 64, 64, generator=generator, dtype=torch.float64)
    x = x * float(starting_sigma(scheduler))
    for index, level in enumerate(levels):
        gain = level.alpha * data_std**2 / (level.alpha**2 * data_std**2 + level.sigma**2)
        x = step(level.output(x, gain * x), index, x).double()
    return float(x.std())


@pytest.mark.parametrize(
    ("name", "steps", "config", "is_wrong"),
    [
        ("HeunDiscreteScheduler", 2, {}, True),
        ("HeunDiscreteScheduler", 3, {}, True),
        ("HeunDiscreteScheduler", 10, {}, False),
        ("KDPM2DiscreteScheduler", 2, {}, True),
        ("KDPM2DiscreteScheduler", 20, {}, False),
        ("KDPM2AncestralDiscreteScheduler", 3, {}, True),
        ("KDPM2AncestralDiscreteScheduler", 25, {}, False),
        ("SASolverScheduler", 20, {"use_beta_sigmas": True}, True),
        ("SASolverScheduler", 20, {}, False),
        ("DPMSolverSDEScheduler", 10, {}, False),
    ],
)
def test_steps_too_long_for_a_scheduler_of_second_order_are_warned_of(
    name: str, steps: int, config: dict[str, Any], is_wrong: bool
) -> None:
    scheduler = build(name, **config)
    scheduler.set_timesteps(steps)
    warning = accuracy_warning(scheduler, noise_levels(scheduler))
    std = ending_std(scheduler, 0.5)
    assert (warning is not None) == is_wrong == (std > 0.75), (warning, std)
    if is_wrong:
        told = re.search(r"would get ([\d.]+);", warning)
        assert float(told[1]) == pytest.approx(std, rel=0.2)


BETA = {"use_beta_sigmas": True}


@pytest.mark.parametrize(
    ("name", "steps", "config"),
    [
        ("KDPM2DiscreteScheduler", 7, {}),
        ("KDPM2AncestralDiscreteScheduler", 10, {}),
        ("KDPM2AncestralDiscreteScheduler", 20, {}),
        ("EulerDiscreteScheduler", 25, BETA),
        ("DPMSolverMultistepScheduler", 10, BETA),
        ("DPMSolverMultistepScheduler", 50, {"beta_schedule": "squaredcos_cap_v2", **BETA}),
        ("UniPCMultistepScheduler", 10, BETA),
        ("DEISMultistepScheduler", 25, BETA),
    ],
)
def test_noise_that_stays_in_data_of_low_contrast_and_smoothing_are_warned_of(
    name: str, steps: int, config: dict[str, Any]
) -> None:
    """The exact network for data of standard deviation 0.3 gives less than half, or 1.22 times."""
    scheduler = build(name, **config)
    scheduler.set_timesteps(steps)
    warning = accuracy_warning(scheduler, noise_levels(scheduler))
    std = ending_std(scheduler, 0.3)
    assert not 0.15 < std < 0.366
    assert ("the images are smoothed" in warning) == (std < 0.15), (warning, std)
    if told := re.search(r"deviation 0.3 would get ([\d.]+);", warning):
        assert float(told[1]) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("config", [{}, {"use_karras_sigmas": True}], ids=str)
@pytest.mark.parametrize("steps", [25, 50])
@pytest.mark.parametrize("name", sorted({case.scheduler for case in CASES}))
def test_usual_runs_are_not_warned_of(name: str, steps: int, config: dict[str, Any]) -> None:
    scheduler = build(name, **config)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, ZeroDivisionError):  # SCM
        return
    assert accuracy_warning(scheduler, noise_levels(scheduler)) is None


def test_the_bundled_preset_is_not_warned_of(caplog: Any) -> None:
    pipeline = ClassifierGuidedPipeline.from_bundled()
    pipeline.set_progress_bar_config(disable=True)
    pipeline(1)
    assert not [r for r in caplog.records if r.name.startswith("guided_diffusers")]


def test_the_check_of_accuracy_leaves_the_scheduler_and_the_global_generator_alone() -> None:
    scheduler = build("KDPM2AncestralDiscreteScheduler")
    scheduler.set_timesteps(3)
    levels = noise_levels(scheduler)
    state, index = torch.get_rng_state(), scheduler.step_index
    assert accuracy_warning(scheduler, levels)
    assert torch.equal(torch.get_rng_state(), state) and scheduler.step_index == index


def test_sigmas_of_continuous_time_have_no_table() -> None:
    config = {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_max": 700.0}
    scheduler = EulerDiscreteScheduler(sigma_min=0.002, **config)
    assert check_custom_steps(scheduler, "sigmas", [700.0, 54.0, 0.0]) == [700.0, 54.0, 0.0]


def test_timesteps_of_other_noise_than_the_samples_are_warned_of() -> None:
    """Euler's "log_linear" spaces the sigmas anew and leaves the timesteps where they were."""
    scheduler = EulerDiscreteScheduler(interpolation_type="log_linear")
    scheduler.set_timesteps(20)
    levels, timesteps = noise_levels(scheduler), scheduler.timesteps.tolist()
    table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    middle = float(table[round(timesteps[10])]), levels[10].sigma / levels[10].alpha
    assert middle[0] > 1.5 * middle[1]
    warning = timestep_warning(scheduler, levels, timesteps)
    told = re.search(r"sigma/alpha=([\d.]+), the network was trained with ([\d.]+) there", warning)
    assert float(told[2]) > 1.05 * float(told[1])


@pytest.mark.parametrize("name", sorted({case.scheduler for case in CASES}))
def test_timesteps_that_are_only_rounded_are_not_warned_of(name: str) -> None:
    for config in ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}):
        for steps in (10, 20, 50):
            scheduler = build(name, **config)
            try:
                scheduler.set_timesteps(steps)
            except (ValueError, ZeroDivisionError):
                continue
            timesteps = sampling_timesteps(scheduler).tolist()
            assert timestep_warning(scheduler, noise_levels(scheduler), timesteps) is None


@pytest.mark.parametrize(
    ("name", "config", "entry"),
    [
        ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 0.0}, "clip_sample_range"),
        ("DDPMScheduler", {"thresholding": True, "sample_max_value": 0.01}, "sample_max_value"),
        ("DDPMScheduler", {"thresholding": True, "dynamic_thresholding_ratio": 2}, "ratio=2"),
        ("DPMSolverMultistepScheduler", {"solver_order": 0}, "solver_order=0"),
        ("PNDMScheduler", {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, "prediction_type="),
        ("KDPM2DiscreteScheduler", {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("DPMSolverSDEScheduler", {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("DDIMScheduler", {"prediction_type": "flow"}, "prediction_type='flow'"),
        ("DDIMScheduler", {"timestep_spacing": "foo"}, "timestep_spacing='foo'"),
        ("LCMScheduler", {"timestep_spacing": "foo"}, "timestep_spacing='foo'"),
        ("DDPMScheduler", {"variance_type": "foo"}, "variance_type='foo'"),
        ("SASolverScheduler", {"variance_type": "foo"}, "variance_type='foo'"),
    ],
)
def test_config_entries_that_make_no_images_are_refused_by_name(
    name: str, config: dict[str, Any], entry: str
) -> None:
    pipeline = quiet(small_unet(), build(name, **config))
    with pytest.raises(ValueError, match=entry) as error:
        sample(pipeline, num_inference_steps=10)
    assert name in str(error.value)


def test_one_step_of_pndm_with_linspace_is_refused_by_name() -> None:
    pipeline = quiet(small_unet(), PNDMScheduler(timestep_spacing="linspace"))
    with pytest.raises(ValueError, match="num_inference_steps=1: PNDMScheduler can't take it"):
        sample(pipeline, num_inference_steps=1)


# calls whose arguments have no effect, or another one than they say


def ddim() -> Any:
    return DDIMScheduler(clip_sample=False)


def test_a_term_that_acts_at_no_step_is_warned_of(caplog: Any) -> None:
    pipeline = quiet(small_unet(), ddim(), small_classifier())
    sample(pipeline, "cat", num_inference_steps=8, guidance_start=0.99)
    assert "ClassifierGuidance has no effect, none of the run's 8 steps" in caplog.text
    caplog.clear()
    sample(pipeline, "cat", num_inference_steps=8, guidance_start=0.99, guidance_scale=0.0)
    sample(pipeline, "cat", num_inference_steps=8, guidance_start=1.0)
    sample(pipeline, "cat", num_inference_steps=8, guidance_start=0.8)
    assert not caplog.text


def test_a_mixture_without_weight_is_refused() -> None:
    pipeline = quiet(small_unet(), ddim(), small_classifier())
    with pytest.raises(ValueError, match="all weights are 0"):
        sample(pipeline, {"cat": 0.0, "dog": 0}, num_inference_steps=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, k: 5, "returned 5"),
        (lambda p, k: {"latents": 5}, "a int of shape None"),
        (lambda p, k: {"latents": k["latents"].numpy()}, "a ndarray"),
        (lambda p, k: {"latents": k["latents"][:, :, :4]}, r"\(1, 1, 8, 8\) is allowed"),
        (lambda p, k: {"x0": k["latents"] * 0}, "other \\['x0'\\]"),
        (lambda p, k: p.scheduler.set_timesteps(5), "set its timesteps"),
        (lambda p, k: p.register_modules(scheduler=ddim()), "exchanged the scheduler"),
    ],
)
def test_what_a_callback_cannot_change_is_refused(change: Any, message: str) -> None:
    pipeline = quiet(small_unet(), ddim(), small_classifier())
    with pytest.raises((ValueError, RuntimeError), match=message):
        sample(
            pipeline,
            num_inference_steps=4,
            callback_on_step_end=lambda p, i, t, tensors: change(p, tensors),
        )


def test_a_callback_may_return_what_it_got() -> None:
    pipeline, names = quiet(small_unet(), ddim()), ["latents", "x0", "sample"]
    options = {"callback_on_step_end_tensor_inputs": names, "num_inference_steps": 4}
    same = sample(pipeline, callback_on_step_end=lambda p, i, t, k: k, **options)
    assert torch.equal(same, sample(pipeline, num_inference_steps=4))


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(1, 3, 8, 8), "latents has 3 channels; the network's 1 are allowed"),
        (torch.zeros(1, 1, 9, 8), r"latents has size \(9, 8\); multiples of 2"),
        (torch.zeros(1, 1, 8, 8).to_sparse(), "sparse"),
        (torch.zeros(1, 1, 8, 8, device="meta"), "meta"),
        (torch.zeros(1, 1, 16, 16), r"the classifier allows only \(8, 8\)"),
    ],
)
def test_latents_that_do_not_fit_are_refused_before_the_first_step(
    latents: torch.Tensor, message: str
) -> None:
    pipeline = quiet(small_unet(), ddim(), small_classifier())
    with pytest.raises(ValueError, match=message):
        sample(pipeline, "cat", latents=latents, num_inference_steps=2)


def test_latents_that_are_no_noise_are_warned_of(caplog: Any) -> None:
    pipeline = quiet(small_unet(), ddim())
    sample(pipeline, latents=normal(1, 1, 8, 8), num_inference_steps=2)
    assert not caplog.text
    sample(pipeline, latents=50 * normal(1, 1, 8, 8), num_inference_steps=2)
    assert "noise of unit variance" in caplog.text


@pytest.mark.parametrize(
    "energy", [lambda x: x.detach().sum((1, 2, 3)), lambda x: torch.zeros(len(x))]
)
@pytest.mark.parametrize("through_network", [False, True])
def test_an_energy_without_gradient_is_refused(energy: Any, through_network: bool) -> None:
    term = EnergyGuidance(energy, through_network=through_network)
    with pytest.raises(ValueError, match="has no gradient in the image"):
        sample(quiet(small_unet(), ddim()), guidance=term, num_inference_steps=2)


def test_a_term_that_is_not_finite_is_named_and_so_is_a_network() -> None:
    nan = EnergyGuidance(lambda x: x.sum((1, 2, 3)) * float("nan"))
    pipeline = quiet(small_unet(), ddim(), small_classifier())
    with pytest.raises(FloatingPointError, match="a guidance term .*EnergyGuidance"):
        sample(pipeline, "cat", guidance=nan, num_inference_steps=2)
    with torch.no_grad():
        pipeline.unet.conv_out.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="the network's output is not finite"):
        sample(pipeline, "cat", num_inference_steps=2)


def test_an_autoencoder_of_other_channels_is_refused_before_the_first_step() -> None:
    pipeline = quiet(small_unet(), ddim(), vae=diffusers.AutoencoderKL(norm_num_groups=32))
    with pytest.raises(ValueError, match="vae: it decodes 4 channels"):
        pipeline(num_inference_steps=2)
