"""README and docs: short, every link leads somewhere, every command exists."""

import csv
import re
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from typer.main import get_command

from speed_core.__main__ import MOVED, app, main
from speed_core.runner.notebook import notebooks
from speed_core.study.claims import CLAIMS
from speed_core.study.verdicts import Verdict

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "notebooks" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def test_the_readme_has_two_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) < 9000


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_and_every_file_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    named = [
        n
        for n in re.findall(r"`((?:speed_core|notebooks|figures|scripts|tests|benchmarks|docs)/[\w./-]+)`", text)
        if "*" not in n
    ]
    assert [n for n in named if not (ROOT / n).exists()] == []
    results = re.findall(r"`((?:earlier/)?\w+\.cpu\.json)`", text)
    assert [r for r in results if not (ROOT / "benchmarks" / "results" / r).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_and_target_that_a_page_names_exists(page):
    text, commands = page.read_text(encoding="utf-8"), get_command(app).commands
    assert {c for c in re.findall(r"python -m speed_core ([a-z-]+)", text)} <= {n for n, c in commands.items() if not c.hidden}
    assert [s for s in re.findall(r"python ((?:scripts|tests)/\w+\.py)", text) if not (ROOT / s).is_file()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {
        t for t in re.findall(r"`?make ([a-z-]+)", "\n".join(re.findall(r"`make [a-z-]+|^make [a-z-]+", text, re.M)))
    } <= targets


def test_the_pages_count_and_name_the_claims_as_the_claim_map_does():
    with (ROOT / "figures" / "claims.csv").open(encoding="utf-8") as f:
        rows = {r["id"]: r for r in csv.DictReader(f)}
    count = Counter(r["verdict"] for r in rows.values())
    readme, results = (p.read_text(encoding="utf-8") for p in (ROOT / "README.md", ROOT / "docs" / "results.md"))
    counted = (
        f"{count[Verdict.UNRESOLVED]} of the {len(rows)} claims are not resolved at this size, {count[Verdict.SMALLER]} go the paper's "
        f"way, {count[Verdict.CONTRADICTED]} is contradicted, {count[Verdict.IMPOSSIBLE]} cannot be tested here, and "
        f"{count[Verdict.INACTIVE]} concern a step that changed too little"
    )
    assert counted in " ".join(readme.split())
    assert f"Of the papers' {len(rows)} claims, {count[Verdict.UNRESOLVED]} are not resolved at this size, " in results
    assert f"{count[Verdict.SMALLER]} hold" in results and f"{count[Verdict.CONTRADICTED]} is contradicted" in results
    assert f"{count[Verdict.INACTIVE]} had a" in results and f"{count[Verdict.INACTIVE]} claims without an answer" in readme
    names = ("Contradicted", "Same direction", "Not resolved, and why", "Treatment inactive")
    parts = re.split("|".join(rf"\*\*{n}\*\*" for n in names), results)[1:]
    verdicts = (Verdict.CONTRADICTED, Verdict.SMALLER, Verdict.UNRESOLVED)
    for part, verdict in zip(parts, verdicts, strict=False):
        named = re.findall(r"^- \*(.+?)\*[^(]*\(([SEG]\d+[ab]?)\b", part, re.M)
        assert named and all(rows[key]["verdict"] == verdict for _, key in named), verdict
        assert all(rows[key]["claim"].lower().startswith(words.lower()) for words, key in named), verdict
        if verdict is not Verdict.UNRESOLVED:
            assert len(named) == count[verdict], verdict
    inactive = re.findall(r"^\| (.+) \(([SEG]\d+[ab]?)\) \|", parts[3].partition("\n## ")[0], re.M)
    assert {key: claim for claim, key in inactive} == {k: r["claim"] for k, r in rows.items() if r["verdict"] == Verdict.INACTIVE}
    (line,) = [x for x in readme.splitlines() if x.startswith("- **Contradicted**")]
    assert all(key in line for key, r in rows.items() if r["verdict"] == Verdict.CONTRADICTED)


@pytest.mark.parametrize("page", [*PAGES, *notebooks(ROOT / "notebooks")], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_claim_in_italics_has_the_words_of_the_map(page):
    if page.suffix == ".ipynb":
        cells = nbformat.read(page, as_version=4).cells
        text = " ".join(c.source for c in cells if c.cell_type == "markdown")
    else:
        text = page.read_text(encoding="utf-8")
    known = {c.id: c.claim.lower() for c in CLAIMS}
    named = re.findall(r"(?<!\*)\*(?!\*)([^*]+)\*(?!\*) \(([SEG]\d+[ab]?)\b", " ".join(text.split()))
    assert [(words, key) for words, key in named if not known[key].startswith(words.lower())] == []
    if page == ROOT / "README.md":
        assert {"E1", "S4", "G1a", "E4"} <= {key for _, key in named}


def test_every_module_that_a_page_names_can_be_found():
    names = {n for page in PAGES for n in re.findall(r"speed_core(?:\.[a-z_]+)+", page.read_text(encoding="utf-8"))}
    assert len(names) >= 5
    for name in names:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name


@pytest.mark.parametrize("name", MOVED)
def test_a_command_that_became_a_script_says_what_to_type_now(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["speed_core", name, "x.tar", "--force"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said == f"{name}: is a script now; type python {MOVED[name]} x.tar --force\n"
    assert (ROOT / MOVED[name]).is_file()
