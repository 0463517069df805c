"""Guiding existing pipelines: tiny ones of each kind, with their own schedulers, against their formulas written out."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import cache, partial, wraps
from math import hypot, sqrt
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from test_guidance import small_classifier
from torch._dynamo import OptimizedModule
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from guided_diffusers import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    EnergyGuidance,
    Guidance,
    StepContext,
)
from guided_diffusers.attach import guide

# tiny pipelines

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
WIDTH, TOKENS = 8, 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lively(model: torch.nn.Module, seed: int = 0) -> Any:
    """Every weight random, so that every argument matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def conditional_unet(
    channels: int = 4, out: int | None = None, **changes: Any
) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return lively(
        UNet2DConditionModel(
            **{
                "sample_size": 8,
                "in_channels": channels,
                "out_channels": out or channels,
                "cross_attention_dim": WIDTH,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "attention_head_dim": 2,
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                **BLOCKS,
                **changes,
            }
        )
    )


def plain_unet(channels: int) -> UNet2DModel:
    torch.manual_seed(0)
    return lively(
        UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            **BLOCKS,
        )
    )


def vae(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        **{
            "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "sample_size": 16,
            **BLOCKS,
            **changes,
        }
    ).eval()


@cache
def tokenizer() -> CLIPTokenizer:
    folder = Path(mkdtemp())
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdefghijklmnopqrstuvwxyz",
        *(letter + "</w>" for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )


def text_config(**changes: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{
            "vocab_size": 60,
            "hidden_size": WIDTH,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": WIDTH,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **changes,
        }
    )


def embeds(count: int = 2) -> dict[str, Any]:
    return {
        "prompt_embeds": normal(count, TOKENS, WIDTH, seed=1),
        "negative_prompt_embeds": normal(count, TOKENS, WIDTH, seed=2),
    }


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion(
    cls: type = diffusers.StableDiffusionPipeline,
    scheduler: Any = None,
    unet: Any = None,
    **components: Any,
) -> Any:
    scheduler = scheduler or PNDMScheduler(skip_prk_steps=True, **SD)
    return quiet(
        cls(
            vae=vae(),
            text_encoder=None,
            tokenizer=None,
            unet=unet or conditional_unet(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **components,
        )
    )


def sd_call(**changes: Any) -> dict[str, Any]:
    return {
        **embeds(),
        "output_type": "latent",
        "guidance_scale": 5.0,
        "num_inference_steps": 3,
        **changes,
    }


def pictures(size: int, count: int = 2) -> torch.Tensor:
    return normal(count, 3, size, size, seed=4).clamp(-1, 1) / 2 + 0.5


def sdxl() -> Any:
    unet = conditional_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )
    return quiet(
        diffusers.StableDiffusionXLPipeline(
            vae=vae(scaling_factor=0.13025),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=EulerDiscreteScheduler(**SD),
            add_watermarker=False,
        )
    )


def sdxl_call(**changes: Any) -> dict[str, Any]:
    return sd_call(
        pooled_prompt_embeds=normal(2, WIDTH, seed=5),
        height=16,
        width=16,
        negative_pooled_prompt_embeds=normal(2, WIDTH, seed=6),
        **changes,
    )


def sd3() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=8,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    )
    return quiet(
        diffusers.StableDiffusion3Pipeline(
            lively(transformer),
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae(shift_factor=0.06, scaling_factor=1.5),
            None,
            None,
            None,
            None,
            None,
            None,
        )
    )


def sd3_call(**changes: Any) -> dict[str, Any]:
    return sdxl_call(**changes)


def flux() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    return quiet(
        diffusers.FluxPipeline(
            FlowMatchEulerDiscreteScheduler(),
            vae(shift_factor=0.0),
            None,
            None,
            None,
            None,
            lively(transformer),
        )
    )


def flux_call(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": normal(2, TOKENS, WIDTH),
        "pooled_prompt_embeds": normal(2, WIDTH),
        "height": 16,
        "width": 16,
        "num_inference_steps": 3,
        "output_type": "latent",
        **changes,
    }


def dit(scheduler: Any = None) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        sample_size=8,
    )
    return quiet(
        diffusers.DiTPipeline(
            lively(transformer), vae(), scheduler or DDIMScheduler(clip_sample=False)
        )
    )


def pixart(cls: type) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        sample_size=8,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return quiet(
        cls(
            tokenizer=None,
            text_encoder=None,
            vae=vae(),
            transformer=lively(transformer),
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )
    )


def pixart_call(**changes: Any) -> dict[str, Any]:
    mask = torch.ones(2, TOKENS)
    return sd_call(
        prompt_attention_mask=mask,
        negative_prompt_attention_mask=mask,
        negative_prompt=None,
        use_resolution_binning=False,
        height=16,
        width=16,
        **changes,
    )


IF_SCHEDULER = {
    "beta_schedule": "squaredcos_cap_v2",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
    "variance_type": "learned_range",
}


def deepfloyd() -> Any:
    return quiet(
        diffusers.IFPipeline(
            None,
            None,
            conditional_unet(3, 6),
            DDPMScheduler(**IF_SCHEDULER),
            None,
            None,
            None,
            requires_safety_checker=False,
        )
    )


def deepfloyd_superresolution() -> Any:
    unet = conditional_unet(6, 6, class_embed_type="timestep")
    return quiet(
        diffusers.IFSuperResolutionPipeline(
            None,
            None,
            unet,
            DDPMScheduler(**IF_SCHEDULER),
            DDPMScheduler(),
            None,
            None,
            None,
            requires_safety_checker=False,
        )
    )


def kandinsky() -> Any:
    unet = conditional_unet(
        4,
        8,
        addition_embed_type="image",
        encoder_hid_dim_type="image_proj",
        encoder_hid_dim=WIDTH,
        cross_attention_dim=WIDTH,
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )
    torch.manual_seed(2)
    movq = VQModel(
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_type="spatial",
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
    )
    scheduler = DDPMScheduler(
        variance_type="learned_range", beta_schedule="linear", clip_sample=True
    )
    return quiet(diffusers.KandinskyV22Pipeline(unet, scheduler, movq.eval()))


