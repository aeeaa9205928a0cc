"""Intervals of scores and of their differences: over the texts of the tasks and over the training seeds, both at once.

Every question that the notebooks ask of scores is a weighted sum of mean scores, a *contrast*: one model's mean (weight 1),
a difference (1, -1), a difference of two differences, the slope over data sizes (regression weights). Its variance is

    V = V_items + S^2 / K

V_items: bootstrap over the texts of each task (jackknife over the documents where items are pairs of them), the same texts for
every model. S^2: sample variance of the contrast over K training seeds. The interval is value +- t sqrt(V), with Student's t at
Welch and Satterthwaite's degrees of freedom, V^2 / ((S^2/K)^2 / (K-1)): with three seeds an interval that took S for known would
be far too narrow.

mteb gives no value for each text of some tasks. Such a task counts with its score; the variance over its texts is taken to be the
mean of the other tasks' (V_items of those that have values, times all tasks over these). Where no task has values there is no
interval over texts, and labels and printed estimates say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, t

from speed_core.evaluation.resampling import has_values, resampled_scores, statistic
from speed_core.files import UserError

NO_TEXTS = "no interval over texts"  # of an estimate whose tasks have no value for each text
Result = Mapping[str, Any]  # what `evaluate.evaluate` returns
Term = tuple[float, Sequence[Result], Sequence[str] | None]


def leaves_zero_out(low: float, high: float) -> bool:
    """Whether an interval lies on one side of zero: what makes a difference resolved."""
    return low > 0 or high < 0


@dataclass(frozen=True)
class Estimate:
    """A contrast in points (0-100) with its interval [low, high].

    With one of `seeds` no training was repeated, and the interval covers the choice of texts alone. `sd_items` and `sd_seeds` are
    the standard errors of the two sources, in points. `sd_items` is nan where no task has values for its texts: then the interval
    covers the seeds alone, and with one seed its ends are nan.
    """

    value: float
    low: float
    high: float
    seeds: int
    sd_items: float
    sd_seeds: float
    each: tuple[float, ...] = ()  # of each seed; of each training of the generators where there are several
    generators: int = 1  # how often they were trained: with several, `sd_seeds` is the standard error over them

    @property
    def repeats(self) -> int:
        """How many repetitions the error over seeds rests on."""
        return self.generators if self.generators > 1 else self.seeds

    @property
    def error(self) -> float:
        """Standard error, both sources together."""
        return math.hypot(self.sd_items, self.sd_seeds)

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves zero out; one without the choice of texts resolves nothing."""
        return not self.no_texts and leaves_zero_out(self.low, self.high)

    @property
    def no_texts(self) -> bool:
        """Whether nothing is known of what the choice of texts does."""
        return math.isnan(self.sd_items)

    def degrees(self, level: float = 0.95) -> float:
        """Student's degrees of freedom that the interval was drawn with, at its `level`; inf for a normal one."""
        quantile = (self.high - self.low) / (2 * self.error)
        if quantile <= norm.ppf((1 + level) / 2) * 1.0001:
            return math.inf
        return float(brentq(lambda free: t.ppf((1 + level) / 2, free) - quantile, 0.3, 1e7))

    def p_value(self, expected: int = 1, margin: float = 0.0, level: float = 0.95) -> float:
        """Two-sided p of a difference of zero. With an `expected` of 0 the claim is that the difference lies within `margin`: then
        the larger of both one-sided p (two one-sided tests) where it does, else twice the p of one that reaches the margin."""
        free, size = self.degrees(level), abs(self.value) / self.error
        if expected:
            return 2 * float(t.sf(size, free))
        beyond = (abs(self.value) - margin) / self.error
        return 2 * float(t.sf(beyond, free)) if beyond > 0 else float(t.cdf(beyond, free))

    def within(self, margin: float, level: float = 0.95) -> bool:
        """Whether the difference is smaller than `margin` either way, by two one-sided tests at 5%: the 90% interval lies inside."""
        half = float(t.ppf(0.95, self.degrees(level))) * self.error
        return abs(self.value) + half < margin

    def row(self, label: str) -> dict[str, Any]:
        """{label, value, low, high, ...}, the row of a figure; its label says where there is no interval over texts."""
        return {
            "label": f"{label} ({NO_TEXTS})" if self.no_texts else label,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "seeds": self.seeds,
            "sd_items": self.sd_items,
            "sd_seeds": self.sd_seeds,
            "each": [round(v, 4) for v in self.each],
        } | ({"generators": self.generators} if self.generators > 1 else {})

    def __str__(self) -> str:
        shown = f"{self.value:+.2f}" if math.isnan(self.low) else f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"
        return f"{shown} ({NO_TEXTS})" if self.no_texts else shown


