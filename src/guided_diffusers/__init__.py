"""Guidance of diffusion sampling for Diffusers' schedulers, networks and pipelines.

The core, to read first: noise, guidance, guider, pipeline. Beside it: attach (`guide`) and modular.
Rooms of tools: sampling, evaluation, sweep, diagnosis, hub, openai, learning (training).
"""

from . import classifier, hub, openai, repository  # noqa: F401 - hub gives the models push_to_hub
from .attach import guide
from .classifier import NoiseAwareClassifier
from .clip import NoiseAwareCLIP
from .deprecated import register_moved_modules, renamed
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

repository.register((classifier, openai.unet, openai.schedules), (ClassifierGuidedPipeline,))
register_moved_modules()
__getattr__ = renamed(__name__, {"ModelGuidance": "AutoGuidance", "Step": "StepContext"})

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
