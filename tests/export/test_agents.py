"""Agents added to a bundle after its export: the gate, and decoding with them.

What happens to the files is tested in tests/unit/test_bundle_agents.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from mara_deploy.agent import Agent, untrained
from mara_export.agents import NamedAgent, add_agent, remove_agent
from mara_export.errors import ParityError
from mara_export.export import finish
from mara_export.options import ExportOptions
from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.bundle import Bundle
from mara_runtime.training import Training
from tests import checkpoints, oracle
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT
from tests.export.test_bad_input import rewrite
from tests.export.test_export import contents
from tests.unit.helpers import TRAINING

MIX = {"agent": 0.5, "other": -1.5}


@pytest.fixture(scope="module")
def other(reference: Callable[[str], Any]) -> Agent:
    """A second agent of the tiny Qwen2, of other widths, that accepts about 60 % too."""
    states = checkpoints.sample_states(reference("qwen2"), seed=7)
    agent = Agent(64, (16, 24))
    agent.load_state_dict(checkpoints.make_agent(64, seed=7, widths=(16, 24), sample_states=states).state_dict())
    return agent.eval()


def named(agent: Any, name: str = "other") -> NamedAgent:
    return NamedAgent(name, f"{name}.safetensors", agent)


@pytest.mark.parametrize("lowering", ["ort", "portable"])
def test_two_agents_and_a_mix_decode_as_the_oracle(bundle_copy, reference, agent, other, lowering) -> None:
    """Each alone, and the mix; the graph is that of the export, byte for byte."""
    folder = bundle_copy("qwen2", lowering)
    before = contents(folder)
    bundle = add_agent(Bundle.open(folder), named(other))
    after = contents(folder)
    assert {name for name in before | after if before.get(name) != after.get(name)} == {
        *("manifest.json", "agents/other.safetensors"),
    }
    assert Bundle.open(folder) == bundle
    decoder, agents = AlignedDecoder(folder, threads=1), {"agent": agent("qwen2"), "other": other}
    answers = []
    for mix in ({"agent": 1.0}, {"other": 1.0}, MIX, {"other": 1.0, "agent": 0.0}):
        options = {"max_new_tokens": 12, "top_k": 8, "fallback": "first"}

        def judge(states: torch.Tensor, mix: dict[str, float] = mix) -> torch.Tensor:
            return sum((part * agents[name](states) for name, part in mix.items() if part), torch.zeros(1))

        for prompt in checkpoints.random_prompts(2, seed=5, length=9):
            expected = oracle.decode(
                reference("qwen2"), judge, prompt, eos_ids=reference("qwen2").generation_config.eos_token_id, **options
            )
            found = decoder.generate(prompt, DecodeConfig(**options, agents=mix))
            assert found.token_ids == expected.token_ids, mix
            answers.append(found.token_ids)
    assert answers[6:] == answers[2:4]  # a part of 0 changes nothing
    assert len({*map(tuple, answers[:6])}) > 4
    plain = remove_agent(bundle, "other")
    assert (contents(folder)["step.onnx"], called(plain)) == (before["step.onnx"], ["agent"])


def called(bundle: Bundle) -> list[str]:
    return [agent.name for agent in bundle.manifest.agents]


@pytest.mark.parametrize(
    ("target", "precision"), [("cpu", "fp32"), ("cpu", "int8"), ("cpu", "fp16"), ("tensorrt", "fp16")]
)
def test_the_gate_reports_what_the_export_s_reports(traced, agent, tmp_path, target, precision) -> None:
    """The same agent, once as it was exported and once added: the noise is of the same size, whatever the weights."""
    options = ExportOptions(target=target, precision=precision, max_context=MAX_CONTEXT, max_candidates=MAX_CANDIDATES)
    folder = tmp_path / "bundle"
    exported = finish(traced("qwen2"), options, folder)
    added = add_agent(Bundle.open(folder), named(agent("qwen2"))).manifest.agent("other")
    before = exported.manifest.agents[0]
    assert set(added.parity) == set(before.parity)
    assert added.parity["rows"] > before.parity["rows"]  # of every width
    assert added.parity["margins"]["greatest_difference"] < 1e-5  # the LLM's error is not the agent's
    assert before.noise / 3 <= added.noise <= before.noise * 3
    assert (added.hidden_size, added.widths, added.training) == (64, (32, 16), None)


# --- the gate fails --------------------------------------------------------------------------------------------------


class Wrong:
    """An agent whose file holds something else than its margins say."""

    def __init__(self, agent: Agent, file: Agent) -> None:
        self._agent, self._file = agent, file
        self.fallback, self.origin = agent.fallback, agent.origin
        self.hidden_size, self.widths = agent.hidden_size, agent.widths

    def margin(self, states: torch.Tensor) -> torch.Tensor:
        return self._agent.margin(states)

    def save(self, path: Path) -> None:
        self._file.save(path)


def nudged(agent: Agent) -> Agent:
    """Nearly the same agent."""
    near = untrained(agent.hidden_size, 0, agent.widths)
    near.load_state_dict(agent.state_dict())
    with torch.no_grad():
        near.output_linear.bias[1] += 3e-3
    return near.eval()


def overflowing(agent: Agent) -> Agent:
    """Finite weights, and margins of inf - inf."""
    far = untrained(agent.hidden_size, 0, agent.widths)
    with torch.no_grad():
        far.linear2.weight.fill_(3e38)
        far.linear1.bias.fill_(10)
    return far.eval()


@pytest.mark.parametrize("fault", ["file", "overflow", "graph"])
def test_the_gate_catches(bundle_copy, agent, other, fault) -> None:
    folder = bundle_copy()
    if fault == "graph":
        damage_agents(folder)
    agents = {"file": Wrong(other, nudged(other)), "overflow": overflowing(other), "graph": other}
    before = contents(folder)
    with pytest.raises(ParityError, match=r"the agent other has other margins in the graph .*margins: .*not changed"):
        add_agent(Bundle.open(folder), named(agents[fault]))
    assert contents(folder) == before
    unchecked = add_agent(Bundle.open(folder), named(agents[fault]), gate=False).manifest.agent("other")
    assert (unchecked.parity, unchecked.noise) == (None, None)


def damage_agents(folder: Path) -> None:
    """The second layer of the graph's agents leaves out its ReLU."""
    model = onnx.load(folder / "step.onnx", load_external_data=False)
    relu = [node for node in model.graph.node if node.name.startswith("agents/") and node.op_type == "Relu"][-1]
    relu.op_type = "Identity"
    onnx.save(model, folder / "step.onnx")
    rewrite(folder)


