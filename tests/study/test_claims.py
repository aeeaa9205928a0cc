"""Verdicts over many claims: the correction for their number, equivalence, and treatments that did not act."""

import math
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import t

from speed_core.data import teacher
from speed_core.data.prompts import parse_prompt_attributes, text_digest
from speed_core.evaluation import uncertainty
from speed_core.evaluation.uncertainty import Estimate
from speed_core.study import claims, gates
from speed_core.study.runs import open_run
from speed_core.study.verdicts import Verdict


def estimate(value: float, error: float, free: float = math.inf, seeds: int = 5) -> Estimate:
    """A difference with its 95% interval at `free` degrees of freedom."""
    half = float(t.ppf(0.975, free)) * error
    return Estimate(value, value - half, value + half, seeds, error, 0.0)


numbers = st.floats(-20, 20, allow_nan=False)
errors = st.floats(0.01, 10)
freedom = st.sampled_from([1.0, 2.0, 4.0, 17.5, 300.0, math.inf])


@given(numbers, errors, freedom)
def test_p_is_below_five_percent_exactly_where_the_interval_leaves_zero_out(value, error, free):
    e = estimate(value, error, free)
    assume(min(abs(e.low), abs(e.high)) > 1e-3 * error)
    assert (e.p_value() < 0.05) == uncertainty.leaves_zero_out(e.low, e.high)


@given(numbers, errors, freedom, st.floats(0.1, 5))
def test_a_difference_is_within_a_margin_exactly_where_its_90_percent_interval_is(value, error, free, margin):
    half = float(t.ppf(0.95, free)) * error
    assume(abs(abs(value) + half - margin) > 1e-3)
    e = estimate(value, error, free)
    assert e.within(margin) == (-margin < value - half and value + half < margin)
    assert e.within(margin) == (abs(value) < margin and e.p_value(0, margin) < 0.05)


def test_holm_gives_the_smallest_p_the_whole_correction_and_keeps_the_order():
    adjusted = uncertainty.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert uncertainty.holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0} and uncertainty.holm({}) == {}


@given(st.dictionaries(st.integers(), st.floats(0, 1), max_size=12))
def test_a_correction_never_lowers_a_p_and_never_turns_two_around(p):
    adjusted = uncertainty.holm(p)
    assert all(p[k] <= adjusted[k] <= 1 for k in p)
    assert all(adjusted[a] <= adjusted[b] for a in p for b in p if p[a] < p[b])


def rows(estimates: dict[str, Estimate], **facts: object) -> dict[str, dict[str, object]]:
    known = {k: e.row(k) | {"what": "measured", "source": "x"} for k, e in estimates.items()}
    return {r["id"]: r for r in claims.build({}, {"estimates": known, **facts}, {"x": "x@1"})}


def test_one_of_many_tests_is_held_back_and_both_verdicts_are_told():
    alone, weak = rows({"G7": estimate(5.0, 2.0)})["G7"], {k: estimate(0.0, 2.0) for k in ("G2", "G3", "G5", "G9")}
    assert alone["verdict"] == Verdict.SMALLER
    together = rows({"G7": estimate(5.0, 2.0), **weak})["G7"]
    assert together["verdict"] == Verdict.UNRESOLVED
    assert "alone it would be smaller scale, same direction (p = 0.012), among the 5 tests" in together["why"]
    assert "Holm: p = 0.06" in together["why"]
    known = {k: e.row(k) | {"what": "measured", "source": "x"} for k, e in {"G7": estimate(5.0, 2.0), **weak}.items()}
    p = claims.p_values({}, {"estimates": known}, {"x": "x@1"})
    assert set(p) == set(known) and p["G7"] == pytest.approx((0.0124, 5 * 0.0124), rel=0.01)
    # The claims of another paper do not count.
    assert rows({"G7": estimate(5.0, 2.0), "E2": estimate(0.0, 2.0)})["G7"]["verdict"] == Verdict.SMALLER


def test_a_small_difference_is_equivalent_and_says_what_that_means_for_the_papers():
    small = rows({"G1b": estimate(0.3, 0.3), "E3": estimate(0.1, 0.3), "S17": estimate(0.1, 0.3)})
    assert small["G1b"]["verdict"] == small["E3"]["verdict"] == Verdict.EQUIVALENT
    assert "neither confirms nor refutes the paper's +0.27" in small["G1b"]["why"]
    assert "the interval leaves +4.2 out" in small["E3"]["why"] and "neither" not in small["E3"]["why"]
    assert rows({"E3": estimate(0.1, 0.3, seeds=1)})["E3"]["verdict"] == Verdict.UNRESOLVED, "one seed decides nothing"


def test_a_claim_behind_a_closed_gate_is_not_judged_and_an_open_gate_changes_nothing():
    measured = {"G1b": estimate(5.0, 1.0), "E3": estimate(5.0, 1.0)}
    shut = rows(measured, gates={"students": gates.Gate(False, "training moves the students by 0.1")})
    assert shut["G1b"]["verdict"] == Verdict.INACTIVE and shut["E3"]["verdict"] == Verdict.SMALLER
    assert "not judged (smaller scale, same direction by its interval), because training moves" in shut["G1b"]["why"]
    assert rows(measured, gates={"students": gates.Gate(True, "")})["G1b"]["verdict"] == Verdict.SMALLER
    assert shut["S7"]["verdict"] == Verdict.UNTESTED, "what was not measured stays so"


def test_a_blind_readers_ranks_decide_where_they_cover_every_answer():
    read = [r for r in teacher.recorded_rows("judgements") if r["list"] == "unseen"]
    prompts = [parse_prompt_attributes(r["kind"], r["task"], r["prompt"]) for r in read]
    answers = [(q, *({"raw": text} for text in r["candidates"][:2])) for q, r in zip(prompts, read, strict=True)]
    better = [r["ranks"][0] < r["ranks"][1] for r in read]
    assert [w == 1 for w in gates._read(answers)] == better and any(better) and not all(better)
    assert gates._read([*answers[:3], (prompts[3], {"raw": "another text"}, answers[3][2])]) == []


def test_recorded_judgements_rank_every_candidate_and_equal_texts_alike():
    rows_ = teacher.recorded_rows("judgements")
    assert Counter(r["list"] for r in rows_) == {"root": 120, "unseen": 120, "root, tiny": 24}
    assert all(text_digest(r["prompt"]) == r["prompt_digest"] for r in rows_)
    for r in rows_:
        assert len(r["ranks"]) == len(r["candidates"]) and sorted(set(r["ranks"])) == list(range(1, max(r["ranks"]) + 1))
        assert len({(text, rank) for text, rank in zip(r["candidates"], r["ranks"], strict=True)}) == len(set(r["candidates"]))


def test_the_gates_of_the_recorded_run_are_measured_on_its_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    monkeypatch.delenv("SPEED_SHIPPED")
    run = open_run("tiny")
    found = gates.gates(run)
    assert set(found) == {"senior", "revisor"}, "students are scored by the run itself"
    raw, revised = ({e["record"]: e for e in run.store.need(n).rows() if e["status"] == "ok"} for n in ("raw", "revised"))
    changed = sum(k in revised and revised[k]["raw"] != e["raw"] for k, e in raw.items()) / len(raw)
    assert f"changes {changed:.2f} of {len(raw)} records" in found["revisor"].said
    assert found["senior"].said.startswith("the senior wins 0.")
