"""constraints.txt, the one list of pinned versions: write it, or check that it is still right.

    python tools/pins.py write    install the requirements of pyproject.toml, pin the result
    python tools/pins.py check    install environment.yml's pip lines, compare with the pins

Both work in a fresh virtual environment outside the tree, made by the Python that runs them.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copy, copytree

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
ENVIRONMENT = ROOT / "environment.yml"
INSTALLED_FILES = ["pyproject.toml", "constraints.txt", "environment.yml", "LICENSE"]

HEADER = """\
# Everything that gets installed, to the version, for Linux, macOS and Windows alike.
# Written by `make pins` from a clean installation: do not edit, but for torch's own line,
# which `make pins` keeps (a newer torch is a decision: change it here, then `make pins`).
"""
# packages of the environment, not of the course, and packages that only some platforms need, such
# as CUDA's libraries: torch requires their exact versions
UNPINNED = re.compile(r"pip|wheel|chapter13|nvidia-.*|cuda-.*|triton")


def normalized(name):
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse_pins(text):
    """Lines `name==version` of a constraints file or of `pip freeze`: {name: version}.

    The suffix of local versions ("2.13.0+cpu") is removed: the build of torch depends on the
    machine. Raises ValueError for a line that pins nothing.
    """
    pins = {}
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if not line or line.startswith("-e "):
            continue
        match = re.fullmatch(r"([\w.-]+)==([^\s;+]+)(\+[\w.]+)?", line)
        if not match:
            raise ValueError(f"not a pin of the form name==version: {line!r}")
        pins[normalized(match[1])] = match[2]
    return pins


def differences(pins, installed):
    """Sentences on installed distributions that are unpinned or not at their pinned version."""
    found = []
    for name, version in sorted(installed.items()):
        if UNPINNED.fullmatch(name):
            continue
        if name not in pins:
            found.append(f"{name} {version} is installed but not pinned")
        elif pins[name] != version:
            found.append(f"{name} {version} is installed, pinned is {pins[name]}")
    return found


def environment_pip_lines(path=ENVIRONMENT):
    """The lines of environment.yml that conda and Binder pass to pip."""
    dependencies = yaml.safe_load(path.read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    return pip


def install(folder, requirements):
    """Install these pip lines beside a copy of the package, as conda does; returns the Python."""
    course = folder / "course"
    course.mkdir()
    for name in INSTALLED_FILES:
        copy(ROOT / name, course)
    copytree(ROOT / "chapter13", course / "chapter13")
    (course / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements))
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    command = [python, "-m", "pip", "install", "-U", "-r", "requirements.txt"]
    subprocess.run(command, cwd=course, check=True)
    return python


def frozen(python):
    """The packages that `pip freeze` lists in that environment, with setuptools, for torch."""
    command = [python, "-m", "pip", "freeze", "--all", "--exclude-editable"]
    output = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    return {name: v for name, v in parse_pins(output).items() if not UNPINNED.fullmatch(name)}


def write(folder):
    torch = parse_pins(CONSTRAINTS.read_text())["torch"]
    pins = frozen(install(folder, [f"torch=={torch}", "-e .[course,test,mutants]"]))
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    CONSTRAINTS.write_text(HEADER + "".join(lines))
    print(f"{CONSTRAINTS.name}: {len(pins)} pins")
    return 0


def check(folder):
    python = install(folder, environment_pip_lines())
    imports = "import chapter13, torch, transformers, ipywidgets, jupyterlab, nbval, pytest"
    subprocess.run([python, "-c", imports], cwd=folder, check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    installed = frozen(python)
    drift = differences(parse_pins(CONSTRAINTS.read_text()), installed)
    print(*drift, sep="\n")
    print(f"environment.yml: {len(installed)} distributions installed, {len(drift)} not as pinned")
    return 1 if drift else 0


def main():
    commands = {"write": write, "check": check}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory(prefix="chapter13-pins-") as folder:
        sys.exit(commands[sys.argv[1]](Path(folder)))


if __name__ == "__main__":
    main()
