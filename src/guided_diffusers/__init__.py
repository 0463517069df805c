"""Guidance of diffusion sampling for every Diffusers scheduler, network and pipeline."""

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
]
