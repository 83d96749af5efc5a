"""Adding engines to a bundle: whatever happens on the way, the bundle is whole and nothing else lies about."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mara_export.folder import additions, extend
from mara_runtime.bundle import Bundle
from mara_runtime.errors import MaraError
from mara_runtime.manifest import EngineFacts
from tests.unit import helpers


def facts(slots: int, target: str = "tensorrt", version: str = "11.1") -> EngineFacts:
    name = f"engines/{target}/step-{slots}.engine"
    return EngineFacts(**helpers.engine_json(name, target=target, slots=slots, version=version))


def add(bundle: Bundle, engines: Sequence[EngineFacts]) -> Bundle:
    """Engines whose content says which they are."""
    with additions(bundle) as staged:
        for engine in engines:
            (staged / engine.file).parent.mkdir(parents=True, exist_ok=True)
            (staged / engine.file).write_text(f"{engine.target} {engine.slots} {engine.version}")
        return extend(bundle, staged, engines)


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
    extended = add(bundle, [facts(64), facts(128)])
    assert assert_whole(bundle.folder) == extended
    assert extended.manifest.engines == (facts(64), facts(128))
    assert extended.manifest.targets == ("cpu", "tensorrt")
    assert extended.path("engines/tensorrt/step-128.engine").read_text() == "tensorrt 128 11.1"
    assert {name: extended.manifest.files[name] for name in bundle.manifest.files} == bundle.manifest.files


def test_replaces_what_has_the_same_target_and_slots_and_nothing_else(bundle: Bundle) -> None:
    first = add(bundle, [facts(64), facts(128), facts(64, "tensorrt-rtx")])
    again = replace(facts(64), decode_rows=7)
    second = add(first, [again])
    assert assert_whole(bundle.folder) == second
    assert second.manifest.engines == (facts(128), facts(64, "tensorrt-rtx"), again)
    assert second.path("engines/tensorrt/step-64.engine").read_text() == "tensorrt 64 11.1"
    assert second.manifest.targets == ("cpu", "tensorrt", "tensorrt-rtx")


def test_engines_of_another_release_go_with_the_first_that_is_replaced(bundle: Bundle) -> None:
    """They could not run beside it, and an engine that does not fit refuses its target."""
    first = add(bundle, [facts(64), facts(128), facts(64, "tensorrt-rtx")])
    second = add(first, [facts(128, version="11.2")])
    assert assert_whole(bundle.folder) == second
    assert second.manifest.engines == (facts(64, "tensorrt-rtx"), facts(128, version="11.2"))


def test_the_file_of_a_replaced_engine_goes_when_it_has_another_name(bundle: Bundle) -> None:
    old = EngineFacts(**helpers.engine_json("engines/tensorrt/by-hand.engine", slots=64))
    assert add(add(bundle, [old]), [facts(64)]).manifest.engines == (facts(64),)
    assert_whole(bundle.folder)


@pytest.mark.parametrize("before", [[], [facts(64, version="10.3"), facts(256)]], ids=["first", "again"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", range(5))
def test_a_failure_leaves_a_whole_bundle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, before: list[EngineFacts], error: type[BaseException], step: int
) -> None:
    bundle = add(bundle, before)
    with monkeypatch.context() as patch:
        _at_each_rename(patch, lambda count: _fail(error) if count == step else None)
        try:
            add(bundle, [facts(64), facts(128)])
        except (KeyboardInterrupt, MaraError):
            failed = True
        else:
            failed = False  # there are fewer renames than that
    renames = 3 + bool(before)  # two engines and the manifest; where one is replaced, the manifest without it first
    assert failed == (step < renames)
    engines = assert_whole(bundle.folder).manifest.engines
    assert not failed or all(engine in before for engine in engines)
    assert facts(256) in engines or facts(256) not in before


@pytest.mark.parametrize("before", [[], [facts(64, version="10.3"), facts(256)]], ids=["first", "again"])
def test_at_no_moment_does_the_manifest_list_what_is_not_there(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[EngineFacts]
) -> None:
    # What a process that is killed leaves behind: nothing of ours runs after that.
    bundle = add(bundle, before)
    moments: list[Path] = []
    with monkeypatch.context() as patch:

        def keep(count: int) -> None:
            moments.append(Path(shutil.copytree(bundle.folder, tmp_path / f"moment {count}")))

        _at_each_rename(patch, keep)
        add(bundle, [facts(64), facts(128)])
    assert len(moments) >= 3
    for moment in moments:
        Bundle.open(moment)


def _fail(error: type[BaseException]) -> None:
    raise error("the disk is full")


def _at_each_rename(patch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    rename, count = Path.replace, 0

    def replace(path: Path, to: Path) -> Path:
        nonlocal count
        act(count)
        count += 1
        return rename(path, to)

    patch.setattr(Path, "replace", replace)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MaraError])
def test_a_build_that_fails_leaves_nothing(bundle: Bundle, error: type[BaseException]) -> None:
    def build() -> None:
        with additions(bundle) as staged:
            (staged / "step-64.engine").write_text("half an eng")
            raise error

    with pytest.raises(error):
        build()
    assert assert_whole(bundle.folder) == bundle


def test_a_folder_that_leads_out_of_the_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle.folder / "engines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MaraError, match="is a link out of the bundle"):
        add(bundle, [facts(64)])
    assert entries(tmp_path / "elsewhere") == set()
    assert Bundle.open(bundle.folder) == bundle
