"""What all commands share: the process they run in, and how they end."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mara_deploy.commands.shared import Parser, guarded
from mara_runtime.errors import EngineError, MaraError
from tests.unit import helpers


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


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (MemoryError(), ["memory", "mara-memory"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ["memory", "mara-memory"]),
        (EngineError("ONNX Runtime cannot load a.onnx: std::bad_alloc"), ["a.onnx", "mara-memory"]),
        (ModuleNotFoundError("No module named 'x'", name="x"), ["x is not installed"]),
        (ImportError("libx.so: cannot enable executable stack"), ["libx.so: cannot enable", "cannot be imported"]),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a/b"), ["a/b: File name too long"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["cannot write: No space left"]),
        (MaraError("two\nlines"), ["two lines"]),
        (KeyboardInterrupt(), ["interrupted"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_is_the_environments_fault_is_one_line(
    error: BaseException, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def body(_: argparse.Namespace) -> None:
        raise error

    assert guarded(Parser("mara-test", ""), body, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert [text for text in named if text not in line] == []
    with pytest.raises(type(error)):
        guarded(Parser("mara-test", ""), body, ["--debug"])


def test_a_defect_shows_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(Parser("mara-test", ""), lambda _: print(1 // 0), [])


@pytest.mark.parametrize("argument", ["--debug=--", "a\udcffb"])
def test_arguments_that_argparse_mistakes_are_refused(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        guarded(Parser("mara-test", ""), lambda _: None, [argument])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("mara-test: error: ")


def test_a_working_directory_that_is_gone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit) as left:
        guarded(Parser("mara-test", ""), lambda _: None, [])
    assert left.value.code == 2
    assert "the working directory cannot be read" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the address space cannot be limited")
def test_too_little_address_space_for_libraries_is_one_line() -> None:
    """PyTorch ends the process when memory runs out while it is loaded."""
    command = f"ulimit -v 600000; exec {sys.executable} -m mara_deploy.commands.export --model a --agent b"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    lines = result.stderr.splitlines()
    assert result.returncode == 2
    assert len(lines) == 2
    assert lines[1].startswith("mara-export: error: the address space is limited to 585 MiB")


def test_streams_may_be_closed_or_narrow(tmp_path: Path) -> None:
    """Letters are replaced, JSON is escaped, and no file that is opened later becomes a stream."""
    folder = helpers.make_bundle(tmp_path / "bundle")
    manifest = helpers.read_manifest(folder)
    manifest["model"]["source"] = "modèle"
    helpers.write_manifest(folder, manifest)

    def inspect(options: str, encoding: str = "utf-8") -> str:
        line = f"{sys.executable} -m mara_deploy.commands.inspect {folder} {options}"
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        result = subprocess.run(["sh", "-c", line], env=environment, capture_output=True)
        assert (result.returncode, result.stderr) == (0, b""), result.stderr
        return result.stdout.decode(encoding)

    assert "mod?le" in inspect("", "ascii")
    assert "modèle" in inspect("", "latin-1")
    assert json.loads(inspect("--json", "ascii"))["model"]["source"] == "modèle"
    assert inspect(">&- 2>&- <&-") == ""
    child = "import os, sys, subprocess as s; from mara_deploy.commands.process import prepared\nwith prepared():\n "
    child += "sys.exit(s.call([sys.executable, '-c', 'import os; [os.fstat(i) for i in (0, 1, 2)]']))"
    line = f'{sys.executable} -c "$CODE" >&- 2>&- <&-'
    assert subprocess.run(["sh", "-c", line], env={**os.environ, "CODE": child}, check=False).returncode == 0
    assert "modèle" in inspect("2>&-")
