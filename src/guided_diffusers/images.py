"""Images to and from tensors: by an autoencoder, for an up-sampling network, as PIL or arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from torch.utils.checkpoint import checkpoint

from .checks import check_number, shown


def encode(vae: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and standard deviation of the latents of images, scaled as `decode` takes them.

    A diffusion model is trained on samples mean + std * eps.

    Args:
        images: (B, 3 or 1, H, W) in [-1, 1].

    Returns:
        Both (B, C, h, w); for an autoencoder without a posterior, as `VQModel`, its latents and
        None.

    Raises:
        ValueError: for an autoencoder in float16 that overflows there (`force_upcast`).
    """
    factor, offset = _scaling(vae, images)
    posterior = vae.encode(images.to(vae.dtype))[0]
    if isinstance(posterior, torch.Tensor):
        return (posterior - offset) * factor, None
    return (posterior.mean - offset) * factor, posterior.std * factor


def decode(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1], (B, 3 or 1, H', W'), of a diffusion model's latents (B, C, H, W).

    The scaling of the autoencoder's config is undone first. If a gradient is needed, one image is
    decoded at a time, and again in the backward pass, so that memory holds the activations of one
    image.

    Raises:
        ValueError: for an autoencoder in float16 that overflows there (`force_upcast`).
    """
    factor, offset = _scaling(vae, latents)
    latents = latents / factor + offset
    return one_by_one(lambda z: vae.decode(z).sample, latents.to(vae.dtype))


def _scaling(
    vae: torch.nn.Module, like: torch.Tensor
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """(factor, offset) of the config: latents of the diffusion model are (z - offset) * factor of
    the autoencoder's z.

    Raises:
        ValueError: as `check_precision`.
    """
    check_precision(vae)
    config = vae.config
    scaling = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.tensor(config[name]).reshape(1, -1, 1, 1).to(like)
            for name in ("latents_mean", "latents_std")
        )
        return scaling / std, mean
    return scaling, config.get("shift_factor") or 0.0


def as_sizes(size: Any, dims: int, name: str = "sample_size") -> tuple[int, ...]:
    """One size a dimension: an integer stands for all.

    Raises:
        ValueError: naming it `name`, for anything else.
    """
    sides = size if isinstance(size, (list, tuple)) else (size,) * dims
    if len(sides) != dims:
        sizes = "(height, width)" if dims == 2 else f"{dims} of them"
        raise ValueError(f"{name}={shown(size)}: an integer, or {sizes}, is allowed")
    return tuple(check_number(name, side, 1, integer=True) for side in sides)


def as_pair(size: Any, name: str = "sample_size") -> tuple[int, int]:
    """(height, width) of a size: an integer, of a square, or a pair.

    Raises:
        ValueError: naming it `name`, for anything else.
    """
    height, width = as_sizes(size, 2, name)
    return height, width


def config_size(size: Any, name: str = "sample_size") -> int | tuple[int, int]:
    """A size as configs hold it: an integer for a square, else (height, width).

    Raises:
        ValueError: as `as_pair`.
    """
    height, width = as_pair(size, name)
    return height if height == width else (height, width)


def size_text(size: Any) -> str:
    """A size as on the command line: 28, or 48x32, the height first."""
    return "x".join(map(str, dict.fromkeys(as_pair(size))))


def down_sampling(config: Mapping[str, Any]) -> int:
    """How many times smaller the innermost features of a UNet, or the latents of an autoencoder,
    are than its input; 1 if its config doesn't say so."""
    return 2 ** (len(config.get("block_out_channels") or (None,)) - 1)


def check_precision(vae: torch.nn.Module) -> None:
    """Refuse an autoencoder in float16 that overflows there (`force_upcast`).

    Raises:
        ValueError: for one.
    """
    if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
        raise ValueError(
            "vae: it computes in float16 and overflows there (force_upcast); load it in float32"
        )


