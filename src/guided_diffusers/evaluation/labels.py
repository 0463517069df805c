"""Label ids of different datasets and classifiers, matched by the labels' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..sampling import as_folder, folder_names, unique_names
from .images import Images
from .networks import Network


class CommonLabels(NamedTuple):
    """Labels that generated images, real images and judge share.

    Ids are {id of the images' labels: common id}; None: they are the same; {}: the images have no
    labels, or others.
    """

    names: dict[int, str]  # by common id
    count: int  # number of labels
    generated_ids: Mapping[int, int] | None
    real_ids: Mapping[int, int] | None
    notes: list[str]  # for the reader of the evaluation


def common_labels(generated: Images, real: Images, judge: Network | None) -> CommonLabels:
    """The judge's labels, without a judge the real images', and the ids of all images there.

    Labels are matched by name, and by id where one side has no names.

    Raises:
        ValueError: for labels of the generated images that the judge, or the real images, lack.
    """
    if not generated.labelled:
        note = "the generated images have no labels, so per-class metrics are skipped"
        return CommonLabels({}, 0, None, {}, [note])
    notes: list[str] = []
    reference, title = generated, "the generated images"
    if judge is not None:
        reference, title = judge, f"the judge {judge.name}"
    elif real.labelled:
        reference, title = real, "the real images' dataset"

    def ids(images: Images, whose: str) -> dict[int, int] | None:
        if has_names(images.names) and has_names(reference.names):
            return match_labels(images.names, reference.names, whose, title)
        if images is not reference:
            notes.append(f"{whose} and {title} were matched by label id")
        return None

    try:
        generated_ids = ids(generated, "the generated images")
    except ValueError as error:
        if judge is None:
            raise
        raise ValueError(f"{error}; a judge of the same classes is needed") from error
    real_ids: Mapping[int, int] | None = {}
    if not real.labelled:
        notes.append("the real images have no labels, so their per-class metrics are skipped")
    else:
        try:
            real_ids = ids(real, "the real images")
        except ValueError as error:
            notes.append(f"{error}; the labels of the real images are ignored")
    count = len(reference.names) if judge is None else judge.classes
    return CommonLabels(dict(reference.names), count, generated_ids, real_ids, notes)


def has_names(names: Mapping[int, str]) -> bool:
    """Whether labels have names other than their ids."""
    return any(name != str(i) for i, name in names.items())


def match_labels(
    names: Mapping[int, str], reference: Mapping[int, str], whose: str, reference_title: str
) -> dict[int, int]:
    """{id: id in `reference`} of labels with the same name, or this as a folder name; of several,
    the one with the same id. A ValueError says which names of `whose` labels are missing."""
    unique = unique_names(reference, max(reference, default=-1) + 1)
    folders = folder_names(unique)
    by_name = {name: i for i, name in reference.items()}
    ids = {as_folder(name): i for name, i in by_name.items()}
    for i in reference:
        ids[folders[i]] = ids[unique[i]] = i
    ids |= by_name
    missing = [name for name in names.values() if name not in ids]
    if missing:
        raise ValueError(
            f"{whose} have the labels {missing[:10]}, which {reference_title} lacks; it has "
            f"{list(reference.values())[:20]}"
        )
    return {i: i if reference.get(i) == name else ids[name] for i, name in names.items()}
