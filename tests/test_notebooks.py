"""The notebooks as files, and all of them executed at the smoke size."""

import csv
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import drawings
import nbformat
import pytest

import captions
import classroom
from speed_core.files import file_digest
from speed_core.plots import provenance
from speed_core.runner import batch, notebook
from speed_core.store.artifacts import notebook_number
from speed_core.study import claims, verdicts
from workbook import exercises

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = notebook.notebooks(ROOT / "notebooks")


def test_they_are_numbered_in_order_and_the_students_have_a_part_of_07():
    numbers = [f"{i:02}" for i in range(13)]
    assert [notebook_number(p) for p in NOTEBOOKS] == [*numbers[:8], "07b", *numbers[8:]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_committed_notebook_is_clean_and_keeps_the_grammar(path):
    nb = nbformat.read(path, 4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in code), "outputs are not committed"
    assert set(notebook.parameters_of(path)) == {"profile", "seed", "overrides"}
    assert sum(c.cell_type == "markdown" for c in nb.cells) >= len(code), "each cell has a sentence"
    text = "\n".join(c.source for c in nb.cells)
    assert nb.cells[0].source.startswith(f"# {notebook_number(path)} - ")
    assert "## Exercises" in text
    check = next(i for i, c in enumerate(nb.cells) if re.search(r"^(## Check$|\*\*Check\.\*\*)", c.source, re.M))
    assert "assert" in nb.cells[check + 1].source
    assert all(len(c.source.splitlines()) <= 18 for c in code), "cells stay short"
    assert sum(c.source.count("open_run(profile") for c in code) == 1, "opened twice, a run says its shipped upstream twice"


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda p: p.stem)
def test_the_idea_is_shown_in_short_code_of_the_package(path):
    cells = nbformat.read(path, 4).cells
    code, section, inside = [c.source for c in cells if c.cell_type == "code"], "", []
    for cell in cells:
        for heading in re.findall(r"^## (.+)$", cell.source, re.M) if cell.cell_type == "markdown" else ():
            section = heading
        if cell.cell_type == "code" and section == "The idea in code":
            inside.append(cell.source)
    assert any("show.source(" in source for source in inside), "no source in the section of the idea"
    shown = [name for source in code for call in re.findall(r"show\.source\(([^)]*)\)", source) for name in call.split(", ")]
    imports = "\n".join(line for source in code for line in source.splitlines() if line.startswith("from "))
    known: dict = {}
    exec(imports, known)
    for name in shown:
        assert len(inspect.getsource(eval(name, known)).splitlines()) <= 25, name


def test_each_recorded_figure_is_read_in_a_sentence_of_its_own_numbers():
    seen = []
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "markdown" and (found := captions.PICTURE.search(cell.source)):
                seen.append(found[1])
                assert cell.source.startswith(captions.LEADS), f"{path.stem}: {found[1]} is not said to be recorded"
                assert captions.under_pictures(cell.source, ROOT / "figures") == cell.source, "run `python scripts/captions.py`"
    assert sorted(seen) == sorted(captions.READINGS)


def digests(folder):
    return {str(p.relative_to(folder)): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def gather(own, runs):
    """Move what a notebook left in its own run folder into `runs`, where nothing that is there is replaced."""
    for kind in ("artifacts", "log", "figures", "notebooks"):
        for path in (own / kind).glob("[!.]*"):
            target = runs / kind / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                path.rename(target)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder of the runs, {notebook: (report, artifacts it made, did it leave upstream as it was)}), all at smoke.

    Each notebook runs first: in an empty run folder, with what the earlier ones made as shipped upstream. What it makes is
    added there, so the folder ends as one whole run.
    """
    runs, done = tmp_path_factory.mktemp("runs"), {}
    for path in NOTEBOOKS:
        own, before = tmp_path_factory.mktemp(path.stem), digests(runs / "smoke" / "artifacts")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPEED_RUNS", str(own))
            patch.setenv("SPEED_SHIPPED", str(runs))
            patch.setattr(batch, "choose", lambda *_, path=path: [path])  # `only` 07 would be 07b too
            (report,) = batch.run_all("smoke")
        made = {p.parent.name for p in (own / "smoke" / "artifacts").glob("*/manifest.json")}
        done[path.stem] = report, made, digests(runs / "smoke" / "artifacts") == before
        gather(own / "smoke", runs / "smoke")
        shutil.rmtree(own)
        if report.status != "ok":
            break
    return runs, done


ALONE = pytest.param("alone", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["in order", ALONE])
def smoke(request, tmp_path_factory):
    """(folder of the runs, reports) of all notebooks at smoke: of one run from 00 to 12, or of `alone`, nothing shipped any more."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "alone":
            runs, done = request.getfixturevalue("alone")
            patch.setenv("SPEED_RUNS", str(runs))
            yield runs, [report for report, _, _ in done.values()]
        else:
            runs = tmp_path_factory.mktemp("in-order")
            patch.setenv("SPEED_RUNS", str(runs))
            yield runs, batch.run_all("smoke")


