"""A model, and what a form for it can offer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli_options import select_device
from ..images import as_pair, down_sampling
from ..inversion import ProbabilityFlow
from ..noise import module_config
from ..pipeline import ClassifierGuidedPipeline
from ..presets import resolve_settings
from ..utils import is_hub_id, load_pipeline, model_folder, scheduler_for, scheduler_name

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from ..clip import NoiseAwareCLIP

#: offered if they fit the network; further names are those of `scheduler_for`
SCHEDULERS = (
    "dpmsolver++",
    "sde-dpmsolver++",
    "dpmsolver++3m",
    "unipc",
    "ddim",
    "ddpm",
    "euler",
    "eulerancestral",
    "heun",
)
CLIP_FOLDER = "clip"  # of a model's folder, beside its components


@dataclass
class DemoModel:
    """A pipeline and what the form of its demo offers; see `load`.

    Attributes:
        name, revision: as `load` takes them.
        pipeline: on the device where it runs.
        clip: for captions; None: none.
        clip_name: the CLIP's folder or Hub id.
    """

    name: str
    pipeline: ClassifierGuidedPipeline
    revision: str | None = None
    clip: NoiseAwareCLIP | None = None
    clip_name: str | None = None

    def __post_init__(self) -> None:
        self.scheduler = self.pipeline.scheduler  # the model's own, which a form may replace

    @classmethod
    def load(
        cls,
        name: str | Path = "fashion-mnist",
        revision: str | None = None,
        clip: str | Path | None = None,
        device: str | None = None,
    ) -> DemoModel:
        """Load a model for the demo.

        Args:
            name: a bundled model, a pipeline's folder or a Hub id.
            revision: of a model on the Hub. None: main.
            clip: folder or Hub id of a `NoiseAwareCLIP`, for captions. None: that in the folder
                `clip` of the model's, if there is one.
            device: None: the fastest available.

        Raises:
            ValueError: for a model that makes no pictures from noise alone.
            OSError: for one that isn't found, or can't be read.
        """
        pipeline = load_pipeline(name, revision)
        if pipeline.has_arrays:
            raise ValueError(
                f"model {name}: its samples are arrays; the demo shows models of pictures"
            )
        channels = module_config(pipeline.unet).get("in_channels")
        if pipeline.vae is None and channels not in (1, 3, None):
            raise ValueError(
                f"model {name}: its network has {channels} input channels, as one that needs an image; "
                "the demo shows models that make pictures of 1 or 3 channels from noise"
            )
        pipeline.to(select_device(device))
        pipeline.set_progress_bar_config(disable=True)
        if clip is None and not is_hub_id(name):
            folder = Path(model_folder(name)) / CLIP_FOLDER
            clip = folder if (folder / "config.json").exists() else None
        loaded = None
        if clip is not None:
            from ..clip import NoiseAwareCLIP

            loaded = NoiseAwareCLIP.from_pretrained(clip).to(pipeline.device)
        clip_name = None if clip is None else str(clip)
        return cls(str(name), pipeline, revision, loaded, clip_name)

    @cached_property
    def labels(self) -> list[tuple[str, int]]:
        """(name, id) of each label; empty for a model that takes none."""
        if self.pipeline.classifier is None and self.pipeline.num_class_embeds is None:
            return []
        count = self.pipeline.num_labels or self.pipeline.num_class_embeds or 0
        names = {int(i): str(name) for i, name in (self.pipeline.config.id2label or {}).items()}
        return [(names.get(i, str(i)), i) for i in range(count)]

    def label(self, i: int) -> int | str:
        """A label as code names it: its name, where only one label has it, else its id."""
        names = self.pipeline.config.id2label or {}
        name = dict((i, name) for name, i in self.labels)[i]
        is_name = name in names.values()
        return name if is_name and [n for n, _ in self.labels].count(name) == 1 else i

    @property
    def has_null_label(self) -> bool:
        """Whether the network knows labels, and can do without."""
        return self.pipeline.null_label is not None

    @property
    def can_hide_label(self) -> bool:
        """Whether it may do without, since a classifier steers."""
        return self.has_null_label and self.pipeline.classifier is not None

    @property
    def max_power(self) -> float | None:
        """The largest power that the classifier was trained for; None without powers."""
        allowed = module_config(self.pipeline.classifier).get("power_range")
        return None if allowed is None else allowed[1]

    @property
    def can_edit(self) -> bool:
        """Whether pictures can be inverted and decoded to another label."""
        try:
            ProbabilityFlow(self.scheduler)
        except ValueError:
            return False
        return bool(self.labels) and self.pipeline.classifier is not None

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """(width, height) of its pictures; None if its config has none."""
        size = module_config(self.pipeline.unet).get("sample_size")
        if size is None:
            return None
        pixels = down_sampling(module_config(self.pipeline.vae))
        height, width = (pixels * side for side in as_pair(size))
        return width, height

    @property
    def schedulers(self) -> list[str]:
        """Names of the schedulers that fit the network, the model's own first."""
        names = [scheduler_name(self.scheduler)]
        for name in SCHEDULERS:
            try:
                scheduler_for(self.scheduler, name)
            except ValueError:
                continue
            names += [name] if name not in names else []
        return names

    def scheduler_called(self, name: str) -> SchedulerMixin:
        """The model's own scheduler, or another one, by its name in `schedulers`."""
        is_own = name == scheduler_name(self.scheduler)
        return self.scheduler if is_own else scheduler_for(self.scheduler, name)

    def preset(self, hidden: bool) -> dict[str, Any]:
        """Arguments that a call of the pipeline has if it leaves them out.

        Args:
            hidden: the network doesn't get the label.
        """
        return resolve_settings(self.pipeline, {}, hidden)
