"""Self-contained files: what they contain, and the same results as with the package."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import diffusers
import pytest
import standalone_script
import torch
from diffusers import AutoencoderKL, UNet2DModel
from safetensors.torch import load_file
from test_hub import BLOCKS, contents, make_classifier

import guided_diffusers
from guided_diffusers import ClassifierGuidedPipeline, NoiseAwareClassifier, NoiseAwareCLIP
from guided_diffusers.modular import ClassifierGuidanceBlock
from guided_diffusers.openai import ADMDDIMScheduler, ADMUNet2DModel
from guided_diffusers.standalone import STAND_INS, _import_order, self_contained

ROOT = Path(__file__).parents[1]
CLASSES = (
    ClassifierGuidedPipeline,
    NoiseAwareClassifier,
    NoiseAwareCLIP,
    ADMUNet2DModel,
    ADMDDIMScheduler,
)
SCHEDULERS = {
    "mean": "DDPM",
    "latent mean": "DDPM",
    "up-sampling": "DDPM",
    "flow": "FlowMatchEulerDiscrete",
    "latent flow": "FlowMatchEulerDiscrete",
    "EDM": "EDMEuler",
    "consistency": "CMStochasticIterative",
    "trigflow": "SCM",
    "second order": "KDPM2Discrete",
    "own memory": "CogVideoXDPM",
}
KINDS = ("plain", "class-conditional", "latent", "spared", *SCHEDULERS)
# schedulers that must work in place of the plain pipeline's DDIM
EXCHANGED = (
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2DiscreteScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


def make(kind: str) -> ClassifierGuidedPipeline:
    torch.manual_seed(0)
    conditional = kind == "class-conditional" or "latent" in kind
    channels = 2 if kind == "up-sampling" else 1
    unet = UNet2DModel(8, channels, 1, **BLOCKS, num_class_embeds=4 if conditional else None)
    vae = None
    if "latent" in kind:
        blocks = (("DownEncoderBlock2D",), ("UpDecoderBlock2D",), (4,))
        vae = AutoencoderKL(1, 1, *blocks, norm_num_groups=2, latent_channels=1)
    scheduler = getattr(diffusers, SCHEDULERS.get(kind, "DDIM") + "Scheduler")(
        **{"clip_sample": False} if kind == "spared" else {}
    )
    defaults = {"guidance_algorithm": "mean"} if SCHEDULERS.get(kind) == "DDPM" else {}
    if conditional:
        defaults["classifier_free_scale"] = 2.0
    if kind == "spared":
        defaults |= {"guidance_algorithm": "strang", "guidance_every": 2}
        defaults["guidance_schedule"] = {"sigmas": [0.1, 10.0], "scales": [0.5, 2.0]}
    return ClassifierGuidedPipeline(unet, scheduler, make_classifier(), vae, defaults=defaults)


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("cls", CLASSES)
def test_a_file_imports_nothing_of_the_package_and_is_clean(cls: type, tmp_path: Path) -> None:
    """Imports within functions are for methods that only the package has, as `from_bundled`."""
    text = self_contained(cls)
    tree = ast.parse(text)
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    for node in tree.body:
        for imported in imports_of(node):
            assert not imported.startswith("guided_diffusers"), imported
    (tmp_path / "file.py").write_text(text)
    ruff = [sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml"]
    run = subprocess.run([*ruff, tmp_path / "file.py"], capture_output=True, text=True)
    if "No module named ruff" not in run.stderr:
        assert run.returncode == 0, run.stdout


def imports_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or "."]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


@pytest.mark.parametrize("cls", [ClassifierGuidedPipeline, NoiseAwareCLIP, ClassifierGuidanceBlock])
def test_the_names_of_concatenated_modules_are_distinct(cls: type) -> None:
    """Else one definition, or one import, would hide another in the file."""
    stand_ins = STAND_INS if cls is ClassifierGuidedPipeline else {}
    modules = _import_order(cls.__module__, stand_ins)
    assert len(modules) > 1
    definitions, imported = Counter(), {}
    for name in modules:
        for node in ast.parse(Path(sys.modules[name].__file__).read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module and not any(alias.asname for alias in node.names), name
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    source = (getattr(node, "module", ""), alias.name)
                    bound = alias.asname or alias.name
                    assert imported.setdefault(bound, source) == source, f"{name}: {bound}"
            else:
                definitions.update(defined_names(node))
    assert [name for name, count in definitions.items() if count > 1] == []
    assert definitions.keys() & imported.keys() == set()


def defined_names(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {
        n.id for target in targets if target for n in ast.walk(target) if isinstance(n, ast.Name)
    }


# ---------------------------------------------------------------- results


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("standalone")
    for kind in KINDS:
        make(kind).save_pretrained(directory / kind)
    return directory


@pytest.fixture(scope="module")
def expected(directory: Path) -> dict[str, torch.Tensor | str]:
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        for kind in KINDS:
            results |= standalone_script.outcomes(make(kind), kind, guided_diffusers)
    return results


@pytest.fixture(scope="module")
def standalone(directory: Path) -> dict[str, torch.Tensor | str]:
    """Results without the package; the process also saves the pipelines, in `directory`/again."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", standalone_script.__file__, "again"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    errors = json.loads((directory / "again" / "errors.json").read_text())
    return {**load_file(directory / "again" / "images.safetensors"), **errors}


