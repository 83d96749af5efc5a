"""Models, agents, bundles and prompts that cannot be used: exit code 2, one line that names the fault, nothing left.

Refusals of options are in tests/unit/test_refusals.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from mara_deploy import agent as agents
from mara_export.graph.trace import trace_agent
from mara_export.hf import sources
from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.errors import MaraError, NumericsError
from tests import checkpoints
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT, CommandResult

Command = Callable[..., CommandResult]
IDS = "72,101,108,108,111"

EXPORT_PROGRESS = re.compile(r"mara-export: loading PyTorch and Optimum …|  \S.* +\d+\.\d s")
RUN_PROGRESS = re.compile(r"engine cpu \(.*\)|engine cuda declined: .*|agent .*, fallback (first|last)")


def refusal(outcome: CommandResult, prog: str) -> str:
    """The one line; everything else about a refusal is checked here."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    *before, last = outcome.err.splitlines()
    assert last.startswith(f"{prog}: error: "), outcome.err
    progress = EXPORT_PROGRESS if prog == "mara-export" else RUN_PROGRESS
    assert [line for line in before if not progress.fullmatch(line)] == []
    return last.removeprefix(f"{prog}: error: ")


def names(message: str, *texts: str) -> None:
    assert [text for text in texts if text not in message] == [], message


# --- mara-export -----------------------------------------------------------------------------------------------------


@pytest.fixture
def export_refused(command: Command, tmp_path: Path, checkpoint: Any, agent_file: Any) -> Callable[..., str]:
    """Run mara-export with a good model and agent but for what is given; → its line."""
    checkpoint("qwen2"), agent_file("qwen2")

    def run(*more: object, model: Any = None, agent: Any = None, out: Path | None = None) -> str:
        out = out or tmp_path / "new" / "out"
        before = sorted(tmp_path.rglob("*"))
        options = ["--model", model or checkpoint("qwen2"), "--agent", agent or agent_file("qwen2"), "--out", out]
        message = refusal(command("export", *options, *more), "mara-export")
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


