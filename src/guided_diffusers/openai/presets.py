"""The published checkpoints of guided-diffusion: their files, their flags, and how they were sampled.

The flags are those of the original's README (github.com/openai/guided-diffusion, section "Sampling from pre-trained
models"), without the ones of precision and memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADM = {"attention_resolutions": "32,16,8", "class_cond": True, "diffusion_steps": 1000, "learn_sigma": True,
       "noise_schedule": "linear", "num_channels": 256, "num_head_channels": 64, "num_res_blocks": 2,
       "resblock_updown": True, "use_scale_shift_norm": True}  # fmt: skip
FOUR_HEADS = {"num_heads": 4, "num_head_channels": -1}
UPSAMPLER = ADM | {"num_channels": 192}
LSUN = ADM | {"class_cond": False, "dropout": 0.1, "image_size": 256}
CLASSIFIER = {"classifier_attention_resolutions": "32,16,8", "classifier_depth": 2, "classifier_width": 128,
              "classifier_pool": "attention", "classifier_resblock_updown": True,
              "classifier_use_scale_shift_norm": True}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A published network, the classifier that guides it, and the settings of its published samples.

    Attributes:
        unet, classifier: names of the files, without ".pt".
        config: the original's flags, of network, classifier and diffusion process.
        guidance_scale, num_inference_steps: of the published samples (`classifier_scale`, `timestep_respacing`).
    """

    unet: str
    config: Mapping[str, Any]
    classifier: str | None = None
    guidance_scale: float = 1.0
    num_inference_steps: int = 250


PRESETS = {
    "imagenet-64": Preset(
        "64x64_diffusion",
        ADM | CLASSIFIER | {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "dropout": 0.1,
                            "noise_schedule": "cosine", "use_new_attention_order": True, "classifier_depth": 4},
        "64x64_classifier"),
    "imagenet-128": Preset("128x128_diffusion", ADM | CLASSIFIER | FOUR_HEADS | {"image_size": 128},
                           "128x128_classifier", 0.5),
    "imagenet-256": Preset("256x256_diffusion", ADM | CLASSIFIER | {"image_size": 256}, "256x256_classifier"),
    "imagenet-256-uncond": Preset("256x256_diffusion_uncond", ADM | CLASSIFIER | {
        "image_size": 256, "class_cond": False}, "256x256_classifier", 10.0),
    "imagenet-512": Preset("512x512_diffusion", ADM | CLASSIFIER | {"image_size": 512}, "512x512_classifier", 4.0),
    "imagenet-64-256-upsampler": Preset("64_256_upsampler", UPSAMPLER | CLASSIFIER | FOUR_HEADS | {
        "large_size": 256, "small_size": 64}),
    "imagenet-128-512-upsampler": Preset("128_512_upsampler", UPSAMPLER | CLASSIFIER | {
        "attention_resolutions": "32,16", "large_size": 512, "small_size": 128}),
    "lsun-bedroom": Preset("lsun_bedroom", LSUN, num_inference_steps=1000),
    "lsun-cat": Preset("lsun_cat", LSUN, num_inference_steps=1000),
    "lsun-horse": Preset("lsun_horse", LSUN, num_inference_steps=1000),
    "lsun-horse-nodropout": Preset("lsun_horse_nodropout", LSUN | {"dropout": 0.0}, num_inference_steps=1000),
}  # fmt: skip


def find_preset(name: str) -> Preset:
    """A preset by its name ("imagenet-256-uncond") or its network's file ("256x256_diffusion_uncond.pt").

    Raises:
        ValueError: if there is none; the message lists them.
    """
    for known, preset in PRESETS.items():
        if name == known or Path(name).stem == preset.unet:
            return preset
    raise ValueError(
        f"preset {name!r} is unknown; allowed: {', '.join(PRESETS)}, or the published file names "
        f"{', '.join(preset.unet for preset in PRESETS.values())}"
    )
