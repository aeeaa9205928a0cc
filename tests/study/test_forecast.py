"""What a size that was never run would take: nothing but the recorded run and the ratio of the work."""

import pytest

from speed_core import profile as profiles
from speed_core.study import forecast, planning
from speed_core.study.forecast import Forecast, Row, start_seconds
from speed_core.study.runs import open_run
from speed_core.study.stage import find, planned


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The tiny run before anything is made."""
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    return open_run("tiny")


def test_at_the_recorded_size_the_forecast_is_the_recording(run):
    tiny, known = Forecast.of(run.profile), planned(run)
    assert tiny.scaled == "" and len(tiny.rows) > 100 and {p.name for p in known} == set(tiny.rows)
    for one in known:
        row = tiny.rows[one.name]
        assert tiny.expected(one) == pytest.approx(row), one.name


def test_twice_the_prompts_take_twice_the_time_after_the_start(run):
    ahead, before = Forecast.of(profiles.load("tiny", {"synthesis.count": 240})), Forecast.of(run.profile)
    raw, junior = find(run, "raw"), find(run, "junior")
    one, two = before.expected(raw), ahead.expected(raw)
    assert two.seconds - before.start == pytest.approx(2 * (one.seconds - before.start))
    assert two.tokens == 2 * one.tokens and ahead.expected(junior).seconds == before.expected(junior).seconds


def test_the_start_is_the_intercept_of_seconds_over_tokens():
    rows = [Row(30 + n / 100, None, 0.0, n, "raw", n) for n in (1000, 4000, 9000)]
    assert start_seconds(rows) == pytest.approx(30)
    assert start_seconds(rows[:1]) == 0 and start_seconds([Row(5, None, 0.0, None, "pairs", 1)]) == 0


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


def test_work_is_counted_in_the_unit_of_the_stage(run):
    p, known = run.profile, {one.name: one for one in planned(run)}
    work = {name: one.work(p) for name, one in known.items()}
    assert work["root"] == p.senior.prompts * p.senior.candidates
    assert work["embedder-sr_re-0"] == p.study.ablation_examples * p.embedding.epochs
    assert work["student-1-both-0"] == 2 * work["student-1-plain-0"]
    asked = {work[f"scores-{n}"] for n in ("guide-topic", "student-1-covered-0", "student-whole-uncovered-0")}
    assert len(asked) == 1 and 0 < asked.pop() < work["scores-student-1-plain-0"], "they answer the questions of one task"
    assert work["scores-plain-0"] > known["scores-plain-0"].work(profiles.load("smoke"))
    assert forecast.recorded("no such profile") == {}
