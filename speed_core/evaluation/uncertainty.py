"""Intervals of scores and of their differences: over the texts of the tasks and over the training seeds, both at once.

Every question that the notebooks ask of scores is a weighted sum of mean scores, a *contrast*: one model's mean (weight 1),
a difference (1, -1), a difference of two differences, the slope over data sizes (regression weights). Its variance is

    V = V_items + S^2 / K

V_items: bootstrap over the texts of each task (jackknife over the documents where items are pairs of them), the same for
every model; S^2: sample variance of the contrast over K training seeds. The interval is value +- t sqrt(V), with Student's t at Welch and Satterthwaite's degrees of freedom,
V^2 / ((S^2/K)^2 / (K-1)): with three seeds an interval that took S for known would be far too narrow.

A task of which mteb gives no value for each text counts with its score; what the choice of its texts does is not known and is
taken to be the mean of the other tasks' (V_items of those that have values, times all tasks over these). Where no task has
values there is no interval over texts, and labels and printed estimates say so.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm, rankdata, t

from speed_core.files import UserError

ENOUGH = "this size is enough"  # what `needed` says of an effect that would be seen
NO_TEXTS = "no interval over texts"  # said of an estimate whose tasks have no value for each text
BLOCK = 4_000_000  # resampled values that are held at a time: a test set may have 400 000 texts
Result = Mapping[str, Any]  # what `evaluate.evaluate` returns
Term = tuple[float, Sequence[Result], Sequence[str] | None]


@dataclass(frozen=True)
class Estimate:
    """A contrast in points (0-100) with its interval. `seeds` is 1 when no training was repeated: then `low` and `high`
    cover the choice of texts alone. `sd_items` and `sd_seeds` are the standard errors of the two sources, in points; `sd_items`
    is nan where no task has values for its texts: then `low` and `high` cover the seeds alone, and are nan with one seed."""

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
        return not self.no_texts and (self.low > 0 or self.high < 0)

    @property
    def no_texts(self) -> bool:
        """Whether nothing is known of what the choice of texts does."""
        return math.isnan(self.sd_items)

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


def fact(value: float, low: float, high: float, what: str) -> dict[str, Any]:
    """A result for the claim map (notebook 12) in which no model was trained several times: its interval [low, high] is over
    texts alone. `what` says in words what was measured."""
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
    sizes = np.array(groups if len(groups) > 1 else [1] * count)
    group = np.repeat(np.arange(len(sizes)), sizes)
    weights = 1 / (len(sizes) * sizes[group]) if len(groups) > 1 else None  # of each result
    each, noise = np.zeros(count), np.zeros(draws)
    chosen = [
        [n for n, e in results[0]["tasks"].items() if not types or {e["type"], n} & set(types)] for _, results, types in terms
    ]
    if any(
        not names or any(n not in r["tasks"] for r in term[1] for n in names) for names, term in zip(chosen, terms, strict=True)
    ):
        raise UserError("contrast: the results share no task of those asked for; evaluate all models on the same tasks")
    # A task's texts are drawn for all models or for none.
    known = {
        n: all(has_values(r["tasks"][n]) for _, results, _ in terms for r in results if n in r["tasks"])
        for ns in chosen
        for n in ns
    }
    for (weight, results, _), names in zip(terms, chosen, strict=True):
        means = np.array([np.mean([100 * r["tasks"][n]["score"] for n in names]) for r in results])
        each += weight * means
        for name in filter(known.get, names):
            sampled = [_resampled(r["tasks"][name], name, draws, seed) for r in results]
            noise += weight * 100 * np.average(sampled, axis=0, weights=weights if len(results) == count else None) / len(names)
    with_values = sum(known.values())
    items = float(np.var(noise)) * (len(known) / with_values) if with_values else math.nan
    each, single = np.bincount(group, each) / sizes, each
    repeats, inside = len(sizes), count - len(sizes)  # degrees of freedom between groups are repeats - 1, inside of them `inside`
    seeds, degrees = (float(np.var(each, ddof=1) / repeats), repeats - 1) if repeats > 1 else (0.0, 0)
    # Means of few groups may lie close together by chance, but no closer than the embedding models inside of a group let them.
    least = np.sum((single - each[group]) ** 2) / inside * np.sum(1 / sizes) / repeats**2 if inside else 0.0
    if least > seeds:
        seeds, degrees = float(least), inside
    both = seeds if math.isnan(items) and repeats > 1 else items + seeds
    half = float(t.ppf((1 + level) / 2, _degrees(both, seeds, degrees))) * math.sqrt(both)
    value = float(each.mean())
    both_errors = math.sqrt(items), math.sqrt(seeds)
    return Estimate(value, value - half, value + half, count, *both_errors, tuple(map(float, each)), max(1, len(groups)))


def _degrees(both: float, seeds: float, known: int) -> float:
    """Degrees of freedom of a variance `both` whose part `seeds` is known with `known` of them and the rest surely (Satterthwaite)."""
    return both**2 / (seeds**2 / known) if seeds > 0 else math.inf


def difference(
    a: Sequence[Result],
    b: Sequence[Result],
    types: Sequence[str] | None = None,
    *,
    draws: int = 1000,
    groups: Sequence[int] = (),
) -> Estimate:
    """Mean score of `a` minus that of `b`, each given as the results of the same training seeds (`groups` as in `contrast`)."""
    return contrast([(1, a, types), (-1, b, types)], draws=draws, groups=groups)


def average(a: Sequence[Result], types: Sequence[str] | None = None, *, draws: int = 1000) -> Estimate:
    """Mean score over tasks."""
    return contrast([(1, a, types)], draws=draws)


def slope(results: Mapping[int, Sequence[Result]], *, draws: int = 1000) -> Estimate:
    """Points a doubling: least squares of the mean score on log2 of the size, as a contrast of the sizes."""
    x = np.log2(list(results))
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return contrast([(float(w), r, None) for w, r in zip(weights, results.values(), strict=True)], draws=draws)


def bend(results: Mapping[int, Sequence[Result]], *, draws: int = 1000) -> Estimate:
    """Points a doubling between the two largest sizes minus between the two smallest: negative where returns diminish."""
    sizes = sorted(results)
    if len(sizes) < 3:
        raise UserError(f"bend: {len(sizes)} sizes; three are needed")
    terms: list[Term] = []
    for sign, (small, large) in ((1, sizes[-2:]), (-1, sizes[:2])):
        weight = sign / math.log2(large / small)
        terms += [(weight, results[large], None), (-weight, results[small], None)]
    return contrast(terms, draws=draws)


def needed(estimate: Estimate, effect: float, *, power: float = 0.8, level: float = 0.95, trained: bool = True) -> str:
    """What would resolve a true `effect` (points) in `power` of all repetitions, in words.

    From the observed variances: with K seeds and m times the texts the standard error is sqrt(V_items / m + S^2 / K); it
    has to be at most effect / (t_{1-a/2} + t_power), with the degrees of freedom that K leaves. Seeds are the cheaper of the two, so
    they are raised first. What was not `trained` has no seeds. Where generators were trained several times, K counts them.
    """
    if estimate.no_texts:
        return f"not known: {NO_TEXTS}"
    if not estimate.error:
        return ENOUGH
    if effect == 0:
        return "no size resolves an effect of zero"
    wanted = (effect / (norm.ppf((1 + level) / 2) + norm.ppf(power))) ** 2
    repeats, unit = estimate.repeats, "trainings of the generators" if estimate.generators > 1 else "seeds"
    items, one = estimate.sd_items**2, estimate.sd_seeds**2 * repeats
    # Whether this size was enough is judged by the interval that was drawn, which has Student's t for few seeds.
    half = (estimate.high - estimate.low) / 2
    if half + norm.ppf(power) * estimate.error <= abs(effect):
        return ENOUGH
    if items < wanted / 2 and repeats > 1:
        return f"about {max(repeats + 1, _enough(one, items, effect, wanted, power, level))} {unit} on the same texts"
    if not trained:
        return f"about {math.ceil(items / wanted)} times as many texts"
    texts = math.ceil(2 * items / wanted)  # half of the variance for each
    seeds = (
        f" and {max(3, _enough(one, items / texts, effect, wanted, power, level))} {unit}"
        if repeats > 1
        else ", seeds not counted"
    )
    return f"about {texts} times as many texts{seeds}"


def _enough(one: float, items: float, effect: float, wanted: float, power: float, level: float) -> int:
    """The least number K of repetitions, each of variance `one`, with which a true `effect` is resolved in `power` of all cases;
    `items` is the variance that they do not lower, `wanted` the one that would do if it were known surely."""
    # Student's t is wider than the normal distribution, so the latter's answer is where the search begins.
    k = max(2, math.ceil(one / (wanted - items)))
    while True:
        seeds, both = one / k, items + one / k
        free = _degrees(both, seeds, k - 1)
        if (t.ppf((1 + level) / 2, free) + t.ppf(power, free)) * math.sqrt(both) <= abs(effect):
            return k
        k += 1


# --- one task ------------------------------------------------------------------------------------------


def statistic(kind: str, data: np.ndarray) -> np.ndarray:
    """The score of resampled items: of (draws, n) the mean, of (draws, n, 2) for STS Spearman's correlation, of
    (draws, n, 1 + R) for clustering the V-measure of classes and clusters, mean over R clusterings, and for pair
    classification the average precision of R similarities for the label, the highest of them (mteb's max_ap)."""
    if data.ndim == 2:
        return data.mean(axis=1)
    if kind == "PairClassification":
        return np.max([_average_precision(data[..., 0], data[..., k]) for k in range(1, data.shape[2])], axis=0)
    if kind == "Clustering":
        classes, *runs = np.moveaxis(data.astype(int), 2, 0)
        return np.mean([_v_measure(classes, clusters) for clusters in runs], axis=0)
    x, y = (rankdata(data[..., k], axis=1) for k in (0, 1))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    spread = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    # Constant vectors have no correlation; that counts as 0.
    return np.divide((x * y).sum(axis=1), spread, out=np.zeros(len(spread)), where=spread > 0)


def _v_measure(classes: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """(draws,) V-measures of (draws, n) classes and clusters: 2 I / (H(classes) + H(clusters)), as Rosenberg and Hirschberg's."""
    draws, wide = len(classes), int(clusters.max()) + 1
    cells = (int(classes.max()) + 1) * wide
    flat = classes * wide + clusters + np.arange(draws)[:, None] * cells
    table = np.bincount(flat.ravel(), minlength=draws * cells).reshape(draws, -1, wide) / classes.shape[1]
    joint, h_class, h_cluster = (_entropy(table.sum(axis=axis)) for axis in ((), 2, 1))
    both = h_class + h_cluster
    return np.divide(2 * (both - joint), both, out=np.ones(draws), where=both > 0)


def _average_precision(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(draws,) average precisions of (draws, n) labels 0 or 1 and scores: sum of (R_k - R_{k-1}) P_k over thresholds, as
    scikit-learn's; equal scores are one threshold. 0 where no label is 1."""
    draws, n = labels.shape
    order = np.argsort(-scores, axis=1)
    labels, scores = (np.take_along_axis(v, order, 1) for v in (labels, scores))
    last = np.append(scores[:, 1:] != scores[:, :-1], np.ones((draws, 1), bool), axis=1)
    ends = np.where(last, np.arange(n), n)
    ends = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]  # where the run of equal scores ends that a pair stands in
    precision = np.take_along_axis(labels.cumsum(axis=1), ends, 1) / (ends + 1)
    found = labels.sum(axis=1)
    return np.divide((labels * precision).sum(axis=1), found, out=np.zeros(draws), where=found > 0)


def _entropy(share: np.ndarray) -> np.ndarray:
    share = share.reshape(len(share), -1)
    return -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1)


# Tasks that share their texts, item by item, are resampled alike: a text that is hard to place is so in both.
SHARED = {
    "OfflineReutersR8Clustering": "OfflineReutersR8Classification",
    "OfflineNewsgroupsClustering": "OfflineNewsgroupsClassification",
}


def has_values(task: Mapping[str, Any]) -> bool:
    """Whether a scored task has values that a bootstrap can draw from: at least two, in each part where its score is the mean
    of parts' scores. One value alone would look as if it did not vary."""
    return all(len(items) > 1 for items in task.get("parts") or [task["items"]])


def _resampled(task: Mapping[str, Any], name: str, draws: int, seed: int) -> np.ndarray:
    """(draws,) statistics of resampled items. By the task's name: the same items for every model, whatever stands beside it.
    Where the score is the mean of parts' scores, each part is drawn by itself."""
    if task.get("parts"):
        each = [{"type": task["type"], "items": items} for items in task["parts"]]
        return np.mean([_resampled(part, f"{name}/{k}", draws, seed) for k, part in enumerate(each)], axis=0)
    items, rng = np.asarray(task["items"], float), np.random.default_rng([seed, zlib.crc32(SHARED.get(name, name).encode())])
    if task.get("documents"):
        return _over_documents(task["type"], items, task["documents"], draws, rng)
    some = max(1, BLOCK // items.size)
    sizes = [min(some, draws - start) for start in range(0, draws, some)]
    return np.concatenate([statistic(task["type"], items[rng.integers(0, len(items), (n, len(items)))]) for n in sizes])


def _over_documents(kind: str, items: np.ndarray, documents: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws,) statistics whose variance is the jackknife's over the texts that the items are all pairs of.

    Pairs of one text are not independent, so texts are left out, one at a time; a draw weighs what each of them changes.
    """
    pairs = np.array(list(itertools.combinations(range(documents), 2)))
    left = np.array([statistic(kind, items[None, (pairs != k).all(axis=1)])[0] for k in range(documents)])
    moved = (left - left.mean()) * math.sqrt((documents - 1) / documents)
    return statistic(kind, items[None])[0] + rng.standard_normal((draws, documents)) @ moved


def interval(draws: Any, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap draws."""
    tail = (1 - level) / 2
    return float(np.quantile(draws, tail)), float(np.quantile(draws, 1 - tail))


def share_interval(values: Sequence[bool | float], level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of the share of true values: none of 48 is [0, 0.07], where a bootstrap would say [0, 0]."""
    found = binomtest(sum(map(bool, values)), len(values)).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def bootstrap_interval(
    items: Sequence[Any], kind: str, *, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the statistic of `items` under resampling with replacement."""
    data = np.asarray(items, float)
    picks = np.random.default_rng(seed).integers(0, len(data), (draws, len(data)))
    return interval(statistic(kind, data[picks]), level)
