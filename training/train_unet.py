"""Train a network that removes noise, unconditional or class-conditional, with Accelerate.

    accelerate launch training/train_unet.py --train_data_dir data/fashion-mnist --resolution 28 --output_dir out/unet
    accelerate launch training/train_unet.py --train_data_dir photos --class_conditional --prediction_type v_prediction
    accelerate launch training/train_unet.py ... --objective hybrid_rescaled         # learns the variance, as ADM does
    accelerate launch training/train_unet.py ... --vae stabilityai/sd-vae-ft-mse --resolution 256 --center_crop
    accelerate launch training/train_unet.py ... --resume_from_checkpoint latest     # a run that was stopped goes on
    accelerate launch --multi_gpu --num_processes 2 training/train_unet.py ...       # several GPUs
    torchrun --standalone --nproc_per_node 2 training/train_unet.py --cpu ...        # several processes on CPUs

--output_dir becomes a folder that `ClassifierGuidedPipeline.from_pretrained` reads: `unet`, `scheduler`, with --vae
`vae`, and the labels' names. Next to it: `metrics.json` (held-out loss at ten noise levels) and `samples-STEP.png`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.utils import make_image_grid
from latents import load_vae, write_latents
from loop import Batch, Draws, Run, collate, finish, generator_for, held_out_figures, ten_levels
from options import Images, Options, explained, load_data, load_scheduler, make_accelerator, make_model, option, parse
from torch.nn import functional as F

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.losses import LossSecondMomentSampler, Objective, Process, bits_per_dim, diffusion_loss

DEFAULT = {"block_out_channels": [64, 128, 256, 256], "layers_per_block": 2,
           "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
           "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"], "attention_head_dim": 64,
           "resnet_time_scale_shift": "scale_shift"}


@dataclass
class UNetOptions(Options):
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = option(
        None, "what the network predicts; what --scheduler says if left out, else epsilon")
    class_conditional: bool = option(False, "give the network the label")
    label_dropout: float = option(0.1, "share of labels replaced by the null label, id `number of labels`, with "
                                       "--class_conditional")
    objective: Objective = option("simple", "the loss, of guided_diffusers.losses: the mean squared error, or with a "
                                            "learned variance one of the others")
    timestep_sampler: Literal["uniform", "second_moment"] = option(
        "uniform", "second_moment: timesteps of large loss more often, meant for --objective bound")
    bits_per_dim_images: int = option(0, "held-out images whose bits a dimension are measured at the end, at every "
                                         "timestep")
    sample_images: int = option(40, "images of the picture that an evaluation draws; 0: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vae is not None and self.bits_per_dim_images:
            raise ValueError(f"--bits_per_dim_images {self.bits_per_dim_images}: with --vae 0 is allowed, since they "
                             "are bits of pixels")


def make_unet(options: UNetOptions, data: Images) -> UNet2DModel:
    if options.class_conditional and not data.id2label:
        raise ValueError("--class_conditional: the dataset has no column of class ids; --label_column can name one of "
                         f"integers or strings, of {data.dataset.column_names}")
    model = make_model(UNet2DModel, options, DEFAULT, sample_size=data.resolution, in_channels=data.channels,
                       out_channels=data.channels * (1 if options.objective == "simple" else 2),
                       num_class_embeds=len(data.id2label) + 1 if options.class_conditional else None)
    levels = len(model.config.block_out_channels)
    if data.resolution % 2 ** (levels - 1):
        multiple = options.resolution // data.resolution * 2 ** (levels - 1)
        raise ValueError(f"--resolution {options.resolution}: the multiples of {multiple} are allowed for a network of "
                         f"{levels} levels")
    return model


def target(scheduler: DDPMScheduler, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the network should say: eps, x0, or v = alpha eps - sigma x0 (Salimans & Ho 2022)."""
    match scheduler.config.prediction_type:
        case "epsilon":
            return eps
        case "sample":
            return x0
        case "v_prediction":
            return scheduler.get_velocity(x0, eps, t)


