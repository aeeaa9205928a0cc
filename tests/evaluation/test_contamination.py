from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from speed_core.evaluation import contamination, offline_tasks
from speed_core.files import UserError


def record(query, positive, negative=None):
    return {"query": query, "positive": positive, "negative": negative}


def letters(texts):
    """Counts of letters: a stand-in for an embedding model whose cosines can be told by eye."""
    return np.array([[t.count(c) for c in "abcdefgh"] for t in texts], float)


TEXTS = {"One": ["a a a a b", "c c c c d"], "Two": ["e e f f e", "good day friend", "h"], "Words": ["a", "h h"]}


def test_shares_are_counted_per_task_before_and_after_curation():
    kept, dropped = [record("g g g", "h g h g")], [record("x c c c c d y", "Good day, friend!")]
    found = contamination.report(TEXTS, kept + dropped, kept, words=5, embed=letters)
    assert [found[t]["ngram_before"] for t in TEXTS] == [0.5, 0.5, None]  # "h" is too short to be checked
    assert [found[t]["ngram_after"] for t in TEXTS] == [0.0, 0.0, None]
    assert [found[t]["checked"] for t in TEXTS] == [2, 2, 0] and [found[t]["texts"] for t in TEXTS] == [2, 3, 2]


def test_the_nearest_training_text_is_named_and_the_negative_counts():
    kept = [record("g g g", "b b b b", "a a a a a b")]
    found = contamination.report(TEXTS, kept, kept, words=5, embed=letters, near=0.95)
    assert found["One"]["pair"] == ["a a a a b", "a a a a a b"] and found["One"]["near"] == 0.5
    assert found["One"]["closest"] == pytest.approx(21 / np.sqrt(17 * 26))
    assert found["One"]["mean"] == pytest.approx(found["One"]["closest"] / 2)  # the other shares no letter
    with pytest.raises(UserError, match="no training text"):
        contamination.report(TEXTS, kept, [], words=5, embed=letters)


def test_blocks_change_nothing():
    rng = np.random.default_rng(0)
    table = {str(i): v for i, v in enumerate(rng.normal(size=(60, 5)))}
    embed = lambda texts: np.stack([table[t] for t in texts])  # noqa: E731
    names = list(table)
    whole = contamination.nearest(embed, names[:25], names[25:])
    parts = contamination.nearest(embed, names[:25], names[25:], block=4)
    unit = np.stack([v / np.linalg.norm(v) for v in table.values()])
    cosines = unit[:25] @ unit[25:].T
    assert (whole[1] == cosines.argmax(1)).all() and np.allclose(whole[0], cosines.max(1), atol=1e-6)
    assert (whole[1] == parts[1]).all() and np.allclose(whole[0], parts[0], atol=1e-6)


def test_a_large_task_is_sampled_by_its_name_and_a_small_one_is_whole():
    texts = {"Large": [f"t{i}" for i in range(50)], "Small": ["b", "a", "b"]}
    drawn = contamination.sample(texts, most=10)
    assert drawn["Small"] == ["b", "a"] and len(set(drawn["Large"])) == 10
    assert drawn["Large"] == contamination.sample({"Large": texts["Large"]}, most=10)["Large"]


def test_texts_are_found_in_every_layout_that_mteb_uses():
    def table(**columns):
        return Dataset.from_dict(columns)

    def task(dataset, splits=("test",)):
        return SimpleNamespace(dataset=dataset, metadata=SimpleNamespace(eval_splits=list(splits)))

    splits = {"train": table(text=["x"], label=[0]), "test": table(text=["a", "b"], label=[0, 1])}
    assert offline_tasks.texts_of(task(splits)) == ["a", "b"]
    assert offline_tasks.texts_of(task({"en": splits, "de": splits})) == ["a", "b", "a", "b"]
    assert offline_tasks.texts_of(task({"test": table(sentences=[["a", "b"], ["c"]], labels=[[0, 1], [0]])})) == ["a", "b", "c"]
    search = {"corpus": table(id=["1"], text=["d"], title=[""]), "queries": table(id=["2"], text=["q"]), "relevant_docs": {}}
    assert offline_tasks.texts_of(task({"default": {"dev": search, "train": search}}, ["dev"])) == ["d", "q"]
