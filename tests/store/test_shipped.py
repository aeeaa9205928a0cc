"""Upstream that somebody else made: when it is used, what is said, and that it is only read."""

import re
import shutil

import pytest

from speed_core.files import UserError
from speed_core.runner import batch
from speed_core.store import run_context
from speed_core.store.artifacts import Catalog, Store, open_notebook
from speed_core.store.run_context import ROOT
from speed_core.study import planning
from speed_core.study.runs import open_run
from speed_core.study.stage import find, notebook_of


def put(store, name, value, parents=()):
    with store.stage(name, {"x": value}, parents) as draft:
        draft.file("f").write_text(f"{store.root.name} {name} {value}")
    return store.made(name)


@pytest.fixture
def two(tmp_path):
    """A store whose folder is empty, and the store of the shipped folder behind it."""
    return Store(tmp_path / "mine", shipped=tmp_path / "theirs"), Store(tmp_path / "theirs")


def test_a_shipped_artifact_is_used_said_once_and_never_written_to(two, capsys):
    mine, theirs = two
    made = put(theirs, "a", 1)
    before = {p: p.stat().st_mtime_ns for p in theirs.root.rglob("*")}
    capsys.readouterr()
    assert mine.need("a").digest == mine.get("a").digest == made.digest and mine.made("a") is None
    assert capsys.readouterr().out == f"using shipped upstream 'a', digest {made.digest}\n"
    put(mine, "a", 2)
    assert before == {p: p.stat().st_mtime_ns for p in theirs.root.rglob("*")}


def test_what_was_made_here_wins_over_what_was_shipped(two):
    mine, theirs = two
    put(theirs, "a", 1)
    put(mine, "a", 2)
    assert mine.need("a").file("f").read_text() == "mine a 2" and not mine.get("a").shipped


def test_a_stage_of_the_open_notebook_is_made_although_one_of_its_name_is_shipped(two, capsys):
    mine, theirs = two
    put(theirs, "a", 1)
    assert mine.why_stale("a", {"x": 1}) == "not made yet"
    put(mine, "a", 1)
    assert "a: making it (not made yet)" in capsys.readouterr().out


def test_a_stage_of_an_earlier_notebook_is_taken_as_shipped_only_when_it_would_be_made_from_the_same(two, monkeypatch):
    mine, theirs = two
    parent = put(theirs, "parent", 1)
    put(theirs, "a", 1, [parent])
    mine.catalog = Catalog(notebook=lambda name: "03" if name == "a" else "")
    monkeypatch.setenv("SPEED_NOTEBOOK", "04_senior_generator.ipynb")
    with mine.stage("a", {"x": 1}, [mine.need("parent")]) as draft:
        assert draft is None
    assert mine.need("a").shipped
    assert put(mine, "a", 2, [parent]).file("f").read_text() == "mine a 2"
    put(mine, "parent", 1)
    assert put(mine, "parent", 3).digest != parent.digest and mine.why_stale("a", {"x": 2}, [mine.need("parent")])


def test_the_open_notebook_is_told_by_its_path_and_each_stage_has_its_own(fresh, monkeypatch):
    run = open_run("tiny")
    for path, number in (
        ("11_scaling_law.ipynb", "11"),
        ("07b_what_students_gain.ipynb", "07b"),
        ("classroom/05_data_revisor.ipynb", "05"),
        ("mine.ipynb", ""),
        ("", ""),
    ):
        monkeypatch.setenv("JPY_SESSION_NAME", path)
        assert open_notebook() == number
    numbers = {"seeds": "02", "eval-junior": "03", "eval-senior": "04", "embedder-guided-0": "08", "scores-guided-0": "09"}
    numbers |= {"mask": "07", "guided-gain": "07b", "student-1-guided-0": "07b", "scores-guide-topic": "07b"}
    numbers |= {"embedder-jr-0": "10", "scaling": "11", "embedder-of-nothing": ""}
    assert {name: notebook_of(run, name) for name in numbers} == numbers


def test_a_result_of_shipped_upstream_is_current_until_upstream_has_other_contents(two):
    mine, theirs = two
    put(theirs, "a", 1)
    put(mine, "b", 1, [mine.need("a")])
    assert mine.why_stale("b", {"x": 1}, [mine.need("a")]) == ""
    put(mine, "a", 2)
    assert mine.why_stale("b", {"x": 1}, [mine.need("a")]).startswith("input.a ")