def claim_evidence(value: float, low: float, high: float, what: str) -> dict[str, Any]:
    """Evidence for the claim map (notebook 12) without repeated training: the interval [low, high] is over texts alone.

    `what` says in words what was measured.
    """
    known = Estimate(value, low, high, 1, (high - low) / (2 * 1.96), 0.0).row("")
    return {k: v for k, v in known.items() if k not in ("label", "each")} | {"what": what, "trained": False}


def contrast(
    terms: Sequence[Term], *, draws: int = 1000, seed: int = 0, level: float = 0.95, groups: Sequence[int] = ()
) -> Estimate:
    """Estimate of sum over `terms` (weight, results of K training seeds, task types or names or None for all) of
    weight x mean score over these tasks.

    All terms have K results, in the order of the seeds, so that seeds are compared like with like; a term with one result
    (a model that was not trained here) stands for all. A task without values for its texts counts with its score (see above).
    `groups`: how many of the K results, in order, come from each training of the generators. Results of one group share their
    data set, so what varies from group to group is the mean of a group, and groups count alike.

    Raises UserError when numbers of seeds or tasks do not fit.
    """
    if not terms:
        raise UserError("contrast: no terms; give at least one (weight, results, types)")
    count = max(len(results) for _, results, _ in terms)
    if any(len(results) not in (1, count) for _, results, _ in terms):
        raise UserError(f"contrast: results of {sorted({len(r) for _, r, _ in terms})} seeds; give each model the same seeds")
    if groups and sum(groups) != count:
        raise UserError(
            f"contrast: groups {list(groups)} hold {sum(groups)} results, the models have {count}; give each its group"
        )
    chosen = [_names(results, types) for _, results, types in terms]
    # A task's texts are drawn for all models or for none.
    drawn = {
        n: all(has_values(r["tasks"][n]) for _, results, _ in terms for r in results if n in r["tasks"])
        for names in chosen
        for n in names
    }
    sizes = np.array(groups if len(groups) > 1 else [1] * count)
    group = np.repeat(np.arange(len(sizes)), sizes)
    weights = 1 / (len(sizes) * sizes[group]) if len(groups) > 1 else None  # of each result
    single, noise = np.zeros(count), np.zeros(draws)
    for (weight, results, _), names in zip(terms, chosen, strict=True):
        means = np.array([np.mean([100 * r["tasks"][n]["score"] for n in names]) for r in results])
        single += weight * means
        for name in filter(drawn.get, names):
            sampled = [resampled_scores(r["tasks"][name], name, draws, seed) for r in results]
            noise += weight * 100 * np.average(sampled, axis=0, weights=weights if len(results) == count else None) / len(names)
    with_values = sum(drawn.values())
    items = float(np.var(noise)) * (len(drawn) / with_values) if with_values else math.nan
    each = np.bincount(group, single) / sizes
    seeds, degrees = _variance_of_mean(single, each, group, sizes)
    total = seeds if math.isnan(items) and len(sizes) > 1 else items + seeds
    half = float(t.ppf((1 + level) / 2, _degrees(total, seeds, degrees))) * math.sqrt(total)
    value = float(each.mean())
    errors = math.sqrt(items), math.sqrt(seeds)
    return Estimate(value, value - half, value + half, count, *errors, tuple(map(float, each)), max(1, len(groups)))


