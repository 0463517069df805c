"""The model in a browser: a Gradio app, on this machine or as a Space of the Hub.

    guided-diffusers demo                     # the bundled model, http://127.0.0.1:7860
    guided-diffusers space FOLDER             # a folder with app.py that the Hub runs

    from guided_diffusers.demo import DemoModel, demo_app, serve

    serve(demo_app(DemoModel.load("fashion-mnist")))

`model` is what the form can offer, `calls` makes the pipeline's call of a form and the code of that
call, `pictures` runs it, `app` lays out the page, `server` runs that, and `space` writes the folder.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_imports

if TYPE_CHECKING:
    from .app import demo_app, require_gradio
    from .calls import EditForm, SampleForm
    from .model import DemoModel
    from .pictures import edit_picture, sample_pictures
    from .server import check_address, serve
    from .space import write_space

__all__ = [
    "DemoModel",
    "EditForm",
    "SampleForm",
    "check_address",
    "demo_app",
    "edit_picture",
    "require_gradio",
    "sample_pictures",
    "serve",
    "write_space",
]

__getattr__, __dir__ = lazy_imports(__name__)
