"""Every notebook has the same form, short cells and few words; every page is in plain English."""

import re

import nbformat
import pytest

from speed_core.runner import notebook
from speed_core.store.run_context import ROOT

NOTEBOOKS = notebook.notebooks(ROOT / "notebooks")
PAGES = [
    ROOT / "README.md",
    ROOT / "notebooks" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
MOST_WORDS, MOST_LINES = 800, 12
# In this order in every notebook; 00 has no idea in code and no stage.
HEADINGS = ["Where this notebook stands", "The idea in code", "The stage", "What to take away", "Check", "Exercises"]
BANNED = [
    "said aloud", "for want of", "of which none", "used all the same", "what is there of", "no point when", "points a doubling",
    "is no merit", "stands for itself", "said it itself", "be it said", "in the main", "the same holds good", "and that is said",
    "tasks a topic", "task a topic", "tokens a record", "calls a record", "models an arm", "tokens a call", "holds zero",
]  # fmt: skip
# What a notebook prints or draws: messages of the package, words in figures, the sentences under them.
MESSAGES = [
    *sorted((ROOT / "speed_core").rglob("*.py")),
    *sorted(p for p in (ROOT / "figures").iterdir() if p.suffix in (".csv", ".json", ".svg")),
    ROOT / "scripts" / "captions.py",
]
# Figures that were drawn with older words; empty once they are drawn again.
DRAWN_BEFORE = {
    "05_revision.svg",
    "10_sweeps.csv",
    "10_sweeps.svg",
    "12_claims.csv",
    "12_claims.svg",
    "12_table5_cost.svg",
    "claims.csv",
}


def cells(path, kind):
    return [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_short(path):
    words = sum(len(re.sub(r"<[^>]+>", "", text).split()) for text in cells(path, "markdown"))
    assert words <= MOST_WORDS
    long = [text for text in cells(path, "code") if len(text.strip().splitlines()) > MOST_LINES]
    assert not long, long[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_headings_in_the_common_order(path):
    found = [line.removeprefix("## ") for text in cells(path, "markdown") for line in text.splitlines() if line.startswith("## ")]
    wanted = [h for h in HEADINGS if path.stem[:2] != "00" or h not in ("The idea in code", "The stage")]
    assert [h for h in found if h in wanted] == wanted
    (last,) = (text for text in cells(path, "markdown") if text.startswith("## What to take away"))
    assert len(re.findall(r"^[-*] ", last, re.M)) == 3
    assert "**Claim" in cells(path, "markdown")[0] or path.stem[:2] == "00"


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_holds_no_phrase_that_has_to_be_read_twice(path):
    texts = cells(path, "markdown") if path.suffix == ".ipynb" else [path.read_text(encoding="utf-8")]
    text = " ".join(" ".join(texts).split()).lower()
    assert not [phrase for phrase in BANNED if phrase in text]


def test_no_message_or_figure_holds_such_a_phrase():
    found = {}
    for path in MESSAGES:
        text = " ".join(path.read_text(encoding="utf-8").split()).lower()
        if phrases := [phrase for phrase in BANNED if phrase in text]:
            found[path.name] = phrases
    assert {name: phrases for name, phrases in found.items() if name not in DRAWN_BEFORE} == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_name_of_a_notebook_stands_for_two_things(path):
    """A name that a cell binds at its top level is bound by no other cell, so that every cell can run twice."""
    import ast

    bound = {}
    for number, text in enumerate(cells(path, "code")):
        for node in ast.parse(text).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node] if isinstance(node, ast.FunctionDef) else []
            for target in targets:
                names = [n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
                for name in [target.name] if isinstance(target, ast.FunctionDef) else names:
                    assert bound.setdefault(name, number) == number, f"{name!r} is bound again"
