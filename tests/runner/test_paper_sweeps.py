"""The sweeps: which points a profile gets, and what they say of a claim. tests/test_notebooks.py runs one."""

import csv
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

import captions
from speed_core.data import asking, teacher
from speed_core.evaluation import uncertainty
from speed_core.files import UserError, write_json, write_jsonl
from speed_core.plots import figures
from speed_core.runner import paper_sweeps
from speed_core.store.artifacts import notebook_number
from speed_core.study import ablation_stages, claims, generation_stages, score_stages, student_stages, verdicts
from speed_core.study.runs import open_run

ROOT = Path(__file__).resolve().parents[2]


def scores(mean: float) -> list[dict]:
    """Three training seeds of a model with one task of forty texts."""
    return [
        {"tasks": {"t": {"type": "Clustering", "score": mean + d, "items": [mean + d] * 40}}} for d in (-0.001, 0.0, 0.001)
    ]  # fmt: skip


def noisy(mean: float, key: int = 0, spread: float = 0.02) -> list[dict]:
    """Three training seeds of a model with one task of forty texts, which differ by model and seed."""
    shift = [spread * x for x in ((-1.0, 0.2, 0.8), (0.9, -1.1, 0.2), (-0.3, 1.1, -0.8), (0.1, 0.9, -1.0))[key]]
    each = [[mean + d + 0.1 * (-1) ** (k * (key + 1)) for k in range(40)] for d in shift]
    return [{"tasks": {"t": {"type": "Retrieval", "score": sum(i) / 40, "items": i}}} for i in each]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    return open_run("tiny")


def by_label(label: str) -> paper_sweeps.Sweep:
    return next(s for s in paper_sweeps.SWEEPS if s.label == label)


def test_every_sweep_has_the_profiles_own_value_and_another_and_a_claim_of_the_map(run):
    known = {key for key, *_ in claims.CLAIMS}
    for sweep in paper_sweeps.SWEEPS:
        values = sweep.points(run)
        assert len(values) == len(set(values)) > 1 and sweep.claim in known
        numbers = [v for v in values if not isinstance(v, str | bool)]
        assert numbers == sorted(numbers)


def test_another_base_model_is_named_after_the_profiles_own(run):
    own = run.profile.models.generator
    assert by_label("base model").points(run) == [own, own + "[:12]"]
    assert paper_sweeps.named_value(own + "[:12]") == "gemma-3-270m[:12]" and paper_sweeps.named_value(0.5) == "0.5"


def test_a_switch_is_on_and_then_off_and_its_claim_says_how_much_it_moves(run):
    truncated = by_label("topics truncated")
    assert truncated.points(run) == [True, False] and list(map(paper_sweeps.named_value, (True, False))) == ["yes", "no"]
    assert paper_sweeps.point(run, truncated, False).overrides["topics.truncate"] is False
    assert truncated.points(open_run("tiny", {"topics.truncate": False})) == [True, False], "the sign of the claim stays"
    found = paper_sweeps.estimate(truncated, {True: scores(0.5), False: scores(0.48)})
    assert found["value"] == pytest.approx(2.0)
    deep = [p for p in generation_stages.topics(run)[0] if p.count("/") >= run.profile.topics.max_depth]
    assert f"{len(deep)} of the {len(generation_stages.topics(run)[0])} data topics" in found["what"]


def test_the_recorded_teacher_answers_for_whole_topic_paths_and_the_seed_examples_stay_the_same(run):
    whole = open_run("tiny", {"topics.truncate": False})
    asked = generation_stages.brainstorm_prompts(whole)
    assert max(q.topic.count("/") for q in asked) == 7, "the deepest path of the list"
    answers = [teacher.RecordedTeacher().submit(q, "brainstorm").result().text for q in asked]
    assert all(asking.parse_tasks(a, q.kind, "stop").status == "ok" for a, q in zip(answers, asked, strict=True))
    assert [q.id for q in generation_stages.seed_plan(whole)] == [q.id for q in generation_stages.seed_plan(run)]


