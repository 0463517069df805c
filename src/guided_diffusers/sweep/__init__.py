"""Does guidance help, at which scale, at which cost?

    guided-diffusers sweep --reference data/fashion-mnist --scales 0 1 3 8 --output out/sweep

    from guided_diffusers import ClassifierGuidedPipeline
    from guided_diffusers.evaluation import load_network
    from guided_diffusers.sweep import sweep

    pipeline = ClassifierGuidedPipeline.from_bundled("fashion-mnist")
    judge = load_network("fashion-mnist")
    print(sweep(pipeline, "data/fashion-mnist", "out/sweep", judge, judge, scales=[1, 3, 8]))

A setting is a scheduler, a number of steps, a guidance scale, and when and how guidance acts. Each
is measured once, on the same seeds, and kept as a JSON file. An interrupted sweep can be resumed,
and several processes can share one. The report says which scale is best, which settings are worth
their cost, and where guidance is worse than no guidance.

`learn_schedule` fits the scale as a function of the noise level to the real images.

Modules, each importing only earlier ones: settings, metrics, store, measure, learn, verdict, plots,
report, run, commands.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_imports

if TYPE_CHECKING:
    from .learn import learn_schedule, nelder_mead
    from .metrics import Result
    from .report import write_report
    from .run import measure_points, sweep
    from .settings import Curve, SweepSetting, sweep_grid
    from .store import Store
    from .verdict import Verdict, pareto_front, verdict_of

__all__ = [
    "Curve",
    "Result",
    "Store",
    "SweepSetting",
    "Verdict",
    "learn_schedule",
    "measure_points",
    "nelder_mead",
    "pareto_front",
    "sweep",
    "sweep_grid",
    "verdict_of",
    "write_report",
]

__getattr__, __dir__ = lazy_imports(__name__, {"Point": "SweepSetting", "points": "sweep_grid"})
