"""`push` and `push_to_hub`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers.utils.logging import get_logger
from huggingface_hub import CommitInfo, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..text import printable
from ..utils import hub_time_limit
from ..weights import weight_patterns, weights_stem
from .files import is_link_out
from .model_card import is_generated, write_card
from .staging import Model, collect, collect_block, complete, is_block, refuse_card_data
from .target import check_datasets, check_target
from .verification import check

logger = get_logger(__name__)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    include: Sequence[str] = (),
    **card: Any,
) -> CommitInfo:
    """Publish a folder with a pipeline, a classifier, a CLIP or a block; the folder isn't changed.

    A README.md on the Hub that a user wrote or edited is kept, unless the folder has such a
    README.md, too.

    Args:
        repo_id: user/model; created if missing.
        private: whether a new repository is private. None: the account's default.
        token: None: the token of the login or of HF_TOKEN.
        revision: a branch; created if missing. None: main.
        subfolder: the folder in the repository. None: its root.
        variant: of the weights, if the folder has only weights of that variant.
        include: patterns of files that are no part of a model and are published, too: paths in the
            folder, with * for any characters, or folders. Pickles are never published.
        card: further arguments of `write_card`: `license`, `datasets`, `picture`.

    Raises:
        ValueError: for a folder without a model, or with files that must not be published, or
            without a token.
        OSError: for a Hub that can't be reached, or refuses.
    """
    check_target(repo_id, revision, commit_message)
    check_datasets(card.get("datasets") or ())
    api = HfApi(token=token)
    with hub_time_limit(), tempfile.TemporaryDirectory() as directory:
        stage = Path(directory) / "repository"
        model = None  # of a block
        if is_block(Path(folder)):
            _check_block_options(card | {"variant": variant})
            collect_block(Path(folder), stage, include)
            _check_access(api, repo_id)
        else:
            collect(Path(folder), stage, include)
            _check_access(api, repo_id)
            model = complete(Path(folder), stage, repo_id, variant, **card)
            check(stage, model, variant, include)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if model is not None and is_generated(Path(folder) / "README.md"):
            readme = (PurePosixPath(subfolder or "") / "README.md").as_posix()
            if api.file_exists(repo_id, readme, revision=revision):
                remote = api.hf_hub_download(
                    repo_id, readme, revision=revision, local_dir=Path(directory) / "remote"
                )
                readmes = (Path(folder) / "README.md", Path(remote))
                _keep_user_card(readmes, f"{readme} of {repo_id}", stage, model, repo_id, card)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=stage,
            path_in_repo=subfolder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload with guided-diffusers",
            delete_patterns=_replaced_weights(stage),
        )


def _check_block_options(options: dict[str, Any]) -> None:
    """Refuse what is of weights or their card."""
    if names := [name for name in ("license", "datasets", "variant") if options.get(name)]:
        raise ValueError(
            f"{', '.join(names)}: a block has no weights and no card is written for it; write its "
            "README.md"
        )


def _check_access(api: HfApi, repo_id: str) -> None:
    """Refuse a missing or invalid token, or a Hub without an answer, before the work."""
    if api.token is None and get_token() is None:
        raise ValueError("no token to publish with: use `hf auth login`, or set HF_TOKEN")
    if api.token is not False:
        try:
            api.whoami()
        except HfHubHTTPError as error:
            if error.response.status_code not in (404, 429):  # not offered, or offered too rarely
                raise
    with suppress(RepositoryNotFoundError):  # it will be created
        api.model_info(repo_id)


def push_to_hub(
    self: Model,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    safe_serialization: bool = True,
    variant: str | None = None,
    subfolder: str | None = None,
    *,
    revision: str | None = None,
    max_shard_size: int | str = "10GB",
    figures: str | Path | None = None,
    **card: Any,
) -> CommitInfo:
    """Publish the model on the Hub, as `push` publishes a folder.

    Args:
        max_shard_size: of a file of weights.
        figures: a folder whose metrics (JSON), pictures and README.md are published, too. None: the
            folder that the model was loaded from, if it was a folder.

    Raises:
        ValueError: as `push`, or for `safe_serialization=False`.
    """
    check_target(repo_id, revision, commit_message)
    check_datasets(card.get("datasets") or ())
    if figures is not None and not Path(figures).is_dir():
        raise ValueError(f"figures={str(figures)!r} is no folder")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "model"
        self.save_pretrained(
            folder,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
        )
        source = figures or self.config.get("_name_or_path")
        if source and Path(source).is_dir():
            _copy_documentation(Path(source), folder)
        return push(
            folder,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            subfolder=subfolder,
            variant=variant,
            commit_message=commit_message,
            create_pr=create_pr,
            **card,
        )


def _copy_documentation(source: Path, folder: Path) -> None:
    """Copy the metrics, the pictures and README.md of a model's folder."""
    for path in source.iterdir():
        if is_link_out(path, source) or path.name.startswith("."):
            continue
        is_new = path.suffix.lower() in (".json", ".png") and not (folder / path.name).exists()
        skipped = path.name.startswith(("samples-", "diffusion_pytorch_model"))
        if path.name == "README.md" or (is_new and not skipped):
            shutil.copy(path, folder)


def _keep_user_card(
    readmes: tuple[Path, Path],
    remote_name: str,
    stage: Path,
    model: Model,
    repo_id: str,
    card: dict[str, Any],
) -> None:
    """Keep a user-edited card on the Hub; of a generated one, reuse the license and datasets.

    Args:
        readmes: the folder's README.md, which may be missing, and the one on the Hub.

    Raises:
        ValueError: for a license or datasets in `card` beside a user's card.
    """
    if not is_generated(readmes[1]):
        refuse_card_data(remote_name, card)
        logger.warning(printable(f"{remote_name} was written or edited by a user and is kept"))
        (stage / "README.md").unlink()
        return
    license, datasets = card.get("license"), card.get("datasets")
    for path in readmes:
        if path.exists():
            data = ModelCard.load(path).data
            license = license or (data.license if data.license != "unknown" else None)
            datasets = datasets or data.datasets
    write_card(stage, model, repo_id, license, datasets or (), picture=False)


def _replaced_weights(stage: Path) -> list[str]:
    """Patterns of the files in which the repository may already have the weights in `stage`."""
    patterns = set()
    for path in stage.rglob("*.safetensors"):
        for file in weight_patterns(weights_stem(path.name)):
            patterns.add((path.parent.relative_to(stage) / file).as_posix())
    return sorted(patterns)
