"""Publishing: a trained folder becomes a repository on the Hub that loads anywhere, and comes back.

    pipeline.push_to_hub("user/model")                 # ClassifierGuidedPipeline, NoiseAwareClassifier, NoiseAwareCLIP
    push("folder", "user/model")                       # guided-diffusers push FOLDER REPO
    pull("user/model", "folder")

Before anything is sent, the folder is put together aside (`prepare`): weights, configs, figures, the code that loads it
without this package, a card, a picture; what must not leave this machine is refused; and it is loaded again in a clean
process without this package, whose images must equal ours (`check`). All files go up in one commit, so that the remote
revision stays as it was if the upload breaks off.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers.utils.logging import get_logger

from ..classifier import NoiseAwareClassifier
from ..clip import NoiseAwareCLIP
from ..pipeline import ClassifierGuidedPipeline
from ..repository import LIBRARIES, check_index
from . import alone
from .files import check_files, safetensors_header

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

logger = get_logger(__name__)

PATIENCE = 1800  # seconds, for a model to answer in a clean process
LEFT_BEHIND = (
    ".*",
    "__pycache__",
    "checkpoint-*",
    "logs",
    "latents",
    "samples-*.png",
    "curves.png",
    "*.partial",
)  # of training
OF_THIS_MACHINE = (
    "output_dir",
    "logging_dir",
    "resume_from_checkpoint",
    "report_to",
    "progress",
    "cpu",
    "dataloader_num_workers",
    "latents_cache",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
)
Model = ClassifierGuidedPipeline | NoiseAwareClassifier | NoiseAwareCLIP
PARTS = (NoiseAwareClassifier, NoiseAwareCLIP)


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
    **card: Any,
) -> CommitInfo:
    """Publish a folder with a pipeline, a classifier or a CLIP; it is left as it is.

    A card on the Hub that a person wrote or edited stays, unless the folder has such a card of its own.

    Args:
        repo_id: user/model; it is made if it isn't there.
        private: whether a repository that is made is private. None: the account's default.
        token: None: that of the login or the environment.
        revision: a branch; made if it isn't there. None: main.
        subfolder: where in the repository it goes. None: to its root.
        variant: of the weights, where the folder holds no others.
        card: what else `write_card` takes: `license`, `datasets`, `picture`.

    Raises:
        ValueError: for a folder that is no pipeline or classifier, or may not be published; the message says why.
    """
    with tempfile.TemporaryDirectory() as aside:
        stage = Path(aside) / "repository"
        model = prepare(Path(folder), stage, repo_id, variant, **card)
        check(stage, model, variant)
        api, repo_id = _repository(repo_id, private, token, revision)
        _heed_remote_card(api, Path(folder), stage, model, repo_id, revision, subfolder, card)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=stage,
            path_in_repo=subfolder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload with guided-diffusers",
            delete_patterns=_stale(stage),
        )


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
    """Publish on the Hub, as `push` does a folder.

    Args:
        figures: a folder whose figures (JSON), pictures and README.md go along. None: the one that this was loaded
            from, where it was a folder.
        max_shard_size: of a file of weights.

    Raises:
        ValueError: as `push`, or for `safe_serialization=False`.
    """
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / "model"
        options = {"variant": variant, "max_shard_size": max_shard_size}
        self.save_pretrained(folder, safe_serialization=safe_serialization, **options)
        source = Path(figures or self.config.get("_name_or_path") or aside)
        if figures is not None and not source.is_dir():
            raise ValueError(f"figures={str(figures)!r} is no folder")
        for path in source.iterdir() if source.is_dir() else ():
            if (
                path.name == "README.md"
                or path.suffix in (".json", ".png")
                and not (folder / path.name).exists()
                and not path.name.startswith(("samples-", "diffusion_pytorch_model"))
            ):
                shutil.copy(path, folder)
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


# Classes whose files can't import this: Diffusers' own method would send what nothing has looked at.
ClassifierGuidedPipeline.push_to_hub = NoiseAwareClassifier.push_to_hub = (
    NoiseAwareCLIP.push_to_hub
) = push_to_hub


def prepare(
    folder: Path, stage: Path, repo_id: str | None, variant: str | None = None, **card: Any
) -> Model:
    """Put together in `stage` what is published of `folder`; the model in it.

    A README.md that a person wrote or edited stays as it is; the card that `write_card` made is made anew.

    Raises:
        ValueError: for a folder that is no pipeline, classifier or CLIP, or with links that leave it.
    """
    from .model_card import is_ours, write_card

    kind = model_class(folder)
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{path} is a link out of the folder and can't be published; `guided-diffusers pull` "
                "makes a folder without links of a repository"
            )
    index = (
        json.loads((folder / "model_index.json").read_text())
        if kind is ClassifierGuidedPipeline
        else {}
    )
    for name in kind._get_signature_keys(kind)[0] if index else ():
        library, cls = index.get(name) or (None, None)
        if (
            library is not None
            and library not in LIBRARIES
            and not hasattr(diffusers.pipelines, library)
        ):
            raise ValueError(
                f"{folder}: {name} is {library}.{cls}, whose code can't go along; a class of "
                f"{', '.join(LIBRARIES)} or guided_diffusers is allowed"
            )
    shutil.copytree(
        folder, stage, ignore=shutil.ignore_patterns(*LEFT_BEHIND), copy_function=_link_weights
    )
    for old in stage.glob("*.py"):  # made anew; other code stays, and is refused
        if old.name == "pipeline.py" or old.name.startswith("guided_diffusers_"):
            old.unlink()
    model = kind.from_pretrained(stage, variant=variant)
    model.save_code(stage)
    _join_figures(stage)
    if is_ours(stage / "README.md"):
        write_card(stage, model, repo_id, **card)
    elif given := sorted(name for name in ("license", "datasets") if card.get(name)):
        raise ValueError(
            f"{', '.join(given)}: {folder / 'README.md'} was written or edited by a person and stays as "
            "it is; say it there"
        )
    return model


def model_class(folder: Path) -> type[Model]:
    """What the folder holds.

    Raises:
        ValueError: if it is neither a pipeline nor a classifier nor a CLIP.
    """
    if (folder / "model_index.json").is_file():
        return ClassifierGuidedPipeline
    if (config := folder / "config.json").is_file():
        name = json.loads(config.read_text()).get("_class_name")
        for cls in PARTS:
            if name == cls.__name__:
                return cls
        raise ValueError(
            f"{folder} holds a {name}; a ClassifierGuidedPipeline, a NoiseAwareClassifier or a "
            "NoiseAwareCLIP is allowed"
        )
    raise ValueError(
        f"{folder} holds neither a pipeline (model_index.json) nor a classifier or CLIP (config.json)"
    )


def _link_weights(source: str, target: str) -> None:
    """A second name of weights, which nobody writes to; a copy of anything else."""
    if source.endswith(".safetensors"):
        try:
            return os.link(os.path.realpath(source), target)
        except OSError:
            pass
    shutil.copy(source, target)


def _join_figures(stage: Path) -> None:
    """metrics.json and options.json, as training leaves them, become figures.json, without what is of this machine."""
    metrics, options = stage / "metrics.json", stage / "options.json"
    if metrics.exists():
        figures = json.loads(metrics.read_text())
        if options.exists():
            figures["options"] = json.loads(options.read_text())
        name = {NoiseAwareClassifier: "classifier", NoiseAwareCLIP: "clip"}.get(
            model_class(stage), "unet"
        )
        known = stage / "figures.json"
        joined = {name: figures, **(json.loads(known.read_text()) if known.exists() else {})}
        known.write_text(json.dumps(joined, indent=2) + "\n")
    for path in (metrics, options):
        path.unlink(missing_ok=True)
    for path in stage.glob("figures.json"):
        figures = json.loads(path.read_text())
        for part in figures.values():
            if isinstance(part, dict) and isinstance(part.get("options"), dict):
                part["options"] = {
                    name: Path(value).name
                    if isinstance(value, str) and Path(value).is_absolute()
                    else value
                    for name, value in part["options"].items()
                    if name not in OF_THIS_MACHINE
                }
        path.write_text(json.dumps(figures, indent=2) + "\n")


def check(folder: Path, model: Model | None = None, variant: str | None = None) -> None:
    """The release gate: refuse a folder that may not be published, or says something else without this package.

    Args:
        model: that of the folder, loaded; None: it is loaded here.

    Raises:
        ValueError: naming what is wrong.
        OSError: for a broken file of weights; the message names it.
    """
    for path in folder.rglob("*.safetensors"):
        safetensors_header(path)
    model = model or model_class(folder).from_pretrained(folder, variant=variant)
    check_files(folder, model.code())
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as aside:
        output = Path(aside) / "answer.safetensors"
        clean = {
            name: value
            for name, value in os.environ.items()
            if not any(word in name for word in ("TOKEN", "SECRET", "PASSWORD", "KEY"))
        }
        clean |= {
            "HF_HOME": aside,
            "HF_MODULES_CACHE": str(Path(aside) / "modules"),
            "HF_HUB_OFFLINE": "1",
        }
        try:
            run = subprocess.run(
                [
                    sys.executable,
                    alone.__file__,
                    folder.resolve(),
                    variant or "",
                    str(torch.get_num_threads()),
                    output,
                ],
                env=clean,
                cwd=aside,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"{folder} says nothing without guided-diffusers in {PATIENCE} seconds"
            ) from error
        if run.returncode:
            raise ValueError(
                f"{folder} doesn't load without guided-diffusers: {run.stderr.strip()[-2000:]}"
            )
        theirs = load_file(output)["answer"]
    ours = alone.answer(model)
    if not torch.equal(ours, theirs):
        largest = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("nan")
        raise ValueError(
            f"{folder} says something else without guided-diffusers; the largest difference is "
            f"{largest:.3g}"
        )


def _repository(
    repo_id: str, private: bool | None, token: str | None, revision: str | None
) -> tuple[HfApi, str]:
    """A client, and the whole name of the repository; that and the branch are made if they aren't there."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api, repo_id


def _heed_remote_card(
    api: HfApi,
    folder: Path,
    stage: Path,
    model: Model,
    repo_id: str,
    revision: str | None,
    subfolder: str | None,
    card: Mapping[str, Any],
) -> None:
    """Leave a person's card on the Hub as it is; of ours, take what neither `card` nor the card in `folder` says.

    Raises:
        ValueError: for a licence or datasets given beside a person's card.
    """
    from huggingface_hub import ModelCard

    from .model_card import is_ours, write_card

    name = (PurePosixPath(subfolder or "") / "README.md").as_posix()
    if not is_ours(folder / "README.md") or not api.file_exists(repo_id, name, revision=revision):
        return
    given = {key: card[key] for key in ("license", "datasets") if card.get(key)}
    with tempfile.TemporaryDirectory() as aside:
        remote = Path(api.hf_hub_download(repo_id, name, revision=revision, local_dir=aside))
        if not is_ours(remote):
            if given:
                raise ValueError(
                    f"{', '.join(given)}: {name} of {repo_id} was written or edited by a person and stays "
                    "as it is; say it there"
                )
            logger.warning(
                f"{name} of {repo_id} was written or edited by a person and stays as it is"
            )
            return (stage / "README.md").unlink()
        known = [
            ModelCard.load(path).data for path in (folder / "README.md", remote) if path.exists()
        ]
    license = next((data.license for data in known if data.license not in (None, "unknown")), None)
    datasets = next((data.datasets for data in known if data.datasets), ())
    write_card(
        stage, model, repo_id, **{"license": license, "datasets": datasets, **given}, picture=False
    )