def kandinsky_call(**changes: Any) -> dict[str, Any]:
    return {
        "image_embeds": normal(2, WIDTH, seed=1),
        "negative_image_embeds": normal(2, WIDTH, seed=2),
        "height": 16,
        "width": 16,
        "guidance_scale": 4.0,
        "num_inference_steps": 3,
        "output_type": "latent",
        **changes,
    }


def kandinsky_prior() -> Any:
    torch.manual_seed(0)
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=WIDTH
    )
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=WIDTH,
    )
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log",
        prediction_type="sample",
        clip_sample=True,
        num_train_timesteps=1000,
        clip_sample_range=5.0,
    )
    image_processor = diffusers.image_processor.VaeImageProcessor()
    image_processor.crop_size = {"height": 8}
    return quiet(
        diffusers.KandinskyV22PriorPipeline(
            lively(prior),
            CLIPVisionModelWithProjection(vision),
            CLIPTextModelWithProjection(text_config()).eval(),
            tokenizer(),
            scheduler,
            image_processor,
        )
    )


def ldm() -> Any:
    return quiet(
        diffusers.LDMPipeline(
            vqvae=VQModel(latent_channels=3, norm_num_groups=4, block_out_channels=(8,)),
            unet=plain_unet(3),
            scheduler=DDIMScheduler(clip_sample=False, **SD),
        )
    )


def ldm_text() -> Any:
    torch.manual_seed(0)
    return quiet(
        diffusers.LDMTextToImagePipeline(
            vqvae=vae(),
            bert=CLIPTextModel(text_config()).eval(),
            tokenizer=tokenizer(),
            unet=conditional_unet(),
            scheduler=DDIMScheduler(clip_sample=False, **SD),
        )
    )


def controlnet() -> Any:
    unet = conditional_unet()
    torch.manual_seed(3)
    control = lively(
        ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)), seed=3
    )
    return stable_diffusion(
        diffusers.StableDiffusionControlNetPipeline, unet=unet, controlnet=control
    )


def inpaint(channels: int) -> tuple[Any, dict[str, Any]]:
    pipeline = stable_diffusion(
        diffusers.StableDiffusionInpaintPipeline,
        DDIMScheduler(clip_sample=False, **SD),
        conditional_unet(channels, 4),
    )
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., :8] = 1
    return pipeline, sd_call(image=pictures(16), mask_image=mask, height=16, width=16)


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "DDPM": lambda: (
        quiet(diffusers.DDPMPipeline(plain_unet(3), DDPMScheduler(clip_sample=False))),
        {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"},
    ),
    "DDIM": lambda: (
        quiet(diffusers.DDIMPipeline(plain_unet(3), DDIMScheduler())),
        {"batch_size": 2, "num_inference_steps": 3, "eta": 0.5, "output_type": "np"},
    ),
    "LDM": lambda: (ldm(), {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}),
    "LDM text": lambda: (
        ldm_text(),
        {
            "prompt": ["a cat", "dogs"],
            "num_inference_steps": 3,
            "output_type": "np",
            "guidance_scale": 3.0,
            "height": 64,
            "width": 64,
        },
    ),
    "SD": lambda: (stable_diffusion(), sd_call()),
    "SD without": lambda: (stable_diffusion(), sd_call(guidance_scale=1.0)),
    "SD 2 Euler v": lambda: (
        stable_diffusion(scheduler=EulerDiscreteScheduler(prediction_type="v_prediction", **SD)),
        sd_call(),
    ),
    "SD Heun": lambda: (
        stable_diffusion(scheduler=diffusers.HeunDiscreteScheduler(**SD)),
        sd_call(),
    ),
    "SDXL": lambda: (sdxl(), sdxl_call()),
    "SDXL img2img": lambda: (
        quiet(
            diffusers.StableDiffusionXLImg2ImgPipeline(**sdxl().components, add_watermarker=False)
        ),
        {
            k: v
            for k, v in sdxl_call(image=pictures(16), strength=0.7).items()
            if k not in ("height", "width")
        },
    ),
    "SD 3": lambda: (sd3(), sd3_call()),
    "Flux": lambda: (flux(), flux_call()),
    "DiT": lambda: (dit(), {"class_labels": [3, 5], "num_inference_steps": 3, "output_type": "np"}),
    "DiT without": lambda: (
        dit(DDPMScheduler(clip_sample=False)),
        {
            "class_labels": [3, 5],
            "guidance_scale": 1.0,
            "num_inference_steps": 3,
            "output_type": "np",
        },
    ),
    "PixArt-alpha": lambda: (pixart(diffusers.PixArtAlphaPipeline), pixart_call()),
    "PixArt-sigma": lambda: (pixart(diffusers.PixArtSigmaPipeline), pixart_call()),
    "IF": lambda: (deepfloyd(), {**sd_call(output_type="pt"), "height": 8, "width": 8}),
    "IF superresolution": lambda: (
        deepfloyd_superresolution(),
        {**sd_call(output_type="pt"), "image": pictures(4), "height": 8, "width": 8},
    ),
    "Kandinsky prior": lambda: (
        kandinsky_prior(),
        {"prompt": ["a cat", "dogs"], "num_inference_steps": 3, "output_type": "pt"},
    ),
    "Kandinsky": lambda: (kandinsky(), kandinsky_call()),
    "img2img": lambda: (
        stable_diffusion(
            diffusers.StableDiffusionImg2ImgPipeline, DDIMScheduler(clip_sample=False, **SD)
        ),
        sd_call(image=pictures(16), strength=0.7),
    ),
    "img2img Euler": lambda: (
        stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline, EulerDiscreteScheduler(**SD)),
        sd_call(image=pictures(16), strength=0.7),
    ),
    "inpainting 9": lambda: inpaint(9),
    "inpainting 4": lambda: inpaint(4),
    "PAG": lambda: (
        stable_diffusion(diffusers.StableDiffusionPAGPipeline, pag_applied_layers="mid"),
        sd_call(pag_scale=3.0),
    ),
    "ControlNet": lambda: (controlnet(), sd_call(image=pictures(16), height=16, width=16)),
}


