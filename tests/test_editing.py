"""Images that exist: started from, inverted, edited; against closed forms and bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import SHAPE, Clock, Mixture, OracleClassifier, OracleUNet
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import Image as PILImage
from test_any_rank import unet_1d
from test_hub import BLOCKS, make_classifier
from test_pixels import deep_png

from guided_diffusers import ClassifierGuidedPipeline, EnergyGuidance, NoiseAwareClassifier
from guided_diffusers.cli import main
from guided_diffusers.editing.files import PictureFiles
from guided_diffusers.editing.folder import edit_folder
from guided_diffusers.edits import inverted
from guided_diffusers.images import convert
from guided_diffusers.inversion import ProbabilityFlow, level_grid

VP = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
KINDS = {
    "epsilon": (
        DDIMScheduler,
        {**VP, "clip_sample": False, "timestep_spacing": "trailing"},
        "ddpm",
        "epsilon",
    ),
    "v": (
        DPMSolverMultistepScheduler,
        {**VP, "prediction_type": "v_prediction"},
        "ddpm",
        "v_prediction",
    ),
    "x0": (EulerDiscreteScheduler, {**VP, "prediction_type": "sample"}, "ddpm", "sample"),
    "flow": (FlowMatchEulerDiscreteScheduler, {}, "flow", "flow"),
    "EDM": (EDMEulerScheduler, {"prediction_type": "epsilon"}, "edm", "edm_epsilon"),
}


def exact(kind: str, mixture: Mixture, classifier: bool = False) -> ClassifierGuidedPipeline:
    scheduler, config, clock, prediction = KINDS[kind]
    sigma_data = 0.5 if kind == "EDM" else None
    unet = OracleUNet(mixture, prediction, Clock(clock), sigma_data=sigma_data)
    guide = OracleClassifier(mixture) if classifier else None
    pipeline = ClassifierGuidedPipeline(unet, scheduler(**config), guide)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def samples_of(mixture: Mixture, count: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (count,), generator=generator)
    noise = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    return mixture.means[labels] + mixture.std * noise


def exact_flow(mixture: Mixture, x0: torch.Tensor, s: float, steps: int) -> torch.Tensor:
    """z = x / alpha at s of dz/ds = eps(z, s), z(0) = x0: Runge-Kutta's method of order 4 in u =
    log(1 + s / 0.05), written apart from the package."""

    def slope(z: torch.Tensor, u: float) -> torch.Tensor:
        s = 0.05 * float(np.expm1(u))
        if s == 0:
            return torch.zeros_like(z)
        x0 = mixture.denoised(z, 1.0, s, None)
        return (z - x0) / s * (s + 0.05)

    z, h = x0, float(np.log1p(s / 0.05)) / steps
    for n in range(steps):
        u = n * h
        k1 = slope(z, u)
        k2 = slope(z + h / 2 * k1, u + h / 2)
        k3 = slope(z + h / 2 * k2, u + h / 2)
        k4 = slope(z + h * k3, u + h)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z


# ---------------------------------------------------------------- inversion


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_is_the_exact_flows(kind: str, mixture: Mixture) -> None:
    """To 1e-3 of the noise's standard deviation at 100 steps, of second order in the steps."""
    pipeline, x0 = exact(kind, mixture), samples_of(mixture)
    errors = {}
    for steps in (50, 100):
        noise = pipeline.invert(x0, 1.0 if kind != "flow" else 0.9, num_inference_steps=steps)
        flow = ProbabilityFlow(pipeline.scheduler, 1.0 if kind != "flow" else 0.9)
        flow.set_timesteps(steps)
        s = flow.levels[0].sigma / flow.levels[0].alpha
        expected = exact_flow(mixture, x0, s, 400) * flow.alpha
        errors[steps] = ((noise - expected) / (s * flow.alpha)).abs()
    assert errors[100].mean() < 1e-3
    assert errors[100].max() < 3e-3
    assert 3.2 < errors[50].mean() / errors[100].mean() < 4.8  # 2^2


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_closes(kind: str, mixture: Mixture) -> None:
    pipeline, x0 = exact(kind, mixture), samples_of(mixture)
    for strength in (0.5, 1.0):
        output = pipeline.edit(x0, strength=strength, num_inference_steps=40, output_type="latent")
        assert output.difference.abs().mean() < 1e-3
        assert torch.allclose((output.images - output.difference).float(), x0.float(), atol=1e-6)
    errors = []
    for steps in (20, 40):
        output = pipeline.edit(x0, strength=1.0, num_inference_steps=steps, output_type="latent")
        errors.append(output.difference.abs().mean())
    assert errors[0] > 3 * errors[1]


