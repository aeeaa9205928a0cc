"""Rows for figures: the counts add up, the intervals are those of `uncertainty`."""

import pytest

from speed_core.evaluation import uncertainty
from speed_core.plots import basic
from workbook import rows


def test_depths_are_counted_before_and_after_over_the_same_levels():
    found = rows.topic_depths(["A", "A/B", "A/B/C/D", "A/B/C/D/E"], lambda path: "/".join(path.split("/")[:2]))
    assert found == {"raw paths": {"1": 1, "2": 1, "4": 1, "5": 1}, "truncated": {"1": 1, "2": 3, "4": 0, "5": 0}}


def test_steps_of_a_waterfall_end_with_what_is_left():
    outcomes = {"ok": 5, "invalid": 1, "refused": 1, "truncated": 2, "error": 1}
    assert [n for _, n in rows.seed_steps(outcomes)] == [10, 9, 6, 5]
    dropped = [{"dropped_by": "near-duplicate"}, {"dropped_by": "near-duplicate"}, {"dropped_by": "evaluation overlap"}]
    assert [n for _, n in rows.synthesis_steps(outcomes, dropped)] == [10, 7, 5, 3, 2]


def test_a_share_of_zero_keeps_its_width():
    low, high = uncertainty.share_interval([False] * 8)
    assert rows.share("none", [False] * 8) == {"label": "none", "value": 0.0, "low": low, "high": high} and high > 0.2


def test_valid_records_are_counted_by_label_and_a_row_is_told_in_a_line():
    found = rows.valid_shares({"none": [{"status": "invalid"}] * 2, "half": [{"status": "ok"}, {"status": "truncated"}]})
    assert found == [rows.share("none", [False] * 2), rows.share("half", [True, False])]
    assert rows.lines([{"label": "a", "value": 0.5, "low": 0.251, "high": 1}]) == ["a: 0.50 [0.25, 1.00]"]


def test_a_mean_is_scaled_with_its_interval_and_no_values_are_zero():
    values = [0.1, 0.4, -0.2]
    low, high = uncertainty.bootstrap_interval(values, "mean")
    found = rows.mean("gain", values, 100)
    assert found == {"label": "gain", "value": pytest.approx(10), "low": 100 * low, "high": 100 * high}
    assert rows.mean("gain", []) == {"label": "gain", "value": 0, "low": 0, "high": 0}


def test_a_row_as_evidence_keeps_its_numbers_and_says_that_nothing_was_trained():
    found = rows.evidence(rows.mean("a", [0.0, 1.0, 1.0], 100), "a share")
    assert (found["what"], found["trained"]) == ("a share", False) and found["low"] <= found["value"] <= found["high"]


def test_the_share_kept_is_counted_by_kind():
    records = [{"kind": k} for k in ("sts", "sts", "short_short")]
    first, second = rows.kept_by_kind(records, records[:1])
    assert (first["label"], first["value"], second["label"], second["value"]) == ("short-short (0 of 1)", 0, "sts (1 of 2)", 0.5)
    assert (second["kind"], second["valid"], second["kept"]) == ("sts", 2, 1)


def test_a_packed_example_holds_a_few_tokens_of_each_text():
    def tokenizer(texts, add_special_tokens):
        return {"input_ids": [list(map(ord, text)) for text in texts]}

    batch = rows.packed_example(tokenizer, [{"prompt": "p" * 20, "chosen": "c" * 20, "rejected": "r" * 20}] * 2)
    assert batch["input_ids"].shape == (1, 38) and batch["segment_ids"][0].tolist()[:19] == [0] * 8 + [1] * 6 + [2] * 5


@pytest.mark.parametrize(
    ("intervals", "said"),
    [
        ({"a": (-1, 1)}, "No difference is resolved"),
        ({"a": (1, 3)}, "Resolved: a (+2.0)"),
        ({"a": (1, 3), "b": (-3, -1), "c": (2, 4)}, "All 3 differences are resolved, -2.0 to +3.0"),
        ({"all, a": (1, 3), "b": (-2, 2), "c": (-3, -1)}, "Resolved: all, a (+2.0); c (-2.0)"),
        ({f"a rather long label {i}": (i, i + 2) for i in range(8)}, "7 of 8 differences are resolved"),
    ],
)
def test_a_title_says_which_differences_are_resolved(intervals, said):
    found = [{"label": k, "value": (low + high) / 2, "low": low, "high": high} for k, (low, high) in intervals.items()]
    assert basic.finding(found) == said
