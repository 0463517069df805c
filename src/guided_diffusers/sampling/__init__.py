"""Labels and a seed -> images: image i depends on the seed and i alone, whatever the batches.

    for indices, images in sample(pipeline, ["sneaker", "coat"], seed=0, indices=range(50_000), guidance_scale=3.0):
        ...                                                                 # one batch at a time is in memory

    sample_to_folder(pipeline, ["sneaker", "coat"], "out/images", 50_000, guidance_scale=3.0)

The latter goes on where it was when it is killed, and shares the work among processes (`scale`).
"""

from .batches import image_generator, sample
from .pictures import grid, save_image
from .scale import sample_to_folder

__all__ = ["grid", "image_generator", "sample", "sample_to_folder", "save_image"]
