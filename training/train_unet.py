# /// script
# requires-python = ">=3.10"
# dependencies = ["guided-diffusers"]
# [tool.uv.sources]
# guided-diffusers = { path = ".." }
# ///
# From a checkout: uv run --with . python training/train_unet.py ...
"""Train a denoiser, unconditional or class-conditional, with Accelerate.

    accelerate launch train_unet.py --train_data_dir data/fashion-mnist --resolution 28 \\
        --output_dir out/unet
    accelerate launch train_unet.py --train_data_dir photos --class_conditional \\
        --prediction_type v_prediction
    accelerate launch train_unet.py ... --objective hybrid_rescaled     # learned variance, as ADM
    accelerate launch train_unet.py ... --objective flow_matching       # rectified flow
    accelerate launch train_unet.py ... --snr_gamma 5                   # min-SNR weighting
    accelerate launch train_unet.py ... --prediction_type v_prediction --rescale_betas_zero_snr
    accelerate launch train_unet.py ... --class_conditional \\
        --model_config_name_or_path training/configs/dit_small.json     # a transformer
    accelerate launch train_unet.py ... --vae stabilityai/sd-vae-ft-mse --resolution 256 \\
        --center_crop                                                   # on latents
    accelerate launch train_unet.py ... --resume_from_checkpoint latest
    accelerate launch train_unet.py ... --push_to_hub --hub_model_id user/model
    accelerate launch --multi_gpu --num_processes 2 train_unet.py ...
    torchrun --standalone --nproc_per_node 2 train_unet.py --cpu ...    # two CPU processes

--output_dir becomes a folder for `ClassifierGuidedPipeline.from_pretrained`: `unet`, `scheduler`,
with --vae `vae`, and the label names. Beside them: `metrics.json` (held-out loss at ten noise
levels) and `samples-STEP.png`. The model is a UNet2DModel, or a DiTTransformer2DModel if that is
the `_class_name` of --model_config_name_or_path.

Data may also be arrays, (C, ...) of any channels: a column of arrays or nested lists, or .npy files
in one folder per label. Signals, (C, L), get a UNet1DModel, and others a model of the config's class.
Their scale (--data_scale) is saved with the pipeline, whose samples are in the data's units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    UNet1DModel,
    UNet2DModel,
)
from diffusers.models.embeddings import LabelEmbedding
from diffusers.utils import make_image_grid

from guided_diffusers import ClassifierGuidedPipeline
from guided_diffusers.cli_options import run_program
from guided_diffusers.images import as_pair, size_text
from guided_diffusers.learning.arrays import LabelledArrays
from guided_diffusers.learning.batches import Batch, StepRandom, collate, generator_for
from guided_diffusers.learning.distributed import (
    exit_on_value_error,
    log_picture,
    make_accelerator,
)
from guided_diffusers.learning.held_out import held_out_metrics
from guided_diffusers.learning.latents import load_vae, write_latents
from guided_diffusers.learning.loop import Trainer, save_and_publish
from guided_diffusers.learning.losses import (
    FlowProcess,
    LossSecondMomentSampler,
    Objective,
    Process,
    bits_per_dim,
    diffusion_loss,
    draw_steps,
    weighted_mean,
)
from guided_diffusers.learning.options import (
    Options,
    changeable,
    check_multiple,
    option,
    parse,
)
from guided_diffusers.learning.prepare import Images, load_data, load_scheduler, make_model
from guided_diffusers.networks import network_output

Denoiser = UNet2DModel | DiTTransformer2DModel | UNet1DModel | ModelMixin
Scheduler = DDPMScheduler | DDIMScheduler | FlowMatchEulerDiscreteScheduler
DEFAULT_UNET = {
    "block_out_channels": [64, 128, 256, 256],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}
DEFAULT_UNET_1D = {
    "block_out_channels": [64, 128, 256],
    "down_block_types": ["DownResnetBlock1D"] * 3,
    "up_block_types": ["UpResnetBlock1D"] * 2,
    "mid_block_type": "MidResTemporalBlock1D",
    "out_block_type": "OutConv1DBlock",
    "time_embedding_type": "positional",
    "use_timestep_embedding": True,
    "act_fn": "mish",
}
DIFFUSION_OPTIONS = """prediction_type rescale_betas_zero_snr snr_gamma scheduler ddpm_num_steps
ddpm_beta_schedule timestep_sampler bits_per_dim_images""".split()  # not for flow matching
FLOW_OPTIONS = ("flow_timestep_sampling", "flow_shift")


@dataclass
class UNetOptions(Options):
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = option(
        None, "output of the model; by default that of --scheduler, else epsilon"
    )
    class_conditional: bool = option(False, "condition the model on the label")
    label_dropout: float = option(
        0.1, "probability of the null label (the number of labels) with --class_conditional", 0, 1
    )
    rescale_betas_zero_snr: bool = option(
        False, "end the schedule in pure noise (Lin et al. 2024); not with epsilon predictions"
    )
    objective: Literal[Objective, "flow_matching"] = option(
        "simple",
        "loss: simple (mean squared error), with a learned variance hybrid, hybrid_rescaled or "
        "bound, or flow_matching (of the velocity eps - x0 on straight paths)",
    )
    snr_gamma: float | None = option(None, "gamma of min-SNR weights (Hang et al. 2023), e.g. 5")
    flow_timestep_sampling: Literal["uniform", "logit_normal"] | None = option(
        None, "flow_matching: distribution of s; by default logit_normal (Esser et al. 2024)"
    )
    flow_shift: float | None = option(
        None,
        "flow_matching: s in [0, 1] becomes shift s / (1 + (shift - 1) s), in sampling too; above "
        "1 for large images; by default 1",
        1e-3,
        1e3,
    )
    timestep_sampler: Literal["uniform", "second_moment"] = option(
        "uniform", "second_moment: timesteps of large loss more often, meant for --objective bound"
    )
    bits_per_dim_images: int = changeable(0, "held-out images for bits per dimension", 0)
    sample_images: int = changeable(40, "images to sample at every evaluation; 0: none", 0)

    def __post_init__(self) -> None:
        if (value := self.snr_gamma) is not None and not 0 < value < math.inf:
            raise ValueError(f"--snr_gamma {value}: a finite number above 0 is allowed")
        super().__post_init__()
        if self.vae is not None and self.bits_per_dim_images:
            value = f"--bits_per_dim_images {self.bits_per_dim_images}"
            raise ValueError(f"{value}: with --vae 0 is allowed, since they are bits of pixels")
        excluded, allowed = FLOW_OPTIONS, "flow_matching is"
        if self.flow_matching:
            excluded, allowed = DIFFUSION_OPTIONS, "simple, hybrid, hybrid_rescaled and bound are"
        objective = f"--objective {self.objective}: {allowed} allowed"
        for f in fields(self):
            if f.name in excluded and (value := getattr(self, f.name)) != f.default:
                raise ValueError(f"--{f.name} {value} with {objective}")
        if self.snr_gamma is not None and self.objective == "bound":
            raise ValueError(
                f"--snr_gamma {self.snr_gamma} with --objective bound, which has no mean squared "
                "error to weight: simple, hybrid and hybrid_rescaled are allowed"
            )

    @property
    def flow_matching(self) -> bool:
        return self.objective == "flow_matching"

    @property
    def learned_variance(self) -> bool:
        return self.objective not in ("simple", "flow_matching")


def make_schedulers(options: UNetOptions, has_range: bool) -> tuple[Scheduler, Scheduler]:
    """The noise schedule to train with, and the scheduler that is saved, for data that are within
    [-1, 1] or not.

    With zero terminal SNR the saved one starts at the noisiest timestep (trailing spacing; Lin et
    al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2024, section 3.3).
    """
    if options.flow_matching:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=options.flow_shift or 1.0)
        return scheduler, scheduler
    scheduler = load_scheduler(options, options.prediction_type, has_range)
    if options.rescale_betas_zero_snr:
        scheduler = DDPMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True)
    if options.learned_variance:
        scheduler = DDPMScheduler.from_config(scheduler.config, variance_type="learned_range")
    if not scheduler.config.rescale_betas_zero_snr:
        return scheduler, scheduler
    if scheduler.config.prediction_type == "epsilon":
        raise ValueError(
            "--prediction_type epsilon: with --rescale_betas_zero_snr the last timestep is pure "
            "noise, where eps tells nothing of x0; v_prediction and sample are allowed"
        )
    if options.snr_gamma is not None:
        raise ValueError(
            f"--snr_gamma {options.snr_gamma} with --rescale_betas_zero_snr weights the last "
            "timestep, where sampling starts, by 0: only one of the two is allowed"
        )
    spacing = {"timestep_spacing": "trailing"}
    if options.learned_variance:  # which DDIM doesn't support
        return scheduler, DDPMScheduler.from_config(scheduler.config, **spacing)
    # Clipping x0 without changing eps degrades guided samples.
    return scheduler, DDIMScheduler.from_config(scheduler.config, **spacing, clip_sample=False)


def make_denoiser(options: UNetOptions, data: Images) -> Denoiser:
    """A UNet2DModel, of signals a UNet1DModel, or a model of the config's class, for these data."""
    if options.class_conditional and not data.id2label:
        raise ValueError(
            "--class_conditional: the dataset has no column of class ids; --label_column can name "
            f"one of integers or strings, of {data.dataset.column_names}"
        )
    settings = {
        "sample_size": data.resolution,
        "in_channels": data.channels,
        "out_channels": data.channels * (2 if options.learned_variance else 1),
    }
    config: dict[str, Any] = {}
    if options.model_config_name_or_path is not None:
        with suppress(OSError, ValueError, RecursionError):  # make_model raises a better message
            config = UNet2DModel.load_config(options.model_config_name_or_path)
    if isinstance(config, dict) and config.get("_class_name") == DiTTransformer2DModel.__name__:
        return make_dit(options, data, settings)
    if isinstance(data, LabelledArrays) and (len(data.size) != 2 or is_other(config)):
        return make_array_denoiser(options, data, settings, config)
    settings["num_class_embeds"] = len(data.id2label) + 1 if options.class_conditional else None
    model = make_model(UNet2DModel, options, DEFAULT_UNET, **settings)
    levels = len(model.config.block_out_channels)
    check_resolution(options, data, 2 ** (levels - 1), f"{levels} levels")
    return model


