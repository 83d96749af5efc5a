"""`mara-bench` on the demo's bundle: it runs through, and its last line is JSON of what it measured."""

from __future__ import annotations

import json
import sys

import pytest

from mara_deploy.demo import MODEL_FOLDER, export_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return export_demo(tmp_path_factory.mktemp("bench") / "demo", quiet=True, max_context=256).folder


def test_it_measures_itself_and_hugging_face(command, demo):
    done = command(
        "bench", demo, "--rounds", 1, "--tokens", 8, "--context", 32, "--peer", f"hugging-face={MODEL_FOLDER}"
    )
    assert (done.code, done.err) == (0, "")
    table, _, last = done.out.rstrip().rpartition("\n")
    figures = json.loads(last)
    assert set(figures["steps"]["32"]) == {"mara", "hugging-face"}
    assert figures["steps"]["32"]["mara"]["ms"]["median"] > 0
    assert figures["memory"]["mara"] > 1e6
    assert figures["contestants"]["hugging-face"]["versions"]["transformers"]
    for profile in figures["profiles"]:
        ways = profile["ways"]
        assert ways["plain"]["ratio"]["median"] == 1.0
        assert ways["aligned"]["passes_per_token"] > 0
        assert 0 <= ways["aligned"]["host_share"] < 1
    assert figures["profiles"][0]["gain_over_hugging_face_serial"] > 0
    for words in ("plain greedy step", "peak memory", "a pass by its rows", "Hugging Face, one candidate a pass"):
        assert words in table


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
        *("--profile", 1, "--profile", 4, "--peer", f"genai={peer}:model"),
    )
    assert (done.code, done.err) == (0, "")
    assert "genai, plain: 500.0 tokens/s; of it plain is ×" in done.out
    first, repeated = json.loads(done.out.splitlines()[-1])["profiles"]
    for profile, ways in ((first, {"plain", "aligned"}), (repeated, {"plain", "aligned", "drafting"})):
        against = profile["peers"]["genai"]["mara_to_its_plain"]
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
    done = command("bench", demo, "--measure", "steps", "--context", 32, "--peer", f"genai={peer}:model")
    assert done.code == 2
    assert done.err.startswith("mara-bench: error: genai ")
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
    ("options", "said"),
    [
        (["--peer", "llama=x"], "--peer is 'llama=x'; it must be"),
        (["--peer", "mara=x"], "--peer is 'mara=x'; it must be"),
        (["--peer", "genai=/a:/b", "--peer", "genai=/c:/d"], "--peer names genai twice; leave one of them out"),
        (["--peer", "hugging-face=/nowhere"], "hugging-face: "),
        (["--peer", "genai=/nowhere/python:/nowhere"], "--peer genai: cannot run /nowhere/python"),
        (["--rounds", 0], "--rounds must be at least 1"),
        (["--tokens", 400], "leaves no context"),
        (["--engine", "tensorrt"], "mara: no engine can run"),
        (["--threads", 0], "--threads is 0; it must be at least 1"),
        (["--context", 250], "holds 256 tokens, which leaves 1 to 159"),
        (["--context", 0], "--context is 0; "),
        (["--measure", "steps", "--profile", 2], "--profile needs 'profiles' among --measure"),
    ],
)
def test_bad_options_are_said_in_one_line(command, demo, options, said):
    done = command("bench", demo, *options)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
