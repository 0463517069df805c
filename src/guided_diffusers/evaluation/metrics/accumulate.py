"""What is added up over images, and the sums of several processes brought together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from safetensors.torch import load, save

BLOCK = 2**21  # numbers of a block of distances: 16 MiB in float64


class Accumulator:
    """Sums over images. The tensors among its attributes are its state; `merge` adds another one of the same kind."""

    def state(self) -> dict[str, torch.Tensor]:
        """All that was added up."""
        return {
            name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go back to a state of an accumulator of the same settings.

        Raises:
            ValueError: for the state of another kind.
        """
        if state.keys() != self.state().keys():
            raise ValueError(
                f"state: {sorted(state)} is none of {type(self).__name__}, which has "
                f"{sorted(self.state())}"
            )
        vars(self).update(state)

    def merge(self, other: Any) -> None:
        """Add what `other` added up."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.state().values())


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows, so that a matrix of them has at most `BLOCK` numbers."""
    step = max(1, BLOCK // max(columns, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def gather(parts: Sequence[Accumulator]) -> None:
    """Merge each accumulator with those of all processes, in their order; all have the same sums then.

    One process after the other sends its state, so that none holds more than two. With one process nothing happens.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    mine = [part.state() for part in parts]
    for process in range(state.num_processes):
        sent = _broadcast(
            {
                f"{i}.{name}": value.contiguous()
                for i, one in enumerate(mine)
                for name, value in one.items()
            },
            process,
        )
        for i, part in enumerate(parts):
            given = {
                name.partition(".")[2]: value
                for name, value in sent.items()
                if name.partition(".")[0] == str(i)
            }
            if process == 0:
                part.restore(given)
            else:
                other = copy(part)
                other.restore(given)
                part.merge(other)


def _broadcast(tensors: dict[str, torch.Tensor], process: int) -> dict[str, torch.Tensor]:
    """Those of one process, on all, as the bytes of a safetensors file."""
    state = PartialState()
    content = torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8).to(state.device)
    size = broadcast(torch.tensor([len(content)], device=state.device), process)
    content = content if state.process_index == process else content.new_zeros(int(size))
    return load(bytes(broadcast(content, process).cpu().numpy()))
