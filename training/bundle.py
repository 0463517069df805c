"""Put a trained network, classifier, judge and noise-aware CLIP into one folder, as the package ships them.

    python training/bundle.py --unet out/fashion-mnist-unet --classifier out/recipes/plain \\
        --judge out/fashion-mnist-judge --clip out/fashion-mnist-clip \\
        --output src/guided_diffusers/bundled/fashion-mnist

Sampling is by DDIM, with the spacing that includes the last timestep, and without its clipping, which leaves eps as it
was and so spoils guided samples. Judge and CLIP are stored in half precision, to save space. `figures.json` is what the
training scripts measured on held-out images, with their options.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from diffusers import DDIMScheduler

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier, NoiseAwareCLIP

LEFT_OUT = ("output_dir", "logging_dir", "resume_from_checkpoint", "report_to", "progress", "cpu",
            "dataloader_num_workers")


def figures(folder: Path) -> dict:
    options = json.loads((folder / "options.json").read_text())
    return {**json.loads((folder / "metrics.json").read_text()),
            "options": {name: value for name, value in options.items() if name not in LEFT_OUT}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("unet", "classifier", "judge", "clip", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="the pipeline's own, where a call says none")
    options = parser.parse_args()

    network = ClassifierGuidedPipeline.from_pretrained(options.unet)
    scheduler = DDIMScheduler.from_config(network.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    classifier = NoiseAwareClassifier.from_pretrained(options.classifier)
    pipeline = ClassifierGuidedPipeline(network.unet, scheduler, classifier,
                                        defaults={"guidance_scale": options.guidance_scale})
    aside = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    pipeline.save_pretrained(aside)
    NoiseAwareClassifier.from_pretrained(options.judge).half().save_pretrained(aside / "judge")
    NoiseAwareCLIP.from_pretrained(options.clip).half().save_pretrained(aside / "clip")
    for path in aside.rglob("*.py"):  # what a repository needs for those without the package
        path.unlink()
    measured = {name: figures(getattr(options, name)) for name in ("unet", "classifier", "judge", "clip")}
    (aside / "figures.json").write_text(json.dumps(measured, indent=2) + "\n")
    shutil.rmtree(options.output, ignore_errors=True)
    os.replace(aside, options.output)
    size = sum(path.stat().st_size for path in options.output.rglob("*.safetensors"))
    print(f"{options.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
