"""Bundles, prompts and numbers that cannot be used: exit code 2 and one line that names the fault.

Refusals of options are in tests/unit/test_refusals.py, of models in test_bad_models.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from mara_export.graph.trace import trace_agents
from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.errors import MaraError, NumericsError
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT
from tests.unit.helpers import write_manifest

IDS = "72,101,108,108,111"


@pytest.fixture
def refused(command) -> Callable[..., str]:
    """(bundle, options of mara-run, default token ids; stdin="") → its line."""

    def run(bundle: Path, *options: object, **more: Any) -> str:
        outcome = command("run", bundle, *(options or ("--input-ids", IDS)), "--threads", 1, **more)
        return outcome.refusal("mara-run")

    return run


def names(line: str, *texts: str) -> None:
    assert [text for text in texts if text not in line] == [], line


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Change the manifest, and make its sizes and checksums true."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest)
    write_manifest(folder, manifest)


def overwrite_weights(folder: Path, weights: torch.Tensor, value: float) -> None:
    """Replace these numbers, which lie together in the graph's data, by one value."""
    old = weights.detach().numpy().tobytes()
    data = (folder / "step.onnx.data").read_bytes()
    assert data.count(old) == 1
    (folder / "step.onnx.data").write_bytes(data.replace(old, np.full(weights.shape, value, np.float32).tobytes()))
    rewrite(folder)


def test_debug_shows_the_traceback(command, tmp_path) -> None:
    with pytest.raises(MaraError):
        command("inspect", tmp_path / "none", "--debug")


