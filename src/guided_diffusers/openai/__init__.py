"""OpenAI's guided-diffusion (Dhariwal & Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021) in Diffusers."""

from .networks import (
    convert_classifier,
    convert_super_resolution,
    convert_unet,
    export_classifier,
    export_super_resolution,
    export_unet,
    join_low_resolution,
)
from .unet import ADMUNet2DModel

__all__ = [
    "ADMUNet2DModel",
    "convert_classifier",
    "convert_super_resolution",
    "convert_unet",
    "export_classifier",
    "export_super_resolution",
    "export_unet",
    "join_low_resolution",
]
