"""Real MTEB tasks by name from a folder of snapshots. All rows here are made for the tests; none are MTEB's."""

import gzip
import json
from pathlib import Path

import datasets
import mteb
import numpy as np
import pytest

from speed_core.evaluation import evaluate, local_data, offline_tasks, resampling, uncertainty
from speed_core.evaluation.encoder import load_encoder
from speed_core.files import UserError
from speed_core.models import loading
from speed_core.runner import cards

TOOLS = ("spade", "rake", "hoe", "saw", "drill", "clamp", "brush", "ladder", "bucket", "wrench", "pliers", "chisel")


def with_data(folder, function, *given):
    """Call a function with $SPEED_DATA set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEED_DATA", str(folder))
        return function(*given)


def resolve(names, folder):
    return with_data(folder, evaluate.resolve_tasks, names)


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


def write_splits(folder: Path, splits, card=""):
    """One JSONL file a split, and a card where configurations are named."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def add_candidates(folder: Path, split: str, candidates):
    """The configuration that makes a retrieval set one to rerank."""
    (folder / "top_ranked").mkdir()
    rows = [{"query-id": q, "corpus-ids": found} for q, found in candidates.items()]
    datasets.Dataset.from_list(rows).to_parquet(folder / "top_ranked" / f"{split}-0.parquet")
    card = folder / "README.md"
    more = f"- config_name: top_ranked\n  data_files:\n  - split: {split}\n    path: top_ranked/{split}-*\n---\n"
    card.write_text(card.read_text(encoding="utf-8").removesuffix("---\n") + more, encoding="utf-8")


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


PLACES = ("in the shed", "on the roof", "near the old bridge")


def some_labelled():
    return [{"text": f"a {t} {w}", "label": k if i % 5 else 0} for i, t in enumerate(TOOLS) for k, w in enumerate(PLACES)]


def one_of_each_type(folder: Path):
    """A snapshot of a task of each type of MTEB(eng, v1), as it lies on the hub, hard enough that no score is 0 or 1."""
    pairs, data = some_pairs(), folder / "mteb"
    close = [int(s > 1) if i % 4 else i % 2 for i, (*_, s) in enumerate(pairs)]
    columns = {"sent1": [a for a, *_ in pairs], "sent2": [b for _, b, _ in pairs], "labels": close}
    write_splits(data / "sprintduplicatequestions-pairclassification", {"test": [columns]})
    summaries = [
        {"text": t, "human_summaries": [f"a {t} is old", f"the old {t}"], "relevance": [5 - i % 3, 1, i % 5, 2],
         "machine_summaries": [f"the {t} is old", "it rains", f"a {t}", f"old things and {t}s"]}
        for i, t in enumerate(TOOLS)
    ]  # fmt: skip
    write_splits(data / "summeval", {"test": summaries})
    labelled = some_labelled()
    write_splits(data / "banking77", {"train": labelled, "test": labelled[::-1]})
    sets = [labelled[k : k + 20] for k in (0, 5, 10, 15)]
    clusters = [{"sentences": [r["text"] for r in rows], "labels": [str(r["label"]) for r in rows]} for rows in sets]
    write_splits(data / "twentynewsgroups-clustering", {"test": clusters})
    some_retrieval(data / "scifact", "test")
    some_retrieval(data / "SciDocsRR", "test")
    ids = [f"{x}{i}" for i in range(len(TOOLS)) for x in "de"]
    add_candidates(data / "SciDocsRR", "test", {f"q{i}": [f"d{i}", f"e{i}", *ids[i : i + 9 : 2]] for i in range(11)})
    queries = {f"{i}_{k}": f"{w} {t}" for i, t in enumerate(TOOLS) for k, w in enumerate(("a", "cake and rain and"))}
    corpus = {f"d{i}": ("", f"how to keep a {t} clean") for i, t in enumerate(TOOLS)}
    relevant = {q: {f"d{q.split('_')[0]}": 1, f"d{(int(q.split('_')[0]) + 3) % 12}": 1} for q in queries}
    write_retrieval(data / "MindSmallReranking", "test", queries, corpus, relevant)
    add_candidates(data / "MindSmallReranking", "test", dict.fromkeys(queries, list(corpus)))
    rows = [{"sentence1": a, "sentence2": b, "score": s} for a, b, s in pairs]
    languages = ("en-en", "ko-ko", "ar-ar", "en-ar", "en-de", "en-tr", "es-en", "es-es", "fr-en", "it-en", "nl-en")
    by_language = [r | {"lang": x, "sentence2": r["sentence2"][k:]} for k, x in enumerate(languages) for r in rows]
    write_splits(data / "sts17-crosslingual-sts", {"test": by_language})
    return [
        "SprintDuplicateQuestions", "SummEval", "Banking77Classification", "TwentyNewsgroupsClustering", "SciFact", "SciDocsRR",
        "MindSmallReranking", "STS17",
    ]  # fmt: skip


