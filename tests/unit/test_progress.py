"""What the user sees of long work, with and without tqdm."""

import io

import pytest

from mara_export import progress
from mara_export.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, tqdm: bool = True, quiet: bool = False) -> str:
    """What a build prints."""
    monkeypatch.setattr("sys.stderr", stream)  # in no fixture: pytest takes stderr for itself after those have run
    if tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setattr(progress, "tqdm", None)
    work = Progress(quiet=quiet)
    with work.stage("build"), work.phases() as tell:
        for name, done, count in (("parse", 0, 2), ("parse", 1, 2), ("time kernels", 0, 9)):
            tell(name, done, count)
    work.note("something to know")
    assert list(work.parts([1, 2])) == [1, 2]
    return stream.getvalue().replace("\r", "")


def test_a_terminal_without_tqdm_gets_a_line_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    *lines, last, note = shown(Terminal(), monkeypatch, tqdm=False).splitlines()
    assert [line.strip() for line in lines[:3]] == ["build …", "parse", "time kernels"]
    assert "build" in last
    assert last.endswith(" s")
    assert note == "  something to know"


def test_a_terminal_with_tqdm_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "time kernels" in shown(Terminal(), monkeypatch)


@pytest.mark.parametrize("tqdm", [True, False])
def test_a_file_gets_the_stage_alone(monkeypatch: pytest.MonkeyPatch, tqdm: bool) -> None:
    stage, note = shown(io.StringIO(), monkeypatch, tqdm=tqdm).splitlines()
    assert stage.split()[0] == "build"
    assert note == "  something to know"


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(Terminal(), monkeypatch, quiet=True) == ""
