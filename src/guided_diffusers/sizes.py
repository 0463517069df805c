"""Sizes and channels of a call's samples: what the networks take, and what the call gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet1DModel, UNet2DModel

from .checks import scalar, shown
from .guidance import GuidanceSum
from .images import as_sizes, check_scale_channels, down_sampling
from .noise import module_config

MAX_SIZE = 2**14  # height and width of an image
MAX_LENGTH = 2**31 - 1  # of a dimension of any sample


def network_size(network: Any) -> tuple[int | None, ...]:
    """Sizes of a network's samples, by its config: a list of any length, or an integer, which stands
    for all dimensions (`dims`, by default 2, of a UNet1DModel 1); None where it doesn't say."""
    config = module_config(network)
    size = config.get("sample_size")
    if isinstance(size, (list, tuple)):
        sizes = tuple(size)
    else:
        sizes = (size,) * (config.get("dims") or (1 if isinstance(network, UNet1DModel) else 2))
    if not all(n is None or (isinstance(n, int) and n > 0) for n in sizes):
        raise ValueError(
            f"unet: sample_size of its config is {shown(size)}; positive integers, one or one a "
            "dimension, are allowed"
        )
    return sizes


def resolve_size(
    pipeline: Any, height: int | None, width: int | None, latents: torch.Tensor | None
) -> tuple[int, ...] | None:
    """Height and width of the samples, from those of the images, which default to the network's;
    of samples of another rank the network's; None: those of `latents`."""
    given = {"height": height, "width": width}
    named = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    if latents is not None:
        if named:
            raise ValueError(
                f"{named}: latents has a size, and so has an image to start from; only one of the two "
                "is allowed"
            )
        return None
    config, pixels = module_config(pipeline.unet), down_sampling(module_config(pipeline.vae))
    size, network_sizes = config.get("sample_size"), network_size(pipeline.unet)
    if named and len(network_sizes) != 2:
        raise ValueError(
            f"{named}: the network's samples have {len(network_sizes)} dimensions, {network_sizes}, "
            "so they are no images; sample_shape=(C, ...) is allowed"
        )
    if None in network_sizes and None in (height, width):
        raise ValueError(
            "height and width, sample_shape, or latents, are needed: the network's config has no "
            "sample_size"
        )
    if not named:
        return network_sizes
    if size is not None and not config.get("block_out_channels"):  # no UNet
        raise ValueError(f"{named}: {type(pipeline.unet).__name__} takes images of one size only")
    height = network_sizes[0] * pixels if height is None else height
    width = network_sizes[1] * pixels if width is None else width
    unit = pixels * down_sampling(config)
    for value in (height, width):
        is_size = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIZE
        if not is_size or value % unit:
            raise ValueError(
                f"{named}: multiples of {unit}, from {unit} to {MAX_SIZE}, are allowed"
            )
    return height // pixels, width // pixels


def check_sample_shape(
    sample_shape: Any, height: int | None, width: int | None, latents: torch.Tensor | None
) -> list[int]:
    """The shape of a sample, (C, ...), as a list."""
    others = {"height": height, "width": width, "latents": latents}
    if named := [name for name, value in others.items() if value is not None]:
        raise ValueError(
            f"sample_shape={shown(sample_shape)} with {', '.join(named)}: only one of them is allowed"
        )
    is_list = isinstance(sample_shape, (list, tuple)) and len(sample_shape) > 0
    sizes = [scalar(n) for n in sample_shape] if is_list else []
    if not sizes or not all(type(n) is int and 1 <= n <= MAX_LENGTH for n in sizes):
        raise ValueError(
            f"sample_shape={shown(sample_shape)}: (channels, size, ...), positive integers, is "
            "allowed"
        )
    return sizes


def check_classifier_size(classifier: Any, sample_size: Sequence[int] | None) -> None:
    """Refuse samples of a size that the classifier doesn't take, before the network computes."""
    config = module_config(classifier)
    if sample_size is None:
        return
    dims = config.get("dims")
    if dims is not None and dims != len(sample_size):
        raise ValueError(
            f"samples of {len(sample_size)} dimensions, {tuple(sample_size)}, and a classifier with "
            f"dims={dims} in its config: use another classifier, or guidance_scale=0"
        )
    if config.get("pool") != "attention" or not config.get("sample_size"):
        return
    size = as_sizes(config["sample_size"], dims or 2)
    if size != tuple(sample_size):
        names = "height and width" if len(size) == 2 else "sample_shape"
        have, takes = (" x ".join(map(str, sizes)) for sizes in (sample_size, size))
        raise ValueError(
            f"{names}: the samples have {have}, the classifier takes {takes} only "
            "(pool='attention' in its config); use that size, another classifier, or "
            "guidance_scale=0"
        )


