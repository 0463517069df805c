"""The page of the demo: its fields, and what its buttons do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.utils.logging import get_logger

from ..checks import shown
from ..cli_options import EXPECTED
from ..text import markdown, one_line
from .calls import MAX_IMAGES, PICTURE_FILE, EditForm, SampleForm
from .model import DemoModel
from .pictures import edit_picture, plot_of, sample_pictures

if TYPE_CHECKING:
    from gradio import Blocks

logger = get_logger(__name__)
#: all that runs the model shares one place in the queue, as it has one scheduler
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "multiple"}
MAX_WAITING = 20  # calls in the queue; more are refused with a message
HOUR = 3600
EDIT_SCALE = 3.0


def require_gradio() -> None:
    """Check that Gradio is installed, and turn off its telemetry.

    Raises:
        ImportError: if it is missing; the message says how to install it.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError("the demo needs Gradio 6: pip install 'gradio>=6.31,<7'") from error


def demo_app(*models: DemoModel, num_images: int = 10) -> Blocks:
    """A Gradio app for models, a page for each; `serve` runs it, or its own `launch`.

    Args:
        models: what the pages show. The first has the address `/`, others have their name there.
        num_images: what the field for it has at first.

    Raises:
        ImportError: without Gradio.
    """
    require_gradio()
    import gradio as gr

    if not models or not all(isinstance(model, DemoModel) for model in models):
        raise ValueError(f"models={shown(models)}: one or more of DemoModel are allowed")
    names = [Path(model.name).name or Path(model.name).resolve().name for model in models]
    title = "guided-diffusers" if len(models) > 1 else f"guided-diffusers: {models[0].name}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as app:
        _page(models[0], names, num_images)
    for i, model in enumerate(models[1:], 1):
        address = re.sub(r"[^A-Za-z0-9._~-]", "-", names[i])
        with app.route(names[i], address if names.count(names[i]) == 1 else f"{i}-{address}"):
            _page(model, names, num_images)
    return app.queue(max_size=MAX_WAITING)


def _page(model: DemoModel, names: Sequence[str], num_images: int) -> None:
    """The page of a model, with links to those of the others."""
    import gradio as gr

    if len(names) > 1:
        gr.Navbar(main_page_name=names[0])
    title = f"guided-diffusers: {model.name}"
    gr.Markdown(f"## {markdown(title)}\nThe same noise without and with guidance.")
    first_image = gr.State()  # of the last run
    with gr.Tab("New images"):
        _sample_tab(model, num_images, first_image)
    if model.can_edit:
        with gr.Tab("Edit a picture"):
            _edit_tab(model, first_image)


def _sample_tab(model: DemoModel, num_images: int, first_image: Any) -> None:
    import gradio as gr

    with gr.Row():
        with gr.Column(min_width=320):
            fields = _guidance_fields(model) | _run_fields(model, num_images)
            inputs = [fields[name] for name in SampleForm.__annotations__]
            button = gr.Button("Generate", variant="primary", elem_id="generate")
        with gr.Column(scale=3):
            with gr.Row():
                unguided = _picture("Without guidance", "unguided")
                guided = _picture("With guidance", "guided")
            summary = gr.Markdown(elem_id="summary")
            steps = _picture("What guidance does at each step", "steps", buttons=())
            label = "Python that makes the same images"
            code = gr.Code(language="python", label=label, interactive=False, elem_id="code")

    @wraps(SampleForm, updated=())  # so that the API has the form's names
    def generate(*values: Any) -> tuple[Any, ...]:
        with errors_as_messages():
            result = sample_pictures(model, SampleForm(*values), _progress())
        text = _summary(result.summary, result.warnings)
        plot = None if result.record is None else plot_of(result.record)
        return result.unguided, result.guided, text, plot, result.code, result.images[0]

    outputs = [unguided, guided, summary, steps, code, first_image]
    events = {"api_name": "generate", "show_progress_on": guided, **ONE_AT_A_TIME}
    button.click(generate, inputs, outputs, **events)
    names = ("scale", "start", "stop", "steps", "classifier_free_scale")
    presets = [fields[name] for name in names]
    hidden = fields["conditional"]
    hidden.input(lambda value: _preset(model, not value), hidden, presets, api_visibility="private")


def _preset(model: DemoModel, hidden: bool) -> tuple[float, float, float, int, float]:
    """Scale, start, stop, steps and classifier-free scale that suit the network with or without the
    label."""
    preset = model.preset(hidden)
    names = ("guidance_scale", "guidance_start", "guidance_stop", "num_inference_steps")
    return tuple(preset[name] for name in (*names, "classifier_free_scale"))


def _guidance_fields(model: DemoModel) -> dict[str, Any]:
    """The components of a `SampleForm` that steer."""
    import gradio as gr

    has_labels = bool(model.labels)
    has_classifier = has_labels and model.pipeline.classifier is not None
    preset = model.preset(model.can_hide_label)
    fields = {}
    fields["labels"] = gr.Dropdown(
        model.labels,
        value=[i for _, i in model.labels[:1]],
        multiselect=True,
        label="Label",
        info="several are a mixture",
        visible=has_labels,
        elem_id="labels",
    )
    fields |= _folded_fields(model)
    fields["scale"] = gr.Number(
        preset["guidance_scale"],
        label="Guidance scale",
        info="0: off; larger: sharper, less varied",
        visible=has_classifier,
        elem_id="scale",
    )
    fields["power"] = gr.Number(
        preset["guidance_power"] or 1,
        label="Power w",
        info=f"1 (off) to {model.max_power or 1:g}; with scale 1: samples of p(x) p(y | x)^w",
        visible=model.max_power is not None,
        elem_id="power",
    )
    fields["conditional"] = gr.Checkbox(
        not model.can_hide_label,
        label="The diffusion model gets the label, too",
        visible=model.can_hide_label,
        elem_id="conditional",
    )
    fields["classifier_free_scale"] = gr.Number(
        preset["classifier_free_scale"],
        label="Classifier-free scale",
        info="0: off; needs a diffusion model that gets the label",
        visible=model.has_null_label,
    )
    return fields


