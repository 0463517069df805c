"""Train an image classifier of `transformers` on clean images, without anything of diffusion.

    python examples/train_off_the_shelf.py --data data/fashion-mnist --output out/fashion-mnist-resnet
    python examples/train_off_the_shelf.py --data data/fashion-mnist --output out/quick --images 2000 --epochs 1

The folder gets the model, its image processor and `figures.json` with the accuracy on the test split.
`ImageClassifierGuidance` guides any diffusion model with it.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from guided_diffusers.learning.data import LabelledImages, load_splits


class Batches:
    """Batches of a labelled dataset, prepared by an image processor."""

    def __init__(self, images: LabelledImages, processor: ViTImageProcessor):
        self.images, self.processor = images, processor

    def __call__(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (B, 3, H, W) and labels (B,) of the images at `indices`."""
        rows = self.images.dataset[indices.tolist()]
        pictures = [image.convert("RGB") for image in rows[self.images.image_column]]
        pixels = self.processor(pictures, return_tensors="pt").pixel_values
        return pixels, torch.tensor(rows[self.images.label_column])


def make_model(id2label: dict[int, str]) -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16,
            hidden_sizes=[32, 64, 128],
            depths=[1, 1, 1],
            layer_type="basic",
            id2label=id2label,
            label2id={name: i for i, name in id2label.items()},
        )
    )


def train_model(model: torch.nn.Module, batches: Batches, options: argparse.Namespace) -> None:
    size = len(batches.images)
    steps_per_epoch = math.ceil(min(options.images or size, size) / options.batch_size)
    steps = options.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=steps
    )
    progress = tqdm(total=steps)
    for _ in range(options.epochs):
        for indices in torch.randperm(size)[: options.images].split(options.batch_size):
            pixels, labels = batches(indices)
            pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(pixels).logits.float()
                loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def test_accuracy(model: torch.nn.Module, batches: Batches, count: int | None) -> float:
    """Accuracy on the first `count` images; None: on all."""
    model.eval()
    correct = []
    for indices in torch.arange(len(batches.images))[:count].split(500):
        pixels, labels = batches(indices)
        correct.append(model(pixels).logits.argmax(-1) == labels)
    return torch.cat(correct).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", required=True, help="labelled dataset with the splits train and test"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--size",
        type=int,
        default=48,
        help="pixels that the image processor resizes to (default: %(default)s)",
    )
    parser.add_argument("--images", type=int, help="images of each split to use (default: all)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    splits = load_splits(options.data)
    train, test = (LabelledImages(splits[name]) for name in ("train", "test"))
    processor = ViTImageProcessor(
        size={"height": options.size, "width": options.size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    model = make_model(train.id2label)
    train_model(model, Batches(train, processor), options)
    accuracy = test_accuracy(model, Batches(test, processor), options.images)
    print(f"accuracy on test images: {accuracy:.2%}")
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    metrics = {
        "test_accuracy": accuracy,
        "epochs": options.epochs,
        "size": options.size,
        "seed": options.seed,
    }
    (options.output / "figures.json").write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main()
