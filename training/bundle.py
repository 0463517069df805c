"""Put a trained network, classifier, judge and noise-aware CLIP into one folder, as the package ships them.

    python training/bundle.py --unet out/fashion-mnist-unet --classifier out/recipes/plain \\
        --judge out/fashion-mnist-judge --clip out/fashion-mnist-clip \\
        --output src/guided_diffusers/bundled/fashion-mnist
    python examples/benchmarks/quality_cost.py --reference data/fashion-mnist --part preset
    python training/bundle.py --preset out/quality_cost/preset.json --output src/guided_diffusers/bundled/fashion-mnist

The first makes the folder. Sampling is by DDIM then, with the spacing that includes the last timestep, and without its
clipping, which leaves eps as it was and so spoils guided samples. Judge and CLIP are stored in half precision, to save
space. `figures.json` is what the training scripts measured on held-out images, with their options. The last gives it
the scheduler and the defaults that were measured to be best (`figures.json` says how); both in one command work, too.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier, NoiseAwareCLIP
from guided_diffusers.sweep.schedulers import scheduler_for

LEFT_OUT = (
    "output_dir",
    "logging_dir",
    "resume_from_checkpoint",
    "report_to",
    "progress",
    "cpu",
    "dataloader_num_workers",
)
PARTS = ("unet", "classifier", "judge", "clip")


def figures(folder: Path) -> dict[str, Any]:
    options = json.loads((folder / "options.json").read_text())
    return {
        **json.loads((folder / "metrics.json").read_text()),
        "options": {name: value for name, value in options.items() if name not in LEFT_OUT},
    }


def trained(folders: dict[str, Path]) -> tuple[ClassifierGuidedPipeline, dict[str, Any]]:
    """The pipeline of the trained parts, and what was measured of each."""
    network = ClassifierGuidedPipeline.from_pretrained(folders["unet"])
    scheduler = DDIMScheduler.from_config(
        network.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    classifier = NoiseAwareClassifier.from_pretrained(folders["classifier"])
    return (
        ClassifierGuidedPipeline(
            network.unet, scheduler, classifier, defaults={"guidance_scale": 3.0}
        ),
        {name: figures(folder) for name, folder in folders.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in PARTS:
        parser.add_argument(
            f"--{name}", type=Path, help="a training's output (default: that in --output)"
        )
    parser.add_argument(
        "--preset", type=Path, help="of examples/benchmarks/quality_cost.py (default: none)"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder; without trained parts, it is there"
    )
    options = parser.parse_args()

    # 1. The parts, trained or those that are there
    folders = {name: getattr(options, name) for name in PARTS}
    if any(folders.values()) and not all(folders.values()):
        parser.error(
            f"--{', --'.join(name for name in PARTS if folders[name] is None)}: all four, or none, are needed"
        )
    if not any(folders.values()) and options.preset is None:
        parser.error("the trained parts, --preset, or both are needed")
    if not any(folders.values()):
        folders = {name: options.output / name for name in PARTS}
        pipeline = ClassifierGuidedPipeline.from_pretrained(options.output)
        measured = json.loads((options.output / "figures.json").read_text())
    else:
        pipeline, measured = trained(folders)
    judge = NoiseAwareClassifier.from_pretrained(folders["judge"]).half()
    clip = NoiseAwareCLIP.from_pretrained(folders["clip"]).half()

    # 2. How it samples where a call says nothing
    if options.preset:
        preset = json.loads(options.preset.read_text())
        pipeline = ClassifierGuidedPipeline(
            pipeline.unet,
            scheduler_for(pipeline.scheduler, preset["scheduler"]),
            pipeline.classifier,
            defaults=preset["defaults"],
        )
        measured["preset"] = {"rows": preset["rows"], "command": preset["command"]}

    # 3. Aside, then into place
    aside = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    pipeline.save_pretrained(aside)
    judge.save_pretrained(aside / "judge")
    clip.save_pretrained(aside / "clip")
    for path in aside.rglob("*.py"):  # what a repository needs for those without the package
        path.unlink()
    (aside / "figures.json").write_text(json.dumps(measured, indent=2) + "\n")
    shutil.rmtree(options.output, ignore_errors=True)
    os.replace(aside, options.output)
    size = sum(path.stat().st_size for path in options.output.rglob("*.safetensors"))
    print(f"{options.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