def _folded_fields(model: DemoModel) -> dict[str, Any]:
    """The components of a `SampleForm` that most calls leave as they are."""
    import gradio as gr

    _, start, stop, *_ = _preset(model, model.can_hide_label)
    has_clip, fields = model.clip is not None, {}
    with gr.Accordion("Mixture, caption and interval", open=False):
        fields["weights"] = gr.Textbox(
            "",  # so that a client of the API may leave it out
            label="Weights of a mixture",
            placeholder="1, 0.5",
            info="a number a label; negative: away from it",
            visible=bool(model.labels),
            elem_id="weights",
        )
        fields["caption"] = gr.Textbox(
            "", label="Caption", info="for the CLIP", visible=has_clip, elem_id="caption"
        )
        fields["caption_scale"] = gr.Number(5.0, label="Caption scale", visible=has_clip)
        fields["start"] = gr.Slider(0, 1, start, step=0.05, label="Guidance starts at")
        fields["stop"] = gr.Slider(
            0, 1, stop, step=0.05, label="Guidance stops at", info="fractions of the run"
        )
    return fields


def _run_fields(model: DemoModel, num_images: int) -> dict[str, Any]:
    """The components of a `SampleForm` that don't steer."""
    import gradio as gr

    steps = model.preset(model.can_hide_label)["num_inference_steps"]
    names = model.schedulers
    fields = {}
    with gr.Row():
        fields["steps"] = gr.Number(steps, precision=0, label="Steps", min_width=80)
        fields["scheduler"] = gr.Dropdown(names, value=names[0], label="Scheduler", min_width=120)
    with gr.Row():
        fields["seed"] = gr.Number(0, precision=0, label="Seed", min_width=80, elem_id="seed")
        fields["num_images"] = gr.Number(
            num_images, precision=0, label=f"Images (to {MAX_IMAGES})", min_width=80
        )
    return fields


def _edit_tab(model: DemoModel, first_image: Any) -> None:
    import gradio as gr

    steps = model.pipeline.config.defaults["num_inference_steps"]
    size = "" if model.picture_size is None else " ({} x {})".format(*model.picture_size)
    with gr.Row():
        with gr.Column(min_width=320):
            picture = gr.Image(
                label=f"Picture{size}",
                type="pil",
                image_mode=None,
                format="png",
                sources=["upload", "clipboard"],
                height=260,
                elem_id="picture",
            )
            take = gr.Button("Take the first generated image", elem_id="take")
            label = gr.Dropdown(model.labels, label="New label", elem_id="new-label")
            source = gr.Dropdown(
                [("unknown", None), *model.labels], value=None, label="Label that it has"
            )
            info = "how much is made again: 0 nothing, 1 all"
            strength = gr.Slider(0, 1, 0.6, step=0.05, label="Strength", info=info)
            scale = gr.Number(EDIT_SCALE, label="Guidance scale")
            count = gr.Number(steps, precision=0, label="Steps")
            button = gr.Button("Edit", variant="primary", elem_id="edit")
        with gr.Column(scale=3):
            comparison = _picture("Before, after, and the difference", "comparison")
            summary = gr.Markdown()
            title = f"Python that makes the same edit of {PICTURE_FILE}"
            code = gr.Code(language="python", label=title, interactive=False)

    @wraps(EditForm, updated=())
    def edit(*values: Any) -> tuple[Any, ...]:
        with errors_as_messages():
            result = edit_picture(model, EditForm(*values))
        return result.comparison, _summary(result.summary, result.warnings), result.code

    inputs = [picture, label, source, strength, scale, count]
    events = {"api_name": "edit", "show_progress_on": comparison, **ONE_AT_A_TIME}
    button.click(edit, inputs, [comparison, summary, code], **events)
    take.click(_taken, first_image, picture, api_visibility="private")


def _picture(title: str, name: str, buttons: Sequence[str] = ("download", "fullscreen")) -> Any:
    """The component of a picture that the demo makes, lossless, under its title."""
    import gradio as gr

    with gr.Column(min_width=200):
        gr.Markdown(f"**{title}**")
        options = {"format": "png", "interactive": False, "elem_id": name}
        return gr.Image(label=title, show_label=False, buttons=[*buttons], **options)


def _taken(image: Any) -> Any:
    with errors_as_messages():
        if image is None:
            raise ValueError("no image was generated yet; generate some, or load a picture")
    return image


def _summary(text: str, warnings: Sequence[str]) -> str:
    lines = [markdown(text), *(f"**Warning:** {markdown(one_line(line))}" for line in warnings)]
    return "\n\n".join(lines)


def _progress() -> Callable[[int, int], None]:
    """Reports the steps that are made to the page."""
    import gradio as gr

    progress = gr.Progress()
    return lambda made, count: progress((made, count), unit="steps")


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Context manager in which errors become the page's messages, in one line; what isn't an error
    of the input is named as a bug, and logged with its traceback."""
    import gradio as gr

    try:
        yield
    except Exception as error:
        message = one_line(error) or type(error).__name__
        if not isinstance(error, EXPECTED):
            logger.exception("unexpected error in the demo")
            message = f"unexpected {type(error).__name__}: {message}; this is a bug"
        raise gr.Error(escape(message), duration=None, print_exception=False) from None
