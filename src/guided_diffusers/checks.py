"""Checks of arguments and files: each says the name, the value and what is allowed. Imports no torch.

Numbers may be Python's, NumPy's, or tensors of one element; booleans are no numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any

MAX_SHOWN = 100  # characters of a value in a message
MAX_SEED = 2**63 - 1  # of torch.Generator
KINDS = {dict: "a JSON object {...}", list: "a JSON list [...]"}


def shown(value: Any) -> str:
    """A value for an error message, in one line that is not too long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a foreign class
        text = type(value).__name__
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def shorten(error: BaseException) -> str:
    """The beginning of another library's message, in one line."""
    text = " ".join(str(error).partition("\n")[0].split())
    return text if len(text) <= 2 * MAX_SHOWN else f"{text[: 2 * MAX_SHOWN]}..."


def scalar(value: Any) -> Any:
    """The element of a NumPy array or tensor without dimensions; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    integer: bool = False,
) -> Any:
    """The number, as Python's, if it is finite and low <= value <= high.

    Args:
        above: low < value instead.
        integer: refuse fractions.

    Raises:
        ValueError: for any other value.
    """
    number = scalar(value)
    kind = Integral if integer else Real
    if isinstance(number, kind) and not isinstance(number, bool):
        in_range = low < number <= high if above else low <= number <= high
        if in_range and (integer or _is_finite(number)):
            return int(number) if integer else float(number)
    raise ValueError(f"{name}={shown(value)}: {_range(low, high, above, integer)} is allowed")


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond the largest float
        return False


def _range(low: float, high: float, above: bool, integer: bool) -> str:
    kind = "an integer" if integer else "a finite number"
    if low == -math.inf:
        return kind
    if high == math.inf:
        return f"{kind} above {low}" if above else f"{kind}, {low} or more,"
    return f"{kind} above {low}, up to {high}," if above else f"{kind} from {low} to {high}"


def check_bool(name: str, value: Any) -> bool:
    """The value, if it is True or False (Python's, NumPy's or a tensor).

    Raises:
        ValueError: for any other value.
    """
    flag = scalar(value)
    if not isinstance(flag, bool):
        raise ValueError(f"{name}={shown(value)}: True and False are allowed")
    return flag


def nearest(name: str, names: Iterable[str], count: int = 5) -> list[str]:
    """The names most similar to `name`, most similar first; all, sorted, if they are few."""
    names = sorted(map(str, names))
    if len(names) <= 2 * count:
        return names
    by_lower: dict[str, str] = {}
    for known in names:
        by_lower.setdefault(known.lower(), known)
    close = get_close_matches(name.lower(), by_lower, count, cutoff=0.0)
    return [by_lower[lower] for lower in close]


def read_json(path: Path, kind: type = dict) -> Any:
    """Content of a JSON file that holds a `kind`.

    Raises:
        ValueError: naming the file, for anything else in it.
        OSError: naming the file, if it can't be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise OSError(f"{path} can't be read: {error.strerror or error}") from error
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for JSON that can be read") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds {shown(content)}; {KINDS[kind]} is allowed")
    return content


class noting:
    """Context that adds where it was raised to an error of a user's code, in Python >= 3.11."""

    def __init__(self, place: str):
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and hasattr(error, "add_note"):
            error.add_note(self.place)
