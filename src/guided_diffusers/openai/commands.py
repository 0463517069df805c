"""`guided-diffusers convert`."""

from __future__ import annotations

import argparse
from typing import Any

from ..checks import read_json
from ..cli_options import add_shared_option, path
from ..text import printable
from .presets import PRESETS


def add_convert_command(commands: Any) -> None:
    """Add `convert` to the subparsers of the program `guided-diffusers`."""
    command = commands.add_parser(
        "convert",
        help="convert OpenAI's guided-diffusion checkpoints to a pipeline folder",
        description="Convert OpenAI's guided-diffusion checkpoints to a folder for "
        "ClassifierGuidedPipeline.from_pretrained. No code in the files is run.",
    )
    command.set_defaults(run=run_convert)
    option = command.add_argument
    option("--unet", type=path, required=True, metavar="FILE", help="UNet, .pt or .safetensors")
    option("--classifier", type=path, metavar="FILE", help="classifier file (default: none)")
    names = ", ".join(PRESETS)
    option("--preset", metavar="NAME", help=f"{names} (default: by the UNet's file name)")
    option("--config", type=path, metavar="JSON", help="the original's flags, instead of a preset")
    option("--output", type=path, required=True, metavar="FOLDER", help="folder, not yet existing")
    option(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="data type of the weights (default: the file's)",
    )
    add_shared_option(command, "--quiet", help="no progress bar")


def run_convert(options: argparse.Namespace) -> None:
    """Run the command `convert`."""
    import torch

    from .convert import convert_checkpoint

    config = None if options.config is None else read_json(options.config)
    unet, output, classifier = options.unet, options.output, options.classifier
    dtype, progress = options.dtype and getattr(torch, options.dtype), not options.quiet
    convert_checkpoint(unet, output, classifier, options.preset, config, dtype, progress)
    load_command = f"ClassifierGuidedPipeline.from_pretrained({str(output)!r})"
    print(printable(f"{output} is ready: {load_command}"))
