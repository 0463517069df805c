"""Sampling by labels and a seed: image i depends on the seed and i only, not on the batches.

    for indices, images in sample(pipeline, ["sneaker", "coat"], indices=range(50_000)):
        ...  # one batch at a time is in memory

    sample_to_folder(pipeline, ["sneaker", "coat"], "out/images", 50_000, guidance_scale=3.0)

`sample_to_folder` resumes an interrupted run and divides the work among processes.
"""

from ..utils import image_generator
from .batches import sample
from .folder import sample_to_folder
from .pictures import grid, save_image

__all__ = ["grid", "image_generator", "sample", "sample_to_folder", "save_image"]