def _names(results: Sequence[Result], types: Sequence[str] | None) -> list[str]:
    """The tasks of these types or names, which all `results` have."""
    names = [n for n, entry in results[0]["tasks"].items() if not types or {entry["type"], n} & set(types)]
    if not names or any(n not in r["tasks"] for r in results for n in names):
        raise UserError("contrast: the results share no task of those asked for; evaluate all models on the same tasks")
    return names


def _variance_of_mean(single: np.ndarray, each: np.ndarray, group: np.ndarray, sizes: np.ndarray) -> tuple[float, int]:
    """(variance, degrees of freedom) of the mean of the groups' means `each`; `single` are the values, `group` the group of each."""
    repeats, inside = len(sizes), len(single) - len(sizes)  # degrees of freedom: repeats - 1 between groups, `inside` within them
    between = float(np.var(each, ddof=1) / repeats) if repeats > 1 else 0.0
    # Means of few groups may lie close together by chance, but no closer than the embedding models within a group let them.
    least = np.sum((single - each[group]) ** 2) / inside * np.sum(1 / sizes) / repeats**2 if inside else 0.0
    return (float(least), inside) if least > between else (between, repeats - 1)


def _degrees(both: float, seeds: float, known: int) -> float:
    """Satterthwaite's degrees of freedom of a variance `both`: its part `seeds` has `known` of them, the rest is known exactly."""
    return both**2 / (seeds**2 / known) if seeds > 0 else math.inf


def difference(
    a: Sequence[Result], b: Sequence[Result], types: Sequence[str] | None = None, *, draws: int = 1000, groups: Sequence[int] = ()
) -> Estimate:
    """Mean score of `a` minus that of `b`, each given as the results of the same training seeds (`groups` as in `contrast`)."""
    return contrast([(1, a, types), (-1, b, types)], draws=draws, groups=groups)


def average(a: Sequence[Result], types: Sequence[str] | None = None, *, draws: int = 1000) -> Estimate:
    """Mean score over tasks."""
    return contrast([(1, a, types)], draws=draws)


def slope(results: Mapping[int, Sequence[Result]], *, draws: int = 1000) -> Estimate:
    """Points per doubling: least squares of the mean score on log2 of the size, as a contrast of the sizes."""
    x = np.log2(list(results))
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return contrast([(float(w), r, None) for w, r in zip(weights, results.values(), strict=True)], draws=draws)


def curvature(results: Mapping[int, Sequence[Result]], *, draws: int = 1000) -> Estimate:
    """Points per doubling between the two largest sizes minus between the two smallest: negative where returns diminish."""
    sizes = sorted(results)
    if len(sizes) < 3:
        raise UserError(f"curvature: {len(sizes)} sizes; three are needed")
    terms: list[Term] = []
    for sign, (small, large) in ((1, sizes[-2:]), (-1, sizes[:2])):
        weight = sign / math.log2(large / small)
        terms += [(weight, results[large], None), (-weight, results[small], None)]
    return contrast(terms, draws=draws)


class Answer(StrEnum):
    """Whether a run of this size resolves an effect."""

    ENOUGH = "this size is enough"
    LARGER = "a larger one would"
    NEVER = "no size resolves an effect of zero"
    UNKNOWN = f"not known: {NO_TEXTS}"


@dataclass(frozen=True)
class RequiredRepeats:
    """The size of a run that would resolve an effect; `str` says it in words.

    `texts`: how many times as many texts (None: the same texts). `repeats`: how many repetitions (None: they play no part, or
    with `seeds_unknown` this run has one and cannot tell). `present`: how many repetitions this run has, in `unit`.
    """

    answer: Answer
    texts: int | None = None
    repeats: int | None = None
    present: int = 1
    unit: str = "seeds"
    seeds_unknown: bool = False

    def __str__(self) -> str:
        if self.answer is not Answer.LARGER:
            return self.answer
        if self.texts is None:
            return f"about {self.repeats} {self.unit} on the same texts"
        more = f"about {self.texts} times as many texts"
        if self.repeats is not None:
            return f"{more} and {'the same' if self.repeats <= self.present else self.repeats} {self.unit}"
        return f"{more}, seeds not counted" if self.seeds_unknown else more


