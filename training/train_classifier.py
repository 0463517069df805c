# /// script
# requires-python = ">=3.10"
# dependencies = ["guided-diffusers"]
# [tool.uv.sources]
# guided-diffusers = { path = ".." }
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
    accelerate launch train_classifier.py ... --init_from out/classifier --teacher out/classifier \\
        --max_power 8                                                  # for guidance_power
    accelerate launch train_classifier.py ... --teacher out/classifier \\
        --model_config_name_or_path student.json                       # a smaller one that guides
    accelerate launch train_classifier.py ... --push_to_hub --hub_model_id user/classifier
    accelerate launch --multi_gpu --num_processes 2 train_classifier.py ...
    torchrun --standalone --nproc_per_node 2 train_classifier.py --cpu ...      # two CPU processes

--output_dir becomes a folder for `NoiseAwareClassifier.from_pretrained`, with the label names and
the noise schedule in its config. Beside the model: `metrics.json` (accuracy and cross entropy, of a
regressor R^2, of the held-out split at ten noise levels); `diagnosis.json` and `diagnosis.png`
(also of its gradient, and whether it is fit to guide).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, set_seed
from diffusers import DDPMScheduler, ModelMixin

from guided_diffusers import NoiseAwareClassifier
from guided_diffusers.cli_options import run_program
from guided_diffusers.diagnosis import (
    GAPS,
    calibration_error,
    calibration_gaps,
    diagnose,
    logit_scale,
    plot,
    with_calibration,
)
from guided_diffusers.evaluation import load_network
from guided_diffusers.images import in_data_units
from guided_diffusers.learning.annotations import TargetedImages
from guided_diffusers.learning.arrays import LabelledArrays
from guided_diffusers.learning.batches import Batch
from guided_diffusers.learning.classifier_losses import METRICS, REGRESSION, SINGLE, held_out_scores
from guided_diffusers.learning.classifier_objective import (
    ClassifierLoss,
    ScoreModel,
    parse_class_weights,
)
from guided_diffusers.learning.distributed import SHARDED, exit_on_value_error, make_accelerator
from guided_diffusers.learning.held_out import held_out_metrics
from guided_diffusers.learning.latents import load_vae, write_latents
from guided_diffusers.learning.loop import Trainer, save_and_publish
from guided_diffusers.learning.losses import LossSecondMomentSampler
from guided_diffusers.learning.options import Options, changeable, named_errors, option, parse
from guided_diffusers.learning.prepare import (
    DEFAULT_CLASSIFIER,
    Images,
    load_data,
    load_scheduler,
    make_model,
    trained_schedule,
)
from guided_diffusers.learning.teacher import Network, NoisyTeacher, Teacher
from guided_diffusers.learning.warm_start import (
    classifier_config,
    copy_weights,
    initial_schedule,
    last_layer_names,
    load_initial_model,
)
from guided_diffusers.text import printable

TEACHER_IMAGES = 5000  # held-out images, at most, that the teacher is calibrated on


