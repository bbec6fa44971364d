"""A private JupyterLab with a headless browser, for the browser test and the pictures.

`jupyterlab(folder)` starts a server that is isolated from the user's: without settings and kernels
of other environments, on a free port of 127.0.0.1, with its own token.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
MAC_CHROME = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = [
    "--no-sandbox",  # root in a container cannot have one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PRIVATE = [
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "JUPYTER_RUNTIME_DIR",
    "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR",
    "IPYTHONDIR",
]
NOTEBOOK = "window.jupyterapp?.shell?.currentWidget"


class NoBrowser(Exception):
    """No Chromium or Chrome was found."""


def launch(playwright):
    """A headless browser: the installed Chromium or Chrome, or else Playwright's own.

    Raises NoBrowser, which says how to get one.
    """
    paths = [*map(shutil.which, NAMES), MAC_CHROME, playwright.chromium.executable_path]
    for path in paths:
        if path and Path(path).exists():
            return playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
    raise NoBrowser(
        "no Chromium or Chrome found: install one, or run "
        f"`{sys.executable} -m playwright install chromium`"
    )


def wait_for(condition, what, seconds=60):
    """Calls `condition` until its result is true, and returns it. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}, without success")
        time.sleep(0.05)
    return answer


@dataclass
class Lab:
    """A running JupyterLab."""

    url: str
    token: str

    def api(self, path, method="GET"):
        """The server's answer to a REST call; None if it has no content."""
        request = urllib.request.Request(
            f"{self.url}/api/{path}",
            method=method,
            headers={"Authorization": f"token {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def answers(self):
        try:
            return self.api("status")
        except OSError:
            return None

    def session(self, name):
        """The session of an open notebook; None if it has none."""
        return next((each for each in self.api("sessions") if each["path"] == name), None)

    def open(self, page, name):
        """Open the notebook in the page, alone, and wait until its kernel is there."""
        page.goto(f"{self.url}/lab/tree/{name}?token={self.token}&reset")
        page.wait_for_function(f"{NOTEBOOK}?.content?.widgets?.length > 0", timeout=60_000)

        def connected():  # before that, JupyterLab ignores the command to run cells
            session = self.session(name)
            return session and session["kernel"]["connections"] > 0

        wait_for(connected, f"a kernel for {name}", 60)
        page.wait_for_function(
            f"{NOTEBOOK}.sessionContext.session?.kernel?.status === 'idle'", timeout=60_000
        )

    def run_all(self, page, name):
        """Open the notebook in the page, run all its cells, return it as a dict."""
        self.open(page, name)
        page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
        return page.evaluate(f"{NOTEBOOK}.context.model.toJSON()")

    def shut_down(self, name):
        """End the notebook's kernel and free its memory."""
        if session := self.session(name):
            self.api(f"sessions/{session['id']}", "DELETE")


@contextmanager
def jupyterlab(folder):
    """A Lab on the notebooks in `folder`, which it may change; it is shut down at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lab = Lab(f"http://127.0.0.1:{port}", secrets.token_hex(16))
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
        *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
        *(f"--IdentityProvider.token={lab.token}", f"--ServerApp.root_dir={folder}"),
        *("--LabApp.extension_manager=readonly", "--LabApp.expose_app_in_browser=True"),
    ]
    with tempfile.TemporaryDirectory(prefix="jupyterlab-") as private:
        env = os.environ | {name: os.path.join(private, name.lower()) for name in PRIVATE}
        env["JUPYTER_CONFIG_PATH"] = str(ROOT / "tools" / "jupyter")  # as `make lab` has it
        env["OMP_NUM_THREADS"] = (
            "1"  # on few cores torch's threads and the browser slow each other down
        )
        log = Path(private, "log")
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: process.poll() is not None or lab.answers(), "JupyterLab", 60)
            if process.poll() is not None:
                raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")
            yield lab
        finally:
            process.terminate()
            process.wait(30)


def explorer(page):
    """The first explorer in the page, scrolled into view."""
    handle = page.locator(".widget-vbox .noUi-handle").first
    handle.scroll_into_view_if_needed(timeout=30_000)
    panel = page.locator(".widget-vbox").filter(has=page.locator(".noUi-handle")).first
    panel.locator("img").wait_for()
    return panel