class Recorder:
    """What the scheduler's step got, and gave, of one call of the pipeline."""

    def __init__(self, pipeline: Any):
        self.pipeline, self.steps = pipeline, []

    def __call__(self, *terms: Guidance, nudge: float = 0.0, **call: Any) -> list[dict[str, Any]]:
        """`nudge`: how far the sample is moved, along `normal(..., seed=8)`, after the first step."""
        scheduler, self.steps = self.pipeline.scheduler, []
        own = type(scheduler).step

        @wraps(scheduler.step)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = own(scheduler, *args, **kwargs)
            if nudge and not self.steps:  # both halves of DiT's alike
                count = len(result[0])
                rows = normal(2, *result[0].shape[1:], seed=8)
                rows = rows.repeat(1 + count // 2, *[1] * (result[0].ndim - 1))[:count]
                result[0].add_(nudge * rows.to(result[0]))
            names = ("model_output", "timestep", "sample")
            self.steps.append({**dict(zip(names, args, strict=False)), **kwargs, "next": result[0]})
            return result

        scheduler.step = step
        torch.manual_seed(0)
        try:
            with guide(self.pipeline, *terms) if terms else nothing():
                self.pipeline(**deepcopy(call), generator=torch.Generator().manual_seed(7))
            assert scheduler.step is step  # as it was found
        finally:
            del scheduler.step
        return self.steps


@contextmanager
def nothing() -> Iterator[None]:
    yield


def formula(scheduler: Any, t: Any) -> tuple[float, float]:
    """(alpha, sigma) of the scheduler's sample at its timestep, written out from its tables."""
    t = float(t)
    if "FlowMatch" in type(scheduler).__name__:
        return 1 - t / 1000, t / 1000
    if any(name in type(scheduler).__name__ for name in ("Euler", "Heun")):
        betas = (
            torch.linspace(
                SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000, dtype=torch.float64
            )
            ** 2
        )
        abar = torch.cumprod(1 - betas, 0).numpy()
        return 1.0, float(np.interp(t, np.arange(1000), np.sqrt((1 - abar) / abar)))
    abar = scheduler.alphas_cumprod[round(t)].double().item()
    return sqrt(abar), sqrt(1 - abar)


def x0_of(scheduler: Any, output: torch.Tensor, t: Any, sample: torch.Tensor) -> torch.Tensor:
    alpha, sigma = formula(scheduler, t)
    output = output[:, : sample.shape[1]]
    kind = "flow" if "FlowMatch" in type(scheduler).__name__ else scheduler.config.prediction_type
    match kind:
        case "flow":
            return sample - sigma * output
        case "epsilon":
            return (sample - sigma * output) / alpha
        case "v_prediction":
            z, norm = sample / hypot(alpha, sigma), hypot(alpha, sigma)
            return (alpha * z - sigma * output) / norm if alpha == 1 else alpha * z - sigma * output
    return output


class Spy(Guidance):
    """Towards its middle, and keeps the steps that it saw."""

    supports_pure_noise = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen: list[StepContext] = []
        self.again: list[torch.Tensor] = []

    def score(self, step: StepContext) -> torch.Tensor:
        self.seen.append(step)
        self.again.append(step.predict(step.sample))
        return -self.scale_at(step) * (step.sample - 0.3)


# every pipeline


@pytest.mark.parametrize("name", PIPELINES)
def test_at_scale_0_it_is_the_unguided_pipeline_bit_for_bit(name: str) -> None:
    pipeline, call = PIPELINES[name]()
    record = Recorder(pipeline)
    plain, off = record(**call), record(Spy(0.0), **call)
    assert len(plain) == len(off) > 0 and all(
        torch.equal(a["next"], b["next"]) for a, b in zip(plain, off, strict=True)
    )
    assert all(torch.isfinite(step["next"]).all() for step in plain)


@pytest.mark.parametrize("name", PIPELINES)
def test_what_a_term_sees_and_what_becomes_of_its_score(name: str) -> None:
    """The predicted x0 moves by sigma^2 / alpha score, all read from formulas written out."""
    pipeline, call = PIPELINES[name]()
    spy, record, scale = Spy(0.2), Recorder(pipeline), 0.2
    plain, steps = record(**call), record(spy, **call)
    assert len(spy.seen) == len(steps) == len(plain)
    for index, (step, got) in enumerate(zip(spy.seen, steps, strict=True)):
        t, rows = got["timestep"], len(step.sample)
        assert (
            rows == 2
            and step.index == index
            and step.count == len(steps)
            and step.timestep == float(t)
        )
        alpha, sigma = formula(pipeline.scheduler, t)
        assert step.level.alpha == pytest.approx(alpha, rel=2e-3, abs=1e-6)
        assert step.level.sigma == pytest.approx(sigma, rel=2e-3)
        torch.testing.assert_close(step.sample, got["sample"][:rows])
        moved = x0_of(pipeline.scheduler, got["model_output"], t, got["sample"])[:rows]
        shift = sigma**2 / max(alpha, 2.0**-24) * -scale * (got["sample"][:rows] - 0.3)
        size = max(
            float(moved.abs().max()),
            float(shift.abs().max()),
            float((sigma * got["model_output"]).abs().max()),
        )
        torch.testing.assert_close(moved, step.x0 + shift, rtol=5e-3, atol=1e-4 * size)
        torch.testing.assert_close(
            spy.again[index], step.x0, rtol=1e-3, atol=1e-4 * float(step.x0.abs().max())
        )
    first = x0_of(
        pipeline.scheduler, plain[0]["model_output"], plain[0]["timestep"], plain[0]["sample"]
    )[:2]
    torch.testing.assert_close(
        spy.seen[0].x0, first, rtol=2e-3, atol=1e-4 * float(first.abs().max())
    )
    if steps[0]["model_output"].shape[1] > plain[0]["sample"].shape[1]:  # the learned variance
        variances = [
            step["model_output"][:, plain[0]["sample"].shape[1] :] for step in (plain[0], steps[0])
        ]
        assert torch.equal(*variances)


@pytest.mark.parametrize("name", PIPELINES)
def test_afterwards_the_pipeline_is_as_before_also_after_an_exception(name: str) -> None:
    pipeline, call = PIPELINES[name]()
    modules = [one for one in pipeline.components.values() if isinstance(one, torch.nn.Module)]
    next(modules[0].parameters()).requires_grad_(False)
    wanted = [[p.requires_grad for p in module.parameters()] for module in modules]
    states = [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]
    plain = Recorder(pipeline)(**call)
    attributes = [
        set(vars(module)) for module in modules
    ]  # a cache of diffusers stays from the first run

    class Fails(Spy):
        def score(self, step: StepContext) -> torch.Tensor:
            score = super().score(step)  # after the network was evaluated for the gradient
            assert not any(p.requires_grad for module in modules[:1] for p in module.parameters())
            if step.index == 1:
                raise KeyError("inside")
            return score

    with pytest.raises(KeyError, match="inside"), guide(pipeline, Fails()):
        pipeline(**deepcopy(call))
    assert "step" not in vars(pipeline.scheduler)
    for module, grads, state, names in zip(modules, wanted, states, attributes, strict=True):
        assert [p.requires_grad for p in module.parameters()] == grads and set(
            vars(module)
        ) == names
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    again = Recorder(pipeline)(**call)
    assert all(torch.equal(a["next"], b["next"]) for a, b in zip(plain, again, strict=True))


# what the terms can ask for


class Seen:
    """A term with the steps and scores that it gave."""

    def __init__(self, term: Guidance):
        self.term, self.steps, self.scores = term, [], []
        own = term.score

        def score(step: StepContext) -> torch.Tensor:
            self.steps.append(step)
            self.scores.append(own(step))
            return self.scores[-1]

        term.score = score


DECODES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "SD": lambda pipeline, z: pipeline.vae.decode(z / 0.18215).sample,
    "SDXL": lambda pipeline, z: pipeline.vae.decode(z / 0.13025).sample,
    "SD 3": lambda pipeline, z: pipeline.vae.decode(z / 1.5 + 0.06).sample,
    "DiT": lambda pipeline, z: pipeline.vae.decode(z / 0.18215).sample,
    "LDM": lambda pipeline, z: pipeline.vqvae.decode(z / 0.18215).sample,
    "Kandinsky": lambda pipeline, z: pipeline.movq.decode(z, force_not_quantize=True).sample,
    "IF": lambda pipeline, z: z,
}


