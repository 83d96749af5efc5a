"""Bad input through the commands: exit code 2, one line that says what is wrong, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from mara_deploy import agent as agents
from mara_export.graph.trace import trace_agent
from mara_export.hf import sources
from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.errors import NumericsError
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


def test_a_missing_model(export_refused, monkeypatch) -> None:
    monkeypatch.setattr(sources, "_snapshot", None)  # a Hub is not even asked
    assert "there is no model '/nowhere/model'" in export_refused(model="/nowhere/model")
    assert "there is no model './nowhere'" in export_refused(model="./nowhere")
    assert "there is no model 'qwen9'" in export_refused(model="qwen9")
    assert "~nosuchuser/model" in export_refused(model="~nosuchuser/model")


def test_a_missing_agent(export_refused, tmp_path) -> None:
    assert f"there is no agent file at {tmp_path}/none.pth" in export_refused(agent=tmp_path / "none.pth")
    assert "there is no agent file at" in export_refused(agent=tmp_path)
    assert "~nosuchuser/a.pth" in export_refused(agent="~nosuchuser/a.pth")
    assert export_refused(agent="x" * 5000)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("data", [b"", b"X", b"\x80\x02M", b"not an agent", bytes(range(256)) * 20], ids=len)
def test_a_corrupt_agent(export_refused, tmp_path, suffix, data) -> None:
    path = tmp_path / f"agent{suffix}"
    path.write_bytes(data)
    assert f"{path} cannot be read as" in export_refused(agent=path)


def test_the_demos_agent_with_another_model(export_refused) -> None:
    assert "not with qwen2" in export_refused(agent="demo")


def test_an_agent_of_another_hidden_size_is_refused_with_both_names_and_numbers(export_refused, tmp_path) -> None:
    agents.save(agents.untrained(128, 0, (4, 4)), tmp_path / "big.safetensors")
    message = export_refused(agent=tmp_path / "big.safetensors")
    assert "big.safetensors" in message
    assert "128" in message
    assert "qwen2 has 64" in message


def test_an_unsupported_architecture_lists_the_supported(export_refused, checkpoint, tmp_path) -> None:
    message = export_refused(model=copied(checkpoint("qwen2"), tmp_path / "gemma", model_type="gemma2"))
    assert "gemma is of architecture 'gemma2'; supported are qwen2, qwen3, llama, mistral" in message


def test_a_folder_in_the_way(export_refused, tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "file").touch()
    assert "full exists already and is not an empty folder" in export_refused(out=tmp_path / "full")
    assert "file exists already" in export_refused(out=tmp_path / "file")
    assert f"cannot write {tmp_path}/file/out" in export_refused(out=tmp_path / "file" / "out")
    if Path("/proc/self").exists():
        assert "cannot write /proc/new/out" in export_refused(out=Path("/proc/new/out"))


def test_corrupt_weights(export_refused, checkpoint, tmp_path) -> None:
    folder = copied(checkpoint("qwen2"), tmp_path / "broken")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for damaged in (data[: len(data) // 2], b"\xff" * 100 + data[100:], b"", b"{}"):
        weights.write_bytes(damaged)
        assert "broken cannot be loaded" in export_refused(model=folder)


def test_a_pickle_is_not_loaded_in_place_of_safetensors(export_refused, checkpoint, tmp_path) -> None:
    """The .safetensors file that the folder has is of something else."""
    folder = copied(checkpoint("qwen2"), tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    message = export_refused(model=folder)
    assert "pickled cannot be loaded: " in message
    assert "model.safetensors" in message


@pytest.mark.parametrize("ids", [-1, [257, -1], 320, [320], "257", 257.0])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_end_tokens_outside_the_vocabulary(export_refused, checkpoint, tmp_path, ids, file) -> None:
    folder = copied(checkpoint("qwen2"), tmp_path / "endless")
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    values = {**json.loads((folder / file).read_text()), "eos_token_id": ids}
    (folder / file).write_text(json.dumps(values))
    bad = ids[-1] if isinstance(ids, list) else ids
    message = export_refused(model=folder)
    assert f"eos_token_id is {bad!r}, which is not in its vocabulary, 0 to 319" in message


def test_weights_that_are_not_finite(export_refused, checkpoint, tmp_path) -> None:
    folder = copied(checkpoint("qwen2"), tmp_path / "broken")
    poison(folder, "model.layers.0.mlp.up_proj.weight", (0, 0))
    assert re.search(r"broken.*(nan|not finite)", export_refused(model=folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-context", "1"], "--max-context is 1; it must be at least 2"),
        (["--max-context", "-4"], "--max-context is -4"),
        (["--max-context", "abc"], "argument --max-context: invalid int value: 'abc'"),
        (["--max-context", "513"], "--max-context is 513; qwen2 was made for at most 512 tokens"),
        (["--max-context", "1000000000000"], "--max-context is 1000000000000"),
        (["--max-candidates", "0"], "--max-candidates is 0; it must lie between 1 and 1024"),
        (["--max-candidates", "100000"], "--max-candidates is 100000"),
        (["--target", "abacus"], "argument --target: invalid choice: 'abacus'"),
        (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
        (["--no-build"], "--no-build is for tensorrt and tensorrt-rtx; --target cpu builds nothing"),
        (["--no-build", "--target", "cuda"], "--target cuda builds nothing"),
        (["--out", ""], "--out is empty; leave it out for the default"),
        (["--model", ""], "--model is empty"),
        (["--agent", ""], "--agent is empty"),
        (["--keep", ""], "--keep are for --precision int8 and int4"),
        (["--lowering", "none"], "argument --lowering: invalid choice: 'none'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["two\nlines"], "unrecognized arguments: two lines"),
        (["--max-cont", "64"], "unrecognized arguments: --max-cont 64"),
    ],
)
def test_export_options(export_refused, options, message) -> None:
    assert message in export_refused(*options)


def test_required_export_options(command) -> None:
    assert "the following arguments are required: --model, --agent" in refusal(command("export"), "mara-export")


def test_packages_that_are_not_installed(export_refused, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mara_export.export", None)
    assert "pip install 'mara-deploy[cpu,export]'" in export_refused()


def test_the_traceback_is_there_for_who_asks(command, tmp_path) -> None:
    from mara_runtime.errors import MaraError

    with pytest.raises(MaraError):
        command("inspect", tmp_path / "none", "--debug")


def poison(folder: Path, name: str, index: Any) -> None:
    state = load_file(folder / "model.safetensors")
    state[name][index] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def big_llama(folder: Path) -> Path:
    """Twenty-four layers: an export that takes seconds."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_an_interrupted_export_leaves_nothing(agent_file, tmp_path) -> None:
    model, new = big_llama(tmp_path / "llama"), tmp_path / "new"
    options = ["--model", model, "--agent", agent_file("llama"), "--out", new / "deeper" / "out"]
    with subprocess.Popen(
        [sys.executable, "-m", "mara_deploy.commands.export", *map(str, options)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
    ) as process:
        lines = []
        while not (lines and lines[-1].startswith("  run the reference")):
            line = process.stderr.readline()
            assert line, lines  # it ended too early
            lines.append(line.rstrip("\n"))
        assert [path.name for path in (new / "deeper").iterdir()]  # it is at work
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    outcome = CommandResult(process.returncode, out, "\n".join([*lines, err]))
    assert refusal(outcome, "mara-export") == "interrupted"
    assert not new.exists()


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
def test_a_missing_bundle(command, tmp_path, prog) -> None:
    options = ["--input-ids", "1"] if prog == "run" else []
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("none", "there is no bundle at"),
        ("file", "there is no bundle at"),
        ("empty", "empty is not a bundle: it has no manifest.json"),
    ):
        assert message in refusal(command(prog, tmp_path / name, *options), f"mara-{prog}")
    assert f"mara-{prog}: error: " in command(prog, "x" * 5000, *options).err


