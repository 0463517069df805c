"""A pipeline's file: what each kind of pipeline needs and no more, the same images, and no silence about the rest."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from guided_diffusers.source import code_of
from safetensors.torch import load_file
from test_hub import BLOCKS, make_classifier

from guided_diffusers import ClassifierGuidedPipeline, source

ROOT = Path(__file__).parents[1]
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


def make(kind: str) -> ClassifierGuidedPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        8,
        2 if kind == "up-sampling" else 1,
        1,
        **BLOCKS,
        num_class_embeds=4 if kind == "class-conditional" or "latent" in kind else None,
    )
    vae = (
        AutoencoderKL(
            1,
            1,
            ("DownEncoderBlock2D",),
            ("UpDecoderBlock2D",),
            (4,),
            norm_num_groups=2,
            latent_channels=1,
        )
        if "latent" in kind
        else None
    )
    scheduler = getattr(diffusers, SCHEDULERS.get(kind, "DDIM") + "Scheduler")(
        **{"clip_sample": False} if kind == "spared" else {}
    )
    defaults = {"guidance_algorithm": "mean"} if SCHEDULERS.get(kind) == "DDPM" else {}
    if kind == "class-conditional" or "latent" in kind:
        defaults["classifier_free_scale"] = 2.0
    if kind == "spared":
        defaults |= {"guidance_algorithm": "strang", "guidance_every": 2}
    pipeline = ClassifierGuidedPipeline(unet, scheduler, make_classifier(), vae, defaults=defaults)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline: ClassifierGuidedPipeline, kind: str, **options: object) -> torch.Tensor:
    if kind == "up-sampling":
        options["image"] = torch.zeros(1, 1, 4, 4)
    steps = 2 if kind == "trigflow" else 3  # all that its scheduler takes
    return pipeline(
        ["boot", {1: 0.5, 2: 0.5}] if kind == "plain" else ["boot", 1],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **options,
    ).images


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_short_and_clean_and_has_no_more_than_its_pipeline_needs(
    kind: str, tmp_path: Path
) -> None:
    text = code_of(make(kind))
    assert len(text.splitlines()) < (1000 if kind == "spared" else 900)
    tree = ast.parse(text)
    assert not any(
        node.level or (node.module or "").startswith("guided_diffusers")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    )
    defined = {
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    latent = ("latent", "latent mean", "latent flow")
    for name, kinds in (
        ("posterior_variance", ("mean", "latent mean", "up-sampling")),
        ("low_resolution", ("up-sampling",)),
        ("decode", latent),
        ("NullGuidance", ("class-conditional", *latent)),
        ("rare_affine", ("EDM", "consistency", "trigflow")),
        ("custom_step_fn", ("own memory",)),
        ("OperatorSplitting", ("spared",)),
        ("GuidanceReuse", ("spared",)),
        ("is_flow", ("flow", "latent flow")),
        ("EnergyGuidance", ()),
        ("save", ()),
    ):
        assert (name in defined) == (kind in kinds), name
    assert "Generate images of a label" in text
    assert ("num_images_per_label: consecutive images" in text) == (
        kind not in (*latent, "up-sampling", "spared")
    )  # which have no room for that
    (tmp_path / "file.py").write_text(text)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--config",
            ROOT / "pyproject.toml",
            tmp_path / "file.py",
        ],
        capture_output=True,
        text=True,
    )
    if "No module is_instance_by_name ruff" not in run.stderr:
        assert run.returncode == 0, run.stdout


WITHOUT = """
import inspect, json, sys
sys.modules["guided_diffusers"] = None  # an import of it fails
import diffusers, torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
torch.set_num_threads(1)
images, errors = {}, {}

CALL

def error(kind, name, function, *arguments, **options):
    try:
        function(*arguments, **options)
        errors[f"{kind}: {name}"] = "nothing was raised"
    except Exception as error:
        errors[f"{kind}: {name}"] = f"{type(error).__name__}: {error}"

