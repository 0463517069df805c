"""Train a noise-aware classifier p(y | x_t) with Accelerate.

    accelerate launch training/train_classifier.py --train_data_dir data/fashion-mnist --resolution 28 \\
        --output_dir out/classifier
    accelerate launch training/train_classifier.py --train_data_dir photos --scheduler google/ddpm-cat-256
    accelerate launch training/train_classifier.py ... --vae stabilityai/sd-vae-ft-mse --resolution 256 --center_crop
    accelerate launch training/train_classifier.py ... --resume_from_checkpoint latest # a run that was stopped goes on
    accelerate launch training/train_classifier.py ... --problem_type multi_label_classification --label_column tags
    accelerate launch training/train_classifier.py ... --init_from out/unet --dlsm_weight 1 --score_model out/unet
    accelerate launch training/train_classifier.py ... --push_to_hub --hub_model_id user/classifier
    accelerate launch --multi_gpu --num_processes 2 training/train_classifier.py ...   # several GPUs
    torchrun --standalone --nproc_per_node 2 training/train_classifier.py --cpu ...    # several processes on CPUs

--output_dir becomes a folder that `NoiseAwareClassifier.from_pretrained` reads, with the labels' names and the noise
schedule in its config. Next to it: `metrics.json`, accuracy and cross entropy (of a regressor R^2) at ten noise levels
of the held-out split; `diagnosis.json` and `diagnosis.png`, also of its gradient, with the verdict whether it is fit to
guide. What is learned, and from which weights on, is in `recipes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import ModelMixin

from guided_diffusers import NoiseAwareClassifier
from guided_diffusers.diagnosis import GAPS, calibration_gaps, diagnose, plot, with_calibration
from guided_diffusers.learning.classifier_losses import FIGURES, SINGLE, held_out_scores
from guided_diffusers.learning.data import TargetedImages
from guided_diffusers.learning.latents import load_vae, write_latents
from guided_diffusers.learning.loop import Batch, Run, finish, held_out_figures, ten_levels
from guided_diffusers.learning.options import (
    Images,
    explained,
    load_data,
    load_scheduler,
    make_accelerator,
    make_model,
    option,
    parse,
)
from guided_diffusers.learning.publishing import DEFAULT, NoisyOptions, publish, trained_schedule
from guided_diffusers.learning.recipes import (
    Recipe,
    RecipeOptions,
    architecture,
    labelled,
    load_start,
    start_at,
    start_schedule,
    without_labels,
)


@dataclass
class ClassifierOptions(NoisyOptions, RecipeOptions):
    diagnosis_images: int = option(
        500, "held-out images by which every evaluation says whether it is fit to guide; 0: off"
    )


def make_classifier(
    options: ClassifierOptions,
    data: Images | TargetedImages,
    schedule: dict[str, Any],
    start: ModelMixin | None = None,
) -> NoiseAwareClassifier:
    if options.problem_type == SINGLE and len(data.id2label) < 2:
        raise ValueError(
            f"--label_column {options.label_column}: {len(data.id2label)} labels found, two or more are "
            f"needed; the dataset has the columns {data.dataset.column_names}"
        )
    default = DEFAULT if start is None else architecture(start)
    return make_model(
        NoiseAwareClassifier,
        options,
        default,
        sample_size=data.resolution,
        in_channels=data.channels,
        num_labels=len(data.id2label) or data.num_labels,
        id2label=data.id2label or None,
        label2id=None,
        problem_type=options.problem_type,
        **schedule,
    )


def write_diagnosis(
    options: ClassifierOptions,
    accelerator: Accelerator,
    model: NoiseAwareClassifier,
    held_out: Images,
    last: bool,
) -> None:
    """`diagnosis.json` and its picture, by a copy in full precision, which the network under training may not keep to.

    Its own noise schedule says which noise levels a run has; the gradient is compared with itself under other noise.
    """
    plain = NoiseAwareClassifier.from_config(model.config)
    plain.load_state_dict(model.state_dict())
    found = diagnose(
        plain.to(accelerator.device).eval(),
        held_out,
        images=options.diagnosis_images,
        gradient_images=32,
        batch_size=options.train_batch_size,
        finite_differences=False,
        progress=False,
    )
    if options.vae is not None:  # latents have no range
        found = replace(found, mismatches=())
    found.save(options.output_dir, picture=find_spec("matplotlib") is not None)
    if last:
        print(f"{found.verdict.summary}\n" + "\n".join([*found.verdict.words, *found.mismatches]))


def main() -> None:
    options = parse(ClassifierOptions, __doc__)
    with explained():
        accelerator = make_accelerator(options)
        vae = load_vae(options)
        images = load_data(without_labels(options), accelerator, vae)
        data, held_out = labelled(options, *images)
        start = load_start(options.init_from)
        scheduler = start_schedule(options, start) or load_scheduler(options)
        schedule = trained_schedule(options, scheduler)
        set_seed(options.seed)
        model = make_classifier(options, data, schedule, start)
        if (started := start_at(options, model, start, data)) is not None:
            accelerator.print(started)
        recipe = Recipe(options, accelerator, scheduler, schedule["num_train_timesteps"] - 1, data)
        run = Run(options, accelerator, model, data)
        write_latents(options, accelerator, vae, *images)

    def logits(
        model: torch.nn.Module, batch: Batch, eps: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        return model(scheduler.add_noise(batch["pixel_values"], eps, t), t).logits.float()

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, Any]:
        def score(batch: Batch, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            answer, label = logits(model, batch, eps, t), batch["label"]
            scores = held_out_scores(answer, label, options.problem_type, recipe.variance)
            return torch.stack(
                [*scores.values(), *(calibration_gaps(answer, label).T if gaps else ())]
            )

        gaps = GAPS if options.problem_type == SINGLE else ()
        figures = held_out_figures(
            options,
            accelerator,
            held_out,
            ten_levels(schedule["num_train_timesteps"]),
            (*FIGURES[options.problem_type], *gaps),
            score,
        )
        if figures and gaps:
            figures["held_out"] = [with_calibration(row) for row in figures["held_out"]]
            if step == run.steps and accelerator.is_main_process and find_spec("matplotlib"):
                plot(figures["held_out"], Path(options.output_dir) / "curves.png")
            if (
                accelerator.is_main_process
                and options.diagnosis_images
                and schedule["num_train_timesteps"] > 1
            ):
                write_diagnosis(options, accelerator, model, held_out, last=step == run.steps)
        return figures

    model = run.train(recipe, evaluate)
    if accelerator.is_main_process:
        model.save_pretrained(options.output_dir)
    finish(accelerator)
    if accelerator.is_main_process:
        publish(options, model)


if __name__ == "__main__":
    main()
