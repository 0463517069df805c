"""Train a noise-aware classifier p(y | x_t) with Accelerate.

    accelerate launch training/train_classifier.py --train_data_dir data/fashion-mnist --resolution 28 \\
        --output_dir out/classifier
    accelerate launch training/train_classifier.py --train_data_dir photos --scheduler google/ddpm-cat-256
    accelerate launch training/train_classifier.py ... --vae stabilityai/sd-vae-ft-mse --resolution 256 --center_crop
    accelerate launch training/train_classifier.py ... --resume_from_checkpoint latest # a run that was stopped goes on
    accelerate launch --multi_gpu --num_processes 2 training/train_classifier.py ...   # several GPUs
    torchrun --standalone --nproc_per_node 2 training/train_classifier.py --cpu ...    # several processes on CPUs

--output_dir becomes a folder that `NoiseAwareClassifier.from_pretrained` reads, with the labels' names and the noise
schedule in its config. Next to it: `metrics.json`, accuracy and cross entropy at ten noise levels of the held-out
split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from latents import load_vae, write_latents
from loop import Batch, Draws, Run, finish, held_out_figures, ten_levels
from options import Images, Options, explained, load_data, load_scheduler, make_accelerator, make_model, option, parse
from torch.nn import functional as F

from guided_diffusers import NoiseAwareClassifier

DEFAULT = {"block_out_channels": [64, 128, 192, 256], "layers_per_block": 2, "attention_head_dim": 64, "dropout": 0.1}


@dataclass
class ClassifierOptions(Options):
    max_timestep: int | None = option(
        None, "the noisiest timestep to train on, with which the saved schedule ends; the schedule's last if left out, "
              "and 0 for a classifier of clean images")
    adam_weight_decay: float = option(0.05, "AdamW's weight decay")


def trained_schedule(options: ClassifierOptions, scheduler: DDPMScheduler) -> dict[str, Any]:
    """The noise levels trained on, in `DDPMScheduler`'s words.

    Raises:
        ValueError: if --max_timestep is beyond the schedule.
    """
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
    schedule = {name: scheduler.config[name] for name in names}
    steps = schedule["num_train_timesteps"] if options.max_timestep is None else options.max_timestep + 1
    if steps > schedule["num_train_timesteps"]:
        last = schedule["num_train_timesteps"] - 1
        raise ValueError(f"--max_timestep {options.max_timestep}: 0 to {last} is allowed")
    if steps < schedule["num_train_timesteps"] or scheduler.config.rescale_betas_zero_snr:
        schedule |= {"num_train_timesteps": steps, "trained_betas": scheduler.betas[:steps].tolist()}
    return schedule


def make_classifier(options: ClassifierOptions, data: Images, schedule: dict[str, Any]) -> NoiseAwareClassifier:
    if len(data.id2label) < 2:
        raise ValueError(f"--label_column {options.label_column}: {len(data.id2label)} labels found, two or more are "
                         f"needed; the dataset has the columns {data.dataset.column_names}")
    return make_model(NoiseAwareClassifier, options, DEFAULT, sample_size=data.resolution, in_channels=data.channels,
                      num_labels=len(data.id2label), id2label=data.id2label, label2id=None, **schedule)


def main() -> None:
    options = parse(ClassifierOptions, __doc__)
    with explained():
        accelerator = make_accelerator(options)
        vae = load_vae(options)
        data, held_out = load_data(options, accelerator, vae)
        scheduler = load_scheduler(options)
        schedule = trained_schedule(options, scheduler)
        set_seed(options.seed)
        run = Run(options, accelerator, make_classifier(options, data, schedule), data)
        write_latents(options, accelerator, vae, data, held_out)

    def logits(model: torch.nn.Module, batch: Batch, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(scheduler.add_noise(batch["pixel_values"], eps, t), t).logits.float()

    def loss(model: torch.nn.Module, batch: Batch, draws: Draws) -> torch.Tensor:
        t = draws.randint(schedule["num_train_timesteps"])
        eps = draws.randn(*batch["pixel_values"].shape[1:])
        return F.cross_entropy(logits(model, batch, eps, t), batch["label"])

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, Any]:
        def score(batch: Batch, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            answer, label = logits(model, batch, eps, t), batch["label"]
            return torch.stack([(answer.argmax(dim=1) == label).float(),
                                F.cross_entropy(answer, label, reduction="none")])

        return held_out_figures(options, accelerator, held_out, ten_levels(schedule["num_train_timesteps"]),
                                ("accuracy", "cross_entropy"), score)

    model = run.train(loss, evaluate)
    if accelerator.is_main_process:
        model.save_pretrained(options.output_dir)
    finish(accelerator)


if __name__ == "__main__":
    main()
