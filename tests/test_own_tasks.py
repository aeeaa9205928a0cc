"""One's own texts through the same evaluation."""

import json

import numpy as np
import pytest

from speed_core import own_tasks
from speed_core.artifacts import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def some_rows():
    tools = ("spade", "rake", "hoe", "saw", "drill", "clamp", "brush", "ladder", "bucket", "wrench", "pliers", "chisel")
    rows = [{"query": f"what is a {t} for", "positive": f"a {t} is a thing to work with", "negative": "a cake"} for t in tools]
    rows += [{"sentence1": t, "sentence2": t if i % 2 else "rain", "score": float(i % 2)} for i, t in enumerate(tools)]
    return rows + [{"text": f"{t} {w}", "label": w} for t in tools for w in ("garden", "workshop")]


def test_each_shape_becomes_a_task_and_a_perfect_model_scores_one_hundred(tmp_path, capsys):
    rows = own_tasks.scorecard(["package:all-MiniLM-L6-v2"], write(tmp_path / "my.jsonl", some_rows()), tmp_path / "out", instructed=False)  # fmt: skip
    found = {r["label"]: r for r in rows}
    assert set(found) == {"OwnRetrieval-my", "OwnSTS-my", "OwnClassification-my"}
    assert found["OwnRetrieval-my"]["value"] > 95 and found["OwnClassification-my"]["value"] > 90
    assert all(r["low"] <= r["value"] + 1e-6 and np.isfinite([r["low"], r["high"]]).all() for r in rows)
    assert (tmp_path / "out" / "scorecard.svg").is_file() and "OwnSTS-my" in (tmp_path / "out" / "scorecard.csv").read_text()
    assert len(json.loads((tmp_path / "out" / "scores.json").read_text())) == 1


def test_a_model_compared_with_itself_differs_by_nothing(tmp_path):
    data = write(tmp_path / "my.jsonl", some_rows()[:12])
    rows = own_tasks.scorecard(["package:all-MiniLM-L6-v2"] * 2, data, tmp_path / "out", instructed=False)
    assert [(r["value"], r["low"], r["high"]) for r in rows] == [(0.0, 0.0, 0.0)]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"query": "a"}], "line 1 has none of the shapes query . positive"),
        ([{"query": "a", "positive": " "}], "line 1: 'positive' is ' '; it must be a text"),
        ([{"sentence1": "a", "sentence2": "b", "score": "high"}], "'score' is 'high'; it must be a number"),
        ([{"query": "a", "positive": "b"}] * 3, "has 3 lines; give at least 10"),
        ([{"text": f"t{i}", "label": "x"} for i in range(12)], "one label only"),
        ([{"sentence1": "a", "sentence2": "b", "score": 1}] * 12, "scores that differ"),
        ([], "empty"),
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
