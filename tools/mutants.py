"""`make mutants`: break the arithmetic in many small ways and count what the tests notice.

mutmut changes one thing at a time in a module and runs the module's own tests, those of MODULES.
The counts and the survivors are written to tests/mutants.md, module by module. A count is current
as long as the code of the module and of its tests is the same; comments and docstrings may change.
Only modules without a current count are run, and a stopped run resumes: each result is stored in
mutants/ as soon as it is known. If tests were only added, only the survivors are tried again. Stop
a run, do not suspend it: the clock goes on, and the mutants under test would count as endless
loops.

    python -m tools.mutants               every module whose count is not current
    python -m tools.mutants gptq awq      these alone

It fails if too few mutants of a module are killed, or if a survivor has no reason. To explain a
survivor, replace its "?" in tests/mutants.md by the reason why no test can or should notice it, or
write the test. Reasons are kept as long as the change that they explain survives.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tools import syntax

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "tests" / "mutants.md"
WORK = ROOT / "mutants"
TESTS = ROOT / "tests" / "package"

WORDS = "test_checkpoint.py::test_"  # of its tests, those that need no other program
MODULES = {
    "packing": ["test_packing.py"],
    "tensors": ["test_integer.py", "test_codebook.py"],
    "integer": ["test_integer.py"],
    "codebook": ["test_codebook.py"],
    "measures": ["test_measures.py"],
    "grids": ["test_integer.py", "test_gptq.py"],
    "gptq": ["test_gptq.py"],
    "awq": ["test_awq.py"],
    "dynamic": ["test_dynamic.py"],
    "gptq_words": [
        f"{WORDS}words_are_a_stream_with_the_lowest_bit_first",
        f"{WORDS}one_weight_to_the_bit",
        f"{WORDS}absmax_becomes_the_symmetric_grid",
        f"{WORDS}zero_point_0_needs_the_second_format",
        f"{WORDS}scales_beyond_float16_are_not_rounded",
        f"{WORDS}what_cannot_be_written",
        f"{WORDS}g_idx_is_optional_where_inputs_are_in_order",
        f"{WORDS}a_damaged_checkpoint_is_refused_and_the_model_kept",
        f"{WORDS}as_autogptq_writes",
        f"{WORDS}bfloat16_scales",
        f"{WORDS}gptqmodel_borrows_for_a_zero_point_of_0",
    ],
    "static": ["test_static.py"],
    "outliers": ["test_outliers.py"],
    "gguf_blocks": ["test_gguf_blocks.py"],
    "whole_model.int8": [
        "test_dynamic.py",
        "whole_model/test_linear.py::test_int8_product_keeps_a_float_s_precision",
        "whole_model/test_linear.py::test_paths_without_an_int8_kernel",
    ],
}
"""Each module of arithmetic, and the tests that must notice when it is wrong."""

FIRST = ("packing", "tensors", "integer", "codebook", "measures")


def enough(module):
    """The share of a module's mutants that the tests must kill."""
    return 0.95 if module in FIRST else 0.9


# timeout: the change made a loop endless, and the tests noticed
KILLED = ("killed", "timeout", "caught by type check")
UNKNOWN = ("not checked", "check was interrupted by user")

# What mutmut is parts, below the project's own pyproject.toml. Left out: tests on the
# real model, which are slow, and the words of error messages (a line that is nothing but a text
# with a blank in it), since the tests hold the numbers and names in them.
SETTINGS = """
[tool.mutmut]
source_paths = ["chapter13"]
only_mutate = {sources}
do_not_mutate_patterns = ['^\\s*"[^"]* [^"]*"$']
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = [
    "-k", "not real",
    "-p", "no:cacheprovider",
    "-p", "no:unraisableexception",  # it collects garbage ten times at the end: a second a mutant
    "-p", "no:threadexception",
    "-p", "pytest_timeout",  # in place of all plugins that are installed
    "-p", "_hypothesis_pytestplugin",
    "--timeout", "30",  # a loop that a change made endless
]
process_isolation = "forkserver"  # torch's threads do not survive a plain fork
timeout_multiplier = 10.0  # of a test's time; at low priority it may take several times as long
"""


class Count(NamedTuple):
    """How many of a module's mutants were killed, and with which code."""

    killed: int
    total: int
    fingerprint: str

    @property
    def share(self):
        return self.killed / self.total


class Survivor(NamedTuple):
    """A change that no test noticed."""

    where: str
    before: str
    after: str

    @property
    def module(self):
        return max((name for name in MODULES if self.where.startswith(f"{name}.")), key=len)


