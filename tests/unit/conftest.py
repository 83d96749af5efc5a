"""Settings of hypothesis for the unit tests: the same examples in every run, no example database.

`pytest --hypothesis-profile=search` looks for new counterexamples instead: fresh and many more of them.
"""

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("search", max_examples=3000, database=None, deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile", None):
        settings.load_profile("repeatable")
