"""The arguments of a pipeline's call, checked, with defaults: batch, condition of the network,
terms of guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checks import check_bool, check_number, shown
from .defaults import ALGORITHMS, DEFAULTS
from .guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Guidance,
    GuidanceSum,
    check_devices,
    check_interval,
    check_module,
    scale_tensor,
)
from .images import check_precision, low_resolution
from .likelihood import MULTI, SINGLE, Labels, parse_labels
from .noise import has_posterior_variance, is_flow, module_config, prediction_type

MAX_IMAGES = 10**6  # of a call; more don't fit any memory
MAX_STEPS = 10**5  # of a run in continuous time


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
        condition: of the network.
        terms: the guidance, without what is off.
        guider_options: `algorithm`, `every` and `tolerance` of `Guider`.
    """

    batch_size: int
    condition: Condition
    terms: list[Guidance]
    guider_options: dict[str, Any]


def resolve_arguments(
    pipeline: Any,
    label: Labels | None,
    num_images_per_label: int,
    *,
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
        interval: guidance_start and guidance_stop.
        tensor_inputs: callback_on_step_end_tensor_inputs.

    The other arguments are those of the call.

    Raises:
        ValueError: naming the argument, the value and what is allowed.
    """
    check_module("unet", pipeline.unet)
    guider_options, interval = _resolve_guidance(
        pipeline, guidance_algorithm, guidance_every, guidance_tolerance, *interval
    )
    if conditional is not None:
        conditional = check_bool("conditional", conditional)
    clip_x0 = check_bool("clip_x0", clip_x0)
    _check_call(pipeline, num_images_per_label, output_type, tensor_inputs)
    device = pipeline._execution_device
    _check_latents(latents)
    mixtures = _resolve_labels(pipeline, label, num_images_per_label)
    low_res = None
    if image is not None:
        low_res = low_resolution(image, pipeline.unet.config.in_channels)
        low_res = low_res.to(device, pipeline.dtype)
    batch_size = _batch_size(mixtures, num_images_per_label, latents, low_res)
    class_labels = _class_labels(pipeline, mixtures, batch_size, conditional, device)
    condition = Condition(class_labels, low_res, clip_x0)
    scales = guidance_scale, classifier_free_scale
    terms = _label_terms(pipeline, mixtures, num_images_per_label, *scales, interval, condition)
    terms += _extra_terms(pipeline, guidance, condition)
    check_devices(terms, device)
    return CallArguments(batch_size, condition, terms, guider_options)


def check_defaults(defaults: Any) -> dict[str, Any]:
    """A pipeline's defaults, completed by `DEFAULTS`; None stands for those.

    Raises:
        ValueError: for other names, or values that no call accepts.
    """
    if not isinstance(defaults, (dict, type(None))):
        raise ValueError(f"defaults={shown(defaults)}: a mapping of {sorted(DEFAULTS)} is allowed")
    values = {name: value for name, value in (defaults or {}).items() if value is not None}
    if unknown := values.keys() - DEFAULTS.keys():
        raise ValueError(
            f"defaults: {sorted(map(str, unknown))} are unknown; allowed: {sorted(DEFAULTS)}"
        )
    values = DEFAULTS | values
    try:
        for name in ("guidance_scale", "classifier_free_scale"):
            values[name] = check_number(name, values[name])
        check_interval(values["guidance_start"], values["guidance_stop"], "guidance_")
        for name, most in (("num_inference_steps", MAX_STEPS), ("guidance_every", math.inf)):
            values[name] = check_number(name, values[name], 1, most, integer=True)
        if values["guidance_tolerance"] is not None:
            check_number("guidance_tolerance", values["guidance_tolerance"], 0, above=True)
        _check_algorithm(values["guidance_algorithm"])
    except ValueError as error:
        raise ValueError(f"defaults: {error}") from None
    return values


def check_names(id2label: Any) -> dict[int, str] | None:
    """Names of labels by their integer ids; None without any.

    Raises:
        ValueError: for anything but a mapping of ids.
    """
    try:
        return {int(i): name for i, name in (id2label or {}).items()} or None
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"id2label={shown(id2label)}: a mapping {{id: name}} is allowed") from None


def _check_algorithm(algorithm: Any) -> None:
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise ValueError(
            f"guidance_algorithm={shown(algorithm)}: one of {', '.join(ALGORITHMS)} is allowed"
        )


def check_steps(scheduler: Any, steps: Any) -> int:
    """`num_inference_steps`, an integer from 1 to the scheduler's number of timesteps.

    Raises:
        ValueError: for any other value.
    """
    most = scheduler.config.get("num_train_timesteps")
    if is_flow(scheduler) or not isinstance(most, int):  # continuous time
        most = MAX_STEPS
    return check_number("num_inference_steps", steps, 1, most, integer=True)


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
    _check_algorithm(algorithm)
    if algorithm == "mean" and not ancestral:
        raise ValueError(
            "guidance_algorithm='mean' shifts the mean of a DDPM step; with "
            f"{type(pipeline.scheduler).__name__} the others are allowed"
        )
    start = defaults["guidance_start"] if start is None else start
    stop = defaults["guidance_stop"] if stop is None else stop
    start, stop = check_interval(start, stop, "guidance_")
    if every is None and tolerance is None:
        every, tolerance = defaults["guidance_every"], defaults["guidance_tolerance"]
    every = 1 if every is None else check_number("guidance_every", every, 1, integer=True)
    if tolerance is not None:
        tolerance = check_number("guidance_tolerance", tolerance, 0, above=True)
    return {"algorithm": algorithm, "every": every, "tolerance": tolerance}, (start, stop)


def _check_call(
    pipeline: Any, num_images_per_label: int, output_type: str, tensor_inputs: Sequence[str]
) -> None:
    """Validate arguments before any computation."""
    if pipeline.vae is not None and output_type != "latent":
        check_precision(pipeline.vae)
    check_number("num_images_per_label", num_images_per_label, 1, MAX_IMAGES, integer=True)
    if not isinstance(output_type, str) or output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(
            f"output_type={shown(output_type)}: 'pil', 'np', 'pt' and 'latent' are allowed"
        )
    known = pipeline._callback_tensor_inputs
    is_list = isinstance(tensor_inputs, (list, tuple, set, frozenset))
    if not is_list or any(name not in known for name in tensor_inputs):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs={shown(tensor_inputs)}: a list of names among "
            f"{known} is allowed"
        )


def _check_latents(latents: Any) -> None:
    is_tensor = isinstance(latents, torch.Tensor) and latents.is_floating_point()
    if latents is not None and not is_tensor:
        kind = latents.dtype if hasattr(latents, "dtype") else type(latents).__name__
        raise ValueError(
            f"latents is a {type(latents).__name__} ({kind}); a floating-point torch.Tensor "
            "(B, C, H, W) is allowed"
        )
    if latents is not None and latents.ndim != 4:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; (B, C, H, W) is allowed")


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
    scale = pipeline.config.defaults[name] if scale is None else scale
    if callable(scale):
        raise ValueError(
            f"{name}={shown(scale)}: a number, or one per label or image, is allowed; a function "
            "of the noise level is the scale of a term, guidance=ClassifierGuidance(..., scale)"
        )
    scale = scale_tensor(name, scale)
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
    given = guidance if isinstance(guidance, (list, tuple)) else (guidance,)
    given = () if guidance is None else tuple(given)
    if not all(isinstance(term, Guidance) for term in given):
        raise ValueError(
            f"guidance={shown(guidance)}: a term of guidance, a sum or a list of them is allowed"
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


def _is_on(scale: Any) -> bool:
    return scale is not None and bool(scale_tensor("guidance_scale", scale).any())
