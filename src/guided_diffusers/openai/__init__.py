"""OpenAI's guided-diffusion: its checkpoints and samplers in Diffusers.

Dhariwal & Nichol, Diffusion Models Beat GANs on Image Synthesis (2021).

    convert_checkpoint("256x256_diffusion_uncond.pt", "adm", "256x256_classifier.pt")
    ClassifierGuidedPipeline.from_pretrained("adm")(207)  # 250 ancestral steps, guidance scale 10

Largest difference from the original's final images over its 21 recorded runs, in float32 and in
float64 (tests/test_openai_sampling.py):

    ancestral, `guidance_algorithm="mean"`    DDPMScheduler 4e-5, 2e-5  ADMDDPMScheduler 4e-5, 4e-8
    DDIM, `clip_x0=True, clip_sample=False`   DDIMScheduler 8e-6, 3e-6  ADMDDIMScheduler 3e-5, 6e-12

`DDIMScheduler` has no "linspace" steps (differences of 0.1 to 7) and can't clip x0 before guidance
without clipping it again afterwards; the pipeline's `clip_x0` does that. With a cosine schedule and
clipping, the original's float32 differs by up to 2e-3 from its float64 in the first steps, and so
does this package's. In the last step, which draws no noise, `guidance_algorithm="mean"` uses the
original's variance.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_imports

if TYPE_CHECKING:
    from ..images import join_low_resolution
    from .commands import add_convert_command
    from .convert import convert_checkpoint, convert_scheduler, load_state_dict
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

__all__ = ["PRESETS", "Preset", "find_preset", "convert_checkpoint", "load_state_dict"]
__all__ += ["convert_unet", "convert_super_resolution", "convert_classifier", "convert_scheduler"]
__all__ += ["export_unet", "export_super_resolution", "export_classifier", "join_low_resolution"]
__all__ += ["ADMUNet2DModel", "ADMDDPMScheduler", "ADMDDIMScheduler", "respaced_timesteps"]
__all__ += ["add_convert_command"]

__getattr__, __dir__ = lazy_imports(__name__)
