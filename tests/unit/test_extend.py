"""Adding engines to a bundle: whatever happens on the way, the bundle is whole and no other file is left."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mara_export import folder as folder_module
from mara_export.folder import add_engines, staging_folder, whole_or_absent
from mara_runtime.bundle import Bundle
from mara_runtime.errors import MaraError
from mara_runtime.manifest import EngineFacts
from tests.unit import helpers, manifests


def facts(slots: int, target: str = "tensorrt", version: str = "11.1") -> EngineFacts:
    name = f"engines/{target}/step-{slots}.engine"
    said = manifests.engine_json(name, target=target, slots=slots, version=version, agent_widths=(8, 4))
    return EngineFacts(**said)


def stage(staged: Path, engines: Sequence[EngineFacts]) -> None:
    """Engines whose content says which they are."""
    for engine in engines:
        (staged / engine.file).parent.mkdir(parents=True, exist_ok=True)
        (staged / engine.file).write_text(f"{engine.target} {engine.slots} {engine.version}")


def add(bundle: Bundle, engines: Sequence[EngineFacts]) -> Bundle:
    """Build and add them."""
    with staging_folder(bundle, engines[0].target) as staged:
        stage(staged, engines)
        return add_engines(bundle, staged, engines)


def plain(engines: Sequence[EngineFacts]) -> list[EngineFacts]:
    """Engines without the checksum in the names of their files."""
    return [replace(e, file=f"engines/{e.target}/step-{e.slots}.engine") for e in engines]


def content(bundle: Bundle, slots: int) -> str:
    (engine,) = [e for e in bundle.manifest.engines if (e.target, e.slots) == ("tensorrt", slots)]
    return bundle.path(engine.file).read_text()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(helpers.make_bundle(tmp_path / "bundle"))


def entries(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_whole(folder: Path) -> Bundle:
    """Every file is as the manifest says, and there is no other."""
    bundle = Bundle.open(folder)
    assert entries(folder) == {*bundle.manifest.files, "manifest.json"}
    return bundle


def test_adds_engines_and_their_target(bundle: Bundle) -> None:
    stray = bundle.path("engines/tensorrt/step-64-0123.engine")  # what a killed build left behind
    stray.parent.mkdir(parents=True)
    stray.touch()
    extended = add(bundle, [facts(64), facts(128)])
    assert assert_whole(bundle.folder) == extended
    assert plain(extended.manifest.engines) == [facts(64), facts(128)]
    assert extended.manifest.targets == ("cpu", "tensorrt")
    assert content(extended, 128) == "tensorrt 128 11.1"
    assert {name: extended.manifest.files[name] for name in bundle.manifest.files} == bundle.manifest.files
    assert add(extended, [facts(64)]).manifest.files == extended.manifest.files  # the same again changes no file


def test_replaces_what_has_the_same_target_and_slots_and_nothing_else(bundle: Bundle) -> None:
    add(bundle, [facts(64), facts(128)])
    add(bundle, [facts(64, "tensorrt-rtx")])  # from the manifest of before, like a build that began at the same time
    again = replace(facts(64), decode_rows=7)
    after = add(bundle, [again])
    assert assert_whole(bundle.folder) == after
    assert plain(after.manifest.engines) == [facts(128), facts(64, "tensorrt-rtx"), again]
    assert content(after, 64) == "tensorrt 64 11.1"
    assert after.manifest.targets == ("cpu", "tensorrt", "tensorrt-rtx")


@pytest.mark.parametrize(
    "change",
    [{"version": "11.2"}, {"compute_capability": "8.9"}, {"platform": "linux-ppc64"}, {"agent_widths": (16, 4)}],
    ids=str,
)
def test_engines_of_another_release_gpu_system_or_width_of_agents_go_with_the_first_that_is_replaced(
    bundle: Bundle, change: dict[str, Any]
) -> None:
    """They could not run beside it, and an engine that does not fit refuses its target."""
    first = add(bundle, [facts(64), facts(128), facts(64, "tensorrt-rtx")])
    new = replace(facts(128), **change)
    second = add(first, [new])
    assert assert_whole(bundle.folder) == second
    assert plain(second.manifest.engines) == [facts(64, "tensorrt-rtx"), new]


def test_no_link_is_written_through(bundle: Bundle, tmp_path: Path) -> None:
    """As the Hub's cache lays out a bundle: what a build changes is a file of its own, and a link goes alone."""
    add(bundle, [facts(64)])
    blobs = {}
    for name in entries(bundle.folder):
        path, blob = bundle.path(name), tmp_path / f"blob {len(blobs)}"
        path.rename(blob)
        path.symlink_to(blob)
        blobs[blob] = blob.read_bytes()
    after = add(Bundle.open(bundle.folder), [replace(facts(64), decode_rows=7), facts(128)])
    assert assert_whole(bundle.folder) == after
    assert {blob: blob.read_bytes() for blob in blobs} == blobs


