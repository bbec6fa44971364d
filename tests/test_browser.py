"""The notebooks' explorers in real JupyterLab, moved by keyboard and mouse in a headless browser.

Uses the Chromium or Chrome that is installed, or Playwright's own. Where there is none the tests
are skipped and the summary says so; with CHAPTER13_REQUIRE_BROWSER=1 that is a failure. Screenshots
are left in screenshots/.
"""

import io
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [
    path
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if "chapter13.explorers" in path.read_text(encoding="utf-8")
]
SCREENSHOTS = ROOT / "screenshots"
BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
MAC_CHROME = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = [
    "--no-sandbox",  # a container's root has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = pytest.mark.browser


def find_browser(playwright):
    """The path of a Chromium or Chrome; None where there is none."""
    found = [shutil.which(name) for name in BROWSERS] + [MAC_CHROME]
    found.append(playwright.chromium.executable_path)
    return next((path for path in found if path and Path(path).exists()), None)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = find_browser(playwright)
        if path is None:
            message = (
                "NO BROWSER: the explorers were NOT tested in JupyterLab. Install Chromium or "
                "Chrome, or run `.venv/bin/python -m playwright install chromium`"
            )
            if os.environ.get("CHAPTER13_REQUIRE_BROWSER") == "1":
                pytest.fail(message)
            pytest.skip(message)
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Lab:
    """A running JupyterLab of our own."""

    url: str
    token: str

    def api(self, path, method="GET"):
        request = urllib.request.Request(
            f"{self.url}/api/{path}",
            method=method,
            headers={"Authorization": f"token {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def session(self, name):
        return next((each for each in self.api("sessions") if each["path"] == name), None)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on copies of the notebooks, with none of the user's settings, kernels or files."""
    tmp = tmp_path_factory.mktemp("lab")
    (tmp / "notebooks").mkdir()
    for path in NOTEBOOKS:
        shutil.copy(path, tmp / "notebooks")
    private = {
        name: str(tmp / name.lower())
        for name in (
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
            "JUPYTERLAB_SETTINGS_DIR",
            "JUPYTERLAB_WORKSPACES_DIR",
            "IPYTHONDIR",
        )
    }
    env = os.environ | private
    env["JUPYTER_CONFIG_PATH"] = str(ROOT / "tools" / "jupyter")  # as `make lab` starts it
    env["PYTHONPATH"] = str(ROOT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lab = Lab(f"http://127.0.0.1:{port}", secrets.token_hex(16))
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
        *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
        *(f"--IdentityProvider.token={lab.token}", f"--ServerApp.root_dir={tmp / 'notebooks'}"),
        *("--LabApp.extension_manager=readonly", "--LabApp.expose_app_in_browser=True"),
    ]
    log = tmp / "jupyterlab.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: process.poll() is not None or answers(lab), "JupyterLab", 60)
        assert process.poll() is None, f"JupyterLab did not start:\n{log.read_text()}"
        yield lab
    finally:
        process.terminate()
        process.wait(30)


def answers(lab):
    try:
        return lab.api("status")
    except OSError:
        return None


def wait_for(condition, what, seconds=30):
    """The first true answer of `condition`, asked again and again."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what}"
        time.sleep(0.05)
    return answer


def run_all(page, lab, name):
    """Open the notebook, run all its cells, return it as a dict with its outputs."""
    page.goto(f"{lab.url}/lab/tree/{name}?token={lab.token}&reset")
    notebook = "window.jupyterapp?.shell?.currentWidget"
    page.wait_for_function(f"{notebook}?.content?.widgets?.length > 0", timeout=60_000)

    def connected():  # cells that are run before that are silently not run
        session = lab.session(name)
        return session and session["kernel"]["connections"] > 0

    wait_for(connected, "a kernel")
    page.wait_for_function(
        f"{notebook}.sessionContext.session?.kernel?.status === 'idle'", timeout=60_000
    )
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    return page.evaluate(f"{notebook}.context.model.toJSON()")


def pixels(locator):
    return Image.open(io.BytesIO(locator.screenshot())).convert("RGB")


def moved(panel, move):
    """Does `move`; waits until readout and picture have both changed."""
    text, picture = panel.locator("pre"), panel.locator("img")
    old_text, old_pixels = text.inner_text(), pixels(picture)
    move()
    wait_for(lambda: text.inner_text() != old_text, "a new readout")
    wait_for(lambda: ImageChops.difference(pixels(picture), old_pixels).getbbox(), "a new picture")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_explorer_moves_in_jupyterlab(path, browser, lab):
    SCREENSHOTS.mkdir(exist_ok=True)
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    outside, complaints = [], []

    def note_request(request):
        if not request.url.startswith(("data:", "blob:", lab.url, lab.url.replace("http", "ws"))):
            outside.append(request.url)

    def note_console(message):
        if message.type == "error":
            complaints.append(message.text)

    page.on("request", note_request)
    page.on("console", note_console)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        notebook = run_all(page, lab, path.name)
        check_outputs(notebook)
        handle = page.locator(".widget-vbox .noUi-handle").first
        handle.scroll_into_view_if_needed(timeout=30_000)
        panel = page.locator(".widget-vbox").filter(has=page.locator(".noUi-handle")).first
        panel.locator("img").wait_for(timeout=5000)

        handle.focus()
        moved(panel, lambda: page.keyboard.press("ArrowRight"))
        if path == NOTEBOOKS[0]:  # the mouse works alike everywhere
            moved(panel, lambda: drag(page, handle, 60))
        assert panel.get_by_role("img").get_attribute("title"), "the picture has no words"

        panel.screenshot(path=SCREENSHOTS / f"{path.stem}_panel.png")
        assert not outside, f"requests to the outside: {outside}"
        assert not complaints, f"the browser's console says: {complaints}"
    finally:
        page.screenshot(path=SCREENSHOTS / f"{path.stem}.png")  # of a failure, too
        page.close()
        if session := lab.session(path.name):
            lab.api(f"sessions/{session['id']}", "DELETE")  # and its kernel's memory


def check_outputs(notebook):
    """Every code cell has run, without an error and without a word on stderr."""
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
            continue
        source = "".join(cell["source"])
        assert cell["execution_count"], f"this cell did not run:\n{source}"
        for output in cell["outputs"]:
            if "raises-exception" not in cell["metadata"].get("tags", []):
                assert output["output_type"] != "error", f"{source}\n\n{output}"
            assert output.get("name") != "stderr", f"{source}\n\n{output}"
            if "image/png" in output.get("data", {}):
                assert output["metadata"]["image/png"]["alt"], f"a picture without words:\n{source}"


def drag(page, handle, distance):
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + distance, y, steps=6)
    page.mouse.up()