# --- the command -----------------------------------------------------------------------------------------------------


def test_an_agent_is_added_and_decodes(command, bundle_copy, other, tmp_path) -> None:
    folder, file = bundle_copy(), tmp_path / "my agent.safetensors"
    other.save(file)
    added = command("agent", "add", folder, file, "--quiet")
    assert (added.code, added.out, added.err) == (0, "", "")
    shown = command("agent", "add", folder, file, "--name", "again", "--default")
    assert shown.code == 0
    assert [line.split()[0] for line in shown.out.splitlines() if line[:1].strip()] == [
        *("again", "agent", "my-agent", "mara-run"),
    ]
    run = command("run", folder, "--prompt", "Hello", "--max-new-tokens", 3, "--threads", 1, "--json")
    assert json.loads(run.out)["config"]["agents"] == {"again": 1.0}
    listed = json.loads(command("agent", "list", folder, "--json").out)
    assert [agent["source"] for agent in listed] == [
        *("my agent.safetensors", "qwen2-agent.safetensors", "my agent.safetensors"),
    ]
    assert str(tmp_path) not in (folder / "manifest.json").read_text(encoding="utf-8")
    assert command("agent", "remove", folder, "again").code == 0
    assert called(Bundle.open(folder)) == ["agent", "my-agent"]
    rewrite(folder, lambda manifest: manifest.update(tokenizer=None))  # the gate takes random tokens then
    assert (
        command("agent", "add", folder, file, "--replace")
        .out.splitlines()[-1]
        .endswith("--agent my-agent --input-ids 1,2,3")
    )


def test_doubts_about_its_training_are_noted(command, bundle_copy, tmp_path) -> None:
    elsewhere = untrained(64, 3, (8, 8))
    elsewhere.origin = replace(Training(**TRAINING), chat_template=None)
    elsewhere.save(tmp_path / "a.safetensors")
    added = command("agent", "add", bundle_copy(), tmp_path / "a.safetensors", "--no-gate")
    assert "note: the agent a may not align this model: it was trained for example/tiny" in added.err
    assert "it was trained on prompts as plain text" in added.out


def test_what_cannot_be_added_is_named_and_nothing_changes(command, bundle_copy, agent_file, tmp_path) -> None:
    folder = bundle_copy()
    untrained(32, 0, (8, 8)).save(tmp_path / "small.safetensors")
    (tmp_path / "text.safetensors").write_text("no agent")
    before = contents(folder)
    for argv, told in (
        ((tmp_path / "small.safetensors",), "hidden size of 32; qwen2 has 64"),
        ((tmp_path / "text.safetensors",), "cannot be read as safetensors"),
        ((tmp_path,), "which is a folder with small.safetensors in it: pass "),
        ((tmp_path / "none.pth",), "no agent file found at"),
        (("demo",), "the agent demo works only with the model demo"),
        ((agent_file("qwen2"), "--name", "agent"), "has an agent agent already: give --replace, or another --name"),
        ((agent_file("qwen2"), "--name", "../up"), "an agent cannot be called '../up'"),
    ):
        assert told in command("agent", "add", folder, *argv).refusal("mara-agent")
        assert contents(folder) == before