class StraightThrough:
    """A decoder that quantizes, as its gradient has it: around the code that it found for z0, not rounded."""

    def __init__(self, vqvae: VQModel, z0: torch.Tensor):
        self.vqvae, self.z0, self.code = vqvae, z0, vqvae.quantize(z0)[0]

    def decode(self, z: torch.Tensor) -> Any:
        return self.vqvae.decode(self.code + (z - self.z0), force_not_quantize=True)


@pytest.mark.parametrize("name", DECODES)
def test_terms_look_at_images_as_the_pipeline_decodes_them(name: str) -> None:
    """The score is the finite difference of the energy of what the pipeline's own decoder makes of x0."""
    pipeline, call = PIPELINES[name]()
    record, target = (
        Seen(EnergyGuidance(lambda images: ((images - 0.2) ** 2).flatten(1).sum(1), 0.5)),
        DECODES[name],
    )
    Recorder(pipeline)(record.term, **call)
    for step, score in zip(record.steps, record.scores, strict=True):
        x0 = step.x0.double()
        with torch.no_grad():
            torch.testing.assert_close(step.decode(step.x0), target(pipeline, step.x0))
            network = next(
                (
                    deepcopy(one).double()
                    for key in ("vae", "movq", "vqvae")
                    if (one := getattr(pipeline, key, None))
                ),
                None,
            )
            vqvae = StraightThrough(network, x0 / 0.18215) if name == "LDM" else None
            holder = type("Holder", (), {"vae": network, "movq": network, "vqvae": vqvae})()
            direction, h = normal(*x0.shape, seed=8).double(), 1e-5 * float(x0.abs().max())
            up, down = (
                ((target(holder, x0 + s * h * direction) - 0.2) ** 2).flatten(1).sum(1)
                for s in (1, -1)
            )
        jacobian = step.level.alpha / (step.level.alpha**2 + step.level.sigma**2)
        torch.testing.assert_close(
            (score * direction).flatten(1).sum(1),
            -0.5 * jacobian * (up - down) / (2 * h),
            rtol=2e-3,
            atol=1e-4 * float(score.norm()),
        )


def test_the_gradient_through_the_network_is_the_finite_difference() -> None:
    """In float64, of the image's energy, through the two halves of classifier-free guidance, written out."""
    scheduler = DDIMScheduler(clip_sample=False, **SD)
    pipeline = stable_diffusion(scheduler=scheduler).to(torch.float64)
    record = Seen(
        EnergyGuidance(lambda images: (images**2).sum((1, 2, 3)), 0.5, through_network=True)
    )
    call = sd_call(**{name: value.double() for name, value in embeds().items()})
    Recorder(pipeline)(record.term, **call)
    assert len(record.steps) == 3

    def energy(x: torch.Tensor, t: float) -> torch.Tensor:
        alpha, sigma = formula(scheduler, t)
        no, yes = (
            pipeline.unet(x, t, encoder_hidden_states=call[name]).sample
            for name in ("negative_prompt_embeds", "prompt_embeds")
        )
        x0 = (x - sigma * (no + 5.0 * (yes - no))) / alpha
        return (pipeline.vae.decode(x0 / 0.18215).sample ** 2).sum((1, 2, 3))

    for step, score in zip(record.steps, record.scores, strict=True):
        direction, h = normal(*step.sample.shape, seed=8).double(), 1e-5
        with torch.no_grad():
            up, down = (energy(step.sample + s * h * direction, step.timestep) for s in (1, -1))
        torch.testing.assert_close(
            (score * direction).sum((1, 2, 3)), -0.5 * (up - down) / (2 * h), rtol=1e-4, atol=1e-9
        )


