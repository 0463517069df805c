"""The package's shape: which module may import which, what is public, what an import costs."""

from __future__ import annotations

import ast
import graphlib
import importlib
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import guided_diffusers

PACKAGE = Path(guided_diffusers.__file__).parent
ROOT = Path(__file__).parents[1]
# what each module of the core may import; it travels to the Hub as one file, without the rest
CORE = {
    "checks": set(),
    "defaults": set(),
    "noise": {"checks"},
    "families": {"checks", "noise"},
    "schedule_checks": {"checks", "families", "noise"},
    "likelihood": {"checks"},
    "images": {"checks"},
    "weights": {"checks"},
    "unet_blocks": set(),
    "classifier": {"unet_blocks", "weights"},
    "repository": {"checks", "families", "noise", "weights"},
    "networks": {"checks"},
    "guidance": {"checks", "noise", "likelihood", "networks"},
    "run_checks": {"checks", "noise", "guidance"},
    "splitting": {"checks", "noise", "guidance"},
    "particles": {"noise", "guidance"},
    "guider": {
        "noise",
        "schedule_checks",
        "guidance",
        "networks",
        "run_checks",
        "splitting",
        "particles",
    },
    "presets": {"checks", "defaults", "guidance", "noise", "schedule_checks"},
    "sizes": {"checks", "guidance", "images", "noise"},
    "arguments": {
        "checks",
        "noise",
        "defaults",
        "guidance",
        "likelihood",
        "images",
        "networks",
        "particles",
        "presets",
        "sizes",
    },
    "inversion": {"noise"},
    "edits": {
        "checks",
        "noise",
        "likelihood",
        "images",
        "networks",
        "run_checks",
        "arguments",
        "sizes",
        "inversion",
    },
    "pipeline": {
        "edits",
        "presets",
        "sizes",
        "inversion",
        "checks",
        "families",
        "noise",
        "schedule_checks",
        "defaults",
        "guidance",
        "networks",
        "run_checks",
        "likelihood",
        "guider",
        "images",
        "arguments",
        "classifier",
        "repository",
        "weights",
    },
}
# beside the core: of the core whatever they like, of the rest this
BESIDE = {
    "attach": {"latent_images", "loop_replay", "network_calls", "pipeline_graph"},
    "latent_images": set(),
    "loop_replay": {"latent_images", "network_calls"},
    "network_calls": set(),
    "pipeline_graph": set(),
    "modular": set(),
    "standalone": set(),
    "preprocess": set(),
    "bundled": set(),
    "files": set(),
    "text": set(),
    "cli_options": {"text"},
    "deprecated": set(),
    "lazy": {"deprecated"},
    "clip": set(),
    "utils": {"bundled", "text"},
    "assembly": {"utils"},
    "image_guidance": {"preprocess", "utils"},
    "speed": {"utils"},
}
ROOMS = (
    "sampling",
    "editing",
    "evaluation",
    "sweep",
    "diagnosis",
    "demo",
    "hub",
    "openai",
    "learning",
)
# a room is used through its package, or through these modules of it
PUBLIC_MODULES = {
    "evaluation.metrics",
    "learning.arrays",
    "learning.pixels",
    "learning.data",
    "learning.losses",
}


def imports(path: Path, package: Path = PACKAGE) -> set[tuple[str, str, bool]]:
    """(module of this package, name imported from it, whether relative) of all imports of a file."""
    found = set()
    parents = path.relative_to(package).parts[:-1] if path.is_relative_to(package) else ()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = parents[: len(parents) - node.level + 1]
                module = ".".join((*base, *filter(None, [module])))
            elif module.partition(".")[0] == "guided_diffusers":
                module = module.partition(".")[2]
            else:
                continue
            found |= {(module or name.name, name.name, node.level > 0) for name in node.names}
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.partition(".")[0] == "guided_diffusers":
                    found.add((name.name.partition(".")[2], "", False))
    return found


def graph() -> dict[str, set[str]]:
    """Top-level module or room -> those that it imports by relative imports."""
    modules: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            used = {module.partition(".")[0] for module, _, relative in imports(path) if relative}
            modules.setdefault(name, set()).update(used - {name})
    return modules


def test_imports_go_one_way() -> None:
    modules = graph()
    assert modules.keys() == {*CORE, *BESIDE, *ROOMS, "cli", "__main__"}
    for name, allowed in CORE.items():
        assert modules[name] <= allowed, f"{name} imports {sorted(modules[name] - allowed)}"
    for name, allowed in BESIDE.items():
        excess = modules[name] - CORE.keys() - allowed
        assert not excess, f"{name} imports {sorted(excess)}"
    for name in ROOMS:
        assert not modules[name] & {"cli", "__main__"}
    graphlib.TopologicalSorter(modules).prepare()  # no circles


def test_no_circle_within_a_room() -> None:
    for room in (*ROOMS, "evaluation/metrics"):
        modules = {}
        for path in (PACKAGE / room).glob("*.py"):
            if path.stem != "__init__":
                inner = room.replace("/", ".") + "."
                used = {m.removeprefix(inner) for m, _, _ in imports(path) if m.startswith(inner)}
                modules[path.stem] = used
        graphlib.TopologicalSorter(modules).prepare()


