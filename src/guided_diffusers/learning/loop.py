"""The training loop of all scripts.

Everything random at a step is a function of (seed, step): the batch, its noise, its timesteps,
dropout. So a run that is resumed at step n continues exactly as the uninterrupted one, and N
processes with batch size B/N draw what one process with batch size B draws (except dropout).
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from diffusers.optimization import get_scheduler
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..files import check_writable, write_json
from ..text import one_line, printable
from ..utils import weights_digest
from .batches import Batch, ShuffledBatches, StepRandom, collate, generator_for, limited_wait
from .checkpointing import (
    LOAD_ERRORS,
    find_checkpoints,
    list_checkpoints,
    refusal_reason,
    run_identity,
    save_checkpoint,
)
from .data import SHARD_STRIDE, row_name
from .distributed import (
    end_training,
    exit_on_value_error,
    full_tensor,
    prepare_sharding,
    release_output,
)
from .ema import EMA
from .options import Options, named_errors
from .output_folder import OPTIONS_FILE, check_output_dir, remove
from .prepare import make_optimizer
from .streaming import StreamedBatches, StreamedImages

# Of a checkpoint for each weight, at least: the weight, and the optimizer's two moments in 8 bits.
CHECKPOINT_BYTES = 6
# (model, batch, random numbers) -> mean loss of this process's rows
Loss = Callable[[torch.nn.Module, Batch, StepRandom], torch.Tensor]
# (model to evaluate, step) -> what `held_out_metrics` returns; called on every process
Evaluate = Callable[[torch.nn.Module, int], dict[str, Any]]


@dataclass
class Progress:
    """Optimizer steps made, and with --streaming each process's position; part of checkpoints."""

    step: int = 0
    positions: list[dict[str, int]] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step} | ({"positions": self.positions} if self.positions else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.positions = state["step"], state.get("positions")


class Trainer:
    """Trains a model: its EMA, optimizer, checkpoints and logs.

    Args:
        model: trained in place.
        data: the training images, by the keys of `ShuffledBatches` or `StreamedBatches`.
        source: with --streaming the stream, if `data` wraps it.

    Attributes:
        steps: optimizer steps of the whole run.
        unwrapped: the model without Accelerate's wrappers.
        data_seconds: time spent waiting for batches.

    Raises:
        ValueError: if the run can't be resumed, or an option isn't possible.
    """

    def __init__(
        self,
        options: Options,
        accelerator: Accelerator,
        model: torch.nn.Module,
        data: torch.utils.data.Dataset,
        source: StreamedImages | None = None,
    ):
        self.options, self.accelerator = options, accelerator
        self.data, self.source = data, source or data
        self.folder, self.progress = Path(options.output_dir), Progress()
        self.accumulation = accelerator.gradient_accumulation_steps
        self.data_seconds, self.skipped_rows = 0.0, []
        world, self.steps = accelerator.num_processes, options.max_train_steps
        images = self.source.kind(options.shuffle_buffer, world) if options.streaming else len(data)
        if self.steps is None:
            images_per_step = options.train_batch_size * world * self.accumulation
            self.steps = math.ceil(options.num_train_epochs * images / images_per_step)
        if options.gradient_checkpointing:
            with named_errors("--gradient_checkpointing"):
                model.enable_gradient_checkpointing()
        self.identity = run_identity(options, accelerator, model, images, self.steps)
        # With FSDP: a copy of the model that isn't sharded, for evaluation and saving.
        self.gathered: torch.nn.Module | None = None
        if accelerator.distributed_type == DistributedType.FSDP:
            self.gathered = copy.deepcopy(model)
        if accelerator.is_main_process:
            size = CHECKPOINT_BYTES * sum(weight.numel() for weight in model.parameters())
            with named_errors("--output_dir"):
                check_writable(self.folder, "a checkpoint in", folder=True, size=size)
        checkpoints = []
        if not options.overwrite_output_dir:
            checkpoints = find_checkpoints(options.resume_from_checkpoint, options.output_dir)
        self.to_remove = check_output_dir(options)
        self._prepare(model)
        self._resume(checkpoints)

    def _prepare(self, model: torch.nn.Module) -> None:
        """Model, optimizer, learning rate and EMA, all part of checkpoints."""
        options, accelerator = self.options, self.accelerator
        prepare_sharding(accelerator, model, options)
        optimizer, warmup = make_optimizer(options, model), options.lr_warmup_steps
        # Not prepared by Accelerate, which would step it once per process.
        self.lr_schedule = get_scheduler(
            options.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=self.steps
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.unwrapped = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        accelerator.register_for_checkpointing(self.progress, self.lr_schedule)
        self.ema = None
        if options.use_ema:
            self.ema = EMA(
                self.unwrapped.parameters(),
                decay=options.ema_max_decay,
                use_ema_warmup=True,
                inv_gamma=options.ema_inv_gamma,
                power=options.ema_power,
                foreach=True,
            )
            accelerator.register_for_checkpointing(self.ema)

        # Checkpoints have the unwrapped model's names, however it is wrapped or compiled. The lists
        # of the hooks are empty where FSDP or DeepSpeed saves the model itself.
        def use_unwrapped_weights(models: Any, weights: list[Any], folder: str) -> None:
            weights[:] = [self.unwrapped.state_dict() for _ in weights]

        def use_unwrapped_model(models: list[torch.nn.Module], folder: str) -> None:
            models[:] = [self.unwrapped for _ in models]

        accelerator.register_save_state_pre_hook(use_unwrapped_weights)
        accelerator.register_load_state_pre_hook(use_unwrapped_model)

    def train(self, loss: Loss, evaluate: Evaluate) -> torch.nn.Module:
        """Make the remaining steps and return the trained model, with --use_ema its EMA.

        Raises:
            FloatingPointError: if the loss or the weights become NaN or infinite.
            OSError: if a checkpoint can't be written.
            ValueError: if an image or a label can't be used.
            RuntimeError: if a process that reads images dies.
        """
        self._open_logs()
        try:
            with limited_wait(self.options.timeout_minutes) as self._limited_next:
                self._make_steps(loss, evaluate)
        except BaseException:
            checkpoints = list_checkpoints(self.folder) or ["the beginning"]
            _print_error(
                f"stopped after step {self.progress.step}; --resume_from_checkpoint latest goes on "
                f"from {checkpoints[-1]}"
            )
            release_output()
            raise
        model = self.unwrapped.eval() if self.gathered is None else self._gather()
        if self.gathered is None and self.ema is not None:
            self.ema.copy_to(model.parameters())
        self._report(evaluate(model, self.progress.step), model)
        return model

    # Resuming

    def _resume(self, newest_first: list[Path]) -> None:
        """Load the newest checkpoint that can be used, and rename newer ones that can't."""
        accelerator, refused = self.accelerator, {}
        for checkpoint in newest_first:
            if (reason := self._load(checkpoint)) is None:
                break
            refused[checkpoint] = reason
            accelerator.print(one_line(f"{checkpoint} is refused: {reason}"))
        else:
            if not refused:
                return
            reasons = "; ".join(f"{path}: {reason}" for path, reason in refused.items())
            source = self.options.resume_from_checkpoint
            raise ValueError(f"--resume_from_checkpoint {source}: {reasons}")
        if accelerator.is_main_process:
            for path in refused:
                os.replace(path, path.with_name(f"{path.name}.refused-{uuid4().hex[:8]}"))
        if self.progress.step > self.steps:
            raise ValueError(
                f"--max_train_steps {self.steps}: {checkpoint} has made {self.progress.step} "
                "steps; as many or more are allowed"
            )
        # An additional process has no state to load it from.
        accelerator.step = self.progress.step * self.accumulation
        accelerator.print(printable(f"goes on from {checkpoint}"))

    def _load(self, checkpoint: Path) -> str | None:
        """Load a checkpoint, or return why it can't be used; the same on every process."""
        accelerator, answer = self.accelerator, [None]
        if accelerator.is_main_process:
            answer = [refusal_reason(checkpoint, self.identity)]
        if (reason := broadcast_object_list(answer)[0]) is not None:
            return reason
        try:
            accelerator.load_state(str(checkpoint))
        except LOAD_ERRORS as error:
            reason = " ".join(str(error).split("\n\t")[:2])  # of a long list
        return next((other for other in gather_object([reason]) if other is not None), None)

    # Steps

    def _make_steps(self, loss: Loss, evaluate: Evaluate) -> None:
        options, accelerator, progress = self.options, self.accelerator, self.progress
        sampler = self._make_sampler()
        loader = DataLoader(
            self.data,
            batch_sampler=sampler,
            num_workers=options.dataloader_num_workers,
            collate_fn=collate,
            pin_memory=accelerator.device.type == "cuda",
        )
        hidden = not (options.progress and accelerator.is_main_process)
        settings = {"unit": "step", "mininterval": 1.0, "disable": hidden}
        bar = tqdm(total=self.steps, initial=progress.step, **settings)
        self.model.train()
        start, batches = time.perf_counter(), iter(loader)
        for number in range(sampler.first, sampler.last):
            value = self._pass(loss, self._next_batch(batches), number)
            if not accelerator.sync_gradients:
                continue
            progress.step += 1
            bar.update()
            last = progress.step == self.steps
            save = progress.step % options.checkpointing_steps == 0
            if save or last or progress.step % 10 == 0:
                self._check_and_log(value, bar, check_weights=save or last)
            if save:
                if options.streaming:
                    progress.positions = gather_object([sampler.position(number + 1)])
                limit, step = options.checkpoints_total_limit, progress.step
                save_checkpoint(accelerator, self.folder, step, limit, self.identity)
            due = options.validation_steps and progress.step % options.validation_steps == 0
            if due and not last:
                with self._eval_model() as model:
                    self._report(evaluate(model, progress.step), model)
        bar.close()
        self._print_summary(time.perf_counter() - start)

    def _make_sampler(self) -> ShuffledBatches | StreamedBatches:
        """The batches of the remaining steps."""
        options, rank, progress = self.options, self.accelerator.process_index, self.progress
        first, last = progress.step * self.accumulation, self.steps * self.accumulation
        world = self.accelerator.num_processes
        share = options.train_batch_size, options.seed, rank, world, first, last
        if not options.streaming:
            return ShuffledBatches(len(self.data), *share)
        position = progress.positions[rank] if progress.positions else None
        return StreamedBatches(self.source, options.shuffle_buffer, *share, position)

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; notes the time it takes and the images that were skipped."""
        start = time.perf_counter()
        batch = self._limited_next(batches)
        self.data_seconds += time.perf_counter() - start
        if "corrupt" in batch:
            rows = [row for row in batch.pop("corrupt").tolist() if row >= 0]
            for row in sorted(set(rows) - set(self.skipped_rows)):
                _print_error(f"the image of {row_name(row)} can't be read: another takes its place")
            self.skipped_rows += rows
            batch.pop("row")
        return batch

    def _pass(self, loss: Loss, batch: Batch, number: int) -> torch.Tensor:
        """A forward and backward pass, and the optimizer's step if it is due; returns the loss."""
        options, accelerator = self.options, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        device = accelerator.device
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        torch.manual_seed(generator_for(options.seed, 1, number, rank).initial_seed())  # dropout
        generator = generator_for(options.seed, 2, number)
        draws = StepRandom(generator, options.train_batch_size, rank, world, device)
        with accelerator.accumulate(self.model):
            value = loss(self.model, batch, draws)
            accelerator.backward(value)
            if accelerator.sync_gradients and options.max_grad_norm:
                accelerator.clip_grad_norm_(self.model.parameters(), options.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            if not accelerator.optimizer_step_was_skipped:  # by fp16's loss scaler
                self.lr_schedule.step()
            if self.ema is not None:
                self.ema.step(self.unwrapped.parameters())
        return value.detach()

    # The model to evaluate

    @contextmanager
    def _eval_model(self) -> Iterator[torch.nn.Module]:
        """The model with its EMA's weights; on exit it has the trained weights again."""
        if self.gathered is not None:
            yield self._gather()
            self.gathered.to("cpu")
            return
        if self.ema is not None:
            self.ema.swap(self.unwrapped.parameters())
        self.unwrapped.eval()
        try:
            yield self.unwrapped
        finally:
            self.unwrapped.train()
            if self.ema is not None:
                self.ema.swap(self.unwrapped.parameters())

    @torch.no_grad()
    def _gather(self) -> torch.nn.Module:
        """The unsharded copy of the model, with the EMA's weights."""
        sharded = self.unwrapped.parameters() if self.ema is None else self.ema.shadow_params
        self.gathered.to(self.accelerator.device)
        targets = chain(self.gathered.parameters(), self.gathered.buffers())
        for target, shard in zip(targets, chain(sharded, self.unwrapped.buffers()), strict=True):
            target.copy_(full_tensor(shard))
        return self.gathered.eval()

    # Logs

    def _open_logs(self) -> None:
        """Write options.json; open the trackers, without what was logged after the checkpoint.

        With --overwrite_output_dir, what an earlier training wrote is removed first.
        """
        self.accelerator.wait_for_everyone()  # all processes have seen what is to be removed
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.to_remove:
                names = [str(path.relative_to(self.folder)) for path in self.to_remove]
                print(f"--overwrite_output_dir removes from {self.folder}: {', '.join(names)}")
                remove(self.to_remove, self.folder)
            for partial in self.folder.glob("checkpoint-*.partial"):  # of a killed run
                shutil.rmtree(partial)
            settings, run_id = asdict(self.options), self.folder / "tracker_run"
            write_json(settings, self.folder / OPTIONS_FILE)
            if not run_id.exists():
                run_id.write_text(uuid4().hex)
            trackers = {
                "tensorboard": {"purge_step": self.progress.step + 1},
                "wandb": {"id": run_id.read_text(), "resume": "allow"},
                "trackio": {"name": run_id.read_text(), "resume": "allow"},
            }
            config = {name: str(value) for name, value in settings.items()}
            self.accelerator.init_trackers(self.folder.resolve().name, config, trackers)
        self.accelerator.wait_for_everyone()

    def _check_and_log(self, value: torch.Tensor, bar: tqdm, check_weights: bool) -> None:
        mean, step = self.accelerator.reduce(value, "mean").item(), self.progress.step
        advice = "try a smaller --learning_rate, or look at the images and labels"
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss at step {step} is {mean}; {advice}")
        if check_weights:
            shards = []
            for weight in self.unwrapped.parameters():
                shards.append(weight.to_local() if isinstance(weight, DTensor) else weight)
            invalid = torch.stack([~shard.isfinite().all() for shard in shards]).any().float()
            if self.accelerator.reduce(invalid, "sum").item():
                raise FloatingPointError(f"weights at step {step} are NaN or infinite; {advice}")
        bar.set_postfix(loss=f"{mean:.4f}")
        rate = self.lr_schedule.get_last_lr()[0]
        self.accelerator.log({"loss": mean, "learning_rate": rate}, step)

    def _report(self, metrics: dict[str, Any], model: torch.nn.Module) -> None:
        """Write metrics of the model to metrics.json and the trackers, and print them."""
        if not metrics:
            return
        step, rows = self.progress.step, metrics["held_out"]
        if self.accelerator.is_main_process:
            content = {"step": step, "weights": weights_digest(model), **metrics}
            write_json(content, self.folder / "metrics.json")
        names = [name for name in rows[0] if name != "timestep"]
        values = {f"{name}/t={row['timestep']}": row[name] for row in rows for name in names}
        self.accelerator.log(values, step)
        for name in names:
            line = ", ".join(f"t={row['timestep']} {row[name]:.3f}" for row in rows)
            self.accelerator.print(f"step {step}: {name} {line}")

    def _print_summary(self, seconds: float) -> None:
        """Print the share of time spent waiting for data, and the images that were skipped."""
        if self.data_seconds and self.progress.step:
            share = self.data_seconds / seconds
            self.accelerator.print(f"{share:.1%} of the time of all steps was waiting for data")
        if self.options.skip_corrupt_images and (rows := gather_object(self.skipped_rows)):
            unique = sorted(set(rows))
            names = [row if row < SHARD_STRIDE else row_name(row) for row in unique[:20]]
            self.accelerator.print(
                f"{len(rows)} times another image took the place of one that can't be read, in "
                f"rows {names}{' ...' if len(unique) > 20 else ''}"
            )


def _print_error(message: str) -> None:
    print(one_line(message), file=sys.stderr, flush=True)


def save_and_publish(
    options: Options, accelerator: Accelerator, model: Any, next_steps: Sequence[str]
) -> None:
    """Save a model or pipeline in --output_dir, end the training, and publish with --push_to_hub.

    The repository gets the metrics and options in --output_dir, too. Called on every process.
    `next_steps` are commands to print.
    """
    folder = Path(options.output_dir)
    if accelerator.is_main_process:
        model.save_pretrained(folder)
    lines = "".join(f"\n    {printable(command)}" for command in next_steps)
    accelerator.print(printable(f"saved to {folder}; next:") + lines)
    end_training(accelerator)
    if accelerator.is_main_process and options.push_to_hub:
        name, private = options.repository, options.hub_private or None
        with exit_on_value_error():
            try:
                commit = model.push_to_hub(name, private=private, figures=folder)
            except OSError as error:
                raise ValueError(f"{folder} is saved, but not published: {error}") from error
        print(printable(f"published: {commit.commit_url}"))
    release_output()
