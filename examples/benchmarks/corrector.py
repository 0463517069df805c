"""Would weights make classifier-free guidance sample p(x)^(1-w) p(x|c)^w? The Feynman-Kac corrector on a mixture.

    python examples/benchmarks/corrector.py            # a minute of a core

Scores are exact. In v = sigma^2 / alpha^2, samples that follow h = (1 - w) h_0 + w h_c, from the scores h_0 of p(x) and
h_c of p(x|c), have the weights (Skreta et al. 2025, "Feynman-Kac correctors in diffusion")

    d log w  =  (h^2 - (1 - w) h_0^2 - w h_c^2) / 2 dv

Printed is the Wasserstein-1 distance to exact draws, by w, steps and particles of a population, and the effective
sample size at the end, as a share. One particle is guidance without weights.
"""

from __future__ import annotations

import argparse

import torch
from powers import MIXTURES, Mixture, wasserstein
from torch import Tensor

from guided_diffusers.particles import systematic

SIGMAS = 80.0, 0.02


def score(mixture: Mixture, z: Tensor, v: float) -> Tensor:
    """grad log p(z), z = x0 + sqrt(v) eps, (B, 1)."""
    one, sigma = torch.ones(1, 1).double(), torch.full((1, 1), v**0.5).double()
    return -mixture.eps(z, one, sigma) / sigma


def guided(
    power: float, steps: int, samples: int, particles: int, seed: int
) -> tuple[Tensor, float]:
    """Samples (samples, 1), resampled to equal weights, and the effective sample size before."""
    parts = MIXTURES["1-D"]
    mixture, condition = Mixture(parts), Mixture([part for part in parts if part[0] == 0])
    condition.shares = condition.shares / condition.shares.sum()
    generator = torch.Generator().manual_seed(seed)
    levels = torch.logspace(*torch.tensor(SIGMAS).log10().tolist(), steps + 1).double() ** 2
    z = SIGMAS[0] * torch.randn(samples, 1, generator=generator, dtype=torch.float64)
    z = z.reshape(-1, particles)
    log_w = torch.zeros_like(z)

    def resampled(rows: Tensor, values: Tensor) -> Tensor:
        uniform = torch.rand(len(values), generator=generator, dtype=torch.float64)
        picked = systematic(log_w.softmax(1), uniform)
        return torch.where(rows[:, None], values.gather(1, picked), values)

    def size() -> Tensor:
        return 1 / (log_w.softmax(1) ** 2).sum(1) / particles

    for v, following in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        flat = z.reshape(-1, 1)
        h_0, h_c = (
            score(mixture, flat, v).reshape(z.shape),
            score(condition, flat, v).reshape(z.shape),
        )
        h = (1 - power) * h_0 + power * h_c
        if particles > 1:
            log_w += (h**2 - (1 - power) * h_0**2 - power * h_c**2) / 2 * (v - following)
        x0 = z + v * h
        noise = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        std = (following * (v - following) / v) ** 0.5
        z = x0 + following / v * (z - x0) + std * noise
        small = size() < 0.5
        z = resampled(small, z)
        log_w[small] = 0.0
    return resampled(size() < 2, z).reshape(-1, 1), float(size().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=2048, help="of a row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args()
    for power in (1.0, 3.0, 8.0):
        generator = torch.Generator().manual_seed(options.seed + 1)
        target = Mixture(MIXTURES["1-D"]).draw_powered(power, options.samples, generator)
        for steps in (25, 50, 200):
            texts = []
            for particles in (1, 16, 64):
                x, size = guided(power, steps, options.samples, particles, options.seed)
                texts.append(f"{particles:3d} particles {wasserstein(x, target):.3f} ({size:.2f})")
            print(f"w = {power:g}, {steps:3d} steps: {', '.join(texts)}", flush=True)


if __name__ == "__main__":
    main()