def test_without_the_package_the_results_are_the_same(
    expected: dict[str, torch.Tensor | str], standalone: dict[str, torch.Tensor | str]
) -> None:
    """Images of all kinds, schedulers and arguments, and the text of every error."""
    for case, result in expected.items():
        if isinstance(result, str):
            assert standalone[case] == result, case
        else:
            assert torch.equal(standalone[case], result), (case, standalone[case])


def test_all_features_work(expected: dict[str, torch.Tensor | str]) -> None:
    """So the comparison is not one of errors only."""
    cases = [f"{kind}: as saved" for kind in KINDS]
    # strang's defaults refuse a scheduler that clips
    cases += [f"{kind}: DDIMScheduler" for kind in KINDS if kind != "spared"]
    features = ("guidance", "mean", "lie_trotter", "strang", "every", "tolerance", "vae")
    cases += [f"plain: {name}" for name in (*features, "use_flow_sigmas", *EXCHANGED)]
    editing = ("image and strength", "invert", "edit", "difference", "probabilities", "anomaly")
    cases += [f"plain: {name}" for name in editing]
    for case in cases:
        assert isinstance(expected[case], torch.Tensor), (case, expected[case])
    working = [
        name for name in standalone_script.SCHEDULERS if torch.is_tensor(expected[f"plain: {name}"])
    ]
    assert len(working) > 30, working
    assert expected["plain: guidance of a wrong type"].startswith("ValueError: guidance=['energy']")
    assert expected["plain: image"].startswith("ValueError: image")


def test_pipelines_loaded_one_after_the_other_stay_right(
    expected: dict[str, torch.Tensor | str], standalone: dict[str, torch.Tensor | str]
) -> None:
    """Diffusers runs every local pipeline.py in one module."""
    first = standalone_script.FIRST
    assert torch.equal(standalone["after all others"], expected[f"{first}: as saved"])


def test_saved_without_the_package_it_is_the_same(
    directory: Path,
    expected: dict[str, torch.Tensor | str],
    standalone: dict[str, torch.Tensor | str],
) -> None:
    """The same files, code included; it loads again without the package and with it."""
    for kind in KINDS:
        assert contents(directory / "again" / kind) == contents(directory / kind)
        images = expected[f"{kind}: as saved"]
        assert torch.equal(standalone[f"{kind}: saved again"], images)
        pipeline = ClassifierGuidedPipeline.from_pretrained(directory / "again" / kind)
        assert torch.equal(standalone_script.call(pipeline, kind), images)
    first = contents(directory / standalone_script.FIRST)
    assert contents(directory / "again" / "after all others") == first
    assert {"pipeline.py", "classifier/guided_diffusers_classifier.py"} <= first.keys()