BEFORE = [facts(64, version="10.3"), facts(256)]
RENAMES = 3
"""Two engines and the manifest."""
first_or_again = pytest.mark.parametrize("before", [[], BEFORE], ids=["first", "again"])


@contextmanager
def at_each_rename(patch: pytest.MonkeyPatch, act: Callable[[int], None]) -> Iterator[None]:
    rename, count = Path.replace, 0

    def replace(path: Path, to: Path) -> Path:
        nonlocal count
        count += 1
        act(count - 1)
        return rename(path, to)

    with patch.context() as inner:
        inner.setattr(Path, "replace", replace)
        yield


@first_or_again
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", range(RENAMES + 1))
def test_after_a_failure_the_bundle_is_as_it_was(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, before: list[EngineFacts], error: type[BaseException], step: int
) -> None:
    def fail(count: int) -> None:
        if count >= step:
            raise error("the disk is full")

    bundle = add(bundle, before) if before else bundle
    with at_each_rename(monkeypatch, fail):
        if step < RENAMES:
            with pytest.raises((KeyboardInterrupt, MaraError), match="the disk is full"):
                add(bundle, [facts(64), facts(128)])
        else:
            add(bundle, [facts(64), facts(128)])
    assert (assert_whole(bundle.folder) == bundle) == (step < RENAMES)


@first_or_again
def test_at_no_moment_does_the_manifest_list_what_is_not_there(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[EngineFacts]
) -> None:
    # What a process that is killed leaves behind: nothing of ours runs after that.
    bundle = add(bundle, before) if before else bundle
    moments: list[Path] = []

    def keep(count: int) -> None:
        moments.append(Path(shutil.copytree(bundle.folder, tmp_path / f"moment {count}")))

    with at_each_rename(monkeypatch, keep):
        add(bundle, [facts(64), facts(128)])
    assert len(moments) == RENAMES
    assert all(Bundle.open(moment).manifest == bundle.manifest for moment in moments)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MaraError])
def test_a_build_that_fails_leaves_nothing(bundle: Bundle, error: type[BaseException]) -> None:
    def build() -> None:
        with staging_folder(bundle, "tensorrt") as staged:
            (staged / "step-64.engine").write_text("half an eng")
            raise error

    with pytest.raises(error):
        build()
    assert assert_whole(bundle.folder) == bundle


@pytest.mark.parametrize("when", ["before the build", "meanwhile"])
def test_a_folder_that_leads_out_of_the_bundle_is_refused(bundle: Bundle, tmp_path: Path, when: str) -> None:
    (tmp_path / "elsewhere").mkdir()

    def build() -> None:
        if when == "before the build":
            (bundle.folder / "engines").symlink_to(tmp_path / "elsewhere")
        with staging_folder(bundle, "tensorrt") as staged:
            assert when == "meanwhile"
            shutil.rmtree(bundle.folder / "engines")
            (bundle.folder / "engines").symlink_to(tmp_path / "elsewhere")
            stage(staged, [facts(64)])
            add_engines(bundle, staged, [facts(64)])

    with pytest.raises(MaraError, match="is a link out of the bundle"):
        build()
    assert entries(tmp_path / "elsewhere") == set()
    assert Bundle.open(bundle.folder) == bundle


