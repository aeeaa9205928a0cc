"""An embedding model for topics of one's own, from a topics file to a scorecard."""

import json
import threading

import pytest
from faulty_endpoint import MODEL, FaultyEndpoint
from sentence_transformers import SentenceTransformer

from speed_core.data import prompts, records
from speed_core.files import UserError
from speed_core.runner import own_domain
from speed_core.study.runs import open_run
from speed_core.study.stage import Kind


def profile(folder, **values):
    """A profile file at smoke size over twenty topics that lie beside it."""
    (folder / "topics.txt").write_text("\n".join(f"Bees/Keeping/Part {i}" for i in range(20)), encoding="utf-8")
    given = {"extends": "smoke", "name": "bees", "topics": {"file": "topics.txt", "count": 0, "held_out": 2}, **values}
    (folder / "bees.json").write_text(json.dumps(given), encoding="utf-8")
    return str(folder / "bees.json")


def texts(folder, lines=12):
    rows = [{"query": f"How do I keep bee number {i}?", "positive": f"Bee {i} is kept in hive {i}."} for i in range(lines)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "mine.jsonl"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "runs"))
    return tmp_path


def test_only_what_the_model_needs_is_made(runs):
    stages = own_domain.needed(open_run(profile(runs)), Kind.EMBEDDER)
    assert [s.name for s in stages] == [
        "tasks", "seeds", "junior", "root", "pairs", "senior", "revisor", "raw", "revised", "synthetic", "embedder-guided-0",
    ]  # fmt: skip
    endpoint = {"kind": "openai", "model": MODEL, "base_url": "http://localhost:1/v1"}
    asked = own_domain.needed(open_run(profile(runs, teacher=endpoint)), Kind.EMBEDDER)
    assert {s.name for s in asked} - {s.name for s in stages} == {"revisions"}


def test_topics_and_texts_that_will_not_do_are_refused_before_anything_is_made(runs):
    out = runs / "out"
    with pytest.raises(UserError, match="topics.file: empty"):
        own_domain.build(open_run("smoke"), out)
    with pytest.raises(UserError, match="topics: 18 to write 18,001 records about"):
        own_domain.build(open_run(profile(runs, synthesis={"count": 18001})), out)
    with pytest.raises(UserError, match="has 3 different queries; give at least 10"):
        own_domain.build(open_run(profile(runs)), out, texts(runs, 3))
    assert not out.exists() and not list((runs / "runs").rglob("manifest.json"))


class Endpoint(FaultyEndpoint):
    """Answers any prompt of the pipeline with something valid, and fails by seed."""

    def answer(self, prompt):
        mark = prompts.text_digest(prompt)[:8]
        for kind in records.KINDS:
            if all(f'"{key}"' in prompt for key in records.KEYS[kind]):
                return json.dumps(
                    {key: f"What {key} says about bee {mark}, part {n}" for n, key in enumerate(records.KEYS[kind])}
                )
        return json.dumps([f"Given question {n} about bees ({mark}), find its answer." for n in range(3)])


@pytest.mark.slow
def test_twenty_topics_and_a_faulty_endpoint_become_a_data_set_a_model_and_a_scorecard(runs, monkeypatch):
    server = Endpoint(faults=0.2, hang_seconds=0.5)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    teacher = {"kind": "openai", "model": MODEL, "base_url": server.url, "timeout_seconds": 3, "attempts": 3}
    out = runs / "out"
    # A junior of two steps writes few whole texts, and which ones differs between processors: one pair is enough.
    small = {"seeds": 12, "junior": {"examples": 4}, "senior": {"prompts": 8, "batch": 1, "micro_batch": 1}}
    own_domain.build(open_run(profile(runs, teacher=teacher, **small)), out, texts(runs))
    rows = [json.loads(line) for line in (out / "dataset" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows and server.struck.total() > server.struck["none"], "no fault struck"
    assert "SentenceTransformer(FOLDER)" in (out / "model" / "README.md").read_text(encoding="utf-8")
    model = SentenceTransformer(str(out / "model"), device="cpu")
    assert model.encode(["How do I keep bees?"]).shape == (1, 640)
    scores = json.loads((out / "scorecard" / "scores.json").read_text(encoding="utf-8"))
    assert len(scores) == 2 and scores[0]["revision"] != scores[1]["revision"]
    assert (out / "scorecard" / "scorecard.svg").is_file()
