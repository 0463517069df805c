"""From metrics to a verdict: where may this classifier guide, and how strongly?

At high noise even the exact classifier's accuracy is at chance. So each level is compared with the
*uninformed baseline*, which always predicts the labels' frequencies: its cross entropy is H(y), its
gradient zero. What the classifier gains is its information on the label, a lower bound of the mutual
information of y and x_t:

    information = H(y) - cross entropy = E[log p(y | x_t) - log p(y)]

    informative   significantly above 0. Also: 0 within the error, where a reference (a denoiser's
                  gradient) makes up more than half of the squared gradient; at high noise a few
                  thousand images are too few to measure the information
    harmless      0 within the error: guidance has little effect and may be left out
    harmful       significantly below 0: confidently wrong, so that the gradient guides to the wrong
                  label

"Significantly" means three standard errors, so that ten levels seldom give a false alarm; for
harmful also half a per cent of H(y). The recommended guidance_scale: where the label is uncertain,
logits that are c times the exact ones have c times the exact gradient, so 1 / c, which
`logit_scale` estimates, gives the exact conditional model. Above three times that scale, variety
decreases and agreement hardly increases (bundled models, DDIM, 20 steps, 100 images of ten labels;
the judge's agreement with the label, mean distance of two images of a label):

    logits x 1    scale 1     0.61  17.8      scale 3    0.91  14.7      scale 6    0.93  13.4
    logits x 3    scale 1/3   0.63  16.8      scale 1    0.86  14.8      scale 2    0.85  14.0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

from torch import Tensor

from .levels import SamplingRun
from .metrics import logit_scale

SIGNIFICANT = 3.0  # standard errors
TOLERANCE = 0.005  # of H(y)
MIN_COSINE = 0.5**0.5  # to a reference that makes up half of the squared gradient
CALIBRATED = 1.1  # a logit scale within this factor of 1 makes no visible difference
LARGEST_SCALE = 3.0  # of the recommended guidance scales, in units of the exact one
LOW_NOISE = 0.5  # a noise level is low where at least this fraction of the run is noisier
POWER_TOLERANCE = 0.1  # share by which the mean of p(y|x)^w may differ between noise levels

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Where and how strongly to guide.

    Attributes:
        summary: "fit", "unfit", or where it is unfit: "unfit above sigma/alpha ..." and the like.
        words: explanation, in sentences.
        guidance_start, guidance_stop: fractions of the run between which the classifier is
            informative; None: nowhere.
        sigma_interval: the same as (low, high) of sigma / alpha, as `ClassifierGuidance` takes it.
        guidance_scale: (low, high), the recommended range.
        confidence: "calibrated", "over-confident" or "under-confident".
        logit_scale, logit_scale_error: factor of the logits with the least cross entropy over the
            informative levels (over all levels if none is), and its standard error.
    """

    summary: str
    words: tuple[str, ...]
    guidance_start: float | None
    guidance_stop: float | None
    sigma_interval: tuple[float, float] | None
    guidance_scale: tuple[float, float] | None
    confidence: str
    logit_scale: float
    logit_scale_error: float


def status(row: Row, has_reference: bool) -> str:
    """ "informative", "harmless" or "harmful"; with `has_reference`, `cosine` is to a reference."""
    information, error = row["information"], row["information_error"]
    if information < -max(SIGNIFICANT * error, TOLERANCE * row["prior_entropy"]):
        return "harmful"
    if information > SIGNIFICANT * error:
        return "informative"
    if has_reference and row["cosine"] - SIGNIFICANT * row["cosine_error"] > MIN_COSINE:
        return "informative"
    return "harmless"


def useful_levels(statuses: Sequence[str], information: Sequence[float]) -> range:
    """Of the ranges of informative levels without a harmful one between, the most informative."""
    ranges, first = [range(0)], None
    for k, level_status in enumerate([*statuses, "harmful"]):
        if level_status == "informative":
            first, last = k if first is None else first, k
        elif level_status == "harmful" and first is not None:
            ranges.append(range(first, last + 1))
            first = None
    return max(ranges, key=lambda levels: sum(information[k] for k in levels))


def edges(fractions: Sequence[float]) -> list[float]:
    """Edges of the parts of the run that the levels stand for: 0, the middles between them, 1."""
    return [0.0, *((a + b) / 2 for a, b in zip(fractions, fractions[1:], strict=False)), 1.0]


def confidence(scale: float, error: float) -> str:
    """Names a logit scale that differs from 1 by more than a tenth and two standard errors."""
    if scale + 2 * error < 1 / CALIBRATED:
        return "over-confident"
    return "under-confident" if scale - 2 * error > CALIBRATED else "calibrated"


def rounded(number: float, down: bool) -> float:
    """The number rounded to three digits, down or up."""
    if number == 0:
        return 0.0
    unit = 10.0 ** (floor(log10(number)) - 2)
    return float(f"{(floor if down else ceil)(number / unit) * unit:.3g}")


