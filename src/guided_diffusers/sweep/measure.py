"""Measures one setting: samples its images, computes the metrics and counts the cost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import SchedulerMixin
from PIL import Image

from ..evaluation import (
    COVERAGE_K,
    Bootstrap,
    Images,
    Network,
    Settings,
    Summary,
    by_class,
    common_labels,
    compare,
    summarise,
)
from ..networks import evaluating
from ..pipeline import ClassifierGuidedPipeline
from ..sampling import LIBRARIES, sample, save_image
from ..speed import computing_in
from ..utils import scheduler_for
from .metrics import PICTURES, Result
from .settings import SweepSetting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MINIMA = {"num_images": 10, "batch_size": 1, "bootstrap": 2, "max_features": COVERAGE_K + 1}


@dataclass(frozen=True)
class MeasureOptions:
    """How every setting of a sweep is measured; arguments as of `sweep`."""

    num_images: int
    seed: int
    batch_size: int
    conditional: bool | None
    dtype: str
    bootstrap: int
    max_features: int

    def __post_init__(self) -> None:
        for name, minimum in MINIMA.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}={getattr(self, name)}: at least {minimum} is allowed")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: use one of {', '.join(DTYPES)}")


class PointEvaluator:
    """Measures the settings of a sweep on the same labels, seeds and networks.

    Creating it summarises the real images, in the folder `cache`. It raises a ValueError for a
    judge or real images without the pipeline's labels.
    """

    def __init__(
        self,
        pipeline: ClassifierGuidedPipeline,
        real: Images,
        features: Network,
        judge: Network | None,
        options: MeasureOptions,
        cache: Path,
        progress: bool,
    ):
        self.pipeline, self.features, self.options = pipeline, features, options
        self.scorer = judge or (features if features.is_inception else None)
        names = class_names(pipeline)
        generated = SimpleNamespace(labelled=True, names=names)
        self.class_names, classes, ids, real_ids, _ = common_labels(generated, real, judge)
        self.labels = sorted(names)  # image i has the label labels[i % len(labels)]
        self.common_ids = [-1] * len(names)
        if classes:
            self.common_ids = [label if ids is None else ids[label] for label in self.labels]
        seed, sizes = options.seed, (options.max_features, options.bootstrap)
        self.settings = Settings(classes, ids, *sizes, seed=seed, judge_labels=judge is not None)
        real_settings = replace(self.settings, ids=real_ids)
        keywords = {"batch_size": options.batch_size, "progress": progress, "cache": cache}
        self.real = summarise(
            real, features, self.scorer, real_settings, title="real images", **keywords
        )
        self.bootstrap = Bootstrap(options.bootstrap, seed=seed, progress=progress)

    def measure(
        self, setting: SweepSetting, folder: Path, on_batch: Callable[[int], object]
    ) -> Result:
        """The result of a setting; writes its first images to `folder`.

        `on_batch` is called with the number of images of each batch.
        """
        summary, first_images, cost = self.generate(setting, on_batch)
        strip = torch.cat(first_images, dim=2).to(torch.uint8).permute(1, 2, 0).numpy()
        strip = strip[:, :, 0] if strip.shape[2] == 1 else strip
        picture = f"{setting.name}.png"
        save_image(Image.fromarray(strip), folder / picture)
        metrics = compare(summary, self.real, self.bootstrap, self.features.is_inception)
        per_class: Sequence[dict[str, Any]] = ()
        if self.settings.classes:
            per_class = by_class(summary, self.real, self.class_names, self.bootstrap)
        return Result(setting, metrics, cost, picture, tuple(per_class))

    def generate(
        self, setting: SweepSetting, on_batch: Callable[[int], object]
    ) -> tuple[Summary, list[torch.Tensor], dict[str, Any]]:
        """The summary of a setting's images, the first `PICTURES` of them, and the cost."""
        scheduler = scheduler_for(self.pipeline.scheduler, setting.scheduler)
        pipeline = quiet_copy(self.pipeline, scheduler)
        classes, count = self.settings.classes, self.options.num_images
        judge_classes = self.scorer.classes if self.scorer else None
        summary = Summary(self.real.width, count, self.settings, judge_classes, classes > 0)
        first_images: list[torch.Tensor] = []
        seconds = 0.0
        with (
            batch_sizes(pipeline.unet) as network_batches,
            batch_sizes(pipeline.classifier) as classifier_batches,
            computing_in(pipeline.unet, DTYPES[self.options.dtype]),
        ):
            for indices, pixels, batch_seconds in self._sample(pipeline, setting):
                seconds += batch_seconds
                first_images += pixels[: PICTURES - len(first_images)]
                self._update(summary, indices, pixels / 127.5 - 1)
                on_batch(len(indices))
        cost = {
            "network_evaluations": sum(network_batches) / count,
            "classifier_evaluations": sum(classifier_batches) / count,
            "seconds": seconds / count,
            **cost_conditions(pipeline.device, self.options.batch_size),
        }
        return summary, first_images, cost

    def _sample(
        self, pipeline: ClassifierGuidedPipeline, setting: SweepSetting
    ) -> Iterator[tuple[list[int], torch.Tensor, float]]:
        """Batches of indices, pixels (B, C, H, W) rounded to 0 ... 255 as in a file, and seconds.

        Seconds are of CPU time on a CPU, which other processes do not change; else of wall time.
        """
        clock = time.process_time if pipeline.device.type == "cpu" else time.perf_counter
        options, call = self.options, setting.call_arguments
        call |= {"conditional": options.conditional, "output_type": "pt"}
        indices = range(options.num_images)
        batches = sample(pipeline, self.labels, options.seed, options.batch_size, indices, **call)
        began = clock()
        for batch, images in batches:
            pixels = (images.float() * 255).round().cpu()
            yield batch, pixels, clock() - began
            began = clock()

    @torch.no_grad()
    def _update(self, summary: Summary, indices: Sequence[int], pixels: torch.Tensor) -> None:
        """Add images (B, C, H, W) in [-1, 1] to the summary."""
        with evaluating(self.features.module, self.scorer and self.scorer.module):
            vectors, logits = self.features(pixels)
            if self.scorer is not self.features:
                logits = self.scorer(pixels)[1] if self.scorer else None
        labels = torch.tensor([self.common_ids[i % len(self.labels)] for i in indices])
        logits = None if logits is None else logits.cpu()
        summary.update(torch.tensor(indices), labels, vectors.cpu(), logits)