@dataclass
class ClassifierOptions(Options):
    adam_weight_decay: float = option(0.05, "AdamW's weight decay", 0)
    max_timestep: int | None = option(
        None, "noisiest timestep, with which the saved schedule ends; 0: clean images only", 0
    )
    min_timestep: int = option(0, "least noisy timestep to train on", 0)
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
        0.0, "probability that is distributed over all labels; 0: off", 0, 1, open=True
    )
    mixup: float = option(
        0.0, "mix pairs of images and labels in shares of Beta(mixup, mixup); 0: off", 0, open=True
    )
    timestep_sampler: Literal["uniform", "second_moment"] = option(
        "uniform", "second_moment: timesteps of large loss more often, at the same mean loss"
    )
    init_from: str | None = option(
        None,
        "initial weights: folder or Hub id of a classifier, a UNet2DModel, or a pipeline with one. "
        "Also decides the architecture, unless --model_config_name_or_path does, and a classifier "
        "the noise schedule, unless --scheduler or a --ddpm option does",
    )
    robust_epsilon: float = option(
        0.0, "train on the worst image within this L2 distance of x_t; 0: off", 0, open=True
    )
    robust_steps: int = option(7, "gradient steps that find the worst image")
    dlsm_weight: float = option(
        0.0, "weight of the denoising likelihood score-matching loss; 0: off", 0, open=True
    )
    score_model: str | None = option(
        None,
        "diffusion model whose score that loss uses: folder or Hub id of a pipeline with a "
        "UNet2DModel, unconditional or with a null label",
    )
    teacher: str | None = option(
        None,
        "classifier whose probabilities replace the labels: folder or Hub id. A noise-aware one sees "
        "x_t, if it also knows the powers to learn; other ones, and image classifiers of "
        "transformers, see clean images, and are calibrated on the held-out ones first",
    )
    teacher_gradient_weight: float = option(
        0.0,
        "weight of the squared distance to the gradient of a --teacher that sees x_t, which guidance "
        "uses; 0: off, 1: usual",
        0,
        open=True,
    )
    max_power: float | None = option(
        None,
        "also learn E[p(y | x_0)^w | x_t] for powers w from 1 to this, for guidance_power; needs "
        "--teacher, on clean images or one that knows these powers",
        1,
        1000,
        open=True,
    )
    diagnosis_images: int = changeable(500, "held-out images of a diagnosis; 0: no diagnosis", 0)

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
        all_labels = "needs all labels before the first step, which --streaming doesn't have:"
        if self.streaming and self.problem_type != SINGLE:
            kind = self.problem_type
            raise ValueError(f"--problem_type {kind} {all_labels} {SINGLE} is allowed")
        if self.renumber_labels and self.problem_type == REGRESSION:
            raise ValueError(f"--renumber_labels: --problem_type {REGRESSION} has numbers, no ids")
        if self.streaming and self.class_weights == "balanced":
            raise ValueError(f"--class_weights balanced {all_labels} numbers, a file are allowed")
        self._check_score_matching()
        self._check_teacher()

    def _check_score_matching(self) -> None:
        weight = f"--dlsm_weight {self.dlsm_weight}"
        if (self.dlsm_weight > 0) != (self.score_model is not None):
            raise ValueError(f"{weight} and --score_model {self.score_model} need each other")
        if self.dlsm_weight and (self.mixup or self.problem_type == REGRESSION):
            raise ValueError(
                f"{weight}: with --mixup {self.mixup} and --problem_type {self.problem_type} 0 is "
                "allowed, since there is no p(y | x_t) of these images"
            )
        for name in ("dlsm_weight", "teacher_gradient_weight"):
            if getattr(self, name) and self.gradient_checkpointing:
                twice = "differentiates twice, which --gradient_checkpointing can't"
                raise ValueError(f"--{name} {getattr(self, name)} {twice}: 0 is allowed with it")

    def _check_teacher(self) -> None:
        if self.max_power is not None and self.teacher is None:
            raise ValueError(
                f"--max_power {self.max_power:g} needs --teacher, whose p(y | x_0)^w are the targets"
            )
        if self.teacher_gradient_weight and self.teacher is None:
            raise ValueError(
                f"--teacher_gradient_weight {self.teacher_gradient_weight:g} needs --teacher, whose "
                "gradient is learned"
            )
        if self.max_power == 1:
            raise ValueError("--max_power 1: a number above 1 is allowed, or none without powers")
        others = {
            "problem_type": SINGLE,
            "class_weights": None,
            "label_smoothing": 0,
            "mixup": 0,
            "dlsm_weight": 0,
            "vae": None,
        }
        for name, allowed in others.items():
            if self.teacher is not None and getattr(self, name) != allowed:
                raise ValueError(
                    f"--{name} {getattr(self, name)}: {allowed} is allowed with --teacher, which "
                    "gives the targets of single labels and needs images in pixels"
                )


def set_targets(
    options: ClassifierOptions, data: Images, held_out: Images | None
) -> tuple[Images | TargetedImages, Images | TargetedImages | None]:
    """Both splits with the labels of --problem_type, which --label_column holds."""
    kind, column = options.problem_type, options.label_column
    if kind == SINGLE:
        return data, held_out
    with named_errors(f"split {options.train_split!r}"):
        data = TargetedImages(data, column, kind, renumber_labels=options.renumber_labels)
    if held_out is not None:
        with named_errors("held-out images"):
            names, renumber = data.id2label, options.renumber_labels
            held_out = TargetedImages(held_out, column, kind, names, renumber)
        if held_out.num_labels != data.num_labels:
            counts = f"{data.num_labels} in the training and {held_out.num_labels} in the held-out"
            raise ValueError(f"--label_column {column}: numbers per image: {counts} split")
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
        power_range=None if options.max_power is None else (1.0, options.max_power),
        **array_settings(data),
        **schedule,
    )


