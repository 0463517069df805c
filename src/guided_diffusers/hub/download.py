"""`pull`: a repository of the Hub as a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download

from ..pipeline import ClassifierGuidedPipeline
from ..repository import check_index
from ..utils import check_writable
from .files import safetensors_header
from .target import check_id

SUFFIXES = ("json", "txt", "safetensors", "md", "py", "png", "jpg", "jpeg", "webp")


def pull(
    repo_id: str, folder: str | Path, *, revision: str | None = None, token: str | None = None
) -> Path:
    """Download a repository into a folder, without pickles; an interrupted download is resumed.

    Weights of an earlier `pull` that the repository no longer has are removed; all other files in
    the folder are kept.

    Raises:
        ValueError: before anything is written, for a file whose path leaves the folder, or a
            weights index in the folder, not written by `pull`, that hides the repository's weights;
            and for a model_index.json with classes that are not models.
        OSError: for a broken file of weights; the message names it.
    """
    folder = Path(folder)
    check_id(repo_id, "repo", "user/model")
    check_writable(folder, "folder", folder=True)
    info = HfApi(token=token).model_info(repo_id, revision=revision)
    names = {file.rfilename for file in info.siblings or ()}
    _check_names(repo_id, names)
    _check_hidden_weights(repo_id, folder, names)
    patterns = [f"*.{suffix}" for suffix in SUFFIXES]
    snapshot_download(
        repo_id, revision=info.sha, token=token, local_dir=folder, allow_patterns=patterns
    )
    for path, record in _weights_not_in(folder, names):
        if record.exists():
            path.unlink()
            record.unlink()
    for path in folder.rglob("*.safetensors"):
        safetensors_header(path)
    if (folder / "model_index.json").exists():
        components = ClassifierGuidedPipeline._get_signature_keys(ClassifierGuidedPipeline)[0]
        check_index(folder, components)
    return folder


def _check_names(repo_id: str, names: set[str]) -> None:
    for name in names:
        if "\\" in name or name.startswith("/") or ".." in name.split("/"):
            raise ValueError(
                f"{repo_id} has a file {name!r}, whose path leaves the folder; nothing was written"
            )


def _check_hidden_weights(repo_id: str, folder: Path, names: set[str]) -> None:
    """Refuse an index in the folder that would be loaded instead of the repository's weights."""
    for path, record in _weights_not_in(folder, names):
        index = path.relative_to(folder).as_posix()
        weights = index.removesuffix(".json").replace(".safetensors.index", "") + ".safetensors"
        if path.suffix == ".json" and weights in names and not record.exists():
            raise ValueError(
                f"{path} was not written by pull and hides {weights} of {repo_id}; nothing was "
                "written. Move it away, or pull to another folder"
            )


def _weights_not_in(folder: Path, names: set[str]) -> Iterator[tuple[Path, Path]]:
    """Weights and their indexes that the repository, with files `names`, doesn't have.

    Each comes with the path of the record that `huggingface_hub` keeps of a file that it
    downloaded.
    """
    records = folder / ".cache" / "huggingface" / "download"
    for parent in {PurePosixPath(name).parent for name in names}:
        for path in sorted((folder / parent).glob("*.safetensors*")):
            is_weights = path.suffix in (".safetensors", ".json")
            if is_weights and (parent / path.name).as_posix() not in names:
                yield path, records / parent / f"{path.name}.metadata"
