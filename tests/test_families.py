"""A scheduler that isn't what the network was trained for is refused, or warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from test_guidance import Pull, quiet, sample, small_unet

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.attach import guide
from guided_diffusers.families import check_origin, training_schedule, training_warning
from guided_diffusers.noise import TrainedSchedule

COSINE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FAMILIES = {
    "variance preserving": DDPMScheduler(**COSINE),
    "flow matching": FlowMatchEulerDiscreteScheduler(shift=2.0),
    "EDM": EDMEulerScheduler(),
}
VP = ["DDIM", "DDPM", "EulerDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete", "PNDM"]
VP += ["EulerAncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep"]
VP += ["DEISMultistep", "SASolver", "LCM", "TCD", "KDPM2AncestralDiscrete", "DPMSolverSDE"]


def as_saved(scheduler: Any) -> dict[str, Any]:
    """The config as in its file, where values are no longer marked as defaults of the class."""
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def of_this_package(caplog: Any) -> str:
    return " ".join(r.getMessage() for r in caplog.records if r.name.startswith("guided_diffusers"))


def swapped(name: str, config: Any, **changes: Any) -> Any:
    return getattr(diffusers, f"{name}Scheduler").from_config(config, **changes)


@pytest.mark.parametrize(
    ("name", "of", "entry"),
    [
        ("FlowMatchEulerDiscrete", "variance preserving", "prediction_type='epsilon'"),
        ("FlowMatchHeunDiscrete", "variance preserving", "beta_schedule='squaredcos_cap_v2'"),
        ("FlowMatchEulerDiscrete", "EDM", "sigma_data=0.5"),
        ("EDMEuler", "variance preserving", "beta_schedule"),
        ("EDMDPMSolverMultistep", "flow matching", "shift=2.0"),
        ("CMStochasticIterative", "variance preserving", "beta_schedule"),
        ("IPNDM", "variance preserving", "prediction_type='epsilon'"),
        ("DDPMWuerstchen", "variance preserving", "beta_schedule"),
        ("DDIM", "flow matching", "shift=2.0"),
        ("DPMSolverMultistep", "flow matching", "shift=2.0"),
        ("EulerDiscrete", "EDM", "sigma_data=0.5"),
    ],
)
def test_a_config_of_another_family_is_refused(name: str, of: str, entry: str) -> None:
    scheduler = swapped(name, as_saved(FAMILIES[of]))
    with pytest.raises(ValueError, match=f"^scheduler {name}Scheduler.*its config has .*{entry}"):
        sample(quiet(small_unet(), scheduler), num_inference_steps=4)


@pytest.mark.parametrize("name", ["DDIM", "TCD", "EulerDiscrete"])
def test_flow_sigmas_of_a_class_without_them_are_refused(name: str) -> None:
    scheduler = swapped(name, as_saved(DPMSolverMultistepScheduler(**FLOW)))
    with pytest.raises(ValueError, match="prediction_type='flow_prediction'"):
        sample(quiet(small_unet(), scheduler), num_inference_steps=4)
    scheduler = swapped(name, as_saved(DPMSolverMultistepScheduler(use_flow_sigmas=True)))
    with pytest.raises(ValueError, match="its config has use_flow_sigmas=True"):
        sample(quiet(small_unet(), scheduler), num_inference_steps=4)


def test_guide_refuses_it_too() -> None:
    scheduler = swapped("FlowMatchEulerDiscrete", as_saved(FAMILIES["variance preserving"]))
    pipeline = DDPMPipeline(small_unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="prediction_type='epsilon'"), guide(pipeline, Pull(0.1)):
        pipeline(num_inference_steps=4, output_type="np")


def test_what_cosmos_2_adds_to_the_config_of_a_flow_scheduler_is_taken() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0)
    check_origin(scheduler)
    scheduler.register_to_config(prediction_type="epsilon")  # as of EDM's schedulers
    with pytest.raises(ValueError, match="prediction_type='epsilon', sigma_data=1.0"):
        check_origin(scheduler)


@pytest.mark.parametrize("name", VP)
def test_schedulers_of_the_same_family_are_taken_without_a_word(name: str, caplog: Any) -> None:
    pipeline = quiet(small_unet(), FAMILIES["variance preserving"])
    for changes in ({}, {"rescale_betas_zero_snr": True}, {"use_karras_sigmas": True}):
        pipeline.scheduler = swapped(name, as_saved(FAMILIES["variance preserving"]), **changes)
        assert training_warning(pipeline.scheduler, pipeline.config.training_schedule) is None
    pipeline.scheduler = swapped("DDIM", pipeline.scheduler.config, timestep_spacing="trailing")
    sample(pipeline, num_inference_steps=10)
    assert not of_this_package(caplog)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("FlowMatchHeunDiscrete", {}),
        ("FlowMatchEulerDiscrete", {"shift": 5.0}),
        ("DPMSolverMultistep", FLOW),
        ("UniPCMultistep", FLOW),
    ],
)
def test_flow_matching_by_other_schedulers_is_taken_without_a_word(
    name: str, changes: dict[str, Any], caplog: Any
) -> None:
    pipeline = quiet(small_unet(), FAMILIES["flow matching"])
    pipeline.scheduler = swapped(name, as_saved(pipeline.scheduler), **changes)
    sample(pipeline, num_inference_steps=10)
    pipeline.scheduler = swapped("FlowMatchEulerDiscrete", as_saved(pipeline.scheduler))  # and back
    sample(pipeline, num_inference_steps=10)
    assert not of_this_package(caplog)


def test_another_family_than_the_trainings_is_warned_of_once_a_run(caplog: Any) -> None:
    pipeline = quiet(small_unet(), FAMILIES["variance preserving"])
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    sample(pipeline, num_inference_steps=4)
    assert caplog.text.count("has the family 'flow matching'") == 1
    assert "trained with DDPMScheduler, 'variance preserving'" in caplog.text


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(clip_sample=False), "by its betas, the network was trained with"),
        (DDIMScheduler(num_train_timesteps=100, **COSINE), "by its betas"),
        (DPMSolverMultistepScheduler(prediction_type="v_prediction"), "prediction 'v_prediction'"),
        (
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "time'",
        ),
        (UniPCMultistepScheduler(**FLOW), "family 'flow matching'"),
        (CosineDPMSolverMultistepScheduler(), "family 'EDM with timesteps of a cosine schedule'"),
    ],
)
def test_default_constructors_are_warned_of(scheduler: Any, message: str) -> None:
    trained = training_schedule(FAMILIES["variance preserving"])
    assert message in training_warning(scheduler, trained)


def test_the_warning_of_betas_has_the_closed_form() -> None:
    """At the timestep that it names, sigma/alpha = sqrt(1 / alpha_bar - 1) of the two tables."""
    trained, other = FAMILIES["variance preserving"], DDIMScheduler()
    warning = training_warning(other, training_schedule(trained))
    t, ratio, right = (
        warning.split("timestep ")[1].replace(":", " ").split()[0],
        *(part.split()[0] for part in (warning.split("alpha=")[1], warning.split("with ")[1])),
    )
    for scheduler, value in ((other, ratio), (trained, right)):
        exact = (1 / scheduler.alphas_cumprod[int(t)].double() - 1).sqrt()
        assert float(value) == pytest.approx(float(exact), rel=0.01)
    distance = [TrainedSchedule(dict(s.config) and _betas(s)).log_ratio for s in (other, trained)]
    assert int(t) == abs(distance[0] - distance[1]).argmax()


def _betas(scheduler: Any) -> dict[str, Any]:
    return {name: scheduler.config[name] for name in ("beta_schedule", "beta_start", "beta_end")}


@pytest.mark.parametrize("key", ["num_train_timesteps", "sigma_data"])
def test_constants_of_other_families_are_compared(key: str) -> None:
    trained = FAMILIES["EDM" if key == "sigma_data" else "flow matching"]
    other = type(trained).from_config(trained.config, **{key: 2})
    assert f"{key}=2" in training_warning(other, training_schedule(trained))


def test_the_trainings_schedule_goes_with_the_pipeline(tmp_path: Path, caplog: Any) -> None:
    """Saved, loaded with another scheduler, shared by from_pipe; also of older folders."""
    trained = training_schedule(FAMILIES["variance preserving"])
    pipeline = quiet(small_unet(), FAMILIES["variance preserving"])
    pipeline.scheduler = DDIMScheduler(clip_sample=False)
    pipeline.save_pretrained(tmp_path / "new")
    assert ClassifierGuidedPipeline.from_pretrained(tmp_path / "new").config.training_schedule == (
        trained
    )
    other = ClassifierGuidedPipeline.from_pipe(pipeline, scheduler=FAMILIES["flow matching"])
    assert other.config.training_schedule == trained
    DDPMPipeline(small_unet(), FAMILIES["variance preserving"]).save_pretrained(tmp_path / "old")
    load = ClassifierGuidedPipeline.from_pretrained
    for scheduler in (DDIMScheduler(clip_sample=False), FlowMatchEulerDiscreteScheduler()):
        loaded = load(tmp_path / "old", scheduler=scheduler)
        assert loaded.config.training_schedule == trained
        loaded.set_progress_bar_config(disable=True)
        caplog.clear()
        loaded(num_inference_steps=4, generator=torch.Generator().manual_seed(0))
        assert "the network was trained with" in caplog.text
    plain = DDPMPipeline.from_pretrained(tmp_path / "old")
    shared = ClassifierGuidedPipeline.from_pipe(plain, scheduler=DDIMScheduler())
    assert shared.config.training_schedule == trained
    assert load(tmp_path / "old", training_schedule={}).config.training_schedule == {}


@pytest.mark.parametrize("value", [5, "VP", {"beta_start": 0.1}])
def test_what_is_no_training_schedule_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="^training_schedule="):
        ClassifierGuidedPipeline(small_unet(), DDIMScheduler(), training_schedule=value)
