"""Tiny pipelines of each kind with random weights, and what records their runs; for several test files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, wraps
from math import hypot, sqrt
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import numpy as np
import torch
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
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from guided_diffusers import Guidance, StepContext
from guided_diffusers.attach import guide

# components

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
