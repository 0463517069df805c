"""From figures to a verdict: is this classifier good enough to guide, where, and how strongly?

Accuracy alone can't tell. At high noise x_t hardly depends on y, so that the exact classifier is at chance, too, and is
exactly what guidance needs there. What can be compared with is silence: a classifier that always answers the labels'
frequencies has the cross entropy H(y), log K for K equally frequent labels, and no gradient. By how much a classifier's
cross entropy is below that is the information that it has on the label (a lower bound of the mutual information):

    information = H(y) - cross entropy = E[log p(y | x_t) - log p(y)]

    informative   significantly above 0: it knows something, guide here
    harmless      0 within the error: where noise hides the label that is all that can be known; its gradient says
                  nothing, so guidance may be left out
    harmful       significantly below 0: worse than silence. It is sure of what isn't so, and its gradient steers there

"Significantly" is three standard errors, so that ten levels seldom give a wrong alarm, and for harmful also half a per
cent of H(y). A classifier of clean images is harmful above a low noise level; one trained on shuffled labels is harmful
or harmless everywhere. An over-confident classifier may be harmful where the exact one knows little, though its
gradient's direction is right: its logits, times `logit_scale`, would be informative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SIGNIFICANT = 3.0
TOLERANCE = 0.005  # of H(y)
CALIBRATED = 1.1  # a logit scale within this factor of 1 makes no difference that samples show
SHARPEST = 3.0
LOW_NOISE = 1.0  # sigma / alpha below which there is more signal than noise

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


def status(row: Row) -> str:
    """"informative", "harmless" or "harmful", by a level's figures."""
    information, error = row["information"], row["information_error"]
    if information > SIGNIFICANT * error:
        return "informative"
    if information < -max(SIGNIFICANT * error, TOLERANCE * row["prior_entropy"]):
        return "harmful"
    return "harmless"


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


def judge(rows: Sequence[Row], levels: range, parts: Sequence[float], ratios: Sequence[float], scale: float,
          error: float, run: str, compared: bool) -> Verdict:
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
    confident = f"It is {kind}: its logits should be multiplied by {scale:.2f} +- {error:.2f}."
    if not levels:
        worse = f"worse than silence at {sum(harmful)} of {len(rows)} noise levels" if any(harmful) else "as silence"
        words = (f"At no noise level does it say more of the label than the labels' frequencies do ({worse}). Guidance "
                 "by it steers nowhere, or to the wrong place.", confident)
        return Verdict("unfit", words, None, None, None, None, kind, scale, error)
    start, stop = parts[levels.start], parts[levels.stop]
    low, high = ratios[levels.stop], ratios[levels.start]
    summary = "fit"
    if any(harmful[: levels.start]):
        summary = f"unfit above sigma/alpha {high:.3g}"
        if high < LOW_NOISE:
            summary = f"unfit above a low noise level (sigma/alpha {high:.3g})"
    if any(harmful[levels.stop :]):
        summary = f"unfit below sigma/alpha {low:.3g}" if summary == "fit" else f"{summary}, and below {low:.3g}"
    strength = (round(scale, 2), round(SHARPEST * scale, 2))
    words = [f"It knows the label at sigma/alpha {low:.3g} to {high:.3g}: guidance_start={start:.2f}, "
             f"guidance_stop={stop:.2f} of a {run} run, or sigma_interval=({low:.3g}, {high:.3g}) with any scheduler.",
             confident,
             f"Recommended guidance_scale: {strength[0]:g} (exact, as far as the classifier is) to {strength[1]:g} "
             "(sharper, less varied)."]
    for name, part in (("noisier", slice(0, levels.start)), ("less noisy", slice(levels.stop, None))):
        if any(harmful[part]):
            worst = min(rows[part], key=lambda row: row["information"])
            words.insert(1, f"At {name} levels it is worse than silence: cross entropy {worst['cross_entropy']:.2f} at "
                            f"sigma/alpha {worst['sigma_over_alpha']:.3g}, where the labels' frequencies have "
                            f"{worst['prior_entropy']:.2f}.")
        elif len(rows[part]):
            words.insert(1, f"At {name} levels it says nothing, which does no harm.")
    if compared:
        pointing = [row["cosine"] for row in rows[levels.start : levels.stop]]
        words.append(f"The cosine of its gradient to the reference is {min(pointing):.2f} to {max(pointing):.2f} there.")
    return Verdict(summary, tuple(words), start, stop, (low, high), strength, kind, scale, error)
