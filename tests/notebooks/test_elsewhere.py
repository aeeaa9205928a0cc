"""Numbers of the recorded runs beside those of this one."""

import elsewhere as collected
from workbook import elsewhere


def test_a_range_is_of_runs_with_the_same_settings_and_names_their_compute_types():
    junior = elsewhere.text("tiny", "junior valid", 0.5)
    assert junior.startswith("junior valid: 0.50 here; 0.38 to 0.50 in 3 recorded tiny runs (bfloat16, float32); ")
    assert junior.endswith("; 0.53 to 0.71 in 6 earlier runs with other settings (bfloat16, float32)")


def test_at_another_size_there_is_no_range(capsys):
    assert elsewhere.text("smoke", "junior valid", 0.5) == "junior valid: 0.50 here (smoke; the recorded runs are at tiny)"


def test_each_number_says_what_it_was_made_with_and_none_is_of_an_unknown_run():
    known = elsewhere.recorded()
    committed = [run for run in known["runs"].values() if "values" not in run]
    assert list(known["numbers"]) == list(collected.NUMBERS) and len(committed) == len(collected.EARLIER) + 1
    for entries in known["numbers"].values():
        assert entries and {e["run"] for e in entries} <= set(known["runs"])
        assert all(e["compute_type"] in ("float32", "bfloat16") and isinstance(e["other"], list) for e in entries)
    today = [e for e in known["numbers"]["junior valid"] if not e["other"]]
    assert {e["compute_type"] for e in today} == {"float32", "bfloat16"}
    assert "junior.examples 322, now 128" in known["numbers"]["junior valid"][0]["other"]


def test_the_table_of_the_docs_is_made_of_the_same_numbers():
    page = collected.PAGE.read_text(encoding="utf-8")
    assert collected.into_page(page, elsewhere.recorded()) == page, "run `python scripts/elsewhere.py`"
