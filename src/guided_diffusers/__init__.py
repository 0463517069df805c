"""Guidance of diffusion sampling for Diffusers' schedulers, networks and pipelines.

The core, to read first: noise, guidance, guider, pipeline. Beside it: attach (`guide`) and modular.
Rooms of tools: sampling, evaluation, sweep, diagnosis, hub, openai, learning (training).
"""

from typing import TYPE_CHECKING

from .deprecated import register_moved_modules
from .lazy import lazy_imports, register_with_diffusers

if TYPE_CHECKING:  # imported at the first use of a name (see `lazy`)
    from . import (  # noqa: F401
        arguments,
        attach,
        bundled,
        classifier,
        clip,
        guidance,
        guider,
        hub,
        image_guidance,
        images,
        likelihood,
        noise,
        openai,
        pipeline,
        repository,
        splitting,
        utils,
    )
    from .attach import guide
    from .classifier import NoiseAwareClassifier
    from .clip import NoiseAwareCLIP
    from .guidance import (
        AutoGuidance,
        ClassifierFreeGuidance,
        ClassifierGuidance,
        EnergyGuidance,
        Guidance,
        StepContext,
        gradient,
        x0_gradient,
    )
    from .image_guidance import CLIPGuidance, ImageClassifierGuidance, NoiseAwareCLIPGuidance
    from .noise import NoiseLevel, noise_levels
    from .pipeline import ClassifierGuidedPipeline

__all__ = [
    "CLIPGuidance",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "ClassifierGuidedPipeline",
    "EnergyGuidance",
    "Guidance",
    "ImageClassifierGuidance",
    "AutoGuidance",
    "NoiseAwareCLIP",
    "NoiseAwareCLIPGuidance",
    "NoiseAwareClassifier",
    "NoiseLevel",
    "StepContext",
    "gradient",
    "guide",
    "noise_levels",
    "x0_gradient",
]

register_with_diffusers()
register_moved_modules()
__getattr__, __dir__ = lazy_imports(
    __name__, {"ModelGuidance": "AutoGuidance", "Step": "StepContext"}
)