def copied(source: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(source, folder)
    if config:
        values = {**json.loads((folder / "config.json").read_text()), **config}
        (folder / "config.json").write_text(json.dumps(values))
    return folder


def poison(folder: Path, name: str, index: Any) -> None:
    state = load_file(folder / "model.safetensors")
    state[name][index] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere", "qwen9", "~nosuchuser/model"])
def test_a_missing_model(export_refused, monkeypatch, model) -> None:
    monkeypatch.setattr(sources, "_snapshot", None)  # a Hub is not even asked
    names(export_refused(model=model), model)


def test_a_missing_agent(export_refused, tmp_path) -> None:
    for agent in (f"{tmp_path}/none.pth", str(tmp_path), "~nosuchuser/a.pth"):
        names(export_refused(agent=agent), agent, "--agent")
    assert export_refused(agent="x" * 5000)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_corrupt_agent(export_refused, tmp_path, suffix) -> None:
    path = tmp_path / f"agent{suffix}"
    for data in (b"", b"X", b"\x80\x02M", b"not an agent", bytes(range(256)) * 20):
        path.write_bytes(data)
        names(export_refused(agent=path), str(path))


def test_the_demos_agent_with_another_model(export_refused) -> None:
    names(export_refused(agent="demo"), "--agent is demo", "qwen2")


def test_an_agent_of_another_hidden_size(export_refused, tmp_path) -> None:
    agents.save(agents.untrained(128, 0, (4, 4)), tmp_path / "big.safetensors")
    names(export_refused(agent=tmp_path / "big.safetensors"), "big.safetensors", "128", "qwen2", "64")


def test_an_unsupported_architecture_lists_the_supported(export_refused, checkpoint, tmp_path) -> None:
    message = export_refused(model=copied(checkpoint("qwen2"), tmp_path / "gemma", model_type="gemma2"))
    names(message, "gemma", "'gemma2'", "qwen2, qwen3, llama, mistral")


def test_a_folder_in_the_way(export_refused, tmp_path) -> None:
    (tmp_path / "full" / "cpu-int4").mkdir(parents=True)
    (tmp_path / "full" / "cpu-int4" / "precious").touch()
    (tmp_path / "file").touch()
    names(export_refused(out=tmp_path / "full"), "full", "exists", "--out")
    names(
        export_refused("--precision", "fp16", "--precision", "int4", out=tmp_path / "full"), "full/cpu-int4", "exists"
    )
    names(export_refused(out=tmp_path / "file"), "file", "exists")
    names(export_refused(out=tmp_path / "file" / "out"), f"cannot write {tmp_path}/file/out")
    if Path("/proc/self").exists():
        names(export_refused(out=Path("/proc/new/out")), "cannot write /proc/new/out")


def test_corrupt_weights(export_refused, checkpoint, tmp_path) -> None:
    folder = copied(checkpoint("qwen2"), tmp_path / "broken")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for damaged in (data[: len(data) // 2], b"\xff" * 100 + data[100:], b"", b"{}"):
        weights.write_bytes(damaged)
        names(export_refused(model=folder), "broken")
    weights.write_bytes(data)
    poison(folder, "model.layers.0.mlp.up_proj.weight", (0, 0))
    assert re.search(r"broken.*(nan|not finite)", export_refused(model=folder))


def test_a_pickle_is_not_loaded_in_place_of_safetensors(export_refused, checkpoint, tmp_path) -> None:
    """The .safetensors file that the folder has is of something else."""
    folder = copied(checkpoint("qwen2"), tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    names(export_refused(model=folder), "pickled", "model.safetensors")


@pytest.mark.parametrize("ids", [-1, [257, -1], 320, [320], "257", 257.0])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_end_tokens_outside_the_vocabulary(export_refused, checkpoint, tmp_path, ids, file) -> None:
    folder = copied(checkpoint("qwen2"), tmp_path / "endless")
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    values = {**json.loads((folder / file).read_text()), "eos_token_id": ids}
    (folder / file).write_text(json.dumps(values))
    bad = ids[-1] if isinstance(ids, list) else ids
    names(export_refused(model=folder), f"eos_token_id is {bad!r}", "0 to 319")


def test_a_context_beyond_the_models_own(export_refused) -> None:
    names(export_refused("--max-context", "513"), "--max-context is 513", "qwen2", "512")
    names(export_refused("--max-context", "1000000000000"), "--max-context is 1000000000000")


def test_packages_that_are_not_installed(export_refused, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mara_export.export", None)
    names(export_refused(), "pip install 'mara-deploy[cpu,export]'")


def test_debug_shows_the_traceback(command, tmp_path) -> None:
    with pytest.raises(MaraError):
        command("inspect", tmp_path / "none", "--debug")


# --- bundles ---------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Change the manifest, and make its sizes and checksums true."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def run_refused(command: Command, bundle: Path, *options: object, **more: Any) -> str:
    return refusal(command("run", bundle, *(options or ("--input-ids", IDS)), "--threads", 1, **more), "mara-run")


@pytest.mark.parametrize("prog", ["run", "inspect"])
def test_a_folder_that_is_not_a_bundle(command, tmp_path, prog) -> None:
    options = ["--input-ids", "1"] if prog == "run" else []
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, fault in (("none", "no bundle"), ("file", "no bundle"), ("empty", "manifest.json")):
        names(refusal(command(prog, tmp_path / name, *options), f"mara-{prog}"), str(tmp_path / name), fault)
    assert refusal(command(prog, "x" * 5000, *options), f"mara-{prog}")


@pytest.mark.parametrize("prog", ["run", "inspect"])
def test_a_flipped_byte_and_a_missing_file(command, bundle_copy, prog) -> None:
    bundle = bundle_copy()
    options = ["--input-ids", "1"] if prog == "run" else []
    for name in ("step.onnx", "step.onnx.data", "tokenizer.json", "chat_template.jinja"):
        whole = (bundle / name).read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for data, fault in (
            (flipped, ("sha256",)),
            (whole[:-1], (f"{len(whole) - 1} bytes", str(len(whole)))),
            (None, ("missing",)),
        ):
            (bundle / name).write_bytes(data) if data is not None else (bundle / name).unlink()
            names(refusal(command(prog, bundle, *options), f"mara-{prog}"), f" {name} ", *fault)
        (bundle / name).write_bytes(whole)


def test_another_schema_version(command, bundle_copy) -> None:
    bundle = bundle_copy()
    current = json.loads((bundle / "manifest.json").read_text())["schema_version"]
    for version in (current - 1, current + 1, str(current), None, float(current), True):
        rewrite(bundle, lambda manifest, version=version: manifest.update(schema_version=version))
        names(run_refused(command, bundle), f"schema version {version!r}", f"version {current}")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"schema_version": 3}', "\udcff"])
def test_a_manifest_that_is_not_one(command, bundle_copy, text) -> None:
    bundle = bundle_copy()
    (bundle / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    names(run_refused(command, bundle), "manifest.json")


@pytest.mark.parametrize("name", ["step.onnx", "step.onnx.data"])
def test_a_damaged_graph_with_a_matching_checksum(command, bundle_copy, name) -> None:
    bundle = bundle_copy()
    data = (bundle / name).read_bytes()
    for damaged in (b"", data[: len(data) // 2], np.random.default_rng(0).bytes(5000), b"this is no graph"):
        (bundle / name).write_bytes(damaged)
        rewrite(bundle)
        names(run_refused(command, bundle), "ONNX Runtime cannot load", "step.onnx")


def test_a_graph_of_something_else(command, bundle, bundle_copy) -> None:
    folder = bundle_copy()
    for name in ("step.onnx", "step.onnx.data"):
        shutil.copy(bundle("llama") / name, folder / name)
    rewrite(folder)
    names(run_refused(command, folder), "step.onnx", "manifest")
    trace_agent(agents.untrained(64, 0, (8, 8)), 64, folder / "step.onnx")
    rewrite(folder)
    names(run_refused(command, folder), "step.onnx", "manifest", "input_ids", "(1, 'S')")


@pytest.mark.parametrize(
    "facts",
    [{"num_kv_heads": 3}, {"num_layers": 5}, {"vocab_size": 300}, {"head_dim": 8}, {"hidden_size": 65}],
    ids=str,
)
def test_a_manifest_of_another_model(command, bundle_copy, facts) -> None:
    bundle = bundle_copy()
    rewrite(bundle, lambda manifest: manifest["model"]["shape"].update(facts))
    names(run_refused(command, bundle), "step.onnx", "manifest")


def test_a_manifest_of_more_candidates(command, bundle_copy) -> None:
    """The graph returns too few tokens for them."""
    bundle = bundle_copy()
    rewrite(bundle, lambda manifest: manifest.update(max_candidates=MAX_CANDIDATES + 1))
    names(run_refused(command, bundle), "step.onnx", "top_ids", "73")


def test_a_graph_that_lost_an_output(command, bundle_copy) -> None:
    bundle = bundle_copy()
    whole = onnx.load(bundle / "step.onnx", load_external_data=False)
    for index in range(len(whole.graph.output)):
        model = onnx.ModelProto()
        model.CopyFrom(whole)
        lost = model.graph.output[index].name
        del model.graph.output[index]
        onnx.save(model, bundle / "step.onnx")
        rewrite(bundle)
        names(run_refused(command, bundle), "step.onnx", lost)


def test_a_damaged_tokenizer_with_a_matching_checksum(command, bundle_copy) -> None:
    bundle = bundle_copy()
    for text in ("", "{", "[]", "{}"):
        (bundle / "tokenizer.json").write_text(text)
        rewrite(bundle)
        names(run_refused(command, bundle, "--prompt", "Hello"), "tokenizer.json")


def test_a_damaged_chat_template_matters_only_where_it_is_used(command, bundle_copy) -> None:
    bundle = bundle_copy()
    for data in (b"{% if %}", b"\xff\xfe"):
        (bundle / "chat_template.jinja").write_bytes(data)
        rewrite(bundle)
        names(run_refused(command, bundle, "--prompt", "Hello"), "--raw")
        for options in (("--raw", "--prompt", "Hello"), ("--input-ids", IDS)):
            outcome = command("run", bundle, *options, "--max-new-tokens", 2, "--threads", 1)
            assert outcome.code == 0, outcome.err


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_an_empty_prompt(command, bundle) -> None:
    for prompt in ("", " ", "\n\t  "):
        for options, stdin in ((("--prompt", prompt), ""), (("--max-new-tokens", 2), prompt), (("--json",), prompt)):
            names(run_refused(command, bundle("qwen2"), *options, stdin=stdin), "empty")
    for options, stdin in ((("--raw", "--prompt", ""), ""), (("--raw",), "\n")):
        names(run_refused(command, bundle("qwen2"), *options, stdin=stdin), "empty")


def test_a_prompt_of_more_than_the_capacity(command, bundle) -> None:
    message = run_refused(command, bundle("qwen2"), "--prompt", "zz" * MAX_CONTEXT)
    assert re.search(rf"the prompt has \d+ tokens.*{MAX_CONTEXT}", message)
    full = ",".join(["70"] * MAX_CONTEXT)
    names(run_refused(command, bundle("qwen2"), "--input-ids", full), f"the prompt has {MAX_CONTEXT} tokens")
    room_for_one = ",".join(["70"] * (MAX_CONTEXT - 1))
    outcome = command("run", bundle("qwen2"), "--input-ids", room_for_one, "--json", "--threads", 1)
    assert outcome.code == 0
    assert json.loads(outcome.out)["stats"]["tokens"] == 1


@pytest.mark.parametrize(
    ("ids", "token", "index"),
    [("320", "320", 0), ("1,2,99999999999999999999", "99999999999999999999", 2), ("1,-7", "-7", 1)],
)
def test_token_ids_outside_the_vocabulary(command, bundle, ids, token, index) -> None:
    names(run_refused(command, bundle("qwen2"), "--input-ids", ids), f"token id {token} at index {index}", "0 to 319")


def test_text_that_is_not_utf8(command, bundle) -> None:
    # What Python makes of a byte 0xff among the arguments.
    for options in (
        ("--prompt", "caf\udcff"),
        ("--raw", "--prompt", "\udcff"),
        ("--prompt", "a", "--system", "\udcff"),
    ):
        assert re.search("UTF-8|Unicode|text", run_refused(command, bundle("qwen2"), *options))
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xff"), encoding="utf-8")
    names(run_refused(command, bundle("qwen2"), "--max-new-tokens", 2, stdin=stdin), "stdin", "UTF-8")


# --- options that depend on the bundle -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--top-k", MAX_CANDIDATES + 1], (f"--top-k is {MAX_CANDIDATES + 1}", f"1 to {MAX_CANDIDATES}")),
        (["--engine", "cuda"], ("cuda", "targets: cpu")),
        (["--engine", "tensorrt", "--threads", 2], ("--threads", "tensorrt")),
        (["--threads", 1_000_000], ("--threads is 1000000",)),
        (["--trace", "/nowhere/trace.jsonl"], ("--trace", "/nowhere/trace.jsonl", "No such file or directory")),
        (["--trace", "/"], ("--trace", "Is a directory")),
        (["--trace", "/dev/full"], ("--trace", "/dev/full", "No space left on device")),
    ],
    ids=str,
)
def test_options_that_this_bundle_or_machine_cannot_have(command, bundle, options, named) -> None:
    names(refusal(command("run", bundle("qwen2"), "--input-ids", IDS, *options), "mara-run"), *named)


def test_text_options_without_a_tokenizer(command, agent_file, tmp_path) -> None:
    model = checkpoints.make("qwen2", tmp_path / "qwen2")
    bundle = tmp_path / "out"
    options = ["--model", model, "--agent", agent_file("qwen2"), "--out", bundle, "--max-context", 64, "--quiet"]
    assert command("export", *options) == CommandResult(0, "", "")
    names(run_refused(command, bundle, "--prompt", "Hello"), "tokenizer", "--input-ids")
    names(run_refused(command, bundle, "--input-ids", IDS, "--stop", "x"), "--stop", "tokenizer")
    outcome = command("run", bundle, "--input-ids", IDS, "--max-new-tokens", 5, "--threads", 1)
    assert outcome.code == 0
    assert re.fullmatch(r"\d+(,\d+){0,4}\n", outcome.out)


# --- numbers that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["ort", "portable"])
def test_a_state_that_is_not_finite_is_named_with_its_position(
    command, checkpoint, agent_file, tmp_path, lowering
) -> None:
    folder = copied(checkpoint("llama"), tmp_path / "llama")  # its head is a matrix of its own
    poison(folder, "model.embed_tokens.weight", 77)
    bundle = tmp_path / "out"
    options = ["--model", folder, "--agent", agent_file("llama"), "--out", bundle, "--max-context", 128]
    outcome = command("export", *options, "--lowering", lowering, "--no-gate")
    assert outcome.code == 0
    assert "NOT CHECKED" in outcome.out
    names(run_refused(command, bundle, "--input-ids", "70,71,72,77,73"), "hidden state", "position 3", "token 77")
    assert command("run", bundle, "--input-ids", "70,71,72", "--max-new-tokens", 1, "--threads", 1).code == 0
    # The entries of the failed pass are gone: whoever keeps the decoder, as a chat does, can go on.
    decoder = AlignedDecoder(bundle, threads=1)
    plain = DecodeConfig(align=False, max_new_tokens=3)
    expected = decoder.generate([70, 71], plain).token_ids
    with pytest.raises(NumericsError):
        decoder.generate([70, 71, 72, 73, 74, 75, 76, 77], plain)
    assert decoder.generate([70, 71], plain).token_ids == expected


def test_logits_that_are_not_finite(command, checkpoint, agent_file, tmp_path) -> None:
    folder = copied(checkpoint("llama"), tmp_path / "llama")
    poison(folder, "lm_head.weight", 77)
    bundle = tmp_path / "out"
    options = ["--model", folder, "--agent", agent_file("llama"), "--out", bundle, "--max-context", 128]
    assert command("export", *options, "--no-gate").code == 0
    names(run_refused(command, bundle), "logits", "position 0", "LM head")  # of a second run from the beginning


def test_an_agent_that_overflows_is_not_a_rejection(command, checkpoint, tmp_path) -> None:
    """Finite weights, finite states, and still margins of inf - inf: to be said, not counted as rejected."""
    agent = agents.untrained(64, 0, (8, 8))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.abs_().mul_(1e25)
    agents.save(agent, tmp_path / "agent.safetensors")
    bundle = tmp_path / "out"
    options = ["--model", checkpoint("qwen2"), "--agent", tmp_path / "agent.safetensors", "--out", bundle]
    assert command("export", *options, "--max-context", 128, "--no-gate").code == 0
    names(run_refused(command, bundle, "--input-ids", IDS, "--json"), "margin", "position")
    # Tokens without a decision came before it: what is printed of them ends its line before the error begins.
    printed = command("run", bundle, "--input-ids", IDS, "--threads", 1)
    assert printed.code == 2
    assert re.fullmatch(r"(.+\n)?", printed.out)
