"""What notebooks 10 to 12 compare: rows, names, the line over sizes, evidence and cost."""

import numpy as np
import pytest

from speed_core.evaluation import uncertainty
from speed_core.study import claims, comparisons
from speed_core.study.verdicts import Verdict
from workbook import findings


class Data:
    """An artifact as far as the comparisons read it."""

    def __init__(self, rows=(), **manifest):
        self._rows, self.manifest = list(rows), manifest

    def rows(self, name):
        assert name == "train.jsonl"
        return self._rows


def scores(*values, tasks=2, texts=30):
    """Results of one training seed for each mean score."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, (tasks, texts))
    noise -= noise.mean(1, keepdims=True)
    return [
        {"tasks": {f"t{t}": {"type": "Retrieval", "score": v, "items": list(v + noise[t])} for t in range(tasks)}} for v in values
    ]


def test_the_prompt_is_shown_to_which_the_generators_wrote_most_differently():
    def made(**queries):
        return Data([{"id": key, "query": q, "positive": "the same"} for key, q in queries.items()])

    data = {"jr": made(a="one", b="of jr"), "sr": made(a="one", b="of sr", c="x"), "base": Data(), "teacher": made(a="x", b="y")}
    assert {arm: r["query"] for arm, r in comparisons.same_prompt(data).items()} == {"jr": "of jr", "sr": "of sr"}
    assert comparisons.same_prompt({}) == comparisons.same_prompt({"teacher": made(b="y")}) == {}


def test_a_data_set_with_fewer_records_says_how_many_of_each_training():
    short = comparisons.fewer({"sr": Data(kept=48), "base": Data(kept=30), "teacher": Data(kept=60)}, 48)
    assert short == {"base": 30}
    names = comparisons.names(short, [{"base": 30, "sr": 48}, {"base": 33}, {}])
    assert names["base"] == "base model, 30/33 records" and names["sr_re"] == "Sr + Re" and "jr" not in names


def test_lines_say_value_interval_and_what_it_would_take():
    rows = [{"label": "Sr", "value": 0.5, "low": -1.0, "high": 2.0}, {"label": "base", "value": -9.0, "low": -12.0, "high": -6.0}]
    first, second = findings.row_lines(rows, {"Sr": "about 12 seeds"})
    assert first == "Sr   +0.50 [-1.00, +2.00]   to see the paper's effect: about 12 seeds" and second.endswith("-6.00]")
    assert findings.fact_lines({"S8": rows[0] | {"what": "Sr minus Jr"}}) == ["S8 Sr minus Jr: +0.50 [-1.00, +2.00]"]
    assert findings.fact_lines({}) == ["no claim is estimated here"]
    named = findings.verdict_lines(rows, lambda low, high, least: f"at least {least}")
    assert named == ["Sr: not resolved at this size; at least 1", "base: contradicted; at least 1"]


def test_what_it_takes_is_counted_in_items_and_in_records():
    assert findings.items_for(-1.0, 1.0, 100, 0.5) == 400
    assert findings.records_for(128, 0.5, 1.0) == 512


def test_the_line_its_residuals_and_its_slope_are_those_of_least_squares():
    results = {16: scores(0.40, 0.42), 32: scores(0.50, 0.49), 64: scores(0.52, 0.53)}
    fit, x = comparisons.line(results), np.log2([16, 32, 64])
    y = [r["value"] for r in fit.rows]
    slope, intercept = np.polyfit(x, y, 1)
    assert (fit.slope.value, fit.intercept) == (pytest.approx(slope), pytest.approx(intercept))
    assert [r["fit"] for r in fit.rows] == pytest.approx(list(intercept + slope * x))
    assert [r["fit"] + r["residual"] for r in fit.rows] == pytest.approx(y)
    assert all(r["fit_low"] < r["fit"] < r["fit_high"] for r in fit.rows) and [len(side) for side in fit.band] == [50, 50]
    assert fit.band[0][0] == pytest.approx(fit.rows[0]["fit_low"]) and (fit.band[0] < fit.band[1]).all()
    assert comparisons.line(dict(list(results.items())[:2])).missed == [], "a line through two points misses neither"
    assert findings.per_doubling(230, 63.2, 920, 63.4) == pytest.approx(0.1)


def test_sound_negatives_are_compared_between_senior_and_base_alone():
    half = comparisons.Negatives(np.array([True, False] * 20), np.full(40, 0.4))
    most = comparisons.Negatives(np.array([True] * 36 + [False] * 4), np.full(40, 0.3))
    fact = comparisons.sound_negatives_gain({"sr": most, "base": half, "jr": half})["S18"]
    assert fact["value"] == pytest.approx(40.0) and 0 < fact["low"] < 40 < fact["high"] and "senior (40)" in fact["what"]
    assert comparisons.sound_negatives_gain({"sr": most}) == {}
    assert str(half).startswith("sound 0.50 [") and str(half).endswith("cosine to the negative 0.40")


def test_the_cost_leaves_brainstorming_out_as_the_paper_does():
    cost = comparisons.Cost({"brainstorm": 64, "seed": 40, "revision": 10}, {"brainstorm": 900, "seed": 500, "revision": 100}, 25)
    assert (cost.counted, cost.read) == (50, 600) and cost.per_record["this run"] == (2.0, 24.0)
    assert cost.lines()[-1] == "without brainstorming 50 calls, 600 tokens for 25 records"
    assert "SPEED: 25K calls, 10M" in cost.lines()[1] and "not counted" in cost.lines()[0]


def test_what_the_map_holds_back_is_told_from_what_it_decides():
    rows = [
        {"id": "S13", "claim": "c", "low": 0.2, "high": 1.0, "verdict": Verdict.UNRESOLVED},
        {"id": "S4", "claim": "d", "low": 0.2, "high": 1.0, "verdict": Verdict.SMALLER},
        {"id": "E4", "claim": "e", "low": 1.2, "high": 2.0, "verdict": Verdict.CONTRADICTED},
        {"id": "S22", "claim": "f", "low": 0.9, "high": 1.0, "verdict": Verdict.UNRESOLVED},
        {"id": "S21", "claim": "g", "low": "", "high": "", "verdict": Verdict.IMPOSSIBLE},
    ]
    assert findings.held_back(rows) == ["S13  [+0.2, +1.0] alone holds: c"]
    assert findings.held_back(rows[1:]) == ["none"]
    assert findings.decided(rows) == [(0.2, 1.0, 1, "S4"), (1.2, 2.0, 0, "E4")]
    for low, high, expected, claim in findings.decided(rows):
        assert findings.in_a_word(low, high, expected) == {"S4": "holds", "E4": "fails"}[claim]


def test_the_evidence_of_a_run_is_read_under_the_present_ids():
    assert claims.present_ids({"G1": 1, "G2": 2}) == {"G1b": 1, "G2": 2}
    known = {c.id for c in claims.CLAIMS}
    assert set(claims.RENAMED.values()) <= known and not set(claims.RENAMED) & known
    assert uncertainty.claim_evidence(1.0, 0.5, 1.5, "x")["seeds"] == 1
