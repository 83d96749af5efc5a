"""An export with --work that was interrupted goes on from its finished stages, and makes the same bundles."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mara_deploy.agent import untrained
from mara_export import export as export_module
from mara_export import parity, tracing
from mara_export.export import export, export_all
from mara_export.graph import pipeline
from mara_export.hf.sources import ModelSource, resolve_model
from mara_export.options import ExportOptions
from mara_export.parity import structure
from mara_export.stages import work_folder
from mara_runtime.bundle import Bundle
from mara_runtime.errors import MaraError
from tests.checkpoints import named
from tests.export.test_export import contents

ROOT = Path(__file__).parents[2]
OPTIONS = ExportOptions(max_context=64, max_candidates=8, gate=False)
GATED = [replace(OPTIONS, gate=True, precision="int8"), replace(OPTIONS, gate=True, precision="fp16")]


class Work:
    """What is done in earnest, in order; before `stop`, the export is interrupted instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.stop = ""
        monkeypatch.setattr(structure, "_passed", {})  # as in a new process
        for module, function, name in (
            (structure, "judge", lambda *_: "structure"),
            (parity, "run_reference", lambda *_: "reference"),
            (tracing, "trace_llm", lambda *_: "trace"),
            (pipeline, "write", lambda _, options, *__: f"graph {options.precision}"),
            (export_module, "_check_parity", lambda _, __, options, ___: f"gate {options.precision}"),
        ):
            monkeypatch.setattr(module, function, self._watched(getattr(module, function), name))

    def _watched(self, function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            if (what := name(*args)) == self.stop:
                raise KeyboardInterrupt
            if what != "graph fp32":  # the miniature's
                self.done.append(what)
            return function(*args)

        return watched


@pytest.fixture
def source(checkpoint) -> ModelSource:
    return resolve_model(str(checkpoint("qwen2")))


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


@pytest.fixture
def begun(source, agent, works, tmp_path) -> Path:
    """The work folder of an export that was interrupted when the model had been traced."""
    works.stop = "graph fp32"
    with pytest.raises(KeyboardInterrupt):
        export(source, named(agent("qwen2")), tmp_path / "out", OPTIONS, work=tmp_path / "work")
    assert works.done == ["trace"]
    assert not (tmp_path / "out").exists()
    works.stop, works.done = "", []
    return tmp_path / "work"


def test_what_is_finished_is_not_done_again(source, agent, works, tmp_path) -> None:
    """Interrupted before each stage in turn: each run does one stage more. A gate is repeated."""
    names = [options.precision for options in GATED]
    stages = ["structure", "reference", "trace", "graph int8", "gate int8", "graph fp16", "gate fp16"]

    def run(folder: str, **work: Path) -> list[str]:
        works.done = []
        structure._passed.clear()
        pairs = [(options, tmp_path / folder / options.precision) for options in GATED]
        made = export_all(source, named(agent("qwen2")), pairs, **work)
        assert [bundle.folder for bundle in made] == [out for _, out in pairs]
        return works.done

    assert run("whole") == stages
    for before, works.stop in zip(["", *stages], stages, strict=False):
        with pytest.raises(KeyboardInterrupt):
            run("out", work=tmp_path / "work")
        assert works.done == ([before] if before else [])
    assert [path.name for path in (tmp_path / "out").iterdir()] == names[:1]
    works.stop = ""
    assert run("out", work=tmp_path / "work") == ["gate fp16"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)


KILLED = """
import os, signal, sys
from mara_deploy.commands.export import main

def hook(event, args):
    if event == "open" and str(args[0]).endswith("step.onnx") and "w" in str(args[1]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
main(sys.argv[1:])
"""


def test_a_graph_that_is_half_written_is_none(checkpoint, agent_file, command, works, tmp_path) -> None:
    """A process is killed when the weights of its graph are on disk, and the graph is not."""
    work, out = tmp_path / "work", tmp_path / "out"
    options = ["--no-gate", "--max-context", 64, "--max-candidates", 8]
    given = ["--model", checkpoint("qwen2"), "--agent", agent_file("qwen2"), *options]
    folders = [*given, "--out", out, "--work", work]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "export", ROOT / "runtime")))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, folders)],
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL
    (half,) = work.glob(".graph-*.partial")
    assert (half / "step.onnx.data").stat().st_size
    assert [path.name for path in work.iterdir() if not path.name.startswith(".")].count("trace") == 1
    again = command("export", *folders)
    assert again.code == 0
    assert [line.split()[-2:] for line in again.err.splitlines() if "trace" in line] == [["from", str(work)]]
    assert works.done == []
    assert command("export", *given, "--out", tmp_path / "whole", "--quiet").code == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


# --- whose folder it is ----------------------------------------------------------------------------------------------


