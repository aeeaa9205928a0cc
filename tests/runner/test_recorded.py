"""A run beside the recorded one: texts that are equal, the first that is not, verdicts, and when nothing is compared."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import record
from speed_core.__main__ import app
from speed_core.files import AppendLog, UserError, write_json, write_jsonl
from speed_core.runner import batch as runner
from speed_core.runner import recorded
from speed_core.store import run_context
from speed_core.study import claims
from speed_core.study.runs import open_run

ROWS = [{"record": f"r{i}", "seed": i, "raw": f"text {i}", "model": "weights of there"} for i in range(4)]
STAGES = ("eval-junior", "raw")


def generate(run, name, rows, **parameters):
    """A stage of `rows` as `sampled.sample` leaves it: a log, and an artifact whose manifest names the generator."""
    with AppendLog(run.log(name)) as log:
        for r in rows:
            log.append({"id": f"{r['model']} {r['record']}", **r})
        entries = list(log.entries.values())
    with run.store.stage(name, {"generator": "junior", "prompts": "p" * 64, **parameters}) as draft:
        write_jsonl(draft.file("data.jsonl"), entries)
        draft.info |= {"compute_type": "float32", "instructions": "AVX2"}


def score(run, value):
    with run.store.stage("scores-sr-0", {"model": "artifact", "value": value}) as draft:
        write_json(draft.file("scores.json"), {"tasks": {"STS": {"type": "STS", "score": value}}})


def conclude(run, estimate, verdict):
    rows = claims.build({}, {}, {})
    rows[0] |= {"ours": estimate, "verdict": verdict}
    run.figures.mkdir(parents=True, exist_ok=True)
    claims.write(run.figures / "claims.csv", rows)


def made(folder, monkeypatch, rows=ROWS, stages=STAGES, value=0.5, estimate=1.5, verdict="not resolved"):
    monkeypatch.setenv("SPEED_RUNS", str(folder))
    run = open_run("tiny")
    for name in stages:
        generate(run, name, rows)
    score(run, value)
    conclude(run, estimate, verdict)
    return run


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """The recorded run of a package in which only `tiny` was recorded."""
    monkeypatch.setattr(recorded, "CARRIED", tmp_path / "package")
    there = made(tmp_path / "there", monkeypatch)
    record.carry(there, tmp_path / "package")
    recorded.write(there)
    return tmp_path / "package" / "tiny"


def here(tmp_path, monkeypatch, **changes):
    return made(tmp_path / "here", monkeypatch, **changes)


def other(number, text):
    return [{**r, "model": "weights of here", "raw": text if i == number else r["raw"]} for i, r in enumerate(ROWS)]


def test_equal_texts_of_other_weights_are_equal_and_both_machines_are_named(carried, tmp_path, monkeypatch):
    run = here(tmp_path, monkeypatch, rows=other(None, ""))
    said = recorded.report(run).splitlines()
    assert said[:2] == ["compared with the recorded run of tiny: 8 of 8 texts equal", "  all of eval-junior 4, raw 4"]
    assert f"  {len(claims.CLAIMS)} of {len(claims.CLAIMS)} verdicts equal" in said
    assert said[-1].startswith("  here: compute type float32, instructions AVX2, on ")
    written = json.loads((run.figures / recorded.REPORT).read_text())
    assert [(s["equal"], s["of"], s["first"]) for s in written["stages"]] == [(4, 4, None)] * 2
    assert set(written["machines"]) == {"recorded", "here"} and written["score"][0] == 0


def test_the_first_text_that_differs_is_named_with_stage_record_and_place(carried, tmp_path, monkeypatch):
    run = here(tmp_path, monkeypatch, stages=STAGES[:1])
    generate(run, "raw", other(2, "tell 2"))
    said = recorded.report(run)
    assert "7 of 8 texts equal" in said
    assert "raw 3 of 4: the first is record r2, which differs from character 3 on" in said
    first = json.loads((run.figures / recorded.REPORT).read_text())["stages"][1]["first"]
    assert first == {"record": "r2", "attempt": 1, "seed": 2, "recorded": "text 2", "here": "tell 2"}


def test_a_stage_or_a_request_that_is_missing_is_said_to_be(carried, tmp_path, monkeypatch):
    run = here(tmp_path, monkeypatch, stages=STAGES[:1])
    assert "raw 0 of 4: not in this run" in recorded.report(run)
    generate(run, "raw", ROWS[:2])
    assert "raw 2 of 4: the first is record r2, which was not asked here" in recorded.report(run)


def test_other_prompts_or_decoding_of_a_stage_are_named_although_its_texts_are_equal(carried, tmp_path, monkeypatch):
    run = here(tmp_path, monkeypatch, stages=STAGES[:1])
    generate(run, "raw", ROWS, prompts="q" * 64)
    assert "raw 4 of 4: with other settings: prompts pppp" in recorded.report(run)


def test_a_verdict_a_score_and_an_estimate_that_changed_are_named(carried, tmp_path, monkeypatch):
    run = here(tmp_path, monkeypatch, value=0.52, estimate=1.25, verdict="contradicted")
    said = recorded.report(run)
    assert (
        f"{len(claims.CLAIMS) - 1} of {len(claims.CLAIMS)} verdicts equal\n  S1: recorded 'not resolved', here 'contradicted'"
        in said
    )
    assert "of a score, in points: 2.00 (scores-sr-0, STS)" in said and "of a claim's estimate: 0.25 (S1)" in said


def test_a_claim_that_has_another_id_since_is_compared_with_its_present_one(carried, tmp_path, monkeypatch):
    known = json.loads((carried / recorded.KNOWN).read_text())
    known["verdicts"]["G1"] = known["verdicts"].pop("G1b")
    write_json(carried / recorded.KNOWN, known)
    said = recorded.report(here(tmp_path, monkeypatch))
    assert f"{len(claims.CLAIMS)} of {len(claims.CLAIMS)} verdicts equal" in said and "G1:" not in said


def test_nothing_is_compared_with_other_values_or_where_nothing_was_recorded(carried, tmp_path, monkeypatch):
    run = here(tmp_path, monkeypatch)
    recorded.report(run)
    (changed, smoke) = open_run("tiny", {"seed": 1, "junior.lr": 1e-9}), open_run("smoke")
    said = recorded.report(changed)
    assert said.startswith("not compared with the recorded run of tiny: ") and "\n" not in said and "1 more value" in said
    assert "seed is 1 here and 0 there" in recorded.report(open_run("tiny", seed=1))
    assert recorded.report(smoke) == "" and not (run.figures / recorded.REPORT).exists()


def test_an_older_record_without_values_and_verdicts_compares_what_it_has(carried, tmp_path, monkeypatch):
    (carried / recorded.KNOWN).unlink()
    said = recorded.report(here(tmp_path, monkeypatch))
    assert "8 of 8 texts equal" in said and "the recorded run holds no verdicts" in said
    assert "seed is 1 here and 0 there" in recorded.report(open_run("tiny", seed=1))


def test_the_command_says_the_same_later_and_knows_with_which_values_the_figures_were_drawn(carried, tmp_path, monkeypatch):
    run = here(tmp_path, monkeypatch)
    said = recorded.report(run)
    done = CliRunner().invoke(app, ["check", "--recorded"])
    assert done.exit_code == 0 and done.output == said + "\n"
    write_json(run.figures / "12_claims.json", {"profile": "tiny", "overrides": {"seed": 3}})
    assert "seed is 3 here and 0 there" in recorded.report_later("tiny")
    open_run("smoke")
    assert recorded.report_later("smoke") == "profile smoke has no recorded run to compare with"
    with pytest.raises(UserError, match="no run of profile overnight is here"):
        recorded.report_later("overnight")
    assert not (run_context.runs_folder() / "overnight").exists()


def test_a_run_ends_well_with_one_line_when_the_comparison_cannot_be_made(carried, tmp_path, monkeypatch, capsys):
    run = here(tmp_path, monkeypatch)
    (carried / "raw" / "manifest.json").write_text("{")
    capsys.readouterr()
    runner._compare(run)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("not compared with the recorded run: UserError: artifact ")


def test_the_record_that_ships_compares_equal_with_itself():
    for folder in sorted(run_context.CARRIED.iterdir()):
        store = recorded.Store(folder)
        found = recorded.compare(store, store)
        assert len(found.stages) >= 8 and all(s.equal == s.of > 0 and not s.asked for s in found.stages)


texts = st.lists(st.text(max_size=30), min_size=1, max_size=12)


@given(texts, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_a_log_equals_itself_in_any_order(tmp_path_factory, texts, rng: random.Random):
    rows = [{"id": str(i), "record": f"r{i % 5}", "attempt": 1 + i // 5, "seed": i, "raw": t} for i, t in enumerate(texts)]
    with AppendLog(tmp_path_factory.mktemp("log") / "a.jsonl") as log:
        for row in rng.sample(rows, len(rows)):
            log.append(row)
        stage = recorded.compare_texts("a", rows, log.entries.values())
    assert (stage.equal, stage.of, stage.first) == (len(rows), len(rows), None)


@given(texts, st.data())
@settings(deadline=None, max_examples=50)
def test_one_changed_text_is_always_found(texts, data):
    rows = [{"record": f"r{i}", "seed": i, "raw": t} for i, t in enumerate(texts)]
    at = data.draw(st.integers(0, len(rows) - 1))
    changed = [dict(r) for r in rows]
    changed[at]["raw"] = data.draw(st.text(max_size=30).filter(lambda t: t != texts[at]))
    stage = recorded.compare_texts("a", rows, data.draw(st.permutations(changed)))
    assert stage.equal == len(rows) - 1 and stage.first["record"] == f"r{at}" and stage.first["here"] == changed[at]["raw"]


@pytest.mark.parametrize(
    ("how", "statuses", "times"), [({}, "ok", 1), ({"only": ["01"]}, "ok", 0), ({"start": "01"}, "ok", 0), ({}, "failed", 0)]
)
def test_only_a_whole_run_that_went_well_ends_with_the_comparison(how, statuses, times, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    monkeypatch.setattr(runner, "execute", lambda path, *_, **__: runner.Report(path.stem, statuses, 1.0))
    asked = []
    monkeypatch.setattr(recorded, "report", lambda run: asked.append(run.profile.name) or "")
    runner.run_all("smoke", **how)
    assert asked == ["smoke"] * times
