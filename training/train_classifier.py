# /// script
# requires-python = ">=3.10"
# dependencies = ["guided-diffusers"]
# ///
# From a checkout: uv run --with . python training/train_classifier.py ...
"""Train a noise-aware classifier p(y | x_t) with Accelerate.

    accelerate launch train_classifier.py --train_data_dir data/fashion-mnist --resolution 28 \\
        --output_dir out/classifier
    accelerate launch train_classifier.py --train_data_dir photos --scheduler google/ddpm-cat-256
    accelerate launch train_classifier.py ... --vae stabilityai/sd-vae-ft-mse --resolution 256 \\
        --center_crop                                                  # on latents
    accelerate launch train_classifier.py ... --resume_from_checkpoint latest
    accelerate launch train_classifier.py ... --problem_type multi_label_classification \\
        --label_column tags
    accelerate launch train_classifier.py ... --init_from out/unet --dlsm_weight 1 \\
        --score_model out/unet
    accelerate launch train_classifier.py ... --push_to_hub --hub_model_id user/classifier
    accelerate launch --multi_gpu --num_processes 2 train_classifier.py ...
    torchrun --standalone --nproc_per_node 2 train_classifier.py --cpu ...      # two CPU processes

--output_dir becomes a folder for `NoiseAwareClassifier.from_pretrained`, with the label names and
the noise schedule in its config. Beside the model: `metrics.json` (accuracy and cross entropy, of a
regressor R^2, of the held-out split at ten noise levels); `diagnosis.json` and `diagnosis.png`
(also of its gradient, and whether it is fit to guide).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, set_seed
from diffusers import DDPMScheduler, ModelMixin

from guided_diffusers import NoiseAwareClassifier
from guided_diffusers.diagnosis import GAPS, calibration_gaps, diagnose, plot, with_calibration
from guided_diffusers.learning.annotations import TargetedImages
from guided_diffusers.learning.batches import Batch
from guided_diffusers.learning.classifier_losses import METRICS, REGRESSION, SINGLE, held_out_scores
from guided_diffusers.learning.classifier_objective import (
    ClassifierLoss,
    ScoreModel,
    parse_class_weights,
)
from guided_diffusers.learning.distributed import SHARDED, exit_on_value_error, make_accelerator
from guided_diffusers.learning.held_out import eval_timesteps, held_out_metrics
from guided_diffusers.learning.latents import load_vae, write_latents
from guided_diffusers.learning.loop import Trainer
from guided_diffusers.learning.losses import LossSecondMomentSampler
from guided_diffusers.learning.options import AT_LEAST_0, Options, Range, changeable, option, parse
from guided_diffusers.learning.prepare import (
    DEFAULT_CLASSIFIER,
    Images,
    load_data,
    load_scheduler,
    make_model,
    trained_schedule,
)
from guided_diffusers.learning.publishing import save_and_publish
from guided_diffusers.learning.warm_start import (
    classifier_config,
    copy_weights,
    initial_schedule,
    last_layer_names,
    load_initial_model,
)

FINITE = Range(0, math.inf, open=True)


@dataclass
class ClassifierOptions(Options):
    adam_weight_decay: float = option(0.05, "AdamW's weight decay", AT_LEAST_0)
    max_timestep: int | None = option(
        None,
        "noisiest timestep to train on, with which the saved schedule ends; by default the last of "
        "the schedule; 0 for a classifier of clean images",
        AT_LEAST_0,
    )
    min_timestep: int = option(0, "least noisy timestep to train on", AT_LEAST_0)
    problem_type: Literal[
        "single_label_classification", "multi_label_classification", "regression"
    ] = option(
        SINGLE,
        "kind of the labels: one class, several (a list of ids or names, or a vector of zeros and "
        "ones), or one or more numbers; all but the first need --label_column",
    )
    class_weights: str | None = option(
        None,
        "weights of the labels: `balanced` (inverse to their frequency), numbers such as 1,1,0.5, "
        "or a JSON file {name: weight}. With several labels per image: weights of their presence",
    )
    label_smoothing: float = option(
        0.0, "probability that is distributed over all labels; 0: off", Range(0, 1, open=True)
    )
    mixup: float = option(
        0.0, "mix pairs of images and labels in shares from Beta(mixup, mixup); 0: off", FINITE
    )
    timestep_sampler: Literal["uniform", "second_moment"] = option(
        "uniform",
        "second_moment: timesteps of large loss more often, with importance weights that keep the "
        "mean loss the same",
    )
    init_from: str | None = option(
        None,
        "initial weights: folder or Hub id of a classifier, a UNet2DModel, or a pipeline with one. "
        "Also decides the architecture, unless --model_config_name_or_path does, and a classifier "
        "the noise schedule, unless --scheduler or a --ddpm option does",
    )
    robust_epsilon: float = option(
        0.0, "train on the worst image within this L2 distance of x_t; 0: off", FINITE
    )
    robust_steps: int = option(7, "gradient steps that find the worst image")
    dlsm_weight: float = option(
        0.0,
        "weight of the denoising likelihood score-matching loss (a mean over pixels), which trains "
        "the gradient itself; needs --score_model; 0: off",
        FINITE,
    )
    score_model: str | None = option(
        None,
        "diffusion model whose score that loss uses: folder or Hub id of a pipeline with a "
        "UNet2DModel, unconditional or with a null label",
    )
    diagnosis_images: int = changeable(
        500, "held-out images for the diagnosis at every evaluation; 0: off", AT_LEAST_0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.robust_steps < 1 or self.robust_steps != 7 and not self.robust_epsilon:
            raise ValueError(
                f"--robust_steps {self.robust_steps}: 1 or more is allowed, with --robust_epsilon"
            )
        if self.mixup and self.train_batch_size % 2:
            raise ValueError(
                f"--train_batch_size {self.train_batch_size}: an even number is allowed with "
                "--mixup, which mixes pairs of images"
            )
        weighted = self.class_weights is not None or self.label_smoothing > 0
        if self.problem_type == REGRESSION and weighted:
            raise ValueError(
                f"--class_weights {self.class_weights}, --label_smoothing {self.label_smoothing}: "
                f"none and 0 are allowed with --problem_type {REGRESSION}"
            )
        if self.streaming and self.problem_type != SINGLE:
            raise ValueError(
                f"--problem_type {self.problem_type} needs all labels before the first step, which "
                f"--streaming doesn't have: {SINGLE} is allowed with it"
            )
        if self.streaming and self.class_weights == "balanced":
            raise ValueError(
                "--class_weights balanced counts all labels before the first step, which "
                "--streaming doesn't have: numbers and a JSON file are allowed with it"
            )
        self._check_score_matching()

    def _check_score_matching(self) -> None:
        if (self.dlsm_weight > 0) != (self.score_model is not None):
            raise ValueError(
                f"--dlsm_weight {self.dlsm_weight} and --score_model {self.score_model} need each "
                "other"
            )
        if self.dlsm_weight and (self.mixup or self.problem_type == REGRESSION):
            raise ValueError(
                f"--dlsm_weight {self.dlsm_weight}: with --mixup {self.mixup} and --problem_type "
                f"{self.problem_type} 0 is allowed, since there is no p(y | x_t) of these images"
            )
        if self.dlsm_weight and self.gradient_checkpointing:
            raise ValueError(
                f"--dlsm_weight {self.dlsm_weight} differentiates twice, which "
                "--gradient_checkpointing can't: 0 is allowed with it"
            )


def set_targets(
    options: ClassifierOptions, data: Images, held_out: Images | None
) -> tuple[Images | TargetedImages, Images | TargetedImages | None]:
    """Both splits with the labels of --problem_type.

    Raises:
        ValueError: if --label_column doesn't hold them.
    """
    kind, column = options.problem_type, options.label_column
    if kind == SINGLE:
        return data, held_out
    data = TargetedImages(data, column, kind)
    if held_out is not None:
        held_out = TargetedImages(held_out, column, kind, data.id2label)
        if held_out.num_labels != data.num_labels:
            raise ValueError(
                f"--label_column {column}: {data.num_labels} numbers per image in the training "
                f"split, and {held_out.num_labels} in the held-out split"
            )
    return data, held_out


def make_classifier(
    options: ClassifierOptions,
    data: Images | TargetedImages,
    schedule: dict[str, Any],
    initial: ModelMixin | None = None,
) -> NoiseAwareClassifier:
    """A classifier for these images and labels, with the architecture of `initial` if given."""
    if options.problem_type == SINGLE and len(data.id2label) < 2:
        raise ValueError(
            f"--label_column {options.label_column}: {len(data.id2label)} labels found, two or "
            f"more are needed; the dataset has the columns {data.dataset.column_names}"
        )
    return make_model(
        NoiseAwareClassifier,
        options,
        DEFAULT_CLASSIFIER if initial is None else classifier_config(initial),
        sample_size=data.resolution,
        in_channels=data.channels,
        num_labels=len(data.id2label) or data.num_labels,
        id2label=data.id2label or None,
        label2id=None,
        problem_type=options.problem_type,
        **schedule,
    )


def make_loss(
    options: ClassifierOptions,
    accelerator: Accelerator,
    scheduler: DDPMScheduler,
    max_timestep: int,
    data: Images | TargetedImages,
) -> ClassifierLoss:
    """The loss that the options define.

    Raises:
        ValueError: if an option doesn't fit the data, the schedule or the processes.
    """
    first = options.min_timestep
    if first > max_timestep:
        raise ValueError(
            f"--min_timestep {first}: 0 to {max_timestep} is allowed with this schedule and "
            "--max_timestep"
        )
    class_weights = parse_class_weights(options.class_weights, data, options.problem_type)
    variance, score, sampler = None, None, None
    if options.problem_type == REGRESSION:
        variance = data.targets().var(dim=0, unbiased=False)
        if not (variance > 0).all():
            raise ValueError(
                f"--label_column {options.label_column}: all images have the same number in one of "
                f"its {data.num_labels} places; numbers that differ can be learned"
            )
    if options.dlsm_weight:
        check_second_derivatives(options.dlsm_weight, accelerator)
        score = ScoreModel(options.score_model, scheduler, first, max_timestep, data)
    if options.timestep_sampler == "second_moment":
        sampler = LossSecondMomentSampler(max_timestep + 1 - first)
        accelerator.register_for_checkpointing(sampler)
    return ClassifierLoss(
        accelerator,
        scheduler,
        len(data.id2label),
        first,
        max_timestep,
        options.problem_type,
        class_weights,
        variance,
        options.label_smoothing,
        options.mixup,
        options.robust_epsilon,
        options.robust_steps,
        score,
        options.dlsm_weight,
        sampler,
    )


def check_second_derivatives(weight: float, accelerator: Accelerator) -> None:
    """Raise a `ValueError` if --dlsm_weight, which needs them, isn't possible."""
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            f"--dlsm_weight {weight}: --mixed_precision no and bf16 are allowed with it, since "
            "fp16's loss scaling doesn't reach the gradient within the loss"
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(
            f"--dlsm_weight {weight} differentiates twice, which torch.compile can't: "
            "--dynamo_backend no is allowed with it"
        )
    if accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"--dlsm_weight {weight} differentiates twice, which distributed_type "
            f"{accelerator.distributed_type.value} isn't made for: 0 is allowed with it"
        )


