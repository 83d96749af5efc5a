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
    """Measures one more kernel per build. It refuses a cache of another GPU, and cannot read a damaged one."""

    def __init__(self) -> None:
        self.cache = Cache(b"")

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Cache | None:
        return None if serialized_timing_cache == b"damaged" else Cache(serialized_timing_cache)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        if cache.content == b"another GPU" and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache:
        return self.cache


def built(chosen: Path | None, at_the_end: Callable[[], object] = lambda: None) -> list[str]:
    """Build once. Returns what the user is told."""
    notes: list[str] = []
    config = Config()
    with timings.timing_cache(config, chosen, OWN, notes.append):
        config.cache.content += b"kernel "
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


def test_a_build_starts_from_the_timings_of_the_one_before(chosen: Path | None, own: Path) -> None:
    path = chosen or own
    assert built(chosen) + built(chosen) == []
    assert path.read_bytes() == b"kernel kernel "
    assert [p.name for p in path.parent.iterdir() if p.is_file()] == [path.name]
    path.unlink()
    with pytest.raises(ZeroDivisionError):  # a build that fails saves nothing
        built(chosen, lambda: 1 / 0)
    assert not path.exists()


@pytest.mark.parametrize("content", [b"damaged", b"another GPU"])
def test_a_cache_that_cannot_be_used_is_replaced(chosen: Path | None, own: Path, content: bytes) -> None:
    path = chosen or own
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    notes = built(chosen)
    assert path.read_bytes() == b"kernel "
    assert [f"--timing-cache: {path}" in note for note in notes] == [True] * (chosen is not None)


def test_a_cache_that_cannot_be_saved_costs_no_engine(chosen: Path | None, own: Path) -> None:
    path = chosen or own
    notes = built(chosen, lambda: path.mkdir(parents=True))
    assert [os.strerror(errno.EISDIR) in note for note in notes] == [True] * (chosen is not None)
    assert not list(path.parent.glob("*.part"))


def test_a_file_that_can_be_written_passes_and_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.timings"
    timings.check(path)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"kernel ")
    timings.check(path)
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], b"kernel ")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "is not a file"),
        ("nowhere/a.timings", os.strerror(errno.ENOENT)),
        ("a-file/a.timings", os.strerror(errno.ENOTDIR)),
        ("x" * 300, os.strerror(errno.ENAMETOOLONG)),
        ("a-file", os.strerror(errno.EACCES)),
        ("forbidden.timings", os.strerror(errno.EACCES)),
    ],
    ids=["a folder", "no folder", "below a file", "long", "file not writable", "folder not writable"],
)
def test_a_file_that_could_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    def forbidden(*_: object, **__: object) -> None:  # root may write everywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "a-file").touch()
    if says == os.strerror(errno.EACCES):
        of, function = (Path, "open") if name == "a-file" else (timings.tempfile, "NamedTemporaryFile")
        monkeypatch.setattr(of, function, forbidden)
    with pytest.raises(OptionError, match=f"^--timing-cache is .*{says}"):
        timings.check(tmp_path / name)
