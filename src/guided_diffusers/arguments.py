"""The arguments of a pipeline's call, checked, with defaults: batch, condition of the network,
terms of guidance."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    PipelineCallback,
)

from .checks import check_bool, check_number, shown
from .defaults import DEFAULTS
from .guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Guidance,
    GuidanceSum,
    ScaleSchedule,
    check_devices,
    scale_tensor,
)
from .images import (
    check_precision,
    check_scale_channels,
    down_sampling,
    low_resolution,
    start_array,
    start_image,
)
from .likelihood import MULTI, SINGLE, Labels, check_power, parse_labels
from .networks import check_module
from .noise import has_posterior_variance, module_config, prediction_type
from .particles import Population
from .presets import check_settings, is_on, resolve_settings
from .sizes import (
    check_classifier_size,
    check_rank,
    check_sample_shape,
    has_known_rank,
    resolve_size,
)

MAX_IMAGES = 10**6  # of a call; more don't fit any memory


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
        num_images_per_label: of them, consecutive.
        sample_size: height and width of the samples, in pixels or latents, or the sizes of samples
            of another rank; None: those of the call's latents.
        channels: of the samples; None: as the network's config says.
        condition: of the network.
        terms: the guidance, without what is off.
        guider_options: `algorithm`, `every` and `tolerance` of `Guider`.
        settings: the `mode`, and the value of each argument in `DEFAULTS`.
        particles: of each population; None: images have no weights.
        resample: whether the images of a population get equal weights.
        start: images to start from, (1 or B, C, ...); None: noise, or the call's latents.
        strength: the fraction of the run that is made; None: all of it, from noise.
    """

    batch_size: int
    num_images_per_label: int
    sample_size: tuple[int, ...] | None
    condition: Condition
    terms: list[Guidance]
    guider_options: dict[str, Any]
    settings: dict[str, Any]
    particles: int | None
    resample: bool
    start: torch.Tensor | None
    strength: float | None
    channels: int | None = None

    def population(
        self, scheduler: Any, sample: torch.Tensor, generator: Any, eta: float
    ) -> Population | None:
        """Weights of the run's images; None without particles.

        Raises:
            ValueError: as `Population`.
        """
        if self.particles is None:
            return None
        options = self.particles, eta, self.resample
        return Population(scheduler, self.terms, sample, generator, *options)

    def terms_with_scale(self, scale: Any) -> tuple[Guidance, ...]:
        """The terms with another scale of the classifier, a number or one per label or image.

        Raises:
            ValueError: for a scale above 0 in a call that began with 0.
        """
        per_label = self.num_images_per_label
        scale = _image_scale("pipeline._guidance_scale", scale, self.batch_size, per_label)
        if is_on("guidance_scale", self.settings["guidance_scale"]):
            return self.terms[0].with_scale(_scheduled(scale, self.settings)), *self.terms[1:]
        if scale.any():
            raise ValueError(
                f"pipeline._guidance_scale={scale.tolist()}: the call began without guidance by a "
                "classifier; begin it with a guidance_scale above 0"
            )
        return tuple(self.terms)