def draw_samples(pipeline: ClassifierGuidedPipeline, path: Path, count: int) -> None:
    """A picture of about `count` DDIM samples, a row a label."""
    pipeline.set_progress_bar_config(disable=True)
    labels = list(range(pipeline.num_labels or 0))[:count] or None
    rows = len(labels) if labels else 1
    images = pipeline(
        labels, num_images_per_label=max(1, count // rows), guidance_scale=0.0,
        num_inference_steps=min(50, pipeline.scheduler.config.num_train_timesteps),
        generator=torch.Generator().manual_seed(0)).images
    make_image_grid(images, rows, len(images) // rows).save(path)


def main() -> None:
    options = parse(UNetOptions, __doc__)
    with explained():
        accelerator = make_accelerator(options)
        vae = load_vae(options)
        data, held_out = load_data(options, accelerator, vae)
        scheduler = load_scheduler(options, options.prediction_type)
        if options.objective != "simple":
            scheduler = DDPMScheduler.from_config(scheduler.config, variance_type="learned_range")
        process = Process(scheduler)
        sampler = LossSecondMomentSampler(len(process)) if options.timestep_sampler == "second_moment" else None
        if sampler is not None:
            accelerator.register_for_checkpointing(sampler)
        set_seed(options.seed)
        run = Run(options, accelerator, make_unet(options, data), data)
        write_latents(options, accelerator, vae, data, held_out)
    if isinstance(vae, AutoencoderKL):
        vae.enable_slicing()  # a picture's images are decoded one by one
    names = data.id2label if options.class_conditional else None

    def errors(model: torch.nn.Module, batch: Batch, eps: torch.Tensor, t: torch.Tensor,
               labels: torch.Tensor) -> torch.Tensor:
        """The loss of each image, (B,)."""
        x0, labels = batch["pixel_values"], labels if options.class_conditional else None
        output = model(scheduler.add_noise(x0, eps, t), t, class_labels=labels).sample
        if options.objective != "simple":
            return diffusion_loss(process, output.float(), x0, eps, t, options.objective)["loss"]
        return F.mse_loss(output.float(), target(scheduler, x0, eps, t), reduction="none").mean(dim=(1, 2, 3))

    def loss(model: torch.nn.Module, batch: Batch, draws: Draws) -> torch.Tensor:
        if sampler is None:
            t = draws.randint(scheduler.config.num_train_timesteps)
        else:
            drawn = sampler.sample(draws.total, draws.generator)
            t, weight = (part[draws.mine].to(draws.device) for part in drawn)
        eps = draws.randn(*batch["pixel_values"].shape[1:])
        labels = torch.where(draws.rand() < options.label_dropout, len(data.id2label), batch["label"])
        losses = errors(model, batch, eps, t, labels)
        if sampler is None:
            return losses.mean()
        sampler.update(*accelerator.gather((t, losses.detach())))
        return (weight * losses).mean()

    def bits(model: torch.nn.Module) -> float:
        """Mean bits a dimension of held-out images, evenly spread; an image's noise is the same in any batch."""
        count, world = min(options.bits_per_dim_images, len(held_out)), accelerator.num_processes
        share, total = range(count)[accelerator.process_index :: world], torch.zeros((), device=accelerator.device)
        for start in range(0, len(share), options.train_batch_size):
            numbers = share[start : start + options.train_batch_size]
            batch = collate([held_out[i * len(held_out) // count] for i in numbers])
            x0, labels = (batch[name].to(accelerator.device) for name in ("pixel_values", "label"))
            total += bits_per_dim(model, process, x0, labels if options.class_conditional else None,
                                  generator=[generator_for(0, 4, i) for i in numbers])["total"].sum()
        return accelerator.reduce(total, "sum").item() / count

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, Any]:
        if options.sample_images and accelerator.is_main_process:
            ddim = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
            pipeline = ClassifierGuidedPipeline(unet=model, scheduler=ddim, vae=vae, id2label=names)
            pipeline.to(accelerator.device)
            draw_samples(pipeline, Path(options.output_dir) / f"samples-{step}.png", options.sample_images)
        accelerator.wait_for_everyone()
        figures = held_out_figures(
            options, accelerator, held_out, ten_levels(scheduler.config.num_train_timesteps), ("loss",),
            lambda batch, eps, t: errors(model, batch, eps, t, batch["label"])[None])
        if figures and options.bits_per_dim_images and step == run.steps:
            figures["bits_per_dim"] = bits(model)
        return figures

    model = run.train(loss, evaluate)
    if accelerator.is_main_process:
        pipeline = ClassifierGuidedPipeline(unet=model, scheduler=scheduler, vae=vae, id2label=names)
        pipeline.save_pretrained(options.output_dir)
    finish(accelerator)


if __name__ == "__main__":
    main()