def array_settings(data: Images | TargetedImages) -> dict[str, Any]:
    """Config entries of a classifier of arrays; none for images."""
    data = data.images if isinstance(data, TargetedImages) else data
    if not isinstance(data, LabelledArrays):
        return {}
    scale = {"data_mean": data.data_mean, "data_std": data.data_std}
    return {"dims": len(data.size), **scale}


def make_teacher(
    options: ClassifierOptions,
    accelerator: Accelerator,
    data: Images,
    held_out: Images | None,
    scheduler: DDPMScheduler,
    max_timestep: int,
) -> Teacher | NoisyTeacher | None:
    """The --teacher, which sees x_t, or is calibrated on clean images; None without."""
    name = options.teacher
    if name is None:
        return None
    with named_errors(f"--teacher {name}"):
        network = load_network(name, accelerator.device)
        if network.classes is None:
            raise ValueError("it is no classifier")
    network.module.requires_grad_(False)
    if sees_noise(network.module, options.max_power) and has_samples(network.module, data):
        accelerator.print(printable(f"teacher {name}: sees x_t, as the student"))
        levels = options.min_timestep, max_timestep
        return NoisyTeacher(name, network.module, data.id2label, scheduler, *levels)
    if held_out is None:
        raise ValueError(
            f"--teacher {name}: held-out images are needed to calibrate it: a validation split, or "
            "--validation_fraction above 0"
        )
    sees = clean_input(network, data)
    teacher = Teacher(name, sees, network.names, network.classes, data.id2label)
    count, batch_size = TEACHER_IMAGES, options.train_batch_size
    progress = options.progress and accelerator.is_main_process

    def error(logits: torch.Tensor, labels: torch.Tensor) -> float:
        return calibration_error(calibration_gaps(logits, labels))

    figures = teacher.calibrate(held_out, count, batch_size, logit_scale, error, progress)
    accelerator.print(
        printable(
            f"teacher {name}: accuracy {figures['accuracy']:.4f}, temperature "
            f"{figures['temperature']:.3f}; calibration error {figures['calibration_error']:.4f}, "
            f"before {figures['calibration_error_before']:.4f}"
        )
    )
    return teacher


def clean_input(network: Network, data: Images) -> Network:
    """A network of clean samples, as a function of the dataset's items; arrays are in units of their
    standard deviation there, and the network gets those of the data."""
    if not isinstance(data, LabelledArrays):
        return network
    return lambda x0: network(in_data_units(x0, data.data_mean, data.data_std))


def sees_noise(classifier: torch.nn.Module, max_power: float | None) -> bool:
    """Whether a teacher knows noisy images, and the powers that are to be learned."""
    if not isinstance(classifier, NoiseAwareClassifier):
        return False
    config = classifier.config
    powers = config.power_range or (1.0, 1.0)
    knows_powers = max_power is None or max_power <= powers[1]
    return config.problem_type == SINGLE and config.num_train_timesteps > 1 and knows_powers


def has_samples(classifier: NoiseAwareClassifier, data: Images | TargetedImages) -> bool:
    """Whether it takes samples as the student does: of the same shape, in the same units."""
    samples = {"sample_size": data.resolution, "in_channels": data.channels}
    samples |= {"dims": 2, "data_mean": None, "data_std": None, **array_settings(data)}
    own = {name: classifier.config[name] for name in samples}
    return json.loads(json.dumps(own)) == json.loads(json.dumps(samples))


