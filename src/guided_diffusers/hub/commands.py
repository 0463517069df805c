"""`guided-diffusers push`, `pull` and `card`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FOLDER = "a folder with a pipeline, a classifier or a CLIP"


def add_hub_commands(commands: Any) -> None:
    push = commands.add_parser(
        "push",
        help="publish a model on the Hub",
        description="Publish a folder on the Hub with a card and the code that loads it anywhere, after it was loaded "
        "again in a clean process. The token is that of `hf auth login` or of HF_TOKEN.",
    )
    push.set_defaults(run=run_push)
    push.add_argument("folder", type=Path, help=FOLDER)
    push.add_argument("repo", metavar="REPO", help="user/model; it is made if it isn't there")
    push.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="whether a repository that is made is private (default: the account's own)",
    )
    push.add_argument("--revision", help="a branch, made if it isn't there (default: main)")
    push.add_argument("--variant", help="of the weights, where the folder has no others: fp16, ...")
    push.add_argument("--commit-message", metavar="TEXT", help="what the commit says")
    _add_card_options(push)

    card = commands.add_parser(
        "card",
        help="write a model's card",
        description="Write README.md and its pictures into a model's folder.",
    )
    card.set_defaults(run=run_card)
    card.add_argument("folder", type=Path, help=FOLDER)
    card.add_argument(
        "--repo", help="user/model, which the card's examples load (default: the folder)"
    )
    _add_card_options(card)

    pull = commands.add_parser(
        "pull",
        help="get a model from the Hub",
        description="Get a repository as a folder, without pickles.",
    )
    pull.set_defaults(run=run_pull)
    pull.add_argument("repo", metavar="REPO", help="user/model")
    pull.add_argument("folder", type=Path, help="where it goes")
    pull.add_argument("--revision", help="a branch, a tag or a commit (default: main)")


def _add_card_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--license", metavar="NAME", help="of the weights, as the Hub calls it: apache-2.0, ..."
    )
    command.add_argument(
        "--datasets",
        nargs="+",
        default=[],
        metavar="ID",
        help="the Hub's datasets that it was trained on (default: what the training's options say)",
    )
    command.add_argument(
        "--picture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw example.png where the folder has none (default: yes)",
    )


def _card_options(options: argparse.Namespace) -> dict[str, Any]:
    return {"license": options.license, "datasets": options.datasets, "picture": options.picture}


def run_push(options: argparse.Namespace) -> None:
    from . import push

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

    print(
        f"{card(options.folder, options.repo, **_card_options(options))} is written; read it before you publish"
    )


def run_pull(options: argparse.Namespace) -> None:
    from . import pull

    print(f"{options.repo} is in {pull(options.repo, options.folder, revision=options.revision)}")
