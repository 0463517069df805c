"""Guiding pipelines whose latents are packed or frames of a video: what terms see, and where it leads.

Checked without this package's formulas: images are those that the pipeline outputs, energies fall from
the unguided run's, gradients are slopes between runs whose sample was moved.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload, UserCpuOffloadHook, add_hook_to_module
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import PipelineCallback
from tiny_pipelines import (
    PIPELINES,
    SD,
    TOKENS,
    WIDTH,
    Recorder,
    Seen,
    Spy,
    conditional_unet,
    flux,
    flux_call,
    formula,
    ldm,
    lively,
    normal,
    pictures,
    plain_unet,
    quiet,
    sd_call,
    sdxl,
    sdxl_call,
    stable_diffusion,
    vae,
)

from guided_diffusers import (
    AutoGuidance,
    ClassifierFreeGuidance,
    EnergyGuidance,
    Guidance,
    StepContext,
)
from guided_diffusers.attach import guide
from guided_diffusers.latent_images import DecoderInput
from guided_diffusers.network_calls import join_batches

EMBEDS = {
    "prompt_embeds": normal(1, TOKENS, WIDTH, seed=1),
    "negative_prompt_embeds": normal(1, TOKENS, WIDTH, seed=2),
}
COMMON = {"num_inference_steps": 3, "output_type": "pt"}


def wan(two: bool = False) -> tuple[Any, dict[str, Any]]:
    def network(seed: int) -> Any:
        torch.manual_seed(seed)
        config = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1}
        sizes = {"text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 16, "rope_max_seq_len": 32}
        return lively(
            diffusers.WanTransformer3DModel(in_channels=4, out_channels=4, **config, **sizes)
        )

    torch.manual_seed(1)
    decoder = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    pipeline = diffusers.WanPipeline(
        None,
        None,
        decoder.eval(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        network(0),
        network(2) if two else None,
        boundary_ratio=0.8 if two else None,
    )
    return quiet(pipeline), {**EMBEDS, **COMMON, "height": 16, "width": 16, "num_frames": 9}


def ltx_condition() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=WIDTH,
    )
    blocks = {"latent_channels": 4, "patch_size": 1, "decoder_causal": False}
    blocks |= {name: (8, 8) for name in ("block_out_channels", "decoder_block_out_channels")}
    blocks |= {name: (1, 1, 1) for name in ("layers_per_block", "decoder_layers_per_block")}
    scaling = {name: (True, True) for name in ("spatio_temporal_scaling",)}
    scaling |= {"decoder_spatio_temporal_scaling": (True, True)}
    scaling |= {"decoder_inject_noise": (False,) * 3, "upsample_residual": (False, False)}
    scaling |= {"upsample_factor": (1, 1), "down_block_types": ("LTXVideoDownBlock3D",) * 2}
    decoder = diffusers.AutoencoderKLLTXVideo(**blocks, **scaling).eval()
    pipeline = diffusers.LTXConditionPipeline(
        FlowMatchEulerDiscreteScheduler(), decoder, None, None, lively(transformer)
    )
    masks = {f"{name}prompt_attention_mask": torch.ones(1, TOKENS) for name in ("", "negative_")}
    sizes = {"height": 32, "width": 32, "num_frames": 9, "image": pictures(32, 1)}
    return quiet(pipeline), {**EMBEDS, **COMMON, **masks, **sizes, "guidance_scale": 3.0}


def qwen_image() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    torch.manual_seed(1)
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, 0.2, 0.0, -0.3],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    pipeline = diffusers.QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(), decoder.eval(), None, None, lively(transformer)
    )
    masks = {
        f"{name}prompt_embeds_mask": torch.ones(1, TOKENS).long() for name in ("", "negative_")
    }
    sizes = {"height": 16, "width": 16, "true_cfg_scale": 3.0}
    return quiet(pipeline), {**EMBEDS, **COMMON, **masks, **sizes}


def z_image() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 16, 16],
    )
    with torch.no_grad():  # made by `torch.empty`
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    pipeline = diffusers.ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae(shift_factor=0.1, scaling_factor=0.4),
        None,
        None,
        lively(transformer),
    )
    embeds = {name: [value[0]] for name, value in EMBEDS.items()}
    return quiet(pipeline), {**embeds, **COMMON, "height": 32, "width": 32, "guidance_scale": 3.0}


def sdxl_rescaled() -> tuple[Any, dict[str, Any]]:
    return sdxl(), {**sdxl_call(), "output_type": "pt", "guidance_rescale": 0.7}


MODERN: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "Flux": lambda: (flux(), {**flux_call(), "output_type": "pt"}),
    "Wan": wan,
    "LTX condition": ltx_condition,
    "Qwen-Image": qwen_image,
    "Z-Image": z_image,
    "SDXL rescaled": sdxl_rescaled,
}
VIDEOS = ("Wan", "LTX condition")


def run(pipeline: Any, call: dict[str, Any], *terms: Guidance, **options: Any) -> torch.Tensor:
    """The pipeline's images in [-1, 1], (B, C, H, W) or (B, C, F, H, W)."""
    generator = torch.Generator().manual_seed(7)
    with guide(pipeline, *terms, **options):
        images = pipeline(**deepcopy(call), generator=generator)[0]
    images = torch.as_tensor(images)
    return 2 * (images.transpose(1, 2) if images.ndim == 5 else images) - 1


