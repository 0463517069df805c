"""A folder with the demo of a model that the Hub runs as a Space, and `python app.py` here.

FOLDER/README.md             header of the Space, and what it is
FOLDER/app.py
FOLDER/requirements.txt
FOLDER/guided_diffusers/     this package, of the bundled models only the one that is shown
FOLDER/model/                a model that isn't bundled and isn't on the Hub, and FOLDER/clip/ likewise
"""

from __future__ import annotations

import shutil
from importlib.metadata import requires, version
from pathlib import Path

from huggingface_hub import ModelCard, SpaceCardData

from ..files import new_folder
from ..text import markdown, printable
from ..utils import is_bundled, is_hub_id
from .app import require_gradio
from .model import DemoModel
from .server import MAX_UPLOAD

PACKAGE = Path(__file__).parents[1]
DEFAULT_LICENSE = "apache-2.0"  # of this package and its models
APP = '''"""The demo of guided-diffusers: `python app.py` runs it on this machine, the Hub as a Space."""

from pathlib import Path

from guided_diffusers.demo import DemoModel, demo_app

FOLDER = Path(__file__).parent

demo = demo_app(DemoModel.load({arguments}))

if __name__ == "__main__":
    demo.launch(footer_links=["api"], run_history=False, max_file_size="{max_upload}")
'''
README = """\
---
{header}
---

# {title}

Guidance of a diffusion model, written by `guided-diffusers space`. To run it on your machine:

    pip install -r requirements.txt
    python app.py
"""


def write_space(
    folder: str | Path,
    model: str | Path = "fashion-mnist",
    revision: str | None = None,
    clip: str | Path | None = None,
    license: str | None = None,
) -> Path:
    """Write the folder of a Space; see the module for its files.

    Args:
        folder: a new or empty one.
        model, revision, clip: as in `DemoModel.load`. What is on the Hub stays there, all else is
            copied.
        license: of the Space. None: that in the model's card; of a bundled model or one on the Hub,
            this package's.

    Returns:
        The folder.

    Raises:
        ValueError: for a folder that isn't empty, a model that the demo can't show, or one in a
            folder whose card names no license.
        ImportError: without Gradio, whose version the Space gets.
        OSError: if the folder can't be written.
    """
    require_gradio()
    loaded, bundled = DemoModel.load(model, revision, clip, "cpu"), None
    is_folder = Path(model).exists() and not is_bundled(model)
    if not is_folder and not is_hub_id(model):
        bundled = str(model)
    license = license or (_card_license(Path(model)) if is_folder else DEFAULT_LICENSE)
    with new_folder(Path(folder)) as partial:
        arguments = [repr(str(model))]
        if is_folder:
            loaded.pipeline.save_pretrained(partial / "model")
            arguments = ['FOLDER / "model"']
        if revision is not None:
            arguments.append(f"revision={revision!r}")
        if loaded.clip is not None and (clip is not None or is_folder):
            if is_hub_id(loaded.clip_name):
                arguments.append(f"clip={loaded.clip_name!r}")
            else:
                loaded.clip.save_pretrained(partial / "clip")
                arguments.append('clip=FOLDER / "clip"')
        _copy_package(partial / "guided_diffusers", bundled)
        (partial / "app.py").write_text(
            APP.format(arguments=", ".join(arguments), max_upload=MAX_UPLOAD)
        )
        (partial / "requirements.txt").write_text("\n".join([*_requirements(), ""]))
        name = Path(model).resolve().name if is_folder else str(model)
        text = _readme(f"Guided diffusion, {name}", license, str(model))
        (partial / "README.md").write_text(text, "utf-8")
    return Path(folder)


def _readme(title: str, license: str, model: str) -> str:
    header = SpaceCardData(
        title=printable(title),
        emoji="👟",
        colorFrom="blue",
        colorTo="indigo",
        sdk="gradio",
        sdk_version=version("gradio"),
        app_file="app.py",
        license=printable(license),
        models=[model] if is_hub_id(model) else None,
    )
    return README.format(header=header.to_yaml().strip(), title=markdown(title))


def _card_license(folder: Path) -> str:
    """The license in the card of a model's folder.

    Raises:
        ValueError: if there is none.
    """
    card = folder / "README.md"
    license = ModelCard.load(card).data.license if card.exists() else None
    if license in (None, "unknown"):
        raise ValueError(f"license: the card of {folder} names none; give one, such as apache-2.0")
    return license


def _copy_package(target: Path, bundled: str | None) -> None:
    """Copy this package, with the bundled model of that name, or none."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        is_models = Path(folder) == PACKAGE / "bundled"
        models = {name for name in names if (Path(folder) / name / "model_index.json").exists()}
        others = models - {bundled} if is_models else set()
        return others | {name for name in names if name == "__pycache__"}

    shutil.copytree(PACKAGE, target, ignore=ignored)


def _requirements() -> list[str]:
    """What this package needs, and Gradio as it is here."""
    needed = [line for line in requires("guided-diffusers") or () if "extra ==" not in line]
    return [*needed, f"gradio=={version('gradio')}"]