def test_a_data_set_beside_table_2_takes_part_from_half_of_the_compared_records_on(run):
    assert ablation_stages.ablation_arms(run) == list(ablation_stages.ARMS), "what is not made yet is planned"
    for arm, kept in {"jr": 40, "jr_re": 40, "sr": 32, "sr_re": 32, "base": 16, "teacher": 15}.items():
        with run.store.stage(f"synthetic-{arm}", {}) as draft:
            draft.file("train.jsonl").write_text(arm)
            draft.info["kept"] = kept
    assert ablation_stages.ablation_size(run) == 32 and ablation_stages.ablation_arms(run) == [*ablation_stages.TABLE2, "base"]
    large = open_run("tiny", {"embedding.batch": 32, "embedding.micro_batch": 32})
    assert ablation_stages.ablation_arms(large) == list(ablation_stages.TABLE2), "a training needs a batch"


def test_students_of_two_mixtures_learn_equally_many_synthetic_records(run):
    assert {s.arm for s in student_stages.mixed_students(run)} == set(student_stages.MIXED)
    assert student_stages.mixed_students(open_run("tiny", {"study.arms": ["sr_re"]})) == [], "a point of a sweep makes one arm"
    for arm, kept in {"jr": 60, "jr_re": 60, "sr": 48, "sr_re": 48, "teacher": 23}.items():
        with run.store.stage(f"synthetic-{arm}", {}) as draft:
            draft.file("train.jsonl").write_text(arm)
            draft.info["kept"] = kept
    assert student_stages.mixed_size(run) == 23


def test_with_labelled_data_the_teachers_records_are_claimed_to_win_by_a_tenth_of_a_point():
    def said(value, half):
        found = {"value": value, "low": value - half, "high": value + half, "seeds": 3, "sd_items": 1.0, "sd_seeds": 1.0}
        fact = found | {"what": "w", "source": "mixed"}
        return next(r for r in claims.build({}, {"estimates": {"S2": fact}}, {"mixed": "m@1"}) if r["id"] == "S2")

    assert "the paper's -0.1 would need" in said(-0.5, 1.0)["why"]
    for value in (-3.0, 3.0):
        assert (
            said(value, 1.0)["verdict"] == verdicts.Verdict.UNRESOLVED
            and "generators trained three times at least" in said(value, 1.0)["why"]
        )


def test_sweeps_are_chosen_by_key_and_one_key_may_name_several():
    assert [s.label for s in paper_sweeps.named(["E4", "T4"])] == ["LoRA rank", "pooling", "base model"]
    assert [s.label for s in paper_sweeps.named(["T3"])] == ["tasks per topic", "topics truncated"]
    assert paper_sweeps.named([]) == list(paper_sweeps.SWEEPS)
    with pytest.raises(UserError, match="'4z': unknown; use 3a, 3b"):
        paper_sweeps.named(["4z"])


def test_a_hump_needs_both_ends_and_is_the_best_inner_value_minus_an_end():
    temperature = by_label("temperature")
    assert paper_sweeps.estimate(temperature, {0.3: scores(0.4), 1.0: scores(0.5)}) is None
    found = paper_sweeps.estimate(temperature, {0.3: scores(0.40), 1.0: scores(0.50), 1.3: scores(0.44)})
    assert found["value"] == pytest.approx(6.0) and "at 1 minus at 1.3, the closer end" in found["what"]
    rising = paper_sweeps.estimate(temperature, {0.3: scores(0.40), 1.0: scores(0.50), 1.3: scores(0.51)})
    assert rising["value"] < 0, "a curve that rises and levels off has no optimum inside"