def make_loss(
    options: ClassifierOptions,
    accelerator: Accelerator,
    scheduler: DDPMScheduler,
    max_timestep: int,
    data: Images | TargetedImages,
    teacher: Teacher | NoisyTeacher | None = None,
) -> ClassifierLoss:
    """The loss that the options define."""
    first, kind = options.min_timestep, options.problem_type
    if first > max_timestep:
        raise ValueError(
            f"--min_timestep {first}: 0 to {max_timestep} is allowed with this schedule and "
            "--max_timestep"
        )
    class_weights = parse_class_weights(options.class_weights, data, kind)
    variance, score, sampler = None, None, None
    if kind == REGRESSION:
        variance = data.targets().var(dim=0, unbiased=False)
        if not (variance > 0).all():
            raise ValueError(
                f"--label_column {options.label_column}: all images have the same number in one of "
                f"its {data.num_labels} places; numbers that differ can be learned"
            )
    for name in ("dlsm_weight", "teacher_gradient_weight"):
        check_second_derivatives(name, getattr(options, name), accelerator)
    if options.teacher_gradient_weight and not isinstance(teacher, NoisyTeacher):
        raise ValueError(
            f"--teacher_gradient_weight {options.teacher_gradient_weight:g}: --teacher "
            f"{options.teacher} sees clean images; a noise-aware one, for samples of this shape, "
            "that knows the powers to learn is allowed"
        )
    if options.dlsm_weight:
        score = ScoreModel(options.score_model, scheduler, first, max_timestep, data)
    if options.timestep_sampler == "second_moment":
        sampler = LossSecondMomentSampler(max_timestep + 1 - first)
        accelerator.register_for_checkpointing(sampler)
    noise = accelerator, scheduler, len(data.id2label), first, max_timestep
    labels = kind, class_weights, variance, options.label_smoothing, options.mixup
    robust = options.robust_epsilon, options.robust_steps
    targets = teacher, options.max_power, options.teacher_gradient_weight
    return ClassifierLoss(*noise, *labels, *robust, score, options.dlsm_weight, sampler, *targets)


def check_second_derivatives(name: str, weight: float, accelerator: Accelerator) -> None:
    """Raise a `ValueError` if an option whose weight needs them isn't possible."""
    if not weight:
        return
    kind, compiler = accelerator.distributed_type, accelerator.state.dynamo_plugin.backend
    twice = "differentiates twice, which"
    checks = [
        (
            accelerator.mixed_precision != "fp16",
            "needs --mixed_precision no or bf16: fp16's loss scaling doesn't reach its gradient",
        ),
        (
            compiler == DynamoBackend.NO,
            f"{twice} torch.compile can't: --dynamo_backend no is allowed with it",
        ),
        (
            kind not in SHARDED,
            f"{twice} distributed_type {kind.value} isn't made for: 0 is allowed with it",
        ),
    ]
    for ok, reason in checks:
        if not ok:
            raise ValueError(f"--{name} {weight} {reason}")