def class_names(pipeline: ClassifierGuidedPipeline) -> dict[int, str]:
    """{label id: name}; ids without a name have themselves as name."""
    names = pipeline.config.id2label or {i: i for i in range(pipeline.num_labels or 0)}
    return {int(i): str(name) for i, name in names.items()}


def quiet_copy(
    pipeline: ClassifierGuidedPipeline, scheduler: SchedulerMixin
) -> ClassifierGuidedPipeline:
    """A pipeline of the same networks with another scheduler and without a progress bar."""
    components = {**pipeline.components, "scheduler": scheduler}
    defaults = dict(pipeline.config.defaults)
    copy = type(pipeline)(**components, id2label=pipeline.config.id2label, defaults=defaults)
    copy.set_progress_bar_config(disable=True)
    return copy


@contextmanager
def batch_sizes(network: torch.nn.Module) -> Iterator[list[int]]:
    """Within, a list that collects the batch size of each call of the network."""
    sizes: list[int] = []

    def record(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes.append(len(next(iter([*args, *kwargs.values()]))))

    handle = network.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def cost_conditions(device: torch.device, batch_size: int) -> dict[str, Any]:
    """What the seconds of a result depend on."""
    name = device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = f"cpu ({os.cpu_count()} cores)"
    return {
        "clock": "CPU" if device.type == "cpu" else "wall",
        "device": name,
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "versions": {name: version(name) for name in LIBRARIES},
    }