def _stale(stage: Path) -> list[str]:
    """Patterns of all files that the weights uploaded may have been in before."""
    patterns = set()
    for path in stage.rglob("*.safetensors"):
        stem = path.name.partition("-0")[0].removesuffix(".safetensors")
        name, _, variant = stem.partition(".")
        index = f"{name}.safetensors.index.{variant + '.' if variant else ''}json"
        where = path.parent.relative_to(stage)
        patterns |= {
            (where / one).as_posix()
            for one in (f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors", index)
        }
    return sorted(patterns)


def pull(
    repo_id: str, folder: str | Path, *, revision: str | None = None, token: str | None = None
) -> Path:
    """A repository as a folder, without pickles; broken off, it goes on where it was.

    Weights that an earlier pull brought and the repository has no more are removed; all else in the folder stays.

    Raises:
        ValueError: before anything is written, for a file whose path leaves the folder, or an index in the folder, of
            no pull, that hides the repository's weights; for a model_index.json that names classes which are no models.
        OSError: for a broken file of weights; the message names it.
    """
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi(token=token).model_info(repo_id, revision=revision)
    names = {file.rfilename for file in info.siblings or ()}
    for name in names:
        if "\\" in name or name.startswith("/") or ".." in name.split("/"):
            raise ValueError(
                f"{repo_id} has a file {name!r}, whose path leaves the folder; nothing was written"
            )
    for path, note in _older(Path(folder), names):
        weights = (
            path.relative_to(folder)
            .as_posix()
            .removesuffix(".json")
            .replace(".safetensors.index", "")
        )
        if not note.exists() and path.suffix == ".json" and f"{weights}.safetensors" in names:
            raise ValueError(
                f"{path} is of no pull, and hides {weights}.safetensors of {repo_id}; nothing was "
                "written: move it away first, or pull to another folder"
            )
    place = Path(
        snapshot_download(
            repo_id,
            revision=info.sha,
            token=token,
            local_dir=folder,
            allow_patterns=[
                f"*.{kind}"
                for kind in ("json", "txt", "safetensors", "md", "py", "png", "jpg", "jpeg", "webp")
            ],
        )
    )
    for path, note in _older(place, names):
        if note.exists():
            path.unlink()
            note.unlink()
    for path in place.rglob("*.safetensors"):
        safetensors_header(path)
    if (place / "model_index.json").exists():
        check_index(
            place, ClassifierGuidedPipeline._get_signature_keys(ClassifierGuidedPipeline)[0]
        )
    return place


def _older(place: Path, names: set[str]) -> Iterator[tuple[Path, Path]]:
    """Weights and their indexes beside those of a repository, which has them not, and the client's note of each."""
    for where in {PurePosixPath(name).parent for name in names}:
        for path in sorted((place / where).glob("*.safetensors*")):
            if (
                path.suffix in (".safetensors", ".json")
                and (where / path.name).as_posix() not in names
            ):
                yield (
                    path,
                    place / ".cache" / "huggingface" / "download" / where / f"{path.name}.metadata",
                )


def card(folder: str | Path, repo_id: str | None = None, **options: Any) -> Path:
    """Write README.md, the card of the model in a folder, and its pictures there; `options` as in `write_card`."""
    from .model_card import write_card

    folder = Path(folder)
    return write_card(folder, model_class(folder).from_pretrained(folder), repo_id, **options)


__all__: Sequence[str] = ("card", "check", "prepare", "pull", "push", "push_to_hub")
