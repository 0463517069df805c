# /// script
# requires-python = ">=3.10"
# dependencies = ["guided-diffusers", "datasets", "matplotlib"]
# [tool.uv.sources]
# guided-diffusers = { path = "../.." }
# ///
"""Measure the emoji models, and draw what they make.

    python examples/emoji/report.py --model out/emoji/bundle --data data/emoji \\
        --output out/emoji/report                       # the table and the pictures
    python examples/emoji/report.py --model out/emoji/bundle --data data/emoji \\
        --output out/emoji/sweep --parts sweep          # preset.json

`table` measures --images samples of each setting against the held-out emoji and writes table.json and
table.md: what the judge, which never guides, recognises of real held-out pictures and of samples;
Frechet distance in the judge's features; and how near samples are to training pictures, compared with
how near held-out pictures are. It draws the nearest pairs. `figures` draws a row for each category,
categories composed with vendors, and captions. `sweep` measures scales of guidance and writes the
preset that `training/bundle.py` takes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from guided_diffusers import (
    ClassifierGuidance,
    ClassifierGuidedPipeline,
    NoiseAwareClassifier,
    NoiseAwareCLIP,
    NoiseAwareCLIPGuidance,
)
from guided_diffusers.bundled import folder
from guided_diffusers.cli_options import run_program
from guided_diffusers.evaluation import DatasetImages, evaluate, load_network, open_real
from guided_diffusers.sampling import grid, sample, save_image
from guided_diffusers.utils import scheduler_for

PARTS = ("table", "figures", "sweep")
UNGUIDED = {"guidance_scale": 0.0, "classifier_free_scale": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "no label, unguided": {"conditional": False, **UNGUIDED},
    "label, unguided": UNGUIDED,
    "label, preset": {},
    "the classifier alone": {"conditional": False},
}
SWEEP = {"scheduler": "dpmsolver++", "num_inference_steps": 20}
#: of the classifier, and of classifier-free guidance, where the network gets the label
SCALES = (
    (0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (4.0, 0.0), (0.0, 1.0), (0.0, 2.0), (1.0, 1.0), (2.0, 1.0),
    (2.0, 2.0), (4.0, 2.0),
)  # fmt: skip
CLASSIFIER_SCALES = (1.0, 3.0, 6.0)  # where it doesn't
SWEPT = ("guidance_scale", "classifier_free_scale")
COMPOSED = ("Food & Drink", "Smileys & Emotion", "Animals & Nature", "Travel & Places")
CAPTIONS = (
    "country flag", "grinning face", "red heart", "blue square", "clock face", "animal mammal",
    "food fruit", "woman", "arrow", "building",
)  # fmt: skip
SHIFT = 1  # pixels, by which samples may be shifted copies


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    help = "a folder of training/bundle.py, which may lack `clip` (default: the bundled models)"
    parser.add_argument("--model", type=Path, default=folder("emoji"), help=help)
    help = "output of examples/emoji/prepare.py"
    parser.add_argument("--data", type=Path, required=True, help=help)
    parser.add_argument("--output", type=Path, required=True, help="folder of results and pictures")
    help = "what to do (default: table figures)"
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["table", "figures"], help=help
    )
    help = "images a setting (default: %(default)s)"
    parser.add_argument("--images", type=int, default=450, help=help)
    help = "images a row of a picture (default: %(default)s)"
    parser.add_argument("--columns", type=int, default=10, help=help)
    parser.add_argument("--caption-scale", type=float, default=4.0, help="(default: %(default)s)")
    parser.add_argument("--vendor-scale", type=float, default=10.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    options = parser.parse_args()
    if options.images < 30:
        parser.error(f"--images {options.images}: 30 or more are allowed")
    if options.columns < 1:
        parser.error(f"--columns {options.columns}: 1 or more is allowed")
    return options


# ---------------------------------------------------------------- samples


def make_samples(
    pipeline: ClassifierGuidedPipeline, count: int, seed: int, **call: Any
) -> DatasetImages:
    """Samples of all labels in turn, as `evaluate` takes them."""
    names = pipeline.config.id2label
    labels = [int(i) for i in names]
    items = []
    batches = sample(pipeline, labels, seed, 64, range(count), output_type="latent", **call)
    for indices, images in batches:
        for i, pixels in zip(indices, images.float().clamp(-1, 1), strict=True):
            items.append({"pixel_values": pixels, "label": labels[i % len(labels)]})
        print(f"\r  {len(items)}/{count} images", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return DatasetImages(items, {int(i): name for i, name in names.items()})


def pixels_of(images: Any) -> torch.Tensor:
    """All images, (N, C, H, W) in [-1, 1]."""
    return torch.stack([pixels for pixels, _ in images.read(0, len(images))])


def shifted(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """The images shifted by up to SHIFT pixels in each direction, the edge repeated."""
    padded = torch.nn.functional.pad(images, (SHIFT,) * 4, mode="replicate")
    height, width = images.shape[-2:]
    for top in range(2 * SHIFT + 1):
        for left in range(2 * SHIFT + 1):
            yield padded[:, :, top : top + height, left : left + width]


def nearest(images: torch.Tensor, training: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Root mean square difference to the nearest training picture, of any shift, and its index."""
    best = torch.full((len(images),), torch.inf)
    index = torch.zeros(len(images), dtype=torch.long)
    for moved in shifted(images):
        distance, which = torch.cdist(moved.flatten(1), training.flatten(1)).min(dim=1)
        index = torch.where(distance < best, which, index)
        best = torch.minimum(distance, best)
    return best / images[0].numel() ** 0.5, index


