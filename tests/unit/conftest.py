"""Settings of hypothesis for the unit tests: the same examples in every run, no example database. A GPU's double.

`pytest --hypothesis-profile=search` looks for new counterexamples instead: fresh and many more of them.
"""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.double.machine import Machine

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("search", max_examples=3000, database=None, deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile", None):
        settings.load_profile("repeatable")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A GPU, to which everything taken is given back at the end."""
    machine = Machine()
    machine.install(monkeypatch)
    yield machine
    machine.check_given_back()
