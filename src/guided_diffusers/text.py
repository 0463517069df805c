"""Text for the terminal, for Markdown and for plots, in which names have no effect."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

#: characters without a visible form beside those of the hidden categories; some are selectors
IGNORABLE = "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0"


IGNORABLE += "\U000e0100-\U000e01ef"


HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


#: of letters without case and symbols: between these a joiner has a visible effect
JOINED_CATEGORIES = ("Lo", "Lm", "Mn", "Mc", "Me", "So", "Sk")


#: joiners; a variant of a character that isn't a Latin letter; the rest of a region's flag
SELECTORS = re.compile(
    f"[\u200c\u200d]|(?<=[^A-Za-z\\s{IGNORABLE}])[\ufe0e\ufe0f\U000e0100-\U000e01ef]"
    "|(?<=\U0001f3f4)[\U000e0030-\U000e007a]{2,6}\U000e007f"
)


def printable(text: object) -> str:
    """A name, path or message for the terminal: one line, in any script, without control sequences.

    Control characters, line breaks, bidirectional overrides, zero-width characters and lone
    surrogates become escapes as in Python's string literals, such as `\\x1b`. Joiners and selectors
    that emoji and some scripts need are kept.
    """
    text, parts, end = str(text), [], 0
    for match in SELECTORS.finditer(text):
        sides = text[max(match.start() - 1, 0)], text[match.end() : match.end() + 1] or " "
        joins = all(unicodedata.category(side) in JOINED_CATEGORIES for side in sides)
        if joins or match[0] not in "\u200c\u200d":
            parts += [_escape_hidden(text[end : match.start()]), match[0]]
            end = match.end()
    return "".join([*parts, _escape_hidden(text[end:])])


def _escape_hidden(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    escaped = []
    for character in text:
        hidden = unicodedata.category(character) in HIDDEN_CATEGORIES
        hidden = hidden or re.match(f"[{IGNORABLE}]", character)
        escaped.append(ascii(character)[1:-1] if hidden else character)
    return "".join(escaped)


def one_line(message: object) -> str:
    """A message for the terminal as one line: line breaks become spaces (see `printable`)."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ", str(message)).strip())


def markdown(text: object) -> str:
    """A name, path or other text in Markdown, shown as it is: one line, all markup escaped.

    Also within a cell of a table. HTML, links, code and mathematics have no effect.
    """
    return re.sub(r"(://|[\\`*_{}\[\]<>|~$&#])", r"\\\1", printable(text))


def markdown_code(text: object) -> str:
    """A text as code in Markdown: one line, between more backticks than it contains."""
    text = printable(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if len(ticks) > 1 else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def code_literal(text: str) -> str:
    """A text as a literal of Python, in one line, readable in any script."""
    return printable(json.dumps(text, ensure_ascii=False))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table of cells in Markdown; it ends in a newline."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def plot_text(text: object) -> str:
    """A name in a plot of matplotlib: as `printable`, and "$" starts no formula."""
    return printable(text).replace("$", r"\$")
