"""Schedulers by the short names that a sweep uses."""

from __future__ import annotations

from diffusers import SchedulerMixin

from ..utils import exchanged

MULTISTEP_DPM = ("dpmsolver++", "sde-dpmsolver++", "sde-dpmsolver")  # its `algorithm_type`s


def scheduler_for(scheduler: SchedulerMixin, name: str) -> SchedulerMixin:
    """The scheduler called `name`, configured for the denoiser of `scheduler`.

    Beside Diffusers' names, these select options of the multistep DPM-Solver: `dpmsolver++`,
    `sde-dpmsolver++`, `dpmsolver++3m` (third order) and `dpmsolver++-thresholding` (dynamic
    thresholding of x0).

    Raises:
        ValueError: for an unknown name, or a scheduler for other kinds of denoisers.
    """
    name = name.lower()
    if name == scheduler_name(scheduler):
        return type(scheduler).from_config(scheduler.config)
    solver = name.removesuffix("-thresholding")
    algorithm = solver.removesuffix("3m")
    if algorithm not in MULTISTEP_DPM:
        return exchanged(scheduler, name)
    multistep = exchanged(scheduler, "dpmsolver")
    return type(multistep).from_config(
        multistep.config,
        algorithm_type=algorithm,
        solver_order=3 if solver.endswith("3m") else 2,
        thresholding=name.endswith("-thresholding"),
    )


def scheduler_name(scheduler: SchedulerMixin) -> str:
    """The short name of a scheduler, as `scheduler_for` accepts it."""
    name = type(scheduler).__name__
    for suffix in ("Scheduler", "Discrete", "Multistep"):
        name = name.removesuffix(suffix)
    if name.lower() != "dpmsolver":
        return name.lower()
    config = scheduler.config
    order = "3m" if config["solver_order"] == 3 else ""
    thresholding = "-thresholding" if config["thresholding"] else ""
    return f"{config['algorithm_type']}{order}{thresholding}"
