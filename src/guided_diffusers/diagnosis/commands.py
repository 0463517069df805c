"""`guided-diffusers inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_inspect_command(commands: Any) -> None:
    command = commands.add_parser(
        "inspect",
        help="whether a noise-aware classifier is good enough, and where",
        description="Measure a noise-aware classifier on held-out images at the noise levels of a sampling run: "
        "accuracy, cross entropy, calibration, gradients. Says between which noise levels it may guide, "
        "and how strongly; writes diagnosis.json and diagnosis.png.",
    )
    command.set_defaults(run=run_inspect)
    option = command.add_argument
    option(
        "model",
        metavar="MODEL",
        help="a classifier's folder or Hub id, a pipeline's that has a classifier, or a bundled model",
    )
    option(
        "--dataset",
        required=True,
        metavar="NAME_OR_FOLDER",
        help="labelled images: a Hub name, an image folder or a folder of Parquet files",
    )
    option(
        "--unet",
        metavar="PIPELINE",
        help="the pipeline of the network to be guided: its schedule is the run's, and where it is "
        "class-conditional with a null label, its own gradient is what the classifier's is compared with "
        "(default: the network of MODEL, where that is a pipeline)",
    )
    option(
        "--output",
        type=Path,
        default=Path("diagnosis"),
        metavar="FOLDER",
        help="where the files go (default: %(default)s)",
    )
    option(
        "--images",
        type=int,
        default=1000,
        metavar="N",
        help="at most so many (default: %(default)s)",
    )
    option(
        "--gradient-images",
        type=int,
        default=64,
        metavar="N",
        help="of these, for the gradients (default: %(default)s)",
    )
    option(
        "--levels",
        type=int,
        default=10,
        metavar="N",
        help="noise levels, evenly over the run, beside its last step (default: %(default)s)",
    )
    option("--split", help="of the dataset (default: validation or test)")
    option("--image-column", help="of the dataset (default: the first with images)")
    option("--label-column", help="of the dataset (default: the first with class ids)")
    option(
        "--seed",
        type=int,
        default=0,
        help="of the choice of images and their noise (default: %(default)s)",
    )
    option("--batch-size", type=int, default=64, help="images at once (default: %(default)s)")
    option("--device", help="cpu, cuda, mps, ... (default: the fastest there is)")
    option(
        "--picture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw the curves, which needs matplotlib (default: yes)",
    )
    option("--quiet", action="store_true", help="no progress bar")


def run_inspect(options: argparse.Namespace) -> None:
    import torch
    from diffusers.utils.logging import disable_progress_bar

    from . import inspect
    from .report import require_matplotlib

    if options.picture:
        require_matplotlib()  # before the work, not after it
    if options.quiet:
        disable_progress_bar()
    fastest = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    names = (
        "split",
        "image_column",
        "label_column",
        "images",
        "gradient_images",
        "levels",
        "seed",
        "batch_size",
    )
    found = inspect(
        options.model,
        options.dataset,
        options.unet,
        device=options.device or fastest,
        progress=not options.quiet,
        **{name: getattr(options, name) for name in names},
    )
    found.save(options.output, options.picture)
    print(f"{found}\n{options.output}")