def statistic_of(task):
    parts = task.get("parts") or [task["items"]]
    return np.mean([resampling.statistic(task["type"], np.array([p], float))[0] for p in parts])


@pytest.fixture(scope="module")
def guide():
    return load_encoder("package:all-MiniLM-L6-v2", "guide", instructed=False, dtype="float32")


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
    assert resampling.statistic("STS", np.array([sts["items"]]))[0] == pytest.approx(sts["score"], abs=2e-3)
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
        tasks = resolve(["STSBenchmark"], tmp_path / place)
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
        resolve(["STSBenchmark"], tmp_path / "none")


def test_a_snapshot_that_is_broken_or_empty_is_named(tmp_path):
    folder = tmp_path / "mteb" / "stsbenchmark-sts"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="no files in it"):
        resolve(["STSBenchmark"], tmp_path)
    (folder / "test.jsonl.gz").write_bytes(b"no gzip")
    (task,) = resolve(["STSBenchmark"], tmp_path)
    with pytest.raises(UserError, match="task 'STSBenchmark': its snapshot .* could not be read"):
        task.load_data()


def test_a_downloaded_snapshot_keeps_its_commit_until_a_file_is_changed(tmp_path):
    write_sts(tmp_path, some_pairs())
    notes = tmp_path / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for p in tmp_path.glob("*.gz"):  # as `hf download --local-dir` writes them: commit, etag, time
        (notes / f"{p.name}.metadata").write_text(f"{'b0fd' * 10}\netag\n{p.stat().st_mtime}\n")
    assert local_data.revision(tmp_path) == "b0fd" * 10
    (tmp_path / "extra.jsonl").write_text("{}\n")
    assert local_data.revision(tmp_path).startswith("local-")


def test_an_aggregate_is_read_from_the_folder_part_by_part(guide, tmp_path):
    (plain,) = [t for t in mteb.get_benchmark("MTEB(eng, v1)").tasks if t.is_aggregate]
    for part in plain.tasks:
        some_retrieval(tmp_path / part.metadata.dataset["path"], "test")
    tasks = resolve([plain.metadata.name], tmp_path)
    entry = evaluate.evaluate(guide, tasks, tmp_path / "kept")["tasks"][plain.metadata.name]
    assert [len(items) for items in entry["parts"]] == [11] * len(plain.tasks) == [11] * 12
    assert np.mean(entry["parts"]) == pytest.approx(entry["score"], abs=1e-4)
    # Notebook 09 reads the texts of an aggregate for its contamination table, too.
    tasks = resolve([plain.metadata.name], tmp_path)
    assert len(offline_tasks.distinct_texts(tasks)[plain.metadata.name]) == 24


def test_a_benchmarks_means_need_all_of_its_tasks():
    tasks = mteb.get_benchmark("MTEB(eng, v1)").tasks
    result = {"tasks": {t.metadata.name: {"type": t.metadata.type, "score": 0.5, "items": []} for t in tasks}}
    means = evaluate.benchmark_means(result, ["MTEB(eng, v1)", "offline"])
    assert means == {"MTEB(eng, v1)": dict.fromkeys((*evaluate.CATEGORIES.values(), "Avg"), 50.0)}
    del result["tasks"]["STS12"]
    with pytest.raises(UserError, match="1 of its 56 tasks are not scored, first STS12"):
        evaluate.benchmark_means(result, ["MTEB(eng, v1)"])


@pytest.fixture(scope="module")
def each_type(guide, tmp_path_factory):
    """Scores of two models, the guide and half of its layers, on a task of each type."""
    folder = tmp_path_factory.mktemp("types")
    tasks, shallow = one_of_each_type(folder), str(loading.shallow_encoder("package:all-MiniLM-L6-v2", 2))
    small = load_encoder(shallow, "small", instructed=False, dtype="float32")
    return [evaluate.evaluate(m, resolve(tasks, folder), folder / "kept") for m in (guide, small)]


