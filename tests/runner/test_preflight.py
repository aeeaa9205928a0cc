"""What is said before anything runs: the type that will be computed in, and a time that fits this machine."""

import pytest
import torch

from speed_core import machine
from speed_core import profile as profiles
from speed_core.models import compute_type
from speed_core.runner import preflight
from speed_core.study import forecast, planning
from speed_core.study.runs import open_run

ENTRY = {"device": "cpu", "cpu": "some processor", "cores": 2, "date": "2026-01-01", "compute_type": "float32"}
WORK = 128  # records times epochs of the junior at tiny
ENTRY |= {"layer_seconds": 0.1, "other": {"00": 40.0, "03": 60.0}, "artifacts": {"junior": [600.0, 1, 1, None, "junior", WORK]}}


@pytest.fixture
def slow(monkeypatch, tmp_path):
    """A processor without AMX that takes three times as long as the one of the recorded run."""
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    monkeypatch.setattr(machine, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(machine, "has_amx", lambda: False)
    monkeypatch.setattr(machine, "layer_seconds", lambda kind: 0.3)
    monkeypatch.setattr(forecast, "_all", lambda: {"tiny": ENTRY})


def test_the_type_is_said_in_words_and_once_where_all_parts_have_it(slow):
    assert preflight._types(profiles.load("tiny")) == [("compute type", "float32: this processor has no AMX", "")]


def test_a_type_that_is_slow_or_impossible_here_has_a_remedy(slow, monkeypatch):
    monkeypatch.setattr(compute_type, "remembered_speedup", lambda: 0.025)
    asked = {"junior.dtype": "bfloat16", "senior.dtype": "float16"}
    rows = {what: (said, remedy) for what, said, remedy in preflight._types(profiles.load("tiny", asked))}
    assert rows["type of generation, revisor, embedding"] == ("float32: this processor has no AMX", "")
    said, remedy = rows["type of junior"]
    assert said == "bfloat16: as the profile says" and remedy == (
        "set junior.dtype to auto: a product in bfloat16 takes 40.0 times as long as one in float32 here"
    )
    assert rows["type of senior"][0] == "float16: not possible here" and "needs an NVIDIA GPU" in rows["type of senior"][1]
    monkeypatch.setattr(compute_type, "remembered_speedup", lambda: 3.2)
    rows = {what: remedy for what, _, remedy in preflight._types(profiles.load("tiny", {"junior.dtype": "bfloat16"}))}
    assert rows["type of junior"] == ""


def test_recorded_seconds_are_those_of_this_machine_in_the_plan_and_in_the_check(slow):
    run = open_run("tiny")
    step = next(s for s in planning.steps(run) if s.name == "junior")
    assert step.seconds == pytest.approx(1800) and step.recorded
    said = preflight._time_text(run, [step])
    assert said.startswith("about 35 min for 1 stages") and "by notebook: 00 2, 03 33" in said, said
    assert "some processor, 2 cores, 2026-01-01 in float32, times 3.0" in said


def test_a_long_run_names_the_profile_that_fits(slow, monkeypatch):
    long, short = ({**ENTRY, "artifacts": {"junior": [s, 1, 1, None, "junior", WORK]}} for s in (9000.0, 300.0))
    monkeypatch.setattr(forecast, "_all", lambda: {"tiny": long, "smoke": short})
    run = open_run("tiny")
    said = preflight._time_text(run, [s for s in planning.steps(run) if s.name == "junior"])
    assert "; profile smoke takes about 20 min here" in said, said
    monkeypatch.setattr(forecast, "_all", lambda: {"tiny": long, "smoke": long})
    said = preflight._time_text(run, [s for s in planning.steps(run) if s.name == "junior"])
    assert "no profile is expected to take less than two hours here" in said


def test_a_layer_is_timed_in_the_type_that_is_asked_for(monkeypatch):
    made, ones = [], torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, **how: made.append(how["dtype"]) or ones(*size, **how))
    machine.layer_seconds.cache_clear()
    assert machine.layer_seconds("float64") > 0 and set(made) == {torch.float64}


def test_where_nothing_was_measured_nothing_is_scaled_and_that_is_said(slow, monkeypatch):
    old = {k: v for k, v in ENTRY.items() if k not in ("layer_seconds", "other")}
    monkeypatch.setattr(forecast, "_all", lambda: {"tiny": old})
    run = open_run("tiny")
    said = preflight._time_text(run, [s for s in planning.steps(run) if s.name == "junior"])
    assert said.startswith("about 10 min for 1 stages") and "not scaled to this machine" in said


def test_a_plan_says_type_and_time_as_the_check_does(slow):
    said = preflight.plan_text("tiny")
    assert "compute type: float32: this processor has no AMX" in said and "\ntime: about 35 min for 1 stages" in said
