"""Files, errors and versions: atomic writes, one run per folder, what is shown of other libraries' errors."""

from __future__ import annotations

import fcntl
import os
from importlib.metadata import version
from pathlib import Path

import pytest

from mara_deploy.files import fingerprint, run_lock, write_file
from mara_export.folder import claimed, destination, whole_or_absent, working_folder
from mara_runtime.errors import MaraError, first_line
from mara_runtime.files import locked, write_atomic
from mara_runtime.versions import installed


@pytest.mark.parametrize("content", [b"new", "new", lambda path: path.write_text("new")], ids=["bytes", "text", "call"])
def test_a_file_is_replaced_with_the_permissions_of_the_umask(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o600)
    before = os.umask(0o027)
    try:
        write_atomic(path, content)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fails(partial: Path) -> None:
        assert partial.parent == tmp_path
        partial.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(MaraError, match=rf"cannot write {path}: No space left on device$"):
        write_file(path, fails)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(MaraError, match="cannot write"):
        write_file(path / "b.txt", "text")


def test_one_run_at_a_time_uses_a_folder(tmp_path):
    folder = tmp_path / "new" / "folder"
    with run_lock(folder), pytest.raises(MaraError, match=f"another run is using {folder}"), run_lock(folder):
        pass
    with run_lock(folder):
        assert list(folder.iterdir()) == []


def test_a_fingerprint_changes_with_weights_and_configuration(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text("a")
    first = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("b")
    assert fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_text("b")
    assert fingerprint(tmp_path) != first


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  what is wrong\nand a page about it"), "what is wrong"),
        (EOFError(), "EOFError"),
        (RuntimeError("Error in loading:\n\n\tsizes differ\nand more"), "Error in loading: sizes differ"),
        (RuntimeError("Error in loading:\n"), "Error in loading:"),
        (RuntimeError("a" * 200 + "b" * 9000 + "c" * 200), "a" * 200 + " … " + "c" * 200),
    ],
)
def test_the_first_line_of_an_error(error, line):
    assert first_line(error) == line


def test_versions_of_packages_that_are_not_installed_are_left_out():
    found = installed("onnxruntime", "no-such-package", "numpy")
    assert list(found.items()) == [("onnxruntime", version("onnxruntime")), ("numpy", version("numpy"))]


def test_what_a_killed_export_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    """But nothing that a running one is writing, and nothing of another destination."""
    abandoned, running = tmp_path / ".out.ab.partial", tmp_path / ".out.cd.partial"
    other = tmp_path / ".out.b.ab.partial"
    for folder in (abandoned, running, other):
        (folder / "engines").mkdir(parents=True)
    with locked(running, wait=False), working_folder(tmp_path / "out") as mine:
        assert sorted(tmp_path.iterdir()) == sorted([mine, running, other])
        with working_folder(tmp_path / "out"):
            assert mine.is_dir()
    assert sorted(tmp_path.iterdir()) == sorted([running, other])


def test_one_export_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".out.lock").mkdir()  # of a process that was killed
    with claimed(out), claimed(out.with_name("other")):
        for again in (out, tmp_path / "new" / "x" / ".." / "out"):
            with pytest.raises(MaraError, match=r"^another export is writing .*new/out: "), claimed(again):
                pass
        with whole_or_absent(out):
            pass
    assert list((tmp_path / "new").iterdir()) == [out]
    with claimed(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def test_a_lock_on_a_folder_that_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, real = tmp_path / ".out.lock", fcntl.flock

    def removed_meanwhile(handle: int, how: int) -> None:
        real(handle, how)
        monkeypatch.setattr(fcntl, "flock", real)
        lock.rmdir()

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with claimed(tmp_path / "out"), pytest.raises(MaraError, match="another export"), claimed(tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    ("given", "found"),
    [
        *(("a/x/../b", "a/b"), ("a/..", "."), ("link/../b", "elsewhere/b"), ("a//./b", "a/b")),
        *(("a/../link", "elsewhere/deep"), ("dangling", "nowhere")),
    ],
)
def test_where_a_path_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, found: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert destination(Path(given)) == tmp_path / found


@pytest.mark.parametrize("kind", ["mount point", "working directory"])
def test_what_cannot_be_replaced_is_filled_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The manifest comes last, and a failure leaves it empty."""
    out = tmp_path / "volume"
    (out / "lost+found").mkdir(parents=True)
    if kind == "mount point":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    else:
        monkeypatch.chdir(out)
    with pytest.raises(MaraError), whole_or_absent(out) as folder:
        (folder / "a.onnx").rename(folder / "b.onnx")
    assert [path.name for path in out.iterdir()] == ["lost+found"]
    arrived: list[str] = []
    replaced = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: arrived.append(path.name) or replaced(path, to))
    with working_folder(out), whole_or_absent(out) as folder:  # the trace lies there, too
        for name in ("a.onnx", "manifest.json", "tokenizer.json"):
            (folder / name).touch()
    assert arrived[-1] == "manifest.json"
    assert {path.name for path in out.iterdir()} == {"lost+found", "a.onnx", "manifest.json", "tokenizer.json"}
    assert list(tmp_path.iterdir()) == [out]
