"""mara-run, mara-inspect and mara-export with good input."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
import torch

from mara_runtime.bundle import Bundle
from mara_runtime.text import TextSide
from tests import checkpoints
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT, PROGRESS, CommandResult

Command = Callable[..., CommandResult]
HELLO = "Hello there"
IDS = "72,101,108,108,111,44,220,70"
RESULT_KEYS = ["token_ids", "text", "finish_reason", "stats", "config"]
STATS_KEYS = {
    *("tokens", "decisions", "examined", "forced", "accepted_rank", "candidate_counts", "smallest_margin"),
    *("within_noise", "prompt_tokens", "reused_tokens", "forwards", "rows", "drafted", "confirmed"),
    *("prefill_ms", "decode_ms", "engine_ms", "tokens_per_second", "engine"),
}


@pytest.fixture
def run(command: Command, bundle: Callable[..., Path]) -> Command:
    """mara-run on the tiny Qwen2, which must succeed."""

    def call(*argv: object, folder: Path | None = None, stdin: str = "") -> CommandResult:
        outcome = command("run", folder or bundle("qwen2"), "--threads", 1, *argv, stdin=stdin)
        assert outcome.code == 0, outcome.err
        return outcome

    return call


@pytest.fixture
def result(run: Command) -> Callable[..., Any]:
    """mara-run --json → the object."""

    def call(*argv: object, **more: Any) -> Any:
        outcome = run("--json", *argv, **more)
        assert outcome.err == ""
        assert outcome.out.count("\n") == 1
        return json.loads(outcome.out)

    return call


@pytest.fixture
def tokens(result: Callable[..., Any]) -> Callable[..., list[int]]:
    """mara-run --json of 24 tokens at most → token ids."""
    return lambda *argv, **more: result("--max-new-tokens", 24, *argv, **more)["token_ids"]


def ids(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


def test_the_commands_are_installed(command) -> None:
    scripts = {script.name: script.value for script in entry_points(group="console_scripts")}
    for name in ("export", "agent", "build", "run", "inspect", "memory", "sign", "bench", "eval", "train"):
        assert scripts[f"mara-{name}"] == f"mara_deploy.commands.{name}:main"
    assert command("run", "--version") == CommandResult(0, f"mara-run (mara-deploy {version('mara-deploy')})\n", "")


# --- mara-run --------------------------------------------------------------------------------------------------------


def test_json_is_one_object_with_the_documented_keys(result, bundle) -> None:
    found = result("--prompt", HELLO, "--max-new-tokens", 30, "--schedule", "together")
    assert list(found) == RESULT_KEYS
    assert set(found["stats"]) == STATS_KEYS
    stats = found["stats"]
    assert len(found["token_ids"]) == stats["tokens"] <= 30
    assert sum(stats["candidate_counts"].values()) == stats["tokens"]
    several = sum(count for number, count in stats["candidate_counts"].items() if number != "1")
    assert stats["decisions"] == several > 0
    assert sum(stats["accepted_rank"].values()) + stats["forced"] == stats["decisions"]
    assert stats["examined"] >= stats["decisions"]
    assert stats["smallest_margin"] > 0
    assert 0 < stats["forwards"] <= stats["tokens"] <= stats["rows"] + 1
    assert stats["prefill_ms"] > 0
    assert stats["tokens_per_second"] == pytest.approx((stats["tokens"] - 1) / stats["decode_ms"] * 1e3, rel=0.01)
    assert stats["engine"]["name"] == "cpu"
    assert set(stats["engine"]["declined"]) == {"tensorrt", "tensorrt-rtx", "cuda"}
    assert set(stats["engine"]["declined"].values()) == {"the bundle was not exported for it (targets: cpu)"}
    assert found["finish_reason"] == ("stop" if found["token_ids"][-1] in checkpoints.EOS_IDS else "length")
    side = TextSide(Bundle.open(bundle("qwen2")))
    assert found["text"] == side.decode(found["token_ids"])
    assert stats["prompt_tokens"] == len(side.encode_chat([{"role": "user", "content": HELLO}]))
    assert found["config"]["fallback"] == "first"


def test_streamed_text_is_that_of_the_json_object(run, result) -> None:
    for options in (("--prompt", HELLO), ("--prompt", "日本語"), ("--input-ids", IDS, "--stop", "e", "--stop", "t")):
        streamed = run(*options, "--max-new-tokens", 60)
        found = result(*options, "--max-new-tokens", 60)
        assert streamed.out == found["text"] + "\n"
        assert not {"e", "t"} & set(found["text"]) or "--stop" not in options
        engine, agent, counters = streamed.err.splitlines()
        assert engine.startswith("engine cpu (onnxruntime ")
        assert agent == "agent agent, fallback first"
        assert counters.startswith(f"[{found['stats']['tokens']} tokens; ")
        assert counters.endswith(f"ended by {found['finish_reason']}]")


def test_a_prompt_is_the_same_however_it_is_given(tokens, bundle) -> None:
    side = TextSide(Bundle.open(bundle("qwen2")))
    user, system = {"role": "user", "content": HELLO}, {"role": "system", "content": "Be brief."}
    chat = tokens("--input-ids", ids(side.encode_chat([user])))
    assert tokens("--prompt", HELLO) == tokens(stdin=HELLO) == tokens(stdin=HELLO + "\n") == chat
    raw = tokens("--input-ids", ids(side.encode_raw(HELLO)).replace(",", " , "))
    assert tokens("--prompt", HELLO, "--raw") == raw
    brief = tokens("--input-ids", ids(side.encode_chat([system, user])))
    assert tokens("--prompt", HELLO, "--system", "Be brief.") == tokens("--system", "Be brief.", stdin=HELLO) == brief
    assert len({tuple(answer) for answer in (chat, raw, brief, tokens(stdin="Other"))}) == 4


def test_the_prompts_of_a_file_are_answered_at_once_as_each_is_alone(command, bundle, run, tokens, tmp_path) -> None:
    file = tmp_path / "prompts.json"
    asked = [HELLO, "日本語", [{"role": "user", "content": "Other"}], "One?", "Two?"]
    file.write_text(json.dumps([*asked, HELLO]))
    outcome = run("--prompts", file, "--conversations", 3, "--jsonl", "--max-new-tokens", 24)
    assert outcome.err == "mara-run: prompts.json repeats prompts: each is asked once\n"
    found = sorted(map(json.loads, outcome.out.splitlines()), key=lambda answer: answer["index"])
    assert [answer["prompt"] for answer in found] == asked
    assert list(found[0]) == ["index", "prompt", *RESULT_KEYS]
    alone = [tokens("--prompt", text) for text in (HELLO, "日本語", "Other", "One?", "Two?")]
    assert [answer["token_ids"] for answer in found] == alone

    file.write_text(json.dumps([HELLO, "long " * 300]))
    outcome = command("run", bundle("qwen2"), "--threads", 1, "--prompts", file, "--jsonl", "--max-new-tokens", 2)
    assert (outcome.code, json.loads(outcome.out.splitlines()[0])["index"]) == (1, 1)
    assert "tokens; this bundle holds" in outcome.out


def test_variables_reach_the_chat_template(result, bundle_copy) -> None:
    folder = bundle_copy()
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{% if loud %}!{% endif %}")
    quiet, loud = (
        result("--no-verify", "--prompt", HELLO, "--template", f"loud={value}", folder=folder)["stats"]["prompt_tokens"]
        for value in ("false", "true")
    )
    assert loud == quiet + 1


def test_alignment_is_that_of_the_options(tokens, result, reference) -> None:
    """Without it, the answer is Hugging Face's greedy search; accepting all or rejecting all changes nothing."""
    prompt = torch.tensor([list(map(int, IDS.split(",")))])
    plain = reference("qwen2").generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24
    )
    plain = plain[0, prompt.shape[1] :].tolist()
    found = result("--input-ids", IDS, "--no-align", "--max-new-tokens", 24)
    assert (found["token_ids"], found["stats"]["decisions"], found["stats"]["examined"]) == (plain, 0, 0)
    assert tokens("--input-ids", IDS) != plain
    for threshold in ("-1000", "1000"):
        found = result("--input-ids", IDS, "--max-new-tokens", 24, "--threshold", threshold)
        assert found["token_ids"] == plain
        assert found["stats"]["forced"] == (found["stats"]["decisions"] if threshold == "1000" else 0)
    assert tokens("--input-ids", IDS, "--threshold", "1000", "--fallback", "last") != plain
    one, together = (
        result("--input-ids", IDS, "--max-new-tokens", 24, "--schedule", schedule)
        for schedule in ("one-by-one", "together")
    )
    assert one["token_ids"] == together["token_ids"] == tokens("--input-ids", IDS)
    assert one["stats"]["examined"] == together["stats"]["examined"]
    assert one["stats"]["rows"] < together["stats"]["rows"]
    assert one["stats"]["forwards"] > together["stats"]["forwards"]


