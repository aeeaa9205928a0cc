"""Real MTEB tasks by name from a folder of snapshots. All rows here are made for the tests; none are MTEB's."""

import gzip
import json
from pathlib import Path

import datasets
import mteb
import numpy as np
import pytest

from speed_core import benchmark_data, evaluate, uncertainty
from speed_core.artifacts import UserError

TOOLS = ("spade", "rake", "hoe", "saw", "drill", "clamp", "brush", "ladder", "bucket", "wrench", "pliers", "chisel")


def write_sts(folder: Path, rows):
    """As mteb/stsbenchmark-sts lies on the hub: one gzipped JSONL file a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as f:
            f.writelines(json.dumps({"split": split, "sentence1": a, "sentence2": b, "score": s}) + "\n" for a, b, s in rows)


def write_retrieval(folder: Path, split: str, queries, corpus, relevant):
    """As mteb pushes a retrieval set to the hub: a Parquet file a configuration, named in the card's front matter."""
    tables = {
        "corpus": [{"id": k, "title": t, "text": x} for k, (t, x) in corpus.items()],
        "queries": [{"id": k, "text": x} for k, x in queries.items()],
        "default": [{"query-id": q, "corpus-id": d, "score": s} for q, found in relevant.items() for d, s in found.items()],
    }
    card = "---\nconfigs:\n"
    for name, rows in tables.items():
        place = "data" if name == "default" else name
        (folder / place).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / place / f"{split}-00000-of-00001.parquet")
        card += f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {place}/{split}-*\n"
    (folder / "README.md").write_text(card + "---\n", encoding="utf-8")


def some_pairs(flip=False):
    return [
        (f"a {t} in the shed", f"the {t} is old" if i % 2 == flip else "rain falls", 4.0 if i % 2 == flip else 0.5)
        for i, t in enumerate(TOOLS)
    ]


def some_retrieval(folder: Path, split: str):
    corpus = {f"d{i}": (f"The {t}", "a thing to work with") for i, t in enumerate(TOOLS)}
    corpus |= {f"e{i}": ("", f"how to keep a {t} clean") for i, t in enumerate(TOOLS)}
    relevant = {f"q{i}": {f"d{i}": 2, f"e{i}": 1, f"d{i + 1}": 0} for i in range(len(TOOLS) - 1)}
    queries = {f"q{i}": f"what is the best {t} for me" for i, t in enumerate(TOOLS)}
    write_retrieval(folder, split, queries, corpus, relevant)


@pytest.fixture(scope="module")
def guide():
    return evaluate.load("package:all-MiniLM-L6-v2", "guide", instructed=False)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_sts(folder / "mteb" / "stsbenchmark-sts", some_pairs())
    some_retrieval(folder / "mteb" / "NanoSciFactRetrieval", "train")
    return folder


