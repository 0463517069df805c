"""The pipeline's call that a form stands for, and the code of that call.

Both are made of the same arguments, so the code makes the picture that the page shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import MAX_SEED, check_number, shown
from ..image_guidance import NoiseAwareCLIPGuidance
from ..likelihood import Label
from ..utils import is_hub_id, model_folder, scheduler_name
from .model import CLIP_FOLDER, DemoModel

MAX_IMAGES = 64  # of a picture
MAX_STEPS = 1000
PICTURE_FILE = "picture.png"  # of the code


@dataclass(frozen=True)
class SampleForm:
    """What the form for new images holds; None: the model's preset.

    Attributes:
        labels: ids; several are a mixture.
        weights: of a mixture, numbers separated by commas. Empty: all 1.
        conditional: whether the network gets the label, too, if it knows labels and can do without.
        scale, power, classifier_free_scale, start, stop: as in the pipeline's call; a power of 1 is
            off.
        caption, caption_scale: for the CLIP. Empty: no caption.
        steps: of the scheduler.
        scheduler: one of `DemoModel.schedulers`. None: the model's own.
        seed, num_images: image i is that of `guided-diffusers sample --seed`.
    """

    labels: Sequence[int] | None = ()
    weights: str = ""
    conditional: bool = False
    scale: float | None = None
    power: float | None = None
    classifier_free_scale: float | None = None
    start: float | None = None
    stop: float | None = None
    caption: str = ""
    caption_scale: float | None = 5.0
    steps: int | None = None
    scheduler: str | None = None
    seed: int | None = 0
    num_images: int | None = 10


@dataclass(frozen=True)
class EditForm:
    """What the form for editing holds; None: the preset, or no source label.

    Attributes:
        picture: a PIL image.
        label, source_label: ids.
        strength, scale, steps: as in `pipeline.edit`.
    """

    picture: Any = None
    label: int | None = None
    source_label: int | None = None
    strength: float = 0.6
    scale: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class SampleCall:
    """A call of the pipeline for new images.

    Attributes:
        label: what the images are guided to; None: no label.
        arguments: further ones of the call, plain values.
        caption: for the CLIP; None: none.
        caption_arguments: of its term.
        is_guided: whether anything steers.
    """

    label: Label | None
    arguments: dict[str, Any]
    caption: str | None
    caption_arguments: dict[str, Any]
    scheduler: str
    seed: int
    num_images: int
    is_guided: bool

    def term(self, model: DemoModel) -> NoiseAwareCLIPGuidance | None:
        """The guidance by the caption.

        Raises:
            ValueError: for a caption that the CLIP can't read.
        """
        if self.caption is None:
            return None
        return NoiseAwareCLIPGuidance(model.clip, self.caption, **self.caption_arguments)

    def unguided(self) -> dict[str, Any]:
        """The arguments without guidance: those of the network and the run."""
        kept = ("conditional", "num_inference_steps")
        arguments = {name: self.arguments[name] for name in kept if name in self.arguments}
        return arguments | {"guidance_scale": 0.0, "classifier_free_scale": 0.0}


def sample_call(model: DemoModel, form: SampleForm) -> SampleCall:
    """The call of a form.

    Raises:
        ValueError: for a field that no call accepts; the pipeline checks the other values.
    """
    seed = check_number("seed", form.seed, 0, MAX_SEED, integer=True)
    count = check_number("number of images", form.num_images, 1, MAX_IMAGES, integer=True)
    label, caption = _mixture(model, form), (form.caption or "").strip() or None
    if label is None and caption is None and model.labels:
        needed = "a label" if model.clip is None else "a label, or a caption,"
        raise ValueError(f"labels: none is chosen; {needed} is needed")
    if caption is not None and model.clip is None:
        raise ValueError(f"caption={shown(caption)}: the model has no CLIP; leave it empty")
    interval = {"start": form.start, "stop": form.stop}
    preset = model.preset(model.can_hide_label and not form.conditional)
    arguments: dict[str, Any] = {}
    if label is not None and model.pipeline.classifier is not None:
        arguments["guidance_scale"] = form.scale
        arguments |= {f"guidance_{name}": value for name, value in interval.items()}
        if (form.power, preset["guidance_power"]) != (1, None):
            arguments["guidance_power"] = form.power
    if label is not None and model.has_null_label:
        if model.can_hide_label and not isinstance(label, dict):
            arguments["conditional"] = bool(form.conditional)
        if form.classifier_free_scale or preset["classifier_free_scale"]:
            arguments["classifier_free_scale"] = form.classifier_free_scale
    arguments["num_inference_steps"] = _steps(form.steps)
    caption_arguments = _given({"scale": form.caption_scale, **interval})
    scales = [caption_arguments.get("scale", 1)] if caption is not None else []
    for name in ("guidance_scale", "classifier_free_scale"):
        if name in arguments:
            scales.append(preset[name] if arguments[name] is None else arguments[name])
    return SampleCall(
        label,
        _given(arguments),
        caption,
        caption_arguments,
        form.scheduler or scheduler_name(model.scheduler),
        seed,
        count,
        any(scales),
    )


def _mixture(model: DemoModel, form: SampleForm) -> Label | None:
    """The form's label, or mixture of labels, by name; None: none."""
    labels = [model.label(i) for i in form.labels or ()]
    words = re.split(r"[,;\s]+", form.weights.strip()) if (form.weights or "").strip() else []
    if not labels:
        return None
    if not words:
        return labels[0] if len(labels) == 1 else dict.fromkeys(labels, 1.0)
    try:
        weights = [float(word) for word in words]
    except ValueError:
        weights = []
    if len(weights) != len(labels):
        raise ValueError(
            f"weights={shown(form.weights)}: {len(labels)} numbers, one for each label, separated by "
            "commas, are allowed; leave it empty for equal weights"
        )
    return dict(zip(labels, weights, strict=True))


