"""Differentiable preprocessing of images, as a network's image processor does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .checks import shown

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

#: switch of each step -> the setting of the step
SWITCHES = {
    "do_resize": "size",
    "do_center_crop": "crop_size",
    "do_rescale": "rescale_factor",
    "do_normalize": "image_mean",
}
SETTINGS = {*SWITCHES, *SWITCHES.values(), "image_std", "resample", "crop_pct"}
#: settings without effect unless the other one is set
DEPENDENT = {"image_std": "image_mean", "resample": "size", "crop_pct": "size"}
PAIR = {"height", "width"}
CLASS_KEYS = {"image_processor_type", "feature_extractor_type"}  # in a transformers config
MODES = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's convert("L")


class Preprocess:
    """Preprocess images in [-1, 1], (B, 1 or 3, H, W), as an image processor, differentiably.

        u = 127.5 (image + 1);  resize (antialiased, as Pillow);  centre crop;
        (rescale_factor u - image_mean) / image_std

    Nothing is rounded or clipped, so the gradient doesn't vanish where x0 leaves [-1, 1].

    Args:
        processor: a `transformers` image processor, its config, or a mapping with any of size
            ({"height", "width"} or {"shortest_edge"}), resample (2: bilinear, 3: bicubic),
            crop_size ({"height", "width"}), crop_pct (ConvNext: below 384 pixels, resize to
            size / crop_pct, then crop), rescale_factor, image_mean, image_std. A step without its
            setting, or with do_resize, do_center_crop, do_rescale or do_normalize False, is left
            out. None: images stay in [-1, 1] and are resized to `size`.
        channels: channels of the network: grey is repeated to 3, RGB becomes luma for 1. None: as
            many as image_mean has.
        size: height and width if there is no processor. None: no resizing.

    Raises:
        ValueError: for an unknown setting, or a processor that treats a test image differently.
    """

    def __init__(
        self,
        processor: BaseImageProcessor | Mapping[str, Any] | None = None,
        channels: int | None = None,
        size: int | Sequence[int] | None = None,
    ):
        if isinstance(processor, Mapping) and CLASS_KEYS & processor.keys():
            processor = _processor_from_config(processor)
        settings = _settings(processor, size)
        mean = settings.get("image_mean")
        self.channels = channels or (len(mean) if isinstance(mean, Sequence) else None)
        _check_settings(settings, self.channels)
        self.size, self.crop = settings.get("size"), settings.get("crop_size")
        self.crop_pct, self.factor = settings.get("crop_pct"), settings.get("rescale_factor")
        self.mean, self.std = mean, settings.get("image_std")
        self.mode = MODES[settings.get("resample", 2)]
        if processor is not None and not isinstance(processor, Mapping):
            self._compare(processor)

    def __call__(self, images: Tensor) -> Tensor:
        """The network's input, (B, C, h, w), in float32 or wider."""
        u = 127.5 * (images.to(torch.promote_types(images.dtype, torch.float32)) + 1)
        if u.shape[1] not in (1, 3):
            raise ValueError(f"images have {u.shape[1]} channels; 1 (grey) and 3 (RGB) are allowed")
        if self.channels == 1 and u.shape[1] == 3:
            u = (u * u.new_tensor(LUMA).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
        if self.size is not None:
            size, crop = self._target(*u.shape[2:])
            if size != tuple(u.shape[2:]):
                u = F.interpolate(u, size, mode=self.mode, align_corners=False, antialias=True)
            if crop:
                u = _centre_crop(u, *crop)
        if self.crop is not None:
            u = _centre_crop(u, self.crop["height"], self.crop["width"])
        if self.channels == 3:
            u = u.expand(-1, 3, -1, -1)
        if self.factor is not None:
            u = self.factor * u
        if self.mean is None:
            return u
        mean, std = (u.new_tensor(value).reshape(1, -1, 1, 1) for value in (self.mean, self.std))
        return (u - mean) / std

    def _target(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """Size to resize to, and the size to crop to right after it (None: no crop)."""
        if "height" in self.size:
            return (self.size["height"], self.size["width"]), None
        edge, crop = self.size["shortest_edge"], None
        if self.crop_pct is not None:
            if edge >= 384:
                return (edge, edge), None
            edge, crop = int(edge / self.crop_pct), (edge, edge)
        short, long = min(height, width), int(edge * max(height, width) / min(height, width))
        return ((edge, long) if height == short else (long, edge)), crop

    def _compare(self, processor: BaseImageProcessor) -> None:
        """Raise ValueError if the result for a test image isn't that of the processor.

        Some processors do more than their settings say (LeViT's size, EfficientNet's mean).
        """
        crop = self.crop or {"height": 0, "width": 0}
        height, width = max(90, crop["height"]), max(120, crop["width"])
        wave = np.cos(np.linspace(0, 9, height))[:, None] * np.sin(np.linspace(0, 11, width))
        array = np.stack([128 + 60 * wave, 128 - 50 * wave, 90 + 40 * wave], -1).astype(np.uint8)
        image = Image.fromarray(array).convert("L" if self.channels == 1 else "RGB")
        expected = torch.tensor(np.ascontiguousarray(processor(image)["pixel_values"][0]))
        actual = self(as_tensor(image)[None])[0]
        tolerance = 3 * (self.factor or 1) / (1 if self.mean is None else np.min(self.std))
        if expected.shape != actual.shape or (expected - actual).abs().max() > tolerance:
            raise ValueError(
                f"processor: {type(processor).__name__} does something that isn't in "
                f"{sorted(SETTINGS)}; use a mapping of these"
            )


def _processor_from_config(config: Mapping[str, Any]) -> BaseImageProcessor:
    import transformers

    name = config.get("image_processor_type") or config["feature_extractor_type"]
    name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    if not hasattr(transformers, name):
        raise ValueError(f"processor: transformers has no {name}")
    return getattr(transformers, name).from_dict(dict(config))


def _settings(processor: Any, size: int | Sequence[int] | None) -> dict[str, Any]:
    """Settings of a processor, a mapping or None, with None for the steps switched off."""
    settings = {"rescale_factor": 1 / 255, "image_mean": 0.5, "image_std": 0.5}  # keeps [-1, 1]
    if processor is None and size:
        height, width = (size, size) if isinstance(size, int) else size
        settings["size"] = {"height": height, "width": width}
    elif isinstance(processor, Mapping):
        settings = dict(processor)
        if unknown := sorted(settings.keys() - SETTINGS):
            raise ValueError(
                f"processor has {unknown}; allowed: {sorted(SETTINGS)}, or an image processor "
                "itself"
            )
        for name, needed in DEPENDENT.items():
            if settings.get(name) is not None and settings.get(needed) is None:
                raise ValueError(
                    f"processor: {name}={settings[name]!r} has no effect without {needed}"
                )
        if settings.get("crop_pct") is not None and "height" in settings["size"]:
            raise ValueError(
                f"processor: crop_pct={settings['crop_pct']!r} has no effect with "
                f"size={settings['size']!r}, only with shortest_edge"
            )
    elif processor is not None:
        if not callable(getattr(processor, "to_dict", None)):
            raise ValueError(
                f"processor={shown(processor)}: an image processor of transformers, or a mapping of "
                "its settings, is allowed"
            )
        switches = {name: bool(getattr(processor, name, False)) for name in SWITCHES}
        settings = processor.to_dict() | switches
    off = {name: None for switch, name in SWITCHES.items() if settings.get(switch) is False}
    return settings | off


def _check_settings(settings: Mapping[str, Any], channels: int | None) -> None:
    size, crop, mean, std = map(settings.get, ("size", "crop_size", "image_mean", "image_std"))
    for name, valid, allowed in (
        ("resample", settings.get("resample", 2) in MODES, "2 (bilinear) and 3 (bicubic) are"),
        ("size", _has_keys(size, PAIR, {"shortest_edge"}), "{height, width} or {shortest_edge} is"),
        ("crop_size", _has_keys(crop, PAIR), "{height, width} is"),
    ):
        if not valid:
            raise ValueError(f"processor: {name}={settings[name]!r}; {allowed} allowed")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels={channels}: 1 and 3 are allowed")
    for value in () if mean is None else (mean, std):
        if not isinstance(value, Real) and (value is None or len(value) != channels):
            raise ValueError(
                f"processor: image_mean={mean!r}, image_std={std!r}; a number, or one for each of "
                f"the network's {channels} channels, is allowed"
            )


def _has_keys(value: Any, *allowed: set[str]) -> bool:
    return value is None or (isinstance(value, Mapping) and set(value) in allowed)


def _centre_crop(images: Tensor, height: int, width: int) -> Tensor:
    if height > images.shape[2] or width > images.shape[3]:
        raise ValueError(
            f"processor: crop_size ({height}, {width}) is larger than the resized images "
            f"{tuple(images.shape[2:])}; at most their size is allowed"
        )
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[..., top : top + height, left : left + width]


def as_tensor(image: Image.Image) -> Tensor:
    """A PIL image as a tensor (1 or 3, H, W) in [-1, 1]."""
    grey = image.mode in ("1", "L", "LA")
    array = np.atleast_3d(np.asarray(image.convert("L" if grey else "RGB"), np.float32))
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
