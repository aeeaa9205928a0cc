"""Captions of the recorded figures: the sentence in sight, the picture folded."""

import nbformat
import pytest
from nbconvert import HTMLExporter

import captions
from speed_core.store.run_context import ROOT

FIGURES = ROOT / "figures"
PICTURE = "![Topic depth](../figures/01_topic_depth.svg)"


def test_the_picture_is_folded_and_its_sentence_is_not():
    text = captions.under_pictures(f"{captions.LEADS[0]} old words.\n\n{PICTURE}", FIGURES)
    sentence, opened, picture, closed = text.split("\n\n")
    assert sentence == f"{captions.LEADS[0]} {captions.reading('01_topic_depth', FIGURES)}"
    assert opened == "<details><summary>The recorded figure</summary>" and picture == PICTURE and closed == "</details>"
    assert captions.under_pictures(text, FIGURES) == text


def test_words_behind_the_picture_stay():
    text = captions.under_pictures(f"{captions.LEADS[0]} old.\n\n{PICTURE}\n\nMore words.", FIGURES)
    assert text.endswith("</details>\n\nMore words.") and captions.under_pictures(text, FIGURES) == text


@pytest.mark.parametrize("text", [f"Words.\n\n{PICTURE}", f"{captions.LEADS[0]} no picture."])
def test_a_cell_that_is_no_caption_stays_as_it_is(text):
    assert captions.under_pictures(text, FIGURES) == text


def test_an_exported_page_shows_the_folded_picture():
    text = captions.under_pictures(f"{captions.LEADS[0]} old words.\n\n{PICTURE}", FIGURES)
    page = HTMLExporter(template_name="lab").from_notebook_node(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    )[0]
    folded = page[page.index("<details>") : page.index("</details>")]
    assert "<img" in folded and "01_topic_depth.svg" in folded and "The recorded figure" in folded


def test_only_the_notebooks_that_are_named_are_written(tmp_path, monkeypatch):
    for name in ("01_a", "02_b"):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"{captions.LEADS[0]} old.\n\n{PICTURE}")])
        nbformat.write(nb, tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(captions, "notebooks", lambda folder: sorted(tmp_path.glob("*.ipynb")))
    assert captions.write(only=["02"]) == 1 and captions.write() == 1 and captions.write() == 0
