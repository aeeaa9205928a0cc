"""The runner tells the truth about what papermill calls completed."""

import nbformat
import pytest
from typer.testing import CliRunner

from speed_core import run
from speed_core.__main__ import main
from speed_core.artifacts import UserError


def notebook(path, *cells, parameters="x = 1  # a number\nrate = 0.1\nname = 'a'"):
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    nb.cells += [nbformat.v4.new_code_cell(c) for c in cells]
    nbformat.write(nb, path)
    return path


def test_a_good_run_takes_the_parameters_and_leaves_no_sentinel_behind(tmp_path):
    report = run.execute(
        notebook(tmp_path / "n.ipynb", "print(x, rate, name)"), tmp_path / "out" / "n.ipynb", {"x": 7, "rate": 1e-5}, show=False
    )
    assert report.status == "ok"
    done = nbformat.read(tmp_path / "out" / "n.ipynb", 4)
    text = "".join(o.get("text", "") for c in done.cells for o in c.get("outputs", []))
    assert text == "7 1e-05 a\n"


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("raise ValueError('bad thing')", "bad thing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ""),
        ("import sys; sys.exit(0)", ""),
    ],
)
def test_exception_killed_kernel_and_exit_zero_all_count_as_failed(tmp_path, cell, says):
    target = tmp_path / "out.ipynb"
    target.write_text("the last good output")
    report = run.execute(notebook(tmp_path / "n.ipynb", cell, "print('after')"), target, {}, show=False)
    assert report.status == "failed" and says in report.detail and report.detail
    assert target.read_text() == "the last good output"
    assert (tmp_path / "out.failed.ipynb").exists() and not list(tmp_path.glob(".*ipynb"))


def test_a_cell_that_takes_too_long_counts_as_failed(tmp_path):
    source = notebook(tmp_path / "n.ipynb", "import time; time.sleep(60)")
    assert run.execute(source, tmp_path / "o.ipynb", {}, cell_timeout=2, show=False).status == "failed"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"xx": 5}, "did you mean 'x'"),
        ({"x": "5"}, "is str"),
        ({"x": 1.5}, "is float"),
        ({"x": True}, "is bool"),
        ({"name": 3}, "is int"),
    ],
)
def test_unknown_names_and_wrong_types_are_refused_before_anything_runs(tmp_path, given, says):
    with pytest.raises(UserError, match=says):
        run.execute(notebook(tmp_path / "n.ipynb"), tmp_path / "o.ipynb", given)
    assert not (tmp_path / "o.ipynb").exists()


def test_a_lost_tag_and_a_computed_parameter_are_refused(tmp_path):
    nb = notebook(tmp_path / "n.ipynb", parameters="x = 1\ny = x * 2")
    with pytest.raises(UserError, match="computed"):
        run.check_parameters(nb, {})
    plain = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 1")])
    nbformat.write(plain, tmp_path / "p.ipynb")
    with pytest.raises(UserError, match="tag"):
        run.check_parameters(tmp_path / "p.ipynb", {})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--profile", "tinny"], "did you mean 'tiny'"),
        (["run", "--profile", "smoke", "--set", "junior.lrr=1"], "did you mean"),
        (["run", "--profile", "smoke", "--only", "77"], "no such notebook"),
        (["plan", "--set", 'models.generator="package:nothing"', "--set", "x"], "no '='"),
        (["execute", "missing.ipynb", "out.ipynb"], "no such file"),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(monkeypatch, capsys, arguments, says):
    monkeypatch.setattr("sys.argv", ["speed_core", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in error and "\n" not in error


@pytest.mark.parametrize("profile", ["smoke", "tiny", "workshop", "paper"])
def test_every_profile_prints_a_plan(profile, tmp_path, monkeypatch):
    from speed_core.__main__ import app

    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    result = CliRunner().invoke(app, ["plan", "--profile", profile])
    assert result.exit_code == 0 and "synthesis:" in result.output and "teacher" in result.output


def test_a_missing_model_folder_and_a_missing_package_name_the_remedy():
    from speed_core import models

    with pytest.raises(UserError, match="no such folder"):
        models.resolve("/nowhere/model")
    with pytest.raises(UserError, match="known packages|use one of"):
        models.resolve("package:nothing")
