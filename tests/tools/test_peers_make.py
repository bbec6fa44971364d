"""`make peers` in a folder of its own, with a Python that only logs."""

import os
import shutil
import subprocess

import pytest
from tiny import says

from tools import peers

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# {code} answers the question whether AutoGPTQ has a wheel, {headers} the one about Python.h
PYTHON = """\
#!/bin/sh
case "$*" in
    "-m venv --clear .peers/"*)
        mkdir -p "$4/bin"; cp inner "$4/bin/python"; echo "venv $4" >> log ;;
    *version_info*) exit {code} ;;
    *Python.h*) exit {headers} ;;
    --version) echo "Python 3.14.1" ;;
esac
"""
INNER = """\
#!/bin/sh
case "$*" in
    "-m pip --version") exit 0 ;;
    "-m pip install"*) echo "$*" >> log; test ! -e offline ;;
esac
"""
AUTOGPTQ, GPTQMODEL = (
    [f"venv .peers/{peer}", f"-m pip install -r tools/peers/{peer}.txt"] for peer in peers.VERSIONS
)


@pytest.fixture
def folder(tmp_path):
    shutil.copy(peers.ROOT / "Makefile", tmp_path)
    (tmp_path / "tools" / "peers").mkdir(parents=True)
    for peer in peers.VERSIONS:
        shutil.copy(peers.ROOT / "tools" / "peers" / f"{peer}.txt", tmp_path / "tools" / "peers")
    script(tmp_path / "inner", INNER)
    script(tmp_path / "python", PYTHON.format(code=0, headers=0))
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "cc", "#!/bin/sh\n")
    return tmp_path


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


def make(folder, *arguments):
    inherited = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "PEER_PYTHON", "TORCH_INDEX"}
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
    command = ["make", "--no-print-directory", "PEER_PYTHON=./python", "peers", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def log(folder):
    path = folder / "log"
    return path.read_text().splitlines() if path.exists() else []


def test_installs_both_once(folder):
    assert make(folder).returncode == 0
    assert make(folder).returncode == 0
    assert log(folder) == AUTOGPTQ + GPTQMODEL


def test_a_failed_installation_is_taken_up_again(folder):
    (folder / "offline").touch()
    result = make(folder)
    assert result.returncode != 0
    assert "network" in result.stdout
    (folder / "offline").unlink()
    assert make(folder).returncode == 0
    assert log(folder) == [*AUTOGPTQ, AUTOGPTQ[1], *GPTQMODEL]  # pip goes on in the same place


def test_installs_again_when_the_pins_change(folder):
    assert make(folder).returncode == 0
    newer = (folder / ".peers" / "gptqmodel" / "installed").stat().st_mtime + 10
    os.utime(folder / "tools" / "peers" / "gptqmodel.txt", (newer, newer))
    assert make(folder).returncode == 0
    assert log(folder) == [*AUTOGPTQ, *GPTQMODEL, GPTQMODEL[1]]


def test_a_python_without_wheels_of_autogptq_is_named_and_the_other_peer_installed(folder):
    script(folder / "python", PYTHON.format(code=1, headers=0))
    result = make(folder)
    assert result.returncode == 0
    assert "AutoGPTQ" in result.stdout
    assert "Python 3.14.1" in result.stdout
    assert "make peers PEER_PYTHON=python3.11" in result.stdout
    assert log(folder) == GPTQMODEL


def test_missing_headers_are_named_and_the_other_peer_installed(folder):
    script(folder / "python", PYTHON.format(code=0, headers=1))
    result = make(folder)
    assert result.returncode == 0
    assert "GPTQModel" in result.stdout
    assert "sudo apt-get install gcc libc6-dev python3-dev" in result.stdout
    assert log(folder) == AUTOGPTQ


def test_torch_index_reaches_pip(folder):
    assert make(folder, "TORCH_INDEX=https://example.org/cpu").returncode == 0
    installs = [line for line in log(folder) if "install" in line]
    wanted = "-m pip install --extra-index-url https://example.org/cpu -r tools/peers/"
    assert [line.startswith(wanted) for line in installs] == [True, True]


@pytest.mark.parametrize("peer", peers.VERSIONS)
def test_every_version_is_pinned(peer):
    text = (peers.ROOT / "tools" / "peers" / f"{peer}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    package = {"autogptq": "auto-gptq", "gptqmodel": "gptqmodel"}[peer]
    assert f"{package}=={peers.VERSIONS[peer]}" in lines
    assert all("==" in line for line in lines)


def test_a_missing_peer_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    with pytest.raises(peers.NoPeer, match=says("make peers")):
        peers.python("autogptq")
    with pytest.raises(ValueError, match=says("exllama", "autogptq, gptqmodel")):
        peers.python("exllama")
