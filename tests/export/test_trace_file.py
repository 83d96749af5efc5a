"""Traces of answers that several agents judge, beside plain decoding's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mara_deploy.agent import Agent
from mara_deploy.see.reader import read_trace
from mara_deploy.see.summary import accepted_ranks, parting
from mara_deploy.trace import TraceFile
from mara_export.agents import NamedAgent, add_agent
from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.bundle import Bundle
from tests import checkpoints

MIX = {"agent": 0.5, "other": -1.5}
CONFIG = DecodeConfig(agents=MIX, max_new_tokens=16, top_k=6, top_p=1.0, threshold=-0.25)


@pytest.fixture(scope="module")
def other(reference):
    states = checkpoints.sample_states(reference("qwen2"), seed=7)
    agent = Agent(64, (16, 24))
    agent.load_state_dict(checkpoints.make_agent(64, seed=7, widths=(16, 24), sample_states=states).state_dict())
    return agent.eval()


def test_both_answers_come_from_shared_passes_and_the_margins_are_pytorch_s(
    bundle_copy, reference, agent, other, tmp_path
) -> None:
    folder = bundle_copy("qwen2")
    add_agent(Bundle.open(folder), NamedAgent("other", "other.safetensors", other))
    decoder, path = AlignedDecoder(folder, threads=1), Path(tmp_path / "trace.jsonl")
    prompts = ["Hello", [{"role": "user", "content": "And then?"}]]
    with path.open("w") as file:
        trace = TraceFile(decoder, lambda line: file.write(json.dumps(line) + "\n"), beside_plain=True)
        streamed = ["".join(piece.text for piece in trace.stream(prompt, CONFIG)) for prompt in prompts]
    found = read_trace(path)
    assert [answer.facts["beside"] for answer in found] == [None, 0, None, 2]
    alone = AlignedDecoder(folder, threads=1)
    model, agents = reference("qwen2"), {"agent": agent("qwen2"), "other": other}
    checked = 0
    for i, prompt in enumerate(prompts):
        aligned, plain = found[2 * i : 2 * i + 2]
        for answer, config in ((aligned, CONFIG), (plain, replace(CONFIG, align=False))):
            expected = alone.generate(prompt, config)
            assert [token["token"] for token in answer.tokens] == expected.token_ids
            assert (answer.text, answer.finish_reason) == (expected.text, expected.finish_reason)
            assert (accepted_ranks(answer), answer.kinds["forced"]) == (
                expected.stats.accepted_rank,
                expected.stats.forced,
            )
        assert streamed[i] == aligned.text
        assert (at := parting(aligned, plain)) is not None
        assert {*plain.kinds} == {"plain"}
        assert aligned.tokens[at]["rank"] > 1
        ids = alone.encode(prompt, agents=MIX)
        for token in aligned.tokens:
            for candidate in token["candidates"]:
                if candidate["margin"] is None:
                    assert candidate["margins"] is None
                    continue
                text = torch.tensor([[*ids, candidate["token"]]])
                state = model(text, output_hidden_states=True).hidden_states[-1][0, -1:]
                judged = {name: agents[name](state)[0] for name in MIX}
                expected_margins = {name: float(accept - reject) for name, (reject, accept) in judged.items()}
                assert candidate["margins"] == pytest.approx(expected_margins, abs=1e-4)
                mixed = sum(part * candidate["margins"][name] for name, part in MIX.items())
                assert candidate["margin"] == pytest.approx(mixed, abs=1e-4)
                checked += 1
            ids.append(token["token"])
    assert checked > 40
