"""Logs leave in one archive, come back only whole, and rebuild what was sampled without any weights."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc

import pytest
from archives import read_archive, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled import sample

from speed_core.files import AppendLog, UserError
from speed_core.generation import generate
from speed_core.runner import replay
from speed_core.study.runs import open_run
from speed_core.study.stage import rebuilt

DECODING = generate.Decoding(max_new_tokens=20)
REQUESTS = [generate.Request(f"r{i}", f"prompt {i}", "sts", i) for i in range(5)]


def write_log(path, requests=REQUESTS, model="weights+adapter"):
    with AppendLog(path) as log:
        for r in requests:
            key = generate.request_id(r, model, DECODING)
            log.append(
                {"id": key, "record": r.id, "kind": r.kind, "raw": f"text {r.id}", "model": model, "finish_reason": "stop"}
                | {"status": "ok", "reason": ""}
            )


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "there"))
    made = open_run("smoke")
    write_log(made.log("raw"))
    return made


def test_every_request_is_answered_from_the_log_in_order_and_without_weights(run):
    backwards = REQUESTS[::-1]
    assert [e["raw"] for e in generate.replay(backwards, run.log("raw"), DECODING)] == [f"text {r.id}" for r in backwards]


@pytest.mark.parametrize(
    "change",
    [
        {"requests": [generate.Request("r1", "another prompt", "sts", 1)]},
        {"requests": [generate.Request("r1", "prompt 1", "sts", 2)]},
        {"requests": [generate.Request("r9", "prompt 9", "sts", 9)]},
        {"decoding": generate.Decoding(temperature=0.5, max_new_tokens=20)},
    ],
)
def test_another_prompt_seed_record_or_decoding_is_refused(run, change):
    with pytest.raises(UserError, match="holds no outcome of record r"):
        generate.replay(change.get("requests", REQUESTS), run.log("raw"), change.get("decoding", DECODING))


def test_an_export_comes_back_byte_for_byte_and_the_same_logs_give_the_same_archive(run, tmp_path, monkeypatch):
    one, other = (replay.export_logs(run, tmp_path / f"{k}.tar.gz") for k in "ab")
    assert one == other
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "here"))
    again, whole = replay.take_in(tmp_path / "a.tar.gz", open_run)
    assert not whole and again.log("raw").read_bytes() == run.log("raw").read_bytes() and again.log("raw") != run.log("raw")
    with again.log("raw").open("a") as f:
        f.write("{}\n")
    with pytest.raises(UserError, match="another one is there already"):
        replay.take_in(tmp_path / "a.tar.gz", open_run)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_one_changed_or_missing_byte_is_always_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEED_RUNS", str(folder))
        run = open_run("smoke")
        write_log(run.log("raw"))
        whole = folder / "whole.tar.gz"
        replay.export_logs(run, whole)
    good = read_archive(whole)
    content = bytearray(whole.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    damaged = folder / "damaged.tar.gz"
    damaged.write_bytes(content)
    try:
        assert read_archive(damaged) == good  # a byte of gzip's own header may change and mean nothing
    except UserError as error:
        assert "again" in str(error) and "\n" not in str(error)


def test_a_manifest_that_lies_is_refused(run, tmp_path):
    replay.export_logs(run, tmp_path / "a.tar.gz")
    data = (
        gzip.decompress((tmp_path / "a.tar.gz").read_bytes())
        .replace(b'"text r1', b'"text rX'[:8])
        .replace(b"text r1", b"text rX")
    )
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(data))
    with pytest.raises(UserError, match="log/raw.jsonl has digest"):
        read_archive(tmp_path / "b.tar.gz")


def test_a_replaying_run_samples_from_the_log(run, monkeypatch):
    from speed_core.data import prompts
    from speed_core.models import training

    planned = [prompts.synthesis("sts", f"Topic {i}", "") for i in range(3)]
    g = run.profile.generation
    decoding = generate.Decoding(g.temperature, g.top_p, g.max_new_tokens, g.constrained)
    with AppendLog(run.log("made")) as log:
        for q in planned:
            seed = int(prompts.text_digest(f"{q.id}|{run.profile.seed}")[:8], 16) & 0x7FFFFFFF
            request = generate.Request(q.id, training.prompt_text(q.text), q.kind, seed)
            text = json.dumps({"S1": q.id, "S2": "b", "S3": "c"})
            entry = {
                "id": generate.request_id(request, "gone", decoding),
                "record": q.id,
                "kind": q.kind,
                "model": "gone",
                "raw": text,
            }
            log.append(entry | {"status": "ok", "reason": "", "finish_reason": "stop", "new_tokens": 3})
    monkeypatch.setenv("SPEED_REPLAY", "1")
    artifact = sample(open_run("smoke"), "made", planned, "senior")  # there is no senior, and none is needed
    assert [e["record"] for e in artifact.rows()] == [q.id for q in planned]


def test_the_recorded_run_that_ships_is_the_one_behind_the_committed_figures():
    from speed_core.store.run_context import OFFICIAL, ROOT

    manifest, files = read_archive(replay.RECORDED)
    assert set(rebuilt(open_run(OFFICIAL))) == set(manifest["artifacts"]) and manifest["profile"] == OFFICIAL
    assert len(manifest["figures"]) >= 9
    for name, digest in manifest["figures"].items():
        assert json.loads((ROOT / "figures" / f"{name}.json").read_text())["data_sha256"] == digest
    folders = [f"/{top}/".encode() for top in ("home", "root", "tmp")]
    assert not any(folder in f for folder in folders for f in files.values()), "a path of somebody's machine"


def test_an_archive_may_be_packed_with_xz_and_a_cut_one_is_refused_as_well(tmp_path):
    contents = {"log/a.jsonl": b"the same row\n" * 500}
    manifest = {
        "profile": "smoke",
        "whole": True,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    }
    for name in ("run.tar.gz", "run.tar.xz"):
        replay.pack(dict(manifest), contents, tmp_path / name)
        assert read_archive(tmp_path / name) == (manifest, contents)
    whole = (tmp_path / "run.tar.xz").read_bytes()
    assert whole.startswith(replay.XZ)
    (tmp_path / "run.tar.xz").write_bytes(whole[:-20])
    with pytest.raises(UserError, match="not a whole export"):
        read_archive(tmp_path / "run.tar.xz")


def archive(path, entries, manifest):
    """A tar.gz of any entries, with replay.json first."""
    return write_tar(path, [(replay.CONTENTS, json.dumps(manifest).encode()), *entries], "w:gz")


def naming(*entries, **more):
    return {"profile": "smoke", "whole": True, "files": {n: hashlib.sha256(c).hexdigest() for n, c in entries}} | more


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/x",
        "log/../../x",
        "log//x",
        "log/./x",
        "x" * 300,
        "log/" + "x" * 300,
        "a\\b",
        "a\nb",
        "log/" + "d/" * 600 + "x",
    ],
)
def test_a_name_that_is_none_is_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    source = archive(tmp_path / "a.tar.gz", [(name, b"x")], naming((name, b"x")))
    with pytest.raises(UserError, match="again") as error:
        replay.take_in(source, open_run)
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("entries", "manifest"),
    [
        ([("log/a", b"x"), ("log/a/b", b"y")], naming(("log/a", b"x"), ("log/a/b", b"y"))),
        ([("log/a/b", b"y"), ("log/a", b"x")], naming(("log/a", b"x"), ("log/a/b", b"y"))),
        ([("log/a", b"x"), ("log/a", b"x")], naming(("log/a", b"x"))),
        ([("log/a", tarfile.SYMTYPE.decode())], naming()),
        ([("log/a", tarfile.FIFOTYPE.decode())], naming()),
        ([], {"files": {}}),
        ([], {"profile": "smoke"}),
        ([], naming(files=[])),
        ([], naming(files=None)),
        ([], naming(profile=7)),
        ([], naming(profile="../smoke")),
        ([], naming(profile="mine.json")),
        ([], naming(artifacts=[], figures={}, whole=False)),
        ([], naming(artifacts={}, whole=False)),
        ([], naming(artifacts={"../../x": "0"}, figures={}, whole=False)),
        ([], naming(artifacts={}, figures={"01": 5}, whole=False)),
        ([], []),
        ([], None),
    ],
)
def test_an_archive_of_another_shape_is_refused_in_one_line(tmp_path, monkeypatch, entries, manifest):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    with pytest.raises(UserError, match="again") as error:
        replay.take_in(archive(tmp_path / "a.tar.gz", entries, manifest), open_run)
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_an_archive_that_unpacks_to_far_more_than_an_export_is_refused_before_it_is_read(tmp_path):
    zeros = bytes(300 << 20)
    source = archive(tmp_path / "a.tar.gz", [("log/a.jsonl", zeros)], naming(("log/a.jsonl", zeros)))
    assert source.stat().st_size < 1 << 20
    with pytest.raises(UserError, match="more than 200 times as large"):
        replay.check_archive(source)


def test_an_archive_of_too_many_files_and_folders_is_refused_before_their_names_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "MOST_NAMES", 100)
    files = [(f"log/{k}/" + "d/" * 20 + "a.jsonl", b"{}") for k in range(10)]
    with pytest.raises(UserError, match="no plain file with a name of its own") as error:
        replay.check_archive(archive(tmp_path / "a.tar.gz", files, naming(*files)))
    assert "'log/4/" in str(error.value)
    assert replay.check_archive(archive(tmp_path / "a.tar.gz", files[:4], naming(*files[:4])))["profile"] == "smoke"


def test_a_header_of_many_megabytes_is_refused_before_it_is_in_memory(tmp_path):
    entry = tarfile.TarInfo(replay.CONTENTS)
    entry.pax_headers = {"comment": "a" * (100 << 20)}
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(entry)
    entry.pax_headers = {}
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="not a whole export"):
            replay.check_archive(tmp_path / "a.tar.gz")
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_long_headers_of_many_members_count_together(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for k in range(6):
            entry = tarfile.TarInfo(f"log/{k}.jsonl")
            entry.pax_headers = {"comment": "a" * 300_000}
            tar.addfile(entry)
    with pytest.raises(UserError, match="not a whole export .ReadError"):
        replay.check_archive(tmp_path / "a.tar.gz")


def test_a_manifest_that_names_a_file_outside_of_its_artifact_is_never_followed(tmp_path, monkeypatch):
    from speed_core.runner import run_archive

    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    (tmp_path / "secret.txt").write_text("secret")
    for name in (str(tmp_path / "secret.txt"), "../../../../secret.txt"):
        said = {"files": {name: {"sha256": "0" * 64, "bytes": 6}}, "parameters": {}, "parents": {}, "seconds": 0.0}
        entry = ("artifacts/tasks/manifest.json", json.dumps(said).encode())
        run, _ = replay.take_in(archive(tmp_path / "a.tar.gz", [entry], naming(entry)), open_run)
        for use in (lambda: run.store.get("tasks"), lambda: run_archive.export(run, tmp_path / "out.tar.gz")):  # noqa: B023
            with pytest.raises(UserError, match="no file inside of it"):
                use()
        (run.folder / "artifacts/tasks/manifest.json").unlink()
    assert not (tmp_path / "out.tar.gz").exists()


FULL = """
import resource, signal, sys
from pathlib import Path
from speed_core.runner import replay
from speed_core.files import UserError
from speed_core.study.runs import open_run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source = Path(sys.argv[1])
run = open_run("smoke")
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    replay.export_logs(run, source.with_name("out.tar.gz")) if sys.argv[2] == "export" else replay.take_in(source, open_run)
except UserError as error:
    print(error)
    sys.exit(2)
"""


def test_an_export_names_a_file_not_a_folder(run, tmp_path):
    with pytest.raises(UserError, match="a folder; name the file to write"):
        replay.pack({"files": {}}, {}, tmp_path)


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_ends_in_one_line_and_leaves_no_half_a_file(run, tmp_path, command):
    with AppendLog(run.log("noise")) as log:
        log.append({"id": "r", "raw": os.urandom(2000).hex()})
    source = tmp_path / "a.tar.gz"
    replay.export_logs(run, source)
    runs = run.folder.parent if command == "export" else tmp_path / "here"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(source), command],
        capture_output=True,
        text=True,
        env=os.environ | {"SPEED_RUNS": str(runs)},
    )
    assert done.returncode == 2, done.stderr
    assert "no room to write it" in done.stdout and done.stdout.count("\n") == 1
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "out.tar.gz").exists()
