import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_core.files import AppendLog, UserError, read_jsonl
from speed_core.store.artifacts import Catalog, Store, differences


@given(st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_a_log_cut_at_any_byte_keeps_every_whole_line(cut):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        with AppendLog(path) as log:
            for i in range(8):
                log.append({"id": f"r{i}", "raw": f"line {i}\u2028with separators\r and \u00e9"})
        data = path.read_bytes()
        path.write_bytes(data[:cut])
        whole = (data[:cut] + b"\n").count(b"}\n")  # a last line that lacks its newline alone is whole
        with AppendLog(path) as log:
            assert len(log.entries) == whole
            log.append({"id": "next", "raw": ""})
        rows = read_jsonl(path)
        assert rows[-1]["id"] == "next" and len(rows) == whole + 1 and not path.with_name("log.jsonl.damaged").exists()


def test_a_row_without_what_every_entry_has_and_a_whole_last_line_are_kept_aside(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    with AppendLog(path) as log:
        log.append({"id": "a", "raw": "x"})
    last = '{"record": "paid for, but without an id"}'
    path.write_text(path.read_text() + '{"id": "b"}\n' + "[" * 100_000 + "\n" + last)
    with AppendLog(path, ("raw",)) as log:
        assert list(log.entries) == ["a"]
    aside = path.with_name("log.jsonl.damaged").read_text()
    assert aside.startswith('{"id": "b"}\n[[') and aside.endswith(last + "\n")
    assert "line 2 and 2 more cannot be read (no 'raw' in it)" in capsys.readouterr().out


UNREADABLE = st.sampled_from([b"<<<<<<< HEAD", b"{}", b"[1]", b"null", b'{"id": 7}', b'{"id": "r0", "raw": ', b"\xff\xfe", b'"'])


@given(st.lists(st.tuples(st.integers(0, 6), UNREADABLE), min_size=1, max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_lines_that_cannot_be_read_are_kept_aside_and_every_other_outcome_counts(inserted, without_last_newline):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        with AppendLog(path) as log:
            for i in range(7):
                log.append({"id": f"r{i}", "raw": f"text {i}"})
        written = path.read_bytes()
        lines = written.splitlines(keepends=True)
        for at, line in sorted(inserted, reverse=True):
            lines[at:at] = [line + b"\n", b"\n"]
        path.write_bytes(b"".join(lines).removesuffix(b"\n" if without_last_newline else b""))
        with AppendLog(path) as log:
            assert {e["id"]: e["raw"] for e in log.entries.values()} == {f"r{i}": f"text {i}" for i in range(7)}
        assert path.read_bytes() == written
        aside = path.with_name("log.jsonl.damaged").read_bytes().split(b"\n")[:-1]
        assert sorted(aside) == sorted(line for _, line in inserted)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_byte_that_flips_in_a_log_costs_its_line_at_most_and_is_named(data):
    import tempfile
    from contextlib import redirect_stdout
    from io import StringIO
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        with AppendLog(path) as log:
            for i in range(4):
                log.append({"id": f"r{i}", "raw": f"the text of answer {i}"})
        whole = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] ^= data.draw(st.sampled_from([1, 2, 4, 16]))
        path.write_bytes(whole)
        said = StringIO()
        with redirect_stdout(said), AppendLog(path) as log:
            kept = dict(log.entries)
        assert all(kept[k]["raw"] == f"the text of answer {k[1:]}" for k in kept)
        # A blank that became another blank, or an escape of the same letter, changes nothing.
        assert len(kept) == 4 or "cannot be read" in said.getvalue()
        assert len(kept) >= 2


def test_a_log_of_an_earlier_version_without_checksums_counts(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"id": "r0", "raw": "x"}\n{"id": "r1", "raw": "y"}', encoding="utf-8")
    with AppendLog(tmp_path / "log.jsonl") as log:
        assert log.entries == {"r0": {"id": "r0", "raw": "x"}, "r1": {"id": "r1", "raw": "y"}}
        log.append({"id": "r2", "raw": "z"})
    assert [r["id"] for r in read_jsonl(tmp_path / "log.jsonl")] == ["r0", "r1", "r2"]


def test_a_stage_that_another_process_is_making_is_refused_in_one_line_and_made_when_that_one_is_gone(tmp_path):
    with Store(tmp_path).stage("a", {"x": 1}) as first:
        with (
            pytest.raises(UserError, match="^a: another process is making it.*SPEED_RUNS") as error,
            Store(tmp_path).stage("a", {}),
        ):
            pass
        first.file("data.jsonl").write_text("{}\n")
    assert "\n" not in str(error.value) and Store(tmp_path).get("a").rows() == [{}]
    (tmp_path / ".b.lock").touch()  # as a killed process leaves it
    with Store(tmp_path).stage("b", {}) as draft:
        draft.file("data.jsonl").write_text("{}\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_failed_stage_leaves_the_old_artifact_untouched(tmp_path):
    store = Store(tmp_path)
    with store.stage("a", {"x": 1}) as draft:
        draft.file("data.jsonl").write_text('{"id": 1}\n')
    old = store.get("a").digest
    with pytest.raises(RuntimeError), store.stage("a", {"x": 2}) as draft:
        draft.file("data.jsonl").write_text("half")
        raise RuntimeError
    assert store.get("a").digest == old and store.get("a").rows() == [{"id": 1}]


def test_a_current_artifact_is_not_made_again_and_a_change_is_named(tmp_path):
    store = Store(tmp_path)
    with store.stage("a", {"decoding": {"temperature": 1.0}}) as draft:
        draft.file("f").write_text("x")
    with store.stage("a", {"decoding": {"temperature": 1.0}}) as draft:
        assert draft is None
    assert store.why_stale("a", {"decoding": {"temperature": 0.7}}) == "decoding.temperature 1.0 -> 0.7"


def test_a_changed_parent_makes_the_child_stale(tmp_path):
    store = Store(tmp_path)
    for text in ("one", "two"):
        with store.stage("parent", {"text": text}) as draft:
            draft.file("f").write_text(text)
        parent = store.get("parent")
        if text == "one":
            with store.stage("child", {}, [parent]) as draft:
                draft.file("f").write_text("c")
    assert store.why_stale("child", {}, [parent]).startswith("input.parent")


def test_a_missing_artifact_names_the_notebook_that_writes_it(tmp_path):
    with pytest.raises(UserError, match="--only 03"):
        Store(tmp_path, catalog=Catalog(notebook={"junior": "03"}.get)).need("junior")


def test_a_kill_between_the_two_renames_is_repaired(tmp_path):
    store = Store(tmp_path)
    with store.stage("a", {}) as draft:
        draft.file("f").write_text("x")
    (tmp_path / "a").rename(tmp_path / ".a.old")
    assert store.get("a") is None
    store.recover()
    assert store.get("a").file("f").read_text() == "x"


def test_manifests_carry_lineage_and_row_counts(tmp_path):
    store = Store(tmp_path)
    with store.stage("a", {"k": [1]}) as draft:
        draft.file("data.jsonl").write_text("{}\n{}\n")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["files"]["data.jsonl"]["rows"] == 2 and {"sha256", "bytes"} <= set(manifest["files"]["data.jsonl"])
    assert {"parents", "parameters", "code", "device", "seconds"} <= set(manifest)


def test_differences_are_named_by_path():
    (one,) = differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 2}, "c": 2})
    assert (one.where, one.then, one.now, str(one)) == ("a.b", 1, 2, "a.b 1 -> 2")


FULL = """
import resource, signal, sys
from pathlib import Path
from speed_core.files import AppendLog, UserError
from speed_core.store.artifacts import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, kind = Path(sys.argv[1]), sys.argv[2]
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    if kind == "log":
        with AppendLog(folder / "raw.jsonl") as log:
            for i in range(100):
                log.append({"id": f"r{i}", "raw": "x" * 300})
    else:
        with Store(folder).stage("weights", {}) as draft:
            if kind == "torch":
                import torch
                from safetensors.torch import save_file
                save_file({"w": torch.zeros(5000)}, draft.file("model.safetensors"))
            else:
                draft.file("big").write_bytes(b"x" * 9000)
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("kind", ["log", "file", "torch"])
def test_a_full_disk_ends_in_one_line_and_keeps_every_finished_outcome(tmp_path, kind):
    import subprocess
    import sys

    with Store(tmp_path).stage("weights", {"x": 1}) as draft:
        draft.file("old").write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), kind], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    line = done.stdout.strip().splitlines()[-1]
    assert ("raw.jsonl: no room" if kind == "log" else "weights: no room") in line and "free some disk" in line
    if kind == "log":
        rows = read_jsonl(tmp_path / "raw.jsonl")
        assert [r["id"] for r in rows] == [f"r{i}" for i in range(len(rows))] and len(rows) > 10
        with AppendLog(tmp_path / "raw.jsonl") as log:
            log.append({"id": "next", "raw": ""})
        assert len(read_jsonl(tmp_path / "raw.jsonl")) == len(rows) + 1
    else:
        assert Store(tmp_path).get("weights").file("old").read_text() == "old"


def test_a_long_value_is_cut_in_what_is_said_and_not_in_what_is_compared():
    one, other = {"a": {"x": [0.1] * 50}}, {"a": {"x": [0.1] * 49 + [0.2]}}
    (said,) = map(str, differences(one, other))
    assert said.startswith("a.x [0.1, 0.1") and said.count("...") == 2 and len(said) < 180
    assert differences(one, one) == []
    assert list(map(str, differences({"d": "f" * 64}, {"d": None}))) == [f"d {'f' * 64} -> None"]


@pytest.mark.parametrize("change", ["emptied", "cut", "a flipped byte"])
def test_a_file_that_is_not_what_its_manifest_says_is_never_read(tmp_path, change):
    with Store(tmp_path / "runs" / "artifacts").stage("seeds", {}) as draft:
        draft.file("data.jsonl").write_text('{"id": 1}\n{"id": 2}\n')
        draft.file("weights/w.bin").write_bytes(b"12345")
    artifact = Store(tmp_path / "runs" / "artifacts").get("seeds")
    assert len(artifact.rows()) == 2 and artifact.weights() == artifact.path
    for name in ("data.jsonl", "weights/w.bin"):
        path = artifact.path / name
        data = path.read_bytes()
        path.write_bytes({"emptied": b"", "cut": data[:-3], "a flipped byte": bytes([data[0] ^ 1]) + data[1:]}[change])
        with pytest.raises(UserError, match=f"artifact 'seeds': {name} has .*its manifest says") as error:
            artifact.rows() if name == "data.jsonl" else artifact.weights()
        assert "remove runs/artifacts/seeds and run again" in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(data)
    assert len(artifact.rows()) == 2


@pytest.mark.parametrize(
    "tail", [b'{"id": "c", "raw": "caf\xe9"}', b">>>>>>> branch", b"a note of somebody's", b'{"id": "c", "x": 1 2}']
)
def test_a_last_line_that_was_not_torn_is_kept_aside(tmp_path, capsys, tail):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + tail)
    with AppendLog(path) as log:
        assert set(log.entries) == {"a"}
    assert (tmp_path / "log.jsonl.damaged").read_bytes() == tail + b"\n" and "line 2" in capsys.readouterr().out
