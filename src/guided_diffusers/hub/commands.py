"""`guided-diffusers assemble`, `push`, `pull` and `card`."""

from __future__ import annotations

import argparse
from typing import Any

from ..cli_options import add_part_options, add_shared_option, path
from ..text import printable

FOLDER = "a folder with a pipeline, a classifier or a CLIP"


def add_hub_commands(commands: Any) -> None:
    push = commands.add_parser(
        "push",
        help="publish a model on the Hub",
        description="Publish a folder on the Hub, with a model card and the code that loads it "
        "without this package, after checking that it loads in a clean process. The token is that "
        "of `hf auth login` or of HF_TOKEN.",
    )
    push.set_defaults(run=run_push)
    help = "a folder with a pipeline, a classifier, a CLIP or a Modular block"
    push.add_argument("folder", type=path, help=help)
    push.add_argument("repo", metavar="REPO", help="user/model; created if missing")
    push.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="whether a new repository is private (default: the account's setting)",
    )
    add_shared_option(push, "--revision", help="a branch; created if missing (default: main)")
    push.add_argument("--variant", help="of the weights, if there is no other: fp16, ...")
    push.add_argument("--commit-message", metavar="TEXT", help="message of the commit")
    help = "publish these files, too, which are no part of a model: paths, * for any characters"
    push.add_argument("--include", nargs="+", default=[], metavar="PATTERN", help=help)
    _add_card_options(push)

    card = commands.add_parser(
        "card",
        help="write a model card",
        description="Write a model card, README.md, and its pictures into a model's folder.",
    )
    card.set_defaults(run=run_card)
    card.add_argument("folder", type=path, help=FOLDER)
    card.add_argument("--repo", help="user/model that the examples load (default: the folder)")
    _add_card_options(card)

    pull = commands.add_parser(
        "pull",
        help="download a model from the Hub",
        description="Download a repository into a folder, without pickles.",
    )
    pull.set_defaults(run=run_pull)
    pull.add_argument("repo", metavar="REPO", help="user/model")
    pull.add_argument("folder", type=path, help="where to write it")
    add_shared_option(pull, "--revision", help="a branch, a tag or a commit (default: main)")


def add_assemble_command(commands: Any) -> None:
    command = commands.add_parser(
        "assemble",
        help="a pipeline from a trained network and classifier",
        description="Write a pipeline's folder from trained parts. `sample`, `inspect`, `evaluate`, "
        "`sweep` and `push` take the folder as their model; the trainings' metrics and options go "
        "along for the model card.",
    )
    command.set_defaults(run=run_assemble)
    add_part_options(command, required=True)
    option = command.add_argument
    help = "of Diffusers: ddim, ddpm, euler, ... (default: DPM-Solver++ if it fits the network)"
    option("--scheduler", metavar="NAME", help=help)
    preset = command.add_argument_group(
        "preset", "What a call of the pipeline leaves out.", argument_default=argparse.SUPPRESS
    ).add_argument
    preset("--guidance-scale", type=float, metavar="SCALE", help="of the classifier (default: 1)")
    preset("--num-inference-steps", type=int, metavar="N", help="scheduler steps (default: 50)")
    option("--output", type=path, required=True, metavar="FOLDER", help="a new or empty folder")


def run_assemble(options: argparse.Namespace) -> None:
    from ..defaults import DEFAULTS
    from . import assemble

    assemble(
        options.output,
        options.unet,
        options.classifier,
        options.vae,
        scheduler=options.scheduler,
        defaults={name: value for name, value in vars(options).items() if name in DEFAULTS},
    )
    output = printable(options.output)
    print(
        f"saved to {output}, next: guided-diffusers sample --model {output} --label all "
        "--output samples.png"
    )


def _add_card_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--license", metavar="NAME", help="of the weights, as the Hub names it: apache-2.0, ..."
    )
    command.add_argument(
        "--datasets",
        nargs="+",
        default=[],
        metavar="ID",
        help="the Hub's ids of the training data (default: from the training options)",
    )
    add_shared_option(command, "--picture", help="draw example.png if it is missing (default: yes)")


def _card_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("license", "datasets", "picture")}


def run_push(options: argparse.Namespace) -> None:
    from huggingface_hub import get_token

    from . import push

    if get_token() is None:
        raise ValueError(f"{options.repo}: a token is needed: `hf auth login`, or set HF_TOKEN")
    commit = push(
        options.folder,
        options.repo,
        private=options.private,
        revision=options.revision,
        variant=options.variant,
        commit_message=options.commit_message,
        include=options.include,
        **_card_options(options),
    )
    print(printable(f"{options.folder} is published: {commit.commit_url}"))


def run_card(options: argparse.Namespace) -> None:
    from . import card

    readme = card(options.folder, options.repo, **_card_options(options))
    print(printable(f"{readme} is written; read it before you publish"))


def run_pull(options: argparse.Namespace) -> None:
    from . import pull

    folder = pull(options.repo, options.folder, revision=options.revision)
    print(printable(f"{options.repo} is in {folder}"))