@pytest.mark.parametrize("options", [("--no-align", "--sample"), ("--strategy", "random")], ids=str)
def test_random_answers_follow_the_seed(tokens, options) -> None:
    drawn = {seed: tokens("--input-ids", IDS, *options, "--seed", seed) for seed in range(3)}
    assert tokens("--input-ids", IDS, *options, "--seed", 2) == drawn[2]
    assert tokens("--input-ids", IDS, *options) == drawn[0]
    assert len({tuple(answer) for answer in drawn.values()}) > 1
    if "--sample" in options:
        greedy = tokens("--input-ids", IDS, "--no-align")
        assert tokens("--input-ids", IDS, *options, "--top-k", 1) == greedy
        assert tokens("--input-ids", IDS, *options, "--temperature", 0.001) == greedy


@pytest.mark.parametrize("order", ["ranked", "reversed"])
def test_a_trace_has_a_line_per_token(result, tmp_path, order) -> None:
    path = tmp_path / "trace.jsonl"
    found = result("--input-ids", IDS, "--max-new-tokens", 40, "--order", order, "--trace", path)
    facts, *lines, end = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert (facts["config"], facts["prompt"]) == (found["config"], [int(token) for token in IDS.split(",")])
    assert (end["text"], end["finish_reason"]) == (found["text"], found["finish_reason"])
    assert "".join(line["piece"] for line in lines) == found["text"]
    assert [line["token"] for line in lines] == found["token_ids"]
    assert [line["position"] for line in lines] == [IDS.count(",") + 1 + i for i in range(len(lines))]
    margins = []
    for line in lines:
        candidates = line["candidates"]
        assert [c["rank"] for c in candidates] == list(range(1, len(candidates) + 1))
        assert sum(c["probability"] for c in candidates) == pytest.approx(1, abs=1e-4)
        assert sorted((c["probability"] for c in candidates), reverse=True) == [c["probability"] for c in candidates]
        assert candidates[line["rank"] - 1]["token"] == line["token"]
        asked = [c["margin"] for c in candidates if c["margin"] is not None]
        margins += asked
        if len(candidates) == 1:
            assert asked == []
        elif line["forced"]:
            assert len(asked) == len(candidates)
            assert max(asked) <= 0
        else:
            assert candidates[line["rank"] - 1]["margin"] > 0
            assert sum(margin > 0 for margin in asked) == 1  # the examination ends with it
    stats = found["stats"]
    assert len(margins) == stats["examined"]
    assert min(map(abs, margins)) == pytest.approx(stats["smallest_margin"])
    assert sum(line["forced"] for line in lines) == stats["forced"]
    counts = [str(len(line["candidates"])) for line in lines]
    assert {number: counts.count(number) for number in counts} == stats["candidate_counts"]


