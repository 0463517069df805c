"""Images of ImageNet classes from OpenAI's guided-diffusion checkpoints (links: github.com/openai/guided-diffusion).

    python examples/adm_imagenet.py --unet 256x256_diffusion_uncond.pt --classifier 256x256_classifier.pt --label 207
    python examples/adm_imagenet.py --unet 64x64_diffusion.pt --classifier 64x64_classifier.pt --label 207 933 \
        --upsampler 64_256_upsampler.pt --num-images 4           # two stages: 64x64, then 256x256
    python examples/adm_imagenet.py --unet lsun_bedroom.pt --ddim-steps 25       # 25 DDIM steps instead of 1000

Checkpoints are converted once, into a folder beside them. The published number of steps and guidance scale are the
preset of the converted pipeline. Labels are ImageNet class ids, 0 to 999. Writes a picture, a row per label.
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.openai import ADMDDIMScheduler, convert_checkpoint


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--unet", type=Path, required=True, help="checkpoint of the diffusion model")
    option("--classifier", type=Path, help="checkpoint of its classifier")
    option("--upsampler", type=Path, help="checkpoint of an up-sampler for the second stage")
    option("--label", type=int, nargs="+", help="ImageNet class ids")
    option("--num-images", type=int, default=1, help="images per label (default: %(default)s)")
    option("--ddim-steps", type=int, help="number of DDIM steps (default: the published sampler)")
    option("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    option("--output", type=Path, default=Path("adm.png"), help="default: %(default)s")
    options = parser.parse_args()
    if options.upsampler and not options.label:
        parser.error("--upsampler needs --label: OpenAI's up-samplers are class-conditional")
    return options


def load(file: Path, classifier: Path | None = None) -> ClassifierGuidedPipeline:
    """Pipeline of OpenAI's checkpoints, which are converted on first use."""
    name = file.stem if classifier is None else f"{file.stem}-with-{classifier.stem}"
    folder = file.with_name(name)
    if not folder.exists():
        convert_checkpoint(file, folder, classifier)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ClassifierGuidedPipeline.from_pretrained(folder).to(device)


def sample(options: argparse.Namespace, generator: torch.Generator) -> list[Image.Image]:
    """Images of the first stage."""
    pipeline, settings = load(options.unet, options.classifier), {}
    if options.ddim_steps:
        pipeline.scheduler = ADMDDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="leading", clip_sample=False
        )
        # the original clips x0 before guidance, not after it
        settings = {"num_inference_steps": options.ddim_steps, "clip_x0": True}
    return pipeline(options.label, options.num_images, generator=generator, **settings).images


def main() -> None:
    options = parse_options()
    generator = torch.Generator().manual_seed(options.seed)
    images = sample(options, generator)
    if options.upsampler:
        labels = [label for label in options.label for _ in range(options.num_images)]
        images = load(options.upsampler)(labels, image=images, generator=generator).images
    rows = len(images) // options.num_images  # one per label
    make_image_grid(images, rows, options.num_images).save(options.output)
    print(f"{len(images)} images of {images[0].width} x {images[0].height}: {options.output}")


if __name__ == "__main__":
    main()
