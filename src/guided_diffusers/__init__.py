"""Guidance of diffusion sampling for every Diffusers scheduler, network and pipeline."""

from .classifier import NoiseAwareClassifier
from .guidance import ClassifierGuidance, Guidance, Step, gradient
from .noise import NoiseLevel, noise_levels
from .pipeline import ClassifierGuidedPipeline

__all__ = ["ClassifierGuidance", "ClassifierGuidedPipeline", "Guidance", "NoiseAwareClassifier", "NoiseLevel", "Step",
           "gradient", "noise_levels"]
