"""Which distance ranks settings with few images as with many? Spearman's rank correlation over 66 settings.

    python examples/benchmarks/distances.py --reference data/fashion-mnist             # half a day of one core
    python examples/benchmarks/distances.py --reference data/fashion-mnist --images 1500 --steps 3 4 5
    python examples/benchmarks/distances.py --reference data/fashion-mnist --report    # of what is measured so far

A setting is a number of steps of the pipeline's solver with classifier guidance (scales, from the beginning or from 40%
of the run on, with the label or without) or classifier-free guidance: 22 for each of --steps. Each gets --images images
of the same seeds; the features of each group of --few images are kept in the folder --output, so that a killed run goes
on. All settings have their first group before any has its second: the table is of the groups that are complete.

Each group of --few images is a small measurement. The many images that it is compared with are those of the other
groups: no image is on both sides. Frechet distance, kernel distance and sliced Wasserstein distance (MIND, in these
features) are between the generated and the real images. Columns of the table, the mean and the range over the groups:

    itself          rank correlation of the distance of few images with the same distance of many
    best third      the same over the third of the settings that has the lowest Frechet distance of many images
    Frechet         rank correlation of the distance of few images with the Frechet distance of many
    seconds         to compute the distance of few images once

and once, of all images, the correlation of each distance with the Frechet distance.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.evaluation import Network, Settings, load_network, open_real, summarise
from guided_diffusers.evaluation.metrics import (
    frechet_distance,
    kernel_distance,
    sliced_wasserstein,
)
from guided_diffusers.files import aside, file_lock, write_json
from guided_diffusers.sampling import sample, weights_hash
from guided_diffusers.sweep.run import image_shape
from guided_diffusers.text import markdown_table
from guided_diffusers.utils import load_pipeline


def frechet_distances(real: Tensor, generated: Tensor, weights: Tensor) -> Tensor:
    """`frechet_distance` of the images that each row of weights (R, N) counts, (R,)."""
    return torch.tensor([frechet_distance(real, generated[row > 0]) for row in weights])


DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "Frechet": frechet_distances,
    "kernel": kernel_distance,
    "sliced Wasserstein": sliced_wasserstein,
}
STARTS = (0.0, 0.4)
NULL_SCALES, LABEL_SCALES, FREE_SCALES = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0), (0.5, 1.0, 3.0), (0.5, 2.0)
PLAIN = {"guidance_every": 1, "guidance_tolerance": None, "guidance_stop": 1.0}


def settings_of(steps: Sequence[int]) -> dict[str, dict[str, Any]]:
    """{name: arguments of the pipeline's call}, 22 for each number of steps."""
    settings = {}
    for count in steps:
        for conditional, scales in ((False, NULL_SCALES), (True, LABEL_SCALES)):
            network = f"{count}-{'label' if conditional else 'null'}"
            call = {"num_inference_steps": count, "conditional": conditional, **PLAIN}
            settings[f"{network}-unguided"] = {**call, "guidance_scale": 0.0}
            for scale in scales:
                for start in STARTS:
                    guidance = {"guidance_scale": scale, "guidance_start": start}
                    settings[f"{network}-scale-{scale:g}-from-{start:g}"] = call | guidance
        for scale in FREE_SCALES:
            free = {"guidance_scale": 0.0, "classifier_free_scale": scale}
            settings[f"{count}-classifier-free-{scale:g}"] = call | free
    return settings


def group_features(
    pipeline: ClassifierGuidedPipeline,
    network: Network,
    call: dict[str, Any],
    indices: range,
    options: argparse.Namespace,
) -> Tensor:
    """Features (n, D) of the images of these indices, rounded to 8 bits as in a file."""
    labels, features = range(pipeline.num_labels), []
    call = call | {"output_type": "pt"}
    for _, images in sample(pipeline, labels, options.seed, options.batch_size, indices, **call):
        with torch.no_grad():
            features.append(network((images.float() * 255).round() / 127.5 - 1)[0].cpu())
    return torch.cat(features)


def measure(options: argparse.Namespace, settings: dict[str, dict[str, Any]]) -> None:
    """Write the features that the folder lacks, group by group."""
    pipeline = load_pipeline(options.model).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    network = load_network(options.features or options.model, options.device)
    check_protocol(pipeline, network, options)
    real_path = options.output / "real.safetensors"
    if not real_path.exists():
        real = open_real(options.reference, image_shape(pipeline))
        kept = Settings(max_features=len(real))
        summary = summarise(real, network, None, kept, title="real images")
        write_features(real_path, summary.sample.features)
    groups = range(options.images // options.few)
    paths = [group_path(options, name, group) for group in groups for name in settings]
    missing = sum(not path.exists() for path in paths)
    with tqdm(total=missing * options.few, unit="image") as bar:
        for group in groups:
            indices = range(group * options.few, (group + 1) * options.few)
            for name, call in settings.items():
                path = group_path(options, name, group)
                if not path.exists():
                    bar.set_description(f"{name}, group {group}")
                    write_features(path, group_features(pipeline, network, call, indices, options))
                    bar.update(options.few)


def check_protocol(
    pipeline: ClassifierGuidedPipeline, network: Network, options: argparse.Namespace
) -> None:
    """Refuse a folder with features of other models, seeds or groups."""
    protocol = {
        "weights": weights_hash(pipeline),
        "features": network.digest(),
        "reference": options.reference,
        "seed": options.seed,
        "few": options.few,
    }
    path = options.output / "protocol.json"
    if path.exists() and (kept := json.loads(path.read_text())) != protocol:
        raise SystemExit(
            f"--output {options.output}: its features are of {kept}; use another folder"
        )
    write_json(protocol, path)


def write_features(path: Path, features: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as partial:
        save_file({"features": features.contiguous()}, partial)


def read_features(path: Path) -> Tensor:
    return load_file(path)["features"]


def group_path(options: argparse.Namespace, name: str, group: int) -> Path:
    return options.output / "features" / f"{name}-group-{group}.safetensors"


def complete_groups(options: argparse.Namespace, names: Sequence[str]) -> list[int]:
    """The groups that all settings have."""
    groups = []
    for group in range(options.images // options.few):
        if all(group_path(options, name, group).exists() for name in names):
            groups.append(group)
    return groups


def report(options: argparse.Namespace, settings: dict[str, dict[str, Any]]) -> None:
    """Print the table, and write it with all distances to `distances.json` and `distances.md`."""
    names = list(settings)
    groups = complete_groups(options, names)
    if len(groups) < 2:
        raise SystemExit(f"{len(groups)} of two groups are complete; run the command again")
    real = read_features(options.output / "real.safetensors")[: options.real_images]
    values: dict[str, list[list[float]]] = {name: [] for name in DISTANCES}
    members = torch.eye(len(groups)).double().repeat_interleave(options.few, dim=1)
    weights = torch.cat([members, 1 - members, torch.ones_like(members[:1])])  # few, others, all
    for name in tqdm(names, desc="distances"):
        parts = [read_features(group_path(options, name, group)) for group in groups]
        for distance, function in DISTANCES.items():
            values[distance].append(function(real, torch.cat(parts), weights).tolist())
    seconds = {}
    for distance, function in DISTANCES.items():
        began = time.process_time()
        function(real, parts[0], weights[:1, : options.few])
        seconds[distance] = time.process_time() - began
    rows = list(table_rows(values, seconds))
    many = (len(groups) - 1) * options.few
    header = ["distance", "itself", "best third", "Frechet", "Frechet, all images", "seconds"]
    text = (
        f"{len(names)} settings, {len(groups)} groups of {options.few} images, each against the other "
        f"{many:,}; {len(real):,} real images. Mean (lowest to highest) over the groups.\n\n"
        f"{markdown_table(header, rows)}\n"
    )
    print(text)
    (options.output / "distances.md").write_text(text)
    content = {"settings": names, "groups": len(groups), "few, others, all": values}
    write_json(content, options.output / "distances.json")


def table_rows(
    values: dict[str, list[list[float]]], seconds: dict[str, float]
) -> Iterator[list[str]]:
    """A row for each distance; values are of few, of the others (each as many as groups), of all."""
    tables = {name: torch.tensor(rows) for name, rows in values.items()}
    groups = tables["Frechet"].shape[1] // 2
    frechet, all_frechet = tables["Frechet"][:, groups:-1], tables["Frechet"][:, -1]
    best = frechet.mean(1).argsort()[: len(frechet) // 3]
    for name, table in tables.items():
        few, others = table[:, :groups], table[:, groups:-1]
        yield [
            name,
            correlations(few, others),
            correlations(few[best], others[best]),
            correlations(few, frechet),
            f"{spearmanr(table[:, -1], all_frechet).statistic:.3f}",
            f"{seconds[name]:.2f}",
        ]


def correlations(a: Tensor, b: Tensor) -> str:
    """Spearman's rank correlation of each column: mean (lowest to highest)."""
    values = [spearmanr(x, y).statistic for x, y in zip(a.T, b.T, strict=True)]
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--reference", required=True, help="real images: a Hub dataset or a folder")
    option("--model", default="fashion-mnist", help="a pipeline with a classifier and class labels")
    option("--features", help="feature network, as of `guided-diffusers evaluate` (default: judge)")
    option("--images", type=int, default=5000, help="of each setting (default: %(default)s)")
    option("--few", type=int, default=500, help="images of a group (default: %(default)s)")
    option("--real-images", type=int, help="a random sample of the real images (default: all)")
    option("--steps", type=int, nargs="+", default=[5, 10, 20], help="(default: 5 10 20)")
    option("--seed", type=int, default=0)
    option("--batch-size", type=int, default=100)
    option("--device", default="cpu")
    option("--report", action="store_true", help="only print the table of what is measured")
    option("--output", type=Path, default=Path("out/distances"), help="(default: %(default)s)")
    options = parser.parse_args()
    if options.few < 10 or options.images < 2 * options.few or min(options.steps) < 1:
        parser.error(
            f"--images {options.images} --few {options.few} --steps {options.steps}: at least two groups "
            "of 10 images, and numbers of steps above 0, are allowed"
        )
    settings = settings_of(options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.report:
        with file_lock(options.output / ".lock") as owner:
            if owner is not None:
                raise SystemExit(f"--output {options.output}: another process measures there")
            measure(options, settings)
    report(options, settings)


if __name__ == "__main__":
    main()
