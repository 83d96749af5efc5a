"""The timing cache, with a builder's configuration of a few lines in the place of TensorRT's."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mara_export.tensorrt import timings
from mara_runtime import files
from mara_runtime.errors import OptionError

OWN = "tensorrt-10.16.timings"


class Cache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class Config:
    """Measures one more kernel a build. It refuses what is of another GPU, and cannot read what is damaged."""

    def __init__(self) -> None:
        self.cache = Cache(b"")

    def create_timing_cache(self, content: bytes) -> Cache | None:
        return None if content == b"damaged" else Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        if cache.content == b"another GPU" and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache:
        return self.cache

    def build(self) -> None:
        self.cache.content += b"kernel "


def built(chosen: Path | None, at_the_end: Callable[[], object] = lambda: None) -> list[str]:
    """Build once. Returns what the user is told."""
    notes: list[str] = []
    config = Config()
    with timings.timing_cache(config, chosen, OWN, notes.append):
        config.build()
        at_the_end()
    return notes


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return files.cache_folder() / OWN


@pytest.fixture(params=["chosen", "own"])
def chosen(request: pytest.FixtureRequest, tmp_path: Path, own: Path) -> Path | None:
    return tmp_path / "chosen.timings" if request.param == "chosen" else None


def test_a_build_goes_on_from_the_one_before(chosen: Path | None, own: Path) -> None:
    assert built(chosen) + built(chosen) == []
    path = chosen or own
    assert path.read_bytes() == b"kernel kernel "
    assert [p.name for p in path.parent.iterdir() if p.is_file()] == [path.name]


@pytest.mark.parametrize("content", [b"damaged", b"another GPU"])
def test_what_is_of_no_use_is_started_anew(chosen: Path | None, own: Path, content: bytes) -> None:
    path = chosen or own
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    notes = built(chosen)
    assert path.read_bytes() == b"kernel "
    if chosen is None:
        assert notes == []
    else:
        assert notes == [f"--timing-cache: {path} is damaged, or from another GPU or TensorRT; starting an empty one"]


def test_a_build_that_fails_keeps_nothing(chosen: Path | None, own: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        built(chosen, lambda: 1 / 0)
    assert not (chosen or own).exists()


def test_a_file_that_cannot_be_written_in_the_end_costs_no_engine(chosen: Path | None, own: Path) -> None:
    path = chosen or own
    notes = built(chosen, lambda: path.mkdir(parents=True))
    if chosen is None:
        assert notes == []
    else:
        assert notes == [
            f"--timing-cache: {path} cannot be written ({os.strerror(errno.EISDIR)}); the next build measures again"
        ]
        assert not list(path.parent.glob("*.part"))


def test_a_file_that_can_be_written_passes_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.timings"
    timings.check(path)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"kernel ")
    timings.check(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"kernel "


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "is not a file"),
        ("nowhere/a.timings", "cannot be written: No such file or directory"),
        ("a-file/a.timings", "cannot be written: Not a directory"),
        ("x" * 300, "cannot be written: File name too long"),
    ],
    ids=["a folder", "no folder", "below a file", "long"],
)
def test_a_file_that_could_not_be_written_is_refused(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(OptionError, match=f"^--timing-cache is .*{says}"):
        timings.check(tmp_path / name)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_the_user_may_not_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    path = tmp_path / "a.timings"
    path.touch()

    def forbidden(*_: object, **__: object) -> None:  # root may write everywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(*((Path, "open") if what == "file" else (timings.tempfile, "NamedTemporaryFile")), forbidden)
    with pytest.raises(OptionError, match="cannot be written: Permission denied"):
        timings.check(path)
