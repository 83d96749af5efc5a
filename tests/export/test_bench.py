"""`mara-bench` on the demo's bundle: it runs through, and its last line is JSON of what it measured."""

from __future__ import annotations

import json

import pytest

from mara_deploy.demo import MODEL_FOLDER
from mara_deploy.demo.__main__ import export_demo


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--peer", "llama=x"], "--peer is 'llama=x'; it must be"),
        (["--peer", "genai=/nowhere/python:/nowhere"], "--peer genai: cannot run /nowhere/python"),
        (["--rounds", 0], "--rounds must be at least 1"),
        (["--tokens", 400], "leaves no context"),
        (["--engine", "tensorrt"], "mara: no engine can run"),
    ],
)
def test_bad_options_are_said_in_one_line(command, demo, options, said):
    done = command("bench", demo, *options)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