# ---------------------------------------------------------------- the table


class Report:
    """Models, data and measurements.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder = options, options.model
        self.pipeline = ClassifierGuidedPipeline.from_pretrained(self.folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.judge = load_network(self.folder / "judge")
        size = self.pipeline.unet.config.sample_size
        shape = (self.pipeline.unet.config.in_channels, size, size)
        self.held_out = open_real(str(options.data), shape, "test", label_column="category")
        self.training = open_real(str(options.data), shape, "train", label_column="category")
        self.training_pixels = pixels_of(self.training)
        self.real_distances = nearest(pixels_of(self.held_out), self.training_pixels)[0]

    def measure(self, name: str, **call: Any) -> tuple[dict[str, Any], DatasetImages]:
        """A row of the table, and its images."""
        print(name, file=sys.stderr)
        images = make_samples(self.pipeline, self.options.images, self.options.seed, **call)
        metrics = evaluate(
            images, self.held_out, self.judge, self.judge, bootstrap=100, progress=False,
            per_class=False,
        ).metrics  # fmt: skip
        distances = nearest(pixels_of(images), self.training_pixels)[0]
        return {
            "name": name,
            "agreement": metrics["top_1"]["value"],
            "judge_on_held_out": metrics["top_1"]["real"],
            "frechet": metrics["frechet_distance"]["value"],
            "nearest_median": distances.median().item(),
            "nearest_median_held_out": self.real_distances.median().item(),
            "near": self.share_near(distances),
            "call": call,
        }, images

    def share_near(self, distances: torch.Tensor) -> float:
        """Share that is nearer to a training picture than 95% of the held-out pictures are."""
        return (distances < self.real_distances.quantile(0.05)).float().mean().item()

    def table(self) -> None:
        """Write table.json, table.md and the picture of the nearest pairs."""
        rows = []
        for name, call in SETTINGS.items():
            row, images = self.measure(name, **call)
            rows.append(row)
            if name == "label, preset":
                self.draw_nearest(images)
        command = shlex.join(["python", *sys.argv])
        result = {"command": command, "images": self.options.images, "rows": rows}
        (self.options.output / "table.json").write_text(json.dumps(result, indent=2) + "\n")
        text = markdown(rows, len(self.held_out))
        (self.options.output / "table.md").write_text(text)
        print(text)

    def draw_nearest(self, images: DatasetImages) -> None:
        """The samples nearest to training pictures, above those pictures; every row from near to far."""
        samples = pixels_of(images)
        distances, index = nearest(samples, self.training_pixels)
        order = distances.argsort()[: 2 * self.options.columns]
        pictures, names = [], []
        for part in order.split(self.options.columns):
            pictures += [*samples[part], *self.training_pixels[index[part]]]
            names += ["sample", "nearest training picture"]
        save_image(grid(as_pictures(pictures), names), self.options.output / "nearest.png")

    # ------------------------------------------------------------ sweep

    def sweep(self) -> None:
        """Measure scales of guidance, and write preset.json and modes.json."""
        pipeline, steps = self.pipeline, SWEEP["num_inference_steps"]
        pipeline.scheduler = scheduler_for(pipeline.scheduler, SWEEP["scheduler"])
        rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        settings = [(True, *scales) for scales in SCALES]
        settings += [(False, scale, 0.0) for scale in CLASSIFIER_SCALES]
        for conditional, scale, free in settings:
            call = {"guidance_scale": scale, "classifier_free_scale": free}
            call |= {"conditional": conditional, "num_inference_steps": steps}
            label = "label" if conditional else "no label"
            row, _ = self.measure(f"{label}, scale {scale}, classifier-free {free}", **call)
            rows[conditional].append(row)
            print(f"  agreement {row['agreement']:.3f}, Frechet {row['frechet']:.3f}", flush=True)
        best = {conditional: best_call(part) for conditional, part in rows.items()}
        preset = {
            "scheduler": SWEEP["scheduler"],
            "defaults": {"num_inference_steps": steps, **best[True]},
            "command": shlex.join(["python", *sys.argv]),
            "rows": rows[True] + rows[False],
        }
        modes = {"classifier": {"guidance_scale": best[False]["guidance_scale"]}}
        if not best[True]["classifier_free_scale"]:
            modes["classifier_free"] = {"guidance_scale": 0.0}
        for name, content in (("preset", preset), ("modes", modes)):
            path = self.options.output / f"{name}.json"
            path.write_text(json.dumps(content, indent=2) + "\n")
        print(f"{self.options.output}/preset.json: {best}")

    # ------------------------------------------------------------ pictures

    def figures(self) -> None:
        """Draw a row a category, guided and unguided, compositions, and captions."""
        names = list(self.pipeline.config.id2label.values())
        self.draw("categories.png", names, names)
        self.draw("unguided.png", names, names, **UNGUIDED)
        self.draw_composition()
        if (self.folder / "clip").is_dir():
            self.draw_captions()
        else:
            print(f"{self.folder}: without a clip, no captions are drawn")

    def draw(
        self, file: str, rows: Sequence[str], labels: Sequence[Any], **call: Any
    ) -> torch.Tensor:
        """A picture of a row for each label; returns its pixels."""
        columns, options = self.options.columns, self.options
        per_image = [label for label in labels for _ in range(columns)]
        batches = sample(self.pipeline, per_image, options.seed, len(per_image),
                         output_type="latent", **call)  # fmt: skip
        pixels = torch.cat([images.float().clamp(-1, 1) for _, images in batches])
        save_image(grid(as_pictures(pixels), list(rows)), options.output / file)
        print(f"{options.output / file}: rows {', '.join(rows)}")
        return pixels

    def draw_composition(self) -> None:
        """Categories and vendors, each by its own classifier; the network gets no label.

        A vendor of the result is measured by that of the nearest training picture, as no classifier
        that guided should measure it.
        """
        vendor = NoiseAwareClassifier.from_pretrained(self.folder / "vendor")
        vendors = list(vendor.config.id2label.values())
        rows = [(category, name) for category in COMPOSED for name in vendors]
        per_image = [name for _, name in rows for _ in range(self.options.columns)]
        term = ClassifierGuidance(vendor, per_image, self.options.vendor_scale)
        names = [f"{category}, {name}" for category, name in rows]
        pixels = self.draw(
            "composition.png", names, [category for category, _ in rows], guidance=term,
            conditional=False,
        )  # fmt: skip
        column = open_real(
            str(self.options.data), self.training.shape, "train", label_column="vendor"
        )
        training_vendors = [vendors[label] for _, label in column.read(0, len(column))]
        index = nearest(pixels, self.training_pixels)[1].tolist()
        same = [training_vendors[i] == name for i, name in zip(index, per_image, strict=True)]
        print(f"  nearest training picture of the vendor: {sum(same)} of {len(same)}")

    def draw_captions(self) -> None:
        """A row for each caption; the network gets no label, and its classifier is off."""
        clip = NoiseAwareCLIP.from_pretrained(self.folder / "clip")
        prompts = [caption for caption in CAPTIONS for _ in range(self.options.columns)]
        term = NoiseAwareCLIPGuidance(clip, prompts, self.options.caption_scale)
        pipeline = self.pipeline
        names = pipeline.config.id2label  # by which the null label is known
        self.pipeline = ClassifierGuidedPipeline(pipeline.unet, pipeline.scheduler, id2label=names)
        self.pipeline.set_progress_bar_config(disable=True)
        steps = pipeline.config.defaults["num_inference_steps"]
        call = {"guidance": term, "conditional": False, "num_inference_steps": steps}
        self.draw("captions.png", CAPTIONS, [None] * len(CAPTIONS), **call)
        self.pipeline = pipeline


def best_call(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The smallest Frechet distance among the rows whose agreement is within 0.03 of the best."""
    least = max(row["agreement"] for row in rows) - 0.03
    best = min((row for row in rows if row["agreement"] >= least), key=lambda row: row["frechet"])
    return {name: best["call"][name] for name in SWEPT}


def as_pictures(images: Sequence[torch.Tensor]) -> list[Image.Image]:
    """Pictures of images (C, H, W) in [-1, 1]."""
    arrays = [image.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy() for image in images]
    return [Image.fromarray(array) for array in arrays]


def markdown(rows: list[dict[str, Any]], held_out: int) -> str:
    """The table."""
    real = rows[0]
    lines = [
        "| | judge agrees | Frechet distance | nearest training picture, median | nearer than 95% "
        "of held-out |",
        "|---|---:|---:|---:|---:|",
        f"| {held_out} held-out pictures | {real['judge_on_held_out']:.1%} | | "
        f"{real['nearest_median_held_out']:.3f} | 5.0% |",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['agreement']:.1%} | {row['frechet']:.2f} | "
            f"{row['nearest_median']:.3f} | {row['near']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    report = Report(options)
    for part in options.parts:
        getattr(report, part)()


if __name__ == "__main__":
    run_program(main)
