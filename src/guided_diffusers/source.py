"""Self-contained code: one file with a class of this package and all that it needs of it, made from the source here."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .noise import (
    OUT_OF_REACH,
    is_flow,
    is_instance_by_name,
    is_ordinary,
    module_config,
    prediction_type,
    rare_affine,
)

PACKAGE = __name__.partition(".")[0]
COMPONENTS = {
    f"{PACKAGE}.classifier"
}  # modules whose classes travel in a file of their own, beside their weights
WIDTH, LIMIT = 120, 900
QUESTIONS = {
    "is_instance_by_name",
    "is_flow",
    "has_custom_step",
}  # of `schedulers`, asked about a pipeline's own beforehand
OPTIONS = (
    "if sigma_interval is not None",
    "if self.sigma_interval is not None",
    "if self.normalize",
    "if callable(self.scale) and (not _numbers(self.scale(level)).any())",
)  # of terms, which pipelines' have not
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


MISSING = """def _missing(what: str, *arguments: Any, **options: Any) -> Any:
    raise ImportError(f"{what} needs the package: pip install guided-diffusers")


"""


# after `MISSING`: the branches for other schedulers aren't there
CHECK_REACH = """def check_supported(scheduler: SchedulerMixin) -> None:{own}
    if not is_ordinary(scheduler){but}:
        _missing("a scheduler of this kind")


"""
FOR_PIPELINES = {
    "Any": ("typing", "Any"),
    "partial": ("functools", "partial"),
    "sys": ("sys", None),
    "SchedulerMixin": ("diffusers", "SchedulerMixin"),
}
FOOTER = """

# Diffusers runs every local pipeline.py in one module; the next one's names go into this copy, not among these
sys.modules[__name__] = module = type(sys)(__name__)
module.__dict__.update(globals())
"""


@dataclass
class Needed:
    """What a file has: definitions, name -> its module; imports; and what is left out of its classes."""

    definitions: dict[str, str] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    typing_only: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    stand_ins: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    unused: dict[str, list[tuple[str, ast.FunctionDef]]] = field(
        default_factory=dict
    )  # name -> (module, method)
    branches: set[ast.If] = field(default_factory=set)
    refused: dict[ast.FunctionDef, str] = field(
        default_factory=dict
    )  # those of the class itself that stay behind

    def left_out(self) -> set[ast.stmt]:
        """Methods that nothing calls, and branches that nothing takes."""
        return self.branches | {method for methods in self.unused.values() for _, method in methods}


def code_of(model: Any) -> str:
    """The text of a file for a model of this package, without what this one doesn't need (`spared`)."""
    return self_contained(type(model), model if hasattr(model, "scheduler") else None)