def test_rooms_do_not_use_the_insides_of_each_other() -> None:
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module, imported, _ in imports(path):
            room = module.partition(".")[0]
            if room in ROOMS and name not in (room, "cli", "__init__"):
                assert module in {room, *PUBLIC_MODULES}, f"{path} uses {imported} of {module}"


def test_saved_code_has_no_import_of_the_package() -> None:
    """Diffusers would advise to `pip install guided_diffusers`, a name that isn't registered."""
    pattern = r"^\s*(?:from|import)\s+guided_diffusers"  # as in its `check_imports`
    for name in (*CORE, "clip", "modular"):
        assert not re.search(pattern, (PACKAGE / f"{name}.py").read_text(), re.MULTILINE), name


def test_nothing_imports_training_or_examples_and_they_use_public_names() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            tops = {name.partition(".")[0] for name in names}
            assert not tops & {"training", "examples", "tests"}, path
    for path in [*ROOT.glob("training/*.py"), *ROOT.glob("examples/**/*.py")]:
        for module, name, _ in imports(path):
            private = any(part.startswith("_") for part in f"{module}.{name}".split("."))
            assert not private, f"{path.name} uses {module}.{name}"


def test_public_names_are_few_and_exist() -> None:
    names = guided_diffusers.__all__
    assert len(names) == len(set(names)) <= 25
    assert all(hasattr(guided_diffusers, name) for name in names)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("guided_diffusers", "ModelGuidance", "AutoGuidance"),
        ("guided_diffusers", "Step", "StepContext"),
        ("guided_diffusers.sweep", "Point", "SweepSetting"),
        ("guided_diffusers.diagnosis", "Place", "EvalLevel"),
        ("guided_diffusers.evaluation", "Rows", "DatasetImages"),
        ("guided_diffusers.evaluation", "of_classifier", "wrap_classifier"),
        ("guided_diffusers.evaluation.metrics", "Answers", "ConfusionMatrix"),
    ],
)
def test_old_names_are_the_new_ones_with_a_warning(module: str, old: str, new: str) -> None:
    place = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{old} is {module}.{new} now"):
        assert getattr(place, old) is getattr(place, new)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        place.nothing  # noqa: B018


def test_moved_modules_are_found_with_a_warning() -> None:
    from guided_diffusers.deprecated import MOVED

    for old, new in MOVED.items():
        moved = importlib.import_module(f"guided_diffusers.{old}")
        target = importlib.import_module(f"guided_diffusers.{new}")
        name = next(name for name in vars(target) if not name.startswith("_"))
        with pytest.warns(DeprecationWarning, match=f"guided_diffusers.{old} is"):
            assert getattr(moved, name) is getattr(target, name)


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


@pytest.mark.parametrize(
    "imports",
    [
        "import guided_diffusers; from diffusers import DiffusionPipeline",
        "from diffusers import DiffusionPipeline; import guided_diffusers",
        "import diffusers, guided_diffusers.noise; from diffusers import DiffusionPipeline",
        "import guided_diffusers.pipeline; from diffusers import DiffusionPipeline",
        "import guided_diffusers, importlib.util; importlib.util.find_spec('diffusers'); "
        "from diffusers import DiffusionPipeline",
    ],
)
def test_diffusers_finds_the_classes_in_whatever_order_both_are_imported(imports: str) -> None:
    """No code of the folder runs: `trust_remote_code` isn't set."""
    code = f"""
{imports}
pipeline = DiffusionPipeline.from_pretrained({str(PACKAGE / "bundled" / "fashion-mnist")!r})
print(type(pipeline).__module__, type(pipeline.classifier).__module__)
from diffusers import ClassifierGuidedPipeline
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["guided_diffusers.pipeline", "guided_diffusers.classifier"]


def test_help_takes_less_than_a_second_and_imports_no_torch() -> None:
    code = """
import sys
from guided_diffusers.cli import main
for words in ([], ["sample"], ["edit"], ["convert"], ["inspect"], ["evaluate"], ["sweep"], ["push"],
              ["demo"], ["space"]):
    try:
        main([*words, "--help"])
    except SystemExit as end:
        assert end.code == 0
assert not {"torch", "diffusers", "transformers", "numpy"} & set(sys.modules)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_names_imported_at_first_use_are_those_of_all() -> None:
    for package in (
        "",
        ".sampling",
        ".editing",
        ".evaluation",
        ".sweep",
        ".diagnosis",
        ".demo",
        ".hub",
        ".openai",
    ):
        module = importlib.import_module(f"guided_diffusers{package}")
        assert set(module.__all__) <= set(dir(module))
        for name in module.__all__:
            assert getattr(module, name) is not None


def test_terms_extend_the_contract_in_at_most_two_steps() -> None:
    def depth(cls: type) -> int:
        subclasses = [
            c for c in cls.__subclasses__() if c.__module__.startswith("guided_diffusers.")
        ]
        return max((1 + depth(subclass) for subclass in subclasses), default=0)

    importlib.import_module("guided_diffusers.diagnosis")
    assert depth(guided_diffusers.Guidance) == 2
