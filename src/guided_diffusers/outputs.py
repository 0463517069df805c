"""Results on the disk: written aside and moved into place, so that a file is whole or absent."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Within, a temporary name beside `path`; what was written there is then moved into place, after an error removed.

    Raises:
        OSError: naming `path`, for a disk that is full, or anything else that keeps it from being written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} can't be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes(content: bytes, path: Path) -> None:
    """As `aside`."""
    with aside(path) as partial:
        partial.write_bytes(content)


def write_json(content: Any, path: Path) -> None:
    """As `aside`; numbers that are NaN or infinite become null."""
    write_bytes((json.dumps(finite(content), indent=2, allow_nan=False) + "\n").encode(), path)


def finite(content: Any) -> Any:
    """What JSON holds, as `write_json` writes it: None for a number that is NaN or infinite."""
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def require_matplotlib() -> None:
    """Raises:
    ImportError: where matplotlib is missing, saying what to install.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "curves need matplotlib: pip install 'guided-diffusers[plots]'"
        ) from error
