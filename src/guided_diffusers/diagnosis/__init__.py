"""Is my noise-aware classifier good enough to guide with?

    guided-diffusers inspect out/classifier --dataset data/fashion-mnist --unet out/unet --output out/diagnosis

    from guided_diffusers.diagnosis import inspect

    found = inspect("out/classifier", "data/fashion-mnist", unet="out/unet")
    print(found.verdict.summary, found.verdict.sigma_interval)

`figures` measures it at the noise levels of a sampling run, asked as guidance asks it; `verdict` says how that is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from tqdm.auto import tqdm

from ..guidance import logits_of
from ..noise import TrainedSchedule, module_config, schedule_config
from ..utils import image_generator
from .figures import (
    BINS,
    GAPS,
    Gradients,
    Item,
    Place,
    Reference,
    SamplingRun,
    batches,
    calibration_error,
    calibration_gaps,
    evaluating,
    level_figures,
    logit_scale,
    mean_and_error,
    network_reference,
    own_run,
    with_calibration,
)
from .report import plot, table, write_json
from .saved import held_out, load, load_pipeline, named_alike
from .verdict import Verdict, edges, judge, status, useful_levels

__all__ = [
    "GAPS",
    "Diagnosis",
    "Place",
    "Verdict",
    "calibration_error",
    "calibration_gaps",
    "diagnose",
    "inspect",
    "plot",
    "with_calibration",
]


@dataclass(frozen=True)
class Diagnosis:
    """Figures at noise levels, noisiest first, and what they come to.

    Attributes:
        levels: a row a level: `sigma_over_alpha`, `fraction` of the run, the scheduler's `timestep`, the classifier's
            own (`classifier_timestep`), whether it is `beyond` what that was trained on, `accuracy`, `chance`,
            `cross_entropy`, `prior_entropy`, `information`, `ece`, `ece_floor`, `overconfidence`, `logit_scale`,
            `gradient_norm`, `cosine`, `finite_difference_error`, `status`; standard errors end in `_error`. With a
            reference, `reference_scale`: the guidance_scale at which the gradient is nearest to it.
        verdict: what to do with it.
        mismatches: what doesn't fit together, in sentences.
        settings: what the figures were made with.
    """

    levels: tuple[dict[str, Any], ...]
    verdict: Verdict
    mismatches: tuple[str, ...]
    settings: dict[str, Any]

    def __str__(self) -> str:
        lines = [table(self.levels), "", f"Verdict: {self.verdict.summary}.", *self.verdict.words]
        return "\n".join(lines + [f"Mismatch: {one}" for one in self.mismatches])

    def save(self, folder: str | Path, picture: bool = True) -> None:
        """Write `diagnosis.json`, and `diagnosis.png` with the curves, each aside and moved into place.

        Raises:
            ImportError: where matplotlib is missing and a picture is asked for.
        """
        folder = Path(folder)
        write_json(
            {
                "verdict": asdict(self.verdict),
                "mismatches": self.mismatches,
                "levels": self.levels,
                "settings": self.settings,
            },
            folder / "diagnosis.json",
        )
        if picture:
            plot(
                self.levels,
                folder / "diagnosis.png",
                f"{self.settings['model']}: {self.verdict.summary}",
                f"cosine to {self.settings['cosine_to']}",
            )


def diagnose(
    classifier: torch.nn.Module,
    data: Sequence[Item],
    scheduler: SchedulerMixin | None = None,
    *,
    unet: torch.nn.Module | None = None,
    vae: torch.nn.Module | None = None,
    reference: Reference | None = None,
    images: int = 1000,
    gradient_images: int = 64,
    levels: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    finite_differences: bool = True,
    progress: bool = True,
) -> Diagnosis:
    """Measure a classifier on held-out images at the noise levels of a sampling run, and judge it.

    Args:
        classifier: as of `ClassifierGuidance`, single-label; where it is, everything is computed.
        data: items `{"pixel_values": (C, H, W) in [-1, 1], "label": id}`, as `LabelledImages`.
        scheduler: of the run. None: DDIM with the classifier's schedule.
        unet: the network to be guided; class-conditional with a null label, its own gradient is the reference.
        vae: the autoencoder of a latent model, by which images become latents.
        reference: (x_t, label, place) -> grad log p(y | x_t), where another is known.
        images: at most so many, drawn at random.
        gradient_images: of these; gradients cost more.
        levels: in the middles of so many equal parts of the run, and at its last step.
        seed: of the choice of images and their noise.
        finite_differences: check the gradient by them, which takes many passes of a copy in float64 on the CPU.
        progress: show a progress bar.

    Raises:
        ValueError: for arguments that are none, or labels that the classifier doesn't have.
        FloatingPointError: if its logits are NaN or infinite.
    """
    classes = _checked(
        classifier,
        data,
        {"images": images, "gradient_images": gradient_images, "batch_size": batch_size},
    )
    if unet is not None and scheduler is None:
        raise ValueError("unet: its scheduler is needed, too")
    run = own_run(classifier) if scheduler is None else SamplingRun(scheduler)
    places, log_prior = run.places(levels), _log_prior(data, classes)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[
        :images
    ].tolist()
    found = mismatches(
        classifier, unet, vae, run, tuple(torch.as_tensor(data[order[0]]["pixel_values"]).shape)
    )
    cosine_to = "a reference" if reference else "itself under a tenth of other noise"
    null = (module_config(unet).get("num_class_embeds") or 0) - 1
    if reference is None and unet is not None and null == classes:
        reference, cosine_to = network_reference(unet, run, null), "the network's own"

    measured = Measured(places, finite_differences)
    device = next((parameter.device for parameter in classifier.parameters()), torch.device("cpu"))
    with (
        torch.no_grad(),
        evaluating(classifier, unet, vae),
        tqdm(total=len(order), unit="image", disable=not progress) as bar,
    ):
        gradients = Gradients(classifier, reference)
        for some, x0, label in batches(data, order, batch_size, vae, seed, device):
            measured.add(
                classifier,
                gradients,
                x0,
                label,
                [len(places) * i for i in some],
                seed,
                gradient_images,
            )
            bar.update(len(some))

    rows = measured.rows(
        log_prior, TrainedSchedule(schedule_config(classifier)), seed, reference is not None
    )
    if (
        error := max(
            (row["finite_difference_error"] for row in rows if finite_differences), default=0.0
        )
    ) > 0.01:
        found.append(
            f"the gradient differs from finite differences by {error:.1%}: its precision is too low, or "
            "something detaches it"
        )
    if vae is None:
        found += range_mismatch(measured.low, measured.high)
    verdict = _verdict(rows, measured, run, reference is not None)
    settings = {
        "model": type(classifier).__name__,
        "images": len(order),
        "gradient_images": min(gradient_images, len(order)),
        "levels": levels,
        "seed": seed,
        "bins": BINS,
        "scheduler": type(run.scheduler).__name__,
        "schedule": "own" if scheduler is None else "given",
        "cosine_to": cosine_to,
        "classifier_schedule": dict(schedule_config(classifier)),
    }
    return Diagnosis(tuple(rows), verdict, tuple(found), settings)


def _checked(classifier: torch.nn.Module, data: Sequence[Item], numbers: dict[str, int]) -> int:
    """How many labels there are."""
    config = module_config(classifier)
    classes, kind = (
        config.get("num_labels"),
        config.get("problem_type") or "single_label_classification",
    )
    if kind != "single_label_classification" or not classes or classes < 2:
        raise ValueError(
            f"classifier: problem_type={kind!r}, num_labels={classes}; a single-label classifier of two "
            "labels or more can be diagnosed"
        )
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1 is allowed")
    if len(data) == 0:
        raise ValueError("data: there are no images")
    return classes


def _verdict(
    rows: list[dict[str, Any]], measured: Measured, run: SamplingRun, compared: bool
) -> Verdict:
    useful = useful_levels([row["status"] for row in rows], [row["information"] for row in rows])
    logits, label = measured.logits_and_label()
    scale, error = logit_scale(torch.stack([logits[k] for k in useful or range(len(rows))]), label)
    parts = edges([row["fraction"] for row in rows])
    return judge(
        rows,
        useful,
        parts,
        [run.ratio_at(part) for part in parts],
        scale,
        error,
        type(run.scheduler).__name__,
        compared,
    )


class Measured:
    """What the classifier said of the images so far, at each place."""

    def __init__(self, places: Sequence[Place], finite_differences: bool):
        self.places, self.low, self.high = places, float("inf"), float("-inf")
        self.finite_differences = finite_differences
        self.labels: list[torch.Tensor] = []
        self.logits: list[list[torch.Tensor]] = [[] for _ in places]
        self.gradients: list[list[dict[str, torch.Tensor]]] = [[] for _ in places]
        self.errors: list[float] = []  # of finite differences, on the first batch

    def add(
        self,
        classifier: torch.nn.Module,
        gradients: Gradients,
        x0: torch.Tensor,
        label: torch.Tensor,
        numbers: Sequence[int],
        seed: int,
        gradient_images: int,
    ) -> None:
        """Ask the classifier about a batch, as `NoiseAwareGuidance` asks it; its noise is that of (seed, number)."""
        schedule = TrainedSchedule(schedule_config(classifier))
        dtype = next(
            (p.dtype for p in classifier.parameters() if p.is_floating_point()), torch.float32
        )
        count = max(0, min(len(x0), gradient_images - sum(map(len, self.labels))))
        self.low, self.high = min(self.low, x0.amin().item()), max(self.high, x0.amax().item())
        for k, place in enumerate(self.places):
            generators = [image_generator(seed, number + k) for number in numbers]
            eps = torch.stack([torch.randn(x0.shape[1:], generator=one) for one in generators]).to(
                x0
            )
            level = place.level
            z = (level.alpha * x0 + level.sigma * eps) / (level.alpha**2 + level.sigma**2) ** 0.5
            self.logits[k].append(
                logits_of(classifier(z.to(dtype), schedule.timestep(level))).cpu().double()
            )
            if count:
                given = x0[:count], eps[:count], label[:count], place
                self.gradients[k].append(gradients(*given, generators[:count]))
            if self.finite_differences and not self.labels:
                self.errors.append(gradients.difference_error(*given, generators[0]))
        self.labels.append(label.cpu())

    def logits_and_label(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(L, N, K) and (N,)."""
        return torch.stack([torch.cat(one) for one in self.logits]), torch.cat(self.labels)

    def rows(
        self, log_prior: torch.Tensor, schedule: TrainedSchedule, seed: int, compared: bool
    ) -> list[dict[str, Any]]:
        """The figures, a row a place; `compared`: the cosine is to a reference.

        Raises:
            FloatingPointError: for logits that are NaN or infinite.
        """
        logits, label = self.logits_and_label()
        if not logits.isfinite().all():
            raise FloatingPointError(
                "the classifier's logits are not finite; load it in float32, or train it anew"
            )
        rows = []
        for k, place in enumerate(self.places):
            row = {
                "fraction": place.fraction,
                "timestep": place.timestep,
                "sigma_over_alpha": place.ratio,
                "classifier_timestep": schedule.timestep(place.level),
                "beyond": schedule.extrapolation_scale(place.level) < 1,
                **level_figures(logits[k], label, log_prior, image_generator(seed, k)),
                **_gradient_figures(self.gradients[k]),
            }
            if self.finite_differences:
                row["finite_difference_error"] = self.errors[k]
            rows.append({**row, "status": status(row, compared)})
        return rows


