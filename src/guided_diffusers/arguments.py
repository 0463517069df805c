"""The arguments of a pipeline's call, checked, with defaults: batch, condition of the network,
terms of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .defaults import ALGORITHMS
from .guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Guidance,
    GuidanceSum,
    check_devices,
)
from .images import check_precision, down_sampling, low_resolution
from .likelihood import MULTI, SINGLE, Labels, parse_labels
from .noise import has_posterior_variance, module_config, prediction_type


@dataclass
class Condition:
    """What the network of a call is conditioned on.

    Attributes:
        class_labels: (B,); None for an unconditional network.
        low_res: low-resolution images of an up-sampling network, (1 or B, C, h, w); None for any
            other.
        clip_x0: whether its predicted x0 is clipped to [-1, 1].
    """

    class_labels: torch.Tensor | None
    low_res: torch.Tensor | None
    clip_x0: bool


@dataclass
class CallArguments:
    """What a call does, after all arguments are resolved.

    Attributes:
        batch_size: number of images.
        sample_size: height and width of the samples, in pixels or latents.
        condition: of the network.
        terms: the guidance, without what is off.
        guider_options: `algorithm`, `every` and `tolerance` of `Guider`.
    """

    batch_size: int
    sample_size: tuple[int, int] | None
    condition: Condition
    terms: list[Guidance]
    guider_options: dict[str, Any]


def resolve_arguments(
    pipeline: Any,
    label: Labels | None,
    num_images_per_label: int,
    *,
    size: tuple[int | None, int | None],
    guidance_scale: Any,
    classifier_free_scale: Any,
    interval: tuple[float | None, float | None],
    conditional: bool | None,
    guidance: Guidance | Sequence[Guidance] | None,
    guidance_algorithm: str | None,
    guidance_every: int | None,
    guidance_tolerance: float | None,
    latents: torch.Tensor | None,
    image: Any,
    clip_x0: bool,
    output_type: str,
    tensor_inputs: Sequence[str],
) -> CallArguments:
    """Check the arguments of the pipeline's call and resolve them with its `config.defaults`.

    Args:
        pipeline: the `ClassifierGuidedPipeline`.
        size: height and width.
        interval: guidance_start and guidance_stop.
        tensor_inputs: callback_on_step_end_tensor_inputs.

    The other arguments are those of the call.

    Raises:
        ValueError: naming the argument, the value and what is allowed.
    """
    guider_options, interval = _resolve_guidance(
        pipeline, guidance_algorithm, guidance_every, guidance_tolerance, *interval
    )
    _check_call(pipeline, num_images_per_label, output_type, tensor_inputs)
    device = pipeline._execution_device
    mixtures = _resolve_labels(pipeline, label, num_images_per_label)
    low_res = None
    if image is not None:
        low_res = low_resolution(image, pipeline.unet.config.in_channels)
        low_res = low_res.to(device, pipeline.dtype)
    batch_size = _batch_size(mixtures, num_images_per_label, latents, low_res)
    sample_size = _sample_size(pipeline, *size, latents)
    class_labels = _class_labels(pipeline, mixtures, batch_size, conditional, device)
    condition = Condition(class_labels, low_res, clip_x0)
    scales = guidance_scale, classifier_free_scale
    terms = _label_terms(pipeline, mixtures, num_images_per_label, *scales, interval, condition)
    terms += _extra_terms(pipeline, guidance, condition)
    check_devices(terms, device)
    return CallArguments(batch_size, sample_size, condition, terms, guider_options)


def _resolve_guidance(
    pipeline: Any,
    algorithm: str | None,
    every: int | None,
    tolerance: float | None,
    start: float | None,
    stop: float | None,
) -> tuple[dict[str, Any], tuple[float, float]]:
    """({algorithm, every, tolerance}, (start, stop)), with the defaults for None."""
    prediction_type(pipeline.scheduler)  # first: it refuses schedulers that can't be guided
    defaults, ancestral = pipeline.config.defaults, has_posterior_variance(pipeline.scheduler)
    if algorithm is None:
        algorithm = defaults["guidance_algorithm"]
        if algorithm == "mean" and not ancestral:
            algorithm = "output"
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"guidance_algorithm={algorithm!r}: one of {', '.join(ALGORITHMS)} is allowed"
        )
    if algorithm == "mean" and not ancestral:
        raise ValueError(
            "guidance_algorithm='mean' shifts the mean of a DDPM step; with "
            f"{type(pipeline.scheduler).__name__} the others are allowed"
        )
    start = defaults["guidance_start"] if start is None else start
    stop = defaults["guidance_stop"] if stop is None else stop
    if not 0 <= start <= stop <= 1:
        raise ValueError(
            f"guidance_start={start!r}, guidance_stop={stop!r}: 0 <= start <= stop <= 1 is allowed"
        )
    if every is None and tolerance is None:
        every, tolerance = defaults["guidance_every"], defaults["guidance_tolerance"]
    every = 1 if every is None else every
    return {"algorithm": algorithm, "every": every, "tolerance": tolerance}, (start, stop)


def _check_call(
    pipeline: Any, num_images_per_label: int, output_type: str, tensor_inputs: Sequence[str]
) -> None:
    """Validate arguments before any computation."""
    if pipeline.vae is not None and output_type != "latent":
        check_precision(pipeline.vae)
    if num_images_per_label < 1:
        raise ValueError(f"num_images_per_label={num_images_per_label}: at least 1 is allowed")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type={output_type!r}: 'pil', 'np', 'pt' and 'latent' are allowed")
    if unknown := set(tensor_inputs) - set(pipeline._callback_tensor_inputs):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs: {sorted(unknown)} not among "
            f"{pipeline._callback_tensor_inputs}"
        )


def _resolve_labels(pipeline: Any, label: Labels | None, per_label: int) -> list[dict[int, float]]:
    """{id: weight} of each image; empty without a label."""
    if label is None:
        return []
    names = module_config(pipeline.classifier).get("id2label") or pipeline.config.id2label
    mixtures = parse_labels(label, names, pipeline.num_labels)
    return [mixture for mixture in mixtures for _ in range(per_label)]


def _class_labels(
    pipeline: Any,
    mixtures: list[dict[int, float]],
    batch_size: int,
    conditional: bool | None,
    device: torch.device,
) -> torch.Tensor | None:
    """Class labels for the network, (B,); None for an unconditional one."""
    embeddings, null = pipeline.num_class_embeds, pipeline.null_label
    if embeddings is None:
        if conditional:
            raise ValueError(
                "conditional=True needs a network with class embeddings; this one is unconditional"
            )
        if mixtures and pipeline.classifier is None:
            raise ValueError(
                "label has no effect: the network is unconditional and there is no classifier"
            )
        return None
    ids = []
    for mixture in mixtures or [{}] * batch_size:
        is_single = len(mixture) == 1 and list(mixture.values()) == [1.0]
        if is_single and conditional is not False:
            ids.extend(mixture)
        elif conditional:
            raise ValueError(
                f"conditional=True: the network can't be conditioned on {mixture or 'no label'}; "
                "use None or False"
            )
        elif null is None:
            raise ValueError(
                f"conditional={conditional}, label={mixture or None}: the network has no null "
                f"label ({embeddings} class embeddings, {pipeline.num_labels} known labels), so "
                "it needs one label an image"
            )
        else:
            ids.append(null)
    if max(ids) >= embeddings:
        raise ValueError(
            f"label {max(ids)} is unknown to the network; ids 0 to {embeddings - 1} are allowed"
        )
    return torch.tensor(ids, device=device)


def _label_terms(
    pipeline: Any,
    mixtures: list[dict[int, float]],
    per_label: int,
    scale: Any,
    free_scale: Any,
    interval: tuple[float, float],
    condition: Condition,
) -> list[Guidance]:
    """Classifier and classifier-free guidance to the labels; none at scale 0."""
    if not mixtures:
        if _is_on(scale) or _is_on(free_scale):
            raise ValueError(
                f"guidance_scale={scale}, classifier_free_scale={free_scale} need a label to "
                "steer to"
            )
        return []
    class_labels, null = condition.class_labels, pipeline.null_label
    hidden = null is not None and bool((class_labels == null).any())
    if free_scale is None and hidden:
        free_scale = 0.0  # the default is for labels that the network gets
    scale = _image_scale(pipeline, "guidance_scale", scale, len(mixtures), per_label)
    free_scale = _image_scale(
        pipeline, "classifier_free_scale", free_scale, len(mixtures), per_label
    )
    terms: list[Guidance] = []
    if scale.any():
        _check_classifier(pipeline, scale)
        terms.append(ClassifierGuidance(pipeline.classifier, mixtures, scale, *interval))
    if free_scale.any():
        if class_labels is None or null is None:
            raise ValueError(
                f"classifier_free_scale={free_scale.tolist()} needs a class-conditional network "
                "with a null label, one class embedding more than labels"
            )
        if hidden:
            raise ValueError(
                f"classifier_free_scale={free_scale.tolist()} needs a network that gets a label; "
                "mixtures and conditional=False hide it"
            )
        terms.append(ClassifierFreeGuidance(null, free_scale))
    return terms


def _check_classifier(pipeline: Any, scale: torch.Tensor) -> None:
    if pipeline.classifier is None:
        raise ValueError(
            f"guidance_scale={scale.tolist()} needs a classifier, and the pipeline has none: pass "
            "classifier=... when loading it, or guidance_scale=0 to use the network alone"
        )
    kind = module_config(pipeline.classifier).get("problem_type") or SINGLE
    if kind not in (SINGLE, MULTI):
        raise ValueError(
            f"classifier: problem_type={kind!r} has no labels; {SINGLE} and {MULTI} are allowed, "
            "or guidance=ClassifierGuidance(classifier, target=...)"
        )


def _image_scale(pipeline: Any, name: str, scale: Any, images: int, per_label: int) -> torch.Tensor:
    """The scale as a tensor, () or one per image."""
    if scale is None:
        alone = name == "guidance_scale" and pipeline.classifier is None
        scale = 0.0 if alone else pipeline.config.defaults[name]
    scale = torch.as_tensor(scale, dtype=torch.float32)
    if scale.ndim == 1 and len(scale) * per_label == images:
        scale = scale.repeat_interleave(per_label)
    if scale.ndim > 1 or (scale.ndim == 1 and len(scale) != images):
        raise ValueError(
            f"{name} has shape {tuple(scale.shape)}; a number, or one per label or image "
            f"({images // per_label} or {images}), is allowed"
        )
    return scale


def _extra_terms(
    pipeline: Any, guidance: Guidance | Sequence[Guidance] | None, condition: Condition
) -> list[Guidance]:
    """The terms of the call's `guidance`, whose conditions must be class labels that the network
    knows."""
    given = (guidance,) if isinstance(guidance, Guidance) else tuple(guidance or ())
    if not all(isinstance(term, Guidance) for term in given):
        raise ValueError(
            f"guidance: {[type(term).__name__ for term in given]}; a term of guidance, a sum or a "
            "list of them is allowed"
        )
    terms, class_labels = GuidanceSum(given), condition.class_labels
    if terms.conditions and class_labels is None:
        raise ValueError(
            "guidance: a term has conditions, class labels, and the network has no class embeddings"
        )
    for extra in terms.conditions:
        if unknown := extra.keys() - {"class_labels"}:
            raise ValueError(
                f"guidance: a term has conditions {sorted(unknown)}; the network takes "
                "['class_labels']"
            )
        labels = extra.get("class_labels", class_labels)
        if labels.ndim != 1 or len(labels) not in (1, len(class_labels)):
            raise ValueError(
                f"guidance: a condition class_labels has shape {tuple(labels.shape)}; one row, or "
                f"one for each of {len(class_labels)} images, of shape () is allowed"
            )
        for label in (int(labels.min()), int(labels.max())):
            if not 0 <= label < pipeline.num_class_embeds:
                raise ValueError(
                    f"guidance: a condition has the class label {label}; 0 to "
                    f"{pipeline.num_class_embeds - 1} are allowed"
                )
    return list(terms.terms())


def _batch_size(
    mixtures: Sequence[Any],
    num_images_per_label: int,
    latents: torch.Tensor | None,
    low_res: torch.Tensor | None,
) -> int:
    """Number of images: of the labels, else of the latents or the low-resolution images."""
    if mixtures:
        return len(mixtures)
    given = low_res if latents is None else latents
    return num_images_per_label if given is None or num_images_per_label > 1 else len(given)


def _sample_size(
    pipeline: Any, height: int | None, width: int | None, latents: torch.Tensor | None
) -> tuple[int, int] | None:
    """Height and width of the samples, from those of the images, which default to the network's;
    None: those of `latents`."""
    given = {"height": height, "width": width}
    named = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    if latents is not None:
        if named:
            raise ValueError(f"{named}: latents has a size, so only one of the two is allowed")
        return None
    config, pixels = module_config(pipeline.unet), down_sampling(module_config(pipeline.vae))
    size = config.get("sample_size")
    own = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if None in own and None in (height, width):
        raise ValueError(
            "height and width, or latents, are needed: the network's config has no sample_size"
        )
    if not named:
        return own
    if size is not None and not config.get("block_out_channels"):  # no UNet
        raise ValueError(f"{named}: {type(pipeline.unet).__name__} takes images of one size only")
    height = own[0] * pixels if height is None else height
    width = own[1] * pixels if width is None else width
    unit = pixels * down_sampling(config)
    for value in (height, width):
        if type(value) is not int or value < 1 or value % unit:
            raise ValueError(f"{named}: multiples of {unit}, at least {unit}, are allowed")
    return height // pixels, width // pixels


def _is_on(scale: Any) -> bool:
    return scale is not None and bool(torch.as_tensor(scale).any())