def is_other(config: dict[str, Any]) -> bool:
    """Whether a config is of another model class of Diffusers than a UNet2DModel."""
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    is_model = isinstance(cls, type) and issubclass(cls, ModelMixin)
    return is_model and not issubclass(cls, UNet2DModel)


def make_array_denoiser(
    options: UNetOptions, data: LabelledArrays, settings: dict[str, Any], config: dict[str, Any]
) -> Denoiser:
    """A UNet1DModel of signals, or a model of the config's class, called (sample, timestep)."""
    path = options.model_config_name_or_path
    if options.class_conditional:
        raise ValueError(
            "--class_conditional: it is allowed with images, and arrays of two dimensions, whose "
            f"UNet2DModel has class embeddings; these arrays are {data.shape}, whose "
            "models, such as UNet1DModel, take no labels, so guide by a classifier"
        )
    if is_other(config):
        return make_model(getattr(diffusers, config["_class_name"]), options, {}, **settings)
    if len(data.size) != 1:
        raise ValueError(
            f"--model_config_name_or_path {path}: for arrays {data.shape} a config is needed whose "
            "_class_name is that of a model of Diffusers that is called (sample, timestep)"
        )
    model = make_model(UNet1DModel, options, DEFAULT_UNET_1D, **settings)
    unit = 2 ** (len(model.config.block_out_channels) - 1)
    if data.size[0] % unit:
        raise ValueError(
            f"--model_config_name_or_path {path}: arrays of length {data.size[0]}; multiples of "
            f"{unit} are allowed for a UNet1DModel of {len(model.config.block_out_channels)} levels"
        )
    return model


