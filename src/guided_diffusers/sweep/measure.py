"""One point measured: its images sampled, looked at by networks that never guided, and what that cost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import SchedulerMixin
from PIL import Image

from ..diagnosis.figures import evaluating
from ..evaluation import Bootstrap, Network, Settings, Summary, by_class, compare
from ..pipeline import ClassifierGuidedPipeline
from ..sampling import sample
from ..sampling.manifest import LIBRARIES
from ..speed import computing_in
from ..utils import aside, exchanged
from .figures import PICTURES, Result
from .points import Point

SOLVERS = (
    "dpmsolver++",
    "sde-dpmsolver++",
    "sde-dpmsolver",
)  # algorithms of the multi-step DPM-Solver
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def scheduler_for(own: SchedulerMixin, name: str) -> SchedulerMixin:
    """The scheduler called `name`, for the network that `own` is for; of the multi-step DPM-Solver also `dpmsolver++`,
    `sde-dpmsolver++`, `dpmsolver++3m` (of third order), `dpmsolver++-thresholding` (dynamic, of x0).

    Raises:
        ValueError: if there is none, or it is for networks of another kind.
    """
    if name.lower() == scheduler_name(own):
        return type(own).from_config(own.config)
    solver, _, option = name.lower().partition("-thresholding")
    third, solver = solver.endswith("3m"), solver.removesuffix("3m")
    if solver in SOLVERS and not option:
        found = exchanged(own, "dpmsolver")
        return type(found).from_config(
            found.config,
            algorithm_type=solver,
            solver_order=3 if third else 2,
            thresholding=name.lower().endswith("-thresholding"),
        )
    return exchanged(own, name)


def scheduler_name(scheduler: SchedulerMixin) -> str:
    """The short one that `scheduler_for` takes."""
    name = (
        type(scheduler)
        .__name__.removesuffix("Scheduler")
        .removesuffix("Discrete")
        .removesuffix("Multistep")
        .lower()
    )
    if name == "dpmsolver":
        return (
            scheduler.config["algorithm_type"]
            + "3m" * (scheduler.config["solver_order"] == 3)
            + "-thresholding" * scheduler.config["thresholding"]
        )
    return name


def quiet_copy(
    pipeline: ClassifierGuidedPipeline, scheduler: SchedulerMixin
) -> ClassifierGuidedPipeline:
    """The same networks with another scheduler, and no progress bar."""
    found = type(pipeline)(
        **{**pipeline.components, "scheduler": scheduler},
        id2label=pipeline.config.id2label,
        defaults=dict(pipeline.config.defaults),
    )
    found.set_progress_bar_config(disable=True)
    return found


@contextmanager
def rows_counted(network: torch.nn.Module) -> Iterator[list[int]]:
    """Within, the batch sizes of the network's calls, as they come."""
    calls: list[int] = []
    handle = network.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(next(iter([*args, *kwargs.values()])))),
        with_kwargs=True,
    )
    try:
        yield calls
    finally:
        handle.remove()


@dataclass(frozen=True)
class Bench:
    """What all points of a sweep are measured with.

    Attributes:
        labels: image i is of `labels[i % len(labels)]`.
        common: as of `evaluation.common_labels`: all labels' names, their number, and the ids there of the model's.
        real: what is compared with.
        dtype: of the network; the sampler and the classifier stay as they are.
    """

    pipeline: ClassifierGuidedPipeline
    labels: Sequence[int]
    features: Network
    judge: Network | None
    real: Summary
    summary: Settings
    names: dict[int, str]
    bootstrap: Bootstrap
    num_images: int
    seed: int
    batch_size: int
    conditional: bool | None
    dtype: torch.dtype

    def measure(
        self, point: Point, folder: Path, made: Callable[[int], None] = lambda count: None
    ) -> Result:
        """A point's figures; its pictures are in the folder then.

        Args:
            made: is told of the images of each batch.
        """
        pipeline = quiet_copy(
            self.pipeline, scheduler_for(self.pipeline.scheduler, point.scheduler)
        )
        found, shown, seconds = self._summary(), [], 0.0
        clock, tick = (
            ("CPU", time.process_time)
            if pipeline.device.type == "cpu"
            else ("wall", time.perf_counter)
        )
        with (
            rows_counted(pipeline.unet) as network,
            rows_counted(pipeline.classifier) as classifier,
            computing_in(pipeline.unet, self.dtype),
        ):
            batches = sample(
                pipeline,
                self.labels,
                self.seed,
                self.batch_size,
                range(self.num_images),
                conditional=self.conditional,
                output_type="pt",
                **point.call,
            )
            while True:
                began = tick()
                indices, images = next(batches, ([], torch.empty(0)))
                pixels = (images.float() * 255).round().cpu()  # as in a file
                seconds += tick() - began
                if not indices:
                    break
                shown += list(pixels[: PICTURES - len(shown)])
                self._look(found, indices, pixels / 127.5 - 1)
                made(len(indices))
        save_strip(shown, folder / f"{point.name}.png")
        per_class = (
            by_class(found, self.real, self.names, self.bootstrap) if self.summary.classes else []
        )
        cost = {
            "network_evaluations": sum(network) / self.num_images,
            "classifier_evaluations": sum(classifier) / self.num_images,
            "seconds": seconds / self.num_images,
            "clock": clock,
            "device": device_name(pipeline.device),
            "threads": torch.get_num_threads(),
            "batch_size": self.batch_size,
            "versions": {name: version(name) for name in LIBRARIES},
        }
        return Result(
            point,
            compare(found, self.real, self.bootstrap, self.features.is_inception),
            cost,
            f"{point.name}.png",
            tuple(per_class),
        )

    def _summary(self) -> Summary:
        judged = self.judge.classes if self.judge else None
        return Summary(
            self.real.width, self.num_images, self.summary, judged, self.summary.classes > 0
        )

    @torch.no_grad()
    def _look(self, found: Summary, indices: Sequence[int], pixels: torch.Tensor) -> None:
        """Add images in [-1, 1]."""
        with evaluating(self.features.module, self.judge and self.judge.module):
            vectors, logits = self.features(pixels)
            if self.judge is not self.features:
                logits = self.judge(pixels)[1] if self.judge else None
        ids = [self.labels[i % len(self.labels)] for i in indices]
        ids = [self.summary.ids[i] for i in ids] if self.summary.ids is not None else ids
        labels = torch.tensor(ids if self.summary.classes else [-1] * len(ids))
        found.update(
            torch.tensor(indices), labels, vectors.cpu(), None if logits is None else logits.cpu()
        )


def save_strip(images: Sequence[torch.Tensor], path: Path) -> None:
    """Images (C, H, W) in [0, 255] beside each other; written aside, then moved."""
    strip = torch.cat(list(images), dim=2).to(torch.uint8).permute(1, 2, 0).numpy()
    with aside(path) as partial:
        Image.fromarray(strip[:, :, 0] if strip.shape[2] == 1 else strip).save(partial, "PNG")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({os.cpu_count()} cores)" if device.type == "cpu" else device.type
