"""What an agent was trained under travels with it: from mara-train through its file and the bundle to mara-run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mara_deploy import agent as agents
from mara_runtime import AlignedDecoder, DecodeConfig
from tests import checkpoints
from tests.export.conftest import copy_model, edit_json

TEMPLATE = (
    "{{ bos_token }}{% if mood is defined %}({{ mood }}){% endif %}"
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SETTINGS = (
    *("--top-k", 3, "--top-p", 0.99, "--max-new-tokens", 4, "--prompts-at-once", 2, "--batch", 16, "--threads", 1),
    *("--replay-transitions", 200, "--updates-per-episode", 1, "--widths", 8, 4, "--fallback", "first"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory, checkpoint) -> Path:
    folder: Path = copy_model(checkpoint("llama"), tmp_path_factory.mktemp("model") / "chatty")
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


@pytest.fixture
def train(command, model, tmp_path, monkeypatch):
    """(folder, more options) → the agent's file."""
    monkeypatch.setattr("mara_deploy.train.report.write_report", lambda folder: None)
    (tmp_path / "p.txt").write_text("one\ntwo\n")

    def run(out: str, *more: object) -> Path:
        given = ["--model", model, "--prompts", tmp_path / "p.txt", "--score", "demo", "--out", tmp_path / out]
        assert command("train", *given, *SETTINGS, "--episodes", 8, "--quiet", *more).code == 0
        return tmp_path / out / "agent.safetensors"

    return run


def test_training_export_and_decoding_agree(command, train, model, tmp_path) -> None:
    agent = train("run", "--start-transitions", 4, "--template", 'mood="calm"')
    assert train("again", "--start-transitions", 4, "--template", 'mood="calm"').read_bytes() == agent.read_bytes()
    origin = agents.load(agent).origin
    assert (origin.top_k, origin.top_p, origin.template, origin.episodes) == (3, 0.99, {"mood": "calm"}, 8)
    assert origin.updates > 0
    assert origin.transitions > 0

    def export(name: str, source: Path, *more: object) -> tuple[Path, str]:
        given = ["--model", source, "--agent", agent, "--out", tmp_path / name, "--no-gate", "--max-context", 64]
        done = command("export", *given, *more)
        assert done.code == 0, done.err
        return (tmp_path / name).resolve(), " ".join(re.findall(r"note: (.*)", done.err))

    bundle, notes = export("a/x/../bundle", model)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["bundle"]
    assert notes == ""
    shown = command("inspect", bundle).out
    assert all(text in shown for text in ("trained for chatty", "8 episodes", "top-k 3, top-p 0.99", 'mood="calm"'))
    assert "note:" not in shown

    def run(folder: Path, *more: object) -> tuple[dict[str, Any], str]:
        done = command("run", folder, "--prompt", "hi", "--max-new-tokens", 4, "--threads", 1, "--json", *more)
        assert done.code == 0, done.err
        return json.loads(done.out), " ".join(re.findall(r"note: (.*)", done.err))

    as_trained, notes = run(bundle)
    assert notes == ""
    assert (as_trained["config"]["top_k"], as_trained["config"]["top_p"]) == (3, 0.99)
    assert (
        run(bundle, "--top-k", 3, "--top-p", 0.99, "--template", 'mood="calm"')[0]["token_ids"]
        == as_trained["token_ids"]
    )
    otherwise, notes = run(bundle, "--top-k", 5, "--template", 'mood="wild"')
    assert otherwise["config"]["top_k"] == 5
    assert "--top-k is 5, and was 3" in notes
    assert 'the template\'s mood is "wild", and was "calm"' in notes
    assert run(bundle, "--no-align")[1] == ""  # no agent runs
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
    config = DecodeConfig(max_new_tokens=4)
    expected = AlignedDecoder(bundle, threads=1).generate(begun, config, continue_final_message=True)
    assert run(bundle, "--prefill", "Well")[0]["token_ids"] == expected.token_ids

    other = checkpoints.make("llama", tmp_path / "other", seed=7)
    checkpoints.add_tokenizer(other, 384)
    foreign, notes = export("foreign", other, "--max-candidates", 2)
    assert "trained for chatty (llama), whose weights are not those of other" in notes
    assert "other has another" in notes
    result, notes = run(foreign)  # mood is no variable here
    assert result["config"]["top_k"] == 2
    assert all(text in notes for text in ("not those of other", "--top-k is 2, and was 3", "mood is unset"))
    assert "whose weights are not those of other" in command("inspect", foreign).out


def test_an_agent_that_learned_nothing_is_named_wherever_it_goes(command, train, model, tmp_path) -> None:
    agent = train("run", "--start-transitions", 190)
    given = ["--model", model, "--agent", agent, "--out", tmp_path / "b", "--no-gate", "--max-context", 64]
    for done in (
        command("export", *given),
        command("inspect", tmp_path / "b"),
        command("run", tmp_path / "b", "--prompt", "hi", "--max-new-tokens", 2, "--threads", 1),
    ):
        assert done.code == 0
        assert "it has learned nothing" in done.out + done.err
