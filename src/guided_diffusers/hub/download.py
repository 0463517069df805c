"""`pull`: a repository of the Hub as a folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from glob import escape
from pathlib import Path, PurePosixPath

from diffusers.utils.logging import get_logger
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from huggingface_hub.errors import EntryNotFoundError

from ..files import check_writable, folder_lock, write_json
from ..pipeline import ClassifierGuidedPipeline
from ..repository import check_index
from ..text import printable
from ..utils import hub_time_limit
from .files import safetensors_header
from .target import check_id

logger = get_logger(__name__)
SUFFIXES = ("json", "txt", "safetensors", "md", "py", "png", "jpg", "jpeg", "webp")
PICKLED_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")


def pull(
    repo_id: str, folder: str | Path, *, revision: str | None = None, token: str | None = None
) -> Path:
    """Download a repository into a folder, without pickles; an interrupted download is resumed.

    Files of an earlier `pull` of the same repository are updated, and its weights that the
    repository no longer has are removed, unless they were changed; no other file is overwritten.

    Raises:
        ValueError: before anything is written, for a file in the folder that would be overwritten;
            for a repository without weights in safetensors, or with a file whose path leaves the
            folder; for a weights index in the folder, not written by `pull`, that hides the
            repository's weights; and for a model_index.json with classes that are not models.
        OSError: for a broken file of weights; the message names it. For a Hub that can't be
            reached, or refuses.
    """
    folder = Path(folder)
    check_id(repo_id, "repo", "user/model")
    check_writable(folder, "folder", folder=True)
    with hub_time_limit(), folder_lock(folder):
        try:
            info = HfApi(token=token).model_info(repo_id, revision=revision)
            names = {file.rfilename for file in info.siblings or ()}
        except (TypeError, KeyError, AttributeError) as error:  # of an answer of another form
            raise OSError(f"the Hub's answer about {repo_id} can't be read: {error!r}") from error
        if info.sha is None or not all(isinstance(name, str) for name in names):
            raise OSError(f"the Hub's answer about {repo_id} has no commit, or files without names")
        _check_names(repo_id, names)
        _check_weights(repo_id, names)
        _check_hidden_weights(repo_id, folder, names)
        downloads = {name for name in names if _is_downloaded(name)}
        stale = [pair for pair in _weights_not_in(folder, names) if pair[1].exists()]
        record = PullRecord(folder, repo_id)
        replaced = downloads | {path.relative_to(folder).as_posix() for path, _ in stale}
        changed = sorted(name for name in replaced if not record.may_replace(name))
        sources = {name: hf_hub_url(repo_id, name, revision=info.sha) for name in changed}
        changed = [name for name in changed if not _is_equal(folder / name, sources[name], token)]
        if changed:
            raise ValueError(
                f"{folder} has files that are not from an earlier pull of {repo_id}, or were "
                f"changed since: {', '.join(changed)}; nothing was written. Move them away, or "
                "pull to another folder"
            )
        record.write()
        try:
            snapshot_download(
                repo_id,
                revision=info.sha,
                token=token,
                local_dir=folder,
                allow_patterns=[escape(name) for name in sorted(downloads)],
            )
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                error.errno,
                f"{folder} can't be written: {error.strerror}; make room and pull again to go on",
            ) from error
    for path, metadata in stale:
        path.unlink()
        metadata.unlink()
    record.write(downloads)
    for path in folder.rglob("*.safetensors"):
        safetensors_header(path)
    if (folder / "model_index.json").exists():
        components = ClassifierGuidedPipeline._get_signature_keys(ClassifierGuidedPipeline)[0]
        check_index(folder, components)
    return folder


class PullRecord:
    """Which repository a folder was pulled from, and the hashes of its files."""

    def __init__(self, folder: Path, repo_id: str):
        self.folder, self.repo_id = folder, repo_id
        self.path = folder / ".cache" / "guided_diffusers" / "pull.json"
        self.files: dict[str, str] = {}
        self.is_same = False
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            content = json.loads(self.path.read_text())
            self.is_same = content["repo"] == repo_id
            self.files = dict(content["files"])

    def may_replace(self, name: str) -> bool:
        """Whether the file doesn't exist, or is as an earlier pull of the repository wrote it."""
        path = self.folder / name
        parents = [parent for parent in path.parents if parent.is_relative_to(self.folder)]
        if any(os.path.lexists(parent) and not parent.is_dir() for parent in parents):
            return False
        if not path.parent.resolve().is_relative_to(self.folder.resolve()):
            return False
        if not os.path.lexists(path):
            return True
        if path.is_symlink() or not path.is_file() or not self.is_same:
            return False
        hashes = _hashes(path)
        return self.files.get(name) in hashes or self._etag(name) in hashes

    def _etag(self, name: str) -> str | None:
        """The hash that `huggingface_hub` recorded, also of files of an interrupted pull."""
        metadata = _metadata(self.folder, name)
        lines = metadata.read_text(errors="replace").splitlines() if metadata.is_file() else []
        return lines[1] if len(lines) > 1 else None

    def write(self, downloads: Collection[str] = ()) -> None:
        """Write the record, with the hashes of `downloads`."""
        files = self.files if self.is_same else {}
        files |= {name: _hashes(self.folder / name)[0] for name in sorted(downloads)}
        write_json({"repo": self.repo_id, "files": files}, self.path)


def _hashes(path: Path) -> tuple[str, str]:
    """The SHA-256 of a file, and its hash in git, which the Hub has for small files."""
    git = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        while block := file.read(2**20):
            git.update(block)
    return sha256, git.hexdigest()


def _is_equal(path: Path, url: str, token: str | None) -> bool:
    """Whether a file is the one at an address of the Hub."""
    if path.is_symlink() or not path.is_file():
        return False
    with suppress(EntryNotFoundError):  # a file that the repository no longer has
        return get_hf_file_metadata(url, token=token).etag in _hashes(path)
    return False


def _is_downloaded(name: str) -> bool:
    if PurePosixPath(name).parent.as_posix() == EVAL_RESULTS_FOLDER:
        return name.endswith(".yaml")
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and name.rpartition(".")[2] in SUFFIXES and "." in name


def _check_weights(repo_id: str, names: set[str]) -> None:
    """Refuse a repository whose only weights are pickles, or that has no file of a model."""
    pickled = sorted(
        name for name in names if PurePosixPath(name).suffix.lower() in PICKLED_WEIGHTS
    )
    safe = {str(PurePosixPath(name).parent) for name in names if name.endswith(".safetensors")}
    if pickled and not safe:
        raise ValueError(
            f"{repo_id} has only pickled weights, which can run code and aren't downloaded: "
            f"{', '.join(pickled[:5])}; a repository with weights in safetensors is needed"
        )
    if not any(map(_is_downloaded, names)):
        raise ValueError(
            f"{repo_id} has no file of a model; files that end in {', '.join(SUFFIXES)} are pulled"
        )
    missing = [name for name in pickled if str(PurePosixPath(name).parent) not in safe]
    if missing:
        logger.warning(printable(f"{repo_id}: pickles aren't downloaded: {', '.join(missing[:5])}"))


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
    for parent in {PurePosixPath(name).parent for name in names}:
        for path in sorted((folder / parent).glob("*.safetensors*")):
            is_weights = path.suffix in (".safetensors", ".json")
            if is_weights and (parent / path.name).as_posix() not in names:
                yield path, _metadata(folder, (parent / path.name).as_posix())


def _metadata(folder: Path, name: str) -> Path:
    """Where `huggingface_hub` records the hash of a file that it downloaded."""
    return folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