def test_pure_noise_is_reached_and_left(mixture: Mixture) -> None:
    """The first level of flow matching has no image: the flow's samples there are normal noise."""
    pipeline, x0 = exact("flow", mixture), samples_of(mixture, 256)
    noise = pipeline.invert(x0, num_inference_steps=30)
    assert noise.std() == pytest.approx(1, abs=0.05) and noise.mean().abs() < 0.05
    images = pipeline(latents=noise.float(), output_type="latent", num_inference_steps=200).images
    assert (images - x0).abs().mean() < 0.03  # Euler's error


def test_levels_are_those_of_the_schedulers_run_with_fractional_timesteps() -> None:
    scheduler = DDIMScheduler(**VP, timestep_spacing="trailing")
    flow = ProbabilityFlow(scheduler, 0.6)
    flow.set_timesteps(10)
    ratios = [level.sigma / level.alpha for level in flow.levels]
    scheduler.set_timesteps(10)
    assert len(ratios) == 6 and ratios == sorted(ratios, reverse=True)
    assert flow.timesteps[0] == scheduler.timesteps[4] and flow.timesteps[-1] == 0
    assert flow.timesteps[1] == flow.timesteps[2] and flow.timesteps[1] % 1 != 0
    assert len(flow.timesteps) == 2 * 6 - 1
    assert level_grid(5.0, 0.1, 1) == [5.0]


@pytest.mark.parametrize("scheduler", ["CMStochasticIterativeScheduler", "SCMScheduler"])
def test_a_network_that_follows_no_flow_is_refused(scheduler: str) -> None:
    pipeline = tiny(scheduler=getattr(diffusers, scheduler)())
    with pytest.raises(ValueError, match="jumps to x0 and can't be inverted"):
        pipeline.invert(torch.zeros(1, 1, 8, 8))


# ---------------------------------------------------------------- start from an image


def tiny(
    conditional: bool = False, vae: bool = False, scheduler: Any = None, channels: int = 1
) -> ClassifierGuidedPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(8, channels, 1, **BLOCKS, num_class_embeds=4 if conditional else None)
    autoencoder = None
    if vae:
        blocks = (("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (4, 4))
        autoencoder = AutoencoderKL(1, 1, *blocks, norm_num_groups=2, latent_channels=1)
    scheduler = scheduler or DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipeline = ClassifierGuidedPipeline(unet, scheduler, make_classifier(), autoencoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def random_image(count: int = 2, size: int = 8) -> torch.Tensor:
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


ONE_STEP = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
ONE_STEP += ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "EulerAncestralDiscreteScheduler")
MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
MULTISTEP += ("LMSDiscreteScheduler", "PNDMScheduler", "DPMSolverSinglestepScheduler")
MULTISTEP += ("SASolverScheduler", "IPNDMScheduler")


@pytest.mark.parametrize("name", [*ONE_STEP, *MULTISTEP])
def test_a_run_goes_on_where_another_was(name: str, mixture: Mixture) -> None:
    """From the sample before its last part, a run ends as the whole run; solvers that lost their
    history nearly so."""
    config = {} if "Flow" in name or name == "IPNDMScheduler" else VP
    if name in ("DDIMScheduler", "DDPMScheduler"):
        config = {**config, "clip_sample": False}
    if name == "PNDMScheduler":
        config = {**config, "skip_prk_steps": True}
    kind = {"F": ("flow", "flow"), "I": ("ipndm", "v_prediction")}.get(name[0], ("ddpm", "epsilon"))
    unet = OracleUNet(mixture, kind[1], Clock(kind[0]))
    pipeline = ClassifierGuidedPipeline(unet, getattr(diffusers, name)(**config))
    pipeline.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []

    def keep(_: Any, index: int, t: Any, tensors: dict[str, torch.Tensor]) -> None:
        seen.append(tensors["sample"])

    def run(**call: Any) -> torch.Tensor:
        options = {"num_inference_steps": 40, "output_type": "latent"}
        return pipeline(**options, generator=torch.Generator().manual_seed(0), **call).images

    observed = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["sample"]}
    whole = run(num_images_per_label=4, **observed)
    count = pipeline.num_timesteps
    stochastic = "Ancestral" in name or name in ("DDPMScheduler", "SASolverScheduler")
    start = seen[-(pipeline_steps(pipeline, count, 0.4))]
    seen.clear()
    rest = run(latents=start, strength=0.4, **observed)
    assert torch.equal(seen[0], start) and not torch.equal(rest, start)
    assert pipeline.num_timesteps < 0.6 * count
    if not stochastic:
        tolerance = 1e-5 if name in ONE_STEP else 1e-2
        assert (rest - whole).abs().max() < tolerance


def pipeline_steps(pipeline: ClassifierGuidedPipeline, count: int, strength: float) -> int:
    """Evaluations in the last part of a run, by counting the scheduler's own."""
    order = getattr(pipeline.scheduler, "order", 1)
    steps = -(-count // order)
    return count - (steps - int(steps * strength)) * order


def test_an_image_gets_the_noise_of_its_level(mixture: Mixture) -> None:
    pipeline, seen = tiny(), []
    image = random_image()

    def keep(_: Any, index: int, t: Any, tensors: dict[str, torch.Tensor]) -> None:
        seen.append((index, int(t), tensors["sample"]))

    call = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["sample"]}
    call |= {"num_inference_steps": 10, "output_type": "latent"}
    pipeline(["boot", 1], image=image, strength=0.6, generator=generators(2), **call)
    assert [entry[:2] for entry in seen] == [(i, t) for i, t in enumerate(range(599, 0, -100))]
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators(2)])
    expected = pipeline.scheduler.add_noise(image, noise, torch.tensor([599]))
    assert torch.allclose(seen[0][2], expected, atol=1e-6)
    alone = pipeline([1], image=image[1:], strength=0.6, generator=generators(2)[1:], **call).images
    both = pipeline(["boot", 1], image=image, strength=0.6, generator=generators(2), **call).images
    assert torch.allclose(alone[0], both[1], atol=1e-5)


