"""The commands with good input: what they print, and how soon."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
import torch

from mara_runtime.bundle import Bundle
from mara_runtime.text import TextSide
from tests import checkpoints
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT, CommandResult

Command = Callable[..., CommandResult]
IDS = [72, 101, 108, 108, 111, 44, 220, 70]
HELLO = "Hello there"
RESULT_KEYS = ["token_ids", "text", "finish_reason", "stats", "config"]
STATS_KEYS = {
    "tokens",
    "decisions",
    "examined",
    "forced",
    "accepted_rank",
    "candidate_counts",
    "smallest_margin",
    "within_noise",
    "prompt_tokens",
    "reused_tokens",
    "forwards",
    "rows",
    "drafted",
    "confirmed",
    "prefill_ms",
    "decode_ms",
    "engine_ms",
    "tokens_per_second",
    "engine",
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


def ids(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


def test_the_commands_are_installed() -> None:
    scripts = {script.name: script.value for script in entry_points(group="console_scripts")}
    for name in ("export", "build", "run", "inspect", "memory", "bench", "eval", "train"):
        assert scripts[f"mara-{name}"] == f"mara_deploy.commands.{name}:main"


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


def test_streamed_text_is_the_json_objects_text(run, result) -> None:
    for prompt in (HELLO, "Why?", "日本語"):
        streamed = run("--prompt", prompt, "--max-new-tokens", 60)
        found = result("--prompt", prompt, "--max-new-tokens", 60)
        assert streamed.out == found["text"] + "\n"
        engine, agent, counters = streamed.err.splitlines()
        assert engine.startswith("engine cpu (onnxruntime ")
        assert agent == "agent qwen2-agent.safetensors, fallback first"
        assert counters.startswith(f"[{found['stats']['tokens']} tokens; ")
        assert counters.endswith(f"ended by {found['finish_reason']}]")


def test_standard_input_is_the_prompt(result) -> None:
    expected = result("--prompt", HELLO, "--max-new-tokens", 20)["token_ids"]
    for text in (HELLO, HELLO + "\n"):
        assert result("--max-new-tokens", 20, stdin=text)["token_ids"] == expected
    assert result("--max-new-tokens", 20, stdin="Other")["token_ids"] != expected


def test_input_ids_are_taken_as_they_are(result, bundle) -> None:
    side = TextSide(Bundle.open(bundle("qwen2")))
    chat = side.encode_chat([{"role": "user", "content": HELLO}])
    raw = side.encode_raw(HELLO)
    options = ["--max-new-tokens", 20]
    with_template = result("--prompt", HELLO, *options)
    assert with_template["token_ids"] == result("--input-ids", ids(chat), *options)["token_ids"]
    without = result("--prompt", HELLO, "--raw", *options)
    assert without["token_ids"] == result("--input-ids", ids(raw), *options)["token_ids"]
    assert without["token_ids"] != with_template["token_ids"]
    assert result("--input-ids", " 72, 101 ", *options)["stats"]["prompt_tokens"] == 2


def test_a_system_message(result, bundle) -> None:
    side = TextSide(Bundle.open(bundle("qwen2")))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": HELLO}]
    found = result("--prompt", HELLO, "--system", "Be brief.", "--max-new-tokens", 20)
    assert (
        found["token_ids"]
        == result("--input-ids", ids(side.encode_chat(messages)), "--max-new-tokens", 20)["token_ids"]
    )
    stdin = result("--system", "Be brief.", "--max-new-tokens", 20, stdin=HELLO)
    assert stdin["token_ids"] == found["token_ids"]


@pytest.mark.parametrize(
    ("architecture", "lowering"), [("qwen2", "ort"), ("qwen3", "portable"), ("llama", "portable"), ("mistral", "ort")]
)
def test_plain_decoding_is_hugging_faces_greedy_search(result, bundle, reference, architecture, lowering) -> None:
    model = reference(architecture)
    for prompt in checkpoints.random_prompts(2, seed=11, length=9):
        given = torch.tensor([prompt])
        with torch.no_grad():
            expected = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=48)[
                0, 9:
            ].tolist()
        options = ["--input-ids", ids(prompt), "--no-align", "--max-new-tokens", 48]
        found = result(*options, folder=bundle(architecture, lowering))
        assert found["token_ids"] == expected
        assert found["finish_reason"] == ("stop" if expected[-1] in checkpoints.EOS_IDS else "length")
        assert found["stats"]["decisions"] == found["stats"]["examined"] == 0


def test_alignment_changes_the_text_and_an_agent_that_accepts_all_does_not(result) -> None:
    plain = result("--input-ids", ids(IDS), "--no-align", "--max-new-tokens", 40)
    aligned = result("--input-ids", ids(IDS), "--max-new-tokens", 40)
    assert aligned["token_ids"] != plain["token_ids"]
    for threshold in ("-1000", "1000"):  # all accepted; all rejected, and the first is the fallback
        found = result("--input-ids", ids(IDS), "--max-new-tokens", 40, "--threshold", threshold)
        assert found["token_ids"] == plain["token_ids"]
        assert found["stats"]["forced"] == (found["stats"]["decisions"] if threshold == "1000" else 0)
    last = result("--input-ids", ids(IDS), "--max-new-tokens", 40, "--threshold", "1000", "--fallback", "last")
    assert last["token_ids"] != plain["token_ids"]
    assert last["config"]["fallback"] == "last"


def test_sampling_follows_the_seed(result) -> None:
    def sampled(*options: object) -> list[int]:
        more = ["--no-align", "--sample", "--max-new-tokens", 40]
        return result("--input-ids", ids(IDS), *more, *options)["token_ids"]

    assert sampled("--seed", 3) == sampled("--seed", 3)
    assert sampled() == sampled("--seed", 0)
    assert len({tuple(sampled("--seed", seed)) for seed in range(4)}) > 1
    greedy = result("--input-ids", ids(IDS), "--no-align", "--max-new-tokens", 40)["token_ids"]
    assert sampled("--top-k", 1) == greedy
    assert sampled("--temperature", 0.001) == greedy


def test_the_random_strategy_follows_the_seed(result) -> None:
    def drawn(seed: int) -> list[int]:
        options = ["--strategy", "random", "--seed", seed, "--max-new-tokens", 40]
        return result("--input-ids", ids(IDS), *options)["token_ids"]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(4)}) > 1


def test_the_schedule_changes_the_work_alone(result) -> None:
    one, together = (
        result("--input-ids", ids(IDS), "--max-new-tokens", 40, "--schedule", schedule)
        for schedule in ("one-by-one", "together")
    )
    assert one["token_ids"] == together["token_ids"]
    assert one["stats"]["examined"] == together["stats"]["examined"]
    assert one["stats"]["rows"] < together["stats"]["rows"]
    assert one["stats"]["forwards"] > together["stats"]["forwards"]


def test_stop_texts(run, result) -> None:
    whole = result("--input-ids", ids(IDS), "--max-new-tokens", 60)
    text = whole["text"]
    stops = [piece for piece in (text[4:6], text[10:13], text[20:21]) if "\ufffd" not in piece]
    assert stops
    for stop in stops:
        found = result("--input-ids", ids(IDS), "--max-new-tokens", 60, "--stop", stop)
        assert found["text"] == text[: text.index(stop)]
        assert found["finish_reason"] == "stop"
        assert found["token_ids"] == whole["token_ids"][: len(found["token_ids"])]
        assert len(found["token_ids"]) < len(whole["token_ids"])
        streamed = run("--input-ids", ids(IDS), "--max-new-tokens", 60, "--stop", stop)
        assert streamed.out == found["text"] + "\n"
    first = min(stops, key=text.index)
    several = result("--input-ids", ids(IDS), "--max-new-tokens", 60, *(o for s in stops for o in ("--stop", s)))
    assert several["text"] == text[: text.index(first)]
    absent = result("--input-ids", ids(IDS), "--max-new-tokens", 60, "--stop", "not in there")
    assert absent["token_ids"] == whole["token_ids"]


def test_the_capacity_ends_an_answer(result) -> None:
    long = checkpoints.random_prompts(1, seed=2, length=MAX_CONTEXT - 5)[0]
    found = result("--input-ids", ids(long))
    assert found["finish_reason"] == ("stop" if found["token_ids"][-1] in checkpoints.EOS_IDS else "length")
    assert len(found["token_ids"]) <= 5
    widest = result("--input-ids", ids(long), "--top-k", MAX_CANDIDATES, "--top-p", 1, "--threshold", 1000)
    assert max(map(int, widest["stats"]["candidate_counts"])) == MAX_CANDIDATES


@pytest.mark.parametrize("order", ["ranked", "reversed"])
def test_a_trace_has_a_line_a_token(result, tmp_path, order) -> None:
    path = tmp_path / "trace.jsonl"
    found = result("--input-ids", ids(IDS), "--max-new-tokens", 40, "--order", order, "--trace", path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["token"] for line in lines] == found["token_ids"]
    assert [line["position"] for line in lines] == [len(IDS) + i for i in range(len(lines))]
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
    counts: dict[str, int] = {}
    for line in lines:
        counts[str(len(line["candidates"]))] = counts.get(str(len(line["candidates"])), 0) + 1
    assert counts == stats["candidate_counts"]


def test_no_verify_skips_the_checksums_alone(result, bundle_copy, command) -> None:
    folder = bundle_copy()
    expected = result("--input-ids", ids(IDS), "--max-new-tokens", 5)["token_ids"]
    with (folder / "chat_template.jinja").open("a") as file:
        file.write(" ")
    assert command("run", folder, "--input-ids", ids(IDS)).code == 2
    assert result("--input-ids", ids(IDS), "--max-new-tokens", 5, "--no-verify", folder=folder)["token_ids"] == expected


def test_a_reader_that_exits_causes_no_traceback(bundle) -> None:
    """As `| head -c 1` does. In a process: Python writes what is left once more when it exits."""
    argv = [sys.executable, "-m", "mara_deploy.commands.run", bundle("qwen2"), "--threads", "1"]
    process = subprocess.Popen(
        [*argv, "--input-ids", ids(IDS), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == ""


@pytest.mark.parametrize(
    ("name", "options"),
    [("run", ("--input-ids", ids(IDS))), ("run", ("--input-ids", ids(IDS), "--json")), ("inspect", ())],
)
def test_a_full_disk_behind_the_output_is_one_line(command, bundle, monkeypatch, name, options) -> None:
    monkeypatch.setattr(sys, "stdout", Path("/dev/full").open("w"))  # noqa: SIM115
    outcome = command(name, bundle("qwen2"), *options)
    sys.stdout.close()  # what is left goes nowhere
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == f"mara-{name}: error: cannot write: No space left on device"
    assert "Traceback" not in outcome.err


def test_json_reaches_an_output_that_is_not_utf_8(command, bundle, result, monkeypatch) -> None:
    expected = result("--input-ids", ids(IDS), "--max-new-tokens", 60)
    assert not expected["text"].isascii()
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding="ascii"))
    options = ["--input-ids", ids(IDS), "--json", "--max-new-tokens", 60, "--threads", 1]
    assert command("run", bundle("qwen2"), *options).code == 0
    assert json.loads(data.getvalue())["text"] == expected["text"]


def test_the_version(command) -> None:
    outcome = command("run", "--version")
    assert (outcome.code, outcome.out) == (0, f"mara-run (mara-deploy {version('mara-deploy')})\n")


def test_onnx_runtime_sends_no_telemetry_unless_it_is_allowed(bundle, tmp_path) -> None:
    argv = [sys.executable, "-m", "mara_deploy.commands.run", bundle("qwen2"), "--input-ids", ids(IDS)]
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([*argv, "--max-new-tokens", "2"], capture_output=True, env=environment, check=True)
    assert not [path for path in tmp_path.rglob("*") if "microsoft" in str(path.relative_to(tmp_path)).lower()]


# --- mara-inspect ----------------------------------------------------------------------------------------------------


def test_inspect(command, bundle) -> None:
    folder = bundle("llama")
    outcome = command("inspect", folder)
    assert (outcome.code, outcome.err) == (0, "")
    for text in (
        str(folder),
        "llama, 3 layers, hidden size 64, vocabulary 384, ends at [257, 258]",
        "llama-agent.safetensors: 64 → 32 → 16 → 2, falls back to the first candidate",
        "fp32, lowering ort, for cpu",
        f"{MAX_CONTEXT} tokens of prompt and answer, {MAX_CANDIDATES} candidates",
        "yes, with a chat template",
        f"torch {torch.__version__}",
        "parity    passed: 4 prompts",
        "0 of ",
    ):
        assert text in outcome.out
    assert outcome.out.splitlines()[-1].startswith("intact ")


def test_inspect_json_is_the_manifest(command, bundle) -> None:
    outcome = command("inspect", bundle("llama"), "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("\n") == 1
    assert json.loads(outcome.out) == json.loads((bundle("llama") / "manifest.json").read_text(encoding="utf-8"))


# --- mara-export -----------------------------------------------------------------------------------------------------


def test_the_line_that_an_export_ends_with_runs(command, checkpoint, agent_file, tmp_path) -> None:
    model = ["--model", checkpoint("qwen2"), "--agent", agent_file("qwen2"), "--max-context", 64]
    done = command("export", *model, "--max-candidates", 8, "--no-gate", "--out", tmp_path / "few")
    program, *arguments = shlex.split(done.out.splitlines()[-1])
    assert program == "mara-run"
    assert command("run", *arguments, "--max-new-tokens", 2, "--threads", 1).code == 0


def test_export_prints_progress_apart_from_its_summary(command, checkpoint, agent_file, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model", checkpoint("qwen2"), "--agent", agent_file("qwen2"), "--max-context", 64]
    outcome = command("export", *options)
    assert outcome.code == 0
    folder = Path("bundles/qwen2-qwen2-agent-cpu-fp32")
    inspected = command("inspect", folder).out.splitlines()
    assert outcome.out.splitlines() == [*inspected[:-1], "", f'mara-run {folder} --prompt "…"']
    assert outcome.err.startswith("mara-export: loading PyTorch and Optimum …\n  load qwen2 ")
    assert str(tmp_path) not in outcome.out
    again = command("export", *options)
    assert again.code == 2
    assert all(text in again.err for text in (str(folder), "exists"))
    quiet = command("export", *options, "--quiet", "--out", "quiet", "--lowering", "portable")
    assert quiet == CommandResult(0, "", "")
    assert Bundle.open("quiet").manifest.step.lowering == "portable"


def test_several_precisions_come_from_one_trace(command, checkpoint, agent_file, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = ["--model", checkpoint("qwen2"), "--agent", agent_file("qwen2"), "--max-context", 64]
    several = [*source, "--precision", "fp16", "--precision", "int8", "--block-size", 16, "--precision", "fp16"]
    outcome = command("export", *several)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("trace the LLM") == 1
    names = ["qwen2-qwen2-agent-cpu-fp16", "qwen2-qwen2-agent-cpu-int8"]
    assert sorted(path.name for path in Path("bundles").iterdir()) == names
    made = [Bundle.open(Path("bundles") / name).manifest for name in names]
    assert [manifest.step.precision for manifest in made] == ["fp16", "int8"]
    assert made[1].step.quantisation["block_size"] == 16
    assert all(manifest.parity["passed"] for manifest in made)
    for name in names:
        assert f"mara-run bundles/{name} " in outcome.out

    assert command("export", *several, "--out", "out", "--target", "cuda", "--quiet") == CommandResult(0, "", "")
    assert sorted(path.name for path in Path("out").iterdir()) == ["cuda-fp16", "cuda-int8"]
    one = command("export", *source, "--precision", "fp16", "--out", "one", "--quiet")
    assert one == CommandResult(0, "", "")
    alone = Bundle.open("one").manifest.files["step.onnx.data"].sha256
    assert alone == made[0].files["step.onnx.data"].sha256  # the same weights as when exported with others


# --- chat on a terminal ----------------------------------------------------------------------------------------------


class Terminal:
    """A command with a terminal for all three of its streams."""

    def __init__(self, argv: list[str]) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(slave)

    def read_until(self, pattern: str, seconds: float = 30) -> str:
        """What appears on the screen, up to a match of `pattern` at its end, or up to the end of the process."""
        text, end = "", time.monotonic() + seconds
        while not re.search(pattern + r"\Z", text):
            ready, _, _ = select.select([self.master], [], [], end - time.monotonic())
            assert ready, f"no {pattern!r} in {text!r}"
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux: the other side is closed
                data = b""
            if not data:
                break
            text += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return text

    def write(self, text: str) -> None:
        os.write(self.master, text.encode())

    def hang_up(self) -> None:
        os.close(self.master)
        self.master = -1

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.master >= 0:
            self.hang_up()


@pytest.fixture
def terminal() -> Any:
    opened: list[Terminal] = []

    def open_terminal(argv: list[object]) -> Terminal:
        opened.append(Terminal([str(a) for a in argv]))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_a_chat(terminal, bundle, tmp_path, run, result) -> None:
    trace = tmp_path / "trace.jsonl"
    options = ["--max-new-tokens", 12, "--threads", 1, "--trace", trace, "--top-k", 8]
    screen = terminal([sys.executable, "-m", "mara_deploy.commands.run", bundle("qwen2"), *options])
    head = screen.read_until("> ")
    assert "engine cpu" in head
    assert "Ctrl-D exits" in head
    answers = []
    for text in ("Hello", "And then?"):
        screen.write(text + "\n")
        turn = screen.read_until(r"ended by \w+\]\n> ")
        answers.append(turn)
        assert "error" not in turn
    screen.write("\n")
    assert "(new conversation)" in screen.read_until("> ")
    screen.write("Hello\n")
    answers.append(screen.read_until(r"ended by \w+\]\n> "))
    screen.write("zz" * MAX_CONTEXT + "\n")
    assert "error: the prompt has" in screen.read_until("> ")  # and the session goes on
    screen.write("\x04")
    rest = screen.read_until("never")
    assert screen.process.wait(timeout=30) == 0
    assert "Traceback" not in rest

    lines = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    turns: list[list[Any]] = []
    for line in lines:
        if not turns or line["position"] != turns[-1][-1]["position"] + 1:
            turns.append([])
        turns[-1].append(line)
    assert len(turns) == 3
    side = TextSide(Bundle.open(bundle("qwen2")))
    first = side.decode([line["token"] for line in turns[0]])
    user = {"role": "user", "content": "Hello"}
    followed = [user, {"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    # Where a turn begins says what went before it: the whole conversation, and nothing after the empty line.
    assert turns[0][0]["position"] == turns[2][0]["position"] == len(side.encode_chat([user]))
    assert turns[1][0]["position"] == len(side.encode_chat(followed))
    tokens = [[line["token"] for line in turn] for turn in turns]
    assert tokens[0] == tokens[2] == result("--prompt", "Hello", *options[:2], "--top-k", 8)["token_ids"]
    expected = result("--input-ids", ids(side.encode_chat(followed)), *options[:2], "--top-k", 8)
    assert tokens[1] == expected["token_ids"]


def in_an_answer(terminal, bundle) -> Terminal:
    """A chat in the middle of an answer that takes seconds: sixty-four passes a token."""
    slow = ["--schedule", "one-by-one", "--top-k", MAX_CANDIDATES, "--top-p", 1, "--threshold", 1000, "--threads", 1]
    screen = terminal([sys.executable, "-m", "mara_deploy.commands.run", bundle("qwen3"), *slow])
    screen.read_until("> ")
    screen.write("Hello\n")
    screen.read_until(r"Hello\n(?s:.)+")
    return screen


def test_an_interrupt_stops_an_answer_and_a_termination_the_chat(terminal, bundle) -> None:
    screen = in_an_answer(terminal, bundle)
    screen.write("\x03")
    text = screen.read_until(r"\(stopped; your message was discarded\)\n> ")
    assert "ended by" not in text
    time.sleep(0.5)  # Python's own line reader misses a signal between the prompt and its wait
    screen.write("half a line")
    text += screen.read_until("half a line")
    screen.write("\x03")  # discards what was typed
    text += screen.read_until(r"\n> ")
    screen.write("Hello\n")
    screen.read_until(r"Hello\n(?s:.)+")
    screen.process.terminate()  # in the middle of an answer
    text += screen.read_until("never")
    assert screen.process.wait(timeout=30) == 2
    assert "mara-run: error: interrupted" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("options", [["--json"], ["--raw"]])
def test_a_terminal_without_a_prompt_is_a_chat_and_nothing_else(command, bundle, options) -> None:
    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    outcome = command("run", bundle("qwen2"), *options, stdin=Keyboard())
    assert outcome.code == 2
    assert all(text in outcome.err for text in ("--json", "--raw", "--prompt"))


def test_a_terminal_that_closes_leaves_nothing_behind(terminal, checkpoint, agent_file, tmp_path) -> None:
    """As when a connection is lost; there is nowhere to write to then."""
    options = ["--model", checkpoint("llama"), "--agent", agent_file("llama"), "--out", tmp_path / "new" / "bundle"]
    screen = terminal([sys.executable, "-m", "mara_deploy.commands.export", *options])
    screen.read_until("run the reference(?s:.)*")
    assert any((tmp_path / "new").iterdir())
    screen.hang_up()
    assert screen.process.wait(timeout=60) == 2
    assert not any(tmp_path.iterdir())


def test_variables_reach_the_chat_template(command, bundle, bundle_copy) -> None:
    folder = bundle_copy()
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{% if loud %}!{% endif %}")
    quiet = command("run", folder, "--no-verify", "--prompt", "Hello", "--json", "--template", "loud=false")
    loud = command("run", folder, "--no-verify", "--prompt", "Hello", "--json", "--template", "loud=true")
    tokens = [json.loads(outcome.out)["stats"]["prompt_tokens"] for outcome in (quiet, loud)]
    assert tokens[1] == tokens[0] + 1
