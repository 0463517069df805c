"""What may not leave this machine in a folder, and what a folder that came from elsewhere may not hold."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import get_token

PICKLES = {
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".joblib",
    ".npy",
    ".npz",
    ".msgpack",
    ".h5",
}
CODE = {".py", ".pyc", ".so", ".dll", ".dylib", ".pyd", ".sh", ".bat", ".exe", ".ipynb"}
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
TEXT = {
    ".json",
    ".md",
    ".txt",
    ".py",
    ".yaml",
    ".yml",
    ".toml",
    ".csv",
    ".jsonl",
    ".safetensors",
    "",
}
USUAL_ROOTS = {
    "home",
    "root",
    "Users",
    "tmp",
    "mnt",
    "var",
    "opt",
    "usr",
    "srv",
    "data",
    "scratch",
    "private",
    "workspace",
    "content",
    "kaggle",
    "media",
    "Volumes",
}
HEADER_LIMIT = 100_000_000  # of a safetensors file, as its format says


def check_files(folder: Path, code: Mapping[str, str]) -> None:
    """Refuse a folder with anything that shouldn't be published.

    Args:
        code: what files of code there may be, {path in the folder: text}.

    Raises:
        ValueError: naming the files: symbolic links that leave the folder, pickles under any name, code that isn't
            ours, secrets (which it doesn't repeat), absolute paths.
    """
    found = [
        f"{path.relative_to(folder).as_posix()} {problem}"
        for path in sorted(folder.rglob("*"))
        for problem in _problems(folder, path, code)
    ]
    if found:
        more = f"\n  and {len(found) - 20} more" if len(found) > 20 else ""
        raise ValueError(f"{folder} can't be published:\n  " + "\n  ".join(found[:20]) + more)


def _problems(folder: Path, path: Path, code: Mapping[str, str]) -> Iterator[str]:
    name = path.relative_to(folder).as_posix()
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        yield "is a link out of the folder"
        return
    if not path.is_file():
        return
    start = path.open("rb").read(4096)
    if (
        path.suffix in PICKLES
        or re.match(rb"\x80[\x02-\x05]", start)
        or (start[:2] == b"PK" and b".pkl" in start)
    ):
        yield "is a pickle or may hold one; only safetensors are allowed for weights"
        return
    if name in code:
        if path.read_text() != code[name]:
            yield "isn't the code that this version of guided-diffusers makes"
    elif path.suffix in CODE or start[:2] == b"#!":
        yield "is code; only that of guided-diffusers is allowed"
    content = safetensors_header(path) if path.suffix == ".safetensors" else path.read_bytes()
    token = get_token()
    for kind, pattern in SECRETS.items():
        if re.search(pattern, content):
            yield f"holds {kind}"
    if token and token.encode() in content:
        yield "holds your Hugging Face token"
    if path.suffix in TEXT and name not in code and (match := _absolute_path().search(content)):
        yield f"names a path of a machine: {match[0].decode(errors='replace')}"


def _absolute_path() -> re.Pattern[bytes]:
    roots = USUAL_ROOTS | {path.name for path in Path("/").iterdir() if path.is_dir()}
    roots |= {Path(tempfile.gettempdir()).parts[1], Path.home().parts[-1]}
    names = "|".join(sorted(map(re.escape, roots)))
    return re.compile(
        rf"(?<![\w/.:~}}>-])/(?:{names})/[\w.+/-]+|(?<!\w)[A-Z]:\\\\?\w[\w.\\]+".encode()
    )


def safetensors_header(path: Path) -> bytes:
    """The JSON in front of the weights.

    Raises:
        OSError: for a broken file; the message names it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= min(size, HEADER_LIMIT) else b""
    try:
        entries = json.loads(header)
        ends = [
            entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise OSError(f"{path} is no safetensors file, or a broken one") from error
    if size != 8 + length + max(ends, default=0):
        raise OSError(
            f"{path} is broken: it has {size} bytes, and its header says {8 + length + max(ends, default=0)}"
        )
    return header


def count_parameters(folder: Path) -> int:
    """How many numbers the weights in a folder hold, of the variant that comes first."""
    files = sorted(folder.glob("*.safetensors"))
    variants = {path.name.partition("-0")[0].removesuffix(".safetensors") for path in files}
    first = min(variants, key=len, default="")
    count = 0
    for path in files:
        if path.name.partition("-0")[0].removesuffix(".safetensors") == first:
            for name, entry in json.loads(safetensors_header(path)).items():
                if name != "__metadata__":
                    product = 1
                    for length in entry["shape"]:
                        product *= length
                    count += product
    return count
