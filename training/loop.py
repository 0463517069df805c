"""The training loop of both scripts: its stream of batches, its random numbers, its checkpoints, its evaluation.

Everything random at a step is a function of (seed, step): the batch, its noise, its noise levels, dropout. A run that
is resumed at step n therefore goes on exactly as the uninterrupted one, and N processes with batch B/N draw what one
process with batch B draws (but for dropout).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from options import Options
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from guided_diffusers.data import LabelledImages

Batch = dict[str, torch.Tensor]  # pixel_values (B, C, H, W) in [-1, 1], label (B,), and what else the items have


def generator_for(*numbers: int) -> torch.Generator:
    """A generator for a tuple of small numbers, e.g. (seed, purpose, step); different tuples give different streams."""
    state = 0
    for number in numbers:
        state = (state * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(state)


class Stream(Sampler[list[tuple[int, int]]]):
    """Batches of `(index, seed)`: epoch after epoch of permutations, cut into batches over all processes.

    Position p of the stream is item `permutation(seed, p // n)[p % n]`. Batch k is the positions from k * B * world;
    process `rank` takes the `rank`-th B of them. It starts at any batch, at no cost.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int, world: int, first: int, last: int):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world, self.first, self.last = rank, world, first, last

    def __len__(self) -> int:
        return max(0, self.last - self.first)

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


class Draws:
    """The random numbers of one batch over all processes, of which this process keeps its rows."""

    def __init__(self, generator: torch.Generator, rows: int, rank: int, world: int, device: torch.device):
        self.generator, self.total, self.mine = generator, rows * world, slice(rank * rows, (rank + 1) * rows)
        self.device = device

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.total, *shape, generator=self.generator)[self.mine].to(self.device)

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(self.total, *shape, generator=self.generator)[self.mine].to(self.device)

    def randint(self, high: int) -> torch.Tensor:
        return torch.randint(high, (self.total,), generator=self.generator)[self.mine].to(self.device)


def collate(items: list[dict[str, Any]]) -> Batch:
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}


