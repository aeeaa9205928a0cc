"""What a reader sees: JupyterLab in a real browser, cells run by its menu, sliders moved by the keyboard."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM, reason="no Chromium found; on Debian: apt-get install chromium (any Chromium or Chrome on the PATH serves)"
    ),
]
UNTIL = 60_000  # milliseconds; a notebook's first import of torch takes most of it on a busy machine
RAN = """() => document.querySelector('[data-mime-type="application/vnd.jupyter.error"]')
    || [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(p => /\\[\\d+\\]/.test(p.textContent))"""


def cut(source, target, last=""):
    """A copy of a notebook at the smoke size, up to the cell that contains `last`."""
    nb = nbformat.read(source, 4)
    end = next((i for i, c in enumerate(nb.cells) if last and last in c.source and c.cell_type == "code"), len(nb.cells) - 1)
    nb.cells = nb.cells[: end + 1]
    for cell in nb.cells:
        cell.source = cell.source.replace('profile = "tiny"', 'profile = "smoke"')
    nbformat.write(nb, target)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(address with %s for a notebook's name, folder) of a JupyterLab over copies of four notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    config, notebooks = folder / "config" / "labconfig", folder / "root" / "notebooks"
    config.mkdir(parents=True)
    notebooks.mkdir(parents=True)
    shutil.copytree(ROOT / "figures", folder / "root" / "figures")  # the prose shows them
    whole = {"01_task_brainstorming": "", "02_seed_data": "", "07_guided_contrastive_loss": "widgets.margin("}
    for name, last in whole.items():
        cut(ROOT / "notebooks" / f"{name}.ipynb", notebooks / f"{name}.ipynb", last)
    three = nbformat.read(ROOT / "notebooks" / "03_junior_generator.ipynb", 4)
    three.cells = [c for c in three.cells if "widgets.temperature(" in c.source]  # the cells before it train a model
    nbformat.write(three, notebooks / "03_junior_generator.ipynb")
    # Cells that are out of sight are drawn too, and no dialogue asks about news.
    whole_page = {"@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}
    (config / "default_setting_overrides.json").write_text(json.dumps(whole_page))
    quiet = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (config / "page_config.json").write_text(json.dumps(quiet))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex()
    env = {k: v for k, v in os.environ.items() if k != "SPEED_HEADLESS"} | {
        "SPEED_RUNS": str(folder / "runs"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    words = re.search(r"-m jupyterlab (.+)", (ROOT / "Makefile").read_text())[1]  # as `make lab` starts it
    opened = words.replace("lab/00_preflight", "notebooks/01_task_brainstorming").split()
    command = [sys.executable, "-m", "jupyterlab", *options, f"--IdentityProvider.token={token}", *opened]
    with (
        (folder / "lab.log").open("w") as log,
        subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder / "root") as server,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={token}", folder / "lab.log")
            yield f"http://127.0.0.1:{port}/lab/tree/notebooks/%s.ipynb?token={token}&reset", notebooks
        finally:
            server.terminate()


def wait_for(address, log, seconds=60):
    end = time.time() + seconds
    while time.time() < end:
        try:
            return urllib.request.urlopen(address, timeout=5).read()
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not answer in {seconds} s: {log.read_text()[-1500:]}")


@pytest.fixture(scope="module")
def page(lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root has no sandbox, and a container's /dev/shm is small.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.set_default_timeout(UNTIL)
        yield page
        browser.close()


def run_all(page, lab, name):
    """Open a notebook, run all cells by the menu, save it; returns it as saved, after looking for anything red."""
    address, folder = lab
    page.goto(address % name)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # before it, JupyterLab lets "Run All Cells" fall flat
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(RAN)
    page.keyboard.press("Control+s")
    page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
    broken = page.evaluate("() => [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.alt)")
    assert broken == [], f"{name}: pictures that do not load"
    nb = nbformat.read(folder / f"{name}.ipynb", 4)
    for cell in [c for c in nb.cells if c.cell_type == "code"]:
        for output in cell.outputs:
            assert output.output_type != "error", (name, output.evalue)
            assert output.get("name") != "stderr" and "Warning" not in output.get("text", ""), (name, output.text)
        assert cell.execution_count, f"{name}: a cell never ran"
    return nb


def look(page, lab, name):
    """A picture of the page for a person, in pytest's temporary folder."""
    page.screenshot(path=lab[1].parent / f"{name}.png")


def test_light_notebooks_run_to_their_end_and_show_their_figure(page, lab):
    for name in ("01_task_brainstorming", "02_seed_data"):
        run_all(page, lab, name)
        assert page.locator(".jp-OutputArea-output svg, .jp-OutputArea-output img").count() > 0


def margin_moves(page):
    """Move the margin slider by the keyboard, to the end at last; (removed at margin 0, removed at the end)."""
    slider, said = page.get_by_role("slider", name="margin m"), page.locator("output")
    before = said.inner_text()
    for _ in range(4):
        slider.press("ArrowRight")
    assert re.match(r"\+0\.04: ", said.inner_text()), said.inner_text()
    assert page.locator("figure svg[aria-label*='at margin +0.04']").count() == 4
    slider.press("End")
    return [int(re.fullmatch(r"\S+: (\d+) removed", text)[1]) for text in (before, said.inner_text())]


def test_an_arrow_key_on_the_margin_slider_redraws_the_microscope(page, lab):
    saved = run_all(page, lab, "07_guided_contrastive_loss")
    assert "query-positive" in saved.cells[-1].outputs[0].text, "the plain table comes first"
    before, after = margin_moves(page)
    assert before < after
    look(page, lab, "margin")


def test_a_page_exported_from_a_notebook_has_the_slider_too(page, lab):
    from nbconvert import HTMLExporter

    export = lab[1] / "export.html"
    export.write_text(HTMLExporter().from_filename(str(lab[1] / "07_guided_contrastive_loss.ipynb"))[0])
    page.goto(export.as_uri())
    before, after = margin_moves(page)
    shown = page.locator("body").inner_text()
    assert before < after and "query-positive" in shown and "Loading widget" not in shown and "Error" not in shown


def test_an_arrow_key_on_the_temperature_slider_shows_another_text(page, lab):
    run_all(page, lab, "03_junior_generator")
    text, handle = page.locator(".widget-html pre").first, page.get_by_role("slider")
    before = text.inner_text()
    handle.press("ArrowRight")
    page.locator(".widget-html b", has_text="temperature 1.0").wait_for()
    assert text.inner_text() != before
    look(page, lab, "temperature")