def test_another_export_is_refused_by_what_differs(begun, source, agent, works, tmp_path, monkeypatch) -> None:
    before = contents(begun)
    weights, settings = (Path(shutil.copytree(source.folder, tmp_path / name)) for name in ("weights", "settings"))
    (file,) = weights.glob("*.safetensors")
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    (settings / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    ours = {"source": source, "agents": named(agent("qwen2")), "options": OPTIONS}

    for name, given in (
        ("agents", {"agents": named(untrained(64, 0))}),
        ("agents", {"agents": []}),
        ("weights", {"source": replace(source, folder=weights)}),
        ("generation_config.json", {"source": replace(source, folder=settings)}),
        ("model", {"source": replace(source, name="other")}),
        ("revision", {"source": replace(source, revision="1")}),
        ("max_context", {"options": replace(OPTIONS, max_context=63)}),
        ("max_candidates", {"options": replace(OPTIONS, max_candidates=9)}),
    ):
        asked = {**ours, **given}
        with pytest.raises(MaraError, match=f"holds another export: {name} was .* choose another --work, or remove /"):
            export(asked["source"], asked["agents"], tmp_path / "out", asked["options"], work=begun)
    monkeypatch.setattr(tracing, "installed", lambda *_: {"torch": "9.9"})
    with pytest.raises(MaraError, match=r"torch was .*, and is 9\.9 now"):
        export(**ours, out=tmp_path / "out", work=begun)
    assert contents(begun) == before
    assert works.done == []
    assert not (tmp_path / "out").exists()


def test_other_graphs_of_the_same_trace_go_on_from_it(begun, source, agent, works, tmp_path) -> None:
    changed = replace(OPTIONS, precision="int4", eos=("<pad>",))
    made = export(source, named(agent("qwen2")), tmp_path / "out", changed, work=begun)
    assert works.done == ["graph int4"]
    assert made.manifest.step.precision == "int4"
    assert not begun.exists()


def test_a_bundle_with_other_options_is_none_of_this_export(source, agent, works, tmp_path) -> None:
    out, other, work = tmp_path / "out", tmp_path / "other", tmp_path / "work"
    options = replace(OPTIONS, precision="int8")
    works.stop = "graph fp32"
    with pytest.raises(KeyboardInterrupt):
        export_all(source, [], [(options, out), (OPTIONS, other)], work=work)
    before, works.stop = contents(out), ""
    pairs = [(replace(each, eos=("<pad>",)), where) for each, where in ((options, out), (OPTIONS, other))]
    with pytest.raises(MaraError, match="out exists already"):
        export_all(source, [], pairs, work=work)
    assert contents(out) == before


@pytest.mark.parametrize(
    "file", ["mara-export.json", "trace/files.json", "trace/facts.json", "trace/arrays.npz", "trace/model.onnx"]
)
def test_a_damaged_file_is_named(begun, source, agent, tmp_path, file) -> None:
    damaged = begun / file
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.raises(MaraError, match=f"^{damaged} is damaged: remove {begun}, and export again$"):
        export(source, named(agent("qwen2")), tmp_path / "out", OPTIONS, work=begun)
    assert not (tmp_path / "out").exists()


def test_a_graph_with_a_changed_byte_is_damaged(source, works, tmp_path) -> None:
    work = tmp_path / "work"
    works.stop = "gate fp32"
    with pytest.raises(KeyboardInterrupt):
        export(source, [], tmp_path / "out", replace(OPTIONS, gate=True), work=work)
    (data,) = work.glob("graph-*/step.onnx.data")
    with data.open("rb+") as file:
        file.write(b"?")
    works.stop = ""
    with pytest.raises(MaraError, match=f"^{data} is damaged: remove {work}"):
        export(source, [], tmp_path / "out", replace(OPTIONS, gate=True), work=work)


def test_one_export_at_a_time_uses_it(begun, source, agent, tmp_path, command, checkpoint, agent_file) -> None:
    given = ["--model", checkpoint("qwen2"), "--agent", agent_file("qwen2"), "--out", tmp_path / "out"]
    with work_folder(begun, []):
        line = command("export", *given, "--work", begun).refusal("mara-export")
    assert line == f"another export is using {begun}: wait until it has ended, or choose another --work"


def test_a_folder_of_something_else_is_left_alone(tmp_path, command, checkpoint) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("data")
    (tmp_path / "file").write_text("data")
    before = sorted(tmp_path.rglob("*"))
    for work, out, message in (
        ("full", "out", "full is not empty and not a work folder: choose another --work"),
        ("file", "out", "file is not empty and not a work folder: choose another --work"),
        ("file/below", "out", "cannot write"),
        ("out", "out", "choose folders that lie side by side"),
        ("out/work", "out", "choose folders that lie side by side"),
        ("work", "work/out", "choose folders that lie side by side"),
        ("new/work", "full", "full exists already and is not an empty folder"),
    ):
        given = ["--model", checkpoint("qwen2"), "--out", tmp_path / out, "--work", tmp_path / work]
        assert message in command("export", *given).refusal("mara-export")
    failing = ["--model", checkpoint("qwen2"), "--out", tmp_path / "out", "--work", tmp_path / "new" / "work"]
    assert "--eos" in command("export", *failing, "--eos", "<nothing>").refusal("mara-export")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_of_the_user_stays_and_is_emptied(source, works, tmp_path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    works.stop = "graph fp32"
    with pytest.raises(KeyboardInterrupt):
        export(source, [], tmp_path / "out", OPTIONS, work=work)
    works.stop = ""
    (work / "notes").write_text("of the user")
    Bundle.open(export(source, [], tmp_path / "out", OPTIONS, work=work).folder)
    assert [path.name for path in work.iterdir()] == ["notes"]


def test_graphs_are_copied_to_another_disk(source, tmp_path, monkeypatch) -> None:
    """Or where the file system has no links."""

    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    export(source, [], tmp_path / "out", OPTIONS, work=tmp_path / "work")
    Bundle.open(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert not any(tmp_path.iterdir())