def test_forms_of_an_image_are_one() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    pictures = [PILImage.fromarray(image) for image in pixels]
    tensor = torch.from_numpy(pixels)[:, None].float() / 127.5 - 1
    array = pixels[..., None].astype(np.float32) / 255
    pipeline, results = tiny(), []
    for image in (pictures, tensor, array):
        call = {"generator": generators(2), "output_type": "pt", "num_inference_steps": 3}
        results.append(pipeline(["boot", 1], image=image, strength=0.7, **call).images)
    assert torch.allclose(results[0], results[1], atol=1e-5)
    assert torch.allclose(results[0], results[2], atol=1e-5)
    output = pipeline(["boot", 1], image=pictures, strength=0)
    for picture, same in zip(pictures, output.images, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(same))


def test_a_tensor_that_looks_like_an_output_is_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    pipeline, image = tiny(), random_image(1)
    pipeline("boot", image=image, strength=0)
    assert not [w for w in recwarn if "image" in str(w.message)]
    with pytest.warns(UserWarning, match="all values are from 0 to 1; tensors of pictures are in"):
        pipeline("boot", image=convert(image, "pt"), strength=0)


@pytest.mark.parametrize("vae", [False, True])
def test_strength_0_is_the_image(vae: bool) -> None:
    pipeline, image = tiny(vae=vae), random_image(size=16 if vae else 8)
    images = pipeline(["boot", 1], image=image, strength=0, output_type="pt").images
    assert torch.equal(images, convert(image, "pt"))
    output = pipeline.edit(image, "boot", strength=0, output_type="pt")
    assert torch.equal(output.images, convert(image, "pt")) and not output.difference.any()
    assert torch.equal(output.probabilities_before, output.probabilities_after)
    assert output.guidance_evaluations == 0
    with pytest.raises(ValueError, match="label 'shoe' is unknown"):
        pipeline.edit(image, "shoe", strength=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"strength": 0.5}, "strength=0.5: the run starts midway.*; one of the two is allowed"),
        (
            {"strength": 0.5, "image": torch.zeros(1, 1, 8, 8), "latents": torch.zeros(1, 1, 8, 8)},
            "only one of",
        ),
        (
            {"strength": 1.5, "image": torch.zeros(1, 1, 8, 8)},
            "strength=1.5: a finite number from 0 to 1",
        ),
        (
            {"strength": 0.01, "image": torch.zeros(1, 1, 8, 8)},
            "less than one of the run's 50 steps; 0, or from 0.02",
        ),
        ({"image": torch.zeros(1, 1, 8, 8)}, "to start from an image, give strength, too"),
        (
            {"strength": 0.5, "image": torch.zeros(1, 2, 8, 8)},
            r"image has shape \(1, 2, 8, 8\).*1 channels",
        ),
        (
            {"strength": 0.5, "image": torch.zeros(3, 1, 8, 8)},
            "image holds 3 images; one, or one for each of the 1",
        ),
        (
            {"strength": 0.5, "image": torch.full((1, 1, 8, 8), torch.nan)},
            "image has infinite or NaN",
        ),
        ({"strength": 0.5, "image": np.full((1, 8, 8, 1), 2.0)}, r"image is an array .*\[0, 1\]"),
        ({"strength": 0.5, "image": "cat.png"}, "image='cat.png': a PIL image"),
        (
            {"strength": 0.5, "image": torch.zeros(1, 1, 8, 8), "height": 8},
            "height=8: .* only one of the two",
        ),
        (
            {"strength": 0.5, "image": torch.zeros(1, 1, 8, 8), "particles": 2},
            "strength=0.5, particles=2: a population starts from noise",
        ),
    ],
)
def test_wrong_starts_are_refused(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()("boot", **call)


def test_pictures_of_more_than_8_bits_are_refused() -> None:
    pipeline = tiny()
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    for values, mode in ((ramp * 65535, "I;16"), (ramp, "F"), (ramp * 65535, "I")):
        kind = {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]
        deep = PILImage.fromarray(values.astype(kind))
        assert deep.mode == mode
        with pytest.raises(ValueError, match=f"image: a picture of mode {mode}; 8 bits"):
            pipeline.edit(deep, "boot", num_inference_steps=2)
        with pytest.raises(ValueError, match=f"mask: a picture of mode {mode}; 8 bits"):
            pipeline.edit(random_image(1), "boot", mask=deep, num_inference_steps=2)


def test_pictures_files_of_more_than_8_bits_are_named(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 64).reshape(8, 8) * 65535
    PILImage.fromarray(ramp.astype(np.uint16)).save(tmp_path / "grey.png")
    deep_png(tmp_path / "colours.png", np.stack([ramp] * 3, -1).round())
    for name in ("grey", "colours"):
        for form in (PictureFiles(None), PictureFiles((8, 8))):
            with pytest.raises(ValueError, match=f"{name}.png: .* 8 bits a channel are allowed"):
                form.check([tmp_path / f"{name}.png"])


def test_a_run_of_no_steps_has_the_checks_and_the_state_of_a_run() -> None:
    pipeline = tiny()
    pipeline("boot", num_inference_steps=3, output_type="latent")
    assert pipeline.num_timesteps == 3
    pipeline("boot", image=random_image(1), strength=0)
    assert pipeline.num_timesteps == 0
    pipeline.register_to_config(data_mean=3.0, data_std=2.0)
    for start in ({"image": random_image(1)}, {"latents": random_image(1)}):
        with pytest.raises(ValueError, match="output_type='pil': .* arrays"):
            pipeline("boot", strength=0, **start)
    pipeline.register_to_config(data_mean=[1.0, 2.0], data_std=[1.0, 1.0])
    with pytest.raises(ValueError, match="data_mean in the pipeline's config is of 2 channels"):
        pipeline("boot", latents=random_image(1)[:, :1], strength=0, output_type="np")


def test_an_up_sampling_network_keeps_its_image() -> None:
    """With strength an image is one to start from, which has other channels than its input."""
    pipeline = tiny(channels=2)
    low = torch.zeros(1, 1, 4, 4)
    pipeline("boot", image=low, num_inference_steps=2, output_type="pt")
    with pytest.raises(ValueError, match="2 channels are allowed .*given without strength"):
        pipeline("boot", image=random_image(1), strength=0.5)
    with pytest.raises(ValueError, match="given without strength"):
        pipeline.edit(random_image(1), "boot")


# ---------------------------------------------------------------- edit


def test_an_exact_classifier_moves_images_to_its_label(mixture: Mixture) -> None:
    pipeline, x0 = exact("epsilon", mixture, classifier=True), samples_of(mixture)
    call = {"num_inference_steps": 25, "guidance_scale": 1.0, "output_type": "latent"}
    output = pipeline.edit(x0, 1, strength=0.9, **call)
    assert output.probabilities_after[:, 1].mean() > output.probabilities_before[:, 1].mean()
    assert (output.probabilities_after[:, 1] > 0.9).all()
    assert output.guidance_evaluations > 0
    assert output.settings["guidance_scale"] == 1 and output.settings["num_inference_steps"] == 25
    kept = output.probabilities_before[:, 1] > 0.9
    assert output.difference[kept].abs().mean() < output.difference[~kept].abs().mean()
    weaker = pipeline.edit(x0, 1, strength=0.5, **call)
    assert weaker.difference.abs().mean() < output.difference.abs().mean()


@pytest.mark.parametrize("vae", [False, True])
def test_outside_a_mask_the_image_stays_bit_for_bit(vae: bool) -> None:
    size = 16 if vae else 8
    pipeline, image, steps = tiny(vae=vae), random_image(size=size), []
    mask = torch.zeros(size, size)
    mask[: size // 2] = 1

    def keep(_: Any, index: int, t: Any, tensors: dict[str, torch.Tensor]) -> None:
        steps.append(tensors["latents"])

    call = {"guidance_scale": 5.0, "num_inference_steps": 4, "strength": 1.0}
    plain = pipeline.edit(image, "boot", output_type="pt", **call)
    call |= {"mask": mask, "callback_on_step_end": keep}
    output = pipeline.edit(image, "boot", output_type="pt", **call)
    before, inside = convert(image, "pt"), mask.bool()
    assert torch.equal(output.images[..., ~inside], before[..., ~inside])
    assert not output.difference[..., ~inside].any() and output.difference[..., inside].any()
    assert plain.difference[..., ~inside].any()
    if not vae:  # at every level
        _, samples = inverted(pipeline, image, 1.0, None, 4)
        originals = [samples[(index + 2) // 2] for index in range(len(steps) - 1)] + [image]
        for latents, original in zip(steps, originals, strict=True):
            assert torch.equal(latents[..., ~inside], original[..., ~inside])
            assert not torch.equal(latents[..., inside], original[..., inside])
    pictures = PILImage.fromarray((mask.numpy() * 255).astype(np.uint8))
    again = pipeline.edit(image, "boot", output_type="pt", **{**call, "mask": pictures})
    assert torch.equal(again.images, output.images)


def test_everything_that_guides_a_call_guides_an_edit() -> None:
    """Terms, intervals, reuse, algorithms, classifier-free guidance, labels of the inversion."""
    pipeline, image = tiny(conditional=True), random_image()
    dark = EnergyGuidance(lambda x: x.flatten(1).mean(1), 5.0)
    base = {
        "strength": 0.8,
        "num_inference_steps": 12,
        "output_type": "latent",
        "guidance_scale": 4.0,
    }
    results = {"": pipeline.edit(image, "boot", **base).images}
    for change in (
        {"guidance_scale": 8.0},
        {"guidance": dark},
        {"guidance_start": 0.5},
        {"guidance_stop": 0.5},
        {"guidance_every": 2},
        {"guidance_tolerance": 0.5},
        {"guidance_algorithm": "lie_trotter"},
        {"guidance_algorithm": "strang"},
        {"classifier_free_scale": 2.0},
        {"conditional": False},
        {"source_label": 1},
        {"clip_x0": True},
        {"strength": 0.6},
        {"num_inference_steps": 10},
    ):
        results[str(change)] = pipeline.edit(image, "boot", **{**base, **change}).images
    results["one an image"] = pipeline.edit(image, ["boot", 2], **base).images
    results["mixture"] = pipeline.edit(image, {"boot": 0.5, 1: 0.5}, **base).images
    results["no label"] = pipeline.edit(image, None, **{**base, "guidance_scale": None}).images
    names = list(results)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert not torch.equal(results[name], results[other]), (name, other)
    assert torch.equal(results["one an image"][0], results[""][0])


def test_the_parts_of_an_output() -> None:
    pipeline, image = tiny(), random_image()
    call = {"strength": 0.8, "num_inference_steps": 3}
    arrays = pipeline.edit(image, "boot", output_type="np", **call)
    assert arrays.images.shape == arrays.difference.shape == (2, 8, 8, 1)
    before = convert(image, "np")
    assert np.allclose(arrays.images - arrays.difference, before, atol=1e-6)
    pictures = pipeline.edit(image, "boot", **call)
    assert pictures.images[0].size == (8, 8) and pictures.difference.shape == (2, 8, 8, 1)
    assert torch.allclose(pictures.probabilities_after.sum(1), torch.ones(2))
    logits = pipeline.classifier(image, 0).logits
    assert torch.allclose(pictures.probabilities_before, logits.softmax(-1))
    maps = pipeline.anomaly(image, "boot", **call)
    assert np.allclose(maps.maps, np.abs(arrays.difference).mean(-1), atol=1e-6)
    assert torch.allclose(maps.scores, maps.maps.mean((1, 2))) and maps.images.shape == image.shape
    pipeline.classifier = None
    output = pipeline.edit(image, None, **call)
    assert output.probabilities_before is output.probabilities_after is None


def test_components_are_as_before_and_the_scheduler_may_be_any() -> None:
    scheduler = DDPMScheduler(clip_sample=False)
    pipeline, image = tiny(scheduler=scheduler), random_image()
    config = dict(pipeline.config)
    first = pipeline.edit(image, "boot", num_inference_steps=3, output_type="pt").images
    assert pipeline.scheduler is scheduler and dict(pipeline.config) == config
    pipeline.scheduler = DDIMScheduler(clip_sample=False)
    again = pipeline.edit(image, "boot", num_inference_steps=3, output_type="pt").images
    assert torch.equal(first, again)  # the run's levels are the same


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"strength": -0.1}, "strength=-0.1: a finite number from 0 to 1"),
        ({"eta": 1.0}, "eta=1.0: edit inverts its image"),
        ({"generator": None}, "generator=None: edit inverts"),
        ({"latents": torch.zeros(1, 1, 8, 8)}, "latents=.*: edit inverts"),
        ({"source_label": 1}, "source_label=1 has no effect: the network is unconditional"),
        ({"label": ["boot", 1, 2]}, "label holds 3 labels; one, or one for each of 2"),
        ({"mask": torch.zeros(8, 8)}, "mask: nothing may change"),
        ({"mask": torch.ones(4, 4)}, r"mask has shape .*size \(8, 8\)"),
        ({"mask": torch.full((8, 8), 2.0)}, "numbers from 0 to 1"),
        ({"mask": "mask.png"}, "mask='mask.png': pictures"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"output_type": "video"}, "output_type='video'"),
        ({"guidance_algorithm": "mean"}, "shifts the mean of a DDPM step"),
    ],
)
def test_wrong_arguments_are_refused(call: dict[str, Any], message: str) -> None:
    pipeline = tiny()
    with pytest.raises(ValueError, match=message):
        pipeline.edit(random_image(), **{"label": "boot", **call})


