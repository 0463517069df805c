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
        hub_commit,
        module_hash,
        open_or_resume,
        resolve_defaults,
        run_settings,
        unique_names,
        weights_hash,
        write_manifest,
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
    "hub_commit",
    "image_generator",
    "module_hash",
    "open_or_resume",
    "resolve_defaults",
    "run_settings",
    "sample",
    "sample_to_folder",
    "save_image",
    "unique_names",
    "weights_hash",
    "write_manifest",
]

__getattr__, __dir__ = lazy_imports(__name__)
