"""`make mutants`: break the arithmetic in many small ways and count what the tests notice.

mutmut changes one thing at a time in the modules named under [tool.mutmut] in pyproject.toml and
runs the tests that reach it. This script runs it, writes the count and the survivors to
tests/mutants.md, and fails if fewer than 95% are killed or a survivor has no reason there.

To explain a new survivor, replace its "?" in tests/mutants.md by the reason why no test can or
should notice it, or write the test. Reasons are kept as long as the change they explain survives.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "tests" / "mutants.md"
ENOUGH = 0.95
# timeout: the change made a loop endless, and the tests noticed
KILLED = ("killed", "timeout", "caught by type check")


def mutmut(*arguments):
    """What a mutmut command prints."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout


def run():
    # one mutant for each core, with fewer examples (tests/conftest.py)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "mutants"}
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(os.cpu_count() or 1)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def outcomes():
    """mutant -> what became of it."""
    lines = re.findall(r"^\s+(chapter13\.\S+): (.+)$", mutmut("results", "--all", "true"), re.M)
    return dict(lines)


def change(mutant):
    """(the function, the line before, the line after) of a mutant."""
    difference = mutmut("show", mutant).splitlines()
    removed = [line[1:].strip() for line in difference if re.match(r"-(?!--)", line)]
    added = [line[1:].strip() for line in difference if re.match(r"\+(?!\+\+)", line)]
    module, _, name = mutant.partition("__mutmut_")[0].rpartition(".")
    name = re.sub(r"^x_|^xǁ", "", name).replace("ǁ", ".")
    return f"{module.removeprefix('chapter13.')}.{name}", " ".join(removed), " ".join(added)


def known_reasons():
    """The reasons in the report, by change."""
    if not REPORT.exists():
        return {}
    pattern = r"^### `(.+)`\n\n```diff\n- (.*)\n\+ (.*)\n```\n\n(.+)$"
    found = re.findall(pattern, REPORT.read_text(encoding="utf-8"), re.M)
    return {(where, before, after): reason for where, before, after, reason in found}


def report(outcome):
    """Writes the report; returns (share killed, number of survivors without a reason)."""
    reasons = known_reasons()
    killed = sum(end in KILLED for end in outcome.values())
    survivors = sorted({change(name) for name, end in outcome.items() if end not in KILLED})
    share = killed / len(outcome)
    text = [
        "# Mutants\n\n"
        "Written by `make mutants`; only the reasons are written by hand.\n\n"
        f"{killed} of {len(outcome)} mutants killed: {share:.1%}. "
        "What the tests did not notice, and why:\n"
    ]
    for where, before, after in survivors:
        reason = reasons.get((where, before, after), "?")
        text.append(f"\n### `{where}`\n\n```diff\n- {before}\n+ {after}\n```\n\n{reason}\n")
    REPORT.write_text("".join(text), encoding="utf-8")
    return share, sum(reasons.get(survivor, "?") == "?" for survivor in survivors)


def main():
    run()
    share, unexplained = report(outcomes())
    print(f"{share:.1%} killed, {unexplained} survivors without a reason: see tests/mutants.md")
    sys.exit(share < ENOUGH or unexplained > 0)


if __name__ == "__main__":
    main()