def test_a_poor_inner_value_does_not_hide_the_best_one_and_the_interval_allows_for_the_choice():
    temperature = by_label("temperature")
    found = paper_sweeps.estimate(temperature, {0.3: scores(0.50), 0.7: scores(0.60), 1.0: scores(0.35), 1.3: scores(0.45)})
    assert found["value"] == pytest.approx(10.0) and "at 0.7 minus at 0.3" in found["what"]
    assert found["level"] == 0.975 and "97.5%, as 0.7 was chosen" in found["what"]
    one = paper_sweeps.estimate(temperature, {0.3: noisy(0.50), 0.7: noisy(0.60, 1), 1.3: noisy(0.45, 2)})
    two = paper_sweeps.estimate(temperature, {0.3: noisy(0.50), 0.7: noisy(0.60, 1), 1.0: noisy(0.35, 3), 1.3: noisy(0.45, 2)})
    assert two["value"] == one["value"] and two["high"] - two["low"] > 1.05 * (one["high"] - one["low"])


def test_an_optimum_inside_has_to_be_above_the_end_that_is_less_clearly_below():
    found = {0.3: noisy(0.40), 1.0: noisy(0.50, 1), 1.3: [r for r, _ in zip(noisy(0.39, 2, spread=0.3), range(3), strict=True)]}
    e = paper_sweeps.estimate(by_label("temperature"), found)
    assert "minus at 1.3" in e["what"] and e["low"] < 0, "1.3 has the lower mean, and is hardly known"


def test_a_best_value_at_an_end_contradicts_no_optimum():
    falls = uncertainty.difference(scores(0.5), scores(0.6))
    for key in verdicts.INTERIOR_OPTIMUM:
        row = verdicts.judged(key, falls, "x", "a@1")
        assert falls.high < 0 and row["verdict"] == verdicts.Verdict.UNRESOLVED and "outside of this range" in row["why"]


def test_what_falls_is_the_first_value_against_all_others():
    found = paper_sweeps.estimate(by_label("tasks per topic"), {1: scores(0.5), 3: scores(0.48), 5: scores(0.44)})
    assert found["value"] == pytest.approx(4.0)


def test_of_two_sweeps_for_one_claim_the_larger_effect_speaks():
    rank, pooling = by_label("LoRA rank"), by_label("pooling")
    found = paper_sweeps.estimates(
        {rank: {4: scores(0.5), 64: scores(0.501)}, pooling: {"last": scores(0.5), "mean": scores(0.47)}}
    )
    assert set(found) == {"E4"} and found["E4"]["value"] == pytest.approx(-3.0)


def test_a_claim_of_no_difference_holds_only_when_the_whole_interval_is_small():
    assert verdicts.verdict(-0.4, 0.6, 0) == "smaller scale, same direction"
    assert verdicts.verdict(-2.0, 0.6, 0) == verdicts.Verdict.UNRESOLVED
    assert verdicts.verdict(1.2, 2.0, 0) == verdicts.verdict(-2.0, -1.2, 0) == "contradicted"


def test_an_estimate_over_unequally_many_records_says_so(run, monkeypatch):
    points, pooling = {"last": scores(0.5), "mean": scores(0.47)}, by_label("pooling")
    monkeypatch.setattr(paper_sweeps, "records", lambda run, sweep, value: {"last": 48, "mean": 36}[value])
    assert "(48 at last, 36 at mean)" in paper_sweeps.estimate(pooling, points, run)["what"]
    monkeypatch.setattr(paper_sweeps, "records", lambda run, sweep, value: 48)
    assert "unequally" not in paper_sweeps.estimate(pooling, points, run)["what"]


