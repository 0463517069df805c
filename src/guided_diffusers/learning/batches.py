"""Batches and random numbers as functions of (seed, step), so that a resumed run repeats them."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from torch.utils.data import Sampler

# pixel_values (B, C, H, W) in [-1, 1], label (B,), and the items' other entries
Batch = dict[str, torch.Tensor]


def generator_for(*numbers: int) -> torch.Generator:
    """A CPU generator with a stream of its own for a tuple of small numbers, e.g. (seed, step)."""
    state = 0
    for number in numbers:
        state = (state * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(state)


def item_seed(seed: int, position: int) -> int:
    """Seed of the augmentation of the item at a position in the training data's order."""
    return seed * 1_000_003 + position


class ShuffledBatches(Sampler[list[tuple[int, int]]]):
    """Batches of `(index, seed)`: epochs of permutations, cut into batches over all processes.

    Position p of the training data's order is item `permutation(seed, p // n)[p % n]`. Batch k
    starts at position k * B * world; process `rank` takes the `rank`-th B positions of it.

    Args:
        length: n, the number of images.
        batch_size, rank: B and number of this process; `world`: number of all processes.
        first, last: the batches first <= k < last; any first costs the same.
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
                    generator = generator_for(self.seed, 0, epoch)
                    order = torch.randperm(self.length, generator=generator)
                index = int(order[position % self.length])
                items.append((index, item_seed(self.seed, position)))
            yield items


@dataclass
class StepRandom:
    """Random numbers of a batch of B images in each of `world` processes: this process's rows.

    `generator` is of the whole batch, in the same state in all processes.
    """

    generator: torch.Generator
    batch_size: int
    rank: int
    world: int
    device: torch.device

    @property
    def total(self) -> int:
        return self.batch_size * self.world

    def local(self, values: torch.Tensor) -> torch.Tensor:
        """This process's rows of values (B * world, ...), on the device."""
        start = self.rank * self.batch_size
        return values[start : start + self.batch_size].to(self.device)

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, (B, *shape)."""
        return self.local(torch.randn(self.total, *shape, generator=self.generator))

    def rand(self, *shape: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), (B, *shape)."""
        return self.local(torch.rand(self.total, *shape, generator=self.generator))

    def randint(self, high: int) -> torch.Tensor:
        """Integers from 0 to high - 1, (B,)."""
        return self.local(torch.randint(high, (self.total,), generator=self.generator))


@contextmanager
def limited_wait(timeout_minutes: float) -> Iterator[Callable[[Iterator[Batch]], Batch]]:
    """Context with a function that returns a DataLoader's next batch, within a time limit.

    The function raises RuntimeError if a worker process dies, or sends no batch within that time;
    it names the worker. The loader's own `timeout` doesn't hold while it asks a worker for the
    memory of a batch (torch 2.13), so a thread watches it.
    """
    seconds, since, late, end = 60 * timeout_minutes, [math.inf], [], Event()

    def watch() -> None:
        import psutil  # comes with Accelerate

        while not end.wait(min(1.0, seconds / 4)):
            if late or time.monotonic() - since[0] <= seconds:
                continue
            workers = [psutil.Process(worker.pid) for worker in multiprocessing.active_children()]
            stopped = [worker for worker in workers if worker.status() == psutil.STATUS_STOPPED]
            late.extend(f"{worker.pid} ({worker.status()})" for worker in stopped or workers)
            for worker in stopped or workers:  # or neither the loader nor this process would end
                worker.resume() if stopped else worker.kill()

    def next_batch(batches: Iterator[Batch]) -> Batch:
        reason, since[0] = None, time.monotonic()
        try:
            batch = next(batches)
        except (ConnectionError, EOFError, RuntimeError) as error:
            if not late and not isinstance(error, ConnectionError):
                raise
            reason = error  # otherwise torch's only message if a worker dies sending a batch
        since[0] = math.inf
        if late:
            raise RuntimeError(
                f"no batch within {timeout_minutes:g} minutes from the DataLoader's worker process "
                f"{', '.join(late)}; --timeout_minutes sets the limit"
            ) from reason
        if reason is not None:
            raise RuntimeError("a DataLoader worker process exited unexpectedly") from reason
        return batch

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield next_batch
    finally:
        end.set()
        thread.join()


def collate(items: list[dict[str, Any]]) -> Batch:
    """Stack the items' tensors and numbers by name."""
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}