def has_known_rank(network: Any) -> bool:
    """Whether a network's class, or its config (`dims`, or a `sample_size` for each dimension), gives
    the number of dimensions of its samples."""
    config = module_config(network)
    is_listed = isinstance(config.get("sample_size"), (list, tuple)) or bool(config.get("dims"))
    return is_listed or isinstance(network, (UNet1DModel, UNet2DModel))


def check_rank(network: Any, start: torch.Tensor) -> None:
    """Refuse images or arrays to start from of another number of dimensions than a network's, where
    that is known.

    Raises:
        ValueError: for such.
    """
    dims = len(network_size(network))
    if has_known_rank(network) and start.ndim != dims + 2:
        sizes = {1: "L", 2: "H, W", 3: "D, H, W"}.get(dims, f"{dims} sizes")
        raise ValueError(
            f"image has shape {tuple(start.shape)}; (B, C, {sizes}) is allowed, as the network is a "
            f"{type(network).__name__}"
        )


def check_channels(
    pipeline: Any,
    latents: torch.Tensor,
    low_res: torch.Tensor | None = None,
    has_shape: bool = False,
) -> None:
    """Refuse samples, (B, C, ...), of channels or of a size that the network doesn't take.

    Args:
        low_res: (B, C', h, w), whose channels an up-sampling network gets, too.
        has_shape: whether the call has a sample_shape, for the message.

    Raises:
        ValueError: for such.
    """
    name = "sample_shape" if has_shape else "latents"
    channels, size = latents.shape[1], tuple(latents.shape[2:])
    config = module_config(pipeline.unet)
    known = (config.get("in_channels") or channels) - (0 if low_res is None else low_res.shape[1])
    if channels != known:
        raise ValueError(f"{name} has {channels} channels; the network's {known} are allowed")
    if isinstance(pipeline.unet, UNet2DModel) and len(size) != 2:
        raise ValueError(
            f"sample_shape={tuple(latents.shape[1:])}: the network, a UNet2DModel, allows (C, H, W)"
        )
    unit = down_sampling(config) if isinstance(pipeline.unet, UNet2DModel) else 1
    if any(n % unit for n in size):
        raise ValueError(f"{name} has size {size}; multiples of {unit} are allowed")


def check_shapes(pipeline: Any, latents: torch.Tensor, arguments: Any, output_type: str) -> None:
    """Refuse samples, (B, C, ...), that the network, the autoencoder or a guide doesn't take, or that
    can't be returned as `output_type`.

    Raises:
        ValueError: for such.
    """
    low_res, (batch_size, channels) = arguments.condition.low_res, latents.shape[:2]
    size = tuple(latents.shape[2:])
    check_channels(pipeline, latents, low_res, arguments.channels is not None)
    of_vae = module_config(pipeline.vae).get("latent_channels") or channels
    if output_type != "latent" and of_vae != channels:
        raise ValueError(
            f"vae: it decodes {of_vae} channels and the network's samples have {channels}; use "
            "the autoencoder of its training, or none for a network of pixels"
        )
    for module in GuidanceSum(arguments.terms).modules():
        guide = module_config(module)
        dims = guide.get("dims") or len(size)
        if dims != len(size):
            raise ValueError(
                f"samples of {len(size)} dimensions, {size}; the classifier's {dims} are allowed"
            )
        if guide.get("pool") != "attention":
            continue
        if (allowed := as_sizes(guide["sample_size"], dims)) != size:
            raise ValueError(
                f"height, width, sample_shape, latents: samples of size {size}; the classifier "
                f"allows only {allowed}, as it has pool='attention'"
            )
    if low_res is not None and len(low_res) not in (1, batch_size):
        raise ValueError(
            f"image holds {len(low_res)} images; one, or one for each of the {batch_size}, is "
            "allowed"
        )
    check_output(pipeline, latents, output_type)


def check_output(pipeline: Any, samples: torch.Tensor, output_type: str) -> None:
    """Check that samples, (B, C, ...), or images to start from, can be returned as `output_type`.

    Raises:
        ValueError: for "pil" of arrays, or other channels than those of `data_mean` and `data_std`.
    """
    channels = samples.shape[1]
    check_scale_channels(pipeline.config, channels)
    if output_type == "pil" and pipeline.are_arrays(samples):
        raise ValueError(
            f"output_type='pil': samples {('B', *samples.shape[1:])} of this pipeline are no "
            "pictures but arrays; 'np', 'pt' and 'latent' are allowed"
        )
    if output_type == "pil" and pipeline.vae is None and channels not in (1, 3, 4):
        raise ValueError(
            f"output_type='pil': samples of {channels} channels are no pictures; an "
            "up-sampling network needs image, others allow 'np', 'pt' and 'latent'"
        )