def spared(pipeline: Any) -> dict[str, str]:
    """What a pipeline never calls as it is, {name: what somebody would want it for}.

    Who exchanges a component, or asks for another algorithm, where guided-diffusers is missing is told so.
    """
    config = module_config(pipeline.unet)
    inputs, outputs = config.get("in_channels"), config.get("out_channels")
    up_sampling = inputs is None or (inputs % 2 == 0 and outputs in (None, inputs, inputs // 2))
    found = {
        f"{type(pipeline).__name__}.save_pretrained": "saving",
        "further_terms": "guidance",
        "Guidance.__add__": "guidance",
        **dict.fromkeys(OPTIONS, "guidance"),
    }
    if pipeline.vae is None:
        found |= dict.fromkeys(("check_precision", "decode"), "a vae")
    if pipeline.vae is not None or not up_sampling:
        found |= dict.fromkeys(
            (
                "low_resolution",
                "if low_res is not None",
                "if low_res is not None and len(low_res) not in (1, batch_size)",
            ),
            "image",
        )
    if not _needs_rare_affine(pipeline.scheduler):
        found["rare_affine"] = "a scheduler of this kind"
    if pipeline._null is None:
        found["NullGuidance"] = "classifier_free_scale"
    defaults = pipeline.config.defaults
    if defaults["guidance_algorithm"] != "mean":
        found["posterior_variance"] = "guidance_algorithm='mean'"
    if defaults["guidance_algorithm"] in ("output", "mean"):
        found |= dict.fromkeys(
            ("OperatorSplitting", "if splitting is not None and (not splitting.asks(index))"),
            "this guidance_algorithm",
        )
    if (defaults["guidance_every"], defaults["guidance_tolerance"]) == (1, None):
        found |= dict.fromkeys(
            ("GuidanceReuse", "if sparing is not None and active"),
            "guidance_every, guidance_tolerance",
        )
    return found


def _needs_rare_affine(scheduler: Any) -> bool:
    try:
        return bool(
            rare_affine(
                prediction_type(scheduler), alpha=1.0, sigma=1.0, sigma_data=0.5, sigma_min=0.0
            )
        )
    except ValueError:  # `x0_coefficients` knows the prediction, or the scheduler can't be guided
        return False


def self_contained(cls: type, pipeline: Any = None) -> str:
    """The text of a file that defines a class of this package without importing it.

    A module that imports nothing of ours travels as it is. Of another, the file has the definitions that the class
    needs, directly or not, with their comments, but without docstrings: the class keeps its first line, and its public
    methods theirs where the file stays below `LIMIT` lines. Methods that need a module of ours as a whole
    (`bundled.folder`) are left out, and those that nothing calls by their name. A class of `COMPONENTS` that is only
    is_instance_by_name in annotations is `torch.nn.Module` there.

    Args:
        pipeline: one of the class, whose file it is. What it doesn't need stays behind: what is `spared`, where a call
            raises an ImportError, and the branches that `QUESTIONS` about its scheduler don't lead into, where
            `check_supported` raises one for any scheduler that could want them. None: nothing stays behind.

    Raises:
        ValueError: if two definitions that it needs have one name, or something `spared` isn't in the source.
    """
    start = parse(cls.__module__)
    if not any(_ours(origin) for origin, _ in start.imports.values()):
        return "\n".join(start.lines) + "\n"
    without, scheduler = (
        (spared(pipeline), pipeline.scheduler) if pipeline is not None else ({}, None)
    )
    needed = _needed(cls, without, scheduler)
    header = HEADER.format(name=cls.__name__)
    parts = [_import_lines(needed.imports)]
    if needed.typing_only:
        guarded = "\n".join(
            "    " + line for line in _import_lines(needed.typing_only).splitlines()
        )
        parts = [
            _import_lines({**needed.imports, "TYPE_CHECKING": ("typing", "TYPE_CHECKING")}),
            f"if TYPE_CHECKING:\n{guarded}",
        ]
    parts += [
        f"{name} = torch.nn.Module  # a component; its class is in its own file"
        for name in sorted(needed.stand_ins - needed.definitions.keys())
    ]
    if pipeline is not None:
        missing = {name: without[name] for name in sorted(needed.missing)}
        parts.append("\n" + MISSING + _check_reach(scheduler) + "\n".join(_missing_lines(missing)))
    before, after = (
        header + "\n" + "\n\n".join(parts) + "\n",
        "\n" + (FOOTER if pipeline is not None else ""),
    )
    for documented in (True, False):
        text = before + "".join(_definitions(cls, needed, documented)).rstrip() + after
        if text.count("\n") < LIMIT:
            break
    return text


def _check_reach(scheduler: Any) -> str:
    """The definition that refuses all schedulers but `ORDINARY` ones and a pipeline's own kind."""
    own = ""
    if not is_ordinary(scheduler) and not is_instance_by_name(scheduler, OUT_OF_REACH):
        own = f"type(scheduler).__name__ == {json.dumps(type(scheduler).__name__)}"
        own += "" if is_flow(scheduler) else ' and not scheduler.config.get("use_flow_sigmas")'
        own = f"\n    own = {own}"
    return CHECK_REACH.format(own=own, but=" and not own" if own else "")


def _missing(what: str) -> str:
    return f"partial(_missing, {json.dumps(what)})"


def _missing_lines(missing: Mapping[str, str]) -> list[str]:
    """Assignments of names that refuse, those for one thing together."""
    lines: list[str] = []
    for what in dict.fromkeys(missing.values()):
        end = _missing(what)
        lines.append(end)
        for name in (name for name, its in missing.items() if its == what):
            if len(name) + 3 + len(lines[-1]) > WIDTH:
                lines.append(end)
            lines[-1] = f"{name} = {lines[-1]}"
    return lines


def _needed(cls: type, without: Mapping[str, str], scheduler: Any) -> Needed:
    """All that a class needs, from its own definition on; with a scheduler, what a pipeline with it does."""
    needed, called = Needed(), set()
    public = {one.__name__ for one in cls.__mro__ if _ours(one.__module__)}
    waiting, met = [(cls.__module__, cls.__name__, True)], set()
    if scheduler is not None:
        waiting.append((f"{PACKAGE}.schedulers", "is_ordinary", True))
        needed.imports |= FOR_PIPELINES

    def use(origin: str, node: ast.AST) -> None:
        """Note what a part of a module needs."""
        module = parse(origin)
        left_out = {one for part in ast.walk(node) for one in _left_out(part, module)}
        held = set()
        if isinstance(node, ast.ClassDef):
            held = {
                method
                for method in node.body
                if isinstance(method, ast.FunctionDef)
                and method not in left_out
                and method.name not in called
                and not _stays(method.name, origin, node.name, node.name in public)
            }
        for method in held:
            needed.unused.setdefault(method.name, []).append((origin, method))
        branches = {
            part: f"if {ast.unparse(part.test)}"
            for part in ast.walk(node)
            if isinstance(part, ast.If)
        }
        parts = {
            part
            for part, text in branches.items()
            if text in without or (scheduler is not None and _denied(part.test, origin, scheduler))
        }
        met.update(branches.values())
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if (name := f"{node.name}.{getattr(method, 'name', None)}") in without or _abstract(
                    method, node
                ):
                    parts.add(method)
                    met.add(name)
                    if node.name in public and name in without:
                        needed.refused[method] = without[name]
        needed.branches |= parts
        held |= parts
        running = _names(node, left_out | held, annotations=False)
        waiting.extend(
            (origin, one, one in running) for one in sorted(_names(node, left_out | held))
        )
        new = {
            one.attr for one in _walk(node, left_out | held) if isinstance(one, ast.Attribute)
        } - called
        called.update(new)
        for name in sorted(new):
            for where, method in needed.unused.pop(name, []):
                use(where, method)

    while waiting:
        origin, name, runs = waiting.pop()
        module = parse(origin)
        met.add(name)
        if name in without:
            if runs:
                needed.missing.add(name)
        elif name == "check_supported" and scheduler is not None:
            pass  # `CHECK_REACH`
        elif name in module.imports:
            source, there = module.imports[name]
            if not _ours(source):
                (needed.typing_only if name in module.typing_only else needed.imports).setdefault(
                    name, (source, there)
                )
            elif source in COMPONENTS and not runs:
                needed.stand_ins.add(name)
            else:
                waiting.append((source, there or name, runs))
        elif name in module.definitions and needed.definitions.get(name) != origin:
            if name in needed.definitions:
                raise ValueError(
                    f"{cls.__name__} needs {name} of {needed.definitions[name]} and of {origin}; rename "
                    "one"
                )
            needed.definitions[name] = origin
            use(origin, module.definitions[name])
    if absent := without.keys() - met:
        raise ValueError(f"{cls.__name__} spares {sorted(absent)}, which its source hasn't")
    return needed


def _denied(test: ast.expr, origin: str, scheduler: Any) -> bool:
    """Whether the test of a branch begins with one of `QUESTIONS`, and this scheduler says no."""
    first = (
        test.values[0] if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else test
    )
    first = first.value if isinstance(first, ast.NamedExpr) else first
    if not (
        isinstance(first, ast.Call)
        and isinstance(first.func, ast.Name)
        and first.func.id in QUESTIONS
    ):
        return False
    names = {**vars(importlib.import_module(origin)), "scheduler": scheduler}
    return not eval(compile(ast.Expression(first), origin, "eval"), names)


def _abstract(node: ast.AST, owner: ast.ClassDef) -> bool:
    """Whether it is a method that the classes which extend its own have, but for those of the `ABC` itself."""
    return (
        isinstance(node, ast.FunctionDef)
        and "abstractmethod" in map(ast.unparse, node.decorator_list)
        and "ABC" not in map(ast.unparse, owner.bases)
    )


def _stays(method: str, origin: str, owner: str, public: bool) -> bool:
    """Whether a method may be called otherwise than by its name here: an operator, one of the pipeline's user, or one
    of the class that its own extends, of another package."""
    if method.startswith("__") or (public and not method.startswith("_")):
        return True
    bases = getattr(importlib.import_module(origin), owner).__mro__
    return any(
        hasattr(base, method) for base in bases if base is not object and not _ours(base.__module__)
    )


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
                module.definitions |= {
                    one.id: node for one in ast.walk(target) if isinstance(one, ast.Name)
                }
        elif isinstance(node, ast.If):  # if TYPE_CHECKING
            for child in node.body:
                module.typing_only |= set(_bind(module, child, parent))
        else:
            _bind(module, node, parent)
    return module


def _bind(module: Module, node: ast.stmt, parent: str) -> list[str]:
    """Note an import; the names that it binds."""
    if isinstance(node, ast.Import):
        found = {
            alias.asname or alias.name.partition(".")[0]: (alias.name, None) for alias in node.names
        }
    elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
        origin = node.module or ""
        if node.level:
            origin = importlib.util.resolve_name("." * node.level + origin, parent)
        found = {}
        for alias in node.names:
            whole = (
                _ours(origin)
                and importlib.util.find_spec(origin).submodule_search_locations is not None
                and importlib.util.find_spec(f"{origin}.{alias.name}") is not None
            )
            found[alias.asname or alias.name] = (
                (f"{origin}.{alias.name}", None) if whole else (origin, alias.name)
            )
    else:
        found = {}
    module.imports |= found
    return list(found)


def _ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def _names(node: ast.AST, without: Set[ast.AST], annotations: bool = True) -> set[str]:
    """The names that a part uses, without those of its parts that are left out."""
    return {one.id for one in _walk(node, without, annotations) if isinstance(one, ast.Name)}


def _walk(node: ast.AST, without: Set[ast.AST], annotations: bool = True) -> Iterator[ast.AST]:
    waiting = [node]
    while waiting:
        one = waiting.pop()
        yield one
        for name, value in ast.iter_fields(one):
            if annotations or name not in ("annotation", "returns"):
                children = value if isinstance(value, list) else [value]
                waiting += [
                    child
                    for child in children
                    if isinstance(child, ast.AST) and child not in without
                ]


def _left_out(node: ast.AST, module: Module) -> list[ast.AST]:
    """The methods of a class that need a module of ours as a whole."""
    if not isinstance(node, ast.ClassDef):
        return []
    whole = {
        name for name, (origin, there) in module.imports.items() if there is None and _ours(origin)
    }
    return [
        method
        for method in node.body
        if isinstance(method, ast.FunctionDef)
        and whole & {one.id for one in ast.walk(method) if isinstance(one, ast.Name)}
    ]


def _import_lines(imports: dict[str, tuple[str, str | None]]) -> str:
    """Statements in the order of isort, wrapped."""
    sections: tuple[list[str], list[str]] = ([], [])
    for origin in sorted({origin for origin, _ in imports.values()}, key=str.lower):
        section = sections[origin.partition(".")[0] not in sys.stdlib_module_names]
        for name, (source, there) in imports.items():
            if source == origin and there is None:
                section.append(f"import {origin}" + ("" if name == origin else f" as {name}"))
    for origin in sorted({origin for origin, there in imports.values() if there}, key=str.lower):
        names = sorted(
            (
                there + ("" if there == name else f" as {name}")
                for name, (source, there) in imports.items()
                if source == origin and there
            ),
            key=_member,
        )
        line = f"from {origin} import {', '.join(names)}"
        if len(line) > WIDTH:
            line = f"from {origin} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
        sections[origin.partition(".")[0] not in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(section) for section in sections if section)


def _member(name: str) -> tuple[int, str]:
    """isort's order: constants, classes, the rest."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)


def _definitions(cls: type, needed: Needed, documented: bool) -> Iterator[str]:
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
        nodes = {
            module.definitions[name] for name, its in needed.definitions.items() if its == origin
        }
        end, defined = 0, True
        for node in sorted(nodes, key=lambda node: node.lineno):
            first = _first(node, module.lines)
            small = isinstance(node, (ast.Assign, ast.AnnAssign))
            blank = 2 if defined or not small else min(first - end - 1, 1)
            yield (
                "\n" * blank
                + "\n".join(_cut(node, module, cls, needed, documented)).rstrip()
                + "\n"
            )
            end, defined = node.end_lineno, not small


def _first(node: ast.stmt, lines: list[str]) -> int:
    """Where a definition begins, with its decorators and the comment right above; lines count from 1."""
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
    while first > 1 and re.match(r"\s*#", lines[first - 2]):
        first -= 1
    return first


def _cut(node: ast.stmt, module: Module, cls: type, needed: Needed, documented: bool) -> list[str]:
    """The lines of a definition without methods that are left out and most docstrings."""
    lines: dict[int, str] = {
        i: module.lines[i - 1] for i in range(_first(node, module.lines), node.end_lineno + 1)
    }
    public = getattr(node, "name", None) == cls.__name__
    lines = {i: line for i, line in lines.items() if public or not line.lstrip().startswith("#:")}
    kept = (
        {
            one
            for one in node.body
            if isinstance(one, ast.FunctionDef)
            and (one.name == "__call__" or not one.name.startswith("_"))
        }
        if public and documented
        else set()
    )
    for one in ast.walk(node):
        if (
            isinstance(one, (ast.ClassDef, ast.FunctionDef))
            and one not in kept
            and ast.get_docstring(one)
            and len(one.body) > 1
        ):
            first, last = one.body[0].lineno, one.body[0].end_lineno
            its = public and one is node and last > first
            for i in range(first + its, last + 1):
                lines.pop(i, None)
            if its:
                lines[first] += '"""'
            elif not lines.get(last + 1, "x").strip():
                del lines[last + 1]
        for part in [
            *_left_out(one, module),
            *needed.left_out().intersection(ast.iter_child_nodes(one)),
        ]:
            for i in range(_first(part, module.lines), part.end_lineno + 1):
                lines.pop(i, None)
            if part in needed.refused:
                also = (
                    " = push_to_hub" if part.name == "save_pretrained" else ""
                )  # which makes the repository first
                lines[part.lineno] = f"    {part.name}{also} = {_missing(needed.refused[part])}\n"
            after = part.end_lineno + 1
            if isinstance(part, ast.FunctionDef) and not lines.get(after, "x").strip():
                del lines[after]
    return [lines[i] for i in sorted(lines)]
