"""Fetch what the course needs and open JupyterLab on its first notebook.

    python tools/lab.py [NOTEBOOK] [JUPYTERLAB OPTION...]

`make lab` calls this; without make it is the last of three commands. JupyterLab listens on
127.0.0.1 with a token and prints its address, for machines without a browser.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = "notebooks/00_number_formats.ipynb"


def lab_command(arguments):
    """The command line that opens the notebook named first in `arguments`, or the first one."""
    arguments = list(arguments)
    named = bool(arguments) and arguments[0].endswith(".ipynb")
    notebook = Path(arguments.pop(0) if named else ROOT / FIRST).resolve()
    if not notebook.is_file() or ROOT not in notebook.parents:
        raise SystemExit(f"no notebook of the course at {notebook}")
    command = [sys.executable, "-m", "jupyterlab"]
    # as the default address: a plain file name would be opened, but not be in the printed address
    command.append(f"--LabApp.default_url=/lab/tree/{notebook.relative_to(ROOT).as_posix()}")
    command += [f"--ServerApp.root_dir={ROOT}", "--ServerApp.ip=127.0.0.1"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # the usual user in a container; else Jupyter refuses it
    return command + arguments


def main():
    fetched = subprocess.run([sys.executable, "-m", "chapter13.fetch"], cwd=ROOT)
    if fetched.returncode:
        return fetched.returncode  # the download has printed the error
    # switches off the news and update pop-ups, in this server only
    paths = [str(ROOT / "tools" / "jupyter"), os.environ.get("JUPYTER_CONFIG_PATH")]
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, paths))
    return run(lab_command(sys.argv[1:]))


def run(command):
    """Runs JupyterLab and returns its exit code. Ctrl-C and SIGTERM end both of us."""
    with subprocess.Popen(command, cwd=ROOT) as server:
        signal.signal(signal.SIGTERM, lambda *_: server.terminate())  # else it would keep the port
        try:
            return server.wait()
        except KeyboardInterrupt:
            server.terminate()
            return 0  # Ctrl-C is how a student stops JupyterLab


if __name__ == "__main__":
    sys.exit(main())
