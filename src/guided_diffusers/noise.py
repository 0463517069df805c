"""Noise level of every step of any scheduler, and the predicted x0 of any network output.

    sample  = alpha * x0 + sigma * eps     in the scheduler's own space (variance preserving, flow, ...)
    x0_pred = a * sample + b * output      one table of (a, b) for everything that networks predict

Terms of guidance use these two lines only. What depends on the scheduler's class is in this module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import hypot, sqrt
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin

from .checks import check_number, shown

# ---------------------------------------------------------------- Diffusers' schedulers by class name

#: samples are (1 - sigma) x0 + sigma eps (also every scheduler with use_flow_sigmas)
FLOW = {
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "FlowMapEulerDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
}
#: preconditioned as in Karras et al. 2022
EDM = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"}
#: what the network predicts is fixed by the class, not by the config
FIXED_PREDICTION = {
    "IPNDMScheduler": "v_prediction",
    "SCMScheduler": "trigflow",
    "CMStochasticIterativeScheduler": "consistency",
    "DDPMWuerstchenScheduler": "epsilon",
}
#: the only values of `prediction_type` that other schedulers of Diffusers know
CONFIG_PREDICTIONS = ("epsilon", "sample", "v_prediction")
#: these don't know "sample"
WITHOUT_SAMPLE = {
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "PNDMScheduler",
}
#: every second step starts at a mid-point, whose sigma is `sigmas_interpol[index - offset]`
MIDPOINT_OFFSET = {"KDPM2DiscreteScheduler": 0, "KDPM2AncestralDiscreteScheduler": 1}
#: the last of `timesteps` is the end of the run, not a step
TERMINAL_TIMESTEP = {"DDPMWuerstchenScheduler", "SCMScheduler"}
DDPM = {"DDPMScheduler", "DDPMParallelScheduler"}
_DISCRETE = "it is for discrete tokens, which have no score"
_OWN_LOOP = "it needs a loop of its own, with corrector steps"
#: schedulers that can't be guided, and why
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
#: alpha = 0 (zero terminal SNR, the first step of flow matching) becomes what Diffusers'
#: sigma-based schedulers use
SMALLEST_ALPHA = 2.0**-24


def is_instance_by_name(scheduler: SchedulerMixin, names: Collection[str]) -> str | None:
    """Name of the scheduler's class, or of a class that it extends, that is in `names`; None if
    there is none."""
    return next((cls.__name__ for cls in type(scheduler).__mro__ if cls.__name__ in names), None)


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler's samples have alpha = 1 - sigma."""
    if is_instance_by_name(scheduler, FLOW) or not scheduler.config.get("use_flow_sigmas"):
        return is_instance_by_name(scheduler, FLOW) is not None
    # `from_config` keeps the entry for classes that don't know it, too
    classes = type(scheduler).__mro__
    return any("use_flow_sigmas" in inspect.signature(cls.__init__).parameters for cls in classes)


def check_scheduler(scheduler: Any) -> None:
    """Raise ValueError unless it is a scheduler, Diffusers' or one with the same methods."""
    is_object = not isinstance(scheduler, type)
    is_scheduler = isinstance(scheduler, SchedulerMixin) or hasattr(scheduler, "set_timesteps")
    if not (is_object and is_scheduler):
        raise ValueError(f"scheduler={shown(scheduler)}: a scheduler of Diffusers is allowed")