# ── what cannot be written ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", ["a file is in the way", "nobody may write there"])
def test_where_no_engine_can_go_is_said_before_one_is_built(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "a file is in the way":
        (bundle.folder / "engines").touch()
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    before = sorted(bundle.folder.rglob("*"))
    with pytest.raises(MaraError, match=r"^cannot write .*engines"), staging_folder(bundle, "tensorrt"):
        pytest.fail("it went on")
    assert sorted(bundle.folder.rglob("*")) == before


ERRORS = [
    (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
    (PermissionError(errno.EACCES, "Permission denied", "{folder}/a-file", None, "{folder}/another"), True),
    (OSError(errno.EIO, "Input/output error", "/somewhere/else"), False),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), False),
    (OSError("a library's own"), False),
]


@pytest.mark.parametrize(("error", "ours"), ERRORS, ids=str)
@pytest.mark.parametrize("kind", ["staging_folder", "whole_or_absent"])
def test_errors_of_the_system_that_are_not_of_writing_there_pass(
    bundle: Bundle, tmp_path: Path, kind: str, error: OSError, ours: bool
) -> None:
    making = staging_folder(bundle, "tensorrt") if kind == "staging_folder" else whole_or_absent(tmp_path / "out")

    def fail() -> None:
        with making as folder:
            names = [n and n.format(folder=folder) for n in (error.filename, error.filename2)]
            raise type(error)(*error.args[:2], names[0], None, names[1]) if names[0] else error

    with pytest.raises((MaraError, OSError)) as caught:
        fail()
    assert isinstance(caught.value, MaraError) == ours
    assert not ours or str(caught.value).endswith(f": {error.strerror}")
    assert sorted(tmp_path.iterdir()) == [bundle.folder]
    assert assert_whole(bundle.folder) == bundle


# ── two at once ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_that_write_the_manifest_at_once_take_turns(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    write, writes, go_on = folder_module.write_manifest, threading.Event(), threading.Event()

    def slow_in_the_first(*args: Any) -> None:
        if threading.current_thread().name == "first":
            writes.set()
            assert go_on.wait(20)
        write(*args)

    monkeypatch.setattr(folder_module, "write_manifest", slow_in_the_first)
    first = threading.Thread(target=add, args=(bundle, [facts(64)]), name="first")
    second = threading.Thread(target=add, args=(bundle, [facts(64, "tensorrt-rtx")]))
    first.start()
    assert writes.wait(20)
    second.start()
    second.join(0.2)  # without a lock it would be done by then, and its entry lost
    go_on.set()
    first.join(20)
    second.join(20)
    assert plain(assert_whole(bundle.folder).manifest.engines) == [facts(64), facts(64, "tensorrt-rtx")]


def test_a_second_build_for_a_target_is_refused_at_its_start(bundle: Bundle) -> None:
    busy = pytest.raises(MaraError, match="another mara-build is adding engines for tensorrt to")
    with staging_folder(bundle, "tensorrt"), staging_folder(bundle, "tensorrt-rtx"), busy:
        add(bundle, [facts(64)])
    assert assert_whole(bundle.folder) == bundle
    assert [path.name for path in bundle.folder.iterdir() if path.is_dir()] == ["agents"]


@pytest.mark.parametrize("what", ["graph", "facts"])
def test_a_bundle_that_was_exported_anew_meanwhile_is_refused(bundle: Bundle, what: str) -> None:
    changed = {"graph": helpers.OTHER_GRAPH} if what == "graph" else {"max_context": 64}
    helpers.make_bundle(bundle.folder, **changed)  # type: ignore[arg-type]
    now = Bundle.open(bundle.folder)
    with pytest.raises(MaraError, match="was exported again while its engine was built"):
        add(bundle, [facts(64)])
    assert assert_whole(bundle.folder) == now


def test_a_bundle_that_has_gone_meanwhile(bundle: Bundle) -> None:
    def build() -> None:
        with staging_folder(bundle, "tensorrt") as staged:
            shutil.rmtree(bundle.folder)
            add_engines(bundle, staged, [facts(64)])

    with pytest.raises(MaraError, match=f"^cannot write {bundle.folder}: "):
        build()
    assert not os.path.lexists(bundle.folder)
