"""What all tests share."""

import os

import hypothesis
import pytest

# `make mutants` runs the properties a thousand times: fewer examples each
hypothesis.settings.register_profile("mutants", max_examples=25)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def weights():
    """The embedded model's linear layers by name, mapped from data/: do not change them.

    FileNotFoundError, with what to do, where `make data` has not run.
    """
    from chapter13 import models

    return models.linear_weights()
