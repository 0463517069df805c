"""`guided-diffusers sweep`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cli_options import (
    SHARED,
    add_pixel_options,
    add_shared_option,
    count,
    count_or_none,
    fraction,
    launched_processes,
    number,
    path,
    scale,
    select_device,
)
from ..defaults import ALGORITHMS


def interval(text: str) -> tuple[float, float]:
    """The two numbers of START:STOP."""
    start, _, stop = text.partition(":")
    try:
        return fraction(start), fraction(stop)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not START:STOP, two numbers from 0 to 1 such as 0.1:0.8"
        ) from error


SCHEDULERS = "ddim, ddpm, euler, dpmsolver++, dpmsolver++3m, sde-dpmsolver++"
LISTS: dict[str, tuple[Callable[[str], Any], str, Any, str]] = {  # type, metavar, default, help
    "--scales": (scale, "SCALE", [0, 1, 2, 3, 5, 8, 10], "guidance scales; 0 (off) is included"),
    "--schedulers": (str, "NAME", None, f"{SCHEDULERS}, ..."),
    "--steps": (count, "N", None, "numbers of scheduler steps"),
    "--intervals": (interval, "START:STOP", None, "guided parts of the run, in [0, 1]; 0:1: all"),
    "--algorithms": (str, "NAME", None, f"guidance algorithms: {', '.join(ALGORITHMS)}"),
    "--every": (count, "K", [], "evaluate the classifier at every K-th step"),
    "--tolerances": (
        number(0, above=True),
        "T",
        [],
        "evaluate the classifier again when the estimated extrapolation error exceeds T, in units "
        "of x0; an alternative to --every, not combined with it",
    ),
}
NUMBERS = {
    "--learn": (
        count_or_none,
        0,
        "also fit a schedule of the guidance scale over noise levels, with so many knots, 4 for "
        "example, for each scheduler and number of steps, and measure it on other seeds, in the "
        "whole run, else with the pipeline's defaults; needs SciPy (extra `learn`); its preset is "
        "OUTPUT/learned/NAME-preset.json; 0: off",
    ),
    "--evaluations": (
        count,
        40,
        "for --learn: how often images are generated and compared, --num-images each time",
    ),
    "--num-images": (count, 1000, "images per setting, labels in turn"),
    "--bootstrap": (count_or_none, 100, "resamples for the 95%% intervals"),
    "--max-features": (
        count,
        2000,
        "images sampled for metrics that need features of single images",
    ),
}
SHARED_FLAGS = (
    "--model --revision --split --image-column --label-column --features --judge --seed "
    "--batch-size --device --timeout-minutes --conditional --quiet"
).split()
CHANGES: dict[str, dict[str, Any]] = {  # of shared options
    "--model": {
        "help": "a bundled model, a pipeline folder or a Hub id; must have a classifier "
        "(default: %(default)s)"
    },
    "--split": {"help": "split of the real images (default: validation, test or train)"},
    "--judge": {
        "help": f"{SHARED['--judge']['help']} (default: the network of --features, if it is a "
        "classifier)"
    },
    "--seed": {"help": "image i depends only on the seed and i (default: %(default)s)"},
    "--batch-size": {"default": 50},
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
    option = command.add_argument
    text = "labelled real images: a Hub dataset, an image folder or a folder of Parquet files"
    option("--reference", required=True, metavar="NAME_OR_FOLDER", help=text)
    for flag, (kind, metavar, default, text) in LISTS.items():
        shown = " ".join(map(str, default or [])) or "the model's"
        choices = ALGORITHMS if flag == "--algorithms" else None
        keywords = {"type": kind, "default": default, "metavar": metavar, "choices": choices}
        option(flag, nargs="+", help=f"{text} (default: {shown})", **keywords)
    for flag, (kind, default, text) in NUMBERS.items():
        text = f"{text} (default: %(default)s)"
        option(flag, type=kind, default=default, metavar="N", help=text)
    text = "autocast dtype of the denoiser; sampler and classifier are not affected"
    dtypes = ("float32", "bfloat16", "float16")
    option("--dtype", choices=dtypes, default="float32", help=f"{text} (default: %(default)s)")
    text = "new folder, or one with results under the same options, which the report then includes"
    folder = {"type": path, "default": Path("sweep"), "metavar": "FOLDER"}
    option("--output", **folder, help=f"{text} (default: %(default)s)")
    add_pixel_options(command)
    for flag in SHARED_FLAGS:
        add_shared_option(command, flag, **CHANGES.get(flag, {}))


def run_sweep(options: argparse.Namespace) -> None:
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_transformers_bar

    from ..evaluation import default_features, load_network
    from ..learning.pixels import pixel_options
    from ..text import printable
    from ..utils import load_pipeline, require_matplotlib
    from .run import check_output, sweep

    require_matplotlib()  # before the computation
    processes = launched_processes(options.device, options.timeout_minutes)
    main = processes is None or processes.is_main_process
    if main:
        check_output(options.output)
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
    vars(options).update(pixel_options(options))
    keywords = {
        name: getattr(options, name)
        for name, parameter in inspect.signature(sweep).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "progress"
    }
    keywords["progress"] = main and not options.quiet
    verdict = sweep(pipeline, options.reference, options.output, features, judge, **keywords)
    if main:
        print(f"{verdict}\n{printable(options.output / 'report.html')}")
    if processes is not None:
        processes.destroy_process_group()
