"""The drawing of the pipeline: one box is filled, counts are those of the profile."""

import re
from xml.etree import ElementTree

import pytest

from speed_core import profile as profiles
from workbook import pipeline


@pytest.mark.parametrize("number", [*(f"{n:02d}" for n in range(1, 13)), "07b"])
def test_the_box_of_the_notebook_is_filled_and_named_in_words(number):
    shown = pipeline.show(number, "smoke")
    drawn = ElementTree.fromstring(shown._repr_html_())
    assert [r.get("fill") for r in drawn.iter("rect")].count("#0072B2") == 1
    assert str(shown).count("[") == 1 and (re.search(rf"\[{number}\b", str(shown)) or number in ("11", "12"))


def test_counts_are_the_papers_and_the_profiles_own():
    texts = [t.text for t in ElementTree.fromstring(pipeline.show("02", "tiny", {"seeds": 99})._repr_html_()).iter("text")]
    assert "25K | 99" in texts and "GPT-4o | recorded" in texts
    assert f"920K | {profiles.load('tiny').synthesis.count}" in texts