def check_supported(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that can't be guided.

    Raises:
        ValueError: saying why.
    """
    check_scheduler(scheduler)
    if name := is_instance_by_name(scheduler, OUT_OF_REACH):
        raise ValueError(f"scheduler {name} can't be guided: {OUT_OF_REACH[name]}")
    readable = is_flow(scheduler) or is_instance_by_name(
        scheduler, {"IPNDMScheduler", "SCMScheduler"}
    )
    if not readable and not callable(getattr(scheduler, "add_noise", None)):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} has no add_noise, so its noise level can't be "
            "read"
        )


# ---------------------------------------------------------------- noise levels and predictions


@dataclass(frozen=True)
class NoiseLevel:
    """One step's `sample = alpha * x0 + sigma * eps` and `x0_pred = a * sample + b * output`, as
    floats."""

    alpha: float
    sigma: float
    a: float
    b: float

    def x0(self, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Predicted x0 of a network's output, in the sample's dtype (a small difference at high
        noise)."""
        return self.a * sample + self.b * output.to(sample.dtype)

    def output(self, sample: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """Network output that predicts `x0`."""
        return (x0 - self.a * sample) / self.b

    def clipped(self, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Network output whose predicted x0 is that of `output`, clipped to [-1, 1]."""
        if not self.b:
            return output
        sample = sample.to(torch.promote_types(sample.dtype, torch.float32))
        return self.output(sample, self.x0(sample, output).clamp(-1, 1)).to(output.dtype)

    def score(self, sample: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """Score grad log p(sample) that predicts `x0`: (alpha x0 - sample) / sigma^2 (Tweedie's
        formula)."""
        return (self.alpha * x0 - sample) / self.sigma**2

    def score_shift(self, x0_shift: torch.Tensor) -> torch.Tensor:
        """Change of the score when the predicted x0 changes by `x0_shift`: alpha / sigma^2
        x0_shift."""
        return self.alpha / self.sigma**2 * x0_shift

    def corrected(self, output: torch.Tensor, score_shift: torch.Tensor) -> torch.Tensor:
        """Network output whose score is larger by `score_shift`: `output + (sigma^2 / alpha) / b *
        score_shift`.

        By Tweedie's formula a score shift g moves the predicted x0 by sigma^2 / alpha * g. For a
        network that predicts epsilon this is `output - sigma * g`, Algorithm 2 of Dhariwal & Nichol
        2021.
        """
        if (
            self.sigma == 0 or self.b == 0
        ):  # no noise, or a consistency model's boundary: x0 is the sample
            return output
        return output + (self.sigma**2 / self.alpha / self.b * score_shift).to(output.dtype)


def x0_coefficients(
    prediction: str,
    alpha: float,
    sigma: float,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
) -> tuple[float, float]:
    """(a, b) of `x0_pred = a * sample + b * output`: the one table of what networks predict.

    Args:
        prediction: epsilon | sample | v_prediction (of the variance-preserving input, Salimans & Ho
            2022) | flow (noise - data) | data_flow (data - noise) | score | edm_epsilon,
            edm_v_prediction (Karras et al. 2022, Table 1) | consistency (Song et al. 2023, eq. 5,
            as in Diffusers) | trigflow (Lu & Song 2024, eq. 3).
        sigma_data, sigma_min: constants of the last four.

    Raises:
        ValueError: for another prediction.
    """
    edm = sqrt(sigma**2 + sigma_data**2)
    match prediction:
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "sample":
            return 0.0, 1.0
        case "v_prediction":
            return alpha / (alpha**2 + sigma**2), -sigma / hypot(alpha, sigma)
        case "flow":
            return 1.0, -sigma
        case "data_flow":
            return 1.0, sigma
        case "score":
            return 1 / alpha, sigma**2 / alpha
        case "edm_epsilon":
            return sigma_data**2 / edm**2, sigma * sigma_data / edm
        case "edm_v_prediction":
            return sigma_data**2 / edm**2, -sigma * sigma_data / edm
        case "consistency":
            above = sigma - sigma_min
            return sigma_data**2 / (above**2 + sigma_data**2), above * sigma_data / edm
        case "trigflow":
            return alpha, -sigma / sigma_data
    raise ValueError(
        f"prediction {prediction!r} is not one of epsilon, sample, v_prediction, flow, data_flow, "
        "score, edm_epsilon, edm_v_prediction, consistency, trigflow"
    )


def prediction_type(scheduler: SchedulerMixin) -> str:
    """What the scheduler takes the network's output for, as a name of `x0_coefficients`.

    Raises:
        ValueError: for a scheduler that can't be guided; the message says why.
    """
    check_supported(scheduler)
    prediction = scheduler.config.get("prediction_type")
    _check_prediction(scheduler, prediction)
    if name := is_instance_by_name(scheduler, FIXED_PREDICTION):
        prediction = FIXED_PREDICTION[name]
    if is_instance_by_name(scheduler, EDM):
        prediction = f"edm_{prediction}"
    if is_instance_by_name(scheduler, FLOW):
        prediction = "data_flow" if scheduler.config.get("invert_sigmas") else "flow"
    if is_flow(scheduler) and prediction == "v_prediction":
        raise ValueError(
            "scheduler: prediction_type='v_prediction' has no meaning with use_flow_sigmas=True; "
            "use 'flow_prediction', 'epsilon' or 'sample'"
        )
    if is_flow(scheduler) and prediction == "flow_prediction":
        prediction = "flow"
    try:
        x0_coefficients(str(prediction), 1.0, 1.0)
    except ValueError as error:
        raise ValueError(f"scheduler {type(scheduler).__name__}: {error}") from None
    return prediction


def _check_prediction(scheduler: SchedulerMixin, prediction: Any) -> None:
    """Refuse what Diffusers refuses only in `step`."""
    kind = type(scheduler)
    has_own = is_flow(scheduler) or is_instance_by_name(scheduler, {*FIXED_PREDICTION, *EDM})
    if has_own or not kind.__module__.startswith("diffusers."):
        return
    allowed = [*CONFIG_PREDICTIONS]
    if is_instance_by_name(scheduler, WITHOUT_SAMPLE):
        allowed.remove("sample")
    if prediction not in allowed:
        raise ValueError(
            f"scheduler: prediction_type={shown(prediction)} in the config of {kind.__name__}: "
            f"{', '.join(allowed)} are allowed"
        )


def sampling_timesteps(scheduler: SchedulerMixin) -> torch.Tensor:
    """Timesteps at which the network is evaluated, after `scheduler.set_timesteps`."""
    if is_instance_by_name(scheduler, TERMINAL_TIMESTEP):
        return scheduler.timesteps[:-1]
    return scheduler.timesteps


def noise_levels(scheduler: SchedulerMixin) -> list[NoiseLevel]:
    """Noise level of each of `sampling_timesteps`, read once after `set_timesteps` so that no step
    waits for it.

    Leaves the scheduler at its first step (`set_begin_index(0)`; without it, Diffusers' schedulers
    start at the second of two equal first timesteps).

    Raises:
        ValueError: for a scheduler that can't be guided, a noise schedule that is none, or
            timesteps that have no noise level.
    """
    prediction = prediction_type(scheduler)
    _check_table(scheduler)
    constants = {
        name: scheduler.config[name]
        for name in ("sigma_data", "sigma_min")
        if name in scheduler.config
    }
    levels = []
    for index, t in enumerate(sampling_timesteps(scheduler).cpu()):
        alpha, sigma = _alpha_sigma(scheduler, index, t)
        # fails for NaN and for a flow's sigma above 1; SCM starts at alpha = -4e-6
        if not (alpha > -1e-4 and sigma >= 0):
            raise ValueError(
                f"timesteps, sigmas: at timestep {t:g} {type(scheduler).__name__} has no noise "
                f"level (alpha={alpha:.4g}, sigma={sigma:.4g})"
            )
        alpha = max(alpha, SMALLEST_ALPHA)
        levels.append(
            NoiseLevel(alpha, sigma, *x0_coefficients(prediction, alpha, sigma, **constants))
        )
    set_begin_index(scheduler, 0)
    return levels


def set_begin_index(scheduler: SchedulerMixin, index: int) -> None:
    """Set the step that the scheduler starts with, where it keeps one."""
    if callable(getattr(scheduler, "set_begin_index", None)):
        scheduler.set_begin_index(index)


def first_step(scheduler: SchedulerMixin, count: int, strength: float) -> int:
    """Index of the first of a run's `count` evaluations of which the last fraction `strength` is
    made, rounded down to whole steps as in Diffusers' img2img; `count` for a strength of 0.

    Raises:
        ValueError: for a strength above 0 that is less than a step.
    """
    order = getattr(scheduler, "order", 1)
    steps = -(-count // order)
    made = int(steps * strength + 1e-9)
    if strength > 0 and made == 0:
        raise ValueError(
            f"strength={strength}: less than one of the run's {steps} steps; 0, or from "
            f"{1 / steps:.3g} to 1, is allowed"
        )
    return count if made == 0 else (steps - made) * order


def begin_midway(scheduler: SchedulerMixin, first: int) -> int:
    """Prepare the scheduler to start with step `first` of its schedule.

    Returns:
        The step's index in `sampling_timesteps`, of which two schedulers need a shorter list: they
        take their first steps, which have no history, by their number.

    Raises:
        ValueError: for PNDM with Runge-Kutta steps, which are its first ones.
    """
    if first and is_instance_by_name(scheduler, {"LMSDiscreteScheduler"}):
        scheduler.timesteps = scheduler.timesteps[first:]
        scheduler.sigmas = scheduler.sigmas[first:]
        first = 0
    if first and is_instance_by_name(scheduler, {"PNDMScheduler"}):
        if not scheduler.config.skip_prk_steps:
            raise ValueError(
                "strength: PNDMScheduler with skip_prk_steps=False can't start midway; use "
                "skip_prk_steps=True, or another scheduler"
            )
        rest = scheduler.timesteps[
            max(first, 2) :
        ]  # after t0, t1, t1, which its first two steps need
        scheduler.timesteps = torch.cat([rest[:2], rest[1:]])
        first = 0
    set_begin_index(scheduler, first)
    return first


def _alpha_sigma(scheduler: SchedulerMixin, index: int, t: torch.Tensor) -> tuple[float, float]:
    """(alpha, sigma) of the sample that step number `index` of the scheduler takes.

    `add_noise` of (x0, eps) = (1, 0) and (0, 1), except where that is not what `step` assumes.
    """
    name = is_instance_by_name(scheduler, MIDPOINT_OFFSET)
    if name and index % 2:  # the mid-point of DPM-Solver-2
        return 1.0, float(scheduler.sigmas_interpol[index - MIDPOINT_OFFSET[name]])
    if (
        is_instance_by_name(scheduler, {"DPMSolverSDEScheduler"}) and index % 2
    ):  # half-way in log sigma
        return 1.0, float((scheduler.sigmas[index - 1] * scheduler.sigmas[index]).sqrt())
    if is_instance_by_name(scheduler, {"IPNDMScheduler"}):
        return float(scheduler.alphas[index]), float(scheduler.betas[index])
    if is_instance_by_name(scheduler, {"SCMScheduler"}):
        return float(t.cos()), float(t.sin()) * scheduler.config.sigma_data
    if is_flow(scheduler):
        sigma = float(scheduler.sigmas[index])
        if scheduler.config.get("invert_sigmas"):  # then it is the share of data, not of noise
            return sigma, 1 - sigma
        if (scheduler.config.get("sigma_max") or 0) > 1:  # Cosmos 2: x0 + sigma eps
            return 1.0, sigma
        return 1 - sigma, sigma
    if is_instance_by_name(scheduler, {"SASolverScheduler"}):
        scale = sqrt(1 + float(scheduler.sigmas[index]) ** 2)
        return 1 / scale, float(scheduler.sigmas[index]) / scale
    set_begin_index(scheduler, index)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    t = t.reshape(1)
    return scheduler.add_noise(one, zero, t).item(), scheduler.add_noise(zero, one, t).item()


def starting_sigma(scheduler: SchedulerMixin) -> Any:
    """Standard deviation of the first sample, after `set_timesteps`."""
    if is_instance_by_name(scheduler, {"SCMScheduler"}):
        return scheduler.config.sigma_data
    return getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching has none, and starts at 1


def scale_model_input(
    scheduler: SchedulerMixin, sample: torch.Tensor, timestep: Any
) -> torch.Tensor:
    """Network input of a sample, by the scheduler's `scale_model_input` if it has one (flow
    matching has none)."""
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, timestep)


# ---------------------------------------------------------------- schedules that give no images


def check_betas(betas: torch.Tensor, config: Mapping[str, Any]) -> None:
    """Check the betas that a config gives, (T,).

    Raises:
        ValueError: unless they are from 0 to 1, the first below 1, and some above 0.
    """
    within = len(betas) and bool(((betas > -1e-6) & (betas <= 1)).all())
    if not (within and betas[0] < 1 and betas.max() > 0):  # also for NaN
        names = ("beta_schedule", "beta_start", "beta_end")
        if config.get("trained_betas") is not None:
            names = ("trained_betas",)
        text = ", ".join(f"{name}={config.get(name)!r:.60}" for name in names)
        raise ValueError(
            f"{text} is no noise schedule; betas from 0 to 1, not all of them 0, are allowed"
        )


def _check_table(scheduler: SchedulerMixin) -> None:
    """Check the table of alpha_bar, and that all timesteps are in it: it is read by index.

    Raises:
        ValueError: for betas that aren't a noise schedule, or timesteps beyond it.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or is_flow(scheduler):
        return
    name, config = type(scheduler).__name__, scheduler.config
    check_betas(torch.as_tensor(getattr(scheduler, "betas", 1 - table[:1])), config)
    timesteps = sampling_timesteps(scheduler).cpu().double()
    if not len(timesteps) or config.get("timestep_type") == "continuous":
        return
    low, high, last = float(timesteps.min()), float(timesteps.max()), len(table) - 1
    if not (low >= 0 and high <= last):
        outside = high if high > last else low
        raise ValueError(
            f"timesteps: {name} has {outside:g}, and its noise schedule 0 to {last}; use fewer steps, "
            f"timesteps in that range, or other config entries (num_train_timesteps="
            f"{config.get('num_train_timesteps')}, steps_offset={config.get('steps_offset', 0)})"
        )


# ---------------------------------------------------------------- steps


def probe_copy(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A copy on the CPU, at its first step, whose steps show what the scheduler does."""
    probe = deepcopy(scheduler)
    for name, value in vars(probe).items():
        if isinstance(value, torch.Tensor):
            setattr(probe, name, value.cpu())
    noise_levels(probe)  # sets it to its first step
    return probe


StepFn = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]
Generators = torch.Generator | list[torch.Generator] | None


def step_fn(
    scheduler: SchedulerMixin, generator: Generators, eta: float, batch_size: int
) -> StepFn:
    """(output, index, sample) -> next sample: `scheduler.step` with the arguments that it accepts.

    Raises:
        ValueError: for an `eta` that the scheduler doesn't accept.
    """
    timesteps = sampling_timesteps(scheduler)
    accepted = inspect.signature(scheduler.step).parameters
    largest = 1 if "eta" in accepted else 0
    eta = check_number("eta", eta)
    if not 0 <= eta <= largest:
        allowed = "0 to 1" if largest else "only 0"
        raise ValueError(f"eta={eta}: {type(scheduler).__name__} allows {allowed}")
    options = {
        name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted
    }
    if "old_pred_original_sample" in accepted:
        return _step_fn_with_memory(scheduler, timesteps, options)
    if is_instance_by_name(scheduler, {"DPMSolverSDEScheduler"}):  # draws by itself, from a seed
        _seed_noise_sampler(scheduler, generator)
    needs_batched_timestep = is_instance_by_name(scheduler, {"DDPMWuerstchenScheduler"})

    def step(output: torch.Tensor, index: int, sample: torch.Tensor) -> torch.Tensor:
        t = timesteps[index]
        if "prev_timestep" in accepted:
            last = index + 1 == len(timesteps)
            options["prev_timestep"] = None if last else timesteps[index + 1]
        if needs_batched_timestep:
            t = t.expand(batch_size)
        return scheduler.step(output, t, sample, **options, return_dict=False)[0]

    return step


def _step_fn_with_memory(
    scheduler: SchedulerMixin, timesteps: torch.Tensor, options: Mapping[str, Any]
) -> StepFn:
    """`step_fn` of CogVideoX's DPM solver, which leaves its memory to the caller."""
    previous_x0 = None

    def step(output: torch.Tensor, index: int, sample: torch.Tensor) -> torch.Tensor:
        nonlocal previous_x0
        previous_t = timesteps[index - 1] if index else None
        arguments = (output, previous_x0, timesteps[index], previous_t, sample)
        sample, previous_x0 = scheduler.step(*arguments, **options, return_dict=False)
        return sample

    return step


def _seed_noise_sampler(scheduler: SchedulerMixin, generator: Generators) -> None:
    """Give DPMSolverSDE seeds drawn from the generators, or its config's where there are none."""
    generators = generator if isinstance(generator, list) else [generator]
    seeds = [torch.randint(2**62, (), generator=g, device=g.device).item() for g in generators if g]
    if isinstance(generator, list):
        scheduler.noise_sampler_seed = seeds
    else:
        scheduler.noise_sampler_seed = seeds[0] if seeds else scheduler.config.noise_sampler_seed


# ---------------------------------------------------------------- variances of ancestral steps


def reads_variance(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler's step takes a network's learned variance along with its prediction."""
    return bool(
        is_instance_by_name(scheduler, DDPM | {"UnCLIPScheduler"})
        and scheduler.config.variance_type in ("learned", "learned_range")
    )


def split_variance(output: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Network output (B, C or 2C, ...) as (prediction, learned variance or None), C = `channels` of
    the sample.

    Raises:
        ValueError: for any other number of channels.
    """
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] == 2 * channels:
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance
    raise ValueError(
        f"the network gave {output.shape[1]} channels for a sample of {channels}; {channels} or, "
        f"with a learned variance, {2 * channels} are allowed"
    )


def has_posterior_variance(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler's step is ancestral, N(mean, Sigma), so that guidance can shift its
    mean."""
    return bool(is_instance_by_name(scheduler, DDPM))


def step_variances(alpha_bar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(beta_t, small_t) of the steps t -> s of a DDPM process, from alpha_bar of its rising
    timesteps, in float64:

        beta_t = 1 - abar_t / abar_s,    small_t = beta_t (1 - abar_s) / (1 - abar_t) (the posterior's)

    The step to the data, abar_s = 1, draws no noise. Its small_t would be 0 and gets the value of
    the step before, so that it has a logarithm, as in the code of Dhariwal & Nichol 2021
    (`DDPMScheduler` has 1e-20).
    """
    alpha_bar = alpha_bar.double()
    previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / previous
    small = beta * (1 - previous) / (1 - alpha_bar)
    small[0] = small[1] if len(small) > 1 else 1e-20
    return beta, small


def log_variance(
    variance_type: str,
    beta: torch.Tensor,
    small: torch.Tensor,
    to_data: torch.Tensor | bool,
    learned: torch.Tensor | None,
) -> torch.Tensor:
    """log Sigma of DDPM steps with these `step_variances`:

        fixed_small  log small_t;    fixed_large  log beta_t, but log small_t in the step `to_data`;
        learned_range  w log beta_t + (1 - w) log small_t, w = (v + 1) / 2
                   (Nichol & Dhariwal 2021, eq. 15)

    Raises:
        ValueError: for another `variance_type`.
    """
    match variance_type:
        case "fixed_small" | "fixed_small_log":
            return small.log()
        case "fixed_large" | "fixed_large_log":
            return torch.where(torch.as_tensor(to_data, device=beta.device), small, beta).log()
        case "learned_range":
            weight = (learned.to(torch.promote_types(learned.dtype, torch.float32)) + 1) / 2
            return weight * beta.log() + (1 - weight) * small.log()
    raise ValueError(
        f"variance_type {variance_type!r}: fixed_small, fixed_large and learned_range are allowed"
    )


def posterior_variance(
    scheduler: SchedulerMixin,
    timesteps: Sequence[int],
    index: int,
    learned: torch.Tensor | None,
) -> float | torch.Tensor:
    """Sigma of DDPM's step number `index`, which guidance_algorithm="mean" multiplies the score
    shift by."""
    to_data, variance_type = index + 1 == len(timesteps), scheduler.config.variance_type
    if variance_type == "learned":
        return learned
    if to_data and variance_type in ("fixed_small", "fixed_small_log"):
        return 0.0
    beta, small = step_variances(scheduler.alphas_cumprod[list(timesteps[::-1])].cpu())
    step = len(timesteps) - 1 - index
    return log_variance(variance_type, beta[step], small[step], to_data, learned).exp()


# ---------------------------------------------------------------- the schedule of a classifier's training


def module_config(module: torch.nn.Module | None) -> Mapping[str, Any]:
    """The module's `config` as a mapping, whether that is a mapping or an object; empty if there is
    none."""
    config = getattr(module, "config", None)
    if isinstance(config, Mapping):
        return config
    return vars(config) if hasattr(config, "__dict__") else {}


def schedule_config(module: torch.nn.Module) -> Mapping[str, Any]:
    """The noise schedule in a classifier's config, as arguments of `DDPMScheduler`.

    Raises:
        ValueError: if the module has no config, or a config without `num_train_timesteps` or betas.
    """
    config = module_config(module)
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
    names += ("rescale_betas_zero_snr",)
    schedule = {name: config[name] for name in names if config.get(name) is not None}
    has_betas = bool({"beta_schedule", "trained_betas"} & schedule.keys())
    if "num_train_timesteps" not in schedule or not has_betas:
        raise ValueError(
            f"classifier {type(module).__name__}: its config must hold the noise schedule that it "
            f"was trained with (num_train_timesteps, beta_schedule, ...); it has {sorted(config)}"
        )
    return schedule


class TrainedSchedule:
    """The variance-preserving schedule that a classifier was trained with: z_t = alpha_t x0 +
    sigma_t eps.

    Args:
        config: `num_train_timesteps`, `beta_schedule`, `beta_start`, `beta_end`, `trained_betas`,
            `rescale_betas_zero_snr` of `DDPMScheduler`.
        pure_noise: whether a last level without signal (zero terminal SNR) is one of the levels.
            What a classifier says of it has no meaning; a denoiser predicts the mean there.

    Raises:
        ValueError: for betas that aren't a noise schedule.
    """

    def __init__(self, config: Mapping[str, Any], pure_noise: bool = True):
        betas = DDPMScheduler(
            **config
        ).betas.double()  # float32 products lose digits of 1 - alpha_bar
        check_betas(betas, config)
        alpha_bar = torch.cumprod(1 - betas, 0)
        if not pure_noise:
            alpha_bar = alpha_bar[alpha_bar > SMALLEST_ALPHA**2]
        alpha_bar = alpha_bar.clamp(SMALLEST_ALPHA**2, 1 - SMALLEST_ALPHA**2).numpy()
        #: log(sigma_t / alpha_t) of each timestep, rising
        self.log_ratio = 0.5 * (np.log1p(-alpha_bar) - np.log(alpha_bar))

    def timestep(self, level: NoiseLevel) -> float:
        """Fractional t with the `sigma_t / alpha_t` of `level`, clamped to the noise levels of the
        training."""
        if level.sigma == 0:
            return 0.0
        log_ratio = np.log(level.sigma / level.alpha)
        t = float(np.interp(log_ratio, self.log_ratio, np.arange(len(self.log_ratio))))
        return (
            float(round(t)) if abs(t - round(t)) < 2e-3 else t
        )  # as exact as schedulers' float32 tables

    def extrapolation_scale(self, level: NoiseLevel) -> float:
        """Factor of a score: 1, or less where `level` is noisier than the highest training noise
        level.

        Above that level the classifier is evaluated at it, (alpha_T, sigma_T), and the shift of the
        predicted x0, sigma^2 / alpha * score, is kept constant: an exact classifier's converges as
        the noise grows.
        """
        if level.sigma == 0:
            return 1.0
        ratio, last = level.sigma / level.alpha, np.exp(self.log_ratio[-1])
        if np.log(ratio) - self.log_ratio[-1] <= 1e-4:  # within the rounding of float32 tables
            return 1.0
        # s^2 / sqrt(1 + s^2) is sigma^2 / alpha of the variance-preserving sample, divided by
        # sqrt(alpha^2 + sigma^2)
        return float(
            last * last / sqrt(1 + last * last) / (ratio * ratio / sqrt(1 + ratio * ratio))
        )
