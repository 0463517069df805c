"""Guidance algorithms, and the default of each argument of a pipeline's call. Imports nothing."""

ALGORITHMS = ("output", "mean", "lie_trotter", "strang")
DEFAULTS = {
    "guidance_scale": 1.0,
    "guidance_power": None,
    "guidance_schedule": None,
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
    "classifier_free_scale": 0.0,
    "num_inference_steps": 50,
    "guidance_algorithm": "output",
    "guidance_every": 1,
    "guidance_tolerance": None,
}
