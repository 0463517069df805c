"""Samples of any rank: the pipeline does with (B, C, L), (B, C, D, H, W) and (B, C) what it does with images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHAPE, Clock, Mixture, OracleClassifier, OracleUNet
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    UNet1DModel,
    UNet2DModel,
)

from guided_diffusers import (
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    EnergyGuidance,
    NoiseAwareClassifier,
)
from guided_diffusers.attach import guide
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
        (
            {"image": torch.zeros(1, 3, 16), "strength": 0.5},
            r"image=an array \(1, 3, 16\): .* numbers \(B, C, ...\) with the network's 2 channels",
        ),
        (
            {"image": torch.zeros(1, 2, 4, 4), "strength": 0.5},
            r"image has shape \(1, 2, 4, 4\); \(B, C, L\) is allowed",
        ),
        (
            {"image": np.full((1, 2, 16), np.inf), "strength": 0.5},
            "image has infinite or NaN values",
        ),
        ({"image": [[1.0]], "strength": 0.5}, r"image=\[\[1.0\]\]: .* are arrays of data"),
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


SCALE = {"data_mean": 3.0, "data_std": 2.0}


@pytest.mark.parametrize("shape", RANKS)
@pytest.mark.parametrize("kind", ["np", "pt"])
def test_arrays_that_exist_are_started_from_inverted_and_edited_in_their_units(
    shape: tuple[int, ...], kind: str
) -> None:
    """As images of the same exact networks without a scale are, in the network's units."""
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing")
    plain = oracle_pipeline(SHAPE, scheduler)
    scaled = oracle_pipeline(shape, scheduler)
    scaled.register_to_config(**SCALE)
    x = plain.unet.mixture.means[torch.tensor([0, 1, 0])].float() + 0.1
    given = (3 + 2 * x).reshape(3, *shape)
    data = given.numpy() if kind == "np" else given

    def in_units(images: torch.Tensor) -> torch.Tensor:
        return 3 + 2 * images.reshape(-1, *shape).float()

    call = {"num_inference_steps": 8, "guidance_scale": 4.0}
    start = {**call, "strength": 0.5}
    noise = [[torch.Generator().manual_seed(i) for i in range(3)] for _ in range(2)]
    expected = plain([1, 0, 1], image=x, generator=noise[0], output_type="latent", **start).images
    output = scaled([1, 0, 1], image=data, generator=noise[1], output_type=kind, **start).images
    torch.testing.assert_close(torch.as_tensor(output), in_units(expected), atol=1e-4, rtol=1e-4)
    same = scaled([1, 0, 1], image=data, strength=0, output_type=kind).images
    assert torch.equal(torch.as_tensor(same), given)  # bit for bit
    # the noise of an array, and back
    noises = scaled.invert(data, num_inference_steps=60)
    reference = plain.invert(x, num_inference_steps=60)
    torch.testing.assert_close(
        noises.flatten(1), reference.flatten(1).to(noises), atol=1e-4, rtol=1e-4
    )
    closed = scaled.edit(data, None, 1.0, num_inference_steps=60, output_type=kind)
    assert torch.as_tensor(closed.difference).abs().max() < 0.02
    # edits, in a region and everywhere
    edit = {"strength": 0.8, **call}
    expected = plain.edit(x, [1, 0, 1], output_type="latent", **edit)
    output = scaled.edit(data, [1, 0, 1], output_type=kind, **edit)
    difference = torch.as_tensor(output.difference)
    scaled_difference = 2 * expected.difference.reshape(3, *shape).float()
    assert difference.abs().max() > 0.5
    torch.testing.assert_close(difference, scaled_difference, atol=1e-3, rtol=1e-3)
    after = expected.probabilities_after.to(output.probabilities_after)
    torch.testing.assert_close(output.probabilities_after, after, atol=1e-3, rtol=1e-3)
    if shape[1:]:
        mask = torch.zeros(shape[1:])
        mask.flatten()[: mask.numel() // 2] = 1
        output = scaled.edit(data, [1, 0, 1], mask=mask, output_type=kind, **edit)
        outside = (mask == 0).expand(3, *shape)
        assert torch.equal(torch.as_tensor(output.images)[outside], given[outside])
        assert torch.as_tensor(output.difference)[~outside].abs().max() > 0.1
    maps = scaled.anomaly(data, 1, **edit)
    torch.testing.assert_close(
        maps.maps, scaled.edit(data, 1, output_type="pt", **edit).difference.abs().mean(1)
    )
    torch.testing.assert_close(maps.scores, maps.maps.reshape(3, -1).mean(1))
    assert type(scaled.edit(data, 1, **edit).images) is np.ndarray
    with pytest.raises(ValueError, match="output_type='pil': .* no pictures but arrays"):
        scaled.edit(data, 1, output_type="pil", **edit)


class OtherLoop(DiffusionPipeline):
    """A pipeline of Diffusers' kind with a loop of its own, for samples of any rank."""

    def __init__(self, unet: torch.nn.Module, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, steps: int, seed: int) -> list[torch.Tensor]:
        """The sample after each step."""
        generator, path = torch.Generator().manual_seed(seed), []
        self.scheduler.set_timesteps(steps)
        x = x * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            output = self.unet(self.scheduler.scale_model_input(x, t), t).sample
            noise = {} if type(self.scheduler) is DDIMScheduler else {"generator": generator}
            x = self.scheduler.step(output, t, x, **noise).prev_sample
            path.append(x)
        return path


@pytest.mark.parametrize("shape", [(2, 8), (1, 2, 4, 2)])
@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**BETAS, clip_sample=False),
        DDPMScheduler(**BETAS, clip_sample=False),
        EulerDiscreteScheduler(**BETAS),
    ],
    ids=["DDIM", "DDPM", "Euler"],
)
def test_guide_is_exact_at_ranks_3_and_5(shape: tuple[int, ...], scheduler: Any) -> None:
    """Another pipeline's unconditional path, guided at scale 1, is the path of label 1; at 0 its own."""
    mixture, paths = Mixture(shape=shape), {}
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for label in (None, 1):
        clock = Clock("ddpm", scheduler.alphas_cumprod)
        pipeline = OtherLoop(OracleUNet(mixture, "epsilon", clock, label), scheduler)
        paths[label] = pipeline(x, 25, seed=1)
        for scale in (0.0, 1.0) if label is None else ():
            term = ClassifierGuidance(OracleClassifier(mixture), label=1, scale=scale)
            with guide(pipeline, term):
                paths["scale", scale] = pipeline(x, 25, seed=1)
    for plain, off in zip(paths[None], paths["scale", 0.0], strict=True):
        assert torch.equal(plain, off)
    apart = max(
        float((guided - exact).abs().max())
        for guided, exact in zip(paths["scale", 1.0], paths[1], strict=True)
    )
    assert apart < 1e-3 < float((paths[1][-1] - paths[None][-1]).abs().max())
