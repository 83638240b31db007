"""The notebooks in JupyterLab, as a reader runs them: all, interrupted, all again."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from tests.support import browser

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("fsdp2_dtensor", "deepspeed_autotp")
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.faults,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium"),
]
NOTEBOOK = "jupyterapp.shell.currentWidget.content.model.toJSON()"
RUN_ALL = "jupyterapp.commands.execute('notebook:run-all-cells')"
BEGIN = f"""() => {{
  window.done = false;
  {RUN_ALL}.finally(() => {{ window.done = true; }});
}}"""
DONE = "() => window.done"  # waited for with a timeout, unlike a promise
INTERRUPT = "jupyterapp.commands.execute('kernelmenu:interrupt')"
TRAINS = f"() => /step [0-9][/]16/.test(JSON.stringify({NOTEBOOK}))"  # not yet 16/16
READY = """() => {
  const widget = window.jupyterapp?.shell.currentWidget;
  return widget?.sessionContext?.session?.kernel?.status === "idle"
    && document.querySelector(".jp-Notebook .jp-Cell") !== null;
}"""
MINUTE = 60_000  # in ms


@pytest.fixture
def lab(tmp_path):
    """JupyterLab's address, in a folder of its own with short runs."""
    for folder in ("notebooks", "images"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
        text = path.read_text()
        assert text.count("MAX_STEPS = None") == 1
        path.write_text(text.replace("MAX_STEPS = None", "MAX_STEPS = 16"))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": "",
        "LabApp.expose_app_in_browser": True,
    }
    command = [sys.executable, "-m", "jupyter", "lab"]
    command += [f"--{name}={value}" for name, value in options.items()]
    own = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA")}
    with open(tmp_path / "log", "w") as log:
        started = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **own}, stdout=log, stderr=log
        )
        yield f"http://127.0.0.1:{port}/lab/tree/notebooks"
        started.terminate()
        started.wait(60)


@pytest.fixture
def page():
    with sync_playwright() as playwright:
        chromium = browser.launch(playwright)
        yield chromium.new_page()
        chromium.close()


def open_notebook(page, address: str) -> None:
    for _ in range(60):  # until the server answers
        try:
            page.goto(address)
            break
        except Exception:
            time.sleep(1)
    page.set_default_timeout(10 * MINUTE)
    page.wait_for_function(READY)


def outputs(page) -> list[dict]:
    """What the notebook shows, from top to bottom."""
    cells = page.evaluate(NOTEBOOK)["cells"]
    return [output for cell in cells for output in cell.get("outputs", ())]


def run_all(page) -> None:
    page.evaluate(BEGIN)
    page.wait_for_function(DONE)
    shown = outputs(page)
    assert "error" not in [output["output_type"] for output in shown]
    assert "stderr" not in [output.get("name") for output in shown]
    assert sum("image/svg+xml" in output.get("data", ()) for output in shown) >= 3
    assert "tokens/s" in str(shown[-1]["data"]["text/plain"])  # the summary


@pytest.mark.parametrize("name", NAMES)
def test_run_all_interrupt_run_all(name, lab, page):
    open_notebook(page, f"{lab}/{name}.ipynb")
    run_all(page)
    page.evaluate(BEGIN)
    page.wait_for_function(TRAINS)
    page.evaluate(INTERRUPT)
    page.wait_for_function(DONE)
    errors = [o["ename"] for o in outputs(page) if o["output_type"] == "error"]
    assert errors == ["Stopped"]
    run_all(page)
