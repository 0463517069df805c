"""Exponential moving average (EMA) of the weights, also of a sharded model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor

from .distributed import full_tensor


class EMA(EMAModel):
    """`EMAModel` whose step makes no copy of the weights: shadow += (1 - decay) (weights - shadow).

    With FSDP each process averages its shard. The state dict holds complete tensors.
    """

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)

    @torch.no_grad()
    def swap(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Exchange the trained weights and their average; a second call restores both."""
        for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
            trained = parameter.clone()
            parameter.copy_(shadow)
            shadow.copy_(trained)

    def state_dict(self) -> dict[str, Any]:
        shadows = [full_tensor(shadow) for shadow in self.shadow_params]
        return super().state_dict() | {"shadow_params": shadows}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        shadows = self.shadow_params
        super().load_state_dict(state)
        for shadow, loaded in zip(shadows, self.shadow_params, strict=True):
            if isinstance(shadow, DTensor):
                mesh, loaded = shadow.device_mesh, loaded.to(shadow.device)
                loaded = distribute_tensor(loaded, mesh, shadow.placements, src_data_rank=None)
            shadow.copy_(loaded)
        self.shadow_params = shadows
