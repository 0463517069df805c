"""Defaults of a pipeline's call: presets, which are measured for a mode, and what a call resolves to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .checks import check_number, shown
from .defaults import ALGORITHMS, DEFAULTS
from .guidance import (
    ClassifierFreeGuidance,
    Guidance,
    GuidanceSum,
    ScaleSchedule,
    check_interval,
    scale_tensor,
)
from .noise import has_posterior_variance, is_flow
from .schedule_checks import check_custom_steps

MAX_STEPS = 10**5  # of a run in continuous time
#: of a call, which a preset is measured for: what the network gets, and what steers
MODES = ("label", "classifier", "classifier_free", "upsampler", "particles")
#: arguments that a preset limits guidance with; in other modes than its own they keep `DEFAULTS`
LIMITS = (
    "guidance_power",
    "guidance_schedule",
    "guidance_start",
    "guidance_stop",
    "guidance_every",
    "guidance_tolerance",
)
#: what a preset of the mode "particles" may have: the rest has no effect on populations
PARTICLE_SETTINGS = (
    "guidance_scale",
    "guidance_power",
    "guidance_start",
    "guidance_stop",
    "num_inference_steps",
)


def check_defaults(defaults: Any) -> dict[str, Any]:
    """A pipeline's defaults, completed by `DEFAULTS`.

    Args:
        defaults: {argument: value}, and {mode: {argument: value}} as "modes"; None, also as a value,
            stands for `DEFAULTS`.

    Raises:
        ValueError: for other names, or values that no call accepts.
    """
    values = defaults or {}
    _check_preset("defaults", values, (*DEFAULTS, "modes"))
    modes = values.get("modes") or {}
    _check_preset("defaults: modes", modes, MODES)
    for mode, preset in modes.items():
        where = f"defaults: modes: {mode}"
        _check_preset(where, preset, DEFAULTS)
        if mode == "particles":
            _check_particle_preset(where, preset)
    return DEFAULTS | {name: value for name, value in values.items() if value is not None}


def _check_particle_preset(where: str, preset: Mapping[str, Any]) -> None:
    for name, value in preset.items():
        is_neutral = value is None or value == DEFAULTS[name]
        if name not in PARTICLE_SETTINGS and not is_neutral:
            raise ValueError(
                f"{where}: {name}={shown(value)} has no effect on populations; allowed: "
                f"{sorted(PARTICLE_SETTINGS)}"
            )


def _check_preset(where: str, preset: Any, allowed: Collection[str]) -> None:
    if not isinstance(preset, Mapping):
        raise ValueError(f"{where}={shown(preset)}: a mapping of {sorted(allowed)} is allowed")
    if unknown := preset.keys() - set(allowed):
        raise ValueError(
            f"{where}: {sorted(map(str, unknown))} are unknown; allowed: {sorted(allowed)}"
        )
    values = DEFAULTS | {n: v for n, v in preset.items() if n in DEFAULTS and v is not None}
    try:
        for name in ("guidance_scale", "classifier_free_scale"):
            check_number(name, values[name])
        check_number(
            "num_inference_steps", values["num_inference_steps"], 1, MAX_STEPS, integer=True
        )
        check_settings(values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the power, the schedule, the interval, the algorithm and the rule of reuse.

    Raises:
        ValueError: naming the argument, the value and what is allowed.
    """
    if settings["guidance_power"] is not None:
        check_number("guidance_power", settings["guidance_power"], 1)
    if settings["guidance_schedule"] is not None:
        ScaleSchedule(settings["guidance_schedule"])
    check_interval(settings["guidance_start"], settings["guidance_stop"], "guidance_")
    check_number("guidance_every", settings["guidance_every"], 1, integer=True)
    if settings["guidance_tolerance"] is not None:
        check_number("guidance_tolerance", settings["guidance_tolerance"], 0, above=True)
    algorithm = settings["guidance_algorithm"]
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise ValueError(
            f"guidance_algorithm={shown(algorithm)}: one of {', '.join(ALGORITHMS)} is allowed"
        )


def check_steps(scheduler: Any, steps: Any) -> int:
    """`num_inference_steps`, an integer from 1 to the scheduler's number of timesteps.

    Raises:
        ValueError: for any other value.
    """
    most = scheduler.config.get("num_train_timesteps")
    if is_flow(scheduler) or not isinstance(most, int):  # continuous time
        most = MAX_STEPS
    return check_number("num_inference_steps", steps, 1, most, integer=True)