@dataclass
class Progress:
    """How many optimizer steps a run has made; saved with every checkpoint."""

    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class Run:
    """A training run: the network, its moving average, its optimizer, and how far it is.

    Args:
        model: trained in place.
        data: what it's trained on.

    Raises:
        ValueError: if --resume_from_checkpoint can't be read, or is missing though --output_dir has checkpoints.
    """

    def __init__(self, options: Options, accelerator: Accelerator, model: torch.nn.Module, data: LabelledImages):
        self.options, self.accelerator, self.data = options, accelerator, data
        self.folder, self.progress = Path(options.output_dir), Progress()
        self.passes = accelerator.gradient_accumulation_steps
        images = options.train_batch_size * accelerator.num_processes * self.passes
        self.steps = options.max_train_steps or math.ceil(options.num_train_epochs * len(data) / images)
        optimizer = torch.optim.AdamW(
            model.parameters(), options.learning_rate, (options.adam_beta1, options.adam_beta2), options.adam_epsilon,
            options.adam_weight_decay)
        # Not prepared by Accelerate, which would step it once a process.
        self.schedule = get_scheduler(options.lr_scheduler, optimizer, num_warmup_steps=options.lr_warmup_steps,
                                      num_training_steps=self.steps)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare = accelerator.unwrap_model(self.model)
        accelerator.register_for_checkpointing(self.progress, self.schedule)
        self.ema = None
        if options.use_ema:
            self.ema = EMAModel(self.bare.parameters(), decay=options.ema_max_decay, use_ema_warmup=True,
                                inv_gamma=options.ema_inv_gamma, power=options.ema_power)
            accelerator.register_for_checkpointing(self.ema)
        if (checkpoint := find_checkpoint(options)) is not None:
            try:
                accelerator.load_state(str(checkpoint))
            except (OSError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split("\n\t")[:2])  # of a long list
                raise ValueError(f"--resume_from_checkpoint {checkpoint}: {reason}") from error
            accelerator.step = self.progress.step * self.passes  # a process that is new has no state to load it from
            accelerator.print(f"goes on from {checkpoint}")
        if self.ema is not None:
            self.ema.to(accelerator.device)  # load_state leaves it on the CPU

    def train(self, loss: Callable[[torch.nn.Module, Batch, Draws], torch.Tensor],
              evaluate: Callable[[torch.nn.Module, int], dict[str, Any]]) -> torch.nn.Module:
        """Make the steps that are left and return the trained model: its moving average with --use_ema.

        Args:
            loss: (model, batch, draws) -> the mean loss of this process's rows.
            evaluate: (averaged model, step) -> what `held_out_figures` gives; called on every process.

        Raises:
            FloatingPointError: if the loss becomes NaN or infinite.
        """
        options, accelerator, progress = self.options, self.accelerator, self.progress
        self._open_records()
        stream = Stream(len(self.data), options.train_batch_size, options.seed, accelerator.process_index,
                        accelerator.num_processes, progress.step * self.passes, self.steps * self.passes)
        loader = DataLoader(self.data, batch_sampler=stream, num_workers=options.dataloader_num_workers,
                            collate_fn=collate, pin_memory=accelerator.device.type == "cuda")
        bar = tqdm(total=self.steps, initial=progress.step, unit="step", mininterval=1.0,
                   disable=not (options.progress and accelerator.is_main_process))
        self.model.train()
        for number, batch in enumerate(loader, start=stream.first):
            value = self._pass(loss, batch, number)
            if not accelerator.sync_gradients:
                continue
            progress.step += 1
            bar.update()
            save = progress.step % options.checkpointing_steps == 0
            if save or progress.step % 10 == 0 or progress.step == self.steps:
                self._check_and_log(value, bar)
            if save:
                save_checkpoint(accelerator, self.folder, progress.step, options.checkpoints_total_limit)
            due = options.validation_steps and progress.step % options.validation_steps == 0
            if due and progress.step < self.steps:
                with self._averaged():
                    self._report(evaluate(self.bare, progress.step))
        bar.close()
        if self.ema is not None:
            self.ema.copy_to(self.bare.parameters())
        self.bare.eval()
        self._report(evaluate(self.bare, progress.step))
        return self.bare

    def _pass(self, loss: Callable[[torch.nn.Module, Batch, Draws], torch.Tensor], batch: Batch, number: int) \
            -> torch.Tensor:
        """A forward and backward pass, and the optimizer's step where it is due."""
        options, accelerator = self.options, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        torch.manual_seed(generator_for(options.seed, 1, number, rank).initial_seed())  # dropout
        draws = Draws(generator_for(options.seed, 2, number), options.train_batch_size, rank, world, accelerator.device)
        with accelerator.accumulate(self.model):
            value = loss(self.model, batch, draws)
            accelerator.backward(value)
            if accelerator.sync_gradients and options.max_grad_norm:
                accelerator.clip_grad_norm_(self.model.parameters(), options.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            if not accelerator.optimizer_step_was_skipped:  # by fp16's loss scaler
                self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.bare.parameters())
        return value.detach()

    def _open_records(self) -> None:
        settings = asdict(self.options)
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "options.json", settings)
            self.accelerator.init_trackers(self.folder.resolve().name, {k: str(v) for k, v in settings.items()})
        self.accelerator.wait_for_everyone()

    def _check_and_log(self, value: torch.Tensor, bar: tqdm) -> None:
        mean = self.accelerator.reduce(value, "mean").item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss at step {self.progress.step} is {mean}; try a smaller --learning_rate")
        bar.set_postfix(loss=f"{mean:.4f}")
        self.accelerator.log({"loss": mean, "learning_rate": self.schedule.get_last_lr()[0]}, self.progress.step)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the model for evaluation, then the trained ones again."""
        if self.ema is not None:
            self.ema.store(self.bare.parameters())
            self.ema.copy_to(self.bare.parameters())
        self.bare.eval()
        try:
            yield
        finally:
            self.bare.train()
            if self.ema is not None:
                self.ema.restore(self.bare.parameters())

    def _report(self, figures: dict[str, Any]) -> None:
        """Figures at noise levels to metrics.json, the trackers and the screen."""
        if not figures:
            return
        step, rows = self.progress.step, figures["held_out"]
        if self.accelerator.is_main_process:
            write_json(self.folder / "metrics.json", {"step": step, **figures})
        names = [name for name in rows[0] if name != "timestep"]
        self.accelerator.log({f"{name}/t={row['timestep']}": row[name] for row in rows for name in names}, step)
        for name in names:
            values = ", ".join(f"t={row['timestep']} {row[name]:.3f}" for row in rows)
            self.accelerator.print(f"step {step}: {name} {values}")


def held_out_figures(
    options: Options, accelerator: Accelerator, data: LabelledImages | None, timesteps: list[int],
    names: tuple[str, ...], score: Callable[[Batch, torch.Tensor, torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """Means over the held-out images at each of some noise levels.

    An image gets the same noise in any batch and process. Each process takes its share; all get the same means.

    Args:
        score: (batch, eps, t) -> (len(names), B), what is averaged.

    Returns:
        `{"images": how many, "held_out": [{"timestep": t, name: mean, ...}, ...]}`; empty without held-out images.
    """
    if data is None:
        return {}
    count, size, device = min(options.validation_samples, len(data)), options.train_batch_size, accelerator.device
    share = [i * len(data) // count for i in range(count)][accelerator.process_index::accelerator.num_processes]
    sums = torch.zeros(len(timesteps), len(names), device=device)
    for start in range(0, len(share), size):
        numbers = share[start:start + size]
        batch = collate([data[i] for i in numbers])
        shape = batch["pixel_values"].shape[1:]
        batch = {name: value.to(device) for name, value in batch.items()}
        for k, timestep in enumerate(timesteps):
            eps = torch.stack([torch.randn(shape, generator=generator_for(0, 3, i, k)) for i in numbers]).to(device)
            t = torch.full((len(numbers),), timestep, device=device)
            with torch.no_grad():
                sums[k] += score(batch, eps, t).float().sum(dim=1)
    means = (accelerator.reduce(sums, "sum") / count).tolist()
    rows = [{"timestep": timestep, **{name: round(mean, 5) for name, mean in zip(names, row, strict=True)}}
            for timestep, row in zip(timesteps, means, strict=True)]
    return {"images": count, "held_out": rows}


def finish(accelerator: Accelerator) -> None:
    """Leave together, after the main process has saved.

    A thread of gloo may need the GIL to let go of the last reduction's tensors. A process that leaves at once destroys
    its process group with the GIL held, and waits for that thread for ever (seen with torch 2.13).
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()