# --- bundles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prog", "options"), [("run", ("--input-ids", "1")), ("inspect", ())])
def test_a_folder_that_is_not_an_intact_bundle(command, bundle_copy, tmp_path, prog, options) -> None:
    def refusal(folder: object) -> str:
        return command(prog, folder, *options).refusal(f"mara-{prog}")

    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    file = "no bundle" if prog == "run" else "no token of an answer"  # mara-inspect takes traces, too
    for name, fault in (("none", "no bundle"), ("file", file), ("empty", "manifest.json")):
        names(refusal(tmp_path / name), str(tmp_path / name), fault)
    assert refusal("x" * 5000)
    bundle = bundle_copy()
    for name in ("step.onnx", "step.onnx.data", "tokenizer.json", "chat_template.jinja"):
        whole = (bundle / name).read_bytes()
        middle = len(whole) // 2
        (bundle / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        names(refusal(bundle), f" {name} ", "sha256")
        (bundle / name).write_bytes(whole[:-1])
        names(refusal(bundle), f" {name} ", f"{len(whole) - 1} bytes", str(len(whole)))
        (bundle / name).unlink()
        names(refusal(bundle), f" {name} ", "missing")
        (bundle / name).write_bytes(whole)
    for text in (b"{", b"[]", b"\xff"):
        (bundle / "manifest.json").write_bytes(text)
        names(refusal(bundle), "manifest.json")


@pytest.mark.parametrize("name", ["step.onnx", "step.onnx.data"])
def test_a_damaged_graph_with_a_matching_checksum(refused, bundle_copy, name) -> None:
    bundle = bundle_copy()
    data = (bundle / name).read_bytes()
    for damaged in (b"", data[: len(data) // 2], np.random.default_rng(0).bytes(5000), b"this is no graph"):
        (bundle / name).write_bytes(damaged)
        rewrite(bundle)
        names(refused(bundle), "step.onnx is not accepted: ")


def test_a_graph_that_does_not_fit_the_manifest(refused, bundle, bundle_copy) -> None:
    folder = bundle_copy()
    facts = (
        *({"caches": [{"count": 2, "kv_heads": heads, "head_dim": size}]} for heads, size in ((3, 16), (2, 8))),
        {"caches": [{"count": 1, "kv_heads": 2, "head_dim": 16}]},
        *({"vocab_size": 300}, {"hidden_size": 65}),
    )
    whole = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for changed in facts:
        rewrite(folder, lambda manifest, changed=changed: manifest["model"]["shape"].update(changed))
        names(refused(folder), "agents.0.hidden_size" if "hidden_size" in changed else "step.onnx", "manifest")
        rewrite(folder, lambda manifest: manifest.update(whole))
    rewrite(folder, lambda manifest: manifest.update(max_candidates=MAX_CANDIDATES + 1))
    names(refused(folder), "step.onnx", "top_ids", "73")  # the graph returns fewer tokens
    rewrite(folder, lambda manifest: manifest.update(whole))

    graph = onnx.load(folder / "step.onnx", load_external_data=False)
    for index, lost in enumerate([output.name for output in graph.graph.output]):
        model = onnx.ModelProto()
        model.CopyFrom(graph)
        del model.graph.output[index]
        onnx.save(model, folder / "step.onnx")
        rewrite(folder)
        names(refused(folder), "step.onnx", lost)
    trace_agents(64, folder / "step.onnx")
    rewrite(folder)
    names(refused(folder), "step.onnx is not accepted: ")


def test_a_damaged_tokenizer_with_a_matching_checksum(refused, bundle_copy) -> None:
    bundle = bundle_copy()
    for text in ("", "{", "[]", "{}"):
        (bundle / "tokenizer.json").write_text(text)
        rewrite(bundle)
        names(refused(bundle, "--prompt", "Hello"), "tokenizer.json")


def test_a_bundle_without_a_tokenizer_or_with_a_damaged_template_takes_other_prompts(
    command, refused, bundle_copy
) -> None:
    bundle = bundle_copy()

    def runs(*options: object) -> str:
        outcome = command("run", bundle, *options, "--max-new-tokens", 2, "--threads", 1)
        assert outcome.code == 0, outcome.err
        return outcome.out

    for data in (b"{% if %}", b"\xff\xfe"):
        (bundle / "chat_template.jinja").write_bytes(data)
        rewrite(bundle)
        names(refused(bundle, "--prompt", "Hello"), "--raw")
        runs("--raw", "--prompt", "Hello"), runs("--input-ids", IDS)
    rewrite(bundle, lambda manifest: manifest.update(tokenizer=None))
    names(refused(bundle, "--prompt", "Hello"), "tokenizer", "--input-ids")
    names(refused(bundle, "--input-ids", IDS, "--stop", "x"), "--stop", "tokenizer")
    assert re.fullmatch(r"\d+(,\d+)?\n", runs("--input-ids", IDS))


# --- prompts and options ---------------------------------------------------------------------------------------------


def test_an_empty_prompt(refused, bundle) -> None:
    for options, stdin in (
        (("--prompt", ""), ""),
        (("--prompt", "\n\t  "), ""),
        (("--json",), " "),
        (("--raw", "--prompt", ""), ""),
        (("--raw",), "\n"),
    ):
        names(refused(bundle("qwen2"), *options, stdin=stdin), "empty")


def test_a_prompt_beyond_the_capacity(command, refused, bundle) -> None:
    line = refused(bundle("qwen2"), "--prompt", "zz" * MAX_CONTEXT)
    assert re.search(rf"the prompt has \d+ tokens.*{MAX_CONTEXT}", line)
    full = ",".join(["70"] * MAX_CONTEXT)
    names(refused(bundle("qwen2"), "--input-ids", full), f"the prompt has {MAX_CONTEXT} tokens")
    room_for_one = ",".join(["70"] * (MAX_CONTEXT - 1))
    outcome = command("run", bundle("qwen2"), "--input-ids", room_for_one, "--json", "--threads", 1)
    assert (outcome.code, json.loads(outcome.out)["stats"]["tokens"]) == (0, 1)


def test_text_that_is_not_utf8(refused, bundle) -> None:
    for options in (  # what Python makes of a byte 0xff among the arguments
        ("--prompt", "caf\udcff"),
        ("--raw", "--prompt", "\udcff"),
        ("--prompt", "a", "--system", "\udcff"),
    ):
        assert re.search("UTF-8|Unicode|text", refused(bundle("qwen2"), *options))
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xff"), encoding="utf-8")
    names(refused(bundle("qwen2"), "--max-new-tokens", 2, stdin=stdin), "stdin", "UTF-8")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--input-ids", "320"], ("token id 320 at index 0", "0 to 319")),
        (["--input-ids", f"1,2,{10**20}"], (f"token id {10**20} at index 2", "0 to 319")),
        (["--input-ids", "1,-7"], ("token id -7 at index 1", "0 to 319")),
        (["--top-k", MAX_CANDIDATES + 1], (f"--top-k is {MAX_CANDIDATES + 1}", f"1 to {MAX_CANDIDATES}")),
        (["--engine", "cuda"], ("cuda", "targets: cpu")),
        (["--engine", "tensorrt"], ("--threads", "tensorrt")),
        (["--threads", 1_000_000], ("--threads is 1000000",)),
        (["--trace", "/nowhere/trace.jsonl"], ("--trace", "/nowhere/trace.jsonl", "No such file or directory")),
        (["--trace", "/"], ("--trace", "Is a directory")),
        (["--trace", "/dev/full"], ("--trace", "/dev/full", "No space left on device")),
    ],
    ids=str,
)
def test_what_this_bundle_or_machine_cannot_do(command, bundle, options, named) -> None:
    prompt = () if "--input-ids" in options else ("--input-ids", IDS)
    names(command("run", bundle("qwen2"), "--threads", 1, *prompt, *options).refusal("mara-run"), *named)


# --- numbers that are not finite -------------------------------------------------------------------------------------


def test_a_hidden_state_that_is_not_finite_is_named_with_its_position(refused, bundle_copy, reference) -> None:
    folder = bundle_copy("llama")  # its head is a matrix of its own
    overwrite_weights(folder, reference("llama").model.embed_tokens.weight[77], np.nan)
    names(refused(folder, "--input-ids", "70,71,72,77,73"), "hidden state", "position 3", "token 77")
    # The entries of the failed pass are gone: whoever keeps the decoder, as a chat does, can go on.
    decoder = AlignedDecoder(folder, threads=1)
    plain = DecodeConfig(align=False, max_new_tokens=3)
    expected = decoder.generate([70, 71], plain).token_ids
    with pytest.raises(NumericsError):
        decoder.generate([70, 71, 72, 73, 74, 75, 76, 77], plain)
    assert decoder.generate([70, 71], plain).token_ids == expected


def test_logits_that_are_not_finite_are_named(refused, bundle_copy, reference) -> None:
    folder = bundle_copy("llama")
    overwrite_weights(folder, reference("llama").lm_head.weight.T[7].contiguous(), np.nan)
    names(refused(folder), "logits", "position 0", "LM head")  # found by running the prompt again


def test_an_agent_that_overflows_is_not_a_rejection(command, refused, bundle_copy, agent) -> None:
    """Finite weights, finite states, and yet margins of inf - inf: an error, not a candidate rejected."""
    folder = bundle_copy()
    path = folder / "agents" / "agent.safetensors"
    state = agent("qwen2").state_dict()
    save_file({**state, "linear2.weight": torch.full_like(state["linear2.weight"], 3e38)}, path)
    rewrite(folder)
    names(refused(folder, "--input-ids", IDS, "--json"), "margin", "position")
    # Tokens without a decision may precede it: their text ends its line before the error.
    printed = command("run", folder, "--input-ids", IDS, "--threads", 1)
    assert printed.code == 2
    assert re.fullmatch(r"(.+\n)?", printed.out)
