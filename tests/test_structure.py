"""The package's shape: which module may import which, what is public, what an import costs."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import guided_diffusers

PACKAGE = Path(guided_diffusers.__file__).parent
ROOT = Path(__file__).parents[1]
# what these may import of ours; the others stand beside the chain, and may import it
ONLY = {
    "classifier": set(),
    "bundled": set(),
    "data": set(),
    "schedulers": set(),
    "noise": {"schedulers"},
    "guidance": {"noise"},
    "preprocess": set(),
    "perceptual": {"noise", "guidance", "preprocess"},
    "run": {"noise", "guidance"},
    "attach": {"noise", "guidance", "images", "run"},
    "modular": {"guidance", "run"},
    "images": set(),
    "clip": {"classifier"},
    "repository": {"source"},
    "source": {"noise", "schedulers"},
    "conditions": {"noise", "guidance"},
    "splitting": {"noise", "guidance"},
    "speed": {"noise", "guidance", "pipeline", "utils"},
    "pipeline": {
        "noise",
        "guidance",
        "conditions",
        "classifier",
        "images",
        "bundled",
        "repository",
        "splitting",
    },
}
LAST = ("hub", "cli", "__main__")  # and nothing before one of these imports it


def imported(path: Path, package: Path = PACKAGE) -> set[tuple[str, str]]:
    """(module of ours, name taken from it) of all imports of a file, also of those within functions."""
    found, depth = (
        set(),
        len(path.relative_to(package).parts) if path.is_relative_to(package) else 0,
    )
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if (
                node.level and node.level == depth
            ):  # of the package itself: from .noise import x, from . import openai
                found |= {(module[0] or name.name, name.name) for name in node.names}
            elif module[0] == "guided_diffusers":
                found |= {(".".join(module[1:]), name.name) for name in node.names}
        elif isinstance(node, ast.Import):
            ours = [
                name.name for name in node.names if name.name.split(".")[0] == "guided_diffusers"
            ]
            found |= {(name.partition(".")[2], "") for name in ours}
    return found


def graph() -> dict[str, set[str]]:
    modules: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            modules.setdefault(name, set()).update(module for module, _ in imported(path))
    return {name: used - {name} for name, used in modules.items()}


def test_imports_go_one_way() -> None:
    modules = graph()
    assert {"noise", "guidance", "pipeline", "classifier"} <= modules.keys() and modules[
        "guidance"
    ] == {"noise"}
    for name, used in modules.items():
        allowed = ONLY.get(
            name, modules.keys() - set(LAST[LAST.index(name) if name in LAST else 0 :])
        )
        assert used <= allowed, f"{name} imports {sorted(used - allowed)}"
    graphlib.TopologicalSorter(modules).prepare()  # no circles


def test_nothing_imports_training_or_examples_and_they_use_public_names() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [name.name for name in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            assert not {name.split(".")[0] for name in names} & {"training", "examples", "tests"}, (
                path
            )
    for path in [*ROOT.glob("training/*.py"), *ROOT.glob("examples/**/*.py")]:
        private = [
            name
            for name in imported(path)
            if any(part.startswith("_") for part in ".".join(name).split("."))
        ]
        assert not private, f"{path.name} uses {private}"


def test_public_names_are_few_and_there() -> None:
    names = guided_diffusers.__all__
    assert len(names) == len(set(names)) <= 25 and all(
        hasattr(guided_diffusers, name) for name in names
    )


def test_an_import_is_quiet_and_brings_nothing_that_diffusers_does_not() -> None:
    code = """
import json, sys
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
before = set(sys.modules)
import guided_diffusers
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    new = json.loads(run.stdout)  # nothing else was printed
    assert "guided_diffusers" in new and not run.stderr
    heavy = {
        "datasets",
        "transformers",
        "torchvision",
        "matplotlib",
        "sklearn",
        "torchmetrics",
        "pandas",
    }
    assert not {name.split(".")[0] for name in new} & heavy, new
