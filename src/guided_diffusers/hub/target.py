"""Checks of where a model is published: what the Hub would refuse only after the work."""

from __future__ import annotations

import re
from collections.abc import Sequence

from huggingface_hub.utils import HFValidationError, validate_repo_id

#: a branch's name that git allows, in plain characters
BRANCH = re.compile(r"(?!.*(\.\.|//|/\.|\.lock(/|$)))\w[\w./+@#-]*(?<![./])")


def check_target(repo_id: str, revision: str | None, commit_message: str | None) -> None:
    """Check the arguments of `push`.

    Raises:
        ValueError: for a repository or branch that can't have this name, or an empty message.
    """
    check_id(repo_id, "repo", "user/model")
    if revision is not None and not BRANCH.fullmatch(revision):
        raise ValueError(
            f"revision {revision!r}: a branch's name of letters, digits and -_./ is allowed"
        )
    if commit_message is not None and not commit_message.strip():
        raise ValueError(f"commit_message {commit_message!r}: a text is needed, or None")


def check_id(repo_id: str, argument: str, allowed: str) -> None:
    """Raise a ValueError for a repository that can't have this name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{argument} {repo_id!r}: {allowed} is allowed. {reason}") from error


def check_datasets(datasets: Sequence[str]) -> None:
    """Raise a ValueError for datasets that can't have these names on the Hub."""
    for name in datasets:
        check_id(name, "datasets", "the id of a dataset on the Hub")
