"""What a network's own image processor does to images, differentiably."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

FLAGS = {
    "do_resize": "size",
    "do_center_crop": "crop_size",
    "do_rescale": "rescale_factor",
    "do_normalize": "image_mean",
}
SETTINGS = {*FLAGS, *FLAGS.values(), "image_std", "resample", "crop_pct"}
MODES = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's convert("L")


class Preprocess:
    """Images in [-1, 1], (B, 1 or 3, H, W), as a network's own image processor prepares them, differentiably.

        u = 127.5 (image + 1);  resize (antialiased, as Pillow);  crop in the middle;  (rescale_factor u - mean) / std

    Nothing is rounded or clipped, so the gradient lives on where the predicted x0 leaves [-1, 1].

    Args:
        processor: a `transformers` image processor, or its config, or a mapping of one's own with some of size
            ({"height", "width"} or {"shortest_edge"}), resample (2 bilinear, 3 bicubic), crop_size ({"height",
            "width"}), crop_pct (as ConvNext: below 384 pixels, resize to size / crop_pct and crop), rescale_factor,
            image_mean, image_std. A step without its setting, or with do_resize, do_center_crop, do_rescale or
            do_normalize False, is left out. None: images stay in [-1, 1] and are resized to `size`.
        channels: of the network: grey is repeated to 3, RGB becomes luma for 1. None: as many as image_mean has.
        size: height and width, where there is no processor. None: as they are.

    Raises:
        ValueError: for settings unknown here, or a processor that does something else with a test image.
    """

    def __init__(
        self,
        processor: BaseImageProcessor | Mapping[str, Any] | None = None,
        channels: int | None = None,
        size: int | Sequence[int] | None = None,
    ):
        if (
            isinstance(processor, Mapping)
            and {"image_processor_type", "feature_extractor_type"} & processor.keys()
        ):
            processor = _processor_of(processor)
        if processor is None:
            height, width = (size, size) if isinstance(size, int) else size or (None, None)
            config = {
                "rescale_factor": 1 / 255,
                "image_mean": 0.5,
                "image_std": 0.5,
                "size": {"height": height, "width": width} if height else None,
            }
        elif isinstance(processor, Mapping):
            if unknown := sorted(processor.keys() - SETTINGS):
                raise ValueError(
                    f"processor has {unknown}; allowed: {sorted(SETTINGS)}, or an image processor itself"
                )
            config = dict(processor)
            for name, needed in (
                ("image_std", "image_mean"),
                ("resample", "size"),
                ("crop_pct", "size"),
            ):
                if config.get(name) is not None and config.get(needed) is None:
                    raise ValueError(
                        f"processor: {name}={config[name]!r} has no effect without {needed}"
                    )
            if config.get("crop_pct") is not None and "height" in config["size"]:
                raise ValueError(
                    f"processor: crop_pct={config['crop_pct']!r} has no effect with "
                    f"size={config['size']!r}, only with shortest_edge"
                )
        else:
            config = processor.to_dict()
            config.update({flag: bool(getattr(processor, flag, False)) for flag in FLAGS})
        for flag, setting in FLAGS.items():
            if config.get(flag) is False:
                config[setting] = None
        self.size, self.crop, self.crop_pct = (
            config.get(name) for name in ("size", "crop_size", "crop_pct")
        )
        self.factor, self.mean, self.std = (
            config.get(name) for name in ("rescale_factor", "image_mean", "image_std")
        )
        if (resample := config.get("resample", 2)) not in MODES:
            raise ValueError(
                f"processor: resample={resample!r}; 2 (bilinear) and 3 (bicubic) are allowed"
            )
        self.mode = MODES[resample]
        forms = [{"height", "width"}, {"shortest_edge"}]
        for name, value, allowed in (
            ("size", self.size, forms),
            ("crop_size", self.crop, forms[:1]),
        ):
            if value is not None and (not isinstance(value, Mapping) or set(value) not in allowed):
                raise ValueError(
                    f"processor: {name}={value!r}; {{height, width}}"
                    + " or {shortest_edge}" * (name == "size")
                    + " is allowed"
                )
        self.channels = channels or (len(self.mean) if isinstance(self.mean, Sequence) else None)
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels={self.channels}: 1 and 3 are allowed")
        for value in (self.mean, self.std) if self.mean is not None else ():
            if not isinstance(value, Real) and (value is None or len(value) != self.channels):
                raise ValueError(
                    f"processor: image_mean={self.mean!r}, image_std={self.std!r}; a number, or one for "
                    f"each of the network's {self.channels} channels, is allowed"
                )
        if processor is not None and not isinstance(processor, Mapping):
            self._check(processor)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """What the network is given, (B, C, h, w), in float32 or wider."""
        u = 127.5 * (images.to(torch.promote_types(images.dtype, torch.float32)) + 1)
        if u.shape[1] not in (1, 3):
            raise ValueError(f"images have {u.shape[1]} channels; 1 (grey) and 3 (RGB) are allowed")
        if self.channels == 1 and u.shape[1] == 3:
            u = (u * u.new_tensor(LUMA).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
        if self.size is not None:
            size, crop = self._target(*u.shape[2:])
            if size != tuple(u.shape[2:]):
                u = F.interpolate(u, size, mode=self.mode, align_corners=False, antialias=True)
            u = _centre(u, *crop) if crop else u
        if self.crop is not None:
            u = _centre(u, self.crop["height"], self.crop["width"])
        if self.channels == 3:
            u = u.expand(-1, 3, -1, -1)
        u = u if self.factor is None else self.factor * u
        if self.mean is None:
            return u
        mean, std = (u.new_tensor(value).reshape(1, -1, 1, 1) for value in (self.mean, self.std))
        return (u - mean) / std

    def _target(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """The size to resize to, and what to crop from it at once."""
        if "height" in self.size:
            return (self.size["height"], self.size["width"]), None
        edge, crop = self.size["shortest_edge"], None
        if self.crop_pct is not None:
            if edge >= 384:
                return (edge, edge), None
            edge, crop = int(edge / self.crop_pct), (edge, edge)
        short, long = min(height, width), int(edge * max(height, width) / min(height, width))
        return ((edge, long) if height == short else (long, edge)), crop

    def _check(self, processor: BaseImageProcessor) -> None:
        """Some processors do more than their config says (LeViT's size, EfficientNet's normalisation)."""
        crop = self.crop or {"height": 0, "width": 0}
        height, width = max(90, crop["height"]), max(120, crop["width"])
        wave = np.cos(np.linspace(0, 9, height))[:, None] * np.sin(np.linspace(0, 11, width))
        array = np.stack([128 + 60 * wave, 128 - 50 * wave, 90 + 40 * wave], -1).astype(np.uint8)
        image = Image.fromarray(array).convert("L" if self.channels == 1 else "RGB")
        theirs = torch.tensor(np.ascontiguousarray(processor(image)["pixel_values"][0]))
        ours = self(as_tensor(image)[None])[0]
        tolerance = 3 * (self.factor or 1) / (1 if self.mean is None else np.min(self.std))
        if theirs.shape != ours.shape or (theirs - ours).abs().max() > tolerance:
            raise ValueError(
                f"processor: {type(processor).__name__} does something that isn't in {sorted(SETTINGS)}; "
                "give a mapping of these"
            )


def _processor_of(config: Mapping[str, Any]) -> BaseImageProcessor:
    import transformers

    name = config.get("image_processor_type") or config["feature_extractor_type"]
    name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    if not hasattr(transformers, name):
        raise ValueError(f"processor: transformers has no {name}")
    return getattr(transformers, name).from_dict(dict(config))


def _centre(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if height > images.shape[2] or width > images.shape[3]:
        raise ValueError(
            f"processor: crop_size ({height}, {width}) is larger than the resized images "
            f"{tuple(images.shape[2:])}; as large at most is allowed"
        )
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[..., top : top + height, left : left + width]


def as_tensor(image: Image.Image) -> torch.Tensor:
    """(1 or 3, H, W) in [-1, 1] of a PIL image."""
    grey = image.mode in ("1", "L", "LA")
    array = np.atleast_3d(np.asarray(image.convert("L" if grey else "RGB"), np.float32))
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