def make_dit(options: UNetOptions, data: Images, settings: dict[str, Any]) -> DiTTransformer2DModel:
    """A transformer whose blocks start as the identity, and its output as 0.

    adaLN-Zero (Peebles & Xie, Scalable Diffusion Models with Transformers, 2023, section 3.2),
    which Diffusers doesn't initialize.
    """
    if not options.class_conditional:
        raise ValueError(
            f"--model_config_name_or_path {options.model_config_name_or_path}: a "
            "DiTTransformer2DModel needs a label: it is allowed with --class_conditional only"
        )
    if not isinstance(data.resolution, int):
        raise ValueError(
            f"--resolution {size_text(options.resolution)}: a DiTTransformer2DModel "
            f"(--model_config_name_or_path {options.model_config_name_or_path}) is for squares; one "
            "number is allowed"
        )
    # It adds the embedding of the null label, whose id is the number of labels.
    settings["num_embeds_ada_norm"] = len(data.id2label)
    model = make_model(DiTTransformer2DModel, options, {}, **settings)
    patch = model.config.patch_size
    check_resolution(options, data, patch, f"patches of {patch}")
    modulation = [block.norm1.linear for block in model.transformer_blocks]
    for linear in (*modulation, model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            # --label_dropout drops a label in all blocks; this would do so in each block separately.
            module.dropout_prob = 0.0
    return model


def check_resolution(options: UNetOptions, data: Images, multiple: int, model: str) -> None:
    """Raise a `ValueError` if a side of the images, or latents, isn't a multiple of a number."""
    pixels = as_pair(options.resolution)[0] // as_pair(data.resolution)[0]
    check_multiple(options.resolution, pixels * multiple, f"for a network of {model}")


class DenoisingLoss:
    """The loss of a denoiser at random noise levels: (model, batch, draws) -> mean of the rows."""

    def __init__(
        self, options: UNetOptions, accelerator: Accelerator, scheduler: Scheduler, num_labels: int
    ):
        self.options, self.accelerator, self.num_labels = options, accelerator, num_labels
        self.process = FlowProcess(scheduler) if options.flow_matching else Process(scheduler)
        self.num_timesteps, self.sampler = scheduler.config.num_train_timesteps, None
        if options.timestep_sampler == "second_moment":
            self.sampler = LossSecondMomentSampler(self.num_timesteps)
            accelerator.register_for_checkpointing(self.sampler)

    def __call__(self, model: torch.nn.Module, batch: Batch, draws: StepRandom) -> torch.Tensor:
        options, weight = self.options, None
        if options.flow_matching:
            uniform = options.flow_timestep_sampling == "uniform"
            t = self.process.timesteps(draws.rand() if uniform else draws.randn().sigmoid())
        else:
            t, weight = draw_steps(draws, self.num_timesteps, self.sampler)
        eps = draws.randn(*batch["pixel_values"].shape[1:])
        dropped = draws.rand() < options.label_dropout
        batch = {**batch, "label": torch.where(dropped, self.num_labels, batch["label"])}
        losses = self.per_image(model, batch, eps, t, options.snr_gamma)
        return weighted_mean(losses, t, weight, self.sampler, self.accelerator)

    def per_image(
        self,
        model: torch.nn.Module,
        batch: Batch,
        eps: torch.Tensor,
        t: torch.Tensor,
        snr_gamma: float | None = None,
    ) -> torch.Tensor:
        """The loss of each image, (B,)."""
        x0 = batch["pixel_values"]
        labels = {"class_labels": batch["label"]} if self.options.class_conditional else {}
        output = network_output(model, self.process.noised(x0, eps, t), t, **labels)
        objective = "simple" if self.options.flow_matching else self.options.objective
        losses = diffusion_loss(self.process, output.float(), x0, eps, t, objective, snr_gamma)
        return losses["loss"]


def evaluate_denoiser(
    loss: DenoisingLoss,
    make_pipeline: Callable[..., ClassifierGuidedPipeline],
    held_out: Images | None,
    last_step: int,
    model: Denoiser,
    step: int,
) -> dict[str, Any]:
    """Held-out loss, at the last step also bits per dimension; writes a picture of samples."""
    options, accelerator = loss.options, loss.accelerator
    if options.sample_images and accelerator.is_main_process:
        pipeline = make_pipeline(unet=model).to(accelerator.device)
        path = Path(options.output_dir) / f"samples-{step}.png"
        draw_samples(pipeline, path, options.sample_images)
        if path.exists():  # of arrays there is none
            log_picture(accelerator, "samples", path, step)
    accelerator.wait_for_everyone()

    def score(batch: Batch, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return loss.per_image(model, batch, eps, t)[None]

    metrics = held_out_metrics(accelerator, options, held_out, loss.num_timesteps, ("loss",), score)
    if metrics and options.bits_per_dim_images and step == last_step:
        metrics["bits_per_dim"] = mean_bits_per_dim(loss, held_out, model)
    return metrics


def mean_bits_per_dim(loss: DenoisingLoss, held_out: Images, model: Denoiser) -> float:
    """Mean bits per dimension of held-out images, evenly spread; the noise of each is fixed."""
    options, accelerator = loss.options, loss.accelerator
    count = min(options.bits_per_dim_images, len(held_out))
    share = range(count)[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros((), device=accelerator.device)
    for start in range(0, len(share), options.train_batch_size):
        indices = share[start : start + options.train_batch_size]
        batch = collate([held_out[i * len(held_out) // count] for i in indices])
        x0, labels = batch["pixel_values"].to(accelerator.device), None
        if options.class_conditional:
            labels = batch["label"].to(accelerator.device)
        generators = [generator_for(0, 4, i) for i in indices]
        bits = bits_per_dim(model, loss.process, x0, labels, generator=generators)
        total += bits["total"].sum()
    return accelerator.reduce(total, "sum").item() / count


def draw_samples(pipeline: ClassifierGuidedPipeline, path: Path, count: int) -> None:
    """Save a picture of about `count` samples, one row per label; of arrays an .npz file."""
    arrays = pipeline.config.data_std is not None
    pipeline.set_progress_bar_config(disable=True)
    labels = list(range(pipeline.num_labels or 0))[:count] or None
    rows = len(labels) if labels else 1
    images = pipeline(
        labels,
        output_type="np" if arrays else "pil",
        num_images_per_label=max(1, count // rows),
        guidance_scale=0.0,
        num_inference_steps=min(50, pipeline.scheduler.config.num_train_timesteps),
        generator=torch.Generator().manual_seed(0),
    ).images
    if arrays:
        np.savez(path.with_suffix(".npz"), images)
    else:
        make_image_grid(images, rows, len(images) // rows).save(path)


def next_steps(options: UNetOptions) -> list[str]:
    """Commands that use the model."""
    folder = quote(options.output_dir)
    commands = [
        f"guided-diffusers assemble --unet {folder} --classifier CLASSIFIER --output PIPELINE  "
        "# with a classifier of the same images, from train_classifier.py"
    ]
    if options.class_conditional:
        line = f"guided-diffusers sample --model {folder} --label all --guidance-scale 0"
        commands.insert(0, f"{line} --output samples.png")
    return commands


def main() -> None:
    options = parse(UNetOptions, __doc__)
    with exit_on_value_error():
        # 1. Data, noise schedule, model
        accelerator = make_accelerator(options)
        vae = load_vae(options.vae)
        data, held_out = load_data(options, accelerator, vae, labelled=options.class_conditional)
        are_arrays = isinstance(data, LabelledArrays)
        if are_arrays and options.bits_per_dim_images:
            value = f"--bits_per_dim_images {options.bits_per_dim_images}"
            raise ValueError(f"{value}: with arrays 0 is allowed, since they are bits of pixels")
        scheduler, saved_scheduler = make_schedulers(options, has_range=not are_arrays)
        loss = DenoisingLoss(options, accelerator, scheduler, len(data.id2label))
        set_seed(options.seed)
        trainer = Trainer(options, accelerator, make_denoiser(options, data), data)
        settings = {"workers": options.dataloader_num_workers, "progress": options.progress}
        settings["timeout_minutes"] = options.timeout_minutes
        write_latents(accelerator, vae, data, held_out, **settings)
    if isinstance(vae, AutoencoderKL):
        vae.enable_slicing()  # decode the images of a picture one by one
    names = data.id2label if options.class_conditional else None

    scale = {"data_mean": data.data_mean, "data_std": data.data_std} if are_arrays else {}
    make_pipeline = partial(ClassifierGuidedPipeline, vae=vae, id2label=names, **scale)

    # 2. Train, save, publish
    sampler = scheduler
    if not options.flow_matching:
        sampler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    make_sampler = partial(make_pipeline, scheduler=sampler)
    evaluate = partial(evaluate_denoiser, loss, make_sampler, held_out, trainer.steps)
    model = trainer.train(loss, evaluate)
    pipeline = make_pipeline(unet=model, scheduler=saved_scheduler)
    save_and_publish(options, accelerator, pipeline, next_steps(options))


if __name__ == "__main__":
    run_program(main)
