"""Small trained models that are part of the package, each a folder with a pipeline, a judge and their figures."""

from pathlib import Path


def folder(name: str) -> Path:
    """The folder of a bundled model: a pipeline, and in `judge` a classifier of clean images that never guides.

    Raises:
        ValueError: for a name that is not bundled.
    """
    here = Path(__file__).parent
    known = sorted(path.parent.name for path in here.glob("*/model_index.json"))
    if name not in known:
        raise ValueError(f"model {name!r} is not bundled; allowed: {known}")
    return here / name
