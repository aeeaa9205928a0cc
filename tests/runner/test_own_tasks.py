"""One's own texts through the same evaluation."""

import json

import numpy as np
import pytest

from speed_core.files import UserError
from speed_core.runner import own_tasks


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def some_rows():
    tools = ("spade", "rake", "hoe", "saw", "drill", "clamp", "brush", "ladder", "bucket", "wrench", "pliers", "chisel")
    rows = [{"query": f"what is a {t} for", "positive": f"a {t} is a thing to work with", "negative": "a cake"} for t in tools]
    rows += [{"sentence1": t, "sentence2": t if i % 2 else "rain", "score": float(i % 2)} for i, t in enumerate(tools)]
    return rows + [{"text": f"{t} {w}", "label": w} for t in tools for w in ("garden", "workshop")]


def test_each_shape_becomes_a_task_and_a_perfect_model_scores_one_hundred(tmp_path, capsys):
    rows = own_tasks.scorecard(["package:all-MiniLM-L6-v2"], tmp_path / "out", data=write(tmp_path / "my.jsonl", some_rows()), instructed=False)  # fmt: skip
    found = {r["label"]: r for r in rows}
    assert set(found) == {"OwnRetrieval-my", "OwnSTS-my", "OwnClassification-my"}
    assert found["OwnRetrieval-my"]["value"] > 95 and found["OwnClassification-my"]["value"] > 90
    assert all(r["low"] <= r["value"] + 1e-6 and np.isfinite([r["low"], r["high"]]).all() for r in rows)
    assert (tmp_path / "out" / "scorecard.svg").is_file() and "OwnSTS-my" in (tmp_path / "out" / "scorecard.csv").read_text()
    assert len(json.loads((tmp_path / "out" / "scores.json").read_text())) == 1


def test_a_score_and_its_items_read_the_same_query_whatever_spaces_stand_around_it(tmp_path):
    from speed_core.evaluation import evaluate
    from speed_core.evaluation.encoder import load_encoder

    rows = [r | {"query": f" {r['query']} \n"} for r in some_rows()[:12]]
    encoder = load_encoder("package:all-MiniLM-L6-v2", "m", instructed=True, max_length=64)
    evaluate.evaluate(encoder, own_tasks.own_tasks(write(tmp_path / "my.jsonl", rows)), tmp_path / "mteb")
    assert len(encoder.vectors) == 25 and all(t == t.strip() for t in encoder.vectors)


