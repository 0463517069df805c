"""From figures to a verdict: is this classifier good enough to guide, where, and how strongly?

Accuracy alone can't tell. At high noise x_t hardly depends on y, so that the exact classifier is at chance, too, and is
exactly what guidance needs there. What can be compared with is silence: a classifier that always answers the labels'
frequencies has the cross entropy H(y), log K for K equally frequent labels, and no gradient. By how much a classifier's
cross entropy is below that is the information that it has on the label (a lower bound of the mutual information):

    information = H(y) - cross entropy = E[log p(y | x_t) - log p(y)]

    informative   significantly above 0: it knows something, guide here; also 0 within the error, where an independent
                  estimate of the gradient (a network's) makes up more than half of the squared gradient: in much noise
                  there is little information, and the error of a few thousand images is larger
    harmless      0 within the error: where noise hides the label that is all that can be known; its gradient says
                  nothing, so guidance may be left out
    harmful       significantly below 0: worse than silence. It is sure of what isn't so, and its gradient steers there

"Significantly" is three standard errors, so that ten levels seldom give a wrong alarm, and for harmful also half a per
cent of H(y). A classifier of clean images is harmful above a low noise level; one trained on shuffled labels is harmful
or harmless everywhere. An over-confident classifier may be harmful where the exact one knows little, though its
gradient's direction is right: its logits, times `logit_scale`, would be informative.

The recommended scale. Logits that are c times the exact ones have, where the label is unsure and guidance decides, c
times the exact gradient, so that 1 / c, which is what `logit_scale` estimates, is the scale of the exact conditional
model, and what other scales do moves along. Measured on the bundled models (DDIM, 20 steps, 100 images of ten labels,
guided by the classifier alone; how often the judge sees the label, mean distance of two images of a label):

    logits x 1    scale 1     0.61  17.8      scale 3    0.91  14.7      scale 6    0.93  13.4
    logits x 3    scale 1/3   0.63  16.8      scale 1    0.86  14.8      scale 2    0.85  14.0

From three times that scale on there was variety to lose and hardly a label to win, so that the recommended range is
`logit_scale` to 3 `logit_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

SIGNIFICANT = 3.0
TOLERANCE = 0.005  # of H(y)
RIGHT = 0.5**0.5  # the cosine to a reference from which on it makes up half of the squared gradient
CALIBRATED = 1.1  # a logit scale within this factor of 1 makes no difference that samples show
SHARPEST = 3.0  # of the recommended scales, in units of the exact one
LOW_NOISE = 0.5  # a noise level is low where at least so much of the run is noisier

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """The verdict in words and numbers.

    Attributes:
        summary: "fit", "unfit", or "unfit above a low noise level (...)" and alike.
        words: it in sentences.
        guidance_start, guidance_stop: between which fractions of the run the classifier is informative; None: nowhere.
        sigma_interval: the same as (low, high) of sigma / alpha, as `ClassifierGuidance` takes it.
        guidance_scale: (low, high) that are worth trying.
        confidence: "calibrated", "over-confident" or "under-confident".
        logit_scale, logit_scale_error: what its logits should be multiplied by, over the levels that are informative
            (all levels if none is).
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


def status(row: Row, compared: bool) -> str:
    """ "informative", "harmless" or "harmful", by a level's figures; `compared`: the cosine is to a reference."""
    information, error = row["information"], row["information_error"]
    if information < -max(SIGNIFICANT * error, TOLERANCE * row["prior_entropy"]):
        return "harmful"
    pointing = compared and row["cosine"] - SIGNIFICANT * row["cosine_error"] > RIGHT
    return "informative" if information > SIGNIFICANT * error or pointing else "harmless"


def useful_levels(statuses: Sequence[str], information: Sequence[float]) -> range:
    """The levels from the first to the last informative one with no harmful one between; of several such ranges the one
    with the most information."""
    found, first = [range(0)], None
    for k, one in enumerate([*statuses, "harmful"]):
        if one == "informative":
            first, last = k if first is None else first, k
        elif one == "harmful" and first is not None:
            found.append(range(first, last + 1))
            first = None
    return max(found, key=lambda levels: sum(information[k] for k in levels))


