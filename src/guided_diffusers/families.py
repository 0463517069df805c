"""Families of schedulers, and whether a scheduler is one that the network was trained for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import log
from typing import Any

import numpy as np
from diffusers import SchedulerMixin

from .checks import shown
from .noise import (
    EDM,
    FIXED_PREDICTION,
    FLOW,
    TrainedSchedule,
    is_flow,
    is_instance_by_name,
    prediction_type,
)

#: sigma/alpha of a timestep over that of the training, or the inverse, above which there is a
#: warning
MAX_SCHEDULE_RATIO = 1.1

COSINE = "squaredcos_cap_v2"  # betas of Nichol & Dhariwal 2021

#: entries of a scheduler's config that say what the network was trained for
TRAINING_ENTRIES = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "snr_shift_scale",
    "sigma_data",
)


def scheduler_family(scheduler: SchedulerMixin) -> str:
    """Schedulers of a family give the same network the same inputs at a noise level, and take its
    output for the same."""
    if is_flow(scheduler):
        return "flow matching"
    if is_instance_by_name(scheduler, {"CosineDPMSolverMultistepScheduler"}):
        return "EDM with timesteps of a cosine schedule"
    if is_instance_by_name(scheduler, EDM):
        return "EDM"
    if name := is_instance_by_name(scheduler, FIXED_PREDICTION):
        return name
    if scheduler.config.get("timestep_type") == "continuous":
        return "continuous time"
    return "variance preserving"


def check_origin(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler made by `from_config` from one of another family, whose entries the config
    still has.

    Raises:
        ValueError: naming an entry.
    """
    config, cls = scheduler.config, type(scheduler)
    own = inspect.signature(cls.__init__).parameters
    if not cls.__module__.startswith("diffusers."):
        return
    hidden = {name: value for name, value in config.items() if name not in own}
    prediction, of_flow = config.get("prediction_type"), config.get("use_flow_sigmas")
    fixed = FIXED_PREDICTION.get(cls.__name__)
    if cls.__name__ in FLOW:
        fixed = "flow_prediction"
    others = {"sigma_data"}
    if is_instance_by_name(scheduler, FLOW) and prediction is None:
        others.clear()  # Cosmos 2 registers it; EDM's schedulers have a prediction_type, too
    if fixed and prediction not in (None, fixed):
        others.add("prediction_type")
    # schedulers with use_flow_sigmas have betas, which they don't use
    is_cosine = cls.__name__ == "UnCLIPScheduler" and config.get("beta_schedule") == COSINE
    if not (of_flow or prediction == "flow_prediction" or is_cosine):
        others |= {"beta_schedule", "trained_betas"}
    if not is_flow(scheduler):
        others |= {"shift", "invert_sigmas", *(["use_flow_sigmas"] if of_flow else [])}
    if fixed == "trigflow":
        hidden["prediction_type"] = prediction
    if found := sorted(name for name in others & hidden.keys() if hidden[name] is not None):
        entries = ", ".join(f"{name}={hidden[name]!r:.40}" for name in found)
        raise ValueError(
            f"scheduler {cls.__name__} ({scheduler_family(scheduler)}): its config has {entries}, of a "
            "scheduler of another family, from which from_config made it. Use one of the family that "
            f"the network was trained for; if that is {scheduler_family(scheduler)}, leave these out"
        )


def training_schedule(scheduler: SchedulerMixin) -> dict[str, Any]:
    """What a network that is trained with a scheduler needs of others: its class, family and
    prediction, and the entries of its config in `TRAINING_ENTRIES`."""
    config, entries = scheduler.config, {}
    try:
        prediction = prediction_type(scheduler)
    except ValueError:  # an error is raised when it is used
        prediction = None
    if is_instance_by_name(scheduler, {"UnCLIPScheduler"}):
        entries["beta_schedule"] = COSINE
    entries |= {name: config[name] for name in TRAINING_ENTRIES if config.get(name) is not None}
    family = scheduler_family(scheduler)
    return {
        "scheduler": type(scheduler).__name__,
        "family": family,
        "prediction": prediction,
        **entries,
    }


def check_training_schedule(schedule: Any, scheduler: SchedulerMixin | None) -> dict[str, Any]:
    """`schedule`, by default `training_schedule` of `scheduler`.

    Raises:
        ValueError: for anything else.
    """
    if schedule is None:
        return {} if scheduler is None else training_schedule(scheduler)
    if not isinstance(schedule, Mapping) or schedule and "family" not in schedule:
        raise ValueError(
            f"training_schedule={shown(schedule)}: what training_schedule(scheduler) returns is allowed"
        )
    return dict(schedule)


def training_warning(scheduler: SchedulerMixin, trained: Mapping[str, Any]) -> str | None:
    """Warning about a scheduler that isn't what the network was trained for.

    Args:
        trained: `training_schedule` of the scheduler of the training.
    """
    if not trained:
        return None
    current = training_schedule(scheduler)
    name, of_training = current["scheduler"], trained.get("scheduler")
    advice = f"use {name}.from_config with the config of the training's {of_training}"
    for key in ("family", "prediction"):
        if current[key] != trained.get(key):
            if key == "family":
                advice = f"use a scheduler of the family of {of_training}"
            return (
                f"scheduler: {name} has the {key} {current[key]!r}, the network was trained with "
                f"{of_training}, {trained.get(key)!r}; {advice}"
            )
    if current["family"] == "variance preserving":
        return _table_warning(current, trained, advice)
    for key in ("num_train_timesteps", "sigma_data"):
        if current.get(key) != trained.get(key):
            return (
                f"scheduler: {name} has {key}={current.get(key)}, the network was trained with "
                f"{trained.get(key)}; {advice}"
            )
    return None


def _table_warning(
    current: Mapping[str, Any], trained: Mapping[str, Any], advice: str
) -> str | None:
    """`training_warning` about betas: of the level that a timestep stands for. That of zero
    terminal SNR, which may be set afterwards, is left out."""
    tables = []
    for schedule in (current, trained):
        config = {name: schedule[name] for name in TRAINING_ENTRIES[:5] if name in schedule}
        if schedule.get("snr_shift_scale") or not {"beta_schedule", "trained_betas"} & set(config):
            return None
        try:
            tables.append(TrainedSchedule(config).log_ratio)
        except (ValueError, NotImplementedError):  # a table of the class's own
            return None
    length = min(map(len, tables))
    distance = np.abs(tables[0][:length] - tables[1][:length])
    t = int(distance.argmax())
    if distance[t] <= log(MAX_SCHEDULE_RATIO):
        return None
    ratios = [float(np.exp(table[t])) for table in tables]
    return (
        f"scheduler: at timestep {t} {current['scheduler']} has sigma/alpha={ratios[0]:.3g} by its "
        f"betas, the network was trained with {ratios[1]:.3g} there; {advice}"
    )
