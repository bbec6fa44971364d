"""One source of truth for versions: constraints.txt. These tests fail when anything drifts.

`python tools/pins.py check` (in CI) goes further and really installs what environment.yml says.
"""

import ast
import graphlib
import re
import sys
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from tiny import says

from tools import pins

PROJECT = tomllib.loads((pins.ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(line) for line in sum(EXTRAS.values(), start=PROJECT["dependencies"])]
PINNED = pins.parse_pins(pins.CONSTRAINTS.read_text())


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_requirement_is_a_lower_bound_that_its_pin_meets(requirement):
    assert [clause.operator for clause in requirement.specifier] == [">="]
    assert requirement.specifier.contains(PINNED[pins.normalized(requirement.name)])


def test_pins_are_sorted_and_unique():
    lines = pins.CONSTRAINTS.read_text().splitlines()
    names = [line.partition("==")[0] for line in lines if not line.startswith("#")]
    assert names == sorted(set(names))
    assert names == [pins.normalized(name) for name in names]


def installed_by_the_course():
    """{name: version} of what chapter13[course,test] requires here, directly or further on."""
    installed, pending = {}, [Requirement("chapter13[course,test]")]
    seen = set()
    while pending:
        requirement = pending.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        distribution = metadata.distribution(requirement.name)
        version = distribution.version.partition("+")[0]
        installed[pins.normalized(requirement.name)] = version
        for line in distribution.requires or []:
            needed = Requirement(line)
            extras = requirement.extras or {""}
            wanted = [needed.marker is None or needed.marker.evaluate({"extra": e}) for e in extras]
            if any(wanted):
                pending.append(needed)
    return installed


def test_what_is_installed_is_what_is_pinned():
    """Packages that somebody added to the environment are their own business."""
    installed = installed_by_the_course()
    assert {"torch", "jupyterlab", "pytest", "filelock"} <= set(installed)
    assert not pins.differences(PINNED, installed)


def test_conda_environment_refers_to_the_pins_and_adds_none():
    environment = yaml.safe_load(pins.ENVIRONMENT.read_text())
    python, pip, pip_lines = environment["dependencies"]
    assert re.fullmatch(r"python=3\.\d+", python)
    assert pip == "pip"
    assert pip_lines == {"pip": ["-c constraints.txt", "-e .[course,test]"]}
    assert pins.environment_pip_lines() == pip_lines["pip"]
    major, minor = map(int, python.removeprefix("python=").split("."))
    assert f"{major}.{minor}" in Requirement(f"python{PROJECT['requires-python']}").specifier


@pytest.mark.parametrize(
    "path", ["Makefile", "postBuild", ".ci/run", ".github/workflows/ci.yml", "pyproject.toml"]
)
def test_no_second_place_holds_versions(path):
    assert not re.findall(r"[\w\]]==\d\S*", (pins.ROOT / path).read_text())


def test_differences_name_what_drifted():
    pinned = pins.parse_pins("# why\nnumpy==2.4.6\nTorch==2.13.0+cpu\n-e .\nJinja2==3.1.6 # x\n")
    assert pinned == {"numpy": "2.4.6", "torch": "2.13.0", "jinja2": "3.1.6"}
    installed = {"numpy": "2.4.5", "torch": "2.13.0", "six": "1.17.0", "nvidia-cublas": "1"}
    assert pins.differences(pinned, installed) == [
        "numpy 2.4.5 is installed, pinned is 2.4.6",
        "six 1.17.0 is installed but not pinned",
    ]


@pytest.mark.parametrize("line", ["numpy", "numpy>=2.1", "numpy @ file:///numpy.whl"])
def test_a_line_that_pins_nothing_is_an_error(line):
    with pytest.raises(ValueError, match=says("name==version", repr(line))):
        pins.parse_pins(line)


def imported(path):
    """Top-level names that a Python file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


# what only these targets install: `make peers`, `make llama`, `make fuzz`, `make mutants`
ELSEWHERE = {"auto_gptq", "gptqmodel", "llama_cpp", "atheris", "drive", "mutmut"}


@pytest.mark.parametrize("folder", ["chapter13", "tools", "tests"])
def test_what_the_code_imports_is_required(folder):
    """Nothing works only because another package happens to bring it along."""
    required = {pins.normalized(requirement.name) for requirement in REQUIREMENTS}
    ours = {"chapter13", "tools", "conftest"} | {path.stem for path in pins.ROOT.glob("tests/*.py")}
    ours |= ELSEWHERE if folder == "tools" else set()
    providers = metadata.packages_distributions()
    missing = {
        f"{path.name} imports {name}"
        for path in (pins.ROOT / folder).rglob("*.py")
        for name in set(imported(path)) - sys.stdlib_module_names - ours
        if not required & {pins.normalized(found) for found in providers.get(name, [])}
    }
    assert not missing


def imported_at_once(path):
    """Modules of the package that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "chapter13":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names | {node.module}


def test_imports_of_the_package_have_no_circle():
    package = pins.ROOT / "chapter13"
    files = {
        ".".join(path.relative_to(pins.ROOT).with_suffix("").parts): path
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    arrows = {name: set(imported_at_once(path)) & set(files) for name, path in files.items()}
    assert sum(map(len, arrows.values())) > 100, "hardly any import was found"
    list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError
