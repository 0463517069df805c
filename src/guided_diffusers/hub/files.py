"""Which files of a folder are published, checks of their content, and safetensors files."""

from __future__ import annotations

import json
import math
import os
import pickletools
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from huggingface_hub import get_token
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from PIL import ExifTags, Image

from ..text import printable
from ..weights import weights_stem

#: suffixes of a model's own files, in lower case; those of code are in `is_generated_code`
MODEL_SUFFIXES = set(".json .txt .md .safetensors .png .jpg .jpeg .webp".split())
PICTURE_SUFFIXES = set(".png .jpg .jpeg .webp".split())
LEGAL_FILES = ("LICENSE", "LICENCE", "NOTICE")
#: what training leaves in the folder, and is published only if a pattern includes it
TRAINING_FILES = "checkpoint-* logs latents samples-*.png samples-*.npz curves.png".split()
#: what tools leave in any folder, and is never published
TOOL_FILES = (
    ".git .gitattributes .gitignore .cache .DS_Store ._* .ipynb_checkpoints __pycache__ *.partial "
    ".*.lock"
).split()
PICKLE_SUFFIXES = set(
    ".bin .pt .pth .pt2 .pkl .p .pickle .dill .ckpt .joblib .npy .npz .msgpack .h5 .hdf5 .keras "
    ".sav .nemo .mar".split()
)
ARCHIVE_SUFFIXES = set(".zip .tar .tgz .gz .bz2 .xz .zst .lz4 .7z .rar".split())
ARCHIVE_STARTS = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc")
CODE_SUFFIXES = set(".py .pyc .so .dll .dylib .pyd .sh .bat .exe .ipynb".split())
#: opcodes of a pickle that is more than a literal
PICKLE_OPCODES = {"GLOBAL", "STACK_GLOBAL", "INST", "REDUCE", "DICT", "LIST", "EMPTY_DICT"}
SECRETS = {
    "a Hugging Face token": r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a GitHub token": r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "a GitLab token": r"(?<![A-Za-z0-9])glpat-[\w-]{20,}",
    "an AWS key": r"(?<![A-Za-z0-9])A(?:KIA|SIA)[0-9A-Z]{16}(?![A-Za-z0-9])",
    "a Google key": r"(?<![A-Za-z0-9])(?:AIza[\w-]{35}|ya29\.[\w-]{30,})",
    "an API key": r"(?<![A-Za-z0-9])(?:sk-[\w-]{20,}|[rs]k_live_\w{20,}|wandb_v1_\w{20,})",
    "a Slack token": r"(?<![A-Za-z0-9])xox[abprs]-[\w-]{10,}",
    "a token of a package index": r"(?<![A-Za-z0-9])(?:npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{30,})",
    "a web token": r"(?<![A-Za-z0-9])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password in an address": r"(?<![A-Za-z0-9])https?://[^\s/:@\"']+:[^\s/@\"']+@",
    "a password": r"(?i)(?<![a-z])(?:password|passwd|secret(?:_?key)?|api_?key|access_?(?:key|token)"
    r"|auth_?token|hf_?token|client_?secret|wandb_api_key)[\"']?\s*[:=]\s*[\"']?[\w/+.-]{12,}"
    r"|\blogin\s+\S+\s+password\s+\S+",
}
#: names of files of credentials, without the suffix
SECRET_NAMES = re.compile(
    r"(?i)(?:^|[_.-])(?:credentials?|secrets?|passwords?|api_?keys?|token|kaggle|netrc|id_rsa"
    r"|id_ed25519)(?:$|[_.-])"
)
#: environment variables whose names contain one of these are secret
SECRET_VARIABLES = ("TOKEN", "SECRET", "PASSWORD", "KEY")
MIN_SECRET_LENGTH = 16  # of a variable's value
#: usual first parts of absolute paths, besides those of this machine
COMMON_ROOTS = set(
    "home root Users tmp mnt var opt usr srv data scratch private workspace content kaggle media "
    "Volumes".split()
)
MAX_REPORTED = 20
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as its format says


# ---------------------------------------------------------------- selection