@pytest.mark.parametrize("prog", ["run", "inspect"])
@pytest.mark.parametrize("name", ["step.onnx", "step.onnx.data", "tokenizer.json", "chat_template.jinja"])
def test_a_flipped_byte_and_a_missing_file(command, bundle_copy, prog, name) -> None:
    bundle = bundle_copy()
    options = ["--input-ids", "1"] if prog == "run" else []
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    message = refusal(command(prog, bundle, *options), f"mara-{prog}")
    assert f"{name} is damaged: its sha256 is not the manifest's" in message
    (bundle / name).write_bytes(data[:-1])
    message = refusal(command(prog, bundle, *options), f"mara-{prog}")
    assert f"{name} has {len(data) - 1} bytes where the manifest says {len(data)}" in message
    (bundle / name).unlink()
    assert f"{name} is missing" in refusal(command(prog, bundle, *options), f"mara-{prog}")


@pytest.mark.parametrize("version", [0, 1, 2, "3", None, 3.0, True])
def test_another_schema_version(command, bundle_copy, version) -> None:
    bundle = bundle_copy()
    rewrite(bundle, lambda manifest: manifest.update(schema_version=version))
    message = run_refused(command, bundle)
    assert f"has schema version {version!r}; this release reads version 3" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"schema_version": 3}', "\udcff"])
