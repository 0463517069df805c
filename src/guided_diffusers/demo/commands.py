"""`guided-diffusers demo` and `space`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..cli_options import DEFAULT_MODEL, add_shared_options, number, path

MAX_PORT = 2**16 - 1


def add_demo_commands(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="try models in the browser",
        description="A page in the browser that makes images with and without guidance, edits "
        "pictures, and shows the code that does the same; each model has a page. It needs Gradio "
        "(pip install 'gradio>=6.31,<7') and no network for a model that is here. Nothing but "
        "this machine reaches it, unless --host says so.",
    )
    demo.set_defaults(run=run_demo)
    help = "bundled models, pipeline folders or Hub ids (default: all bundled ones)"
    demo.add_argument("models", metavar="MODEL", nargs="*", help=help)
    _add_model_options(demo)
    help = "address that it listens at; 0.0.0.0: open to other machines (default: %(default)s)"
    demo.add_argument("--host", default="127.0.0.1", help=help)
    help = "default: the first free one from 7860"
    demo.add_argument("--port", type=number(1, MAX_PORT, integer=True), help=help)
    add_shared_options(demo, "--device")

    space = commands.add_parser(
        "space",
        help="write the demo as a Space of the Hub",
        description="Write a folder with the demo of a model as a Gradio Space of the Hub, with "
        "all that it needs: `hf upload USER/NAME FOLDER . --repo-type space` publishes it, and "
        "`python FOLDER/app.py` runs it here.",
    )
    space.set_defaults(run=run_space)
    space.add_argument("folder", metavar="FOLDER", type=path, help="a new or empty folder")
    help = "a bundled model, a pipeline folder or a Hub id (default: %(default)s)"
    space.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL, help=help)
    _add_model_options(space)
    help = "of the Space, as the Hub names it (default: that in the model's card, or apache-2.0)"
    space.add_argument("--license", metavar="NAME", help=help)


def _add_model_options(command: Any) -> None:
    add_shared_options(command, "--revision")
    help = "a NoiseAwareCLIP, a folder or Hub id, for captions (default: the model's own `clip`)"
    command.add_argument("--clip", metavar="CLIP", help=help)


def run_demo(options: Namespace) -> None:
    import os
    from tempfile import TemporaryDirectory

    from .. import bundled
    from . import DemoModel, check_address, demo_app, require_gradio, serve

    require_gradio()  # before a model is loaded
    check_address(options.host, options.port)
    names = options.models or sorted(bundled.names(), key=lambda name: name != DEFAULT_MODEL)
    for option in ("revision", "clip"):
        if getattr(options, option) is not None and len(options.models) != 1:
            raise ValueError(f"--{option}: only for one MODEL; {len(options.models)} are given")
    shared = options.revision, options.clip, options.device
    models = [DemoModel.load(name, *shared) for name in names]
    with TemporaryDirectory(prefix="guided-diffusers-demo-") as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)  # its own is shared by all users
        serve(demo_app(*models), options.host, options.port)


def run_space(options: Namespace) -> None:
    from ..text import printable
    from . import write_space

    write_space(options.folder, options.model, options.revision, options.clip, options.license)
    folder = printable(options.folder)
    print(
        f"saved to {folder}, next: python {folder}/app.py, or "
        f"hf upload USER/NAME {folder} . --repo-type space"
    )