@pytest.fixture
def float64() -> Iterator[None]:
    """Networks, embeddings and noise that are made meanwhile are."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def waves(x0: torch.Tensor) -> torch.Tensor:
    """An energy with a gradient of the same size wherever x0 is: cos(x0)."""
    return x0.sin().flatten(1).sum(1)


@pytest.mark.parametrize("name", PIPELINES)
def test_an_energy_of_x0_falls_as_its_finite_differences_say(name: str, float64: None) -> None:
    """Measured from outside, on what reaches the second step of whole runs.

    Through the network the predicted x0 moves by -scale sigma^2 / alpha grad_x E(x0(x)), and that gradient is the slope
    of the energy between unguided runs whose sample was moved. Without, E falls by what the gradient in x0 predicts,
    scale sigma^2 / (alpha^2 + sigma^2) |grad E|^2.
    """
    pipeline, call = PIPELINES[name]()
    record, scale, h = Recorder(pipeline), 1e-6, 1e-5

    def second(*terms: Guidance, nudge: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(sample, predicted x0) of the two images."""
        got = record(*terms, nudge=nudge, **call)[1]
        return got["sample"][:2], x0_of(
            pipeline.scheduler, got["model_output"], got["timestep"], got["sample"]
        )[:2]

    def slope(gradient: torch.Tensor, *points: torch.Tensor) -> torch.Tensor:
        return (gradient * (points[0] - points[1]) / (2 * h)).flatten(1).sum(1)

    (x, plain), (above, up), (below, down) = second(), second(nudge=h), second(nudge=-h)
    alpha, sigma = formula(pipeline.scheduler, record.steps[1]["timestep"])
    begin = 0.9 / len(record.steps)  # from the second step
    (seen, through), (seen_too, beside) = (
        second(EnergyGuidance(waves, scale, begin, of="x0", through_network=one))
        for one in (True, False)
    )
    assert torch.equal(seen, x) and torch.equal(seen_too, x) and x.dtype == torch.float64
    gradient = (plain - through) * alpha / (scale * sigma**2)
    # a control network's own gradient is left out: what it said is taken as given
    tolerance = 0.05 if name == "ControlNet" else 1e-4
    torch.testing.assert_close(
        slope(gradient, above, below),
        (waves(up) - waves(down)) / (2 * h),
        rtol=tolerance,
        atol=tolerance * float(gradient.norm()),
    )
    fall = scale * sigma**2 / (alpha**2 + sigma**2) * plain.cos().square().flatten(1).sum(1)
    torch.testing.assert_close(waves(plain) - waves(beside), fall, rtol=1e-3, atol=0)


def counted(network: torch.nn.Module) -> list[int]:
    """The batch sizes of the network's calls, as they come."""
    calls: list[int] = []
    network.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(
            len(args[0] if args else next(iter(kwargs.values())))
        ),
        with_kwargs=True,
    )
    return calls