def select_files(
    folder: Path, places: Collection[str], include: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Paths in the folder of the files that are published, and of the parts that training left.

    Args:
        places: the folders in which a model has files, "." for the folder itself.
        include: patterns of further files, of their paths or of folders that contain them.

    Raises:
        ValueError: naming the files that are no part of a model, links out of the folder, and
            patterns without a file.
    """
    selected, left, refused, unused = [], set(), [], set(include)
    for path in _files(folder):
        name = path.relative_to(folder)
        if any(fnmatchcase(part, tool) for part in name.parts for tool in TOOL_FILES):
            continue
        patterns = {pattern for pattern in include if matches(name, pattern)}
        unused -= patterns
        if not patterns and any(fnmatchcase(name.parts[0], p) for p in TRAINING_FILES):
            left.add(name.parts[0])
        elif is_link_out(path, folder):
            raise ValueError(
                f"{_shown(path)} is a link out of the folder and can't be published; "
                "`guided-diffusers pull` downloads a repository as a folder without links"
            )
        elif path.is_file() and (patterns or is_model_file(name, places)):
            selected.append(name.as_posix())
        else:
            refused.append(name.as_posix())
    if refused:
        raise ValueError(
            f"{_shown(folder)} has files that are no part of a model: {_listed(refused)}. Move them "
            "away, or publish them with --include PATTERN"
        )
    if unused:
        raise ValueError(
            f"--include {' '.join(map(_shown, sorted(unused)))}: no file of {_shown(folder)} that "
            "may be published matches; allowed: a path in the folder, with * for any characters"
        )
    return selected, sorted(left)


def _files(folder: Path) -> Iterator[Path]:
    """All files, in order; a link to a folder counts as its files, or as one if it leads out."""
    for root, directories, files in os.walk(folder):
        directories.sort()
        yield from (Path(root) / name for name in sorted(files))
        for path in (Path(root) / name for name in directories):
            if path.is_symlink():
                yield from [path] if is_link_out(path, folder) else sorted(path.iterdir())


def matches(name: PurePath, pattern: str) -> bool:
    """Whether a pattern is of a path, or of a folder that contains it."""
    paths = [path.as_posix() for path in (name, *name.parents[:-1])]
    return any(fnmatchcase(path, pattern.rstrip("/")) for path in paths)


def is_model_file(name: Path, places: Collection[str]) -> bool:
    """Whether a path in a model's folder is of a file that belongs to the model."""
    if name.parent.as_posix() == EVAL_RESULTS_FOLDER:
        return name.suffix == ".yaml"
    known = name.suffix.lower() in MODEL_SUFFIXES or is_generated_code(name)
    known = known or name.stem.upper() in LEGAL_FILES
    return known and name.parent.as_posix() in places and not name.name.startswith(".")


def is_generated_code(name: Path) -> bool:
    """Whether it is the name of a file of code that this package writes into a model's folder."""
    if name.suffix != ".py":
        return False
    return str(name) == "pipeline.py" or name.name.startswith("guided_diffusers_")


def _listed(names: Sequence[str]) -> str:
    more = [f"and {len(names) - MAX_REPORTED} more"] * (len(names) > MAX_REPORTED)
    return ", ".join([*map(_shown, names[:MAX_REPORTED]), *more])


def _shown(name: object) -> str:
    """A name in a message, without secrets."""
    return printable(redact(str(name)))


def redact(text: str) -> str:
    """A text in which each secret is replaced by ***."""
    for pattern in SECRETS.values():
        text = re.sub(pattern, "***", text)
    for secret in _own_secrets():
        text = text.replace(secret, "***")
    return text


# ---------------------------------------------------------------- content


def check_files(folder: Path, code: Mapping[str, str], include: Sequence[str] = ()) -> None:
    """Refuse a folder with files that must not be published.

    Args:
        code: the allowed files of code, {path in the folder: text}.
        include: patterns of files that may be other code.

    Raises:
        ValueError: naming the files: links out of the folder, pickles under any name, archives,
            other code, secrets (not repeated in the message), absolute paths.
    """
    problems = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        for problem in _problems(folder, path, code, include):
            problems.append(f"{_shown(name)} {_shown(problem)}")
    if len(problems) > MAX_REPORTED:
        problems[MAX_REPORTED:] = [f"and {len(problems) - MAX_REPORTED} more"]
    if problems:
        raise ValueError(f"{_shown(folder)} can't be published: " + "; ".join(problems))


def is_link_out(path: Path, folder: Path) -> bool:
    """Whether the path is a symbolic link to something outside the folder."""
    return path.is_symlink() and not path.resolve().is_relative_to(folder.resolve())


def _problems(
    folder: Path, path: Path, code: Mapping[str, str], include: Sequence[str]
) -> Iterator[str]:
    name = path.relative_to(folder).as_posix()
    if is_link_out(path, folder):
        yield "is a link out of the folder"
        return
    if not path.is_file():
        return
    if printable(name) != name:
        yield "has control or invisible characters in its name"
    if SECRET_NAMES.search(path.stem):
        yield "has the name of a file of credentials"
    for kind in _secrets(name.encode(errors="replace")):
        yield f"has {kind} in its name"
    is_weights = path.suffix.lower() == ".safetensors"
    content = safetensors_header(path) if is_weights else path.read_bytes()
    if is_pickle(path, content):
        yield "is a pickle or may contain one; weights must be safetensors"
        return
    if is_archive(path, content):
        yield "is an archive, whose content can't be checked; unpack it"
        return
    if name in code and path.read_text() != code[name]:
        yield "differs from the code that this version of guided-diffusers writes"
    is_code = path.suffix.lower() in CODE_SUFFIXES or content[:2] == b"#!"
    if is_code and name not in code and not any(matches(PurePath(name), p) for p in include):
        yield "is code; only the code of guided-diffusers is allowed"
    if b"\0" in content and not is_weights:  # may be UTF-16
        content += content.replace(b"\0", b"")
    if path.suffix.lower() in PICTURE_SUFFIXES:
        content += picture_text(path)
        if _has_place(path):
            yield "contains the place where it was taken; save it without EXIF data"
    yield from (f"contains {kind}" for kind in _secrets(content))
    if name not in code and (is_weights or b"\0" not in content):
        if match := _absolute_path().search(content):
            yield f"contains an absolute path: {match[0].decode(errors='replace')}"


def is_pickle(path: Path, content: bytes) -> bool:
    """Whether a file is, or by its name or start may be, a pickle or an archive of pickles."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[1:] and suffixes[-1] not in ARCHIVE_SUFFIXES:
        suffixes = suffixes[-1:]
    is_zip_with_pickle = content[:2] == b"PK" and b".pkl" in content[:4096]
    starts_as_pickle = re.match(rb"\x80[\x02-\x05]", content) is not None
    if PICKLE_SUFFIXES & set(suffixes) or is_zip_with_pickle or starts_as_pickle:
        return True
    try:  # the text format of pickles has no mark at its start
        opcodes = list(pickletools.genops(content))
    except Exception:  # not a pickle; the parser has no common class of errors
        return False
    ends_there = not content[opcodes[-1][2] + 1 :].strip()
    return ends_there and any(opcode.name in PICKLE_OPCODES for opcode, *_ in opcodes)


def picture_text(path: Path) -> bytes:
    """The texts in a picture's file, which may be compressed there; none for a broken file."""
    try:
        with Image.open(path) as image:
            image.load()
            texts = [str(value) for value in image.info.values() if isinstance(value, (str, int))]
    except Exception:  # Pillow has no common class of errors
        return b""
    return "\n".join(texts).encode(errors="replace")


def _has_place(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return bool(image.getexif().get_ifd(ExifTags.IFD.GPSInfo))
    except Exception:
        return False


def is_archive(path: Path, content: bytes) -> bool:
    return path.suffix.lower() in ARCHIVE_SUFFIXES or content.startswith(ARCHIVE_STARTS)


def _secrets(content: bytes) -> Iterator[str]:
    """Kinds of the secrets in a content."""
    for kind, pattern in SECRETS.items():
        if re.search(pattern.encode(), content):
            yield kind
    for secret, kind in _own_secrets().items():
        if secret.encode() in content:
            yield kind


def _own_secrets() -> dict[str, str]:
    """{secret: kind} of the secrets in this process's environment."""
    secrets = {}
    for name, value in os.environ.items():
        is_secret = any(word in name.upper() for word in SECRET_VARIABLES)
        if is_secret and len(value) >= MIN_SECRET_LENGTH and not os.path.exists(value):
            secrets[value] = f"the value of {name}"
    if token := get_token():
        secrets[token] = "your Hugging Face token"
    return secrets


def _absolute_path() -> re.Pattern[bytes]:
    roots = COMMON_ROOTS | {path.name for path in Path("/").iterdir() if path.is_dir()}
    roots |= {Path(tempfile.gettempdir()).parts[1], Path.home().parts[-1]}
    names = "|".join(sorted(map(re.escape, roots)))
    unix = rf"(?:(?<![\w/.:~}}>-])|file://)/(?:{names})/(?:[\w.+/-]|[^\x00-\x7f]|\\u)+"
    windows = r"(?<!\w)(?:[A-Z]:\\\\?\w|[a-z]:\\\\?[Uu]sers)[\w.\\]+"
    return re.compile(f"{unix}|{windows}".encode())


def safetensors_header(path: Path) -> bytes:
    """The JSON header of a safetensors file.

    Raises:
        OSError: for a broken file; the message names it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= min(size, MAX_HEADER_BYTES) else b""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in entries.values()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{path} is not a safetensors file, or is broken") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise OSError(f"{path} is broken: it has {size} bytes, its header says {expected}")
    return header


def count_parameters(folder: Path) -> int:
    """Number of parameters in a folder's safetensors files, of one variant of the weights."""
    variants: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        variants.setdefault(weights_stem(path.name), []).append(path)
    if not variants:
        return 0
    count = 0
    for path in variants[min(variants, key=len)]:
        entries = json.loads(safetensors_header(path))
        entries.pop("__metadata__", None)
        count += sum(math.prod(entry["shape"]) for entry in entries.values())
    return count