class Looks(Guidance):
    """Adds nothing, and keeps the images that it sees of the predicted x0."""

    supports_pure_noise = True
    images: torch.Tensor

    def score(self, step: StepContext) -> torch.Tensor:
        self.images = step.decode(step.x0)
        return torch.zeros_like(step.sample)


def dark_left(images: torch.Tensor) -> torch.Tensor:
    half = images[..., : images.shape[-1] // 2]
    return (half + 1).square().flatten(1).sum(1)


def red_first(images: torch.Tensor) -> torch.Tensor:
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1)
    return (images[:, :, 0] - red).square().flatten(1).sum(1)


@pytest.mark.parametrize("name", MODERN)
def test_terms_see_what_the_pipeline_outputs_and_take_it_where_they_say(name: str) -> None:
    """At the last step the predicted x0 is the result. The energy is measured on the output."""
    pipeline, call = MODERN[name]()
    looks = Looks()
    plain = run(pipeline, call, looks)
    torch.testing.assert_close(looks.images.clamp(-1, 1), plain, rtol=0, atol=1e-4)
    energy = red_first if name in VIDEOS else dark_left
    values = [energy(plain).sum()]
    for scale in (0.02, 0.1):
        values.append(energy(run(pipeline, call, EnergyGuidance(energy, scale))).sum())
    assert values[2] < values[1] < values[0]


@pytest.mark.parametrize("name", MODERN)
def test_the_image_gradient_reaches_the_latents_and_scale_0_is_off(name: str) -> None:
    pipeline, call = MODERN[name]()
    record, call = Recorder(pipeline), {**call, "output_type": "latent"}
    plain = record(**call)
    off = record(
        EnergyGuidance(dark_left, 0.0), EnergyGuidance(dark_left, 0.0, through_network=True), **call
    )
    assert all(torch.equal(a["next"], b["next"]) for a, b in zip(plain, off, strict=True))
    assert not torch.equal(
        record(EnergyGuidance(dark_left, 0.1), **call)[0]["next"], plain[0]["next"]
    )
    requires = [p.requires_grad for p in pipeline.vae.parameters()]
    assert all(requires) and torch.is_grad_enabled()