def test_real_tasks_are_scored_offline_from_a_folder_with_mtebs_own_files_and_items(guide, snapshots, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_DATA", str(snapshots))
    tasks = evaluate.resolve_tasks(["STSBenchmark", "NanoSciFactRetrieval", "STSBenchmark"])
    assert [type(t).__module__.split(".")[0] for t in tasks] == ["mteb", "mteb"]
    found = evaluate.evaluate(guide, tasks, tmp_path)
    sts, nano = found["tasks"]["STSBenchmark"], found["tasks"]["NanoSciFactRetrieval"]
    assert len(sts["items"]) == 12 and sts["score"] > 0.5
    # Two degrees of relevance, titles, a query without a relevant document: the mean of our items is still mteb's score.
    assert len(nano["items"]) == 11 and np.mean(nano["items"]) == pytest.approx(nano["score"], abs=1e-4)
    assert uncertainty.statistic("STS", np.array([sts["items"]]))[0] == pytest.approx(sts["score"], abs=2e-3)
    for name in found["tasks"]:
        (path,) = tmp_path.rglob(f"{name}.json")
        kept = json.loads(path.read_text())
        assert (
            kept["task_name"] == name and kept["dataset_revision"].startswith("local-") and str(snapshots) not in path.read_text()
        )
    assert tasks[0].metadata.dataset["path"] == "mteb/stsbenchmark-sts"
    assert mteb.get_task("STSBenchmark").metadata.revision.startswith("b0fddb56")


def test_another_snapshot_of_the_same_name_gives_its_own_rows_and_no_kept_score(guide, tmp_path):
    scores = []
    for flip, place in ((False, "a"), (True, "b")):
        write_sts(tmp_path / place / "mteb" / "stsbenchmark-sts", some_pairs(flip))
        some_retrieval(tmp_path / place / "mteb" / "NanoSciFactRetrieval", "train")
        tasks = evaluate.resolve_tasks(["STSBenchmark"], data=tmp_path / place)
        scores.append(evaluate.evaluate(guide, tasks, tmp_path / "kept")["tasks"]["STSBenchmark"]["items"])
    golds = [[g for g, _ in items] for items in scores]
    assert golds[0] == [s for *_, s in some_pairs()] and golds[1] == [s for *_, s in some_pairs(True)]
    kept = json.loads(next((tmp_path / "kept").rglob("STSBenchmark.json")).read_text())
    assert kept["dataset_revision"] == tasks[0].metadata.revision


def test_without_hub_and_folder_one_line_names_task_data_set_and_both_ways(tmp_path, monkeypatch):
    monkeypatch.delenv("SPEED_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        evaluate.resolve_tasks(["NanoBEIR"])
    line = str(error.value)
    assert "'NanoArguAnaRetrieval'" in line and "mteb/NanoArguAnaRetrieval is not here (and 12 more" in line
    assert "SPEED_ONLINE=1" in line and "SPEED_DATA" in line and "\n" not in line
    with pytest.raises(UserError, match="no such folder"):
        evaluate.resolve_tasks(["STSBenchmark"], data=tmp_path / "none")


def test_a_snapshot_that_is_broken_or_empty_is_named(tmp_path):
    folder = tmp_path / "mteb" / "stsbenchmark-sts"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="no files in it"):
        evaluate.resolve_tasks(["STSBenchmark"], data=tmp_path)
    (folder / "test.jsonl.gz").write_bytes(b"no gzip")
    (task,) = evaluate.resolve_tasks(["STSBenchmark"], data=tmp_path)
    with pytest.raises(UserError, match="task 'STSBenchmark': its snapshot .* could not be read"):
        task.load_data()


def test_a_downloaded_snapshot_keeps_its_commit_until_a_file_is_changed(tmp_path):
    write_sts(tmp_path, some_pairs())
    notes = tmp_path / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for p in tmp_path.glob("*.gz"):  # as `hf download --local-dir` writes them: commit, etag, time
        (notes / f"{p.name}.metadata").write_text(f"{'b0fd' * 10}\netag\n{p.stat().st_mtime}\n")
    assert benchmark_data.revision(tmp_path) == "b0fd" * 10
    (tmp_path / "extra.jsonl").write_text("{}\n")
    assert benchmark_data.revision(tmp_path).startswith("local-")


def test_an_aggregate_is_read_from_the_folder_part_by_part(guide, tmp_path):
    (plain,) = [t for t in mteb.get_benchmark("MTEB(eng, v1)").tasks if t.is_aggregate]
    for part in plain.tasks:
        some_retrieval(tmp_path / part.metadata.dataset["path"], "test")
    tasks = evaluate.resolve_tasks([plain.metadata.name], data=tmp_path)
    entry = evaluate.evaluate(guide, tasks, tmp_path / "kept")["tasks"][plain.metadata.name]
    assert len(entry["items"]) == 11 * len(plain.tasks) == 132
    assert np.mean(entry["items"]) == pytest.approx(entry["score"], abs=1e-4)


def test_a_benchmarks_means_need_all_of_its_tasks():
    tasks = mteb.get_benchmark("MTEB(eng, v1)").tasks
    result = {"tasks": {t.metadata.name: {"type": t.metadata.type, "score": 0.5, "items": []} for t in tasks}}
    means = benchmark_data.aggregate(result, ["MTEB(eng, v1)", "offline"])
    assert means == {"MTEB(eng, v1)": dict.fromkeys((*evaluate.CATEGORIES.values(), "Avg"), 50.0)}
    del result["tasks"]["STS12"]
    with pytest.raises(UserError, match="1 of its 56 tasks are not scored, first STS12"):
        benchmark_data.aggregate(result, ["MTEB(eng, v1)"])