def test_no_verify_skips_only_the_checksums(command, tokens, bundle_copy) -> None:
    folder = bundle_copy()
    with (folder / "chat_template.jinja").open("a") as file:
        file.write(" ")
    assert command("run", folder, "--input-ids", IDS).code == 2
    assert tokens("--input-ids", IDS, "--no-verify", folder=folder) == tokens("--input-ids", IDS)


# --- output and processes --------------------------------------------------------------------------------------------


def test_a_process_sends_no_telemetry_and_no_traceback_to_a_reader_that_exits(bundle, tmp_path) -> None:
    """A reader such as `| head -c 1`; only in a process does Python write the rest again at exit."""
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    argv = [sys.executable, "-m", "mara_deploy.commands.run", bundle("qwen2"), "--threads", "1"]
    process = subprocess.Popen(
        [*argv, "--input-ids", IDS, "--json", "--max-new-tokens", "2"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "")
    assert not [path for path in tmp_path.rglob("*") if "microsoft" in str(path.relative_to(tmp_path)).lower()]


@pytest.mark.parametrize(
    ("name", "options"), [("run", ("--input-ids", IDS)), ("run", ("--input-ids", IDS, "--json")), ("inspect", ())]
)
def test_a_full_disk_behind_the_output_is_one_line(command, bundle, monkeypatch, name, options) -> None:
    monkeypatch.setattr(sys, "stdout", Path("/dev/full").open("w"))  # noqa: SIM115
    outcome = command(name, bundle("qwen2"), *options)
    sys.stdout.close()  # what is left goes nowhere
    assert outcome.refusal(f"mara-{name}") == "cannot write: No space left on device"


def test_json_can_be_written_where_the_output_is_not_utf_8(command, bundle, result, monkeypatch) -> None:
    options = ["--input-ids", IDS, "--max-new-tokens", 60, "--json"]
    expected = result(*options[:-1])
    assert not expected["text"].isascii()
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding="ascii"))
    assert command("run", bundle("qwen2"), *options, "--threads", 1).code == 0
    assert json.loads(data.getvalue())["text"] == expected["text"]


