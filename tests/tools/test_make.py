"""The Makefile does what `make help` says, in a folder of its own with a Python that only logs."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from tiny import says

from tools import lab, pins

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# Stands for the system's Python. `-m venv` makes .venv/bin/python, another logging script;
# the real Python answers the questions about its version.
FAKE_PYTHON = """\
#!/bin/sh
case "$*" in
    "-m venv --clear .venv")
        mkdir -p .venv/bin
        cp venv_python .venv/bin/python
        echo "venv" >> log ;;
    *) exec {python} "$@" ;;
esac
"""
VENV_PYTHON = """\
#!/bin/sh
case "$*" in
    "-m pip --version") exit 0 ;;
    "-m pip install"*) echo "install" >> log; test ! -e offline ;;
    "tools/gpu.py") echo "gpu?" >> log; test ! -e no_gpu ;;
    *) echo "$CHAPTER13_DEVICE python $*" | sed "s/^ //" >> log ;;
esac
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with the Makefile, a notebook, a student's copy, and a Python that only logs."""
    for name in "Makefile", "pyproject.toml", "constraints.txt":
        shutil.copy(pins.ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    for name in "00_first.ipynb", "my_00_first_1.ipynb":
        (tmp_path / "notebooks" / name).write_text("{}")
    script(tmp_path / "python", FAKE_PYTHON.format(python=shlex.quote(sys.executable)))
    script(tmp_path / "venv_python", VENV_PYTHON)
    return tmp_path


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


def make(folder, *arguments, python="./python"):
    """Run make in `folder` as from a plain shell: without what an outer `make test` hands on."""
    inherited = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "TORCH_INDEX", "CHAPTER13_DEVICE"}
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    command = ["make", "--no-print-directory", f"PYTHON={python}", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def log(folder):
    path = folder / "log"
    return path.read_text().splitlines() if path.exists() else []


def test_help_is_the_default_and_lists_every_target(folder):
    text = (folder / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    result = make(folder)
    assert result.stdout == make(folder, "help").stdout
    assert set(re.findall(r"^  make ([\w-]+) +\S.*$", result.stdout, re.MULTILINE)) == targets
    wanted = "setup lab test check data rerun reset lint mutants bench clean"
    assert set(wanted.split()) <= targets


def test_setup_installs_once(folder):
    assert make(folder, "setup").returncode == 0
    assert make(folder, "setup").returncode == 0
    assert log(folder) == ["venv", "install"]


def test_setup_installs_again_when_the_pins_change(folder):
    assert make(folder, "setup").returncode == 0
    newer = max(path.stat().st_mtime for path in (folder / ".venv").iterdir()) + 10
    os.utime(folder / "constraints.txt", (newer, newer))
    assert make(folder, "setup").returncode == 0
    assert log(folder) == ["venv", "install", "install"]


def test_setup_installs_again_when_the_folder_was_renamed(folder):
    assert make(folder, "setup").returncode == 0
    moved = folder.rename(folder.with_name("renamed"))
    assert make(moved, "setup").returncode == 0
    assert log(moved) == ["venv", "install", "install"]


def test_a_failed_installation_is_taken_up_again(folder):
    (folder / "offline").touch()
    result = make(folder, "test")
    assert result.returncode != 0
    assert "network" in result.stdout
    assert log(folder) == ["venv", "install"]
    (folder / "offline").unlink()
    assert make(folder, "setup").returncode == 0
    assert log(folder) == ["venv", "install", "install"]


def test_half_an_environment_is_made_again(folder):
    (folder / ".venv" / "bin").mkdir(parents=True)
    script(folder / ".venv" / "bin" / "python", "#!/bin/sh\nexit 1\n")  # a Python without pip
    assert make(folder, "setup").returncode == 0
    assert log(folder) == ["venv", "install"]


def test_setup_names_a_missing_python(folder):
    result = make(folder, "setup", python="/nonexistent")
    assert result.returncode != 0
    assert re.search(says("/nonexistent", "Python 3.11"), result.stdout)


def test_setup_names_an_old_python(folder):
    script(folder / "old", '#!/bin/sh\ntest "$1" = --version && echo Python 3.9.2\n')
    result = make(folder, "setup", python="./old")
    assert result.returncode != 0
    assert re.search(says("Python 3.9.2", "Python 3.11"), result.stdout)


def test_setup_says_how_to_add_venv(folder):
    real = shlex.quote(sys.executable)
    without = f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; *) exec {real} "$@" ;; esac\n'
    script(folder / "without", without)
    result = make(folder, "setup", python="./without")
    assert result.returncode != 0
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"  sudo apt-get install python{version}-venv\n" in result.stdout


def test_torch_index_reaches_pip(folder):
    with_index = make(folder, "-n", "setup", "TORCH_INDEX=https://example.org/cpu").stdout
    assert '--extra-index-url "https://example.org/cpu"' in with_index
    assert "index" not in make(folder, "-n", "setup").stdout


def test_test_runs_tests_and_strict_nbval_over_the_course_alone(folder):
    assert make(folder, "test").returncode == 0
    *_, download, pytest_line = log(folder)
    assert download == "python -m chapter13.fetch"
    device, *words = pytest_line.split()
    assert device == "cpu"
    assert words[:5] == ["python", "-m", "pytest", "tests", "chapter13"]
    assert {"--nbval", "--nbval-current-env", "notebooks/00_first.ipynb"} <= set(words)
    assert "--nbval-lax" not in words
    assert not [word for word in words if "my_" in word]


def test_test_uses_two_cores_and_keeps_a_file_in_one_process(folder):
    assert make(folder, "test").returncode == 0
    *_, words = log(folder)
    assert words.endswith(" -n 2 --dist loadfile --no-loadscope-reorder")
    assert make(folder, "test", "WORKERS=8").returncode == 0
    assert log(folder)[-1] == words.replace(" -n 2 ", " -n 8 ")
    assert "OMP_NUM_THREADS=1" in make(folder, "-n", "test").stdout


def test_check_runs_the_fast_tests_of_the_package_and_the_style(folder):
    assert make(folder, "setup").returncode == 0
    script(folder / ".venv" / "bin" / "ruff", '#!/bin/sh\necho "ruff $*" >> log\n')
    assert make(folder, "check").returncode == 0
    *_, download, pytest_line, formatted, checked = log(folder)
    assert download == "python -m chapter13.fetch"
    assert pytest_line.startswith("cpu python -m pytest -q tests/package chapter13 -m not slow")
    assert "nbval" not in pytest_line
    assert (formatted, checked) == ("ruff format --check .", "ruff check .")


def test_test_gpu_runs_the_very_same_elsewhere_in_one_process(folder):
    assert make(folder, "test").returncode == 0
    *_, on_cpu = log(folder)
    assert make(folder, "test-gpu").returncode == 0
    *_, asked, download, on_gpu = log(folder)
    assert (asked, download) == ("gpu?", "python -m chapter13.fetch")
    assert on_gpu == on_cpu.replace("cpu ", "cuda ", 1).partition(" -n 2 ")[0]


@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_what_needs_a_gpu_stops_at_once_where_there_is_none(target, folder):
    (folder / "no_gpu").touch()
    assert make(folder, target).returncode != 0
    assert log(folder) == ["venv", "install", "gpu?"]


def test_clean_removes_what_was_made_and_nothing_else(folder):
    assert make(folder, "setup").returncode == 0
    kept = ["data/results.json", "data/figure.png", "notebooks/.ipynb_checkpoints/mine.ipynb"]
    removed = ["data/model/weights", "data/text.bz2", "tests/__pycache__/a.pyc", ".ruff_cache/b"]
    removed += ["tools/slides/node_modules/c"]
    for name in kept + removed:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in "chapter13", "tests", "tools":
        (folder / name).mkdir(exist_ok=True)
    kept += ["notebooks/00_first.ipynb", "notebooks/my_00_first_1.ipynb", "Makefile"]
    assert make(folder, "clean").returncode == 0
    assert all((folder / name).exists() for name in kept)
    assert not [name for name in [*removed, ".venv"] if (folder / name).exists()]
    assert make(folder, "clean").returncode == 0


def test_lab_listens_on_this_machine_alone_and_opens_the_first_notebook():
    command = lab.lab_command([])
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert command[3] == "--LabApp.default_url=/lab/tree/notebooks/00_number_formats.ipynb"
    assert "--ServerApp.ip=127.0.0.1" in command
    assert not [word for word in command if "token" in word]  # Jupyter's own, a random one
    assert ("--allow-root" in command) == (hasattr(os, "geteuid") and os.geteuid() == 0)


def test_lab_takes_another_notebook_and_options():
    other = pins.ROOT / "notebooks" / "01_absmax_int8.ipynb"
    command = lab.lab_command([str(other), "--no-browser"])
    assert command[3].endswith("=/lab/tree/notebooks/01_absmax_int8.ipynb")
    assert command[-1] == "--no-browser"


@pytest.mark.parametrize("name", ["gone.ipynb", "elsewhere.ipynb"])
def test_lab_names_a_notebook_that_is_not_the_courses(tmp_path, name):
    (tmp_path / "elsewhere.ipynb").touch()
    with pytest.raises(SystemExit, match=says(tmp_path / name)):
        lab.lab_command([str(tmp_path / name)])


@pytest.mark.skipif(os.name == "nt", reason="there are no such signals")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_what_ends_the_launcher_ends_jupyterlab(how):
    server = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    launcher = f"import sys; from tools import lab; lab.run([sys.executable, '-c', {server!r}])"
    command = [sys.executable, "-c", launcher]
    with subprocess.Popen(command, cwd=pins.ROOT, stdout=subprocess.PIPE, text=True) as process:
        number = int(process.stdout.readline())
        process.send_signal(how)
        process.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
