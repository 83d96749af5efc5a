"""Scores that are Python functions: how they are found, and that nothing they do reaches the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mara_deploy.scores.base import ScoreError
from mara_deploy.scores.load import load_score
from mara_runtime.bundle import sha256

pytestmark = pytest.mark.slow

PROMPTS, ANSWERS = ["a", "bb"], ["x", "xyz"]
LENGTH = "def length(prompts, answers): return [len(a) for a in answers]\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "file", "name"),
    [
        ("mine:length", "mine.py", None),
        ("statistics:length", "statistics.py", None),
        ("json:length", "json.py", None),
        ("numpy:length", "numpy.py", None),
        ("./statistics.py:length", "statistics.py", "statistics.py:length"),
        ("../sub/my-score.v2.py:length", "../sub/my-score.v2.py", "my-score.v2.py:length"),
        ("package.mine:length", "package/mine.py", None),
    ],
)
def test_a_file_is_found_and_hides_no_module(here, monkeypatch, spec, file, name) -> None:
    """The module may have the name of another, which it and we can still import, and import what is beside it."""
    (here / "run").mkdir()
    monkeypatch.chdir(here / "run")
    path = here / "run" / file
    path.parent.mkdir(exist_ok=True)
    (path.parent / "beside_it.py").write_text("ONE = 1\n")
    (path.parent / "random.py").write_text("raise ImportError('not for you')\n")
    beside = "from package.beside_it import ONE" if "package" in spec else "from beside_it import ONE"
    theirs = "import numpy.linalg" if "numpy" in spec else "from random import random"
    path.write_text(f"{beside}\nfrom statistics import fmean\n{theirs}\n{LENGTH}")
    score = load_score(spec)
    assert (score.name, score.columns, score.fingerprint) == (name or spec, (), sha256(path)[:16])
    path.write_text("def length(prompts, answers): return [1.0]\n")  # what was imported counts
    assert list(score(PROMPTS, ANSWERS)) == [1.0, 3.0]


def test_a_file_beside_the_run_hides_no_module_from_the_command(here) -> None:
    """`python -m` puts the working directory first."""
    (here / "statistics.py").write_text("raise ImportError('this is mine')\n")
    (here / "prompts.txt").write_text("How?\n")
    line = ["-m", "mara_deploy.commands.eval", "none", "--prompts", "prompts.txt", "--score", "demo"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, *line], env=environment, capture_output=True, text=True, check=False)
    assert run.stderr.startswith("mara-eval: error: no bundle found at none")


@pytest.mark.parametrize(
    ("spec", "text", "reason"),
    [
        ("nowhere_to_be_found:f", "", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("mine:other", "def f(): pass", "mine has no function 'other'"),
        ("mine:f", "f = 3.5", "'f' in mine is of type float"),
        ("mine:f", "\n1 / 0", r"ZeroDivisionError: division by zero \(mine\.py:2\)"),
        ("mine:f", "import nowhere_to_be_found", r"No module named 'nowhere_to_be_found' \(mine\.py:1\)"),
        ("mine:f", "import sys\nsys.exit(0)", r"SystemExit: 0 \(mine\.py:2\)"),
        ("mine:f", "raise KeyboardInterrupt", r"KeyboardInterrupt \(mine\.py:1\)"),
        ("mine:f", "def f(:", "SyntaxError: .*mine.py, line 1"),
        ("mine:f", "import os\nos._exit(3)", "ended its process, with exit code 3"),
        ("mine:f", "async def f(prompts, answers): return [1.0]", "is an `async def`: write a `def`"),
        ("mine:f", "class F:\n  async def __call__(self, p, a): yield 1.0\nf = F()", "is an `async def`"),
        ("mine:f", "def f(prompts): return [1.0]", "cannot be called with prompts and answers"),
        ("./mine.py:other", "", "mine.py has no function 'other'"),
        ("./other.py:f", "", "there is no file other.py"),
        ("./mine.py", "", "the score ./mine.py names no function: write ./mine.py:FUNCTION"),
        ("./mine.py:", "", "the score ./mine.py: names no function: write ./mine.py:FUNCTION"),
        ("mine:", "", "the score mine: names no function: write mine:FUNCTION"),
    ],
)
def test_a_function_that_cannot_be_loaded_gives_the_reason(here, spec, text, reason) -> None:
    (here / "mine.py").write_text(text)
    with pytest.raises(ScoreError, match=reason) as caught:
        load_score(spec)
    assert str(caught.value).startswith("the score ")
    assert "\n" not in str(caught.value)


FAILING = """
import json, os, signal, sys
def in_a_list(prompts, answers):
    return [
        json.loads(a) for a in answers
    ]