# --- what the counts depend on ----------------------------------------------------------------


def source_of(module):
    return ROOT / "chapter13" / f"{module.replace('.', '/')}.py"


def tests_of(module):
    """The files that contain a module's tests."""
    return sorted({TESTS / name.partition("::")[0] for name in MODULES[module]})


def fingerprint(module):
    """A digest of the code of a module and of its tests."""
    parts = [MODULES[module]]
    parts += [syntax.code(path) for path in (source_of(module), *tests_of(module))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def state_of(module, counts):
    """Why a module's count is not valid for today's code; None if it is."""
    if module not in counts:
        return "not counted yet"
    if counts[module].fingerprint != fingerprint(module):
        return "stale: the module or its tests have changed since"
    return None


# --- the report ------------------------------------------------------------------------------


def read_report():
    """(counts by module, reason by survivor, a list of all survivors) of the last report."""
    if not REPORT.exists():
        return {}, {}, []
    text = REPORT.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \| (\d+) of (\d+) \|.*\| `(\w+)` \|$", text, re.M)
    counts = {name: Count(int(killed), int(total), code) for name, killed, total, code in rows}
    pattern = r"^### `(.+)`\n\n```diff\n- (.*)\n\+ (.*)\n```\n\n(.+)$"
    found = re.findall(pattern, text, re.M)
    survivors = [Survivor(*change) for *change, _ in found]
    return counts, dict(zip(survivors, (reason for *_, reason in found), strict=True)), survivors


def write_report(counts, survivors, reasons):
    text = [
        "# Mutants\n\n"
        "Written by `make mutants`; only the reasons are written by hand. A count is of the code "
        "with this fingerprint, of the module and its tests; `make mutants` counts again what has "
        "changed since.\n\n"
        "| module | killed | share | needed | state | fingerprint |\n"
        "|---|---|---|---|---|---|\n"
    ]
    for module in MODULES:
        need, state = f"{enough(module):.0%}", state_of(module, counts) or "current"
        if module in counts:
            count = counts[module]
            text.append(
                f"| `{module}` | {count.killed} of {count.total} | {count.share:.1%} | {need} "
                f"| {state} | `{count.fingerprint}` |\n"
            )
        else:
            text.append(f"| `{module}` | | | {need} | {state} | |\n")
    text.append("\nWhat the tests did not notice, and why:\n")
    order = list(MODULES)
    for survivor in sorted(survivors, key=lambda one: (order.index(one.module), one)):
        where, before, after = survivor
        reason = reasons.get(survivor, "?")
        text.append(f"\n### `{where}`\n\n```diff\n- {before}\n+ {after}\n```\n\n{reason}\n")
    REPORT.write_text("".join(text), encoding="utf-8")


def problems(module, count, survivors, reasons):
    """The problems of a module's count, as sentences."""
    found = []
    own = [one for one in survivors if one.module == module]
    if count.share < enough(module):
        found.append(f"{module}: {count.share:.1%} killed, less than {enough(module):.0%}")
    if len(own) != count.total - count.killed:
        found.append(f"{module}: {count.total - count.killed} survived, {len(own)} are listed")
    if unexplained := sum(reasons.get(one, "?") == "?" for one in own):
        found.append(f"{module}: {unexplained} survivors without a reason")
    return found


# --- mutmut ----------------------------------------------------------------------------------


def mutmut(folder, *arguments, read=False):
    """Runs a mutmut command in a folder; returns its output if `read`."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HYPOTHESIS_PROFILE": "mutants",  # fewer examples, see tests/conftest.py
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": str(ROOT),
        "CHAPTER13_DATA": os.environ.get("CHAPTER13_DATA") or str(ROOT / "data"),
    }
    command = [sys.executable, "-m", "tools.mutants", "mutmut", *arguments]
    stdout = subprocess.PIPE if read else None
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=stdout, start_new_session=True
    ) as process:
        try:
            printed, _ = process.communicate()
        except BaseException:  # KeyboardInterrupt too: its workers end with it
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        sys.exit(f"mutmut {arguments[0]} failed in {folder}")
    return printed


def mutmut_itself(arguments):
    """mutmut with two changes.

    Its result files are written atomically, so it may be stopped at any moment; and quick tests run
    first, because many tests kill most mutants.
    """
    from mutmut.__main__ import cli
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.runners.harness import PytestRunner
    from mutmut.state import state

    write, run_tests = SourceFileMutationData.save, PytestRunner.run_tests

    def save(data):
        path = data.meta_path
        try:
            data.meta_path = path.with_suffix(".part")
            write(data)
        finally:
            data.meta_path = path
        os.replace(path.with_suffix(".part"), path)

    def quick_first(runner, *, mutant_name, tests):
        seconds = state().duration_by_test
        tests = sorted(tests, key=lambda test: seconds.get(test, 0))
        return run_tests(runner, mutant_name=mutant_name, tests=tests)

    SourceFileMutationData.save, PytestRunner.run_tests = save, quick_first
    cli(arguments)


def outcomes(folder):
    """mutant -> its outcome."""
    text = mutmut(folder, "results", "--all", "true", read=True)
    return dict(re.findall(r"^\s+(chapter13\.\S+): (.+)$", text, re.M))


def change(folder, mutant):
    """The change of a mutant, as a Survivor."""
    difference = mutmut(folder, "show", mutant, read=True).splitlines()
    removed = [line[1:].strip() for line in difference if re.match(r"-(?!--)", line)]
    added = [line[1:].strip() for line in difference if re.match(r"\+(?!\+\+)", line)]
    module, _, name = mutant.partition("__mutmut_")[0].rpartition(".")
    name = re.sub(r"^x_|^xǁ", "", name).replace("ǁ", ".")
    where = f"{module.removeprefix('chapter13.')}.{name}"
    return Survivor(where, " ".join(removed), " ".join(added))


def run(module, folder):
    """Tries all mutants of a module, in a folder with mutmut's settings for it.

    The results of an earlier run are kept, unless the module has changed since, or a test has
    changed or gone: mutants that this test killed might survive now.
    """
    state = {
        "code": [SETTINGS, syntax.code(source_of(module))],
        "tests": [
            one
            for path in tests_of(module)
            for one in syntax.statements(path)
            if not one.startswith("Import")
        ],
    }
    known = folder / "state.json"
    old = json.loads(known.read_text()) if known.exists() else {"code": None, "tests": []}
    kept = old["code"] == state["code"] and set(old["tests"]) <= set(state["tests"])
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("chapter13", "tests"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    settings = SETTINGS.format(
        sources=json.dumps([source_of(module).relative_to(ROOT).as_posix()]),
        tests=json.dumps([f"tests/package/{name}" for name in MODULES[module]]),
    )
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "pyproject.toml").write_text(project + settings, encoding="utf-8")
    jobs = ("--max-children", str(os.cpu_count() or 1))  # one mutant for each core
    ends = outcomes(folder) if kept else {}
    if ends:
        again = [one for one, end in ends.items() if end not in (*KILLED, "not checked")]
        if old["tests"] == state["tests"]:
            again = [one for one in again if ends[one] in UNKNOWN]
        if again:
            mutmut(folder, "run", *jobs, *again)
    known.write_text(json.dumps(state))
    if not ends or "not checked" in ends.values():
        mutmut(folder, "run", *jobs)


def count(module):
    """Breaks a module: (its Count, the survivors)."""
    of = fingerprint(module)
    folder = WORK / module
    run(module, folder)
    ends = outcomes(folder)
    if open_ends := sum(end in UNKNOWN for end in ends.values()):
        sys.exit(f"{module}: {open_ends} mutants were not tried; make mutants continues there")
    survivors = [change(folder, name) for name, end in ends.items() if end not in KILLED]
    return Count(len(ends) - len(survivors), len(ends), of), survivors


def main():
    if sys.argv[1:2] == ["mutmut"]:
        mutmut_itself(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", metavar="module", help="all if not given")
    wanted = parser.parse_args().modules or list(MODULES)
    if unknown := [name for name in wanted if name not in MODULES]:
        parser.error(f"no module {unknown[0]!r}; there are: {', '.join(MODULES)}")
    # stops mutmut too, as Ctrl-C does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped: make mutants continues here"))
    counts, _, survivors = read_report()
    todo = []
    for module in MODULES:
        state = state_of(module, counts)
        print(f"{module}: {state or 'current'}", flush=True)
        if state and module in wanted:
            todo.append(module)
    for module in todo:
        counts[module], found = count(module)
        survivors = [one for one in survivors if one.module != module] + found
        write_report(counts, survivors, read_report()[1])
        print(f"{module}: {counts[module].killed} of {counts[module].total} killed", flush=True)
    reasons = read_report()[1]
    write_report(counts, survivors, reasons)
    wrong = [
        problem
        for module, of in counts.items()
        if not state_of(module, counts)
        for problem in problems(module, of, survivors, reasons)
    ]
    print(*wrong or ["all as it should be"], "see tests/mutants.md", sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
