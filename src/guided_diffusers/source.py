"""Self-contained code: one file with a class of this package and all that it needs of it, made from the source here."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGE = __name__.partition(".")[0]
COMPONENTS = {f"{PACKAGE}.classifier"}  # modules whose classes travel in a file of their own, beside their weights
WIDTH = 120
HEADER = """\"\"\"`{name}` in one file, for use without the package guided-diffusers.

Made from the package's source by its `source.self_contained` (Apache-2.0); change it there, not here.
\"\"\"

from __future__ import annotations
"""


@dataclass
class Module:
    """A module's lines, its top-level definitions by name, and what its imports bind: name -> (module, name there).

    The name there is None for a module itself.
    """

    lines: list[str]
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    typing_only: set[str] = field(default_factory=set)


def self_contained(cls: type) -> str:
    """The text of a file that defines a class of this package without importing it.

    A module that imports nothing of ours travels as it is. Of another, the file has the definitions that the class
    needs, directly or not, with their comments; docstrings are cut to their first paragraph, but for the class's own
    and those of its public methods. Methods that need a module of ours as a whole (`bundled.folder`) are left out. A
    class of `COMPONENTS` that is only named in annotations is `torch.nn.Module` there.

    Raises:
        ValueError: if two definitions that it needs have one name.
    """
    start = parse(cls.__module__)
    if not any(_ours(origin) for origin, _ in start.imports.values()):
        return "\n".join(start.lines) + "\n"
    needed: dict[str, str] = {}  # name -> its module
    imports: dict[str, tuple[str, str | None]] = {}
    typing_only: dict[str, tuple[str, str | None]] = {}
    stand_ins: set[str] = set()
    waiting = [(cls.__module__, cls.__name__, True)]
    while waiting:
        origin, name, runs = waiting.pop()
        module = parse(origin)
        if name in module.imports:
            source, there = module.imports[name]
            if not _ours(source):
                (typing_only if name in module.typing_only else imports).setdefault(name, (source, there))
            elif source in COMPONENTS and not runs:
                stand_ins.add(name)
            else:
                waiting.append((source, there or name, runs))
        elif name in module.definitions and needed.get(name) != origin:
            if name in needed:
                raise ValueError(f"{cls.__name__} needs {name} of {needed[name]} and of {origin}; rename one")
            needed[name], node = origin, module.definitions[name]
            running = _names(node, module, annotations=False)
            waiting += [(origin, one, one in running) for one in sorted(_names(node, module))]
    header = HEADER.format(name=cls.__name__)
    parts = [_import_lines(imports)]
    if typing_only:
        guarded = "\n".join("    " + line for line in _import_lines(typing_only).splitlines())
        parts = [_import_lines({**imports, "TYPE_CHECKING": ("typing", "TYPE_CHECKING")}),
                 f"if TYPE_CHECKING:\n{guarded}"]
    parts += [f"{name} = torch.nn.Module  # a component; its class is in its own file"
              for name in sorted(stand_ins - needed.keys())]
    return header + "\n" + "\n\n".join(parts) + "\n" + "".join(_definitions(cls, needed)).rstrip() + "\n"


@cache
def parse(name: str) -> Module:
    """A module of this package, which isn't imported."""
    spec = importlib.util.find_spec(name)
    text = Path(spec.origin).read_text()
    module = Module(text.splitlines())
    parent = name if spec.submodule_search_locations else name.rpartition(".")[0]
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            module.definitions[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                module.definitions |= {one.id: node for one in ast.walk(target) if isinstance(one, ast.Name)}
        elif isinstance(node, ast.If):  # if TYPE_CHECKING
            for child in node.body:
                module.typing_only |= set(_bind(module, child, parent))
        else:
            _bind(module, node, parent)
    return module


def _bind(module: Module, node: ast.stmt, parent: str) -> list[str]:
    """Note an import; the names that it binds."""
    if isinstance(node, ast.Import):
        found = {alias.asname or alias.name.partition(".")[0]: (alias.name, None) for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
        origin = node.module or ""
        if node.level:
            origin = importlib.util.resolve_name("." * node.level + origin, parent)
        found = {}
        for alias in node.names:
            whole = _ours(origin) and importlib.util.find_spec(origin).submodule_search_locations is not None \
                and importlib.util.find_spec(f"{origin}.{alias.name}") is not None
            found[alias.asname or alias.name] = (f"{origin}.{alias.name}", None) if whole else (origin, alias.name)
    else:
        found = {}
    module.imports |= found
    return list(found)


def _ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def _names(node: ast.AST, module: Module, annotations: bool = True) -> set[str]:
    """The names that a definition uses, without those of methods that are left out."""
    found, waiting = set(), [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, ast.Name):
            found.add(one.id)
        left_out = _left_out(one, module)
        for name, value in ast.iter_fields(one):
            if annotations or name not in ("annotation", "returns"):
                children = value if isinstance(value, list) else [value]
                waiting += [child for child in children if isinstance(child, ast.AST) and child not in left_out]
    return found


def _left_out(node: ast.AST, module: Module) -> list[ast.AST]:
    """The methods of a class that need a module of ours as a whole."""
    if not isinstance(node, ast.ClassDef):
        return []
    whole = {name for name, (origin, there) in module.imports.items() if there is None and _ours(origin)}
    return [method for method in node.body if isinstance(method, ast.FunctionDef)
            and whole & {one.id for one in ast.walk(method) if isinstance(one, ast.Name)}]


def _import_lines(imports: dict[str, tuple[str, str | None]]) -> str:
    """Statements in the order of isort, wrapped."""
    sections: tuple[list[str], list[str]] = ([], [])
    for origin in sorted({origin for origin, _ in imports.values()}, key=str.lower):
        section = sections[origin.partition(".")[0] not in sys.stdlib_module_names]
        for name, (source, there) in imports.items():
            if source == origin and there is None:
                section.append(f"import {origin}" + ("" if name == origin else f" as {name}"))
    for origin in sorted({origin for origin, there in imports.values() if there}, key=str.lower):
        names = sorted((there + ("" if there == name else f" as {name}")
                        for name, (source, there) in imports.items() if source == origin and there), key=_member)
        line = f"from {origin} import {', '.join(names)}"
        if len(line) > WIDTH:
            line = f"from {origin} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
        sections[origin.partition(".")[0] not in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(section) for section in sections if section)


def _member(name: str) -> tuple[int, str]:
    """isort's order: constants, classes, the rest."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)


def _definitions(cls: type, needed: dict[str, str]) -> Iterator[str]:
    """Their text, what is imported before what imports it."""
    order: list[str] = []

    def visit(name: str) -> None:
        for origin, _ in parse(name).imports.values():
            if _ours(origin) and origin not in order:
                visit(origin)
        if name not in order:
            order.append(name)

    visit(cls.__module__)
    for origin in order:
        module = parse(origin)
        nodes = {module.definitions[name] for name, its in needed.items() if its == origin}
        end, defined = 0, True
        for node in sorted(nodes, key=lambda node: node.lineno):
            first = _first(node, module.lines)
            small = isinstance(node, (ast.Assign, ast.AnnAssign))
            blank = 2 if defined or not small else min(first - end - 1, 1)
            yield "\n" * blank + "\n".join(_cut(node, module, cls)) + "\n"
            end, defined = node.end_lineno, not small


def _first(node: ast.stmt, lines: list[str]) -> int:
    """Where a definition begins, with its decorators and the comment right above; lines count from 1."""
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
    while first > 1 and re.match(r"\s*#", lines[first - 2]):
        first -= 1
    return first


def _cut(node: ast.stmt, module: Module, cls: type) -> list[str]:
    """The lines of a definition without methods that are left out and most docstrings."""
    lines: dict[int, str] = {i: module.lines[i - 1] for i in range(_first(node, module.lines), node.end_lineno + 1)}
    public = getattr(node, "name", None) == cls.__name__
    kept = {node, *(one for one in node.body if isinstance(one, ast.FunctionDef)
                    and (one.name == "__call__" or not one.name.startswith("_")))} if public else set()
    for one in ast.walk(node):
        if isinstance(one, (ast.ClassDef, ast.FunctionDef)) and one not in kept and ast.get_docstring(one):
            doc = one.body[0]
            blank = next((i for i in range(doc.lineno, doc.end_lineno + 1) if not module.lines[i - 1].strip()), None)
            if blank is not None:
                for i in range(blank, doc.end_lineno + 1):
                    del lines[i]
                fits = len(lines[blank - 1]) + 3 <= WIDTH
                lines[blank - 1] += ("" if fits else "\n" + " " * doc.col_offset) + '"""'
        for method in _left_out(one, module):
            for i in range(_first(method, module.lines), method.end_lineno + 1):
                lines.pop(i, None)
            after = method.end_lineno + 1
            if not lines.get(after, "x").strip():
                del lines[after]
    return [lines[i] for i in sorted(lines)]
