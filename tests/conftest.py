"""What all tests share."""

import os

import hypothesis
import pytest

# no deadline: a busy machine is no bug. In CI the same examples each time, so that a failure is
# the change's; at home new ones, so that the properties get around.
hypothesis.settings.register_profile("course", deadline=None, derandomize="CI" in os.environ)
# `make mutants` runs the properties a thousand times
hypothesis.settings.register_profile("mutants", deadline=None, max_examples=25)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "course"))


@pytest.fixture(scope="session")
def weights():
    """The embedded model's linear layers by name, mapped from data/: do not change them.

    FileNotFoundError, with what to do, where `make data` has not run.
    """
    from chapter13 import models

    return models.linear_weights()
