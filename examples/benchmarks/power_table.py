"""Linear scales, powers and populations of particles on Fashion-MNIST: same seeds, one judge, the right yardstick.

    python examples/benchmarks/power_table.py --data data/fashion-mnist --output out/powers   # an hour of a core
    python examples/benchmarks/power_table.py --data data/fashion-mnist --output out/small --images-per-label 16 \\
        --rows "linear 3" "power 3" "power 3, 16 particles"

The diffusion network gets its null label, so only the classifier steers. Agreement is how often the judge, a classifier
that never guides, recognises the label. The Frechet distances are in the judge's features: to all test images, and to
the test images weighted by what was requested: for p(x) p(y|x)^w of all labels y, image i counts

    sum over y of p(y | x_i)^w / Z_y,    Z_y = sum over i of p(y | x_i)^w

with p(y|x) of the teacher, the guiding classifier without noise. The rows "exact" are what no sampler of p(x) p(y|x)^w
can do better in: the unguided images with these weights, so p(x) is the network's, not that of the test images. Recall
is the share of 1,000 test images in the manifold of the generated ones; ancestors is the share of starting noises that
the images of a population stem from. Evaluations, of the network and of the classifier, are per image that the judge
agrees with. Run it again to resume: a finished row is kept.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.bundled import folder
from guided_diffusers.evaluation import load_network
from guided_diffusers.evaluation.metrics import precision_recall
from guided_diffusers.evaluation.metrics.frechet import gaussian_frechet_distance
from guided_diffusers.files import write_json
from guided_diffusers.learning.data import LabelledImages, load_splits
from guided_diffusers.sampling import grid, image_generator
from guided_diffusers.speed import optimize
from guided_diffusers.utils import scheduler_for

WEIGHTED = (1.0, 3.0, 8.0)
ROWS: dict[str, dict[str, Any]] = {"unguided": {"guidance_scale": 0.0}}
ROWS |= {f"linear {w:g}": {"guidance_scale": w} for w in WEIGHTED}
ROWS |= {f"power {w:g}": {"guidance_power": w} for w in WEIGHTED}
ROWS |= {
    f"power {w:g}, {k} particles": {"guidance_power": w, "particles": k}
    for w in (1.0, 3.0)
    for k in (4, 16, 64)
}


class Reference:
    """Test images: features, and log p(y | x) of the teacher, (N, K)."""

    def __init__(self, data: str, judge: Any, teacher: torch.nn.Module):
        test = LabelledImages(load_splits(data)["test"], resolution=28)
        images = torch.stack([test[i]["pixel_values"] for i in range(len(test))]).split(250)
        with torch.no_grad():
            self.features = torch.cat([judge(part)[0] for part in images]).double()
            logits = [teacher(part, 0).logits.double() for part in images]
        self.log_p = torch.cat(logits).log_softmax(dim=1)

    def distance(self, moments: tuple[Tensor, Tensor], power: float) -> float:
        """Frechet distance to p(x) p(y|x)^power of the test images; 0: to all of them."""
        weights = (power * self.log_p).softmax(dim=0).mean(dim=1)
        return gaussian_frechet_distance(*moments, *weighted_moments(self.features, weights))


def weighted_moments(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of features (N, D) with weights (N,) of sum 1."""
    mean = weights @ features
    centred = features - mean
    return mean, (weights[:, None] * centred).T @ centred


