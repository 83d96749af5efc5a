"""`mara-bench` on the demo's bundle: it runs through, and its last line is JSON of what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mara_deploy.bench.measure import PROFILES
from mara_deploy.demo import MODEL_FOLDER, export_demo

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return export_demo(tmp_path_factory.mktemp("bench") / "demo", quiet=True, max_context=256).folder


def test_it_measures_itself(command, demo):
    done = command("bench", demo, "--rounds", 1, "--tokens", 8, "--context", 32)
    assert (done.code, done.err) == (0, "")
    table, _, last = done.out.rstrip().rpartition("\n")
    figures = json.loads(last)
    assert figures["steps"]["32"]["mara"]["ms"]["median"] > 0
    assert figures["prefill"]["32"]["mara"]["ms"]["median"] > 0
    assert figures["memory"]["mara"] > 1e6
    assert len(figures["profiles"]) == len(PROFILES)
    for profile in figures["profiles"]:
        ways = profile["ways"]
        assert ways["plain"]["ratio"]["median"] == 1.0
        assert ways["aligned"]["passes_per_token"] > 0
        assert 0 <= ways["aligned"]["host_share"] < 1
    for words in ("plain greedy step", "peak memory", "a pass by its rows", "synthetic acceptance 5: "):
        assert words in table


def test_hugging_face_is_measured_one_candidate_at_a_time(command, demo):
    peer = f"hugging-face={sys.executable} {PEERS / 'hugging_face.py'} {MODEL_FOLDER}"
    options = ["--rounds", 1, "--tokens", 8, "--context", 32, "--measure", "prefill,steps,profiles", "--profile", 1]
    done = command("bench", demo, *options, "--peer", peer)
    assert (done.code, done.err) == (0, "")
    figures = json.loads(done.out.splitlines()[-1])
    assert set(figures["steps"]["32"]) == {"mara", "hugging-face"}
    assert set(figures["prefill"]["32"]) == {"mara"}  # the other one is slow
    assert figures["contestants"]["hugging-face"]["versions"]["transformers"]
    serial = figures["profiles"][0]["serial"]["hugging-face"]
    assert serial["gain"] > 0
    assert serial["ms_per_token"] > 0
    assert "hugging-face, one pass per candidate" in done.out


STAND_IN = """#!{python}
import json, sys
print(json.dumps({{"name": "steady", "versions": {{}}}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    assert request["do"] == "decode", request
    print(json.dumps({{"ms": [2.0] * request["tokens"]}}), flush=True)
"""


def test_aligned_decoding_is_compared_with_a_peer_s_plain_steps(command, demo, tmp_path):
    peer = tmp_path / "peer"
    peer.write_text(STAND_IN.format(python=sys.executable))
    peer.chmod(0o755)
    tokens, step_ms = 8, 2.0
    done = command(
        *("bench", demo, "--rounds", 1, "--tokens", tokens, "--context", 32, "--measure", "profiles"),
        *("--profile", 1, "--profile", 4, "--peer", f"steady={peer} model"),
    )
    assert (done.code, done.err) == (0, "")
    assert "steady, plain: 500.0 tokens/s; of it plain is ×" in done.out
    first, repeated = json.loads(done.out.splitlines()[-1])["profiles"]
    for profile, ways in ((first, {"plain", "aligned"}), (repeated, {"plain", "aligned", "drafting"})):
        against = profile["peers"]["steady"]["mara_to_its_plain"]
        assert ways <= set(against)
        for way, ratio in against.items():  # an answer's first token comes from its prompt: the others are compared
            ours_ms = (tokens - 1) / profile["ways"][way]["tokens_per_second"] * 1e3
            assert ratio["median"] == pytest.approx((tokens - 1) * step_ms / ours_ms)


DYING = """#!{python}
import json
print(json.dumps({{"name": "dying", "versions": {{}}}}), flush=True)
"""


def test_a_contestant_that_ends_too_early_is_named(command, demo, tmp_path):
    peer = tmp_path / "peer"
    peer.write_text(DYING.format(python=sys.executable))
    peer.chmod(0o755)
    done = command("bench", demo, "--measure", "steps", "--context", 32, "--peer", f"dying={peer}")
    assert done.code == 2
    assert done.err.startswith("mara-bench: error: dying ")
    assert done.err.count("\n") == 1


def test_a_prompt_of_several_chunks_and_few_candidates(command, tmp_path):
    bundle = export_demo(tmp_path / "demo", quiet=True, max_context=512, max_candidates=4).folder
    done = command("bench", bundle, "--rounds", 2, "--tokens", 8, "--context", 420, "--measure", "profiles")
    assert (done.code, done.err) == (0, "")
    for profile in json.loads(done.out.splitlines()[-1])["profiles"]:
        one_by_one = profile["ways"]["one-by-one"]
        assert one_by_one["expected_ratio"] == pytest.approx(
            profile["ways"]["plain"]["passes_per_token"] / one_by_one["passes_per_token"], rel=0.5
        )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--peer", "broken=false"], "broken "),
        (["--peer", "absent=/nowhere/python x"], "/nowhere/python"),
        (["--engine", "tensorrt"], "mara: no engine can run"),
    ],
)
def test_a_contestant_that_does_not_start_is_one_line(command, demo, options, named):
    done = command("bench", demo, "--measure", "steps", *options)
    assert done.code == 2
    assert named in done.err
    assert done.err.count("\n") == 1
