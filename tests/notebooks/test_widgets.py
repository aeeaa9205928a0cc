"""Widgets: text for everybody first, and behind each control the same real data."""

import os
import re
from xml.etree import ElementTree

import ipywidgets
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speed_core.contrastive.guided_loss import false_negative_mask
from speed_core.data import minhash
from speed_core.runner import notebook
from speed_core.store.run_context import ROOT
from workbook import show, widgets


@pytest.fixture(scope="module")
def columns():
    """Unit vectors of 8 queries, positives near them, and negatives."""
    g = torch.Generator().manual_seed(0)
    q, near, far = (torch.randn(8, 6, generator=g) for _ in range(3))
    return [torch.nn.functional.normalize(t, dim=1) for t in (q, q + near, far)]


def controls(box):
    """Every widget in a box, by its description."""
    found = {}
    for child in getattr(box, "children", ()):
        found |= controls(child) | ({child.description: child} if getattr(child, "description", "") else {})
    return found


def page(box):
    return next(c for c in reversed(box.children) if isinstance(c, ipywidgets.HTML))


def test_outside_a_kernel_only_the_text_is_shown(columns, capsys):
    widgets.show("text", lambda: pytest.fail("a widget was made"))
    widgets.margin(columns)
    assert capsys.readouterr().out.startswith("text\nmargin  query-positive")


def test_the_runner_leaves_text_and_a_still_figure_in_the_notebook_and_no_widget(tmp_path):
    nb = nbformat.read(ROOT / "notebooks" / "03_junior_generator.ipynb", 4)
    nb.cells = [c for c in nb.cells if "parameters" in c.metadata.get("tags", []) or "widgets.temperature(" in c.source]
    nbformat.write(nb, tmp_path / "03.ipynb")
    report = notebook.execute(tmp_path / "03.ipynb", tmp_path / "done.ipynb", {}, show=False)
    assert report.status == "ok", report.detail
    done = nbformat.read(tmp_path / "done.ipynb", 4)
    said, still = done.cells[-1].outputs
    assert said.name == "stdout" and "share, 95% interval" in said.text
    assert 'alt="Valid records, recorded samples. Its numbers' in still.data["text/html"]
    assert "widgets" not in done.metadata and "SPEED_HEADLESS" not in os.environ


def test_a_progress_bar_of_a_library_does_not_stay_in_the_notebook_that_the_runner_writes(tmp_path):
    nb = nbformat.read(ROOT / "notebooks" / "03_junior_generator.ipynb", 4)
    nb.cells = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    bar = "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)):\n    print('said')"
    nb.cells.append(nbformat.v4.new_code_cell(bar))
    nbformat.write(nb, tmp_path / "bar.ipynb")
    assert notebook.execute(tmp_path / "bar.ipynb", tmp_path / "done.ipynb", {}, show=False).status == "ok"
    done = nbformat.read(tmp_path / "done.ipynb", 4)
    assert [o.get("text") for o in done.cells[-1].outputs] == ["said\n" * 3] and "widgets" not in done.metadata


def test_the_margin_table_counts_what_the_mask_removes_and_a_larger_margin_removes_more(columns):
    lines = [line.split() for line in widgets.margin_table(columns).splitlines()[1:]]
    assert [float(line[0]) for line in lines] == list(widgets.MARGINS)
    totals = [int(line[-1]) for line in lines]
    assert totals == sorted(totals) and totals[0] < totals[-1]
    assert totals[3] == sum(int(gone.sum()) for gone in false_negative_mask(columns).removed.values())


def test_the_still_figures_draw_the_numbers_of_the_text():
    points = widgets.temperature_points()
    (ax,) = widgets.temperature_picture(points).axes
    assert ax.lines[0].get_ydata().tolist() == [p["valid"] / p["all"] for p in points]
    found = [{"stage": "raw", "status": s, "reason": r} for s, r in [("ok", "")] * 3 + [("truncated", "length")]]
    counts = widgets.outcome_counts(found)
    (ax,) = widgets.outcome_picture(counts).axes
    assert [bar.get_width() for bar in ax.patches] == [3, 1] == list(counts.values())
    assert [t.get_text() for t in ax.get_yticklabels()] == ["raw, ok", "raw, truncated, length"]
    plt.close("all")


def test_what_the_slider_computes_from_gives_the_counts_of_the_table_at_each_margin(columns):
    data, lines = widgets.margin_data(columns), [line.split() for line in widgets.margin_table(columns).splitlines()[1:]]
    for m, line in zip(widgets.MARGINS, lines, strict=True):
        gone = [sum(x is not None and x > round(-1000 * m) for row in rows for x in row) for rows in data["blocks"].values()]
        assert gone == [int(n) for n in line[1:-1]], m
    same = data["blocks"]["query-positive"]
    assert all(same[i][i] is None for i in range(8)) and all(None not in row for row in data["blocks"]["query-negative"])


def test_the_slider_never_removes_an_exact_tie_at_margin_zero(columns):
    queries, positives, _ = columns
    blocks = widgets.margin_data([queries, positives, positives])["blocks"]  # each negative is the own positive
    assert [blocks["query-negative"][i][i] for i in range(8)] == [0] * 8


