"""Populations of particles: guided samples with weights, which correct what guidance gets wrong.

The twisted diffusion sampler (Wu et al. 2023, "Practical and asymptotically exact conditional
sampling in diffusion models", algorithm 1) for the density p(x_0) psi_0(x_0) / Z, where p is the
scheduler's with the network alone and psi_t(x_t) is the product of the terms' factors, such as
p(y | x_t). In the step t -> s, guidance shifts the mean of the scheduler's Gaussian,

    p(x_s | x_t) = N(m, S^2),    q(x_s | x_t) = N(m + S^2 g, S^2),    g = sum of the terms' scores,

as p(x_s | x_t) psi_s(x_s) is where psi is log-linear, and the weight of each particle grows by

    log w  +=  log psi_s(x_s) - log psi_t(x_t) + log p(x_s | x_t) - log q(x_s | x_t)

Any g is valid, and so is any `guidance_scale` of a classifier: it changes how much weights vary, not
the density; an energy's scale is part of psi. The mean weight estimates Z = E_p[psi_0(x_0)] without
bias. For a classifier Z is p(y) if the network doesn't get the label, and E[p(y | x)^w] with a power.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from math import isfinite, log
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .guidance import Guidance
from .noise import (
    Generators,
    probe_copy,
    reads_variance,
    sampling_timesteps,
    scale_model_input,
    step_fn,
)

#: share of the particles below which the effective sample size leads to resampling
RESAMPLING_THRESHOLD = 0.5
#: share of the largest noise of a step below which a step counts as one without noise
SMALLEST_NOISE = 1e-6
#: kinds of devices that have no float64; the weights of their samples are on the CPU
WITHOUT_FLOAT64 = ("mps",)
#: what to use instead of a scheduler whose steps are not Gaussian
GAUSSIAN_SCHEDULERS = (
    "DDPMScheduler, DDIMScheduler with eta=1, EulerAncestralDiscreteScheduler, or "
    "DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'"
)


class Population:
    """Weights of the particles of a run: P populations of K consecutive images each.

    Args:
        scheduler: after `set_timesteps`, before its first step. Where particles are resampled, its
            tensors of earlier steps are, too.
        terms: each multiplies the density by a factor (`Guidance.log_factor`).
        sample: the first one, (P K, C, ...), float32 or float64.
        generator: of the run's noise; not None. Populations are resampled with numbers derived from
            the state of the first image's.
        particles: K.
        eta: the scheduler's.
        resample: whether `finish` resamples all populations, for images of equal weight.

    Attributes:
        log_weights: (P, K), float64; normalized after `finish`.
        log_evidence: log Z of each population, (P,); complete after `finish`.
        effective_sample_size: (sum w)^2 / sum w^2, (P,), from 1 to K, before any resampling in
            `finish`.
        ancestors: (P, K): number in its population, 0 to K - 1, of the first sample that each
            particle descends from.

    Raises:
        ValueError: for a scheduler whose steps aren't Gaussian given the steps before, a term
            without factor, or with different labels within a population, or samples in half
            precision.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        terms: Sequence[Guidance],
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator],
        particles: int,
        eta: float = 0.0,
        resample: bool = True,
    ):
        if sample.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"particles={particles} needs samples in float32, which weights are computed from; "
                f"these are {sample.dtype}. Load the unet in float32, and use autocast "
                "(guided_diffusers.speed.optimize)"
            )
        _check_terms(terms, particles)
        self.scheduler, self.resample, self._shape = scheduler, resample, sample.shape
        self._device = device = sample.device
        self._dtype = torch.float64  # of sums over samples
        if device.type in WITHOUT_FLOAT64:
            self._dtype, device = torch.float32, torch.device("cpu")
        self.stds, self.noise_dtype = step_noise(scheduler, eta, sample.dtype, particles)
        self._noise_generator = generator
        shape = len(sample) // particles, particles
        self._generators = _resampling_generators(generator, *shape)
        self._factors = torch.zeros(len(terms), *shape, dtype=torch.float64, device=device)
        self.log_weights = torch.zeros(shape, dtype=torch.float64, device=device)
        self.log_evidence = torch.zeros_like(self.log_weights[:, 0])
        self.effective_sample_size = self.log_evidence + particles
        self.ancestors = torch.arange(particles, device=device).repeat(shape[0], 1)

    def start_step(self, index: int) -> bool:
        """Begin step `index`; whether guidance can act in it: not without noise, S = 0."""
        self._std = self.stds[index]
        copies = _clones(self._noise_generator)  # the scheduler draws the same afterwards
        self._eps = randn_tensor(self._shape, copies, self._device, self.noise_dtype)
        return self._std != 0

    def weigh(
        self, positions: Sequence[int], log_factors: Sequence[torch.Tensor]
    ) -> torch.Tensor | None:
        """Update the weights by the factors of some of the terms at this sample, and resample the
        populations whose effective sample size is too small.

        Args:
            positions: number of each of these terms.
            log_factors: its `log_factor`, (P K,).

        Returns:
            The images to go on with, (P K,), which the scheduler's history is already of; None: as
            they are.

        Raises:
            FloatingPointError: for weights that are not finite.
        """
        self._multiply(positions, log_factors)
        smallest = RESAMPLING_THRESHOLD * self.log_weights.shape[1]
        return self._resample([p for p, size in enumerate(self._sizes()) if size < smallest])

    def mean_shift(self, score_shift: torch.Tensor) -> torch.Tensor:
        """S^2 g, by which guidance shifts the mean of the step, (P K, C, ...); the weights grow by

            log p - log q  =  (|x_s - m - S^2 g|^2 - |x_s - m|^2) / (2 S^2)  =  -S g eps - S^2 g^2 / 2

        where eps is the noise that the scheduler is about to draw.

        Args:
            score_shift: g, of the samples as resampled.
        """
        shift = (self._std * score_shift).to(self._dtype)  # of x_s / S
        log_ratio = -(shift * (self._eps + shift / 2)).flatten(1).sum(1)
        self.log_weights += self._of_weights(log_ratio)
        return self._std**2 * score_shift

    def finish(self, log_factors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Update the weights by the factors of all terms at the images, none if the run is cut short;
        the images to return, as of `weigh`."""
        self._multiply(range(len(log_factors)), log_factors)
        everything = range(len(self._sizes()))
        order = self._resample(everything if self.resample else [])
        self.log_evidence += self._log_mean()
        self.log_weights = self.log_weights.log_softmax(1)
        return order

    def results(self) -> dict[str, torch.Tensor]:
        """The attributes, on the CPU."""
        names = ("log_weights", "log_evidence", "effective_sample_size", "ancestors")
        return {name: getattr(self, name).cpu() for name in names}

    def _multiply(self, positions: Sequence[int], log_factors: Sequence[torch.Tensor]) -> None:
        before = self._factors.sum(0)
        for position, log_factor in zip(positions, log_factors, strict=True):
            self._factors[position] = self._of_weights(log_factor)
        self.log_weights += self._factors.sum(0) - before
        self.effective_sample_size = 1 / self.log_weights.softmax(1).square().sum(1)

    def _of_weights(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the images, (P K,), on the device of the weights, (P, K)."""
        return values.to(self.log_weights.device).double().reshape(self.log_weights.shape)

    def _sizes(self) -> list[float]:
        """The effective sample sizes; an accelerator is waited for."""
        sizes, count = self.effective_sample_size.tolist(), self.log_weights.shape[1]
        failed = [p for p, size in enumerate(sizes) if not isfinite(size)]
        if failed:
            error = FloatingPointError(
                f"particles: of population {', '.join(map(str, failed))}, a weight is not finite, or all "
                f"{count} are 0; look at the terms' log factors, or use more particles"
            )
            error.images = [p * count + i for p in failed for i in range(count)]
            raise error
        return sizes

    def _log_mean(self) -> torch.Tensor:
        """Log of the mean weight of each population, (P,)."""
        return self.log_weights.logsumexp(1) - log(self.log_weights.shape[1])

    def _resample(self, populations: Sequence[int]) -> torch.Tensor | None:
        """Resample these populations; returns the new order of all images, None without any."""
        if not populations:
            return None
        shape, device = self.log_weights.shape, self.log_weights.device
        p = torch.tensor(populations, device=device)
        draws = [torch.rand((), generator=self._generators[i]) for i in populations]
        picked = systematic(self.log_weights[p].softmax(1), torch.stack(draws).to(device))
        self.ancestors[p] = self.ancestors[p].gather(1, picked)
        self.log_evidence[p] += self._log_mean()[p]
        self.log_weights[p] = 0.0
        order = torch.arange(shape.numel(), device=device).reshape(shape)
        order[p] = order[p].gather(1, picked)
        order = order.flatten()
        self._factors = self._factors.flatten(1)[:, order].reshape(self._factors.shape)
        order = order.to(self._device)
        _select_history(self.scheduler, order, self._shape)
        return order


def systematic(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Systematic resampling: K numbers from 0 to K - 1 in rising order, (P, K); number i comes
    floor(K w_i) or ceil(K w_i) times, K w_i on average.

    Args:
        weights: (P, K), of sum 1 in each row.
        uniform: (P,), in [0, 1).
    """
    count = weights.shape[1]
    points = (torch.arange(count, device=weights.device) + uniform.double()[:, None]) / count
    sums = weights.cumsum(1)
    return torch.searchsorted(sums / sums[:, -1:], points, right=True).clamp(max=count - 1)


def step_noise(
    scheduler: SchedulerMixin, eta: float, dtype: torch.dtype, particles: int
) -> tuple[list[float], torch.dtype]:
    """Standard deviation of the noise in each step, 0 for none, and the dtype that it is drawn in.

    They are measured in a run with samples and outputs of 0, whose next sample is the noise alone.

    Raises:
        ValueError: unless each step but the last ones adds one draw from the generator times a
            number.
    """
    name = type(scheduler).__name__
    if reads_variance(scheduler):
        raise ValueError(
            f"particles={particles}: the steps' variance is learned, and differs between particles; use "
            f"another variance_type of {name}, such as 'fixed_small'"
        )
    stds = None
    for noise_dtype in dict.fromkeys((dtype, torch.float32)):
        stds = stds or _measured_noise(scheduler, eta, dtype, noise_dtype)
        if stds is not None:
            break
    if stds is None:
        raise ValueError(
            f"particles={particles}: a step of {name} isn't a Gaussian given the samples before, with "
            f"noise that is one draw from the generator; use {GAUSSIAN_SCHEDULERS}"
        )
    smallest = SMALLEST_NOISE * max(map(abs, stds))
    stds = [std if abs(std) > smallest else 0.0 for std in stds]
    noisy = [index for index, std in enumerate(stds) if std]
    first = len(noisy)  # step without noise, if these are the last ones
    if noisy != list(range(first)) or not noisy:
        quiet = stds.index(0.0)
        raise ValueError(
            f"particles={particles}: {name} adds no noise in step {quiet} of {len(stds)}, so that "
            f"guided samples can't be weighted; use {GAUSSIAN_SCHEDULERS}"
        )
    return stds, noise_dtype


def _measured_noise(
    scheduler: SchedulerMixin, eta: float, dtype: torch.dtype, noise_dtype: torch.dtype
) -> list[float] | None:
    """Standard deviations as of `step_noise`; None if they aren't what the samples show."""
    if "old_pred_original_sample" in inspect.signature(scheduler.step).parameters:
        return None  # its caller has the history, where resampling doesn't reach it
    probe, zero = probe_copy(scheduler), torch.zeros(1, 1, 8, 8, dtype=dtype)
    generator, same = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    step, stds = step_fn(probe, generator, eta, 1), []
    for index, t in enumerate(sampling_timesteps(probe)):
        scale_model_input(probe, zero, t)  # some schedulers warn without it
        noise = step(zero, index, zero).double()
        eps = randn_tensor(zero.shape, same, zero.device, noise_dtype).double()
        std = float((noise * eps).sum() / eps.square().sum())
        if not torch.allclose(noise, std * eps, rtol=0, atol=1e-4 * abs(std)):
            return None
        if any(tensor.any() for tensor in _history(probe, zero.shape)):
            return None  # it corrects its noise later, as SASolver
        stds.append(std)
    return stds


def _history(scheduler: SchedulerMixin, shape: torch.Size) -> Iterator[torch.Tensor]:
    """The tensors of earlier steps that a scheduler keeps."""
    for value in vars(scheduler).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, torch.Tensor) and item.shape == shape:
                yield item


def _select_history(scheduler: SchedulerMixin, order: torch.Tensor, shape: torch.Size) -> None:
    """Reorder the images of the tensors of `_history`."""

    def select(item: Any) -> Any:
        is_history = isinstance(item, torch.Tensor) and item.shape == shape
        return item[order] if is_history else item

    for name, value in list(vars(scheduler).items()):
        if isinstance(value, list):
            setattr(scheduler, name, [select(item) for item in value])
        elif isinstance(value, torch.Tensor):
            setattr(scheduler, name, select(value))


def _clones(generator: Generators) -> Generators:
    """Generators in the same states; one for each that the list has, at all its places."""
    generators = generator if isinstance(generator, list) else [generator]
    clones = {}
    for one in generators:
        if id(one) not in clones:
            clones[id(one)] = torch.Generator(one.device)
            clones[id(one)].set_state(one.get_state())
    copies = [clones[id(one)] for one in generators]
    return copies if isinstance(generator, list) else copies[0]


def _resampling_generators(
    generator: Generators, populations: int, particles: int
) -> list[torch.Generator]:
    """A generator for each population, seeded by the state of its first image's."""
    copies = _clones(generator)
    if not isinstance(copies, list):
        copies = [copies] * (populations * particles)
    generators = []
    for one in copies[::particles]:
        seed = torch.randint(2**62, (), generator=one, device=one.device).item()
        generators.append(torch.Generator().manual_seed(seed))
    return generators


def _check_terms(terms: Sequence[Guidance], particles: int) -> None:
    if not terms:
        raise ValueError(
            f"particles={particles} are weighted by the terms of guidance, and none is on: a label with a "
            "classifier, or guidance=..., is needed"
        )
    for term in terms:
        name = type(term).__name__
        if type(term).log_factor is Guidance.log_factor:
            raise ValueError(
                f"particles={particles}: {name} multiplies the density by no factor of its own, so "
                "that its samples can't be weighted; use ClassifierGuidance, EnergyGuidance, or "
                "another term with a log_factor"
            )
        if differs := term.differs_within(particles):
            raise ValueError(
                f"guidance: {name} has different {differs} for the {particles} particles of a population; "
                f"one for all is allowed, {particles} times in a row"
            )
