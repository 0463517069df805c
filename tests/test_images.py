"""Images of latents as Diffusers' pipelines make them, their gradient, and a latent pipeline with its autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler
from test_guidance import normal, quiet, sample, small_classifier, small_unet
from test_terms import assert_equal, slope
from test_terms_schedulers import Spy
from tiny_pipelines import sdxl, sdxl_call

from guided_diffusers import ClassifierGuidedPipeline, EnergyGuidance, gradient, guide
from guided_diffusers.images import convert, decode, one_by_one

SCALING = {"scaling_factor": 0.18215}
STATISTICS = {"scaling_factor": 0.5, "latents_mean": [0.5, -1.0], "latents_std": [2.0, 3.0]}


def small_vae(**config: Any) -> AutoencoderKL:
    """RGB images of 16x16 from two channels of 8x8."""
    torch.manual_seed(0)
    return AutoencoderKL(
        **{
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 2,
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "sample_size": 16,
            **config,
        }
    ).eval()


def latent_pipeline(scheduler: Any, vae: AutoencoderKL, **config: Any) -> ClassifierGuidedPipeline:
    unet = small_unet(in_channels=2, out_channels=2, **config)
    return quiet(unet, scheduler, small_classifier(in_channels=2), vae)


def seen_by(module: torch.nn.Module) -> list[int]:
    """The batch sizes of its calls, as they come."""
    sizes: list[int] = []
    module.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize("config", [{}, SCALING, {**SCALING, "shift_factor": 0.3}, STATISTICS])
def test_latents_are_unscaled_as_in_diffusers(config: dict[str, Any]) -> None:
    """As StableDiffusionPipeline, StableDiffusion3Pipeline and StableDiffusionXLPipeline do it."""
    vae, latents = small_vae(**config).double(), normal(3, 2, 8, 8)
    if "latents_mean" in config:
        mean, std = (
            torch.tensor(config[name]).view(1, 2, 1, 1).double()
            for name in ("latents_mean", "latents_std")
        )
        unscaled = latents * std / vae.config.scaling_factor + mean
    else:
        unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    with torch.no_grad():
        assert_equal(decode(vae, latents), vae.decode(unscaled).sample, 1e-12)
        assert decode(vae.float(), latents).dtype == torch.float32


def test_a_gradient_decodes_one_image_at_a_time() -> None:
    """The plain gradient; the images anew in the backward pass; and all in one where no gradient is wanted."""
    vae, latents = small_vae(**SCALING).double(), normal(3, 2, 8, 8)
    sizes = seen_by(vae.decoder)

    def energy(images: torch.Tensor) -> torch.Tensor:
        return (images - 0.5).square().sum((1, 2, 3))

    with torch.no_grad():
        found = gradient(lambda z: energy(decode(vae, z)), latents)
        assert sizes == [1] * 6
        del sizes[:]
        decode(vae, latents)
        assert sizes == [3]
    assert_equal(found, gradient(lambda z: energy(vae.decode(z / 0.18215).sample), latents), 1e-12)
    with torch.inference_mode():
        assert_equal(gradient(lambda z: energy(decode(vae, z)), latents), found, 1e-12)
    torch.testing.assert_close(gradient(lambda z: one_by_one(torch.sin, z), latents), latents.cos())


def test_a_half_precision_decoder_that_overflows_is_refused_before_the_run() -> None:
    message = (
        r"vae: it computes in float16 and overflows there \(force_upcast\); load it in float32"
    )
    with pytest.raises(ValueError, match=message):
        decode(small_vae().half(), torch.zeros(1, 2, 8, 8))
    assert decode(small_vae().to(torch.bfloat16), torch.zeros(1, 2, 8, 8)).dtype == torch.bfloat16
    pipeline = latent_pipeline(DDIMScheduler(), small_vae().half())
    calls = seen_by(pipeline.unet)
    with pytest.raises(ValueError, match=message):
        pipeline("cat", num_inference_steps=2)
    assert not calls
    assert sample(pipeline, "cat", num_inference_steps=2).shape == (
        1,
        2,
        8,
        8,
    )  # latents need no decoder
    pipeline = latent_pipeline(DDIMScheduler(), small_vae(force_upcast=False).half())
    assert pipeline("cat", num_inference_steps=2, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_each_form(channels: int) -> None:
    """[-1, 1] is 0 to 1, or 0 to 255; what lies beyond is clipped."""
    values = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0, 0.25])
    images = torch.stack([values.roll(i) for i in range(channels)])[None].reshape(1, channels, 2, 4)
    expected = torch.tensor([0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 0.625])
    expected = torch.stack([expected.roll(i) for i in range(channels)])[None].reshape(
        1, channels, 2, 4
    )
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(convert(images.to(dtype), "pt"), expected)
    array = convert(images, "np")
    assert array.dtype == np.float32 and np.array_equal(array, expected.permute(0, 2, 3, 1).numpy())
    (picture,) = convert(images, "pil")
    assert picture.size == (4, 2) and picture.mode == {1: "L", 3: "RGB"}[channels]
    assert np.array_equal(np.asarray(picture).reshape(2, 4, channels), (array[0] * 255).round())


# a latent pipeline


@pytest.mark.parametrize(
    ("scheduler", "config"), [(DDIMScheduler, SCALING), (EulerDiscreteScheduler, STATISTICS)]
)
def test_images_are_the_decoded_latents_also_when_loaded(
    scheduler: type, config: dict, tmp_path: Path
) -> None:
    vae = small_vae(**config)
    pipeline = latent_pipeline(scheduler(), vae)

    def images(pipeline: ClassifierGuidedPipeline, output_type: str, **more: Any) -> Any:
        return pipeline(
            ["cat", "dog"],
            output_type=output_type,
            num_inference_steps=3,
            **more,
            generator=[torch.Generator().manual_seed(i) for i in (0, 1)],
        ).images

    latents, pictures = images(pipeline, "latent"), images(pipeline, "pt")
    assert latents.shape == (2, 2, 8, 8) and pictures.shape == (2, 3, 16, 16)
    if "latents_mean" in config:
        mean, std = (
            torch.tensor(config[name]).view(1, 2, 1, 1) for name in ("latents_mean", "latents_std")
        )
        unscaled = latents * std / 0.5 + mean
    else:
        unscaled = latents / 0.18215
    with torch.no_grad():
        torch.testing.assert_close(pictures, (vae.decode(unscaled).sample / 2 + 0.5).clamp(0, 1))
    assert [picture.size for picture in images(pipeline, "pil")] == [(16, 16)] * 2
    assert not torch.equal(
        images(pipeline, "latent", guidance_scale=0), latents
    )  # the classifier sees latents

    pipeline.save_pretrained(tmp_path)
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae) is AutoencoderKL and torch.equal(images(loaded, "pt"), pictures)
    without = ClassifierGuidedPipeline.from_pretrained(tmp_path, vae=None)
    without.set_progress_bar_config(disable=True)
    assert without.vae is None and torch.equal(images(without, "latent"), latents)


@pytest.mark.parametrize("through_network", [True, False])
def test_an_energy_of_images_goes_through_the_decoder(through_network: bool) -> None:
    """Its score at each step is the finite difference, in float64, of a loop over networks and decoder written out;
    and it lowers the energy of what comes out."""
    vae, scheduler = (
        small_vae(scaling_factor=0.8, shift_factor=0.1).double(),
        DDIMScheduler(clip_sample=False),
    )
    pipeline = latent_pipeline(scheduler, vae)
    pipeline.unet.double()
    direction, target = normal(2, 2, 8, 8, seed=1), 0.2 * normal(3, 16, 16, seed=2)
    x_T = normal(2, 2, 8, 8, seed=3)

    def energy(images: torch.Tensor) -> torch.Tensor:
        return (images - target).square().sum((1, 2, 3))

    def of_x0(x0: torch.Tensor) -> torch.Tensor:
        return energy(vae.decode(x0 / 0.8 + 0.1).sample)

    spy = Spy(EnergyGuidance(energy, 0.3, through_network=through_network))
    vae.requires_grad_(True)
    on = sample(pipeline, num_images_per_label=2, num_inference_steps=4, latents=x_T, guidance=spy)
    assert all(p.requires_grad and p.grad is None for p in vae.parameters()) and len(spy.steps) == 4
    for step, score, t in zip(spy.steps, spy.scores, scheduler.timesteps, strict=True):
        abar = scheduler.alphas_cumprod[t].double()
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()

        def predict(
            x: torch.Tensor, t: Any = t, alpha: torch.Tensor = alpha, sigma: torch.Tensor = sigma
        ) -> torch.Tensor:
            return (x - sigma * pipeline.unet(x, t).sample) / alpha

        with torch.no_grad():
            if through_network:
                expected = slope(
                    lambda x: of_x0(predict(x)), step.sample, direction, 0.1 * float(alpha)
                )  # noqa: B023
            else:
                expected = alpha * slope(of_x0, predict(step.sample), direction, 0.1)
        assert_equal((score * direction).sum((1, 2, 3)), -0.3 * expected, 1e-5)
    off = sample(pipeline, num_images_per_label=2, num_inference_steps=4, latents=x_T)
    with torch.no_grad():
        assert (of_x0(on) < of_x0(off)).all()


def test_an_autoencoder_that_overflows_in_float16_decodes_in_float32_for_guidance() -> None:
    """Stable Diffusion XL in float16, whose pipeline does the same when it decodes the result; float16 again after."""
    pipeline = sdxl().to(torch.float16)
    pipeline.vae.register_to_config(force_upcast=True)
    seen: list[torch.dtype] = []
    hook = pipeline.vae.decoder.register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    call = {
        name: value.half() if isinstance(value, torch.Tensor) else value
        for name, value in sdxl_call().items()
    }
    plain = pipeline(
        **{**call, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    ).images
    own, darker = len(seen), EnergyGuidance(lambda image: image.mean((1, 2, 3)), 300.0)
    with guide(pipeline, darker + darker):
        found = pipeline(
            **{**call, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
        ).images
    hook.remove()
    assert (
        pipeline.vae.dtype == torch.float16 and len(seen) > 2 * own and set(seen) == {torch.float32}
    )
    assert np.isfinite(found).all() and found.mean() < plain.mean()