on_alone = pytest.mark.parametrize("smoke", [ALONE], indirect=True)  # of tests that execute notebooks again


OWN = {
    "01": "tasks", "02": "seeds", "03": "junior", "04": "senior", "05": "revisor", "06": "synthetic", "07": "mask",
    "07b": "guided-gain", "08": "embedder-guided-0", "09": "scores-guided-0", "10": "scores-sr_re-0", "11": "scaling",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_any_notebook_runs_first_on_shipped_upstream_and_says_so(alone, path):
    runs, done = alone
    assert path.stem in done, f"not run: an earlier one failed: {list(done.values())[-1][0]}"
    report, made, untouched = done[path.stem]
    assert report.status == "ok", report.detail
    shown = [
        o.get("text", "") for c in nbformat.read(runs / "smoke" / "notebooks" / path.name, 4).cells for o in c.get("outputs", [])
    ]
    upstream = re.findall(r"using shipped upstream '(.+)', digest [0-9a-f]{16}(.*)", "".join(shown))
    number = notebook_number(path)
    assert bool(upstream) == (number >= "02") and not any(note for _, note in upstream), upstream
    assert len({name for name, _ in upstream}) == len(upstream), "said more than once"
    assert OWN.get(number) in made or number not in OWN, "its own stage did not run"
    assert not made & {name for name, _ in upstream} and untouched


def test_every_notebook_runs_at_the_smoke_size(smoke):
    runs, reports = smoke
    assert [r.status for r in reports] == ["ok"] * len(NOTEBOOKS), [r for r in reports if r.status != "ok"]
    folder = runs / "smoke" / "figures"
    assert provenance.inspect(folder, runs)[0] == [] and len(list(folder.glob("*.svg"))) >= 15
    assert [p.stem for p in folder.glob("*.svg") if drawings.smallest_text(p) <= 8] == []
    with (folder / "12_claims.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == len(claims.CLAIMS) and all(r["verdict"] for r in rows)
    for path in (runs / "smoke" / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            for output in cell.get("outputs", []):
                result = output.get("data", {}).get("text/plain", "")
                assert not result.startswith("Artifact("), f"{path.stem}: a cell ends in an artifact: {result[:100]}"
                shown = output.get("text", "") if output.output_type == "stream" else ""
                assert "Warning" not in shown, f"{path.stem}: a warning in a cell's output: {shown[:300]}"


def test_an_export_to_html_shows_every_text_and_waits_for_no_widget(smoke):
    from nbconvert import HTMLExporter

    runs, _ = smoke
    shown = {}
    for path in NOTEBOOKS:
        done = nbformat.read(runs / "smoke" / "notebooks" / path.name, 4)
        assert "widgets" not in done.metadata, f"{path.stem}: a widget was made although nobody watches"
        shown[notebook_number(path)] = page = HTMLExporter(template_name="lab").from_notebook_node(done)[0]
        stderr = 'data-mime-type="application/vnd.jupyter.stderr"'  # the bare name is in every page's style sheet
        for bad in ("Loading widget", 'widget-view+json">', "Traceback (most recent call last)", stderr):
            assert bad not in page, f"{path.stem}: {bad}"
        pictures = re.findall(r"<img[^>]*>", page)
        assert all('alt="' in p and 'alt=""' not in p for p in pictures), f"{path.stem}: a picture without alternative text"
        levels = [int(n) for n in re.findall(r"<h([1-6])", page)]
        assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False)), f"{path.stem}: {levels}"
    for number, head in {"03": "share, 95% interval", "06": "stage, status, reason", "07": "positive-positive"}.items():
        assert head in shown[number], f"{number}: the text in place of its widget"


def said(path):
    """What the checker cells of an executed notebook printed, a line each."""
    checkers = classroom.tagged(nbformat.read(path, 4), "checker")
    return ["".join(o.get("text", "") for o in c.outputs).strip() for c in checkers]


def test_every_solution_is_right_on_the_artifacts_of_a_run(smoke):
    runs, _ = smoke
    for path in NOTEBOOKS[1:]:
        lines = said(runs / "smoke" / "notebooks" / path.name)
        assert lines == [f"{notebook_number(path)}.{k}: right" for k in range(1, len(lines) + 1)] and lines


@on_alone
def test_an_unsolved_copy_runs_to_its_end_and_says_what_is_missing(smoke, tmp_path, monkeypatch):
    runs, _ = smoke
    monkeypatch.setenv("SPEED_RUNS", str(runs))
    for path in classroom.write(tmp_path / "classroom"):
        if notebook_number(path) in ("01", "02", "12"):  # the light ones; tests/notebooks/test_exercises.py has the stubs of all
            report = notebook.execute(path, tmp_path / "done" / path.name, {"profile": "smoke"}, show=False)
            assert report.status == "ok", report.detail
            lines = said(tmp_path / "done" / path.name)
            assert lines and all("not yet - " in line and exercises.UNANSWERED in line for line in lines)


@on_alone
@pytest.mark.parametrize("number", ["01", "02", "07", "08", "11", "12"])
def test_every_cell_can_run_twice_in_a_row(smoke, number, tmp_path, monkeypatch):
    runs, _ = smoke
    monkeypatch.setenv("SPEED_RUNS", str(runs))
    (path,) = [p for p in NOTEBOOKS if notebook_number(p) == number]
    nb = nbformat.read(path, 4)
    parameters, *rest = [c for c in nb.cells if c.cell_type == "code"]
    nb.cells = [parameters] + [nbformat.v4.new_code_cell(c.source) for c in rest for _ in range(2)]
    nbformat.write(nb, tmp_path / path.name)
    report = notebook.execute(tmp_path / path.name, tmp_path / "done.ipynb", {"profile": "smoke"}, cwd=path.parent, show=False)
    assert report.status == "ok", report.detail


@on_alone
def test_a_second_run_finds_every_artifact_current_and_makes_nothing_again(smoke):
    runs, _ = smoke
    before = {p: p.stat().st_mtime for p in (runs / "smoke" / "artifacts").glob("*/manifest.json")}
    assert all(r.status == "ok" for r in batch.run_all("smoke", only=["02", "03", "06", "09"]))
    assert len(before) > 20 and before == {p: p.stat().st_mtime for p in before}


def test_the_plan_names_exactly_the_stages_that_a_run_makes_and_why_they_would_run_again(smoke):
    from speed_core.study import planning
    from speed_core.study.runs import open_run

    runs, _ = smoke
    found = planning.steps(open_run("smoke"))
    written_by_notebooks = {"mask", "mixed", "guided-gain", "scaling", "second-pass", "hard-negatives", "judge-check"}
    made = {p.parent.name for p in (runs / "smoke" / "artifacts").glob("*/manifest.json")}
    assert {s.name for s in found} == made - written_by_notebooks and [s.reason for s in found] == [""] * len(found)
    assert all(s.seconds is not None and s.disk_mb is not None and s.peak_mb for s in found)
    warmer = {s.name: s for s in planning.steps(open_run("smoke", {"generation.temperature": 0.9}))}
    assert warmer["eval-base"].reason == "decoding.temperature 0.7 -> 0.9" and not warmer["eval-base"].follows
    assert warmer["pairs"].reason == "if input.root changes" and warmer["pairs"].follows
    assert warmer["junior"].reason == warmer["tasks"].reason == ""


@on_alone
def test_a_point_of_a_sweep_is_read_once_it_was_run_and_compared_with_the_runs_own(smoke, monkeypatch):
    import dataclasses

    from speed_core.runner import paper_sweeps, sweep
    from speed_core.study.runs import open_run

    runs, _ = smoke
    monkeypatch.setenv("SPEED_RUNS", str(runs))
    one = dataclasses.replace(paper_sweeps.SWEEPS[0], values=(1.0,))
    here = open_run("smoke")
    assert list(paper_sweeps.collect(here, one)[0]) == [0.7]
    assert [code for _, code in sweep.run_points("smoke", [paper_sweeps.point(here, one, 1.0)], only=one.notebooks)] == [0]
    made = {p.parent.name for p in (runs / "smoke" / "variants").glob("*/artifacts/*/manifest.json")}
    assert {"raw-junior", "synthetic-jr", "embedder-jr-0", "scores-jr-0"} <= made and not any("sr" in m for m in made)
    found, inputs = paper_sweeps.collect(here, one)
    assert sorted(found) == [0.7, 1.0] and len(inputs) == 2
    rows = paper_sweeps.rows(here, one, found)
    assert [r["value"] for r in rows if r["own"]] == [0] and paper_sweeps.estimate(one, found) is None
    own = [r["records"] for r in rows if r["own"]]
    assert own == [here.store.need("embedder-jr-0").json("training.json")["rows"]] and all(r["records"] for r in rows)
    assert paper_sweeps.estimate(one, {1: found[0.7], 2: found[1.0], 3: found[0.7]})["value"] == pytest.approx(rows[1]["value"])


def test_the_plan_of_other_prompts_names_what_would_be_asked_again(smoke, monkeypatch):
    from speed_core.study import planning
    from speed_core.study.runs import open_run

    monkeypatch.setenv("SPEED_RUNS", str(smoke[0]))
    reasons = {s.name: s.reason for s in planning.steps(open_run("smoke", {"topics.tasks_per_topic": 2}))}
    assert reasons["raw"].startswith("prompts ") and reasons["raw-junior"].startswith("prompts ")
    assert reasons["revised-junior"] == "input.raw-junior will answer other prompts" and not reasons["seeds"]


@on_alone
def test_data_sets_and_figures_are_rebuilt_elsewhere_from_the_log_alone_without_weights(smoke, tmp_path):
    from speed_core.study.runs import open_run
    from speed_core.study.stage import rebuilt

    speed = [sys.executable, "-m", "speed_core"]
    archive = str(tmp_path / "smoke.tar.gz")
    subprocess.run([*speed, "export", archive, "--profile", "smoke"], check=True, cwd=ROOT)
    elsewhere = os.environ | {"SPEED_RUNS": str(tmp_path / "elsewhere")}
    done = subprocess.run([*speed, "import", archive], capture_output=True, text=True, cwd=ROOT, env=elsewhere)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    same = [line.split()[0] for line in done.stdout.splitlines() if line.endswith(" same")]
    assert set(rebuilt(open_run("smoke"))) <= set(same) and "DIFFERENT" not in done.stdout
    assert {"02_seed_yield", "03_valid_rate", "04_senior_against_junior", "05_revision", "06_yield"} <= set(same)
    assert not list((tmp_path / "elsewhere").rglob("*.safetensors"))


def test_a_touched_figure_is_found(tmp_path):
    (tmp_path / "a.svg").write_text("x")
    assert "no .csv" in provenance.inspect(tmp_path)[0][0]


def test_committed_figures_agree_with_their_records():
    assert provenance.inspect(ROOT / "figures")[0] == []


def test_a_verdict_follows_from_its_interval():
    assert verdicts.verdict(0.1, 0.5) == "smaller scale, same direction"
    assert verdicts.verdict(-0.5, -0.1) == "contradicted"
    assert verdicts.verdict(-0.1, 0.5) == "not resolved at this size"
