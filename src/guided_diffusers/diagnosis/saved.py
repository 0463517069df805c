"""What `inspect` is given by name: a saved classifier, the network that it guides, held-out images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import bundled
from ..classifier import NoiseAwareClassifier
from ..pipeline import ClassifierGuidedPipeline
from .figures import Item

if TYPE_CHECKING:
    from ..learning.data import LabelledImages


def load(model: str | Path) -> tuple[NoiseAwareClassifier, ClassifierGuidedPipeline | None]:
    """The classifier of a folder, Hub id or bundled name, and the pipeline that it is part of.

    Raises:
        ValueError: if there is none.
    """
    if (
        "/" not in str(model)
        and not Path(model).exists()
        or (Path(model) / "model_index.json").is_file()
    ):
        pipeline = load_pipeline(model)
    elif Path(model).is_dir():
        return NoiseAwareClassifier.from_pretrained(model), None
    else:
        try:
            ClassifierGuidedPipeline.load_config(model)
        except (
            OSError
        ):  # no model_index.json: the repository of a classifier, or nothing, which this says
            return NoiseAwareClassifier.from_pretrained(model), None
        pipeline = load_pipeline(model)
    if pipeline.classifier is None:
        raise ValueError(f"model {str(model)!r} is a pipeline without a classifier")
    return pipeline.classifier, pipeline


def load_pipeline(model: str | Path) -> ClassifierGuidedPipeline:
    """Of a folder, a Hub id or a bundled name."""
    here = "/" not in str(model) and not Path(model).exists()
    return ClassifierGuidedPipeline.from_pretrained(bundled.folder(str(model)) if here else model)


def held_out(
    dataset: str,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    resolution: int,
    channels: int,
) -> tuple[LabelledImages, str]:
    """The images of a split and its name.

    Raises:
        ValueError: if there is no such split, or it has no labels.
    """
    from ..learning.data import LabelledImages, load_splits

    splits = load_splits(dataset)
    if split is None:
        split = next((name for name in ("validation", "test", "train") if name in splits), None)
    if split not in splits:
        raise ValueError(f"split {split!r}: the dataset has {sorted(splits)}")
    data = LabelledImages(
        splits[split], image_column, label_column, resolution, center_crop=True, channels=channels
    )
    if not data.id2label:
        raise ValueError("dataset: it has no labels; name their column with label_column")
    return data, split


class Renumbered:
    """Images with their labels' ids exchanged."""

    def __init__(self, data: LabelledImages, ids: Mapping[int, int]):
        self.data, self.ids = data, ids

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        item = self.data[index]
        return {**item, "label": self.ids[item["label"]]}

    def label(self, index: int) -> int:
        return self.ids[self.data.label(index)]


def named_alike(
    data: LabelledImages, names: Mapping[Any, str] | None
) -> tuple[Sequence[Item], list[str]]:
    """The data with the classifier's ids where both have the same names in another order, and what to say of it."""
    wanted = {int(i): name for i, name in (names or {}).items()}
    if not wanted or wanted == data.id2label:
        return data, []
    ids = {name: i for i, name in wanted.items()}
    if len(ids) == len(wanted) and set(data.id2label.values()) <= ids.keys():
        return Renumbered(data, {i: ids[name] for i, name in data.id2label.items()}), [
            "the dataset numbers its labels otherwise than the classifier; they were matched by name"
        ]
    return data, [
        f"the dataset's labels are {list(data.id2label.values())[:20]}, the classifier's "
        f"{list(wanted.values())[:20]}; they were matched by id"
    ]