def one_by_one(function: Any, latents: torch.Tensor) -> torch.Tensor:
    """`function(latents)`; if a gradient is needed, image by image, each computed again in the
    backward pass."""
    if not (torch.is_grad_enabled() and latents.requires_grad):
        return function(latents)
    return torch.cat([checkpoint(function, z, use_reentrant=False) for z in latents.split(1)])


def start_image(image: Any, channels: int) -> torch.Tensor:
    """Images to start from, (B, C, ...) in float32; pictures are in [-1, 1].

    Args:
        image: PIL, one or several; a floating-point tensor of that form; or an array of pictures as
            `output_type="np"` gives them, (B, H, W, C) in [0, 1].
        channels: C.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(image, np.ndarray):
        is_image = image.ndim == 4 and image.dtype.kind == "f" and image.size > 0
        if not is_image or not (0 <= image.min() <= image.max() <= 1):
            raise ValueError(
                f"image is an array {image.shape} of {image.dtype}; floating-point numbers in "
                "[0, 1], (B, H, W, C), are allowed"
            )
        image = torch.from_numpy(image).movedim(-1, 1).float() * 2 - 1
    elif not isinstance(image, torch.Tensor):
        if channels not in (1, 3):
            raise ValueError(f"image: pictures have 1 or 3 channels, the network's are {channels}")
        image = read_pictures(image, "L" if channels == 1 else "RGB", "(B, C, ...)")
    is_image = image.is_floating_point() and image.ndim >= 3 and image.numel() > 0
    if not is_image or image.shape[1] != channels:
        raise ValueError(
            f"image has shape {tuple(image.shape)}, {image.dtype}; floating-point numbers (B, C, ...)"
            f" with the network's {channels} channels are allowed (an up-sampling network's "
            "low-resolution image is given without strength)"
        )
    if not image.isfinite().all():
        raise ValueError("image has infinite or NaN values; finite ones are allowed")
    return image.float()


def start_array(array: Any, channels: int | None) -> torch.Tensor:
    """Arrays of data to start from, (B, C, ...) in float32, in the data's units.

    Args:
        array: such numbers, a tensor or a NumPy array.
        channels: C; None: any.

    Raises:
        ValueError: for anything else.
    """
    is_numpy = isinstance(array, np.ndarray) and array.dtype.kind in "fiu"
    values = torch.from_numpy(array.astype(np.float32)) if is_numpy else array
    is_tensor = isinstance(values, torch.Tensor) and not values.is_complex()
    if (
        not is_tensor
        or values.ndim < 2
        or 0 in values.shape
        or channels not in (None, values.shape[1])
    ):
        kind = f"an array {tuple(array.shape)}" if hasattr(array, "shape") else shown(array)
        of_network = "" if channels is None else f" with the network's {channels} channels"
        raise ValueError(
            f"image={kind}: the pipeline's samples are arrays of data, so a tensor or a NumPy array of "
            f"numbers (B, C, ...){of_network}, in the data's units, is allowed"
        )
    if not values.isfinite().all():
        raise ValueError("image has infinite or NaN values; finite ones are allowed")
    return values.float()


def read_pictures(image: Any, mode: str, tensor: str) -> torch.Tensor:
    """PIL images of one size, one or a list, as a tensor (B, C, H, W) in [-1, 1].

    Args:
        mode: "L" or "RGB".
        tensor: the shape of tensors that are allowed, too, for the message.

    Raises:
        ValueError: for anything else.
    """
    pictures = [image] if isinstance(image, Image.Image) else image
    is_list = isinstance(pictures, (list, tuple)) and pictures
    if not is_list or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise ValueError(
            f"image={shown(image)}: a PIL image, a list of them, or a tensor {tensor} in "
            "[-1, 1] is allowed"
        )
    if len({picture.size for picture in pictures}) > 1:
        sizes = sorted({picture.size for picture in pictures})
        raise ValueError(f"image has pictures of the sizes {sizes}; one size is allowed")
    arrays = [np.atleast_3d(eight_bits(picture, mode)) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def eight_bits(picture: Image.Image, mode: str, name: str = "image") -> np.ndarray:
    """A picture's values, (H, W) or (H, W, C), in float32 from 0 to 255.

    Args:
        mode: "L" or "RGB".
        name: of the argument, for the message.

    Raises:
        ValueError: as `check_bits`.
    """
    check_bits(picture.mode, name)
    return np.asarray(picture.convert(mode), np.float32)


def check_bits(mode: str, name: Any) -> None:
    """Refuse pictures of a mode of more than 8 bits a channel, of which Pillow would drop some.

    Raises:
        ValueError: for one, naming it `name`.
    """
    if mode.startswith(("I", "F")) or ";16" in mode:
        raise ValueError(
            f"{name}: a picture of mode {mode}; 8 bits a channel are allowed: convert it, or give a "
            "tensor"
        )


def low_resolution(
    image: Image.Image | Sequence[Image.Image] | torch.Tensor, channels: int
) -> torch.Tensor:
    """Low-resolution images for an up-sampling network, (1 or B, C, h, w) in [-1, 1].

    Args:
        image: PIL, one or several, or a tensor of that form.
        channels: of the network's input, 2C.

    Raises:
        ValueError: for another shape.
    """
    if not isinstance(image, torch.Tensor):
        image = read_pictures(image, "L" if channels == 2 else "RGB", "(B, C, h, w)")
    if image.ndim != 4 or 2 * image.shape[1] != channels:
        raise ValueError(
            f"image has shape {tuple(image.shape)}; (B, C, h, w) is allowed, C half of the "
            f"network's {channels} input channels"
        )
    return image


def join_low_resolution(sample: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
    """An up-sampling network's input (B, 2C, H, W): `sample` (B, C, H, W), then `low_res` (1 or B,
    C, h, w) enlarged bilinearly."""
    enlarged = F.interpolate(low_res, sample.shape[2:], mode="bilinear", align_corners=False)
    return torch.cat([sample, enlarged.expand(len(sample), -1, -1, -1)], dim=1)


def check_data_scale(mean: Any, std: Any) -> tuple[Any, Any]:
    """`data_mean` and `data_std` of a pipeline: both None, or numbers, one or one a channel.

    Raises:
        ValueError: for anything else.
    """
    if mean is None and std is None:
        return None, None
    values = []
    for name, value, low in (("data_mean", mean, -math.inf), ("data_std", std, 0)):
        items = value if isinstance(value, (list, tuple)) else [value]
        numbers = [check_number(name, item, low, above=low == 0) for item in items]
        values.append(numbers if isinstance(value, (list, tuple)) else numbers[0])
    return values[0], values[1]


def check_scale_channels(config: Mapping[str, Any], channels: int) -> None:
    """Refuse samples of other channels than `data_mean` and `data_std` of a pipeline's config.

    Raises:
        ValueError: for such.
    """
    for name in ("data_mean", "data_std"):
        values = config.get(name)
        if isinstance(values, list) and len(values) not in (1, channels):
            raise ValueError(
                f"{name} in the pipeline's config is of {len(values)} channels; the samples have "
                f"{channels}"
            )


def to_network_units(arrays: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
    """What a network that was trained on (data - mean) / std gets of arrays of the data, (B, C, ...)."""
    shape = (-1, *[1] * (arrays.ndim - 2))
    mean, std = (arrays.new_tensor(value).reshape(shape) for value in (mean, std))
    return (arrays - mean) / std


def in_data_units(samples: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
    """Arrays of the data, (B, C, ...), of samples x of a network that was trained on (data - mean) /
    std: mean + std * x, in float32."""
    samples = samples.float()
    shape = (-1, *[1] * (samples.ndim - 2))
    mean, std = (samples.new_tensor(value).reshape(shape) for value in (mean, std))
    return mean + std * samples


def convert(images: torch.Tensor, output_type: str) -> Any:
    """Images (B, C, H, W) in [-1, 1] as "pil", "np" (B, H, W, C) or "pt", both in [0, 1]."""
    images = (images.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    return array if output_type == "np" else DiffusionPipeline.numpy_to_pil(array)
