"""The runner tells the truth about what papermill calls completed."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from speed_core import profile
from speed_core.__main__ import app as cli
from speed_core.__main__ import main
from speed_core.files import UserError
from speed_core.runner import notebook
from speed_core.store.artifacts import notebook_number

ROOT = Path(__file__).resolve().parents[2]


def small_notebook(path, *cells, parameters="x = 1  # a number\nrate = 0.1\nname = 'a'"):
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    nb.cells += [nbformat.v4.new_code_cell(c) for c in cells]
    nbformat.write(nb, path)
    return path


def test_a_good_run_takes_the_parameters_and_leaves_no_sentinel_behind(tmp_path):
    report = notebook.execute(
        small_notebook(tmp_path / "n.ipynb", "print(x, rate, name)"),
        tmp_path / "out" / "n.ipynb",
        {"x": 7, "rate": 1e-5},
        show=False,
    )
    assert report.status == "ok"
    done = nbformat.read(tmp_path / "out" / "n.ipynb", 4)
    text = "".join(o.get("text", "") for c in done.cells for o in c.get("outputs", []))
    assert text == "7 1e-05 a\n"


def test_relative_links_and_pictures_lead_to_the_same_files_from_the_output(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.svg").write_text("<svg/>")
    source = small_notebook(tmp_path / "in" / "n.ipynb", "print(1)")
    nb = nbformat.read(source, 4)
    text = "![a](../figures/a.svg) [web](https://example.org/a.svg) [gone](../figures/b.svg) [here](#top)"
    nb.cells.append(nbformat.v4.new_markdown_cell(text))
    nbformat.write(nb, source)
    assert notebook.execute(source, tmp_path / "runs" / "deep" / "n.ipynb", {}, show=False).status == "ok"
    found = nbformat.read(tmp_path / "runs" / "deep" / "n.ipynb", 4).cells[-1].source
    assert found == text.replace("![a](../figures/a.svg)", "![a](../../figures/a.svg)")


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("raise ValueError('bad thing')", "bad thing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "cell 2, `import os, signal; os.kill"),
        ("x = 1\nassert x == 2", "line `assert x == 2`: AssertionError"),
        ("import sys; sys.exit(0)", ""),
    ],
)
def test_exception_killed_kernel_and_exit_zero_all_count_as_failed(tmp_path, cell, says):
    target = tmp_path / "out.ipynb"
    target.write_text("the last good output")
    report = notebook.execute(small_notebook(tmp_path / "n.ipynb", cell, "print('after')"), target, {}, show=False)
    assert report.status == "failed" and says in report.detail and report.detail
    assert target.read_text() == "the last good output"
    assert (tmp_path / "out.failed.ipynb").exists() and not list(tmp_path.glob(".*ipynb"))


def test_a_cell_that_takes_too_long_counts_as_failed(tmp_path):
    source, target = small_notebook(tmp_path / "n.ipynb", "import time; time.sleep(60)"), tmp_path / "o.ipynb"
    target.write_text("the last good output")
    report = notebook.execute(source, target, {}, cell_timeout=2, show=False)
    assert report.status == "failed" and "time.sleep(60)" in report.detail and "longer than 2 s" in report.detail
    assert target.read_text() == "the last good output"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_the_kernel_too_and_keep_the_last_good_output(tmp_path, number, code):
    cell = "import os, time\nopen('kernel', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    source, target = small_notebook(tmp_path / "n.ipynb", "print('before')", cell), tmp_path / "out.ipynb"
    target.write_text("the last good output")
    child = subprocess.Popen([sys.executable, "-m", "speed_core", "execute", str(source), str(target)], stderr=subprocess.PIPE)
    pid_file = tmp_path / "kernel"
    while not (pid_file.exists() and pid_file.read_text()):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.1)
    time.sleep(0.5)
    child.send_signal(number)
    assert child.wait(60) in (code, 1), "ended as if nothing had happened"
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(pid_file.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(int(pid_file.read_text())), "the kernel is still there"
    assert target.read_text() == "the last good output" and not list(tmp_path.glob(".*ipynb"))
    kept = nbformat.read(tmp_path / "out.failed.ipynb", 4)
    assert notebook.unfinished(tmp_path / "out.failed.ipynb") and "before" in str(kept.cells[1].outputs)


def test_out_of_memory_counts_as_failed(tmp_path):
    cell = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\nx = bytearray(2**33)"
    report = notebook.execute(small_notebook(tmp_path / "n.ipynb", cell), tmp_path / "o.ipynb", {}, show=False)
    assert report.status == "failed" and "MemoryError" in report.detail


def test_twenty_thousand_progress_updates_stay_one_small_output_in_a_folder_that_was_missing(tmp_path):
    cell = "import sys, tqdm\nfor _ in tqdm.tqdm(range(20_000), file=sys.stdout, mininterval=0): pass"
    target = tmp_path / "not" / "yet" / "there.ipynb"
    report = notebook.execute(small_notebook(tmp_path / "n.ipynb", cell), target, {}, show=False)
    assert report.status == "ok", report.detail
    assert target.stat().st_size < 50_000 and sum(len(c.outputs) for c in nbformat.read(target, 4).cells) <= 2


def test_the_command_keeps_numbers_numbers_and_refuses_what_the_notebook_does_not_know(tmp_path):
    source = small_notebook(tmp_path / "n.ipynb", "print(type(rate).__name__, rate)")
    speed = [sys.executable, "-m", "speed_core", "execute", str(source), str(tmp_path / "o.ipynb"), "-p"]
    assert subprocess.run([*speed, "rate=1e-5"], capture_output=True).returncode == 0
    assert "float 1e-05" in str(nbformat.read(tmp_path / "o.ipynb", 4).cells)
    wrong = subprocess.run([*speed, "rat=1e-5"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "did you mean 'rate'" in wrong.stderr and len(wrong.stderr.splitlines()) == 1


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
        notebook.execute(small_notebook(tmp_path / "n.ipynb"), tmp_path / "o.ipynb", given)
    assert not (tmp_path / "o.ipynb").exists()


def test_cells_that_may_raise_or_are_skipped_by_their_tag_do_as_in_jupyter(tmp_path):
    path = small_notebook(tmp_path / "01_a.ipynb", "1 / 0", "skipped = True", "print('skipped' in globals())")
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].metadata["tags"], nb.cells[2].metadata["tags"] = ["raises-exception"], ["skip-execution"]
    nbformat.write(nb, path)
    report = notebook.execute(path, tmp_path / "out" / path.name, {}, show=False)
    assert report.status == "ok", report.detail
    cells = nbformat.read(tmp_path / "out" / path.name, as_version=4).cells
    assert [o.ename for c in cells for o in c.outputs if o.output_type == "error"] == ["ZeroDivisionError"]
    assert cells[-1].outputs[0].text == "False\n"
    nb.cells.append(nbformat.v4.new_code_cell("int('x')"))
    nbformat.write(nb, path)
    assert "ValueError" in notebook.execute(path, tmp_path / "out" / path.name, {}, show=False).detail


def test_half_of_a_pair_that_is_printed_is_shown_as_its_escape(tmp_path):
    path = small_notebook(
        tmp_path / "01_a.ipynb", "print('a', chr(0xd83d), '\u00e9')", "import sys; sys.stderr.write(chr(0xdc80)); 1"
    )
    report = notebook.execute(path, tmp_path / "out" / path.name, {}, show=False)
    assert report.status == "ok", report.detail
    cells = nbformat.read(tmp_path / "out" / path.name, as_version=4).cells
    assert cells[-2].outputs[0].text == "a \\ud83d \u00e9\n" and cells[-1].outputs[0].text == "\\udc80"


def test_every_kind_of_bad_input_is_told_from_a_fault_of_the_code(tmp_path):
    raised = 'MissingArtifact("junior", "artifact \'junior\': not made")'
    for says, bad in ((raised, True), ('OtherPrompts("others")', True), ('UserError("x")', True), ('ValueError("x")', False)):
        cell = f"from speed_core.files import MissingArtifact, OtherPrompts, UserError\nraise {says}"
        report = notebook.execute(small_notebook(tmp_path / "n.ipynb", cell), tmp_path / "o.ipynb", {}, show=False)
        assert report.bad_input is bad and ("UserError: " in report.detail) is bad, report.detail


def test_the_user_of_an_address_stands_in_no_parameter(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_URL_USERS", "{}")
    from speed_core import files, profile

    address, shown = "HTTP://me:p@ss@host:1/v1", "HTTP://host:1/v1"
    given = {"teacher.base_url": address, "generation.base_url": "https://you:k@host:1/v1"}
    p = profile.load("smoke", given)
    assert (p.teacher.base_url, p.generation.base_url) == (shown, "https://host:1/v1")
    assert files.with_user(shown) == address and files.with_user("https://host:1/v1") == "https://you:k@host:1/v1"
    assert files.without_users({"teacher": {"base_url": address}, "n": [1, address]}) == {
        "teacher": {"base_url": shown},
        "n": [1, shown],
    }
    path = small_notebook(tmp_path / "01_a.ipynb", "print(overrides)", parameters="overrides = {}")
    assert notebook.execute(path, tmp_path / "out.ipynb", {"overrides": {"teacher": given}}, show=False).status == "ok"
    assert "p@ss" not in (tmp_path / "out.ipynb").read_text() and "me:" not in (tmp_path / "out.ipynb").read_text()


def test_check_names_an_executed_notebook_that_was_changed(tmp_path):
    source, folder = small_notebook(tmp_path / "01_a.ipynb", "print('\u00e9' * 3)\n1 / 3"), tmp_path / "run" / "notebooks"
    target = folder / source.name
    assert notebook.execute(source, target, {}, show=False).status == "ok" and notebook.changed(folder) == []
    (tmp_path / "run" / "figures").mkdir()
    whole = target.read_bytes()
    for damaged in (whole.replace(b"0.333", b"0.334"), whole[:-20]):
        target.write_bytes(damaged)
        assert notebook.changed(folder) == ["01_a.ipynb: changed since it was executed; run it again"]
        assert CliRunner().invoke(cli, ["check", str(tmp_path / "run" / "figures")]).exit_code == 1


def test_an_address_with_a_query_is_refused_without_showing_it():
    query = "ends before its '[?]' or '#'; a key goes into OPENAI_API_KEY"
    for address, said in (
        ("https://host/v1?api-key=s3cret", query), ("https://me:s3cret@host/v1#s3cret", query),
        ("http://me:s3/cret@host/v1", "write / and @ in a user's key as %2F"), ("http://me:s3cret@host:80x/v1", "no address as in"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as refused:
            profile.load("smoke", {"teacher.base_url": address})
        assert "s3" not in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b'{"cells": 7}', "{}".encode("utf-16"), b"\xff\xfe\xff", b"{", b"\xefx"])
def test_a_file_that_is_no_notebook_is_refused_in_one_line(tmp_path, data):
    (tmp_path / "01_a.ipynb").write_bytes(data)
    with pytest.raises(UserError, match="01_a.ipynb: ") as refused:
        notebook.execute(tmp_path / "01_a.ipynb", tmp_path / "out" / "01_a.ipynb", {"x": 1}, show=False)
    assert "\n" not in str(refused.value) and not list((tmp_path / "out").glob("*"))


def test_a_notebook_with_a_byte_order_mark_runs(tmp_path):
    path = small_notebook(tmp_path / "01_a.ipynb", "print(x)")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert notebook.execute(path, tmp_path / "out.ipynb", {"x": 2}, show=False).status == "ok"


def test_a_printed_line_of_any_length_is_left_as_it_is():
    # Each was quadratic: minutes instead of a moment.
    for line in ("7" * 2_000_000, "\x1b[" * 1_000_000, "5%|" * 700_000):
        assert notebook.fold(line) == line and notebook.plain(f"first\n{line}") == line[:400]


def test_a_lost_tag_and_a_computed_parameter_are_refused(tmp_path):
    nb = small_notebook(tmp_path / "n.ipynb", parameters="x = 1\ny = x * 2")
    with pytest.raises(UserError, match="computed"):
        notebook.check_parameters(nb, {})
    plain = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 1")])
    nbformat.write(plain, tmp_path / "p.ipynb")
    with pytest.raises(UserError, match="tag"):
        notebook.check_parameters(tmp_path / "p.ipynb", {})


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


@pytest.mark.parametrize(
    ("code", "says"),
    [("EROFS", "cannot be read or written"), ("ENOSPC", "no room to write it"), ("EACCES", "cannot be read or written")],
)
@pytest.mark.parametrize(
    "words", [["run", "--profile", "smoke"], ["import"], ["export", "out.tar.gz"], ["plan", "--profile", "smoke"]]
)
def test_a_disk_that_takes_nothing_ends_in_one_line(tmp_path, monkeypatch, capsys, words, code, says):
    import errno
    import os

    def refuses(self, *args, **more):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), str(self))

    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(Path, "mkdir", refuses)
    monkeypatch.setattr("sys.argv", ["speed_core", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in error and "SPEED_RUNS" in error and "\n" not in error


@pytest.mark.parametrize("where", ["file/runs", "x" * 300])
@pytest.mark.parametrize("words", [["plan", "--profile", "smoke"], ["import"], ["execute", "a.ipynb", "WHERE/a.ipynb"]])
def test_a_folder_that_cannot_be_made_ends_in_one_line(tmp_path, monkeypatch, capsys, words, where):
    (tmp_path / "file").write_text("")
    small_notebook(tmp_path / "a.ipynb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / where))
    monkeypatch.setattr("sys.argv", ["speed_core", *(w.replace("WHERE", where) for w in words)])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "cannot be read or written" in error and "\n" not in error


@pytest.mark.parametrize("profile", ["smoke", "tiny", "workshop", "paper"])
def test_every_profile_prints_a_plan(profile, tmp_path, monkeypatch):
    from speed_core.__main__ import app

    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    result = CliRunner().invoke(app, ["plan", "--profile", profile])
    assert result.exit_code == 0 and "synthesis:" in result.output and "teacher" in result.output


def test_a_missing_model_folder_and_a_missing_package_name_the_remedy():
    from speed_core.models import loading

    with pytest.raises(UserError, match="no such folder"):
        loading.resolve("/nowhere/model")
    with pytest.raises(UserError, match="known packages|use one of"):
        loading.resolve("package:nothing")


def test_long_progress_is_folded_and_results_and_short_progress_stay():
    bars = "".join(f"m{i}: making it (not made yet)\nm{i}: 100%|####| 4/4 [00:01<00:00]\n" for i in range(20))
    folded = notebook.fold("first\n" + bars + "result 3.1\n")
    assert (
        folded.startswith("first\nm0: making it") and folded.endswith("result 3.1\n") and "(32 more lines of progress)" in folded
    )
    assert len(folded.splitlines()) == 11 and notebook.fold(bars[:200] + "\nx") == bars[:200] + "\nx"


@given(st.text("ab\r\n", max_size=40))
def test_carriage_returns_are_read_as_nbclient_reads_them(text):
    import nbclient.client

    with notebook._cells_may_raise():
        assert nbclient.client._RGX_CARRIAGERETURN.sub("", text) == re.sub(r".*\r(?=[^\n])", "", text)


def test_a_line_of_megabytes_is_kept_whole(tmp_path):
    code = "print('x ' * 2_000_000); print('10%\\r20%\\rdone')"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), source := tmp_path / "long.ipynb")
    assert notebook.execute(source, target := tmp_path / "o.ipynb", {}, show=False).status == "ok"
    assert nbformat.read(target, 4).cells[0].outputs[0].text == "x " * 2_000_000 + "\ndone\n"


def test_any_notebook_is_executed_as_it_is_and_refused_parameters_that_it_has_no_cell_for(tmp_path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import os\nprint(os.path.basename(os.getcwd()))")])
    nbformat.write(nb, source := tmp_path / "theirs.ipynb")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    assert notebook.execute(source, target := tmp_path / "o.ipynb", {}, cwd=elsewhere, show=False).status == "ok"
    assert nbformat.read(target, 4).cells[0].outputs[0].text == "elsewhere\n"
    with pytest.raises(UserError, match="0 cells tagged 'parameters'"):
        notebook.execute(source, target, {"a": 1}, show=False)


def test_a_parameter_without_a_default_takes_any_value_and_one_of_another_type_is_refused(tmp_path):
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("name = None\nflag = False", metadata={"tags": ["parameters"]})]
    )
    nbformat.write(nb, source := tmp_path / "n.ipynb")
    notebook.check_parameters(source, {"name": "a", "flag": True})
    notebook.check_parameters(source, {"name": 1.5})
    with pytest.raises(UserError, match="'flag'.*bool"):
        notebook.check_parameters(source, {"flag": "True"})
    nb.cells[0].source = "%matplotlib inline\nname = 1"
    nbformat.write(nb, source)
    with pytest.raises(UserError, match="line 1 of the parameters cell is no Python"):
        notebook.check_parameters(source, {"name": 2})


def test_parameters_of_a_file_and_of_the_command_line_come_as_papermill_takes_them(tmp_path):
    from speed_core.runner.arguments import overrides, yaml_file, yaml_values

    (path := tmp_path / "p.yaml").write_text("rate: 1e-5\nname: a\nlist: [1, 2]\n")
    assert yaml_file(path) == {"rate": 1e-5, "name": "a", "list": [1, 2]}
    assert overrides(["flag=True", "none=None", "x=1e-5", "t=abc"]) == {"flag": True, "none": None, "x": 1e-5, "t": "abc"}
    path.write_text("[1")
    with pytest.raises(UserError, match="give JSON or YAML"):
        yaml_file(path)
    with pytest.raises(UserError, match="No such file or directory; give a JSON or YAML file"):
        yaml_file(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="^-y: holds no name: value pairs"):
        yaml_values("[1, 2]", "-y")
    nb = small_notebook(tmp_path / "n.ipynb", "print(x, rate, name)")
    words = ["execute", str(nb), str(tmp_path / "o.ipynb"), "-f", str(path), "-y", "x: 3", "-r", "name=7", "-p", "x=4"]
    path.write_text("rate: 1e-5")
    done = subprocess.run([sys.executable, "-m", "speed_core", *words], capture_output=True, text=True)
    assert done.returncode == 0 and "4 1e-05 7" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--only", "03,77"], "--only 77: no such notebook; numbers are 00, 01"),
        (["--from", "99"], "--from 99: no such notebook"),
        (["--only", "3", "--from", "4"], "leaves no notebook"),
        (["--executor", "ray", "--only", "00"], "are for a sweep, and this is one run"),
        (["--executor", "magic", "--seed", "0,1"], "--executor 'magic': unknown; use process or ray"),
    ],
)
def test_what_names_no_notebook_or_does_nothing_is_refused_before_anything_runs(options, says, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "speed_core", "run", "--profile", "smoke", *options], capture_output=True, text=True
    )
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.ipynb"))


def test_a_number_without_its_zero_is_that_notebook(tmp_path):
    assert [p.stem for p in notebook.choose(ROOT / "notebooks", ["3", "04"])] == ["03_junior_generator", "04_senior_generator"]
    assert [p.stem[:2] for p in notebook.choose(ROOT / "notebooks", start="11")] == ["11", "12"]


def test_a_number_is_all_of_its_parts_and_a_letter_is_one_of_them():
    def chosen(*only, start=""):
        return [notebook_number(p) for p in notebook.choose(ROOT / "notebooks", only, start)]

    assert chosen("07") == chosen("7") == ["07", "07b"] and chosen("7b") == chosen("07b") == ["07b"]
    assert chosen(start="07b")[:2] == ["07b", "08"] and chosen(start="8")[0] == "08"
    with pytest.raises(UserError, match="--only 8b: no such notebook; .* 07, 07b, 08"):
        chosen("8b")


def test_past_predictions_are_compared_with_what_the_stages_took(tmp_path, monkeypatch):
    from speed_core.study import forecast, planning
    from speed_core.study.runs import open_run
    from speed_core.study.stage import find

    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    junior = find(open_run("smoke"), "junior")
    rows = {
        "junior": [10.0, 1, 1, None, "junior", junior.work(open_run("smoke").profile)],
        "seeds": [3.0, 1, 1, None, "seeds", 1],
    }
    (tmp_path / "times.json").write_text(json.dumps({"smoke": {"device": "cpu", "artifacts": rows}}))
    monkeypatch.setattr(forecast, "RECORDED", tmp_path / "times.json")
    here = open_run("smoke")
    assert planning.past_error(here) == ""
    took = {"senior": (5.0, 4.0), "junior": (8.0, None), "seeds": (3.0, None), "unknown": (7.0, None), "pairs": (0.5, 9.0)}
    for name, (seconds, said) in took.items():
        (here.store.root / name).mkdir(parents=True)
        manifest = {"name": name, "seconds": seconds, "files": {}, "parameters": {}, "parents": {}} | (
            {"predicted_seconds": said} if said else {}
        )
        (here.store.root / name / "manifest.json").write_text(json.dumps(manifest))
    assert planning.past_error(here) == "past predictions were off by 22% (median of 2 stages)"


def test_a_plan_takes_the_options_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    from speed_core.runner import preflight

    shown = preflight.plan_text("smoke", {}, only=["3"], seed=1).split("\nstages ")[1]
    assert " 03 " in shown and "junior" in shown and " 04 " not in shown and "senior" not in shown
    priced = {"teacher.kind": "openai", "teacher.model": "m", "teacher.prices": [{"model": "m", "input": 2.0, "output": 8.0}]}
    line = next(x for x in preflight.plan_text("smoke", priced).splitlines() if " seeds: " in x)
    assert line.endswith("asks the teacher: 48 calls, about 19,200 tokens, 0.10 USD")
    with pytest.raises(UserError, match="--from 44: no such notebook"):
        preflight.plan_text("smoke", {}, start="44")
