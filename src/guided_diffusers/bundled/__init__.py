"""Small trained models that come with the package: a pipeline, a judge and their metrics."""

from pathlib import Path


def folder(name: str) -> Path:
    """Folder of a bundled model: a pipeline, and in `judge` a classifier not used for guidance.

    Raises:
        ValueError: for an unknown name.
    """
    root = Path(__file__).parent
    names = sorted(path.parent.name for path in root.glob("*/model_index.json"))
    if name not in names:
        raise ValueError(f"model {name!r} is not bundled; allowed: {names}")
    return root / name
