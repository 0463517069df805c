"""Images of ImageNet classes from OpenAI's guided-diffusion files (github.com/openai/guided-diffusion has the links).

    python examples/adm_imagenet.py --unet 256x256_diffusion_uncond.pt --classifier 256x256_classifier.pt --label 207
    python examples/adm_imagenet.py --unet 64x64_diffusion.pt --classifier 64x64_classifier.pt --label 207 933 \
        --upsampler 64_256_upsampler.pt --num-images 4                           # two stages: 64x64, then 256x256
    python examples/adm_imagenet.py --unet lsun_bedroom.pt --ddim-steps 25       # 25 steps of DDIM instead of 1000

The files are converted once, to a folder beside them, and sampled as published: steps and guidance scale are part of
the converted pipeline. Labels are ImageNet's ids, 0 to 999.
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import make_image_grid

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.openai import ADMDDIMScheduler, convert_checkpoint

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--unet", type=Path, required=True)
parser.add_argument("--classifier", type=Path)
parser.add_argument("--upsampler", type=Path)
parser.add_argument("--label", type=int, nargs="+")
parser.add_argument(
    "--num-images", type=int, default=1, help="of each label (default: %(default)s)"
)
parser.add_argument("--ddim-steps", type=int)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("adm.png"))
options = parser.parse_args()
if options.upsampler and not options.label:
    parser.error("--upsampler needs --label: OpenAI's up-samplers are class-conditional")


def load(file: Path, classifier: Path | None = None) -> ClassifierGuidedPipeline:
    """The pipeline of OpenAI's files, converted when they are used for the first time."""
    folder = file.with_name("-with-".join(path.stem for path in (file, classifier) if path))
    if not folder.exists():
        convert_checkpoint(file, folder, classifier)
    return ClassifierGuidedPipeline.from_pretrained(folder).to(
        "cuda" if torch.cuda.is_available() else "cpu"
    )


# 1. The small images, or the only ones
pipeline, steps = load(options.unet, options.classifier), {}
if options.ddim_steps:
    pipeline.scheduler = ADMDDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="leading", clip_sample=False
    )
    steps = {
        "num_inference_steps": options.ddim_steps,
        "clip_x0": True,
    }  # clipped before guidance, not after
generator = torch.Generator().manual_seed(options.seed)
images = pipeline(options.label, options.num_images, generator=generator, **steps).images

# 2. The large ones: an up-sampler is given the small images, and the same labels
if options.upsampler:
    labels = [label for label in options.label for _ in range(options.num_images)]
    images = load(options.upsampler)(labels, image=images, generator=generator).images

# 3. A picture, a row a label
make_image_grid(images, len(images) // options.num_images, options.num_images).save(options.output)
print(f"{len(images)} images of {images[0].width} x {images[0].height}: {options.output}")
