"""What all tests share."""

import pytest


@pytest.fixture(scope="session")
def weights():
    """The embedded model's linear layers by name, mapped from data/: do not change them.

    FileNotFoundError, with what to do, where `make data` has not run.
    """
    from chapter13 import models

    return models.linear_weights()