def assess(
    rows: Sequence[Row], logits: Tensor, label: Tensor, run: SamplingRun, has_reference: bool
) -> Verdict:
    """The verdict on a run, from rows of metrics and logits (L, N, K), noisiest level first."""
    useful = useful_levels([row["status"] for row in rows], [row["information"] for row in rows])
    scale, error = logit_scale(logits[useful.start : useful.stop] if useful else logits, label)
    kind = confidence(scale, error)
    calibration = (
        f"It is {kind}: cross entropy is least with its logits times {scale:.2f} +- {error:.2f}."
    )
    if not useful:
        words = [_uninformative(rows)]
        if kind != "calibrated":
            words.append(calibration)
        return Verdict("unfit", tuple(words), None, None, None, None, kind, scale, error)

    fractions = edges([row["fraction"] for row in rows])
    start, stop = fractions[useful.start], fractions[useful.stop]
    high = rounded(run.at(start).ratio, down=False)  # outwards, so that the ends are included
    low = 0.0 if stop == 1 else rounded(run.at(stop).ratio, down=True)
    guidance_scale = round(scale, 2), round(LARGEST_SCALE * scale, 2)
    noisier, cleaner = rows[: useful.start], rows[useful.stop :]
    words = [
        f"It is informative at sigma/alpha {low:.3g} to {high:.3g}: guidance_start={start:.2f}, "
        f"guidance_stop={stop:.2f} of a {type(run.scheduler).__name__} run, or "
        f"sigma_interval=({low:.3g}, {high:.3g}) with any scheduler.",
        *_outside("noisier", noisier),
        *_outside("less noisy", cleaner),
        calibration,
        f"Recommended guidance_scale: {guidance_scale[0]:g} (exact, if the classifier is) to "
        f"{guidance_scale[1]:g} (sharper, less varied).",
    ]
    if has_reference:
        inside = rows[useful.start : useful.stop]
        cosines, scales = ([row[name] for row in inside] for name in ("cosine", "reference_scale"))
        words.append(
            f"At these levels the cosine of its gradient to the reference is {min(cosines):.2f} to "
            f"{max(cosines):.2f}; the scale at which it is nearest to the reference is "
            f"{min(scales):.2f} to {max(scales):.2f}."
        )
    words += powers(rows)
    above = f"above sigma/alpha {high:.3g}"
    if start >= LOW_NOISE:
        above = (
            f"above a low noise level (sigma/alpha {high:.3g}; {start:.0%} of the run is noisier)"
        )
    sides = ((noisier, above), (cleaner, f"below sigma/alpha {low:.3g}"))
    parts = [text for levels, text in sides if _any_harmful(levels)]
    summary = f"unfit {', and '.join(parts)}" if parts else "fit"
    sigmas = low, high
    return Verdict(summary, tuple(words), start, stop, sigmas, guidance_scale, kind, scale, error)


def powers(rows: Sequence[Row]) -> list[str]:
    """The sentence on the largest power w of a classifier that knows powers.

    The mean over images of E[p(y | x_0)^w | x_t] is that of p(y | x_0)^w, at every noise level.
    """
    if "power_mean" not in rows[0]:
        return []
    means = [row["power_mean"] for row in rows]
    clean, apart = means[-1], max(abs(mean / means[-1] - 1) for mean in means)
    fit = "consistent" if apart < POWER_TOLERANCE else "inconsistent: train it longer"
    return [
        f"At guidance_power={rows[0]['power']:g} the mean of its p(y|x)^w, summed over the labels, is "
        f"{min(means):.3f} to {max(means):.3f}, and {clean:.3f} at the lowest noise, where it should "
        f"be at all levels ({fit})."
    ]


def _any_harmful(rows: Sequence[Row]) -> bool:
    return any(row["status"] == "harmful" for row in rows)


def _uninformative(rows: Sequence[Row]) -> str:
    """The sentence on a classifier that is informative at no level."""
    harmful = sum(row["status"] == "harmful" for row in rows)
    compared = "the same as the uninformed baseline"
    if harmful:
        compared = f"worse than the uninformed baseline at {harmful} of {len(rows)} noise levels"
    return (
        "It is informative nowhere: at no noise level does it predict the label better than the "
        f"labels' frequencies do ({compared}). Its guidance has no effect, or a wrong one."
    )


def _outside(name: str, rows: Sequence[Row]) -> list[str]:
    """The sentence on the levels on one side of the informative ones, if there are any."""
    if not rows:
        return []
    if not _any_harmful(rows):
        return [
            f"At {name} levels it is not significantly better than predicting label frequencies; "
            "guidance has little effect there."
        ]
    worst = min(rows, key=lambda row: row["information"])
    return [
        f"At {name} levels it is worse than the uninformed baseline: cross entropy "
        f"{worst['cross_entropy']:.2f} at sigma/alpha {worst['sigma_over_alpha']:.3g}, where label "
        f"frequencies have {worst['prior_entropy']:.2f}."
    ]
