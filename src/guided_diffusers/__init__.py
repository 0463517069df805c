"""Guidance of diffusion sampling for every Diffusers scheduler, network and pipeline."""

from . import openai  # noqa: F401 - from_pretrained finds ADMUNet2DModel only in a module that is imported
from .classifier import NoiseAwareClassifier
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
from .pipeline import ClassifierGuidedPipeline

__all__ = ["ClassifierFreeGuidance", "ClassifierGuidance", "ClassifierGuidedPipeline", "EnergyGuidance", "Guidance",
           "ModelGuidance", "NoiseAwareClassifier", "NoiseLevel", "Step", "gradient", "noise_levels"]