def resolve_arguments(
    pipeline: Any,
    label: Labels | None,
    num_images_per_label: int | None,
    call: Mapping[str, Any],
    *,
    conditional: bool | None,
    size: tuple[int | None, int | None],
    sample_shape: Sequence[int] | None,
    latents: torch.Tensor | None,
    clip_x0: bool,
    output_type: str,
    tensor_inputs: Sequence[str],
) -> CallArguments:
    """Check the arguments of the pipeline's call and resolve them with its `config.defaults`.

    Args:
        pipeline: the `ClassifierGuidedPipeline`.
        call: the arguments in `DEFAULTS`, `guidance`, `image`, `strength`, `particles`, `resample`,
            `timesteps` and `sigmas`.
        size: height and width.
        tensor_inputs: callback_on_step_end_tensor_inputs.

    The other arguments are those of the call.

    Raises:
        ValueError: naming the argument, the value and what is allowed.
    """
    check_module("unet", pipeline.unet)
    prediction_type(pipeline.scheduler)  # it refuses schedulers that can't be guided
    if conditional is not None:
        conditional = check_bool("conditional", conditional)
    clip_x0 = check_bool("clip_x0", clip_x0)
    particles, resample = _check_particles(call, num_images_per_label)
    if num_images_per_label is None:
        num_images_per_label = particles or 1
    _check_call(pipeline, num_images_per_label, output_type, tensor_inputs)
    device = pipeline._execution_device
    _check_latents(pipeline, latents)
    mixtures = _resolve_labels(pipeline, label, num_images_per_label)
    low_res, start, strength = _images_of_call(pipeline, call, latents, particles)
    given = latents if start is None else start
    batch_size = _batch_size(mixtures, num_images_per_label, given, low_res)
    _check_count(start, batch_size)
    channels, sample_size = None, None
    if sample_shape is None:
        sample_size = resolve_size(pipeline, *size, given)
    else:
        channels, *sample_size = check_sample_shape(sample_shape, *size, given)
    class_labels = _class_labels(pipeline, mixtures, batch_size, conditional, device)
    condition = Condition(class_labels, low_res, clip_x0)
    settings = _call_settings(pipeline, call, class_labels)
    if not mixtures:
        settings |= {"guidance_scale": 0.0, "classifier_free_scale": 0.0}
    guider_options = _guider_options(pipeline, call, settings)
    terms = _label_terms(pipeline, mixtures, num_images_per_label, call, settings, condition)
    if any(isinstance(term, ClassifierGuidance) for term in terms):
        check_classifier_size(pipeline.classifier, sample_size)
    terms += _extra_terms(pipeline, call["guidance"], condition)
    check_devices(terms, device)
    if particles is not None:
        _check_populations(batch_size, particles, low_res)
        terms = [term for term in terms if term.is_on]  # what is off is no part of the density
    return CallArguments(
        batch_size,
        num_images_per_label,
        sample_size,
        condition,
        terms,
        guider_options,
        settings,
        particles,
        resample,
        start,
        strength,
        channels,
    )


def _images_of_call(
    pipeline: Any, call: Mapping[str, Any], latents: torch.Tensor | None, particles: int | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, float | None]:
    """(low-resolution images, images to start from, strength) of a call; None where it has none.

    With `strength`, `image` is one to start from; without, an up-sampling network's.
    """
    image, strength = call["image"], call.get("strength")
    if strength is None:
        if image is None:
            return None, None, None
        low_res = _low_resolution(pipeline, image)
        return low_res.to(pipeline._execution_device, pipeline.dtype), None, None
    strength = check_number("strength", strength, 0, 1)
    if particles is not None:
        raise ValueError(
            f"strength={strength}, particles={particles}: a population starts from noise, so only one "
            "of the two is allowed"
        )
    if (image is None) == (latents is None):
        both = "only one of the two" if image is not None else "one of the two"
        raise ValueError(
            f"strength={strength}: the run starts midway, from image (with noise of that level) or "
            f"from latents (samples of that level); {both} is allowed"
        )
    return None, None if image is None else read_start(pipeline, image), strength


def _check_count(start: torch.Tensor | None, batch_size: int) -> None:
    if start is not None and len(start) not in (1, batch_size):
        raise ValueError(
            f"image holds {len(start)} images; one, or one for each of the {batch_size}, is allowed"
        )


def read_start(pipeline: Any, image: Any) -> torch.Tensor:
    """Images to start from, (B, C, ...), of a size that the pipeline's networks take; arrays are in
    the data's units.

    Raises:
        ValueError: for others.
    """
    config, vae = module_config(pipeline.unet), module_config(pipeline.vae)
    is_known = has_known_rank(pipeline.unet)
    if pipeline.has_arrays if is_known else pipeline.are_arrays(image):
        start = start_array(image, config.get("in_channels"))
        check_scale_channels(pipeline.config, start.shape[1])
        check_rank(pipeline.unet, start)
        return start
    channels = vae.get("in_channels", 3) if pipeline.vae is not None else config.get("in_channels")
    start = start_image(image, channels)
    check_rank(pipeline.unet, start)
    if isinstance(image, torch.Tensor) and 0 <= start.min() and 0.5 < start.max() <= 1:
        warnings.warn(
            "image: all values are from 0 to 1; tensors of pictures are in [-1, 1] (output_type='pt' "
            "gives [0, 1]: use 2 * image - 1)",
            stacklevel=3,
        )
    unit = down_sampling(vae)
    if any(n % unit for n in start.shape[2:]):
        raise ValueError(
            f"image has size {tuple(start.shape[2:])}; multiples of {unit} are allowed"
        )
    return start


