"""A run that is killed at any moment resumes to the result of an uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mara_deploy.commands import train
from tests.export.training.conftest import new_run, same_runs

EPISODES = 6
SEED = 5


class Killed:
    """Counts what changes files, and kills the process in the middle of one of those steps, or never."""

    def __init__(self, at: int) -> None:
        self.steps, self.at = 0, at
        self.open, self.replace, self.unlink = Path.open, Path.replace, Path.unlink

    def due(self) -> bool:
        self.steps += 1
        return self.steps == self.at

    def install(self) -> None:
        def step(real: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kw: Any) -> Any:
                if self.due():
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kw)

            return run

        def opened(path: Path, mode: str = "r", *args: Any, **kw: Any) -> Any:
            file = self.open(path, mode, *args, **kw)
            if mode[0] not in "aw" or not self.due():
                return file
            return HalfWritten(file)

        Path.open, Path.replace, Path.unlink = opened, step(self.replace), step(self.unlink)
        os.fsync = step(lambda handle: None)  # a kill loses nothing that was written


class HalfWritten:
    """A file whose first write ends in the middle, with the process."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write(self, content: Any) -> None:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def start(run, talker, tmp_path) -> Callable[..., int]:
    """(folder, step) → the id of a process that begins a run there, or continues it, and is killed in that step; it
    returns the number of its steps.
    """

    def forked(out: str, at: int = 0) -> int:
        if pid := os.fork():
            return pid
        code = 70
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(nowhere, stream)
            killed = Killed(at)
            killed.install()
            begun = (tmp_path / out / "run.json").is_file()
            new = new_run(out, talker, ("train_test_scores:length",), episodes=EPISODES)
            code = train.main([str(part) for part in (["--resume", "--out", out] if begun else new)])
            code = code or min(killed.steps, 250)
        finally:
            os._exit(code)

    return forked


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def as_uninterrupted(start, uninterrupted, tmp_path) -> Callable[[str], None]:
    def check(out: str) -> None:
        assert end_of(start(out)) > 2
        assert same_runs(tmp_path / out, uninterrupted(EPISODES))
        assert not list((tmp_path / out).glob(".*"))

    return check


@pytest.mark.parametrize("every", [31, pytest.param(1, marks=pytest.mark.long)])
def test_killed_in_the_middle_of_a_write(start, as_uninterrupted, every) -> None:
    """Of any file, and again in the same step of the continued run."""
    steps = end_of(start("counted"))
    assert 60 < steps < 250
    for at in range(SEED, steps + 1, every):
        assert end_of(start(f"at{at}", at)) == -signal.SIGKILL
        end_of(start(f"at{at}", at))
        as_uninterrupted(f"at{at}")


@pytest.mark.parametrize("kills", [2, pytest.param(60, marks=pytest.mark.long)])
def test_ended_at_a_random_moment(start, as_uninterrupted, kills) -> None:
    rng = random.Random(SEED)
    began = time.monotonic()
    end_of(start("timed"))
    whole, done, number = time.monotonic() - began, 0, 0
    while done < kills:
        number += 1
        for _ in range(3):
            pid = start(f"run{number}")
            time.sleep(rng.uniform(0, whole))
            os.kill(pid, rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
            done += end_of(pid) in (-signal.SIGKILL, 2)
        as_uninterrupted(f"run{number}")
