"""Images that exist, changed by guidance: inverted to noise, then decoded to another label.

    noise = probability flow of the image, under its own label or none       (`inversion`)
    image = the same flow back, guided                                        (the pipeline's call)

Without guidance and under one label the second undoes the first, so that what changes is what the
guidance changes: counterfactuals, and maps of what is unusual for a label (Wolleb et al. 2022,
"Diffusion models for medical anomaly detection", with classifier guidance and DDIM).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from PIL import Image

from .arguments import check_output_type, image_condition, image_labels, read_start
from .checks import check_number, shown
from .images import eight_bits
from .inversion import ProbabilityFlow, invert
from .likelihood import MULTI, REGRESSION, Labels, logits_of
from .networks import evaluating
from .noise import module_config
from .run_checks import check_images
from .sizes import check_channels, check_output


@dataclass
class EditOutput(BaseOutput):
    """Result of `ClassifierGuidedPipeline.edit`.

    Attributes:
        images: as `output_type` says.
        difference: images - originals, (B, H, W, C) of NumPy for "pil" and "np", else a tensor
            (B, C, ...); 1 is from black to white, or for "latent" the latents' unit. Of arrays, (B,
            C, ...) in the data's units.
        probabilities_before, probabilities_after: p(label | image) by the pipeline's classifier at
            its lowest noise level, (B, num_labels); None without a classifier of labels.
        guidance_evaluations, settings: as of `GuidedImageOutput`.
    """

    images: Any
    difference: Any
    probabilities_before: torch.Tensor | None = None
    probabilities_after: torch.Tensor | None = None
    guidance_evaluations: float = 0.0
    settings: dict[str, Any] | None = None


@dataclass
class AnomalyOutput(BaseOutput):
    """Result of `ClassifierGuidedPipeline.anomaly`.

    Attributes:
        maps: |image - edited image|, the mean over the channels, (B, ...); 1 is from black to white,
            or of arrays the data's unit.
        scores: the mean of each map, (B,).
        images: the edited images, (B, C, ...) in [0, 1], or arrays in the data's units.
    """

    maps: torch.Tensor
    scores: torch.Tensor
    images: torch.Tensor


def inverted(
    pipeline: Any,
    start: torch.Tensor,
    strength: float,
    label: Labels | None,
    num_inference_steps: int | None,
    name: str = "label",
) -> tuple[Any, list[torch.Tensor]]:
    """A copy of the pipeline that decodes by the probability flow, and the samples of `invert`.

    Args:
        start: of `read_start`, (B, C, ...).
        label: that the network gets, one or one per image; None: its null label, if it has labels.
        name: of that argument, for messages.
    """
    condition = image_condition(pipeline, name, label, len(start))
    decoder, flow = copy(pipeline), ProbabilityFlow(pipeline.scheduler, strength)
    vars(decoder)["scheduler"] = flow  # unregistered: it is no component that could be saved
    steps = _steps(pipeline, num_inference_steps)
    device = pipeline._execution_device
    decoder._set_timesteps({"num_inference_steps": steps}, None, None, device)
    with evaluating(pipeline.unet, pipeline.vae):
        x0 = pipeline._encode(start)
        check_channels(pipeline, x0)
        with pipeline.progress_bar(total=2 * len(flow.levels)) as bar:

            def predict(x: torch.Tensor, i: int) -> torch.Tensor:
                bar.update()
                t, labels = flow.timesteps[2 * i], [condition.class_labels]
                return decoder._evaluate(x, t, flow.levels[i], labels, condition)[0][0]

            samples = invert(flow, x0, predict)
    pipeline.maybe_free_model_hooks()
    check_images(samples[0], "after the inversion")
    return decoder, samples


def edited(
    pipeline: Any,
    image: Any,
    label: Labels | None,
    strength: float,
    source_label: Labels | None,
    mask: Any,
    num_inference_steps: int | None,
    output_type: str | None,
    call: Mapping[str, Any],
) -> EditOutput:
    """`ClassifierGuidedPipeline.edit`, whose further arguments are `call`."""
    _check_call_arguments(call)
    strength = check_number("strength", strength, 0, 1)
    start = read_start(pipeline, image)
    output_type = _output_type(pipeline, output_type, start)
    region = None if mask is None else read_mask(mask, start)
    steps = _steps(pipeline, num_inference_steps)
    options = {**call, "label": image_labels(pipeline, label, len(start)) or None}
    options |= {"num_inference_steps": steps, "output_type": "latent"}
    before = pipeline._encode(start)
    if strength == 0:
        if source_label is not None:
            image_condition(pipeline, "source_label", source_label, len(start))
        output = pipeline(**options, image=start, strength=0)
        after, images = before, start
    else:
        decoder, samples = inverted(pipeline, start, strength, source_label, steps, "source_label")
        if region is not None:
            options |= keep_outside(samples, before, region, call)
        output = decoder(**options, latents=samples[0], strength=1.0)
        after = output.images
        images = pipeline._in_units(after)
        if region is not None:
            images = torch.where(region.to(images.device), images, start.to(images))
    return EditOutput(
        *_outputs(pipeline, (start, images), (before, after), output_type),
        label_probabilities(pipeline.classifier, before),
        label_probabilities(pipeline.classifier, after),
        output.guidance_evaluations,
        output.settings,
    )


def _steps(pipeline: Any, num_inference_steps: int | None) -> int:
    if num_inference_steps is None:
        return pipeline.config.defaults["num_inference_steps"]
    return num_inference_steps


def anomalies(pipeline: Any, image: Any, label: Labels, **arguments: Any) -> AnomalyOutput:
    """`ClassifierGuidedPipeline.anomaly`."""
    output = pipeline.edit(image, label, output_type="pt", **arguments)
    maps = output.difference.abs().mean(1)
    return AnomalyOutput(maps, maps.reshape(len(maps), -1).mean(1), output.images)


#: arguments of the pipeline's call that have no meaning in `edit`
NOT_IN_EDIT = (
    "latents",
    "image",
    "timesteps",
    "sigmas",
    "eta",
    "generator",
    "height",
    "width",
    "num_images_per_label",
    "return_dict",
    "particles",
    "resample",
)


def _check_call_arguments(call: Mapping[str, Any]) -> None:
    for name in call:
        if name in NOT_IN_EDIT:
            raise ValueError(
                f"{name}={shown(call[name])}: edit inverts its image to the noise that it decodes, "
                "without chance, so it takes the other arguments of the pipeline's call only"
            )


def _output_type(pipeline: Any, output_type: str | None, start: torch.Tensor) -> str:
    """The call's, or its default.

    Raises:
        ValueError: for another, and as `check_output`.
    """
    if output_type is None:
        output_type = "np" if pipeline.are_arrays(start) else "pil"
    check_output_type(output_type)
    check_output(pipeline, start, output_type)
    return output_type


def _outputs(
    pipeline: Any,
    in_units: tuple[torch.Tensor, torch.Tensor],
    latents: tuple[torch.Tensor, torch.Tensor],
    output_type: str,
) -> tuple[Any, Any]:
    """(images, difference) as `output_type` says, of those (before, after) the edit."""
    if output_type == "latent":
        before, after = latents
        return after, after - before
    start, images = in_units
    difference = pipeline._convert(images, "pt") - pipeline._convert(start.to(images.device), "pt")
    if output_type != "pt":
        are_arrays = pipeline.are_arrays(images)
        difference = difference if are_arrays else difference.movedim(1, -1)
        difference = difference.cpu().numpy()
    return pipeline._convert(images, output_type), difference


def read_mask(mask: Any, images: torch.Tensor) -> torch.Tensor:
    """Where images may change, as booleans (1 or B, 1, ...).

    Args:
        mask: PIL, one or several, in which white may change; or numbers from 0 to 1, of the images'
            size, also with dimensions (B,) or (B, 1) before it.
        images: (B, C, ...).

    Raises:
        ValueError: for another size, other numbers, or a mask with nothing to change.
    """
    size, count = tuple(images.shape[2:]), len(images)
    pictures = [mask] if isinstance(mask, Image.Image) else mask
    if isinstance(pictures, (list, tuple)) and all(isinstance(m, Image.Image) for m in pictures):
        pictures = np.stack([eight_bits(picture, "L", "mask") / 255 for picture in pictures])
    try:
        values = torch.as_tensor(pictures).float()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"mask={shown(mask)}: pictures, or an array of numbers from 0 to 1, are allowed"
        ) from None
    values = values[None] if values.ndim == len(size) else values
    values = values[:, None] if values.ndim == len(size) + 1 else values
    allowed = [(rows, 1, *size) for rows in (1, count)]
    if tuple(values.shape) not in allowed or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"mask has shape {tuple(values.shape)} and values from {float(values.min()):g} to "
            f"{float(values.max()):g}; numbers from 0 to 1 in the images' size {size}, one mask or "
            f"one for each of {count} images, are allowed"
        )
    region = values > 0.5
    if not region.flatten(1).any(1).all():
        raise ValueError("mask: nothing may change, all of a mask is 0 (black); 1 marks what may")
    return region


def keep_outside(
    samples: Sequence[torch.Tensor],
    x0: torch.Tensor,
    region: torch.Tensor,
    call: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of a decoding call in which each sample is that of the inversion outside a region.

    Args:
        samples: of `invert`.
        x0: what they lead to, (B, C, ...).
        region: (1 or B, 1, ...), of the images' size; of latents, all that it touches may change.
        call: the further arguments, of which the callback is called afterwards.
    """
    callback = call.get("callback_on_step_end")
    inputs = call.get("callback_on_step_end_tensor_inputs", ("latents",))
    region = region.to(x0.device)
    if region.shape[2:] != x0.shape[2:]:
        region = F.adaptive_max_pool2d(region.float(), x0.shape[2:]) > 0

    def merge(pipeline: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        level = (index + 2) // 2  # that the step led to
        original = samples[level] if index + 1 < pipeline.num_timesteps else x0
        latents = tensors["latents"]
        latents = torch.where(region, latents, original.to(latents))
        changed = None
        if callback is not None:
            seen = {name: tensors[name] for name in inputs}
            changed = callback(pipeline, index, t, seen | {"latents": latents})
        return {"latents": latents} if changed is None else {"latents": latents, **changed}

    names = tuple(dict.fromkeys(("latents", *inputs)))
    return {"callback_on_step_end": merge, "callback_on_step_end_tensor_inputs": names}


def label_probabilities(
    classifier: torch.nn.Module | None, images: torch.Tensor
) -> torch.Tensor | None:
    """p(label | image), (B, num_labels), at the classifier's lowest noise level; None without one of
    labels."""
    kind = module_config(classifier).get("problem_type")
    if classifier is None or kind == REGRESSION:
        return None
    with evaluating(classifier):
        dtype = next((p.dtype for p in classifier.parameters()), images.dtype)
        logits = logits_of(classifier(images.to(dtype), 0)).float()
    return logits.sigmoid() if kind == MULTI else logits.softmax(-1)
