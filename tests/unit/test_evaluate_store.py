"""Answers and scores are kept: what an interruption leaves is taken up, what other settings made is refused."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from mara_deploy.evaluate.store import Store
from mara_deploy.files import fingerprint, write_text
from mara_runtime.errors import MaraError

SETTINGS = {"seed": 0, "stop": ["a"], "bundle": "0123", "limit": None}


def filled(path: Path) -> bytes:
    with Store(path, SETTINGS) as store:
        store.keep({"one": {"text": "ä\n\u2028"}})
        store.keep({"two": 0.1 + 0.2})
    return path.read_bytes()


def test_what_was_kept_is_there_again(tmp_path):
    path = tmp_path / "new" / "folder" / "a.jsonl"
    before = filled(path)
    with Store(path, dict(reversed(SETTINGS.items()))) as store:
        assert "one" in store
        assert "three" not in store
        assert store["one"] == {"text": "ä\n\u2028"}
        assert store["two"] == 0.1 + 0.2
    assert path.read_bytes() == before


def test_what_is_kept_together_is_written_at_once(tmp_path):
    """Scores of one batch: a part of them would be made again in another batch, and differ in their last bits."""
    written = []
    with Store(tmp_path / "a.jsonl", SETTINGS) as store:
        real = store._file
        store._file = SimpleNamespace(write=lambda data: written.append(data), flush=lambda: None, close=real.close)
        store.keep({"one": 1.0, "two": 2.0})
    assert [data.count(b"\n") for data in written] == [2]


def test_whatever_an_interruption_leaves_is_a_store(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = filled(path)
    ends = [i for i, byte in enumerate(whole, 1) if byte == ord("\n")]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with Store(path, SETTINGS) as store:
            assert [key in store for key in ("one", "two")] == [length >= ends[1], length >= ends[2]]
            store.keep({"two": 0.1 + 0.2})
            if length < ends[1]:
                store.keep({"one": {"text": "ä\n\u2028"}})
        with Store(path, SETTINGS) as store:
            assert (store["one"], store["two"]) == ({"text": "ä\n\u2028"}, 0.1 + 0.2)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"seed": 1}, "was made with seed 0, now it is 1"),
        ({"stop": ["b"]}, 'was made with stop ["a"], now it is ["b"]'),
        ({"new": True}, "was made with new null, now it is true"),
        ({"bundle": "x" * 200}, 'was made with bundle "0123", now it is "xxx'),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, changed, line):
    path = tmp_path / "a.jsonl"
    before = filled(path)
    with pytest.raises(MaraError) as caught:
        Store(path, {**SETTINGS, **changed})
    assert line in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))
    assert path.read_bytes() == before


def test_a_setting_that_is_gone_is_refused(tmp_path):
    filled(tmp_path / "a.jsonl")
    with pytest.raises(MaraError, match="was made with seed 0, now it is null"):
        Store(tmp_path / "a.jsonl", {name: value for name, value in SETTINGS.items() if name != "seed"})


@pytest.mark.parametrize("line", ["not json", "[]", "3", '{"key": "one"}', "null"])
@pytest.mark.parametrize("number", [1, 2])
def test_damage_is_named_by_its_line(tmp_path, number, line):
    path = tmp_path / "a.jsonl"
    lines = filled(path).decode().split("\n")
    lines[number - 1] = line
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(MaraError, match=f"line {number}, is damaged"):
        Store(path, SETTINGS)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MaraError, match="cannot write"):
        Store(tmp_path / "file" / "a.jsonl", SETTINGS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_one_line(tmp_path):
    store = Store(tmp_path / "a.jsonl", SETTINGS)
    store._file.close()
    store._file = Path("/dev/full").open("ab")  # noqa: SIM115 - the store closes it
    with store, pytest.raises(MaraError, match=r"cannot write .*: No space left on device"):
        store.keep({"one": "text"})


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "one")
    assert path.read_text() == "one"

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MaraError, match=r"cannot write .*: No space left on device"):
        write_text(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_fingerprint_changes_with_weights_and_configuration(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text("a")
    first = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("b")
    assert fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_text("b")
    assert fingerprint(tmp_path) != first