first = DiffusionPipeline.from_pretrained("EDM", custom_pipeline="EDM", trust_remote_code=True)
first.set_progress_bar_config(disable=True)
for kind in KINDS:
    pipeline = DiffusionPipeline.from_pretrained(kind, custom_pipeline=kind, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    images[kind] = call(pipeline, kind)
    own = pipeline.scheduler
    if kind == "plain":
        vae = diffusers.AutoencoderKL.from_pretrained("latent/vae")
        error(kind, "saving", pipeline.save_pretrained, "again")
        error(kind, "pushing", pipeline.push_to_hub, "user/model")
        error(kind, "guidance", call, pipeline, kind, guidance=[])
        error(kind, "image", call, pipeline, kind, image=torch.zeros(1, 1, 4, 4))
        pipeline.register_modules(vae=vae)
        error(kind, "vae", call, pipeline, kind)
        pipeline.register_modules(vae=None)
        pipeline.scheduler = diffusers.DDPMScheduler()
        error(kind, "mean", call, pipeline, kind, guidance_algorithm="mean")
        error(kind, "strang", call, pipeline, kind, guidance_algorithm="strang")
        error(kind, "every", call, pipeline, kind, guidance_every=2)
        error(kind, "tolerance", call, pipeline, kind, guidance_tolerance=0.1)
        for name in EXCHANGED:
            pipeline.scheduler = getattr(diffusers, name)()
            images[name] = call(pipeline, kind)
        for name in REFUSED:
            pipeline.scheduler = getattr(diffusers, name)()
            error(kind, name, call, pipeline, kind)
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True,
                                                                   prediction_type="flow_prediction")
        error(kind, "use_flow_sigmas", call, pipeline, kind)
    elif kind in SCHEDULERS and "mean" not in kind and kind != "up-sampling":
        pipeline.scheduler = diffusers.DDIMScheduler()
        images[kind + " DDIM"] = call(pipeline, kind)
        pipeline.scheduler = diffusers.SASolverScheduler()
        error(kind, "SASolverScheduler", call, pipeline, kind)
        pipeline.scheduler = diffusers.KarrasVeScheduler()
        error(kind, "KarrasVeScheduler", call, pipeline, kind)
images["after all others"] = call(first, "EDM")
save_file({kind: value.contiguous() for kind, value in images.items()}, "theirs.safetensors")
json.dump(errors, open("errors.json", "w"))
"""
EXCHANGED = ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler")
REFUSED = (
    "IPNDMScheduler",
    "SASolverScheduler",
    "KDPM2DiscreteScheduler",
    "ScoreSdeVeScheduler",
    "SCMScheduler",
)


def test_without_the_package_images_are_the_same_and_what_is_not_there_is_refused(
    tmp_path: Path,
) -> None:
    ours = {}
    for kind in KINDS:
        pipeline = make(kind)
        pipeline.save_pretrained(tmp_path / kind)
        ours[kind] = call(pipeline, kind)
        if kind == "plain":
            for name in EXCHANGED:
                pipeline.scheduler = getattr(diffusers, name)()
                ours[name] = call(pipeline, kind)
        elif kind in SCHEDULERS and "mean" not in kind and kind != "up-sampling":
            pipeline.scheduler = DDIMScheduler()
            ours[kind + " DDIM"] = call(pipeline, kind)
    ours["after all others"] = ours["EDM"]  # Diffusers has one module for all local pipelines
    definition = inspect.getsource(call).replace(
        "pipeline: ClassifierGuidedPipeline, kind: str, **options: object",
        "pipeline, kind, **options",
    )
    names = "\n".join(
        f"{name} = {globals()[name]!r}" for name in ("KINDS", "SCHEDULERS", "EXCHANGED", "REFUSED")
    )
    script = WITHOUT.replace("CALL", names + "\n" + definition)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert theirs.keys() == ours.keys()
    for name, images in ours.items():
        assert torch.equal(images, theirs[name]), name
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert len(errors) == 10 + len(REFUSED) + 2 * len(
        [kind for kind in theirs if kind.endswith(" DDIM")]
    )
    for name, text in errors.items():
        assert text.startswith("ImportError") and text.endswith(
            "needs the package: pip install guided-diffusers"
        ), name


def test_what_is_spared_must_be_in_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "OPTIONS", (*source.OPTIONS, "if self.renamed"))
    with pytest.raises(ValueError, match="if self.renamed"):
        source.code_of(make("plain"))