def image_labels(pipeline: Any, label: Labels | None, count: int) -> list[dict[int, float]]:
    """{id: weight} for each of `count` images, of one label or one per image; empty without.

    Raises:
        ValueError: for another number of labels, or unknown ones.
    """
    mixtures = _resolve_labels(pipeline, label, 1)
    if len(mixtures) not in (0, 1, count):
        raise ValueError(
            f"label holds {len(mixtures)} labels; one, or one for each of {count} images, is allowed"
        )
    return mixtures * count if len(mixtures) == 1 else mixtures


def image_condition(pipeline: Any, name: str, label: Labels | None, count: int) -> Condition:
    """What the network gets to invert `count` images of a label, or without one of none.

    Args:
        name: of the label's argument, for messages.

    Raises:
        ValueError: for a label that the network can't get, or a network that needs one.
    """
    if label is not None and pipeline.num_class_embeds is None:
        raise ValueError(
            f"{name}={shown(label)} has no effect: the network is unconditional; use None"
        )
    mixtures = image_labels(pipeline, label, count)
    conditional = None if label is None else True
    device = pipeline._execution_device
    class_labels = _class_labels(pipeline, mixtures, count, conditional, device)
    return Condition(class_labels, None, False)


def _low_resolution(pipeline: Any, image: Any) -> torch.Tensor:
    try:
        return low_resolution(image, pipeline.unet.config.in_channels)
    except ValueError as error:
        raise ValueError(f"{error}; to start from an image, give strength, too") from None


def _check_particles(call: Mapping[str, Any], num_images: Any) -> tuple[int | None, bool]:
    """`particles` and `resample` of a call; refuses arguments that have no meaning with them."""
    particles, resample = call["particles"], check_bool("resample", call["resample"])
    if particles is None:
        if not resample:
            raise ValueError("resample=False has no effect without particles")
        return None, True
    particles = check_number("particles", particles, 1, MAX_IMAGES, integer=True)
    if isinstance(num_images, int) and num_images % particles:
        raise ValueError(
            f"num_images_per_label={num_images}, particles={particles}: whole populations, a multiple of "
            "particles, are allowed"
        )
    for name in ("guidance_every", "guidance_tolerance"):
        if call[name] not in (None, DEFAULTS[name]):
            raise ValueError(
                f"{name}={shown(call[name])}: with particles, guidance is evaluated at every step, "
                "since its values are their weights; leave it out"
            )
    if call["guidance_schedule"] is not None:
        raise ValueError(
            f"guidance_schedule={shown(call['guidance_schedule'])}: with particles, guidance has one "
            "scale; leave it out"
        )
    if call["guidance_algorithm"] not in (None, "mean"):
        raise ValueError(
            f"guidance_algorithm={shown(call['guidance_algorithm'])}: with particles, 'mean' is allowed, "
            "which shifts the mean of the scheduler's step"
        )
    return particles, resample


def _check_populations(batch_size: int, particles: int, low_res: torch.Tensor | None) -> None:
    if batch_size % particles:
        raise ValueError(
            f"particles={particles}: the call has {batch_size} images; whole populations are allowed"
        )
    if low_res is not None and len(low_res) > 1:
        raise ValueError(
            f"image holds {len(low_res)} images; with particles, which are samples of one density, one is "
            "allowed"
        )


