"""Train a network that removes noise, unconditional or class-conditional, with Accelerate.

    accelerate launch training/train_unet.py --train_data_dir data/fashion-mnist --resolution 28 --output_dir out/unet
    accelerate launch training/train_unet.py --train_data_dir photos --class_conditional --prediction_type v_prediction
    accelerate launch training/train_unet.py ... --objective hybrid_rescaled         # learns the variance, as ADM does
    accelerate launch training/train_unet.py ... --objective flow_matching           # rectified flow, sampled by Euler
    accelerate launch training/train_unet.py ... --snr_gamma 5                       # min-SNR weighting
    accelerate launch training/train_unet.py ... --prediction_type v_prediction --rescale_betas_zero_snr
    accelerate launch training/train_unet.py ... --class_conditional \\
        --model_config_name_or_path training/configs/dit_small.json                  # a transformer
    accelerate launch training/train_unet.py ... --vae stabilityai/sd-vae-ft-mse --resolution 256 --center_crop
    accelerate launch training/train_unet.py ... --resume_from_checkpoint latest     # a run that was stopped goes on
    accelerate launch training/train_unet.py ... --push_to_hub --hub_model_id user/model
    accelerate launch --multi_gpu --num_processes 2 training/train_unet.py ...       # several GPUs
    torchrun --standalone --nproc_per_node 2 training/train_unet.py --cpu ...        # several processes on CPUs

--output_dir becomes a folder that `ClassifierGuidedPipeline.from_pretrained` reads: `unet`, `scheduler`, with --vae
`vae`, and the labels' names. Next to it: `metrics.json` (held-out loss at ten noise levels) and `samples-STEP.png`.
The network is a UNet2DModel, or a DiTTransformer2DModel if that is the `_class_name` of --model_config_name_or_path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.models.embeddings import LabelEmbedding
from diffusers.utils import make_image_grid

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.learning.latents import load_vae, write_latents
from guided_diffusers.learning.loop import (
    Batch,
    Draws,
    Run,
    collate,
    finish,
    generator_for,
    held_out_figures,
    ten_levels,
)
from guided_diffusers.learning.losses import (
    FlowProcess,
    LossSecondMomentSampler,
    Objective,
    Process,
    bits_per_dim,
    diffusion_loss,
)
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
from guided_diffusers.learning.publishing import PublishedOptions, publish

Network = UNet2DModel | DiTTransformer2DModel

DEFAULT = {
    "block_out_channels": [64, 128, 256, 256],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}
WITH_BETAS = (
    "prediction_type",
    "rescale_betas_zero_snr",
    "snr_gamma",
    "scheduler",
    "ddpm_num_steps",
    "ddpm_beta_schedule",
    "timestep_sampler",
    "bits_per_dim_images",
)
WITH_FLOW = ("flow_timestep_sampling", "flow_shift")


@dataclass
class UNetOptions(PublishedOptions):
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = option(
        None, "what the network predicts; what --scheduler says if left out, else epsilon"
    )
    class_conditional: bool = option(False, "give the network the label")
    label_dropout: float = option(
        0.1,
        "share of labels replaced by the null label, id `number of labels`, with "
        "--class_conditional",
    )
    rescale_betas_zero_snr: bool = option(
        False,
        "end the noise schedule in noise alone (Lin et al. 2024), with --prediction_type v_prediction or sample",
    )
    objective: Literal[Objective, "flow_matching"] = option(
        "simple",
        "the loss, of guided_diffusers.learning.losses: the mean squared error, with a learned variance hybrid, "
        "hybrid_rescaled or bound, or flow_matching: of the velocity eps - x0 on straight paths",
    )
    snr_gamma: float | None = option(
        None,
        "weight the mean squared error by min-SNR (Hang et al. 2023) with this gamma, e.g. 5; left out: not",
    )
    flow_timestep_sampling: Literal["uniform", "logit_normal"] | None = option(
        None,
        "how the s in [0, 1] of --objective flow_matching is drawn; logit_normal (Esser et al. 2024) if left out",
    )
    flow_shift: float | None = option(
        None,
        "with --objective flow_matching: s becomes shift s / (1 + (shift - 1) s), in sampling too; above 1 for "
        "large images; 1 if left out",
    )
    timestep_sampler: Literal["uniform", "second_moment"] = option(
        "uniform", "second_moment: timesteps of large loss more often, meant for --objective bound"
    )
    bits_per_dim_images: int = option(
        0, "held-out images whose bits a dimension are measured at the end, at every timestep"
    )
    sample_images: int = option(40, "images of the picture that an evaluation draws; 0: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vae is not None and self.bits_per_dim_images:
            raise ValueError(
                f"--bits_per_dim_images {self.bits_per_dim_images}: with --vae 0 is allowed, since they "
                "are bits of pixels"
            )
        for name in ("snr_gamma", "flow_shift"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} {value}: a finite number above 0 is allowed")
        flow = self.objective == "flow_matching"
        for name, default in ((f.name, f.default) for f in fields(self)):
            if name in (WITH_BETAS if flow else WITH_FLOW) and getattr(self, name) != default:
                allowed = (
                    "simple, hybrid, hybrid_rescaled and bound are" if flow else "flow_matching is"
                )
                raise ValueError(
                    f"--{name} {getattr(self, name)} with --objective {self.objective}: {allowed} allowed"
                )
        if self.snr_gamma is not None and self.objective == "bound":
            raise ValueError(
                f"--snr_gamma {self.snr_gamma} with --objective bound, which has no mean squared error to "
                "weight: simple, hybrid and hybrid_rescaled are allowed"
            )


def make_schedulers(
    options: UNetOptions,
) -> tuple[
    DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    DDPMScheduler | DDIMScheduler | FlowMatchEulerDiscreteScheduler,
]:
    """The noise schedule to train with, and the scheduler that is saved.

    With zero terminal SNR that starts at the noisiest timestep, where the network learned the mean of the images
    (trailing spacing; Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2024, section 3.3).

    Raises:
        ValueError: if the objective can't learn from this schedule.
    """
    if options.objective == "flow_matching":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=options.flow_shift or 1.0)
        return scheduler, scheduler
    scheduler = load_scheduler(options, options.prediction_type)
    changes: dict[str, Any] = (
        {"rescale_betas_zero_snr": True} if options.rescale_betas_zero_snr else {}
    )
    if options.objective != "simple":
        changes["variance_type"] = "learned_range"
    scheduler = DDPMScheduler.from_config(scheduler.config, **changes) if changes else scheduler
    if not scheduler.config.rescale_betas_zero_snr:
        return scheduler, scheduler
    if scheduler.config.prediction_type == "epsilon":
        raise ValueError(
            "--prediction_type epsilon: with --rescale_betas_zero_snr the last timestep is noise alone, "
            "of which eps says nothing; v_prediction and sample are allowed"
        )
    if options.snr_gamma is not None:
        raise ValueError(
            f"--snr_gamma {options.snr_gamma} with --rescale_betas_zero_snr weights the last timestep, "
            "where sampling starts, by 0: only one of the two is allowed"
        )
    trailing = {"timestep_spacing": "trailing"}
    if options.objective != "simple":  # DDIM takes no learned variance
        return scheduler, DDPMScheduler.from_config(scheduler.config, **trailing)
    return scheduler, DDIMScheduler.from_config(
        scheduler.config, **trailing, clip_sample=False
    )  # it spoils guidance


def make_network(options: UNetOptions, data: Images) -> Network:
    """A UNet2DModel or, if the config says so, a DiTTransformer2DModel, for these images and labels.

    Raises:
        ValueError: if there are no labels to be told, or the config or the resolution doesn't fit.
    """
    if options.class_conditional and not data.id2label:
        raise ValueError(
            "--class_conditional: the dataset has no column of class ids; --label_column can name one of "
            f"integers or strings, of {data.dataset.column_names}"
        )
    learned_variance = options.objective not in ("simple", "flow_matching")
    given = {
        "sample_size": data.resolution,
        "in_channels": data.channels,
        "out_channels": data.channels * (2 if learned_variance else 1),
    }
    if is_dit(options):
        return make_dit(options, data, given)
    model = make_model(
        UNet2DModel,
        options,
        DEFAULT,
        **given,
        num_class_embeds=len(data.id2label) + 1 if options.class_conditional else None,
    )
    levels = len(model.config.block_out_channels)
    check_resolution(options, data, 2 ** (levels - 1), f"{levels} levels")
    return model


def is_dit(options: UNetOptions) -> bool:
    """Whether --model_config_name_or_path is that of a DiTTransformer2DModel."""
    if options.model_config_name_or_path is None:
        return False
    try:
        config = UNet2DModel.load_config(options.model_config_name_or_path)
    except (OSError, ValueError):  # make_model says so
        return False
    return config.get("_class_name") == DiTTransformer2DModel.__name__


def make_dit(options: UNetOptions, data: Images, given: dict[str, Any]) -> DiTTransformer2DModel:
    """A transformer that starts as the identity of its blocks and an output of 0 (adaLN-Zero; Peebles & Xie, Scalable
    Diffusion Models with Transformers, 2023, section 3.2), which Diffusers leaves to the weights that are loaded."""
    if not options.class_conditional:
        raise ValueError(
            f"--model_config_name_or_path {options.model_config_name_or_path}: a DiTTransformer2DModel is "
            "always told a label; it is allowed with --class_conditional only"
        )
    # beside the labels' embeddings it makes one for the null label, whose id is their number
    model = make_model(
        DiTTransformer2DModel, options, {}, **given, num_embeds_ada_norm=len(data.id2label)
    )
    check_resolution(
        options, data, model.config.patch_size, f"patches of {model.config.patch_size}"
    )
    for linear in (
        *(block.norm1.linear for block in model.transformer_blocks),
        model.proj_out_1,
        model.proj_out_2,
    ):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = (
                0.0  # --label_dropout does it for all blocks alike; theirs would be one a block
            )
    return model


def check_resolution(options: UNetOptions, data: Images, multiple: int, what: str) -> None:
    if data.resolution % multiple:
        raise ValueError(
            f"--resolution {options.resolution}: the multiples of "
            f"{options.resolution // data.resolution * multiple} are allowed for a network of {what}"
        )


def draw_samples(pipeline: ClassifierGuidedPipeline, path: Path, count: int) -> None:
    """A picture of about `count` samples, a row a label."""
    pipeline.set_progress_bar_config(disable=True)
    labels = list(range(pipeline.num_labels or 0))[:count] or None
    rows = len(labels) if labels else 1
    images = pipeline(
        labels,
        num_images_per_label=max(1, count // rows),
        guidance_scale=0.0,
        num_inference_steps=min(50, pipeline.scheduler.config.num_train_timesteps),
        generator=torch.Generator().manual_seed(0),
    ).images
    make_image_grid(images, rows, len(images) // rows).save(path)


def main() -> None:
    options = parse(UNetOptions, __doc__)
    with explained():
        accelerator = make_accelerator(options)
        vae = load_vae(options)
        data, held_out = load_data(options, accelerator, vae)
        scheduler, saved_scheduler = make_schedulers(options)
        flow, steps = options.objective == "flow_matching", scheduler.config.num_train_timesteps
        process = FlowProcess(scheduler) if flow else Process(scheduler)
        sampler = (
            LossSecondMomentSampler(steps) if options.timestep_sampler == "second_moment" else None
        )
        if sampler is not None:
            accelerator.register_for_checkpointing(sampler)
        set_seed(options.seed)
        run = Run(options, accelerator, make_network(options, data), data)
        write_latents(options, accelerator, vae, data, held_out)
    if isinstance(vae, AutoencoderKL):
        vae.enable_slicing()  # a picture's images are decoded one by one
    names = data.id2label if options.class_conditional else None

    def errors(
        model: torch.nn.Module,
        batch: Batch,
        eps: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor,
        snr_gamma: float | None = None,
    ) -> torch.Tensor:
        """The loss of each image, (B,)."""
        x0, labels = batch["pixel_values"], labels if options.class_conditional else None
        output = model(process.noised(x0, eps, t), t, class_labels=labels).sample
        objective = "simple" if flow else options.objective
        return diffusion_loss(process, output.float(), x0, eps, t, objective, snr_gamma)["loss"]

    def loss(model: torch.nn.Module, batch: Batch, draws: Draws) -> torch.Tensor:
        if flow:
            uniform = options.flow_timestep_sampling == "uniform"
            t = process.timesteps(draws.rand() if uniform else draws.randn().sigmoid())
        elif sampler is None:
            t = draws.randint(steps)
        else:
            drawn = sampler.sample(draws.total, draws.generator)
            t, weight = (part[draws.mine].to(draws.device) for part in drawn)
        eps = draws.randn(*batch["pixel_values"].shape[1:])
        labels = torch.where(
            draws.rand() < options.label_dropout, len(data.id2label), batch["label"]
        )
        losses = errors(model, batch, eps, t, labels, options.snr_gamma)
        if sampler is None:
            return losses.mean()
        sampler.update(*accelerator.gather((t, losses.detach())))
        return (weight * losses).mean()

    def bits(model: torch.nn.Module) -> float:
        """Mean bits a dimension of held-out images, evenly spread; an image's noise is the same in any batch."""
        count, world = min(options.bits_per_dim_images, len(held_out)), accelerator.num_processes
        share, total = (
            range(count)[accelerator.process_index :: world],
            torch.zeros((), device=accelerator.device),
        )
        for start in range(0, len(share), options.train_batch_size):
            numbers = share[start : start + options.train_batch_size]
            batch = collate([held_out[i * len(held_out) // count] for i in numbers])
            x0, labels = (batch[name].to(accelerator.device) for name in ("pixel_values", "label"))
            total += bits_per_dim(
                model,
                process,
                x0,
                labels if options.class_conditional else None,
                generator=[generator_for(0, 4, i) for i in numbers],
            )["total"].sum()
        return accelerator.reduce(total, "sum").item() / count

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, Any]:
        if options.sample_images and accelerator.is_main_process:
            fast = (
                scheduler
                if flow
                else DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
            )
            pipeline = ClassifierGuidedPipeline(unet=model, scheduler=fast, vae=vae, id2label=names)
            pipeline.to(accelerator.device)
            draw_samples(
                pipeline, Path(options.output_dir) / f"samples-{step}.png", options.sample_images
            )
        accelerator.wait_for_everyone()
        figures = held_out_figures(
            options,
            accelerator,
            held_out,
            ten_levels(steps),
            ("loss",),
            lambda batch, eps, t: errors(model, batch, eps, t, batch["label"])[None],
        )
        if figures and options.bits_per_dim_images and step == run.steps:
            figures["bits_per_dim"] = bits(model)
        return figures

    model = run.train(loss, evaluate)
    if accelerator.is_main_process:
        pipeline = ClassifierGuidedPipeline(
            unet=model, scheduler=saved_scheduler, vae=vae, id2label=names
        )
        pipeline.save_pretrained(options.output_dir)
    finish(accelerator)
    if accelerator.is_main_process:
        publish(options, pipeline)


if __name__ == "__main__":
    main()