def test_the_slider_is_in_the_page_that_a_run_leaves_and_fetches_nothing(tmp_path):
    cells = ["import torch\nfrom workbook import widgets", "widgets.margin([torch.eye(3), torch.eye(3), torch.ones(3, 3)])"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(nb, tmp_path / "07.ipynb")
    assert notebook.execute(tmp_path / "07.ipynb", tmp_path / "done.ipynb", {}, show=False).status == "ok"
    table, slider = nbformat.read(tmp_path / "done.ipynb", 4).cells[-1].outputs
    page = slider.data["text/html"]
    assert table.text.startswith("margin ") and "table above" in slider.data["text/plain"]
    assert '"query-negative":[[' in page and '<input type="range"' in page and "http" not in page


def test_the_browser_filters_and_goes_forth_and_back():
    _, rows = widgets.recorded_samples()
    found = [r | {"stage": "raw", "text": r["raw"]} for r in rows]
    box = widgets.entry_browser(found)
    control, (place,) = controls(box), [c for c in box.children[1].children if isinstance(c, ipywidgets.Label)]
    assert place.value == f"1 of {len(rows)}" and control["previous"].disabled
    control["status"].value = "invalid"
    invalid = [r for r in rows if r["status"] == "invalid"]
    control["next"].click()
    assert place.value == f"2 of {len(invalid)}" and invalid[1]["reason"] in page(box).value
    control["previous"].click()
    assert place.value.startswith("1 of") and invalid[0]["reason"] in page(box).value
    control["reason"].value = "length"  # what is cut off is truncated, not invalid
    assert place.value == "none: widen a filter" and page(box).value == ""
    assert control["previous"].disabled and control["next"].disabled


def test_model_text_is_escaped():
    entry = dict.fromkeys(widgets.FILTERS, "raw") | {"text": "<script>alert(1)</script>", "prompt": "<b>"}
    assert "<script>" not in page(widgets.entry_browser([entry])).value


def test_between_recorded_temperatures_nothing_differs_but_the_temperature():
    header, rows = widgets.recorded_samples()
    asked = {t: [(r["record"], r["seed"], r["kind"]) for r in rows if r["temperature"] == t] for t in widgets.TEMPERATURES}
    assert len(asked[0.3]) == 24 and all(a == asked[0.3] for a in asked.values()) and len(rows) == 96
    assert {r["prompt"] for r in rows} == set(header["prompts"])
    assert {"profile", "junior", "decoding", "device", "date", "engine"} <= set(header)


def test_every_recorded_text_can_be_reached_and_says_whether_it_is_valid():
    _, rows = widgets.recorded_samples()
    box = widgets.temperature_slider()
    control = controls(box)
    for r in rows[::7]:
        control["temperature"].value, control["prompt"].value = r["temperature"], r["prompt"]
        control["seed"].value = r["record"].partition("#")[2]
        word = "a valid record" if r["status"] == "ok" else f"no valid record: {r['status']}, {r['reason']}"
        assert f"temperature {r['temperature']}, {word}" in page(box).value


def test_marked_tokens_and_a_word_diff_hold_every_word_as_text_and_as_a_page():
    marked = show.masked(["a <b>", " c"], [0, 1])
    assert repr(marked) == "a <b>[ c]" and "a &lt;b&gt;<mark> c</mark>" in marked._repr_html_()
    diff = show.word_diff("the old hen lays", "the young hen lays well")
    assert repr(diff) == "the [-old-] {+young+} hen lays {+well+}"
    assert "<del>old</del> <ins>young</ins>" in diff._repr_html_()


def test_fields_of_a_record_are_shown_without_its_quotes_and_other_text_as_it_is():
    assert show.fields('{"input_text":"a \\"b\\"","label":"c"}') == 'input_text: a "b"\nlabel: c'
    assert show.fields('{"cut') == '{"cut' and show.fields("[1]") == "[1]"


def test_bands_are_filled_where_a_text_agrees_with_the_first():
    shown = show.bands({"one <b>": [1, 2, 3], "two": [1, 5, 3], "three": [4, 5, 6]})
    assert repr(shown).splitlines() == ["###  3 bands: one <b>", "#.#  2 of 3 bands agree: two", "...  0 of 3 bands agree: three"]
    drawn = ElementTree.fromstring(shown._repr_html_())
    assert [r.get("fill") for r in drawn.iter("rect")].count("#0072B2") == 5 and "two" in drawn.get("aria-label")


def test_the_s_curve_marks_pairs_and_says_their_probability():
    shown = show.s_curve(32, 4, 0.7, [0.75, 0.33])
    assert f"similarity 0.75: found with probability {minhash.probability(0.75, 32, 4):.4f}" in repr(shown).splitlines()
    drawn = ElementTree.fromstring(shown._repr_html_())
    circles = list(drawn.iter("circle"))
    assert len(circles) == 2 and float(circles[0].get("cy")) < float(circles[1].get("cy"))
    assert {t.text for t in drawn.iter("text")} >= {"pair at 0.75", "threshold 0.7"}


@given(*[st.lists(st.sampled_from("a b c".split()), max_size=8).map(" ".join)] * 2)
def test_a_word_diff_gives_back_both_texts(before, after):
    text = repr(show.word_diff(before, after))
    old = re.sub(r"\{\+.*?\+\}", " ", text).replace("[-", " ").replace("-]", " ")
    new = re.sub(r"\[-.*?-\]", " ", text).replace("{+", " ").replace("+}", " ")
    assert old.split() == before.split() and new.split() == after.split()
