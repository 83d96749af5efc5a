"""What all commands share: signals that end a command."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator

import pytest

from mara_deploy.commands.shared import Parser, guarded


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Here a signal that the command does not handle fails the test, instead of ending all tests."""

    def missed(number: int, _: object) -> None:
        raise AssertionError(f"signal {number} came through")

    before = {number: signal.signal(number, missed) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    for _ in range(1000):  # Python calls the handler between two instructions
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_unwinding_ends_when_the_signal_comes_again(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The shell and the system each send a SIGHUP when a terminal closes."""
    before, tidied = signal.getsignal(number), []

    def body(_: argparse.Namespace) -> None:
        try:
            send(number)
        finally:
            send(number)
            tidied.append(True)

    assert guarded(Parser("mara-test", ""), body, []) == 2
    assert tidied == [True]
    assert capsys.readouterr().err == "mara-test: error: interrupted\n"
    assert signal.getsignal(number) == before


def test_a_hangup_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert guarded(Parser("mara-test", ""), lambda _: send(signal.SIGHUP), []) == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
