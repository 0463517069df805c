"""Loads what `inspect` is given by name: a classifier, the pipeline it guides, held-out images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..classifier import NoiseAwareClassifier
from ..images import as_pair, as_sizes, down_sampling
from ..noise import module_config
from ..pipeline import ClassifierGuidedPipeline
from ..utils import load_pipeline
from .statistics import Item

if TYPE_CHECKING:
    from datasets import Dataset

    from ..learning.data import LabelledImages


def load_classifier(
    model: str | Path,
) -> tuple[NoiseAwareClassifier, ClassifierGuidedPipeline | None]:
    """The classifier of a folder, Hub id or bundled name, and the pipeline that contains it."""
    if not _is_pipeline(str(model)):
        return NoiseAwareClassifier.from_pretrained(model), None
    pipeline = load_pipeline(str(model))
    if pipeline.classifier is None:
        raise ValueError(f"model {str(model)!r} is a pipeline without a classifier")
    return pipeline.classifier, pipeline


def _is_pipeline(model: str) -> bool:
    if Path(model).is_dir():
        return (Path(model) / "model_index.json").is_file()
    if "/" not in model:  # a bundled name
        return True
    try:
        ClassifierGuidedPipeline.load_config(model)
    except OSError:  # the Hub repository has no model_index.json
        return False
    return True


def reads_arrays(classifier: torch.nn.Module | None) -> bool:
    """Whether a classifier reads arrays of data, by its config, rather than images in [-1, 1]."""
    config = module_config(classifier)
    return (config.get("dims") or 2) != 2 or config.get("data_std") is not None


def open_data(
    rows: Dataset,
    classifier: torch.nn.Module,
    vae: torch.nn.Module | None,
    columns: tuple[str | None, str | None],
    pixels: Mapping[str, Any],
) -> LabelledImages:
    """Labelled images, or arrays, as the classifier, or the autoencoder, reads them.

    Args:
        columns: of images or arrays, and of labels; None: the first that fits.
        pixels: `image_range` and `alpha_background` of images.

    Raises:
        ValueError: for other data, or data without labels.
    """
    from ..learning.arrays import arrays_of_shape, find_array_column
    from ..learning.data import LabelledImages, are_renumbered
    from ..learning.pixels import check_no_pixel_options

    config = module_config(classifier)
    names = {int(i): name for i, name in (config.get("id2label") or {}).items()}
    renumber = {"renumber_labels": are_renumbered(names)}
    column = find_array_column(rows, *columns)
    if reads_arrays(classifier):
        if column is None:
            raise ValueError(
                f"dataset: it has no column of arrays, which the classifier (dims="
                f"{config.get('dims')}, data_std={config.get('data_std')}) reads; image_column "
                f"names one of {rows.column_names}"
            )
        check_no_pixel_options(column, pixels)
        shape = (config["in_channels"], *as_sizes(config["sample_size"], config.get("dims") or 2))
        mean, std = config.get("data_mean"), config.get("data_std")
        scale = (0.0, 1.0) if std is None else (mean, std)
        data = arrays_of_shape(rows, column, columns[1], shape, scale=scale, **renumber)
    else:
        if column is not None:
            raise ValueError(
                f"dataset: column {column!r} has arrays, and the classifier reads images (no data_std "
                "in its config); image_column names a column of images, or use another classifier"
            )
        size, channels = image_format(classifier, vae)
        options = {"center_crop": True, "channels": channels, "check_pixels": True}
        options |= {**renumber, **pixels}
        data = LabelledImages(rows, *columns, size, **options)
    if not data.id2label:
        raise ValueError("dataset: it has no labels; name their column with label_column")
    return data


def image_format(
    classifier: torch.nn.Module, vae: torch.nn.Module | None
) -> tuple[tuple[int, int], int]:
    """(H, W) and channels of the images that the classifier, or the autoencoder, reads."""
    config, vae_config = module_config(classifier), module_config(vae)
    height, width = as_pair(config["sample_size"])
    if vae is None:
        return (height, width), config["in_channels"]
    scale = down_sampling(vae_config)
    return (height * scale, width * scale), vae_config["in_channels"]


class RelabeledDataset:
    """Images of a dataset with other label ids: `new_ids` maps the dataset's to them."""

    def __init__(self, data: LabelledImages, new_ids: Mapping[int, int]):
        self.data, self.new_ids = data, new_ids

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        item = self.data[index]
        return {**item, "label": self.new_ids[item["label"]]}

    def label(self, index: int) -> int:
        return self.new_ids[self.data.label(index)]


def match_labels(
    data: LabelledImages, id2label: Mapping[Any, str] | None
) -> tuple[Sequence[Item], list[str]]:
    """The data with the classifier's label ids where both have the same names, and any mismatch."""
    classifier_names = {int(i): name for i, name in (id2label or {}).items()}
    if not classifier_names or classifier_names == data.id2label:
        return data, []
    ids = {name: i for i, name in classifier_names.items()}
    unique = len(ids) == len(classifier_names)
    if unique and set(data.id2label.values()) <= ids.keys():
        new_ids = {i: ids[name] for i, name in data.id2label.items()}
        note = "dataset and classifier number the labels differently; they were matched by name"
        return RelabeledDataset(data, new_ids), [note]
    return data, [
        f"the dataset's labels are {list(data.id2label.values())[:20]}, the classifier's "
        f"{list(classifier_names.values())[:20]}; they were matched by id"
    ]