class Evaluator:
    """Evaluates a classifier: (model, step) -> metrics; writes curves and the diagnosis."""

    def __init__(
        self,
        options: ClassifierOptions,
        accelerator: Accelerator,
        loss: ClassifierLoss,
        held_out: Images | TargetedImages | None,
        steps: int,
    ):
        self.options, self.accelerator, self.loss = options, accelerator, loss
        self.held_out, self.steps = held_out, steps

    def __call__(self, model: NoiseAwareClassifier, step: int) -> dict[str, Any]:
        options, kind = self.options, self.options.problem_type
        calibration = GAPS if kind == SINGLE else ()

        def score(batch: Batch, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            x_t, y = self.loss.scheduler.add_noise(batch["pixel_values"], eps, t), batch["label"]
            logits = model(x_t, t).logits.float()
            scores = [*held_out_scores(logits, y, kind, self.loss.variance).values()]
            if calibration:
                scores += calibration_gaps(logits, y).T
            return torch.stack(scores)

        metrics = held_out_metrics(
            self.accelerator,
            self.held_out,
            eval_timesteps(self.loss.max_timestep + 1),
            (*METRICS[kind], *calibration),
            score,
            options.validation_samples,
            options.train_batch_size,
        )
        if metrics and calibration:
            metrics["held_out"] = [with_calibration(row) for row in metrics["held_out"]]
            if self.accelerator.is_main_process:
                self.write_plots(model, metrics["held_out"], step == self.steps)
        return metrics

    def write_plots(
        self, model: NoiseAwareClassifier, rows: list[dict[str, float]], last: bool
    ) -> None:
        """Write the diagnosis, and at the end curves.png, if matplotlib is installed."""
        folder, can_plot = Path(self.options.output_dir), find_spec("matplotlib") is not None
        if last and can_plot:
            plot(rows, folder / "curves.png")
        if not self.options.diagnosis_images or self.loss.max_timestep == 0:
            return
        # A copy in float32 without hooks, since autocast may be part of the trained model.
        copy = NoiseAwareClassifier.from_config(model.config)
        copy.load_state_dict(model.state_dict())
        diagnosis = diagnose(
            copy.to(self.accelerator.device).eval(),
            self.held_out,
            images=self.options.diagnosis_images,
            gradient_images=32,
            batch_size=self.options.train_batch_size,
            finite_differences=False,
            progress=False,
        )
        if self.options.vae is not None:  # latents have no range
            diagnosis = replace(diagnosis, mismatches=())
        diagnosis.save(folder, picture=can_plot)
        if last:
            verdict = diagnosis.verdict
            print("\n".join([verdict.summary, *verdict.words, *diagnosis.mismatches]))


def main() -> None:
    options = parse(ClassifierOptions, __doc__)
    with exit_on_value_error():
        # 1. Data
        accelerator = make_accelerator(options)
        vae = load_vae(options.vae)
        single = options.problem_type == SINGLE  # other labels are read by `set_targets`
        image_options = options if single else replace(options, label_column=None)
        images = load_data(image_options, accelerator, vae)
        data, held_out = set_targets(options, *images)

        # 2. Noise schedule, model, loss
        initial = load_initial_model(options.init_from)
        scheduler = None
        if options.scheduler is None and options.has_default_schedule:
            scheduler = initial_schedule(initial)
        scheduler = scheduler or load_scheduler(options)
        schedule = trained_schedule(scheduler, options.max_timestep)
        set_seed(options.seed)
        model = make_classifier(options, data, schedule, initial)
        if options.problem_type == REGRESSION:  # a regressor starts at the labels' mean
            bias = model.get_parameter(last_layer_names(model)[1])
            bias.data.copy_(data.targets().mean(dim=0))
        if initial is not None:
            accelerator.print(copy_weights(model, initial, options.init_from))
        max_timestep = schedule["num_train_timesteps"] - 1
        loss = make_loss(options, accelerator, scheduler, max_timestep, data)
        trainer = Trainer(options, accelerator, model, data)
        write_latents(
            accelerator,
            vae,
            *images,
            workers=options.dataloader_num_workers,
            progress=options.progress,
        )

    # 3. Train, save, publish
    evaluate = Evaluator(options, accelerator, loss, held_out, trainer.steps)
    model = trainer.train(loss, evaluate)
    save_and_publish(options, accelerator, model)


if __name__ == "__main__":
    main()
