"""`mara-bench` on the demo's bundle: it runs through, and its last line is JSON of what it measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mara_deploy.bench.measure import PROFILES
from mara_deploy.demo import MODEL_FOLDER

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(command, bundle):
    """(option, …) → CommandResult of one round of eight tokens."""
    return lambda *options: command("bench", bundle("demo"), *("--rounds", 1, "--tokens", 8, "--context", 32), *options)


@pytest.fixture
def peer(tmp_path):
    """(name, about=…, answer=…) → a --peer that answers each request with an expression of it, or ends at once."""

    def make(name: str, answer: str | None, **about: Any) -> str:
        lines = [
            f"#!{sys.executable}",
            "import json, sys",
            f"print(json.dumps({ ({'name': name, 'versions': {}} | about)!r}), flush=True)",
        ]
        if answer is not None:
            lines += [
                "for line in sys.stdin:",
                "    request = json.loads(line)",
                f"    print(json.dumps({answer}), flush=True)",
            ]
        (tmp_path / name).write_text("\n".join(lines))
        (tmp_path / name).chmod(0o755)
        return f"{name}={tmp_path / name} model"

    return make


def figures(done) -> dict[str, Any]:
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out.splitlines()[-1])


def test_it_measures_itself(bench):
    done = bench()
    found = figures(done)
    assert found["steps"]["32"]["mara"]["ms"]["median"] > 0
    assert found["prefill"]["32"]["mara"]["ms"]["median"] > 0
    assert found["memory"]["mara"] > 1e6
    assert len(found["profiles"]) == len(PROFILES)
    for profile in found["profiles"]:
        plain, aligned, serial = (profile["ways"][way] for way in ("plain", "aligned", "one-by-one"))
        assert plain["ratio"]["median"] == 1.0
        assert aligned["passes_per_token"] > 0
        assert 0 <= aligned["host_share"] < 1
        expected = plain["passes_per_token"] / serial["passes_per_token"]
        assert serial["expected_ratio"] == pytest.approx(expected, rel=0.5)
    for way in ("plain", "aligned"):
        assert found["conversations"]["mara"][way]["1"]["ratio"]["median"] == 1.0
        assert found["conversations"]["mara"][way]["8"]["tokens_per_second"]["median"] > 0
    for words in ("plain greedy step", "peak memory", "a pass by its rows", "synthetic acceptance 5: "):
        assert words in done.out


def test_aligned_decoding_is_compared_with_a_peer_s_plain_steps(bench, peer):
    tokens, step_ms = 8, 2.0
    steady = peer("steady", '{"ms": [2.0] * request["tokens"]}')
    done = bench("--measure", "profiles", "--profile", 1, "--profile", 4, "--peer", steady)
    first, repeated = figures(done)["profiles"]
    assert "steady, plain: 500.0 tokens/s; of it plain is ×" in done.out
    for profile, ways in ((first, {"plain", "aligned"}), (repeated, {"plain", "aligned", "drafting"})):
        against = profile["peers"]["steady"]["mara_to_its_plain"]
        assert ways <= set(against)
        for way, ratio in against.items():  # an answer's first token comes from its prompt: the others are compared
            ours_ms = (tokens - 1) / profile["ways"][way]["tokens_per_second"] * 1e3
            assert ratio["median"] == pytest.approx((tokens - 1) * step_ms / ours_ms)


def test_several_conversations_are_compared_with_one_and_with_a_peer(bench, bundle, command, peer):
    several = peer("several", '{"tokens": 8, "ms": 16.0 / request["conversations"]}', conversations=3)
    single = peer("single", None)
    options = ("--measure", "conversations", "--conversations", "2,4")
    done = bench(*options, "--peer", several, "--peer", single)
    found = figures(done)["conversations"]
    assert {name: set(ways) for name, ways in found.items()} == {"mara": {"plain", "aligned"}, "several": {"plain"}}
    assert set(found["mara"]["plain"]) == {"1", "2", "4"}
    medians = {n: [values[key]["median"] for key in values] for n, values in found["several"]["plain"].items()}
    assert medians == {"1": [500.0, 1.0], "2": [1000.0, 2.0]}
    assert "without 4: it holds 3 at once" in done.out
    full = command("bench", bundle("demo"), "--rounds", 1, "--tokens", 2, "--context", 253, "--quiet", *options)
    assert full.refusal("mara-bench").startswith("mara: 4 conversations of 253 tokens: the bundle has no room")


def test_a_peer_that_examines_one_candidate_at_a_time_is_compared_with_aligned_decoding(bench, peer):
    """It is slow, and so not asked for a prefill."""
    answer = '{"ms": [2.0] * request["tokens"] if request["do"] == "decode" else 7.0 * request["tokens"]}'
    slow = peer("slow", answer, serial=True)
    done = bench("--measure", "prefill,steps,profiles", "--profile", 1, "--peer", slow)
    found = figures(done)
    assert set(found["steps"]["32"]) == {"mara", "slow"}
    assert set(found["prefill"]["32"]) == {"mara"}
    serial = found["profiles"][0]["serial"]["slow"]
    assert serial["ms_per_token"] == pytest.approx(7.0)
    assert serial["gain"] > 0
    assert "slow, one pass per candidate" in done.out


def test_hugging_face_is_a_peer():
    """In this process: its command is that of the other peers, see tests/unit/test_bench_peers.py."""
    script = ROOT / "benchmarks" / "peers" / "hugging_face.py"
    spec = importlib.util.spec_from_file_location("hugging_face", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    peer = module.HuggingFace(str(MODEL_FOLDER), 1)
    assert peer.describe()["serial"]
    assert peer.describe()["versions"]["transformers"]
    for context in (12, 12, 5):  # cached, cut back, filled again
        assert len(peer.decode(context, 3)["ms"]) == 3
    assert peer.prefill(20)["ms"] > 0
    step, passes = peer._step, []
    peer._step = lambda token: passes.append(token) or step(token)
    everything = {"decisions": 1.0, "accept": 1.0}
    assert peer.serial(everything, 8, 4)["ms"] > 0
    assert len(passes) == 4, "a pass for each accepted candidate"
    peer.serial({**everything, "accept": 0.0}, 8, 4)
    assert len(passes) > 4 + 2 * 4, "and one for each that is rejected"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--peer", "broken=false"], "broken "),
        (["--peer", "absent=/nowhere/python x"], "/nowhere/python"),
        (["--engine", "tensorrt"], "mara: no engine can run"),
        (None, "dying "),  # after it has started
    ],
)
def test_a_contestant_that_fails_is_named_in_one_line(bench, peer, options, named):
    done = bench("--measure", "steps", *(options or ("--peer", peer("dying", None))))
    assert done.code == 2
    assert done.err.startswith("mara-bench: error: ")
    assert named in done.err
    assert done.err.count("\n") == 1