CONDITIONS: dict[
    str, tuple[dict[str, Any], float, dict[str, Any]]
] = {  # null, the pipeline's scale, its "off"
    "SD": (
        {"encoder_hidden_states": embeds()["negative_prompt_embeds"]},
        5.0,
        {"guidance_scale": 1.0},
    ),
    "SDXL": (
        {
            "encoder_hidden_states": embeds()["negative_prompt_embeds"],
            "added_cond_kwargs": {"text_embeds": normal(2, WIDTH, seed=6)},
        },
        5.0,
        {"guidance_scale": 1.0},
    ),
    "SD 3": (
        {
            "encoder_hidden_states": embeds()["negative_prompt_embeds"],
            "pooled_projections": normal(2, WIDTH, seed=6),
        },
        5.0,
        {"guidance_scale": 1.0},
    ),
    "DiT": ({"class_labels": torch.tensor([1000])}, 4.0, {"guidance_scale": 1.0}),
    "PixArt-sigma": (
        {"encoder_hidden_states": embeds()["negative_prompt_embeds"]},
        5.0,
        {"guidance_scale": 1.0},
    ),
    "Kandinsky": (
        {"added_cond_kwargs": {"image_embeds": normal(2, WIDTH, seed=2)}},
        4.0,
        {"guidance_scale": 1.0},
    ),
    "ControlNet": (
        {"encoder_hidden_states": embeds()["negative_prompt_embeds"]},
        5.0,
        {"guidance_scale": 1.0},
    ),
    "IF": (
        {"encoder_hidden_states": embeds()["negative_prompt_embeds"]},
        5.0,
        {"guidance_scale": 1.0},
    ),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_classifier_free_guidance_is_the_pipelines_own_with_one_call_a_step(name: str) -> None:
    pipeline, call = PIPELINES[name]()
    null, scale, off = CONDITIONS[name]
    record = Recorder(pipeline)
    if (
        name == "ControlNet"
    ):  # its control for the null prompt comes from the null prompt in one, and not in the other
        call["controlnet_conditioning_scale"] = 0.0
    own = record(**call)
    calls = counted(getattr(pipeline, "unet", None) or pipeline.transformer)
    ours = record(ClassifierFreeGuidance(null, scale - 1), **{**call, **off})
    assert calls == [4] * len(own)
    for one, other in zip(own, ours, strict=True):
        rows = len(other["next"])
        torch.testing.assert_close(
            other["next"], one["next"][:rows], rtol=2e-3, atol=2e-4 * float(one["next"].abs().max())
        )
    plain = record(**{**call, **off})
    assert (plain[0]["next"] - ours[0]["next"]).norm() > 1e-3 * (plain[0]["next"]).norm()


def test_conditions_act_on_part_of_the_run_and_beside_the_pipelines_own_guidance() -> None:
    pipeline, call = PIPELINES["SD"]()
    null = {"encoder_hidden_states": embeds()["negative_prompt_embeds"][:1]}
    calls = counted(pipeline.unet)
    Recorder(pipeline)(ClassifierFreeGuidance(null, 2.0, 0.0, 0.5), **call)  # PNDM: four steps
    assert calls == [8, 8, 4, 4]

    pipeline, call = PIPELINES["img2img"]()
    calls, spy = counted(pipeline.unet), Spy(0.1)
    Recorder(pipeline)(
        ClassifierFreeGuidance(null, 2.0, 0.5, 1.0) + spy, **{**call, "num_inference_steps": 6}
    )
    assert [step.index for step in spy.seen] == [0, 1, 2, 3] and {
        step.count for step in spy.seen
    } == {4}
    assert calls == [4, 4, 4, 4, 8, 4, 8, 4]  # the spy's own between them


def test_a_worse_network_is_told_the_same() -> None:
    """Autoguidance of a whole Stable Diffusion step, written out."""
    pipeline, call = PIPELINES["SD 2 Euler v"]()
    worse = lively(conditional_unet(), seed=5)
    record = Recorder(pipeline)
    plain, ours = record(**call), record(AutoGuidance(worse, 2.0), **call)
    got, context = plain[0], torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    _, sigma = formula(pipeline.scheduler, got["timestep"])
    with torch.no_grad():
        no, yes = worse(
            torch.cat([got["sample"]] * 2) / hypot(1, sigma),
            got["timestep"],
            encoder_hidden_states=context,
        ).sample.chunk(2)
    bad = no + 5.0 * (yes - no)
    torch.testing.assert_close(
        ours[0]["model_output"],
        got["model_output"] + 2 * (got["model_output"] - bad),
        rtol=1e-3,
        atol=1e-4,
    )
    assert all(p.requires_grad for p in worse.parameters())


def test_a_classifier_steers_stable_diffusion_by_names_and_scales_an_image() -> None:
    pipeline, call = PIPELINES["SD"]()
    classifier, record = small_classifier(in_channels=4), Recorder(pipeline)
    record_of = Seen(ClassifierGuidance(classifier, ["cat", "owl"], [2.0, 0.0]))
    plain, ours = record(**call), record(record_of.term, **call)
    assert not torch.equal(plain[-1]["next"][0], ours[-1]["next"][0])
    torch.testing.assert_close(
        ours[-1]["next"][1], plain[-1]["next"][1]
    )  # PNDM mixes steps, not images
    step, score = record_of.steps[0], record_of.scores[0]
    _, sigma = formula(pipeline.scheduler, step.timestep)
    torch.testing.assert_close(
        ours[0]["model_output"], plain[0]["model_output"] - sigma * score, rtol=1e-3, atol=1e-5
    )
    with pytest.raises(
        ValueError, match="label holds 3 labels up to id 2; one, or one for each of the 2 images"
    ):
        record(ClassifierGuidance(classifier, [0, 1, 2]), **call)


@pytest.mark.parametrize("name", ["img2img", "img2img Euler", "inpainting 9", "inpainting 4"])
def test_images_that_exist_are_guided_to_a_lower_energy(name: str) -> None:
    pipeline, call = PIPELINES[name]()
    call |= {"output_type": "latent", "strength": 0.7, "num_inference_steps": 10}

    def energy(latents: torch.Tensor) -> torch.Tensor:
        return latents.float()[..., :4].square().mean((1, 2, 3))

    def run(scale: float) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        with guide(pipeline, EnergyGuidance(energy, scale, of="x0")):
            return pipeline(**{**call, "generator": generators})[0]

    plain, guided, more = run(0.0), run(20.0), run(60.0)
    assert (energy(guided) < energy(plain)).all() and (energy(more) < energy(guided)).all()
    if name == "inpainting 4":  # outside the mask the pipeline puts the image back
        torch.testing.assert_close(guided[..., 4:], plain[..., 4:])
        assert not torch.equal(guided[..., :4], plain[..., :4])


def test_a_sum_of_terms_is_one_guidance() -> None:
    pipeline, call = PIPELINES["SD without"]()
    record, null = Recorder(pipeline), {"encoder_hidden_states": embeds()["negative_prompt_embeds"]}
    terms = [Spy(0.1), ClassifierFreeGuidance(null, 2.0)]
    plain, one, other, both, summed = (
        record(*some, **call)[0]["model_output"]
        for some in ([], terms[:1], terms[1:], terms, [terms[0] + terms[1]])
    )
    torch.testing.assert_close(both - plain, (one - plain) + (other - plain), rtol=1e-3, atol=1e-5)
    assert torch.equal(both, summed)


def test_dit_of_two_images_of_one_seed_is_not_taken_for_a_doubled_batch() -> None:
    pipeline = dit()
    classifier = small_classifier(in_channels=4)
    call = {
        "class_labels": [3, 3],
        "guidance_scale": 1.0,
        "num_inference_steps": 2,
        "output_type": "np",
    }
    with guide(pipeline, ClassifierGuidance(classifier, ["cat", "dog"])):
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        images = pipeline(**call, generator=generators).images
    assert abs(images[0] - images[1]).max() > 1e-4


def test_within_inference_mode_it_is_the_same() -> None:
    pipeline, call = PIPELINES["SD 2 Euler v"]()
    record, null = Recorder(pipeline), {"encoder_hidden_states": embeds()["negative_prompt_embeds"]}

    def terms() -> Guidance:
        return ClassifierFreeGuidance(null, 2.0) + EnergyGuidance(
            lambda x: (x**2).sum((1, 2, 3)), through_network=True
        )

    plain = record(terms(), **call)[-1]["next"]
    with torch.inference_mode():  # the network is evaluated again there, for the gradient
        torch.testing.assert_close(record(terms(), **call)[-1]["next"], plain)


def test_a_new_call_and_other_timesteps_are_a_new_run() -> None:
    pipeline, call = PIPELINES["SDXL"]()
    spy = Spy(0.1)
    with guide(pipeline, spy):
        pipeline(**deepcopy(call))
        pipeline(**{**deepcopy(call), "num_inference_steps": 2})
        pipeline(**{**deepcopy(call), "timesteps": [900, 400]})
    assert [(step.index, step.count) for step in spy.seen] == [
        (0, 3),
        (1, 3),
        (2, 3),
        (0, 2),
        (1, 2),
        (0, 2),
        (1, 2),
    ]
    assert [step.timestep for step in spy.seen[-2:]] == [900, 400]


def test_a_run_that_broke_off_leaves_nothing_to_the_next() -> None:
    """Between the network's call and the step: the call must not count for the next run."""
    pipeline, call = PIPELINES["SDXL"]()
    spy = Spy(0.1)

    class Broken(Exception):
        pass

    def rescale(self: Any) -> float:
        raise Broken

    with guide(pipeline, spy):
        own = type(pipeline).guidance_rescale
        type(pipeline).guidance_rescale = property(rescale)
        try:
            with pytest.raises(Broken):
                pipeline(**deepcopy(call))
        finally:
            type(pipeline).guidance_rescale = own
        assert not spy.seen
        pipeline(**deepcopy(call))
    assert len(spy.again) == 3


def test_a_loop_of_ones_own_is_guided_too() -> None:
    """With timesteps set before, and the second half of the run only."""
    pipeline, _ = PIPELINES["SD"]()
    pipeline.scheduler = EulerDiscreteScheduler(**SD)
    pipeline.scheduler.set_timesteps(4)
    begun = pipeline.scheduler.timesteps[2:]
    x, spy = normal(1, 4, 8, 8) * 2, Spy(0.1)
    with guide(pipeline, spy), torch.no_grad():
        for t in begun:
            output = pipeline.unet(
                pipeline.scheduler.scale_model_input(x, t), t, normal(1, TOKENS, WIDTH)
            ).sample
            x = pipeline.scheduler.step(output, t, x).prev_sample
    assert [(step.index, step.count) for step in spy.seen] == [(0, 2), (1, 2)]
    assert [step.timestep for step in spy.seen] == begun.tolist()


# misuse


def test_what_cannot_be_guided_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    pipeline, call = PIPELINES["SD"]()
    spy = Spy()

    def entering(pipeline: Any, *terms: Any) -> None:
        with guide(pipeline, *terms):
            raise AssertionError

    class Bare:
        scheduler, unet = DDIMScheduler(), None

    with pytest.raises(ValueError, match="pipeline Bare has no unet or transformer or prior"):
        entering(Bare(), spy)
    Bare.scheduler = None
    with pytest.raises(ValueError, match="pipeline Bare has no scheduler"):
        entering(Bare(), spy)
    with pytest.raises(ValueError, match=r"terms: \[\]; one or more terms"):
        entering(pipeline)
    with pytest.raises(ValueError, match=r"terms: \['NoiseAwareClassifier'\]; one or more terms"):
        entering(pipeline, small_classifier())
    with guide(pipeline, spy):
        with pytest.raises(ValueError, match="is guided already; give all terms to one guide"):
            entering(pipeline, spy)
        pipeline(**call)
    assert "step" not in vars(pipeline.scheduler) and "nothing was guided" not in caplog.text
    with guide(pipeline, spy):
        pass
    assert (
        "nothing was guided: PNDMScheduler.step of the StableDiffusionPipeline was not called"
        in caplog.text
    )
    pipeline.scheduler = diffusers.DDIMInverseScheduler()
    with pytest.raises(ValueError, match="scheduler DDIMInverseScheduler can't be guided"):
        entering(pipeline, spy)


def test_conditions_that_the_network_is_not_told_are_refused() -> None:
    pipeline, call = PIPELINES["SD"]()
    record = Recorder(pipeline)
    with pytest.raises(
        ValueError,
        match=r"a term has the condition 'class_labels'; the pipeline passes its "
        r"UNet2DConditionModel \['encoder_hidden_states', ",
    ):
        record(ClassifierFreeGuidance(1), **call)
    for shape in ((3, TOKENS, WIDTH), (1, TOKENS + 1, WIDTH)):
        with pytest.raises(
            ValueError, match=r"a condition has shape .* in the place of \(4, 5, 8\); one row"
        ):
            record(ClassifierFreeGuidance({"encoder_hidden_states": normal(*shape)}), **call)
    record(ClassifierFreeGuidance(1, 0.0), **call)


def test_a_combination_that_is_not_affine_is_refused_where_it_matters() -> None:
    pipeline, call = PIPELINES["SD"]()
    record, call = Recorder(pipeline), {**call, "guidance_rescale": 0.7}
    record(EnergyGuidance(lambda x: (x**2).sum((1, 2, 3))), **call)
    with pytest.raises(
        ValueError, match="no weighted mean of the batch's parts .*use through_network=False"
    ):
        record(EnergyGuidance(lambda x: (x**2).sum((1, 2, 3)), through_network=True), **call)


def test_a_network_that_is_not_seen_is_told_of() -> None:
    pipeline, call = PIPELINES["SD"]()

    class Unseen(Guidance):
        def score(self, step: StepContext) -> torch.Tensor:
            return step.predict(step.sample)

    with (
        pytest.raises(
            ValueError,
            match="between two steps none of its unet, transformer, prior, decoder was called",
        ),
        guide(pipeline, Unseen()),
    ):
        pipeline.unet = conditional_unet()  # as a pipeline with two networks that change over
        pipeline(**call)


def test_a_scheduler_that_is_exchanged_within_is_refused_at_the_next_call() -> None:
    pipeline, call = PIPELINES["SD"]()
    own, spy = pipeline.scheduler, Spy(0.1)
    with guide(pipeline, spy):
        pipeline(**deepcopy(call))
        count = len(spy.seen)
        for other in (DDIMScheduler.from_config(own.config), deepcopy(own), None):
            pipeline.scheduler = other
            kind = type(other).__name__
            if other is None:  # the network alone, in a loop of one's own
                with pytest.raises(ValueError, match="PNDMScheduler for NoneType, whose steps"):
                    pipeline.unet(normal(1, 4, 8, 8), 5, normal(1, TOKENS, WIDTH))
                continue
            with pytest.raises(ValueError, match=f"within guide, PNDMScheduler for {kind}, whose"):
                pipeline(**deepcopy(call))
        assert len(spy.seen) == count
        pipeline.scheduler = own  # put back, it is guided as before
        pipeline(**deepcopy(call))
        assert len(spy.seen) == 2 * count
        pipeline.scheduler = other = DDIMScheduler.from_config(own.config)
    assert pipeline.scheduler is other and "step" not in vars(own)
    with guide(pipeline, spy):
        pipeline(**deepcopy(call))
    assert len(spy.seen) > 2 * count


COPIES = {"deepcopy": deepcopy, "copy": copy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_the_scheduler_made_within_is_not_guided(name: str) -> None:
    """Its steps are those of a scheduler that was never guided, and leave the original as it is."""
    pipeline, _ = PIPELINES["SD"]()
    pipeline.scheduler = scheduler = EulerDiscreteScheduler(**SD)
    fresh, spy = EulerDiscreteScheduler(**SD), Spy(0.1)
    x, eps = normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=1)
    with guide(pipeline, spy):
        copied = COPIES[name](scheduler)
        for one in (scheduler, copied, fresh):
            one.set_timesteps(3)
        for index in range(2):
            expected = fresh.step(eps, fresh.timesteps[index], x).prev_sample
            assert torch.equal(copied.step(eps, copied.timesteps[index], x).prev_sample, expected)
        assert not spy.seen and scheduler.step_index is None and copied.step_index == 2
        with pytest.raises(ValueError, match="between two steps none of its unet"):
            scheduler.step(eps, scheduler.timesteps[0], x)  # guided: the spy evaluates the network
        assert len(spy.seen) == 1
    expected = fresh.step(eps, fresh.timesteps[2], x).prev_sample
    assert torch.equal(copied.step(eps, copied.timesteps[2], x).prev_sample, expected)
    assert (
        len(spy.seen) == 1 and vars(copied).keys() == vars(fresh).keys() == vars(scheduler).keys()
    )


def test_a_step_that_the_user_replaced_is_kept_and_copied() -> None:
    pipeline, call = PIPELINES["SD"]()
    scheduler = pipeline.scheduler
    own = scheduler.step = partial(type(scheduler).step, scheduler)
    with guide(pipeline, Spy(0.1)):
        pipeline(**call)
        assert vars(copy(scheduler))["step"] is own and scheduler.step is not own
    assert scheduler.step is own and "__getstate__" not in vars(scheduler)


def test_a_pipeline_copied_within_is_not_guided() -> None:
    pipeline, call = PIPELINES["SD"]()

    def images(one: Any) -> torch.Tensor:
        return one(**deepcopy(call), generator=torch.Generator().manual_seed(0)).images

    plain, spy, rows = images(pipeline), Spy(0.1), []
    free = ClassifierFreeGuidance({"encoder_hidden_states": normal(1, TOKENS, WIDTH)}, 3.0)
    with guide(pipeline, spy, free):
        copied = deepcopy(pipeline)
        copied.unet.register_forward_hook(lambda _, args, output: rows.append(len(output[0])))
        assert torch.equal(images(copied), plain) and not spy.seen
        assert not torch.equal(images(pipeline), plain) and spy.seen
    assert torch.equal(images(copied), plain)
    assert set(rows) == {4}  # two images, with and without the prompt; the term adds no rows


def test_dit_with_a_scheduler_that_scales_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="not given the sample as EulerDiscreteScheduler scales it.*use a "
        "scheduler that doesn't scale",
    ):
        Recorder(dit(EulerDiscreteScheduler()))(Spy(), **PIPELINES["DiT"]()[1])


