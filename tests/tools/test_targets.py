"""Every record of data/results.json can be measured again by the make target that it names."""

import re
from importlib import import_module

import pytest

from chapter13 import results
from tools import markdown


def writers():
    """make target -> the module under tools/ that it runs, from the Makefile."""
    rules = re.split(r"^(?=[a-z-]+:)", (markdown.ROOT / "Makefile").read_text(), flags=re.M)
    found = {}
    for rule in rules:
        if module := re.search(r"python -m (tools\.\w+)$", rule, re.M):
            found[f"make {rule.partition(':')[0]}"] = module[1]
    return found


TARGETS = sorted({record["target"] for record in results.load().values()})


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_writes_the_records_that_name_it(target):
    module = import_module(writers()[target])
    assert module.TARGET == target
    ours = {key for key, record in results.load().items() if record["target"] == target}
    assert ours <= module.keys()


def test_no_record_lacks_a_target():
    keys = {target: import_module(writers()[target]).keys() for target in TARGETS}
    assert {key for each in keys.values() for key in each} >= set(results.load())
    assert sum(map(len, keys.values())) == len(set().union(*keys.values()))  # one writer each
