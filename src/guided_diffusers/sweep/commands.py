"""`guided-diffusers sweep`."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

from ..arguments import ALGORITHMS
from ..cli_options import add_shared_option, launched_processes, select_device


def interval(text: str) -> tuple[float, float]:
    """The two numbers of START:STOP."""
    start, _, stop = text.partition(":")
    try:
        return float(start), float(stop)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not START:STOP, two numbers such as 0.1:0.8"
        ) from error


OPTIONS: dict[str, dict[str, Any]] = {
    "--reference": {
        "required": True,
        "metavar": "NAME_OR_FOLDER",
        "help": "labelled real images: a Hub dataset, an image folder or a folder of Parquet files",
    },
    "--scales": {
        "type": float,
        "nargs": "+",
        "default": [0, 1, 2, 3, 5, 8, 10],
        "metavar": "SCALE",
        "help": "guidance scales; 0, no guidance, is always measured (default: 0 1 2 3 5 8 10)",
    },
    "--schedulers": {
        "nargs": "+",
        "metavar": "NAME",
        "help": "ddim, dpmsolver++, dpmsolver++3m, sde-dpmsolver++, ddpm, euler, ... "
        "(default: the model's)",
    },
    "--steps": {
        "type": int,
        "nargs": "+",
        "metavar": "N",
        "help": "numbers of scheduler steps (default: the model's)",
    },
    "--intervals": {
        "nargs": "+",
        "type": interval,
        "metavar": "START:STOP",
        "help": "guided parts of the run, fractions in [0, 1]; "
        "0:1: all of it (default: the model's)",
    },
    "--algorithms": {
        "nargs": "+",
        "choices": ALGORITHMS,
        "metavar": "NAME",
        "help": f"guidance algorithms: {', '.join(ALGORITHMS)} (default: the model's)",
    },
    "--every": {
        "type": int,
        "nargs": "+",
        "default": [],
        "metavar": "K",
        "help": "evaluate the classifier at every K-th step (default: the model's)",
    },
    "--tolerances": {
        "type": float,
        "nargs": "+",
        "default": [],
        "metavar": "T",
        "help": "evaluate the classifier again when the estimated extrapolation error exceeds T, "
        "in units of x0; an alternative to --every, not combined with it",
    },
    "--num-images": {
        "type": int,
        "default": 1000,
        "metavar": "N",
        "help": "images per setting, labels in turn (default: %(default)s)",
    },
    "--dtype": {
        "choices": ("float32", "bfloat16", "float16"),
        "default": "float32",
        "help": "autocast dtype of the denoiser; sampler and classifier are not affected "
        "(default: %(default)s)",
    },
    "--bootstrap": {
        "type": int,
        "default": 100,
        "metavar": "N",
        "help": "resamples for the 95%% intervals (default: %(default)s)",
    },
    "--max-features": {
        "type": int,
        "default": 2000,
        "metavar": "N",
        "help": "size of the sample of images for metrics that need features of single images "
        "(default: %(default)s)",
    },
    "--output": {
        "type": Path,
        "default": Path("sweep"),
        "metavar": "FOLDER",
        "help": "new folder, or one with results under the same options, which the report then "
        "includes (default: %(default)s)",
    },
}
SHARED_OPTIONS: dict[str, dict[str, Any]] = {  # with what differs from `cli_options`
    "--model": {
        "help": "a bundled model, a pipeline folder or a Hub id; must have a classifier "
        "(default: %(default)s)"
    },
    "--revision": {},
    "--split": {"help": "split of the real images (default: validation, test or train)"},
    "--image-column": {},
    "--label-column": {},
    "--features": {},
    "--judge": {
        "help": "a classifier of clean images with the same labels that was never used for "
        "guidance: as --features; `none`: no judge (default: the network of --features, if it is "
        "a classifier)"
    },
    "--seed": {"help": "image i depends only on the seed and i (default: %(default)s)"},
    "--batch-size": {"default": 50},
    "--device": {},
    "--conditional": {},
    "--quiet": {},
}


def add_sweep_command(commands: Any) -> None:
    command = commands.add_parser(
        "sweep",
        help="measure guidance over scales, schedulers and steps",
        description="Measure guidance in every combination of scales, schedulers, steps and "
        "intervals, on the same seeds, and write a report: report.html (self-contained), report.md "
        "(for a model card), plots and images. Each setting is measured once; run the command "
        "again to resume. Several processes on one folder, or those of `accelerate launch -m "
        "guided_diffusers sweep ...`, share the settings.",
    )
    command.set_defaults(run=run_sweep)
    for flag, definition in OPTIONS.items():
        command.add_argument(flag, **definition)
    for flag, changes in SHARED_OPTIONS.items():
        add_shared_option(command, flag, **changes)


def run_sweep(options: argparse.Namespace) -> None:
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_transformers_bar

    from ..evaluation import default_features, load_network
    from ..utils import load_pipeline, require_matplotlib
    from .run import sweep

    require_matplotlib()  # before the computation
    processes = launched_processes(options.device)
    main = processes is None or processes.is_main_process
    if options.quiet or not main:
        disable_progress_bar()
        disable_transformers_bar()
    device = select_device(options.device, processes)
    pipeline = load_pipeline(options.model, options.revision).to(device)
    features = load_network(options.features or default_features({"model": options.model}), device)
    judge = None
    if options.judge not in (None, "none", options.features):
        judge = load_network(options.judge, device)
    elif options.judge != "none" and features.classes is not None and not features.is_inception:
        judge = features
    keywords = {
        name: getattr(options, name)
        for name, parameter in inspect.signature(sweep).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "progress"
    }
    verdict = sweep(
        pipeline,
        options.reference,
        options.output,
        features,
        judge,
        progress=main and not options.quiet,
        **keywords,
    )
    if main:
        print(f"{verdict}\n{options.output / 'report.html'}")
    if processes is not None:
        processes.destroy_process_group()
