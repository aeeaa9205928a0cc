"""Cards say what manifests and mteb's files say, and the hub's own library reads them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub import DatasetCard, ModelCard

from speed_core.data import curate
from speed_core.evaluation import evaluate
from speed_core.evaluation.encoder import load_encoder
from speed_core.files import UserError, write_json, write_jsonl
from speed_core.profile import dotted
from speed_core.runner import cards
from speed_core.study.runs import open_run

ROOT = Path(__file__).resolve().parents[2]


def some_rows():
    row = dict.fromkeys(("task", "topic", "instruction", "query", "positive", "prompt_digest"), "some text") | {"language": "en"}
    kinds = ("retrieval", "sts", "short_short")
    return [
        row | {"id": f"r{i}", "kind": k, "negative": None if k == "short_short" else "another", "source": "senior", "parent": None, "seed": i}
        for i, k in enumerate(kinds)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with seeds -> raw -> synthetic -> embedder-guided -> scores-guided; the guide stands for the trained model. The same
    model is scored as `scores-bare` too, without the instruction: its name comes first, and its scores are others."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEED_RUNS", str(folder))
        run = open_run("smoke")
    store = run.store
    with store.stage("seeds", {}) as draft:
        write_jsonl(draft.file("data.jsonl"), [])
        draft.info["teacher"] = "recorded answers, written by this repository's authors"
    with store.stage("raw", {"generator": "senior", "seed": 0}, [store.need("seeds")]) as draft:
        write_jsonl(draft.file("data.jsonl"), [])
        draft.info["outcomes"] = {"ok": 4, "invalid": 2, "truncated": 0}
    with store.stage("synthetic", {"curate": dotted(run.profile.curate)}, [store.need("raw")]) as draft:
        curate.write_dataset(draft.path, some_rows(), title="t", how="h")
        write_jsonl(draft.file("dropped.jsonl"), [some_rows()[0] | {"dropped_by": "near-duplicate", "because": "of r0"}])
    training = {"training": dotted(run.profile.embedding), "seed": 5, "base": "abc", "guide": "package:all-MiniLM-L6-v2"}
    with store.stage("embedder-guided", training, [store.need("synthetic")]) as draft:
        write_json(draft.file("training.json"), {"history": [{"step": 1, "loss": 2.5}], "rows": 3, "guided": True})
        write_json(draft.file("adapter/body.json"), {"base": "package:gemma-3-270m", "max_length": 96, "dtype": "bfloat16"})
        write_json(draft.file("adapter/adapter_config.json"), {"base_model_name_or_path": str(ROOT)})
    tasks = evaluate.resolve_tasks(["OfflineWordSim353", "OfflineSimLex999"], "smoke")
    for arm, instructed in (("bare", False), ("guided", True)):
        guide = load_encoder("package:all-MiniLM-L6-v2", arm, instructed=instructed)
        how = {"tasks": ["offline"], "instructed": instructed}
        with store.stage(f"scores-{arm}", how, [store.need("embedder-guided")]) as draft:
            write_json(draft.file("scores.json"), evaluate.evaluate(guide, tasks, run.folder / "mteb", label=arm))
    return run, folder


def test_a_model_card_has_every_score_of_mtebs_files_and_the_files_themselves(made, tmp_path):
    run, _ = made
    path = cards.write(run, "embedder-guided", tmp_path / "out")
    card, text = ModelCard.load(path), path.read_text()
    assert card.data.base_model == "google/gemma-3-270m" and card.data.license == "gemma" and card.data.library_name == "peft"
    found = {r.dataset_name: r for r in card.data.eval_results}
    assert set(found) == {"OfflineWordSim353 (not MTEB)", "OfflineSimLex999 (not MTEB)"}
    files = {p.stem: p for p in (tmp_path / "out" / "results").rglob("Offline*.json")}
    for name, file in files.items():
        score = json.loads(file.read_text())["scores"]["test"][0]["main_score"]
        assert found[f"{name} (not MTEB)"].metric_value == pytest.approx(100 * score, abs=1e-3)
        (original,) = (p for p in (run.folder / "mteb").rglob(file.name) if p.parent.parent.name.endswith("__guided"))
        assert file.read_bytes() == original.read_bytes() and (file.parent / "model_meta.json").is_file()
    assert "not GPT-4o output" in text and "Gemma Terms of Use" in text and "| seed | 5 |" in text and "load_trained" in text
    assert run.store.need("synthetic").digest in text and r"Instruct: {task}\nQuery: {text}" in text and "| raw |" in text
    assert (tmp_path / "out" / "adapter" / "body.json").is_file()
    assert cards.local_paths(tmp_path / "out") == [f"adapter/adapter_config.json: {ROOT}"]


def test_the_card_publishes_the_instructed_scores_and_says_so_when_there_are_none(made, tmp_path):
    run, _ = made
    guided, bare = (run.store.need(f"scores-{arm}").json("scores.json") for arm in ("guided", "bare"))
    assert guided["revision"] != bare["revision"] and guided["tasks"] != bare["tasks"]
    text = cards.write(run, "embedder-guided", tmp_path / "out").read_text()
    for name, task in guided["tasks"].items():
        assert f"| {name} | STS | {100 * task['score']:.1f} |" in text
        assert f"{100 * task['score']:.1f}" != f"{100 * bare['tasks'][name]['score']:.1f}"
    assert {p.name for p in (tmp_path / "out" / "results").iterdir()} == {"speed-step-by-step__guided"}
    assert "queries with the instruction" in text
    place = run.store.need("scores-guided").path
    place.rename(tmp_path / "aside")
    try:
        text = cards.write(run, "embedder-guided", tmp_path / "bare").read_text()
    finally:
        (tmp_path / "aside").rename(place)
    assert "queries without the instruction" in text
    assert {p.name for p in (tmp_path / "bare" / "results").iterdir()} == {"speed-step-by-step__bare"}


def test_an_unscored_model_says_so_and_has_no_scores(made, tmp_path):
    run, _ = made
    with run.store.stage("embedder-plain", run.store.need("embedder-guided").manifest["parameters"], [run.store.need("synthetic")]) as draft:  # fmt: skip
        write_json(draft.file("training.json"), {"history": [], "rows": 3, "guided": False})
    text = cards.write(run, "embedder-plain", tmp_path / "out").read_text()
    assert "Not scored in this run" in text and "model-index" not in text and "InfoNCE" in text
    assert not (tmp_path / "out" / "results").exists()


def test_a_data_set_card_opens_as_a_data_set_with_its_counts_and_losses(made, tmp_path):
    run, _ = made
    path = cards.write(run, "synthetic", tmp_path / "out")
    card, text = DatasetCard.load(path), path.read_text()
    assert card.data.size_categories == "n<1K" and card.data.to_dict()["dataset_info"]["splits"][0]["num_examples"] == 3
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert [dict(r) for r in rows] == [{k: r[k] for k in rows.column_names} for r in some_rows()]
    assert set(re.findall(r"^\| (\w+) \|", text.split("## What is in a row")[1], re.M)) == {*rows.column_names, "field"}
    assert "| invalid answer in `raw` | 2 |" in text and "| near-duplicate | 1 |" in text and "| evaluation overlap | 0 |" in text
    assert "not GPT-4o output" in text and "| short_short | 1 |" in text


def test_what_moved_since_is_said_and_not_guessed(made, tmp_path):
    run, _ = made
    raw = run.store.root / "raw" / "manifest.json"
    before = raw.read_text()
    changed = json.loads(before)
    changed["files"]["data.jsonl"]["sha256"] = "0" * 64
    raw.write_text(json.dumps(changed))
    try:
        text = cards.write(run, "synthetic", tmp_path / "out").read_text()
    finally:
        raw.write_text(before)
    assert "made again since, or not in this run" in text and "Teacher: not known" in text


def test_the_command_refuses_what_has_no_card_and_the_artifacts_own_folder(made, tmp_path):
    run, folder = made
    with pytest.raises(UserError, match="embedder-. and synthetic."):
        cards.write(run, "raw", tmp_path)
    with pytest.raises(UserError, match="the artifact itself"):
        cards.write(run, "synthetic", run.store.need("synthetic").path)
    speed = [sys.executable, "-m", "speed_core", "card"]
    done = subprocess.run([*speed, "synthetic", str(tmp_path / "out"), "--profile", "smoke"], cwd=ROOT, env=os.environ | {"SPEED_RUNS": str(folder)}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and "2 files beside it" in done.stdout
    assert subprocess.run([*speed, "synthetic", str(tmp_path / "out"), "--profile", "smoke"], cwd=ROOT, env=os.environ | {"SPEED_RUNS": str(tmp_path)}).returncode == 2  # fmt: skip
