"""One file with a class of this package and every module that it needs: the code that travels with a model's weights.

As in SQLite's amalgamation, the modules are concatenated in the order of their imports. Relative imports are dropped and
all others moved to the top; nothing else changes. One file is what Diffusers' loader of custom code handles best.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

from diffusers import DiffusionPipeline

PACKAGE = __name__.partition(".")[0]
HEADER = '''"""`{name}` in one file, for use without the package guided-diffusers (Apache-2.0).

Concatenated from the package's modules by its `standalone.self_contained`; change those, not this file.
"""

from __future__ import annotations

'''
#: the classifier's class is in a file of its own, beside its weights; the pipeline only names it in annotations
STAND_INS = {f"{PACKAGE}.classifier": "NoiseAwareClassifier = torch.nn.Module\n"}
FOOTER = """

__source__ = Path(__file__).read_text()  # Diffusers overwrites the file with the next local pipeline
# Diffusers runs every local pipeline.py in one module; the next one's names go into this copy, not among these
sys.modules[__name__] = module = type(sys)(__name__)
module.__dict__.update(globals())
"""
Import = tuple[str, str]  # (module, name imported from it, or "" for the module itself)


def self_contained(cls: type) -> str:
    """Text of a file that defines a class of this package without importing the package."""
    stand_ins = STAND_INS if issubclass(cls, DiffusionPipeline) else {}
    modules = _import_order(cls.__module__, stand_ins)
    if len(modules) == 1:
        return _read(modules[0])
    imports, bodies = set(), list(stand_ins.values())
    for module in modules:
        body, module_imports = _split(module)
        bodies.append(body)
        imports |= module_imports
    footer = FOOTER if issubclass(cls, DiffusionPipeline) else ""
    if footer:
        imports |= {("sys", ""), ("pathlib", "Path")}
    header = HEADER.format(name=cls.__name__) + _import_lines(imports)
    return header + "\n\n" + "\n\n".join(bodies) + footer


def _read(module: str) -> str:
    return Path(importlib.util.find_spec(module).origin).read_text()


def _import_order(module: str, left_out: dict[str, str]) -> list[str]:
    """The module and those of this package that it imports, each after the ones that it imports itself."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order or name in left_out:
            return
        for node in ast.parse(_read(name)).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                relative = "." * node.level + node.module
                visit(importlib.util.resolve_name(relative, name.rpartition(".")[0]))
        order.append(name)

    visit(module)
    return order


def _split(module: str) -> tuple[str, set[Import]]:
    """(text of the module without its docstring and imports, its absolute imports)."""
    text = _read(module)
    tree, lines, imports = ast.parse(text), text.splitlines(keepends=True), set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports.add((f"{alias.name} as {alias.asname}" if alias.asname else alias.name, ""))
        elif isinstance(node, ast.ImportFrom):
            if not node.level and node.module != "__future__":
                imports |= {(node.module, alias.name) for alias in node.names}
        elif node is not tree.body[0] or ast.get_docstring(tree) is None:
            continue
        for number in range(node.lineno - 1, node.end_lineno):
            lines[number] = ""
    return "".join(lines).strip() + "\n", imports


def _import_lines(imports: set[Import]) -> str:
    """Import statements, the standard library's first."""
    sections: tuple[list[str], list[str]] = ([], [])
    for module, name in sorted(imports, key=lambda each: (each[1] != "", each[0].lower())):
        section = sections[module.partition(".")[0].split()[0] not in sys.stdlib_module_names]
        line = f"import {module}" if not name else f"from {module} import ("
        if not name:
            section.append(line)
        elif line not in section:
            names = sorted(n for m, n in imports if m == module and n)
            section += [line, *(f"    {n}," for n in names), ")"]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"
