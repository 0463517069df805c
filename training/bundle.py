# /// script
# requires-python = ">=3.10"
# dependencies = ["guided-diffusers"]
# [tool.uv.sources]
# guided-diffusers = { path = ".." }
# ///
"""Collect a trained denoiser, classifier, judge and noise-aware CLIP in one folder for the package.

    python training/bundle.py --unet out/fashion-mnist-unet --classifier out/recipes/plain \\
        --judge out/fashion-mnist-judge --clip out/fashion-mnist-clip \\
        --output src/guided_diffusers/bundled/fashion-mnist
    python examples/benchmarks/quality_cost.py --reference data/fashion-mnist --part preset
    python training/bundle.py --preset out/quality_cost/preset.json \\
        --modes training/configs/fashion_mnist_modes.json \\
        --output src/guided_diffusers/bundled/fashion-mnist

    python training/bundle.py --classifier out/fashion-mnist-power \\
        --output src/guided_diffusers/bundled/fashion-mnist

The first command makes the folder; the last one exchanges a part. Its scheduler is DDIM with trailing
spacing and without clipping, which would change x0 but not eps and so spoil guided samples. Judge and
CLIP are stored in half precision. `figures.json` has the held-out metrics of the training scripts,
with their options. --preset adds the scheduler and the defaults that were measured to be best, and
by --modes those for calls in which the classifier alone steers, or classifier-free guidance does.
All may be one command.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier, NoiseAwareCLIP
from guided_diffusers.cli_options import run_program
from guided_diffusers.utils import scheduler_for

LOCAL_OPTIONS = """output_dir logging_dir resume_from_checkpoint report_to progress cpu
dataloader_num_workers""".split()
PARTS = ("unet", "classifier", "judge", "clip")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    helps = dict.fromkeys(PARTS, "output of a training (default: that in --output)")
    helps["preset"] = "preset.json of examples/benchmarks/quality_cost.py"
    helps["modes"] = "JSON file: with --preset, presets of other calls, as `defaults['modes']`"
    helps["output"] = "the folder; must exist if no parts are given"
    for name, help in helps.items():
        parser.add_argument(f"--{name}", type=Path, required=name == "output", help=help)
    help = "further classifiers: each is stored in the folder NAME, in half precision"
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=FOLDER", help=help)
    help = "store the denoiser and the classifier in half precision, too"
    parser.add_argument("--half", action="store_true", help=help)
    help = "text files to copy: a card (README.md), licences of the data"
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help=help)
    options = parser.parse_args()
    for text in options.also:
        name, _, folder = text.partition("=")
        if not name.isidentifier() or name in PARTS or not folder:
            parser.error(f"--also {text}: NAME=FOLDER is allowed, with a name not of {PARTS}")
    missing = [name for name in PARTS if getattr(options, name) is None]
    if missing and not (options.output / "model_index.json").is_file():
        parser.error(f"--{', --'.join(missing)}: needed, as {options.output} holds no model")
    given = options.preset or options.also or options.text
    if len(missing) == len(PARTS) and not given:
        parser.error("trained parts, --preset, --also or --text are needed")
    if options.modes and options.preset is None:
        parser.error(f"--modes {options.modes}: only with --preset")
    return options


def training_metrics(folder: Path) -> dict[str, Any]:
    """Held-out metrics of a training, with its options."""
    options = json.loads((folder / "options.json").read_text())
    for name in LOCAL_OPTIONS:
        options.pop(name, None)
    for name, value in options.items():
        if isinstance(value, str) and Path(value).is_absolute():  # of this machine
            options[name] = Path(value).name
    return {**json.loads((folder / "metrics.json").read_text()), "options": options}


def make_pipeline(unet: Path, classifier: Path) -> ClassifierGuidedPipeline:
    """The pipeline of a trained denoiser and classifier."""
    pipeline = ClassifierGuidedPipeline.from_pretrained(unet)
    changes = {"timestep_spacing": "trailing", "clip_sample": False}
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **changes)
    model, defaults = NoiseAwareClassifier.from_pretrained(classifier), {"guidance_scale": 3.0}
    return ClassifierGuidedPipeline(pipeline.unet, scheduler, model, defaults=defaults)


def main() -> None:
    options = parse_arguments()

    # 1. The parts: trained ones, or those in --output
    folders, metrics = {}, {}
    if (options.output / "figures.json").is_file():
        metrics = json.loads((options.output / "figures.json").read_text())
    for name in PARTS:
        folders[name] = getattr(options, name) or options.output / name
        if getattr(options, name) is not None:
            metrics[name] = training_metrics(folders[name])
    if options.unet is not None:
        pipeline = make_pipeline(folders["unet"], folders["classifier"])
    else:
        classifier = NoiseAwareClassifier.from_pretrained(folders["classifier"])
        pipeline = ClassifierGuidedPipeline.from_pretrained(options.output, classifier=classifier)
    judge = NoiseAwareClassifier.from_pretrained(folders["judge"]).half()
    clip = NoiseAwareCLIP.from_pretrained(folders["clip"]).half()
    further = {}
    for path in options.output.glob("*/config.json"):
        if path.parent.name not in PARTS:
            further[path.parent.name] = NoiseAwareClassifier.from_pretrained(path.parent).half()
    for name, folder in (text.split("=", 1) for text in options.also):
        further[name] = NoiseAwareClassifier.from_pretrained(folder).half()
        metrics[name] = training_metrics(Path(folder))

    # 2. Scheduler and defaults
    if options.preset:
        preset = json.loads(options.preset.read_text())
        scheduler = scheduler_for(pipeline.scheduler, preset["scheduler"])
        usual = "classifier" if pipeline.num_class_embeds is None else "label"
        if usual == "label" and preset["defaults"].get("classifier_free_scale"):
            usual = "classifier_free"
        if preset.get("mode", usual) != usual:
            raise ValueError(
                f"--preset {options.preset}: it is for calls of the mode {preset['mode']!r}; one for "
                f"{usual!r} is allowed, and its defaults can be in the file of --modes"
            )
        modes = json.loads(options.modes.read_text()) if options.modes else None
        defaults = {**preset["defaults"], "modes": modes}
        pipeline = ClassifierGuidedPipeline(
            pipeline.unet, scheduler, pipeline.classifier, defaults=defaults
        )
        metrics["preset"] = {"rows": preset["rows"], "command": preset["command"]}

    # 3. Save
    parts = {".": pipeline, "judge": judge, "clip": clip} | further
    if options.half:
        pipeline.to(torch.float16)
    partial = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for path, part in parts.items():
        part.save_pretrained(partial / path)
    for path in partial.rglob("*.py"):  # standalone code, which the package doesn't need
        path.unlink()
    texts = [*options.output.glob("*.md"), *options.output.glob("*.txt"), *options.text]
    for path in texts:  # a new one replaces that of the same name
        shutil.copy(path, partial)
    (partial / "figures.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shutil.rmtree(options.output, ignore_errors=True)
    os.replace(partial, options.output)
    size = sum(path.stat().st_size for path in options.output.rglob("*.safetensors"))
    print(f"{options.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_program(main)
