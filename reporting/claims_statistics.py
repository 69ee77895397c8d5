"""Tests behind the claims: paired differences, conjunctions, Holm's correction, verdicts.

A case asks whether one thing is above another. It is read by two scores, AUROC and balanced
accuracy, and by several comparisons where the claim names several methods. It is "yes" only if
every reading is, "no" if one comparison is by both scores, and otherwise undecided.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.special import stdtr, stdtrit

ALPHA = 0.05
MIN_PAIRS = 3
TOLERANCE = 2.0  # points that "not worse" may lose
MAX_SEEDS = 50  # beyond that no number of seeds is proposed
POWER = 0.8


@dataclass
class Difference:
    """A minus B in points, over the seeds that both have. A may be `margin` points below B."""

    values: list
    margin: float = 0.0

    @cached_property
    def mean(self):
        return float(np.mean(self.values))

    @cached_property
    def std(self):
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    def p_above(self, bound):
        """Return twice the one-sided p of Student's t-test that the mean is above `bound`.

        Equal differences have no spread to test by: the sign test takes its place.
        """
        n = len(self.values)
        if n < MIN_PAIRS:
            return 1.0
        if self.std < 1e-9:
            return 2.0 ** (1 - n) if self.mean > bound + 1e-9 else 1.0
        t = (self.mean - bound) / (self.std / n**0.5)
        return min(1.0, 2 * float(stdtr(n - 1, -t)))

    @property
    def p_yes(self):
        """p of "A is above B"; with a margin, of non-inferiority: "A is above B - margin"."""
        return self.p_above(-self.margin)

    @property
    def p_no(self):
        """p of "A is below B"."""
        return Difference([-v for v in self.values]).p_above(0)

    def seeds_needed(self):
        """Return how many pairs would show this difference with 80 % power; None above MAX_SEEDS.

        A positive mean is tested against the margin, a negative one against 0.
        """
        effect = self.mean + self.margin if self.mean > -self.margin else -self.mean
        n = np.arange(MIN_PAIRS, MAX_SEEDS + 1)
        wanted = (stdtrit(n - 1, 1 - ALPHA / 2) + stdtrit(n - 1, POWER)) / n**0.5
        enough = n[effect >= wanted * self.std]
        return int(enough[0]) if len(enough) else None

    def __str__(self):
        spread = "" if math.isnan(self.std) else f" ± {self.std:.1f}"
        return f"{self.mean:+.1f}{spread}"


@dataclass
class Case:
    """One question to the runs. p_yes and p_no are those of the whole, before Holm's correction."""

    where: str
    evidence: str
    p_yes: float
    p_no: float
    size: float = 0.0  # of the effect
    unit: str = "points"
    holds: bool | None = None
    p: float = 1.0
    hint: str = ""  # what would decide it


def p_text(p):
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def all_of(where, cases):
    """Return the Case that holds if all cases do, and fails if one does; None without a case.

    The largest p_yes counts (an intersection-union test needs no correction), and the smallest
    p_no times the number of cases (Bonferroni).
    """
    if not cases:
        return None
    if len(cases) == 1:
        return replace(cases[0], where=where)
    smallest = min(cases, key=lambda case: abs(case.size))
    return Case(
        where,
        "; ".join(f"{case.where}: {case.evidence}" for case in cases),
        max(case.p_yes for case in cases),
        min(1.0, len(cases) * min(case.p_no for case in cases)),
        smallest.size,
        smallest.unit,
        hint=next((case.hint for case in cases if case.hint and case.p_yes >= ALPHA), ""),
    )


def decide(cases, is_corrected):
    """Set `holds` and `p` of the cases; with Holm's correction over them if asked."""
    # A difference between -TOLERANCE and 0 may be both "not worse" and "below": the first counts.
    is_yes = [case.p_yes < ALPHA or case.p_yes <= case.p_no for case in cases]
    adjusted = [c.p_yes if yes else c.p_no for c, yes in zip(cases, is_yes, strict=True)]
    if is_corrected:
        order = np.argsort(adjusted, kind="stable")
        steps = [(len(cases) - rank) * adjusted[i] for rank, i in enumerate(order)]
        for i, p in zip(order, np.maximum.accumulate(steps), strict=True):
            adjusted[i] = min(1.0, float(p))
    for case, p, yes in zip(cases, adjusted, is_yes, strict=True):
        case.p, case.holds = p, yes if p < ALPHA else None
    return cases


def verdict(cases):
    """Name the verdict over the primary cases of a claim."""
    held = [case.holds for case in cases]
    if not cases:
        return "not run"
    if True in held:
        return "holds" if all(held) else "holds in part"
    return "does not hold here" if False in held else "not decided"


def count_text(cases):
    """Count the further cases, beside the number that chance alone would give."""
    if not cases:
        return ""
    yes, no = (sum(case.holds is holds for case in cases) for holds in (True, False))
    chance = len(cases) * ALPHA / 2
    return f"{yes} of {len(cases)} for it, {no} against it; chance gives at most {chance:.1f} each"