def test_a_classifier_on_another_device_is_refused() -> None:
    pipeline, call = PIPELINES["SD"]()
    with pytest.raises(
        ValueError,
        match=r"NoiseAwareClassifier is on \['meta'\], the pipeline's samples are on cpu",
    ):
        Recorder(pipeline)(
            ClassifierGuidance(small_classifier(in_channels=4).to("meta"), "cat"), **call
        )


def test_infinite_guidance_is_refused() -> None:
    pipeline, call = PIPELINES["SD"]()
    with pytest.raises(FloatingPointError, match="the guidance is not finite at step 0 of 4"):
        Recorder(pipeline)(
            EnergyGuidance(lambda x: (x * 1e38).exp().sum((1, 2, 3)), of="x0"), **call
        )


def test_a_classifier_of_images_is_not_asked_about_packed_latents() -> None:
    pipeline, call = PIPELINES["Flux"]()
    with pytest.raises(ValueError, match=r"sample.shape is \(2, 16, 16\)"):
        Recorder(pipeline)(ClassifierGuidance(small_classifier(), "cat"), **call)


def test_clipping_without_noise_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    pipeline, call = PIPELINES["DDIM"]()
    Recorder(pipeline)(Spy(0.0), **call)
    assert "clip_sample=False" not in caplog.text
    Recorder(pipeline)(Spy(0.1), **call)
    assert caplog.text.count("use clip_sample=False") == 1


