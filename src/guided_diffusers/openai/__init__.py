"""OpenAI's guided-diffusion (Dhariwal & Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021) in Diffusers."""

from ..pipeline import join_low_resolution
from .convert import add_convert_command, convert_checkpoint, convert_scheduler, load_state_dict
from .networks import (
    convert_classifier,
    convert_super_resolution,
    convert_unet,
    export_classifier,
    export_super_resolution,
    export_unet,
)
from .presets import PRESETS, Preset, find_preset
from .schedules import ADMDDIMScheduler, ADMDDPMScheduler, respaced_timesteps
from .unet import ADMUNet2DModel

__all__ = [
    "ADMDDIMScheduler",
    "ADMDDPMScheduler",
    "ADMUNet2DModel",
    "PRESETS",
    "Preset",
    "add_convert_command",
    "convert_checkpoint",
    "convert_classifier",
    "convert_scheduler",
    "convert_super_resolution",
    "convert_unet",
    "export_classifier",
    "export_super_resolution",
    "export_unet",
    "find_preset",
    "join_low_resolution",
    "load_state_dict",
    "respaced_timesteps",
]
