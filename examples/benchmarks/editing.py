"""Inversion, edits and anomaly maps on the bundled Fashion-MNIST models, measured on test images.

    python examples/benchmarks/editing.py --data data/fashion-mnist --output out/editing           # two hours of a core
    python examples/benchmarks/editing.py --data data/fashion-mnist --output out/small --images 20 --per-pair 2
    python examples/benchmarks/editing.py --data data/fashion-mnist --output out/editing --report examples/figures

Three parts, each with a line per setting; run it again to resume, a finished line of the same settings is kept.

round-trip: the images are inverted to noise and decoded without guidance; mean absolute error in [-1, 1].
counterfactuals: every ordered pair of four labels that look alike; images that the judge gives the first are edited to
the second (inverted, then decoded guided), or noised and denoised with the same guidance at the same strength. Flipped:
the share to which the judge gives the new label. Change: mean absolute difference in [-1, 1].
anomaly: a square of another brightness is pasted into each image; AUROC of its pixels in the map of `anomaly`, whose
label is the image's, against maps of plain reconstruction with the same network.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.bundled import folder
from guided_diffusers.editing import comparison
from guided_diffusers.files import write_json
from guided_diffusers.learning.data import LabelledImages, load_splits
from guided_diffusers.sampling import image_generator, save_image

SIMILAR = ("t-shirt", "pullover", "coat", "shirt")
PARTS = ("round-trip", "counterfactuals", "anomaly")
SQUARE = 6  # pixels of a pasted square's side


def batches(count: int, size: int, name: str) -> Iterator[slice]:
    for start in tqdm(range(0, count, size), desc=name, leave=False):
        yield slice(start, min(start + size, count))


def error(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of images in [-1, 1], (B,)."""
    return (images.clamp(-1, 1) - others.clamp(-1, 1)).abs().mean((1, 2, 3))


def auroc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Area under the receiver operating characteristic of pixels, by ranks (mean ranks of ties)."""
    _, inverse, counts = scores.flatten().unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()
    positive = positive.flatten()
    n, m = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def round_trip(
    pipeline: ClassifierGuidedPipeline,
    images: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    with_label: bool,
    size: int,
) -> dict[str, Any]:
    errors = []
    for part in batches(len(images), size, f"round trip, {steps} steps"):
        call = {"strength": 1.0, "num_inference_steps": steps, "output_type": "latent"}
        known = {"label": labels[part], "source_label": labels[part]} if with_label else {}
        output = pipeline.edit(images[part], **known, **call, guidance_scale=0.0 if known else None)
        errors.append(error(output.images, images[part]))
    errors = torch.cat(errors)
    return {
        "images": len(images),
        "mean_absolute_error": errors.mean().item(),
        "largest": errors.max().item(),
    }


def counterfactual(
    pipeline: ClassifierGuidedPipeline,
    pairs: list[tuple[torch.Tensor, int, int]],
    judge: Callable[[torch.Tensor], torch.Tensor],
    method: str,
    strength: float,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], torch.Tensor]:
    """The line, and the edited images, in the order of the pairs."""
    images = torch.cat([pair for pair, _, _ in pairs])
    old = torch.tensor([a for pair, a, _ in pairs for _ in pair])
    new = torch.tensor([b for pair, _, b in pairs for _ in pair])
    call = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    call |= {"strength": strength, "output_type": "latent"}
    edited = []
    for part in batches(len(images), options.batch_size, f"{method} {strength:g}"):
        if method == "edit":
            output = pipeline.edit(images[part], new[part], source_label=old[part], **call)
        else:
            generators = [image_generator(options.seed, i) for i in range(part.start, part.stop)]
            output = pipeline(new[part], image=images[part], generator=generators, **call)
        edited.append(output.images)
    edited = torch.cat(edited).clamp(-1, 1)
    flipped, change = judge(edited) == new, error(edited, images)
    line = {"images": len(images), "flipped": flipped.float().mean().item()}
    line |= {"change": change.mean().item(), "per_pair": {}}
    start = 0
    names = pipeline.config.id2label
    for pair, a, b in pairs:
        rows = slice(start, start + len(pair))
        share = flipped[rows].float().mean().item()
        line["per_pair"][f"{names[a]} -> {names[b]}"] = share, change[rows].mean().item()
        start += len(pair)
    return line, edited


def pasted(images: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images with a square each, and where it is, (B, 1, H, W); it is as far from the mean
    brightness beneath it as that allows, and within the middle of the image."""
    changed, where = images.clone(), torch.zeros_like(images, dtype=torch.bool)
    for i in range(len(images)):
        generator = image_generator(seed, i)
        top, left = torch.randint(
            7, images.shape[-1] - 7 - SQUARE, (2,), generator=generator
        ).tolist()
        rows, columns = slice(top, top + SQUARE), slice(left, left + SQUARE)
        mean = images[i, :, rows, columns].mean()
        changed[i, :, rows, columns] = 0.8 if mean < 0 else -0.8
        where[i, :, rows, columns] = True
    return changed, where


