"""Load every pipeline folder of a directory without the package, sample from it, and save it again.

    python standalone_script.py OUTPUT        # in the directory

The tests import `outcomes` for the same calls with the package. Nothing in this file may import the
package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import save_file

FIRST = "EDM"  # loaded before all others, and sampled again after them
SCHEDULERS = sorted(
    name
    for name in dir(diffusers.schedulers)
    if name.endswith("Scheduler") and not name.startswith("Flax") and hasattr(diffusers, name)
)


def call(pipeline: Any, kind: str, **options: Any) -> torch.Tensor:
    if kind == "up-sampling":
        options.setdefault("image", torch.zeros(1, 1, 4, 4))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        ["boot", {1: 0.5, 2: 0.5}] if kind == "plain" else ["boot", 1],
        num_inference_steps=2 if kind == "trigflow" else 3,  # all that its scheduler takes
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **options,
    ).images


def outcomes(pipeline: Any, kind: str, guidance: ModuleType) -> dict[str, torch.Tensor | str]:
    """{case: images, or text of the error}; `guidance` is the module that has `EnergyGuidance`."""
    results = {}

    def add(case: str, scheduler: type | None = None, **options: Any) -> None:
        try:
            if scheduler is not None:
                pipeline.scheduler = scheduler()
            results[f"{kind}: {case}"] = call(pipeline, kind, **options)
        except Exception as error:
            results[f"{kind}: {case}"] = f"{type(error).__name__}: {error}"

    add("as saved")
    saved_scheduler = pipeline.scheduler
    if kind == "plain":
        energy = guidance.EnergyGuidance(lambda x0: x0.flatten(1).square().sum(1), 0.5)
        add("guidance", guidance=energy)
        add("guidance of a wrong type", guidance=["energy"])
        add("image", image=torch.zeros(1, 1, 4, 4))
        start = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
        add("image and strength", image=start, strength=0.7)
        add("every", guidance_every=2)
        add("tolerance", guidance_tolerance=0.1)
        for algorithm in ("lie_trotter", "strang"):
            add(algorithm, diffusers.EulerDiscreteScheduler, guidance_algorithm=algorithm)
        add("mean", diffusers.DDPMScheduler, guidance_algorithm="mean")
        for name in SCHEDULERS:
            add(name, getattr(diffusers, name))
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler(**flow)
        add("use_flow_sigmas")
        pipeline.scheduler = saved_scheduler
        pipeline.register_modules(vae=AutoencoderKL.from_pretrained("latent/vae"))
        add("vae")
        pipeline.register_modules(vae=None)
        results |= edits(pipeline, start)
    else:
        add("DDIMScheduler", diffusers.DDIMScheduler)
    pipeline.scheduler = saved_scheduler
    return results


def edits(pipeline: Any, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inversion, an edit within a mask, and maps."""
    pipeline.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    steps = {"num_inference_steps": 3, "strength": 0.7}
    output = pipeline.edit(image, "boot", output_type="pt", mask=image[1, 0] > 0.5, **steps)
    return {
        "plain: invert": pipeline.invert(image, **steps),
        "plain: edit": output.images,
        "plain: difference": output.difference,
        "plain: probabilities": output.probabilities_after,
        "plain: anomaly": pipeline.anomaly(image, "boot", **steps).maps,
    }


def load(folder: str) -> tuple[Any, ModuleType]:
    """The pipeline, and the module that its file made."""
    pipeline = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=folder, trust_remote_code=True
    )
    return pipeline, sys.modules[type(pipeline).__module__]


def main(output: str) -> None:
    sys.modules["guided_diffusers"] = None  # an import of it fails
    kinds = sorted(path.parent.name for path in Path().glob("*/model_index.json"))
    first, _ = load(FIRST)
    results = {}
    for kind in kinds:
        pipeline, module = load(kind)
        results |= outcomes(pipeline, kind, module)
        pipeline.save_pretrained(f"{output}/{kind}")
    results["after all others"] = call(first, FIRST)
    first.save_pretrained(f"{output}/after all others")
    for kind in kinds:
        results[f"{kind}: saved again"] = call(load(f"{output}/{kind}")[0], kind)
    errors = {case: result for case, result in results.items() if isinstance(result, str)}
    images = {case: result.contiguous() for case, result in results.items() if case not in errors}
    save_file(images, f"{output}/images.safetensors")
    Path(output, "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(sys.argv[1])
