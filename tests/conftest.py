"""What all tests share."""

import os
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent

# no deadline: a busy machine is no bug. In CI the same examples each time, so that a failure is
# the change's; at home new ones, so that the properties get around.
hypothesis.settings.register_profile("course", deadline=None, derandomize="CI" in os.environ)
# `make mutants` runs the properties a thousand times, and its count should not depend on luck
hypothesis.settings.register_profile("mutants", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "course"))

# `make test` gives whole files to its processes, in this order: the long ones may not come last
LONG = [
    "test_browser.py",
    "test_checkpoint.py",
    "test_peers.py",
    "04_int8_activations.ipynb",
    "06_gptq.ipynb",
    "09_awq.ipynb",
    "05_bitsandbytes.ipynb",
    "test_present.py",
    "08_summary.ipynb",
    "test_slides.py",
    "test_devices.py",
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_make_parametrize_id(val):
    """In a test's name, a message's pattern made by `tiny.says` is what it says."""
    return " ".join(map(str, val.facts)) if hasattr(val, "facts") else None


@pytest.fixture(scope="session")
def weights():
    """The embedded model's linear layers by name, mapped from data/: do not change them.

    FileNotFoundError, with what to do, where `make data` has not run.
    """
    from chapter13 import models

    return models.linear_weights()


def skip_or_fail(what, error):
    """Skip loudly, or fail where the browser is required: `what` was not tested in one."""
    message = f"{what} NOT TESTED IN A BROWSER: {error}"
    if os.environ.get("CHAPTER13_REQUIRE_BROWSER") == "1":
        pytest.fail(message)
    pytest.skip(message)


def from_npm(fetch):
    """Calls `fetch`, which installs something from npm: one process at a time."""
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / "npm.lock"):
        return fetch()


@pytest.fixture(scope="module")  # while it lives, no other event loop can run
def browser(request):
    """A headless Chromium or Chrome; `WHAT` of the module says what goes untested without one."""
    from playwright.sync_api import sync_playwright

    from tools.browser import NoBrowser, launch

    with sync_playwright() as playwright:
        try:
            browser = launch(playwright)
        except NoBrowser as error:
            skip_or_fail(request.module.WHAT, error)
        yield browser
        browser.close()
