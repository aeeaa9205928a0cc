"""Generators trained more than once: intervals over their trainings, and what then may be said of a claim."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from speed_core.evaluation import uncertainty
from speed_core.files import UserError, write_json
from speed_core.runner import paper_sweeps, replicates
from speed_core.study import ablation_stages, claims, embedding_stages, planning, score_stages, student_stages, verdicts
from speed_core.study.runs import open_run


def result(score: float, texts: int = 40, turn: int = 1) -> dict:
    """One task of `texts` texts; with another `turn` others of them are hard."""
    items = [score + 0.05 * (-1) ** (k // turn) for k in range(texts)]
    return {"tasks": {"t": {"type": "Retrieval", "score": sum(items) / texts, "items": items}}}


def trained(*groups: tuple[float, ...]) -> tuple[list[dict], tuple[int, ...]]:
    """Results of several trainings of the generators, with the scores of the embedding models of each."""
    return [result(s) for g in groups for s in g], tuple(map(len, groups))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    return open_run("tiny")


def test_the_value_is_the_mean_of_the_trainings_means_and_the_error_is_over_them():
    found, groups = trained((0.50, 0.52), (0.60,), (0.55, 0.56, 0.57))
    e = uncertainty.average(found)
    of_groups = uncertainty.contrast([(1, found, None)], groups=groups)
    means = np.array([51.0, 60.0, 56.0])
    assert of_groups.each == pytest.approx(tuple(means)) and of_groups.value == pytest.approx(means.mean())
    assert of_groups.sd_seeds == pytest.approx(means.std(ddof=1) / 3**0.5)
    assert (of_groups.generators, of_groups.seeds, of_groups.repeats) == (3, 6, 3) and e.repeats == 6


def test_more_embedding_models_of_the_same_generators_do_not_narrow_an_interval_over_generators():
    few, sizes = trained((0.50,), (0.60,), (0.55,))
    many, more = trained((0.50,) * 9, (0.60,) * 9, (0.55,) * 9)
    a, b = (uncertainty.contrast([(1, r, None)], groups=g) for r, g in ((few, sizes), (many, more)))
    assert b.high - b.low == pytest.approx(a.high - a.low)
    naive = uncertainty.average(many)
    assert naive.high - naive.low < 0.5 * (b.high - b.low)


@given(st.lists(st.floats(0.1, 0.9), min_size=2, max_size=6))
def test_one_group_or_one_result_a_group_is_what_it_is_without_groups(scores):
    found = [result(s) for s in scores]
    plain = uncertainty.average(found)
    assert uncertainty.contrast([(1, found, None)], groups=[len(found)]) == plain
    each = uncertainty.contrast([(1, found, None)], groups=[1] * len(found))
    assert (each.value, each.sd_seeds, each.low) == pytest.approx((plain.value, plain.sd_seeds, plain.low), abs=1e-9)


def test_the_interval_over_groups_has_students_t_of_their_number():
    found, groups = trained((0.50, 0.51), (0.60, 0.61), (0.55, 0.56))
    e = uncertainty.contrast([(1, found, None), (-1, [result(0.545)], None)], groups=groups)
    assert e.sd_items < 1e-6 and (e.high - e.low) / 2 == pytest.approx(stats.t.ppf(0.975, 2) * e.sd_seeds, rel=1e-3)


def test_groups_count_alike_in_the_error_over_texts_too():
    found = [result(0.5, turn=1)] * 4 + [result(0.5, turn=4)]
    alike = uncertainty.contrast([(1, found, None)], groups=(4, 1))
    assert alike.sd_items == pytest.approx(uncertainty.average([found[0], found[-1]]).sd_items)
    assert abs(uncertainty.average(found).sd_items - alike.sd_items) > 0.05


def test_groups_that_agree_by_chance_are_no_more_certain_than_their_embedding_models_let_them():
    found, groups = trained((0.45, 0.55), (0.44, 0.56), (0.46, 0.54))
    e = uncertainty.contrast([(1, found, None), (-1, [result(0.4)], None)], groups=groups)
    inside = np.sum([(5.0**2 + 6.0**2 + 4.0**2) * 2]) / 3
    assert np.std(e.each) < 1e-9 and e.sd_seeds == pytest.approx((inside * 1.5 / 9) ** 0.5)


def test_groups_that_do_not_hold_every_result_are_refused():
    with pytest.raises(UserError, match=r"groups \[1, 1\] hold 2 results, the models have 3"):
        uncertainty.contrast([(1, [result(0.5)] * 3, None)], groups=[1, 1])


def test_what_would_resolve_an_effect_is_told_in_trainings_of_the_generators():
    found, groups = trained((0.50, 0.52), (0.60, 0.58), (0.55, 0.56))
    e = uncertainty.contrast([(1, found, None), (-1, [result(0.545)], None)], groups=groups)
    assert str(uncertainty.required_repeats(e, 0.3)).endswith("trainings of the generators on the same texts")
    assert "generators" not in str(uncertainty.required_repeats(uncertainty.average([result(0.5), result(0.7)]), 0.3))


def claim(value: float, half: float, generators: int) -> dict:
    e = uncertainty.Estimate(value, value - half, value + half, 9, 0.2, half / 5, generators=generators)
    return verdicts.judged("S8", e, "Sr against Jr", "generators@1")


def test_an_interval_over_three_trainings_of_the_generators_may_decide_and_one_over_two_may_not():
    assert (
        claim(3.0, 1.0, 3)["verdict"] == verdicts.Verdict.SMALLER
        and claim(-3.0, 1.0, 3)["verdict"] == verdicts.Verdict.CONTRADICTED
    )
    assert "over 3 trainings of the generators (9 embedding models per arm) and the texts" in claim(3.0, 1.0, 3)["why"]
    twice = claim(3.0, 1.0, 2)
    assert twice["verdict"] == verdicts.Verdict.UNRESOLVED
    assert twice["why"].endswith("rests on two trainings of each generator: it takes generators trained three times at least")
    wide = claim(0.5, 3.0, 3)["why"]
    assert "the paper's +0.35 would need about" in wide and "three times at least" not in wide


def test_an_order_holds_where_each_step_rises_and_the_step_that_is_least_sure_decides():
    def order(*steps: tuple[float, ...]) -> uncertainty.Estimate:
        level, out = np.zeros(3), {"jr": [result(0.5)] * 3}
        for arm, step in zip(("jr_re", "sr", "sr_re"), steps, strict=True):
            level = level + np.array(step)
            out[arm] = [result(0.5 + v) for v in level]
        found = claims.compared("S6", out)
        assert found
        return found

    sure, wide, down = (0.029, 0.03, 0.031), (-0.06, 0.04, 0.14), (-0.032, -0.03, -0.028)
    assert order(sure, sure, sure).low > 0
    e = order(sure, wide, sure)
    assert e.low < 0 < e.high and e.value == pytest.approx(4.0), "a larger step may be the one that is not shown"
    fell = order(sure, down, sure)
    assert fell.high < 0 and fell.low < uncertainty.difference([result(0.5 + v) for v in down], [result(0.5)] * 3).low, (
        "one of three was chosen"
    )


def test_a_repetition_is_a_point_at_another_seed_and_never_the_run_itself(run):
    assert [p.name for p in replicates.points(run)] == ["seed=10", "seed=20"]
    assert [p.seed for p in replicates.points(open_run("tiny", seed=10))] == [20]
    assert [p.seed for p in replicates.points(open_run("tiny", seed=9))] == [20], "9, 10 and 11 are its own embedding seeds"
    one = open_run("tiny", replicates.points(run)[0].overrides, 10, variant="seed=10")
    assert embedding_stages.training_seeds(one) == [10, 11] and one.profile.synthesis.evaluation_prompts <= replicates.UNSEEN
    assert not set(one.profile.study.student.seeds) & set(run.profile.study.student.seeds), "S2's teacher students differ too"
    assert one.point and not run.point and not ablation_stages.compares_all(one) and ablation_stages.compares_all(run)
    kept = {"topics", "seeds", "junior", "senior", "revisor", "generation", "embedding", "evaluation"}
    assert all(getattr(one.profile, name) == getattr(run.profile, name) for name in kept), "nothing else is changed"
    with pytest.raises(UserError, match="generator_seeds .* give each once"):
        open_run("tiny", {"study.generator_seeds": [10, 10]})


def test_unequal_records_are_named_by_arm():
    assert replicates._counts({"jr": 168, "base": 150}, ["jr", "base"]) == "168 (base 150)"
    assert replicates._counts({"jr": 168, "sr": 168, "base": 1}, ["jr", "sr"]) == "168"


def test_study_knows_them_by_a_key_of_their_own():
    assert paper_sweeps.named([replicates.KEY]) == [] and paper_sweeps.named(["3c", replicates.KEY]) == paper_sweeps.named(["3c"])


def scored(at, arms: dict[str, float]) -> None:
    """Scores, models and data sets of `arms` at a run, as notebook 10 leaves them."""
    for arm, score in arms.items():
        how = {"at": score, "run": at.folder.name}  # else a repetition would find that of the run current
        with at.store.stage(f"synthetic-{arm}", how) as draft:
            draft.info["kept"] = 40
            draft.file("train.jsonl").write_text(arm)
        for k, seed in enumerate(embedding_stages.training_seeds(at)):
            with at.store.stage(f"embedder-{arm}-{seed}", how | {"seed": seed}) as draft:
                write_json(draft.file("training.json"), {"rows": 40})
            with at.store.stage(f"scores-{arm}-{seed}", how | {"seed": seed}) as draft:
                write_json(draft.file("scores.json"), result(score + 0.01 * k))


def test_repetitions_that_are_there_and_current_are_read_and_joined_by_arm(run, monkeypatch, capsys):
    arms = {"jr": 0.50, "jr_re": 0.52, "sr": 0.51, "sr_re": 0.55, "teacher": 0.54}
    scored(run, arms)
    assert replicates.collect(run).runs == (), "none was run"
    for shift, one in enumerate(replicates.points(run)):
        at = open_run("tiny", one.overrides, one.seed, variant=one.name)
        scored(at, {arm: s + 0.02 * shift * (arm != "teacher") for arm, s in arms.items() if shift or arm != "teacher"})
        (at.folder / "times.jsonl").write_text("")
    stale = {"seed=20"}
    monkeypatch.setattr(planning, "stale", lambda at, names: names[:1] if at.folder.name in stale else [])
    monkeypatch.setattr(student_stages, "mixed_students", lambda at: [])
    capsys.readouterr()
    assert [r.folder.name for r in replicates.collect(run).runs] == ["seed=10"]
    assert capsys.readouterr().out == "seed=20 is left out: scores-jr-20\n"
    stale.clear()
    again = replicates.collect(run)
    assert [r.folder.name for r in again.runs] == ["seed=10", "seed=20"]
    own = {arm: [a.json("scores.json") for a in score_stages.scored(run, arm)] for arm in arms}
    both, groups = again.joined(own, ("sr", "jr"))
    assert groups == (3, 2, 2) and len(both["sr"]) == 7
    assert again.joined(own, ("sr_re", "teacher"))[1] == (3, 2), "the first repetition has no teacher's models"
    counts = [embedding_stages.records(r, arms) for r in (run, *again.runs)]
    facts = again.estimates(own, counts)
    assert set(facts) == {"S1", "S5", "S6", "S7", "S8"} and "S4" not in facts, "no arm of the base model"
    assert facts["S8"]["generators"] == 3 and facts["S1"]["generators"] == 2
    assert facts["S8"]["what"].endswith(", on 40 records each time")
    counts[2] = counts[2] | {"teacher": 30}
    assert again.estimates(own, counts)["S1"]["what"].endswith(", on 40, then 40 (teacher 30) records"), "it has both arms"
    made = paper_sweeps.keep(run, facts, again.inputs, "generators")
    assert json.loads(made.file("generators.json").read_text()) == facts
    assert {k.rpartition("/")[0] for k in made.manifest["parents"]} == {"variants/seed=10", "variants/seed=20"}
    rows = claims.build(own, {"estimates": facts}, dict.fromkeys(arms, "a@1") | {"generators": "generators@1"})
    assert next(r for r in rows if r["id"] == "S8")["artifact"] == "generators@1"
    assert replicates.collect(again.runs[0]).runs == (), "a repetition has no repetitions"
    capsys.readouterr()
    assert replicates.collect(open_run("tiny", {"junior.epochs": 2})).runs == ()
    assert capsys.readouterr().out.startswith("seed=10 is left out: junior.epochs 2.0 here, 1.0 there\n")


def test_scores_that_were_never_made_are_stale_with_the_reason(run):
    assert planning.stale(run, ["scores-jr-0"]) == ["scores-jr-0: not made yet"]
    assert planning.stale(run, ["scores-of-nothing"]) == ["scores-of-nothing: no stage of this run"]


def test_the_spread_between_trainings_stands_beside_that_of_single_embedding_models():
    between, within = replicates.spread([[50.0, 52.0], [60.0], [55.0, 57.0]])
    assert between == pytest.approx(np.std([51, 60, 56], ddof=1)) and within == pytest.approx(2**0.5)
    assert np.isnan(replicates.spread([[50.0]])).all()