def resolve_settings(pipeline: Any, call: Mapping[str, Any], hidden: bool) -> dict[str, Any]:
    """The `mode` of a call, and the value of each argument in `DEFAULTS`.

    What the call leaves at None has the value in `pipeline.config.defaults`, a preset that was
    measured for the pipeline's usual mode: "label", without class embeddings "classifier", with a
    `classifier_free_scale` "classifier_free". In another mode, its `LIMITS` don't apply, so that
    guidance acts in the whole run and is evaluated at each step, and what `defaults["modes"]` has
    for that mode does. In the mode "particles", and where the call gives a `guidance_power`, only the
    number of steps of presets applies, and scale 1, by which a classifier of the power samples
    p(x) p(y | x)^w. A default of "mean" is "output" where there is no DDPM step, and custom timesteps
    or sigmas have their own number of steps.

    Args:
        call: the call's arguments.
        hidden: whether the network gets its null label instead of the label.

    Raises:
        ValueError: for wrong custom timesteps or sigmas.
    """
    defaults = check_defaults(pipeline.config.defaults)  # also of `register_to_config`
    given = {name: call[name] for name in DEFAULTS if call.get(name) is not None}
    preset = {name: defaults[name] for name in DEFAULTS}
    if hidden:
        preset["classifier_free_scale"] = 0.0  # it is for labels that the network gets
    if pipeline.classifier is None:
        preset["guidance_scale"] = 0.0
    usual = _mode(pipeline, defaults, hidden=False)
    mode = _mode(pipeline, {**call, **preset, **given}, hidden)
    changes = (defaults.get("modes") or {}).get(mode)
    is_exact = call.get("guidance_power") is not None  # samples of p(x) p(y|x)^w
    if mode != usual or is_exact:
        preset |= {name: DEFAULTS[name] for name in LIMITS}
    if mode == "particles":
        preset |= {"guidance_algorithm": "mean", "classifier_free_scale": 0.0}
        preset["guidance_scale"] = float(pipeline.classifier is not None)
    allowed = PARTICLE_SETTINGS if mode == "particles" else DEFAULTS
    changes = {n: x for n, x in (changes or {}).items() if x is not None and n in allowed}
    if is_exact:
        preset["guidance_scale"] = float(pipeline.classifier is not None)
        changes = {name: x for name, x in changes.items() if name == "num_inference_steps"}
    if {"guidance_every", "guidance_tolerance"} & changes.keys():
        preset |= {name: DEFAULTS[name] for name in ("guidance_every", "guidance_tolerance")}
    preset |= changes
    if {"guidance_every", "guidance_tolerance"} & given.keys():  # one turns off the other's
        preset |= {name: DEFAULTS[name] for name in ("guidance_every", "guidance_tolerance")}
    without_mean = mode != "particles" and not has_posterior_variance(pipeline.scheduler)
    if preset["guidance_algorithm"] == "mean" and without_mean:
        preset["guidance_algorithm"] = "output"
    if call.get("timesteps") is not None and call.get("sigmas") is not None:
        raise ValueError("timesteps and sigmas: only one is allowed")
    for name in ("timesteps", "sigmas"):
        if call.get(name) is not None:
            steps = check_custom_steps(pipeline.scheduler, name, call[name])
            given["num_inference_steps"] = len(steps)
    return {"mode": mode, **preset, **given}


def _mode(pipeline: Any, call: Mapping[str, Any], hidden: bool) -> str:
    terms = call.get("guidance")
    terms = terms if isinstance(terms, (list, tuple)) else (terms,)
    terms = GuidanceSum([term for term in terms if isinstance(term, Guidance)]).terms()
    if call.get("particles") is not None:
        return "particles"
    if call.get("image") is not None and call.get("strength") is None:
        return "upsampler"
    if hidden or pipeline.num_class_embeds is None:
        return "classifier"
    is_free = any(isinstance(term, ClassifierFreeGuidance) for term in terms)
    name = "classifier_free_scale"
    return "classifier_free" if is_free or is_on(name, call[name]) else "label"


def is_on(name: str, scale: Any) -> bool:
    """Whether a scale, one or several, acts on any image; None and 0 are off."""
    return scale is not None and bool(scale_tensor(name, scale).any())