# --- mara-inspect ----------------------------------------------------------------------------------------------------


def test_inspect_shows_the_facts_and_as_json_the_manifest(command, bundle) -> None:
    folder = bundle("qwen2")
    outcome = command("inspect", folder)
    assert (outcome.code, outcome.err) == (0, "")
    for text in (
        str(folder),
        "qwen2, 2 layers, hidden size 64, vocabulary 320, ends at [257, 258]",
        "qwen2-agent.safetensors: 64 → 32 → 16 → 2, falls back to the first candidate",
        "fp32, lowering ort, for cpu",
        f"{MAX_CONTEXT} tokens of prompt and answer, {MAX_CANDIDATES} candidates",
        "yes, with a chat template",
        f"torch {torch.__version__}",
        "parity    passed: 4 prompts",
        "0 of ",
    ):
        assert text in outcome.out
    assert outcome.out.splitlines()[-1].startswith("intact ")
    outcome = command("inspect", folder, "--json")
    assert (outcome.code, outcome.err, outcome.out.count("\n")) == (0, "", 1)
    assert json.loads(outcome.out) == json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


# --- mara-export -----------------------------------------------------------------------------------------------------


@pytest.fixture
def export(command: Command, checkpoint, agent_file, tmp_path, monkeypatch) -> Command:
    """mara-export of the tiny Qwen2 without the gate, which must succeed; in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    model = ["--model", checkpoint("qwen2"), "--agent", agent_file("qwen2"), "--max-context", 64, "--no-gate"]

    def call(*options: object) -> CommandResult:
        outcome = command("export", *model, *options)
        assert outcome.code == 0, outcome.err
        return outcome

    return call


def test_export_ends_with_a_summary_and_a_command_that_runs(export, command) -> None:
    outcome = export("--max-candidates", 8)
    folder = Path("bundles/qwen2-qwen2-agent-cpu-fp32")
    summary = command("inspect", folder).out.splitlines()[:-1]
    assert outcome.out.splitlines() == [*summary, "", f'mara-run {folder} --prompt "…"']
    assert "NOT CHECKED" in outcome.out
    assert all(PROGRESS.fullmatch(line) for line in outcome.err.splitlines()), outcome.err
    assert "open qwen2 " in outcome.err
    program, *arguments = shlex.split(outcome.out.splitlines()[-1])
    assert program == "mara-run"
    assert command("run", *arguments, "--max-new-tokens", 2, "--threads", 1).code == 0


def test_several_targets_and_precisions_come_from_one_trace(export) -> None:
    targets, precisions = ("cpu", "cuda"), ("fp16", "int8")
    options = [*(("--target", t) for t in targets), *(("--precision", p) for p in (*precisions, "fp16"))]
    outcome = export(*(word for option in options for word in option), "--block-size", 16, "--out", "out")
    assert outcome.err.count("trace the LLM") == 1
    assert {path.name for path in Path("out").iterdir()} == {f"{t}-{p}" for t in targets for p in precisions}
    for target in targets:
        for precision in precisions:
            manifest = Bundle.open(Path("out") / f"{target}-{precision}").manifest
            assert (manifest.targets[0], manifest.step.precision) == (target, precision)
            assert (manifest.step.quantisation or {}).get("block_size") == (16 if precision == "int8" else None)
            assert f"mara-run out/{target}-{precision} " in outcome.out
    assert export("--lowering", "portable", "--out", "quiet", "--quiet") == CommandResult(0, "", "")
    assert Bundle.open("quiet").manifest.step.lowering == "portable"