def required_repeats(
    estimate: Estimate, effect: float, *, power: float = 0.8, level: float = 0.95, trained: bool = True
) -> RequiredRepeats:
    """What would resolve a true `effect` (points) in `power` of all repetitions.

    From the observed variances: with K seeds and m times the texts the standard error is sqrt(V_items / m + S^2 / K). It has to
    be at most effect / (t_{1-a/2} + t_power), with the degrees of freedom that K leaves. Seeds are the cheaper of the two, so they
    are raised first. Without training (`trained`) there are no seeds; with several trainings of the generators, K counts these.
    """
    if estimate.no_texts:
        return RequiredRepeats(Answer.UNKNOWN)
    if not estimate.error:
        return RequiredRepeats(Answer.ENOUGH)
    if effect == 0:
        return RequiredRepeats(Answer.NEVER)
    # The interval as drawn, with Student's t for few seeds, says whether this size was enough.
    if (estimate.high - estimate.low) / 2 + norm.ppf(power) * estimate.error <= abs(effect):
        return RequiredRepeats(Answer.ENOUGH)
    target = (effect / (norm.ppf((1 + level) / 2) + norm.ppf(power))) ** 2
    present, unit = estimate.repeats, "trainings of the generators" if estimate.generators > 1 else "seeds"
    items, one = estimate.sd_items**2, estimate.sd_seeds**2 * present
    larger = partial(RequiredRepeats, Answer.LARGER, present=present, unit=unit)
    if items < target / 2 and present > 1:
        return larger(repeats=max(present + 1, _repeats(one, items, effect, target, power, level)))
    if not trained:
        return larger(texts=math.ceil(items / target))
    texts = math.ceil(2 * items / target)  # half of the variance for each
    if present == 1:
        return larger(texts=texts, seeds_unknown=True)
    return larger(texts=texts, repeats=max(3, _repeats(one, items / texts, effect, target, power, level)))


def _repeats(one: float, items: float, effect: float, target: float, power: float, level: float) -> int:
    """The least number K of repetitions, each of variance `one`, that resolves a true `effect` in `power` of all cases.

    `items` is the variance that repetitions do not lower, `target` the total that would do if it were known exactly.
    """
    # Student's t is wider than the normal distribution, so the latter's answer is where the search begins.
    k = max(2, math.ceil(one / (target - items)))
    while True:
        seeds, both = one / k, items + one / k
        free = _degrees(both, seeds, k - 1)
        if (t.ppf((1 + level) / 2, free) + t.ppf(power, free)) * math.sqrt(both) <= abs(effect):
            return k
        k += 1


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """{name: p} adjusted for how many there are (Holm's step-down): one false positive among them stays below the level."""
    out, largest = {}, 0.0
    for k, name in enumerate(sorted(p_values, key=lambda n: p_values[n])):
        largest = max(largest, min(1.0, (len(p_values) - k) * p_values[name]))
        out[name] = largest
    return out


# --- intervals of one model's own values ---------------------------------------------------------------


def interval(draws: Any, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap draws."""
    tail = (1 - level) / 2
    return float(np.quantile(draws, tail)), float(np.quantile(draws, 1 - tail))


def share_interval(values: Sequence[bool | float], level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of the share of true values: none of 48 is [0, 0.07], where a bootstrap would say [0, 0]."""
    found = binomtest(sum(map(bool, values)), len(values)).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def bootstrap_interval(items: Sequence[Any], kind: str) -> tuple[float, float]:
    """Percentile interval (95%) of the statistic of `items` under resampling with replacement, from 1000 draws."""
    data = np.asarray(items, float)
    return interval(statistic(kind, data[np.random.default_rng(0).integers(0, len(data), (1000, len(data)))]))