# networks in other clothes


def test_a_network_whose_forward_is_exchanged_meanwhile() -> None:
    """As offloading does after each call of the pipeline."""
    pipeline, call = PIPELINES["SD"]()
    spies = Spy(0.1), Spy(0.1)
    expected = Recorder(pipeline)(spies[0], **call)
    add_hook_to_module(pipeline.unet, ModelHook())
    with guide(pipeline, spies[1]):
        pipeline(**deepcopy(call), generator=torch.Generator().manual_seed(7))
        remove_hook_from_module(pipeline.unet)
        add_hook_to_module(pipeline.unet, ModelHook())
        pipeline(**deepcopy(call), generator=torch.Generator().manual_seed(7))
    assert len(spies[1].again) == 2 * len(expected)
    for index, seen in enumerate(spies[1].again):
        torch.testing.assert_close(seen, spies[0].again[index % len(expected)])
    remove_hook_from_module(pipeline.unet)


def test_in_half_precision_it_is_nearly_the_same() -> None:
    scores = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipeline, call = PIPELINES["SD 2 Euler v"]()
        null = {"encoder_hidden_states": embeds()["negative_prompt_embeds"]}
        energy = Seen(
            EnergyGuidance(lambda x: (x.float() ** 2).sum((1, 2, 3)), 1e-3, through_network=True)
        )
        call = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) else value
            for name, value in call.items()
        }
        Recorder(pipeline.to(dtype))(energy.term + ClassifierFreeGuidance(null, 0.1), **call)
        assert energy.scores[0].dtype == torch.float32
        scores[dtype] = energy.scores[0]
    assert (
        torch.nn.functional.cosine_similarity(
            *(score.flatten() for score in scores.values()), dim=0
        )
        > 0.95
    )


def test_a_compiled_network() -> None:
    """Which diffusers sees through, and whose signature says nothing."""
    pipeline, call = PIPELINES["DiT without"]()
    record, call = Recorder(pipeline), {**call, "num_inference_steps": 2}

    def terms() -> Guidance:
        return ClassifierFreeGuidance(1000, 2.0) + Spy(0.1)

    expected, calls = record(terms(), **call), counted(pipeline.transformer)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    assert isinstance(pipeline.transformer, OptimizedModule)
    ours = record(terms(), **call)
    assert calls == [4, 2] * len(ours)  # with the null label; the spy's own
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one["next"], other["next"])


def test_after_guidance_that_was_not_finite_the_next_run_is_its_own() -> None:
    """Within one block: the error of a run is raised once, not at the next one's first call."""
    pipeline, call = PIPELINES["DDIM"]()
    factor = [float("nan")]

    class Sometimes(Spy):
        def score(self, step: StepContext) -> torch.Tensor:
            return factor[0] * super().score(step)

    with guide(pipeline, Sometimes(0.1)):
        with pytest.raises(FloatingPointError, match="not finite at step 0"):
            pipeline(**deepcopy(call))
        factor[0] = 1.0
        pipeline(**deepcopy(call))