def ten_levels(steps: int) -> list[int]:
    """Ten timesteps: the middles of ten equal parts of a schedule, e.g. 49, 149, ..., 949 of 1000; fewer of fewer."""
    return sorted({int((part + 0.5) * steps / 10 - 1e-6) for part in range(10)})


def write_json(path: Path, content: Any) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(aside, path)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, limit: int) -> None:
    """Write `checkpoint-STEP` under a temporary name, move it into place, drop the oldest beyond the limit."""
    aside, place = folder / f"checkpoint-{step}.partial", folder / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(place, ignore_errors=True)
        os.replace(aside, place)
        for old in checkpoints(folder)[:-limit] if limit else []:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(options: Options) -> Path | None:
    """The folder that --resume_from_checkpoint means; None to start at the beginning.

    Raises:
        ValueError: if there is none, or it is none, or a new run would mix its checkpoints with an older run's.
    """
    asked, there = options.resume_from_checkpoint, checkpoints(Path(options.output_dir))
    if asked is None and there:
        raise ValueError(f"--output_dir {options.output_dir} has {there[-1].name} of another run: go on with "
                         "--resume_from_checkpoint latest, or give another folder")
    if asked in (None, "latest"):
        return there[-1] if there else None
    if not (Path(asked) / "custom_checkpoint_0.pkl").is_file():
        raise ValueError(f"--resume_from_checkpoint {asked}: not the folder of a checkpoint; `latest` and "
                         f"{[str(path) for path in there]} are allowed")
    known = [path.resolve() for path in there]
    if Path(asked).resolve() in known[:-1]:
        raise ValueError(f"--resume_from_checkpoint {asked}: --output_dir {options.output_dir} has newer ones, up to "
                         f"{there[-1].name}, which would be mixed with what follows; remove them, or give another "
                         "--output_dir")
    return Path(asked)
