"""data/results.json: all measurements, each with its machine, versions and date.

Records are merged by key, so each measuring command replaces only its own. The file is replaced
atomically: a reader sees the old file or the new one, never part of one.
"""

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from chapter13.atomic import replacing

FILE = Path(__file__).parent.parent / "data" / "results.json"


def load(path: Path = FILE) -> dict[str, dict]:
    """All records by key; empty if nothing was recorded yet.

    Raises ValueError if the file does not hold such records.
    """
    if not path.exists():
        return {}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(record, dict) for record in records.values()):
            raise TypeError
    except (json.JSONDecodeError, AttributeError, TypeError):
        raise ValueError(f"{path} holds no records: restore it from git, or delete it") from None
    return records


def record(
    key: str, measured: dict, target: str, packages: tuple[str, ...] = (), path: Path = FILE
) -> None:
    """Stores `measured` under `key`, with machine, date, commit, and the versions of `packages`.

    `target`: the command that measures it again, such as "make results".
    """
    records = load(path)
    records[key] = measured | {"target": target, "environment": environment(packages)}
    _write(records, path)


def forget(key: str, path: Path = FILE) -> None:
    """Removes a record. Raises KeyError if there is none."""
    records = load(path)
    del records[key]
    _write(records, path)


def _write(records: dict[str, dict], path: Path) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def environment(packages: tuple[str, ...] = ()) -> dict:
    """The machine, the versions, the date (UTC) and the commit of a measurement."""
    names = ("torch", "numpy", *packages)
    return {
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: version_of(name) for name in names},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
    }


def machine() -> str:
    """The processor, torch's vector instructions and threads, and the GPU if there is one."""
    words = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    threads = torch.get_num_threads()
    words += f", {threads} thread{'s' * (threads > 1)}"
    if torch.cuda.is_available():
        words += f", {torch.cuda.get_device_name()}"
    return words


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version_of(name: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit that is checked out, with "+" if files were changed since; "" without git."""
    git = ["git", "-C", str(FILE.parent.parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", "chapter13", "tools"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + "+" * bool(changed)
