"""Train a noise-aware classifier p(y | x_t) with Accelerate.

    accelerate launch training/train_classifier.py --train_data_dir data/fashion-mnist --resolution 28 \\
        --output_dir out/classifier
    accelerate launch training/train_classifier.py --train_data_dir photos --scheduler google/ddpm-cat-256
    accelerate launch training/train_classifier.py ... --resume_from_checkpoint latest # a run that was stopped goes on
    accelerate launch --num_processes 2 training/train_classifier.py ...               # several processes

--output_dir becomes a folder that `NoiseAwareClassifier.from_pretrained` reads, with the labels' names and the noise
schedule in its config. Next to it: `metrics.json`, accuracy and cross entropy at ten noise levels of the held-out split.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from common import (
    Draws,
    Options,
    generator_for,
    load_data,
    load_scheduler,
    make_accelerator,
    model_config,
    option,
    parse,
    ten_levels,
    train,
    validation_batches,
    write_json,
)
from torch.nn import functional as F

from guided_diffusers import NoiseAwareClassifier

DEFAULT = {"block_out_channels": [64, 128, 192, 256], "layers_per_block": 2, "attention_head_dim": 64, "dropout": 0.1}


@dataclass
class ClassifierOptions(Options):
    max_timestep: int | None = option(None, "the noisiest timestep trained on (default: the schedule's last); 0 with the "
                                            "default schedule is a classifier of clean images")
    adam_weight_decay: float = option(0.05, "AdamW's weight decay")


def main() -> None:
    options = parse(ClassifierOptions, __doc__)
    accelerator = make_accelerator(options)
    set_seed(options.seed)
    with accelerator.main_process_first():
        data, held_out = load_data(options)
    if len(data.id2label) < 2:
        raise ValueError(f"label_column: {len(data.id2label)} labels found; a classifier needs two or more")
    scheduler = load_scheduler(options)
    noisiest = scheduler.config.num_train_timesteps - 1 if options.max_timestep is None else options.max_timestep
    if not 0 <= noisiest < scheduler.config.num_train_timesteps:
        raise ValueError(f"--max_timestep {noisiest}: 0 to {scheduler.config.num_train_timesteps - 1} is allowed")
    schedule = {name: scheduler.config[name] for name in
                ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")}
    model = NoiseAwareClassifier(**model_config(
        options, DEFAULT, sample_size=options.resolution, in_channels=data.channels, num_labels=len(data.id2label),
        id2label=data.id2label, **schedule))

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], draws: Draws) -> torch.Tensor:
        device = batch["label"].device
        t = draws.randint(noisiest + 1).to(device)
        eps = draws.randn(*batch["pixel_values"].shape[1:]).to(device)
        logits = model(scheduler.add_noise(batch["pixel_values"], eps, t), t).logits
        return F.cross_entropy(logits.float(), batch["label"])

    @torch.no_grad()
    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        """Accuracy and cross entropy at ten noise levels of the held-out images."""
        if held_out is None:
            return {}
        levels = [level for level in ten_levels(scheduler) if level <= noisiest] or [noisiest]
        sums = torch.zeros(len(levels), 2, dtype=torch.float64, device=accelerator.device)
        count = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for start, batch in validation_batches(held_out, options, accelerator.process_index,
                                               accelerator.num_processes):
            x0, label = batch["pixel_values"].to(accelerator.device), batch["label"].to(accelerator.device)
            for k, level in enumerate(levels):
                eps = torch.randn(x0.shape, generator=generator_for(0, 3, start, k)).to(accelerator.device)
                t = torch.full(label.shape, level, device=accelerator.device)
                logits = model(scheduler.add_noise(x0, eps, t), t).logits.double()
                sums[k, 0] += (logits.argmax(-1) == label).sum()
                sums[k, 1] += F.cross_entropy(logits, label, reduction="sum")
            count += len(label)
        means = (accelerator.reduce(sums) / accelerator.reduce(count)).tolist()
        rows = [{"timestep": level, "accuracy": round(accuracy, 4), "cross_entropy": round(entropy, 4)}
                for level, (accuracy, entropy) in zip(levels, means, strict=True)]
        if accelerator.is_main_process:
            count = min(options.validation_samples, len(held_out))
            write_json(Path(options.output_dir) / "metrics.json", {"step": step, "images": count, "held_out": rows})
            accelerator.print(f"step {step}: accuracy " + ", ".join(f"t={r['timestep']} {r['accuracy']:.3f}" for r in rows))
        return {f"{name}/t={row['timestep']}": row[name] for row in rows for name in ("accuracy", "cross_entropy")}

    model = train(options, accelerator, model, data, loss, evaluate)
    if accelerator.is_main_process:
        model.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