def test_every_type_of_the_papers_benchmark_has_values_whose_statistic_is_mtebs_score(each_type):
    tasks = each_type[0]["tasks"]
    assert {t["type"] for t in tasks.values()} == set(evaluate.CATEGORIES)
    for name, task in tasks.items():
        assert resampling.has_values(task), name
        assert statistic_of(task) == pytest.approx(task["score"], abs=2e-3), name
    assert sum(0.05 < t["score"] < 0.99 for t in tasks.values()) >= 6, "scores at the end of the scale test little"
    assert {n: len(t["items"]) for n, t in tasks.items() if n in ("MindSmallReranking", "SummEval", "SprintDuplicateQuestions")} == {
        "MindSmallReranking": 12, "SummEval": 12, "SprintDuplicateQuestions": 12,
    }  # fmt: skip
    assert len(tasks["STS17"]["parts"]) == 11


def test_every_task_counts_in_notebook_09s_means_and_differences(each_type):
    one, other = ([r] for r in each_type)
    gains = []
    for name, task in one[0]["tasks"].items():
        found = uncertainty.average(one, (name,))
        assert found.value == pytest.approx(100 * task["score"]) and np.isfinite([found.low, found.high]).all(), name
        gains.append(100 * (task["score"] - other[0]["tasks"][name]["score"]))
    together = uncertainty.difference(one, other)
    assert together.value == pytest.approx(np.mean(gains)) and together.low < together.value < together.high
    by_type = {k: uncertainty.difference(one, other, (k,)) for k in evaluate.CATEGORIES}
    assert all(not e.no_texts for e in by_type.values())
    assert evaluate.category_means(one[0])["Avg"] == pytest.approx(uncertainty.average(one).value)


def test_a_task_without_values_counts_and_is_said_to_have_no_interval(each_type):
    tasks = each_type[0]["tasks"]
    lost = [{**r, "tasks": {**r["tasks"], "STS17": {"type": "STS", "score": 0.5, "items": []}}} for r in each_type]
    alone = uncertainty.average(lost[:1], ("STS17",))
    assert alone.value == 50 and alone.no_texts and not alone.resolved and "no interval over texts" in alone.row("STS17")["label"]
    assert str(alone) == "+50.00 (no interval over texts)"
    assert "| STS17 | STS | 50.0 | no interval over texts |" in cards.score_table(lost[0])
    every = uncertainty.average(lost[:1])
    assert every.value == pytest.approx(np.mean([50] + [100 * t["score"] for n, t in tasks.items() if n != "STS17"]))
    # Its variance is taken to be the mean of the others': the same interval as of their mean, but for how many tasks there are.
    others = uncertainty.average([{"tasks": {n: t for n, t in tasks.items() if n != "STS17"}}])
    assert every.sd_items**2 * 8 == pytest.approx(others.sd_items**2 * 7)


def test_only_what_a_task_asks_for_is_scored_when_more_is_kept(guide, tmp_path):
    card = "---\nconfigs:\n"
    for language in ("de", "en", "es", "fr", "ja", "zh"):
        rows = some_labelled()
        hard = [r | {"label": i % 3} for i, r in enumerate(rows)] if language != "en" else rows
        hard = hard if language == "en" else [r | {"text": f"{language} text"} for r in hard]
        place = tmp_path / "mteb" / "AmazonReviewsClassification" / language
        write_splits(place, {"train": hard, "validation": hard, "test": hard})
        files = "".join(f"  - split: {s}\n    path: {language}/{s}.jsonl\n" for s in ("train", "validation", "test"))
        card += f"- config_name: {language}\n  data_files:\n{files}"
    (tmp_path / "mteb" / "AmazonReviewsClassification" / "README.md").write_text(card + "---\n", encoding="utf-8")
    (every,) = resolve(["AmazonReviewsClassification"], tmp_path)
    first = evaluate.evaluate(guide, [every], tmp_path / "kept")["tasks"]["AmazonReviewsClassification"]
    assert len(first["parts"]) == 12 and statistic_of(first) == pytest.approx(first["score"], abs=1e-6)
    english = mteb.get_task(
        "AmazonReviewsClassification", languages=["eng"], eval_splits=["test"]
    )  # as MTEB(eng, v1) asks for it
    (task,) = with_data(tmp_path, local_data.prepare, [english])
    second = evaluate.evaluate(guide, [task], tmp_path / "kept")["tasks"]["AmazonReviewsClassification"]
    assert len(second["items"]) == 36 and second["score"] == pytest.approx(np.mean(second["items"])) != first["score"]