def test_a_point_of_a_sweep_reads_its_base_first_and_shipped_upstream_last(two, tmp_path):
    base, theirs = two
    put(theirs, "a", 1)
    point = Store(tmp_path / "point", theirs.root, base=base.root)
    assert point.need("a").shipped
    put(base, "a", 2)
    assert point.need("a").file("f").read_text() == "mine a 2"
    put(theirs, "b", 1)
    assert point.why_stale("b", {"x": 1}) == "not made yet"


def test_a_damaged_shipped_file_is_refused_by_name(two):
    mine, theirs = two
    put(theirs, "a", 1).file("f").write_text("other")
    with pytest.raises(UserError, match="shipped artifact 'a': f has .* unpack the bundle again"):
        mine.need("a")


def test_without_shipped_upstream_the_error_names_both_ways_out(two):
    two[0].catalog = Catalog(notebook=lambda name: "03")
    with pytest.raises(UserError, match="--only 03, or unpack an offline bundle and set SPEED_SHIPPED") as error:
        two[0].need("junior")
    assert "\n" not in str(error.value)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A fresh clone: nothing is made, and only what the package carries is shipped."""
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    monkeypatch.delenv("SPEED_SHIPPED")
    monkeypatch.setattr(run_context, "ROOT", tmp_path)  # no bundle was unpacked there
    return tmp_path


def test_a_fresh_clone_has_data_and_scores_at_tiny_but_no_weights(fresh, capsys):
    store = open_run("tiny").store
    for name in ("tasks", "seeds", "root", "raw", "revised", "synthetic", "scores-untrained"):
        assert store.need(name).shipped and f"using shipped upstream {name!r}" in capsys.readouterr().out
    with pytest.raises(UserError, match="--profile tiny --only 03"):
        store.need("junior")
    assert not list((ROOT / "speed_core" / "assets" / "shipped").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("number", ["02", "12"])
def test_a_notebook_that_reads_data_only_starts_in_a_fresh_clone(tmp_path, monkeypatch, number):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    monkeypatch.setenv("SPEED_SHIPPED", str(tmp_path / "shipped"))
    (tmp_path / "shipped" / "tiny").mkdir(parents=True)
    (tmp_path / "shipped" / "tiny" / "artifacts").symlink_to(run_context.CARRIED / "tiny")
    (report,) = batch.run_all("tiny", only=[number])
    assert report.status == "ok", report.detail


def test_upstream_made_with_another_value_is_used_and_the_value_is_said(fresh, capsys):
    open_run("tiny", {"generation.temperature": 0.9, "curate.overlap_words": 4}).store.need("synthetic")
    assert "made with curate.overlap_words " in (out := capsys.readouterr().out) and ", this run says 4" in out
    open_run("tiny", {"embedding.margin": 0.1}).store.need("synthetic")
    assert capsys.readouterr().out.count("made with") == 0, "what later stages do is no matter of this one"


def test_upstream_that_answers_other_prompts_is_refused(fresh):
    with pytest.raises(UserError, match="'raw' answers other prompts than this run's; run .* --only 06") as error:
        open_run("tiny", {"synthesis.count": 48}).store.need("raw")
    assert "\n" not in str(error.value)


def test_the_plan_says_what_is_shipped_and_still_counts_its_stage(fresh):
    found = {s.name: s for s in planning.steps(open_run("tiny"))}
    assert found["seeds"].shipped and found["seeds"].reason == "not made yet" and not found["junior"].shipped
    text = planning.text(open_run("tiny"))
    assert "seeds: not made yet, shipped" in text and "can start first" in text and "using shipped" not in text
    line = next(x for x in text.splitlines() if "raw: not made yet" in x)
    assert re.fullmatch(r"  06 +\d+\.\d min +\d+\.\d GB +\d+\.\d MB  raw: .*; [\d,]+ tokens; reads senior", line), line


def test_a_replay_takes_nothing_shipped(fresh, monkeypatch):
    monkeypatch.setenv("SPEED_REPLAY", "1")
    with pytest.raises(UserError, match="none is shipped"):
        open_run("tiny").store.need("tasks")


def test_a_shipped_generator_is_an_input_of_what_it_writes(fresh, tmp_path, monkeypatch):
    junior = put(Store(tmp_path / "theirs" / "tiny" / "artifacts"), "junior", 1)
    for name in ("tasks", "seeds"):
        shutil.copytree(run_context.CARRIED / "tiny" / name, tmp_path / "theirs" / "tiny" / "artifacts" / name)
    monkeypatch.setenv("SPEED_SHIPPED", str(tmp_path / "theirs"))
    run = open_run("tiny")
    _, used, read = find(run, "eval-junior").decided_by(run)
    assert [a.digest for a in used] == [junior.digest] and not read