def check_generator(generator: Any, particles: int | None = None) -> Any:
    """One generator, or a list of them; a tuple becomes one, since Diffusers reads lists only.

    With particles, whose noise is drawn twice, None becomes one that is seeded by torch's own.

    Raises:
        ValueError: for anything else.
    """
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if generator is not None and not all(isinstance(g, torch.Generator) for g in generators):
        raise ValueError(
            f"generator={shown(generator)}: a torch.Generator, or a list of one per image, is allowed"
        )
    if generator is None and particles is not None:
        return torch.Generator().manual_seed(torch.randint(2**62, ()).item())
    return generators if isinstance(generator, (list, tuple)) else generator


def check_callback(callback: Any, tensor_inputs: Any, known: Sequence[str]) -> Any:
    """Names of the tensors that a callback_on_step_end gets: its own, if it is Diffusers'.

    Args:
        known: the names that the pipeline has.

    Raises:
        ValueError: for a callback that can't be called, or one of Diffusers' that changes what
            other pipelines have.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end={shown(callback)}: a function is allowed")
    if not isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        return tensor_inputs
    for part in getattr(callback, "callbacks", [callback]):
        changed = [name for name in part.tensor_inputs if name not in known]
        if isinstance(part, IPAdapterScaleCutoffCallback):
            changed = ["the scale of an IP adapter"]
        if changed:
            raise ValueError(
                f"callback_on_step_end={type(part).__name__}: it changes {', '.join(changed)}, which "
                "this pipeline doesn't have; guidance_stop ends guidance, and callbacks of "
                f"{', '.join(known)} are allowed"
            )
    return callback.tensor_inputs


def check_names(id2label: Any) -> dict[int, str] | None:
    """Names of labels by their integer ids; None without any.

    Raises:
        ValueError: for anything but a mapping of ids.
    """
    try:
        return {int(i): name for i, name in (id2label or {}).items()} or None
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"id2label={shown(id2label)}: a mapping {{id: name}} is allowed") from None


def _call_settings(
    pipeline: Any, call: Mapping[str, Any], class_labels: torch.Tensor | None
) -> dict[str, Any]:
    """`resolve_settings` for the class labels of the network, (B,)."""
    null = pipeline.null_label
    hidden = [] if class_labels is None else [label == null for label in class_labels.tolist()]
    settings = resolve_settings(pipeline, call, any(hidden))
    if any(hidden) and not all(hidden):
        of_labels = resolve_settings(pipeline, call, False)
        unset = [name for name in DEFAULTS if call[name] is None]
        different = [name for name in unset if settings[name] != of_labels[name]]
        if different:
            warnings.warn(
                f"label: the presets of single labels and mixtures differ in {different}; in one "
                "batch, that of mixtures is used: give these arguments, or make two calls",
                stacklevel=4,
            )
    return settings


def _guider_options(
    pipeline: Any, call: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """{algorithm, every, tolerance}."""
    check_settings(settings)
    if call.get("particles") is not None:
        return {"algorithm": "mean"}  # of any step that is a Gaussian
    algorithm = settings["guidance_algorithm"]
    if algorithm == "mean" and not has_posterior_variance(pipeline.scheduler):
        raise ValueError(
            "guidance_algorithm='mean' shifts the mean of a DDPM step; with "
            f"{type(pipeline.scheduler).__name__} the others are allowed"
        )
    every, tolerance = settings["guidance_every"], settings["guidance_tolerance"]
    return {"algorithm": algorithm, "every": every, "tolerance": tolerance}


def _check_call(
    pipeline: Any, num_images_per_label: int, output_type: str, tensor_inputs: Sequence[str]
) -> None:
    """Validate arguments before any computation."""
    if pipeline.vae is not None and output_type != "latent":
        check_precision(pipeline.vae)
    check_number("num_images_per_label", num_images_per_label, 1, MAX_IMAGES, integer=True)
    check_output_type(output_type)
    known = pipeline._callback_tensor_inputs
    is_list = isinstance(tensor_inputs, (list, tuple, set, frozenset))
    if not is_list or any(name not in known for name in tensor_inputs):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs={shown(tensor_inputs)}: a list of names among "
            f"{known} is allowed"
        )


def check_output_type(output_type: Any) -> None:
    """Raise a ValueError unless it is one of the four that the call knows."""
    if not isinstance(output_type, str) or output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(
            f"output_type={shown(output_type)}: 'pil', 'np', 'pt' and 'latent' are allowed"
        )


def _check_latents(pipeline: Any, latents: Any) -> None:
    is_tensor = isinstance(latents, torch.Tensor) and latents.is_floating_point()
    is_tensor = is_tensor and latents.layout == torch.strided and not latents.is_meta
    if latents is not None and not is_tensor:
        names = [n for n in ("dtype", "layout", "device") if hasattr(latents, n)]
        kind = ", ".join(str(getattr(latents, n)) for n in names)
        raise ValueError(
            f"latents is a {type(latents).__name__} ({kind}); a dense floating-point torch.Tensor "
            "(B, C, H, W) is allowed"
        )
    if latents is None:
        return
    if isinstance(pipeline.unet, UNet2DModel) and latents.ndim != 4:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; (B, C, H, W) is allowed")
    if latents.ndim < 2:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; (B, C, ...) is allowed")


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
    call: Mapping[str, Any],
    settings: Mapping[str, Any],
    condition: Condition,
) -> list[Guidance]:
    """Classifier and classifier-free guidance to the labels; none at scale 0."""
    names = ("guidance_scale", "classifier_free_scale")
    if not mixtures:
        if call["guidance_power"] is not None:
            raise ValueError(f"guidance_power={call['guidance_power']} needs a label to steer to")
        if call["guidance_schedule"] is not None:
            raise ValueError(
                f"guidance_schedule={shown(call['guidance_schedule'])} needs a label to steer to"
            )
        if any(is_on(name, call[name]) for name in names):
            raise ValueError(
                f"guidance_scale={call[names[0]]}, classifier_free_scale={call[names[1]]} need a "
                "label to steer to"
            )
        return []
    class_labels, null = condition.class_labels, pipeline.null_label
    scale, free_scale = (
        _image_scale(name, settings[name], len(mixtures), per_label) for name in names
    )
    terms: list[Guidance] = []
    _check_guidance_power(pipeline, call, scale)
    if call["guidance_schedule"] is not None and not scale.any():
        raise ValueError(
            f"guidance_schedule={shown(call['guidance_schedule'])} has no effect with guidance_scale=0"
        )
    if scale.any():
        _check_classifier(pipeline, scale)
        interval = settings["guidance_start"], settings["guidance_stop"]
        power = settings["guidance_power"]
        if call["guidance_power"] is None and any(list(m.values()) != [1] for m in mixtures):
            power = settings["guidance_power"] = None  # a default is for single labels
        scale = _scheduled(scale, settings)
        term = ClassifierGuidance(pipeline.classifier, mixtures, scale, *interval, power=power)
        terms.append(term)
    if free_scale.any():
        if class_labels is None or null is None:
            raise ValueError(
                f"classifier_free_scale={free_scale.tolist()} needs a class-conditional network "
                "with a null label, one class embedding more than labels"
            )
        if bool((class_labels == null).any()):
            raise ValueError(
                f"classifier_free_scale={free_scale.tolist()} needs a network that gets a label; "
                "mixtures and conditional=False hide it"
            )
        terms.append(ClassifierFreeGuidance(null, free_scale))
    return terms


def _scheduled(scale: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor | ScaleSchedule:
    """The scale times the `guidance_schedule`, if there is one."""
    schedule = settings["guidance_schedule"]
    return scale if schedule is None else ScaleSchedule(schedule, scale)


def _check_guidance_power(pipeline: Any, call: Mapping[str, Any], scale: torch.Tensor) -> None:
    """Refuse the call's `guidance_power` where the classifier doesn't know it or is off."""
    power = call["guidance_power"]
    if power is None:
        return
    check_power("guidance_power", power, module_config(pipeline.classifier).get("power_range"))
    if not scale.any():
        raise ValueError(
            f"guidance_power={power} has no effect with guidance_scale=0; 1 is p(x) p(y | x)^w"
        )


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


def _image_scale(name: str, scale: Any, images: int, per_label: int) -> torch.Tensor:
    """The scale as a tensor, () or one per image."""
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
