"""What a size that was never run would take: nothing but the recorded run and the ratio of the work."""

import pytest

from speed_core import profile as profiles
from speed_core.study import forecast, planning
from speed_core.study.forecast import Forecast, Row, start_seconds, work
from speed_core.study.runs import open_run


@pytest.fixture
def tiny():
    return Forecast.of(profiles.load("tiny"))


def test_at_the_recorded_size_the_forecast_is_the_recording(tiny):
    assert tiny.scaled == "" and len(tiny.rows) > 100
    for name, row in tiny.rows.items():
        assert tiny.expected(name).seconds == pytest.approx(row.seconds), name
        assert tiny.expected(name).inputs == row.inputs, name


def test_twice_the_prompts_take_twice_the_time_after_the_start():
    p = profiles.load("tiny", {"synthesis.count": 320})
    ahead, before = Forecast.of(p), Forecast.of(profiles.load("tiny"))
    one, two = before.expected("raw"), ahead.expected("raw")
    assert two.seconds - before.start == pytest.approx(2 * (one.seconds - before.start))
    assert two.tokens == 2 * one.tokens and ahead.expected("junior").seconds == before.expected("junior").seconds


def test_the_start_is_the_intercept_of_seconds_over_tokens():
    rows = {str(n): Row(30 + n / 100, None, 0.0, n, []) for n in (1000, 4000, 9000)}
    assert start_seconds(rows) == pytest.approx(30)
    assert start_seconds({"a": rows["1000"]}) == 0 and start_seconds({"t": Row(5, None, 0.0, None, [])}) == 0


def test_each_stage_of_the_night_has_a_time_that_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    known = forecast.recorded("tiny")
    monkeypatch.setattr(forecast, "_all", lambda: {"tiny": known})
    found = planning.steps(open_run("overnight"))
    assert all(s.seconds is not None and s.recorded and s.measured.endswith("scaled from profile tiny") for s in found)
    inputs = {s.name: s.inputs for s in found}
    assert inputs["scores-bare-3"] == ("embedder-guided-3",) and inputs["embedder-jr-3"] == ("synthetic-jr",)
    assert inputs["scores-scale42-3"] == ("embedder-scale42-3",) and inputs["scores-student-4-plain-4"] == ("student-4-plain-4",)


def test_another_model_or_length_of_text_is_not_scaled():
    assert Forecast.of(profiles.load("tiny", {"models.embedder": "some/model"})) is None
    assert Forecast.of(profiles.load("tiny", {"generation.max_new_tokens": 145})) is None


def test_work_is_counted_in_the_unit_of_the_stage():
    p = profiles.load("tiny")
    assert work(p, "root") == ("root", p.senior.prompts * p.senior.candidates)
    assert work(p, "embedder-scale16-2")[1] * 3 == work(p, "embedder-sr_re-0")[1] == p.study.ablation_examples
    assert work(p, "student-3-both-1")[1] == 6 * work(p, "student-1-plain-0")[1]
    asked = {name: work(p, f"scores-student-{name}") for name in ("1-plain-0", "1-covered-0", "whole-uncovered-0")}
    assert {sort for sort, _ in asked.values()} == {"scores-student"} and work(p, "scores-guide-topic")[0] == "scores-guide"
    topic = {work(p, "scores-guide-topic")[1], asked["1-covered-0"][1], asked["whole-uncovered-0"][1]}
    assert len(topic) == 1 and 0 < topic.pop() < asked["1-plain-0"][1], "they answer the questions of one task"
    assert work(p, "scores-plain-0")[1] > work(profiles.load("smoke"), "scores-plain-0")[1]
    assert forecast.recorded("no such profile") == {}
