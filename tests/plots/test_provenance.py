"""Figures know their inputs: what moved is found and named, and drawing again changes nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from speed_core.files import UserError, write_json
from speed_core.plots import basic, figures, provenance
from speed_core.runner import paper_sweeps
from speed_core.study import claims
from speed_core.study.runs import open_run

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"label": "Sr", "value": 0.5, "low": 0.1, "high": 0.9}, {"label": "Sr + Re", "value": 0.7, "low": 0.2, "high": 1.1}]


def problems(*given, **how):
    return provenance.inspect(*given, **how)[0]


def make(run, name, value, parents=(), **parameters):
    """A real artifact `name` whose contents are `value`; made again when they differ."""
    above = [run.store.need(p) for p in parents]
    with run.store.stage(name, {"value": value, **parameters}, above) as draft:
        if draft:
            write_json(draft.file("data.json"), value)
    return run.store.need(name)


def chain(run, seeds=1, embedder=1, scores=1):
    """seeds -> embedder-jr (with a training seed) -> scores-jr, as in a run."""
    make(run, "seeds", seeds)
    make(run, "embedder-jr", [seeds, embedder], ["seeds"], seed=7)
    return make(run, "scores-jr", [seeds, embedder, scores], ["embedder-jr"])


def draw(run, rows=ROWS):
    basic.estimates(run, "10_table2", rows, [run.store.need("scores-jr")], "Difference", "points", paper={"Sr": 0.3}, line=0)
    return run.figures


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """(run, folder of figures, folder of runs) with one figure whose input has two ancestors."""
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    run = open_run("smoke", {"junior.epochs": 3})
    chain(run)
    return run, draw(run), tmp_path


def test_a_record_names_inputs_ancestors_seeds_overrides_and_digests(drawn):
    run, folder, runs = drawn
    said = json.loads((folder / "10_table2.json").read_text())
    assert said["inputs"] == {"scores-jr": run.store.need("scores-jr").digest}
    assert said["upstream"] == {n: run.store.need(n).digest for n in ("embedder-jr", "seeds")}
    assert said["seeds"] == [7] and said["overrides"] == {"junior.epochs": 3} and said["profile"] == "smoke"
    assert {"device", "compute_types", "code", "written", "data_sha256", "svg_sha256"} <= set(said)
    assert provenance.inspect(folder, runs) == ([], []) and provenance.inspect(folder, runs, deep=True) == ([], [])


def test_drawing_the_same_numbers_again_changes_no_byte_not_even_the_date(drawn):
    run, folder, _ = drawn
    record = folder / "10_table2.json"
    said = json.loads(record.read_text())
    write_json(record, said | {"written": "2020-01-01T00:00:00Z"})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    draw(run)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    draw(run, ROWS[:1])
    assert json.loads(record.read_text())["written"] > said["written"][:10]


def test_an_input_that_moved_is_named_with_what_made_it_move(drawn):
    run, folder, runs = drawn
    chain(run, embedder=2)
    (line,) = problems(folder, runs)
    assert line.startswith("10_table2: stale, input scores-jr moved (") and line.endswith("because embedder-jr moved")
    chain(run, seeds=2)
    (line,) = problems(folder, runs)
    assert line.endswith("because seeds -> embedder-jr moved")
    draw(run)
    assert problems(folder, runs) == []


def test_an_input_remade_with_the_same_contents_has_not_moved(drawn):
    run, folder, runs = drawn
    with run.store.stage("scores-jr", {"other": "settings"}, [run.store.need("embedder-jr")]) as draft:
        write_json(draft.file("data.json"), [1, 1, 1])
    assert problems(folder, runs) == []


def test_a_figure_of_a_benchmark_is_stale_when_its_file_was_written_again(drawn, monkeypatch):
    run, folder, runs = drawn
    file = runs / "results" / "loss.json"
    row = {"method": "ours", "batch": 64, "status": "ok", "seconds": 0.1, "peak_mb": 2.0}
    write_json(file, {"rows": [row, row | {"method": "gist"}], "machine": {"cpu": "a CPU"}, "written": "2026-01-01"})
    monkeypatch.setattr(provenance, "ROOT", runs)
    figures.loss_cost(run, "07_loss_cost", file)
    assert problems(folder) == []
    write_json(
        file, {"rows": [row | {"seconds": 0.2}, row | {"method": "gist"}], "machine": {"cpu": "a CPU"}, "written": "2026-01-02"}
    )
    assert problems(folder) == ["07_loss_cost: stale, results/loss.json moved since it was drawn; run its notebook again"]


def test_something_upstream_made_again_makes_a_figure_stale_though_its_input_is_the_same(drawn):
    run, folder, runs = drawn
    make(run, "seeds", 2)
    (line,) = problems(folder, runs)
    assert "stale, input scores-jr is of an earlier seeds by way of embedder-jr: seeds moved (" in line
    make(run, "embedder-jr", [2, 1], ["seeds"], seed=7)
    (line,) = problems(folder, runs)
    assert "input scores-jr is of an earlier embedder-jr: embedder-jr moved" in line


def test_bytes_changed_behind_a_manifest_are_found_by_a_deep_check(drawn):
    run, folder, runs = drawn
    (run.store.root / "embedder-jr" / "data.json").write_text("[0]")
    assert problems(folder, runs) == []
    (line,) = problems(folder, runs, deep=True)
    assert "input scores-jr is of an earlier embedder-jr" in line
    (run.store.root / "scores-jr" / "data.json").write_text("[0]")
    (line,) = problems(folder, runs, deep=True)
    assert line.endswith("because its data.json was changed by hand")


@pytest.mark.parametrize(
    ("touch", "says"),
    [
        (lambda f: (f / "10_table2.csv").write_text("label,value\n"), "10_table2.csv: changed since 10_table2.json was written"),
        (lambda f: (f / "10_table2.svg").write_text("<svg/>"), "10_table2.svg: changed since 10_table2.json was written"),
        (lambda f: (f / "10_table2.json").unlink(), "10_table2: no .json beside it"),
        (lambda f: (f / "10_table2.csv").unlink(), "10_table2: no .csv beside it"),
        (lambda f: (f / "10_table2.svg").unlink(), "10_table2: no .svg beside it"),
        (lambda f: (f / "10_table2.json").write_text("{"), "10_table2.json: no record of a figure"),
    ],
)
def test_an_edited_or_missing_file_is_named(drawn, touch, says):
    _, folder, runs = drawn
    touch(folder)
    (line,) = problems(folder, runs)
    assert line.startswith(says)


def test_where_there_is_no_run_the_check_says_that_inputs_were_not_looked_at(drawn, tmp_path):
    run, folder, _ = drawn
    alone = tmp_path / "alone" / "figures"
    alone.parent.mkdir()
    folder.rename(alone)
    assert provenance.inspect(alone, tmp_path / "none") == ([], ["inputs not checked: no run here of profile smoke (1 figures)"])
    (run.store.root / "scores-jr" / "manifest.json").unlink()
    assert provenance.inspect(alone, tmp_path) == ([], ["10_table2: inputs not checked: scores-jr not in the run here"])


def test_a_point_of_a_sweep_is_checked_against_its_own_artifacts_and_those_of_its_base(drawn, monkeypatch):
    run, _, runs = drawn
    monkeypatch.setenv("SPEED_VARIANT", "lr=2")
    point = open_run("smoke")
    make(point, "scores-jr", "of the point", ["embedder-jr"])
    folder = draw(point)
    assert folder == runs / "smoke" / "variants" / "lr=2" / "figures" and problems(folder, runs) == []
    make(run, "scores-jr", "the base has another", ["embedder-jr"])
    assert problems(folder, runs) == []
    make(run, "embedder-jr", "moved", ["seeds"])
    assert "input scores-jr is of an earlier embedder-jr" in problems(folder, runs)[0]


def test_a_figure_over_several_points_keeps_their_inputs_apart(drawn, monkeypatch):
    run, _, runs = drawn
    points = []
    for value in (1, 2):
        monkeypatch.setenv("SPEED_VARIANT", f"lr={value}")
        points.append(open_run("smoke"))
        make(points[-1], "embedder-jr", value, ["seeds"], seed=value)
        make(points[-1], "scores-jr", value, ["embedder-jr"])
    inputs = [run.store.need("scores-jr"), *(p.store.need("scores-jr") for p in points)]
    basic.estimates(run, "10_sweeps", ROWS, inputs, "Sweep", "points")
    said = json.loads((run.figures / "10_sweeps.json").read_text())
    assert list(said["inputs"]) == ["scores-jr", "variants/lr=1/scores-jr", "variants/lr=2/scores-jr"]
    assert said["seeds"] == [1, 2, 7] and problems(run.figures, runs) == problems(run.figures, runs, deep=True) == []
    make(points[1], "embedder-jr", 3, ["seeds"], seed=2)
    (line,) = problems(run.figures, runs)
    assert "input variants/lr=2/scores-jr is of an earlier variants/lr=2/embedder-jr: " in line
    make(points[1], "scores-jr", 3, ["embedder-jr"])
    (line,) = problems(run.figures, runs)
    assert "input variants/lr=2/scores-jr moved (" in line and line.endswith("because variants/lr=2/embedder-jr moved")


def test_a_verdict_on_a_sweep_is_stale_when_a_point_of_the_sweep_moves(drawn, monkeypatch):
    run, _, runs = drawn
    sweep = next(s for s in paper_sweeps.SWEEPS if s.label == "temperature")
    points = [paper_sweeps.at_value(run, sweep, value) for value in (0.3, 1.0)]
    for point in points:
        make(point, "scores-jr", point.folder.name, ["embedder-jr"])
    used = [run.store.need("scores-jr"), *(p.store.need("scores-jr") for p in points)]
    made = paper_sweeps.keep(run, {"S12": {"value": 1.0}}, used)
    assert list(made.manifest["parents"]) == ["scores-jr", *(f"variants/{p.folder.name}/scores-jr" for p in points)]
    assert paper_sweeps.keep(run, {"S12": {"value": 1.0}}, used).manifest["written"] == made.manifest["written"]
    paper_sweeps.keep(run, {"S12": {"value": 1.0}}, used)
    paper_sweeps.keep(run, {}, [], "generators")
    assert run.store.made("study").manifest["written"] == made.manifest["written"] and not run.store.made("generators")
    basic.estimates(run, "12_map", ROWS, [made], "Verdicts", "points")
    assert problems(run.figures, runs) == []
    make(points[1], "scores-jr", "moved", ["embedder-jr"])
    (line,) = problems(run.figures, runs)
    assert line.startswith(f"12_map: stale, input study is of an earlier variants/{points[1].folder.name}/scores-jr: ")


def test_a_table_of_claims_that_is_not_the_plotted_one_is_found(drawn):
    run, folder, runs = drawn
    rows = claims.build({}, {}, {})
    figures.claim_map(run, "12_claims", rows, [])
    assert problems(folder) == ["claims.csv: not beside 12_claims.csv; run notebook 12 again"]
    claims.write(folder / "claims.csv", rows)
    assert problems(folder) == []
    text = (folder / "claims.csv").read_text()
    (folder / "claims.csv").write_text(text.replace("S3,", "S3,all of it, ", 1))
    assert problems(folder) == ["claims.csv: S3 not as in 12_claims.csv; run notebook 12 again"]
    (folder / "claims.csv").write_text("\n".join(text.splitlines()[:-1]) + "\n")
    assert problems(folder) == ["claims.csv: G9 not as in 12_claims.csv; run notebook 12 again"]


def test_the_command_ends_with_one_on_a_problem_and_two_on_a_folder_that_is_none(drawn):
    run, folder, _ = drawn
    speed = [sys.executable, "-m", "speed_core", "check"]
    assert subprocess.run([*speed, str(folder)], cwd=ROOT).returncode == 0
    chain(run, scores=2)
    done = subprocess.run([*speed, str(folder), "--deep"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "input scores-jr moved" in done.stdout and "1 figures, 1 problems" in done.stdout
    assert subprocess.run([*speed, str(folder / "none")], cwd=ROOT).returncode == 2


def test_nothing_to_plot_and_a_score_without_interval_are_refused(drawn):
    run, _, _ = drawn
    with pytest.raises(UserError, match="nothing to plot"):
        basic.curves(run, "empty", {"a": []}, ["loss"], [], "")
    with pytest.raises(UserError, match="without an interval"):
        basic.estimates(run, "bare", [{"label": "a", "value": 1}], [], "", "")