def test_invert_refuses_what_it_can_not_use() -> None:
    pipeline, image = tiny(conditional=True), random_image()
    with pytest.raises(ValueError, match="strength=0: a finite number above 0"):
        pipeline.invert(image, 0)
    with pytest.raises(ValueError, match="can't be conditioned on"):
        pipeline.invert(image, label={"boot": 0.5, 1: 0.5})
    with pytest.raises(TypeError, match="scale"):
        pipeline.edit(image, "boot", scale=3)
    one = pipeline.invert(image, label="boot", num_inference_steps=3)
    other = pipeline.invert(image, label=1, num_inference_steps=3)
    assert one.shape == image.shape and not torch.equal(one, other)


# ---------------------------------------------------------------- command


FEW = ["--num-inference-steps", "3", "--quiet", "--device", "cpu"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("a.png", "b.bmp", "more/c.png"):
        PILImage.fromarray(random.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / name)
    return folder


def test_a_folder_is_edited_and_resumed(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    line = ["edit", str(pictures), str(out), "--label", "coat", "--batch-size", "1", *FEW]
    plain, calls = ClassifierGuidedPipeline.edit, []

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(ClassifierGuidedPipeline, "edit", killed)
    with pytest.raises(SystemExit):
        main(line)
    assert (out / "a.png").exists() and not (out / "b.png").exists()
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    main(line)
    assert len(calls) == 4 and "3 pictures, 1 of them existed" in capsys.readouterr().out
    main([*line[:2], str(whole), *line[3:]])
    for name in ("a.png", "b.png", "more/c.png", "comparisons/more/c.png", "results.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    results = json.loads((out / "results.json").read_text())
    assert results.keys() == {"a", "b", "more/c"}
    assert 0 <= results["a"]["after"]["p(coat)"] <= results["a"]["after"]["probability"] <= 1
    with pytest.raises(SystemExit, match="other settings: strength is 0.6, here 0.5"):
        main([*line, "--strength", "0.5"])
    main(line)
    assert "3 of them existed" in capsys.readouterr().out


def test_one_picture_and_a_mask(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mask = np.zeros((28, 28), np.uint8)
    mask[:14] = 255
    PILImage.fromarray(mask).save(tmp_path / "mask.png")
    line = ["edit", str(pictures / "a.png"), str(tmp_path / "o.png"), "--label", "4", *FEW]
    main(
        [
            *line,
            "--mask",
            str(tmp_path / "mask.png"),
            "--source-label",
            "shirt",
            "--guidance-scale",
            "9",
        ]
    )
    before, after = (np.asarray(PILImage.open(p)) for p in (pictures / "a.png", tmp_path / "o.png"))
    assert np.array_equal(before[14:], after[14:]) and not np.array_equal(before, after)
    assert re.search(
        r"\w+ \d+% -> \w+ \d+% by the classifier, mean change 0\.\d+", capsys.readouterr().out
    )
    width, height = PILImage.open(tmp_path / "o-comparison.png").size
    assert width > 3 * 196 and height > 196


def messages(pictures: Path, tmp_path: Path) -> Sequence[tuple[list[str], str]]:
    PILImage.new("L", (30, 28)).save(tmp_path / "wide.png")
    (tmp_path / "no.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    source = str(pictures)
    return [
        ([str(tmp_path / "none"), "out"], "none doesn't exist"),
        ([source, "out.png"], "OUT out.png: IN is a folder"),
        ([str(pictures / "a.png"), "out"], "OUT out: a picture"),
        ([source, str(pictures / "out")], "one within the other"),
        (
            [str(tmp_path / "wide.png"), "out.png"],
            "wide.png has 30 x 28 pixels; the model's images have 28 x 28",
        ),
        ([str(tmp_path / "no.png"), "out.png"], "no.png can't be read as a picture"),
        ([str(tmp_path / "empty"), "out"], "empty has no pictures"),
        ([source, "out", "--mask", str(tmp_path / "empty")], "empty has no pictures"),
        (
            [source, "out", "--mask", str(tmp_path / "wide.png")],
            "wide.png has 30 x 28 pixels, .*28 x 28",
        ),
        ([source, "out", "--label", "shoe"], "label 'shoe' is unknown"),
        ([source, "out", "--strength", "2"], "--strength 2: a finite number from 0 to 1"),
    ]


def test_the_command_checks_before_it_works(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, message in messages(pictures, tmp_path):
        with pytest.raises(SystemExit) as error:
            main(["edit", *words, *([] if "--label" in words else ["--label", "coat"]), *FEW])
        assert re.search(message, str(error.value)), (words, error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.png").exists()


def test_arrays_in_files_are_edited_in_their_units(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A folder of .npy, resumed, and one file with a mask; written with the axes that they have."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "layers_per_block": 1}
    unet = UNet2DModel(**sizes, **blocks, block_out_channels=(8,), norm_num_groups=4)
    config = {**make_classifier().config, "in_channels": 2}
    names = ("sample_size", "in_channels", "num_labels", "block_out_channels", "down_block_types")
    names += ("layers_per_block", "attention_head_dim", "norm_num_groups", "id2label")
    guide = NoiseAwareClassifier(**{name: config[name] for name in names})
    torch.nn.init.normal_(guide.head[-1].out.weight)
    scale = {"data_mean": [5.0, -1.0], "data_std": [3.0, 0.5]}
    pipeline = ClassifierGuidedPipeline(unet, DDIMScheduler(clip_sample=False), guide, **scale)
    pipeline.save_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    source, random = tmp_path / "in", np.random.default_rng(0)
    (source / "more").mkdir(parents=True)
    arrays = random.normal(size=(3, 2, 8, 8)).astype(np.float32) * 3
    for name, array in zip(("a", "b", "more/c"), arrays, strict=True):
        np.save(source / f"{name}.npy", np.moveaxis(array, 0, -1))  # channels last
    line = ["--label", "boot", "--model", str(tmp_path / "model"), "--guidance-scale", "1e5", *FEW]
    main(["edit", str(source), str(tmp_path / "out"), *line])
    expected = pipeline.edit(arrays, "boot", num_inference_steps=3, guidance_scale=1e5)
    for i, name in enumerate(("a", "b", "more/c")):
        after = np.load(tmp_path / "out" / f"{name}.npy")
        difference = np.load(tmp_path / "out" / "differences" / f"{name}.npy")
        assert after.shape == (8, 8, 2)
        np.testing.assert_allclose(
            np.moveaxis(after, -1, 0), expected.images[i], rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(after - difference, np.moveaxis(arrays[i], 0, -1), atol=1e-5)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    change = float(np.abs(expected.difference[2]).mean())
    assert results["more/c"]["change"] == pytest.approx(change, rel=1e-4)
    assert "p(boot)" in results["a"]["after"]
    main(["edit", str(source), str(tmp_path / "out"), *line])
    assert "3 arrays, 3 of them existed" in capsys.readouterr().out
    mask = np.zeros((8, 8))
    mask[:4] = 1
    np.save(tmp_path / "mask.npy", mask)
    files = [str(source / "a.npy"), str(tmp_path / "o.npy")]
    main(["edit", *files, *line, "--mask", str(tmp_path / "mask.npy")])
    before, after = map(np.load, files)
    assert np.array_equal(before[4:], after[4:]) and not np.allclose(before[:4], after[:4])
    assert np.abs(np.load(tmp_path / "o-difference.npy")[:4]).max() > 0.01
    np.save(tmp_path / "long.npy", np.zeros((2, 9, 8)))
    PILImage.new("L", (8, 8)).save(tmp_path / "a.png")
    for words, message in (
        ([str(tmp_path / "long.npy"), "o.npy"], r"long.npy has an array \(2, 9, 8\).*\(2, 8, 8\)"),
        (
            [str(source), str(tmp_path / "folder.npy")],
            "OUT .*folder.npy: IN is a folder, so a folder is",
        ),
        ([files[0], "o.png"], r"OUT o.png: an array \(.npy\) is allowed, as IN is one"),
        ([str(tmp_path / "a.png"), "o.png"], "a.png: the model's samples are arrays; .npy are"),
        ([*files, "--mask", str(tmp_path / "long.npy")], r"mask .*long.npy has shape .*\(8, 8\)"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["edit", *words, *line])


def signals() -> ClassifierGuidedPipeline:
    """A pipeline of signals, (2, 16), in units with a mean of 3 and a deviation of 2."""
    torch.manual_seed(0)
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipeline = ClassifierGuidedPipeline(unet_1d(), scheduler, data_mean=3.0, data_std=2.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_numbers_that_float32_can_not_hold_stay_outside_a_mask(tmp_path: Path) -> None:
    random, masked = np.random.default_rng(0), np.arange(16) < 8
    arrays = {"float64": random.normal(size=(2, 16)) / 3, "float16": np.ones((2, 16), np.float16)}
    arrays["int64"] = np.full((2, 16), 2**24 + 1)
    np.save(tmp_path / "mask.npy", masked)
    (tmp_path / "in").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "in" / f"{name}.npy", array)
    for out, options in (("masked", {"mask": tmp_path / "mask.npy"}), ("same", {"strength": 0.0})):
        options |= {"num_inference_steps": 2, "progress": False}
        edit_folder(signals(), tmp_path / "in", tmp_path / out, None, **options)
        for name, array in arrays.items():
            after = np.load(tmp_path / out / f"{name}.npy")
            outside = slice(8 if out == "masked" else 0, None)
            assert np.array_equal(after[:, outside], array[:, outside])
            assert out == "same" or not np.array_equal(after, array)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones((2, 16), bool), "1.npy has True and False"),
        (np.full((2, 16), np.nan), "1.npy has infinite or NaN"),
        (np.ones((2, 24)), r"1.npy has an array \(2, 24\), .*0.npy one \(2, 16\); one shape"),
    ],
)
def test_arrays_are_checked_before_a_folder_is_edited(
    bad: np.ndarray, message: str, tmp_path: Path
) -> None:
    pipeline = signals()
    pipeline.unet.register_to_config(sample_size=None)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "0.npy", np.ones((2, 16)))
    np.save(tmp_path / "in" / "1.npy", bad)
    with pytest.raises(ValueError, match=message):
        edit_folder(pipeline, tmp_path / "in", tmp_path / "out", None, batch_size=1, progress=False)
    assert not (tmp_path / "out").exists()


def plain_signals() -> ClassifierGuidedPipeline:
    pipeline = signals()
    pipeline.register_to_config(data_mean=None, data_std=None)
    return pipeline


@pytest.mark.parametrize(
    ("make", "image", "message"),
    [
        (tiny, torch.zeros(1, 8, 8), r"image has shape \(1, 8, 8\).* the network's 1 channels"),
        (tiny, torch.zeros(1, 1, 1, 8, 8), r"\(B, C, H, W\) is allowed, .* UNet2DModel"),
        (tiny, np.zeros((8, 8, 1)), r"image is an array \(8, 8, 1\).*\(B, H, W, C\), are allowed"),
        (tiny, torch.zeros(0, 1, 8, 8), r"image has shape \(0, 1, 8, 8\)"),
        (tiny, np.zeros((0, 8, 8, 1)), r"image is an array \(0, 8, 8, 1\)"),
        (plain_signals, torch.zeros(1, 2, 4, 4), r"\(B, C, L\) is allowed, .* UNet1DModel"),
        (signals, np.zeros((0, 2, 16)), r"image=an array \(0, 2, 16\)"),
    ],
)
def test_starts_of_another_rank_or_none_are_refused_in_the_words_of_the_network(
    make: Any, image: Any, message: str
) -> None:
    label = "boot" if make is tiny else None
    for start in (
        lambda: make()(label, image=image, strength=0.5, num_inference_steps=2, output_type="pt"),
        lambda: make().edit(image, label, num_inference_steps=2),
    ):
        with pytest.raises(ValueError, match=message):
            start()