def _steps(steps: int | None) -> int | None:
    return None if steps is None else check_number("steps", steps, 1, MAX_STEPS, integer=True)


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def edit_arguments(model: DemoModel, form: EditForm) -> dict[str, Any]:
    """Arguments of `pipeline.edit` beside the picture.

    Raises:
        ValueError: for a form without a label.
    """
    if form.label is None:
        raise ValueError("label: none is chosen; the label that the picture gets is needed")
    source = None if form.source_label is None else model.label(form.source_label)
    arguments = {"label": model.label(form.label), "source_label": source}
    arguments |= {"strength": form.strength, "guidance_scale": form.scale}
    return _given(arguments | {"num_inference_steps": _steps(form.steps)})


# ---------------------------------------------------------------- code


def sample_code(model: DemoModel, call: SampleCall) -> str:
    """Python that makes the images of a call, the same bit for bit, and saves their picture."""
    imports = ["from guided_diffusers.sampling import grid, image_generator"]
    lines = _load_lines(model)
    if call.scheduler != scheduler_name(model.scheduler):
        imports.append("from guided_diffusers.utils import scheduler_for")
        name = repr(call.scheduler)
        lines.append(f"pipeline.scheduler = scheduler_for(pipeline.scheduler, {name})")
    arguments = [f"num_images_per_label={call.num_images}"]
    if call.label is not None:
        arguments.insert(0, repr(call.label))
    arguments += [f"{name}={value!r}" for name, value in call.arguments.items()]
    names = ["ClassifierGuidedPipeline"]
    if call.caption is not None:
        names += ["NoiseAwareCLIP", "NoiseAwareCLIPGuidance"]
        options = "".join(f", {name}={value!r}" for name, value in call.caption_arguments.items())
        lines.append(f"clip = NoiseAwareCLIP.from_pretrained({_clip(model, imports)})")
        lines += [f"clip.to({str(model.pipeline.device)!r})"] if _device(model) else []
        lines.append(f"term = NoiseAwareCLIPGuidance(clip, {call.caption!r}{options})")
        arguments.append("guidance=term")
    generators = f"[image_generator({call.seed}, i) for i in range({call.num_images})]"
    arguments.append(f"generator={generators}")
    lines += ["images = pipeline(", *(f"    {argument}," for argument in arguments), ").images"]
    lines.append(f'grid(images).save("{PICTURE_FILE}")')
    return _script([f"from guided_diffusers import {', '.join(names)}", *imports], lines)


def edit_code(model: DemoModel, form: EditForm) -> str:
    """Python that edits the form's picture, saved as `PICTURE_FILE`; the result is the same bit for
    bit."""
    imports = ["from guided_diffusers import ClassifierGuidedPipeline", "from PIL import Image"]
    lines = [*_load_lines(model), f'picture = Image.open("{PICTURE_FILE}")']
    size = model.picture_size
    if size not in (None, form.picture.size):
        imports[-1] = "from PIL import Image, ImageOps"
        lines.append(f"picture = ImageOps.fit(picture.convert({mode(model)!r}), {size})")
    lines.append("result = pipeline.edit(")
    lines.append("    picture,")
    lines += [f"    {name}={value!r}," for name, value in edit_arguments(model, form).items()]
    lines += [")", 'result.images[0].save("edited.png")']
    return _script(imports, lines)


def mode(model: DemoModel) -> str:
    """PIL's mode of the model's pictures."""
    channels = model.pipeline.unet.config.get("in_channels")
    return "L" if model.pipeline.vae is None and channels == 1 else "RGB"


def _load_lines(model: DemoModel) -> list[str]:
    device = _device(model)
    return [f"pipeline = ClassifierGuidedPipeline.{_source(model)}{device}"]


def _source(model: DemoModel) -> str:
    if model.revision is not None:
        return f"from_pretrained({model.name!r}, revision={model.revision!r})"
    method = "from_bundled" if _is_bundled(model) else "from_pretrained"
    return f"{method}({model.name!r})"


def _is_bundled(model: DemoModel) -> bool:
    return not is_hub_id(model.name) and not Path(model.name).exists()


def _clip(model: DemoModel, imports: list[str]) -> str:
    """Expression for the CLIP's folder or id; a bundled one's adds its import."""
    own = Path(model_folder(model.name)) / CLIP_FOLDER
    if _is_bundled(model) and model.clip_name == str(own):
        imports.insert(0, "from guided_diffusers.bundled import folder")
        return f"folder({model.name!r}) / {CLIP_FOLDER!r}"
    return repr(model.clip_name)


def _device(model: DemoModel) -> str:
    """The call that puts a model on the device of the demo; empty for the CPU."""
    device = model.pipeline.device
    return "" if device.type == "cpu" else f".to({str(device)!r})"


def _script(imports: Sequence[str], lines: Sequence[str]) -> str:
    return "\n".join([*imports, "", *lines, ""])