def anomaly(
    pipeline: ClassifierGuidedPipeline,
    images: torch.Tensor,
    labels: torch.Tensor,
    where: torch.Tensor,
    method: str,
    strength: float,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], torch.Tensor]:
    """The line, and the maps, (N, H, W)."""
    maps = []
    call = {"num_inference_steps": options.steps, "strength": strength}
    for part in batches(len(images), options.batch_size, f"{method} {strength:g}"):
        if method == "anomaly":
            scale = options.anomaly_scale
            output = pipeline.anomaly(images[part], labels[part], guidance_scale=scale, **call)
            maps.append(output.maps)
            continue
        if method == "round trip":
            output = pipeline.edit(images[part], output_type="latent", **call)
        else:  # noised and denoised, of the label but without the classifier
            generators = [image_generator(options.seed, i) for i in range(part.start, part.stop)]
            call |= {"guidance_scale": 0.0, "output_type": "latent", "generator": generators}
            output = pipeline(labels[part], image=images[part], **call)
        maps.append((output.images.clamp(-1, 1) - images[part]).abs().mean(1) / 2)
    maps = torch.cat(maps)
    return {"images": len(images), "auroc": auroc(maps, where[:, 0])}, maps


class Lines:
    """Results in a JSON file: a line is computed once, with what it returned beside its numbers."""

    def __init__(self, options: argparse.Namespace):
        self.path, self.folder = options.output / "editing.json", options.output
        names = ("images", "per_pair", "steps", "guidance_scale", "anomaly_scale", "seed")
        self.settings = {name: getattr(options, name) for name in names}
        self.content = json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, name: str, compute: Callable[[], Any]) -> torch.Tensor | None:
        stored = self.folder / f"{name.replace(' ', '-')}.pt"
        if self.content.get(name, {}).get("settings") != self.settings:
            result = compute()
            line, tensor = result if isinstance(result, tuple) else (result, None)
            if tensor is not None:
                torch.save(tensor, stored)
            self.content[name] = {**line, "settings": self.settings}
            write_json(self.content, self.path)
        line = self.content[name]
        numbers = {key: value for key, value in line.items() if isinstance(value, float)}
        print(
            f"{name}: {line['images']} images, "
            + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()),
            flush=True,
        )
        return torch.load(stored, weights_only=True) if stored.exists() else None


def rows(pictures: list[Any], columns: int) -> Any:
    """Pictures of one size below and beside each other."""
    width, height = (max(p.size[i] for p in pictures) for i in range(2))
    lines = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * width, lines * height), "white")
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i % columns * width, i // columns * height))
    return whole


