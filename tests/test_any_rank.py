"""Samples of any rank: the pipeline does with (B, C, L), (B, C, D, H, W) and (B, C) what it does with images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHAPE, Clock, Mixture, OracleClassifier, OracleUNet
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UNet1DModel, UNet2DModel

from guided_diffusers import (
    ClassifierGuidedPipeline,
    EnergyGuidance,
    NoiseAwareClassifier,
)
from guided_diffusers.networks import network_output

RANKS = [(16,), (2, 8), (1, 2, 4, 2)]
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def quiet(pipeline: ClassifierGuidedPipeline) -> ClassifierGuidedPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def oracle_pipeline(shape: tuple[int, ...], scheduler: Any) -> ClassifierGuidedPipeline:
    """Exact networks of one mixture, whose samples have another shape."""
    mixture = Mixture()
    mixture.means = mixture.means.reshape(2, *shape)
    unet = OracleUNet(mixture, "epsilon", Clock("ddpm", scheduler.alphas_cumprod))
    return quiet(ClassifierGuidedPipeline(unet, scheduler, OracleClassifier(mixture)))


def energy(x0: torch.Tensor) -> torch.Tensor:
    return x0.flatten(1).square().mean(1)


CALLS: list[dict[str, Any]] = [
    {"guidance_scale": 3.0},
    {"guidance_scale": 0.0},
    {"guidance_scale": [0.5, 2.0, 4.0, 1.0]},
    {"guidance_algorithm": "lie_trotter"},
    {"guidance_algorithm": "strang"},
    {"guidance_every": 2},
    {"guidance_tolerance": 0.05},
    {"clip_x0": True},
    {"guidance": EnergyGuidance(energy, 2.0)},
    {"guidance": EnergyGuidance(energy, 2.0, through_network=False, normalize=True)},
]


@pytest.mark.parametrize("shape", RANKS)
@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**BETAS, clip_sample=False),
        DDPMScheduler(**BETAS, clip_sample=False),
        EulerDiscreteScheduler(**BETAS),
    ],
    ids=["DDIM", "DDPM", "Euler"],
)
def test_samples_of_other_ranks_are_images_in_another_shape(
    shape: tuple[int, ...], scheduler: Any
) -> None:
    """Of networks that see numbers only, bit for bit, with all guidance; the noise is the same, too."""
    for call in CALLS:
        outputs = []
        for of_rank in (SHAPE, shape):
            pipeline = oracle_pipeline(of_rank, scheduler)
            generator = [torch.Generator().manual_seed(i) for i in range(4)]
            options = {"num_inference_steps": 6, "generator": generator, **call}
            outputs.append(pipeline([0, 1, 1, 0], output_type="latent", **options).images)
        assert outputs[1].shape == (4, *shape)
        assert torch.equal(outputs[0].flatten(1), outputs[1].flatten(1)), call


def unet_1d(**changes: Any) -> UNet1DModel:
    """A real network of signals (B, 2, 16), conditioned on the time in each block."""
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "in_channels": 2,
        "out_channels": 2,
        "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"),
        "up_block_types": ("UpResnetBlock1D",),
        "mid_block_type": "MidResTemporalBlock1D",
        "out_block_type": "OutConv1DBlock",
        "block_out_channels": (16, 32),
        "time_embedding_type": "positional",
        "use_timestep_embedding": True,
        "act_fn": "silu",
    }
    return UNet1DModel(**config | changes).eval()


def classifier_1d(**changes: Any) -> NoiseAwareClassifier:
    torch.manual_seed(1)
    model = NoiseAwareClassifier(
        sample_size=16,
        in_channels=2,
        num_labels=3,
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        layers_per_block=1,
        attention_head_dim=16,
        norm_num_groups=8,
        **{"dims": 1, **changes},
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_signals_by_a_unet1d_and_a_classifier_of_signals(tmp_path: Any) -> None:
    """Shape, units, the plain loop at scale 0, an effect of guidance, and the same when loaded again."""
    mean, std = [3.0, -1.0], [2.0, 0.5]
    pipeline = quiet(
        ClassifierGuidedPipeline(
            unet_1d(), DDIMScheduler(**BETAS), classifier_1d(), data_mean=mean, data_std=std
        )
    )

    def call(pipeline: ClassifierGuidedPipeline, scale: float, kind: str) -> Any:
        generator = [torch.Generator().manual_seed(i) for i in range(2)]
        options = {"generator": generator, "num_inference_steps": 5, "output_type": kind}
        return pipeline([0, 2], guidance_scale=scale, **options).images

    x = torch.stack(
        [torch.randn(2, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    )
    scheduler = DDIMScheduler(**BETAS)
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t.expand(2)).sample, t, x).prev_sample
    assert torch.equal(call(pipeline, 0.0, "latent"), x)
    expected = x * torch.tensor(std)[:, None] + torch.tensor(mean)[:, None]
    torch.testing.assert_close(call(pipeline, 0.0, "pt"), expected)
    guided = call(pipeline, 3.0, "np")
    assert isinstance(guided, np.ndarray) and guided.shape == (2, 2, 16)
    assert not np.allclose(guided, expected.numpy(), atol=1e-3)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(ClassifierGuidedPipeline.from_pretrained(tmp_path))
    assert type(loaded.unet) is UNet1DModel and loaded.config.data_std == std
    assert np.array_equal(call(loaded, 3.0, "np"), guided)


def test_a_unet1d_of_other_lengths() -> None:
    pipeline = quiet(
        ClassifierGuidedPipeline(unet_1d(), DDIMScheduler(**BETAS), classifier_1d(pool="adaptive"))
    )
    options = {"num_inference_steps": 2, "output_type": "pt"}
    assert pipeline(1, sample_shape=(2, 24), **options).images.shape == (1, 2, 24)
    noise = torch.randn(3, 2, 8)
    assert pipeline(1, num_images_per_label=3, latents=noise, **options).images.shape == (3, 2, 8)
    assert pipeline(1, **options).images.shape == (1, 2, 16)


class Plain(torch.nn.Module):
    """A network of volumes, called (sample, timestep), without a config."""

    def __init__(self, kind: str):
        super().__init__()
        self.conv, self.kind, self.timesteps = torch.nn.Conv3d(2, 2, 3, padding=1), kind, []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> Any:
        self.timesteps.append(timestep)
        output = self.conv(sample) * (1 + timestep.reshape(-1, 1, 1, 1, 1) / 1000)
        return output if self.kind == "tensor" else (output, "more")


def test_volumes_by_a_plain_network_that_returns_a_tensor_or_a_tuple() -> None:
    torch.manual_seed(0)
    networks = {kind: Plain(kind) for kind in ("tensor", "tuple")}
    networks["tuple"].load_state_dict(networks["tensor"].state_dict())
    images = {}
    for kind, network in networks.items():
        pipeline = quiet(ClassifierGuidedPipeline(network, DDIMScheduler(**BETAS)))
        options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
        shape = {"sample_shape": (2, 4, 6, 5), "num_images_per_label": 2}
        images[kind] = pipeline(None, output_type="pt", **shape, **options).images
        assert all(t.shape == (2,) for t in network.timesteps)
    assert images["tensor"].shape == (2, 2, 4, 6, 5)
    assert torch.equal(images["tensor"], images["tuple"])


def test_outputs_of_networks() -> None:
    x, t = torch.randn(2, 2, 16), torch.tensor([3, 4])
    unet = unet_1d()
    assert torch.equal(network_output(unet, x, t), unet(x, t).sample)
    plain = torch.nn.Identity()
    plain.forward = lambda sample, timestep: sample + 1
    assert torch.equal(network_output(plain, x, t), x + 1)


def test_a_unet2d_takes_images_only() -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        **{"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    )
    pipeline = quiet(ClassifierGuidedPipeline(unet, DDIMScheduler(**BETAS)))
    with pytest.raises(
        ValueError, match=r"sample_shape=\(3, 8\): the network, a UNet2DModel, allows"
    ):
        pipeline(None, sample_shape=(3, 8))
    with pytest.raises(
        ValueError, match=r"latents has shape \(1, 3, 8\); \(B, C, H, W\) is allowed"
    ):
        pipeline(None, latents=torch.zeros(1, 3, 8))


def test_images_with_a_data_scale_are_arrays_in_its_units() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    scaled, plain = (
        quiet(ClassifierGuidedPipeline(unet, DDIMScheduler(**BETAS), **scale))
        for scale in ({"data_mean": 5.0, "data_std": 10.0}, {})
    )

    def call(pipeline: ClassifierGuidedPipeline, kind: str) -> Any:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "generator": generator, "output_type": kind}
        return pipeline(None, num_images_per_label=2, **options).images

    x = call(plain, "latent")
    torch.testing.assert_close(call(scaled, "pt"), 5 + 10 * x)
    assert call(scaled, "np").shape == (2, 4, 8, 8) and call(plain, "np").shape == (2, 8, 8, 4)
    assert call(plain, "pt").min() >= 0 and call(plain, "pt").max() <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, r"output_type='pil': samples \('B', 2, 16\).*'np', 'pt' and 'latent' are allowed"),
        ({"height": 16}, r"height=16: .* 1 dimensions, \(16,\).*sample_shape"),
        ({"sample_shape": (3, 16)}, "sample_shape has 3 channels; the network's 2 are allowed"),
        ({"sample_shape": (2, 0)}, r"sample_shape=\(2, 0\): \(channels, size, ...\), positive"),
        ({"sample_shape": 16}, "sample_shape=16: "),
        ({"sample_shape": (2, 16), "width": 4}, "sample_shape=.* with width: only one"),
        ({"sample_shape": (2, 4, 4)}, "samples of 2 dimensions, .*dims=1"),
        ({"image": torch.zeros(1, 2, 16), "strength": 0.5}, "image: the pipeline has a data scale"),
        ({"sample_shape": (2, 24)}, "sample_shape: the samples have 24, the classifier takes 16"),
        ({"latents": torch.zeros(1, 2, 8)}, r"samples of size \(8,\); the classifier allows only"),
        ({"latents": torch.zeros(1, 2, 4, 4)}, r"samples of 2 dimensions.* the classifier's 1"),
    ],
)
def test_refused_of_signals(call: dict[str, Any], message: str) -> None:
    scale = {"data_mean": 0.0, "data_std": 1.0} if "image" in call else {}
    networks = unet_1d(), DDIMScheduler(**BETAS), classifier_1d()
    pipeline = quiet(ClassifierGuidedPipeline(*networks, **scale))
    with pytest.raises(ValueError, match=message):
        pipeline(0, num_inference_steps=2, **call)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"data_mean": 1.0}, "data_std=None: a finite number above 0 is allowed"),
        ({"data_std": 1.0}, "data_mean=None: a finite number is allowed"),
        ({"data_mean": 1.0, "data_std": 0}, "data_std=0: a finite number above 0 is allowed"),
        ({"data_mean": 1.0, "data_std": [1, "a"]}, "data_std='a': "),
        (
            {"data_mean": [0, 0, 0], "data_std": 1.0},
            "data_mean .* of 3 channels; the samples have 2",
        ),
    ],
)
def test_refused_data_scales(scale: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline = ClassifierGuidedPipeline(unet_1d(), DDIMScheduler(**BETAS), **scale)
        quiet(pipeline)(None, output_type="np", num_inference_steps=2)
