"""What is peculiar to single schedulers of Diffusers; `noise` knows the others, which are `ORDINARY`.

The questions `named`, `is_flow` and `steps_otherwise` have one answer for all that are ordinary, no. `source` relies on
it: the file of a pipeline has the branches that such a question leads its own scheduler into, and refuses others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import torch
from diffusers import SchedulerMixin

#: their config says what the network predicts, and a step takes the sample that `add_noise` makes at its timestep
ORDINARY = {
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
}
FLOW = {
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "FlowMapEulerDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
}
EDM = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"}
FIXED = {
    "IPNDMScheduler": "v_prediction",
    "SCMScheduler": "trigflow",
    "CMStochasticIterativeScheduler": "consistency",
    "DDPMWuerstchenScheduler": "epsilon",
}
MID_SIGMA = {"KDPM2DiscreteScheduler": 0, "KDPM2AncestralDiscreteScheduler": 1}
TERMINAL_TIMESTEP = {"DDPMWuerstchenScheduler", "SCMScheduler"}
_DISCRETE = "it is for discrete tokens, which have no score"
_OWN_LOOP = "it needs a loop of its own, with corrector steps"
OUT_OF_REACH = {
    "DDIMInverseScheduler": "its sample is one step behind its timestep",
    "DPMSolverMultistepInverseScheduler": "it adds noise, so there is no x0 to guide",
    "ConsistencyDecoderScheduler": "it is part of a decoder, not a sampler of images",
    "HeliosScheduler": "its stages change the sample's size between steps",
    "HeliosDMDScheduler": "its stages change the sample's size between steps",
    "PiflowScheduler": "its network gives a policy for several steps, not a prediction",
    "ScoreSdeVeScheduler": _OWN_LOOP,
    "KarrasVeScheduler": _OWN_LOOP,
    "RePaintScheduler": "it needs a mask and an image in every step",
    "RFD4ProteinaScheduler": "its samples are protein structures",
    "MiniMaxH3Scheduler": "it runs two modalities with a schedule each",
    "VQDiffusionScheduler": _DISCRETE,
    "AmusedScheduler": _DISCRETE,
    "DiscreteDDIMScheduler": _DISCRETE,
    "BlockRefinementScheduler": _DISCRETE,
    "EntropyBoundScheduler": _DISCRETE,
}


def named(scheduler: SchedulerMixin, names: Any) -> str | None:
    """The name of the scheduler's class, or of the class it extends, that is in `names`."""
    return next((cls.__name__ for cls in type(scheduler).__mro__ if cls.__name__ in names), None)


def is_ordinary(scheduler: SchedulerMixin) -> bool:
    """Whether nothing here is needed for the scheduler."""
    return bool(named(scheduler, ORDINARY)) and not scheduler.config.get("use_flow_sigmas")


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether its samples are alpha = 1 - sigma."""
    return bool(named(scheduler, FLOW) or scheduler.config.get("use_flow_sigmas"))


def steps_otherwise(scheduler: SchedulerMixin) -> bool:
    """Whether its step takes something else than (output, timestep, sample, eta, generator)."""
    takes = inspect.signature(scheduler.step).parameters.keys()
    return bool(
        named(scheduler, {"DPMSolverSDEScheduler", "DDPMWuerstchenScheduler"})
        or takes & {"old_pred_original_sample", "prev_timestep"}
    )


def check_reach(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that guidance can't work with.

    Raises:
        ValueError: for one; the message says why.
    """
    if name := named(scheduler, OUT_OF_REACH):
        raise ValueError(f"scheduler {name} can't be guided: {OUT_OF_REACH[name]}")
    tells = is_flow(scheduler) or named(scheduler, {"IPNDMScheduler", "SCMScheduler"})
    if not tells and not callable(getattr(scheduler, "add_noise", None)):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} has no add_noise, so its noise level can't be read"
        )


def rare_affine(
    prediction: str,
    alpha: float,
    sigma: float,
    sigma_data: float,
    sigma_min: float,
) -> tuple[float, float]:
    """(a, b) of `x0_pred = a * sample + b * output` of networks that ordinary schedulers don't know.

    Args:
        prediction: score | edm_epsilon, edm_v_prediction (Karras et al. 2022, Table 1) | consistency (Song et al. 2023,
            eq. 5, as Diffusers has it) | trigflow (Lu & Song 2024, eq. 3).
        sigma_data, sigma_min: the constants of the last four.
    """
    edm = sqrt(sigma**2 + sigma_data**2)
    match prediction:
        case "score":
            return 1 / alpha, sigma**2 / alpha
        case "edm_epsilon":
            return sigma_data**2 / edm**2, sigma * sigma_data / edm
        case "edm_v_prediction":
            return sigma_data**2 / edm**2, -sigma * sigma_data / edm
        case "consistency":
            return sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2), (
                sigma - sigma_min
            ) * sigma_data / edm
        case "trigflow":
            return alpha, -sigma / sigma_data
    raise ValueError(
        f"prediction {prediction!r} is not one of epsilon, sample, v_prediction, flow, data_flow, score, "
        "edm_epsilon, edm_v_prediction, consistency, trigflow"
    )


def own_stepper(
    scheduler: SchedulerMixin,
    schedule: torch.Tensor,
    options: Mapping[str, Any],
    generator: torch.Generator | list[torch.Generator] | None,
    batch_size: int,
) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]:
    """(output, index, sample) -> the next sample."""
    takes = inspect.signature(scheduler.step).parameters
    if named(scheduler, {"DPMSolverSDEScheduler"}):  # draws for itself, from a seed
        each = (
            generator
            if isinstance(generator, list)
            else [generator]
            if generator is not None
            else []
        )
        seeds = [torch.randint(2**62, (), generator=one, device=one.device).item() for one in each]
        own = scheduler.config.noise_sampler_seed
        scheduler.noise_sampler_seed = (
            seeds if isinstance(generator, list) else seeds[0] if seeds else own
        )
    wants_batched_timestep = named(scheduler, {"DDPMWuerstchenScheduler"})
    previous_x0 = None

    def step(output: torch.Tensor, index: int, sample: torch.Tensor) -> torch.Tensor:
        nonlocal previous_x0
        t, next_t = schedule[index], schedule[index + 1] if index + 1 < len(schedule) else None
        if (
            "old_pred_original_sample" in takes
        ):  # CogVideoX's DPM solver leaves its memory to the caller
            back = schedule[index - 1] if index else None
            sample, previous_x0 = scheduler.step(
                output, previous_x0, t, back, sample, **options, return_dict=False
            )
            return sample
        more = {"prev_timestep": next_t} if "prev_timestep" in takes else {}
        t = t.expand(batch_size) if wants_batched_timestep else t
        return scheduler.step(output, t, sample, **options, **more, return_dict=False)[0]

    return step
