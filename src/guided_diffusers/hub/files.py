"""Checks of a folder's files before they are published, and of safetensors files."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import get_token

from ..weights import weights_stem

PICKLE_SUFFIXES = set(".bin .pt .pth .pkl .pickle .ckpt .joblib .npy .npz .msgpack .h5".split())
CODE_SUFFIXES = set(".py .pyc .so .dll .dylib .pyd .sh .bat .exe .ipynb".split())
#: files that are searched for absolute paths
TEXT_SUFFIXES = {"", *".json .md .txt .py .yaml .yml .toml .csv .jsonl .safetensors".split()}
SECRETS = {
    "a Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "a GitLab token": rb"\bglpat-[\w-]{20,}",
    "an AWS key": rb"\bA(?:KIA|SIA)[0-9A-Z]{16}\b",
    "a Google key": rb"\bAIza[\w-]{35}",
    "an API key": rb"\bsk-[\w-]{20,}",
    "a Slack token": rb"\bxox[abprs]-[\w-]{10,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": rb"\bhttps?://[^\s/:@\"']+:[^\s/@\"']+@",
}
#: usual first parts of absolute paths, besides those of this machine
COMMON_ROOTS = set(
    "home root Users tmp mnt var opt usr srv data scratch private workspace content kaggle media "
    "Volumes".split()
)
MAX_REPORTED = 20
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as its format says


def check_files(folder: Path, code: Mapping[str, str]) -> None:
    """Refuse a folder with files that must not be published.

    Args:
        code: the allowed files of code, {path in the folder: text}.

    Raises:
        ValueError: naming the files: links out of the folder, pickles under any name, other code,
            secrets (not repeated in the message), absolute paths.
    """
    problems = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        problems += [f"{name} {problem}" for problem in _problems(folder, path, code)]
    if len(problems) > MAX_REPORTED:
        problems[MAX_REPORTED:] = [f"and {len(problems) - MAX_REPORTED} more"]
    if problems:
        raise ValueError(f"{folder} can't be published:\n  " + "\n  ".join(problems))


def is_link_out(path: Path, folder: Path) -> bool:
    """Whether the path is a symbolic link to something outside the folder."""
    return path.is_symlink() and not path.resolve().is_relative_to(folder.resolve())


def _problems(folder: Path, path: Path, code: Mapping[str, str]) -> Iterator[str]:
    if is_link_out(path, folder):
        yield "is a link out of the folder"
        return
    if not path.is_file():
        return
    name = path.relative_to(folder).as_posix()
    with path.open("rb") as file:
        start = file.read(4096)
    if _may_be_pickle(path, start):
        yield "is a pickle or may contain one; weights must be safetensors"
        return
    if name in code and path.read_text() != code[name]:
        yield "differs from the code that this version of guided-diffusers writes"
    if name not in code and (path.suffix in CODE_SUFFIXES or start[:2] == b"#!"):
        yield "is code; only the code of guided-diffusers is allowed"
    content = safetensors_header(path) if path.suffix == ".safetensors" else path.read_bytes()
    yield from _secrets(content)
    if path.suffix in TEXT_SUFFIXES and name not in code:
        if match := _absolute_path().search(content):
            yield f"contains an absolute path: {match[0].decode(errors='replace')}"


def _may_be_pickle(path: Path, start: bytes) -> bool:
    is_zip_with_pickle = start[:2] == b"PK" and b".pkl" in start
    is_pickle = re.match(rb"\x80[\x02-\x05]", start) is not None
    return path.suffix in PICKLE_SUFFIXES or is_pickle or is_zip_with_pickle


def _secrets(content: bytes) -> Iterator[str]:
    for kind, pattern in SECRETS.items():
        if re.search(pattern, content):
            yield f"contains {kind}"
    token = get_token()
    if token and token.encode() in content:
        yield "contains your Hugging Face token"


def _absolute_path() -> re.Pattern[bytes]:
    roots = COMMON_ROOTS | {path.name for path in Path("/").iterdir() if path.is_dir()}
    roots |= {Path(tempfile.gettempdir()).parts[1], Path.home().parts[-1]}
    names = "|".join(sorted(map(re.escape, roots)))
    unix = rf"(?<![\w/.:~}}>-])/(?:{names})/[\w.+/-]+"
    windows = r"(?<!\w)[A-Z]:\\\\?\w[\w.\\]+"
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
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
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
