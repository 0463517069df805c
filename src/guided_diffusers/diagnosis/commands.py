"""`guided-diffusers inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..cli_options import (
    add_pixel_options,
    add_shared_option,
    add_shared_options,
    count,
    count_or_none,
    path,
    select_device,
)


def add_inspect_command(commands: Any) -> None:
    """Add the command to the program's subparsers."""
    command = commands.add_parser(
        "inspect",
        help="measure whether, and at which noise levels, a noise-aware classifier can guide",
        description="Measure a noise-aware classifier on held-out images at the noise levels of a "
        "sampling run: accuracy, cross entropy, calibration, gradients. Recommends the noise "
        "levels and the scale to guide with; writes diagnosis.json and diagnosis.png.",
    )
    command.set_defaults(run=run_inspect)
    option = command.add_argument
    option(
        "model", metavar="MODEL", help="a classifier or pipeline: folder, Hub id or bundled name"
    )
    help = "labelled images, or arrays: a Hub name, an image folder, .npy files or Parquet files"
    option("--dataset", required=True, help=help)
    option(
        "--unet",
        metavar="PIPELINE",
        help="pipeline of the network to be guided. Its schedule is used, and if it is "
        "class-conditional with a null label, its gradient is the reference "
        "(default: MODEL, if that is a pipeline)",
    )
    help = (
        "check, by 4 populations of K particles a label, whether the labels' evidences add up to 1; "
        "samples 4 K images of each label"
    )
    option("--evidence", type=count, metavar="K", help=help)
    help = "folder to write (default: %(default)s)"
    option("--output", type=path, default=Path("diagnosis"), help=help)
    for flag, kind, default, text in (
        ("--images", count, 1000, "largest number of images to use"),
        ("--gradient-images", count_or_none, 64, "number of these to take gradients of"),
        ("--levels", count, 10, "noise levels, evenly over the run; its last step is added"),
    ):
        option(flag, type=kind, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    add_shared_options(command, "--split", "--image-column", "--label-column")
    add_pixel_options(command)
    help = "seed of the choice of images and their noise (default: %(default)s)"
    add_shared_option(command, "--seed", help=help)
    add_shared_options(command, "--batch-size", "--device", "--picture", "--quiet")


def run_inspect(options: argparse.Namespace) -> None:
    """Run the command and print the table and the verdict."""
    from diffusers.utils.logging import disable_progress_bar

    from ..files import check_writable, folder_lock
    from ..learning.pixels import pixel_options
    from ..text import printable
    from ..utils import require_matplotlib
    from . import inspect

    if options.picture:
        require_matplotlib()  # before the long computation, not after it
    for name in ("diagnosis.json", "diagnosis.png"):
        check_writable(options.output / name, "--output")
    if options.quiet:
        disable_progress_bar()
    names = ("split", "image_column", "label_column", "images", "gradient_images", "levels")
    names += ("evidence",)
    diagnosis = inspect(
        options.model,
        options.dataset,
        options.unet,
        device=select_device(options.device),
        progress=not options.quiet,
        **pixel_options(options),
        **{name: getattr(options, name) for name in (*names, "seed", "batch_size")},
    )
    with folder_lock(options.output, wait=True):
        diagnosis.save(options.output, options.picture)
    print(f"{diagnosis}\n{printable(options.output)}")
