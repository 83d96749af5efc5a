"""Killed before any change that it makes to the file system, an export or a build leaves no half state; the next one
works, and removes what is left."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mara_export.folder import claimed, whole_or_absent, working_folder
from mara_export.progress import Progress
from mara_export.stages import work_folder
from mara_runtime.bundle import Bundle
from tests.fork import killed_before
from tests.unit import helpers, test_bundle_agents
from tests.unit.test_bundle_agents import CHANGES
from tests.unit.test_extend import BEFORE, add, assert_whole, facts

pytestmark = pytest.mark.slow
QUIET = Progress(quiet=True)


@pytest.mark.parametrize("is_mount", [False, True])
def test_a_killed_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mount: bool) -> None:
    """In a mount point, where the files arrive one by one, the manifest says whether all are there."""
    root, made = tmp_path / "new", helpers.make_bundle(tmp_path / "made")
    out = root / "out"
    if is_mount:
        out.mkdir(parents=True)
        monkeypatch.setattr(Path, "is_mount", lambda path: path == out)

    def export() -> None:
        with claimed(out), working_folder(out) as trace:
            (trace / "weights").write_text("w")
            with whole_or_absent(out) as folder:
                for name in (*Bundle.open(made).manifest.files, "manifest.json"):
                    (folder / name).parent.mkdir(exist_ok=True)
                    (folder / name).write_bytes((made / name).read_bytes())

    for change in count(1):
        killed = killed_before(change, export)
        if (out / "manifest.json").exists():
            Bundle.open(out)
        else:
            assert killed
            if is_mount:
                for path in [path for path in out.iterdir() if not path.name.startswith(".")]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()  # what arrived is not ours to remove
            export()
            assert assert_whole(out)
        assert {path.name for path in root.iterdir()} <= {"out", ".out.lock"} or killed
        if not killed:
            break
        shutil.rmtree(out)
        if is_mount:
            out.mkdir()
    assert change > 15


def test_a_killed_export_with_a_work_folder(tmp_path: Path) -> None:
    """What is finished is whole and not done again."""
    root = tmp_path / "new"
    out, work = tmp_path / "out", root / "work"
    done: list[str] = []

    def numbers(folder: Path) -> tuple[list[int], dict[str, NDArray[np.float32]]]:
        done.append("numbers")
        (folder / "file").write_text("f")
        return [1, 2], {"half": np.full(1000, 0.5, np.float32)}

    def graph(folder: Path) -> tuple[None, dict[str, NDArray[np.float32]]]:
        done.append("graph")
        (folder / "step.onnx").write_text("g")
        return None, {}

    def export() -> None:
        with work_folder(work, []) as stages:
            stages.begin({"model": "m"})
            folder, facts, arrays = stages.run("numbers", "numbers", numbers, QUIET)
            assert (facts, arrays["half"].sum(), (folder / "file").read_text()) == ([1, 2], 500, "f")
            stages.write(out, "graph", "graph", graph, QUIET)
            assert (out / "step.onnx").read_text() == "g"
            stages.clear()

    for change in count(1):
        out.mkdir()
        killed = killed_before(change, export)
        shutil.rmtree(out)
        out.mkdir()
        finished = {path.name for path in work.glob("[!.]*") if path.is_dir()}
        done.clear()
        export()
        assert not finished & {*done}
        assert [*root.rglob("*")] in ([], [work])
        shutil.rmtree(out)
        shutil.rmtree(root, ignore_errors=True)
        if not killed:
            break
    assert change > 25


@pytest.mark.parametrize("before", [[], BEFORE], ids=["first", "again"])
def test_a_killed_build(tmp_path: Path, before: list[object]) -> None:
    fresh = Bundle.open(helpers.make_bundle(tmp_path / "fresh"))
    fresh = add(fresh, before) if before else fresh
    for change in count(1):
        folder = Path(shutil.copytree(fresh.folder, tmp_path / f"{change}"))
        bundle = Bundle.open(folder)
        killed = killed_before(change, lambda bundle=bundle: add(bundle, [facts(64), facts(128)]))
        assert len(Bundle.open(folder).manifest.engines) in (len(before), 2, 3)
        add(Bundle.open(folder), [facts(64), facts(128)])
        assert_whole(folder)
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
        if not killed:
            break
        shutil.rmtree(folder)
    assert change > 10


@pytest.mark.parametrize("change", CHANGES)
def test_a_killed_change_of_agents(tmp_path: Path, change: str) -> None:
    """The agents are those before or those after it; whoever adds that agent then has a whole bundle."""
    fresh = test_bundle_agents.add(Bundle.open(helpers.make_bundle(tmp_path / "fresh")))
    done = CHANGES[change](Bundle.open(Path(shutil.copytree(fresh.folder, tmp_path / "done"))))
    for moment in count(1):
        folder = Path(shutil.copytree(fresh.folder, tmp_path / f"{moment}"))
        bundle = Bundle.open(folder)
        killed = killed_before(moment, lambda bundle=bundle: CHANGES[change](bundle))
        now = Bundle.open(folder)
        assert now.manifest in (fresh.manifest, done.manifest)
        if killed:
            test_bundle_agents.add(now, "brief" if change == "add" else "polite", replace=True)
        assert_whole(folder)
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
        if not killed:
            break
        shutil.rmtree(folder)
    assert moment > (3 if change == "remove" else 8)
