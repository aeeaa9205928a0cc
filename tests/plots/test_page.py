"""Figures on a page: text that can be read, nothing that leaves the picture, the finding first."""

import csv
from pathlib import Path

import drawings
import pytest

from speed_core.plots import basic, figures, provenance
from speed_core.store.run_context import ROOT
from speed_core.study.runs import open_run

LONG = "A title that says at length what was found, and how far it is from what the paper found on other tasks"
ROWS = [
    {"label": f"label of row {i}, long", "value": v, "low": v - 2, "high": v + 2, "each": [v - 1, v + 1], "generators": 3}
    for i, v in enumerate((0.5, 1.5, 4.0))
]
SWEEP = {"value": 1.0, "low": 0.5, "high": 1.5, "each": [1.0], "paper": "62.6, 61.6, 60.9 at 1, 3, 5", "records": 48}


def claims():
    with (ROOT / "figures" / "12_claims.csv").open(newline="", encoding="utf-8") as f:
        return [r | {"effect": float(r["effect"]) if r["effect"] else ""} for r in csv.DictReader(f)]


def sweeps():
    return [SWEEP | {"panel": f"T{i}: tasks a topic", "x": x, "own": x == "1"} for i in range(5) for x in ("1", "3")]


DRAW = {
    "estimates": lambda run: basic.estimates(run, "a", ROWS, [], LONG, "points", paper={"label of row 1, long": -9.0}, line=0),
    "waterfall": lambda run: basic.waterfall(run, "a", [("prompts", 9), ("no evaluation overlap", 5)], [], LONG),
    "counts": lambda run: basic.counts(run, "a", {"raw": {"1": 3, "2": 4}, "truncated": {"1": 7}}, [], LONG, "topics"),
    "curves": lambda run: basic.curves(
        run, "a", {k: [{"step": s, "loss": s, "grad_norm": 1} for s in (1, 2)] for k in "ab"}, ["loss", "grad_norm"], [], LONG
    ),
    "loss_cost": lambda run: figures.loss_cost(run, "a", ROOT / "benchmarks" / "results" / "guided_loss.cpu.json"),
    "sweeps": lambda run: figures.sweeps(run, "a", sweeps(), [], LONG),
    "cost": lambda run: figures.cost(run, "a", {"this run": (0.9, 200.0), "paper: SPEED": (0.05, 35.0)}, []),
    "claim_map": lambda run: figures.claim_map(run, "a", claims(), []),
}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws one of `DRAW`; returns the figure and the file."""
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    run, kept = open_run("smoke"), []
    monkeypatch.setattr(provenance, "show", lambda figure, text: kept.append((figure, text)))

    def draw(name: str):
        DRAW[name](run)
        return *kept[-1], run.figures / "a.svg"

    return draw


@pytest.mark.parametrize("path", sorted((ROOT / "figures").glob("*.svg")), ids=lambda p: p.stem)
def test_text_of_a_committed_figure_is_larger_than_8_points_at_page_width(path: Path):
    assert drawings.smallest_text(path) > 8


@pytest.mark.parametrize("name", DRAW)
def test_a_drawn_figure_can_be_read_at_page_width_and_holds_all_its_text(drawn, name):
    figure, _, svg = drawn(name)
    assert drawings.smallest_text(svg) > 8
    width, height = figure.get_size_inches()
    taken = figure.get_tightbbox()
    assert min(taken.x0, taken.y0, width - taken.x1, height - taken.y1) > -0.03, (taken, width, height)


def test_findings_are_computed_from_the_rows_and_stand_first(drawn):
    figure, said, _ = drawn("estimates")
    assert figure.get_suptitle().startswith("Resolved: label of row 2, long (+4.0).\nA title") and "(+4.0). A title" in said
    assert drawn("cost")[0].get_suptitle() == "A record of ours takes 18 times the calls and 5.7 times the tokens of SPEED's"
    assert drawn("sweeps")[0].get_suptitle().startswith("All 5 differences are resolved, +1.0 to +1.0.\n")
    assert "GISTEmbedLoss takes" in drawn("loss_cost")[0].get_suptitle().splitlines()[0]


def test_the_claim_map_names_what_is_decided_cuts_no_claim_and_lists_those_without_an_effect(drawn):
    figure, _, svg = drawn("claim_map")
    title = figure.get_suptitle().replace("\n", " ")
    assert title.startswith("Of 37 claims this run ") and "contradicts 1 (E4), leaves 32 open" in title
    text = svg.read_text(encoding="utf-8")
    assert "..." not in text and "Without an effect in points" in text and "S21 not possible here" in text