def evaluations(module: torch.nn.Module) -> list[int]:
    """A list that each call of the network appends its batch size to."""
    sizes: list[int] = []

    def record(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        sizes.append(len(args[0] if args else kwargs["sample"]))

    module.register_forward_pre_hook(record, with_kwargs=True)
    return sizes


def generate(
    pipeline: ClassifierGuidedPipeline, call: dict[str, Any], options: argparse.Namespace
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Images in [-1, 1], their labels, and what making them took."""
    labels, count = sorted(pipeline.config.id2label), options.images_per_label
    network, classifier = evaluations(pipeline.unet), evaluations(pipeline.classifier)
    start, parts, ancestors, evidence = time.process_time(), [], [], []
    for label in tqdm(labels, leave=False, disable=options.quiet):
        seeds = [label * count + i for i in range(count)]
        output = pipeline(
            label,
            count,
            conditional=False,
            num_inference_steps=options.num_inference_steps,
            generator=[image_generator(options.seed, i) for i in seeds],
            output_type="latent",
            **{"guidance_scale": 1.0, **call},
        )
        parts.append(output.images)
        if "particles" in call:
            ancestors += [len(set(row)) / len(row) for row in output.ancestors.tolist()]
            evidence += output.log_evidence.tolist()
    total = count * len(labels)
    cost = {
        "network_evaluations": sum(network) / total,
        "classifier_evaluations": sum(classifier) / total,
        "seconds": (time.process_time() - start) / total,
    }
    if ancestors:
        cost["ancestors"] = sum(ancestors) / len(ancestors)
        cost["log_evidence"] = sum(evidence) / len(evidence)
    return torch.cat(parts).clamp(-1, 1), torch.tensor(labels).repeat_interleave(count), cost


def measure(
    images: Tensor, labels: Tensor, judge: Any, reference: Reference
) -> dict[str, float | list[float]]:
    features, predicted = judged(images, judge)
    moments = features.mean(dim=0), features.T.cov()
    subset = reference.features[:: max(1, len(reference.features) // 1000)].float()
    return {
        "agreement": float((predicted == labels).float().mean()),
        "frechet_distance": reference.distance(moments, 0.0),
        "weighted_frechet_distance": [reference.distance(moments, w) for w in WEIGHTED],
        "recall": precision_recall(subset, features.float())[1],
    }


@torch.no_grad()
def judged(images: Tensor, judge: Any) -> tuple[Tensor, Tensor]:
    """The judge's features, float64, and its labels."""
    results = [judge(part) for part in images.split(250)]
    features = torch.cat([features for features, _ in results]).double()
    return features, torch.cat([logits for _, logits in results]).argmax(dim=1)


@torch.no_grad()
def exact_row(
    images: Tensor, power: float, judge: Any, teacher: torch.nn.Module, reference: Reference
) -> dict[str, Any]:
    """Unguided images, weighted by p(y|x)^power for each label y."""
    features, predicted = judged(images, judge)
    logits = torch.cat([teacher(part, 0).logits.double() for part in images.split(250)])
    weights = (power * logits.log_softmax(dim=1)).softmax(dim=0)  # a column a label, of sum 1
    agreement = weights.gather(1, predicted[:, None]).sum() / weights.shape[1]
    moments = weighted_moments(features, weights.mean(dim=1))
    return {
        "agreement": float(agreement),
        "frechet_distance": reference.distance(moments, 0.0),
        "weighted_frechet_distance": [reference.distance(moments, w) for w in WEIGHTED],
    }


def report(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    weighted = " | ".join(f"to p(y\\|x)^{w:g}" for w in WEIGHTED)
    print(
        f"| guidance | agreement | Frechet distance to the test set | {weighted} | recall | ancestors "
        "| evaluations per agreed image |"
    )
    print("|---" * 9 + "|")
    for name, row in rows.items():
        distances = " | ".join(f"{d:.2f}" for d in row["weighted_frechet_distance"])
        texts = [f"{name} | {row['agreement']:.1%} | {row['frechet_distance']:.2f} | {distances}"]
        texts.append(f"{row['recall']:.3f}" if "recall" in row else "-")
        texts.append(f"{row['ancestors']:.0%}" if "ancestors" in row else "-")
        counts = [row.get(f"{kind}_evaluations") for kind in ("network", "classifier")]
        shares = [f"{count / row['agreement']:.1f}" for count in counts if count is not None]
        print(f"| {' | '.join(texts)} | {' + '.join(shares) or '-'} |")
    write_json(rows, options.output / "table.json")
    pictures = []
    drawn = [name for name in rows if name in ROWS]
    for name in drawn:
        images = torch.load(options.output / f"{name}.pt", weights_only=True)
        step = len(images) // 10
        pictures += ClassifierGuidedPipeline.numpy_to_pil(
            ((images[::step][:10].float() + 1) / 2).permute(0, 2, 3, 1).numpy()
        )
    grid(pictures, drawn).save(options.output / "table.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--data", required=True, help="labelled dataset, for its test images")
    option("--output", type=Path, required=True, help="folder of the rows and the table")
    option("--classifier", help="that knows powers (default: the bundled one)")
    option(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="of the table"
    )
    option(
        "--images-per-label",
        type=int,
        default=128,
        help="a multiple of the particles (default: %(default)s)",
    )
    option("--scheduler", default="sde-dpmsolver++", help="a stochastic one (default: %(default)s)")
    option("--num-inference-steps", type=int, default=25, help="(default: %(default)s)")
    option("--seed", type=int, default=0, help="(default: %(default)s)")
    option("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist", defaults={})
    if options.classifier is not None:
        pipeline.classifier = NoiseAwareClassifier.from_pretrained(options.classifier)
    pipeline.scheduler = scheduler_for(pipeline.scheduler, options.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    judge = load_network(str(folder("fashion-mnist") / "judge"))
    reference = Reference(options.data, judge, pipeline.classifier)
    options.output.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for name in options.rows:
        path = options.output / f"{name}.json"
        if not path.exists():
            with optimize(pipeline, options.images_per_label * 10):
                images, labels, cost = generate(pipeline, ROWS[name], options)
            torch.save(images.half(), options.output / f"{name}.pt")
            write_json({**measure(images, labels, judge, reference), **cost}, path)
        rows[name] = json.loads(path.read_text())
        if name == "unguided":
            images = torch.load(options.output / "unguided.pt", weights_only=True).float()
            for w in WEIGHTED:
                row = exact_row(images, w, judge, pipeline.classifier, reference)
                rows[f"exact, w = {w:g}"] = row
        print(name, {key: rows[name][key] for key in ("agreement", "frechet_distance")}, flush=True)
    report(rows, options)


if __name__ == "__main__":
    main()