def test_a_verdict_does_not_say_more_than_what_was_repeated():
    better, same = uncertainty.difference(scores(0.6), scores(0.5)), uncertainty.difference(scores(0.5), scores(0.5))
    once = verdicts.judged("S8", better, "Sr against Jr", "scores@1")
    assert (
        better.resolved
        and once["verdict"] == verdicts.Verdict.UNRESOLVED
        and "rests on one training of each generator" in once["why"]
    )
    assert verdicts.judged("E3", better, "with against without", "scores@1")["verdict"] == "smaller scale, same direction"
    void = verdicts.judged(
        "S19", uncertainty.Estimate(0.0, 0.0, 0.0, 1, 0.0, 0.0), "second pass", "x@1", trained=False, expected=0
    )
    assert (
        void["verdict"] == verdicts.Verdict.UNRESOLVED and "nothing changed anywhere" in void["why"] and "seed" not in void["why"]
    )
    fell = verdicts.judged("G4", better, "guided against plain", "x@1", expected=-1)
    assert same.low <= 0 <= same.high and fell["verdict"] == verdicts.Verdict.UNRESOLVED


def test_what_is_not_resolved_says_what_would_resolve_the_papers_effect_or_else_one_of_a_point():
    wide = uncertainty.Estimate(0.5, -1.0, 2.0, 5, 0.3, 0.6)
    whys = {key: verdicts.judged(key, wide, "x", "a@1")["why"] for key in ("S9", "G9", "S8")}
    assert "the paper's +1.35 would need about" in whys["S9"] and "an effect of 1 would need about" in whys["G9"]
    assert whys["S8"].endswith("and generators trained three times at least"), (
        "more seeds of the embedding model do not resolve it"
    )
    little = verdicts.judged("S11", wide, "x", "a@1", expected=0)["why"]
    assert "an interval within 1 of zero would need about" in little
    outside = uncertainty.Estimate(1.2, -0.1, 2.5, 5, 0.3, 0.6)
    beyond = verdicts.judged("S11", outside, "x", "a@1", expected=0)["why"]
    assert "one wholly beyond 1 would need about" in beyond, "no size moves the middle inside"
    texts = verdicts.judged("S18", uncertainty.Estimate(0.8, -0.2, 1.8, 1, 0.5, 0.0), "x", "a@1", trained=False)["why"]
    assert "would need about 2 times as many texts, and generators" in texts


def test_an_interval_without_the_papers_effect_says_so_and_no_line_says_that_it_would_have_been_resolved():
    narrow = uncertainty.Estimate(0.06, -0.07, 0.19, 5, 0.03, 0.03)
    assert verdicts.judged("G1b", narrow, "x", "a@1")["why"].endswith(
        "smaller than the paper's effect: the interval leaves +0.27 out"
    )
    fell = uncertainty.Estimate(-1.04, -4.67, 2.59, 5, 1.0, 1.0)
    assert verdicts.judged("G4", fell, "x", "a@1", expected=-1)["why"].endswith("the interval leaves -7 out")
    margin = verdicts.judged("G9", uncertainty.Estimate(0.10, -0.04, 0.25, 5, 0.03, 0.03), "x", "a@1")["why"]
    assert "an effect of 1 is outside of the interval, the +0.10 seen would need about" in margin
    inside = verdicts.judged("G1b", uncertainty.Estimate(0.1, -0.01, 0.30, 5, 0.03, 0.03), "x", "a@1")["why"]
    assert "leaves" not in inside and "would need" in inside
    once = verdicts.judged("S5", uncertainty.Estimate(0.1, -0.1, 0.3, 5, 0.1, 0.0), "x", "a@1")["why"]
    assert "leaves" not in once, "an interval over embedding seeds cannot exclude an effect of generators"


def test_as_many_seeds_as_were_used_are_called_the_same_seeds():
    news = uncertainty.Estimate(1.6, -0.76, 3.96, 5, 1.19, 0.2)
    assert re.search(r"about \d+ times as many texts and the same seeds$", verdicts.judged("G8", news, "x", "a@1")["why"])


def test_data_sets_that_were_written_once_resolve_nothing():
    better, wide = uncertainty.difference(scores(0.6), scores(0.5)), uncertainty.Estimate(0.5, -1.0, 2.0, 3, 0.3, 0.6)
    for key in ("S9", "S10", "S12"):
        row = verdicts.judged(key, better, "x", "a@1")
        assert row["verdict"] == verdicts.Verdict.UNRESOLVED and "rests on one writing of each data set" in row["why"]
        assert verdicts.judged(key, wide, "x", "a@1")["why"].endswith("and data sets written three times at least")


