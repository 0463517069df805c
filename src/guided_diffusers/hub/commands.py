"""`guided-diffusers push`, `pull` and `card`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..cli_options import add_shared_option

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
    push.add_argument("folder", type=Path, help=FOLDER)
    push.add_argument("repo", metavar="REPO", help="user/model; created if missing")
    push.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="whether a new repository is private (default: the account's setting)",
    )
    add_shared_option(push, "--revision", help="a branch; created if missing (default: main)")
    push.add_argument("--variant", help="of the weights, if there is no other: fp16, ...")
    push.add_argument("--commit-message", metavar="TEXT", help="message of the commit")
    _add_card_options(push)

    card = commands.add_parser(
        "card",
        help="write a model card",
        description="Write a model card, README.md, and its pictures into a model's folder.",
    )
    card.set_defaults(run=run_card)
    card.add_argument("folder", type=Path, help=FOLDER)
    card.add_argument("--repo", help="user/model that the examples load (default: the folder)")
    _add_card_options(card)

    pull = commands.add_parser(
        "pull",
        help="download a model from the Hub",
        description="Download a repository into a folder, without pickles.",
    )
    pull.set_defaults(run=run_pull)
    pull.add_argument("repo", metavar="REPO", help="user/model")
    pull.add_argument("folder", type=Path, help="where to write it")
    add_shared_option(pull, "--revision", help="a branch, a tag or a commit (default: main)")


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
        **_card_options(options),
    )
    print(f"{options.folder} is published: {commit.commit_url}")


def run_card(options: argparse.Namespace) -> None:
    from . import card

    path = card(options.folder, options.repo, **_card_options(options))
    print(f"{path} is written; read it before you publish")


def run_pull(options: argparse.Namespace) -> None:
    from . import pull

    folder = pull(options.repo, options.folder, revision=options.revision)
    print(f"{options.repo} is in {folder}")
