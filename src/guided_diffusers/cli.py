"""The command-line program `guided-diffusers`."""

from __future__ import annotations

import argparse
import sys

from .cli_options import timeout_message
from .diagnosis.commands import add_inspect_command
from .evaluation.commands import add_evaluate_command
from .hub.commands import add_hub_commands
from .openai import add_convert_command
from .sampling.commands import add_sample_command
from .sweep.commands import add_sweep_command


def main(arguments: list[str] | None = None) -> None:
    """Run a command; invalid arguments and failed operations print a one-line error."""
    parser = argparse.ArgumentParser(
        "guided-diffusers", description="Guidance of diffusion sampling."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_sample_command(commands)
    add_convert_command(commands)
    add_inspect_command(commands)
    add_evaluate_command(commands)
    add_sweep_command(commands)
    add_hub_commands(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        message = timeout_message(error, "--timeout-minutes") or error
        sys.exit(f"guided-diffusers {options.command}: {message}")
