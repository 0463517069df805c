"""A block of Modular Diffusers: classifier guidance in the loop of any modular pipeline of images.

Diffusers' guiders combine predictions and never see the sample; a block between the denoiser and
the scheduler does:

    blocks = StableDiffusionXLAutoBlocks().get_workflow("text2image")
    denoise = blocks.sub_blocks["denoise.denoise"].sub_blocks
    denoise.insert("guidance", ClassifierGuidanceBlock(), 2)  # after "denoiser"
    pipeline = blocks.init_pipeline(...)
    pipeline.update_components(classifier=classifier)
    pipeline(prompt="a photo of a shoe", label="sneaker", guidance_scale=3.0, output="images")

`label` and `guidance_scale` are `ClassifierGuidance`'s `label` and `scale`. `guide` applies every
kind of guidance to a modular pipeline, too.

    ClassifierGuidanceBlock().push_to_hub("user/block")    # and without guided-diffusers:
    block = ModularPipelineBlocks.from_pretrained("user/block", trust_remote_code=True)
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import ModularPipeline
from diffusers.modular_pipelines import BlockState, ComponentSpec, InputParam, ModularPipelineBlocks

from .guidance import ClassifierGuidance, check_devices
from .guider import Guider, Prediction, StepFinder
from .networks import evaluating
from .noise import split_variance

BLOCK_FILE = "guided_diffusers_modular"  # what the block's code is called beside its config


class ClassifierGuidanceBlock(ModularPipelineBlocks):
    """Correct a step's `noise_pred` by `guidance_scale * grad log p(label | latents)`.

    Its place is in the denoising loop, after the denoiser, whose `noise_pred`, and `latents`, it
    reads.
    """

    @property
    def description(self) -> str:
        return (
            "Step within the denoising loop, after the denoiser, that steers to what a "
            "noise-aware classifier of the latents calls the label."
        )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("scheduler"), ComponentSpec("classifier", torch.nn.Module)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "latents", required=True, type_hint=torch.Tensor, description="The noisy latents."
            ),
            InputParam(
                "label",
                required=True,
                description="A label of `ClassifierGuidance`, or one per image.",
            ),
            InputParam(
                "guidance_scale",
                default=1.0,
                description="How strongly, or one per image; 0 is off.",
            ),
        ]

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save as in Diffusers, with the code that loads the block without guided-diffusers.

        Of a subclass from elsewhere no code is saved: its file may hold more than the class.
        """
        cls = type(self)
        package = cls.__module__.partition(".")[0]
        if package == "guided_diffusers":
            code = import_module("guided_diffusers.standalone").self_contained(cls)
        elif package == "diffusers_modules":  # it was loaded from such a file
            code = Path(inspect.getfile(cls)).read_text()
        else:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
            return
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{BLOCK_FILE}.py").write_text(code)
        class_name = f"{BLOCK_FILE}.{cls.__name__}"
        self.register_to_config(auto_map={ModularPipelineBlocks.__name__: class_name})
        self.save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @torch.no_grad()
    def __call__(
        self, components: ModularPipeline, block_state: BlockState, i: int, t: torch.Tensor
    ) -> tuple[Any, BlockState]:
        if i == 0:
            block_state.guidance_run = self._start_run(components, block_state, t)
        guider, finder = block_state.guidance_run
        latents = block_state.latents
        terms = guider.start_step(finder.advance(t), len(latents))
        if terms:
            output, variance = split_variance(block_state.noise_pred, latents.shape[1])
            with evaluating(components.classifier):
                output, _ = guider.correct(latents, Prediction(output))
            if variance is not None:
                output = torch.cat([output, variance], dim=1)
            block_state.noise_pred = output
        guider.finish_step(block_state.noise_pred)  # the scheduler's step comes after this block
        return components, block_state

    def _start_run(
        self, components: ModularPipeline, block_state: BlockState, t: torch.Tensor
    ) -> tuple[Guider, StepFinder]:
        term = ClassifierGuidance(
            components.classifier, block_state.label, block_state.guidance_scale
        )
        check_devices([term], block_state.latents.device)
        finder = StepFinder(components.scheduler, t)
        return Guider(components.scheduler, [term], first=finder.first), finder
