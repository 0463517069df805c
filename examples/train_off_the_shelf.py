"""Train an ordinary image classifier of `transformers`, on clean images: it has never heard of diffusion.

    python examples/train_off_the_shelf.py --data data/fashion-mnist --output out/fashion-mnist-resnet
    python examples/train_off_the_shelf.py --data data/fashion-mnist --output out/quick --images 2000 --epochs 1

The folder has the model, its image processor and `figures.json` with the accuracy on the test split.
`ImageClassifierGuidance` steers any diffusion model by it.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from guided_diffusers.learning.data import LabelledImages, load_splits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", required=True, help="a labelled data set with the splits train and test"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--size", type=int, default=48, help="what the image processor resizes to, pixels"
    )
    parser.add_argument("--images", type=int, help="of each split; all by default")
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
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16,
            hidden_sizes=[32, 64, 128],
            depths=[1, 1, 1],
            layer_type="basic",
            id2label=train.id2label,
            label2id={name: i for i, name in train.id2label.items()},
        )
    )

    def batch(images: LabelledImages, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = images.dataset[indices]
        pictures = [image.convert("RGB") for image in rows[images.image_column]]
        return processor(pictures, return_tensors="pt").pixel_values, torch.tensor(
            rows[images.label_column]
        )

    steps = options.epochs * -(-min(options.images or len(train), len(train)) // options.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=steps
    )
    progress = tqdm(total=steps)
    for _ in range(options.epochs):
        for indices in torch.randperm(len(train))[: options.images].split(options.batch_size):
            pixels, labels = batch(train, indices.tolist())
            pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(
                    model(pixels).logits.float(), labels, label_smoothing=0.05
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}")

    model.eval()
    right = []
    for indices in torch.arange(len(test))[: options.images].split(500):
        pixels, labels = batch(test, indices.tolist())
        with torch.no_grad():
            right.append(model(pixels).logits.argmax(-1) == labels)
    accuracy = torch.cat(right).float().mean().item()
    print(f"accuracy on {len(torch.cat(right))} test images: {accuracy:.2%}")
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    figures = {
        "test_accuracy": accuracy,
        "epochs": options.epochs,
        "size": options.size,
        "seed": options.seed,
    }
    (options.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