def moved(pipeline: Any, call: dict[str, Any], nudge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(sample, sum of sin(x0)) at the second step of an unguided run that was moved before it."""
    term = Values(1.0, 0.3, 0.6)
    steps = Recorder(pipeline)(term, nudge=nudge, **call)
    return steps[1]["sample"].double(), term.value


class Values(Guidance):
    supports_pure_noise = True
    value: torch.Tensor

    def score(self, step: StepContext) -> torch.Tensor:
        self.value = step.x0.double().sin().sum()
        return torch.zeros_like(step.sample)


def wave(x0: torch.Tensor) -> torch.Tensor:
    return x0.sin().flatten(1).sum(1)


@pytest.mark.parametrize(
    "name", ["Qwen-Image", "Z-Image", "SDXL rescaled", "Wan 2.2", "LTX condition"]
)
def test_the_gradient_through_the_network_is_the_slope_between_runs(name: str) -> None:
    """Through lists, packing, two networks, and combinations of outputs that are not linear."""
    pipeline, call = wan(two=True) if name == "Wan 2.2" else MODERN[name]()
    call = {**call, "output_type": "latent"}
    seen = Seen(EnergyGuidance(wave, 1.0, 0.3, 0.6, of="x0", through_network=True))
    Recorder(pipeline)(seen.term, **call)
    (score,), h = seen.scores, 2e-3
    (above, up), (below, down) = moved(pipeline, call, h), moved(pipeline, call, -h)
    along = -(score.double() * (above - below) / (2 * h)).sum()  # not of tokens that stay
    slope, atol = (up - down) / (2 * h), 0.02 * float(score.norm())
    torch.testing.assert_close(along, slope, rtol=0.03, atol=atol)


OTHER = normal(1, TOKENS, WIDTH, seed=5)


def animate_diff() -> tuple[Any, dict[str, Any]]:
    """Text embeddings have a row for each frame in its network."""
    torch.manual_seed(0)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 8), motion_layers_per_block=1, motion_norm_num_groups=2
    )
    unet = lively(
        diffusers.UNet2DConditionModel(
            block_out_channels=(8, 8),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            norm_num_groups=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )
    scheduler = DDIMScheduler(clip_sample=False, **SD)
    pipeline = diffusers.AnimateDiffPipeline(vae(), None, None, unet, adapter, scheduler)
    sizes = {"height": 16, "width": 16, "num_frames": 3, "guidance_scale": 3.0}
    return quiet(pipeline), {**EMBEDS, **COMMON, **sizes}


class Conditional(Guidance):
    """Adds nothing; keeps x0 without and with its conditions, at the first step."""

    supports_pure_noise = True

    def __init__(self, *conditions: Any):
        super().__init__()
        self.conditions, self.kept = conditions, None

    def score(self, step: StepContext) -> torch.Tensor:
        self.kept = self.kept or (step.x0, *step.condition_x0)
        return torch.zeros_like(step.sample)


def sd_rescaled() -> tuple[Any, dict[str, Any]]:
    """Two images."""
    pipeline, call = PIPELINES["SD"]()
    pipeline.scheduler = DDIMScheduler(clip_sample=False, **SD)
    return pipeline, {**call, "guidance_rescale": 0.7, "output_type": "pt"}


@pytest.mark.parametrize("name", ["AnimateDiff", "Qwen-Image", "Z-Image", "SD rescaled"])
def test_a_condition_gives_what_the_pipeline_predicts_with_it(name: str) -> None:
    """With lists, rows for frames, and guidance that is rescaled or normalized: a condition is in the
    place of both of the pipeline's prompts, as when both are it."""
    own = {"AnimateDiff": animate_diff, "SD rescaled": sd_rescaled}
    pipeline, call = {**MODERN, **own}[name]()
    is_list = name == "Z-Image"
    value = [OTHER[0]] if is_list else OTHER
    term, expected = (
        Conditional({"cap_feats" if is_list else "encoder_hidden_states": value}),
        Conditional(),
    )
    run(pipeline, call, term)
    value = OTHER.repeat(2, 1, 1) if name == "SD rescaled" else value
    run(
        pipeline, call | dict.fromkeys(["prompt_embeds", "negative_prompt_embeds"], value), expected
    )
    plain, conditional = term.kept
    torch.testing.assert_close(conditional, expected.kept[0], rtol=1e-4, atol=1e-4)
    assert (conditional - plain).norm() > 0.01 * plain.norm()


def test_conditions_of_images_in_a_batch_of_frames_keep_their_order() -> None:
    """Two prompts, three frames: each video gets its own condition."""
    pipeline, call = animate_diff()
    names = [f"{kind}prompt_embeds" for kind in ("", "negative_")]
    call = {**call, **{name: call[name].repeat(2, 1, 1) for name in names}}
    two = torch.cat([OTHER, normal(1, TOKENS, WIDTH, seed=6)])
    term, expected = Conditional({"encoder_hidden_states": two}), Conditional()
    run(pipeline, call, term)
    run(pipeline, {**call, names[0]: two, names[1]: two}, expected)
    torch.testing.assert_close(term.kept[1], expected.kept[0], rtol=1e-4, atol=1e-4)


def test_conditions_are_not_in_the_batch_of_a_cache_and_positions_have_no_rows() -> None:
    """As of AnyFlow's network, which keeps keys and values, and CogVideoX's with two positions."""
    value, rotary = normal(2, 3), (normal(2, 4), normal(2, 4))
    own = {"hidden_states": normal(2, 5), "text": value, "image_rotary_emb": rotary}
    joined = join_batches(2, own, [{**own, "text": torch.zeros(1, 3)}])
    assert joined["hidden_states"].shape == (4, 5) and joined["image_rotary_emb"] == rotary
    assert torch.equal(joined["text"], torch.cat([value, torch.zeros(2, 3)]))
    cached = {**own, "kv_cache": {0: normal(2, 2)}}
    assert join_batches(2, cached, [{**cached, "text": torch.zeros(1, 3)}]) is None
    layers = {**own, "encoder_hidden_states_llama3": normal(2, 2, 3)}  # HiDream's: (layers, B, C)
    assert join_batches(2, layers, [{**layers, "text": torch.zeros(1, 3)}]) is None


def test_a_mask_for_all_rows_stays_one_and_sizes_of_each_row_are_joined() -> None:
    """As of Cosmos, whose network repeats the mask for each row, and of JoyImage's several images."""
    own = {
        "hidden_states": normal(1, 4, 1, 8, 8),
        "encoder_hidden_states": normal(1, 3, 8, seed=1),
        "padding_mask": torch.ones(1, 1, 8, 8),
    }
    other = {**own, "encoder_hidden_states": normal(1, 3, 8, seed=2)}
    joined = join_batches(1, own, [dict(other)])
    assert [len(value) for value in joined.values()] == [2, 2, 1]
    for name in ("hidden_states", "encoder_hidden_states"):
        assert torch.equal(joined[name], torch.cat([own[name], other[name]]))
    assert torch.equal(joined["padding_mask"], own["padding_mask"])
    mask = {**own, "padding_mask": torch.zeros(1, 1, 8, 8)}  # a condition of the mask itself
    assert join_batches(1, own, [mask]) is None
    sizes = [[(1, 2, 2)], [(1, 4, 4)]]
    own = {"hidden_states": normal(2, 5), "text": normal(2, 3), "shape_list": sizes}
    joined = join_batches(2, own, [{**own, "text": torch.zeros(1, 3)}])
    assert joined["shape_list"] == sizes * 2 and len(sizes) == 2


def test_the_gradient_through_a_nonlinear_loop_at_the_first_step_is_the_slope() -> None:
    """There the pipeline's statements run again at another sample."""
    pipeline, call = sd_rescaled()
    call, latents = {**call, "output_type": "latent"}, normal(2, 4, 8, 8, seed=9)
    term = Seen(EnergyGuidance(wave, 1.0, 0.0, 0.3, of="x0", through_network=True))
    run(pipeline, {**call, "latents": latents}, term.term)
    direction, values, h = normal(2, 4, 8, 8, seed=8), [], 2e-3
    for sign in (1, -1):
        value = Values(1.0, 0.0, 0.3)
        run(pipeline, {**call, "latents": latents + sign * h * direction}, value)
        values.append(value.value)
    along = -(term.scores[0].double() * direction).sum()
    torch.testing.assert_close(along, (values[0] - values[1]) / (2 * h), rtol=0.03, atol=1e-3)


class Nonlinear(diffusers.DiffusionPipeline):
    """Its loop normalizes; statements before its network's call use the loop's state up."""

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, mode: str) -> torch.Tensor:
        generator, factor = torch.Generator().manual_seed(0), 1.0
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(3)
        for t in self.scheduler.timesteps:
            if mode == "state":
                factor = factor * 0.5
            noise = torch.randn(latents.shape, generator=generator) if mode == "noise" else 0
            output = self.unet(latents * factor + noise, t)[0]
            output = (output / output.std()).sign() * (output / output.std()).abs().sqrt()
            latents = self.scheduler.step(output, t, latents)[0]
        return latents


