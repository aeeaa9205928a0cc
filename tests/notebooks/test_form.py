"""Every notebook has the same form, short cells and few words; every page is in plain English."""

import ast
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
# In this order in every notebook; 00 has no idea in code, no stage and no figure. Some have several figures.
HEADINGS = [
    "Where this notebook stands", "What goes in", "The idea in code", "The stage", "What comes out", "The figure", "What to take away",
    "Check", "Exercises",
]  # fmt: skip
NOT_IN_00 = ("The idea in code", "The stage", "The figure")
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
# Their older words are stored in artifacts of the recorded run at `overnight`; empty once it is recorded again.
DRAWN_BEFORE = {"10_sweeps.csv", "12_claims.csv", "claims.csv"}


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
    text = "\n".join(cells(path, "markdown"))
    found = [h.replace("The figures", "The figure") for h in re.findall(r"^###? (.+)$", text, re.M)]
    wanted = [h for h in HEADINGS if path.stem[:2] != "00" or h not in NOT_IN_00]
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
    """A name that a cell binds, in a loop or under a condition too, is bound by no other cell, so that every cell can run twice."""
    bound = {}
    for number, text in enumerate(cells(path, "code")):
        for name in set(bound_by(ast.parse(text).body)) - {"_"}:
            assert bound.setdefault(name, number) == number, f"{name!r} is bound again"


def bound_by(statements):
    """The names of assignments and functions; not of loop variables, nor of what a function binds inside."""
    for node in statements:
        if isinstance(node, ast.FunctionDef):
            yield node.name
            continue
        targets = (
            node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)] * (not isinstance(node, ast.For))
        )
        for target in filter(None, targets):
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        yield from bound_by([*getattr(node, "body", ()), *getattr(node, "orelse", ())])


def test_names_are_found_in_loops_and_under_conditions():
    text = "if x:\n    a = 1\nelse:\n    for k in y:\n        b[0], c = 2, 3\ndef f():\n    d = 4\nwith z:\n    e += 5"
    assert list(bound_by(ast.parse(text).body)) == ["a", "c", "f", "e"]