def test_a_manifest_that_is_none(command, bundle_copy, text) -> None:
    bundle = bundle_copy()
    (bundle / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "manifest.json" in run_refused(command, bundle)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "random": lambda _: np.random.default_rng(0).bytes(5000),
    "text": lambda _: b"this is no graph",
}


@pytest.mark.parametrize("name", ["step.onnx", "step.onnx.data"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_graph_with_a_matching_checksum(command, bundle_copy, name, damage) -> None:
    bundle = bundle_copy()
    (bundle / name).write_bytes(DAMAGES[damage]((bundle / name).read_bytes()))
    rewrite(bundle)
    message = run_refused(command, bundle)
    assert "ONNX Runtime cannot load" in message
    assert name.removesuffix(".data") in message


def test_the_graph_of_another_model(command, bundle, bundle_copy) -> None:
    folder = bundle_copy()
    for name in ("step.onnx", "step.onnx.data"):
        shutil.copy(bundle("llama") / name, folder / name)
    rewrite(folder)
    assert "step.onnx does not fit its manifest: " in run_refused(command, folder)


def test_a_graph_of_another_kind(command, bundle_copy, tmp_path) -> None:
    folder = bundle_copy()
    trace_agent(agents.untrained(64, 0, (8, 8)), 64, folder / "step.onnx")
    rewrite(folder)
    message = run_refused(command, folder)
    assert "step.onnx does not fit its manifest: input_ids should have the shape (1, 'S') and has None" in message


@pytest.mark.parametrize(
    "facts",
    [{"num_kv_heads": 3}, {"num_layers": 5}, {"vocab_size": 300}, {"head_dim": 8}, {"hidden_size": 65}],
    ids=str,
)
def test_a_manifest_of_another_model(command, bundle_copy, facts) -> None:
    """Its sizes are not the graph's."""
    bundle = bundle_copy()
    rewrite(bundle, lambda manifest: manifest["model"]["shape"].update(facts))
    assert "step.onnx does not fit its manifest: " in run_refused(command, bundle)


def test_a_manifest_of_more_candidates(command, bundle_copy) -> None:
    """The graph returns too few tokens for them."""
    bundle = bundle_copy()
    rewrite(bundle, lambda manifest: manifest.update(max_candidates=MAX_CANDIDATES + 1))
    assert "step.onnx does not fit its manifest: top_ids should have the shape ('P', 73)" in run_refused(
        command, bundle
    )


@pytest.mark.parametrize("index", range(7))
def test_a_graph_that_lost_an_output(command, bundle_copy, index) -> None:
    bundle = bundle_copy()
    model = onnx.load(bundle / "step.onnx", load_external_data=False)
    lost = model.graph.output[index].name
    del model.graph.output[index]
    onnx.save(model, bundle / "step.onnx")
    rewrite(bundle)
    assert f"step.onnx does not fit its manifest: {lost} should have the shape" in run_refused(command, bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_tokenizer_with_a_matching_checksum(command, bundle_copy, text) -> None:
    bundle = bundle_copy()
    (bundle / "tokenizer.json").write_text(text)
    rewrite(bundle)
    assert "tokenizer.json is not a tokenizer file" in run_refused(command, bundle, "--prompt", "Hello")


def test_a_damaged_chat_template_does_not_hinder_who_goes_without(command, bundle_copy) -> None:
    bundle = bundle_copy()
    for data in (b"{% if %}", b"\xff\xfe"):
        (bundle / "chat_template.jinja").write_bytes(data)
        rewrite(bundle)
        assert "--raw" in run_refused(command, bundle, "--prompt", "Hello")
        for options in (("--raw", "--prompt", "Hello"), ("--input-ids", IDS)):
            outcome = command("run", bundle, *options, "--max-new-tokens", 2, "--threads", 1)
            assert outcome.code == 0, outcome.err


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", " ", "\n\t  "])
def test_an_empty_prompt(command, bundle, prompt) -> None:
    assert "the prompt is empty" in run_refused(command, bundle("qwen2"), "--prompt", prompt)
    assert "the prompt is empty" in run_refused(command, bundle("qwen2"), "--max-new-tokens", 2, stdin=prompt)
    assert "the prompt is empty" in run_refused(command, bundle("qwen2"), "--json", stdin=prompt)


def test_an_empty_raw_prompt(command, bundle) -> None:
    assert "the prompt is empty" in run_refused(command, bundle("qwen2"), "--raw", "--prompt", "")
    assert "the prompt is empty" in run_refused(command, bundle("qwen2"), "--raw", stdin="\n")


def test_a_prompt_of_more_than_the_capacity(command, bundle) -> None:
    message = run_refused(command, bundle("qwen2"), "--prompt", "zz" * MAX_CONTEXT)
    assert re.search(rf"the prompt has \d+ tokens; this bundle holds {MAX_CONTEXT} for prompt and answer", message)
    full = ",".join(["70"] * MAX_CONTEXT)
    assert f"the prompt has {MAX_CONTEXT} tokens" in run_refused(command, bundle("qwen2"), "--input-ids", full)
    room_for_one = ",".join(["70"] * (MAX_CONTEXT - 1))
    outcome = command("run", bundle("qwen2"), "--input-ids", room_for_one, "--json", "--threads", 1)
    assert outcome.code == 0
    assert json.loads(outcome.out)["stats"]["tokens"] == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("1,x", "--input-ids is '1,x'; it must be whole numbers, as in 1,2,3"),
        ("", "--input-ids is ''"),
        ("1,,2", "--input-ids is '1,,2'"),
        ("1.5", "--input-ids is '1.5'"),
        ("[1]", "--input-ids is '[1]'"),
        ("320", "token id 320 at index 0 of the prompt is outside the vocabulary, 0 to 319"),
        ("1,2,99999999999999999999", "token id 99999999999999999999 at index 2"),
        ("1,-7", "token id -7 at index 1"),
    ],
)
def test_input_ids(command, bundle, ids, message) -> None:
    assert message in run_refused(command, bundle("qwen2"), "--input-ids", ids)


def test_text_that_is_not_utf8(command, bundle) -> None:
    # What Python makes of a byte 0xff among the arguments.
    for options in (["--prompt"], ["--raw", "--prompt"]):
        assert re.search("UTF-8|text", run_refused(command, bundle("qwen2"), *options, "caf\udcff"))
    assert re.search("UTF-8|text", run_refused(command, bundle("qwen2"), "--prompt", "a", "--system", "\udcff"))


def test_standard_input_that_is_not_utf8(bundle) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "mara_deploy.commands.run", bundle("qwen2")],
        input=b"caf\xff",
        capture_output=True,
        env={**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"},
        timeout=60,
        check=False,
    )
    assert "UTF-8" in refusal(
        CommandResult(outcome.returncode, outcome.stdout.decode(), outcome.stderr.decode()), "mara-run"
    )


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; it must be a whole number of at least 1"),
        (["--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        (["--max-new-tokens", "abc"], "argument --max-new-tokens: invalid int value: 'abc'"),
        (["--top-k", "0"], "--top-k is 0"),
        (["--top-k", "-3"], "--top-k is -3"),
        (["--top-k", str(MAX_CANDIDATES + 1)], f"this bundle allows 1 to {MAX_CANDIDATES}"),
        (["--top-p", "1.5"], "--top-p is 1.5; it must"),
        (["--top-p", "-0.1"], "--top-p is -0.1"),
        (["--top-p", "nan"], "--top-p is nan"),
        (["--top-p", "all"], "argument --top-p: invalid float value: 'all'"),
        (["--threads", "0"], "--threads is 0; it must"),
        (["--threads", "-3"], "--threads is -3"),
        (["--threads", "two"], "argument --threads: invalid int value: 'two'"),
        (["--seed", "-1"], "--seed is -1; it must be a whole number of at least 0"),
        (["--threshold", "nan"], "--threshold is nan; it must be a finite number"),
        (["--threshold", "inf"], "--threshold is inf"),
        (["--no-align", "--sample", "--temperature", "0"], "--temperature is 0.0; it must be a finite number above 0"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--sample"], "--sample is for plain decoding: add --no-align"),
        (["--engine", "abacus"], "--engine is 'abacus'; it must be one of auto, tensorrt, tensorrt-rtx, cuda, cpu"),
        (["--engine", "cuda"], "cuda: the bundle was not exported for it (targets: cpu)"),
        (["--strategy", "best"], "argument --strategy: invalid choice: 'best'"),
        (["--order", "random"], "argument --order: invalid choice: 'random'"),
        (["--fallback", "middle"], "argument --fallback: invalid choice: 'middle'"),
        (["--schedule", "later"], "argument --schedule: invalid choice: 'later'"),
        (["--draft", "-1"], "--draft is -1; it must be a whole number of at least 0"),
        (["--draft", "17"], "--draft is 17; it must be at most 16"),
        (
            ["--draft", "4", "--strategy", "random"],
            "--draft is 4, but only greedy decoding and top1 in ranked order draft",
        ),
        (["--draft", "4", "--order", "reversed"], "--draft is 4, but only"),
        (["--draft", "4", "--no-align", "--sample"], "--draft is 4, but only"),
        (["--no-align", "--strategy", "random"], "--strategy is random, but --no-align asks no agent"),
        (["--no-align", "--order", "reversed"], "--order is reversed, but"),
        (["--no-align", "--fallback", "first"], "--fallback is first, but"),
        (["--no-align", "--threshold", "1"], "--threshold is 1.0, but"),
        (["--engine", "tensorrt", "--threads", "2"], "--threads is for an engine on a CPU, and this is tensorrt"),
        (["--draft", "few"], "argument --draft: invalid int value: 'few'"),
        (["--stop", ""], "--stop is "),
        (["--raw", "--system", "S"], "--system needs the chat template: leave out --raw"),
        (["--prompt", "Hello"], "argument --prompt: not allowed with argument --input-ids"),
        (["--trace", "/nowhere/trace.jsonl"], "--trace cannot write /nowhere/trace.jsonl: No such file or directory"),
        (["--trace", "/"], "--trace cannot write /: Is a directory"),
        (["--trace", "/dev/full"], "--trace cannot write /dev/full: No space left on device"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--max-new", "3"], "unrecognized arguments: --max-new 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_run_options(command, bundle, options, message) -> None:
    options = ["--input-ids", IDS, *options]
    outcome = command("run", bundle("qwen2"), *options, *([] if "--threads" in options else ["--threads", 1]))
    assert message in refusal(outcome, "mara-run")


def test_an_absurd_number_of_threads(bundle) -> None:
    """In a process of its own: ONNX Runtime would set about to start them all."""
    options = ["--input-ids", IDS, "--threads", "1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mara_deploy.commands.run", bundle("qwen2"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=15)
    except subprocess.TimeoutExpired:
        pytest.fail("it is still busy")
    finally:
        process.kill()
        process.communicate()
    assert "--threads is 1000000" in refusal(CommandResult(process.returncode, out, err), "mara-run")


def test_text_options_without_a_tokenizer(command, agent_file, tmp_path) -> None:
    model = checkpoints.make("qwen2", tmp_path / "qwen2")
    bundle = tmp_path / "out"
    options = ["--model", model, "--agent", agent_file("qwen2"), "--out", bundle, "--max-context", 64, "--quiet"]
    assert command("export", *options) == CommandResult(0, "", "")
    assert "holds no tokenizer: give the prompt as --input-ids" in run_refused(command, bundle, "--prompt", "Hello")
    message = run_refused(command, bundle, "--input-ids", IDS, "--stop", "x")
    assert "--stop needs text, and this bundle holds no tokenizer" in message
    outcome = command("run", bundle, "--input-ids", IDS, "--max-new-tokens", 5, "--threads", 1)
    assert outcome.code == 0
    assert re.fullmatch(r"\d+(,\d+){0,4}\n", outcome.out)


# --- numbers that are none -------------------------------------------------------------------------------------------


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
    message = run_refused(command, bundle, "--input-ids", "70,71,72,77,73")
    assert "the hidden state at position 3 (token 77) is not finite" in message
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
    message = run_refused(command, bundle)  # the prompt is run again from its beginning, and the first is named
    assert "the logits after position 0 are not finite: the model's LM head or its precision is at fault" in message


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
    assert "margin at position" in run_refused(command, bundle, "--input-ids", IDS, "--json")
    # Tokens without a decision came before it: what is printed of them ends its line before the error begins.
    printed = command("run", bundle, "--input-ids", IDS, "--threads", 1)
    assert printed.code == 2
    assert re.fullmatch(r"(.+\n)?", printed.out)
