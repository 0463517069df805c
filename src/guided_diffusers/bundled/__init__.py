"""Small trained models that come with the package: a pipeline, a judge and their metrics."""

from pathlib import Path

ROOT = Path(__file__).parent


def names() -> list[str]:
    """Names of the bundled models."""
    return sorted(path.parent.name for path in ROOT.glob("*/model_index.json"))


def folder(name: str) -> Path:
    """Folder of a bundled model: a pipeline, and in `judge` a classifier not used for guidance.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in names():
        raise ValueError(f"model {name!r} is not bundled; allowed: {names()}")
    return ROOT / name