def _gradient_figures(batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    row: dict[str, float] = {}
    for name in ("gradient_norm", "cosine"):
        row[name], row[f"{name}_error"] = mean_and_error(joined[name])
    if "_with_itself" in joined:
        row["reference_scale"] = float(
            joined["_with_reference"].sum() / joined["_with_itself"].sum().clamp(min=1e-300)
        )
    return row


def _log_prior(data: Sequence[Item], classes: int) -> torch.Tensor:
    """(K,) of all labels' frequencies, without reading the images where that is possible.

    Raises:
        ValueError: for a label that the classifier doesn't have.
    """
    read = getattr(data, "label", None) or (lambda i: int(data[i]["label"]))
    count = Counter(read(i) for i in range(len(data)))
    if wrong := sorted(i for i in count if not 0 <= i < classes):
        raise ValueError(
            f"dataset: labels {wrong[:10]} are unknown to the classifier; ids 0 to {classes - 1} are "
            "allowed"
        )
    share = torch.tensor([count[i] for i in range(classes)], dtype=torch.float64) / len(data)
    return share.log()


def mismatches(
    classifier: torch.nn.Module,
    unet: torch.nn.Module | None,
    vae: torch.nn.Module | None,
    run: SamplingRun,
    shape: tuple[int, ...],
) -> list[str]:
    """What the configs of classifier, network and data don't agree on.

    Args:
        shape: (C, H, W) of the data's images.

    Raises:
        ValueError: where the classifier can't read the images at all.
    """
    found, (mine, other) = [], (module_config(classifier), module_config(unet))
    channels = mine.get("in_channels")
    if vae is None and channels not in (None, shape[0]):
        raise ValueError(
            f"dataset: its images have {shape[0]} channels, the classifier's {channels}"
        )
    for name, value in (("sample_size", "size"), ("in_channels", "number of channels")):
        if None not in (mine.get(name), other.get(name)) and _pair(mine[name]) != _pair(
            other[name]
        ):
            found.append(f"the classifier's {value} is {mine[name]}, the network's {other[name]}")
    embeddings, labels = other.get("num_class_embeds"), mine.get("num_labels")
    if embeddings and labels and embeddings not in (labels, labels + 1):
        found.append(
            f"the classifier has {labels} labels, the network {embeddings} class embeddings"
        )
    last, begin = (
        float(TrainedSchedule(schedule_config(classifier)).log_ratio[-1]),
        run.noise_levels[0],
    )
    if begin.sigma / begin.alpha > 1.01 * torch.tensor(last).exp().item():
        if (
            begin.sigma / begin.alpha < 1e4 or last < 2
        ):  # a zero terminal SNR has no noise level to train on
            found.append(
                f"the classifier was trained up to sigma/alpha {torch.tensor(last).exp():.3g}, and the run "
                f"begins at {begin.sigma / begin.alpha:.3g}; there it is asked at its noisiest level"
            )
    return found


def _pair(size: Any) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def range_mismatch(low: float, high: float) -> list[str]:
    """What to say of images whose values run from `low` to `high`."""
    if low < -1.001 or high > 1.001:
        return [f"the images' values run from {low:.3g} to {high:.3g}, beyond [-1, 1]"]
    if high - low < 1.5:
        hint = "; they look like [0, 1], x -> 2 x - 1 mends that" if low >= 0 else ""
        return [
            f"the images' values run from {low:.3g} to {high:.3g} and don't cover [-1, 1]{hint}"
        ]
    return []


def inspect(
    model: str | Path,
    dataset: str,
    unet: str | Path | None = None,
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Diagnosis:
    """`diagnose` a saved classifier.

    Args:
        model: a classifier's folder or Hub id, a pipeline's with a classifier, or a bundled name. A pipeline's network
            is the one to be guided, unless there is another `unet`.
        dataset: a Hub name, an image folder or a folder of Parquet files.
        unet: the pipeline of the network to be guided: a folder, a Hub id or a bundled name.
        split, image_column, label_column: of the dataset; by default validation or test, and the first that fit.
        options: of `diagnose`.

    Raises:
        ValueError: for a model without a classifier, a split that isn't there, labels that don't fit, and as
            `diagnose`.
        OSError: for files that are missing or broken.
    """
    classifier, pipeline = load(model)
    pipeline = load_pipeline(unet) if unet is not None else pipeline
    vae = None if pipeline is None else pipeline.vae
    config, mine = module_config(vae), module_config(classifier)
    size = _pair(mine["sample_size"])
    if size[0] != size[1]:
        raise ValueError(
            f"model: its images are {size[0]} by {size[1]}; only square ones can be inspected"
        )
    resolution = (
        size[0] * 2 ** (len(config["block_out_channels"]) - 1) if vae is not None else size[0]
    )
    channels = mine["in_channels"] if vae is None else config["in_channels"]
    data, split = held_out(dataset, split, image_column, label_column, resolution, channels)
    data, notes = named_alike(data, mine.get("id2label"))
    if split == "train":
        notes.append(
            "the split is 'train': images that the classifier may know say nothing of others"
        )
    for module in (classifier, *(() if pipeline is None else (pipeline.unet, vae))):
        if module is not None:
            module.to(device)
    found = diagnose(
        classifier,
        data,
        None if pipeline is None else pipeline.scheduler,
        unet=None if pipeline is None else pipeline.unet,
        vae=vae,
        **options,
    )
    settings = {
        **found.settings,
        "model": str(model),
        "dataset": str(dataset),
        "split": split,
        "unet": None if unet is None else str(unet),
    }
    return Diagnosis(found.levels, found.verdict, (*notes, *found.mismatches), settings)