def test_an_interval_that_leaves_out_the_texts_resolves_nothing():
    seeds_only = uncertainty.Estimate(5.0, 4.0, 6.0, 3, math.nan, 0.3)
    row = verdicts.judged("E1", seeds_only, "x", "a@1")
    assert row["verdict"] == verdicts.Verdict.UNRESOLVED and "over 3 embedding seeds; it leaves out the texts" in row["why"]
    once = verdicts.judged("E1", uncertainty.Estimate(5.0, math.nan, math.nan, 1, math.nan, 0.0), "x", "a@1")
    assert once["verdict"] == verdicts.Verdict.UNRESOLVED and once["low"] == once["high"] == "" and once["ours"] == 5.0


def test_a_claim_of_two_halves_needs_both():
    def said(**bend):
        facts = {
            "estimates": {
                "S17": uncertainty.difference(scores(0.6), scores(0.5)).row("") | bend | {"what": "slope", "source": "s"}
            }
        }
        return next(r for r in claims.build({}, facts, {"s": "scaling@1"}) if r["id"] == "S17")

    bends = [uncertainty.Estimate(v, v - 2, v + 2, 5, 0.5, 0.5).row("bend") for v in (-5.0, -1.0, 5.0)]
    down, open_, up = (said(bend=b) for b in bends)
    assert [r["verdict"] for r in (down, open_, up)] == [verdicts.Verdict.SMALLER, verdicts.Verdict.UNRESOLVED, "contradicted"]
    assert "bend -1.00 [-3.00, +1.00] is not resolved; the -1.0 seen would need about" in open_["why"]
    assert said()["verdict"] == verdicts.Verdict.UNRESOLVED and "it takes three sizes" in said()["why"]


def test_what_few_records_cannot_show_says_how_many_could():
    facts = {"kept": 408, "valid": 408, "calls": {"calls": 407, "tokens": 408 * 213, "records": 408, "share": 407 / 408}}
    by = {r["id"]: r for r in claims.build({}, facts, {"synthetic": "s@1"})}
    assert (
        "more than 4,070 (10.0 x as many)" in by["S3"]["why"] and "a sixth of its tokens 1,449 (3.6 x as many)" in by["S3"]["why"]
    )
    assert "takes embedding models trained with and without it, on a pool of which MinHash drops something" in by["S22"]["why"]


def test_a_comparison_of_generators_that_leaves_zero_out_says_what_is_missing():
    arms = {"sr_re": 0.6, "teacher": 0.5, "jr": 0.55, "base": 0.3}
    by = {r["id"]: r for r in claims.build({k: scores(v) for k, v in arms.items()}, {}, dict.fromkeys(arms, "a@1"))}
    for key in ("S1", "S4", "S5"):
        assert by[key]["why"].endswith("it takes generators trained three times at least")


def test_a_reader_is_told_what_was_tested_in_place_of_the_claim():
    row = uncertainty.difference(scores(0.6), scores(0.5)).row("") | {"what": "x", "source": "s"}
    facts = {"estimates": dict.fromkeys(("S15", "S16", "E4", "G7", "S20"), row)}
    rows = claims.build({}, facts, {"s": "s@1"})
    why = {r["id"]: r["why"] for r in rows}
    assert all("optimum inside the range only" in why[k] and "were not compared" in why[k] for k in ("S15", "S16"))
    assert "learning rate was chosen with last-token pooling" in why["E4"] and "is not measured" in why["G7"]
    assert "written by the rubric's authors" in why["S20"]


