"""The sweeps: which points a profile gets, and what they say of a claim. tests/test_notebooks.py runs one."""

import dataclasses
import json
from pathlib import Path

import pytest

from speed_core import claims, experiments, pipeline, plots, study, teacher, uncertainty
from speed_core.artifacts import UserError
from speed_core.run_context import open_run

ROOT = Path(__file__).resolve().parent.parent


def scores(mean: float) -> list[dict]:
    """Three training seeds of a model with one task of forty texts."""
    return [
        {"tasks": {"t": {"type": "Clustering", "score": mean + d, "items": [mean + d] * 40}}} for d in (-0.001, 0.0, 0.001)
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    return open_run("tiny")


def by_label(label: str) -> study.Sweep:
    return next(s for s in study.SWEEPS if s.label == label)


def test_every_sweep_has_the_profiles_own_value_and_another_and_a_claim_of_the_map(run):
    known = {key for key, *_ in claims.CLAIMS}
    for sweep in study.SWEEPS:
        values = sweep.points(run)
        assert len(values) == len(set(values)) > 1 and sweep.claim in known
        numbers = [v for v in values if not isinstance(v, str | bool)]
        assert numbers == sorted(numbers)


def test_another_base_model_is_named_after_the_profiles_own(run):
    own = run.profile.models.generator
    assert by_label("base model").points(run) == [own, own + "[:12]"]
    assert study.named_value(own + "[:12]") == "gemma-3-270m[:12]" and study.named_value(0.5) == "0.5"


def test_a_switch_is_on_and_then_off_and_its_claim_says_how_much_it_moves(run):
    truncated = by_label("topics truncated")
    assert truncated.points(run) == [True, False] and list(map(study.named_value, (True, False))) == ["yes", "no"]
    assert study.point(run, truncated, False).overrides["topics.truncate"] is False
    assert truncated.points(open_run("tiny", {"topics.truncate": False})) == [True, False], "the sign of the claim stays"
    found = study.estimate(truncated, {True: scores(0.5), False: scores(0.48)})
    assert found["value"] == pytest.approx(2.0)
    deep = [p for p in pipeline.topics(run)[0] if p.count("/") >= run.profile.topics.max_depth]
    assert f"{len(deep)} of the {len(pipeline.topics(run)[0])} data topics" in found["what"]


def test_the_recorded_teacher_answers_for_whole_topic_paths_and_the_seed_examples_stay_the_same(run):
    whole = open_run("tiny", {"topics.truncate": False})
    asked = pipeline.brainstorm_prompts(whole)
    assert max(q.topic.count("/") for q in asked) == 7, "the deepest path of the list"
    answers = [teacher.RecordedTeacher().answer(q.text, "brainstorm").text for q in asked]
    assert all(teacher.parse_tasks(a, q.kind, "stop").status == "ok" for a, q in zip(answers, asked, strict=True))
    assert [q.id for q in pipeline.seed_plan(whole)] == [q.id for q in pipeline.seed_plan(run)]


def test_a_data_set_beside_table_2_takes_part_from_half_of_the_compared_records_on(run):
    assert experiments.ablation_arms(run) == list(experiments.ARMS), "what is not made yet is planned"
    for arm, kept in {"jr": 60, "jr_re": 60, "sr": 48, "sr_re": 48, "base": 24, "teacher": 23}.items():
        with run.store.stage(f"synthetic-{arm}", {}) as draft:
            draft.file("train.jsonl").write_text(arm)
            draft.info["kept"] = kept
    assert experiments.ablation_size(run) == 48 and experiments.ablation_arms(run) == [*experiments.TABLE2, "base"]
    large = open_run("tiny", {"embedding.batch": 32, "embedding.micro_batch": 32})
    assert experiments.ablation_arms(large) == list(experiments.TABLE2), "a training needs a batch"


def test_sweeps_are_chosen_by_key_and_one_key_may_name_several():
    assert [s.label for s in study.named(["E4", "T4"])] == ["LoRA rank", "pooling", "base model"]
    assert [s.label for s in study.named(["T3"])] == ["tasks a topic", "topics truncated"]
    assert study.named([]) == list(study.SWEEPS)
    with pytest.raises(UserError, match="'4z': unknown; use 3a, 3b"):
        study.named(["4z"])


def test_a_hump_needs_both_ends_and_is_the_middle_minus_the_better_of_them():
    temperature = by_label("temperature")
    assert study.estimate(temperature, {0.3: scores(0.4), 1.0: scores(0.5)}) is None
    found = study.estimate(temperature, {0.3: scores(0.40), 1.0: scores(0.50), 1.3: scores(0.44)})
    assert found["value"] == pytest.approx(6.0) and "at 1 minus at 1.3, the better end" in found["what"]
    rising = study.estimate(temperature, {0.3: scores(0.40), 1.0: scores(0.50), 1.3: scores(0.51)})
    assert rising["value"] < 0, "a curve that rises and levels off has no optimum inside"


def test_what_falls_is_the_first_value_against_all_others():
    found = study.estimate(by_label("tasks a topic"), {1: scores(0.5), 3: scores(0.48), 5: scores(0.44)})
    assert found["value"] == pytest.approx(4.0)


def test_of_two_sweeps_for_one_claim_the_larger_effect_speaks():
    rank, pooling = by_label("LoRA rank"), by_label("pooling")
    found = study.estimates({rank: {4: scores(0.5), 64: scores(0.501)}, pooling: {"last": scores(0.5), "mean": scores(0.47)}})
    assert set(found) == {"E4"} and found["E4"]["value"] == pytest.approx(-3.0)


def test_a_claim_of_no_difference_holds_only_when_the_whole_interval_is_small():
    assert claims.verdict(-0.4, 0.6, 0) == "smaller scale, same direction"
    assert claims.verdict(-2.0, 0.6, 0) == claims.UNRESOLVED
    assert claims.verdict(1.2, 2.0, 0) == claims.verdict(-2.0, -1.2, 0) == "contradicted"


def test_an_estimate_over_unequally_many_records_says_so(run, monkeypatch):
    points, pooling = {"last": scores(0.5), "mean": scores(0.47)}, by_label("pooling")
    monkeypatch.setattr(study, "records", lambda run, sweep, value: {"last": 48, "mean": 36}[value])
    assert "(48 at last, 36 at mean)" in study.estimate(pooling, points, run)["what"]
    monkeypatch.setattr(study, "records", lambda run, sweep, value: 48)
    assert "unequally" not in study.estimate(pooling, points, run)["what"]


def test_a_verdict_does_not_say_more_than_what_was_repeated():
    better, same = uncertainty.difference(scores(0.6), scores(0.5)), uncertainty.difference(scores(0.5), scores(0.5))
    once = claims.judged("S8", better, "Sr against Jr", "scores@1")
    assert better.resolved and once["verdict"] == claims.UNRESOLVED and "each generator was trained once" in once["why"]
    assert claims.judged("E3", better, "with against without", "scores@1")["verdict"] == "smaller scale, same direction"
    void = claims.judged("S19", uncertainty.Estimate(0.0, 0.0, 0.0, 1, 0.0, 0.0), "second pass", "x@1", trained=False, expected=0)
    assert void["verdict"] == claims.UNRESOLVED and "nothing changed anywhere" in void["why"] and "seed" not in void["why"]
    fell = claims.judged("G4", better, "guided against plain", "x@1", expected=-1)
    assert same.low <= 0 <= same.high and fell["verdict"] == claims.UNRESOLVED


def test_what_is_not_resolved_says_what_would_resolve_the_papers_effect_or_else_one_of_a_point():
    wide = uncertainty.Estimate(0.5, -1.0, 2.0, 5, 0.3, 0.6)
    whys = {key: claims.judged(key, wide, "x", "a@1")["why"] for key in ("S9", "G9", "S8")}
    assert "the paper's +1.35 would need about" in whys["S9"] and "an effect of 1 would need about" in whys["G9"]
    assert whys["S8"].endswith("and generators trained more than once"), "more seeds of the embedding model do not resolve it"
    little = claims.judged("S11", wide, "x", "a@1", expected=0)["why"]
    assert "an interval within 1 of zero would need about" in little
    outside = uncertainty.Estimate(1.2, -0.1, 2.5, 5, 0.3, 0.6)
    assert "would" not in claims.judged("S11", outside, "x", "a@1", expected=0)["why"], "no size moves the middle inside"
    texts = claims.judged("S18", uncertainty.Estimate(0.8, -0.2, 1.8, 1, 0.5, 0.0), "x", "a@1", trained=False)["why"]
    assert "would need about 2 times as many texts, and generators" in texts


def test_an_order_is_judged_by_its_smallest_step_and_kept_records_by_those_that_were_valid():
    arms = {"jr": 0.5, "jr_re": 0.52, "sr": 0.51, "sr_re": 0.56}
    found = {k: scores(v) for k, v in arms.items()}
    rows = claims.build(found, {"kept": 90, "valid": 100}, dict.fromkeys(arms, "a@1") | {"synthetic": "s@1"})
    by = {r["id"]: r for r in rows}
    assert by["S6"]["ours"] == pytest.approx(-1.0) and "smallest of the three steps" in by["S6"]["why"]
    assert by["S22"]["ours"] == 0.9 and by["S22"]["low"] < 0.9 < by["S22"]["high"] and "90 of 100 valid" in by["S22"]["why"]


def test_a_claim_with_two_printed_differences_is_their_mean_and_at_the_papers_size_it_is_reproduced():
    arms = {"jr": 0.5, "jr_re": 0.52, "sr": 0.51, "sr_re": 0.56, "guided": 0.6, "bare": 0.5, "untrained": 0.3}
    found, digests = {k: scores(v) for k, v in arms.items()}, dict.fromkeys(arms, "a@1")
    by = {r["id"]: r for r in claims.build(found, {}, digests)}
    assert by["S7"]["ours"] == pytest.approx((2.0 + 5.0) / 2) and by["S8"]["ours"] == pytest.approx((1.0 + 4.0) / 2)
    assert by["E3"]["verdict"] == claims.SMALLER and by["S4"]["verdict"] == "not yet tested"
    assert by["S4"]["why"].startswith("no scores of base;")
    sizes = dict.fromkeys(arms, 48) | {"sr": 40, "guided": claims.PAPER_RECORDS}
    rows = claims.build(found, {}, digests, sizes)
    large, why = ({r["id"]: r[k] for r in rows} for k in ("verdict", "why"))
    assert "on unequally many (jr_re 48, jr 48, sr_re 48, sr 40)" in why["S7"] and "unequally" not in why["E3"]
    assert large["E3"] == claims.REPRODUCED and large["S7"] == claims.UNRESOLVED
    assert large["E1"] == claims.SMALLER, "that it beats the untrained model is not the paper's claim"


def test_each_claim_that_can_be_measured_names_a_code_cell_of_its_notebook():
    cells = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells[path.name[:2]] = {c["id"] for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"}
    for key, _, _, notebook, cell in claims.CLAIMS:
        assert (cell == "") == (key in claims.NOT_POSSIBLE) and (not cell or cell in cells[notebook]), key


def test_a_sweep_of_text_values_changes_one_setting_like_any_other(run):
    base = dataclasses.replace(by_label("base model"), values=("{own}[:6]",))
    point = study.point(run, base, base.points(run)[1])
    assert point.name == "models.generator=package_gemma-3-270m_6_"
    assert point.overrides["models.generator"].endswith("[:6]") and open_run("tiny", point.overrides).profile.study.arms == (
        "jr",
    )


def test_a_sweep_can_do_with_fewer_seeds_than_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    run = open_run("tiny", {"study.seeds": [0, 1, 2, 3], "study.sweep_seeds": [0, 1]})
    point = study.point(run, by_label("temperature"), 1.0)
    assert open_run("tiny", point.overrides).profile.study.seeds == (0, 1)
    with pytest.raises(UserError, match="not the first of seeds"):
        open_run("tiny", {"study.sweep_seeds": [2]})


def test_a_point_that_learned_from_fewer_records_says_so_in_the_figure(run):
    row = {"panel": "3a: temperature", "paper": "best at 1.0", "value": 0.0, "low": -1.0, "high": 1.0, "each": [0.0]}
    found = [row | {"x": "0.7", "own": True, "records": 48}, row | {"x": "1.3", "own": False, "records": 36}]
    plots.sweeps(run, "10_sweeps", found, [], "One value changed")
    drawn = (run.figures / "10_sweeps.svg").read_text(encoding="utf-8")
    assert drawn.count("(36 records)") == 1 and "(48 records)" not in drawn
