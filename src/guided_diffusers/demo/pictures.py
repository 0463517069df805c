"""The pictures of the demo: guided beside unguided, what guidance does at each step, edits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageOps

from ..diagnosis import GuidanceDiagnostics
from ..editing import comparison, describe, titles
from ..images import check_bits
from ..sampling import grid, image_generator
from .calls import (
    EditForm,
    SampleCall,
    SampleForm,
    edit_arguments,
    edit_code,
    mode,
    sample_call,
    sample_code,
)
from .model import DemoModel

Progress = Callable[[int, int], Any]  # (steps made, all steps)


@dataclass(frozen=True)
class SampleResult:
    """Result of `sample_pictures`.

    Attributes:
        images: PIL images.
        guided, unguided: grids of the images, and of those of the same seeds without guidance.
        record: of what guidance does at each step, for `plot_of`; None without guidance.
        code: Python that makes `guided`.
        summary: a line on the run.
        warnings: that were logged.
    """

    images: list[Image.Image]
    guided: Image.Image
    unguided: Image.Image
    record: GuidanceDiagnostics | None
    code: str
    summary: str
    warnings: list[str]


@dataclass(frozen=True)
class EditResult:
    """Result of `edit_picture`.

    Attributes:
        image: the edited picture.
        comparison: it before, after, and the difference.
        code, summary, warnings: as of `SampleResult`.
    """

    image: Image.Image
    comparison: Image.Image
    code: str
    summary: str
    warnings: list[str]


def sample_pictures(
    model: DemoModel, form: SampleForm, progress: Progress | None = None
) -> SampleResult:
    """Generate the images of a form, with and without guidance.

    Raises:
        ValueError: for a form that the pipeline refuses.
        FloatingPointError: for images that are not finite.
    """
    call = sample_call(model, form)
    model.pipeline.scheduler = model.scheduler_called(call.scheduler)
    record = GuidanceDiagnostics(call.label)
    with logged_warnings() as warnings:
        output = _run(model, call, True, watched(record, progress, 0, 1 + call.is_guided))
        unguided = output
        if call.is_guided:
            unguided = _run(model, call, False, watched(None, progress, 1, 2))
    noun = "image" if call.num_images == 1 else "images"
    summary = f"{call.num_images} {noun}"
    if call.is_guided:
        summary += f", guidance evaluated {output.guidance_evaluations:.1f} times an image"
    return SampleResult(
        images=output.images,
        guided=grid(output.images),
        unguided=grid(unguided.images),
        record=record if call.is_guided else None,
        code=sample_code(model, call),
        summary=summary,
        warnings=warnings,
    )


def _run(model: DemoModel, call: SampleCall, guided: bool, callback: Any) -> Any:
    arguments = call.arguments if guided else call.unguided()
    term = call.term(model) if guided else None
    return model.pipeline(
        call.label,
        num_images_per_label=call.num_images,
        **arguments,
        guidance=term,
        generator=[image_generator(call.seed, i) for i in range(call.num_images)],
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=GuidanceDiagnostics.tensor_inputs,
    )


def watched(
    record: GuidanceDiagnostics | None, progress: Progress | None, part: int, parts: int
) -> Callable[..., dict[str, Any]]:
    """A callback of the pipeline that records its steps and reports its progress.

    Args:
        record: None: no steps are recorded.
        part, parts: this run is number `part` of `parts`, of equally many steps.
    """

    def callback(pipeline: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if record is not None:
            record(pipeline, index, t, tensors)
        if progress is not None:
            count = pipeline.num_timesteps
            progress(part * count + index + 1, parts * count)
        return {}

    return callback


def plot_of(record: GuidanceDiagnostics) -> Image.Image:
    """The plot of a record, as a picture."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "steps.png"
        record.save(path)
        with Image.open(path) as picture:
            return picture.convert("RGB")


def edit_picture(model: DemoModel, form: EditForm) -> EditResult:
    """Edit the picture of a form to its label. A picture of another size is cropped and resized.

    Raises:
        ValueError: for a form that the pipeline refuses, or a transparent picture.
    """
    if form.picture is None:
        raise ValueError("picture: none is there; load one, or take a generated one")
    arguments = edit_arguments(model, form)
    before = fitting(model, form.picture)
    model.pipeline.scheduler = model.scheduler
    with logged_warnings() as warnings:
        result = model.pipeline.edit(before, **arguments)
    (record,) = describe(model.pipeline, form.label, result)
    return EditResult(
        image=result.images[0],
        comparison=comparison(before, result.images[0], result.difference[0], titles(record)),
        code=edit_code(model, form),
        summary=f"mean change {record['change']:.3f} (1 is from black to white)",
        warnings=warnings,
    )


def fitting(model: DemoModel, picture: Image.Image) -> Image.Image:
    """A picture in the size of the model's.

    Raises:
        ValueError: for a picture with transparent parts, or of more than 8 bits a channel.
    """
    check_bits(picture.mode, "picture")
    if picture.has_transparency_data and picture.convert("RGBA").getextrema()[3][0] < 255:
        raise ValueError("picture: parts of it are transparent; put it on a background first")
    if model.picture_size in (None, picture.size):
        return picture
    return ImageOps.fit(picture.convert(mode(model)), model.picture_size)


@contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """Context manager: the list of what this package logs as warnings within, without repetitions."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text not in messages:
                messages.append(text)

    handler, logger = Collect(logging.WARNING), logging.getLogger(__name__.partition(".")[0])
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
