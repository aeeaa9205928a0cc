"""A run goes to another machine without its weights and goes on there."""

import subprocess
import sys

import pytest

from speed_core.files import UserError
from speed_core.runner import replay, run_archive
from speed_core.store.run_context import ROOT
from speed_core.study.runs import open_run


def train(run, name, parents, data=b"weights"):
    with run.store.stage(name, {"seed": 0}, parents) as draft:
        if draft:
            draft.file("adapter_model.safetensors").write_bytes(data)
            draft.file("training.json").write_text("{}")
    return run.store.made(name)


def write(run, name, parents, text='{"id": 1}\n'):
    with run.store.stage(name, {}, parents) as draft:
        if draft:
            draft.file("data.jsonl").write_text(text)
    return run.store.made(name)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Without weights, of a run with a junior that was read, an embedder that was not, and a point of a sweep; it is not here."""
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "there"))
    run = open_run("smoke", {})
    seeds = write(run, "seeds", [])
    write(run, "scores-mine-0", [train(run, "embedder-mine-0", [seeds])])
    write(run, "eval-junior", [train(run, "junior", [seeds])])
    train(run, "embedder-guided-0", [seeds])
    point = open_run("smoke", {"seed": 1}, variant="seed=1")
    write(point, "scores-mine-1", [train(point, "embedder-mine-1", [seeds])])  # a model that no stage of the run will read
    (point.folder / "times.jsonl").write_text("{}\n")
    run.log("seeds").parent.mkdir()
    run.log("seeds").write_text('{"id": "a"}\n')
    run_archive.export(run, tmp_path / "whole.tar.gz", weights=False)
    run_archive.export(run, tmp_path / "heavy.tar.gz")
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "here"))
    return tmp_path / "whole.tar.gz"


def test_what_was_made_from_a_model_needs_its_weights_no_longer_and_an_unread_model_is_trained_again(archive):
    run, _ = replay.take_in(archive, open_run)
    seeds, model = run.store.need("seeds"), run.store.need("embedder-mine-0")
    assert run.store.why_stale("embedder-mine-0", {"seed": 0}, [seeds]) == "" == run.store.why_stale("scores-mine-0", {}, [model])
    assert not list(run.folder.rglob("*.safetensors")) and run.store.made("embedder-guided-0") is None
    assert run.store.made("junior") is None and run.store.made("eval-junior") is not None, "it has more to write"
    assert run.log("seeds").read_text() == '{"id": "a"}\n'
    point = open_run("smoke", {"seed": 1}, variant="seed=1")
    assert point.store.why_stale("scores-mine-1", {}, [point.store.need("embedder-mine-1")]) == ""
    assert (point.folder / "times.jsonl").is_file()


def test_the_generators_travel_unless_they_are_left_out(archive):
    run, _ = replay.take_in(archive.with_name("heavy.tar.gz"), open_run)
    assert run.store.need("junior").weights() == run.store.root / "junior"
    assert [p.parent.name for p in run.folder.rglob("*.safetensors")].count("junior") == 1
    assert run.store.made("embedder-guided-0") is not None, "notebook 08 reads this one"


def test_a_model_is_left_behind_whole_when_a_stage_still_has_to_read_it_or_its_child_was_made_of_another(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "there"))
    run = open_run("smoke")
    seeds = write(run, "seeds", [])
    revisor = train(run, "revisor", [seeds])
    write(run, "revised", [revisor])
    with run.store.stage("revisor", {"seed": 1}, [seeds]) as draft:  # again, and what was made of the first is still there
        draft.file("adapter_model.safetensors").write_bytes(b"others")
    assert run.store.made("revised").manifest["parents"] == {"revisor": revisor.digest}
    run_archive.export(run, tmp_path / "a.tar.gz", weights=False)
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "here"))
    here, _ = replay.take_in(tmp_path / "a.tar.gz", open_run)
    assert here.store.made("revisor") is None and here.store.made("revised") is not None


def test_shipped_artifacts_without_their_weights_do_not_count(archive, tmp_path, monkeypatch):
    run, _ = replay.take_in(archive, open_run)
    monkeypatch.setenv("SPEED_SHIPPED", str(run.folder.parent))
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "third"))
    store = open_run("smoke").store
    assert store.get("seeds") is not None and store.get("embedder-mine-0") is None


def test_whoever_needs_the_weights_is_told_in_one_line_and_the_same_weights_leave_everything_as_it_is(archive):
    import shutil

    run, _ = replay.take_in(archive, open_run)
    seeds, before = run.store.need("seeds"), run.store.need("scores-mine-0").digest
    with pytest.raises(UserError, match="'embedder-mine-0' came without its weights .*remove its folder") as error:
        run.store.need("embedder-mine-0").weights()
    assert "\n" not in str(error.value)
    shutil.rmtree(run.store.root / "embedder-mine-0")
    again = train(run, "embedder-mine-0", [seeds])
    assert again.weights() == run.store.root / "embedder-mine-0"
    assert run.store.why_stale("scores-mine-0", {}, [again]) == "" and run.store.need("scores-mine-0").digest == before
    shutil.rmtree(run.store.root / "embedder-mine-0")
    assert "input.embedder-mine-0" in run.store.why_stale(
        "scores-mine-0", {}, [train(run, "embedder-mine-0", [seeds], b"others")]
    )


def test_the_same_run_gives_the_same_archive_again_also_from_where_it_was_taken_in(archive, tmp_path):
    run, _ = replay.take_in(archive, open_run)
    run_archive.export(run, tmp_path / "again.tar.gz", weights=False)
    assert (tmp_path / "again.tar.gz").read_bytes() == archive.read_bytes()


def test_another_file_that_is_there_already_stops_an_import_before_it_writes(archive):
    run = open_run("smoke")
    run.log("seeds").parent.mkdir()
    run.log("seeds").write_text("mine\n")
    with pytest.raises(UserError, match=r"log/seeds.jsonl: another one is there already"):
        replay.take_in(archive, open_run)
    assert run.log("seeds").read_text() == "mine\n" and not (run.store.root / "seeds").exists()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["../x", "notes/x", "variants/p/notes/x", "variants/../../x", "artifacts/../../../x"])
def test_an_archive_that_reaches_outside_of_the_run_is_refused(tmp_path, name, whole):
    import hashlib

    manifest = {
        "profile": "smoke",
        "whole": whole,
        "artifacts": {},
        "figures": {},
        "files": {name: hashlib.sha256(b"x").hexdigest()},
    }
    replay.pack(manifest, {name: b"x"}, tmp_path / "a.tar.gz")
    with pytest.raises(UserError, match="would land outside|no plain file"):
        replay.take_in(tmp_path / "a.tar.gz", open_run)


def test_the_two_commands_carry_a_run_over(archive, tmp_path):
    def speed(*words):
        return subprocess.run([sys.executable, "-m", "speed_core", *words], cwd=ROOT, capture_output=True, text=True)

    done = speed("import", str(archive))
    assert done.returncode == 0 and "go on: python -m speed_core run --profile smoke" in done.stdout, done.stderr
    done = speed("export", "--whole", "--no-weights", "--profile", "smoke", str(tmp_path / "b.tar.gz"))
    assert done.returncode == 0 and "sha256" in done.stdout
    assert (tmp_path / "b.tar.gz").read_bytes() == archive.read_bytes()


def test_a_file_that_is_not_what_its_manifest_says_does_not_travel(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    run = open_run("smoke")
    with run.store.stage("seeds", {}) as draft:
        draft.file("data.jsonl").write_text('{"a": 1}\n')
    (run.folder / "artifacts" / "seeds" / "data.jsonl").write_text('{"a": 2}\n')
    with pytest.raises(UserError, match="not what its manifest says"):
        run_archive.export(run, tmp_path / "out.tar.gz")
    assert not (tmp_path / "out.tar.gz").exists()


@pytest.mark.parametrize("text", ["{bad", "[]", "{}"])
def test_a_figures_record_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    run = open_run("smoke")
    run.figures.mkdir(parents=True, exist_ok=True)
    (run.figures / "01_x.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        replay.figures(run)
