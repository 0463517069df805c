"""Guidance: something added to the score.

    score of p(x_t | y)  =  score of p(x_t)  +  guidance_scale * grad_x log p(y | x_t)

A term of guidance answers one question: at this noisy sample and this noise level, what do you add to the score? Terms
add up (`a + b`), and the sum corrects the network's output in one place (`NoiseLevel.corrected`).

To write a term, extend `Guidance` and give `score(step)`, for instance to make images brighter:

    class Brighter(Guidance):
        def score(self, step: Step) -> torch.Tensor:
            return self.scale_at(step) * gradient(lambda x: step.predict(x).mean(dim=(1, 2, 3)), step.sample)

A term that needs the network's prediction under another condition than the step's own names the arguments that differ
in `conditions`; they join the step's one call of the network, and their predicted x0 are in `step.others`.
"""

from .classifier import (
    ClassifierGuidance,
    Label,
    LabelGuidance,
    LogitsGuidance,
    NoiseAwareGuidance,
    check_softplus,
    likelihood,
    logits_of,
    parse_labels,
    smoothed,
)
from .contract import (
    NO_SIGNAL,
    FiniteCheck,
    Guidance,
    Scale,
    Step,
    Sum,
    check_evaluating,
    frozen,
    gradient,
    normalized,
    total_score,
    x0_gradient,
)
from .energy import EnergyGuidance
from .prediction import ClassifierFreeGuidance, ModelGuidance, NullGuidance

__all__ = [
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "EnergyGuidance",
    "FiniteCheck",
    "Guidance",
    "Label",
    "LabelGuidance",
    "LogitsGuidance",
    "ModelGuidance",
    "NO_SIGNAL",
    "NoiseAwareGuidance",
    "NullGuidance",
    "Scale",
    "Step",
    "Sum",
    "check_evaluating",
    "check_softplus",
    "frozen",
    "gradient",
    "likelihood",
    "logits_of",
    "normalized",
    "parse_labels",
    "smoothed",
    "total_score",
    "x0_gradient",
]
