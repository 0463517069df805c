"""What the training scripts share: their options, the stream of batches, the loop and its checkpoints.

Everything random at a step is a function of (seed, step): the batch, its noise, its noise levels, dropout. A run that is
resumed at step n therefore goes on exactly as the uninterrupted one, and N processes with batch B/N draw what one process
with batch B draws.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from guided_diffusers.data import LabelledImages, load_splits

logger = get_logger(__name__)
AnyOptions = TypeVar("AnyOptions", bound="Options")


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    dataset_name: str | None = option(None, "a dataset on the Hub, or a local folder that `load_dataset` reads")
    dataset_config_name: str | None = option(None, "the dataset's configuration")
    train_data_dir: str | None = option(None, "an image folder (one folder a label) or a folder of Parquet files")
    train_split: str = option("train", "the split to train on")
    validation_split: str | None = option(None, "the held-out split (default: validation or test, where there is one)")
    image_column: str | None = option(None, "column of the images (default: the first that holds images)")
    label_column: str | None = option(None, "column of the labels (default: the first that holds class ids)")
    output_dir: str = option("output", "where the model, its checkpoints and its figures go")
    seed: int = option(0, "decides the initial weights, the order of the data and all noise")
    resolution: int = option(64, "height and width in pixels")
    center_crop: bool = option(False, "crop in the middle (default: at a random place)")
    random_flip: bool = option(False, "mirror half of the images")
    random_shift: int = option(0, "move by up to that many pixels each way")
    model_config_name_or_path: str | None = option(None, "JSON with the model's config (default: a small network)")
    scheduler: str | None = option(None, "a scheduler config or a pipeline folder whose noise schedule is used")
    ddpm_num_steps: int = option(1000, "timesteps of the noise schedule, without --scheduler")
    ddpm_beta_schedule: str = option("linear", "linear, scaled_linear or squaredcos_cap_v2, without --scheduler")
    train_batch_size: int = option(64, "images a process and forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes an optimizer step")
    max_train_steps: int = option(10_000, "optimizer steps")
    learning_rate: float = option(1e-4, "AdamW's, after the warm-up")
    lr_scheduler: str = option("constant_with_warmup", "constant_with_warmup, cosine, linear, ... of Diffusers")
    lr_warmup_steps: int = option(500, "optimizer steps of linear warm-up")
    adam_beta1: float = option(0.9, "AdamW's first beta")
    adam_beta2: float = option(0.999, "AdamW's second beta")
    adam_weight_decay: float = option(0.01, "AdamW's weight decay")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = option(1.0, "gradients of a larger norm are scaled to it; 0 switches it off")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "autocast of the forward pass")
    use_ema: bool = option(True, "save the exponential moving average of the weights")
    ema_inv_gamma: float = option(1.0, "EMA decay is 1 - (1 + step / inv_gamma)^-power ...")
    ema_power: float = option(0.75, "... with this power ...")
    ema_max_decay: float = option(0.9999, "... and at most this")
    validation_steps: int = option(1000, "optimizer steps between evaluations; 0: only at the end")
    validation_samples: int = option(2000, "images of the held-out split that an evaluation reads")
    checkpointing_steps: int = option(500, "optimizer steps between checkpoints")
    checkpoints_total_limit: int | None = option(2, "how many checkpoints are kept")
    resume_from_checkpoint: str | None = option(None, "a checkpoint folder, or `latest`")
    dataloader_num_workers: int = option(0, "processes that read images")
    logging_dir: str = option("logs", "where trackers write, below --output_dir")
    report_to: str | None = option(None, "tensorboard, wandb, ...: a tracker of Accelerate")
    cpu: bool = option(False, "train on the CPU even where there is an accelerator")
    progress: bool = option(True, "show a progress bar")

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError("give one of --dataset_name and --train_data_dir")
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps",
                     "resolution", "ddpm_num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")


def parse(options: type[AnyOptions], description: str | None) -> AnyOptions:
    """The options from the command line; wrong ones end the program with a message."""
    parser = HfArgumentParser(options, description=description)
    try:
        return parser.parse_args_into_dataclasses()[0]
    except ValueError as error:
        parser.error(str(error))


def load_data(options: Options) -> tuple[LabelledImages, LabelledImages | None]:
    """The split to train on, and the held-out one if there is one."""
    splits = load_splits(options.dataset_name or options.train_data_dir, options.dataset_config_name)
    held_out = options.validation_split or next((name for name in ("validation", "test") if name in splits), None)
    for name, split in (("train_split", options.train_split), ("validation_split", held_out)):
        if split is not None and split not in splits:
            raise ValueError(f"--{name} {split!r}: the dataset has {sorted(splits)}")
    train = LabelledImages(splits[options.train_split], options.image_column, options.label_column, options.resolution,
                           options.center_crop, options.random_flip, options.random_shift)
    validation = held_out and LabelledImages(
        splits[held_out], train.image_column, train.label_column, options.resolution, center_crop=True,
        channels=train.channels, labels=train.id2label)
    return train, validation or None


def load_scheduler(options: Options, **overrides: Any) -> DDPMScheduler:
    """The noise schedule to train with: of a scheduler or pipeline folder, or from the --ddpm options."""
    if options.scheduler is None:
        return DDPMScheduler(options.ddpm_num_steps, beta_schedule=options.ddpm_beta_schedule, **overrides)
    folder = Path(options.scheduler)
    subfolder = "scheduler" if not folder.exists() or (folder / "model_index.json").exists() else None
    return DDPMScheduler.from_pretrained(options.scheduler, subfolder=subfolder, **overrides)


def model_config(options: Options, default: dict[str, Any], **filled_in: Any) -> dict[str, Any]:
    """The architecture from --model_config_name_or_path or `default`, with what the data decides filled in."""
    path = options.model_config_name_or_path
    config = default if path is None else json.loads(Path(path).read_text())
    return {**{name: value for name, value in config.items() if not name.startswith("_")}, **filled_in}


class Stream(Sampler[list[tuple[int, int]]]):
    """Batches of `(index, seed)`: epoch after epoch of permutations, cut into batches over all processes.

    Position p of the stream is item `permutation(seed, p // n)[p % n]`. Batch k is the positions from k * B * world;
    process `rank` takes the `rank`-th B of them. It starts at any batch, at no cost.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int, world: int, first: int, last: int):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world, self.first, self.last = rank, world, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0)
        for batch in range(self.first, self.last):
            start = (batch * self.world + self.rank) * self.batch_size
            items = []
            for position in range(start, start + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = torch.randperm(self.length, generator=generator_for(self.seed, 0, epoch))
                items.append((int(order[position % self.length]), self.seed * 1_000_003 + position))
            yield items


def generator_for(*numbers: int) -> torch.Generator:
    """A generator for a tuple of numbers, e.g. (seed, purpose, step); distinct tuples give distinct streams."""
    state = 0
    for number in numbers:
        state = (state * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(state)


class Draws:
    """The random numbers of one batch over all processes, of which this process keeps its rows."""

    def __init__(self, generator: torch.Generator, rows: int, rank: int = 0, world: int = 1):
        self.generator, self.total, self.mine = generator, rows * world, slice(rank * rows, (rank + 1) * rows)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.total, *shape, generator=self.generator)[self.mine]

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(self.total, *shape, generator=self.generator)[self.mine]

    def randint(self, high: int) -> torch.Tensor:
        return torch.randint(high, (self.total,), generator=self.generator)[self.mine]


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "label": torch.tensor([item["label"] for item in items])}


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def write_json(path: Path, content: Any) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(aside, path)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, limit: int | None) -> None:
    """Write `checkpoint-STEP` under a temporary name, move it into place, drop the oldest beyond the limit."""
    aside = folder / f"checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        place = folder / f"checkpoint-{step}"
        shutil.rmtree(place, ignore_errors=True)
        os.replace(aside, place)
        for old in checkpoints(folder)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(options: Options) -> Path | None:
    """The folder that --resume_from_checkpoint means; None to start at the beginning."""
    if options.resume_from_checkpoint is None:
        return None
    if options.resume_from_checkpoint == "latest":
        return next(iter(reversed(checkpoints(Path(options.output_dir)))), None)
    if not Path(options.resume_from_checkpoint).is_dir():
        raise ValueError(f"--resume_from_checkpoint {options.resume_from_checkpoint!r}: no such folder; "
                         "give a checkpoint folder or `latest`")
    return Path(options.resume_from_checkpoint)