def test_the_mask_has_a_row_for_the_model_of_notebook_09_and_one_for_students_whatever_a_recorded_run_calls_it():
    arms = {"guided": noisy(0.5), "plain": noisy(0.48, 1)}
    student = uncertainty.difference(scores(0.51), scores(0.5))
    facts = {"estimates": {"G1": student.row("G1") | {"what": "students", "source": "s"}}}
    digests = {"s": "s@1", "guided": "scores-guided-0@1", "plain": "scores-plain-0@1"}
    by = {r["id"]: r for r in claims.build(arms, facts, digests)}
    large = uncertainty.difference(*arms.values())
    assert "G1" not in by and by["G1a"]["ours"] == round(large.value, 2) and by["G1b"]["ours"] == round(student.value, 2)
    assert f"all tasks: {large} points" in by["G1a"]["why"] and by["G1a"]["artifact"] == "scores-guided-0@1 scores-plain-0@1"
    assert by["G1b"]["why"].startswith("students: ") and by["G1b"]["artifact"] == "s@1"


def made_at(run, rows, trained):
    """A data set of the junior's and one embedding model that learned from its first `trained` records."""
    with run.store.stage("synthetic-jr", {"rows": rows}) as draft:
        write_jsonl(draft.file("train.jsonl"), rows)
    with run.store.stage("embedder-jr-0", {"rows": rows}) as draft:
        write_json(draft.file("training.json"), {"rows": trained})


def test_the_sweep_of_tasks_a_topic_says_how_the_data_varied(run):
    sweep = by_label("tasks per topic")
    made_at(run, [{"task": f"t{k % 2}", "topic": f"p{k % 4}"} for k in range(9)], 8)
    for value in (2, 3):
        made_at(
            paper_sweeps.at_value(run, sweep, value), [{"task": f"t{k % (2 * value)}", "topic": f"p{k % 3}"} for k in range(9)], 8
        )
    assert paper_sweeps.variety(run, sweep, 1) == (2, 4) and paper_sweeps.variety(run, sweep, 3) == (6, 3)
    what = paper_sweeps.estimate(sweep, {1: scores(0.5), 2: scores(0.48), 3: scores(0.44)}, run)["what"]
    assert "2 / 4 / 6 distinct tasks on 4 / 3 / 3 topics: more per topic varies tasks more here" in what
    assert paper_sweeps._more_tasks([(5, 9), (5, 4)]) == "5 / 5 distinct tasks on 9 / 4 topics"


def test_a_value_that_stands_for_several_of_the_papers_has_all_their_differences(run, monkeypatch):
    monkeypatch.setattr(paper_sweeps, "records", lambda run, sweep, value: 48)
    base = by_label("base model")
    found = paper_sweeps.rows(run, base, dict.fromkeys(base.points(run), scores(0.5)))
    assert [r["paper_value"] for r in found] == ["", [-0.1, -0.2, -0.3]]
    figures.sweeps(run, "10_sweeps", found, [], "One value changed")
    pooling = paper_sweeps.rows(run, by_label("pooling"), {"last": scores(0.5), "mean": scores(0.4)})
    assert [r["paper_value"] for r in pooling] == ["", -0.4]


def whole(rows: list[dict[str, str]]) -> bool:
    """Does a claim map hold every claim once, each with a known verdict, a reason, and artifacts where something was measured?"""
    ids = [*(f"S{k}" for k in range(1, 23)), *(f"E{k}" for k in range(1, 6)), "G1a", "G1b", *(f"G{k}" for k in range(2, 10))]
    digest = re.compile(r"[\w-]+@[0-9a-f]{8}( [\w-]+@[0-9a-f]{8})*")
    known = all(r["verdict"] in set(verdicts.Verdict) and len(r["why"]) > 20 for r in rows)
    return (
        [r["id"] for r in rows] == ids and known and all(bool(r["ours"]) == bool(digest.fullmatch(r["artifact"])) for r in rows)
    )


