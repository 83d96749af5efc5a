"""Agents added to a bundle and removed from it, the gate aside: nothing else changes, and the bundle is always whole.

tests/export/test_agents.py adds real ones, with their gate.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mara_deploy.commands import agent as command
from mara_export import agents as agents_module
from mara_export.agents import NamedAgent, add_agent, remove_agent
from mara_export.errors import ModelError
from mara_runtime.bundle import Bundle
from mara_runtime.errors import BundleError, EngineError, MaraError, OptionError
from mara_runtime.signature import SIGNATURE_FILE
from tests.unit import helpers
from tests.unit.test_extend import add as add_engines
from tests.unit.test_extend import assert_whole, at_each_rename, entries, facts

FIRST = helpers.AGENT


@dataclass
class FileOnly:
    """An agent that can be saved, and nothing else."""

    content: bytes = helpers.agent_file([1.0, 2.0])
    hidden_size: int = 2
    widths: tuple[int, int] = (3, 2)
    fallback: str = "last"
    origin: None = None

    def save(self, path: Path) -> None:
        path.write_bytes(self.content)


def named(name: str = "polite", **changes: Any) -> NamedAgent:
    return NamedAgent(name, f"{name}.safetensors", FileOnly(**changes))  # type: ignore[arg-type]


def add(
    bundle: Bundle, name: str = "polite", *, replace: bool = False, default: bool = False, **changes: Any
) -> Bundle:
    return add_agent(bundle, named(name, **changes), gate=False, replace=replace, default=default)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(helpers.make_bundle(tmp_path / "bundle"))


def with_engine(bundle: Bundle, target: str = "tensorrt") -> Bundle:
    return Bundle.open(add_engines(bundle, [facts(64, target)]).folder)


def called(bundle: Bundle) -> list[str]:
    return [agent.name for agent in bundle.manifest.agents]


OTHER = helpers.agent_file([3.0, 4.0])
CHANGES: dict[str, Callable[[Bundle], Bundle]] = {
    "add": lambda bundle: add(bundle, "brief"),
    "replace": lambda bundle: add(bundle, replace=True, content=OTHER),
    "remove": lambda bundle: remove_agent(bundle, "polite"),
}
RENAMES = {"add": 2, "replace": 2, "remove": 1}
each_change = pytest.mark.parametrize("change", CHANGES)


def test_one_is_added_replaced_and_removed_and_nothing_else_changes(bundle: Bundle) -> None:
    before = with_engine(bundle)
    stays = {name: (before.path(name).read_bytes(), before.path(name).stat().st_ino) for name in before.manifest.files}
    polite = add(before)
    assert assert_whole(bundle.folder) == polite
    assert called(polite) == [FIRST, "polite"]
    added = polite.manifest.agents[1]
    assert (added.file, added.source, added.fallback) == ("agents/polite.safetensors", "polite.safetensors", "last")
    assert (added.parity, added.noise) == (None, None)
    assert called(add(polite, "brief", default=True)) == ["brief", FIRST, "polite"]
    other = add(polite, replace=True, content=OTHER)  # from a manifest of before, like one that began at the same time
    assert called(other) == ["brief", FIRST, "polite"]
    assert assert_whole(bundle.folder) == other
    assert other.path(other.manifest.agent("polite").file).read_bytes() == OTHER
    assert called(add(other, replace=True, default=True, content=OTHER)) == ["polite", "brief", FIRST]
    remove_agent(other, "polite")
    after = remove_agent(other, "brief")
    assert assert_whole(bundle.folder).manifest == before.manifest == after.manifest
    assert {name: (after.path(name).read_bytes(), after.path(name).stat().st_ino) for name in stays} == stays


def test_the_last_may_go_and_one_comes_back(bundle: Bundle) -> None:
    empty = remove_agent(bundle, FIRST)
    assert called(assert_whole(bundle.folder)) == []
    assert not (bundle.folder / "agents").exists()
    with pytest.raises(OptionError, match="NAME is 'agent'; the bundle has no agent"):
        remove_agent(empty, FIRST)
    assert called(add(empty)) == ["polite"]
    assert_whole(bundle.folder)


def test_a_file_that_the_manifest_does_not_list_stays(bundle: Bundle) -> None:
    mine = bundle.path("agents/mine.safetensors")
    mine.write_bytes(OTHER)
    for change in CHANGES.values():
        bundle = change(bundle if called(bundle)[1:] else add(bundle))
    assert mine.read_bytes() == OTHER


def test_an_engine_and_an_agent_that_are_added_meanwhile_stay(bundle: Bundle) -> None:
    with_engine(bundle)
    add(bundle)
    both = with_engine(bundle, "tensorrt-rtx")
    assert (called(both), len(both.manifest.engines)) == ([FIRST, "polite"], 2)
    assert assert_whole(bundle.folder) == both


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "changes", "kind", "named"),
    [
        (FIRST, {}, OptionError, "the bundle has an agent agent already: give --replace, or another --name"),
        ("polite", {"hidden_size": 3}, ModelError, "for a hidden size of 3; example/tiny has 2"),
        ("polite", {"widths": (2048, 2)}, EngineError, r"engines/tensorrt/step-64.*engine takes at most .*mara-build"),
        ("polite", {"widths": (3, 2048)}, EngineError, "hidden layers of 3 and 2048"),
    ],
)
def test_what_does_not_go_with_the_bundle(bundle: Bundle, name: str, changes: Any, kind: Any, named: str) -> None:
    before = with_engine(bundle)
    with pytest.raises(kind, match=named):
        add(before, name, **changes)
    assert assert_whole(bundle.folder) == before


@pytest.mark.parametrize("name", ["", "../up", "-x", "a b", "x" * 65, "a/b", "é"])
def test_names_that_no_agent_has(name: str) -> None:
    with pytest.raises(OptionError, match="an agent cannot be called"):
        named(name)


def test_the_gate_is_refused_where_no_cpu_computes_the_graph(bundle: Bundle) -> None:
    manifest = helpers.read_manifest(bundle.folder)
    manifest["step"].update(precision="bf16", cache="bfloat16", quantisation=None)
    helpers.write_manifest(bundle.folder, manifest)
    with pytest.raises(OptionError, match=r"computes in bfloat16.*--no-gate"):
        add_agent(Bundle.open(bundle.folder), named())


@pytest.mark.parametrize("way", ["a file is in the way", "nobody may write there", "a link leads out"])
def test_where_no_agent_can_go_is_said_before_its_gate(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    bundle = remove_agent(bundle, FIRST)
    if way == "a file is in the way":
        bundle.path("agents").touch()
    elif way == "a link leads out":
        bundle.path("agents").symlink_to(tmp_path)
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    monkeypatch.setattr(agents_module, "_gate", lambda *_: pytest.fail("it went on"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MaraError, match=r"^cannot write .*agents|agents is a link out of the bundle"):
        add_agent(bundle, named())
    assert sorted(tmp_path.rglob("*")) == before


# ── failures, and two at once ────────────────────────────────────────────────────────────────────────────────────────


@each_change
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_after_a_failure_the_bundle_is_as_it_was(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, change: str, error: type[BaseException]
) -> None:
    bundle = add(bundle)
    for step in range(RENAMES[change]):

        def fail(count: int, step: int = step) -> None:
            if count >= step:
                raise error("the disk is full")

        with (
            at_each_rename(monkeypatch, fail),
            pytest.raises((KeyboardInterrupt, MaraError), match="the disk is full"),
        ):
            CHANGES[change](bundle)
        assert assert_whole(bundle.folder) == bundle


@each_change
def test_at_no_moment_does_the_manifest_list_what_is_not_there(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    bundle, moments = add(bundle), list[Path]()
    with at_each_rename(
        monkeypatch, lambda n: moments.append(Path(shutil.copytree(bundle.folder, tmp_path / f"moment {n}")))
    ):
        CHANGES[change](bundle)
    assert len(moments) == RENAMES[change]
    assert all(Bundle.open(moment).manifest == bundle.manifest for moment in moments)


def test_two_that_are_checked_at_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are added; of two with one name the second is refused, and of two exports the agent goes with the first."""
    checked, go_on = threading.Barrier(2), threading.Event()

    def gate(_: object, named: NamedAgent, facts: Any, *__: object) -> Any:
        checked.wait(20)
        assert go_on.wait(20)
        return replace(facts, noise=0.5)

    monkeypatch.setattr(agents_module, "_gate", gate)
    first = threading.Thread(target=add_agent, args=(bundle, named("slow")))
    first.start()
    checked.wait(20)
    add(bundle, "quick")
    go_on.set()
    first.join(20)
    assert called(assert_whole(bundle.folder)) == [FIRST, "quick", "slow"]
    assert Bundle.open(bundle.folder).manifest.agent("slow").noise == 0.5

    def meanwhile(do: Callable[[], object]) -> None:
        monkeypatch.setattr(agents_module, "_gate", lambda _, __, facts, *___: do() and facts)
        add_agent(bundle, named("late"))

    with pytest.raises(OptionError, match="has an agent late already"):
        meanwhile(lambda: add(bundle, "late"))
    with pytest.raises(MaraError, match="was exported again while its agent was checked: add the agent again"):
        meanwhile(lambda: helpers.make_bundle(bundle.folder, graph=helpers.OTHER_GRAPH) and remove_agent_files(bundle))
    assert called(assert_whole(bundle.folder)) == [FIRST]


