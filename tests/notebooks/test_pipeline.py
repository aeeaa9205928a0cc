"""The drawing of the pipeline: one box is filled, counts are those of the profile."""

import re
from xml.etree import ElementTree

import pytest

from speed_core import profile as profiles
from speed_core.files import write_json
from workbook import pipeline


@pytest.mark.parametrize("number", [*(f"{n:02d}" for n in range(1, 13)), "07b"])
def test_the_box_of_the_notebook_is_filled_and_named_in_words(number):
    shown = pipeline.show(number, "smoke")
    drawn = ElementTree.fromstring(shown._repr_html_())
    assert [r.get("fill") for r in drawn.iter("rect")].count("#0072B2") == 1
    assert str(shown).count("[") == 1 and (re.search(rf"\[{number}\b", str(shown)) or number in ("11", "12"))


def texts(*arguments):
    return [t.text for t in ElementTree.fromstring(pipeline.show(*arguments)._repr_html_()).iter("text")]


def test_an_arrow_has_the_papers_count_and_the_profiles_until_the_run_has_one(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    said = texts("02", "tiny", {"seeds": 99})
    assert said.index("25K") + 1 == said.index("(99)") and {"GPT-4o", "recorded"} <= set(said)
    assert f"({profiles.load('tiny').synthesis.count})" in said
    for name, manifest in {
        "seeds": {"outcomes": {"ok": 97}},
        "synthetic": {"kept": 41},
        "raw": {"of": "an older version"},
    }.items():
        write_json(tmp_path / "tiny" / "artifacts" / name / "manifest.json", manifest)
    said = texts("02", "tiny", {"seeds": 99})
    assert said.index("25K") + 1 == said.index("97") and said.index("920K") + 1 == said.index("41") and "(99)" not in said
    write_json(tmp_path / "tiny" / "artifacts" / "scores-guided-3" / "scores.json", {"tasks": {"a": {}, "b": {}}})
    said = texts("02", "tiny")
    assert said.index("56") + 1 == said.index("2"), "MTEB's tasks and the run's"
    monkeypatch.setenv("SPEED_VARIANT", "seeds=7")
    write_json(tmp_path / "tiny" / "variants" / "seeds=7" / "artifacts" / "seeds" / "manifest.json", {"outcomes": {"ok": 7}})
    assert {"7", "41"} <= set(texts("02", "tiny"))


def test_no_text_of_the_drawing_is_smaller_than_8_points_at_page_width():
    drawn = pipeline.show("02", "smoke")._repr_html_()
    width = float(re.search(r'viewBox="0 0 (\d+)', drawn)[1])
    assert min(map(float, re.findall(r'font-size="(\d+)"', drawn))) * 600 / width > 8