def test_the_committed_claim_map_has_every_claim_with_a_verdict_a_reason_and_its_artifacts():
    with (ROOT / "figures" / "claims.csv").open(encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert whole(rows) and len(set(verdicts.Verdict)) == 8
    for key, value in {"id": "S99", "verdict": "probably", "why": "", "artifact": ""}.items():
        assert not whole([rows[0] | {key: value}, *rows[1:]]), key
    assert not whole(rows[1:])


def test_the_table_of_claims_shows_every_claim_with_its_interval_and_escapes_its_text():
    facts = {"estimates": {"G9": uncertainty.Estimate(0.1, -0.1, 0.3, 5, 0.1, 0.1).row("") | {"what": "a < b", "source": "s"}}}
    page = claims.table(claims.build({}, facts, {"s": "s@1"}))
    assert page.count("<tr>") == 1 + len(claims.CLAIMS) and "a &lt; b" in page and "[-0.1, 0.3]" in page
    assert page.index(">G9<") < page.index(">S1<"), "what was measured comes first"


def test_an_order_is_judged_by_its_smallest_step_and_kept_records_by_those_that_were_valid():
    arms = {"jr": 0.5, "jr_re": 0.52, "sr": 0.51, "sr_re": 0.56}
    found = {k: scores(v) for k, v in arms.items()}
    rows = claims.build(found, {"kept": 90, "valid": 100}, dict.fromkeys(arms, "a@1") | {"synthetic": "s@1"})
    by = {r["id"]: r for r in rows}
    assert by["S6"]["ours"] == pytest.approx(-1.0) and "whose interval reaches lowest" in by["S6"]["why"]
    assert by["S22"]["ours"] == 0.9 and by["S22"]["low"] < 0.9 < by["S22"]["high"] and "90 of 100 valid" in by["S22"]["why"]


def test_a_claim_with_two_printed_differences_is_their_mean_and_at_the_papers_size_it_is_reproduced():
    arms = {"jr": 0.5, "jr_re": 0.52, "sr": 0.51, "sr_re": 0.56, "guided": 0.6, "bare": 0.5, "untrained": 0.3}
    found, digests = {k: scores(v) for k, v in arms.items()}, dict.fromkeys(arms, "a@1")
    by = {r["id"]: r for r in claims.build(found, {}, digests)}
    assert by["S7"]["ours"] == pytest.approx((2.0 + 5.0) / 2) and by["S8"]["ours"] == pytest.approx((1.0 + 4.0) / 2)
    assert by["E3"]["verdict"] == verdicts.Verdict.SMALLER and by["S4"]["verdict"] == "not yet tested"
    assert by["S4"]["why"].startswith("no scores of base;")
    sizes = dict.fromkeys(arms, 48) | {"sr": 40, "guided": claims.PAPER_RECORDS}
    rows = claims.build(found, {}, digests, sizes)
    large, why = ({r["id"]: r[k] for r in rows} for k in ("verdict", "why"))
    assert "on unequally many (jr_re 48, jr 48, sr_re 48, sr 40)" in why["S7"] and "unequally" not in why["E3"]
    assert large["E3"] == verdicts.Verdict.REPRODUCED and large["S7"] == verdicts.Verdict.UNRESOLVED
    assert large["E1"] == verdicts.Verdict.SMALLER, "that it beats the untrained model is not the paper's claim"


def test_each_claim_that_can_be_measured_names_a_code_cell_of_its_notebook():
    cells = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells[notebook_number(path)] = {c["id"] for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"}
    for key, _, notebook, cell in claims.CLAIMS:
        assert (cell == "") == (key in claims.NOT_POSSIBLE) and (not cell or cell in cells[notebook]), key


def test_a_sweep_of_text_values_changes_one_setting_like_any_other(run):
    base = dataclasses.replace(by_label("base model"), values=("{own}[:6]",))
    point = paper_sweeps.point(run, base, base.points(run)[1])
    assert point.name == "models.generator=package_gemma-3-270m_6_"
    assert point.overrides["models.generator"].endswith("[:6]") and open_run("tiny", point.overrides).profile.study.arms == (
        "jr",
    )


def test_a_sweep_can_do_with_fewer_seeds_than_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    run = open_run("tiny", {"study.seeds": [0, 1, 2, 3], "study.sweep_seeds": [0, 1]})
    point = paper_sweeps.point(run, by_label("temperature"), 1.0)
    assert open_run("tiny", point.overrides).profile.study.seeds == (0, 1)
    with pytest.raises(UserError, match="not the first of seeds"):
        open_run("tiny", {"study.sweep_seeds": [2]})


def test_a_point_that_learned_from_fewer_records_says_so_in_the_figure(run):
    row = {"panel": "3a: temperature", "paper": "best at 1.0", "value": 0.0, "low": -1.0, "high": 1.0, "each": [0.0]}
    found = [row | {"x": "0.7", "own": True, "records": 48}, row | {"x": "1.3", "own": False, "records": 36}]
    figures.sweeps(run, "10_sweeps", found, [], "One value changed")
    drawn = (run.figures / "10_sweeps.svg").read_text(encoding="utf-8")
    assert drawn.count("(36 records)") == 1 and "(48 records)" not in drawn


def test_the_scaling_figure_keeps_the_intervals_of_its_residuals(run):
    rows = [{"records": n, "value": 1.0, "low": 0.0, "high": 2.0, "residual": r, "residual_low": r - 1, "residual_high": r + 1}
            for n, r in ((8, 0.5), (16, -0.5))]  # fmt: skip
    figures.scaling(run, "11_scaling", rows, {"slope": 0.0, "intercept": 1.0}, [[0.0] * 50, [2.0] * 50], [], "Score")
    with (run.figures / "11_scaling.csv").open() as f:
        ours = [r for r in csv.DictReader(f) if r["source"] == "ours"]
    assert [(r["residual_low"], r["residual_high"]) for r in ours] == [("-0.5", "1.5"), ("-1.5", "0.5")]
    drawn = (run.figures / "11_scaling.svg").read_text(encoding="utf-8")
    narrow = [r | {"residual_low": r["residual"], "residual_high": r["residual"]} for r in rows]
    figures.scaling(run, "11_scaling", narrow, {"slope": 0.0, "intercept": 1.0}, [[0.0] * 50, [2.0] * 50], [], "Score")
    assert drawn != (run.figures / "11_scaling.svg").read_text(encoding="utf-8")


def test_category_means_stand_beside_the_papers_where_it_prints_one_and_are_read_in_a_sentence(run):
    rows = [{"category": c, "model": m, "value": v, "low": v - 1, "high": v + 1, "paper": {"STS": 82.6}.get(c, "")}
            for m, up in (("untrained", 0), ("Sr + Re", 20)) for c, v in (("STS", 10 + up), ("Pair", 30.0), ("Avg", 20 + up))]  # fmt: skip
    figures.categories(run, "10_table1_categories", rows, [], "Means")
    drawn = (run.figures / "10_table1_categories.svg").read_text(encoding="utf-8")
    assert "compare no levels" in drawn and all(f">{word}<" in drawn for word in ("STS", "Pair", "untrained", "Sr + Re"))
    said = captions.reading("10_table1_categories", run.figures)
    assert said.startswith("the best and the worst category: untrained, Pair (30.0) and STS (10.0); ")
    assert said.endswith("; the paper, STS (82.6) and STS (82.6).")


def test_only_models_that_this_run_scored_with_every_seed_count_as_scored(run):
    for arm, seeds in {"sr_re": (0, 1, 2), "base": (0, 1)}.items():
        for s in seeds:
            with run.store.stage(f"scores-{arm}-{s}", {}) as draft:
                write_json(draft.file("scores.json"), {})
    found = score_stages.already_scored(run, ["base", "sr_re", "teacher"])
    assert {arm: [a.name for a in made] for arm, made in found.items()} == {"sr_re": [f"scores-sr_re-{s}" for s in range(3)]}
