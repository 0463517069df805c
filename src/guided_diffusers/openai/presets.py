"""The published checkpoints of guided-diffusion: file names, flags and sampling settings.

The flags are those of the README of github.com/openai/guided-diffusion, section "Sampling from
pre-trained models", without the flags of precision and memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SWITCHES = ("class_cond", "learn_sigma", "resblock_updown", "use_scale_shift_norm")
ADM = dict.fromkeys(SWITCHES, True) | {"attention_resolutions": "32,16,8", "num_res_blocks": 2}
ADM |= {"num_channels": 256, "num_head_channels": 64}
ADM |= {"noise_schedule": "linear", "diffusion_steps": 1000}
GUIDED_ADM = ADM | {"classifier_resblock_updown": True, "classifier_use_scale_shift_norm": True}
GUIDED_ADM |= {"classifier_width": 128, "classifier_depth": 2, "classifier_pool": "attention"}
GUIDED_ADM |= {"classifier_attention_resolutions": "32,16,8"}
ADM_64 = GUIDED_ADM | {"num_channels": 192, "num_res_blocks": 3, "classifier_depth": 4}
ADM_64 |= {"dropout": 0.1, "noise_schedule": "cosine", "use_new_attention_order": True}
FOUR_HEADS = {"num_heads": 4, "num_head_channels": -1}
UPSAMPLER = GUIDED_ADM | {"num_channels": 192}
UPSAMPLER_256 = UPSAMPLER | FOUR_HEADS | {"large_size": 256, "small_size": 64}
UPSAMPLER_512 = UPSAMPLER | {"large_size": 512, "small_size": 128, "attention_resolutions": "32,16"}
LSUN = ADM | {"class_cond": False, "dropout": 0.1, "image_size": 256}
LSUN_NO_DROPOUT = LSUN | {"dropout": 0.0}


@dataclass(frozen=True)
class Preset:
    """A published diffusion model, the classifier that guides it, and its sampling settings.

    Attributes:
        unet: File name of the UNet, without ".pt".
        config: The original's flags of UNet, classifier and diffusion process.
        classifier: File name of the classifier, without ".pt", or None.
        guidance_scale: `classifier_scale` of the published samples.
        num_inference_steps: `timestep_respacing` of the published samples.
    """

    unet: str
    config: Mapping[str, Any]
    classifier: str | None = None
    guidance_scale: float = 1.0
    num_inference_steps: int = 250


def _imagenet(size: int, config: dict[str, Any], scale: float = 1.0, suffix: str = "") -> Preset:
    unet, classifier = f"{size}x{size}_diffusion{suffix}", f"{size}x{size}_classifier"
    return Preset(unet, config | {"image_size": size}, classifier, scale)


PRESETS = {
    "imagenet-64": _imagenet(64, ADM_64),
    "imagenet-128": _imagenet(128, GUIDED_ADM | FOUR_HEADS, 0.5),
    "imagenet-256": _imagenet(256, GUIDED_ADM),
    "imagenet-256-uncond": _imagenet(256, GUIDED_ADM | {"class_cond": False}, 10.0, "_uncond"),
    "imagenet-512": _imagenet(512, GUIDED_ADM, 4.0),
    "imagenet-64-256-upsampler": Preset("64_256_upsampler", UPSAMPLER_256),
    "imagenet-128-512-upsampler": Preset("128_512_upsampler", UPSAMPLER_512),
    "lsun-bedroom": Preset("lsun_bedroom", LSUN, num_inference_steps=1000),
    "lsun-cat": Preset("lsun_cat", LSUN, num_inference_steps=1000),
    "lsun-horse": Preset("lsun_horse", LSUN, num_inference_steps=1000),
    "lsun-horse-nodropout": Preset("lsun_horse_nodropout", LSUN_NO_DROPOUT, None, 1.0, 1000),
}


def find_preset(name: str) -> Preset:
    """The preset with this name or UNet file.

    For example "imagenet-256-uncond" or "256x256_diffusion_uncond.pt".

    Raises:
        ValueError: If there is none; the message lists all.
    """
    for preset_name, preset in PRESETS.items():
        if name == preset_name or Path(name).stem == preset.unet:
            return preset
    files = ", ".join(preset.unet for preset in PRESETS.values())
    allowed = f"{', '.join(PRESETS)}, or the published file names {files}"
    raise ValueError(f"preset {name!r} is unknown; allowed: {allowed}")