@pytest.mark.parametrize("mode", ["plain", "state", "noise"])
def test_a_loop_is_run_again_only_if_its_network_gets_the_same(mode: str) -> None:
    """The difference to the network itself is nothing; what has changed before its call is refused."""
    network = lively(plain_unet(4))
    pipeline = quiet(Nonlinear(network, DDIMScheduler(clip_sample=False)))
    expected = pipeline(mode)
    with guide(pipeline, AutoGuidance(deepcopy(network), 1.0)):
        if mode == "plain":
            torch.testing.assert_close(pipeline(mode), expected, rtol=1e-4, atol=1e-4)
            return
        with pytest.raises(ValueError, match="its loop can't be run again"):
            pipeline(mode)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_too_little_memory_in_a_loop_run_again_is_no_refusal(error: type[Exception]) -> None:
    def run_out(*_: Any) -> None:
        raise error("out of memory")

    network = lively(plain_unet(4))
    pipeline, other = quiet(Nonlinear(network, DDIMScheduler(clip_sample=False))), deepcopy(network)
    other.register_forward_pre_hook(run_out)
    with guide(pipeline, AutoGuidance(other, 1.0)), pytest.raises(error, match="^out of memory"):
        pipeline("plain")


def test_gradients_are_on_again_after_a_run_that_ends_within_the_graph() -> None:
    """By an exception, and by a pipeline that is interrupted."""
    pipeline, call = MODERN["Qwen-Image"]()
    term = EnergyGuidance(wave, 0.1, of="x0", through_network=True)

    def fail(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("in a callback")

    def interrupt(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return tensors

    with pytest.raises(KeyError):
        run(pipeline, {**call, "callback_on_step_end": fail}, term)
    assert torch.is_grad_enabled()
    run(pipeline, {**call, "callback_on_step_end": interrupt}, term)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("output_type", ["np", "latent"])
@pytest.mark.parametrize("way", ["interrupted", "denoising_end"])
def test_a_run_that_ends_before_its_last_step_gives_images_without_a_graph(
    way: str, output_type: str
) -> None:
    """They are those of the term that goes through the network at the steps that there were."""
    pipeline, call = sdxl(), sdxl_call()
    if way == "denoising_end":
        call["denoising_end"] = 0.7

    def interrupt(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.vae.decode(tensors["latents"])  # a preview
        pipe._interrupt = way == "interrupted" and index == 1
        return tensors

    call |= {"callback_on_step_end": interrupt, "output_type": output_type}
    term = EnergyGuidance(wave, 0.01, of="x0", through_network=True)
    calls, kept = [], []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    with guide(pipeline, term):
        for _ in range(2):
            images = pipeline(**deepcopy(call), generator=torch.Generator().manual_seed(7)).images
            kept.append(torch.as_tensor(images))
    assert not kept[0].requires_grad and torch.equal(*kept) and torch.is_grad_enabled()
    assert len(calls) == 6  # two steps, and the first one's is evaluated again


def test_with_a_timestep_for_each_token_an_energy_falls_too() -> None:
    """The scheduler takes the opposite sign of the output there."""
    pipeline, call = ltx_condition()
    call, record = {**call, "output_type": "latent"}, Recorder(pipeline)
    energy = lambda x0: (x0 - 0.3).square().flatten(1).sum(1)  # noqa: E731
    values = [
        energy(record(EnergyGuidance(energy, scale, of="x0"), **call)[-1]["next"]).item()
        for scale in (0.0, 0.01, 0.03, 0.1)
    ]
    assert values == sorted(values, reverse=True) and values[-1] < 0.95 * values[0]


def test_a_last_step_that_does_not_give_the_predicted_x0_is_an_error() -> None:
    """As of a pipeline whose network predicts the opposite."""

    class Opposite(FlowMatchEulerDiscreteScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            return super().step(-model_output, timestep, sample, **options)

    pipeline, call = MODERN["Flux"]()
    pipeline.scheduler = Opposite()
    with pytest.raises(
        ValueError, match="FluxPipeline: the last step of its Opposite gave another"
    ):
        run(pipeline, call, EnergyGuidance(wave, 0.1, of="x0"))
    run(pipeline, call, EnergyGuidance(wave, 0.0, of="x0"))


def test_frames_of_a_video_can_be_chosen() -> None:
    pipeline, call = wan()
    every, one, some = Looks(), Looks(), Looks()
    video = run(pipeline, call, every)
    assert every.images.shape == video.shape == (1, 3, 9, 16, 16)
    run(pipeline, call, one, frames="middle")
    torch.testing.assert_close(one.images, every.images[:, :, 4])
    run(pipeline, call, some, frames=[0, -1])
    torch.testing.assert_close(some.images, every.images[:, :, [0, 8]])
    with pytest.raises(ValueError, match=r"frames=\[9\]: the video has 9 frames"):
        run(pipeline, call, some, frames=[9])
    for frames in ("first", [], [0.5], 3, np.array([0, 1])):
        with pytest.raises(
            ValueError, match="frames=.*: 'all', 'middle' or a list of frame numbers"
        ):
            run(pipeline, call, some, frames=frames)
    pipeline, call = MODERN["Flux"]()
    with pytest.raises(ValueError, match=r"frames=\[0\]: pipeline FluxPipeline makes .*no frames"):
        run(pipeline, call, some, frames=[0])


def test_the_middle_of_a_long_video_takes_the_memory_of_four_frames() -> None:
    """Counted as the activations that have an autograd graph; its latent frame gets the gradient."""
    pipeline, call = wan()
    counts: list[int] = []
    for module in pipeline.vae.decoder.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_hook(
                lambda module, args, out: counts.append(out.requires_grad * out.numel())
            )
    sums = {}
    for frames, number in ("all", 5), ("middle", 33):
        seen = Seen(EnergyGuidance(wave, 0.1, 0.5, 0.8, of="image"))  # one step
        counts.clear()
        run(pipeline, {**call, "num_frames": number}, seen.term, frames=frames)
        sums[number] = sum(counts)
    assert 0 < sums[33] <= sums[5]
    changed = seen.scores[0].abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist()
    assert changed == [4]  # of nine; frames 13 to 16


@pytest.mark.parametrize("temporal", [(False, True, True), (True, True, False)])
@pytest.mark.parametrize("is_residual", [False, True])
def test_a_frame_is_decoded_from_what_it_needs_and_equals_that_of_the_video(
    temporal: tuple[bool, ...], is_residual: bool
) -> None:
    """Its gradient is that of the decoded video, of its own latent frame; of the frames before, the
    last layers make a part."""
    patches = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True}
    torch.manual_seed(0)
    decoder = lively(
        diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=list(temporal),
            **(patches if is_residual else {}),
        )
    ).requires_grad_(False)
    z = normal(1, 4, 9, 2, 2).requires_grad_()
    chosen = DecoderInput(decoder, z, (), {"return_dict": False}).chosen_frames
    made, last = [], decoder.decoder.conv_out
    handle = last.register_forward_hook(lambda module, args, out: made.append(out.shape[2]))
    video = decoder.decode(z).sample
    assert sum(made) == video.shape[2] == 33
    for number in (0, 1, 6, 21, 32):  # at most in two latent frames, of four frames each
        made.clear()
        frame = chosen([number])[:, :, 0]
        assert sum(made) <= 8
        torch.testing.assert_close(frame, video[:, :, number], rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(frame.square().sum(), z)
        (whole,) = torch.autograd.grad(video[:, :, number].square().sum(), z, retain_graph=True)
        own = -(-number // 4)
        torch.testing.assert_close(gradient[:, :, own], whole[:, :, own], rtol=1e-4, atol=1e-5)
        assert whole[:, :, own].any()
        assert gradient.abs().sum((0, 1, 3, 4)).nonzero().flatten().tolist() == [own]
    handle.remove()
    assert "forward" not in vars(decoder.decoder) and not last._forward_pre_hooks


def test_the_network_can_be_named() -> None:
    pipeline, call = wan(two=True)
    with pytest.raises(
        ValueError, match="network='unet': pipeline WanPipeline has .*'transformer'"
    ):
        run(pipeline, call, Spy(0.1), network="unet")
    null = {"encoder_hidden_states": EMBEDS["negative_prompt_embeds"]}
    off = {**call, "guidance_scale": 1.0, "guidance_scale_2": 1.0}
    torch.testing.assert_close(  # each of the two networks in its part of the run
        run(pipeline, off, ClassifierFreeGuidance(null, 4.0)),
        run(pipeline, {**call, "guidance_scale": 5.0}, Spy(0.0)),
        rtol=0,
        atol=2e-3,
    )


def test_a_pipeline_that_steps_a_copy_of_its_scheduler_is_refused() -> None:
    """Before the run where its source says so; else during a long run, or at the end of a short one.
    At scale 0 there is nothing to refuse."""

    class Copies(diffusers.DiffusionPipeline):
        def __init__(self, unet: Any, scheduler: Any):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, steps: int) -> tuple[torch.Tensor]:
            self.scheduler.set_timesteps(steps)
            scheduler, self.latents = deepcopy(vars(self)["scheduler"]), normal(1, 4, 8, 8)
            for self.index, t in enumerate(scheduler.timesteps):
                output = self.unet(self.latents, t, normal(1, TOKENS, WIDTH)).sample
                self.latents = scheduler.step(output, t, self.latents).prev_sample
            return (self.latents,)

    pipeline = Copies(conditional_unet(), DDIMScheduler(clip_sample=False, **SD))
    plain = pipeline(3)[0]
    for steps, last in ((3, 2), (40, 17)):
        with (
            pytest.raises(ValueError, match="pipeline Copies: it steps copies of its scheduler"),
            guide(pipeline, Spy(0.1)),
        ):
            pipeline(steps)
        assert pipeline.index == last
    with guide(pipeline, Spy(0.0)):
        assert torch.equal(pipeline(3)[0], plain)


def test_a_pipeline_whose_source_steps_copies_only_is_refused_before_its_run() -> None:
    """As SkyReels V2's diffusion forcing, with a scheduler for each frame."""

    class Forcing(diffusers.DiffusionPipeline):
        def __init__(self, unet: Any, scheduler: Any):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        def __call__(self) -> None:
            schedulers = [deepcopy(self.scheduler)]
            schedulers[0].step(None, 0, None)

    pipeline = Forcing(conditional_unet(), DDIMScheduler(clip_sample=False, **SD))
    with pytest.raises(ValueError, match="pipeline Forcing: it steps copies of its scheduler"):
        with guide(pipeline, Spy(0.1)):
            pytest.fail("it was not refused")
    with guide(pipeline, Spy(0.0)):
        pass


def test_what_is_no_image_is_refused_by_a_term_that_looks_at_images() -> None:
    pipeline, call = PIPELINES["Kandinsky prior"]()
    with pytest.raises(
        ValueError, match="KandinskyV22PriorPipeline: its predicted x0 .*is no image.*of='x0'"
    ):
        run(pipeline, call, EnergyGuidance(wave, 0.1))


def test_a_callback_gets_plain_tensors_and_may_change_them() -> None:
    """While gradients are on between two steps, for a term that goes through the network."""
    pipeline, call = MODERN["Qwen-Image"]()
    term, kept = EnergyGuidance(wave, 0.1, of="x0", through_network=True), []

    def callback(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.append((tensors["latents"].requires_grad, torch.is_grad_enabled()))
        tensors["latents"].numpy()
        return tensors

    class Official(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012, of the pipeline's contract

        def callback_fn(self, *args: Any) -> dict[str, Any]:
            return {**callback(*args), "note": None}

    expected = run(pipeline, call, term)
    for one in (callback, Official(cutoff_step_ratio=None, cutoff_step_index=1)):
        assert torch.equal(run(pipeline, {**call, "callback_on_step_end": one}, term), expected)
    assert kept == [(False, False)] * 6


# manners


class Leaves(CpuOffload):
    """`CpuOffload` without an accelerator: weights that aren't on the device are NaN."""

    def init_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        if not hasattr(self, "weights"):
            self.weights = [parameter.data for parameter in module.parameters()]
        for parameter in module.parameters():  # the same parameter with other data, as `to` has it
            parameter.data = torch.full_like(parameter, float("nan"))
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.prev_module_hook is not None:
            self.prev_module_hook.offload()
        for parameter, weight in zip(module.parameters(), self.weights, strict=True):
            parameter.data = weight
        return args, kwargs


def offload_models(*modules: torch.nn.Module) -> list[UserCpuOffloadHook]:
    """As `enable_model_cpu_offload` does, which wants an accelerator."""
    hooks: list[UserCpuOffloadHook] = []
    for module in modules:
        hook = Leaves("cpu", hooks[-1] if hooks else None)
        add_hook_to_module(module, hook, append=True)
        hooks.append(UserCpuOffloadHook(module, hook))
    return hooks


@pytest.mark.parametrize(
    ("name", "through"),
    [
        ("slicing", False),
        ("models", False),
        ("models", True),
        ("layers", False),
        ("layers", True),
        ("compiled", True),
    ],
)
def test_ways_to_save_memory_or_time_change_no_guided_image(name: str, through: bool) -> None:
    pipeline, call = MODERN["Flux"]()
    term = EnergyGuidance(dark_left, 0.1, through_network=through)
    expected, plain, hooks = run(pipeline, call, term), run(pipeline, call, Spy(0.0)), []
    assert (expected - plain).abs().max() > 1e-3
    if name == "slicing":
        pipeline.vae.enable_slicing()
    elif name == "models":
        hooks = offload_models(pipeline.transformer, pipeline.vae)
    elif name == "layers":  # as `enable_sequential_cpu_offload` does
        for module in (pipeline.transformer, pipeline.vae):
            cpu_offload(module, torch.device("cpu"), offload_buffers=True)
    else:
        pipeline.transformer = torch.compile(pipeline.transformer, backend="aot_eager")
    torch.testing.assert_close(run(pipeline, call, term), expected, rtol=0, atol=1e-5)
    parameters = [*pipeline.transformer.parameters(), *pipeline.vae.parameters()]
    assert all(parameter.requires_grad for parameter in parameters)
    if name == "layers":
        assert all(parameter.device.type == "meta" for parameter in parameters)
    if hooks:  # the last network is on the device, the one before has left again
        assert all(parameter.isnan().all() for parameter in pipeline.transformer.parameters())
        assert hooks[1].hook.prev_module_hook is hooks[0]


@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_terms_see_what_is_decoded_in_tiles(name: str) -> None:
    pipeline, call = MODERN[name]()
    whole = run(pipeline, call, EnergyGuidance(dark_left, 0.0))
    pipeline.vae.enable_tiling()
    names = ("tile_sample_min_size", "tile_latent_min_size")
    if name == "Wan":
        names = ("tile_sample_min_height", "tile_sample_min_width")
        pipeline.vae.tile_sample_stride_height = pipeline.vae.tile_sample_stride_width = 8
    for attribute in names:
        assert hasattr(pipeline.vae, attribute)
        setattr(pipeline.vae, attribute, 4 if "latent" in attribute else 8)
    looks, one = Looks(), Looks()
    plain = run(pipeline, call, looks)
    assert (plain - whole).abs().max() > 1e-3
    torch.testing.assert_close(looks.images.clamp(-1, 1), plain, rtol=0, atol=1e-4)
    if name == "Wan":
        run(pipeline, call, one, frames="middle")
        torch.testing.assert_close(one.images, looks.images[:, :, 4])
    energy = red_first if name in VIDEOS else dark_left
    guided = run(pipeline, call, EnergyGuidance(energy, 0.1))
    assert energy(guided).sum() < energy(plain).sum()


def test_adapters_that_a_callback_switches_count_from_the_next_step() -> None:
    """Against the step written out, with the gradient through the network."""
    import peft

    unet = conditional_unet()
    for seed, name in enumerate(("first", "second")):
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        torch.manual_seed(seed)
        unet.add_adapter(config, name)
    scheduler = DDIMScheduler(clip_sample=False, **SD)
    pipeline = stable_diffusion(scheduler=scheduler, unet=unet)
    call = sd_call(guidance_scale=1.0, latents=normal(2, 4, 8, 8))
    scale = 0.05

    def switch(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        unet.set_adapter("second")
        return tensors

    results = {}
    for callback in (None, switch):
        unet.set_adapter("first")
        term = EnergyGuidance(wave, scale, of="x0", through_network=True)
        call["callback_on_step_end"] = callback
        results[callback] = Recorder(pipeline)(term, **call)[-1]["next"]
    unet.requires_grad_(False)
    x = call["latents"]
    for index, t in enumerate(scheduler.timesteps):
        unet.set_adapter("second" if index else "first")
        alpha, sigma = formula(scheduler, t)
        x = x.detach().requires_grad_()
        eps = unet(x, t, call["prompt_embeds"]).sample
        (gradient,) = torch.autograd.grad(wave((x - sigma * eps) / alpha).sum(), x)
        x = scheduler.step(eps + sigma * scale * gradient, t, x).prev_sample
    torch.testing.assert_close(results[switch], x.detach(), rtol=0, atol=2e-4)
    assert (results[None] - results[switch]).abs().max() > 0.01


class InPlace(diffusers.DiffusionPipeline):
    """Writes each step into its latents, and clears a cache after the loop, which decoding must not."""

    def __init__(self, unet: Any, vae: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, output_type: str = "pt") -> tuple[torch.Tensor]:
        self.scheduler.set_timesteps(3)
        latents, cache, images = normal(1, 8, 8, 8), [1], []
        for i, t in enumerate(self.scheduler.timesteps):
            output = self.unet(latents[:, :4], t, normal(1, TOKENS, WIDTH)).sample
            if not cache or i >= 3:
                break
            latents[:, :4] = self.scheduler.step(output, t, latents[:, :4], return_dict=False)[0]
        assert cache
        cache.clear()
        latents = latents[:, :4].clone()
        latents[:, :1] = (
            latents[:, :1] * latents[:, 1:].square().mean()
        )  # whose gradient needs both
        for part in latents.split(1):
            images.append(self.vae.decode(part / 2).sample)
        return (torch.cat(images),)


class Helped(diffusers.LDMPipeline):
    """Steps in a method of its own."""

    def denoise(self, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return self.scheduler.step(self.unet(latents, t).sample, t, latents).prev_sample

    @torch.no_grad()
    def __call__(self) -> tuple[torch.Tensor]:
        self.scheduler.set_timesteps(3)
        latents = normal(1, 3, 8, 8)
        for t in self.scheduler.timesteps:
            latents = self.denoise(t, latents)
        return (self.vqvae.decode(latents / self.vqvae.config.scaling_factor).sample,)


def test_latents_of_three_channels_that_another_method_decodes_are_no_images() -> None:
    pipeline, looks = Helped(**ldm().components), Looks()
    with guide(pipeline, looks):
        torch.testing.assert_close(pipeline()[0], looks.images)


class Settings(diffusers.StableDiffusionPipeline):
    """Changes a dictionary in its loop, and before it decodes."""

    @torch.no_grad()
    def __call__(self) -> tuple[torch.Tensor]:
        self.scheduler.set_timesteps(3)
        latents, settings = normal(1, 4, 8, 8), {"factor": 1.0, "unknown": True}
        for t in self.scheduler.timesteps:
            output = self.unet(latents, t, normal(1, TOKENS, WIDTH)).sample.tanh()
            settings["factor"] *= 2
            latents = self.scheduler.step(output, t, latents).prev_sample
        settings.update(offset=5.0)
        settings.pop("unknown")
        return (self.vae.decode(latents * settings.pop("factor") + settings.pop("offset")).sample,)


def test_a_dictionary_is_changed_before_decoding_and_is_the_pipelines_own() -> None:
    parts = stable_diffusion(scheduler=DDIMScheduler(clip_sample=False, **SD)).components
    pipeline, looks = Settings(**parts, requires_safety_checker=False), Looks()
    plain = pipeline()[0]
    with guide(pipeline, looks):
        assert torch.equal(pipeline()[0], plain)
    torch.testing.assert_close(looks.images, plain)


def test_what_terms_see_changes_nothing_of_the_pipelines_run() -> None:
    pipeline = InPlace(conditional_unet(), vae(), DDIMScheduler(clip_sample=False, **SD))
    plain = pipeline()[0]
    looks = Looks()
    with guide(pipeline, looks):
        assert torch.equal(pipeline()[0], plain)
    torch.testing.assert_close(looks.images, plain)
    values = [dark_left(plain)]
    for scale in (1.0, 10.0):  # through what the pipeline writes into its latents
        with guide(pipeline, EnergyGuidance(dark_left, scale, start=0.6)):
            values.append(dark_left(pipeline()[0]))
    assert (values[2] < values[1]).all() and (values[1] < values[0]).all()


class Predictions(diffusers.DiffusionPipeline):
    """Appends its results to a list, and decodes that in the end, as Marigold does."""

    def __init__(self, unet: Any, vae: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        results, text = [], normal(1, TOKENS, WIDTH)
        for start in normal(1, 4, 8, 8).split(1):
            self.scheduler.set_timesteps(3)
            for t in self.scheduler.timesteps:
                output = self.unet(start, t, text).sample
                start = self.scheduler.step(output, t, start).prev_sample
            results.append(start)
        latents = torch.cat(results)
        return torch.cat([self.vae.decode(part).sample for part in latents.split(1)])


def test_a_list_of_results_gets_those_of_the_pipeline_only() -> None:
    pipeline = Predictions(conditional_unet(), vae(), DDIMScheduler(clip_sample=False, **SD))
    plain = pipeline()
    looks = Looks()
    with guide(pipeline, looks):
        assert torch.equal(pipeline(), plain)
    torch.testing.assert_close(looks.images, plain)
    with guide(pipeline, EnergyGuidance(dark_left, 1.0, start=0.6)):
        assert dark_left(pipeline()) < dark_left(plain)


class Edit(diffusers.DiffusionPipeline):
    """Latents (B, items, C, F, H, W), of which the last item is the edited image, as JoyImage's."""

    def __init__(self, transformer: Any, vae: Any, scheduler: Any):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        self.scheduler.set_timesteps(3)
        latents = normal(2, 2, 4, 1, 2, 2)
        source = latents[:, :1].clone()
        for t in self.scheduler.timesteps:
            latents[:, :1] = source
            flat, text = latents.flatten(0, 1), normal(4, TOKENS, WIDTH)
            output = self.transformer(flat, t.expand(4), text).sample.unflatten(0, (2, 2))
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        videos = self.vae.decode(latents.flatten(0, 1)).sample
        return videos.unflatten(0, (2, 2))[:, -1, :, 0]


def test_the_edited_image_is_what_terms_see_of_several_in_the_latents() -> None:
    parts = wan()[0].components
    pipeline = Edit(parts["transformer"], parts["vae"], FlowMatchEulerDiscreteScheduler())
    plain = pipeline()
    for frames in ("all", "middle"):
        looks = Looks()
        with guide(pipeline, looks, frames=frames):
            assert torch.equal(pipeline(), plain)
        assert looks.images.shape == plain.shape == (2, 3, *plain.shape[2:])
        torch.testing.assert_close(looks.images, plain, rtol=1e-4, atol=1e-4)


class WithSound(diffusers.DiffusionPipeline):
    """Steps its scheduler for the images and a copy of it for something else, as LTX 2 does."""

    def __init__(self, unet: Any, vae: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self) -> tuple[torch.Tensor]:
        self.scheduler.set_timesteps(3)
        sound_scheduler = deepcopy(self.scheduler)
        latents, sound = normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=3)
        for t in self.scheduler.timesteps:
            output = self.unet(latents, t, normal(1, TOKENS, WIDTH)).sample
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
            sound = sound_scheduler.step(output, t, sound, return_dict=False)[0]
        images = self.vae.decode(latents).sample
        return images, sound


def test_a_copy_of_the_scheduler_for_something_else_is_neither_guided_nor_in_the_way() -> None:
    pipeline = WithSound(conditional_unet(), vae(), FlowMatchEulerDiscreteScheduler())
    images, sound = pipeline()
    looks = Looks()
    with guide(pipeline, looks):
        assert torch.equal(pipeline()[0], images)
    torch.testing.assert_close(looks.images, images)
    with guide(pipeline, EnergyGuidance(dark_left, 10.0, start=0.6)):  # the last step
        guided, same = pipeline()
    assert dark_left(guided) < dark_left(images) and torch.equal(same, sound)


# the examples


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[1] / "examples" / f"{name}.py"))


def test_the_example_of_energies_does_what_it_says_of_images_and_videos() -> None:
    script = example("energy_pipeline")
    for name, energy, part in (("Flux", "dark left", 0.96), ("Wan", "red start", 1.0)):
        (pipeline, call), values = MODERN[name](), []
        for scale in (0.0, 100.0):
            call["generator"] = torch.Generator().manual_seed(7)
            made = 2 * script["make"](pipeline, energy, scale, **call) - 1
            if name in VIDEOS:
                made = made.transpose(1, 2)[:, :, :1]
            values.append(script["ENERGIES"][energy][0](made))
        assert (values[1] < part * values[0]).all()
