"""Is my noise-aware classifier good enough to guide with?

    guided-diffusers inspect out/classifier --dataset data/fashion-mnist --unet out/unet \\
        --output out/diagnosis

    from guided_diffusers.diagnosis import inspect

    diagnosis = inspect("out/classifier", "data/fashion-mnist", unet="out/unet")
    print(diagnosis.verdict.summary, diagnosis.verdict.sigma_interval)

`statistics` evaluates it at the noise levels of a sampling run, as guidance does; `verdict` explains
how the metrics are interpreted; `steps` records what guidance does during sampling.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_imports

if TYPE_CHECKING:
    from .evidence import LabelEvidence, label_evidence
    from .inspection import Diagnosis, diagnose, inspect
    from .levels import EvalLevel
    from .metrics import (
        GAPS,
        calibration_error,
        calibration_gaps,
        logit_scale,
        with_calibration,
    )
    from .report import BASELINES, COLUMNS, CURVES, plot
    from .steps import GuidanceDiagnostics, check_output
    from .verdict import Verdict

__all__ = [
    "LabelEvidence",
    "BASELINES",
    "COLUMNS",
    "CURVES",
    "check_output",
    "GAPS",
    "Diagnosis",
    "EvalLevel",
    "GuidanceDiagnostics",
    "Verdict",
    "calibration_error",
    "calibration_gaps",
    "diagnose",
    "inspect",
    "label_evidence",
    "logit_scale",
    "plot",
    "with_calibration",
]

__getattr__, __dir__ = lazy_imports(__name__, {"Place": "EvalLevel"})