def make_accelerator(options: Options) -> Accelerator:
    project = ProjectConfiguration(options.output_dir, str(Path(options.output_dir) / options.logging_dir))
    accelerator = Accelerator(mixed_precision=options.mixed_precision, cpu=options.cpu, log_with=options.report_to,
                              gradient_accumulation_steps=options.gradient_accumulation_steps, project_config=project)
    if accelerator.is_main_process:
        Path(options.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(options.output_dir) / "options.json", {f.name: getattr(options, f.name) for f in fields(options)})
        if options.report_to:
            plain = {f.name: str(getattr(options, f.name)) for f in fields(options)}
            accelerator.init_trackers(Path(options.output_dir).name, plain)
    accelerator.wait_for_everyone()
    return accelerator


def train(options: Options, accelerator: Accelerator, model: torch.nn.Module, data: LabelledImages,
          loss: Callable[[torch.nn.Module, dict[str, torch.Tensor], Draws], torch.Tensor],
          evaluate: Callable[[torch.nn.Module, int], dict[str, float]]) -> torch.nn.Module:
    """Run the loop and return the trained model: its moving average with --use_ema.

    Args:
        loss: (model, batch of `pixel_values` and `label`, draws) -> the mean loss of this process's rows.
        evaluate: (averaged model, step) -> figures for the trackers; called on every process.
    """
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, (options.adam_beta1, options.adam_beta2),
                                  options.adam_epsilon, options.adam_weight_decay)
    schedule = get_scheduler(options.lr_scheduler, optimizer, num_warmup_steps=options.lr_warmup_steps,
                             num_training_steps=options.max_train_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    progress = Progress()
    accelerator.register_for_checkpointing(progress, schedule)
    ema = None
    if options.use_ema:
        ema = EMAModel(bare.parameters(), decay=options.ema_max_decay, use_ema_warmup=True,
                       inv_gamma=options.ema_inv_gamma, power=options.ema_power)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    checkpoint = find_checkpoint(options)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"goes on from {checkpoint}")

    passes, world, rank = options.gradient_accumulation_steps, accelerator.num_processes, accelerator.process_index
    stream = Stream(len(data), options.train_batch_size, options.seed, rank, world,
                    progress.step * passes, options.max_train_steps * passes)
    loader = DataLoader(data, batch_sampler=stream, num_workers=options.dataloader_num_workers, collate_fn=collate,
                        pin_memory=accelerator.device.type == "cuda")
    bar = tqdm(total=options.max_train_steps, initial=progress.step, unit="step", mininterval=1.0,
               disable=not (options.progress and accelerator.is_main_process))
    model.train()
    for number, batch in enumerate(loader, start=stream.first):
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        torch.manual_seed(generator_for(options.seed, 1, number, rank).initial_seed())  # dropout
        draws = Draws(generator_for(options.seed, 2, number), options.train_batch_size, rank, world)
        with accelerator.accumulate(model):
            value = loss(model, batch, draws)
            accelerator.backward(value)
            if accelerator.sync_gradients and options.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        schedule.step()
        if ema is not None:
            ema.step(bare.parameters())
        progress.step += 1
        bar.update()
        if progress.step % 10 == 0:
            mean = accelerator.reduce(value.detach(), "mean").item()
            if mean != mean:
                raise FloatingPointError(f"the loss at step {progress.step} is NaN; try a smaller --learning_rate")
            bar.set_postfix(loss=f"{mean:.4f}")
            accelerator.log({"loss": mean, "learning_rate": schedule.get_last_lr()[0]}, progress.step)
        if progress.step % options.checkpointing_steps == 0:
            save_checkpoint(accelerator, Path(options.output_dir), progress.step, options.checkpoints_total_limit)
        if options.validation_steps and progress.step % options.validation_steps == 0 \
                and progress.step < options.max_train_steps:
            with_average(bare, ema, lambda: evaluate(bare, progress.step), accelerator, progress.step)
    bar.close()
    if ema is not None:
        ema.copy_to(bare.parameters())
    bare.eval()
    accelerator.log(evaluate(bare, progress.step), progress.step)
    accelerator.end_training()
    return bare


def with_average(model: torch.nn.Module, ema: EMAModel | None, evaluate: Callable[[], dict[str, float]],
                 accelerator: Accelerator, step: int) -> None:
    """Evaluate the averaged weights, then go on with the trained ones."""
    if ema is not None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    model.eval()
    try:
        accelerator.log(evaluate(), step)
    finally:
        model.train()
        if ema is not None:
            ema.restore(model.parameters())


def validation_batches(data: LabelledImages, options: Options, rank: int, world: int) \
        -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """This process's share of the first --validation_samples held-out images, evenly spread, with their numbers."""
    count = min(options.validation_samples, len(data))
    size = options.train_batch_size
    for start in range(rank * size, count, world * size):
        chosen = range(start, min(start + size, count))
        yield start, collate([data[i * len(data) // count] for i in chosen])


def ten_levels(scheduler: DDPMScheduler) -> list[int]:
    """Ten timesteps: the middles of ten equal parts of the schedule, e.g. 49, 149, ..., 949 of 1000."""
    steps = scheduler.config.num_train_timesteps
    return [int((part + 0.5) * steps / 10 - 1e-6) for part in range(10)]
