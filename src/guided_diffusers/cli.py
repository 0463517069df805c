"""The command-line program `guided-diffusers`."""

from __future__ import annotations

import sys
from importlib.metadata import version

from .cli_options import Parser, one_line_errors
from .demo.commands import add_demo_commands
from .diagnosis.commands import add_inspect_command
from .editing.commands import add_edit_command
from .evaluation.commands import add_evaluate_command
from .hub.commands import add_assemble_command, add_hub_commands
from .openai.commands import add_convert_command
from .sampling.commands import add_sample_command
from .sweep.commands import add_sweep_command
from .utils import hub_time_limit


def main(arguments: list[str] | None = None) -> None:
    """Run a command; invalid arguments and failed operations print a one-line error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in arguments  # before the command, or among its options
    arguments = [word for word in arguments if word != "--traceback"]
    command = next((word for word in arguments if not word.startswith("-")), "")
    with one_line_errors(f"guided-diffusers {command}".strip(), traceback=traceback):
        options = make_parser().parse_args(arguments)
        with hub_time_limit():
            options.run(options)


def make_parser() -> Parser:
    """The parser of the program and its commands."""
    parser = Parser("guided-diffusers", description="Guidance of diffusion sampling.")
    parser.add_argument(
        "--version", action="version", version=f"guided-diffusers {version('guided-diffusers')}"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_sample_command(commands)
    add_edit_command(commands)
    add_convert_command(commands)
    add_assemble_command(commands)
    add_inspect_command(commands)
    add_evaluate_command(commands)
    add_sweep_command(commands)
    add_hub_commands(commands)
    add_demo_commands(commands)
    return parser
