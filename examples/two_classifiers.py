"""Two classifiers at once: the bundled one for the label, a regressor for the brightness.

    python examples/two_classifiers.py
    python examples/two_classifiers.py --label coat --brightness -0.8 -0.4 0 --output coats.png

The regressor is trained here, in about a minute, on samples of the bundled pipeline: it predicts the mean pixel
value of x0 from the noisy x_t, and log p(brightness | x_t) is Gaussian. The two terms add up: the score is that of
p(x) p(label | x) p(brightness | x). Writes a picture, a row per brightness.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler

from guided_diffusers import ClassifierGuidance, ClassifierGuidedPipeline, NoiseAwareClassifier
from guided_diffusers.sampling import grid, image_generator, save_image


def train_regressor(images: torch.Tensor, steps: int) -> NoiseAwareClassifier:
    """Noise-aware regressor of the mean pixel value, trained on images (N, 1, H, W) in [-1, 1]."""
    torch.manual_seed(0)
    model = NoiseAwareClassifier(
        images.shape[-1],
        1,
        num_labels=1,
        problem_type="regression",
        pool="adaptive",
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
    )
    schedule, optimizer = DDPMScheduler(), torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        x0, t = images[torch.randint(len(images), (64,))], torch.randint(1000, (64,))
        outputs = model(schedule.add_noise(x0, torch.randn_like(x0), t), t).logits[:, 0]
        torch.nn.functional.mse_loss(outputs, x0.mean((1, 2, 3))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--label", default="pullover")
    parser.add_argument(
        "--brightness",
        type=float,
        nargs="+",
        default=[-0.7, -0.45, -0.2],
        help="mean pixel values, in [-1, 1]",
    )
    parser.add_argument(
        "--std",
        type=float,
        default=0.05,
        help="standard deviation of the brightness given the image (default: %(default)s)",
    )
    parser.add_argument("--images", type=int, default=8, help="per row (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, default=30)
    parser.add_argument("--training-images", type=int, default=256)
    parser.add_argument("--training-steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default="two-classifiers.png")
    options = parser.parse_args()

    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist")
    training_images = pipeline(
        list(range(10)),
        num_images_per_label=-(-options.training_images // 10),
        guidance_scale=0,
        num_inference_steps=15,
        output_type="latent",
        generator=image_generator(0, 0),
    ).images.clamp(-1, 1)
    regressor = train_regressor(training_images, options.training_steps)
    pictures = []
    for brightness in options.brightness:
        term = ClassifierGuidance(regressor, target=brightness, std=options.std)
        images = pipeline(
            [options.label] * options.images,
            num_inference_steps=options.num_inference_steps,
            guidance=term,
            generator=[image_generator(1, i) for i in range(options.images)],
            output_type="latent",
        ).images.clamp(-1, 1)
        print(
            f"target {brightness:+.2f}: mean {images.mean():+.2f}, per image "
            f"{[round(image.mean().item(), 2) for image in images]}"
        )
        pictures += pipeline.numpy_to_pil((images / 2 + 0.5).permute(0, 2, 3, 1).numpy())
    row_names = [f"{brightness:+.2f}" for brightness in options.brightness]
    save_image(grid(pictures, row_names), options.output)


if __name__ == "__main__":
    main()