def in_a_generator(prompts, answers):
    yield 1.0
    raise OSError("gone")
def leaving(prompts, answers): sys.exit(0)
def interrupting(prompts, answers): raise KeyboardInterrupt
def exiting(prompts, answers): os._exit(0)
def closing(prompts, answers):
    os.closerange(3, 256)
    return [1.0, 1.0]
def killed(prompts, answers): os.kill(os.getpid(), signal.SIGKILL)
def not_a_number(prompts, answers): return [float("nan")] * len(answers)
async def asynchronous(): return [1.0]
def a_coroutine(prompts, answers): return asynchronous()
"""


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("in_a_list", r"failed with JSONDecodeError: .* \(failing.py:5\)"),
        ("in_a_generator", r"failed with OSError: gone \(failing.py:9\)"),
        ("leaving", r"failed with SystemExit: 0 \(failing.py:10\)"),
        ("interrupting", r"failed with KeyboardInterrupt \(failing.py:11\)"),
        ("exiting", "ended its process, with exit code 0"),
        ("closing", "ended its process, with exit code 1"),
        ("killed", "ended its process, with signal SIGKILL"),
        ("not_a_number", "is nan for the answer to the prompt 'a'"),
        ("a_coroutine", "returned <coroutine .*; it must return a list"),
    ],
)
def test_whatever_happens_in_a_call_is_one_line(here, capfd, function, reason) -> None:
    (here / "failing.py").write_text(FAILING)
    score = load_score(f"failing:{function}")
    for _ in range(2):
        with pytest.raises(ScoreError, match=f"^the score failing:{function} {reason}") as caught:
            score(PROMPTS, ANSWERS)
        assert caught.value.transient == (function == "in_a_generator")
    assert "Traceback" not in capfd.readouterr().err


DISTURBING = """
import builtins, json, locale, os, random, signal, subprocess, sys
def all_of_it(prompts, answers):
    os.chdir("/")
    os.environ["MARA"] = "1"
    os.umask(0o777)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    random.seed(0)
    sys.path.clear()
    sys.setrecursionlimit(200)
    json.dumps = builtins.open = None
    print("printed")
    subprocess.run(["echo", "by a child"])
    sys.stdout.close()
    return [len(a) for a in answers]
def reading(prompts, answers):
    return [len(sys.stdin.read()) for a in answers]
"""


def test_what_a_score_does_to_its_process_does_not_reach_the_run(here, capfd) -> None:
    (here / "disturbing.py").write_text(DISTURBING)

    def state() -> list[object]:
        os.umask(mask := os.umask(0o022))
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return [Path.cwd(), dict(os.environ), mask, handlers, list(sys.path), sys.getrecursionlimit()]

    before = state()
    assert load_score("disturbing:all_of_it")(PROMPTS, ANSWERS) == [1.0, 3.0]
    assert load_score("disturbing:reading")(PROMPTS, ANSWERS) == [0.0, 0.0]  # its stdin is empty
    assert state() == before
    assert json.dumps({}) == "{}"
    out, err = capfd.readouterr()
    assert out == ""
    assert "by a child" in err


SLOW = """
import os, pathlib, time
def judge(prompts, answers):
    pathlib.Path("pid").write_text(f"{os.getpid()}\\n")
    time.sleep(60)
"""


def wait_for_the_end() -> None:
    """Of the process that the score has noted, and of the note."""
    note = Path("pid")
    for _ in range(1000):
        time.sleep(0.01)
        if note.exists() and note.read_text().endswith("\n") and not Path(f"/proc/{note.read_text().strip()}").exists():
            note.unlink()
            return
    raise AssertionError("the process of the score goes on")


def test_ctrl_c_ends_the_process_of_a_call(here) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (here / "slow.py").write_text(SLOW)
    score = load_score("slow:judge")
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            score(PROMPTS, ANSWERS)
    finally:
        signal.signal(signal.SIGALRM, old)
    del score
    wait_for_the_end()


def test_the_end_of_a_run_that_is_killed_ends_the_process_of_its_call(here) -> None:
    (here / "slow.py").write_text(SLOW)
    code = "from mara_deploy.scores.load import load_score; load_score('slow:judge')(['a'], ['b'])"
    run = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    )
    while not (here / "pid").exists():
        time.sleep(0.01)
    run.kill()
    run.wait()
    wait_for_the_end()