def compared(before: torch.Tensor, after: torch.Tensor, titles: list[tuple[str, str]]) -> list[Any]:
    """Each image before, after, and the difference."""
    to_pil = ClassifierGuidedPipeline.numpy_to_pil
    numbers = [((x.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy() for x in (before, after)]
    pictures = [to_pil(x) for x in numbers]
    differences = numbers[1] - numbers[0]
    return [
        comparison(a, b, d, title)
        for a, b, d, title in zip(*pictures, differences, titles, strict=True)
    ]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--data", required=True, help="labelled dataset, for its test images")
    option("--output", type=Path, required=True, help="folder of the results")
    option("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    option(
        "--images", type=int, default=500, help="of round-trip and anomaly (default: %(default)s)"
    )
    option(
        "--per-pair", type=int, default=50, help="images a pair of labels (default: %(default)s)"
    )
    help = "of the round trip, with which its order is measured, too (default: 25 50)"
    option("--round-trip-steps", type=int, nargs="+", default=[25, 50], help=help)
    option("--steps", type=int, default=20, help="of edits and maps (default: %(default)s)")
    help = "of edits and maps (default: 0.4 0.6 0.8)"
    option("--strengths", type=float, nargs="+", default=[0.4, 0.6, 0.8], help=help)
    option("--guidance-scale", type=float, default=3.0, help="of edits (default: %(default)s)")
    option("--anomaly-scale", type=float, default=3.0, help="of maps (default: %(default)s)")
    option("--batch-size", type=int, default=50, help="(default: %(default)s)")
    option("--seed", type=int, default=0, help="(default: %(default)s)")
    option("--report", type=Path, help="folder for editing.json, edits.png and anomaly_maps.png")
    return parser.parse_args()


def make_counterfactuals(
    pipeline: ClassifierGuidedPipeline,
    images: torch.Tensor,
    labels: torch.Tensor,
    judge: Callable[[torch.Tensor], torch.Tensor],
    lines: Lines,
    options: argparse.Namespace,
) -> None:
    names = pipeline.config.id2label
    ids = [label for label, name in names.items() if name in SIMILAR]
    pairs = []
    known = {a: images[labels == a] for a in ids}
    known = {a: x[: 4 * options.per_pair] for a, x in known.items()}
    known = {a: x[judge(x) == a] for a, x in known.items()}
    for a, b in permutations(ids, 2):
        pairs.append((known[a][: options.per_pair], a, b))
    for strength in options.strengths:
        for method in ("edit", "noise-and-denoise"):
            run = (pipeline, pairs, judge, method, strength, options)
            edited = lines.add(f"{method} {strength:g}", lambda run=run: counterfactual(*run))
            if (
                method == "edit"
                and options.report
                and strength == options.strengths[len(options.strengths) // 2]
            ):
                first = [sum(len(p[0]) for p in pairs[:k]) for k in range(len(pairs))]
                before = torch.cat([p[0] for p in pairs])[first]
                titles = [(names[a], f"edited to {names[b]}") for _, a, b in pairs]
                picture = rows(compared(before, edited[first], titles), 2)
                save_image(picture, options.report / "edits.png")


def make_anomalies(
    pipeline: ClassifierGuidedPipeline,
    images: torch.Tensor,
    labels: torch.Tensor,
    lines: Lines,
    options: argparse.Namespace,
) -> None:
    changed, where = pasted(images, options.seed)
    for strength in options.strengths:
        maps = {}
        for method in ("anomaly", "round trip", "reconstruction"):
            run = (pipeline, changed, labels, where, method, strength, options)
            name = f"maps {method} {strength:g}"
            maps[method] = lines.add(name, lambda run=run: anomaly(*run))
        if options.report and strength == options.strengths[len(options.strengths) // 2]:
            picture = anomaly_picture(changed, where, maps)
            save_image(picture, options.report / "anomaly_maps.png")


def anomaly_picture(
    images: torch.Tensor, where: torch.Tensor, maps: dict[str, torch.Tensor], count: int = 8
) -> Any:
    """Rows: images, where the squares are, and the maps, each with its largest value black."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count, titles = min(count, len(images)), ["image", "pasted", *maps]
    parts = [images[:count, 0], where[:count, 0].float(), *(m[:count] for m in maps.values())]
    figure, axes = pyplot.subplots(len(parts), count, figsize=(count * 1.1, len(parts) * 1.15))
    for row, (title, part) in enumerate(zip(titles, parts, strict=True)):
        for column in range(count):
            axis = axes[row, column]
            colours = "gray" if row == 0 else "Greys" if row == 1 else "magma_r"
            axis.imshow(part[column].numpy(), cmap=colours)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row, 0].set_ylabel(title, fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.canvas.draw()
    picture = Image.frombytes("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba())
    pyplot.close(figure)
    return picture.convert("RGB")


def main() -> None:
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist")
    pipeline.set_progress_bar_config(disable=True)
    network = NoiseAwareClassifier.from_pretrained(folder("fashion-mnist") / "judge")

    @torch.no_grad()
    def judge(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(part, 0).logits.argmax(-1) for part in x.split(250)])

    test = LabelledImages(load_splits(options.data)["test"], resolution=28)
    needed = max(options.images, 60 * options.per_pair)
    items = [test[i] for i in range(min(needed, len(test)))]
    images = torch.stack([item["pixel_values"] for item in items])
    labels = torch.tensor([item["label"] for item in items])
    lines, first = Lines(options), slice(options.images)
    if "round-trip" in options.parts:
        for steps in options.round_trip_steps:
            for with_label in (False, True):
                run = (
                    pipeline,
                    images[first],
                    labels[first],
                    steps,
                    with_label,
                    options.batch_size,
                )
                name = f"round trip {steps} steps, {'its label' if with_label else 'null label'}"
                lines.add(name, lambda run=run: round_trip(*run))
    if "counterfactuals" in options.parts:
        make_counterfactuals(pipeline, images, labels, judge, lines, options)
    if "anomaly" in options.parts:
        make_anomalies(pipeline, images[first], labels[first], lines, options)
    if options.report:
        write_json(lines.content, options.report / "editing.json")


if __name__ == "__main__":
    main()
