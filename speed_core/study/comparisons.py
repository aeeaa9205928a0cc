"""What notebooks 10 to 12 compare: data sets, sizes of one data set, hard negatives, and the evidence behind the claim map.

The functions join scores and names into rows that figures draw; the stages that make these scores are in embedding_stages.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from speed_core.evaluation import evaluate, uncertainty
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run
from speed_core.study import claims, embedding_stages, gates, generation_stages, paper_values
from speed_core.study.claims import Verdict
from speed_core.study.embedding_stages import Arm

DATA_SETS = {
    Arm.JR_RE: "Jr + Re",
    Arm.SR: "Sr",
    Arm.SR_RE: "Sr + Re",
    Arm.BASE: "base model",
    Arm.TEACHER: "teacher",
}  # but Jr, which the others are compared with
TABLE1 = {
    "base": "base model's records",
    "teacher": "teacher's examples",
    "sr_re": "Sr + Re",
    "guided": "all synthetic data",
}
UNTRAINED = "untrained"
Results = Mapping[str, Sequence[Any]]  # arm -> what `evaluate.evaluate` returned, one a training seed


# --- 10: the data sets ----------------------------------------------------------------------------


def same_prompt(data: Mapping[str, Artifact]) -> dict[str, dict[str, Any]]:
    """{arm: record} of the prompt that the generators of `data` answered with the most different records, the first of several; the
    teacher answered other prompts."""
    rows = {arm: {r["id"]: r for r in a.rows("train.jsonl")} for arm, a in data.items() if arm != Arm.TEACHER}
    found = {key: {arm: of[key] for arm, of in rows.items() if key in of} for of in rows.values() for key in of}

    def different(key: str) -> tuple[int, int]:
        return len({(r["query"], r["positive"]) for r in found[key].values()}), len(found[key])

    most = max(found, key=different, default=None)
    return found[most] if most else {}


def fewer(data: Mapping[str, Artifact], equal: int) -> dict[str, int]:
    """{arm: records} of the data sets that hold fewer than the `equal` records that are compared."""
    return {arm: n for arm, a in data.items() if (n := a.manifest["kept"]) < equal}


def names(short: Iterable[str], counts: Sequence[Mapping[str, int]]) -> dict[str, str]:
    """{arm: its name in the figure of Table 2}; of the arms in `short` with the records behind it ("base model, 150/156 records").

    `counts`: {arm: records that its models learned from}, of the profile's own run and of each repetition.
    """
    many = {arm: "/".join(str(n[arm]) for n in counts if arm in n) for arm in short}
    return {arm: f"{name}, {many[arm]} records" if arm in many else name for arm, name in DATA_SETS.items()}


def published(names: Mapping[str, str]) -> dict[str, float]:
    """{label: the paper's difference to Jr} for the figure of Table 2; `names`: {arm: label}."""
    return {names[arm]: value for arm, value in paper_values.MINUS_JUNIOR.items()}


def category_rows(run: Run) -> tuple[list[dict[str, Any]], list[Artifact]]:
    """(rows {category, model, paper, value, low, high, ...}, artifacts) of the figure of Table 1: the mean score of each category for
    the untrained model and for `TABLE1`. No rows without the untrained model's scores."""
    made, before = embedding_stages.already_scored(run, list(TABLE1)), run.store.made("scores-untrained")
    models = {UNTRAINED: [before] if before else []} | {TABLE1[arm]: of for arm, of in made.items()}
    rows: list[dict[str, Any]] = []
    for model, of in models.items() if before else ():
        scores = [a.json("scores.json") for a in of]
        for kind in (*dict.fromkeys(t["type"] for t in scores[0]["tasks"].values()), None):
            word = evaluate.CATEGORIES.get(kind, kind) if kind else "Avg"
            e = uncertainty.average(scores, (kind,) if kind else None).row(f"{word}, {model}")
            rows.append({"category": word, "model": model, "paper": paper_values.SPEED_SCORES.get(word, "")} | e)
    return rows, [a for of in models.values() for a in of]


def resolved(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels of the rows {label, low, high} whose interval leaves zero out, on either side."""
    return [r["label"] for r in rows if uncertainty.leaves_zero_out(r["low"], r["high"])]


def row_lines(rows: Sequence[Mapping[str, Any]], needs: Mapping[str, str] | None = None) -> list[str]:
    """A line for each difference {label, value, low, high}; `needs`: {label: what would resolve the paper's effect}."""
    more = {label: f"   to see the paper's effect: {words}" for label, words in (needs or {}).items()}
    width = max((len(r["label"]) for r in rows), default=0)
    return [f"{r['label']:{width}} {_interval(r)}{more.get(r['label'], '')}" for r in rows]


def verdict_lines(rows: Iterable[Mapping[str, Any]], at_least: Callable[[float, float, float], str]) -> list[str]:
    """A line for each difference {label, low, high}: the verdict that it is positive, and by `at_least(low, high, 1)` a point at least."""
    words = ((r["label"], claims.verdict(r["low"], r["high"]), at_least(r["low"], r["high"], 1)) for r in rows)
    return [f"{label}: {positive}; {a_point}" for label, positive, a_point in words]


def items_for(low: float, high: float, items: int, effect: float) -> float:
    """How many items give a half-width of `effect`, where `items` give the interval [low, high]."""
    return items * ((high - low) / 2 / effect) ** 2


def fact_lines(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each claim of {claim: evidence}; one that says so where there is none."""
    if not facts:
        return ["no claim is estimated here"]
    return [f"{claim} {f['what']}: {_interval(f)}" for claim, f in facts.items()]


def _interval(r: Mapping[str, Any]) -> str:
    return f"{r['value']:+.2f} [{r['low']:+.2f}, {r['high']:+.2f}]"


# --- 10: hard negatives (S18) ---------------------------------------------------------------------


@dataclass(frozen=True)
class Negatives:
    """The hard negatives of one data set under the guide, a value for each record that has one.

    `sound`: the query is nearer to its positive than to its negative. `cosine`: how near the query is to the negative.
    """

    sound: np.ndarray  # (n,) of bool
    cosine: np.ndarray  # (n,)

    def __str__(self) -> str:
        low, high = uncertainty.bootstrap_interval(self.sound.tolist(), "mean")
        return f"sound {self.sound.mean():.2f} [{low:.2f}, {high:.2f}], cosine to the negative {self.cosine.mean():.2f}"


def hard_negatives(run: Run, data: Mapping[str, Artifact]) -> dict[str, Negatives]:
    """{arm: its hard negatives as the guide sees them}, of data sets with two records at least that have one."""
    model, out = generation_stages.guide(run), {}
    for arm, artifact in data.items():
        kept = [r for r in artifact.rows("train.jsonl") if r["negative"]]
        if len(kept) > 1:
            q, p, n = (model.encode([r[c] for r in kept]) for c in ("query", "positive", "negative"))
            out[arm] = Negatives((q * p).sum(1) > (q * n).sum(1), (q * n).sum(1))
    return out


def sound_negatives_gain(found: Mapping[str, Negatives], *, draws: int = 2000) -> dict[str, dict[str, Any]]:
    """{"S18": evidence}: the senior's share of sound negatives minus the base model's, in points, with an interval over the texts.
    Empty without one of both."""
    if not {Arm.BASE, Arm.SR} <= set(found):
        return {}
    rng, (a, b) = np.random.default_rng(0), (found[Arm.SR].sound, found[Arm.BASE].sound)
    low, high = uncertainty.interval([rng.choice(a, len(a)).mean() - rng.choice(b, len(b)).mean() for _ in range(draws)])
    what = f"share of sound negatives under the guide, senior ({len(a)}) minus base model ({len(b)})"
    gain = float(a.mean() - b.mean())
    fact = uncertainty.claim_evidence(100 * gain, 100 * low, 100 * high, what)
    return {"S18": fact | {"source": "hard-negatives"}}


# --- 11: score against size -------------------------------------------------------------------------


def per_doubling(small: float, score_small: float, large: float, score_large: float) -> float:
    """Points per doubling between two sizes of the training set."""
    return float((score_large - score_small) / np.log2(large / small))


def records_for(records: float, slope: float, gain: float) -> float:
    """How many records score `gain` points more than `records` do, at `slope` points per doubling."""
    return float(records * 2 ** (gain / slope))


@dataclass(frozen=True)
class Line:
    """The least-squares line of the mean score on log2 of the number of records.

    `rows`: {records, value, low, high, fit, fit_low, fit_high, residual, residual_low, residual_high, ...}, one a size.
    `band`: the ends of the line's interval at 50 sizes from the smallest to the largest, evenly spaced in the logarithm.
    """

    slope: uncertainty.Estimate  # points per doubling
    intercept: float
    rows: list[dict[str, Any]]
    band: list[np.ndarray]

    @property
    def missed(self) -> list[int]:
        """The sizes that the line misses by more than the noise; a line through two points misses neither."""
        out = [r["records"] for r in self.rows if r["residual_low"] > 0 or r["residual_high"] < 0]
        return out if len(self.rows) > 2 else []


def line(results: Mapping[int, Sequence[Any]]) -> Line:
    """The line through the scores {records: results of the training seeds}, its band and its residuals.

    The line at a size is a weighted sum of the scores, and so is what it leaves over there: each has its interval (`contrast`).
    """
    sizes, x = list(results), np.log2(list(results))
    distance = ((x - x.mean()) ** 2).sum()

    def weights_at(g: float) -> np.ndarray:
        return 1 / len(x) + (g - x.mean()) * (x - x.mean()) / distance

    def weighted(weights: np.ndarray) -> uncertainty.Estimate:
        return uncertainty.contrast([(float(w), results[n], None) for w, n in zip(weights, sizes, strict=True)], draws=200)

    rows = [{"records": n} | uncertainty.average(found).row(str(n)) for n, found in results.items()]
    for k, r in enumerate(rows):
        e, left = weighted(weights_at(x[k])), weighted(np.eye(len(x))[k] - weights_at(x[k]))
        r |= {"fit": e.value, "fit_low": e.low, "fit_high": e.high}
        r |= {"residual": left.value, "residual_low": left.low, "residual_high": left.high}
    slope = uncertainty.slope(results)
    grid = np.log2(np.geomspace(min(sizes), max(sizes), 50))
    ends = np.array([(e.low, e.high) for e in (weighted(weights_at(g)) for g in grid[::7])]).T
    intercept = float(np.mean([r["value"] for r in rows]) - slope.value * x.mean())
    return Line(slope, intercept, rows, [np.interp(grid, grid[::7], side) for side in ends])


def scaling_evidence(run: Run, results: Mapping[int, Sequence[Any]], fit: Line) -> dict[str, dict[str, Any]]:
    """{"S17": evidence}: the slope, with three sizes or more the bend, and in words how many optimizer steps each size took."""
    settings, sizes = run.profile.embedding, list(results)
    steps = [int(np.ceil(np.ceil(n / settings.batch) * settings.epochs)) for n in sizes]
    what = f"points per doubling over {'/'.join(map(str, sizes))} records, in {'/'.join(map(str, steps))}"
    what += " optimizer steps at one learning rate, so more records are more steps"
    if fit.missed:
        what += f" (the line misses {' and '.join(map(str, fit.missed))} by more than the noise)"
    fact = fit.slope.row("S17") | {"what": what, "source": "scaling"}
    if len(sizes) > 2:
        fact["bend"] = uncertainty.curvature(results).row("bend")
    return {"S17": fact}


# --- 12: the evidence -------------------------------------------------------------------------------

NOTED = ("scaling", "guided-gain", "mixed", "hard-negatives", "second-pass", "judge-check", "study", "generators", "mask")


@dataclass(frozen=True)
class Cost:
    """What a run asked of its teacher, by purpose; `counted` and `read` leave brainstorming out, as the paper does."""

    calls: dict[str, int]
    tokens: dict[str, int]
    records: int  # kept for training

    @property
    def counted(self) -> int:
        return sum(self.calls.values()) - self.calls["brainstorm"]

    @property
    def read(self) -> int:
        return sum(self.tokens.values()) - self.tokens["brainstorm"]

    def lines(self) -> list[str]:
        """A line for each purpose, with SPEED's total beside it, and one for the sum."""
        paper = {k: f"{calls // 1000}K calls, {tokens // 1_000_000}M" for k, (calls, tokens) in paper_values.SPEED_CALLS.items()}
        out = [
            f"{k:11} {n:5} calls, {self.tokens[k]:8,} tokens (SPEED: {paper.get(k, 'not counted')})"
            for k, n in self.calls.items()
        ]
        return [*out, f"without brainstorming {self.counted} calls, {self.read:,} tokens for {self.records} records"]

    @property
    def per_record(self) -> dict[str, tuple[float, float]]:
        """{who: (teacher calls, teacher tokens) per training record}, of this run and of both papers."""
        return {
            "this run": (self.counted / self.records, self.read / self.records),
            "paper: SPEED": paper_values.SPEED_A_RECORD,
            "paper: E5-mistral": paper_values.E5_A_RECORD,
        }


def cost(run: Run) -> Cost:
    """Table 5 of a run (`generation_stages.teacher_use`)."""
    use = generation_stages.teacher_use(run)
    tokens = {purpose: n["input"] + n["output"] for purpose, n in use.items()}
    return Cost({purpose: n["calls"] for purpose, n in use.items()}, tokens, run.store.need("synthetic").manifest["kept"])


@dataclass(frozen=True)
class Evidence:
    """What verdicts rest on: the arguments of `claims.build`, and the artifacts that they come from."""

    scores: dict[str, list[Any]]
    facts: dict[str, Any]
    digests: dict[str, str]
    records: dict[str, int]
    inputs: list[Artifact] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """The claim map: a row for each claim, with its verdict."""
        return claims.build(self.scores, self.facts, self.digests, self.records)

    def p_values(self) -> dict[str, tuple[float, float]]:
        """{claim: (its p alone, its p among the tests of its paper)} of the claims that are tested (`claims.p_values`)."""
        return claims.p_values(self.scores, self.facts, self.digests)


def evidence(run: Run, spent: Cost) -> Evidence:
    """Everything that a run knows about the claims: scores of all arms, what notebooks noted down (`NOTED`), and its cost."""
    arms = ["guided", "plain", "bare", *embedding_stages.ARMS]
    found = {arm: embedding_stages.scored(run, arm) for arm in arms}
    found[UNTRAINED] = [run.store.need("scores-untrained")]
    data, noted = run.store.need("synthetic"), {n: a for n in NOTED if (a := run.store.get(n))}
    digests = {arm: " ".join(f"{a.name}@{a.digest[:8]}" for a in made) for arm, made in found.items()}
    digests |= {a.name: f"{a.name}@{a.digest[:8]}" for a in (*noted.values(), data)}
    kept = data.manifest["kept"]
    facts: dict[str, Any] = {"kept": kept, "valid": kept + data.manifest["dropped"], "estimates": {}}
    facts["calls"] = {"calls": spent.counted, "tokens": spent.read, "records": kept, "share": spent.counted / kept}
    for name in [n for n in noted if n != "mask"]:
        rows = claims.present_ids(noted[name].json(f"{name}.json"))
        facts["estimates"] |= {k: {"source": name} | f for k, f in rows.items() if k in {c.id for c in claims.CLAIMS}}
    if "mask" in noted:
        facts["mask"] = noted["mask"].json("mask.json")
    scores = {arm: [a.json("scores.json") for a in made] for arm, made in found.items()}
    facts["gates"] = gates.gates(run)
    inputs = [a for made in found.values() for a in made] + [data, *noted.values()]
    return Evidence(scores, facts, digests, embedding_stages.records(run, arms), inputs)


SHARES = ("S3", "S22")  # the numbers of these claims are shares of calls and of records, not differences
WORDS = {Verdict.SMALLER: "holds", Verdict.CONTRADICTED: "fails", Verdict.UNRESOLVED: "open"}


def in_a_word(low: float, high: float, expected: int = 1) -> str:
    """The rule of `claims.verdict`: "holds", "fails" or "open"."""
    return WORDS[claims.verdict(low, high, expected)]


def held_back(rows: Iterable[Mapping[str, Any]], rule: Callable[[float, float, int], str] = in_a_word) -> list[str]:
    """A line for each claim that its interval alone would decide and the map does not."""
    out = []
    for r in _differences(rows):
        word = rule(r["low"], r["high"], claims.EXPECTED.get(r["id"], 1))
        if word != "open" and r["verdict"] in (Verdict.UNRESOLVED, Verdict.EQUIVALENT, Verdict.INACTIVE):
            out.append(f"{r['id']:4} [{r['low']:+}, {r['high']:+}] alone {word}: {r['claim']}")
    return out or ["none"]


def decided(rows: Iterable[Mapping[str, Any]]) -> list[tuple[float, float, int, str]]:
    """(low, high, expected sign, claim) of the claims that are differences and have a verdict in the map."""
    open_ = (Verdict.UNRESOLVED, Verdict.EQUIVALENT, Verdict.INACTIVE, Verdict.IMPOSSIBLE, Verdict.UNTESTED)
    found = [r for r in _differences(rows) if r["verdict"] not in open_]
    return [(r["low"], r["high"], claims.EXPECTED.get(r["id"], 1), r["id"]) for r in found]


def _differences(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [r for r in rows if r["low"] != "" and r["id"] not in SHARES]
