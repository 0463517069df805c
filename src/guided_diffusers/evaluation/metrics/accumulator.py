"""Sums over images, and merging them across processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

BLOCK = 2**21  # numbers in a block of distances: 16 MiB in float64


class Accumulator:
    """Sums over images: the tensors named in `sums`."""

    sums: tuple[str, ...]

    def state(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in self.sums}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace the sums by those of an accumulator with the same settings.

        Raises:
            ValueError: for the state of another class.
        """
        if state.keys() != set(self.sums):
            raise ValueError(
                f"state: {sorted(state)} is none of {type(self).__name__}; {self.sums} is needed"
            )
        vars(self).update(state)

    def merge(self, other: Any) -> None:
        """Add the sums of `other`, an accumulator of the same class."""
        for name, value in self.state().items():
            value += getattr(other, name)


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a matrix with at most `BLOCK` numbers each."""
    step = max(1, BLOCK // max(columns, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def gather(accumulators: Sequence[Accumulator]) -> None:
    """Merge each accumulator with those of all processes, in the order of their ranks.

    Afterwards all processes hold the same sums. The processes broadcast their states one after the
    other, so none holds more than two.
    """
    num_processes = PartialState().num_processes
    if num_processes == 1:
        return
    local = [accumulator.state() for accumulator in accumulators]
    for process in range(num_processes):
        states = broadcast_object_list([local], from_process=process)[0]
        for accumulator, state in zip(accumulators, states, strict=True):
            if process == 0:
                accumulator.restore(state)
            else:
                other = copy(accumulator)
                other.restore(state)
                accumulator.merge(other)
