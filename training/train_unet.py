"""Train a network that removes noise, unconditional or class-conditional, with Accelerate.

    accelerate launch training/train_unet.py --train_data_dir data/fashion-mnist --resolution 28 --output_dir out/unet
    accelerate launch training/train_unet.py --train_data_dir photos --class_conditional --prediction_type v_prediction
    accelerate launch training/train_unet.py ... --resume_from_checkpoint latest       # a run that was stopped goes on
    accelerate launch --num_processes 2 training/train_unet.py ...                     # several processes

--output_dir becomes a folder that `ClassifierGuidedPipeline.from_pretrained` reads: `unet`, `scheduler` and the labels'
names. Next to it: `metrics.json` (held-out loss at ten noise levels) and `samples-STEP.png`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.utils import make_image_grid
from torch.nn import functional as F

DEFAULT = {"block_out_channels": [64, 128, 256, 256], "layers_per_block": 2,
           "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
           "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"], "attention_head_dim": 64,
           "resnet_time_scale_shift": "scale_shift"}


@dataclass
class UNetOptions(Options):
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = option("epsilon", "what the network predicts")
    class_conditional: bool = option(False, "give the network the label")
    label_dropout: float = option(0.1, "share of labels replaced by the null label (id `number of labels`)")
    sample_images: int = option(40, "images of the picture that an evaluation draws; 0: none")


def target(scheduler: DDPMScheduler, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the network should say: eps, x0, or v = alpha eps - sigma x0 (Salimans & Ho 2022)."""
    match scheduler.config.prediction_type:
        case "epsilon":
            return eps
        case "sample":
            return x0
        case "v_prediction":
            return scheduler.get_velocity(x0, eps, t)


def main() -> None:
    options = parse(UNetOptions, __doc__)
    accelerator = make_accelerator(options)
    set_seed(options.seed)
    with accelerator.main_process_first():
        data, held_out = load_data(options)
    scheduler = load_scheduler(options, prediction_type=options.prediction_type)
    null = len(data.id2label)
    if options.class_conditional and null == 0:
        raise ValueError("--class_conditional: the dataset has no label column; name it with --label_column")
    model = UNet2DModel(**model_config(
        options, DEFAULT, sample_size=options.resolution, in_channels=data.channels, out_channels=data.channels,
        num_class_embeds=null + 1 if options.class_conditional else None))

    def errors(model: torch.nn.Module, batch: dict[str, torch.Tensor], t: torch.Tensor, eps: torch.Tensor,
               dropped: torch.Tensor) -> torch.Tensor:
        x0 = batch["pixel_values"]
        labels = torch.where(dropped, null, batch["label"]) if options.class_conditional else None
        output = model(scheduler.add_noise(x0, eps, t), t, class_labels=labels).sample
        return F.mse_loss(output.float(), target(scheduler, x0, eps, t), reduction="none").mean(dim=(1, 2, 3))

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], draws: Draws) -> torch.Tensor:
        device = batch["pixel_values"].device
        t = draws.randint(scheduler.config.num_train_timesteps).to(device)
        eps = draws.randn(*batch["pixel_values"].shape[1:]).to(device)
        dropped = (draws.rand() < options.label_dropout).to(device)
        return errors(model, batch, t, eps, dropped).mean()

    @torch.no_grad()
    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        sums = torch.zeros(10, dtype=torch.float64, device=accelerator.device)
        count = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        levels = ten_levels(scheduler)
        if held_out is not None:
            for start, batch in validation_batches(held_out, options, accelerator.process_index,
                                                   accelerator.num_processes):
                batch = {name: value.to(accelerator.device) for name, value in batch.items()}
                rows, shape = len(batch["label"]), batch["pixel_values"].shape
                kept = torch.zeros(rows, dtype=torch.bool, device=accelerator.device)
                for k, level in enumerate(levels):
                    eps = torch.randn(shape, generator=generator_for(0, 3, start, k)).to(accelerator.device)
                    t = torch.full((rows,), level, device=accelerator.device)
                    sums[k] += errors(model, batch, t, eps, kept).double().sum()
                count += rows
        means = (accelerator.reduce(sums) / accelerator.reduce(count)).tolist()
        figures = {f"loss/t={level}": value for level, value in zip(levels, means, strict=True)} if held_out else {}
        if accelerator.is_main_process:
            if held_out:
                write_json(Path(options.output_dir) / "metrics.json", {"step": step, "held_out_loss": figures})
                accelerator.print(f"step {step}: " + json.dumps({k: round(v, 4) for k, v in figures.items()}))
            if options.sample_images:
                draw_samples(accelerator.unwrap_model(model), step)
        accelerator.wait_for_everyone()
        return figures

    def draw_samples(model: UNet2DModel, step: int) -> None:
        """A picture of DDIM samples, a row a label."""
        count, device = options.sample_images, accelerator.device
        rows = max(1, min(null, count)) if options.class_conditional else 4
        labels = torch.arange(rows, device=device).repeat_interleave(max(1, count // rows))
        ddim = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
        ddim.set_timesteps(50, device=device)
        x = torch.randn(len(labels), data.channels, options.resolution, options.resolution,
                        generator=torch.Generator().manual_seed(0)).to(device)
        for t in ddim.timesteps:
            output = model(x, t, class_labels=labels if options.class_conditional else None).sample
            x = ddim.step(output, t, x).prev_sample
        arrays = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        from PIL import Image
        images = [Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a) for a in arrays]
        grid = make_image_grid(images, rows, len(images) // rows)
        grid.save(Path(options.output_dir) / f"samples-{step}.png")

    model = train(options, accelerator, model, data, loss, evaluate)
    if accelerator.is_main_process:
        model.save_pretrained(Path(options.output_dir) / "unet")
        scheduler.save_pretrained(Path(options.output_dir) / "scheduler")


if __name__ == "__main__":
    main()
