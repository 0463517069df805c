"""Self-contained code: one file with a class of this package and every module that it needs.

As in SQLite's amalgamation, the modules are concatenated in the order of their imports. Relative
imports are dropped and all others moved to the top; nothing else changes. One file is what
Diffusers' loader of custom code handles best.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Collection
from pathlib import Path

from diffusers import DiffusionPipeline

PACKAGE = __name__.partition(".")[0]
HEADER = '''"""`{name}` in one file, for use without the package guided-diffusers (Apache-2.0).

Concatenated from the package's modules by `standalone.self_contained`; change those, not this file.
"""

from __future__ import annotations

'''
#: the classifier has a file of its own, beside its weights; the pipeline has it in annotations only
STAND_INS = {f"{PACKAGE}.classifier": "NoiseAwareClassifier = torch.nn.Module\n"}
FOOTER = """\
# Diffusers copies every local pipeline.py to one file, and runs it in one module. So the text is
# kept here, and the next pipeline's names go into a copy of this module.
__source__ = Path(__file__).read_text()
sys.modules[__name__] = module = type(sys)(__name__)
module.__dict__.update(globals())
"""
MAX_LINE_LENGTH = 100
Imports = dict[str, set[str]]  # module -> what is imported from it, "" being the module itself


def self_contained(cls: type) -> str:
    """Text of a file that defines a class of this package without importing the package."""
    is_pipeline = issubclass(cls, DiffusionPipeline)
    stand_ins = STAND_INS if is_pipeline else {}
    modules = _import_order(cls.__module__, stand_ins)
    if len(modules) == 1:
        return _read(modules[0])
    imports: Imports = {"sys": {""}, "pathlib": {"Path"}} if is_pipeline else {}
    bodies = list(stand_ins.values())
    for module in modules:
        bodies.append(_body(module, imports))
    if is_pipeline:
        bodies.append(FOOTER)
    header = HEADER.format(name=cls.__name__) + _import_lines(imports)
    gap = "\n\n" if bodies[0].startswith(("def ", "class ", "@")) else "\n"
    return header + gap + "\n\n".join(bodies)


def _read(module: str) -> str:
    return Path(importlib.util.find_spec(module).origin).read_text()


def _import_order(module: str, left_out: Collection[str]) -> list[str]:
    """The module and the package's modules that it needs, each after those that it imports."""
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


def _body(module: str, imports: Imports) -> str:
    """Text of a module without its docstring and imports; `imports` gets the absolute imports."""
    text = _read(module)
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    removed = tree.body[:1] if ast.get_docstring(tree) is not None else []
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports.setdefault(ast.unparse(alias), set()).add("")
        elif isinstance(node, ast.ImportFrom):
            if not node.level and node.module != "__future__":
                imports.setdefault(node.module, set()).update(map(ast.unparse, node.names))
        else:
            continue
        removed.append(node)
    for node in removed:
        for number in range(node.lineno - 1, node.end_lineno):
            lines[number] = ""
    return "".join(lines).strip() + "\n"


def _import_lines(imports: Imports) -> str:
    """Import statements as ruff sorts them: standard library first, `import` before `from`."""
    modules, names = ([], []), ([], [])
    for module in sorted(imports, key=str.lower):
        third_party = module.partition(".")[0].partition(" ")[0] not in sys.stdlib_module_names
        if "" in imports[module]:
            modules[third_party].append(f"import {module}\n")
        if imported := sorted(imports[module] - {""}, key=_isort_key):
            line = f"from {module} import {', '.join(imported)}\n"
            if len(line) > MAX_LINE_LENGTH + 1:
                line = f"from {module} import (\n    " + ",\n    ".join(imported) + ",\n)\n"
            names[third_party].append(line)
    sections = ["".join([*modules[i], *names[i]]) for i in (False, True)]
    return "\n".join(section for section in sections if section)


def _isort_key(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest, in alphabetical order."""
    if name.isupper() and len(name) > 1:
        return 0, name
    return (1 if name[0].isupper() else 2), name
