"""What the user sees of long work, with and without tqdm."""

import io

import pytest

from mara_export import progress
from mara_export.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """No fixture: pytest takes stderr for itself after those have run."""
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def work(shown: Progress) -> None:
    with shown.stage("build"), shown.phases() as tell:
        tell("parse", 0, 2)
        tell("parse", 1, 2)
        tell("time kernels", 0, 9)


def test_without_tqdm_each_phase_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on(Terminal(), monkeypatch)
    monkeypatch.setattr(progress, "tqdm", None)
    work(Progress())
    lines = terminal.getvalue().splitlines()
    assert [line.strip() for line in lines[:3]] == ["build …", "parse", "time kernels"]
    assert "build" in lines[-1]
    assert lines[-1].endswith(" s")
    assert list(Progress().parts([1, 2])) == [1, 2]


def test_with_tqdm_the_phases_move_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on(Terminal(), monkeypatch)
    pytest.importorskip("tqdm")
    work(Progress())
    assert "time kernels" in terminal.getvalue()


@pytest.mark.parametrize("without_tqdm", [True, False])
def test_into_a_file_goes_the_stage_alone(without_tqdm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = on(io.StringIO(), monkeypatch)
    if without_tqdm:
        monkeypatch.setattr(progress, "tqdm", None)
    shown = Progress()
    work(shown)
    shown.note("something to know")
    (stage, note) = stream.getvalue().splitlines()
    assert stage.split()[0] == "build"
    assert note == "  something to know"


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on(Terminal(), monkeypatch)
    shown = Progress(quiet=True)
    work(shown)
    shown.note("something to know")
    assert terminal.getvalue() == ""
