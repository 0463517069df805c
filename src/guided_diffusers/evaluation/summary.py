"""One pass over images, by any number of processes: all that figures are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..utils import aside, evaluating
from .images import Images
from .metrics import Accumulator, Answers, ClassScore, Kept, Moments, gather
from .networks import Network

LARGEST = 2**27  # numbers of all classes' covariances: 1 GiB


@dataclass(frozen=True)
class Settings:
    """How a pass is made.

    Attributes:
        classes: K, of the common labels; 0: none.
        ids: {id of the images' labels: common id}; None: they are the same.
        max_features: how many images' features are kept, a sample.
        resamples: of the class score's interval.
        per_class: whether each class gets its moments.
        labelled: whether labels are used; False where they don't fit.
        answers: whether the judge is asked for them; its logits are of the common labels then.
    """

    classes: int = 0
    ids: Mapping[int, int] | None = None
    max_features: int = 10_000
    resamples: int = 100
    per_class: bool = True
    labelled: bool = True
    answers: bool = True
    seed: int = 0


class Summary:
    """Moments, kept features, answers and class score of images; `answers` and `score` are None without a judge."""

    def __init__(self, width: int, settings: Settings, judged: int | None, labelled: bool):
        self.classed = (
            settings.per_class and labelled and 0 < settings.classes * width**2 <= LARGEST
        )
        self.moments = Moments(width, settings.classes if self.classed else 1)
        self.kept = Kept(settings.max_features, settings.seed)
        self.answers = Answers(judged) if judged and labelled and settings.answers else None
        self.score = ClassScore(judged, settings.resamples, settings.seed) if judged else None

    def parts(self) -> list[Accumulator]:
        return [
            one for one in (self.moments, self.kept, self.answers, self.score) if one is not None
        ]

    @property
    def count(self) -> int:
        return int(self.moments.count.sum())

    def update(
        self, numbers: Tensor, labels: Tensor, features: Tensor, logits: Tensor | None
    ) -> None:
        """Images with these numbers, labels (B,), features (B, D) and a judge's logits (B, K)."""
        self.moments.update(features, labels if self.classed else None)
        self.kept.update(numbers, labels, features)
        if self.answers is not None:
            self.answers.update(labels, logits)
        if self.score is not None:
            self.score.update(numbers, logits)

    def save(self, path: Path) -> None:
        with aside(path) as partial:
            save_file(
                {
                    f"{i}.{name}": value.contiguous().clone()
                    for i, part in enumerate(self.parts())
                    for name, value in part.state().items()
                },
                partial,
            )

    def load(self, path: Path) -> None:
        content = load_file(path)
        for i, part in enumerate(self.parts()):
            part.restore(
                {
                    name.partition(".")[2]: value
                    for name, value in content.items()
                    if name.partition(".")[0] == str(i)
                }
            )


def stream(
    images: Images,
    features: Network,
    judge: Network | None,
    batch_size: int,
    what: str,
    progress: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """This process's share of the images, in batches: numbers, labels, features, and the judge's logits."""
    state = PartialState()
    first, last = (len(images) * (state.process_index + i) // state.num_processes for i in (0, 1))
    pending: list[tuple[Tensor, int]] = []
    with (
        torch.no_grad(),
        evaluating(features.module, judge and judge.module),
        tqdm(
            total=last - first,
            desc=what,
            unit="image",
            disable=not progress or not state.is_main_process,
        ) as bar,
    ):
        start, reading = first, images.read(first, last)
        while start < last:
            pending = [
                one for _, one in zip(range(min(batch_size, last - start)), reading, strict=False)
            ]
            if not pending:
                raise ValueError(f"{what}: they end at number {start} of {len(images)}")
            pixels = torch.stack([image for image, _ in pending])
            found, logits = features(pixels)
            if judge is None:
                logits = None
            elif judge is not features:
                logits = judge(pixels)[1]
            labels = torch.tensor([label for _, label in pending])
            yield torch.arange(start, start + len(pending)), labels, found, logits
            start += len(pending)
            bar.update(len(pending))


def summarise(
    images: Images,
    features: Network,
    judge: Network | None,
    settings: Settings,
    *,
    batch_size: int = 64,
    what: str = "images",
    progress: bool = True,
    cache: Path | None = None,
) -> Summary:
    """Look at all images once; with several processes each at its share, and all have the whole then.

    Args:
        what: the images' name in messages.
        cache: a folder where the result is kept, and taken from where images, networks and settings are the same: by
            the main process, which sends it to the others, whose folder may be another.

    Raises:
        ValueError: for images that can't be read, or labels that are unknown.
        FloatingPointError: for features that are not finite.
    """
    labelled = images.labelled and settings.labelled and settings.classes > 0
    with torch.no_grad(), evaluating(features.module):
        width = features(next(images.read(0, 1))[0][None])[0].shape[1]
    found = Summary(width, settings, judge.classes if judge else None, labelled)
    path = _place(cache, images, features, judge, settings) if cache is not None else None
    main = PartialState().is_main_process
    if broadcast_object_list([path is not None and path.exists()])[0]:  # one looks for all
        if main:
            found.load(path)
        gather(found.parts())
        return found
    ids = settings.ids
    for numbers, labels, vectors, logits in stream(
        images, features, judge, batch_size, what, progress
    ):
        if not labelled:
            labels = torch.full_like(labels, -1)
        elif ids is not None:
            labels = torch.tensor([ids[label] for label in labels.tolist()])
        if labelled and not 0 <= int(labels.min()) <= int(labels.max()) < settings.classes:
            raise ValueError(
                f"{what}: labels {labels.unique().tolist()[-5:]} are there, and ids 0 to "
                f"{settings.classes - 1} are known"
            )
        found.update(numbers, labels, vectors, logits)
    gather(found.parts())
    if path is not None and main:
        found.save(path)
    PartialState().wait_for_everyone()
    return found


def _place(
    cache: Path, images: Images, features: Network, judge: Network | None, settings: Settings
) -> Path:
    """The file of what was found before of the same images.

    Raises:
        ValueError: for images that have no fingerprint.
    """
    if "fingerprint" not in images.description:
        raise ValueError("cache: only what is found of a data set is kept")
    key = [
        images.description,
        images.shape,
        features.digest(),
        judge and judge.digest(),
        {**vars(settings), "ids": settings.ids and sorted(settings.ids.items())},
    ]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return cache / f"{digest[:24]}.safetensors"