def remove_agent_files(bundle: Bundle) -> bool:
    """Those of a bundle that was there before."""
    for name in entries(bundle.folder) - {*Bundle.open(bundle.folder).manifest.files, "manifest.json"}:
        if not name.startswith(".new"):
            (bundle.folder / name).unlink()
    return True


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_lists_and_removes(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    training = {**helpers.TRAINING, "updates": 0}
    helpers.make_bundle(bundle.folder, agents={"polite": OTHER, "brief": OTHER}, training=training)
    bundle.path(f"agents/{FIRST}.safetensors").unlink()

    def run(*argv: str) -> str:
        assert command.main([argv[0], str(bundle.folder), *argv[1:]]) == 0
        out, err = capsys.readouterr()
        assert (err != "") == (argv[0] == "remove")
        return str(out + err)

    polite, brief = json.loads(run("list", "--json"))
    assert (polite["name"], polite["default"], polite["score"], polite["updates"]) == (
        *("polite", True, "scores:politeness", 0),
    )
    assert (brief["default"], brief["score"], brief["gate"]) == (False, None, "passed")
    assert [line.split()[0] for line in run("list").splitlines() if line[0] != " "] == ["polite", "brief"]
    assert "note: it has learned nothing" in run("list")
    bundle.path(SIGNATURE_FILE).touch()
    assert "mara-agent: the bundle's signature no longer holds: sign it again with mara-sign" in run("remove", "polite")
    assert called(Bundle.open(bundle.folder)) == ["brief"]
    run("remove", "brief")
    assert "add" in run("list")


@pytest.mark.parametrize("argv", [["--debug", "list", "nowhere"], ["list", "nowhere", "--debug"]])
def test_debug_may_stand_before_the_command(argv: list[str]) -> None:
    with pytest.raises(BundleError):
        command.main(argv)
