"""What notebooks 07 and 07b ask: the facts that they note down are those that shipped runs have."""

import json

import numpy as np
import pytest

from speed_core.evaluation import uncertainty
from speed_core.store.run_context import CARRIED
from speed_core.study import mask_quality, student_questions
from speed_core.study.runs import open_run

TASKS = {"R": "Retrieval", "S": "STS", "OfflineNewsgroupsClustering": "Clustering"}
ARMS = ("guided", "plain", "weak", "margin", "labelled", "both")


def shipped(profile, name):
    folder = CARRIED / profile / name
    manifest = json.loads((folder / "manifest.json").read_text())
    return json.loads((folder / f"{name}.json").read_text()), manifest["parameters"]


@pytest.fixture
def scores():
    """{(layers, arm): results of three seeds}, each with four texts a task."""
    rng = np.random.default_rng(0)

    def result():
        items = {name: rng.uniform(0, 1, 4) for name in TASKS}
        return {"tasks": {n: {"type": TASKS[n], "score": float(v.mean()), "items": v.tolist()} for n, v in items.items()}}

    return {(layers, arm): [result() for _ in range(3)] for layers in (1, 2, 3, 4) for arm in ARMS}


def mean(results, *tasks):
    return np.mean([[100 * r["tasks"][t]["score"] for t in tasks or TASKS] for r in results])


@pytest.mark.parametrize("profile", ["tiny", "overnight"])
def test_the_masks_facts_follow_from_its_points(profile):
    facts, parameters = shipped(profile, "mask")
    assert mask_quality.facts(parameters["points"]) == facts


@pytest.mark.parametrize("profile", ["tiny", "overnight"])
def test_each_claim_asks_in_the_words_of_the_shipped_runs(profile, scores, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    run, (facts, _), (_, parameters) = open_run(profile), shipped(profile, "guided-gain"), shipped(profile, "mask")
    pairs = len(mask_quality.known_pairs(run)[mask_quality.NEWS])
    layers = run.profile.study.student.layers
    asked = student_questions.of_the_mask(scores, layers, parameters["points"], pairs)
    asked += student_questions.of_labelled_data(scores, layers)
    assert list(facts) == [*(q.claim for q in asked), "G4", "G5"]
    assert {q.claim: q.what for q in asked} == {k: f["what"] for k, f in facts.items() if k not in ("G4", "G5")}


def test_each_contrast_is_the_weighted_sum_of_mean_scores(scores):
    points = [
        {"margin": 0.0, "guide": guide, "labels": mask_quality.NEWS, "removed": n}
        for guide, n in ((mask_quality.WHOLE, 7), (mask_quality.SHALLOW, 1234))
    ]
    asked = student_questions.of_the_mask(scores, (1, 4), points, 36) + student_questions.of_labelled_data(scores, (1, 4))
    found = {q.claim: uncertainty.contrast(q.terms).value for q in asked}

    def gain(layers, *tasks, one="guided", other="plain"):
        return mean(scores[layers, one], *tasks) - mean(scores[layers, other], *tasks)

    both = {"one": "both", "other": "guided"}
    wanted = {
        "G1": (gain(1) + gain(4)) / 2,
        "G2": gain(1) - gain(4),
        "G3": (gain(1, "S") + gain(4, "S") - gain(1) - gain(4)) / 2,
        "G7": gain(1, other="weak"),
        "G9": gain(1, one="margin", other="guided"),
        "E2": gain(1, one="both", other="labelled"),
        "G8": gain(1, "OfflineNewsgroupsClustering", **both) - gain(1, "R", "S", **both),
    }
    assert found == pytest.approx(wanted) and "they mask 7 and 1,234 of 1,260 newsgroup candidates" in asked[3].what
    facts = student_questions.answered(asked)
    labels = [r["label"] for r in student_questions.shown(asked, facts)]
    assert labels == ["G7, stronger guide", "G9, margin 0.05", "E2, seed data added", "G8, own collection"]
    line = student_questions.text(facts).splitlines()[0]
    assert line.startswith(f"G1b guided against plain, all students and tasks: {found['G1']:+.2f} [")


def test_without_a_task_on_newsgroups_the_collection_is_not_asked_for(scores):
    for results in scores.values():
        for r in results:
            del r["tasks"]["OfflineNewsgroupsClustering"]
    assert [q.claim for q in student_questions.of_labelled_data(scores, (1, 4))] == ["E2"]


def test_the_rows_of_the_figure_are_sizes_and_all_by_kind_of_task(scores):
    rows = dict(student_questions.guided_minus_plain(scores, (1, 4)))
    assert list(rows)[:2] == ["1 layer, all tasks", "1 layer, STS"] and list(rows)[-1] == "all students, Retrieval"
    assert len(rows["all students, STS"]) == 4 and sum(w for w, _, _ in rows["all students, STS"]) == 0


def test_precision_and_recall_count_what_is_removed_and_what_is_false():
    removed, false = np.zeros((2, 4, 4), dtype=bool)
    removed[0, 1] = removed[1, 0] = removed[2, 3] = removed[3, 2] = True
    false[0, 1] = false[1, 2] = True
    assert mask_quality.precision_and_recall(removed, false) == (0.25, 0.5)
    assert mask_quality.precision_and_recall(~removed & removed, false) == (0, 0)
    pairs = [("a", "x", "y"), ("b", "x", "y"), ("a", "x", "y")]
    assert mask_quality.alike(pairs).nonzero()[0].tolist() == [0, 2]
