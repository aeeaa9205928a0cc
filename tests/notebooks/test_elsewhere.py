"""Numbers of the recorded runs beside those of this one."""

import elsewhere as collected
from workbook import elsewhere


def test_a_range_is_of_runs_with_the_same_settings_and_names_their_compute_types():
    untrained = elsewhere.text("tiny", "untrained", 32.2)
    assert untrained.startswith("untrained: 32.20 here; 32.09 to 32.48 in 2 recorded runs (bfloat16, float32); ")
    assert untrained.endswith("earlier with other settings (bfloat16)")
    junior = elsewhere.text("tiny", "junior valid", 0.5)
    assert "; 0.53 in 1 recorded run (float32); 0.69 to 0.71 in 5 earlier with other settings (bfloat16)" in junior


def test_at_another_size_there_is_no_range(capsys):
    assert elsewhere.text("smoke", "junior valid", 0.5) == "junior valid: 0.50 here (smoke; the recorded runs are at tiny)"


def test_each_number_says_what_it_was_made_with_and_none_is_of_an_unknown_run():
    known = elsewhere.recorded()
    assert list(known["numbers"]) == list(collected.NUMBERS) and len(known["runs"]) == len(collected.EARLIER) + 1
    for entries in known["numbers"].values():
        assert entries and {e["run"] for e in entries} <= set(known["runs"])
        assert all(e["compute_type"] in ("float32", "bfloat16") and isinstance(e["other"], list) for e in entries)
    (today,) = [e for e in known["numbers"]["junior valid"] if not e["other"]]
    assert today["compute_type"] == "float32"
    assert "junior.examples 322, now 160" in known["numbers"]["junior valid"][0]["other"]


def test_the_table_of_the_docs_is_made_of_the_same_numbers():
    page = collected.PAGE.read_text(encoding="utf-8")
    assert collected.into_page(page, elsewhere.recorded()) == page, "run `python scripts/elsewhere.py`"
