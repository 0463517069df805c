"""Guidance of diffusion sampling for every Diffusers scheduler, network and pipeline."""

from . import classifier, hub, openai, repository  # noqa: F401 - hub gives the models push_to_hub
from .attach import guide
from .classifier import NoiseAwareClassifier
from .clip import NoiseAwareCLIP
from .guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    EnergyGuidance,
    Guidance,
    ModelGuidance,
    Step,
    gradient,
)
from .noise import NoiseLevel, noise_levels
from .perceptual import CLIPGuidance, ImageClassifierGuidance, NoiseAwareCLIPGuidance
from .pipeline import ClassifierGuidedPipeline

repository.register((classifier, openai.unet, openai.schedules), (ClassifierGuidedPipeline,))

__all__ = [
    "CLIPGuidance",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "ClassifierGuidedPipeline",
    "EnergyGuidance",
    "Guidance",
    "ImageClassifierGuidance",
    "ModelGuidance",
    "NoiseAwareCLIP",
    "NoiseAwareCLIPGuidance",
    "NoiseAwareClassifier",
    "NoiseLevel",
    "Step",
    "gradient",
    "guide",
    "noise_levels",
]
