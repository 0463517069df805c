"""Measures one setting: samples its images, computes the metrics and counts the cost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import SchedulerMixin
from PIL import Image

from ..evaluation import COVERAGE_K, Bootstrap, Network, Settings, Summary, by_class, compare
from ..pipeline import ClassifierGuidedPipeline
from ..sampling import sample
from ..sampling.manifest import LIBRARIES
from ..sampling.pictures import save_image
from ..speed import computing_in
from ..utils import evaluating
from .metrics import PICTURES, Result
from .schedulers import scheduler_for
from .settings import SweepSetting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MeasureOptions:
    """How every setting of a sweep is measured; arguments as of `sweep`.

    Raises:
        ValueError: for a number that is too small or an unknown dtype.
    """

    num_images: int = 1000
    seed: int = 0
    batch_size: int = 50
    conditional: bool | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    bootstrap: int = 100
    max_features: int = 2000

    def __post_init__(self) -> None:
        minima = {
            "num_images": 10,
            "batch_size": 1,
            "bootstrap": 2,
            "max_features": COVERAGE_K + 1,
        }
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value < minimum:
                raise ValueError(f"{name}={value}: at least {minimum} is allowed")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: use one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class PointEvaluator:
    """Measures the settings of a sweep on the same labels, seeds and networks.

    Attributes:
        labels: image i has the label `labels[i % len(labels)]`.
        real: summary of the real images.
        summary_settings: classes, and the ids of the pipeline's labels among them, as of
            `evaluation.common_labels`.
        class_names: names of these classes.
    """

    pipeline: ClassifierGuidedPipeline
    labels: Sequence[int]
    features: Network
    judge: Network | None
    real: Summary
    summary_settings: Settings
    class_names: dict[int, str]
    bootstrap: Bootstrap
    options: MeasureOptions

    def measure(
        self,
        setting: SweepSetting,
        folder: Path,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> Result:
        """The result of a setting; writes its first images to `folder`.

        Args:
            on_batch: called with the number of images of each batch.
        """
        pipeline = quiet_copy(
            self.pipeline, scheduler_for(self.pipeline.scheduler, setting.scheduler)
        )
        summary = self._empty_summary()
        first_images: list[torch.Tensor] = []
        seconds = 0.0
        with (
            batch_sizes(pipeline.unet) as network_batches,
            batch_sizes(pipeline.classifier) as classifier_batches,
            computing_in(pipeline.unet, DTYPES[self.options.dtype]),
        ):
            batches = self._sample(pipeline, setting)
            for (indices, pixels), batch_seconds in timed(batches, clock_of(pipeline.device)):
                seconds += batch_seconds
                first_images += list(pixels[: PICTURES - len(first_images)])
                self._update(summary, indices, pixels / 127.5 - 1)
                on_batch(len(indices))
        picture = f"{setting.name}.png"
        save_strip(first_images, folder / picture)
        per_class: Sequence[dict[str, Any]] = ()
        if self.summary_settings.classes:
            per_class = by_class(summary, self.real, self.class_names, self.bootstrap)
        count = self.options.num_images
        return Result(
            setting,
            compare(summary, self.real, self.bootstrap, self.features.is_inception),
            {
                "network_evaluations": sum(network_batches) / count,
                "classifier_evaluations": sum(classifier_batches) / count,
                "seconds": seconds / count,
                **cost_conditions(pipeline.device, self.options.batch_size),
            },
            picture,
            tuple(per_class),
        )

    def _empty_summary(self) -> Summary:
        judge_classes = self.judge.classes if self.judge else None
        labelled = self.summary_settings.classes > 0
        return Summary(
            self.real.width, self.options.num_images, self.summary_settings, judge_classes, labelled
        )

    def _sample(
        self, pipeline: ClassifierGuidedPipeline, setting: SweepSetting
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Batches of indices and pixels (B, C, H, W), rounded to 0 ... 255 as in a file."""
        batches = sample(
            pipeline,
            self.labels,
            self.options.seed,
            self.options.batch_size,
            range(self.options.num_images),
            conditional=self.options.conditional,
            output_type="pt",
            **setting.call_arguments,
        )
        for indices, images in batches:
            yield indices, (images.float() * 255).round().cpu()

    @torch.no_grad()
    def _update(self, summary: Summary, indices: Sequence[int], pixels: torch.Tensor) -> None:
        """Add images (B, C, H, W) in [-1, 1] to the summary."""
        with evaluating(self.features.module, self.judge and self.judge.module):
            vectors, logits = self.features(pixels)
            if self.judge is None:
                logits = None
            elif self.judge is not self.features:
                logits = self.judge(pixels)[1]
        labels = [self.labels[i % len(self.labels)] for i in indices]
        if self.summary_settings.ids is not None:
            labels = [self.summary_settings.ids[label] for label in labels]
        if not self.summary_settings.classes:
            labels = [-1] * len(labels)
        summary.update(
            torch.tensor(indices),
            torch.tensor(labels),
            vectors.cpu(),
            None if logits is None else logits.cpu(),
        )


def quiet_copy(
    pipeline: ClassifierGuidedPipeline, scheduler: SchedulerMixin
) -> ClassifierGuidedPipeline:
    """A pipeline of the same networks with another scheduler and without a progress bar."""
    copy = type(pipeline)(
        **{**pipeline.components, "scheduler": scheduler},
        id2label=pipeline.config.id2label,
        defaults=dict(pipeline.config.defaults),
    )
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


def clock_of(device: torch.device) -> Callable[[], float]:
    """CPU time on a CPU, which other processes do not change; wall time elsewhere."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def timed(batches: Iterator[Any], clock: Callable[[], float]) -> Iterator[tuple[Any, float]]:
    """Each item with the seconds that it took to produce."""
    began = clock()
    for batch in batches:
        yield batch, clock() - began
        began = clock()


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


def save_strip(images: Sequence[torch.Tensor], path: Path) -> None:
    """Write images (C, H, W) in 0 ... 255 side by side, atomically."""
    strip = torch.cat(list(images), dim=2).to(torch.uint8).permute(1, 2, 0).numpy()
    save_image(Image.fromarray(strip[:, :, 0] if strip.shape[2] == 1 else strip), path)