def evaluate_classifier(
    options: ClassifierOptions,
    loss: ClassifierLoss,
    held_out: Images | TargetedImages | None,
    last_step: int,
    model: NoiseAwareClassifier,
    step: int,
) -> dict[str, Any]:
    """Held-out metrics; the main process also writes the diagnosis, and at the end the curves."""
    kind, accelerator = options.problem_type, loss.accelerator
    calibration = GAPS if kind == SINGLE else ()
    powers = power_names(options.max_power)

    def score(batch: Batch, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x_t, y = loss.scheduler.add_noise(batch["pixel_values"], eps, t), batch["label"]
        logits = model(x_t, t).logits.float()
        scores = [*held_out_scores(logits, y, kind, loss.variance).values()]
        if calibration:
            scores += calibration_gaps(logits, y).T
        for power in powers:
            odds = model(x_t, t, power=power).logits
            scores.append(odds.sigmoid().sum(dim=1))
            log_q = loss.teacher.log_targets(batch["pixel_values"], x_t, t, power)
            scores.append(log_q.exp().sum(dim=1))
        return torch.stack(scores)

    names, num_timesteps = (*METRICS[kind], *calibration), loss.max_timestep + 1
    names += tuple(name for pair in powers.values() for name in pair)
    metrics = held_out_metrics(accelerator, options, held_out, num_timesteps, names, score)
    if metrics and loss.teacher is not None:
        metrics["teacher"] = loss.teacher.figures
    if metrics and calibration:
        rows = metrics["held_out"] = [with_calibration(row) for row in metrics["held_out"]]
        if accelerator.is_main_process:
            if step == last_step and find_spec("matplotlib"):
                plot(rows, Path(options.output_dir) / "curves.png")
            if options.diagnosis_images and loss.max_timestep:
                write_diagnosis(options, model, held_out, verbose=step == last_step)
    return metrics


def power_names(max_power: float | None) -> dict[float, tuple[str, str]]:
    """By power, four from 1 to the largest: names of the metrics mean_x sum_y sigmoid(f_y), which
    the classifier gives, and mean_x sum_y p(y | x_0)^w, which it should."""
    if max_power is None:
        return {}
    powers = [max_power ** (k / 3) for k in range(3)] + [max_power]
    return {w: (f"power {w:.3g}", f"power {w:.3g} of the teacher") for w in powers}


def write_diagnosis(
    options: ClassifierOptions, model: NoiseAwareClassifier, held_out: Images, verbose: bool
) -> None:
    """Write the diagnosis, with a picture if matplotlib is installed; print it if `verbose`."""
    # A copy in float32 without hooks, since autocast may be part of the trained model.
    copy = NoiseAwareClassifier.from_config(model.config)
    copy.load_state_dict(model.state_dict())
    diagnosis = diagnose(
        copy.to(model.device).eval(),
        held_out,
        images=options.diagnosis_images,
        gradient_images=32,
        batch_size=options.train_batch_size,
        finite_differences=False,
        progress=False,
    )
    if options.vae is not None:  # latents, which have no range
        diagnosis = replace(diagnosis, mismatches=())
    diagnosis.save(Path(options.output_dir), picture=find_spec("matplotlib") is not None)
    if verbose:
        verdict = diagnosis.verdict
        lines = [verdict.summary, *verdict.words, *diagnosis.mismatches]
        print(*map(printable, lines), sep="\n")


def next_steps(options: ClassifierOptions) -> list[str]:
    """Commands that use the model."""
    folder, data = quote(options.output_dir), quote(options.train_data_dir or options.dataset_name)
    if options.max_timestep == 0:  # a judge
        line = f"guided-diffusers evaluate IMAGES --dataset {data}"
        return [f"{line} --judge {folder} --features {folder} --output EVALUATION"]
    assemble = "guided-diffusers assemble --unet UNET --classifier"
    commands = [f"{assemble} {folder} --output PIPELINE  # a model from train_unet.py"]
    if options.problem_type == SINGLE and options.vae is None:
        line = f"guided-diffusers inspect {folder} --dataset {data} --unet UNET"
        columns = {"image": options.image_column, "label": options.label_column}
        for name, column in columns.items():
            line += f" --{name}-column {quote(column)}" if column else ""
        for name in ("image_range", "alpha_background"):
            value = getattr(options, name)
            line += f" --{name.replace('_', '-')} {quote(value)}" if value else ""
        commands.insert(0, f"{line} --output DIAGNOSIS  # is it fit to guide?")
    return commands


def main() -> None:
    options = parse(ClassifierOptions, __doc__)
    with exit_on_value_error():
        # 1. Data
        accelerator = make_accelerator(options)
        vae = load_vae(options.vae)
        single = options.problem_type == SINGLE  # other labels are read by `set_targets`
        images = load_data(options, accelerator, vae, labelled=single)
        data, held_out = set_targets(options, *images)
        if not single:
            kind = "numbers" if options.problem_type == REGRESSION else "labels"
            names = ", ".join(list(data.id2label.values())[:10])
            column = f"{data.num_labels} {kind} in {options.label_column!r}"
            accelerator.print(printable(f"data: {column}{names and ': '}{names}"))

        # 2. Noise schedule, model, loss
        initial = load_initial_model(options.init_from)
        default = options.scheduler is None and options.has_default_schedule
        scheduler = (initial_schedule(initial) if default else None) or load_scheduler(options)
        schedule = trained_schedule(scheduler, options.max_timestep)
        set_seed(options.seed)
        model = make_classifier(options, data, schedule, initial)
        if options.problem_type == REGRESSION:  # a regressor starts at the labels' mean
            bias = model.get_parameter(last_layer_names(model)[1])
            bias.data.copy_(data.targets().mean(dim=0))
        if initial is not None:
            accelerator.print(copy_weights(model, initial, options.init_from))
        max_timestep = schedule["num_train_timesteps"] - 1
        teacher = make_teacher(options, accelerator, data, held_out, scheduler, max_timestep)
        loss = make_loss(options, accelerator, scheduler, max_timestep, data, teacher)
        trainer = Trainer(options, accelerator, model, data)
        settings = {"workers": options.dataloader_num_workers, "progress": options.progress}
        settings["timeout_minutes"] = options.timeout_minutes
        write_latents(accelerator, vae, *images, **settings)

    # 3. Train, save, publish
    evaluate = partial(evaluate_classifier, options, loss, held_out, trainer.steps)
    model = trainer.train(loss, evaluate)
    save_and_publish(options, accelerator, model, next_steps(options))


if __name__ == "__main__":
    run_program(main)
