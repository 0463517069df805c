"""One pass over images, by any number of processes, that collects all that metrics are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers.utils.logging import get_logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..files import aside, check_writable, file_lock
from ..networks import evaluating
from .images import Images, read_image
from .metrics import Accumulator, ClassScore, ConfusionMatrix, FeatureSample, Moments, gather
from .networks import Network

logger = get_logger(__name__)
MAX_COVARIANCE_NUMBERS = 2**27  # of all classes together: 1 GiB
OLD_STATE_NAMES = {"counts": "confusion", "top5_correct": "among"}  # in caches of version 0.2


@dataclass(frozen=True)
class Settings:
    """What a pass collects.

    `ids` is {id of the images' labels: common id}; None: they are the same; {}: labels are ignored.
    """

    classes: int = 0  #: number K of common labels; 0: none
    ids: Mapping[int, int] | None = None
    max_features: int = 10_000  #: size of the sample of images whose features are kept
    resamples: int = 100  #: for the class score's interval
    per_class: bool = True  #: whether to keep moments of each class
    judge_labels: bool = True  #: whether the judge's logits are of the common labels
    seed: int = 0


class Summary:
    """Accumulators of one set of images: `moments` (of each class if `has_class_moments`), `sample`
    of the features, and the judge's `confusion` (None without judge or labels) and `class_score`.

    Args:
        width, count: of the features, and of the images.
        judge_classes: of the judge; None without a judge.
        labelled: whether the images have labels.
    """

    def __init__(
        self, width: int, count: int, settings: Settings, judge_classes: int | None, labelled: bool
    ):
        self.width, self.count = width, count
        covariance_numbers = settings.classes * width**2 if settings.per_class and labelled else 0
        self.has_class_moments = 0 < covariance_numbers <= MAX_COVARIANCE_NUMBERS
        self.moments = Moments(width, settings.classes if self.has_class_moments else 1)
        self.sample = FeatureSample(width, count, settings.max_features, settings.seed)
        self.confusion, self.class_score = None, None
        if judge_classes:
            self.class_score = ClassScore(judge_classes, settings.resamples, settings.seed)
            if labelled and settings.judge_labels:
                self.confusion = ConfusionMatrix(judge_classes)

    def accumulators(self) -> list[Accumulator]:
        parts = (self.moments, self.sample, self.confusion, self.class_score)
        return [part for part in parts if part is not None]

    def overall_moments(self) -> Moments:
        """Moments of all classes together."""
        return self.moments.pooled() if self.has_class_moments else self.moments

    def update(
        self, indices: Tensor, labels: Tensor, features: Tensor, logits: Tensor | None
    ) -> None:
        """Add images with indices (B,), labels (B,), features (B, D), and the judge's logits."""
        self.moments.update(features, labels if self.has_class_moments else None)
        self.sample.update(indices, labels, features)
        if self.confusion is not None:
            self.confusion.update(labels, logits)
        if self.class_score is not None:
            self.class_score.update(indices, logits)

    def save(self, path: Path) -> None:
        tensors = {}
        for i, accumulator in enumerate(self.accumulators()):
            for name, value in accumulator.state().items():
                tensors[f"{i}.{name}"] = value.contiguous().clone()
        with aside(path) as partial:
            save_file(tensors, partial)

    def load(self, path: Path) -> bool:
        """Read a saved summary; return False, with a warning, for a file that can't be used."""
        try:
            tensors = load_file(path)
            states = []
            for i, accumulator in enumerate(self.accumulators()):
                state = {}
                for name, own in accumulator.state().items():
                    old_key = f"{i}.{OLD_STATE_NAMES.get(name, name)}"
                    state[name] = tensors.get(old_key, tensors.get(f"{i}.{name}"))
                    if state[name] is None or state[name].shape != own.shape:
                        raise ValueError(f"no tensor {i}.{name} of shape {tuple(own.shape)}")
                states.append(state)
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning(f"{path} can't be read ({error}) and is made again")
            return False
        for accumulator, state in zip(self.accumulators(), states, strict=True):
            accumulator.restore(state)
        return True


def progress_bar(total: int, title: str, shown: bool) -> tqdm:
    """A bar that counts images, on the main process only."""
    disable = not shown or not PartialState().is_main_process
    return tqdm(total=total, desc=title, unit="image", disable=disable)


def iterate_features(
    images: Images,
    features: Network,
    judge: Network | None,
    batch_size: int,
    title: str,
    progress: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Batches of this process's share of the images: indices, labels, features, judge's logits."""
    state = PartialState()
    ranks = (state.process_index, state.process_index + 1)
    first, last = (len(images) * rank // state.num_processes for rank in ranks)
    reader = images.read(first, last)
    with (
        torch.no_grad(),
        evaluating(features.module, judge and judge.module),
        progress_bar(last - first, title, progress) as bar,
    ):
        for start in range(first, last, batch_size):
            indices = torch.arange(start, min(start + batch_size, last))
            items = list(islice(reader, len(indices)))
            if len(items) < len(indices):
                raise ValueError(f"{title}: only {start + len(items)} of {len(images)} can be read")
            pixels, labels = zip(*items, strict=True)
            vectors, logits = features(torch.stack(pixels))
            if judge is not features:
                logits = None if judge is None else judge(torch.stack(pixels))[1]
            yield indices, torch.tensor(labels), vectors, logits
            bar.update(len(indices))


def summarise(
    images: Images,
    features: Network,
    judge: Network | None,
    settings: Settings,
    *,
    batch_size: int = 64,
    title: str = "images",
    progress: bool = True,
    cache: Path | None = None,
) -> Summary:
    """Process all images once. Several processes share the images, and all get the full summary.

    Args:
        title: what messages call the images.
        cache: a folder where the summary is kept, and read from when images, networks and settings
            are the same. Only the main process reads and writes it.

    Raises:
        ValueError: for images that can't be read, or unknown labels.
        FloatingPointError: for features that aren't finite.
    """
    labelled = images.labelled and settings.ids != {} and settings.classes > 0
    with torch.no_grad(), evaluating(features.module):
        width = features(read_image(images, 0)[None])[0].shape[1]
    summary = Summary(width, len(images), settings, judge.classes if judge else None, labelled)
    path = None if cache is None else _cache_path(cache, images, features, judge, settings)
    is_main = PartialState().is_main_process
    if is_main and path is not None and not path.exists():
        try:
            check_writable(path, "cache")
        except OSError as error:
            logger.warning(f"{error}; the summary of the {title} is not kept")
            path = None
    with _cache_lock(path) if is_main and path is not None else nullcontext():
        loaded = is_main and path is not None and path.exists() and summary.load(path)
        cached = broadcast_object_list([loaded])[0]
        if not cached:
            batches = iterate_features(images, features, judge, batch_size, title, progress)
            for indices, labels, vectors, logits in batches:
                labels = _common_ids(labels, settings, labelled, title)
                summary.update(indices, labels, vectors, logits)
        gather(summary.accumulators())
        if path is not None and is_main and not cached:
            summary.save(path)
    PartialState().wait_for_everyone()
    return summary


def _cache_lock(path: Path) -> AbstractContextManager[str | None]:
    """The lock of a summary that isn't cached yet: a second process waits for the first one's."""
    if path.exists():  # it never changes, and may be where nothing can be written
        return nullcontext()
    return file_lock(path.with_name(f".{path.stem}.lock"), wait=True)


def _common_ids(labels: Tensor, settings: Settings, labelled: bool, title: str) -> Tensor:
    """The common ids of a batch's labels; -1 without labels."""
    if not labelled:
        return torch.full_like(labels, -1)
    if settings.ids is not None:
        labels = torch.tensor([settings.ids[label] for label in labels.tolist()])
    if not 0 <= int(labels.min()) <= int(labels.max()) < settings.classes:
        raise ValueError(
            f"{title}: they have the labels {labels.unique().tolist()[-5:]}; ids 0 to "
            f"{settings.classes - 1} are allowed"
        )
    return labels


def _cache_path(
    cache: Path, images: Images, features: Network, judge: Network | None, settings: Settings
) -> Path:
    """The file of a summary of the same images, networks and settings."""
    if "fingerprint" not in images.description:
        raise ValueError("cache: only summaries of datasets can be kept")
    fields = {**vars(settings), "ids": settings.ids and sorted(settings.ids.items())}
    # the names that caches of version 0.2 were found by
    fields |= {"answers": fields.pop("judge_labels"), "labelled": settings.ids != {}}
    networks = features.digest(), judge and judge.digest()
    key = [images.description, images.shape, *networks, fields]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return cache / f"{digest[:24]}.safetensors"