def test_a_model_compared_with_itself_differs_by_nothing(tmp_path):
    data = write(tmp_path / "my.jsonl", some_rows()[:12])
    rows = own_tasks.scorecard(["package:all-MiniLM-L6-v2"] * 2, tmp_path / "out", data=data, instructed=False)
    assert [(r["value"], r["low"], r["high"]) for r in rows] == [(0.0, 0.0, 0.0)]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"query": "a"}], "line 1 has none of the shapes query . positive"),
        ([{"query": "a", "positive": " "}], "line 1: 'positive' is ' '; it must be a text"),
        ([{"sentence1": "a", "sentence2": "b", "score": "high"}], "'score' is 'high'; it must be a number"),
        ([{"sentence1": "a", "sentence2": "b", "score": float("nan")}], "line 1: 'score' is nan; it must be a number"),
        ([{"sentence1": "a", "sentence2": "b", "score": float("inf")}], "line 1: 'score' is inf; it must be a number"),
        ([{"query": "a", "positive": "b", "negative": 5}], "line 1: 'negative' is 5; it must be a text"),
        ([{"query": "a", "positive": "b", "negative": ["c"]}], "line 1: 'negative' is .'c'.; it must be a text"),
        ([{"query": "a", "positive": "b", "instruction": 5}], "line 1: 'instruction' is 5; it must be a text"),
        (
            [{"query": "a", "positive": "b"}, {"query": "c", "positive": "d", "instruction": "Find"}],
            "line 2: 'instruction' is 'Find', the task's first line has None; give all lines of a task the same",
        ),
        ([{"text": "a", "label": "x"}] * 3, "has 3 lines; give at least 10"),
        ([{"query": "a", "positive": f"b{i}"} for i in range(12)], "has 1 different queries; give at least 10"),
        ([{"text": f"t{i}", "label": "x"} for i in range(12)], "one label only"),
        ([{"sentence1": "a", "sentence2": "b", "score": 1}] * 12, "scores that differ"),
        ([], "empty"),
        ([{"sentence1": "a", "sentence2": "b", "score": True}], "'score' is True; it must be a number"),
        ([{"text": "t", "label": True}], "'label' is True"),
        ([{"query": "a \ud83d", "positive": "b"}], "line 1 holds half of a UTF-16 pair"),
        ([{"query": "a", "positive": "b", "more": "\ud83d"}], "line 1 holds half of a UTF-16 pair"),
        *[([{"text": "t", "label": "x", "task": t}], "line 1: 'task' is") for t in ("help/billing", "../up", "", ".", "a" * 65)],
    ],
)
def test_a_bad_file_is_named_with_its_line_and_rule(tmp_path, rows, says):
    with pytest.raises(UserError, match=says):
        own_tasks.own_tasks(write(tmp_path / "my.jsonl", rows))


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        own_tasks.own_tasks(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"query": "a"\n')
    with pytest.raises(UserError, match="line 1 is no JSON"):
        own_tasks.own_tasks(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'[{"query": "a", "positive": "b"}]', "one JSON list; write one object per line"),
        ('{"text": "caf\u00e9", "label": "x"}'.encode("latin-1"), "line 1 is no UTF-8"),
        ('{"text": "a", "label": "x"}'.encode("utf-16"), "written as UTF-16; save it as UTF-8"),
        (b"[" * 100_000, "one JSON list"),
        (b'{"a":' * 100_000, "line 1 is no JSON"),
    ],
)
def test_a_file_of_another_form_or_encoding_is_named_as_what_it_is(tmp_path, data, says):
    (tmp_path / "my.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=says):
        own_tasks.own_tasks(tmp_path / "my.jsonl")


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    lines = "".join(json.dumps({"text": f"text {i}", "label": f"l{i % 2}"}) + "\r\n" for i in range(12))
    (tmp_path / "My texts (1).jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert list(own_tasks.read(tmp_path / "My texts (1).jsonl")) == [("My-texts-1-", "Classification")]


def test_a_query_on_two_lines_has_two_relevant_texts(tmp_path):
    rows = [{"query": f"what is a {t} for", "positive": f"a {t} {w}"} for t in ("spade", "hoe", "saw", "drill", "clamp", "brush", "ladder", "bucket", "chisel", "rake") for w in ("digs", "cuts")]  # fmt: skip
    (task,) = own_tasks.own_tasks(write(tmp_path / "my.jsonl", rows))
    task.load_data()
    split = task.dataset["default"]["test"]
    assert len(split["queries"]) == 10 and {len(found) for found in split["relevant_docs"].values()} == {2}
    (found,) = own_tasks.scorecard(["package:all-MiniLM-L6-v2"], tmp_path / "out", data=tmp_path / "my.jsonl", instructed=False)
    assert found["value"] > 95


def scores(folder):
    (found,) = json.loads((folder / "scores.json").read_text())
    return {name: task["score"] for name, task in found["tasks"].items()}


def test_a_file_that_was_edited_is_scored_anew(tmp_path):
    model, rows = ["package:all-MiniLM-L6-v2"], some_rows()[12:24]
    own_tasks.scorecard(model, tmp_path / "out", data=write(tmp_path / "my.jsonl", rows), instructed=False)
    before = scores(tmp_path / "out")["OwnSTS-my"]
    write(tmp_path / "my.jsonl", [r | {"score": 1 - r["score"]} for r in rows])
    own_tasks.scorecard(model, tmp_path / "out", data=tmp_path / "my.jsonl", instructed=False)
    assert scores(tmp_path / "out")["OwnSTS-my"] == pytest.approx(-before)


def test_scores_without_the_instruction_are_not_those_with_it(tmp_path):
    rows = [r | {"instruction": "Say nothing of tools, sing of the sea"} for r in some_rows()[:12]]
    rows = [r | {"positive": r["positive"].split()[1][::-1]} for r in rows]  # hard enough to differ
    data, kept = write(tmp_path / "my.jsonl", rows), {}
    for where in ("shared", "fresh"):
        for instructed in (True, False):
            folder = tmp_path / (where if where == "shared" else f"{where}{instructed}")
            own_tasks.scorecard(["package:all-MiniLM-L6-v2"], folder, data=data, instructed=instructed)
            kept[where, instructed] = scores(folder)
    assert kept["fresh", True] != kept["fresh", False]
    assert all(kept["shared", k] == kept["fresh", k] for k in (True, False))