def edges(fractions: Sequence[float]) -> list[float]:
    """Of the parts of the run that the levels stand for: 0, the middles between them, 1."""
    return [0.0, *((a + b) / 2 for a, b in zip(fractions, fractions[1:], strict=False)), 1.0]


def confidence(scale: float, error: float) -> str:
    """In words, where it differs from 1 by more than a tenth and two standard errors."""
    if scale + 2 * error < 1 / CALIBRATED:
        return "over-confident"
    return "under-confident" if scale - 2 * error > CALIBRATED else "calibrated"


def rounded(number: float, down: bool) -> float:
    """To three digits, outwards, so that an interval still has its ends in it."""
    if number == 0:
        return 0.0
    unit = 10.0 ** (floor(log10(number)) - 2)
    return float(f"{(floor if down else ceil)(number / unit) * unit:.3g}")


def judge(
    rows: Sequence[Row],
    levels: range,
    parts: Sequence[float],
    ratios: Sequence[float],
    scale: float,
    error: float,
    run: str,
    compared: bool,
) -> Verdict:
    """The verdict on levels with their `status`.

    Args:
        rows: noisiest first.
        levels: `useful_levels`.
        parts: `edges` of the levels in the run, and `ratios`, sigma / alpha at them.
        scale, error: the logit scale over those levels and its standard error.
        run: what kind of run it is, for the words.
        compared: whether the cosine is to a reference.
    """
    kind, harmful = confidence(scale, error), [row["status"] == "harmful" for row in rows]
    confident = f"It is {kind}: its cross entropy is least with its logits times {scale:.2f} +- {error:.2f}."
    if not levels:
        worse = (
            f"worse than silence at {sum(harmful)} of {len(rows)} noise levels"
            if any(harmful)
            else "as silence"
        )
        words = (
            f"At no noise level does it say more of the label than the labels' frequencies do ({worse}). Guidance "
            "by it steers nowhere, or to the wrong place.",
            *([confident] if kind != "calibrated" else []),
        )
        return Verdict("unfit", words, None, None, None, None, kind, scale, error)
    start, stop = parts[levels.start], parts[levels.stop]
    low, high = rounded(ratios[levels.stop], down=True), rounded(ratios[levels.start], down=False)
    summary = "fit"
    if any(harmful[: levels.start]):
        summary = f"unfit above sigma/alpha {high:.3g}"
        if start >= LOW_NOISE:
            summary = f"unfit above a low noise level (sigma/alpha {high:.3g}; {start:.0%} of the run is noisier)"
    if any(harmful[levels.stop :]):
        summary = (
            f"unfit below sigma/alpha {low:.3g}"
            if summary == "fit"
            else f"{summary}, and below {low:.3g}"
        )
    strength = (round(scale, 2), round(SHARPEST * scale, 2))
    words = [
        f"It knows the label at sigma/alpha {low:.3g} to {high:.3g}: guidance_start={start:.2f}, "
        f"guidance_stop={stop:.2f} of a {run} run, or sigma_interval=({low:.3g}, {high:.3g}) with any scheduler.",
        confident,
        f"Recommended guidance_scale: {strength[0]:g} (exact, as far as the classifier is) to {strength[1]:g} "
        "(sharper, less varied).",
    ]
    for name, part in (
        ("noisier", slice(0, levels.start)),
        ("less noisy", slice(levels.stop, None)),
    ):
        if any(harmful[part]):
            worst = min(rows[part], key=lambda row: row["information"])
            words.insert(
                1,
                f"At {name} levels it is worse than silence: cross entropy {worst['cross_entropy']:.2f} at "
                f"sigma/alpha {worst['sigma_over_alpha']:.3g}, where the labels' frequencies have "
                f"{worst['prior_entropy']:.2f}.",
            )
        elif len(rows[part]):
            words.insert(
                1,
                f"At {name} levels it is as good as silence, as far as these images tell: no harm, and no "
                "guidance to speak of.",
            )
    if compared:
        there = rows[levels.start : levels.stop]
        angle, size = ([row[name] for row in there] for name in ("cosine", "reference_scale"))
        words.append(
            f"There the cosine of its gradient to the reference is {min(angle):.2f} to {max(angle):.2f}, and "
            f"the scale at which it is nearest to it {min(size):.2f} to {max(size):.2f}."
        )
    return Verdict(summary, tuple(words), start, stop, (low, high), strength, kind, scale, error)
