"""The training loop of both scripts: its stream of batches, its random numbers, its checkpoints, its evaluation.

Everything random at a step is a function of (seed, step): the batch, its noise, its noise levels, dropout. A run that
is resumed at step n therefore goes on exactly as the uninterrupted one, and N processes with batch B/N draw what one
process with batch B draws (but for dropout).
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    broadcast_object_list,
    convert_outputs_to_fp32,
    gather_object,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from .checkpointing import (
    UNLOADABLE,
    checkpoints,
    find_checkpoints,
    identity_of,
    save_checkpoint,
    why_refused,
    write_json,
)
from .data import SHARD, LabelledImages, row_name
from .options import Options
from .streaming import StreamedBatches, StreamedImages

Batch = dict[
    str, torch.Tensor
]  # pixel_values (B, C, H, W) in [-1, 1], label (B,), and what else the items have
BLOCKS = {
    "ResnetBlock2D",
    "BasicTransformerBlock",
}  # what FSDP gathers at a time, where its config names nothing


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

    def __init__(
        self, length: int, batch_size: int, seed: int, rank: int, world: int, first: int, last: int
    ):
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
                    order = torch.randperm(
                        self.length, generator=generator_for(self.seed, 0, epoch)
                    )
                items.append((int(order[position % self.length]), self.seed * 1_000_003 + position))
            yield items


class Draws:
    """The random numbers of one batch over all processes, of which this process keeps its rows."""

    def __init__(
        self, generator: torch.Generator, rows: int, rank: int, world: int, device: torch.device
    ):
        self.generator, self.total, self.mine = (
            generator,
            rows * world,
            slice(rank * rows, (rank + 1) * rows),
        )
        self.device = device

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.total, *shape, generator=self.generator)[self.mine].to(self.device)

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(self.total, *shape, generator=self.generator)[self.mine].to(self.device)

    def randint(self, high: int) -> torch.Tensor:
        return torch.randint(high, (self.total,), generator=self.generator)[self.mine].to(
            self.device
        )


def collate(items: list[dict[str, Any]]) -> Batch:
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}


@dataclass
class Progress:
    """How many optimizer steps a run has made, and where each process's stream is; saved with every checkpoint."""

    step: int = 0
    positions: list[dict[str, int]] | None = None  # with --streaming

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step} | ({"positions": self.positions} if self.positions else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.positions = state["step"], state.get("positions")


class Average(EMAModel):
    """`EMAModel` whose step makes no copy of the weights: shadow += (1 - decay) (weights - shadow).

    Of a network that FSDP splits, each process averages its part. What is saved is whole.
    """

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)

    @torch.no_grad()
    def exchange(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Trained weights become the average, and the average the trained weights; done twice, nothing has changed."""
        for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
            kept = parameter.clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "shadow_params": [whole(shadow) for shadow in self.shadow_params]
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        shadows = self.shadow_params
        super().load_state_dict(state)
        for shadow, loaded in zip(shadows, self.shadow_params, strict=True):
            if isinstance(shadow, DTensor):
                loaded = distribute_tensor(
                    loaded.to(shadow.device),
                    shadow.device_mesh,
                    shadow.placements,
                    src_data_rank=None,
                )
            shadow.copy_(loaded)
        self.shadow_params = shadows


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process may have a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Run:
    """A training run: the network, its moving average, its optimizer, and how far it is.

    Args:
        model: trained in place.
        data: what it's trained on.
        source: with --streaming, what `data` is made of, if it isn't that itself.

    Raises:
        ValueError: if no checkpoint of --resume_from_checkpoint can be used, or the option is missing though
            --output_dir has checkpoints, or --optimizer or --gradient_checkpointing isn't possible.
    """

    def __init__(
        self,
        options: Options,
        accelerator: Accelerator,
        model: torch.nn.Module,
        data: LabelledImages | StreamedImages,
        source: StreamedImages | None = None,
    ):
        self.options, self.accelerator, self.data, self.source = (
            options,
            accelerator,
            data,
            source or data,
        )
        self.folder, self.progress = Path(options.output_dir), Progress()
        self.passes = accelerator.gradient_accumulation_steps
        images = options.train_batch_size * accelerator.num_processes * self.passes
        self.steps = options.max_train_steps or math.ceil(
            options.num_train_epochs * len(data) / images
        )
        self.waited, self.skipped = (
            0.0,
            [],
        )  # seconds without a batch; rows whose images could not be read
        if options.gradient_checkpointing:
            try:
                model.enable_gradient_checkpointing()
            except ValueError as error:
                raise ValueError(f"--gradient_checkpointing: {error}") from error
        self.identity = identity_of(options, accelerator, model, self._images(), self.steps)
        self.whole = (
            copy.deepcopy(model) if accelerator.distributed_type == DistributedType.FSDP else None
        )
        split_between_processes(options, accelerator, model)
        optimizer = make_optimizer(options, model)
        # Not prepared by Accelerate, which would step it once a process.
        self.schedule = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=self.steps,
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        accelerator.register_for_checkpointing(self.progress, self.schedule)
        self.ema = None
        if options.use_ema:
            self.ema = Average(
                self.bare.parameters(),
                decay=options.ema_max_decay,
                use_ema_warmup=True,
                inv_gamma=options.ema_inv_gamma,
                power=options.ema_power,
                foreach=True,
            )
            accelerator.register_for_checkpointing(self.ema)
        # A checkpoint's names are the network's own, however it is wrapped or compiled. Accelerate hands over what it
        # would save or load itself: nothing, where FSDP or DeepSpeed does.
        accelerator.register_save_state_pre_hook(self._give_names)
        accelerator.register_load_state_pre_hook(self._take_names)
        self._resume(find_checkpoints(options))

    def train(
        self,
        loss: Callable[[torch.nn.Module, Batch, Draws], torch.Tensor],
        evaluate: Callable[[torch.nn.Module, int], dict[str, Any]],
    ) -> torch.nn.Module:
        """Make the steps that are left and return the trained model: its moving average with --use_ema.

        Args:
            loss: (model, batch, draws) -> the mean loss of this process's rows.
            evaluate: (averaged model, step) -> what `held_out_figures` gives; called on every process.

        Raises:
            FloatingPointError: if the loss or the weights become NaN or infinite.
            OSError: if a checkpoint can't be written.
            ValueError: if an image or a label can't be used.
            RuntimeError: if a process that reads images dies.
        """
        self._open_records()
        try:
            self._make_steps(loss, evaluate)
        except BaseException:
            newest = checkpoints(self.folder)[-1:]
            print(
                f"stopped after step {self.progress.step}; --resume_from_checkpoint latest goes on from "
                f"{newest[0] if newest else 'the beginning'}",
                file=sys.stderr,
                flush=True,
            )
            raise
        if self.whole is not None:
            model = self._gathered()
        else:
            model = self.bare.eval()
            if self.ema is not None:
                self.ema.copy_to(model.parameters())
        self._report(evaluate(model, self.progress.step))
        return model

    def _resume(self, newest_first: list[Path]) -> None:
        """Load the newest checkpoint that is whole and of this run, and put aside those that aren't."""
        accelerator, refused = self.accelerator, {}
        for checkpoint in newest_first:
            reason = self._load(checkpoint)
            if reason is None:
                break
            refused[checkpoint] = reason
            accelerator.print(f"{checkpoint} is refused: {reason}")
        else:
            if refused:
                reasons = "; ".join(f"{path}: {reason}" for path, reason in refused.items())
                raise ValueError(
                    f"--resume_from_checkpoint {self.options.resume_from_checkpoint}: {reasons}"
                )
            return
        if accelerator.is_main_process:
            for path in refused:
                os.replace(path, path.with_name(f"{path.name}.refused-{uuid4().hex[:8]}"))
        if self.progress.step > self.steps:
            raise ValueError(
                f"--max_train_steps {self.steps}: {checkpoint} has made {self.progress.step} steps; as "
                "many or more are allowed"
            )
        accelerator.step = (
            self.progress.step * self.passes
        )  # a process that is new has no state to load it from
        accelerator.print(f"goes on from {checkpoint}")

    def _load(self, checkpoint: Path) -> str | None:
        """Load a checkpoint, or say why it can't be used: the same on every process."""
        accelerator, answer = self.accelerator, [None]
        if accelerator.is_main_process:
            answer = [why_refused(checkpoint, self.identity)]
        if (reason := broadcast_object_list(answer)[0]) is not None:
            return reason
        try:
            accelerator.load_state(str(checkpoint))
        except UNLOADABLE as error:
            reason = " ".join(str(error).split("\n\t")[:2])  # of a long list
        return next((each for each in gather_object([reason]) if each is not None), None)

    def _make_steps(
        self,
        loss: Callable[[torch.nn.Module, Batch, Draws], torch.Tensor],
        evaluate: Callable[[torch.nn.Module, int], dict[str, Any]],
    ) -> None:
        """The steps that are left."""
        options, accelerator, progress = self.options, self.accelerator, self.progress
        stream = self._stream()
        loader = DataLoader(
            self.data,
            batch_sampler=stream,
            num_workers=options.dataloader_num_workers,
            collate_fn=collate,
            pin_memory=accelerator.device.type == "cuda",
        )
        bar = tqdm(
            total=self.steps,
            initial=progress.step,
            unit="step",
            mininterval=1.0,
            disable=not (options.progress and accelerator.is_main_process),
        )
        self.model.train()
        begun, batches = time.perf_counter(), iter(loader)
        for number in range(stream.first, stream.last):
            batch = self._next(batches)
            value = self._pass(loss, batch, number)
            if not accelerator.sync_gradients:
                continue
            progress.step += 1
            bar.update()
            save = progress.step % options.checkpointing_steps == 0
            if save or progress.step % 10 == 0 or progress.step == self.steps:
                self._check_and_log(value, bar, weights=save or progress.step == self.steps)
            if save:
                if options.streaming:
                    progress.positions = gather_object([stream.position(number + 1)])
                save_checkpoint(
                    accelerator,
                    self.folder,
                    progress.step,
                    options.checkpoints_total_limit,
                    self.identity,
                )
            due = options.validation_steps and progress.step % options.validation_steps == 0
            if due and progress.step < self.steps:
                with self._averaged() as model:
                    self._report(evaluate(model, progress.step))
        bar.close()
        self._say_how_it_went(time.perf_counter() - begun)

    def _images(self) -> int | str:
        """What is trained on, as far as a run that goes on must find the same: their number, or the stream's kind."""
        options, processes = self.options, self.accelerator.num_processes
        return (
            self.source.kind(options.shuffle_buffer, processes)
            if options.streaming
            else len(self.data)
        )

    def _stream(self) -> Stream | StreamedBatches:
        """The batches of the steps that are left."""
        options, rank, progress = self.options, self.accelerator.process_index, self.progress
        share = (
            options.train_batch_size,
            options.seed,
            rank,
            self.accelerator.num_processes,
            progress.step * self.passes,
            self.steps * self.passes,
        )
        if not options.streaming:
            return Stream(len(self.data), *share)
        return StreamedBatches(
            self.source,
            options.shuffle_buffer,
            *share,
            progress.positions[rank] if progress.positions else None,
        )

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, without what says which images were skipped; how long it took is counted."""
        begun = time.perf_counter()
        try:
            batch = next(batches)
        except (
            ConnectionError
        ) as error:  # it died while it handed a batch over, of which torch says no more
            raise RuntimeError("a DataLoader worker process exited unexpectedly") from error
        self.waited += time.perf_counter() - begun
        if "corrupt" in batch:
            rows = [row for row in batch.pop("corrupt").tolist() if row >= 0]
            for row in sorted(set(rows) - set(self.skipped)):
                print(
                    f"the image of {row_name(row)} can't be read: another takes its place",
                    file=sys.stderr,
                    flush=True,
                )
            self.skipped += rows
            batch.pop("row")
        return batch

    def _say_how_it_went(self, seconds: float) -> None:
        """What this process waited for data, and the images that all processes skipped."""
        if self.waited and self.progress.step:
            self.accelerator.print(
                f"{self.waited / seconds:.1%} of the time of all steps was waiting for data"
            )
        if self.options.skip_corrupt_images and (rows := gather_object(self.skipped)):
            kinds = [row if row < SHARD else row_name(row) for row in sorted(set(rows))]
            self.accelerator.print(
                f"{len(rows)} times another image took the place of one that can't be read, in rows "
                f"{kinds[:20]}{' ...' if len(kinds) > 20 else ''}"
            )

    def _pass(
        self,
        loss: Callable[[torch.nn.Module, Batch, Draws], torch.Tensor],
        batch: Batch,
        number: int,
    ) -> torch.Tensor:
        """A forward and backward pass, and the optimizer's step where it is due."""
        options, accelerator = self.options, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        batch = {
            name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()
        }
        torch.manual_seed(generator_for(options.seed, 1, number, rank).initial_seed())  # dropout
        draws = Draws(
            generator_for(options.seed, 2, number),
            options.train_batch_size,
            rank,
            world,
            accelerator.device,
        )
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
            for half in self.folder.glob("checkpoint-*.partial"):  # of a run that was killed
                shutil.rmtree(half)
            write_json(self.folder / "options.json", settings)
            self._open_trackers({name: str(value) for name, value in settings.items()})
        self.accelerator.wait_for_everyone()

    def _open_trackers(self, settings: dict[str, str]) -> None:
        """They go on with the same run from the checkpoint's step, without what was logged after it."""
        number = self.folder / "tracker_run"
        if not number.exists():
            number.write_text(uuid4().hex)
        own = {
            "tensorboard": {"purge_step": self.progress.step + 1},
            "wandb": {"id": number.read_text(), "resume": "allow"},
        }
        self.accelerator.init_trackers(self.folder.resolve().name, settings, own)

    def _check_and_log(self, value: torch.Tensor, bar: tqdm, weights: bool) -> None:
        mean = self.accelerator.reduce(value, "mean").item()
        advice = "try a smaller --learning_rate, or look at the images and labels"
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss at step {self.progress.step} is {mean}; {advice}")
        if weights and not self._weights_are_finite():
            raise FloatingPointError(
                f"weights at step {self.progress.step} are NaN or infinite; {advice}"
            )
        bar.set_postfix(loss=f"{mean:.4f}")
        self.accelerator.log(
            {"loss": mean, "learning_rate": self.schedule.get_last_lr()[0]}, self.progress.step
        )

    def _weights_are_finite(self) -> bool:
        """The same on every process."""
        parts = [
            part.to_local() if isinstance(part, DTensor) else part
            for part in self.bare.parameters()
        ]
        wrong = torch.stack([~part.isfinite().all() for part in parts]).any().float()
        return self.accelerator.reduce(wrong, "sum").item() == 0

    @contextmanager
    def _averaged(self) -> Iterator[torch.nn.Module]:
        """The network for evaluation, with the averaged weights, which has the trained ones again afterwards."""
        if self.whole is not None:
            yield self._gathered()
            self.whole.to("cpu")
            return
        if self.ema is not None:
            self.ema.exchange(self.bare.parameters())
        self.bare.eval()
        try:
            yield self.bare
        finally:
            self.bare.train()
            if self.ema is not None:
                self.ema.exchange(self.bare.parameters())

    @torch.no_grad()
    def _gathered(self) -> torch.nn.Module:
        """A network of all the averaged weights, of which the trained one has a part in each process."""
        parts = self.bare.parameters() if self.ema is None else self.ema.shadow_params
        self.whole.to(self.accelerator.device)
        for mine, part in zip(self.whole.parameters(), parts, strict=True):
            mine.copy_(whole(part))
        for mine, part in zip(self.whole.buffers(), self.bare.buffers(), strict=True):
            mine.copy_(whole(part))
        return self.whole.eval()

    def _give_names(
        self, models: list[torch.nn.Module], weights: list[dict[str, torch.Tensor]], folder: str
    ) -> None:
        weights[:] = [self.bare.state_dict() for _ in weights]

    def _take_names(self, models: list[torch.nn.Module], folder: str) -> None:
        models[:] = [self.bare for _ in models]

    def _report(self, figures: dict[str, Any]) -> None:
        """Figures at noise levels to metrics.json, the trackers and the screen."""
        if not figures:
            return
        step, rows = self.progress.step, figures["held_out"]
        if self.accelerator.is_main_process:
            write_json(self.folder / "metrics.json", {"step": step, **figures})
        names = [name for name in rows[0] if name != "timestep"]
        self.accelerator.log(
            {f"{name}/t={row['timestep']}": row[name] for row in rows for name in names}, step
        )
        for name in names:
            values = ", ".join(f"t={row['timestep']} {row[name]:.3f}" for row in rows)
            self.accelerator.print(f"step {step}: {name} {values}")


def held_out_figures(
    options: Options,
    accelerator: Accelerator,
    data: LabelledImages | None,
    timesteps: list[int],
    names: tuple[str, ...],
    score: Callable[[Batch, torch.Tensor, torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """Means over the held-out images at each of some noise levels.

    An image gets the same noise in any batch and process. Each process takes its share; all get the same means.

    Args:
        score: (batch, eps, t) -> (len(names), B), what is averaged.

    Returns:
        `{"images": how many, "held_out": [{"timestep": t, name: mean, ...}, ...]}`; empty without held-out images. Also
        `"skipped_images"`, how many could not be read, where --skip_corrupt_images met any.
    """
    if data is None:
        return {}
    count, size, device = (
        min(options.validation_samples, len(data)),
        options.train_batch_size,
        accelerator.device,
    )
    share = [i * len(data) // count for i in range(count)][
        accelerator.process_index :: accelerator.num_processes
    ]
    sums, skipped = (
        torch.zeros(len(timesteps), len(names), device=device),
        torch.zeros((), device=device),
    )
    for start in range(0, len(share), size):
        numbers = share[start : start + size]
        batch = collate([data[i] for i in numbers])
        shape = batch["pixel_values"].shape[1:]
        skipped += (batch["corrupt"] >= 0).sum() if "corrupt" in batch else 0
        batch = {name: value.to(device) for name, value in batch.items()}
        for k, timestep in enumerate(timesteps):
            eps = torch.stack(
                [torch.randn(shape, generator=generator_for(0, 3, i, k)) for i in numbers]
            ).to(device)
            t = torch.full((len(numbers),), timestep, device=device)
            with torch.no_grad():
                sums[k] += score(batch, eps, t).float().sum(dim=1)
    means = (accelerator.reduce(sums, "sum") / count).tolist()
    rows = [
        {
            "timestep": timestep,
            **{name: round(mean, 5) for name, mean in zip(names, row, strict=True)},
        }
        for timestep, row in zip(timesteps, means, strict=True)
    ]
    skipped = int(accelerator.reduce(skipped, "sum")) if options.skip_corrupt_images else 0
    return {"images": count, "held_out": rows} | ({"skipped_images": skipped} if skipped else {})


def finish(accelerator: Accelerator) -> None:
    """Leave together, after the main process has saved; what it does alone afterwards keeps nobody waiting.

    A thread of gloo may need the GIL to let go of the last reduction's tensors. A process that leaves at once destroys
    its process group with the GIL held, and waits for that thread for ever (seen with torch 2.13).
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()


def ten_levels(steps: int) -> list[int]:
    """Ten timesteps: the middles of ten equal parts of a schedule, e.g. 49, 149, ..., 949 of 1000; fewer of fewer."""
    return sorted({int((part + 0.5) * steps / 10 - 1e-6) for part in range(10)})


def make_optimizer(options: Options, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW as --optimizer says.

    Raises:
        ValueError: if it isn't installed.
    """
    settings = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "weight_decay": options.adam_weight_decay,
    }
    if options.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                "--optimizer adamw_8bit needs bitsandbytes (pip install bitsandbytes); adamw and "
                "adamw_fused are allowed without it"
            ) from error
        return AdamW8bit(model.parameters(), **settings)
    return torch.optim.AdamW(
        model.parameters(), **settings, fused=options.optimizer == "adamw_fused" or None
    )


def split_between_processes(
    options: Options, accelerator: Accelerator, model: torch.nn.Module
) -> None:
    """Make FSDP and DeepSpeed (ZeRO 1 or 2) train as several processes without them do, up to rounding.

    With bf16 both would convert the weights and the timesteps, of which few digits would be left; instead the weights
    stay float32, and the forward pass runs under autocast, as elsewhere.

    Raises:
        ValueError: if an option or Accelerate's config is one that a network in parts isn't trained with here.
    """
    kind, state, precision = (
        accelerator.distributed_type,
        accelerator.state,
        accelerator.mixed_precision,
    )
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    fsdp = kind == DistributedType.FSDP
    for name, value, allowed in (
        ("--mixed_precision", precision, ("no", "bf16")),
        ("--optimizer", options.optimizer, ("adamw", "adamw_fused")),
        ("dynamo_backend", state.dynamo_plugin.backend.value.lower(), ("no",)),
        ("fsdp_version", state.fsdp_plugin.fsdp_version if fsdp else 2, (2,)),
        (
            "fsdp_state_dict_type",
            state.fsdp_plugin.state_dict_type.name if fsdp else "FULL_STATE_DICT",
            ("FULL_STATE_DICT",),
        ),
        ("zero_stage", 0 if fsdp else state.deepspeed_plugin.zero_stage, (0, 1, 2)),
    ):
        if value not in allowed:
            raise ValueError(
                f"{name} {value}: with distributed_type {kind.value} one of {allowed} is allowed"
            )
    if fsdp:
        state.fsdp_plugin.mixed_precision_policy = None
        if state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            here = BLOCKS & {type(module).__name__ for module in model.modules()}
            state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(here)
    else:
        config = state.deepspeed_plugin.deepspeed_config
        config.pop("train_batch_size", None)
        config |= {
            "train_micro_batch_size_per_gpu": options.train_batch_size,
            "bf16": {"enabled": False},
            "gradient_accumulation_steps": options.gradient_accumulation_steps,
            "gradient_clipping": options.max_grad_norm,
        }
    if precision == "bf16":
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        model.forward = convert_outputs_to_fp32(autocast(model.forward))
