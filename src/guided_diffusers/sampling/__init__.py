"""Sampling by labels and a seed: image i depends on the seed and i only, not on the batches.

    for indices, images in sample(pipeline, ["sneaker", "coat"], indices=range(50_000)):
        ...  # one batch at a time is in memory

    sample_to_folder(pipeline, ["sneaker", "coat"], "out/images", 50_000, guidance_scale=3.0)

`sample_to_folder` resumes an interrupted run and divides the work among processes.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_imports

if TYPE_CHECKING:
    from ..utils import image_generator
    from .batches import WarnOnce, sample
    from .folder import sample_to_folder
    from .manifest import (
        LIBRARIES,
        add_weights,
        as_folder,
        differences,
        folder_names,
        module_hash,
        resolve_defaults,
        unique_names,
        weights_hash,
    )
    from .pictures import grid, save_image

__all__ = [
    "LIBRARIES",
    "WarnOnce",
    "add_weights",
    "as_folder",
    "differences",
    "folder_names",
    "grid",
    "image_generator",
    "module_hash",
    "resolve_defaults",
    "sample",
    "sample_to_folder",
    "save_image",
    "unique_names",
    "weights_hash",
]

__getattr__, __dir__ = lazy_imports(__name__)
